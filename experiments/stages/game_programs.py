"""The programs of learning to play a world in words, as shapes: for `--dry-run`."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from experiments.programs import Program, key_shape, state_shapes, whole_shapes
from experiments.stages import games
from experiments.stages.control import choose
from experiments.stages.games import Method, Task
from rlhfjax.algorithms import ilql
from rlhfjax.environments.text import row_length
from rlhfjax.mesh import Devices, row_parts
from rlhfjax.networks import LanguageModel
from rlhfjax.recipes import game_episodes


def programs_of_games(config: Any, task: Task, mesh: Devices) -> list[Program]:
    """Of the data, and of every method: updates, games between two points of the curve, and those at the end.

    How long the games to learn from are is not known before they are played: it is planned for the longest.

    Args:
      config: as `game_report.solve` takes it.

    Raises ValueError on bad settings.
    """
    names = choose(config.algorithms, [name for name in games.METHODS if hasattr(config, name)])
    games.check(config, names, mesh)
    lm = games.language_model(task, config.network, mesh)
    collecting = games.scripted_games(task.world, task.demonstrator, config.games, mesh)
    found = [Program("data", "scripted games", collecting, (key_shape(mesh),), 1, rows=config.games)]
    for name in dict.fromkeys(["clone", *names]):
        found += programs_of_method(name, config, lm, task, mesh, evaluated=name in names)
    return found


def programs_of_method(
    name: str, config: Any, lm: LanguageModel, task: Task, mesh: Devices, *, evaluated: bool
) -> list[Program]:
    """Of one method of `games.METHODS`; `evaluated`: its games at the end too."""
    stage, play = getattr(config, name), config.play
    method = games.make_method(name, config, lm, task, jax.random.key(0))
    cloned = state_shapes(mesh, lm.init, jax.random.key(0))
    params = jax.eval_shape(method.start, cloned)
    policies = jax.eval_shape(lambda params: [x.params for x in method.policies(params)], params)
    spoken = state_shapes(mesh, lambda params: params, policies[-1])
    count = config.games
    if name == "best":
        count = math.ceil(config.best_fraction * count)
    found = [
        _updates(name, method, cloned, _episodes(task, count, mesh), stage, config, mesh),
        _games(name, method, spoken, task, play.games, mesh, games.course(stage, play)[0]),
    ]
    if evaluated:  # sampled and greedy
        found.append(_games("evaluation", method, spoken, task, play.final_games, mesh, 2 * len(policies)))
    return found


def _updates(
    name: str, method: Method, cloned: Any, episodes: Any, stage: Any, config: Any, mesh: Devices
) -> Program:
    points, per_point = games.course(stage, config.play)
    params = jax.eval_shape(method.start, cloned)
    state = state_shapes(mesh, method.algorithm.init, params)
    frozen = cloned if method.keeps_clone else ()
    number = whole_shapes(mesh, jax.ShapeDtypeStruct((), jnp.int32))
    return Program(
        stage=name,
        name=f"{per_point} updates",
        function=games.make_updates(method, stage, config.play, mesh, jax.random.key(0)),
        arguments=(state, frozen, episodes, number),
        runs=points,
        parts={
            "parameters": state.params,
            "optimiser": state.opt_state,
            "frozen": frozen,
            "batch": episodes,
        },
        rows=stage.batch,
        at=lambda rows: _updates(name, method, cloned, episodes, replace(stage, batch=rows), config, mesh),
    )


def _games(
    stage: str, method: Method, params: Any, task: Task, count: int, mesh: Devices, runs: int
) -> Program:
    temperature = whole_shapes(mesh, jax.ShapeDtypeStruct((), jnp.float32))
    return Program(
        stage=stage,
        name="games",
        function=games.player(method.lm, task, count, mesh),
        arguments=(params, temperature, key_shape(mesh)),
        runs=runs,
        parts={"parameters": params},
        rows=count,
        at=lambda rows: _games(stage, method, params, task, rows, mesh, runs),
    )


def _episodes(task: Task, count: int, mesh: Devices) -> ilql.Episodes:
    """So many games of the longest that there may be, cut into pieces where the task has them cut."""
    world = task.world
    collecting = games.scripted_games(world, task.demonstrator, row_parts(mesh), mesh)
    whole_games = jax.eval_shape(collecting, jax.random.key(0))
    turns = min(task.piece or world.turns, world.turns)
    rows = count * math.ceil(world.turns / turns)
    length = row_length(world) - (world.turns - turns) * (world.action_length + world.observation_length)

    def sized(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (rows, *(length - row_length(world) + n for n in x.shape[1:]))
        return jax.ShapeDtypeStruct(shape, x.dtype)

    episodes = jax.eval_shape(game_episodes, jax.tree.map(sized, whole_games))
    return whole_shapes(mesh, episodes)
