"""Q heads against plain arrays, and guided decoding against the distribution it stands for."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled

from rlhfjax.config import Decoder
from rlhfjax.generation import Sampling, generate, guided, sample_keys
from rlhfjax.networks import (
    Branches,
    best_token,
    branch_hidden,
    decoder,
    init_q_heads,
    q_advantage,
    q_log_softmax,
    q_of_tokens,
    q_values,
    state_value,
)

CONFIG = Decoder(
    vocab_size=14, width=8, layers=1, heads=2, kv_heads=2, head_size=4, mlp_width=12, max_positions=16
)
WIDER = dataclasses.replace(CONFIG, width=12, layers=2)
LM, TRUNK = decoder(CONFIG), decoder(WIDER)
STOP = (2, 5)
PROMPT = jnp.asarray([[0, 3, 4], [6, 7, 8]], jnp.int32)
MASK = jnp.asarray([[0, 1, 1], [1, 1, 1]], bool)
KEYS = compiled(lambda key: sample_keys(key, jnp.arange(2), 3), jax.random.key(3))


def sharp(lm, seed):
    params = jax.jit(lm.init)(jax.random.key(seed))
    return params | {"embedding": jnp.asarray(np.asarray(params["embedding"]) * 30)}


BASE = sharp(LM, 0)


@partial(jax.jit, static_argnums=(0, 1))
def heads(width, seed=7):
    key_q, key_v = jax.random.split(jax.random.key(seed))
    bias = jax.random.normal(key_q, (2, CONFIG.vocab_size))
    q = init_q_heads(key_q, width, CONFIG.vocab_size) | {"outer_bias": bias}
    return {"q": q, "v": init_q_heads(key_v, width, 1, heads=1, bias=0.5)}


def hidden_states(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def before_of(lm, params, branches):
    """Hidden states in which the completions' tokens are chosen."""
    return branch_hidden(lm, params, branches)[0]


logits_of = jax.jit(LM.logits)


