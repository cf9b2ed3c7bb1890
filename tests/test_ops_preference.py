"""The Bradley-Terry model against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import ops

RNG = np.random.default_rng(4)
CHOSEN, REJECTED = RNG.normal(0, 2, (2, 16)).astype(np.float32)
LABEL = RNG.uniform(size=16).astype(np.float32)
MARGIN = RNG.uniform(size=16).astype(np.float32)
DIFFERENCE = CHOSEN.astype(np.float64) - REJECTED


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_loss_equals_the_formula():
    np.testing.assert_allclose(
        ops.bradley_terry_loss(CHOSEN, REJECTED), -np.log(sigmoid(DIFFERENCE)), rtol=1e-5
    )
    soft = -LABEL * np.log(sigmoid(DIFFERENCE)) - (1 - LABEL) * np.log(sigmoid(-DIFFERENCE))
    np.testing.assert_allclose(ops.bradley_terry_loss(CHOSEN, REJECTED, label=LABEL), soft, rtol=1e-5)
    lead = -np.log(sigmoid(DIFFERENCE - MARGIN))
    np.testing.assert_allclose(ops.bradley_terry_loss(CHOSEN, REJECTED, margin=MARGIN), lead, rtol=1e-5)


def test_swapping_the_pair_and_its_label_changes_nothing():
    given = jax.jit(ops.bradley_terry_loss)
    loss = given(CHOSEN, REJECTED, label=LABEL, margin=MARGIN)
    np.testing.assert_allclose(given(REJECTED, CHOSEN, label=1 - LABEL, margin=MARGIN), loss, rtol=1e-5)


def test_gradient_is_probability_less_label():
    gradient = jax.vmap(jax.grad(lambda c, r, label: ops.bradley_terry_loss(c, r, label=label)))
    np.testing.assert_allclose(gradient(CHOSEN, REJECTED, LABEL), sigmoid(DIFFERENCE) - LABEL, atol=1e-6)


def test_extreme_scores_stay_finite():
    loss, gradient = jax.value_and_grad(ops.bradley_terry_loss)(-1000.0, 1000.0)
    assert (loss, gradient) == (2000.0, -1.0)


def test_probability():
    temperature = 2.5
    expected = sigmoid(DIFFERENCE / temperature)
    given = ops.bradley_terry_probability(CHOSEN, REJECTED, temperature=temperature)
    np.testing.assert_allclose(given, expected, rtol=1e-5)
    likelihood = np.exp(-np.asarray(ops.bradley_terry_loss(CHOSEN, REJECTED)))
    np.testing.assert_allclose(ops.bradley_terry_probability(CHOSEN, REJECTED), likelihood, rtol=1e-5)


def test_bayes_accuracy_is_that_of_the_best_judge():
    # Every deterministic judge of four pairs, one of which does not count.
    probability = np.array([0.9, 0.2, 0.5, np.nan], np.float32)
    mask = np.array([True, True, True, False])
    judges = np.array(np.meshgrid(*[[False, True]] * 3)).reshape(3, -1).T
    expected_accuracy = np.where(judges, probability[:3], 1 - probability[:3]).mean(axis=1)
    np.testing.assert_allclose(ops.bayes_accuracy(probability, mask), expected_accuracy.max(), rtol=1e-6)
    np.testing.assert_allclose(ops.bayes_accuracy(probability[:2]), 0.85, rtol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="score_rejected must be floating point"):
        ops.bradley_terry_loss(CHOSEN, np.ones(16, np.int32))
    with pytest.raises(ValueError, match=r"label must be a scalar or of shape \[16\]"):
        ops.bradley_terry_loss(CHOSEN, REJECTED, label=LABEL[:1])
    with pytest.raises(ValueError, match="score_rejected must be of shape"):
        ops.bradley_terry_probability(CHOSEN, jnp.zeros(3))
    with pytest.raises(TypeError, match="probability must be floating point"):
        ops.bayes_accuracy(np.ones(3, bool))
