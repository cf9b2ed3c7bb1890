"""The trials of the referee: which methods, what theory says of each, and the tables of what came out.

Shapes: as in `enumerated`; a leading axis runs over the betas.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.stages import estimators
from experiments.stages.enumerated import (
    World,
    all_pairs,
    evaluate_with,
    grpo_batch,
    ipo_optimum,
    judged,
    pair_batch,
    pair_evaluate,
    policy_logp,
    ppo_batch,
    random_pairs,
    sigmoid_optimum,
    tabular_world,
    train_on_pairs,
    train_online,
    transformer_world,
)
from rlhfjax.algorithms import dpo, grpo, make_optimizer, ppo
from rlhfjax.config import DPO, GRPO, PPO, Optimizer
from rlhfjax.environments import enumerable
from rlhfjax.report import Section, Table

# Whitening would blow up advantages that vanish at the optimum, and the noise of the steps with them.
PPO_K1 = PPO(whiten_advantages=False, epochs=2, minibatches=2, value_clip=float("inf"), value_coefficient=1.0)
NO_STD = GRPO(scale="none", aggregation="constant", length_constant=1.0)
RLOO = replace(NO_STD, baseline="leave_one_out", clip="none", kl_placement="score", kl_estimator="k1")

Answer = Callable[[World, float], np.ndarray]  # (world, beta) -> log-probabilities [N]


class Trial(NamedTuple):
    """One method on one kind of policy, at every beta."""

    policy: str
    method: str
    betas: tuple[float, ...]
    own: Answer | None  # the fixed point that theory gives it; None: pi*, or none known
    compute: Callable[[], tuple[dict[str, Any], dict[str, float], list]]


def trials(config, key: jax.Array, max_steps: int | None) -> dict[str, Trial]:
    """Name -> trial; the key is that of the run, and every trial sees the same worlds."""
    key_table, key_transformer, key_run = jax.random.split(key, 3)
    table = tabular_world(config.model, key_table)
    transformer = transformer_world(config.model, config.transformer, key_transformer)
    kinds = {
        "tabular": (table, config.betas, config.learning_rate, _capped(config.steps, max_steps)),
        "transformer": (
            transformer,
            config.betas[-1:],
            config.transformer_learning_rate,
            _capped(config.transformer_steps, max_steps),
        ),
    }
    found = {}
    for kind, (world, betas, learning_rate, steps) in kinds.items():
        for name, (method, settings, own) in _online(config.samples).items():
            if kind == "tabular" or own is None and name != "grpo":
                train = partial(
                    _train_online,
                    world,
                    settings,
                    key_run,
                    learning_rate=learning_rate,
                    steps=steps,
                    config=config,
                )
                compute = partial(_compute, world, betas, own, train)
                found[f"{kind}_{name}"] = Trial(kind, method, betas, own, compute)
        pair_steps = _capped(config.pair_steps, max_steps)
        for name, (method, settings, own) in _on_pairs(config, world).items():
            if kind == "tabular" or own is None:
                train = partial(
                    _train_on_pairs,
                    world,
                    settings,
                    learning_rate=learning_rate,
                    steps=pair_steps,
                    config=config,
                )
                compute = partial(_compute, world, betas, own, train)
                found[f"{kind}_{name}"] = Trial(kind, method, betas, own, compute)
    return found


def _online(samples: int) -> dict[str, tuple[str, PPO | GRPO, Answer | None]]:
    """Name -> title, settings, own fixed point: the group mean leaves (G - 1) / G of the reward's gradient, so that
    a KL which has no such baseline weighs G / (G - 1) times its coefficient."""
    factor = samples / (samples - 1)

    def weighed(world, beta):
        return enumerable.optimal_policy(world.logp_ref_N, world.reward_N, beta=beta * factor)

    def by_token(world, beta, forward=False):
        return enumerable.token_kl_optimum(
            world.model, world.logits_ref_SV, world.reward_N, world.every, beta=beta * factor, forward=forward
        )

    loss = partial(replace, NO_STD, kl_placement="loss")
    return {
        "ppo": ("PPO, k1 in the reward", PPO_K1, None),
        "rloo": ("RLOO, k1 in the score", RLOO, None),
        "grpo_no_std": ("GRPO without std, k1 in the score", replace(RLOO, baseline="group_mean"), None),
        "grpo_no_std_reward": (
            "GRPO without std, k1 in the reward",
            replace(NO_STD, kl_placement="reward", kl_estimator="k1"),
            weighed,
        ),
        "grpo_no_std_k2": ("GRPO without std, k2 in the loss", loss(kl_estimator="k2"), by_token),
        "grpo_no_std_exact": ("GRPO without std, exact in the loss", loss(kl_estimator="exact"), by_token),
        "grpo_no_std_k3": (
            "GRPO without std, k3 in the loss",
            loss(kl_estimator="k3"),
            partial(by_token, forward=True),
        ),
        "grpo": ("GRPO: std, k3 in the loss", GRPO(), None),
    }


def _on_pairs(config, world: World) -> dict[str, tuple[str, DPO, Answer | None]]:
    pairs = _pairs(config, world)

    def smoothed(world, beta):
        return sigmoid_optimum(world, pairs, beta=beta, smoothing=config.label_smoothing)

    def ipo(world, beta):
        return ipo_optimum(world, pairs, beta=beta)

    return {
        "dpo": ("DPO, exact labels", DPO(), None),
        "cdpo": (
            f"cDPO, smoothing {config.label_smoothing}",
            DPO(label_smoothing=config.label_smoothing),
            smoothed,
        ),
        "ipo": ("IPO, exact labels", DPO(loss="ipo"), ipo),
    }


def _pairs(config, world: World):
    return random_pairs(world, config.pairs, np.random.default_rng(0))


def _train_online(world: World, settings, key, beta, *, learning_rate, steps, config):
    """The trained params; beta may be traced."""
    settings = replace(settings, kl_coefficient=beta)
    total = steps * settings.epochs * settings.minibatches
    optimizer = make_optimizer(Optimizer(learning_rate=learning_rate, max_grad_norm=None), total)
    algorithm, batch = (ppo, ppo_batch) if isinstance(settings, PPO) else (grpo, grpo_batch)
    made = algorithm.make(evaluate_with(world), optimizer, settings)
    return train_online(world, made, batch(world), key, steps=steps, shape=(config.prompts, config.samples))


def _train_on_pairs(world: World, settings, beta, *, learning_rate, steps, config):
    settings = replace(settings, beta=beta)
    optimizer = make_optimizer(Optimizer(learning_rate=learning_rate, max_grad_norm=None), steps)
    made = dpo.make(pair_evaluate(world), optimizer, settings)
    params, _ = train_on_pairs(world, made, pair_batch(world, _pairs(config, world)), steps=steps)
    return params


def _compute(world: World, betas: Sequence[float], own: Answer | None, train):
    """What `run_once` asks for: the measures at every beta."""
    start = time.perf_counter()
    params = jax.block_until_ready(jax.jit(jax.vmap(train))(jnp.asarray(betas, jnp.float32)))
    seconds = time.perf_counter() - start
    found = {name: np.zeros(len(betas)) for name in ("total_variation", "gap", *(["to_own"] if own else []))}
    for i, beta in enumerate(betas):
        logp_N = policy_logp(world, jax.tree.map(lambda x, i=i: x[i], params))
        best_N = enumerable.optimal_policy(world.logp_ref_N, world.reward_N, beta=beta)
        found["total_variation"][i] = enumerable.total_variation(logp_N, best_N)
        found["gap"][i] = beta * enumerable.kl(logp_N, best_N)
        if own is not None:
            found["to_own"][i] = enumerable.total_variation(logp_N, own(world, beta))
    metrics = {name: float(x.max()) for name, x in found.items()}
    return found | {"seconds": np.asarray(seconds)}, metrics, []


def method_rows(trial: Trial, found: Mapping[str, np.ndarray]) -> list[list[Any]]:
    """Rows of the table of methods, one a beta."""
    return [
        [
            trial.policy,
            trial.method,
            beta,
            f"{found['total_variation'][i]:.4f}",
            None if trial.own is None else f"{found['to_own'][i]:.4f}",
            f"{found['gap'][i]:.2g}",
            f"{float(found['seconds']):.1f}" if i == 0 else None,
        ]
        for i, beta in enumerate(trial.betas)
    ]


def estimator_tables():
    """Scale and residue of every estimator's mean gradient, as `run_once` asks for it."""
    small = estimators.small()
    advantages, penalties = estimators.advantage_gradients(small), estimators.kl_gradients(small)
    arrays = {
        "advantages": np.array([[g.scale, g.residue] for g in advantages.values()]),
        "penalties": np.array([[g.scale, g.residue] for g in penalties.values()]),
    }
    return arrays, {"largest_residue": float(arrays["penalties"][:, 1].max())}, []


