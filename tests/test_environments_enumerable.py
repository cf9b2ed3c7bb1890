"""The enumerable language model against brute force: loops over Python tuples, and finite differences in float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.config import Decoder, Enumerable
from rlhfjax.environments import enumerable
from rlhfjax.generation import Sampling, generate, sample_keys
from rlhfjax.networks import Branches, decoder
from rlhfjax.recipes.text import completion_logp

MODELS = {
    "fixed": Enumerable(vocab_size=3, length=3),
    "stop": Enumerable(vocab_size=3, length=3, stop_token=1),
    "stop zero": Enumerable(vocab_size=2, length=4, stop_token=0),
    "one token": Enumerable(vocab_size=4, length=1),
}
BETA = 0.7


def said(model: Enumerable) -> list[tuple[int, ...]]:
    """Every sequence as a tuple, by walking the tree."""
    found = []

    def walk(prefix):
        for token in range(model.vocab_size):
            sequence = (*prefix, token)
            if token == model.stop_token or len(sequence) == model.length:
                found.append(sequence)
            else:
                walk(sequence)

    walk(())
    return found


def number(prefix: tuple[int, ...], size: int) -> int:
    """Prefixes counted level by level, in lexical order within one."""
    before = sum(size**t for t in range(len(prefix)))
    return before + sum(token * size**place for place, token in enumerate(reversed(prefix)))


def tables(model: Enumerable, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a policy, of its reference, and a reward for each sequence."""
    rng = np.random.default_rng(seed)
    shape = (enumerable.count_prefixes(model), model.vocab_size)
    return rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=len(said(model)))


def brute(model: Enumerable, logits: np.ndarray) -> dict[tuple[int, ...], float]:
    """Probability of every sequence, token by token."""
    found = {}
    for sequence in said(model):
        probability = 1.0
        for t, token in enumerate(sequence):
            row = np.exp(logits[number(sequence[:t], model.vocab_size)])
            probability *= row[token] / row.sum()
        found[sequence] = probability
    return found


def exact_j(p: dict, q: dict, reward: np.ndarray) -> float:
    terms = [p[y] * (r - BETA * math.log(p[y] / q[y])) for y, r in zip(p, reward, strict=True)]
    return math.fsum(terms)


each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


@each_model
def test_every_sequence_is_listed_once_with_its_prefixes(model):
    listed = enumerable.sequences(model)
    rows = [tuple(token[mask].tolist()) for token, mask in zip(listed.token, listed.mask, strict=True)]
    assert rows == said(model)
    for row, mask, prefix in zip(rows, listed.mask, listed.prefix, strict=True):
        assert mask.tolist() == [t < len(row) for t in range(model.length)]
        assert prefix[mask].tolist() == [number(row[:t], model.vocab_size) for t in range(len(row))]
    assert listed.token[~listed.mask].sum() == 0 and listed.prefix[~listed.mask].sum() == 0


def test_every_prefix_is_the_row_of_its_number():
    model = MODELS["fixed"]
    listed = enumerable.prefixes(model)
    every = [p for t in range(model.length) for p in itertools.product(range(3), repeat=t)]
    assert [tuple(t[m].tolist()) for t, m in zip(listed.token, listed.mask, strict=True)] == every
    assert [number(p, 3) for p in every] == list(range(enumerable.count_prefixes(model)))
    for prefix, row, mask in zip(every, listed.prefix, listed.mask, strict=True):
        assert row[mask].tolist() == [number(prefix[:t], 3) for t in range(len(prefix))]


