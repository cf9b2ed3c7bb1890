"""PPO's clipped losses against loops in float64 and against rlax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from rlhfjax import ops

RNG = np.random.default_rng(3)
LOGP_OLD, ADVANTAGE, VALUE_OLD, RETURNS = RNG.normal(size=(4, 64)).astype(np.float32)
LOGP = (LOGP_OLD + RNG.normal(0, 0.4, 64)).astype(np.float32)
VALUE = (VALUE_OLD + RNG.normal(0, 0.5, 64)).astype(np.float32)

clipped_surrogate = jax.jit(ops.clipped_surrogate)
clipped_value_loss = jax.jit(ops.clipped_value_loss)


def surrogate(logp, logp_old=LOGP_OLD, advantage=ADVANTAGE, clip_low=0.2, clip_high=0.3):
    return clipped_surrogate(logp, logp_old, advantage, clip_low=clip_low, clip_high=clip_high)


def gradient(elementwise, x):
    """Of every element with respect to its own argument."""
    return np.asarray(jax.jit(jax.grad(lambda x: elementwise(x)[0].sum()))(x))


def test_surrogate_equals_the_loop():
    loss, clipped = map(np.asarray, surrogate(LOGP))
    slope = gradient(surrogate, LOGP)
    kinds = set()
    for i in range(64):
        ratio, advantage = np.exp(float(LOGP[i]) - float(LOGP_OLD[i])), float(ADVANTAGE[i])
        active = (advantage > 0 and ratio > 1.3) or (advantage < 0 and ratio < 0.8)
        bound = 1.3 if advantage > 0 else 0.8
        np.testing.assert_allclose(loss[i], -advantage * (bound if active else ratio), rtol=1e-5)
        np.testing.assert_allclose(slope[i], 0 if active else -advantage * ratio, rtol=1e-5)
        assert clipped[i] == active
        kinds.add((advantage > 0, ratio > 1.3, ratio < 0.8))
    assert len(kinds) == 6  # below, inside and above the bounds, for both signs


def test_dual_clip_equals_the_loop():
    """arXiv:1912.09729: with a negative advantage the loss is at most dual_clip * |advantage|."""

    def dual(logp, dual_clip=1.4):
        return clipped_surrogate(logp, LOGP_OLD, ADVANTAGE, clip_low=0.2, clip_high=0.3, dual_clip=dual_clip)

    loss, clipped = map(np.asarray, dual(LOGP))
    slope, plain_clipped = gradient(dual, LOGP), np.asarray(surrogate(LOGP)[1])
    bound = 0
    for i in range(64):
        ratio, advantage = np.exp(float(LOGP[i]) - float(LOGP_OLD[i])), float(ADVANTAGE[i])
        gain = min(ratio * advantage, np.clip(ratio, 0.8, 1.3) * advantage)
        held = advantage < 0 and gain < 1.4 * advantage
        gain = max(gain, 1.4 * advantage) if advantage < 0 else gain
        np.testing.assert_allclose(loss[i], -gain, rtol=1e-5)
        assert clipped[i] == (plain_clipped[i] or held)
        np.testing.assert_allclose(slope[i], 0 if clipped[i] else -advantage * ratio, rtol=1e-5)
        bound += held
    assert 3 < bound < 30
    for given, wanted in zip(dual(LOGP, np.inf), surrogate(LOGP), strict=True):
        np.testing.assert_array_equal(given, wanted)


def test_surrogate_equals_rlax():
    loss, _ = surrogate(LOGP, clip_high=0.2)
    expected = rlax.clipped_surrogate_pg_loss(jnp.exp(LOGP - LOGP_OLD), jnp.asarray(ADVANTAGE), 0.2)
    np.testing.assert_allclose(loss.mean(), expected, rtol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient(clip):
    loss, clipped = surrogate(LOGP_OLD, clip_low=clip, clip_high=clip)
    np.testing.assert_array_equal(loss, -ADVANTAGE)
    assert not clipped.any()
    if clip:
        at_one = gradient(lambda logp: surrogate(logp, clip_low=clip, clip_high=clip), LOGP_OLD)
        np.testing.assert_array_equal(at_one, -ADVANTAGE)


def test_surrogate_stays_finite():
    logp = np.array([0.0, -500.0], np.float32)
    arguments = logp[::-1].copy(), np.array([-1.0, -1.0], np.float32)
    loss, _ = surrogate(logp, *arguments)
    np.testing.assert_allclose(loss, [np.exp(20.0), 0.8], rtol=1e-5)
    np.testing.assert_array_equal(gradient(lambda logp: surrogate(logp, *arguments), logp), [0, 0])


def value_loss(value, clip=0.3):
    return clipped_value_loss(value, VALUE_OLD, RETURNS, clip=clip)


def test_value_loss_equals_the_loop():
    loss, clipped = map(np.asarray, value_loss(VALUE))
    slope = gradient(value_loss, VALUE)
    for i in range(64):
        value, old, target = float(VALUE[i]), float(VALUE_OLD[i]), float(RETURNS[i])
        bounded = min(max(value, old - 0.3), old + 0.3)
        expected = max((value - target) ** 2, (bounded - target) ** 2) / 2
        np.testing.assert_allclose(loss[i], expected, rtol=1e-4, atol=1e-6)
        assert clipped[i] == ((bounded - target) ** 2 > (value - target) ** 2 and bounded != value)
        np.testing.assert_allclose(slope[i], 0 if clipped[i] else value - target, rtol=1e-5, atol=1e-6)
    assert 0 < clipped.sum() < 64


def test_value_loss_without_clipping():
    loss, clipped = value_loss(VALUE, clip=jnp.inf)
    np.testing.assert_allclose(loss, (VALUE - RETURNS) ** 2 / 2, rtol=1e-6)
    assert not clipped.any()
    np.testing.assert_allclose(
        gradient(lambda v: value_loss(v, clip=jnp.inf), VALUE), VALUE - RETURNS, rtol=1e-6
    )


def test_shapes_and_dtypes_are_kept():
    shape = (4, 16)
    arguments = [x.reshape(shape) for x in (LOGP, LOGP_OLD, ADVANTAGE)]
    loss, clipped = surrogate(*arguments)
    np.testing.assert_array_equal(loss, surrogate(LOGP)[0].reshape(shape))
    assert clipped.dtype == bool
    swept, _ = jax.vmap(lambda clip: value_loss(VALUE, clip))(jnp.array([0.1, 0.3]))
    np.testing.assert_array_equal(swept[1], value_loss(VALUE)[0])
    assert surrogate(*(x.astype(jnp.bfloat16) for x in arguments))[0].dtype == jnp.float32


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="advantage must be floating point, got int32"):
        surrogate(LOGP, LOGP_OLD, np.ones(64, np.int32))
    with pytest.raises(ValueError, match=r"logp_old must be of shape \[64\]"):
        surrogate(LOGP, LOGP_OLD[:1])
    with pytest.raises(ValueError, match="dual_clip must be a scalar"):
        ops.clipped_surrogate(LOGP, LOGP_OLD, ADVANTAGE, clip_low=0.2, clip_high=0.2, dual_clip=LOGP)
    with pytest.raises(ValueError, match="returns must be of shape"):
        ops.clipped_value_loss(VALUE, VALUE_OLD, RETURNS[:, None], clip=0.2)
