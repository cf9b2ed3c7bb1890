"""What an experiment would compile, without its data and its weights: what `--dry-run` plans from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from rlhfjax.mesh import Devices, rows, shardings, whole

PyTree = Any


@dataclass(frozen=True)
class Program:
    """One compiled program of a stage, as shapes."""

    stage: str  # the stage's name, as in metrics.jsonl
    name: str  # what it does, such as "update"
    function: Callable[..., Any]  # jitted
    arguments: tuple[PyTree, ...]  # shapes with shardings
    runs: float  # in the whole run
    # Of the arguments: parameters, optimiser, frozen, batch. What is in none of them is `other`.
    parts: Mapping[str, PyTree] = field(default_factory=dict)
    rows: int = 0  # of its batch; 0: it has none to vary
    at: Callable[[int], "Program"] | None = None  # the same program for another number of rows
    uncounted: str = ""  # what a step does besides, on the host
    # Flags that would need less memory -> the same program with them.
    variants: Mapping[str, Callable[[], "Program"]] = field(default_factory=dict)
    depth: int = 0  # equal layers; 0: not to be told from fewer
    shallow: Callable[[int], "Program"] | None = None  # the same program with so many layers

    def lower(self) -> Any:
        """Traced, ready to be compiled."""
        # With adapters, the base that they stand on is bound to the jitted function.
        bound = getattr(self.function, "args", ())
        function: Any = self.function.func if bound else self.function
        return function.lower(*bound, *self.arguments)


def state_shapes(mesh: Devices, init: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """The shapes of a state, each with where it lies."""
    shapes = jax.eval_shape(init, *arguments)
    return _laid_out(shapes, shardings(mesh, shapes))


def row_shapes(mesh: Devices, batch: PyTree) -> PyTree:
    """The shapes of a batch, split by rows; numbers without axes are whole."""
    return _laid_out(batch, jax.tree.map(lambda x: rows(mesh) if x.shape else whole(mesh), batch))


def whole_shapes(mesh: Devices, tree: PyTree) -> PyTree:
    """The shapes of what is the same on every device."""
    return _laid_out(tree, jax.tree.map(lambda _: whole(mesh), tree))


def key_shape(mesh: Devices) -> jax.ShapeDtypeStruct:
    """Of a random key."""
    return whole_shapes(mesh, jax.eval_shape(lambda: jax.random.key(0)))


def _laid_out(shapes: PyTree, where: PyTree) -> PyTree:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
