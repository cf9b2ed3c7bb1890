"""The code of docs/environments.md runs, block by block, and prints what the page says."""

import re
from pathlib import Path

import pytest
from test_docs_q_learning import blocks, run

PAGE = "environments.md"
DOOR, ACTING, REPLAY, WRITING, THEIRS, OURS, WORDS, PLAYED, SPOKEN = blocks(PAGE)


@pytest.mark.parametrize("block", [DOOR, ACTING, WRITING, OURS], ids=["door", "acting", "writing", "ours"])
def test_a_block_prints_what_stands_beside_it(block, capsys):
    """The comments behind `print`, up to a colon, are the output."""
    if "gymnasium" in block:
        pytest.importorskip("gymnasium")
    printed = " ".join(run(block, capsys).split())
    for said in re.findall(r"print\(.*\)  # (.*)", block):
        if said == "15 each":
            assert printed.count("15.") == 8
        else:
            assert said.split(":")[0] in printed or said in printed


def test_the_final_observation_is_not_that_of_the_next_episode(capsys):
    own, other = re.findall(r"episode: +(-?[\d.]+)", run(ACTING, capsys))
    assert own != other


def test_catch_is_learnt_from_replay(capsys):
    (caught,) = re.findall(r"caught (-?[\d.]+)", run(REPLAY, capsys))
    assert float(caught) == 1.0


def test_their_environments_are_acted_in(capsys):
    pytest.importorskip("gymnasium")
    assert re.fullmatch(r"\(100, 2\) episodes that ended [1-9]\d*\n", run(THEIRS, capsys))


def test_games_in_words_become_episodes(capsys):
    printed = run(WORDS, capsys)
    assert "> move" in printed and "the game was won" in printed
    (score,) = re.findall(r"mean score (-?[\d.]+)", printed)
    assert -100 < float(score) < -6.83  # the optimum, and nothing reaches it with random moves


def test_a_language_model_plays(capsys):
    score, shape = run(PLAYED, capsys).split("\n", 1)
    assert float(score) < -30 and shape.strip() == "(16, 51)"


def test_a_text_world_answers_in_words(capsys):
    pytest.importorskip("gymnasium")
    assert re.fullmatch(r"You are in row \d.*\nYou are in row \d.* -1.0\n", run(SPOKEN, capsys))


def test_the_worlds_of_the_page_exist():
    from rlhfjax import environments
    from rlhfjax.environments import text

    page = (Path(__file__).resolve().parents[1] / "docs" / PAGE).read_text()
    table = page[page.index("| world |") : page.index("## Acting")]
    names = re.findall(r"`(\w+)\(", table)
    assert len(names) >= 11
    assert all(hasattr(environments, name) or hasattr(text, name) for name in names)
