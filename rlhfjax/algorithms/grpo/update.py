"""The update: targets once, then epochs of minibatches.

Shapes: B prompts, G samples of each, R rewards of a sample, T actions in time.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.algorithms.algorithm import (
    Algorithm,
    PyTree,
    check_divisible,
    check_kl,
    gradient_step,
    split_blocks,
)
from rlhfjax.algorithms.grpo.advantage import targets
from rlhfjax.algorithms.grpo.batch import Rollout, Sample
from rlhfjax.algorithms.grpo.objective import Evaluate, loss
from rlhfjax.config import GRPO as Config

CHOICES = {
    "baseline": ("group_mean", "leave_one_out", "batch_mean", "moving", "none", "given"),
    "scale": ("group_std", "batch_std", "none"),
    "whiten": ("none", "samples", "actions"),
    "ratio": ("token", "sequence", "sequence_token"),
    "clip": ("surrogate", "cispo", "none"),
    "aggregation": ("token", "sequence", "constant"),
    "kl_placement": ("loss", "reward", "score"),
}


class State(NamedTuple):
    """All that a run needs to go on."""

    params: PyTree
    opt_state: PyTree
    mean_reward: jax.Array  # float32 [], of baseline "moving": decayed sum of mean rewards, 0 at the start
    step: jax.Array  # int32 [], updates made
    # float32 [], reward per nat: that of the config until the caller puts another; None: there is none in the config
    kl_coefficient: jax.Array | None = None


def make(
    evaluate: Evaluate,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: str | None = None,
) -> Algorithm:
    """The configured method as `Algorithm(init, update)` on `Rollout`; see the module for the metrics.

    Raises ValueError on choices that are unknown or contradict each other, and when tracing where the batch does
    not fit: prompts not divisible by minibatches x microbatches, groups of one sample with a baseline that
    compares them.
    """
    _check_config(config)

    def init(params: PyTree) -> State:
        coefficient = config.kl_coefficient
        coefficient = None if coefficient is None else jnp.asarray(coefficient, jnp.float32)
        return State(params, optimizer.init(params), jnp.zeros(()), jnp.zeros((), jnp.int32), coefficient)

    def update(state: State, rollout: Rollout, key: jax.Array):
        if (state.kl_coefficient is None) != (config.kl_coefficient is None):
            raise ValueError(
                f"state.kl_coefficient is {state.kl_coefficient}, and that of the config {config.kl_coefficient}: make "
                "the state by `init` of this algorithm"
            )
        parts = config.minibatches * config.microbatches
        check_divisible(rollout.mask.shape[0], parts, what="minibatches x microbatches")
        # The reference is closed over, and no part of the batch: it has no leading axis to be cut.
        reference = rollout.reference
        of_batch = evaluate if reference is None else lambda p, inputs: evaluate(p, inputs, reference)
        # Undoes the start from 0, as Adam does; before the first update there is no mean, and the baseline is 0.
        known = 1.0 - jnp.power(config.baseline_decay, state.step.astype(jnp.float32))
        moving = jnp.where(state.step > 0, state.mean_reward / jnp.where(state.step > 0, known, 1.0), 0.0)
        now = dataclasses.replace(config, kl_coefficient=state.kl_coefficient)
        sample, mean_reward, metrics = targets(rollout, moving, config=now, axis_name=axis_name)
        if state.kl_coefficient is not None:
            metrics["objective/kl_coefficient"] = state.kl_coefficient

        def minibatch(carry: tuple[PyTree, PyTree], batch: Sample):
            params, opt_state, step_metrics = gradient_step(
                partial(loss, evaluate=of_batch, config=now),
                optimizer,
                *carry,
                batch,
                microbatches=config.microbatches,
                axis_name=axis_name,
            )
            return (params, opt_state), _per_action(step_metrics)

        def epoch(carry, key):
            return jax.lax.scan(minibatch, carry, split_blocks(sample, config.minibatches, key))

        (params, opt_state), steps = jax.lax.scan(
            epoch, (state.params, state.opt_state), jax.random.split(key, config.epochs)
        )
        decay = config.baseline_decay
        mean_reward = decay * state.mean_reward + (1.0 - decay) * mean_reward
        state = State(params, opt_state, mean_reward, state.step + 1, state.kl_coefficient)
        return state, metrics | _over_steps(steps)

    return Algorithm(init, update)


def _per_action(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics of a gradient step, those of the policy divided by actions in place of the loss's count."""
    actions = metrics.pop("actions")  # per count
    actions = jnp.where(actions > 0, actions, 1.0)
    sums = ("policy/entropy", "policy/approximate_kl", "policy/ratio_mean", "policy/clip_fraction")
    return metrics | {name: metrics[name] / actions for name in sums}


def _over_steps(steps: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics [epochs, minibatches] of the gradient steps as one number each."""
    del steps["batch/count"]
    logp_gap = steps.pop("policy/logp_gap_max")[0, 0]
    ratio_max = jnp.max(steps.pop("policy/ratio_max"))
    averages = {name: jnp.mean(x) for name, x in steps.items()}
    return averages | {"policy/logp_gap": logp_gap, "policy/ratio_max": ratio_max}


def _check_config(config: Config) -> None:
    """Raises ValueError on choices that are unknown or contradict each other."""
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is unknown; choose among {', '.join(choices)}"
            )
    check_kl("loss" if config.kl_placement == "loss" else "reward", config.kl_estimator)
    if config.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {config.epochs}")
    if config.dual_clip is not None and config.clip != "surrogate":
        raise ValueError(f'dual_clip bounds clip="surrogate" only, not {config.clip!r}; set it to None')
    if config.baseline == "moving" and config.separate_rewards:
        raise ValueError('baseline="moving" is one number; with separate_rewards choose another baseline')
    if config.kl_placement == "score" and config.separate_rewards:
        raise ValueError(
            'kl_placement="score" takes the KL off one reward; with separate_rewards choose "reward" or "loss"'
        )