@each_model
def test_exact_numbers_against_loops(model):
    logits, logits_ref, reward = tables(model)
    every = enumerable.sequences(model)
    logp, logp_ref = (enumerable.table_logp(x, every) for x in (logits, logits_ref))
    p, q = brute(model, logits), brute(model, logits_ref)
    np.testing.assert_allclose(np.exp(logp), list(p.values()), rtol=1e-12)
    assert abs(sum(p.values()) - 1) < 1e-12
    mean = sum(a * r for a, r in zip(p.values(), reward, strict=True))
    divergence = sum(p[y] * math.log(p[y] / q[y]) for y in p)
    apart = sum(abs(p[y] - q[y]) for y in p) / 2
    tilted = np.array([q[y] * math.exp(r / BETA) for y, r in zip(q, reward, strict=True)])
    optimum = enumerable.optimal_policy(logp_ref, reward, beta=BETA)
    exact = [
        (enumerable.expected_reward(logp, reward), mean),
        (enumerable.kl(logp, logp_ref), divergence),
        (enumerable.objective(logp, logp_ref, reward, beta=BETA), mean - BETA * divergence),
        (enumerable.total_variation(logp, logp_ref), apart),
        (np.exp(optimum), tilted / tilted.sum()),
        (enumerable.optimal_objective(logp_ref, reward, beta=BETA), BETA * math.log(tilted.sum())),
        (enumerable.objective(optimum, logp_ref, reward, beta=BETA), BETA * math.log(tilted.sum())),
    ]
    for found, wanted in exact:
        assert np.asarray(found).dtype == np.float64
        np.testing.assert_allclose(found, wanted, rtol=1e-11)
    gap = enumerable.optimal_objective(logp_ref, reward, beta=BETA) - exact_j(p, q, reward)
    np.testing.assert_allclose(gap, BETA * enumerable.kl(logp, optimum), rtol=1e-10)


@each_model
def test_soft_values_solve_the_soft_bellman_equation(model):
    _, logits_ref, reward = tables(model, 1)
    every = enumerable.sequences(model)
    logp_ref = enumerable.table_logp(logits_ref, every)
    q, rewards = brute(model, logits_ref), dict(zip(said(model), reward, strict=True))

    def value(prefix):
        row = np.exp(logits_ref[number(prefix, model.vocab_size)])
        total = 0.0
        for token in range(model.vocab_size):
            child = (*prefix, token)
            worth = rewards[child] if child in q else value(child)
            total += row[token] / row.sum() * math.exp(worth / BETA)
        return BETA * math.log(total)

    found = enumerable.soft_value(model, logp_ref, reward, every, beta=BETA)
    states = {sequence[:t] for sequence in said(model) for t in range(len(sequence))}
    for prefix in states:
        np.testing.assert_allclose(
            found[number(prefix, model.vocab_size)], value(prefix), rtol=1e-11, atol=1e-12
        )
    unseen = set(range(found.size)) - {number(s, model.vocab_size) for s in states}
    assert all(found[s] == 0 for s in unseen)
    np.testing.assert_allclose(
        found[0], enumerable.optimal_objective(logp_ref, reward, beta=BETA), rtol=1e-11
    )


@each_model
def test_a_distribution_of_sequences_has_its_table(model):
    _, logits_ref, reward = tables(model, 2)
    every = enumerable.sequences(model)
    optimum = enumerable.optimal_policy(enumerable.table_logp(logits_ref, every), reward, beta=BETA)
    table = enumerable.conditional_logp(model, optimum, every)
    assert np.isfinite(table).all() or model.stop_token is None
    np.testing.assert_allclose(enumerable.table_logp(table, every), optimum, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(np.exp(table).sum(-1)[every.prefix[every.mask]], 1.0, rtol=1e-12)


@each_model
def test_in_jax_the_same_numbers(model):
    logits, logits_ref, reward = tables(model, 3)
    every = enumerable.sequences(model)

    def numbers(logits, logits_ref, reward):
        logp, logp_ref = enumerable.table_logp(logits, every), enumerable.table_logp(logits_ref, every)
        optimum = enumerable.optimal_policy(logp_ref, reward, beta=BETA)
        return {
            "logp": logp,
            "reward": enumerable.expected_reward(logp, reward),
            "kl": enumerable.kl(logp, logp_ref),
            "objective": enumerable.objective(logp, logp_ref, reward, beta=BETA),
            "optimum": optimum,
            "best": enumerable.optimal_objective(logp_ref, reward, beta=BETA),
            "total variation": enumerable.total_variation(logp, optimum),
            "table": enumerable.conditional_logp(model, optimum, every),
            "value": enumerable.soft_value(model, logp_ref, reward, every, beta=BETA),
        }

    exact = numbers(logits, logits_ref, reward)
    floats = (jnp.asarray(x, jnp.float32) for x in (logits, logits_ref, reward))
    for name, found in jax.jit(numbers)(*floats).items():
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact[name], rtol=2e-5, atol=2e-6, err_msg=name)


