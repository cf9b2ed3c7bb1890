"""Advantages without a critic: a reward compared with those of other samples of the same prompt.

The last axis G holds the samples of one prompt, a group; leading axes are independent. A sample under the
mask does not exist: what it holds, NaN included, reaches nothing, and the others are treated as if the group
had never had it.

Which baselines leave the policy gradient E[sum_g baseline-corrected reward_g * grad logp_g] / G unbiased, for
n independent samples of one prompt:

    none                      unbiased
    leave-one-out             unbiased: the baseline of a sample does not depend on it
    mean of the group         (n - 1) / n times the gradient: each sample stands in its own baseline
    mean, then group_std      biased: every prompt gets a weight of its own, 1 / std, and the sampled std
                              depends on the samples (arXiv:2503.20783)

The factor (n - 1) / n is a matter of the learning rate where all groups have one size. Body suffixes: G
samples.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhfjax.ops._check import as_float, as_index, as_mask, as_number, require_rank


def group_mean_baseline(reward: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """Mean reward of the group, at each of its samples (GRPO, arXiv:2402.03300).

    Equal rewards are returned exactly, whatever their number: `reward - baseline` is then 0 and not a
    rounding error, which a division by the standard deviation would blow up.

    Args:
      reward: float [..., G].
      mask: bool [..., G], True where the sample counts. None: all do.

    Returns:
      float32 [..., G]; 0 where masked out.

    >>> group_mean_baseline([0.0, 1.0, 2.0, 99.0], [True, True, True, False]).tolist()
    [1.0, 1.0, 1.0, 0.0]
    """
    reward_G, mask_G, anchor_G = _anchored(reward, mask)
    count = jnp.maximum(jnp.sum(mask_G, axis=-1, keepdims=True, dtype=reward_G.dtype), 1)
    return jnp.where(mask_G, anchor_G + jnp.sum(reward_G - anchor_G, axis=-1, keepdims=True) / count, 0)


def leave_one_out_baseline(reward: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """Mean reward of the other samples of the group (RLOO, arXiv:2402.14740; Kool et al. 2019).

        baseline_g = sum_{h != g} reward_h / (n - 1)

    `reward - baseline` is n / (n - 1) times that of the group mean. A sample alone in its group has nothing
    to be compared with: its baseline is its own reward, so that its advantage is 0. Equal rewards are
    returned exactly.

    Args:
      reward: float [..., G].
      mask: bool [..., G], True where the sample counts. None: all do.

    Returns:
      float32 [..., G]; 0 where masked out.

    >>> leave_one_out_baseline([0.0, 1.0, 2.0]).tolist()
    [1.5, 1.0, 0.5]
    """
    reward_G, mask_G, anchor_G = _anchored(reward, mask)
    deviation_G = reward_G - anchor_G
    others = jnp.sum(mask_G, axis=-1, keepdims=True, dtype=reward_G.dtype) - 1
    of_others_G = jnp.sum(deviation_G, axis=-1, keepdims=True) - deviation_G
    mean_G = anchor_G + of_others_G / jnp.maximum(others, 1)
    return jnp.where(mask_G, jnp.where(others > 0, mean_G, reward_G), 0)


def group_std(reward: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """Sample standard deviation (divided by n - 1) of the group; 0 for fewer than two samples.

    Exactly 0 where all rewards of the group are equal.

    Args:
      reward: float [..., G].
      mask: bool [..., G], True where the sample counts. None: all do.

    Returns:
      float32 [...]. Its gradient is not defined where it is 0; rewards are constants to usual callers.
    """
    reward_G, mask_G, _ = _anchored(reward, mask)
    deviation_G = jnp.where(mask_G, reward_G - group_mean_baseline(reward_G, mask_G), 0)
    count = jnp.sum(mask_G, axis=-1, dtype=reward_G.dtype)
    return jnp.sqrt(jnp.sum(jnp.square(deviation_G), axis=-1) / jnp.maximum(count - 1, 1))


def batch_mean(reward: ArrayLike, mask: ArrayLike | None = None, *, axis_name: str | None = None) -> Array:
    """Mean of all rewards of the batch that count, a scalar; 0 where none does. As a baseline it leaves (n - 1)
    / n of the gradient, n the samples of the batch.

    Args:
      reward: float, any shape.
      mask: bool, the same shape, True where the sample counts. None: all do.
      axis_name: mapped axis over which the batch is split; the mean is that of all devices.
    """
    return _batch_moments(reward, mask, axis_name)[0]


def batch_std(reward: ArrayLike, mask: ArrayLike | None = None, *, axis_name: str | None = None) -> Array:
    """Sample standard deviation (divided by n - 1) of all rewards of the batch, a scalar; 0 for fewer than two.

    Args:
      reward: float, any shape.
      mask: bool, the same shape, True where the sample counts. None: all do.
      axis_name: mapped axis over which the batch is split; the deviation is that of all devices.
    """
    _, squares, count = _batch_moments(reward, mask, axis_name)
    return jnp.sqrt(squares / jnp.maximum(count - 1, 1))


def divide_by_std(advantage: ArrayLike, std: ArrayLike, *, epsilon: ArrayLike = 1e-4) -> Array:
    """`advantage / (std + epsilon)`, elementwise; 0 where std is 0, i.e. where nothing tells samples apart.

    Args:
      advantage: float, any shape.
      std: scalar or the same shape, >= 0, in units of reward.
      epsilon: scalar >= 0, in units of reward.

    Returns:
      float32, shape of advantage.
    """
    advantage = as_float("advantage", advantage)
    std = jnp.broadcast_to(as_number("std", std, advantage.shape), advantage.shape)
    varies = std > 0
    return jnp.where(varies, advantage / jnp.where(varies, std + as_number("epsilon", epsilon), 1), 0)


def all_equal(reward: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """True where all samples of the group have one and the same reward, so that the group says nothing about
    which is better: what dynamic sampling leaves out (DAPO, arXiv:2503.14476, sec. 3.2).

    Also True for groups of one sample or none.

    Args:
      reward: float [..., G].
      mask: bool [..., G], True where the sample counts. None: all do.

    Returns:
      bool [...].
    """
    reward_G, _, anchor_G = _anchored(reward, mask)
    return jnp.all(reward_G == anchor_G, axis=-1)


def first_chosen(chosen: ArrayLike, count: int) -> Array:
    """Indices of the first `count` entries that are chosen, in order; if too few are, the first others follow.

    With `chosen = ~all_equal(reward)` this is dynamic sampling of static shape: more prompts are sampled than
    the update takes, and the first `count` with a signal are kept.

    Args:
      chosen: bool [N].
      count: at most N; static.

    Returns:
      int32 [count], distinct.
    """
    chosen_N = jnp.asarray(chosen)
    if chosen_N.ndim != 1 or not 0 < count <= chosen_N.size:
        raise ValueError(f"count = {count} cannot be taken from an array of shape {chosen_N.shape}")
    chosen_N = as_mask("chosen", chosen, chosen_N.shape)
    return jnp.argsort(~chosen_N, stable=True)[:count].astype(jnp.int32)


def soft_overlong_penalty(length: ArrayLike, *, limit: ArrayLike, cache: ArrayLike) -> Array:
    """Reward added for length, elementwise: 0, then falling to -1 (DAPO, arXiv:2503.14476, sec. 3.4):

        0                                      length <= limit - cache
        ((limit - cache) - length) / cache     between
        -1                                     length > limit

    Args:
      length: int, any shape: tokens of each completion.
      limit: scalar: tokens at which the penalty is whole (the paper's L_max).
      cache: scalar > 0: tokens before the limit over which it grows (the paper's L_cache).

    Returns:
      float32, shape of length, in [-1, 0].

    >>> import jax.numpy as jnp
    >>> soft_overlong_penalty(jnp.array([10, 18, 30]), limit=20, cache=4).tolist()
    [0.0, -0.5, -1.0]
    """
    length = as_index("length", length, jnp.shape(length)).astype(jnp.float32)
    cache = as_number("cache", cache)
    return jnp.clip((as_number("limit", limit) - cache - length) / cache, -1, 0)


def _batch_moments(
    reward: ArrayLike, mask: ArrayLike | None, axis_name: str | None
) -> tuple[Array, Array, Array]:
    """Mean, sum of squared differences from it, and count, over all that counts on all devices."""
    reward = as_float("reward", reward)
    mask = as_mask("mask", mask, reward.shape)
    across = (lambda x: x) if axis_name is None else partial(jax.lax.psum, axis_name=axis_name)
    count = across(jnp.sum(mask, dtype=reward.dtype))
    mean = across(jnp.sum(jnp.where(mask, reward, 0))) / jnp.maximum(count, 1)
    return mean, across(jnp.sum(jnp.where(mask, jnp.square(jnp.where(mask, reward, 0) - mean), 0))), count


def _anchored(reward: ArrayLike, mask: ArrayLike | None) -> tuple[Array, Array, Array]:
    """Rewards and mask [..., G], and the group's largest reward, which also stands at masked places.

    Sums are taken of differences from it: equal rewards then differ by exactly 0, and a large common part of
    the rewards costs no accuracy.
    """
    reward = as_float("reward", reward)
    require_rank("reward", reward, 1, "[..., G]")
    mask_G = as_mask("mask", mask, reward.shape)
    highest = jnp.max(jnp.where(mask_G, reward, -jnp.inf), axis=-1, keepdims=True)
    anchor_G = jnp.broadcast_to(jnp.where(jnp.isfinite(highest), highest, 0), reward.shape)
    return jnp.where(mask_G, reward, anchor_G), mask_G, anchor_G
