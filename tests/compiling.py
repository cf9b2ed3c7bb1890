"""Whole computations as single programs: outside of `jit` JAX compiles every operation by itself."""

from collections.abc import Callable
from typing import Any

import jax


def compiled(function: Callable[..., Any], *arrays: Any, **settings: Any) -> Any:
    """function(*arrays, **settings) in one program, of which the settings are constants."""
    return jax.jit(lambda *arrays: function(*arrays, **settings))(*arrays)
