"""The examples in the docstrings run and give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "rlhfjax").rglob("*.py"))
    if ">>> " in path.read_text()
]


def test_there_are_examples():
    """Those of the algorithms, and of functions of the rooms that are used most."""
    assert len(MODULES) >= 28
    for room in ("algorithms", "ops", "rewards", "recipes"):
        assert any(name.startswith(f"rlhfjax.{room}.") for name in MODULES), room


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0 and failed == 0
