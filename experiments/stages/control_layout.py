"""Where the runs of a stage lie on a mesh: its seeds are spread over the devices, or the worlds of each seed.

Shapes: R seeds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from rlhfjax import processes
from rlhfjax.config import ControlTabular, Mesh
from rlhfjax.mesh import Devices, check_rows, make_mesh, place_rows, row_parts, rows, whole
from rlhfjax.recipes.control import Run

PyTree = Any


class Layout(NamedTuple):
    """How arrays [R, ...] are split."""

    mesh: Devices
    axis: int | None  # 0: seeds; 1: the worlds of each; None: not at all

    @property
    def within(self) -> Devices | None:
        """The mesh that what one run holds is split over."""
        return self.mesh if self.axis == 1 else None

    @property
    def place(self) -> Callable[[Any], Any]:
        """`place` of the games of one run."""
        return place_rows(self.within)

    def where(self, runs: Run) -> PyTree:
        """Where each array of the runs lies, as shardings."""
        if self.axis == 0:
            return jax.tree.map(lambda _: rows(self.mesh), runs)
        everywhere = jax.tree.map(lambda _: whole(self.mesh), runs)
        if self.axis is None:
            return everywhere
        return everywhere._replace(worlds=jax.tree.map(lambda _: rows(self.mesh, 1), runs.worlds))

    def laid(self, runs: Run) -> Run:
        """The runs, where they belong; within a program."""
        if self.mesh.size == 1:
            return runs
        return jax.lax.with_sharding_constraint(runs, self.where(runs))


def lay_out(mesh: Devices, name: str, config: Any, training: Any) -> Layout:
    """How a method is laid over the mesh: by seeds where they can be split evenly, else by worlds.

    A table is learnt from one step after the other: where the seeds cannot be split one device does it all, or, with
    several processes, every device the same, and a line says so.

    Args:
      name: of the method, for messages.
      config: `seeds`, `episodes` and `final_episodes` of the experiment.
      training: the method's own config.

    Raises ValueError where neither seeds nor worlds can be split evenly, or the episodes of an evaluation cannot.
    """
    parts = row_parts(mesh)
    if config.seeds % parts == 0:
        return Layout(mesh, 0)
    if isinstance(training, ControlTabular):
        alone = processes.count() == 1
        who = "one device does it all" if alone else "every device does the same"
        print(
            f"note: {name}: --seeds {config.seeds} cannot be split over {parts} devices, nor can a table: {who}"
        )
        return Layout(make_mesh(Mesh(data=1, fsdp=1), list(mesh.devices.flat)) if alone else mesh, None)
    if training.worlds % parts:
        raise ValueError(
            f"{name}: neither --seeds {config.seeds} nor --{name}.worlds {training.worlds} can be split over {parts} "
            f"devices: make one a multiple of {parts}, or the mesh smaller (--mesh.data)"
        )
    for field in ("episodes", "final_episodes"):
        what = f"set of worlds to evaluate in (--{field.replace('_', '-')})"
        check_rows(mesh, getattr(config, field), what=what)
    return Layout(mesh, 1)