def judgements(config, key: jax.Array, max_steps: int | None):
    """DPO on hard labels: mean distance from pi* over repetitions, for each number of judgements of a pair."""
    world, beta = tabular_world(config.judged, key), 1.0
    pairs, rng = all_pairs(world), np.random.default_rng(1)
    labels = [[judged(pairs, n, rng).label_K for _ in range(config.repetitions)] for n in config.judgements]
    train = partial(_fit_judged, world, pairs, config=config, steps=_capped(config.judged_steps, max_steps))
    params = jax.jit(jax.vmap(jax.vmap(train)))(jnp.asarray(labels, jnp.float32))
    best_N = enumerable.optimal_policy(world.logp_ref_N, world.reward_N, beta=beta)
    apart = enumerable.total_variation(policy_logp_of_tables(world, params), best_N).mean(axis=1)
    number = np.asarray(config.judgements) * pairs.label_K.size
    exponent = np.polyfit(np.log(number), np.log(apart), 1)[0] if number.size > 1 else np.nan
    return (
        {"judgements": number, "total_variation": apart, "exponent": np.asarray(exponent)},
        {"total_variation_of_most": float(apart[-1])},
        [],
    )


def policy_logp_of_tables(world: World, params: dict) -> np.ndarray:
    """[..., N] from tables with leading axes."""
    logits = np.asarray(params["logits"], np.float64)
    flat = [enumerable.table_logp(x, world.every) for x in logits.reshape(-1, *logits.shape[-2:])]
    return np.reshape(flat, (*logits.shape[:-2], -1))


