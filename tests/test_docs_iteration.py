"""The code of docs/iteration.md runs, and learns what the page says."""

import re

import pytest
from test_docs_q_learning import blocks, run

FIRST, ONE, MANY, RUNS, HOST = blocks("iteration.md")


@pytest.mark.slow
def test_the_ways_to_iterate(capsys):
    """Each block after the first goes on from it."""
    printed = run("\n".join((FIRST, ONE, MANY, RUNS, HOST)), capsys)
    device, host = (float(x) for x in re.findall(r"share of even tokens ([\d.]+)", printed))
    assert device > 0.85 and host > 0.85
    assert "(30,)" in printed
    free, held = (float(x) for x in re.findall(r"([\d.]+) with", printed))
    assert free > 2 * held
