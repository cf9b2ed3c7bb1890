"""Losses of direct preference optimisation against their formulas in float64: values, gradients, optima."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import ops

RNG = np.random.default_rng(5)
N, BETA = 16, 0.3
CHOSEN, REJECTED = RNG.normal(0, 4, (2, N)).astype(np.float32)
LABEL = RNG.uniform(0.05, 0.95, N).astype(np.float32)
MEAN_LOGP = -RNG.uniform(0.01, 5, (2, N)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_odds(logp):
    return np.log(np.exp(logp) / (1 - np.exp(logp)))


# Each as its paper writes it for a preferred completion w and the other v, r = beta * log-ratio.
PAPERS = {
    ops.dpo_loss: lambda w, v: -np.log(sigmoid(BETA * w - BETA * v)),
    ops.hinge_loss: lambda w, v: BETA * np.maximum(0, 1 / BETA - w + v),
    ops.ipo_loss: lambda w, v: (w - v - 1 / (2 * BETA)) ** 2,
    ops.nca_loss: lambda w, v: (
        -np.log(sigmoid(BETA * w)) - 0.5 * (np.log(sigmoid(-BETA * w)) + np.log(sigmoid(-BETA * v)))
    ),
    ops.apo_zero_loss: lambda w, v: 1 - sigmoid(BETA * w) + sigmoid(BETA * v),
    ops.apo_down_loss: lambda w, v: 1 + sigmoid(BETA * w) - sigmoid(BETA * (w - v)),
    ops.odds_ratio_loss: lambda w, v: -BETA * np.log(sigmoid(log_odds(w) - log_odds(v))),
}


def soft(paper, first, second, label):
    return label * paper(first, second) + (1 - label) * paper(second, first)


def exo(first, second, label):
    q = np.stack([sigmoid(BETA * (first - second)), sigmoid(BETA * (second - first))])
    return np.sum(q * np.log(q / np.stack([label, 1 - label])), axis=0)


def sppo(first, second, label):
    return (first - (label - 0.5) / BETA) ** 2 + (second - ((1 - label) - 0.5) / BETA) ** 2


ORACLES = {op: lambda f, s, label, paper=paper: soft(paper, f, s, label) for op, paper in PAPERS.items()}
ORACLES |= {ops.exo_loss: exo, ops.sppo_loss: sppo}


def arguments(op):
    return MEAN_LOGP if op is ops.odds_ratio_loss else np.stack([CHOSEN, REJECTED])


def slope(oracle, x, eps=1e-6):
    """Central differences of an elementwise float64 function."""
    return (oracle(x + eps) - oracle(x - eps)) / (2 * eps)


@pytest.mark.parametrize("op", ORACLES, ids=lambda op: op.__name__)
def test_value_and_gradient_equal_the_paper(op):
    first, second = arguments(op)
    wide_first, wide_second, label = (x.astype(np.float64) for x in (first, second, LABEL))

    @jax.jit
    def given(first, second):
        loss, pull = jax.vjp(lambda a, b: op(a, b, beta=BETA, label=LABEL), first, second)
        return loss, pull(jnp.ones_like(loss))

    loss, (d_first, d_second) = given(first, second)
    assert loss.dtype == jnp.float32
    oracle = ORACLES[op]
    np.testing.assert_allclose(loss, oracle(wide_first, wide_second, label), rtol=2e-5, atol=1e-6)
    expected = slope(lambda x: oracle(x, wide_second, label), wide_first)
    np.testing.assert_allclose(d_first, expected, rtol=1e-4, atol=1e-5)
    expected = slope(lambda x: oracle(wide_first, x, label), wide_second)
    np.testing.assert_allclose(d_second, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", [op for op in ORACLES if op is not ops.exo_loss], ids=lambda op: op.__name__)
def test_a_hard_label_is_the_default(op):
    first, second = arguments(op)
    hard = ORACLES[op](first.astype(np.float64), second.astype(np.float64), 1.0)
    np.testing.assert_allclose(op(first, second, beta=BETA), hard, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("op", ORACLES, ids=lambda op: op.__name__)
def test_swapping_the_pair_and_its_label_changes_nothing(op):
    first, second = arguments(op)
    swapped = op(second, first, beta=BETA, label=1 - LABEL)
    np.testing.assert_allclose(op(first, second, beta=BETA, label=LABEL), swapped, rtol=2e-5, atol=1e-6)


def test_the_margin_of_simpo():
    expected = -np.log(sigmoid(BETA * (CHOSEN.astype(np.float64) - REJECTED) - 0.7))
    np.testing.assert_allclose(ops.dpo_loss(CHOSEN, REJECTED, beta=BETA, margin=0.7), expected, rtol=1e-5)


def test_dpo_is_bradley_terry_of_the_implicit_rewards():
    expected = ops.bradley_terry_loss(BETA * CHOSEN, BETA * REJECTED, label=LABEL, margin=0.2)
    given = ops.dpo_loss(CHOSEN, REJECTED, beta=BETA, label=LABEL, margin=0.2)
    np.testing.assert_allclose(given, expected, rtol=1e-5)


def gradient_at(op, difference, label):
    zero = np.zeros_like(difference)
    return jax.vmap(jax.grad(lambda d, z, label: op(d, z, beta=BETA, label=label)))(difference, zero, label)


def test_optima():
    """Where the gradient is zero: sigmoid(beta h) = label for DPO and EXO, h = (2 label - 1) / (2 beta) for IPO."""
    logit = (np.log(LABEL / (1 - LABEL)) / BETA).astype(np.float32)
    for op in (ops.dpo_loss, ops.exo_loss):
        np.testing.assert_allclose(gradient_at(op, logit, LABEL), 0, atol=1e-6)
    linear = (2 * LABEL - 1) / (2 * BETA)
    np.testing.assert_allclose(gradient_at(ops.ipo_loss, linear, LABEL), 0, atol=1e-5)
    reward = LABEL / (LABEL + 0.5)
    odds = (np.log(reward / (1 - reward)) / BETA).astype(np.float32)
    np.testing.assert_allclose(gradient_at(ops.nca_loss, odds, LABEL), 0, atol=1e-6)


def test_exo_is_zero_at_its_optimum():
    logit = (np.log(LABEL / (1 - LABEL)) / BETA).astype(np.float32)
    np.testing.assert_allclose(ops.exo_loss(logit, 0 * logit, beta=BETA, label=LABEL), 0, atol=1e-6)


def test_smoothed_labels_are_conservative_dpo():
    e = 0.15
    given = ops.dpo_loss(CHOSEN, REJECTED, beta=BETA, label=ops.smoothed_label(1.0, e))
    d = BETA * (CHOSEN.astype(np.float64) - REJECTED)
    expected = -(1 - e) * np.log(sigmoid(d)) - e * np.log(sigmoid(-d))
    np.testing.assert_allclose(given, expected, rtol=1e-5)


def test_debiased_labels_are_robust_dpo_and_unbiased():
    """The expectation over flipped labels of the robust loss is the loss of the clean ones."""
    e = 0.2
    d = BETA * (CHOSEN.astype(np.float64) - REJECTED)
    right, wrong = -np.log(sigmoid(d)), -np.log(sigmoid(-d))
    robust = ops.dpo_loss(CHOSEN, REJECTED, beta=BETA, label=ops.debiased_label(1.0, e))
    np.testing.assert_allclose(robust, ((1 - e) * right - e * wrong) / (1 - 2 * e), rtol=1e-4, atol=1e-5)
    flipped = ops.dpo_loss(CHOSEN, REJECTED, beta=BETA, label=ops.debiased_label(0.0, e))
    np.testing.assert_allclose((1 - e) * robust + e * flipped, right, rtol=1e-4, atol=1e-5)
    there_and_back = ops.debiased_label(ops.smoothed_label(LABEL, e), e)
    np.testing.assert_allclose(there_and_back, LABEL, rtol=1e-5)


def test_extremes_stay_finite():
    """Also a mean log-probability of exactly 0, whose odds are infinite."""
    extreme = np.array([-2000.0, 2000.0], np.float32)
    for op in ORACLES:
        if op is ops.odds_ratio_loss:
            first, second = np.array([0.0, -200.0], np.float32), np.array([-200.0, 0.0], np.float32)
        else:
            first, second = extreme, -extreme
        loss, pull = jax.vjp(lambda a, b, op=op: op(a, b, beta=BETA, label=0.9), first, second)
        for x in (loss, *pull(jnp.ones_like(loss))):
            assert np.isfinite(x).all(), op.__name__


# ------------------------------------------------------------------------------------------------------- unpaired


def kto(log_ratio, z, label):
    good = 1.5 * (1 - sigmoid(BETA * (log_ratio - z)))
    bad = 0.5 * (1 - sigmoid(BETA * (z - log_ratio)))
    return label * good + (1 - label) * bad


def test_kto_equals_the_paper():
    z = 1.2
    loss, pull = jax.vjp(
        lambda x, z: ops.kto_loss(
            x, beta=BETA, label=LABEL, reference_point=z, desirable_weight=1.5, undesirable_weight=0.5
        ),
        CHOSEN,
        jnp.float32(z),
    )
    x, label = CHOSEN.astype(np.float64), LABEL.astype(np.float64)
    np.testing.assert_allclose(loss, kto(x, z, label), rtol=1e-5)
    d_x, d_z = pull(jnp.ones_like(loss))
    np.testing.assert_allclose(d_x, slope(lambda x: kto(x, z, label), x), rtol=1e-4, atol=1e-6)
    assert d_z == 0


def test_kto_without_reference_point_is_apo_zero_unpaired():
    def one(log_ratio, label):
        return ops.kto_loss(log_ratio, beta=BETA, label=label, reference_point=0.0)

    both = one(CHOSEN, 1.0) + one(REJECTED, 0.0)
    np.testing.assert_allclose(both, ops.apo_zero_loss(CHOSEN, REJECTED, beta=BETA), rtol=1e-5, atol=1e-6)


def test_bco_equals_the_paper():
    shift = 0.4

    def bco(x):
        d = BETA * x - shift
        return -LABEL * np.log(sigmoid(d)) - (1 - LABEL) * np.log(sigmoid(-d))

    loss, pull = jax.vjp(
        lambda x, shift: ops.bco_loss(x, beta=BETA, label=LABEL, reward_shift=shift),
        CHOSEN,
        jnp.float32(shift),
    )
    x = CHOSEN.astype(np.float64)
    np.testing.assert_allclose(loss, bco(x), rtol=1e-5)
    d_x, d_shift = pull(jnp.ones_like(loss))
    np.testing.assert_allclose(d_x, slope(bco, x), rtol=1e-4, atol=1e-6)
    assert d_shift == 0


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="log_ratio_rejected must be floating point"):
        ops.dpo_loss(CHOSEN, np.ones(N, np.int32), beta=BETA)
    with pytest.raises(ValueError, match=r"label must be a scalar or of shape \[16\]"):
        ops.ipo_loss(CHOSEN, REJECTED, beta=BETA, label=LABEL[:1])
    with pytest.raises(ValueError, match="logp_rejected must be of shape"):
        ops.odds_ratio_loss(CHOSEN, REJECTED[:3])
    with pytest.raises(TypeError, match="log_ratio must be floating point"):
        ops.bco_loss(np.ones(3, bool), beta=BETA, label=1.0)
