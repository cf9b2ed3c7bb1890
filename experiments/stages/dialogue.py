"""Learning in dialogues: from the games of others, from preferences between games, and by playing.

Shapes: G games that are evaluated.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import Show, run_once, run_stage
from experiments.stages import games
from experiments.stages.dialogue_configs import DPOGames, GRPOGames, PPOGames, Stages
from experiments.stages.games import Method, Policy, Task
from rlhfjax.algorithms import Algorithm, dpo, evaluation_params, grpo, make_optimizer, ppo
from rlhfjax.algorithms.algorithm import check_divisible
from rlhfjax.environments.text import Conversation, Player, render
from rlhfjax.generation import Sampling
from rlhfjax.mesh import Devices, check_rows, fetch, init_on, kept, make_mesh, place_rows, put
from rlhfjax.networks import LanguageModel, init_scalar_head
from rlhfjax.recipes import (
    AsGameBatch,
    game_actor_critic,
    game_kl,
    game_logp,
    game_pairs,
    game_policy,
    grpo_games,
    make_game_iteration,
    play_games,
    policy_parameters,
    ppo_games,
)
from rlhfjax.run_folder import RunFolder

ON_POLICY = ("ppo", "grpo", "rloo")
OFFLINE = ("best", "ilql", "monte_carlo", "soft_q")  # from the games of the data
GAMES_SHOWN = 2
WORLDS = 20260  # of the key of the games at the end: the same worlds in every run


class Learner(NamedTuple):
    """A method that plays to learn: an algorithm, its batch, and where it starts."""

    algorithm: Algorithm
    as_batch: AsGameBatch
    params: Any
    policy: Callable[[Any], dict]  # the language model among the params


class Outcome(NamedTuple):
    """Games of one policy, [G] each."""

    score: np.ndarray
    success: np.ndarray
    turns: np.ndarray
    kl: np.ndarray  # log(policy / clone) of what the agent said, nats
    greedy_score: np.ndarray  # at temperature 0, in the same worlds
    greedy_success: np.ndarray
    greedy_turns: np.ndarray


def make_learner(stage: PPOGames | GRPOGames, lm: LanguageModel, cloned: dict, task: Task) -> Learner:
    """PPO with a critic that starts as the clone with a head at zero, or a critic-free method."""
    memory, algorithm = task.memory, stage.algorithm
    exact = algorithm.kl_estimator == "exact"
    updates = stage.steps * algorithm.epochs * algorithm.minibatches
    optimizer = make_optimizer(stage.optimizer, updates)
    if isinstance(stage, PPOGames):
        evaluate = game_actor_critic(lm, memory=memory, shared_trunk=stage.shared_trunk)
        critic = {"head": init_scalar_head(jax.random.key(0), lm.config.width, scale=0.0)}
        if not stage.shared_trunk:
            critic["trunk"] = cloned
        return Learner(
            ppo.make(evaluate, optimizer, stage.algorithm, is_policy=policy_parameters),
            ppo_games(lm, evaluate, memory=memory, shared_trunk=stage.shared_trunk, exact_kl=exact),
            {"policy": cloned, "critic": critic},
            itemgetter("policy"),
        )
    evaluate = game_policy(lm, memory=memory)
    needed = stage.algorithm.kl_coefficient is not None
    as_batch = grpo_games(lm, memory=memory, exact_kl=evaluate if exact and needed else None)
    return Learner(grpo.make(evaluate, optimizer, stage.algorithm), as_batch, cloned, lambda params: params)


def make_iterate(
    stage: PPOGames | GRPOGames, lm: LanguageModel, cloned: dict, task: Task, mesh: Devices
) -> tuple[Learner, Callable[..., Any]]:
    """The learner, and its compiled iteration, games and update: `(state, clone, key) -> (state, metrics)`."""
    learner = make_learner(stage, lm, cloned, task)
    iterate = make_game_iteration(
        lm,
        task.world,
        learner.algorithm,
        learner.as_batch,
        worlds=stage.worlds,
        samples=stage.samples,
        memory=task.memory,
        policy=learner.policy,
        place=place_rows(mesh),
    )

    def step(state: Any, reference: dict, key: jax.Array):
        state, metrics, played = iterate(state, reference, key)
        spoken = jnp.sum(played.games.agent_BT, dtype=jnp.float32)
        return state, metrics | {"perf/generated_tokens": spoken}

    return learner, jax.jit(kept(mesh, step), donate_argnums=0)


def play_to_learn(
    name: str,
    stage: PPOGames | GRPOGames,
    lm: LanguageModel,
    cloned: dict,
    task: Task,
    folder: RunFolder,
) -> dict:
    """Runs the on-policy stage `name` from the clone; returns the policy's params."""
    mesh = make_mesh(folder.mesh)
    learner, iterate = make_iterate(stage, lm, cloned, task, mesh)
    key, reference = games.run_key(folder, name), put(mesh, cloned)

    def step(state: Any, i: int):
        # Waited for, lest two programs of several devices meet, see `run_stage`.
        return jax.block_until_ready(iterate(state, reference, jax.random.fold_in(key, i)))

    columns = {
        "game/score": "score",
        "game/won": "won",
        "game/turns": "turns",
        "objective/kl": "KL",
        "policy/entropy": "entropy",
        "policy/clip_fraction": "clipped",
    }
    state = run_stage(
        name,
        folder=folder,
        init=lambda: init_on(
            mesh, learner.algorithm.init, jax.tree.map(jnp.array, put(mesh, learner.params))
        ),
        step=step,
        steps=stage.steps,
        checkpoint_every=20,
        show=Show(columns=columns),
    )
    return learner.policy(evaluation_params(state.opt_state, state.params))


