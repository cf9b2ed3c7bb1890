"""Sorting numbers, spelling words backwards, and counting letters.

31 4 15    -> 4 15 31
planet     -> tenalp
s:assess   -> 4
"""

from typing import Literal

from rlhfjax.environments.text.reasoning.questions import (
    Draw,
    Question,
    ReasoningTask,
    between,
    check_range,
    verify_answer,
)

_CONSONANTS, _VOWELS = "bdfghklmnprstvz", "aeiou"


def sorting(
    *, numbers: tuple[int, int] = (3, 5), largest: int = 99, descending: bool = False
) -> ReasoningTask:
    """Between low and high numbers from 0 to `largest`, to be put in order. ValueError for settings out of range."""
    check_range("numbers", numbers, 2)
    if largest < 1:
        raise ValueError(f"largest={largest} must be at least 1")

    def make(draw: Draw) -> Question:
        given = [draw(largest + 1) for _ in range(between(draw, numbers))]
        answer = " ".join(map(str, sorted(given, reverse=descending)))
        return Question(" ".join(map(str, given)), answer, answer, " ".join(map(str, sorted(given))))

    return ReasoningTask("sorting", make, verify_answer, one_answer=True)


def spelling(
    kind: Literal["backward", "count"] = "backward", *, length: tuple[int, int] = (4, 6), steps: bool = False
) -> ReasoningTask:
    """Words of between low and high letters, spelt backwards, or one of their letters counted.

    The words are made up, a consonant and a vowel in turn, so that there are enough of any length. Those whose letters
    are counted have few different ones.

    steps: of counting, whether `worked` counts along the word: "t0 a1 m1 a2=2" of a:tama.

    ValueError for settings out of range.
    """
    check_range("length", length, 2)
    if kind not in ("backward", "count"):
        raise ValueError(f'kind must be "backward" or "count", got {kind!r}')
    if steps and kind == "backward":
        raise ValueError("steps are for counting: a word is spelt backwards in one")

    def backward(draw: Draw) -> Question:
        word = _word(draw, between(draw, length), _CONSONANTS, _VOWELS)
        return Question(word, word[::-1], word[::-1], word)

    def count(draw: Draw) -> Question:
        word = _word(draw, between(draw, length), "mst", "ae")
        letter = "mstae"[draw(5)]
        answer = str(word.count(letter))
        along = " ".join(f"{x}{word[: i + 1].count(letter)}" for i, x in enumerate(word))
        return Question(
            f"{letter}:{word}", answer, f"{along}={answer}" if steps else answer, f"{letter}:{word}"
        )

    return ReasoningTask(
        "spelling", backward if kind == "backward" else count, verify_answer, one_answer=True
    )


def _word(draw: Draw, length: int, consonants: str, vowels: str) -> str:
    first = draw(2)
    parts = [vowels if (first + i) % 2 else consonants for i in range(length)]
    return "".join(part[draw(len(part))] for part in parts)
