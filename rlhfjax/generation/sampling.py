"""Sampling one token per row, without a sort of the vocabulary and without a draw per vocabulary entry.

Every setting is an array, one number for all rows or one per row, so that changing it compiles nothing anew.

Shapes: R rows, V vocabulary.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

_BLOCK = 64  # vocabulary entries a block of the two-level search


class Sampling(NamedTuple):
    """What turns logits into a distribution; scalars or [R] arrays.

    The order is temperature, top-k, top-p (of what top-k kept), min-p, as in transformers.
    """

    temperature: jax.Array | float = 1.0  # logits are divided by it; 0 means greedy
    top_k: jax.Array | int = 0  # keep the k most likely; 0 keeps all. Ties with the k-th are kept.
    # Keep the fewest tokens whose mass reaches top_p; 1 keeps all (arXiv 1904.09751).
    top_p: jax.Array | float = 1.0
    # Keep tokens of at least min_p times the largest probability (arXiv 2407.01082).
    min_p: jax.Array | float = 0.0


def sample_token(
    logits_RV: jax.Array, uniform_R: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """Draws a token per row by inverting the distribution function at `uniform_R`, float32 in [0, 1).

    Returns (token_R int32, logp_R float32): `logp` is the log-probability under the distribution that was sampled
    from, temperature and filters included, which is what an importance ratio needs. A greedy row has logp 0.

    The search has two levels: sums of blocks of 64 entries first, then the entries of one block. It needs one pass
    over the vocabulary and one uniform number a row, where the Gumbel trick needs V of them.
    """
    chex.assert_rank([logits_RV, uniform_R], [2, 1])
    chex.assert_type([logits_RV, uniform_R], float)
    rows = logits_RV.shape[0]
    temperature_R = jnp.broadcast_to(jnp.asarray(sampling.temperature, jnp.float32), (rows,))
    greedy_R = temperature_R <= 0
    logits_RV = logits_RV.astype(jnp.float32) / jnp.where(greedy_R, 1.0, temperature_R)[:, None]
    top_k, top_p, min_p = (jnp.asarray(x) for x in sampling[1:])
    filtered = jnp.any(top_k > 0) | jnp.any(top_p < 1) | jnp.any(min_p > 0)
    logits_RV = jax.lax.cond(
        filtered, lambda x: filter_logits(x, top_k, top_p, min_p), lambda x: x, logits_RV
    )

    highest_R = jnp.max(logits_RV, axis=1)
    mass_RV = jnp.exp(logits_RV - highest_R[:, None])
    token_R, total_R = _invert(mass_RV, uniform_R)
    # One more pass over the vocabulary, where a row asks for it.
    token_R = jax.lax.cond(
        jnp.any(greedy_R),
        lambda: jnp.where(greedy_R, jnp.argmax(logits_RV, axis=1).astype(jnp.int32), token_R),
        lambda: token_R,
    )
    logit_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=1)[:, 0]
    logp_R = jnp.where(greedy_R, 0.0, logit_R - highest_R - jnp.log(total_R))
    return token_R, logp_R


def _invert(mass_RV: jax.Array, uniform_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first entry at which the running sum of `mass` exceeds uniform * total; and the total."""
    rows, size = mass_RV.shape
    if size <= _BLOCK:  # one block, whose two-level search XLA takes minutes to compile on CPU
        total_R = jnp.sum(mass_RV, axis=1)
        return _first_beyond(mass_RV, uniform_R * total_R), total_R
    blocks = -(-size // _BLOCK)
    mass_RNb = jnp.pad(mass_RV, ((0, 0), (0, blocks * _BLOCK - size))).reshape(rows, blocks, _BLOCK)
    block_sum_RN = jnp.sum(mass_RNb, axis=2)
    block_end_RN = jnp.cumsum(block_sum_RN, axis=1)
    total_R = block_end_RN[:, -1]
    target_R = uniform_R * total_R
    block_R = jnp.minimum(jnp.sum(block_end_RN <= target_R[:, None], axis=1), blocks - 1)
    chosen = block_R[:, None]
    before_R = jnp.take_along_axis(block_end_RN - block_sum_RN, chosen, axis=1)[:, 0]
    inside_Rb = jnp.take_along_axis(mass_RNb, chosen[:, :, None], axis=1)[:, 0]
    return block_R * _BLOCK + _first_beyond(inside_Rb, target_R - before_R), total_R


def _first_beyond(mass_RN: jax.Array, target_R: jax.Array) -> jax.Array:
    """The first entry with mass at which the running sum exceeds the target; int32 [R]."""
    beyond_RN = (jnp.cumsum(mass_RN, axis=1) > target_R[:, None]) & (mass_RN > 0)
    # Rounding can leave the target just past the end: then the likeliest entry, never one of mass zero.
    entry_R = jnp.where(
        jnp.any(beyond_RN, axis=1), jnp.argmax(beyond_RN, axis=1), jnp.argmax(mass_RN, axis=1)
    )
    return entry_R.astype(jnp.int32)


def filter_logits(
    logits_RV: jax.Array, top_k: jax.Array | int, top_p: jax.Array | float, min_p: jax.Array | float
) -> jax.Array:
    """Sets what top-k, top-p and min-p leave out to -inf; [R, V] float32. Settings are scalars or [R].

    The thresholds are found by bisection over the bits of a float32: exact, and 32 passes of compare and sum
    instead of a sort of the vocabulary.
    """
    rows, size = logits_RV.shape
    top_k, top_p, min_p = (jnp.broadcast_to(jnp.asarray(x), (rows,)) for x in (top_k, top_p, min_p))
    k_R = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)
    order_RV = _ordered_bits(logits_RV)
    kth_R = _largest_threshold(order_RV, lambda kept: jnp.sum(kept, axis=1) >= k_R)
    logits_RV = jnp.where(order_RV >= kth_R[:, None], logits_RV, -jnp.inf)

    probability_RV = jax.nn.softmax(logits_RV, axis=1)
    mass_R = top_p.astype(jnp.float32)

    def enough(kept_RV):
        return jnp.sum(jnp.where(kept_RV, probability_RV, 0.0), axis=1) >= mass_R

    nucleus_R = _largest_threshold(order_RV, enough)
    keep_RV = (order_RV >= nucleus_R[:, None]) | (top_p >= 1)[:, None]
    floor_R = jnp.max(logits_RV, axis=1) + jnp.log(jnp.maximum(min_p, 1e-30))
    keep_RV &= (logits_RV >= floor_R[:, None]) | (min_p <= 0)[:, None]
    return jnp.where(keep_RV, logits_RV, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """int32 that order as the float32 values do."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _largest_threshold(order_RV: jax.Array, enough) -> jax.Array:
    """Per row the largest threshold t such that `enough(order >= t)`; `enough` is monotone in what is kept."""
    lowest, highest = jnp.min(order_RV, axis=1), jnp.max(order_RV, axis=1)

    def halve(_, bounds):
        low, high = bounds
        # low + (high - low + 1) / 2 without overflow: the bounds span up to 2^32.
        middle = (low >> 1) + (high >> 1) + (low & high & 1) + ((low ^ high) & 1)
        good = enough(order_RV >= middle[:, None])
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 32, halve, (lowest, highest))
    return low
