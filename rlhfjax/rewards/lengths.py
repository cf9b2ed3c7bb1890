"""Rewards by length: near to a wanted one, or not above a limit; in words, characters or tokens.

A count on the host is a function of a text, `count_words` or `len`. On the device it is a function of tokens:

    partial(word_count, table=word_table(...))           as count_words
    partial(character_count, table=byte_table(...))      as len
    token_count                                          tokens that were drawn, the stop token among them

DAPO's penalty, which grows over the last tokens before a limit, is `ops.soft_overlong_penalty`.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from rlhfjax.rewards.characters import ByteTable, characters

__all__ = [
    "character_count",
    "count_words",
    "near_length_on_device",
    "near_length_reward",
    "over_length_on_device",
    "over_length_reward",
    "token_count",
]

Count = Callable[[jax.Array, jax.Array], jax.Array]


def count_words(text: str) -> int:
    """Words as `str.split` gives them."""
    return len(text.split())


def near_length_reward(
    wanted: float, count: Callable[[str], int] = count_words
) -> Callable[..., list[float]]:
    """A host reward: -|count - wanted|, at most 0.

    >>> near_length_reward(3)([""], ["one two three four five"])
    [-2]
    """
    _check(wanted)
    return _on_host(count, lambda n: -abs(n - wanted))


def over_length_reward(
    limit: float, count: Callable[[str], int] = count_words, *, slope: float = 1.0
) -> Callable[..., list[float]]:
    """A host reward: -slope for each unit above the limit, 0 up to it. slope in reward per unit, above 0."""
    _check(limit, slope)
    return _on_host(count, lambda n: -slope * max(0.0, n - limit))


def near_length_on_device(wanted: float, count: Count) -> Callable[..., jax.Array]:
    """`reward(params, token_BT, mask_BT) -> float32 [B]`, as `near_length_reward` gives it; params are not used."""
    _check(wanted)
    return _on_device(count, lambda n_B: -jnp.abs(n_B - wanted))


def over_length_on_device(limit: float, count: Count, *, slope: float = 1.0) -> Callable[..., jax.Array]:
    """`reward(params, token_BT, mask_BT) -> float32 [B]`, as `over_length_reward` gives it; params are not used."""
    _check(limit, slope)
    return _on_device(count, lambda n_B: -slope * jnp.maximum(0.0, n_B - limit))


def token_count(token: jax.Array, mask: jax.Array) -> jax.Array:
    """Tokens of each completion, int32 [...] of mask [..., T]; the tokens themselves are not looked at."""
    del token
    return jnp.sum(mask, axis=-1, dtype=jnp.int32)


def character_count(token_BT: jax.Array, mask_BT: jax.Array, table: ByteTable) -> jax.Array:
    """Characters of each completion, int32 [B]."""
    return characters(token_BT, mask_BT, table).length_B


def _on_host(count: Callable[[str], int], score: Callable[[int], float]) -> Callable[..., list[float]]:
    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
        del prompts, columns
        return [score(count(completion)) for completion in completions]

    return reward


def _on_device(count: Count, score: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    def reward(params: object, token_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
        del params
        return score(count(token_BT, mask_BT).astype(jnp.float32))

    return reward


def _check(length: float, slope: float = 1.0) -> None:
    if isinstance(length, int | float) and not 0 <= length < math.inf:  # an array may be traced
        raise ValueError(f"a length must be finite and at least 0, it is {length}")
    if not slope > 0:
        raise ValueError(f"slope must be above 0 for a penalty, it is {slope}")
