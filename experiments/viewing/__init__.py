"""The comparison of runs that there are: `python experiments/compare.py RUN RUN...`."""
