"""Baselines and deviations of groups against float64 loops, and against the exact policy gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.ops import (
    all_equal,
    batch_mean,
    batch_std,
    divide_by_std,
    first_chosen,
    group_mean_baseline,
    group_std,
    leave_one_out_baseline,
    soft_overlong_penalty,
)


@pytest.fixture(scope="module")
def groups():
    """Rewards [6, 4] with masks from none to all; NaN under the mask."""
    generator = np.random.default_rng(0)
    reward = generator.normal(size=(6, 4)).astype(np.float32) + 3.0
    mask = np.asarray(
        [[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]], bool
    )
    return np.where(mask, reward, np.nan), mask


def test_group_statistics_equal_loops_over_what_counts(groups):
    reward, mask = groups
    mean, others, std = jax.jit(
        lambda r, m: (group_mean_baseline(r, m), leave_one_out_baseline(r, m), group_std(r, m))
    )(reward, mask)
    for b in range(len(reward)):
        alive = [float(x) for x in reward[b][mask[b]]]
        assert float(std[b]) == pytest.approx(np.std(alive, ddof=1) if len(alive) > 1 else 0.0, rel=1e-5)
        for g in range(reward.shape[1]):
            if not mask[b, g]:
                assert float(mean[b, g]) == float(others[b, g]) == 0.0
                continue
            assert float(mean[b, g]) == pytest.approx(np.mean(alive), rel=1e-6)
            rest = [float(reward[b, h]) for h in range(4) if mask[b, h] and h != g]
            expected = np.mean(rest) if rest else float(reward[b, g])
            assert float(others[b, g]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [0.1, 1e-20, 1e6 + 0.1, -7.3])
@pytest.mark.parametrize("samples", [2, 3, 7])
def test_equal_rewards_leave_exactly_nothing(value, samples):
    """A rounding error would be blown up by the division: mean([x, x, x]) is not x in float32."""
    reward = jnp.full((1, samples), value, jnp.float32)
    for baseline in (group_mean_baseline, leave_one_out_baseline):
        assert not np.any(np.asarray(reward - baseline(reward)))
    std = group_std(reward)
    assert float(std[0]) == 0.0 and bool(all_equal(reward)[0])
    advantage = divide_by_std(
        reward - group_mean_baseline(reward), jnp.broadcast_to(std[:, None], reward.shape)
    )
    assert not np.any(np.asarray(advantage))


def test_all_equal_looks_at_what_counts():
    reward = jnp.asarray([[1.0, 1.0, 2.0], [1.0, 1.0, jnp.nan], [jnp.nan, 4.0, jnp.nan], [1.0, 1.0, 1.0]])
    mask = jnp.asarray([[1, 1, 1], [1, 1, 0], [0, 1, 0], [0, 0, 0]], bool)
    np.testing.assert_array_equal(all_equal(reward, mask), [False, True, True, True])


def test_batch_statistics(groups):
    reward, mask = groups
    alive = reward[mask].astype(np.float64)
    assert float(batch_mean(reward, mask)) == pytest.approx(alive.mean(), rel=1e-6)
    assert float(batch_std(reward, mask)) == pytest.approx(alive.std(ddof=1), rel=1e-5)
    none = jnp.zeros_like(jnp.asarray(mask))
    assert float(batch_mean(reward, none)) == float(batch_std(reward, none)) == 0.0
    one = none.at[0, 0].set(True)
    assert float(batch_std(reward, one)) == 0.0


def test_batch_statistics_over_a_mapped_axis(groups):
    reward, mask = (jnp.asarray(x).reshape(3, 2, 4) for x in groups)
    for statistic in (batch_mean, batch_std):
        parts = jax.vmap(lambda r, m, f=statistic: f(r, m, axis_name="i"), axis_name="i")(reward, mask)
        np.testing.assert_allclose(parts, np.full(3, statistic(reward, mask)), rtol=1e-6)


def test_dividing_by_a_deviation():
    advantage, std = jnp.asarray([1.0, -2.0, 3.0]), jnp.asarray([0.5, 0.0, 2.0])
    np.testing.assert_allclose(divide_by_std(advantage, std, epsilon=0.5), [1.0, 0.0, 1.2], rtol=1e-6)
    np.testing.assert_allclose(divide_by_std(advantage, 0.5, epsilon=0.0), [2.0, -4.0, 6.0], rtol=1e-6)


def test_overlong_penalty_is_the_papers():
    """DAPO with limit 10 and cache 4: nothing up to 6, -1/4 a token, -1 from 10 on."""
    length = jnp.arange(13)
    expected = [0.0 if n <= 6 else max((6 - n) / 4, -1.0) for n in range(13)]
    np.testing.assert_allclose(soft_overlong_penalty(length, limit=10, cache=4), expected, atol=1e-7)


def test_first_chosen_keeps_order_and_fills_up():
    chosen = jnp.asarray([False, True, False, True, True])
    np.testing.assert_array_equal(first_chosen(chosen, 2), [1, 3])
    np.testing.assert_array_equal(jax.jit(first_chosen, static_argnums=1)(chosen, 4), [1, 3, 4, 0])
    with pytest.raises(ValueError, match="count = 6 cannot be taken"):
        first_chosen(chosen, 6)


def expected_gradient(baseline, p, reward, samples):
    """E over all groups of the mean of (reward - baseline) grad log p, by going through every group."""
    total = np.zeros(len(p))
    for group in itertools.product(range(len(p)), repeat=samples):
        group = np.asarray(group)
        of_group = reward[group]
        advantage = of_group - np.asarray(baseline(jnp.asarray(of_group, jnp.float32)), np.float64)
        score = np.eye(len(p))[group] - p
        total += p[group].prod() * (advantage[:, None] * score).mean(axis=0)
    return total


@pytest.mark.parametrize("samples", [2, 3])
def test_which_baselines_are_unbiased(samples):
    """Three answers, every group of samples: the statements of the module."""
    logits, reward = np.asarray([0.3, -0.5, 0.9]), np.asarray([1.0, -0.4, 0.25])
    p = np.exp(logits) / np.exp(logits).sum()
    exact = p * (reward - p @ reward)  # gradient of E[reward] with respect to the logits
    assert np.abs(exact).max() > 0.1
    none = expected_gradient(jnp.zeros_like, p, reward, samples)
    np.testing.assert_allclose(none, exact, atol=1e-6)
    leave_one_out = expected_gradient(leave_one_out_baseline, p, reward, samples)
    np.testing.assert_allclose(leave_one_out, exact, atol=1e-6)
    mean = expected_gradient(group_mean_baseline, p, reward, samples)
    np.testing.assert_allclose(mean, exact * (samples - 1) / samples, atol=1e-6)


def test_wrong_input_is_refused():
    with pytest.raises(TypeError, match="reward must be floating point"):
        group_mean_baseline(jnp.asarray([[1, 0]]))
    with pytest.raises(ValueError, match="reward must have shape"):
        group_std(jnp.float32(1.0))
    with pytest.raises(ValueError, match="mask must be of shape"):
        leave_one_out_baseline(jnp.zeros((2, 3)), jnp.ones((2, 2), bool))
    with pytest.raises(TypeError, match="length must be integer"):
        soft_overlong_penalty(jnp.zeros(3), limit=10, cache=4)