def q64(params, hidden):
    """All values by the definition, NumPy float64, [H, ..., V]."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    out = []
    for i in range(p["outer"].shape[0]):
        inner = np.maximum(np.asarray(hidden, np.float64) @ p["inner"][i] + p["inner_bias"][i], 0)
        out.append(inner @ p["outer"][i].T + p["outer_bias"][i])
    return np.stack(out)


def test_heads_equal_their_definition():
    params = heads(8)
    hidden = hidden_states(3, 4, 8)
    token = jnp.asarray(np.random.default_rng(2).integers(14, size=(3, 4)))
    expected = q64(params["q"], hidden)
    np.testing.assert_allclose(compiled(q_values, params["q"], hidden), expected, rtol=1e-4, atol=1e-5)
    taken = np.take_along_axis(expected, np.asarray(token)[None, ..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(compiled(q_of_tokens, params["q"], hidden, token), taken, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        compiled(state_value, params["v"], hidden), q64(params["v"], hidden)[0, ..., 0], rtol=1e-4, atol=1e-5
    )
    advantage = expected.min(0) - q64(params["v"], hidden)[0]
    np.testing.assert_allclose(compiled(q_advantage, params, hidden), advantage, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        compiled(q_advantage, {"q": params["q"]}, hidden), expected.min(0), rtol=1e-4, atol=1e-5
    )
    best, value = compiled(best_token, params["q"], hidden, chunk_size=5)
    np.testing.assert_array_equal(best, expected.min(0).argmax(-1))
    np.testing.assert_allclose(value, expected.min(0).max(-1), rtol=1e-4, atol=1e-5)


def test_log_softmax_in_chunks_equals_all_at_once_with_its_gradient():
    params = heads(8)["q"]
    hidden = hidden_states(3, 4, 8)
    token = jnp.asarray(np.random.default_rng(2).integers(14, size=(3, 4)))

    def chunked(params, hidden):
        return jnp.sum(jnp.sin(q_log_softmax(params, hidden, token, temperature=0.7, chunk_size=5)))

    def whole(params, hidden):
        logp = jax.nn.log_softmax(q_values(params, hidden) / 0.7)
        index = jnp.broadcast_to(token[None, ..., None], (2, *token.shape, 1))
        return jnp.sum(jnp.sin(jnp.take_along_axis(logp, index, axis=-1)))

    given = jax.jit(jax.value_and_grad(chunked, (0, 1)))(params, hidden)
    expected = jax.jit(jax.value_and_grad(whole, (0, 1)))(params, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), given, expected)


def test_heads_start_where_they_are_told():
    settings = {"heads": 3, "hidden": 4, "scale": 0.0, "bias": -2.0}
    params = compiled(lambda key: init_q_heads(key, 8, 5, **settings), jax.random.key(0))
    hidden = hidden_states(2, 8)
    np.testing.assert_array_equal(compiled(q_values, params, hidden), np.full((3, 2, 5), -2.0))
    with pytest.raises(ValueError, match="must be at least 1"):
        init_q_heads(jax.random.key(0), 8, 5, heads=0)


MODELS = {
    "own trunk": (guided(LM, TRUNK), heads(12) | {"trunk": sharp(TRUNK, 1)}),
    "shared trunk": (guided(LM), heads(8)),
}


def run(lm, params, sampling=None):
    sampling = sampling or Sampling()
    return jax.jit(
        lambda params: generate(
            lm, params, PROMPT, MASK, KEYS, max_new_tokens=5, stop_tokens=STOP, sampling=sampling
        )
    )(params)


@pytest.mark.parametrize("name", list(MODELS))
def test_without_beta_it_is_the_base_policy_to_the_bit(name):
    model, guide = MODELS[name]
    spoiled = jax.tree.map(lambda x: np.full_like(x, np.nan), guide)
    expected = run(LM, BASE)
    assert len(set(np.asarray(expected.mask_BGC).sum(-1).ravel())) > 1  # completions differ in length
    for value in (guide, spoiled):
        given = run(model, {"base": BASE, "guide": value, "beta": jnp.float32(0.0)})
        jax.tree.map(np.testing.assert_array_equal, given, expected)


def guided_logits(name, beta, hidden_base, hidden_guide):
    """log pi + beta (min Q - V) from the networks apart."""
    _, guide = MODELS[name]
    advantage = q64(guide["q"], hidden_guide).min(0) - q64(guide["v"], hidden_guide)[0]
    return np.asarray(logits_of(BASE, hidden_base), np.float64) + beta * advantage


@pytest.mark.parametrize("name", list(MODELS))
def test_logp_while_decoding_is_that_of_the_guided_distribution(name):
    """The cache holds both networks: every step equals two training forwards over the whole text."""
    model, guide = MODELS[name]
    out = run(model, {"base": BASE, "guide": guide, "beta": jnp.float32(1.5)})
    branches = Branches(PROMPT, MASK, out.token_BGC, out.mask_BGC)
    before = before_of(LM, BASE, branches)
    read = before if name == "shared trunk" else before_of(TRUNK, guide["trunk"], branches)
    logits = guided_logits(name, 1.5, before, read)
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logp = logp - logits.max(-1, keepdims=True)
    logp = np.take_along_axis(logp, np.asarray(out.token_BGC)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.logp_BGC, np.where(out.mask_BGC, logp, 0.0), atol=2e-4)
    unguided = run(LM, BASE)
    assert not np.array_equal(out.token_BGC, unguided.token_BGC)


def test_a_great_beta_takes_the_token_of_the_highest_value():
    model, guide = MODELS["shared trunk"]
    out = run(model, {"base": BASE, "guide": guide, "beta": jnp.float32(1e6)})
    before = before_of(LM, BASE, Branches(PROMPT, MASK, out.token_BGC, out.mask_BGC))
    best = q64(guide["q"], before).min(0).argmax(-1)
    np.testing.assert_array_equal(out.token_BGC, np.where(out.mask_BGC, best, 0))


def test_rows_may_have_their_own_beta():
    model, guide = MODELS["shared trunk"]
    beta = jnp.asarray([[0.0], [2.0]])
    out = jax.tree.map(np.asarray, run(model, {"base": BASE, "guide": guide, "beta": beta}))
    for row, single in enumerate((0.0, 2.0)):
        alone = run(model, {"base": BASE, "guide": guide, "beta": jnp.float32(single)})
        np.testing.assert_array_equal(out.token_BGC[row], np.asarray(alone.token_BGC)[row])


def test_only_the_base_policys_likeliest_tokens_are_drawn():
    guide = heads(8)
    model = guided(LM, top_k=3)
    hidden = hidden_states(2, 3, 8)
    params = {"base": BASE, "guide": guide, "beta": jnp.float32(2.0)}
    logits, plain = np.asarray(compiled(model.logits, params, hidden)), np.asarray(logits_of(BASE, hidden))
    kept = np.isfinite(logits)
    np.testing.assert_array_equal(kept, plain >= np.sort(plain, axis=-1)[..., -3:-2])
    whole = np.asarray(compiled(guided(LM).logits, params, hidden))
    np.testing.assert_array_equal(logits[kept], whole[kept])


def test_only_what_the_base_policy_might_say_is_said():
    hidden = hidden_states(2, 3, 8)
    params = {"base": BASE, "guide": heads(8), "beta": jnp.float32(2.0)}
    logits = np.asarray(compiled(guided(LM, min_p=0.1).logits, params, hidden))
    plain = np.asarray(logits_of(BASE, hidden), np.float64)
    likely = np.exp(plain - plain.max(axis=-1, keepdims=True)) >= 0.1
    assert 0 < likely.sum() < likely.size and (likely.sum(axis=-1) > 1).any()
    np.testing.assert_array_equal(np.isfinite(logits), likely)
    whole = np.asarray(compiled(guided(LM).logits, params, hidden))
    np.testing.assert_array_equal(logits[likely], whole[likely])


def test_the_advantage_may_be_any_function():
    def bounded(params, hidden):
        return jnp.minimum(q_advantage(params, hidden), 0.0)

    hidden = hidden_states(2, 3, 8)
    params = {"base": BASE, "guide": heads(8), "beta": jnp.float32(2.0)}
    given = compiled(guided(LM, advantage=bounded).logits, params, hidden)
    advantage = np.asarray(compiled(bounded, params["guide"], hidden))
    expected = np.asarray(logits_of(BASE, hidden)) + 2.0 * advantage
    np.testing.assert_allclose(given, expected, rtol=1e-6)


def test_what_cannot_work_is_refused():
    model, guide = MODELS["shared trunk"]
    with pytest.raises(ValueError, match="no embedding and no init"):
        model.embedding({})
    with pytest.raises(ValueError, match="top_k=-1"):
        guided(LM, top_k=-1)
    with pytest.raises(ValueError, match="min_p=1.5"):
        guided(LM, min_p=1.5)
    params = {
        "base": BASE,
        "guide": {"q": compiled(lambda key: init_q_heads(key, 8, 9), jax.random.key(0))},
        "beta": 1.0,
    }
    with pytest.raises(ValueError, match="the advantage has shape"):
        model.logits(params, jnp.zeros((2, 3, 8)))
    short = guided(LM, decoder(dataclasses.replace(WIDER, max_positions=6)))
    with pytest.raises(ValueError, match="max_positions 6"):
        run(short, {"base": BASE, "guide": guide, "beta": 1.0})