@each_model
def test_the_policy_gradient_is_the_slope_of_the_objective(model):
    logits, logits_ref, reward = tables(model, 4)
    every = enumerable.sequences(model)
    logp_ref = enumerable.table_logp(logits_ref, every)
    params = {"logits": np.float32(logits), "value": np.zeros(len(logits), np.float32)}

    @jax.jit
    def gradient(params):
        return enumerable.policy_gradient(enumerable.tabular, params, every, logp_ref, reward, beta=BETA)

    found = jax.tree.map(np.asarray, gradient(params))
    assert not found["value"].any()
    wanted, step = np.zeros_like(logits), 1e-5
    for place in np.ndindex(*logits.shape):
        ends = []
        for sign in (1, -1):
            moved = logits.copy()
            moved[place] += sign * step
            ends.append(exact_j(brute(model, moved), brute(model, logits_ref), reward))
        wanted[place] = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(found["logits"], wanted, atol=2e-6)


def test_a_table_evaluates_tokens_states_and_the_exact_divergence():
    model = MODELS["stop"]
    logits, logits_ref, _ = tables(model, 5)
    every = enumerable.sequences(model)
    as_params = [
        {"logits": np.float32(x), "value": np.arange(13, dtype=np.float32)} for x in (logits, logits_ref)
    ]
    outputs = jax.jit(enumerable.tabular_with_kl)(as_params[0], every, as_params[1])
    logp, entropy, value, kl = map(np.asarray, outputs)
    p_SV, q_SV = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, logits_ref))
    for n, t in zip(*np.nonzero(every.mask), strict=True):
        prefix, token = every.prefix[n, t], every.token[n, t]
        p, q = p_SV[prefix], q_SV[prefix]
        np.testing.assert_allclose(logp[n, t], np.log(p[token]), rtol=1e-5)
        np.testing.assert_allclose(entropy[n, t], -(p * np.log(p)).sum(), rtol=1e-5)
        np.testing.assert_allclose(kl[n, t], (p * np.log(p / q)).sum(), rtol=1e-5, atol=1e-6)
        assert value[n, t] == prefix
    total = enumerable.sequence_logp(enumerable.tabular, as_params[0], every)
    np.testing.assert_allclose(total, enumerable.table_logp(logits, every), rtol=1e-5)


