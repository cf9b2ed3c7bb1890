"""Masked statistics against NumPy float64 on the entries that count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import ops

RNG = np.random.default_rng(0)
X = RNG.normal(3.0, 2.0, (4, 6)).astype(np.float32)
MASK = RNG.random((4, 6)) < 0.6
POISONED = np.where(MASK, X, np.nan).astype(np.float32)

STATISTICS = {ops.masked_sum: np.sum, ops.masked_mean: np.mean, ops.masked_variance: np.var}


@pytest.mark.parametrize("statistic", STATISTICS)
def test_equals_numpy_on_the_entries_that_count(statistic):
    oracle = STATISTICS[statistic]
    expected = oracle(X[MASK].astype(np.float64))
    np.testing.assert_allclose(statistic(POISONED, MASK), expected, rtol=1e-6)
    np.testing.assert_allclose(statistic(POISONED, MASK.astype(np.int32)), expected, rtol=1e-6)

    per_row = [oracle(row[keep].astype(np.float64)) for row, keep in zip(X, MASK, strict=True)]
    np.testing.assert_allclose(statistic(POISONED, MASK, axis=-1), per_row, rtol=1e-6)
    np.testing.assert_allclose(
        jax.jit(statistic, static_argnums=2)(POISONED, MASK, (0, 1)), expected, rtol=1e-6
    )
    np.testing.assert_allclose(jax.vmap(statistic)(POISONED, MASK), per_row, rtol=1e-6)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_nothing_counts(statistic):
    value, gradient = jax.value_and_grad(lambda x: statistic(x, np.zeros_like(MASK)))(jnp.asarray(POISONED))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(X))


def test_masked_nan_leaks_into_no_gradient():
    count = MASK.sum()
    of_mean = jax.grad(lambda x: ops.masked_mean(jnp.square(x), MASK))
    np.testing.assert_allclose(
        of_mean(jnp.asarray(np.where(MASK, X, 0))), np.where(MASK, 2 * X / count, 0), rtol=1e-6
    )
    of_variance = jax.grad(lambda x: ops.masked_variance(x, MASK))(jnp.asarray(POISONED))
    np.testing.assert_allclose(of_variance, np.where(MASK, 2 * (X - X[MASK].mean()) / count, 0), atol=1e-6)
    for statistic in (ops.masked_sum, ops.masked_mean, lambda x, mask: ops.whiten(x, mask).max()):
        assert np.isfinite(jax.grad(statistic)(jnp.asarray(POISONED), MASK)).all()


def test_sums_run_in_float32():
    ones = jnp.ones(1001, jnp.bfloat16)  # bfloat16 has no 1001
    assert float(ops.masked_sum(ones, jnp.ones(1001, bool))) == 1001
    assert (
        ops.masked_mean(jnp.array([True, False, True, True]), jnp.array([True, True, False, True])).dtype
        == jnp.float32
    )


def test_variance_survives_a_large_mean():
    x = np.array([1e4, 1e4 + 1, 1e4 + 2], np.float32)
    np.testing.assert_allclose(ops.masked_variance(x, np.ones(3, bool)), 2 / 3, rtol=1e-5)
    np.testing.assert_allclose(ops.whiten(x), np.array([-1, 0, 1]) * np.sqrt(1.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(shift_mean):
    kept = X[MASK].astype(np.float64)
    expected = (kept - kept.mean()) / np.sqrt(kept.var() + 1e-3) + (0 if shift_mean else kept.mean())
    whitened = np.asarray(ops.whiten(POISONED, MASK, shift_mean=shift_mean, epsilon=1e-3))
    np.testing.assert_allclose(whitened[MASK], expected, rtol=1e-5, atol=1e-6)
    assert (whitened[~MASK] == 0).all()


def test_statistics_over_devices_equal_one_device():
    target = RNG.normal(size=X.shape).astype(np.float32)
    whiten = jax.vmap(lambda x, mask: ops.whiten(x, mask, axis_name="data"), axis_name="data")
    np.testing.assert_allclose(whiten(POISONED, MASK), ops.whiten(POISONED, MASK), rtol=1e-5, atol=1e-6)
    explained = jax.vmap(lambda *xs: ops.explained_variance(*xs, axis_name="data"), axis_name="data")
    np.testing.assert_allclose(
        explained(POISONED, target, MASK),
        np.full(4, ops.explained_variance(POISONED, target, MASK)),
        rtol=1e-5,
    )


def test_explained_variance():
    target = X + RNG.normal(size=X.shape).astype(np.float32)
    residual = (target - X)[MASK].astype(np.float64)
    expected = 1 - residual.var() / target[MASK].astype(np.float64).var()
    np.testing.assert_allclose(ops.explained_variance(POISONED, target, MASK), expected, rtol=1e-5)
    np.testing.assert_allclose(ops.explained_variance(X, X), 1)
    np.testing.assert_allclose(ops.explained_variance(X, np.full_like(X, 2.0)), 0)
    # A constant offset is not unexplained: it is a bias.
    np.testing.assert_allclose(ops.explained_variance(target + 5, target), 1, atol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match=r"mask must be bool .* got float32\[4,6\]; pass mask != 0"):
        ops.masked_mean(MASK, X)  # swapped
    with pytest.raises(ValueError, match=r"mask must be of shape \[4,6\].* got bool\[6\]"):
        ops.masked_sum(X, MASK[0])
    with pytest.raises(TypeError, match=r"x must be floating point, got int32\[2\]"):
        ops.whiten(jnp.array([1, 2]))
    with pytest.raises(ValueError, match="prediction must be of shape"):
        ops.explained_variance(X[:2], X)
