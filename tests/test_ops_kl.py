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


def functional(name, logits):
    """float64: the function of pi whose gradient the docs promise for an estimator off the reward."""
    p = probabilities(logits)
    u = p / REF
    terms = {
        "k1": u * np.log(u),
        "k2": u * (np.log(u) ** 2 / 2 - np.log(u) + 1),
        "k3": (1 + u) * np.log(u) - 2 * u,
    }
    return np.sum(REF * terms[name])


def slope(function, x, width=1e-5):
    """Central differences of a scalar function, float64."""
    x = np.asarray(x, np.float64)
    moves = np.eye(x.size).reshape(-1, *x.shape) * width
    return np.array([(function(x + m) - function(x - m)) / (2 * width) for m in moves]).reshape(x.shape)


@pytest.mark.parametrize("estimator", [ops.k1, ops.k2, ops.k3])
def test_expected_gradient_off_the_reward(estimator):
    def policy_gradient_loss(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(PI.astype(np.float32) * jax.lax.stop_gradient(estimator(logp, LOGP_REF)) * logp)

    expected = slope(lambda x: functional(estimator.__name__, x), LOGITS)
    np.testing.assert_allclose(jax.grad(policy_gradient_loss)(LOGITS), expected, atol=1e-6)
    if estimator is ops.k1:
        np.testing.assert_allclose(expected, REVERSE_GRADIENT, atol=1e-8)


@pytest.mark.parametrize("estimator", [ops.k2, ops.k3])
def test_off_the_reward_k2_and_k3_push_rare_actions_down(estimator):
    """The penalty of an action at half its reference probability rises as it gets rarer; that of k1 falls."""

    def penalty(estimate, u):
        return float(estimate(np.log(0.4 * u, dtype=np.float32), np.log(0.4, dtype=np.float32)))

    assert penalty(estimator, 0.4) > penalty(estimator, 0.5) > penalty(estimator, 0.999)
    assert penalty(ops.k1, 0.4) < penalty(ops.k1, 0.5) < penalty(ops.k1, 1.0)
    # Near the reference the force is of second order.
    assert penalty(estimator, 1.01) < 1e-2 * penalty(ops.k1, 1.01)


# Two decisions of two and three choices; the second state is the first choice. All logits in one vector.
TWO_LOGITS = np.array([0.4, -0.3, 0.3, -0.4, 0.9, -0.8, 0.1, 0.5], np.float32)
TWO_REF = np.array([-0.2, 0.1, -0.2, 0.8, 0.1, 0.3, -0.6, 0.2], np.float32)


def two_decisions(x, xp=jnp):
    """Probabilities of the first choice [2] and of the second given the first [2, 3]."""
    first, second = xp.exp(x[:2]), xp.exp(x[2:].reshape(2, 3))
    return first / first.sum(), second / second.sum(-1, keepdims=True)


def sequence_kl(x):
    (p, q), (p_ref, q_ref) = (two_decisions(np.asarray(y, np.float64), np) for y in (x, TWO_REF))
    return np.sum(p * np.log(p / p_ref)) + np.sum(p[:, None] * q * np.log(q / q_ref))


def test_over_a_sequence_reward_and_loss_each_hold_a_part():
    """Exact KL in the loss holds every decision for itself, in the reward those before it; k1 has both."""
    p, q = map(np.asarray, two_decisions(TWO_LOGITS))
    p_ref, q_ref = map(np.asarray, two_decisions(TWO_REF))
    pq = p[:, None] * q
    kl_second = np.sum(q * np.log(q / q_ref), axis=-1)

    def exact_in_the_loss(x):
        p_x, q_x = two_decisions(x)
        second = jnp.sum(q_x * jnp.log(q_x / q_ref), axis=-1)
        return jnp.sum(p_x * jnp.log(p_x / p_ref)) + jnp.sum(p * second)

    def exact_in_the_reward(x):
        p_x, q_x = two_decisions(x)
        # Own decision: the weight is the same for all its choices, and the sum of p d log p is 0.
        own = jnp.sum(p * np.sum(p * np.log(p / p_ref)) * jnp.log(p_x))
        own += jnp.sum(pq * kl_second[:, None] * jnp.log(q_x))
        return own + jnp.sum(p * kl_second * jnp.log(p_x))

    def k1_in_the_reward(x):
        p_x, q_x = two_decisions(x)
        to_go = np.log(q / q_ref)
        both = np.log(p / p_ref)[:, None] + to_go
        return jnp.sum(pq * (both * jnp.log(p_x)[:, None] + to_go * jnp.log(q_x)))

    full = slope(sequence_kl, TWO_LOGITS)
    in_loss, in_reward, by_k1 = (
        jax.jit(jax.grad(f))(TWO_LOGITS) for f in (exact_in_the_loss, exact_in_the_reward, k1_in_the_reward)
    )
    np.testing.assert_allclose(by_k1, full, atol=1e-6)
    np.testing.assert_allclose(in_loss + in_reward, full, atol=1e-6)
    np.testing.assert_allclose(in_reward[2:], 0, atol=1e-7)  # the last decision is free
    assert np.abs(in_reward[:2]).max() > 0.01


def test_fixed_points_in_the_loss():
    """One decision, coefficient 0.5: k2 gives the tilt; k3 gives coefficient * ref / (level - reward)."""
    reward, coefficient = np.array([0.2, 1.0, -0.3]), 0.5
    tilted = REF * np.exp(reward / coefficient)
    tilted = np.log(tilted / tilted.sum()).astype(np.float32)
    low, high = reward.max() + 1e-6, reward.max() + 10.0
    for _ in range(100):  # the level at which the probabilities sum to 1
        level = (low + high) / 2
        low, high = (level, high) if np.sum(coefficient * REF / (level - reward)) > 1 else (low, level)
    forward = np.log(coefficient * REF / (level - reward)).astype(np.float32)

    for logits, estimator in ((tilted, ops.k2), (forward, ops.k3)):
        p = np.exp(logits)

        def loss(x, p=p, estimator=estimator):
            logp = jax.nn.log_softmax(x)
            return jnp.sum(p * (coefficient * estimator(logp, LOGP_REF) - reward.astype(np.float32) * logp))

        np.testing.assert_allclose(jax.grad(loss)(logits), 0, atol=2e-6)
    assert np.abs(np.exp(tilted) - np.exp(forward)).max() > 0.05


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
