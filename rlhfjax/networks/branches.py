"""Several completions of one prompt in one row: the prompt is computed once and shared by its samples.

A row is [prompt | completion 0 | completion 1 | ... ]. The mask lets each completion see the prompt and itself, and
its positions go on from the prompt's, so that every hidden state equals that of the prompt and the one completion
alone. Against one row per completion this saves the prompt G - 1 times.

Prompts are left-padded: the last prompt token stands at index P - 1 in every row, and its hidden state predicts the
first token of every branch.

Shapes: B prompts, G completions of each, P prompt length, C completion length, T = P + G * C, D width.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhfjax.networks.attention import BranchMask
from rlhfjax.networks.decoder import LanguageModel
from rlhfjax.networks.ragged import PackedRows, pack, rows_for


class Branches(NamedTuple):
    """Prompts and their completions.

    Padding is told by the masks, never by a token id. A completion is a run of True from its first position; what is
    in it is seen, and need not be all the model's own (conversations).
    """

    prompt_BP: jax.Array  # int32, left-padded
    prompt_mask_BP: jax.Array  # bool
    completion_BGC: jax.Array  # int32
    completion_mask_BGC: jax.Array  # bool


def pad_prompt_positions(prompt_mask_BP: jax.Array) -> jax.Array:
    """Position of every prompt token, 0 for the first real one (and for the padding before it)."""
    return jnp.maximum(jnp.cumsum(prompt_mask_BP.astype(jnp.int32), axis=1) - 1, 0)


def branch_hidden(lm: LanguageModel, params: dict, branches: Branches) -> tuple[jax.Array, jax.Array]:
    """Hidden states before and after every completion token, each [B, G, C, D].

    `before[b, g, c]` predicts completion token c (the state in which it is chosen; a critic reads it);
    `after[b, g, c]` has read token c (a reward model reads it at the last token). Where the mask is False they mean
    nothing.

    With `Decoder.packing` the sequences are packed into fewer rows; a batch too long for them takes full rows.
    """
    prompt_BP, prompt_mask_BP, completion_BGC, completion_mask_BGC = branches
    chex.assert_rank([prompt_BP, completion_BGC], [2, 3])
    chex.assert_equal_shape([prompt_BP, prompt_mask_BP])
    chex.assert_equal_shape([completion_BGC, completion_mask_BGC])
    if lm.config.packing is None:
        return _in_full_rows(lm, params, branches)
    batch, samples, _ = completion_BGC.shape
    packed, fit = pack(*branches, rows_for(lm.config.packing, batch * samples))
    return _in_fewer_rows_if_they_fit(lm, params, branches, packed, fit)


def _in_full_rows(lm: LanguageModel, params: dict, branches: Branches) -> tuple[jax.Array, jax.Array]:
    prompt_BP, prompt_mask_BP, completion_BGC, completion_mask_BGC = branches
    batch, samples, length = completion_BGC.shape
    prompt_length_B = jnp.sum(prompt_mask_BP, axis=1, dtype=jnp.int32)
    completion_position_BC = prompt_length_B[:, None] + jnp.arange(length)[None, :]
    position_BT = jnp.concatenate(
        [pad_prompt_positions(prompt_mask_BP), jnp.tile(completion_position_BC, (1, samples))], axis=1
    )
    token_BT = jnp.concatenate([prompt_BP, completion_BGC.reshape(batch, -1)], axis=1)
    mask = BranchMask(prompt_mask_BP, completion_mask_BGC)
    hidden_BTD, _ = lm.apply(params, token_BT, position_BT=position_BT, mask_BTS=mask)
    start = prompt_BP.shape[1]
    after = hidden_BTD[:, start:].reshape(batch, samples, length, -1)
    last_prompt = jnp.broadcast_to(
        hidden_BTD[:, None, start - 1 : start], (batch, samples, 1, hidden_BTD.shape[-1])
    )
    before = jnp.concatenate([last_prompt, after[:, :, :-1]], axis=2)
    return before, after


def _in_fewer_rows(lm: LanguageModel, params: dict, packed: PackedRows) -> tuple[jax.Array, jax.Array]:
    hidden_RLD, _ = lm.apply(params, packed.token_RL, position_BT=packed.position_RL, mask_BTS=packed.mask)
    hidden_ND = hidden_RLD.reshape(-1, hidden_RLD.shape[-1])
    # What precedes a completion token in its row precedes it in its sequence too: no prompt is empty.
    return hidden_ND[packed.index_BGC - 1], hidden_ND[packed.index_BGC]


# Differentiated as one: through a cond, JAX would keep what the backward pass needs of both ways, in place of the one
# that is taken. Kept is nothing; the backward pass computes the forward pass again.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_fewer_rows_if_they_fit(
    lm: LanguageModel, params: dict, branches: Branches, packed: PackedRows, fit: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return jax.lax.cond(
        fit,
        lambda params: _in_fewer_rows(lm, params, packed),
        lambda params: _in_full_rows(lm, params, branches),
        params,
    )


def _fewer_rows_forward(lm, params, branches, packed, fit):
    return _in_fewer_rows_if_they_fit(lm, params, branches, packed, fit), (params, branches, packed, fit)


def _fewer_rows_backward(lm, kept, d_hidden):
    params, branches, packed, fit = kept

    def pulled(hidden: Callable[[dict], tuple[jax.Array, jax.Array]]):
        return lambda params, d_hidden: jax.vjp(hidden, params)[1](d_hidden)[0]

    d_params = jax.lax.cond(
        fit,
        pulled(lambda params: _in_fewer_rows(lm, params, packed)),
        pulled(lambda params: _in_full_rows(lm, params, branches)),
        params,
        d_hidden,
    )
    return d_params, None, None, None


_in_fewer_rows_if_they_fit.defvjp(_fewer_rows_forward, _fewer_rows_backward)
