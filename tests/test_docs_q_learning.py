"""The code of docs/q_learning.md runs, block by block, and finds what the page says."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def run(block: str, capsys) -> str:
    """What the block prints."""
    exec(compile(block, "docs", "exec"), {"__name__": "docs"})
    return capsys.readouterr().out


def numbers(block: str, capsys) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", run(block, capsys))]


TABLE, CART_POLE, WHOLE_RUN, TURNS, SOFT = blocks("q_learning.md")


def test_a_table_of_values_is_the_exact_one(capsys):
    learnt, exact = numbers(TABLE, capsys)
    assert learnt == exact == -9.7332


@pytest.mark.slow
def test_cart_pole_is_balanced_for_longer_than_by_chance(capsys):
    score, best, steps = numbers(CART_POLE, capsys)
    assert (best, steps) == (500, 81_920) and score > 60  # random play: 22


def test_the_whole_run_is_one_program(capsys):
    # Of 60 iterations of 32 steps the first 15 leave the replay below its 500; each of the others makes 4 updates.
    assert numbers(WHOLE_RUN, capsys) == [1920, 180]


def test_values_guide_a_clone_through_the_better_door(capsys):
    """Players take door 2 one time in five, and a clone as often."""
    found = re.findall(r"beta ([\d.]+): door 2 in (\d+)%", run(TURNS, capsys))
    (plain_beta, plain), (beta, guided) = ((float(x), float(share)) for x, share in found)
    assert (plain_beta, beta) == (0, 4)
    assert 10 <= plain <= 30 and guided >= 80


@pytest.mark.slow
def test_soft_q_learning_reaches_the_optimum_from_all_texts(capsys):
    reference, found = numbers(SOFT, capsys)
    assert reference > 0.3 and found <= 1e-3


def test_the_experiments_of_the_page_exist():
    names = re.findall(r"python experiments/run.py (\w+)", (DOCS / "q_learning.md").read_text())
    assert names and all((DOCS.parent / "experiments" / f"{name}.py").exists() for name in names)


def test_the_pages_that_are_linked_exist():
    for page in ("q_learning.md", "environments.md", "referee.md"):
        for link in re.findall(r"\]\((\w+\.md)\)", (DOCS / page).read_text()):
            assert (DOCS / link).exists(), (page, link)


def test_the_distances_are_those_of_the_referee():
    """The page quotes its table at beta 0.5."""
    rows = (DOCS / "referee.md").read_text().splitlines()
    page = " ".join((DOCS / "q_learning.md").read_text().split())
    quoted = re.search(
        r"expectile values ([\d.]+) away and values of the reference ([\d.]+) at beta 0.5", page
    )
    assert quoted
    for name, distance in zip(("ILQL", "values of the reference"), quoted.groups(), strict=True):
        (row,) = [row for row in rows if row.startswith(f"| tabular | {name}") and "| 0.5 |" in row]
        assert f"{float(row.split('|')[4]):.2f}" == distance
