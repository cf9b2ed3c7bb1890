"""Generation: prompts are prefilled once and shared by their samples, then decoded in one compiled loop.

Shapes: B prompts, G samples of each, P prompt length, C most new tokens, V vocabulary, S columns of the cache.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rlhfjax.generation.sampling import Drawn, draw_tokens
from rlhfjax.generation.settings import Sampling, as_stop_tokens
from rlhfjax.networks.branches import pad_prompt_positions
from rlhfjax.networks.decoder import LanguageModel


class Generation(NamedTuple):
    """Completions. The stop token is an action: it is kept, and counted by the mask.

    Of `recipes.chat_rollout` the mask has holes: True on what the model said, not on its partner's tokens.
    """

    token_BGC: jax.Array  # int32, 0 after the end
    mask_BGC: jax.Array  # bool, True up to and including the stop token
    # Both float32, 0 after the end, and equal where nothing but a temperature is set.
    logp_BGC: (
        jax.Array
    )  # log-probability under the processed distribution, the one sampled from (`Drawn.logp_R`)
    plain_logp_BGC: (
        jax.Array
    )  # under the model's own distribution at the same temperature (`Drawn.plain_logp_R`)
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
_FIRST_COLUMNS = 128  # of the cache, at least; then it doubles


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
    stop_tokens: tuple[int, ...] | jax.Array,
    sampling: Sampling = PLAIN,
) -> Generation:
    """Samples G completions of each prompt, up to `max_new_tokens` tokens or the first stop token.

    prompt_BP: int32, left-padded; prompt_mask_BP: bool, True on real tokens (at least the last one).
    key_BG: typed keys, one a completion (`sample_keys`); consumed.
    sampling: arrays or numbers; for all completions alike, or one for each of the B * G in row-major order.
    stop_tokens: ids that end a completion; int32 [k], or [B * G, k], -1 void.

    The prompt's keys and values are computed once and seen by its G samples. The loop ends when every completion has.
    The cache starts short and is made twice as long when it is full, so that a step pays for what is filled.

    Raises ValueError or TypeError on prompts, keys or settings of a wrong shape or dtype, on a prompt too long for the
    model's positions and on a stop token outside the vocabulary.
    """
    check_prompts(lm, prompt_BP, prompt_mask_BP, key_BG, max_new_tokens)
    batch, samples = key_BG.shape
    prompt = prompt_BP.shape[1]
    length_B = jnp.sum(prompt_mask_BP, axis=1, dtype=jnp.int32)
    stops = as_stop_tokens(stop_tokens, lm.config.vocab_size, batch * samples)
    params = lm.for_decoding(params)

    def draw(state: _Loop, logits_BGV) -> Drawn:
        seen = None
        if sampling.repetition_penalty is not None:
            seen = _seen(prompt_BP, prompt_mask_BP, state.out)
        logits_RV = logits_BGV.reshape(batch * samples, -1)
        return draw_tokens(logits_RV, key_BG.reshape(-1), state.step, sampling, seen, stops)

    def record(state: _Loop, drawn: Drawn, cache) -> _Loop:
        stop_BG = is_stop(drawn.token_R, stops).reshape(batch, samples) & ~state.done_BG
        token_BG, logp_BG, plain_BG = (jnp.where(state.done_BG, 0, x.reshape(batch, samples)) for x in drawn)
        columns = (token_BG, ~state.done_BG, logp_BG, plain_BG)
        written = [
            jax.lax.dynamic_update_slice_in_dim(old, new[:, :, None], state.step, axis=2)
            for old, new in zip(state.out[:4], columns, strict=True)
        ]
        out = Generation(*written, finished_BG=state.out.finished_BG | stop_BG)
        return _Loop(state.step + 1, token_BG, state.done_BG | stop_BG, cache, out)

    def decode(state: _Loop, columns: int) -> _Loop:
        position_BG = jnp.broadcast_to((length_B + state.step - 1)[:, None], (batch, samples))
        hidden_BGD, cache = lm.apply(
            params,
            state.last_BG,
            position_BT=position_BG,
            mask_BTS=_decode_mask(prompt_mask_BP, samples, columns, state.step - 1),
            cache=state.cache,
            slot=prompt + (state.step - 1) * samples,
        )
        return record(state, draw(state, lm.logits(params, hidden_BGD)), cache)

    buckets = bucket_lengths(prompt, samples, max_new_tokens)
    hidden_BD, cache = prefill(lm, params, prompt_BP, prompt_mask_BP, prompt + samples * buckets[0])
    out = _empty(batch, samples, max_new_tokens)
    state = _Loop(jnp.int32(0), out.token_BGC[:, :, 0], out.finished_BG, cache, out)
    first_logits = jnp.repeat(lm.logits(params, hidden_BD[:, None]), samples, axis=1)
    state = record(state, draw(state, first_logits), cache)
    for length in buckets:
        columns = prompt + samples * length
        end = min(length + 1, max_new_tokens)  # the last token is drawn and never read
        state = state._replace(cache=_grown(state.cache, lm.init_cache(batch, columns)))
        state = jax.lax.while_loop(
            lambda s, end=end: (s.step < end) & ~jnp.all(s.done_BG),
            lambda s, columns=columns: decode(s, columns),
            state,
        )
    return state.out


def prefill(
    lm: LanguageModel, params: dict, prompt_BP: jax.Array, prompt_mask_BP: jax.Array, columns: int
) -> tuple[jax.Array, tuple]:
    """(hidden state of the last token [B, D], a cache of `columns` columns whose first P hold the prompt)."""
    hidden_BPD, cache = lm.apply(
        params,
        prompt_BP,
        position_BT=pad_prompt_positions(prompt_mask_BP),
        mask_BTS=_prefill_mask(prompt_mask_BP, columns),
        cache=lm.init_cache(prompt_BP.shape[0], columns),
        slot=0,
    )
    return hidden_BPD[:, -1], cache


def is_stop(token_R: jax.Array, stop_tokens: jax.Array) -> jax.Array:
    """Whether each token is among the stop tokens, [k] or [R, k]; bool [R]."""
    stops_Rk = jnp.broadcast_to(stop_tokens, (token_R.shape[0], stop_tokens.shape[-1]))
    return jnp.any(token_R[:, None] == stops_Rk, axis=1)


def bucket_lengths(prompt: int, samples: int, new_tokens: int) -> list[int]:
    """Tokens of each completion that the cache holds, from short to all of them; the columns about double."""
    lengths, columns = [], max(_FIRST_COLUMNS, 2 * prompt)
    while prompt + samples * new_tokens > columns:
        lengths.append(max(1, (columns - prompt) // samples))
        columns *= 2
    return [*dict.fromkeys(lengths), new_tokens]


def check_prompts(
    lm: LanguageModel, prompt_BP: jax.Array, prompt_mask_BP: jax.Array, key_BG: jax.Array, max_new_tokens: int
) -> None:
    """Raises TypeError or ValueError that tells what is wrong with the prompts or their keys."""
    chex.assert_rank([prompt_BP, prompt_mask_BP, key_BG], [2, 2, 2])
    chex.assert_equal_shape([prompt_BP, prompt_mask_BP])
    if not jnp.issubdtype(prompt_BP.dtype, jnp.integer):
        raise TypeError(f"prompt: token ids must be integers, got {prompt_BP.dtype}")
    if prompt_mask_BP.dtype != bool:
        raise TypeError(f"prompt_mask must be bool, True on real tokens, got {prompt_mask_BP.dtype}")
    if not jnp.issubdtype(key_BG.dtype, jax.dtypes.prng_key):
        raise TypeError(f"key must hold typed keys, as `sample_keys` makes them, got {key_BG.dtype}")
    if key_BG.shape[0] != prompt_BP.shape[0]:
        raise ValueError(
            f"key is {list(key_BG.shape)}, one row a prompt; there are {prompt_BP.shape[0]} prompts"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    prompt, most = prompt_BP.shape[1], lm.config.max_positions
    if prompt + max_new_tokens > most:
        raise ValueError(
            f"prompt length {prompt} + max_new_tokens {max_new_tokens} exceeds the model's max_positions {most}"
        )
    if isinstance(prompt_mask_BP, Tracer):
        return  # what follows is told by values
    empty = np.flatnonzero(~np.asarray(prompt_mask_BP)[:, -1])
    if empty.size:
        raise ValueError(
            f"prompt_mask is False in the last column of row {empty[0]}: prompts are padded on the left and hold at "
            "least one token"
        )


def _seen(prompt_BP: jax.Array, prompt_mask_BP: jax.Array, out: Generation) -> jax.Array:
    """The tokens of each completion and its prompt, [B * G, P + C], -1 where there is none yet."""
    samples = out.token_BGC.shape[1]
    prompt = jnp.repeat(jnp.where(prompt_mask_BP, prompt_BP, -1), samples, axis=0)
    drawn = jnp.where(out.mask_BGC, out.token_BGC, -1)
    return jnp.concatenate([prompt, drawn.reshape(prompt.shape[0], -1)], axis=1)


def _empty(batch: int, samples: int, length: int) -> Generation:
    shape = (batch, samples, length)
    return Generation(
        token_BGC=jnp.zeros(shape, jnp.int32),
        mask_BGC=jnp.zeros(shape, bool),
        logp_BGC=jnp.zeros(shape),
        plain_logp_BGC=jnp.zeros(shape),
        finished_BG=jnp.zeros((batch, samples), bool),
    )


def _grown(cache: tuple, longer: tuple) -> tuple:
    """The cache in the first columns of a longer one that is empty."""
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice(new, old, (0,) * new.ndim), cache, longer
    )


def _decode_mask(prompt_mask_BP: jax.Array, samples: int, columns: int, step: jax.Array) -> jax.Array:
    """Columns that the G tokens of a step see: the prompt, and their own branch up to now. [B, G, S] bool"""
    prompt = prompt_mask_BP.shape[1]
    column_S = jnp.arange(columns) - prompt  # negative: the prompt; then G columns a step
    branch = (column_S % samples)[None, :] == jnp.arange(samples)[:, None]
    own = branch & (column_S >= 0)[None, :] & (column_S // samples <= step)[None, :]
    prompt_BS = jnp.pad(prompt_mask_BP, ((0, 0), (0, columns - prompt)))
    return own[None] | prompt_BS[:, None, :]


def _prefill_mask(prompt_mask_BP: jax.Array, columns: int) -> jax.Array:
    """Causal over real prompt tokens, blind to the empty columns; padding sees itself. [B, P, S] bool"""
    prompt = prompt_mask_BP.shape[1]
    causal = jnp.tril(jnp.ones((prompt, prompt), bool))
    seen = (causal[None] & prompt_mask_BP[:, None, :]) | jnp.eye(prompt, dtype=bool)[None]
    return jnp.pad(seen, ((0, 0), (0, 0), (0, columns - prompt)))
