"""The code of docs/rewards.md runs, and gives what the page says."""

import re

import pytest
from test_docs_q_learning import DOCS, blocks, run

import rlhfjax.rewards
from rlhfjax.rewards import chrf

DEVICE, SUM, OWN, SHAPING = blocks("rewards.md")


def test_rewards_on_the_device_one_by_one_and_together(capsys):
    printed = run(DEVICE + SUM, capsys)
    found, together = ([float(x) for x in re.findall(r"-?\d+\.\d*", line)] for line in printed.splitlines())
    texts, wanted = ("Das ist ein Haus.", "das das das das", "Dies ist das Haus"), "Das ist ein Haus."
    expected = [chrf(a, b) for a, b in zip(texts, (wanted, wanted, "Das ist das Haus."), strict=True)]
    assert found == pytest.approx([*expected, 1.0, 0.0, 0.0], abs=1e-3)
    repeats = (0.0, -0.5, 0.0)
    for x, score, repeated in zip(together, expected, repeats, strict=True):
        assert abs(x - ((score - 0.4) / 0.2 + 2 * repeated)) < 1e-3


def test_own_rewards_and_shaping(capsys):
    score = [
        float(x)
        for x in re.findall(
            r"-?\d\.\d+", run("texts = ['Das ist ein Haus.', 'das das das das', 'x y z w']\n" + OWN, capsys)
        )
    ]
    assert score == [0.8, -0.2, -0.2]
    assert re.findall("True|False", run(SHAPING, capsys)) == ["True", "True"]


def test_the_table_names_what_there_is():
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "rewards.md").read_text(), re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(names) == 14
    for name in names:
        assert hasattr(rlhfjax.rewards, f"{name}_reward") and hasattr(rlhfjax.rewards, f"{name}_on_device"), (
            name
        )
