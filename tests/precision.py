"""Arithmetic in float64, for tests that hold code against an oracle to twelve digits."""

import jax
from jax import experimental


def float64(on: bool = True):
    """The context in which JAX computes in float64; older releases keep it among the experiments."""
    enable = jax.enable_x64 if hasattr(jax, "enable_x64") else getattr(experimental, "enable_x64")  # noqa: B009
    return enable(on)
