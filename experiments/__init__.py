"""The experiments: each file is one, and `python experiments/run.py` runs them."""
