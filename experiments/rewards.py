"""Rewards in plain Python, to try and to copy: `python experiments/run.py own_reward --rewards FILE.py:FUNCTION`.

A reward takes lists of texts, and the data's columns as further keywords; it gives a number for each completion, or
None where it does not apply.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def words_from_the_prompt(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """Share of a completion's words that its prompt has: nothing is made up."""
    return [
        _share([word in _words(prompt) for word in _words(completion)])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def no_repetition(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """Share of a completion's words that it has not used before."""
    del prompts
    found = []
    for completion in completions:
        words = _words(completion)
        found.append(_share([word not in words[:i] for i, word in enumerate(words)]))
    return found


def sentiment(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """How positive a completion is, from -1 to 1: VADER's compound score (Hutto and Gilbert 2014), by a lexicon."""
    del prompts
    analyzer = _vader()
    return [analyzer.polarity_scores(completion)["compound"] for completion in completions]


@lru_cache(maxsize=1)
def _vader() -> Any:
    if find_spec("vaderSentiment") is None:
        raise ValueError('the reward `sentiment` needs VADER: pip install "rlhfjax[chat]"')
    return import_module("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()


def _words(text: str) -> list[str]:
    return text.lower().split()


def _share(true: Sequence[bool]) -> float:
    return sum(true) / len(true) if true else 0.0
