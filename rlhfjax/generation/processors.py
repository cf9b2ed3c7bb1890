"""What is done to logits before the filters: the repetition penalty, banned tokens, the minimum length.

Each is a write to few entries of every row; none is a pass over the vocabulary.

Shapes: R rows, V vocabulary, T tokens seen, k token ids.
"""

import jax
import jax.numpy as jnp

from rlhfjax.generation.settings import Sampling


def process_logits(
    logits_RV: jax.Array,
    sampling: Sampling,
    step: jax.Array | int,
    seen_RT: jax.Array | None,
    stop_tokens: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """(the logits, whether any row was changed); None where the settings are None.

    Arguments as in `sample_token`. Raises ValueError where a setting lacks the tokens it needs.
    """
    rows = logits_RV.shape[0]
    changed = []
    if sampling.repetition_penalty is not None:
        if seen_RT is None:
            raise ValueError("sampling.repetition_penalty needs the tokens seen so far: give seen_RT")
        penalty_R = jnp.broadcast_to(jnp.asarray(sampling.repetition_penalty, jnp.float32), (rows,))
        changed.append(jnp.any(penalty_R != 1))
        logits_RV = jax.lax.cond(changed[-1], _penalise, lambda x, *_: x, logits_RV, seen_RT, penalty_R)
    held_back = []
    if sampling.banned_tokens is not None:
        held_back.append(_per_row(sampling.banned_tokens, rows))
    if sampling.min_new_tokens is not None:
        if stop_tokens is None:
            raise ValueError("sampling.min_new_tokens needs to know what it holds back: give stop_tokens")
        early = jnp.broadcast_to(jnp.asarray(step) < jnp.asarray(sampling.min_new_tokens), (rows,))
        held_back.append(jnp.where(early[:, None], _per_row(stop_tokens, rows), -1))
    if held_back:
        token_Rk = jnp.concatenate(held_back, axis=1)
        changed.append(jnp.any(token_Rk >= 0))
        logits_RV = jax.lax.cond(changed[-1], _ban, lambda x, _: x, logits_RV, token_Rk)
    return logits_RV, jnp.any(jnp.stack(changed)) if changed else None


def _per_row(token: jax.Array, rows: int) -> jax.Array:
    token = jnp.asarray(token, jnp.int32)
    return jnp.broadcast_to(token, (rows, token.shape[-1]))


def _penalise(logits_RV: jax.Array, seen_RT: jax.Array, penalty_R: jax.Array) -> jax.Array:
    """The same value is written to a token however often it was seen."""
    seen = jnp.take_along_axis(logits_RV, jnp.maximum(seen_RT, 0), axis=1)
    penalised = jnp.where(seen > 0, seen / penalty_R[:, None], seen * penalty_R[:, None])
    return _write(logits_RV, seen_RT, penalised)


def _ban(logits_RV: jax.Array, token_Rk: jax.Array) -> jax.Array:
    return _write(logits_RV, token_Rk, jnp.full(token_Rk.shape, -jnp.inf))


def _write(logits_RV: jax.Array, token_Rk: jax.Array, value_Rk: jax.Array) -> jax.Array:
    rows, size = logits_RV.shape
    index = jnp.where(token_Rk >= 0, token_Rk, size)  # void: past the end, where writes are dropped
    return logits_RV.at[jnp.arange(rows)[:, None], index].set(value_Rk, mode="drop")