def _fit_judged(world: World, pairs, label_K, *, config, steps):
    optimizer = make_optimizer(Optimizer(learning_rate=config.learning_rate, max_grad_norm=None), steps)
    made = dpo.make(pair_evaluate(world), optimizer, DPO(beta=1.0))
    return train_on_pairs(world, made, pair_batch(world, pairs, label_K), steps=steps)[0]


def overfit(config, key: jax.Array, max_steps: int | None):
    """DPO on too few hard labels: the training loss falls to the end, and the true objective turns."""
    world, rng, steps = (
        tabular_world(config.judged, key),
        np.random.default_rng(2),
        _capped(config.judged_steps, max_steps),
    )
    pairs = judged(random_pairs(world, config.few, rng), 1, rng)
    logp_ref_N, reward_N = (jnp.asarray(x, jnp.float32) for x in (world.logp_ref_N, world.reward_N))
    optimizer = make_optimizer(Optimizer(learning_rate=config.few_learning_rate, max_grad_norm=None), steps)
    made = dpo.make(pair_evaluate(world), optimizer, DPO(beta=1.0))
    watch = partial(enumerable.objective, logp_ref=logp_ref_N, reward=reward_N, beta=1.0)
    train = jax.jit(
        lambda: train_on_pairs(world, made, pair_batch(world, pairs), steps=steps, watch=watch)[1]
    )
    loss, true = (np.asarray(x, np.float64) for x in train())
    found = {
        "loss_first": loss[0],
        "loss_last": loss[-1],
        "objective_first": true[0],
        "objective_best": true.max(),
        "objective_last": true[-1],
        "step_best": true.argmax(),
        "objective_optimum": enumerable.optimal_objective(world.logp_ref_N, world.reward_N, beta=1.0),
    }
    arrays = {name: np.asarray(x) for name, x in found.items()} | {"loss": loss, "objective": true}
    return arrays, {name: float(x) for name, x in found.items()}, []


def sections(config, rows, estimates, noise, overfit) -> list[Section]:
    """The report's tables."""
    size = f"{config.model.vocab_size}^{config.model.length}"
    methods = Table(
        ["policy", "method", "beta", "TV to pi*", "TV to its own fixed point", "J* - J", "seconds"], rows
    )
    advantages = [
        [name, f"{scale:.4f}", f"{residue:.4f}"]
        for name, (scale, residue) in zip(
            estimators.ADVANTAGES | estimators.CRITICS, estimates["advantages"], strict=True
        )
    ]
    places = [(place, name) for place in estimators.KL_PLACES for name in estimators.KL_ESTIMATORS]
    penalties = [
        [place, name, f"{scale:.4f}", f"{residue:.4f}"]
        for (place, name), (scale, residue) in zip(places, estimates["penalties"], strict=True)
    ]
    error = [[int(n), f"{x:.4f}"] for n, x in zip(noise["judgements"], noise["total_variation"], strict=True)]
    course = [
        ["start", f"{overfit['loss_first']:.4f}", f"{overfit['objective_first']:.4f}"],
        [
            f"best J, step {int(overfit['step_best'])}",
            f"{overfit['loss'][int(overfit['step_best'])]:.4f}",
            f"{overfit['objective_best']:.4f}",
        ],
        ["end", f"{overfit['loss_last']:.4f}", f"{overfit['objective_last']:.4f}"],
        ["pi*", None, f"{overfit['objective_optimum']:.4f}"],
    ]
    multiple = ["multiple of the true gradient", "residue"]
    return [
        Section(f"Methods on {size} sequences", "Total variation to pi*, in float64.", methods),
        Section(
            "Mean gradient of the advantages",
            "By enumeration of all groups.",
            Table(["advantage", *multiple], advantages),
        ),
        Section(
            "Mean gradient of the KL penalties",
            "Beside the gradient of KL(policy || reference).",
            Table(["place", "estimator", *multiple], penalties),
        ),
        Section(
            "DPO on hard labels",
            f"TV to pi* falls as the number of judgements to the power {float(noise['exponent']):.2f}.",
            Table(["judgements", "TV to pi*"], error),
        ),
        Section(
            f"DPO on {config.few} hard labels",
            "The training loss falls, the true objective turns.",
            Table(["", "training loss", "true J"], course),
        ),
    ]


def _capped(steps: int, most: int | None) -> int:
    return steps if most is None else min(steps, most)
