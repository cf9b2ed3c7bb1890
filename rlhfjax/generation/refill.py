"""Generation through a fixed number of slots: a completion that ends frees its slot for the next.

A batch of `generate` lasts as long as its longest completion, while rows that have ended idle. Here a few slots stay
full until the queue is empty, all in one program. What comes out is what `generate` gives.

A slot holds one completion. Its cache is [prompt but its last token | ring of C columns]: at every step all slots
write to the same column of the ring, the step modulo C, so that the write is one slice, however far each completion
has come; the mask tells how many of the last columns are a slot's own. The last token of the prompt is the first that
a slot reads, so that the first token of a completion is drawn like all others.

Prompts are prefilled in the order of the queue, some at a time, inside the loop, when the slots have taken all
samples of those before. Each is prefilled once; its samples start from copies of its columns.

Shapes: N prompts, G samples of each, R = N * G completions, P prompt length, C most new tokens, S slots, Q prompts
prefilled together.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.generation.generate import PLAIN, Generation, check_prompts, is_stop, prefill
from rlhfjax.generation.sampling import draw_tokens
from rlhfjax.generation.settings import Sampling, as_stop_tokens, check_sampling, take_rows
from rlhfjax.networks.decoder import LanguageModel

_FEWEST_SLOTS = 4  # when the queue is empty the slots are halved down to this


class _Work(NamedTuple):
    """What the loop reads and never changes; completions in row-major order of (prompt, sample)."""

    lm: LanguageModel
    params: dict
    prompt_NP: jax.Array  # N padded to a multiple of Q
    mask_NP: jax.Array
    key_R: jax.Array
    sampling: Sampling
    stops: jax.Array
    samples: int
    length: int  # C
    chunk: int  # Q


class _Prefilled(NamedTuple):
    number: jax.Array  # of the Q prompts, counted from 0; -1 before the first
    cache: Any  # [Q, ...] of P - 1 columns


class _Output(NamedTuple):
    token_RC: jax.Array
    logp_RC: jax.Array
    plain_logp_RC: jax.Array
    length_R: jax.Array
    finished_R: jax.Array


class _State(NamedTuple):
    step: jax.Array
    next: jax.Array  # the first completion that no slot has taken
    task_S: jax.Array  # the completion in each slot; R where there is none
    count_S: jax.Array  # tokens it has drawn
    last_S: jax.Array  # the token it reads next
    cache: Any
    prefilled: _Prefilled
    out: _Output


def generate_refilled(
    lm: LanguageModel,
    params: dict,
    prompt_NP: jax.Array,
    prompt_mask_NP: jax.Array,
    key_NG: jax.Array,
    *,
    slots: int,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...] | jax.Array,
    sampling: Sampling = PLAIN,
    prefill_chunk: int | None = None,
) -> Generation:
    """Samples G completions of each of N prompts as `generate` does, with the same arguments, through `slots` slots.

    Tokens, masks and ends are those of `generate`, log-probabilities to rounding (1e-4 in float32), whatever the
    number of slots and the order of the prompts: each completion has its own key.

    Args:
      slots: completions decoded at a time, at most N * G; static.
      prefill_chunk: prompts prefilled in one call, Q; static. None: as many as fill the slots.

    When the queue is empty and half of the slots idle, the others go on in half as many.

    It is for one device, or for the share of each under `shard_map`; `vmap` prefills a chunk at every admission.
    Raises ValueError or TypeError as `generate`, and ValueError on a number of slots or prompts that cannot be.
    """
    check_prompts(lm, prompt_NP, prompt_mask_NP, key_NG, max_new_tokens)
    prompts, samples = key_NG.shape
    total = prompts * samples
    if not 1 <= slots <= total:
        raise ValueError(
            f"slots={slots} must be from 1 to the {total} completions there are ({prompts} prompts, {samples} samples)"
        )
    chunk = prefill_chunk if prefill_chunk is not None else min(prompts, -(-slots // samples))
    if not 1 <= chunk <= prompts:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be from 1 to the {prompts} prompts there are")
    check_sampling(sampling, total)
    padding = ((0, -prompts % chunk), (0, 0))
    work = _Work(
        lm,
        lm.for_decoding(params),
        jnp.pad(prompt_NP, padding),
        jnp.pad(prompt_mask_NP, padding),
        key_NG.reshape(-1),
        sampling,
        as_stop_tokens(stop_tokens, lm.config.vocab_size, total),
        samples,
        max_new_tokens,
        chunk,
    )
    state = _run(work, _start(work, slots, total))
    grouped = jax.tree.map(lambda x: x.reshape(prompts, samples, *x.shape[1:]), state.out)
    mask_NGC = jnp.arange(max_new_tokens)[None, None] < grouped.length_R[:, :, None]
    return Generation(grouped[0], mask_NGC, grouped[1], grouped[2], grouped.finished_R)


def _start(work: _Work, slots: int, total: int) -> _State:
    before = work.prompt_NP.shape[1] - 1
    empty_S = jnp.zeros(slots, jnp.int32)
    shape = (total, work.length)
    return _State(
        step=jnp.int32(0),
        next=jnp.int32(0),
        task_S=jnp.full(slots, total, jnp.int32),
        count_S=empty_S,
        last_S=empty_S,
        cache=work.lm.init_cache(slots, before + work.length),
        prefilled=_Prefilled(jnp.int32(-1), work.lm.init_cache(work.chunk, before)),
        out=_Output(
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape),
            jnp.zeros(shape),
            jnp.zeros(total, jnp.int32),
            jnp.zeros(total, bool),
        ),
    )


def _run(work: _Work, state: _State) -> _State:
    """All slots while there is a queue; then half of them, and again, each as soon as it holds what is left."""
    total, width = state.out.length_R.shape[0], state.task_S.shape[0]

    def live(state):
        return jnp.sum(state.task_S < total)

    half = width // 2 if width // 2 >= _FEWEST_SLOTS else 0
    state = jax.lax.while_loop(
        lambda s: (s.next < total) | (live(s) > half), lambda s: _decode(work, _admit(work, s)), state
    )
    while half:
        width, half = half, half // 2 if half // 2 >= _FEWEST_SLOTS else 0
        order = jnp.argsort(state.task_S)[:width]  # the idle ones have the greatest number
        state = state._replace(
            task_S=state.task_S[order],
            count_S=state.count_S[order],
            last_S=state.last_S[order],
            cache=jax.tree.map(lambda x, order=order: x[order], state.cache),
        )
        state = jax.lax.while_loop(lambda s, half=half: live(s) > half, lambda s: _decode(work, s), state)
    return state


def _admit(work: _Work, state: _State) -> _State:
    """Fills free slots from the queue, one after another."""
    total = state.out.length_R.shape[0]

    def admit(state: _State) -> _State:
        prompt = state.next // work.samples
        wanted = prompt // work.chunk
        # A loop of at most one turn: a cond would copy the cache where nothing is to be done. Its work hangs on what
        # the loop carries: the compiler would do it before the loop, turn or no turn, if it hung on `wanted`.
        prefilled = jax.lax.while_loop(
            lambda held: held.number != wanted, lambda held: _prefill(work, held.number + 1), state.prefilled
        )
        slot = jnp.argmax(state.task_S == total)
        row = prompt - wanted * work.chunk

        def copy(cache, source):
            source = jax.lax.dynamic_slice_in_dim(source, row, 1)
            return jax.lax.dynamic_update_slice(cache, source, (slot,) + (0,) * (cache.ndim - 1))

        return state._replace(
            next=state.next + 1,
            task_S=state.task_S.at[slot].set(state.next),
            count_S=state.count_S.at[slot].set(0),
            last_S=state.last_S.at[slot].set(work.prompt_NP[prompt, -1]),
            cache=jax.tree.map(copy, state.cache, prefilled.cache),
            prefilled=prefilled,
        )

    return jax.lax.while_loop(lambda s: (s.next < total) & jnp.any(s.task_S == total), admit, state)


def _prefill(work: _Work, number: jax.Array) -> _Prefilled:
    """All but the last token of Q prompts."""
    before = work.prompt_NP.shape[1] - 1
    if before == 0:
        return _Prefilled(number, work.lm.init_cache(work.chunk, 0))
    token, mask = (
        jax.lax.dynamic_slice(x, (number * work.chunk, 0), (work.chunk, before))
        for x in (work.prompt_NP, work.mask_NP)
    )
    return _Prefilled(number, prefill(work.lm, work.params, token, mask, before)[1])


def _decode(work: _Work, state: _State) -> _State:
    """One token in every slot that holds a completion."""
    total, before = state.out.length_R.shape[0], work.prompt_NP.shape[1] - 1
    held_S = jnp.minimum(state.task_S, total - 1)  # of idle slots nothing is written
    mask_SP = work.mask_NP[held_S // work.samples]
    column = state.step % work.length
    age_C = (column - jnp.arange(work.length)) % work.length
    own_SC = age_C[None, :] <= state.count_S[:, None]
    hidden_S1D, cache = work.lm.apply(
        work.params,
        state.last_S[:, None],
        position_BT=(jnp.sum(mask_SP, axis=1, dtype=jnp.int32) - 1 + state.count_S)[:, None],
        mask_BTS=jnp.concatenate([mask_SP[:, :before], own_SC], axis=1)[:, None, :],
        cache=state.cache,
        slot=before + column,
    )
    logits_SV = work.lm.logits(work.params, hidden_S1D)[:, 0]
    sampling, stops = take_rows(work.sampling, work.stops, held_S)
    seen = None if sampling.repetition_penalty is None else _seen(work, state, held_S)
    drawn = draw_tokens(logits_SV, work.key_R[held_S], state.count_S, sampling, seen, stops)

    old, place = state.out, (state.task_S, state.count_S)
    stop_S, count_S = is_stop(drawn.token_R, stops), state.count_S + 1
    out = _Output(
        *(x.at[place].set(new, mode="drop") for x, new in zip(old[:3], drawn, strict=True)),
        length_R=old.length_R.at[state.task_S].set(count_S, mode="drop"),
        finished_R=old.finished_R.at[state.task_S].set(stop_S, mode="drop"),
    )
    ended_S = stop_S | (count_S >= work.length)
    return state._replace(
        step=state.step + 1,
        task_S=jnp.where(ended_S, total, state.task_S),
        count_S=jnp.where(ended_S | (state.task_S == total), 0, count_S),
        last_S=drawn.token_R,
        cache=cache,
        out=out,
    )


def _seen(work: _Work, state: _State, held_S: jax.Array) -> jax.Array:
    """The tokens of each slot's prompt and completion, [S, P + C], -1 where there is none."""
    prompt = held_S // work.samples
    prompt_SP = jnp.where(work.mask_NP[prompt], work.prompt_NP[prompt], -1)
    drawn = jnp.arange(work.length)[None, :] < state.count_S[:, None]
    return jnp.concatenate([prompt_SP, jnp.where(drawn, state.out.token_RC[held_S], -1)], axis=1)
