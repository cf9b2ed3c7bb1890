"""Rewards in plain Python, to try and to copy: `python experiments/run.py own_reward --rewards FILE.py:FUNCTION`.

A reward takes lists of texts, and the data's columns as further keywords; it gives a number for each completion, or
None where it does not apply.
"""

from collections.abc import Sequence


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


def _words(text: str) -> list[str]:
    return text.lower().split()


def _share(true: Sequence[bool]) -> float:
    return sum(true) / len(true) if true else 0.0