def preferences(lm: LanguageModel, stage: DPOGames, task: Task) -> Method:
    """DPO on groups of games."""
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    algorithm = dpo.make(game_logp(lm, memory=task.memory), optimizer, stage.algorithm)
    return Method(
        algorithm,
        lm,
        lambda frozen, episodes: game_pairs(lm, frozen, episodes, memory=task.memory),
        lambda cloned: cloned,
        lambda params: [Policy("dpo", lm, params)],
        "loss/preference",
        keeps_clone=True,
    )


def player(lm: LanguageModel, base: LanguageModel, task: Task, count: int, samples: int, mesh: Devices):
    """Compiled games: `(params, clone, temperature, key) -> (games, KL from the clone)`; `base` is the clone's."""

    @jax.jit
    def play(params: Any, cloned: dict, temperature: jax.Array, key: jax.Array):
        played = play_games(
            lm,
            params,
            task.world,
            key,
            count,
            samples=samples,
            memory=task.memory,
            sampling=Sampling(temperature=temperature),
            place=place_rows(mesh),
        )
        return played.games, game_kl(base, cloned, played, memory=task.memory)

    return play


def play_pairs(
    lm: LanguageModel, cloned: dict, stage: DPOGames, task: Task, folder: RunFolder
) -> Conversation:
    """Games of the clone, [W worlds, samples, ...]: in the stage `pairs`."""

    def compute():
        mesh = make_mesh(folder.mesh)
        play = player(lm, lm, task, stage.worlds * stage.samples, stage.samples, mesh)
        found, _ = fetch(play(cloned, cloned, jnp.float32(1.0), games.run_key(folder, "pairs")))
        grouped = jax.tree.map(lambda x: x.reshape(-1, stage.samples, *x.shape[1:]), found)
        differ = np.mean(np.ptp(grouped.score_B, axis=1) > 0)
        numbers = {"game/score": grouped.score_B.mean(), "pairs/worlds_with_a_better_game": differ}
        return grouped._asdict(), numbers, []

    stored: dict[str, Any] = run_once("pairs", folder=folder, compute=compute)
    return Conversation(**stored)


def learn_all(config: Stages, task: Task, folder: RunFolder) -> tuple[Conversation, list[Policy]]:
    """Runs the methods in order; returns the games of the data, and the policies, the clone's first."""
    lm = games.language_model(task, config.network, make_mesh(folder.mesh))
    data = games.collect(task, config.games, folder)
    policies = games.learn_all(["clone"], config, task, data, folder)
    cloned = policies[0].params
    for name in config.methods:
        stage = getattr(config, name)
        if name in ON_POLICY:
            policies.append(Policy(name, lm, play_to_learn(name, stage, lm, cloned, task, folder)))
        elif name == "dpo":
            grouped, method = play_pairs(lm, cloned, stage, task, folder), preferences(lm, stage, task)
            params = games.learn(name, method, cloned, grouped, task, stage, config.play, folder)
            policies += method.policies(params)
        elif name != "clone":
            policies += games.learn_one(name, config, lm, cloned, task, data, folder)
    return data, policies


