"""Sampling one token per row, without a sort of the vocabulary and without a draw per vocabulary entry.

Shapes: R rows, V vocabulary, k token ids.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhfjax.generation.filters import least_mass
from rlhfjax.generation.processors import process_logits
from rlhfjax.generation.settings import Sampling, check_sampling

_BLOCK = 64  # vocabulary entries a block of the two-level search


class Drawn(NamedTuple):
    """One token a row."""

    token_R: jax.Array  # int32
    logp_R: (
        jax.Array
    )  # float32, under the processed distribution, from which it was drawn; greedy and forced: 0
    # float32, under the model's own distribution at the given temperature (greedy: at 1), nothing left out or
    # penalised: what a network that is trained gives, and so what an importance ratio over it needs.
    plain_logp_R: jax.Array


def sample_token(
    logits_RV: jax.Array,
    uniform_R: jax.Array,
    sampling: Sampling,
    *,
    step: jax.Array | int = 0,
    seen_RT: jax.Array | None = None,
    stop_tokens: jax.Array | None = None,
) -> Drawn:
    """Draws a token per row by inverting the distribution function at `uniform_R`, float32 in [0, 1).

    Args:
      step: int32, tokens drawn before, a scalar or [R]; `min_new_tokens` and `forced_tokens` go by it.
      seen_RT: int32 ids that `repetition_penalty` is for, -1 where there is none; any order, any number of times.
      stop_tokens: int32 ids [k] or [R, k] that `min_new_tokens` holds back, -1 void.

    The search has two levels: sums of blocks of 64 entries first, then the entries of one block. It needs one pass
    over the vocabulary and one uniform number a row, where the Gumbel trick needs V of them.
    """
    chex.assert_rank([logits_RV, uniform_R], [2, 1])
    chex.assert_type([logits_RV, uniform_R], float)
    rows = logits_RV.shape[0]
    check_sampling(sampling, rows)
    temperature_R = jnp.broadcast_to(jnp.asarray(sampling.temperature, jnp.float32), (rows,))
    greedy_R = temperature_R <= 0
    plain_RV = logits_RV.astype(jnp.float32) / jnp.where(greedy_R, 1.0, temperature_R)[:, None]
    # A temperature is positive, so that penalties and bans may as well come after it.
    logits_RV, changed = process_logits(plain_RV, sampling, step, seen_RT, stop_tokens)
    highest_R = jnp.max(logits_RV, axis=1)
    mass_RV = jnp.exp(logits_RV - highest_R[:, None])
    mass_RV, all_R, filtered = _filter(mass_RV, sampling)
    token_R, total_R = _invert(mass_RV, uniform_R)
    # One more pass over the vocabulary, where a row asks for it.
    token_R = jax.lax.cond(
        jnp.any(greedy_R),
        lambda: jnp.where(greedy_R, jnp.argmax(logits_RV, axis=1).astype(jnp.int32), token_R),
        lambda: token_R,
    )
    certain_R = greedy_R
    if sampling.forced_tokens is not None:
        forced_R = _forced(jnp.asarray(sampling.forced_tokens), step, rows)
        token_R = jnp.where(forced_R >= 0, forced_R, token_R)
        certain_R |= forced_R >= 0
    logp_R = _pick(logits_RV, token_R) - (highest_R + jnp.log(total_R))
    log_all_R = highest_R + jnp.log(jnp.where(filtered, all_R, total_R))
    if changed is not None:
        log_all_R = jax.lax.cond(changed, lambda: jax.nn.logsumexp(plain_RV, axis=1), lambda: log_all_R)
    return Drawn(token_R, jnp.where(certain_R, 0.0, logp_R), _pick(plain_RV, token_R) - log_all_R)


def draw_tokens(
    logits_RV: jax.Array,
    key_R: jax.Array,
    step: jax.Array,
    sampling: Sampling,
    seen_RT: jax.Array | None,
    stop_tokens: jax.Array,
) -> Drawn:
    """`sample_token` with the uniform number that a completion's own key gives at this step, a scalar or [R]."""
    step_R = jnp.broadcast_to(step, key_R.shape)
    uniform_R = jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in)(key_R, step_R))
    return sample_token(logits_RV, uniform_R, sampling, step=step, seen_RT=seen_RT, stop_tokens=stop_tokens)


def _filter(mass_RV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(the mass kept, the sum of all mass, whether any row asks for a filter); the sum is 0 where none does."""
    top_k, top_p, min_p = (jnp.asarray(x) for x in (sampling.top_k, sampling.top_p, sampling.min_p))
    filtered = jnp.any(top_k > 0) | jnp.any(top_p < 1) | jnp.any(min_p > 0)

    def keep(mass_RV):
        all_R = jnp.sum(mass_RV, axis=1)
        least_R = least_mass(mass_RV, all_R, top_k, top_p, min_p)
        return jnp.where(mass_RV >= least_R[:, None], mass_RV, 0.0), all_R

    mass_RV, all_R = jax.lax.cond(filtered, keep, lambda x: (x, jnp.zeros_like(x[:, 0])), mass_RV)
    return mass_RV, all_R, filtered


def _pick(values_RV: jax.Array, token_R: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values_RV, token_R[:, None], axis=1)[:, 0]


def _forced(forced: jax.Array, step: jax.Array | int, rows: int) -> jax.Array:
    """The token each row must draw now, -1 where it is free."""
    steps = forced.shape[-1]
    forced_RC = jnp.broadcast_to(forced, (rows, steps))
    step_R = jnp.broadcast_to(jnp.asarray(step), (rows,))
    now_R = _pick(forced_RC, jnp.minimum(step_R, steps - 1))
    return jnp.where(step_R < steps, now_R, -1).astype(jnp.int32)


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
