"""Several completions of one prompt in one row: the prompt is computed once and shared by its samples.

A row is [prompt | completion 0 | completion 1 | ... ]. The mask lets each completion see the prompt and itself, and
its positions go on from the prompt's, so that every hidden state equals that of the prompt and the one completion
alone. Against one row per completion this saves the prompt G - 1 times.

Prompts are left-padded: the last prompt token stands at index P - 1 in every row, and its hidden state predicts the
first token of every branch.

Shapes: B prompts, G completions of each, P prompt length, C completion length, T = P + G * C, D width.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhfjax.networks.attention import BranchMask
from rlhfjax.networks.decoder import LanguageModel


class Branches(NamedTuple):
    """Prompts and their completions.

    Padding is told by the masks, never by a token id. A completion is a run of True from its first position.
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
    `after[b, g, c]` has read token c (a reward model reads it at the last token).
    """
    prompt_BP, prompt_mask_BP, completion_BGC, completion_mask_BGC = branches
    chex.assert_rank([prompt_BP, completion_BGC], [2, 3])
    chex.assert_equal_shape([prompt_BP, prompt_mask_BP])
    chex.assert_equal_shape([completion_BGC, completion_mask_BGC])
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
