"""The code of docs/dialogue.md runs, and the page names what there is."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "dialogue.md").read_text()
GAMES, PLAYING = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run(block: str, capsys) -> str:
    """What the block prints."""
    exec(compile(block, "docs", "exec"), {"__name__": "docs"})
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_careless_player_stays_below_the_optimum(capsys):
    out = run(GAMES, capsys)
    optimum = float(re.findall(r"scores (\S+)", out)[0])
    score, turns = (float(re.findall(rf"{name} (\S+)", out)[-1]) for name in ("score", "turns"))
    assert 6.0 < optimum < 10.0 and score < optimum - 2.0 and 1.0 < turns <= 5.0
    assert out.count("Guess who it is.") == 1 and "> " in out


@pytest.mark.slow
def test_an_iteration_starts_at_no_kl_and_no_gap(capsys):
    found = dict(re.findall(r"(score|KL|gap) (\S+)", run(PLAYING, capsys)))
    assert abs(float(found["KL"])) < 1e-3 and float(found["gap"]) < 1e-3 and float(found["score"]) < 0


def test_what_the_page_names_exists():
    names = re.findall(r"python experiments/run.py (\w+)", PAGE)
    assert names and all((DOCS.parent / "experiments" / f"{name}.py").exists() for name in names)
    pages = re.findall(r"\((\w+\.md)\)", PAGE)
    assert pages and all((DOCS / page).exists() for page in pages)
