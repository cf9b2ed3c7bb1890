"""Sampling against exact distributions, generation against the training forward."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled

from rlhfjax.config import Decoder
from rlhfjax.generation import Generation, Sampling, filter_logits, generate, sample_keys, sample_token
from rlhfjax.networks import Branches, branch_hidden, decoder

CONFIG = Decoder(
    vocab_size=70, width=16, layers=2, heads=2, kv_heads=2, head_size=8, mlp_width=24, max_positions=32
)
STOP = (2, 5)
LM = decoder(CONFIG)
PARAMS = compiled(lambda key: jax.tree.map(lambda x: x * 1.5, LM.init(key)), jax.random.key(0))
# Sharper logits, so that completions stop at different lengths.
PARAMS = PARAMS | {"embedding": jnp.asarray(np.asarray(PARAMS["embedding"]) * 20)}
PROMPT = jnp.asarray([[0, 0, 3, 4], [5, 6, 7, 8], [0, 9, 9, 1]], jnp.int32)
MASK = jnp.asarray([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]], bool)


@jax.jit
def run(prompt, mask, keys, sampling) -> Generation:
    return generate(LM, PARAMS, prompt, mask, keys, max_new_tokens=8, stop_tokens=STOP, sampling=sampling)


def default(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> Sampling:
    return Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p))


def keys(samples=4, seed=3):
    return compiled(lambda key: sample_keys(key, jnp.arange(3), samples), jax.random.key(seed))


@jax.jit
def forward_logits(branches):
    """Logits before every token of the completions, from one pass."""
    return LM.logits(PARAMS, branch_hidden(LM, PARAMS, branches)[0])


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def random_logits(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def numpy_filter(logits, top_k, top_p, min_p):
    """The definition by sorting, in float64: the kept set of one row."""
    order = np.argsort(-logits, kind="stable")
    kept = list(order[: top_k or len(logits)])
    kept += [i for i in order if logits[i] == logits[kept[-1]] and i not in kept]
    p = np.exp(logits[kept] - logits.max())
    p /= p.sum()
    if top_p < 1:
        count = int(np.searchsorted(np.cumsum(p), top_p) + 1)
        kept, p = kept[:count], p[:count]
    return {int(i) for i, x in zip(kept, p, strict=True) if x >= min_p * p.max()}


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2), (9, 0.6, 0.1)]
)
def test_filters_keep_what_sorting_keeps(top_k, top_p, min_p):
    logits = random_logits(7, 6, 70) * 2
    out = np.asarray(jax.jit(filter_logits)(logits, top_k, top_p, min_p))
    for row, kept in zip(np.asarray(logits, np.float64), out, strict=True):
        assert set(np.flatnonzero(np.isfinite(kept))) == numpy_filter(row, top_k, top_p, min_p)
    finite = np.isfinite(out)
    np.testing.assert_array_equal(out[finite], np.asarray(logits)[finite])


def test_filters_may_differ_by_row():
    logits, ones = random_logits(8, 3, 70), np.ones(3, np.float32)
    out = compiled(filter_logits, logits, np.asarray([0, 1, 4]), ones, 0 * ones)
    assert np.isfinite(out).sum(axis=1).tolist() == [70, 1, 4]


@pytest.mark.parametrize("size", [3, 64, 70, 130])  # one block of the search, exactly one, several
def test_tokens_are_drawn_by_inverting_the_distribution(size):
    """At evenly spaced uniforms the counts equal the probabilities to one part in N."""
    logits = random_logits(9, size) * np.float32(1.5)
    n = 20_000
    uniform = ((np.arange(n) + 0.5) / n).astype(np.float32)
    token, logp, _ = jax.jit(sample_token)(np.tile(logits[None], (n, 1)), uniform, default(0.8))
    p = np.exp(np.asarray(logits, np.float64) / 0.8)
    p /= p.sum()
    np.testing.assert_allclose(np.bincount(token, minlength=size) / n, p, atol=2.5 / n)
    np.testing.assert_allclose(logp, np.log(p)[np.asarray(token)], atol=1e-5)


@pytest.mark.parametrize("size", [50, 200])
def test_no_token_of_probability_zero_is_drawn(size):
    logits = np.where(np.arange(size) % 3 == 0, 0.0, -np.inf).astype(np.float32)
    uniform = np.asarray([0.0, 0.5, 1.0 - 2**-24, 0.999999], np.float32)
    token, logp, _ = compiled(sample_token, np.tile(logits[None], (4, 1)), uniform, default())
    token = np.asarray(token)
    assert np.all(token % 3 == 0)
    np.testing.assert_allclose(logp, -np.log(-(-size // 3)), atol=1e-5)
    assert token[0] == 0 and token[2] == (size - 1) // 3 * 3


def test_temperature_zero_is_greedy_and_rows_may_differ():
    logits = random_logits(1, 2, 70)
    sampling = default()._replace(temperature=jnp.asarray([0.0, 1.0]))
    drawn = compiled(sample_token, logits, np.asarray([0.99, 0.0], np.float32), sampling)
    token, logp = map(np.asarray, drawn[:2])
    assert token[0] == np.argmax(logits[0]) and logp[0] == 0.0
    assert token[1] == 0 and logp[1] < 0


def test_sampled_filters_give_renormalised_logp():
    logits = random_logits(2, 1, 70)
    drawn = compiled(sample_token, logits, np.asarray([0.3], np.float32), default(top_k=3))
    token, logp = map(np.asarray, drawn[:2])
    top = np.sort(np.asarray(logits[0], np.float64))[-3:]
    expected = float(logits[0, token[0]]) - np.log(np.exp(top).sum())
    np.testing.assert_allclose(logp[0], expected, atol=1e-5)


def test_logp_kept_while_decoding_equals_the_training_forward():
    out = run(PROMPT, MASK, keys(), default())
    logp = log_softmax(forward_logits(Branches(PROMPT, MASK, out.token_BGC, out.mask_BGC)))
    logp = np.take_along_axis(logp, np.asarray(out.token_BGC)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.logp_BGC, np.where(out.mask_BGC, logp, 0.0), atol=1e-4)
    lengths = np.asarray(out.mask_BGC).sum(-1)
    assert lengths.min() < lengths.max()  # the test would be weak if all ended together


def test_completions_stop_at_stop_tokens():
    out = run(PROMPT, MASK, keys(), default())
    token, mask, finished = (np.asarray(x) for x in (out.token_BGC, out.mask_BGC, out.finished_BG))
    for b in range(3):
        for g in range(4):
            length = mask[b, g].sum()
            assert mask[b, g, :length].all()
            stops = np.isin(token[b, g, :length], STOP)
            assert not stops[:-1].any()
            assert finished[b, g] == stops[-1]
            assert finished[b, g] or length == 8
            assert (token[b, g, length:] == 0).all()
    assert finished.any()


def test_a_completion_does_not_depend_on_its_batch():
    whole = jax.tree.map(np.asarray, run(PROMPT, MASK, keys(), default()))
    order = np.asarray([2, 0, 1])
    prompt, mask = np.asarray(PROMPT), np.asarray(MASK)
    turned = run(prompt[order], mask[order], keys()[order], default())
    np.testing.assert_array_equal(turned.token_BGC, whole.token_BGC[order])
    alone = jax.tree.map(np.asarray, run(prompt[1:2], mask[1:2], keys()[1:2, :2], default()))
    np.testing.assert_array_equal(alone.token_BGC[0], whole.token_BGC[1, :2])
    np.testing.assert_allclose(alone.logp_BGC[0], whole.logp_BGC[1, :2], atol=1e-5)


def test_samples_differ_and_keys_decide():
    one, again = run(PROMPT, MASK, keys(), default()), run(PROMPT, MASK, keys(), default())
    np.testing.assert_array_equal(one.token_BGC, again.token_BGC)
    other = keys(seed=4)
    assert not np.array_equal(one.token_BGC, run(PROMPT, MASK, other, default()).token_BGC)
    rows = {tuple(row) for row in np.asarray(one.token_BGC).reshape(12, -1).tolist()}
    assert len(rows) > 6


def test_greedy_equals_argmax_of_the_forward():
    out = run(PROMPT, MASK, keys(1), default(0.0))
    best = np.argmax(forward_logits(Branches(PROMPT, MASK, out.token_BGC, out.mask_BGC)), axis=-1)
    mask = np.asarray(out.mask_BGC)
    np.testing.assert_array_equal(best[mask], np.asarray(out.token_BGC)[mask])


def test_changing_the_sampling_compiles_nothing():
    run(PROMPT, MASK, keys(), default())
    compiled = run._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    run(PROMPT, MASK, keys(), default(0.5, 3, 0.9, 0.1))
    assert run._cache_size() == compiled  # pyright: ignore[reportAttributeAccessIssue]


def test_too_long_is_refused():
    with pytest.raises(ValueError, match="exceeds the model's max_positions 32"):
        generate(LM, PARAMS, PROMPT, MASK, keys(), max_new_tokens=29, stop_tokens=STOP)


@pytest.mark.parametrize("samples", [1, 3])
def test_a_cache_that_grows_gives_what_a_whole_one_gives(monkeypatch, samples):
    module = importlib.import_module("rlhfjax.generation.generate")
    assert module.bucket_lengths(4, samples, 8) == [8]  # short: one piece

    def rollout():
        return jax.jit(
            lambda keys: generate(LM, PARAMS, PROMPT, MASK, keys, max_new_tokens=8, stop_tokens=STOP)
        )(keys(samples))

    whole = rollout()
    monkeypatch.setattr(module, "_FIRST_COLUMNS", 5)
    assert module.bucket_lengths(4, samples, 8) == {1: [4, 8], 3: [1, 4, 8]}[samples]
    grown = rollout()
    for name in ("token_BGC", "mask_BGC", "finished_BG"):
        np.testing.assert_array_equal(getattr(grown, name), getattr(whole, name))
    np.testing.assert_allclose(grown.logp_BGC, whole.logp_BGC, atol=1e-5)
    assert np.asarray(whole.mask_BGC).sum(-1).max() == 8


def test_stop_tokens_may_differ_by_row_and_be_arrays():
    stops = jnp.asarray([[2, 5]] * 4 + [[-1, -1]] * 4 + [[5, -1]] * 4)
    out = jax.jit(
        lambda stops: generate(LM, PARAMS, PROMPT, MASK, keys(), max_new_tokens=8, stop_tokens=stops)
    )(stops)
    out = jax.tree.map(np.asarray, out)
    usual = jax.tree.map(np.asarray, run(PROMPT, MASK, keys(), default()))
    np.testing.assert_array_equal(out.token_BGC[0], usual.token_BGC[0])
    assert not out.finished_BG[1].any() and out.mask_BGC[1].all()
    ends = np.asarray(out.token_BGC[2])[np.asarray(out.mask_BGC[2])]
    assert (ends == 5).sum() == np.asarray(out.finished_BG[2]).sum()


def test_the_repetition_penalty_reaches_prompt_and_completion():
    """So strong that no token comes twice, and none of the prompt's; the order of the others stays."""
    sampling = default(0.0)._replace(repetition_penalty=jnp.float32(1e6), min_new_tokens=jnp.int32(8))
    out = jax.jit(
        lambda s: generate(LM, PARAMS, PROMPT, MASK, keys(1), max_new_tokens=8, stop_tokens=STOP, sampling=s)
    )(sampling)
    prompt, mask = np.asarray(PROMPT), np.asarray(MASK)
    for b in range(3):
        drawn = np.asarray(out.token_BGC)[b, 0].tolist()
        assert len(set(drawn)) == 8 and not set(drawn) & set(prompt[b][mask[b]].tolist())
        assert not set(drawn) & set(STOP)
