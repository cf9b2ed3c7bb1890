"""Control from preferences: numbers of labels, ways to query and labellers, with several seeds, all in one program.

Shapes: R seeds, V variants (rows of the table), J = V * R runs with the seeds running fastest, N episodes.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import Show, run_once, run_stage
from experiments.programs import Program, whole_shapes
from experiments.stages.control_layout import Layout
from rlhfjax.environments import Environment, Worlds, cart_pole, frozen_lake, play, rollout, start
from rlhfjax.mesh import Devices, fetch, row_parts
from rlhfjax.recipes.control import (
    Training,
    control_ppo,
    control_preferences,
    learned_scores,
    rounds_of,
    train,
)
from rlhfjax.recipes.control.segments import Segments, cut_segments
from rlhfjax.recipes.control.training import Run
from rlhfjax.run_folder import RunFolder

CHECKPOINT_EVERY = 10
MEANS = (
    "query/disagreement",
    "query/chosen",
    "reward/agreement",
    "reward/loss",
    "reward/heldout_loss",
    "reward/l2",
)
START = 2**31 - 1  # no iteration has this number
AUDIT_WORLDS = 16
AUDIT_STEPS = 256
AUDIT_PAIRS = 512


class Variant(NamedTuple):
    """One row of the table."""

    name: str  # in metrics.jsonl
    method: str  # in words
    labels: int
    random: bool  # queries
    noisy: bool  # labels


class Choice(NamedTuple):
    """What tells the runs of one program apart."""

    labels: Any  # int32
    random_queries: Any  # float32
    temperature: Any  # float32, of the labeller
    coin: Any  # float32, its share of random answers


class Study(NamedTuple):
    """Everything that is to be run, checked."""

    title: str
    metric: str
    env: Environment
    most_steps: int  # of an episode
    config: Any  # the experiment's
    variants: list[Variant]
    layout: Layout  # of the J runs
    true_layout: Layout  # of the R runs on the true reward

    @property
    def rounds(self) -> int:
        """Steps of either stage."""
        return rounds_of(self.config.training)


class Programs(NamedTuple):
    """What a stage compiles; jitted, for all of its runs at once.

    init(keys) -> runs
    advance(runs, keys, number of the step) -> (runs, metrics, each [J])
        Donates the runs.
    scores(runs, keys) -> returns of whole greedy episodes [J, N]

    `keys` are two arrays [J]: to train with and to play with.
    """

    init: Callable[[Any], Run]
    advance: Callable[[Run, Any, Any], tuple[Run, dict[str, jax.Array]]]
    scores: Callable[[Run, Any], jax.Array]


class Found(NamedTuple):
    """What came out."""

    x: np.ndarray  # [rounds], environment steps of one run
    curve: np.ndarray  # [V, R, rounds], mean true return of the episodes that ended in a round; NaN: none did
    true_curve: np.ndarray  # [R, rounds]
    score: np.ndarray  # [V, R, N], true returns of greedy episodes at the end
    true_score: np.ndarray  # [R, N]
    asked: np.ndarray  # [V], labels at the end, mean over seeds
    correlation: (
        np.ndarray
    )  # [V, R], Pearson's, of learnt and true returns of the audit's segments; NaN: not defined
    agreement: (
        np.ndarray
    )  # [V, R], share of pairs of them with unequal returns that are put in the right order


def make_study(config: Any, mesh: Devices) -> Study:
    """What the experiment's config asks for. ValueError on bad settings, before anything is run."""
    for name in ("seeds", "episodes"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(config, name)}")
    if not 0 < config.success <= 1:
        raise ValueError(f"--success {config.success} is a probability: it must lie above 0 and be at most 1")
    worlds = {
        "cartpole": ("CartPole", cart_pole(), 500),
        "grid": ("FrozenLake", frozen_lake(success=config.success), 100),
    }
    if config.env not in worlds:
        raise ValueError(f"--env {config.env!r} is unknown; there are: {', '.join(worlds)}")
    title, env, most_steps = worlds[config.env]
    if config.training.segment > most_steps:
        raise ValueError(
            f"--training.segment {config.training.segment} is longer than an episode of {title} can be, {most_steps}"
        )
    variants = make_variants(config)
    for variant in variants:  # every one of them is checked with its own numbers, which are traced later
        control_preferences(env, _settings(config, choice_of(variant, config), variant.labels))
    metric = "return of an episode" if config.env == "cartpole" else "share of episodes that reach the goal"

    def layout(count: int) -> Layout:
        return Layout(mesh, 0 if count % row_parts(mesh) == 0 else None)

    of_all = layout(config.seeds * len(variants))
    return Study(title, metric, env, most_steps, config, variants, of_all, layout(config.seeds))


