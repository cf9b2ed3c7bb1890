"""The programs of learning in dialogues, as shapes: for `--dry-run`."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from experiments.programs import Program, key_shape, state_shapes, whole_shapes
from experiments.stages import dialogue, games
from experiments.stages.dialogue_configs import DPOGames, GRPOGames, PPOGames, Stages
from experiments.stages.game_programs import programs_of_method
from experiments.stages.games import Task
from rlhfjax.mesh import Devices
from rlhfjax.networks import LanguageModel
from rlhfjax.recipes import game_episodes


def programs_of_dialogue(config: Stages, task: Task, mesh: Devices) -> list[Program]:
    """Of the data, the clone, every method, and the games at the end.

    Raises ValueError on bad settings.
    """
    dialogue.check(config, mesh)
    lm = games.language_model(task, config.network, mesh)
    cloned = state_shapes(mesh, lm.init, jax.random.key(0))
    collecting = games.scripted_games(task.world, task.demonstrator, config.games, mesh)
    found = [Program("data", "scripted games", collecting, (key_shape(mesh),), 1, rows=config.games)]
    found += programs_of_method("clone", config, lm, task, mesh, evaluated=False)
    runs = 2  # of the games at the end, sampled and greedy, of each policy: the clone's first
    for name in config.methods:
        stage = getattr(config, name)
        if name in dialogue.ON_POLICY:
            found.append(_iteration(name, stage, lm, cloned, task, mesh))
        elif name == "dpo":
            found += _preferences(stage, config, lm, cloned, task, mesh)
        elif name != "clone":
            found += programs_of_method(name, config, lm, task, mesh, evaluated=False)
        if name in games.VALUE_METHODS:
            found.append(_guided(name, config, lm, cloned, task, mesh))
        elif name != "clone":
            runs += 2
    final, most = config.play.final_games, config.play.best_of
    found.append(_games("best_of", lm, lm, cloned, cloned, task, final * most, most, mesh, 1))
    found.append(_games("evaluation", lm, lm, cloned, cloned, task, final, 1, mesh, runs))
    return found


def _guided(name: str, config: Stages, lm: LanguageModel, cloned: Any, task: Task, mesh: Devices) -> Program:
    """Games at the end of the policies that values guide."""
    method = games.make_method(name, config, lm, task, jax.random.key(0))
    params = jax.eval_shape(method.start, cloned)
    policies = jax.eval_shape(lambda params: [x.params for x in method.policies(params)], params)
    spoken, runs = state_shapes(mesh, lambda params: params, policies[-1]), 2 * len(policies)
    return _games("evaluation", method.lm, lm, spoken, cloned, task, config.play.final_games, 1, mesh, runs)


def _iteration(
    name: str, stage: PPOGames | GRPOGames, lm: LanguageModel, cloned: Any, task: Task, mesh: Devices
) -> Program:
    learner, iterate = dialogue.make_iterate(stage, lm, cloned, task, mesh)
    state = state_shapes(mesh, learner.algorithm.init, learner.params)
    return Program(
        stage=name,
        name="iteration",
        function=iterate,
        arguments=(state, cloned, key_shape(mesh)),
        runs=stage.steps,
        parts={"parameters": state.params, "optimiser": state.opt_state, "frozen": cloned},
        rows=stage.worlds,
        at=lambda rows: _iteration(name, replace(stage, worlds=rows), lm, cloned, task, mesh),
    )


def _preferences(
    stage: DPOGames, config: Stages, lm: LanguageModel, cloned: Any, task: Task, mesh: Devices
) -> list[Program]:
    count = stage.worlds * stage.samples
    playing = _games("pairs", lm, lm, cloned, cloned, task, count, stage.samples, mesh, 1)
    played, _ = jax.eval_shape(playing.function, *playing.arguments)
    grouped = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((stage.worlds, stage.samples, *x.shape[1:]), x.dtype), played
    )
    method, (points, per_point) = dialogue.preferences(lm, stage, task), games.course(stage, config.play)
    state = state_shapes(mesh, method.algorithm.init, cloned)
    number = whole_shapes(mesh, jax.ShapeDtypeStruct((), jnp.int32))
    episodes = whole_shapes(mesh, jax.eval_shape(game_episodes, grouped))
    updates = Program(
        stage="dpo",
        name=f"{per_point} updates",
        function=games.make_updates(method, stage, config.play, mesh, jax.random.key(0)),
        arguments=(state, cloned, episodes, number),
        runs=points,
        parts={
            "parameters": state.params,
            "optimiser": state.opt_state,
            "frozen": cloned,
            "batch": episodes,
        },
        rows=stage.batch,
        at=lambda rows: _preferences(replace(stage, batch=rows), config, lm, cloned, task, mesh)[1],
    )
    trying = Program(
        stage="dpo",
        name="games",
        function=games.player(lm, task, config.play.games, mesh),
        arguments=(cloned, whole_shapes(mesh, jax.ShapeDtypeStruct((), jnp.float32)), key_shape(mesh)),
        runs=points,
        parts={"parameters": cloned},
        rows=config.play.games,
    )
    return [playing, updates, trying]


def _games(
    stage: str,
    lm: LanguageModel,
    base: LanguageModel,
    params: Any,
    cloned: Any,
    task: Task,
    count: int,
    samples: int,
    mesh: Devices,
    runs: int,
) -> Program:
    heat = whole_shapes(mesh, jax.ShapeDtypeStruct((), jnp.float32))
    return Program(
        stage=stage,
        name="games",
        function=dialogue.player(lm, base, task, count, samples, mesh),
        arguments=(params, cloned, heat, key_shape(mesh)),
        runs=runs,
        parts={"parameters": params},
        rows=count,
        at=lambda rows: _games(stage, lm, base, params, cloned, task, rows, samples, mesh, runs),
    )
