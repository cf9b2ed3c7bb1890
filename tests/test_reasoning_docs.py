"""The code of docs/reasoning.md runs, block by block, and prints what the page says of it."""

import re
from pathlib import Path

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "reasoning.md").read_text()
QUESTIONS, COUNTDOWN, PASS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def printed(block: str, capsys) -> str:
    exec(compile(block, "docs", "exec"), {"__name__": "docs"})
    return capsys.readouterr().out


def test_a_question_and_its_answers(capsys):
    found = re.fullmatch(
        r"(\d\d)\+(\d\d) -> (\d+) by (\S*;)=(\d+)\n\[1.0, 1.0, 0.0\]\n", printed(QUESTIONS, capsys)
    )
    assert found and int(found[1]) + int(found[2]) == int(found[3]) == int(found[5])


def test_countdowns_verifier(capsys):
    first, second = printed(COUNTDOWN, capsys).splitlines()
    assert first == "[1.0, 0.0, 0.0]" and second.startswith(
        "None Value(value=Fraction(24, 1), numbers=(6, 1, 3, 4)"
    )


def test_pass_at_k_of_a_quarter(capsys):
    rows = [[float(x) for x in re.findall(r"[\d.]+", line)] for line in printed(PASS, capsys).splitlines()]
    assert rows[0] == [0, 0, 0] and rows[3] == [1, 1, 1]
    assert rows[1] == [0.0625, 0.25, 1] and abs(rows[2][1] - (1 - 495 / 1820)) < 1e-6  # C(12, 4), C(16, 4)


def test_the_tables_examples_are_right():
    from rlhfjax.environments.text import reasoning

    assert "`132`; with `steps` `" + reasoning.column_steps([47, 85]) + "=132`" in PAGE
    assert "`406`; with `steps` `" + reasoning.product_steps(7, 58) + "=406`" in PAGE
