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

from experiments.stages import enumerated_values as values
from experiments.stages import estimators
from experiments.stages.enumerated import (
    World,
    evaluate_with,
    grpo_batch,
    ipo_optimum,
    pair_batch,
    pair_evaluate,
    ppo_batch,
    random_pairs,
    sigmoid_optimum,
    tabular_world,
    train_on_pairs,
    train_online,
    transformer_world,
)
from experiments.stages.enumerated_values import Ended
from experiments.stages.hard_labels import capped
from rlhfjax.algorithms import dpo, grpo, ilql, make_optimizer, ppo, soft_q
from rlhfjax.config import DPO, GRPO, ILQL, PPO, Optimizer, SoftQ
from rlhfjax.environments import enumerable
from rlhfjax.report import Section, Table

IN_A_TRANSFORMER = ("ppo", "rloo", "grpo_no_std", "soft_q", "soft_q_both", "soft_q_on_policy", "dpo")
# Whitening would blow up advantages that vanish at the optimum, and the noise of the steps with them.
PPO_K1 = PPO(whiten_advantages=False, epochs=2, minibatches=2, value_clip=float("inf"), value_coefficient=1.0)
NO_STD = GRPO(scale="none", aggregation="constant", length_constant=1.0)
RLOO = replace(NO_STD, baseline="leave_one_out", clip="none", kl_placement="score", kl_estimator="k1")

SOFT_Q = SoftQ(polyak=0.05)
EXPECTILE = 0.7
VALUES = ILQL(discount=1.0, polyak=0.05, cql_coefficient=None, policy_coefficient=None, expectile=EXPECTILE)

Answer = Callable[[World, float], np.ndarray]  # (world, beta) -> log-probabilities [N]


class Trial(NamedTuple):
    """One method on one kind of policy, at every beta."""

    policy: str
    method: str
    betas: tuple[float, ...]
    own: Answer | None  # the fixed point that theory gives it; None: pi*, or none known
    train: Callable[[jax.Array], Ended]  # all betas -> how their runs ended; jitted
    compute: Callable[[], tuple[dict[str, Any], dict[str, float], list]]


def trials(config, key: jax.Array, max_steps: int | None) -> dict[str, Trial]:
    """Name -> trial; the key is that of the run, and every trial sees the same worlds."""
    key_table, key_transformer, key_run = jax.random.split(key, 3)
    table = tabular_world(config.model, key_table)
    transformer = transformer_world(config.model, config.transformer, key_transformer)
    kinds = {
        "tabular": (table, config.betas, config.learning_rate, config.steps),
        "transformer": (
            transformer,
            config.betas[-1:],
            config.transformer_learning_rate,
            config.transformer_steps,
        ),
    }
    found = {}
    for kind, (world, betas, learning_rate, steps) in kinds.items():
        methods = _methods(config, world, key_run, steps=steps, max_steps=max_steps)
        for name, (method, train, own) in methods.items():
            if kind == "tabular" or name in IN_A_TRANSFORMER:
                train = jax.jit(jax.vmap(partial(train, learning_rate=learning_rate, config=config)))
                compute = partial(_compute, world, betas, own, train)
                found[f"{kind}_{name}"] = Trial(kind, method, betas, own, train, compute)
    return found


def _methods(config, world: World, key: jax.Array, *, steps: int, max_steps: int | None):
    """Name -> title, run, own fixed point; `run(beta, learning_rate=..., config=...)` gives how it ended."""
    found: dict[str, tuple[str, Callable[..., Ended], Answer | None]] = {}
    steps, pair_steps = capped(steps, max_steps), capped(config.pair_steps, max_steps)
    for name, (method, settings, own) in _online(config.samples).items():
        found[name] = (method, partial(_train_online, world, settings, key, steps=steps), own)
    for name, (method, settings, draw, own) in _of_values(world).items():
        train = _train_soft if isinstance(settings, SoftQ) else _train_values
        found[name] = (method, partial(train, world, settings, draw, key, steps=steps), own)
    for name, (method, settings, own) in _on_pairs(config, world).items():
        found[name] = (method, partial(_train_on_pairs, world, settings, steps=pair_steps), own)
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