def evaluate(policies: Sequence[Policy], config: Stages, task: Task, folder: RunFolder) -> dict[str, Outcome]:
    """Games of every policy, sampled and greedy, in the same worlds; in the stage `evaluation`."""
    base, cloned = policies[0].lm, policies[0].params

    def compute():
        key, arrays, numbers, rows = jax.random.key(WORLDS), {}, {}, []
        mesh, count = make_mesh(folder.mesh), config.play.final_games
        models = {id(policy.lm): policy.lm for policy in policies}
        compiled = {name: player(lm, base, task, count, 1, mesh) for name, lm in models.items()}
        for name, lm, params in policies:
            run = compiled[id(lm)]
            (played, kl), (greedy, _) = (
                fetch(run(params, cloned, jnp.float32(heat), key)) for heat in (1.0, 0.0)
            )
            parts = (played.score_B, played.success_B, played.turns_B, kl)
            parts = Outcome(*parts, greedy.score_B, greedy.success_B, greedy.turns_B)
            arrays |= {f"{name}/{field}": x for field, x in parts._asdict().items()}
            numbers |= {f"{name}/score": played.score_B.mean(), f"{name}/greedy": greedy.score_B.mean()}
            rows += [{"player": name, "game": render(task.world, played, i)} for i in range(GAMES_SHOWN)]
        return arrays, numbers, rows

    found = run_once("evaluation", folder=folder, compute=compute)
    return {
        name: Outcome(*(found[f"{name}/{field}"] for field in Outcome._fields)) for name, _, _ in policies
    }


def best_of(cloned: Policy, config: Stages, task: Task, folder: RunFolder) -> dict[str, np.ndarray]:
    """Score, success and turns of the best of several games of the clone in each world, by their true score, [G] each;
    in the stage `best_of`."""
    count, samples = config.play.final_games, config.play.best_of

    def compute():
        run = player(cloned.lm, cloned.lm, task, count * samples, samples, make_mesh(folder.mesh))
        played, _ = fetch(run(cloned.params, cloned.params, jnp.float32(1.0), jax.random.key(WORLDS)))
        arrays = best_games_of(played, samples)
        return arrays, {"score": arrays["score"].mean()}, []

    return run_once("best_of", folder=folder, compute=compute)


def best_games_of(played: Conversation, samples: int) -> dict[str, np.ndarray]:
    """Score, success and turns of the best game of each world by its score, [G]; ties go to the first."""
    score_B = np.asarray(played.score_B)
    best_G = np.argmax(score_B.reshape(-1, samples), axis=1) + np.arange(0, score_B.size, samples)
    parts = {"score": score_B, "success": played.success_B, "turns": played.turns_B}
    return {name: np.asarray(x)[best_G] for name, x in parts.items()}


def scripted(
    players: Mapping[str, Player], config: Stages, task: Task, folder: RunFolder
) -> dict[str, Conversation]:
    """Games of scripted players in the worlds that policies are evaluated in."""
    mesh, count = make_mesh(folder.mesh), config.play.final_games
    key = jax.random.key(WORLDS)
    return {
        name: fetch(games.scripted_games(task.world, one, count, mesh)(key)) for name, one in players.items()
    }


def check(config: Stages, mesh: Devices) -> None:
    """Raises ValueError for numbers that cannot be, before anything is run."""
    if not config.methods:
        raise ValueError("--methods is empty: name at least one")
    if len(set(config.methods)) != len(config.methods):
        raise ValueError(f"--methods names one twice: {' '.join(config.methods)}")
    games.check(config, [name for name in config.methods if name in OFFLINE], mesh)
    if config.play.best_of < 1:
        raise ValueError(f"play.best_of={config.play.best_of} must be at least 1")
    for name in config.methods:
        stage = getattr(config, name)
        if name in ON_POLICY or name == "dpo":
            _check_played(name, stage, mesh)


def _check_played(name: str, stage: PPOGames | GRPOGames | DPOGames, mesh: Devices) -> None:
    for field in ("steps", "worlds", "samples"):
        if getattr(stage, field) < 1:
            raise ValueError(f"{name}: {field}={getattr(stage, field)} must be at least 1")
    check_rows(mesh, stage.worlds, what=f"set of worlds (--{name}.worlds)")
    if isinstance(stage, DPOGames):
        if stage.samples < 2:
            raise ValueError(f"dpo: samples={stage.samples}: games of a world are compared, give at least 2")
        check_divisible(stage.batch, stage.algorithm.microbatches)
        check_rows(mesh, stage.batch, what=f"batch (--{name}.batch)")
        dpo.make(_never, make_optimizer(stage.optimizer, stage.steps), stage.algorithm)
        return
    algorithm = stage.algorithm
    rows = stage.worlds * stage.samples if isinstance(stage, PPOGames) else stage.worlds
    check_divisible(rows, algorithm.minibatches * algorithm.microbatches, what="minibatches x microbatches")
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    if isinstance(stage, PPOGames):
        ppo.make(_never, optimizer, stage.algorithm, is_policy=policy_parameters)
        return
    grpo.make(_never, optimizer, stage.algorithm)
    compares = (
        stage.algorithm.baseline in ("group_mean", "leave_one_out") or stage.algorithm.scale == "group_std"
    )
    if compares and stage.samples < 2:
        raise ValueError(
            f"{name}: samples={stage.samples}: games of a world are compared with each other, give at least 2"
        )


def _never(*_: Any) -> Any:
    raise AssertionError("settings are checked without an evaluation")
