"""Statistics over the entries that count.

`mask` is True (or 1) where an entry counts; it has the shape of its array. What lies at the other places, NaN
included, reaches neither the result nor a gradient: it is replaced before any arithmetic. Sums run in float32
(or wider).
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhfjax.ops._check import as_float, as_mask, as_number

Axis = int | tuple[int, ...] | None


def masked_sum(x: ArrayLike, mask: ArrayLike, axis: Axis = None) -> Array:
    """Sum of `x` where `mask` is True, over `axis` (default: all axes). Any real dtype in, float32 out."""
    x, _ = _masked(x, mask)
    return jnp.sum(x, axis)


def masked_mean(x: ArrayLike, mask: ArrayLike, axis: Axis = None) -> Array:
    """Mean of `x` where `mask` is True, over `axis` (default: all axes); 0 where nothing counts.

    >>> float(masked_mean([1.0, 3.0, 99.0], [True, True, False]))
    2.0
    """
    x, mask = _masked(x, mask)
    return jnp.squeeze(_mean(x, mask, axis), axis)


def masked_variance(x: ArrayLike, mask: ArrayLike, axis: Axis = None) -> Array:
    """Population variance (divided by n) of `x` where `mask` is True, over `axis`; 0 where nothing counts.

    Computed from centred values: a large mean costs no accuracy.
    """
    x, mask = _masked(x, mask)
    return jnp.squeeze(_mean(jnp.square(x - _mean(x, mask, axis)), mask, axis), axis)


def whiten(
    x: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    shift_mean: bool = True,
    epsilon: float = 1e-8,
    axis_name: str | None = None,
) -> Array:
    """`(x - mean) / sqrt(variance + epsilon)` with mean and population variance over all entries that count.

    The statistics are those of the whole array, i.e. of the whole batch, and not of a row. Under `pmap` or
    `shard_map`, `axis_name` makes them those of all devices together, so that the result equals one device's.

    Args:
      x: floating point, any shape.
      mask: bool, shape of x: True where an entry counts. None: all do.
      shift_mean: False adds the mean back, so that only the spread is scaled, as lm-human-preferences does
        for rewards (arXiv:1909.08593).
      epsilon: added to the variance; unit of x squared.
      axis_name: mapped axis over which x is split.

    Returns:
      float32, shape of x; 0 where masked out.

    >>> whiten([1.0, 3.0, 7.0], [True, True, False]).tolist()
    [-1.0, 1.0, 0.0]
    """
    x = as_float("x", x)
    x, mask = _masked(x, as_mask("mask", mask, x.shape))
    mean, variance = _moments(x, mask, axis_name)
    whitened = (x - mean) * jax.lax.rsqrt(variance + epsilon)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def explained_variance(
    prediction: ArrayLike, target: ArrayLike, mask: ArrayLike | None = None, *, axis_name: str | None = None
) -> Array:
    """`1 - Var[target - prediction] / Var[target]` over all entries that count.

    1 is perfect, 0 no better than a constant. A target that does not vary leaves nothing to explain and gives
    0.

    Args:
      prediction, target: floating point, equal shapes.
      mask: bool, the same shape: True where an entry counts. None: all do.
      axis_name: mapped axis over which the arrays are split; the result is that of all devices together.
    """
    target = as_float("target", target)
    prediction = as_float("prediction", prediction, target.shape)
    target, mask = _masked(target, as_mask("mask", mask, target.shape))
    residual = target - jnp.where(mask, prediction, 0)
    _, unexplained = _moments(residual, mask, axis_name)
    _, total = _moments(target, mask, axis_name)
    varies = total > 0
    return jnp.where(varies, 1.0 - unexplained / jnp.where(varies, total, 1.0), 0.0)


def _masked(x: ArrayLike, mask: ArrayLike) -> tuple[Array, Array]:
    """`x` in float32 with zeros where `mask` is False, and the mask as bool."""
    x = jnp.asarray(x)
    mask = as_mask("mask", mask, x.shape)
    x = as_number("x", x, x.shape)
    return jnp.where(mask, x, 0), mask


def _mean(x: Array, mask: Array, axis: Axis = None, axis_name: str | None = None) -> Array:
    """Masked mean that keeps the reduced axes (length 1), over the devices of `axis_name` too."""
    total = jnp.sum(x, axis, where=mask, keepdims=True)
    count = jnp.sum(mask, axis, dtype=x.dtype, keepdims=True)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1)


def _moments(x: Array, mask: Array, axis_name: str | None) -> tuple[Array, Array]:
    """Scalar mean and population variance over the whole array and the devices of `axis_name`.

    Two passes, the second over centred values: the mean of squares minus the squared mean loses all digits
    when the mean is large.
    """
    mean = _mean(x, mask, axis_name=axis_name)
    variance = _mean(jnp.square(x - mean), mask, axis_name=axis_name)
    return mean.reshape(()), variance.reshape(())
