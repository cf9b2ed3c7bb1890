"""Slot refill against one generation of each prompt: tokens and ends equal, log-probabilities to rounding."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from jax.sharding import Mesh, PartitionSpec

from rlhfjax.config import Decoder
from rlhfjax.generation import Generation, Sampling, generate, generate_refilled, guided, sample_keys
from rlhfjax.networks import decoder, init_q_heads

CONFIG = Decoder(
    vocab_size=70, width=16, layers=1, heads=2, kv_heads=1, head_size=8, mlp_width=24, max_positions=32
)
STOP = (7, 13)
LM = decoder(CONFIG)
PARAMS = compiled(lambda key: jax.tree.map(lambda x: x * 1.5, LM.init(key)), jax.random.key(0))
PARAMS = PARAMS | {
    "embedding": jnp.asarray(np.asarray(PARAMS["embedding"]) * 20)
}  # sharp, so that completions differ in length
PROMPTS, SAMPLES, LENGTH, NEW = 6, 2, 4, 7
TOTAL = PROMPTS * SAMPLES
REAL = np.asarray([4, 1, 3, 4, 2, 1])  # tokens of each prompt
MASK = jnp.asarray(np.arange(LENGTH) >= LENGTH - REAL[:, None])
PROMPT = jnp.asarray(np.random.default_rng(1).integers(70, size=(PROMPTS, LENGTH)), jnp.int32)
KEYS = compiled(lambda key: sample_keys(key, jnp.arange(PROMPTS), SAMPLES), jax.random.key(3))
PLACE = np.arange(TOTAL)
SETTINGS: dict[str, Any] = {
    "temperature": np.linspace(0.0, 1.5, TOTAL, dtype=np.float32),
    "top_k": PLACE * 5,
    "top_p": np.linspace(0.5, 1.0, TOTAL, dtype=np.float32),
    "min_p": np.float32(0.01),
    "repetition_penalty": np.linspace(0.8, 2.0, TOTAL, dtype=np.float32),
    "banned_tokens": np.arange(2 * TOTAL).reshape(TOTAL, 2) - 1,
    "min_new_tokens": PLACE % 4,
    "forced_tokens": np.where(PLACE[:, None] % 5 == np.arange(3)[None], 9, -1),
}
EVERY = Sampling(**{name: jnp.asarray(x) for name, x in SETTINGS.items()})


@functools.cache
def whole(sampling: str = "plain") -> Generation:
    settings = {"plain": Sampling(), "every": EVERY}[sampling]
    run = jax.jit(
        lambda *x: generate(LM, PARAMS, *x, max_new_tokens=NEW, stop_tokens=STOP, sampling=settings)
    )
    return run(PROMPT, MASK, KEYS)


@functools.cache
def refilled(slots: int, chunk: int | None, sampled: bool = False):
    settings = EVERY if sampled else Sampling()

    def run(prompt, mask, keys, sampling=settings):
        return generate_refilled(
            LM,
            PARAMS,
            prompt,
            mask,
            keys,
            slots=slots,
            prefill_chunk=chunk,
            max_new_tokens=NEW,
            stop_tokens=STOP,
            sampling=sampling,
        )

    return jax.jit(run)


def assert_same(given: Generation, expected: Generation):
    for name in ("token_BGC", "mask_BGC", "finished_BG"):
        np.testing.assert_array_equal(getattr(given, name), getattr(expected, name), err_msg=name)
    for name in ("logp_BGC", "plain_logp_BGC"):
        np.testing.assert_allclose(getattr(given, name), getattr(expected, name), atol=1e-4, err_msg=name)


@pytest.mark.parametrize(("slots", "chunk"), [(1, 1), (5, 4), (TOTAL, None)])
def test_it_equals_generating_each_prompt_alone(slots, chunk):
    """One slot, a number that divides nothing, all at once."""
    lengths, finished = np.asarray(whole().mask_BGC).sum(-1), np.asarray(whole().finished_BG)
    assert len(set(lengths.ravel())) > 2 and finished.any() and not finished.all()
    assert_same(refilled(slots, chunk)(PROMPT, MASK, KEYS), whole())


def test_halving_the_slots_loses_nothing(monkeypatch):
    """Completions end a few at a time, so that the slots are halved three times: 12, 6, 3, 1."""
    monkeypatch.setattr(importlib.import_module("rlhfjax.generation.refill"), "_FEWEST_SLOTS", 1)
    length = np.asarray([2, 7, 1, 3, 1, 6, 2, 1, 4, 2, 5, 3])
    last = np.arange(NEW) == length[:, None] - 1
    forced = Sampling(banned_tokens=jnp.asarray(STOP), forced_tokens=jnp.asarray(np.where(last, STOP[0], -1)))
    settings = {"max_new_tokens": NEW, "stop_tokens": STOP, "sampling": forced}
    expected = jax.jit(lambda: generate(LM, PARAMS, PROMPT, MASK, KEYS, **settings))()
    np.testing.assert_array_equal(np.asarray(expected.mask_BGC).sum(-1).ravel(), length)
    run = jax.jit(lambda: generate_refilled(LM, PARAMS, PROMPT, MASK, KEYS, slots=TOTAL, **settings))
    assert_same(run(), expected)


def test_every_setting_may_differ_by_completion():
    assert not np.array_equal(whole("every").token_BGC, whole().token_BGC)
    assert_same(refilled(3, 2, sampled=True)(PROMPT, MASK, KEYS), whole("every"))


def test_the_order_of_the_prompts_does_not_matter():
    order = np.asarray([3, 5, 0, 4, 1, 2])
    turned = refilled(5, 4)(np.asarray(PROMPT)[order], np.asarray(MASK)[order], KEYS[order])
    assert_same(turned, jax.tree.map(lambda x: np.asarray(x)[order], whole()))


def test_changing_settings_and_prompts_compiles_nothing():
    run = refilled(3, 2, sampled=True)
    run(PROMPT, MASK, KEYS, EVERY)
    compiled = run._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    warmer = jnp.asarray(np.asarray(EVERY.temperature) + np.float32(0.5))
    other = EVERY._replace(temperature=warmer, repetition_penalty=jnp.asarray(np.ones(TOTAL, np.float32)))
    changed = run(jnp.asarray(np.asarray(PROMPT)[::-1]), jnp.asarray(np.asarray(MASK)[::-1]), KEYS, other)
    assert run._cache_size() == compiled  # pyright: ignore[reportAttributeAccessIssue]
    assert not np.array_equal(changed.token_BGC, whole("every").token_BGC)


def test_prompts_of_one_token_and_completions_of_one_token():
    prompt, one = np.asarray(PROMPT)[:, -1:], np.ones((PROMPTS, 1), bool)
    settings = {"max_new_tokens": 1, "stop_tokens": STOP}
    given = compiled(functools.partial(generate_refilled, LM), PARAMS, prompt, one, KEYS, slots=4, **settings)
    assert_same(given, compiled(functools.partial(generate, LM), PARAMS, prompt, one, KEYS, **settings))


def test_a_guided_model_is_refilled_like_any_other():
    guide = {"q": compiled(lambda key: init_q_heads(key, 16, 70), jax.random.key(5))}
    params = {"base": PARAMS, "guide": guide, "beta": jnp.float32(1.0)}
    settings = {"max_new_tokens": 4, "stop_tokens": STOP}
    run = jax.jit(lambda: generate_refilled(guided(LM), params, PROMPT, MASK, KEYS, slots=4, **settings))
    assert_same(run(), jax.jit(lambda: generate(guided(LM), params, PROMPT, MASK, KEYS, **settings))())


def test_each_device_refills_its_own_share():
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    share = PartitionSpec("data")
    run = jax.shard_map(
        lambda *x: generate_refilled(
            LM, PARAMS, *x, slots=2, prefill_chunk=2, max_new_tokens=NEW, stop_tokens=STOP
        ),
        mesh=mesh,
        in_specs=(share, share, share),
        out_specs=share,
        check_vma=False,
    )
    assert_same(jax.jit(run)(PROMPT, MASK, KEYS), whole())


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"slots": TOTAL + 1}, ValueError, "slots=13 must be from 1 to the 12 completions"),
        ({"slots": 0}, ValueError, "slots=0 must be from 1"),
        ({"prefill_chunk": 7}, ValueError, "prefill_chunk=7 must be from 1 to the 6 prompts"),
        ({"max_new_tokens": 29}, ValueError, "exceeds the model's max_positions 32"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0 must be at least 1"),
        ({"stop_tokens": (70,)}, ValueError, "stop_tokens: 70 is no token id; the vocabulary has 70"),
        ({"stop_tokens": jnp.zeros((5, 1), jnp.int32)}, ValueError, "stop_tokens must be .k. or .R, k."),
        ({"stop_tokens": jnp.zeros(1)}, TypeError, "stop_tokens must be integers, got float32"),
        ({"sampling": Sampling(top_k=jnp.float32(3))}, TypeError, "sampling.top_k must be integers"),
        ({"sampling": Sampling(jnp.ones(PROMPTS))}, ValueError, "sampling.temperature must be a scalar or"),
        ({"prompt": PROMPT * 1.0}, TypeError, "token ids must be integers, got float32"),
        ({"mask": MASK * 1}, TypeError, "prompt_mask must be bool"),
        ({"mask": MASK.at[4].set(False)}, ValueError, "prompt_mask is False in the last column of row 4"),
        ({"keys": KEYS[:5]}, ValueError, "one row a prompt; there are 6 prompts"),
        ({"keys": jnp.zeros((6, 2))}, TypeError, "key must hold typed keys"),
    ],
)
def test_what_cannot_work_is_refused(change, error, why):
    given = {"prompt": PROMPT, "mask": MASK, "keys": KEYS, "slots": 3, "max_new_tokens": 4, "stop_tokens": ()}
    given |= change
    positional = [given.pop(name) for name in ("prompt", "mask", "keys")]
    with pytest.raises(error, match=why):
        generate_refilled(LM, PARAMS, *positional, **given)
    if not change.keys() & {"slots", "prefill_chunk"}:
        del given["slots"]
        with pytest.raises(error, match=why):
            generate(LM, PARAMS, *positional, **given)
