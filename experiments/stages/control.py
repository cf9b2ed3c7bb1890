"""Training in a world with several seeds at once: curves, greedy evaluation, one game to look at.

Shapes: R seeds, N episodes, A actions.
"""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import Show, run_once, run_stage
from experiments.options import did_you_mean
from experiments.stages.control_layout import Layout
from rlhfjax.environments import Environment, play, rollout, start
from rlhfjax.mesh import fetch
from rlhfjax.recipes.control import (
    Training,
    control_dqn,
    control_ppo,
    control_pqn,
    iterations_of,
    train,
)
from rlhfjax.recipes.tabular import control_tabular
from rlhfjax.run_folder import RunFolder, read_lines

TRAININGS: Mapping[str, Callable[..., Training]] = {
    "tabular": control_tabular,
    "ppo": control_ppo,
    "pqn": control_pqn,
    "dqn": control_dqn,
}
CHECKPOINT_EVERY = 5
WINDOW = 100  # episodes in the mean return of training that a world counts as solved by


class World(NamedTuple):
    """What an experiment trains in."""

    title: str
    env: Environment
    most_steps: int  # of one episode
    solved: float  # mean return from which on it counts as solved
    draw: Callable[[np.ndarray], str] | None = None  # a frame in letters, of one observation


class Plan(NamedTuple):
    """How a method is run."""

    seeds: int
    points: int  # of the curves, about
    episodes: int  # of each seed, at each point of the curve
    final_episodes: int  # of each seed, at the end
    iterations: int  # of the whole run
    iteration_steps: int  # environment steps of one of them, of one seed

    @property
    def point_iterations(self) -> int:
        """Iterations from one point to the next."""
        return max(1, self.iterations // self.points)

    @property
    def steps(self) -> int:
        """Points of the curve, each a step of the stage."""
        return self.iterations // self.point_iterations


class Job(NamedTuple):
    """A method, ready to be run in a world, or to be planned."""

    name: str
    training: Training
    env: Environment
    plan: Plan
    layout: Layout


class Programs(NamedTuple):
    """What a stage compiles; jitted, for all seeds at once.

    init() -> runs
    advance(runs, number of the first iteration) -> (runs, metrics [R])
        Donates the runs.
    evaluate(runs, metrics [R], number of the point) -> metrics
        Those of greedy games among them.
    final_scores(runs) -> returns of whole greedy games [R, N]
    one_game(runs) -> Trajectory
        A greedy game of the first seed.
    """

    init: Callable[[], Any]
    advance: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
    evaluate: Callable[[Any, dict[str, jax.Array], Any], dict[str, jax.Array]]
    final_scores: Callable[[Any], jax.Array]
    one_game: Callable[[Any], Any]


class Outcome(NamedTuple):
    """What came out for one method."""

    name: str
    x: np.ndarray  # [points], environment steps of one seed
    sampled: (
        np.ndarray
    )  # [R, points], mean return of the episodes that ended since the point before; NaN: none did
    ended: np.ndarray  # [R, points], how many those were
    greedy: np.ndarray  # [R, points], mean return of the greedy policy
    score: np.ndarray  # [R, N], returns of whole greedy episodes at the end
    game: np.ndarray  # observations of one greedy game of the first seed, the last one included
    rate: float | None  # environment steps per second of all seeds together, compilation and evaluation apart


def choose(text: str, known: Sequence[str]) -> list[str]:
    """The names in a comma-separated text. Raises ValueError where one is unknown or there is none."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in known:
            raise ValueError(
                f"--algorithms: {name!r} is unknown{did_you_mean(name, known)} (there are: {', '.join(known)})"
            )
    if not names:
        raise ValueError(f"--algorithms names none; there are: {', '.join(known)}")
    return names


def make_plan(config: Any, training_config: Any) -> Plan:
    """The plan of one method from an experiment's config and the method's own. ValueError where a number is below 1."""
    for name in ("seeds", "points", "episodes", "final_episodes"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")
    worlds, steps = training_config.worlds, training_config.steps
    iterations = iterations_of(training_config.environment_steps, worlds, steps)
    return Plan(
        config.seeds, config.points, config.episodes, config.final_episodes, iterations, worlds * steps
    )


def make_training(name: str, env: Environment, config: Any, layout: Layout) -> Training:
    """The method of that name; ValueError where a setting does not fit."""
    split = {} if layout.within is None else {"mesh": layout.within}
    return TRAININGS[name](env, config, **split)


def seed_keys(name: str, plan: Plan, seed: int) -> tuple[jax.Array, jax.Array]:
    """Keys to train with, those of the method, and keys to play with, the same for all methods; [R] each."""
    key_train, key_play = jax.random.split(jax.random.key(seed))
    key_train = jax.random.fold_in(key_train, zlib.crc32(name.encode()) & 0x7FFFFFFF)
    train_R, play_R = (
        jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(plan.seeds)) for key in (key_train, key_play)
    )
    return train_R, play_R


def make_programs(
    training: Training,
    env: Environment,
    plan: Plan,
    keys: tuple[jax.Array, jax.Array],
    layout: Layout,
    *,
    most_steps: int,
) -> Programs:
    """The programs of a stage; `keys` are those of `seed_keys`, `most_steps` those of an episode that is played."""
    keys_R, play_keys_R = keys
    last = 2**31 - 1  # no point of the curve has this number

    def init_one(key: jax.Array):
        return train(training, key, 0)[0]

    def advance_one(run: Any, key: jax.Array, first: Any):
        run, metrics = train(training, key, plan.point_iterations, run=run, first=first)
        return run, _over_iterations(metrics)

    def play_one(run: Any, key: jax.Array, i: Any, *, count: int) -> jax.Array:
        key = jax.random.fold_in(key, i)
        most = {"count": count, "most_steps": most_steps, "place": layout.place}
        return play(env, training.policy(run), key, **most).score_B

    def init():
        return layout.laid(jax.vmap(init_one)(keys_R))

    def advance(runs: Any, first: jax.Array):
        runs, metrics = jax.vmap(advance_one, in_axes=(0, 0, None))(runs, keys_R, first)
        return layout.laid(runs), metrics

    def evaluate(runs: Any, metrics: dict[str, jax.Array], i: jax.Array):
        def mean_one(run: Any, key: jax.Array) -> jax.Array:
            return jnp.mean(play_one(run, key, i, count=plan.episodes))

        return _over_seeds(metrics, jax.vmap(mean_one)(runs, play_keys_R))

    def final_scores(runs: Any) -> jax.Array:
        return jax.vmap(lambda run, key: play_one(run, key, last, count=plan.final_episodes))(
            runs, play_keys_R
        )

    def one_game(runs: Any):
        run = jax.tree.map(lambda x: x[0], runs)
        key_start, key_roll = jax.random.split(jax.random.fold_in(play_keys_R[0], last - 1))
        worlds = start(env, key_start, 1)
        return rollout(env, training.policy(run), worlds, key_roll, steps=most_steps)[1]

    return Programs(
        jax.jit(init),
        jax.jit(advance, donate_argnums=0),
        jax.jit(evaluate),
        jax.jit(final_scores),
        jax.jit(one_game),
    )


def run_training(
    name: str,
    training: Training,
    world: World,
    plan: Plan,
    folder: RunFolder,
    *,
    layout: Layout,
    look: Callable[[Any], Any] | None = None,
    measure: Callable[[int, Any], Mapping[str, float]] | None = None,
) -> tuple[Outcome, Any]:
    """Trains with all seeds at once, in the stage `name`, then evaluates in the stage `name`_games.

    Seed number r is the same whatever other methods and seeds there are and however `layout` splits them, and all
    methods are evaluated in the same worlds. `look(run)` takes from the state what `measure(step, looked)` makes
    metrics of on the host, at each point. Returns what came out, and what `look` sees at
    the end, as NumPy arrays with the seeds as first axis.
    """
    keys = seed_keys(name, plan, folder.seed)
    programs = make_programs(training, world.env, plan, keys, layout, most_steps=world.most_steps)
    per_point = plan.point_iterations
    looked = jax.jit(jax.vmap(look)) if look else lambda runs: ()

    def step(runs: Any, i: int):
        began = time.perf_counter()
        runs, metrics = jax.block_until_ready(programs.advance(runs, jnp.int32(i * per_point)))
        seconds = time.perf_counter() - began
        # Waited for, lest two programs of several devices meet, see `run_stage`.
        metrics, seen = jax.block_until_ready((programs.evaluate(runs, metrics, jnp.int32(i)), looked(runs)))
        return runs, metrics | {"perf/train_seconds": np.float64(seconds)}, seen

    columns = {"episode/return": "return", "greedy/return": "greedy", "greedy/low": "lowest seed"}
    runs = run_stage(
        name,
        folder=folder,
        init=programs.init,
        step=step,
        steps=plan.steps,
        checkpoint_every=CHECKPOINT_EVERY,
        nullable=_unknown_at_times(plan.seeds),
        show=Show(columns=columns, measure=measure),
    )
    games = run_once(
        f"{name}_games",
        folder=folder,
        compute=lambda: _games(name, programs, world, runs),
    )
    return _outcome(name, plan, folder, games), fetch(looked(runs))


def _unknown_at_times(seeds: int) -> frozenset[str]:
    """Returns are not known where no episode ended, and gaps are infinite where a policy never ends."""
    own = [f"seed_{r}/{name}" for r in range(seeds) for name in ("return", "gap")]
    return frozenset(["episode/return", "episode/length", "gap/largest", *own])


def _over_iterations(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics of several iterations as one: means, sums of counts, maxima; returns weighted by their episodes."""
    count = metrics["episode/count"]
    found = {}
    for name, x in metrics.items():
        if name in ("episode/count", "environment_steps"):
            found[name] = jnp.sum(x)
        elif name in ("episode/return", "episode/length"):
            found[name] = jnp.sum(x * count) / jnp.sum(count)  # NaN where none ended
        else:
            found[name] = (jnp.max if name.endswith("_max") else jnp.mean)(x)
    return found


def _over_seeds(metrics: dict[str, jax.Array], greedy_R: jax.Array) -> dict[str, jax.Array]:
    """Means over seeds, and the returns of each."""
    return_R, count_R = metrics["episode/return"], metrics["episode/count"]
    found = {
        name: (jnp.max if name.endswith("_max") else jnp.mean)(x)
        for name, x in metrics.items()
        if not name.startswith("episode/")
    }
    ended = jnp.maximum(jnp.sum(count_R), 1)
    for name in ("episode/return", "episode/length"):
        known_R = jnp.where(count_R > 0, metrics[name] * count_R, 0)
        found[name] = jnp.where(jnp.sum(count_R) > 0, jnp.sum(known_R) / ended, jnp.nan)
    found |= {
        "episode/count": jnp.sum(count_R).astype(jnp.int32),
        "environment_steps": jnp.sum(metrics["environment_steps"]).astype(jnp.int32),
        "greedy/return": jnp.mean(greedy_R),
        "greedy/low": jnp.min(greedy_R),
        "greedy/high": jnp.max(greedy_R),
    }
    for r in range(greedy_R.shape[0]):
        found |= {
            f"seed_{r}/return": return_R[r],
            f"seed_{r}/episodes": count_R[r].astype(jnp.int32),
            f"seed_{r}/greedy": greedy_R[r],
        }
    return found


def _games(name: str, programs: Programs, world: World, runs: Any):
    """Returns of whole greedy episodes of every seed, and one game of the first, as `run_once` asks for it."""
    score_RN = fetch(programs.final_scores(runs))
    steps = fetch(programs.one_game(runs))
    ended_T = (steps.terminated | steps.truncated)[:, 0]
    length = int(np.argmax(ended_T)) + 1 if ended_T.any() else len(ended_T)
    game = np.concatenate([steps.observation[:length, 0], steps.next_observation[length - 1 : length, 0]])
    draw = world.draw
    rows = (
        [
            {"game": f"{name}, step {i} of {length}", "frame": draw(game[i])}
            for i in pick_frames(length + 1, 4)
        ]
        if draw
        else []
    )
    mean_R = score_RN.mean(axis=1)
    numbers = {
        "greedy/return": float(mean_R.mean()),
        "greedy/low": float(mean_R.min()),
        "greedy/high": float(mean_R.max()),
    }
    return {"score": score_RN, "game": game}, numbers, rows


def pick_frames(count: int, most: int = 8) -> list[int]:
    """At most so many of `count` frames, evenly spread, the first and the last among them."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def _outcome(name: str, plan: Plan, folder: RunFolder, games: Mapping[str, np.ndarray]) -> Outcome:
    """Reads back what the logs hold."""
    lines = folder.metrics(name)

    def each(key: str) -> np.ndarray:
        rows = [[line[f"seed_{r}/{key}"] for line in lines] for r in range(plan.seeds)]
        return np.array(rows, np.float64)  # None becomes NaN

    x = np.array([line["step"] for line in lines]) * plan.point_iterations * plan.iteration_steps
    rate = steps_per_second(folder, name, lines)
    return Outcome(
        name, x, each("return"), each("episodes"), each("greedy"), games["score"], games["game"], rate
    )


def steps_per_second(folder: RunFolder, name: str, lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Environment steps per second of training, all seeds together, over the points that compiled nothing."""
    steps = {line["step"]: line["environment_steps"] for line in lines}
    perf = [line for line in read_lines(folder.path / "perf.jsonl") if line["stage"] == name]
    steady = [line for line in perf if line["compile_seconds"] == 0 and line["step"] in steps]
    seconds = sum(line["train_seconds"] for line in steady)
    return sum(steps[line["step"]] for line in steady) / seconds if seconds else None


def solved_at(outcome: Outcome, level: float) -> np.ndarray:
    """Environment steps until the mean return of the last 100 or more episodes of training reached `level`, [R].

    NaN: never. Episodes are known by points of the curve, so the mean is over the newest points that have so many.
    """
    at_R = np.full(len(outcome.sampled), np.nan)
    for r, (mean, count) in enumerate(zip(outcome.sampled, outcome.ended, strict=True)):
        total = np.nan_to_num(mean) * count
        for k in range(len(count)):
            held = np.cumsum(count[k::-1])
            if held[-1] < WINDOW:
                continue
            newest = int(np.argmax(held >= WINDOW)) + 1
            if total[k::-1][:newest].sum() / held[newest - 1] >= level:
                at_R[r] = outcome.x[k]
                break
    return at_R


def greedy_solved_at(outcome: Outcome, level: float) -> np.ndarray:
    """Environment steps until the greedy policy first reached `level` at a point of its curve, [R]; NaN: never."""
    reached = outcome.greedy >= level
    return np.where(reached.any(axis=1), outcome.x[reached.argmax(axis=1)], np.nan)
