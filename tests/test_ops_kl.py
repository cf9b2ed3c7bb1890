"""KL estimators by exact enumeration of three tokens: what they estimate, and what they push towards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import ops

LOGITS = np.array([0.3, -0.4, 0.9], np.float32)
LOGITS_REF = np.array([-0.2, 0.8, 0.1], np.float32)


def probabilities(logits):
    weight = np.exp(logits.astype(np.float64))
    return weight / weight.sum()


PI, REF = probabilities(LOGITS), probabilities(LOGITS_REF)
KL = float(np.sum(PI * np.log(PI / REF)))
# With log-probabilities l of pi as a function of its logits: dKL(pi||ref) / dlogit_i = pi_i (log pi_i/ref_i -
# KL), and dKL(ref||pi) / dlogit_i = pi_i - ref_i.
REVERSE_GRADIENT = PI * (np.log(PI / REF) - KL)
FORWARD_GRADIENT = PI - REF
LOGP_REF = np.log(REF).astype(np.float32)


def test_definitions():
    d = np.log(PI / REF)
    logp = np.log(PI).astype(np.float32)
    np.testing.assert_allclose(ops.k1(logp, LOGP_REF), d, atol=1e-6)
    np.testing.assert_allclose(ops.k2(logp, LOGP_REF), d**2 / 2, atol=1e-6)
    np.testing.assert_allclose(ops.k3(logp, LOGP_REF), np.exp(-d) - 1 + d, atol=1e-6)


@pytest.mark.parametrize("estimator", [ops.k1, ops.k3])
def test_expectation_is_the_divergence(estimator):
    estimate = np.asarray(estimator(np.log(PI).astype(np.float32), LOGP_REF), np.float64)
    np.testing.assert_allclose(np.sum(PI * estimate), KL, rtol=1e-5)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [(ops.k1, np.zeros(3)), (ops.k2, REVERSE_GRADIENT), (ops.k3, FORWARD_GRADIENT)],
    ids=["k1: none", "k2: KL(pi||ref)", "k3: KL(ref||pi)"],
)
def test_expected_gradient_as_a_loss(estimator, expected):
    def expected_loss(logits):
        # Samples are drawn from pi, and the draw is not differentiated: hence PI, a constant.
        return jnp.sum(PI.astype(np.float32) * estimator(jax.nn.log_softmax(logits), LOGP_REF))

    np.testing.assert_allclose(jax.grad(expected_loss)(LOGITS), expected, atol=1e-6)


def test_k1_off_the_reward_gives_the_reverse_gradient():
    def policy_gradient_loss(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(PI.astype(np.float32) * jax.lax.stop_gradient(ops.k1(logp, LOGP_REF)) * logp)

    np.testing.assert_allclose(jax.grad(policy_gradient_loss)(LOGITS), REVERSE_GRADIENT, atol=1e-6)


def test_k3_stays_finite():
    k3, slope = jax.value_and_grad(ops.k3)(-300.0, -1.0)
    assert np.isfinite(k3) and k3 > 1e8
    assert slope == 1  # only the linear term is left
    assert ops.k3(-1.0, -1.0) == 0


def test_categorical_kl():
    np.testing.assert_allclose(ops.categorical_kl(LOGITS, LOGITS_REF), KL, rtol=1e-6)
    np.testing.assert_allclose(ops.categorical_kl(LOGITS + 7, LOGITS_REF - 3), KL, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ops.categorical_kl)(LOGITS, LOGITS_REF), REVERSE_GRADIENT, atol=1e-6)
    a, b = np.random.default_rng(2).normal(size=(2, 3, 4, 5)).astype(np.float32)
    expected = [
        [
            np.sum(probabilities(p) * np.log(probabilities(p) / probabilities(q)))
            for p, q in zip(*rows, strict=True)
        ]
        for rows in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(jax.jit(ops.categorical_kl)(a, b), expected, atol=1e-6)


def test_categorical_kl_with_excluded_tokens():
    logits = jnp.array([0.0, -jnp.inf, 0.0])
    logits_ref = jnp.array([0.0, 1.0, 0.0])
    kl, gradient = jax.value_and_grad(ops.categorical_kl)(logits, logits_ref)
    np.testing.assert_allclose(kl, np.log((2 + np.e) / 2), rtol=1e-6)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(ops.categorical_kl(logits, logits), 0, atol=1e-7)
    assert ops.categorical_kl(logits_ref, logits) == np.inf


@pytest.mark.parametrize(
    ("kl", "error"), [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (0.0, -0.2)], ids=str
)
def test_adaptive_kl_coefficient(kl, error):
    coefficient = ops.adaptive_kl_coefficient(0.15, kl, target=6.0, horizon=10_000, steps=512)
    np.testing.assert_allclose(coefficient, 0.15 * (1 + error * 512 / 10_000), rtol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="logp_ref must be floating point"):
        ops.k3(np.zeros(2, np.float32), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match=r"logp_ref must be of shape \[2\]"):
        ops.k1(np.zeros(2, np.float32), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="logits_ref must be of shape"):
        ops.categorical_kl(LOGITS, LOGITS_REF[:2])
    with pytest.raises(ValueError, match=r"kl must be a scalar .* got float32\[3\]"):
        ops.adaptive_kl_coefficient(0.1, LOGITS, target=1.0, horizon=1, steps=1)
