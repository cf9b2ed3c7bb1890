"""The two clipped losses of PPO, elementwise: one number per action, to be summed under a mask.

Masked entries may hold anything finite. `gae` and `whiten` return 0 there; a NaN would pass the mask in the
gradient, because 0 * NaN is NaN, and must be replaced before it comes here.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhfjax.ops._check import as_float, as_number
from rlhfjax.ops.kl import LOG_RATIO_BOUND


def clipped_surrogate(
    logp: ArrayLike,
    logp_old: ArrayLike,
    advantage: ArrayLike,
    *,
    clip_low: ArrayLike,
    clip_high: ArrayLike,
    dual_clip: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """PPO's policy loss (arXiv:1707.06347 eq. 7), as a loss; `ratio = exp(logp - logp_old)`:

        -min(ratio * advantage, clip(ratio, 1 - clip_low, 1 + clip_high) * advantage)

    The paper has clip_low = clip_high; unequal bounds are the "clip higher" of DAPO (arXiv:2503.14476, sec.
    3.1). Where the advantage is negative, nothing bounds the loss of an action that has become much likelier.
    `dual_clip` does (arXiv:1912.09729): there the loss is at most dual_clip * |advantage|,

        -max(min(ratio * advantage, clip(ratio, ...) * advantage), dual_clip * advantage)    if advantage < 0

    The log-ratio is clamped to [-20, 20] before the exponential (no gradient beyond), so that the loss stays
    finite.

    Args:
      logp: float, any shape: log-probability of the action under the policy being trained.
      logp_old: the same shape: under the policy that acted.
      advantage: the same shape; not differentiated by usual callers (apply `stop_gradient`).
      clip_low, clip_high: scalars >= 0, distance of the bounds from 1.
      dual_clip: scalar > 1, largest ratio that a negative advantage still acts on (the paper uses 3); None:
        no bound.

    Returns:
      loss: float32, shape of logp.
      clipped: bool, True where the bound is active, i.e. where logp gets no gradient.

    >>> loss, clipped = clipped_surrogate(jnp.log(2.0), 0.0, 1.0, clip_low=0.2, clip_high=0.2)
    >>> round(float(loss), 3), bool(clipped)  # the ratio of 2 counts as 1.2
    (-1.2, True)
    """
    logp = as_float("logp", logp)
    advantage = as_float("advantage", advantage, logp.shape)
    log_ratio = logp - as_float("logp_old", logp_old, logp.shape)
    ratio = jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    bounded = jnp.clip(ratio, 1 - as_number("clip_low", clip_low), 1 + as_number("clip_high", clip_high))
    clipped = ratio * advantage > bounded * advantage
    if dual_clip is not None:
        dual_clip = as_number("dual_clip", dual_clip)
        dual_clipped = (advantage < 0) & (ratio > dual_clip)
        bounded = jnp.where(dual_clipped, dual_clip, bounded)
        clipped = clipped | dual_clipped
    # A selection, and not jnp.minimum, which would halve the gradient where both terms are equal.
    return -jnp.where(clipped, bounded, ratio) * advantage, clipped


def clipped_value_loss(
    value: ArrayLike, value_old: ArrayLike, returns: ArrayLike, *, clip: ArrayLike
) -> tuple[Array, Array]:
    """PPO's value loss, the 1/2 included:

        max((value - returns)^2, (value_old + clip(value - value_old, -clip, clip) - returns)^2) / 2

    From openai/baselines `ppo2`, kept by lm-human-preferences (arXiv:1909.08593); not in the PPO paper.

    Args:
      value: float, any shape: V(s) of the network being trained.
      value_old: the same shape: V(s) when the actions were taken.
      returns: the same shape: the target.
      clip: scalar >= 0, largest useful change of a value, in units of return; `jnp.inf` turns clipping off.

    Returns:
      loss: float32, shape of value.
      clipped: bool, True where the clipped value decides the loss, i.e. where value gets no gradient.
    """
    value = as_float("value", value)
    value_old = as_float("value_old", value_old, value.shape)
    returns = as_float("returns", returns, value.shape)
    clip = as_number("clip", clip)
    error = value - returns
    bounded_error = value_old + jnp.clip(value - value_old, -clip, clip) - returns
    # Outside the bound only: inside, the two differ by rounding, which must not decide who gets a gradient.
    clipped = (jnp.abs(value - value_old) > clip) & (jnp.square(bounded_error) > jnp.square(error))
    return 0.5 * jnp.square(jnp.where(clipped, bounded_error, error)), clipped
