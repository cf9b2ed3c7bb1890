"""The models of Bradley and Terry and of Plackett and Luce against their formulas in float64."""

import itertools

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


# -------------------------------------------------------------------------------------------------- Plackett-Luce

RANKED = RNG.normal(0, 2, (6, 4)).astype(np.float32)


def ranking_loss(score, mask, places, smoothing):
    """NLL of every choice, [G], of one ranking in float64; 0 where none was made."""
    loss, here = np.zeros(len(score)), np.flatnonzero(mask)
    for place, p in enumerate(here[:places]):
        left = score[here[place:]].astype(np.float64)
        if len(left) > 1:
            logp = left - np.log(np.exp(left).sum())
            loss[p] = -(1 - smoothing) * logp[0] - smoothing * logp[1:].mean()
    return loss


plackett_luce = jax.jit(ops.plackett_luce_loss)


def test_ranking_loss_and_gradient_equal_a_loop():
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]]) > 0
    places = np.array([4, 2, 1, 3, 4, 0])
    score = np.where(mask, RANKED, np.nan)
    expected = np.stack([ranking_loss(RANKED[i], mask[i], places[i], 0.1) for i in range(6)])
    loss, counts = plackett_luce(score, mask=mask, places=places, label_smoothing=0.1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(counts, expected > 0)

    def total(score):
        return jnp.sum(ops.plackett_luce_loss(score, mask=mask, places=places, label_smoothing=0.1)[0])

    gradient = np.asarray(jax.jit(jax.grad(total))(score))
    h = 1e-6
    for i, g in itertools.product(range(6), range(4)):
        up, down = RANKED.astype(np.float64), RANKED.astype(np.float64)
        up[i, g] += h
        down[i, g] -= h
        change = ranking_loss(up[i], mask[i], places[i], 0.1) - ranking_loss(down[i], mask[i], places[i], 0.1)
        np.testing.assert_allclose(gradient[i, g], change.sum() / (2 * h), atol=1e-5)


def test_probabilities_of_all_rankings_sum_to_1():
    orders = np.array(list(itertools.permutations(range(4))))
    loss, _ = plackett_luce(RANKED[0][orders])
    np.testing.assert_allclose(np.exp(-np.asarray(loss).sum(1)).sum(), 1.0, rtol=1e-5)


def test_a_ranking_of_two_is_bradley_terry():
    loss, counts = plackett_luce(np.stack([CHOSEN, REJECTED], axis=1), label_smoothing=0.2)
    np.testing.assert_allclose(loss[:, 0], ops.bradley_terry_loss(CHOSEN, REJECTED, label=0.8), rtol=1e-5)
    np.testing.assert_array_equal(counts, [[True, False]] * 16)


def test_one_place_is_the_choice_of_the_best():
    loss, _ = plackett_luce(RANKED, places=1)
    expected = np.log(np.exp(RANKED.astype(np.float64)).sum(1)) - RANKED[:, 0]
    np.testing.assert_allclose(loss[:, 0], expected, rtol=1e-5)
    assert (np.asarray(loss)[:, 1:] == 0).all()


# --------------------------------------------------------------------------------------------------- temperature


def golden_section(f, low, high):
    """The least of a function with one valley, to about 1e-9."""
    ratio = (np.sqrt(5) - 1) / 2
    while high - low > 1e-9:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if f(left) < f(right) else (left, high)
    return (low + high) / 2


fit = jax.jit(ops.fit_temperature)


@pytest.mark.parametrize("unit", [1e-2, 1.0, 300.0])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_temperature_is_the_likeliest(unit, soft):
    generator = np.random.default_rng(8)
    logit = generator.normal(0, 2, 200) * unit
    probability = sigmoid(logit / unit / 1.7)
    label = probability if soft else (generator.uniform(size=200) < probability).astype(float)
    mask = generator.uniform(size=200) > 0.2

    def nll(log_scale):
        d = np.exp(log_scale) * logit[mask] / unit
        return np.sum(label[mask] * np.logaddexp(0, -d) + (1 - label[mask]) * np.logaddexp(0, d))

    expected = unit / np.exp(golden_section(nll, -5, 5))
    given = fit(*(jnp.float32(np.where(mask, x, np.nan)) for x in (logit, label)), mask)
    np.testing.assert_allclose(given, expected, rtol=1e-4)
    if soft:
        np.testing.assert_allclose(given, 1.7 * unit, rtol=1e-4)


def test_temperature_where_there_is_no_minimum():
    """All right: as sure as float32 can be. All wrong: as unsure as the bound allows. Never NaN or below 0."""
    logit = jnp.array([1.0, -2.0, 0.5])
    sure, unsure = fit(logit, jnp.float32(logit > 0)), fit(logit, jnp.float32(logit < 0))
    np.testing.assert_array_equal(np.round(jax.nn.sigmoid(logit / sure), 6), [1, 0, 1])
    np.testing.assert_allclose(jax.nn.sigmoid(logit / unsure), 0.5, atol=1e-3)
    assert float(fit(jnp.zeros(3), jnp.ones(3))) == 1.0
    assert float(fit(logit, jnp.ones(3), jnp.zeros(3, bool))) == 1.0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"places must be of shape \[6\]"):
        ops.plackett_luce_loss(RANKED, places=np.ones(3, int))
    with pytest.raises(TypeError, match="places must be integer"):
        ops.plackett_luce_loss(RANKED, places=1.0)
    with pytest.raises(ValueError, match=r"mask must be of shape \[6,4\]"):
        ops.plackett_luce_loss(RANKED, mask=np.ones(4, bool))
    with pytest.raises(TypeError, match="logit must be floating point"):
        ops.fit_temperature(np.ones(3, int), 1.0)
    with pytest.raises(TypeError, match="score_rejected must be floating point"):
        ops.bradley_terry_loss(CHOSEN, np.ones(16, np.int32))
    with pytest.raises(ValueError, match=r"label must be a scalar or of shape \[16\]"):
        ops.bradley_terry_loss(CHOSEN, REJECTED, label=LABEL[:1])
    with pytest.raises(ValueError, match="score_rejected must be of shape"):
        ops.bradley_terry_probability(CHOSEN, jnp.zeros(3))
    with pytest.raises(TypeError, match="probability must be floating point"):
        ops.bayes_accuracy(np.ones(3, bool))
