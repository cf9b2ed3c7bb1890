"""Generation: prompts are prefilled once and shared by their samples, then decoded in one compiled loop.

Shapes: B prompts, G samples of each, P prompt length, C most new tokens, V vocabulary.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhfjax.generation.sampling import Sampling, sample_token
from rlhfjax.networks.branches import pad_prompt_positions
from rlhfjax.networks.decoder import LanguageModel


class Generation(NamedTuple):
    """Completions. The stop token is an action: it is kept, and counted by the mask."""

    token_BGC: jax.Array  # int32, 0 after the end
    mask_BGC: jax.Array  # bool, True up to and including the stop token
    logp_BGC: jax.Array  # float32, log-probability under the distribution sampled from; 0 after the end
    finished_BG: jax.Array  # bool, True where a stop token ended the completion


def sample_keys(key: jax.Array, index_B: jax.Array, samples: int) -> jax.Array:
    """One key per (prompt, sample), [B, G], from the prompt's own number.

    So a completion does not depend on which prompts stood beside it, in what order, or on how many devices.
    `index_B` is int32: the prompt's place in its step or data set. The key is consumed.
    """
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    per_prompt = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index_B)
    return jax.vmap(fold, in_axes=(None, 0), out_axes=1)(per_prompt, jnp.arange(samples))


PLAIN = Sampling()  # the model's own distribution


class _Loop(NamedTuple):
    step: jax.Array  # number of tokens drawn so far
    last_BG: jax.Array
    done_BG: jax.Array
    cache: tuple
    out: Generation


def generate(
    lm: LanguageModel,
    params: dict,
    prompt_BP: jax.Array,
    prompt_mask_BP: jax.Array,
    key_BG: jax.Array,
    *,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    sampling: Sampling = PLAIN,
) -> Generation:
    """Samples G completions of each prompt, up to `max_new_tokens` tokens or the first stop token.

    prompt_BP: int32, left-padded; prompt_mask_BP: bool, True on real tokens (at least the last one).
    key_BG: typed keys, one a completion (`sample_keys`); consumed.
    sampling: arrays or numbers; a scalar, or [B * G] in row-major order.
    stop_tokens: ids that end a completion; static.

    The prompt's keys and values are computed once and seen by its G samples. The loop ends when every completion has.
    """
    chex.assert_rank([prompt_BP, prompt_mask_BP, key_BG], [2, 2, 2])
    chex.assert_equal_shape([prompt_BP, prompt_mask_BP])
    batch, samples = key_BG.shape
    length_B = jnp.sum(prompt_mask_BP, axis=1, dtype=jnp.int32)
    prompt = prompt_BP.shape[1]
    if prompt + max_new_tokens > lm.config.max_positions:
        raise ValueError(
            f"prompt length {prompt} + max_new_tokens {max_new_tokens} exceeds the model's "
            f"max_positions {lm.config.max_positions}"
        )
    slots = prompt + samples * max_new_tokens
    slot_S = jnp.arange(slots) - prompt  # negative: the prompt; then G slots a step

    def draw(logits_BGV, step):
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_BG.reshape(-1), step)
        uniform = jax.vmap(jax.random.uniform)(keys)
        token, logp = sample_token(logits_BGV.reshape(batch * samples, -1), uniform, sampling)
        return token.reshape(batch, samples), logp.reshape(batch, samples)

    def record(state: _Loop, token_BG, logp_BG, cache) -> _Loop:
        live = ~state.done_BG
        stop = jnp.isin(token_BG, jnp.asarray(stop_tokens, jnp.int32)) & live
        token_BG = jnp.where(live, token_BG, 0)
        columns = (token_BG, live, jnp.where(live, logp_BG, 0.0))
        written = [
            jax.lax.dynamic_update_slice_in_dim(old, new[:, :, None], state.step, axis=2)
            for old, new in zip(state.out[:3], columns, strict=True)
        ]
        out = Generation(*written, finished_BG=state.out.finished_BG | stop)
        return _Loop(state.step + 1, token_BG, state.done_BG | stop, cache, out)

    def decode_mask(step):
        """Slots that the G new tokens see: the prompt, and their own branch up to now. [B, G, S]"""
        branch = (slot_S % samples)[None, :] == jnp.arange(samples)[:, None]
        own = branch & (slot_S >= 0)[None, :] & (slot_S // samples <= step)[None, :]
        prompt_BS = jnp.pad(prompt_mask_BP, ((0, 0), (0, slots - prompt)))
        return own[None] | prompt_BS[:, None, :]

    def body(state: _Loop) -> _Loop:
        position_BG = jnp.broadcast_to((length_B + state.step - 1)[:, None], (batch, samples))
        hidden_BGD, cache = lm.apply(
            params,
            state.last_BG,
            position_BT=position_BG,
            mask_BTS=decode_mask(state.step - 1),
            cache=state.cache,
            slot=prompt + (state.step - 1) * samples,
        )
        return record(state, *draw(lm.logits(params, hidden_BGD), state.step), cache)

    hidden_BPD, cache = lm.apply(
        params,
        prompt_BP,
        position_BT=pad_prompt_positions(prompt_mask_BP),
        mask_BTS=_prefill_mask(prompt_mask_BP, slots),
        cache=lm.init_cache(batch, slots),
        slot=0,
    )
    shape = (batch, samples, max_new_tokens)
    empty = Generation(
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, bool),
        jnp.zeros(shape),
        jnp.zeros((batch, samples), bool),
    )
    state = _Loop(jnp.int32(0), jnp.zeros((batch, samples), jnp.int32), empty.finished_BG, cache, empty)
    first_logits = jnp.repeat(lm.logits(params, hidden_BPD[:, -1:]), samples, axis=1)
    state = record(state, *draw(first_logits, state.step), cache)
    return jax.lax.while_loop(lambda s: (s.step < max_new_tokens) & ~jnp.all(s.done_BG), body, state).out


def _prefill_mask(prompt_mask_BP: jax.Array, slots: int) -> jax.Array:
    """Causal over real prompt tokens, blind to the empty slots; padding sees itself. [B, P, S] bool"""
    prompt = prompt_mask_BP.shape[1]
    causal = jnp.tril(jnp.ones((prompt, prompt), bool))
    seen = (causal[None] & prompt_mask_BP[:, None, :]) | jnp.eye(prompt, dtype=bool)[None]
    return jnp.pad(seen, ((0, 0), (0, 0), (0, slots - prompt)))
