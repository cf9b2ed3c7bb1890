"""The examples in the docstrings run and give what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["sft", "reward_model", "ppo", "grpo", "dpo", "kto"])
def test_the_example_of_an_algorithm_runs(name):
    failed, tried = doctest.testmod(importlib.import_module(f"rlhfjax.algorithms.{name}"))
    assert tried > 0 and failed == 0