def make_variants(config: Any) -> list[Variant]:
    """The rows of the table. ValueError where a list of numbers is none, or all are empty."""
    kinds = (
        ("labels", "labels", "preferences, {} labels", False, False),
        ("random_labels", "random", "random queries, {} labels", True, False),
        ("noisy_labels", "noisy", "noisy labels, {} labels", False, True),
    )
    found = []
    for field, name, words, random, noisy in kinds:
        text = getattr(config, field)
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not all(part.isdecimal() for part in parts):
            flag = field.replace("_", "-")
            raise ValueError(f"--{flag} {text!r}: numbers of labels, 0 or more, separated by commas")
        counts = dict.fromkeys(int(part) for part in parts)
        found += [Variant(f"{name}_{n}", words.format(n), n, random, noisy) for n in counts]
    if not found:
        raise ValueError(
            "--labels, --random-labels and --noisy-labels are all empty: give a number of labels"
        )
    return found


def choice_of(variant: Variant, config: Any) -> Choice:
    """Its numbers."""
    labeller = config.noise if variant.noisy else config.training.labeller
    return Choice(variant.labels, float(variant.random), labeller.temperature, labeller.random)


def make_programs(
    study: Study,
) -> tuple[Programs, Programs, Callable[[Run, Run, jax.Array], dict[str, jax.Array]]]:
    """Of the learnt rewards, of the true one, and the audit: (runs [J], runs on the true reward [R], keys [R]) ->
    arrays [J]."""
    config, env, seeds = study.config, study.env, study.config.seeds
    capacity = max(variant.labels for variant in study.variants)
    chosen = [choice_of(variant, config) for variant in study.variants]
    choice_J = Choice(*(jnp.repeat(jnp.asarray(x), seeds) for x in zip(*chosen, strict=True)))

    def learnt(choice: Choice) -> Training:
        return control_preferences(env, _settings(config, choice, capacity))

    def known(choice: tuple) -> Training:
        return control_ppo(env, config.training.ppo)

    return (
        _programs(study, learnt, choice_J, 1, study.layout),
        _programs(study, known, (), config.training.iterations, study.true_layout),
        jax.jit(partial(_audit, study, learned_scores(env, _settings(config, choice_J, capacity)))),
    )


def seed_keys(study: Study, seed: int) -> tuple[jax.Array, jax.Array]:
    """Keys of seed number r to train with, the same for all variants, and to play with; [R] each."""
    both = jax.random.split(jax.random.key(seed))
    train_R, play_R = (
        jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(study.config.seeds)) for key in both
    )
    return train_R, play_R


def run_study(study: Study, folder: RunFolder) -> Found:
    """Trains on the true reward, then on all learnt ones together, then plays and audits."""
    keys = seed_keys(study, folder.seed)
    variants, seeds = study.variants, study.config.seeds
    learnt, known, audit = make_programs(study)
    repeated = tuple(jnp.tile(key, len(variants)) for key in keys)

    def stage(name: str, programs: Programs, keys: Any, rows: list[str], columns: dict[str, str]) -> Run:
        def step(runs: Run, i: int):
            runs, metrics = programs.advance(runs, keys, jnp.int32(i))
            return runs, _named(metrics, rows, seeds)

        nullable = frozenset(f"{row}/seed_{r}/return" for row in rows for r in range(seeds))
        return run_stage(
            name,
            folder=folder,
            init=lambda: programs.init(keys),
            step=step,
            steps=study.rounds,
            checkpoint_every=CHECKPOINT_EVERY,
            nullable=nullable | {f"{row}/return" for row in rows},
            show=Show(columns=columns),
        )

    true_runs = stage("true_reward", known, keys, ["true"], {"true/return": "return"})
    names = [variant.name for variant in variants]
    shown = {f"{name}/return": name.replace("_", " ") for name in names[:6]}
    runs = stage("preferences", learnt, repeated, names, shown)

    def games():
        found = fetch(audit(runs, true_runs, keys[1]))
        arrays = {name: x.reshape(len(variants), seeds) for name, x in found.items()}
        score = fetch(learnt.scores(runs, repeated)).reshape(len(variants), seeds, -1)
        arrays |= {"score": score, "true_score": fetch(known.scores(true_runs, keys))}
        numbers = {f"{name}/score": float(x.mean()) for name, x in zip(names, score, strict=True)}
        return arrays, numbers | {"true/score": float(arrays["true_score"].mean())}, []

    arrays = run_once("games", folder=folder, compute=games)
    return _found(study, folder, arrays)


