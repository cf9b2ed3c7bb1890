"""DPO on labels drawn by a noisy judge: how its error falls with their number, and how it overfits too few.

Shapes: as in `enumerated`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.stages.enumerated import (
    World,
    all_pairs,
    judged,
    pair_batch,
    pair_evaluate,
    random_pairs,
    tabular_world,
    train_on_pairs,
)
from rlhfjax.algorithms import dpo, make_optimizer
from rlhfjax.config import DPO, Optimizer
from rlhfjax.environments import enumerable


def judgements(config, key: jax.Array, max_steps: int | None):
    """DPO on hard labels: mean distance from pi* over repetitions, for each number of judgements of a pair."""
    world, beta = tabular_world(config.judged, key), 1.0
    pairs, rng = all_pairs(world), np.random.default_rng(1)
    labels = [[judged(pairs, n, rng).label_K for _ in range(config.repetitions)] for n in config.judgements]
    train = partial(_fit_judged, world, pairs, config=config, steps=capped(config.judged_steps, max_steps))
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
        capped(config.judged_steps, max_steps),
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


def capped(steps: int, most: int | None) -> int:
    """No more steps than the run allows."""
    return steps if most is None else min(steps, most)
