"""The code of docs/chat.md runs, and learns what the page says."""

import re

import pytest
from test_docs_q_learning import blocks, run

NEEDED, TALK, LEARNING = blocks("chat.md")


@pytest.mark.slow
def test_the_model_learns_to_say_what_it_hears_between_its_turns(capsys):
    """What to say is told only in between, at random; a third of the answers are right by chance."""
    printed = run("\n".join((NEEDED, TALK, LEARNING)), capsys)
    assert re.match(
        r"user a word\nassistant  \w+\nuser  \w+\nassistant  \w+\n\[\[2 2\]\] \[\[False False\]\]", printed
    )
    before, after = (float(x) for x in re.findall(r"\d\.\d+", printed))
    assert before < 0.6 and after > 0.95
