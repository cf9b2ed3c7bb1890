"""The programs of training in worlds, as shapes: for `--dry-run`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.programs import Program, whole_shapes
from experiments.stages.control import Job, make_programs, seed_keys
from rlhfjax.recipes.control import Run
from rlhfjax.recipes.tabular import Learner


def programs_of_jobs(jobs: Sequence[Job], *, most_steps: int, on_host: str = "") -> list[Program]:
    """Of every method: training, the games between two points of the curve, and those at the end.

    Args:
      most_steps: of an episode that is played.
      on_host: what is computed there at every point, in words.
    """
    return [program for job in jobs for program in _programs(job, most_steps, on_host)]


def _programs(job: Job, most_steps: int, on_host: str) -> list[Program]:
    name, training, env, plan, layout = job
    # Which keys they are changes no shape.
    own = make_programs(training, env, plan, seed_keys(name, plan, 0), layout, most_steps=most_steps)
    shapes = jax.eval_shape(own.init)
    runs = jax.tree.map(lambda x, where: x.update(sharding=where), shapes, layout.where(shapes))
    number = whole_shapes(layout.mesh, jax.ShapeDtypeStruct((), jnp.int32))
    # Where these few numbers lie is the compiler's choice.
    metrics = whole_shapes(layout.mesh, jax.eval_shape(own.advance, runs, number)[1])
    of_point = {"runs": plan.steps, "parts": _parts(runs)}
    return [
        Program(name, "training", own.advance, (runs, number), **of_point, uncounted=on_host),
        Program(name, "evaluation", own.evaluate, (runs, metrics, number), **of_point),
        Program(f"{name}_games", "greedy games", own.final_scores, (runs,), 1, of_point["parts"]),
    ]


def _parts(runs: Run) -> dict[str, Any]:
    """Parameters or tables, optimiser, worlds and replay."""
    learner = runs.learner
    if isinstance(learner, Learner):
        return {"parameters": learner.table, "batch": (learner.action_B, runs.worlds)}
    return {
        "parameters": learner.params,
        "optimiser": learner.opt_state,
        "batch": (runs.worlds, runs.replay),
    }
