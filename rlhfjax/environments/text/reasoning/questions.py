"""Questions with answers that can be checked, as a pure function of (seed, index), and never in two splits.

What a question asks, written in one way (`Question.key`: 12+34 and 34+12 share theirs), decides its split by a hash.
So a question of the test split is none of the training split's, whatever their seeds, counts and other settings.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Draw = Callable[[int], int]  # a whole number from 0 to below the argument, each as likely
Verifier = Callable[
    ..., list[float | None]
]  # (prompts, completions, *, reference, **columns), as host rewards are

_HELD_OUT = 10  # a tenth of all keys is validation, another is test
_PATIENCE = 2000  # draws without a new question after which there are none left


class Question(NamedTuple):
    """A question, its answer, and how it may be reached."""

    prompt: str
    answer: str  # one that is right
    worked: str  # the answer behind its steps, where steps are asked for: what fine-tuning learns
    key: str  # what is asked, however it is put


class ReasoningTask(NamedTuple):
    """A kind of question: how to draw one, and how to tell whether a completion answers it."""

    name: str
    draw: Callable[[Draw], Question]
    verify: Verifier  # 1.0 for a right completion, else 0.0
    one_answer: (
        bool  # whether only `answer` is right, behind the last "=" or alone: it can be checked on the device
    )


def draws(seed: int, index: int) -> Draw:
    """The random numbers of a question, from raw Philox words, whose stream NumPy keeps fixed across versions."""
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative; they are {seed} and {index}")
    bits = np.random.Philox(key=np.array([seed, index], np.uint64))
    return lambda below: int(bits.random_raw()) % below


def split_of(key: str) -> Split:
    """The split that a question of this key belongs to."""
    part = zlib.crc32(key.encode()) % _HELD_OUT
    return "test" if part == 0 else "validation" if part == 1 else "train"


def question(task: ReasoningTask, split: Split, *, seed: int, index: int) -> Question:
    """Question number `index`, drawn until it is one of the split; two indices may give the same.

    ValueError where the task has hardly a question of this split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {list(SPLITS)}, got {split!r}")
    draw = draws(seed, index)
    for _ in range(_PATIENCE):
        found = task.draw(draw)
        if split_of(found.key) == split:
            return found
    raise ValueError(
        f"{task.name}: none of {_PATIENCE} questions is of the {split} split; ask for harder ones"
    )


def distinct_questions(task: ReasoningTask, split: Split, count: int, *, seed: int) -> list[Question]:
    """The first `count` questions of a split that ask different things.

    ValueError where there are no more, with how many there are about.
    """
    found: dict[str, Question] = {}
    index = missed = 0
    while len(found) < count:
        one = question(task, split, seed=seed, index=index)
        missed = missed + 1 if one.key in found else 0
        if missed > _PATIENCE:
            raise ValueError(
                f"{task.name} has about {len(found)} different questions of the {split} split, and {count} are asked "
                "for: ask for fewer, or for harder ones"
            )
        found.setdefault(one.key, one)
        index += 1
    return list(found.values())


def rows_of(questions: Sequence[Question], split: str) -> list[dict[str, Any]]:
    """Rows for a JSONL file: prompt, completion (worked), answer and split."""
    return [
        {"prompt": q.prompt, "completion": q.worked, "answer": q.answer, "split": split} for q in questions
    ]


def final_answer(completion: str) -> str:
    """What stands behind the last "=", or all of it where there is none."""
    return completion.rpartition("=")[2].strip()


def verify_answer(
    prompts: Sequence[str], completions: Sequence[str], *, reference: Sequence[str], **_: object
) -> list[float | None]:
    """1.0 where the final answer is that of the reference, character by character; else 0.0."""
    del prompts
    return [float(final_answer(x) == final_answer(y)) for x, y in zip(completions, reference, strict=True)]


def check_range(name: str, given: tuple[int, int], least: int) -> None:
    """ValueError unless `given` is (low, high) with least <= low <= high."""
    low, high = given
    if not least <= low <= high:
        raise ValueError(f"{name}={given} must be (low, high) with {least} <= low <= high")


def between(draw: Draw, given: tuple[int, int]) -> int:
    """A whole number from low to high, both included."""
    return given[0] + draw(given[1] - given[0] + 1)
