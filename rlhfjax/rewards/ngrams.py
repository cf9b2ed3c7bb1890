"""How much lists of items have in common, and how much one repeats itself: on the device.

Every function takes one step for each item of the longest list that is there, not of the longest that could be, and
holds no array of all pairs.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from rlhfjax.rewards.characters import Items, joined_hash

__all__ = [
    "clipped_matches",
    "count_distinct",
    "longest_repeat",
    "n_grams",
    "orders",
    "same_lists",
    "subsequence_length",
]


Carry = TypeVar("Carry")


def n_grams(items: Items, n: int) -> Items:
    """The runs of n neighbours, [..., N]: max(0, count - n + 1) of them."""
    hashes = []
    for which, item in enumerate((items.first, items.second)):
        joined = item
        for k in range(1, n):
            following = jnp.pad(item, [(0, 0)] * (item.ndim - 1) + [(0, k)])[..., k:]
            joined = joined_hash(joined, following, which)
        hashes.append(joined)
    return Items(hashes[0], hashes[1], jnp.maximum(items.count - (n - 1), 0))


def orders(items: Items, most: int) -> Items:
    """The n-grams of n = 1 to `most`, on a new first axis."""
    found = [n_grams(items, n) for n in range(1, most + 1)]
    return Items(*(jnp.stack(x) for x in zip(*found, strict=True)))


def clipped_matches(a: Items, b: Items) -> jax.Array:
    """Items that both lists have, each counted as often as both have it: int32 [...], as `(Counter & Counter)`."""

    def found(i: jax.Array, times: jax.Array) -> jax.Array:
        return times + _equal(a, i, b)

    times = _steps(a, found, jnp.zeros(b.first.shape, jnp.int32))
    return jnp.sum((_earlier(b) < times) & _real(b), axis=-1, dtype=jnp.int32)


def count_distinct(items: Items) -> jax.Array:
    """Items without their repetitions, int32 [...]: `len(set(items))`."""
    return jnp.sum((_earlier(items) == 0) & _real(items), axis=-1, dtype=jnp.int32)


def same_lists(a: Items, b: Items) -> jax.Array:
    """Whether both lists are the same, bool [...]."""
    least = min(a.first.shape[-1], b.first.shape[-1])
    same = (a.first[..., :least] == b.first[..., :least]) & (a.second[..., :least] == b.second[..., :least])
    real = jax.lax.broadcasted_iota(jnp.int32, same.shape, same.ndim - 1) < a.count[..., None]
    return (a.count == b.count) & jnp.all(same | ~real, axis=-1)


def subsequence_length(a: Items, b: Items) -> jax.Array:
    """Length of the longest common subsequence, int32 [...]; one step of its table for each item of `a`."""

    def row_after(i: jax.Array, row: jax.Array) -> jax.Array:
        with_one_more = jnp.maximum(row, _behind(row) + _equal(a, i, b))
        return jax.lax.cummax(with_one_more, axis=row.ndim - 1)

    return _steps(a, row_after, jnp.zeros(b.first.shape, jnp.int32))[..., -1]


def longest_repeat(items: Items) -> jax.Array:
    """Length of the longest run of items that is there twice, overlaps included, int32 [...]; 0: nothing is."""
    place = _places(items)

    def longer(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        run, longest = carry
        same = _equal(items, i, items) * ((place > i) & _real(items))
        run = (_behind(run) + 1) * same
        return run, jnp.maximum(longest, jnp.max(run, axis=-1))

    start = (jnp.zeros(items.first.shape, jnp.int32), jnp.zeros_like(items.count))
    return _steps(items, longer, start)[1]


def _earlier(items: Items) -> jax.Array:
    """How many equal items stand before each, int32 [..., N]."""
    place = _places(items)

    def found(i: jax.Array, times: jax.Array) -> jax.Array:
        return times + _equal(items, i, items) * (place > i)

    return _steps(items, found, jnp.zeros(items.first.shape, jnp.int32))


def _steps(items: Items, body: Callable[[jax.Array, Carry], Carry], start: Carry) -> Carry:
    return jax.lax.fori_loop(0, jnp.max(items.count, initial=0), body, start)


def _equal(a: Items, i: jax.Array, b: Items) -> jax.Array:
    """1 where b's item is item i of a, int32 [..., N of b]; 0 everywhere where a has no item i."""
    first, second = (jax.lax.dynamic_index_in_dim(x, i, axis=x.ndim - 1) for x in a[:2])
    return ((first == b.first) & (second == b.second) & (i < a.count)[..., None]).astype(jnp.int32)


def _behind(x: jax.Array) -> jax.Array:
    """Each place takes what stood one place before it."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 0)])[..., :-1]


def _places(items: Items) -> jax.Array:
    shape = items.first.shape
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def _real(items: Items) -> jax.Array:
    return _places(items) < items.count[..., None]
