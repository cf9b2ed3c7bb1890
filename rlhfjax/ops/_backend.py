"""Which kind of device a program is traced for."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_TARGET: ContextVar[str | None] = ContextVar("target", default=None)


def backend() -> str:
    """The kind of device that a program is traced for, "cpu", "gpu" or "tpu": JAX's default backend, unless
    `compiling_for` names another."""
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(kind: str) -> Iterator[None]:
    """What is traced within is for another kind of device than this machine has, to be compiled ahead of time."""
    token = _TARGET.set(kind)
    try:
        yield
    finally:
        _TARGET.reset(token)
