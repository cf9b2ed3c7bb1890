"""Reward models that are linear in features, against a float64 loop over pairs and a known utility."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.algorithms import reward_model
from rlhfjax.config import RewardModel

PROMPTS, SAMPLES, WIDTH = 6, 4, 3
PAIRS = np.array(list(itertools.combinations(range(SAMPLES), 2)))
SGD = optax.sgd(1.0)
CENTRED = RewardModel(centring=0.1)


def evaluate(params, inputs):
    return inputs @ params["weight"] + params["bias"]


@functools.cache
def algorithm(config=CENTRED):
    made = reward_model.make(evaluate, SGD, config)
    return made.init, jax.jit(made.update)


def step(params, batch, config=CENTRED):
    init, update = algorithm(config)
    state, metrics = update(init(params), batch, jax.random.key(0))
    return state.params, metrics


@pytest.fixture(scope="module")
def params():
    return {"weight": jnp.array([0.5, -1.0, 0.2]), "bias": jnp.asarray(0.3)}


@pytest.fixture(scope="module")
def batch():
    """All six pairs of four completions, soft labels, about a third masked."""
    generator = np.random.default_rng(0)
    shape = (PROMPTS, len(PAIRS))
    return reward_model.Preference(
        inputs=jnp.asarray(generator.normal(size=(PROMPTS, SAMPLES, WIDTH)), jnp.float32),
        first=jnp.asarray(PAIRS[:, 0]),
        second=jnp.asarray(PAIRS[:, 1]),
        label_BK=jnp.asarray(generator.choice([0.0, 0.2, 1.0], size=shape), jnp.float32),
        mask_BK=jnp.asarray(generator.uniform(size=shape) > 0.3),
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_step_equals_a_loop_over_pairs(params, batch):
    weight, bias = np.asarray(params["weight"], np.float64), float(params["bias"])
    features = np.asarray(batch.inputs, np.float64)
    score = features @ weight + bias
    gradient, losses, agreements, margins, scores = {"weight": np.zeros(WIDTH), "bias": 0.0}, [], [], [], []
    for b, k in zip(*np.nonzero(batch.mask_BK), strict=True):
        i, j = PAIRS[k]
        label, d, s = float(batch.label_BK[b, k]), score[b, i] - score[b, j], score[b, i] + score[b, j]
        losses.append(-label * np.log(sigmoid(d)) - (1 - label) * np.log(sigmoid(-d)))
        agreements.append(label if d > 0 else 1 - label)
        margins.append((2 * label - 1) * d)
        scores += [score[b, i], score[b, j]]
        slope = sigmoid(d) - label
        gradient["weight"] += slope * (features[b, i] - features[b, j])
        gradient["weight"] += 0.1 * 2 * s * (features[b, i] + features[b, j])
        gradient["bias"] += 0.1 * 2 * s * 2
    n = len(losses)
    new, metrics = step(params, batch)
    centring = 0.1 * np.mean([(a + b) ** 2 for a, b in zip(scores[::2], scores[1::2], strict=True)])
    expected = {
        "loss/preference": np.mean(losses),
        "loss/total": np.mean(losses) + centring,
        "pair/accuracy": np.mean(agreements),
        "pair/margin": np.mean(margins),
        "score/mean": np.mean(scores),
        "score/std": np.std(scores),
        "batch/count": n,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    for name, g in gradient.items():
        np.testing.assert_allclose(params[name] - new[name], g / n, rtol=1e-4, atol=1e-6)
    assert metrics.keys() == expected.keys() | {"optimizer/gradient_norm"}
    assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())
    documented = reward_model.__doc__
    assert [name for name in metrics if name not in documented] == []


def test_masked_pairs_equal_dropped_pairs(params, batch):
    """Appended pairs under the mask, with NaN scores and labels, move nothing."""
    ruined = jnp.concatenate([batch.inputs, jnp.full((PROMPTS, 1, WIDTH), jnp.nan)], axis=1)

    def widen(x, filler):
        return jnp.concatenate([x, jnp.full((PROMPTS, 1), filler, x.dtype)], axis=1)

    wider = batch._replace(
        inputs=ruined,
        first=jnp.append(batch.first, SAMPLES),
        second=jnp.append(batch.second, 0),
        label_BK=widen(batch.label_BK, jnp.nan),
        mask_BK=widen(batch.mask_BK, False),
    )

    def finite_scores(params, inputs):
        # The scores may be NaN; the network itself gives 0 gradient for 0 cotangent.
        bad = jnp.isnan(inputs).any(-1)
        return jnp.where(bad, jnp.nan, 0.0) + evaluate(params, jnp.where(bad[..., None], 0.0, inputs))

    def gradient(batch):
        def mean(params):
            total, sums = reward_model.loss(params, batch, evaluate=finite_scores, config=CENTRED)
            return total / sums["count"]

        return jax.jit(jax.value_and_grad(mean))(params)

    chex.assert_trees_all_close(gradient(wider), gradient(batch), rtol=1e-6)


def test_pairs_may_differ_between_prompts_and_swapping_changes_nothing(params, batch):
    shape = batch.label_BK.shape
    swapped = batch._replace(
        first=jnp.broadcast_to(batch.second, shape),
        second=jnp.broadcast_to(batch.first, shape),
        label_BK=1 - batch.label_BK,
    )
    chex.assert_trees_all_close(step(params, swapped), step(params, batch), rtol=1e-5, atol=1e-6)


def test_accumulation_gives_the_same_step(params, batch):
    parts = step(params, batch, RewardModel(centring=0.1, microbatches=3))
    chex.assert_trees_all_close(parts, step(params, batch), rtol=1e-5, atol=1e-6)


def test_a_tie_counts_half(batch):
    _, metrics = step({"weight": jnp.zeros(WIDTH), "bias": jnp.zeros(())}, batch)
    np.testing.assert_allclose(metrics["pair/accuracy"], 0.5)
    np.testing.assert_allclose(metrics["loss/preference"], np.log(2), rtol=1e-6)


def test_recovers_a_linear_utility():
    """With labels equal to the true probabilities the loss is least at the utility (up to the bias)."""
    utility = np.array([1.0, -2.0, 0.5])
    features = np.random.default_rng(1).normal(size=(64, SAMPLES, WIDTH))
    score = features @ utility
    label = sigmoid(score[:, PAIRS[:, 0]] - score[:, PAIRS[:, 1]])
    batch = reward_model.Preference(
        jnp.asarray(features, jnp.float32),
        jnp.asarray(PAIRS[:, 0]),
        jnp.asarray(PAIRS[:, 1]),
        jnp.asarray(label, jnp.float32),
        jnp.ones(label.shape, bool),
    )
    made = reward_model.make(evaluate, optax.adam(0.1), RewardModel())

    def iterate(state, key):
        return made.update(state, batch, key)

    start = made.init({"weight": jnp.zeros(WIDTH), "bias": jnp.zeros(())})
    keys = jax.random.split(jax.random.key(0), 300)
    state, metrics = jax.jit(lambda s: jax.lax.scan(iterate, s, keys))(start)
    np.testing.assert_allclose(state.params["weight"], utility, atol=0.01)
    # The best judge agrees with the label as often as max(p, 1 - p).
    np.testing.assert_allclose(metrics["pair/accuracy"][-1], np.maximum(label, 1 - label).mean(), atol=1e-3)


def test_normalisation_gives_mean_0_and_deviation_1():
    generator = np.random.default_rng(2)
    score = jnp.asarray(generator.normal(50.0, 3.0, size=(7, 9)), jnp.float32)
    mask = jnp.asarray(generator.uniform(size=(7, 9)) > 0.4)
    gain, bias = jax.jit(reward_model.normalisation)(jnp.where(mask, score, jnp.nan), mask)
    counted = np.asarray(gain * score + bias)[np.asarray(mask)]
    np.testing.assert_allclose([counted.mean(), counted.std()], [0, 1], atol=1e-4)
    gain, bias = reward_model.normalisation(score)
    np.testing.assert_allclose(np.std(np.asarray(gain * score + bias)), 1, rtol=1e-4)


def test_normalisation_of_equal_scores_only_shifts():
    gain, bias = reward_model.normalisation(jnp.full(1000, 0.1))
    assert gain == 1
    np.testing.assert_allclose(bias, -0.1, rtol=1e-6)


def test_bad_input_is_named(params, batch):
    def update(**changes):
        made = reward_model.make(evaluate, SGD, RewardModel())
        jax.eval_shape(made.update, made.init(params), batch._replace(**changes), jax.random.key(0))

    with pytest.raises(TypeError, match="label_BK must be a float probability, got int32"):
        update(label_BK=jnp.ones(batch.label_BK.shape, jnp.int32))
    with pytest.raises(ValueError, match=r"batch.first must be \[K\] = \(6,\)"):
        update(first=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="mask_BK"):
        update(mask_BK=batch.mask_BK[:, :1])
    with pytest.raises(ValueError, match=r"scores \[B, G\]"):
        update(inputs=batch.inputs[:2])