def test_samples_follow_the_distribution():
    model = MODELS["stop"]
    every = enumerable.sequences(model)
    logp = enumerable.table_logp(tables(model, 6)[0], every)
    logp[4] = -np.inf
    logp -= np.log(np.exp(logp).sum())
    count = 40_000
    sample = jax.jit(lambda key, logp: enumerable.sample(key, logp, (count // 4, 4)))
    index = np.asarray(sample(jax.random.key(3), np.float32(logp)))
    seen = np.bincount(index.ravel(), minlength=logp.size)
    assert index.shape == (count // 4, 4) and index.dtype == jnp.int32 and seen[4] == 0
    expected = count * np.exp(logp[logp > -np.inf])
    statistic = np.sum((seen[logp > -np.inf] - expected) ** 2 / expected)
    freedom = expected.size - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)
    drawn = enumerable.rows(every, index)
    np.testing.assert_array_equal(drawn.token[7, 2], every.token[index[7, 2]])
    assert drawn.mask.shape == (count // 4, 4, model.length)


def test_a_decoder_gives_every_sequence_what_its_own_generation_gives():
    """One function, two uses: what `generate` says it drew a sequence with is what enumeration gives it."""
    model = Enumerable(vocab_size=4, length=3, stop_token=2)
    config = Decoder(
        vocab_size=4, width=8, layers=1, heads=1, kv_heads=1, head_size=8, mlp_width=8, max_positions=8,
        embedding_stddev=1.0,
    )  # fmt: skip
    lm = decoder(config)
    params = jax.jit(lm.init)(jax.random.key(0))
    prompt, mask = np.zeros((1, 1), np.int32), np.ones((1, 1), bool)
    every = enumerable.sequences(model)

    def evaluate(params, inputs):
        texts = (jnp.asarray(x) for x in (prompt, mask, inputs.token[None], inputs.mask[None]))
        branches = Branches(*texts)
        return (completion_logp(lm, params, branches)[0],)

    logp = jax.jit(lambda params: enumerable.sequence_logp(evaluate, params, every))(params)
    logp = np.asarray(logp, np.float64)
    np.testing.assert_allclose(np.exp(logp).sum(), 1.0, atol=1e-5)

    @jax.jit
    def draw(params, key):
        keys = sample_keys(key, jnp.arange(1), 64)
        texts = jnp.asarray(prompt), jnp.asarray(mask)
        return generate(lm, params, *texts, keys, max_new_tokens=3, stop_tokens=(2,), sampling=Sampling(1.0))

    drawn = jax.tree.map(np.asarray, draw(params, jax.random.key(1)))
    numbers = {tuple(t[m].tolist()): n for n, (t, m) in enumerate(zip(every.token, every.mask, strict=True))}
    for token, kept, token_logp in zip(drawn.token_BGC[0], drawn.mask_BGC[0], drawn.logp_BGC[0], strict=True):
        n = numbers[tuple(token[kept].tolist())]
        np.testing.assert_allclose(token_logp[kept].sum(), logp[n], atol=1e-5)


def _improvement(logp_V, q_V, logp_ref_V, forward):
    """At one state: the gradient in the logits of sum pi q - beta KL, q held fixed."""
    p, q = np.exp(logp_V), np.exp(logp_ref_V)
    by_logp = p * (q_V - p @ q_V)
    if forward:
        return by_logp - BETA * (p - q)
    ratio = logp_V - logp_ref_V
    return by_logp - BETA * p * (ratio - p @ ratio)


@pytest.mark.parametrize("forward", [False, True])
@each_model
def test_the_optimum_of_a_token_kl_has_no_gradient_left(model, forward):
    _, logits_ref, reward = tables(model, 7)
    every = enumerable.sequences(model)
    logp = enumerable.token_kl_optimum(model, logits_ref, reward, every, beta=BETA, forward=forward)
    assert abs(np.exp(logp).sum() - 1) < 1e-10
    table = enumerable.conditional_logp(model, logp, every)
    rewards = dict(zip(said(model), reward, strict=True))

    def worth(prefix):
        if prefix in rewards:
            return rewards[prefix]
        row = np.exp(table[number(prefix, model.vocab_size)])
        return sum(row[a] * worth((*prefix, a)) for a in range(model.vocab_size))

    for prefix in {y[:t] for y in rewards for t in range(len(y))}:
        row = number(prefix, model.vocab_size)
        q_V = np.array([worth((*prefix, a)) for a in range(model.vocab_size)])
        logp_ref_V = logits_ref[row] - np.log(np.exp(logits_ref[row]).sum())
        np.testing.assert_allclose(_improvement(table[row], q_V, logp_ref_V, forward), 0, atol=1e-9)
    if model.length == 1 and not forward:
        best = enumerable.optimal_policy(enumerable.table_logp(logits_ref, every), reward, beta=BETA)
        np.testing.assert_allclose(logp, best, rtol=1e-12)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Enumerable(vocab_size=0), "vocab_size must be at least 1, got 0"),
        (Enumerable(length=0), "length must be at least 1, got 0"),
        (Enumerable(vocab_size=4, stop_token=4), "stop_token 4 is not among the 4 tokens"),
        (Enumerable(vocab_size=32, length=5), "too many to enumerate.*make vocab_size or length smaller"),
    ],
)
def test_a_model_that_cannot_be_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        enumerable.sequences(model)
