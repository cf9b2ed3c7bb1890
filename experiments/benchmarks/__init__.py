"""Benchmarks of the steps a run is made of; `python experiments/benchmarks/run.py` measures them."""
