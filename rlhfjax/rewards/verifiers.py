"""Rewards for answers that can be checked: the last number, what stands behind a marker, or any function of yours.

A number is [0-9] with commas between digits, which are left out, and a fraction: 12, 1,234, 0.5. A "-" right before it
makes it negative, unless a letter, digit or "_" stands before that: 3-5 is 3 and 5. The last one of a text counts.

A marked answer is what stands behind the last marker, up to the end of that line: of "so ... #### 12 " with the marker
"####" it is "12". White space is where `str.split` cuts, and how much there is does not count.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.rewards.characters import (
    ByteTable,
    Characters,
    characters,
    look_up,
    runs,
    score_against_references,
    space_map,
    words,
)
from rlhfjax.rewards.ngrams import same_lists

__all__ = [
    "last_number",
    "last_number_on_device",
    "last_number_reward",
    "marked_answer",
    "marked_answer_on_device",
    "marked_answer_reward",
    "verifier_reward",
]

_NUMBER = re.compile(r"((?<![0-9A-Za-z_])-)?[0-9]+(,[0-9]+)*(\.[0-9]+)?")


def verifier_reward(
    check: Callable[[str, str, Any], bool], *, column: str = "answer"
) -> Callable[..., list[float | None]]:
    """A host reward: 1.0 where `check(prompt, completion, answer)` holds, else 0.0; None where the answer is None.

    column: of the data, that holds the answers. The reward raises ValueError where the data has none of that name.
    """

    def reward(
        prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        if column not in columns:
            raise ValueError(f"the data has no column {column!r}; it has {sorted(columns)}")
        rows = zip(prompts, completions, columns[column], strict=True)
        return [None if x is None else float(check(prompt, text, x)) for prompt, text, x in rows]

    return reward


def last_number(text: str) -> float | None:
    """The last number of a text; None: it has none.

    >>> last_number("12 and 30 are 42."), last_number("none")
    (42.0, None)
    """
    numbers = [found[0] for found in _NUMBER.finditer(text)]
    return float(numbers[-1].replace(",", "")) if numbers else None


def last_number_reward(
    *, tolerance: float = 0.0, column: str = "answer"
) -> Callable[..., list[float | None]]:
    """A host reward: 1.0 where the last number of a completion is within `tolerance` of the answer, else 0.0.

    Answers are numbers, or texts of which the last number is meant; None: does not apply. For the rest see
    `verifier_reward`.
    """
    _check_tolerance(tolerance)

    def check(prompt: str, completion: str, answer: Any) -> bool:
        del prompt
        found = last_number(completion)
        return found is not None and abs(found - as_number(answer)) <= tolerance

    return verifier_reward(check, column=column)


def as_number(answer: Any) -> float:
    """An answer of the data as a number. Raises ValueError where it is, or has, none."""
    number = last_number(answer) if isinstance(answer, str) else float(answer)
    if number is None or not math.isfinite(number):
        raise ValueError(f"the answer {answer!r} holds no number")
    return number


def last_number_on_device(table: ByteTable, *, tolerance: float = 0.0) -> Callable[..., jax.Array]:
    """`reward(answer_R, token_BT, mask_BT, index_B) -> 0 or 1`, float32 [B], as `last_number_reward` gives it.

    table: `byte_table` of the vocabulary. Of the reward: answer_R float32, the answers of the data, are its params;
    index_B int, the row of each; NaN where there is none, or its answer is NaN. Numbers are float32: of more than seven
    digits, or a tolerance finer than that, it may differ from the host.
    """
    _check_tolerance(tolerance)

    def reward(answer_R: jax.Array, token_BT: jax.Array, mask_BT: jax.Array, index_B: jax.Array) -> jax.Array:
        rows = answer_R.shape[0]
        answer_B = jnp.asarray(answer_R, jnp.float32)[jnp.clip(index_B, 0, rows - 1)]
        answer_B = jnp.where((index_B >= 0) & (index_B < rows), answer_B, jnp.nan)
        number_B, found_B = last_numbers(characters(token_BT, mask_BT, table))
        right_B = found_B & (jnp.abs(number_B - answer_B) <= tolerance)
        return jnp.where(jnp.isnan(answer_B), jnp.nan, right_B.astype(jnp.float32))

    return reward


_NONE, _WHOLE, _COMMA, _POINT, _FRACTION = range(5)  # where in a number a text stands


def last_numbers(text: Characters) -> tuple[jax.Array, jax.Array]:
    """`last_number` of each text, float32 [B], and whether there is one, bool [B]."""
    code_BN = text.code_BN

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        place, value, scale, minus, before, sign = carry
        code = jnp.where(i < text.length_B, jax.lax.dynamic_index_in_dim(code_BN, i, 1, keepdims=False), 0)
        digit = (code >= ord("0")) & (code <= ord("9"))
        begins = digit & (place == _NONE)
        fraction = (place == _POINT) | (place == _FRACTION)
        number = (code - ord("0")).astype(jnp.float32)
        value = jnp.where(digit, jnp.where(begins, 0.0, value) * 10 + number, value)
        scale = jnp.where(begins, 1.0, jnp.where(digit & fraction, scale * 10, scale))
        minus = jnp.where(begins, sign, minus)
        place = jnp.where(
            digit,
            jnp.where(fraction, _FRACTION, _WHOLE),
            jnp.where(
                place == _WHOLE,
                jnp.where(code == ord(","), _COMMA, jnp.where(code == ord("."), _POINT, _NONE)),
                _NONE,
            ),
        )
        return place, value, scale, minus, code, (code == ord("-")) & ~_is_name(before)

    none_B = jnp.zeros_like(text.length_B)
    no_B = jnp.zeros(none_B.shape, bool)
    start = (none_B, jnp.zeros(none_B.shape), jnp.zeros(none_B.shape), no_B, none_B, no_B)
    _, value, scale, minus, _, _ = jax.lax.fori_loop(0, jnp.max(text.length_B, initial=0), step, start)
    found_B = scale > 0
    number_B = value / jnp.where(found_B, scale, 1.0)
    return jnp.where(minus, -number_B, number_B), found_B


def _is_name(code: jax.Array) -> jax.Array:
    """Whether it is one of [0-9A-Za-z_]."""
    table = np.zeros(128, bool)
    table[[ord(c) for c in map(chr, range(128)) if re.match("[0-9A-Za-z_]", c)]] = True
    return jnp.asarray(table)[jnp.clip(code, 0, 127)] & (code < 128)


def marked_answer(text: str, marker: str) -> str | None:
    """What stands behind the last marker, up to the end of the line, without white space around; None: no marker."""
    _, found, rest = text.rpartition(marker)
    return rest.partition("\n")[0].strip() if found else None


def marked_answer_reward(marker: str, *, column: str = "answer") -> Callable[..., list[float | None]]:
    """A host reward: 1.0 where the marked answer of a completion has the words of the answer, else 0.0.

    marker: such as "####", "=" or "Answer:". For the rest see `verifier_reward`.
    """
    _check_marker(marker)

    def check(prompt: str, completion: str, answer: Any) -> bool:
        del prompt
        found = marked_answer(completion, marker)
        return found is not None and found.split() == str(answer).split()

    return verifier_reward(check, column=column)


def marked_answer_on_device(table: ByteTable, marker: str) -> Callable[..., jax.Array]:
    """`reward(references, token_BT, mask_BT, index_B) -> 0 or 1`, float32 [B], as `marked_answer_reward` gives it.

    table: `byte_table` of the vocabulary. Of the reward: `references(answers)` are its params; index_B int, the row of
    each; NaN where there is none.
    """
    _check_marker(marker)
    wanted = np.frombuffer(marker.encode("utf-32-le"), np.uint32).astype(np.int32)

    def score(text: Characters, reference: Characters) -> jax.Array:
        code_BN = text.code_BN
        index_BN = jnp.broadcast_to(jnp.arange(code_BN.shape[1])[None, :], code_BN.shape)
        begins_BN = index_BN <= text.length_B[:, None] - len(wanted)
        for k, code in enumerate(wanted):
            begins_BN &= jnp.pad(code_BN, ((0, 0), (0, k)))[:, k:] == code
        last_B = jnp.max(jnp.where(begins_BN, index_BN, -1), axis=1, initial=-1)
        behind_BN = index_BN >= (last_B + len(wanted))[:, None]
        line_break_BN = behind_BN & (code_BN == ord("\n"))
        inside_BN = behind_BN & text.mask_BN & (jnp.cumsum(line_break_BN, axis=1) == 0)
        found = runs(code_BN, inside_BN & (look_up(space_map(), code_BN) == 0))
        return (last_B >= 0) & same_lists(found, words(reference))

    return score_against_references(table, score)


def _check_tolerance(tolerance: float) -> None:
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, it is {tolerance}")


def _check_marker(marker: str) -> None:
    if not marker or "\n" in marker:
        raise ValueError(f"the marker must be some characters without a line break, got {marker!r}")