def programs_of_study(study: Study) -> list[Program]:
    """The programs of all stages, as shapes: for `--dry-run`."""
    learnt, known, audit = make_programs(study)
    keys = seed_keys(study, 0)
    both = []
    stages = (
        ("true_reward", known, study.true_layout, 1),
        ("preferences", learnt, study.layout, len(study.variants)),
    )
    for name, programs, layout, copies in stages:
        repeated = tuple(jnp.tile(key, copies) for key in keys)
        own = whole_shapes(layout.mesh, jax.eval_shape(lambda x: x, repeated))
        shapes = jax.eval_shape(programs.init, own)
        runs = jax.tree.map(lambda x, where: x.update(sharding=where), shapes, layout.where(shapes))
        number = whole_shapes(layout.mesh, jax.ShapeDtypeStruct((), jnp.int32))
        policy = runs.learner if name == "true_reward" else runs.learner.policy
        parts = {"parameters": policy.params, "optimiser": policy.opt_state, "batch": runs.worlds}
        both += [
            Program(name, "training", programs.advance, (runs, own, number), study.rounds, parts),
            Program("games", f"greedy games, {name}", programs.scores, (runs, own), 1, parts),
        ]
    return both


def _settings(config: Any, choice: Choice, capacity: int) -> Any:
    """The recipe's config of one run."""
    labeller = dataclasses.replace(
        config.training.labeller, temperature=choice.temperature, random=choice.coin
    )
    return dataclasses.replace(
        config.training,
        labels=choice.labels,
        capacity=capacity,
        random_queries=choice.random_queries,
        labeller=labeller,
    )


def _programs(
    study: Study, make: Callable[[Any], Training], choice: Any, iterations: int, layout: Layout
) -> Programs:
    """`iterations` of each training are one step of the stage."""
    config = study.config

    def init(keys: tuple[jax.Array, jax.Array]) -> Run:
        # The start of `train`, without its loop: of no iterations that would still be compiled.
        return layout.laid(
            jax.vmap(lambda one, key: make(one).init(jax.random.fold_in(key, START)))(choice, keys[0])
        )

    def advance(runs: Run, keys: tuple[jax.Array, jax.Array], i: Any):
        def one(choice: Any, run: Run, key: jax.Array):
            run, metrics = train(make(choice), key, iterations, run=run, first=i * iterations)
            return run, _over_iterations(metrics)

        runs, metrics = jax.vmap(one)(choice, runs, keys[0])
        return layout.laid(runs), metrics

    def scores(runs: Run, keys: tuple[jax.Array, jax.Array]) -> jax.Array:
        def one(choice: Any, run: Run, key: jax.Array) -> jax.Array:
            act = make(choice).policy(run)
            return play(study.env, act, key, count=config.episodes, most_steps=study.most_steps).score_B

        return jax.vmap(one)(choice, runs, keys[1])

    return Programs(jax.jit(init), jax.jit(advance, donate_argnums=0), jax.jit(scores))