def _of_values(world: World) -> dict[str, tuple[str, SoftQ | ILQL, values.Draw, Answer | None]]:
    """Name -> title, settings, data, own fixed point. The last three learn tables, and know no KL while they do."""
    reference = values.of_reference(world)

    def guided(state_value):
        return lambda world, beta: values.guided_optimum(world, state_value, beta=beta)

    return {
        "soft_q": ("soft Q, one step, uniform data", SOFT_Q, values.uniform, None),
        "soft_q_whole": (
            "soft Q, whole episodes, uniform data",
            replace(SOFT_Q, steps=(0,)),
            values.uniform,
            None,
        ),
        "soft_q_mixed": (
            "soft Q, one step and whole episodes, uniform data",
            replace(SOFT_Q, steps=(1, 0)),
            values.uniform,
            None,
        ),
        "soft_q_both": (
            "path consistency, uniform data",
            replace(SOFT_Q, gradient="both"),
            values.uniform,
            None,
        ),
        "soft_q_on_policy": ("soft Q, one step, on policy", SOFT_Q, enumerable.sample, None),
        "ilql": (
            f"ILQL (expectile {EXPECTILE}), guided, samples of the reference",
            VALUES,
            reference,
            guided(partial(values.expectile_value, expectile=EXPECTILE)),
        ),
        "monte_carlo": (
            "values of the reference (Monte Carlo), guided, its samples",
            replace(VALUES, bootstrap="returns", expectile=0.5),
            reference,
            guided(values.mean_value),
        ),
        "dqn": (
            "DQN, greedy, uniform data",
            replace(VALUES, bootstrap="max", expectile=None),
            values.uniform,
            lambda world, beta: values.best_sequence(world),
        ),
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
    """How a run of a policy-gradient method ended; beta may be traced."""
    settings = replace(settings, kl_coefficient=beta)
    has_value = isinstance(settings, PPO)
    algorithm, batch = (ppo, ppo_batch) if has_value else (grpo, grpo_batch)
    optimizer = _adam(learning_rate, steps * settings.epochs * settings.minibatches)
    made = algorithm.make(evaluate_with(world), optimizer, settings)
    shape = (config.prompts, config.samples)
    logits_SV, value_S = world.table(train_online(world, made, batch(world), key, steps=steps, shape=shape))
    # Rewards hold the penalty: the critic's value of the start is the objective itself.
    return Ended(logits_SV, value_S[0] if has_value else None)


def _train_soft(world: World, settings: SoftQ, draw, key, beta, *, learning_rate, steps, config):
    """The same of soft Q-learning."""
    settings = replace(settings, beta=beta)
    made = soft_q.make(values.soft_evaluate(world), _adam(learning_rate, steps), settings)
    shape, batch = (config.prompts, config.samples), values.soft_batch(world)
    logits_SV, _ = world.table(train_online(world, made, batch, key, steps=steps, shape=shape, draw=draw))
    return Ended(logits_SV, beta * values.log_partition(world, logits_SV)[0])


def _train_values(world: World, settings: ILQL, draw, key, beta, *, learning_rate, steps, config):
    """The same of tables of Q and V, and of the policy made of them."""
    key_init, key_run = jax.random.split(key)
    heads = 1 if settings.bootstrap == "returns" else 2
    tables = values.init_values(world, key_init, heads)
    # Whoever draws, it is not the policy: what stands for it here is not read.
    data = world._replace(params=tables, table=lambda params: (params["q"][0], params["v"]))
    made = ilql.make(values.table_evaluate, _adam(learning_rate, steps), settings)
    shape, batch = (config.prompts, config.samples), values.episodes(world)
    params = train_online(data, made, batch, key_run, steps=steps, shape=shape, draw=draw)
    return (
        values.greedy_policy(params)
        if settings.bootstrap == "max"
        else values.guided_policy(world, params, beta)
    )


def _train_on_pairs(world: World, settings, beta, *, learning_rate, steps, config):
    settings = replace(settings, beta=beta)
    made = dpo.make(pair_evaluate(world), _adam(learning_rate, steps), settings)
    params, _ = train_on_pairs(world, made, pair_batch(world, _pairs(config, world)), steps=steps)
    return Ended(world.table(params)[0])


def _adam(learning_rate: float, steps: int):
    return make_optimizer(Optimizer(learning_rate=learning_rate, max_grad_norm=None), steps)


def _compute(world: World, betas: Sequence[float], own: Answer | None, train):
    """What `run_once` asks for: the measures at every beta."""
    start = time.perf_counter()
    ended = jax.block_until_ready(train(jnp.asarray(betas, jnp.float32)))
    seconds = time.perf_counter() - start
    found = {name: np.zeros(len(betas)) for name in ("total_variation", "gap", *(["to_own"] if own else []))}
    for i, beta in enumerate(betas):
        logp_N = enumerable.table_logp(np.asarray(ended.logits_SV[i], np.float64), world.every)
        best_N = enumerable.optimal_policy(world.logp_ref_N, world.reward_N, beta=beta)
        found["total_variation"][i] = enumerable.total_variation(logp_N, best_N)
        found["gap"][i] = beta * enumerable.kl(logp_N, best_N)
        if own is not None:
            found["to_own"][i] = enumerable.total_variation(logp_N, own(world, beta))
    if ended.value is not None:
        best = [enumerable.optimal_objective(world.logp_ref_N, world.reward_N, beta=beta) for beta in betas]
        found["value_error"] = np.abs(np.asarray(ended.value, np.float64) - best)
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
            f"{found['value_error'][i]:.4f}" if "value_error" in found else None,
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


def sections(config, rows, estimates, noise, overfit) -> list[Section]:
    """The report's tables."""
    size = f"{config.model.vocab_size}^{config.model.length}"
    distances = ["TV to pi*", "TV to its own fixed point", "J* - J", "error of V(start)"]
    methods = Table(["policy", "method", "beta", *distances, "seconds"], rows)
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
        Section(
            f"Methods on {size} sequences",
            "TV: total variation, in float64. Error of V(start): its distance from beta log Z.",
            methods,
        ),
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
