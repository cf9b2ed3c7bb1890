"""The program of many runs of policy optimisation, as shapes: for `--dry-run`."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from experiments.programs import Program, state_shapes, whole_shapes
from experiments.stages.configs import PPOStage
from experiments.stages.many import Grid, make_programs
from experiments.stages.policy import Problem, ppo_learner
from experiments.stages.text import Text
from rlhfjax.mesh import check_rows, rows
from rlhfjax.recipes import Frozen, Prompts


def program_of_runs(name: str, config: PPOStage, text: Text, grid: Grid) -> Program:
    """The iteration of all runs of the grid, with a reward that costs nothing; `text` is one of shapes.

    Raises ValueError where the prompts of a run cannot be split over the mesh.
    """
    mesh, length = text.mesh, text.config.prompt_length
    check_rows(mesh, config.prompts, what="batch of prompts (--ppo.prompts)")
    reference = state_shapes(mesh, text.start, jax.random.key(0)) if text.lora else text.base
    unread: Any = None  # no data, and no gold scores
    problem = Problem(text, reference, lambda lm: _free, None, unread, unread, unread)

    def learner(lm, own):
        return ppo_learner(lm, own, problem, reference)

    own = make_programs(config, learner, problem, grid)
    state_R = state_shapes(mesh, own.init, learner(text.lm, config).params)
    count = len(grid.seed_R)

    def of_prompts(dtype: Any, *shape: int) -> Any:
        # The rows of each run lie as those of one alone.
        return jax.ShapeDtypeStruct((count, config.prompts, *shape), dtype, sharding=rows(mesh, axis=1))

    prompts_R = Prompts(of_prompts(jnp.int32, length), of_prompts(bool, length), of_prompts(jnp.int32))
    number = whole_shapes(mesh, jax.ShapeDtypeStruct((), jnp.int32))
    return Program(
        stage=name,
        name=f"iteration of {count} runs",
        function=own.iterate,
        arguments=(state_R, Frozen(reference, None), prompts_R, number),
        runs=config.steps,
        parts={
            "parameters": state_R.params,
            "optimiser": state_R.opt_state,
            "frozen": (reference, text.base if text.lora else ()),
            "batch": prompts_R,
        },
        rows=config.prompts,
        at=lambda prompts: program_of_runs(name, replace(config, prompts=prompts), text, grid),
    )


def _free(params: Any, branches: Any) -> jax.Array:
    del params
    return jnp.zeros(branches.completion_BGC.shape[:2])
