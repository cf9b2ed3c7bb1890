"""Advantages and returns against sums written out from their definition in float64, and against rlax.

The masks are exhaustive: one row for each of the 32 patterns of five positions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from rlhfjax import ops

T = 5
RNG = np.random.default_rng(1)
MASK = np.array(np.meshgrid(*[[False, True]] * T)).reshape(T, -1).T
B = len(MASK)
REWARD, VALUE, NEXT_VALUE = RNG.normal(size=(3, B, T)).astype(np.float32)
DISCOUNT = RNG.uniform(0.5, 1.0, (B, T)).astype(np.float32)
TERMINATED = RNG.random((B, T)) < 0.2
TRUNCATED = RNG.random((B, T)) < 0.2
LAM = 0.7

gae = jax.jit(ops.gae)


def gae_by_definition(reward, value, next_value, discount, terminated, truncated, lam=LAM):
    """Advantage t: the deltas from t to the end of the episode, each times all discount * lam between."""
    advantage = np.zeros(len(reward))
    for t in range(len(reward)):
        weight = 1.0
        for k in range(t, len(reward)):
            bootstrap = 0.0 if terminated[k] else float(discount[k]) * float(next_value[k])
            advantage[t] += weight * (float(reward[k]) + bootstrap - float(value[k]))
            if terminated[k] or truncated[k]:
                break
            weight *= float(discount[k]) * lam
    return advantage


def on_kept_entries(function, mask, *arrays):
    """Applies a function to each row without its masked entries and puts the results back, 0 elsewhere."""
    out = np.zeros(mask.shape)
    for b, keep in enumerate(mask):
        out[b, keep] = function(*(array[b, keep] for array in arrays))
    return out


def poisoned(*arrays):
    return [np.where(MASK, array, np.nan).astype(np.float32) for array in arrays]


NEVER = np.zeros((B, T), bool)


def test_gae_with_every_mask_equals_dropping_the_entries():
    def oracle(reward, value, discount):
        never = np.zeros(len(reward), bool)
        return gae_by_definition(reward, value, np.append(value[1:], 0.0), discount, never, never)

    expected = on_kept_entries(oracle, MASK, REWARD, VALUE, DISCOUNT)
    reward, value, discount = poisoned(REWARD, VALUE, DISCOUNT)
    advantage, returns = gae(reward, value, discount=discount, lam=LAM, mask=MASK)
    np.testing.assert_allclose(advantage, expected, atol=2e-6)
    np.testing.assert_allclose(returns, np.where(MASK, expected + VALUE, 0), atol=2e-6)


def test_gae_with_every_mask_terminations_and_truncations():
    arrays = (REWARD, VALUE, NEXT_VALUE, DISCOUNT, TERMINATED, TRUNCATED)
    expected = on_kept_entries(gae_by_definition, MASK, *arrays)
    reward, value, discount = poisoned(REWARD, VALUE, DISCOUNT)
    next_value = np.where(MASK & ~TERMINATED, NEXT_VALUE, np.nan)  # nobody knows what comes after the end
    flags = {"terminated": TERMINATED, "truncated": TRUNCATED}
    advantage, returns = gae(
        reward, value, discount=discount, lam=LAM, mask=MASK, next_value=next_value, **flags
    )
    np.testing.assert_allclose(advantage, expected, atol=2e-6)
    np.testing.assert_allclose(returns, np.where(MASK, expected + VALUE, 0), atol=2e-6)


def test_gae_terminations_inside_a_row_without_next_value():
    following = np.concatenate([VALUE[:, 1:], np.zeros((B, 1))], axis=1)
    expected = on_kept_entries(
        gae_by_definition, ~NEVER, REWARD, VALUE, following, DISCOUNT, TERMINATED, NEVER
    )
    advantage, _ = gae(REWARD, VALUE, discount=DISCOUNT, lam=LAM, terminated=TERMINATED)
    np.testing.assert_allclose(advantage, expected, atol=2e-6)


def test_gae_equals_rlax():
    values = np.concatenate([VALUE, NEXT_VALUE[:, -1:]], axis=1)
    expected = jax.vmap(rlax.truncated_generalized_advantage_estimation, (0, 0, None, 0))(
        REWARD, DISCOUNT, LAM, values
    )
    advantage, returns = gae(REWARD, VALUE, discount=DISCOUNT, lam=LAM, next_value=values[:, 1:])
    np.testing.assert_allclose(advantage, expected, atol=2e-6)
    lambda_returns = jax.vmap(rlax.lambda_returns, (0, 0, 0, None))(REWARD, DISCOUNT, values[:, 1:], LAM)
    np.testing.assert_allclose(returns, lambda_returns, atol=2e-6)


def test_a_truncated_episode_bootstraps_and_a_terminated_one_does_not():
    one = np.ones(1, np.float32)
    seen = {"discount": 0.9, "lam": 1.0, "next_value": np.array([50.0], np.float32)}
    _, cut_short = ops.gae(one, one, truncated=np.array([True]), **seen)
    _, ended = ops.gae(one, one, terminated=np.array([True]), **seen)
    _, both = ops.gae(one, one, terminated=np.array([True]), truncated=np.array([True]), **seen)
    np.testing.assert_allclose(np.concatenate([cut_short, ended, both]), [46.0, 1.0, 1.0])


def test_gae_leading_axes_and_transforms():
    expected, _ = gae(REWARD, VALUE, discount=DISCOUNT, lam=LAM, mask=MASK)
    shape = (4, B // 4, T)
    reshaped = [x.reshape(shape) for x in (REWARD, VALUE, DISCOUNT, MASK)]
    deep, _ = gae(*reshaped[:2], discount=reshaped[2], lam=LAM, mask=reshaped[3])
    np.testing.assert_allclose(deep, expected.reshape(shape), atol=1e-6)
    one_row, _ = gae(REWARD[7], VALUE[7], discount=DISCOUNT[7], lam=LAM, mask=MASK[7])
    np.testing.assert_allclose(one_row, expected[7], atol=1e-6)
    # A sweep over lam is a vmap.
    swept, _ = jax.vmap(lambda lam: gae(REWARD[7], VALUE[7], discount=0.9, lam=lam))(jnp.array([0.0, 1.0]))
    td_error = REWARD[7] + 0.9 * np.append(VALUE[7, 1:], 0) - VALUE[7]
    np.testing.assert_allclose(swept[0], td_error, atol=1e-6)
    np.testing.assert_allclose(
        swept[1] + VALUE[7], ops.discounted_returns(REWARD[7], discount=0.9), atol=2e-6
    )


def test_padding_changes_nothing():
    padded = [np.pad(x, [(0, 0), (2, 3)], constant_values=np.nan) for x in (REWARD, VALUE)]
    mask = np.pad(MASK, [(0, 0), (2, 3)])
    advantage, returns = gae(*padded, discount=0.9, lam=LAM, mask=mask)
    expected = gae(REWARD, VALUE, discount=0.9, lam=LAM, mask=MASK)
    # To rounding: XLA may fuse a product and a sum in one shape and not in another.
    np.testing.assert_allclose(advantage[:, 2:-3], expected[0], atol=1e-6)
    np.testing.assert_allclose(returns[:, 2:-3], expected[1], atol=1e-6)


def test_masked_nan_leaks_into_no_gradient():
    def total(reward, value, next_value, discount):
        flags = {"terminated": TERMINATED, "truncated": TRUNCATED}
        advantage, returns = ops.gae(
            reward, value, discount=discount, lam=LAM, mask=MASK, next_value=next_value, **flags
        )
        discounted = ops.discounted_returns(reward, discount=discount, mask=MASK)
        return advantage.sum() + 0.5 * returns.sum() + discounted.sum()

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))
    arrays = (REWARD, VALUE, NEXT_VALUE, DISCOUNT)
    clean = gradients(*arrays)
    for gradient, expected in zip(gradients(*poisoned(*arrays)), clean, strict=True):
        np.testing.assert_array_equal(gradient, expected)
        assert not np.asarray(gradient)[~MASK].any()
        assert np.asarray(gradient)[MASK].any()


def test_discounted_returns_with_every_mask():
    bootstrap = RNG.normal(size=B).astype(np.float32)

    def oracle(reward, discount, after):
        return [
            sum(np.prod(discount[t:k], dtype=np.float64) * float(reward[k]) for k in range(t, len(reward)))
            + np.prod(discount[t:], dtype=np.float64) * float(after[0])
            for t in range(len(reward))
        ]

    expected = on_kept_entries(oracle, MASK, REWARD, DISCOUNT, np.repeat(bootstrap[:, None], T, axis=1))
    reward, discount = poisoned(REWARD, DISCOUNT)
    returns = ops.discounted_returns(reward, discount=discount, mask=MASK, bootstrap=bootstrap)
    np.testing.assert_allclose(returns, expected, atol=2e-6)


@pytest.mark.parametrize("penalty", [None, -1.0, 0.0])
def test_end_of_sequence_reward(penalty):
    score = RNG.normal(size=B).astype(np.float32)
    finished = RNG.random(B) < 0.5
    expected = np.zeros((B, T), np.float32)
    for b in range(B):
        if MASK[b].any():
            replaced = penalty is not None and not finished[b]
            expected[b, np.flatnonzero(MASK[b])[-1]] = penalty if replaced else score[b]
    score[~MASK.any(axis=1)] = np.nan
    reward = jax.jit(ops.end_of_sequence_reward)(score, MASK, finished=finished, missing_eos_penalty=penalty)
    np.testing.assert_array_equal(reward, expected)
    one_row = ops.end_of_sequence_reward(score[9], MASK[9], finished=finished[9], missing_eos_penalty=penalty)
    np.testing.assert_array_equal(one_row, expected[9])


def test_bfloat16_comes_out_as_float32():
    reward = jnp.ones(3, jnp.bfloat16)
    advantage, returns = ops.gae(reward, reward, discount=1.0, lam=1, mask=jnp.ones(3, jnp.int32))
    assert advantage.dtype == returns.dtype == jnp.float32
    np.testing.assert_allclose(returns, [3, 2, 1])


def test_bad_input_is_named():
    with pytest.raises(TypeError, match=r"reward must be floating point, got int32\[3\]"):
        ops.gae(jnp.array([1, 0, 2]), VALUE[0, :3], discount=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"value must be of shape \[5\].* got float32\[4\]"):
        ops.gae(REWARD[0], VALUE[0, :4], discount=1.0, lam=1.0)
    with pytest.raises(
        ValueError, match=r"discount must be a scalar or of shape \[32,5\].* got float32\[5\]"
    ):
        ops.gae(REWARD, VALUE, discount=DISCOUNT[0], lam=1.0)
    with pytest.raises(ValueError, match="truncated needs next_value"):
        ops.gae(REWARD, VALUE, discount=1.0, lam=1.0, truncated=TRUNCATED)
    with pytest.raises(TypeError, match="terminated must be bool"):
        ops.gae(REWARD, VALUE, discount=1.0, lam=1.0, terminated=TERMINATED.astype(np.float32))
    with pytest.raises(ValueError, match=r"reward must have shape \[..., T\]"):
        ops.discounted_returns(1.0, discount=0.9)
    with pytest.raises(ValueError, match=r"score must be of shape \[32\]"):
        ops.end_of_sequence_reward(REWARD, MASK, finished=np.ones(B, bool))
    with pytest.raises(TypeError, match="score must be floating point"):
        ops.end_of_sequence_reward(np.ones(B, np.int32), MASK, finished=np.ones(B, bool))
