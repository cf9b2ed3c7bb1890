"""The door of every op: arguments as arrays of the right kind and shape, or an error that names the argument.

All checks read shapes and dtypes only, so they run while tracing and cost nothing in a compiled program.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def as_float(name: str, x: ArrayLike, shape: tuple[int, ...] | None = None) -> Array:
    """`x` in float32 or wider. Integers are refused: a reward that became integer was truncated before."""
    x = require_float(name, x)
    if shape is not None:
        _require_shape(name, x, shape)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def require_float(name: str, x: ArrayLike) -> Array:
    """`x` as an array in its own floating-point type."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating point, got {describe(x)}; "
            f"build it as a float, or convert it with {name}.astype(jnp.float32) if no fraction was lost"
        )
    return x


def as_number(name: str, x: ArrayLike, shape: tuple[int, ...] = ()) -> Array:
    """`x` (a scalar, or an array of `shape`) in float32 or wider, from any real dtype."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be real, got {describe(x)}")
    if x.ndim:
        _require_shape(name, x, shape, "a scalar or ")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def as_mask(name: str, x: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    """`x` as bool of `shape`; None means all True. Floats are refused: a sign of swapped arguments."""
    if x is None:
        return jnp.ones(shape, bool)
    flags = jnp.asarray(x)
    if not (flags.dtype == bool or jnp.issubdtype(flags.dtype, jnp.integer)):
        raise TypeError(f"{name} must be bool (or integer 0/1), got {describe(flags)}; pass {name} != 0")
    _require_shape(name, flags, shape)
    return flags.astype(bool)


def as_index(name: str, x: ArrayLike, shape: tuple[int, ...]) -> Array:
    """`x` as int32 of `shape`."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be integer, got {describe(x)}; convert it with {name}.astype(jnp.int32)"
        )
    _require_shape(name, x, shape)
    return x.astype(jnp.int32)


def require_rank(name: str, x: Array, at_least: int, axes: str) -> None:
    """Refuses an `x` with fewer than `at_least` axes; `axes` says which, for the message."""
    if x.ndim < at_least:
        raise ValueError(f"{name} must have shape {axes}, got {describe(x)}")


def describe(x: Array) -> str:
    """Dtype and shape in the notation of JAX's own messages: `float32[2,5]`."""
    return f"{x.dtype.name}[{','.join(map(str, x.shape))}]"


def _require_shape(name: str, x: Array, shape: tuple[int, ...], alternative: str = "") -> None:
    if x.shape != shape:
        wanted = f"[{','.join(map(str, shape))}]"
        raise ValueError(f"{name} must be {alternative}of shape {wanted}, like the rest, got {describe(x)}")