def _audit(
    study: Study, scores: Callable[[Run, Segments], jax.Array], runs: Run, true_runs: Run, keys_R: jax.Array
) -> dict[str, jax.Array]:
    """How well the learnt rewards tell segments of all kinds apart: those of the policy that was trained on the true
    reward, in worlds of which number b acts at random with probability b / (worlds - 1)."""
    env, config = study.env, study.config
    policy = control_ppo(env, config.training.ppo).policy
    random_B = jnp.linspace(0.0, 1.0, AUDIT_WORLDS)

    def segments_of(run: Run, key: jax.Array) -> tuple[Segments, jax.Array]:
        key_start, key_roll, key_cut = jax.random.split(jax.random.fold_in(key, 1), 3)
        greedy = policy(run)

        def act(observation: jax.Array, key: jax.Array):
            key_which, key_action = jax.random.split(key)
            action_B = jax.random.randint(key_action, (AUDIT_WORLDS,), 0, env.num_actions or 1, jnp.int32)
            at_random_B = jax.random.uniform(key_which, (AUDIT_WORLDS,)) < random_B
            return jnp.where(at_random_B, action_B, greedy(observation, key)[0]), ()

        worlds: Worlds = start(env, key_start, AUDIT_WORLDS)
        _, trajectory = rollout(env, act, worlds, key_roll, steps=max(AUDIT_STEPS, config.training.segment))
        return cut_segments(key_cut, trajectory, count=2 * AUDIT_PAIRS, length=config.training.segment)

    def one(run: Run, segments: Segments, true: jax.Array) -> dict[str, jax.Array]:
        learnt = scores(run, segments)
        gap = learnt[:AUDIT_PAIRS] - learnt[AUDIT_PAIRS:]
        true_gap = true[:AUDIT_PAIRS] - true[AUDIT_PAIRS:]
        right = 0.5 + 0.5 * jnp.sign(gap) * jnp.sign(true_gap)
        unequal = true_gap != 0.0
        return {
            "correlation": jnp.corrcoef(learnt, true)[0, 1],
            "agreement": jnp.sum(jnp.where(unequal, right, 0.0)) / jnp.sum(unequal),
        }

    copies = len(study.variants)
    found = jax.vmap(segments_of)(true_runs, keys_R)
    segments, true = jax.tree.map(lambda x: jnp.concatenate([x] * copies), found)
    return jax.vmap(one)(runs, segments, true)


def _over_iterations(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What is kept of the iterations of a step; returns are NaN where no episode ended."""
    count = metrics["episode/count"]
    total = jnp.sum(count)
    kept = {name: jnp.mean(metrics[name]) for name in MEANS if name in metrics}
    kept |= {name: x[-1] for name, x in metrics.items() if name.startswith("labels/")}
    mean = jnp.sum(metrics["episode/return"] * count) / jnp.where(total > 0, total, 1.0)
    return kept | {
        "return": jnp.where(total > 0, mean, jnp.nan),
        "environment_steps": jnp.sum(metrics["environment_steps"]),
    }


def _named(metrics: dict[str, jax.Array], rows: list[str], seeds: int) -> dict[str, jax.Array]:
    """Means over the seeds of each row of the table, and the return of each seed."""
    found = {}
    for name, x_J in metrics.items():
        x_VR = x_J.reshape(len(rows), seeds)
        if name == "environment_steps":
            found[name] = jnp.sum(x_VR).astype(jnp.int32)
            continue
        found |= {f"{row}/{name}": jnp.nanmean(x) for row, x in zip(rows, x_VR, strict=True)}
        if name == "return":
            found |= {
                f"{row}/seed_{r}/return": x_VR[v, r] for v, row in enumerate(rows) for r in range(seeds)
            }
    return found


def _found(study: Study, folder: RunFolder, arrays: dict[str, np.ndarray]) -> Found:
    seeds, names = study.config.seeds, [variant.name for variant in study.variants]

    def curve(stage: str, name: str) -> np.ndarray:
        lines = folder.metrics(stage)
        values = [[line[f"{name}/seed_{r}/return"] for line in lines] for r in range(seeds)]
        return np.array([[np.nan if x is None else x for x in row] for row in values], np.float64)

    lines = folder.metrics("preferences")
    steps = np.cumsum([line["environment_steps"] for line in lines]) // (seeds * len(names))
    asked = np.array([lines[-1][f"{name}/labels/count"] for name in names])
    true_curve = curve("true_reward", "true")
    curves = np.stack([curve("preferences", name) for name in names])
    score, true_score = arrays["score"], arrays["true_score"]
    agreement = arrays["agreement"]
    return Found(steps, curves, true_curve, score, true_score, asked, arrays["correlation"], agreement)
