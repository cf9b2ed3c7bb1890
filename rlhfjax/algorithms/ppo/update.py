"""PPO's update: epochs of minibatches on one rollout, the KL controller, the critic's warm-up."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.algorithms import sft
from rlhfjax.algorithms.algorithm import (
    Algorithm,
    PyTree,
    across,
    check_divisible,
    check_kl,
    gradient_step,
    split_blocks,
)
from rlhfjax.algorithms.ppo.batch import Rollout, Sample
from rlhfjax.algorithms.ppo.experience import targets
from rlhfjax.algorithms.ppo.objective import Evaluate, loss
from rlhfjax.config import PPO as Config
from rlhfjax.ops import adaptive_kl_coefficient


class State(NamedTuple):
    """All that a run needs to go on."""

    params: PyTree
    opt_state: PyTree
    kl_coefficient: jax.Array  # float32 [], reward per nat
    step: jax.Array  # int32 [], updates made


def make(
    evaluate: Evaluate,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: str | None = None,
    *,
    is_policy: Callable[[PyTree], PyTree] | None = None,
    evaluate_ptx: sft.Evaluate | None = None,
) -> Algorithm:
    """PPO as `Algorithm(init, update)` on `Rollout`; see the module for the metrics.

    Args:
      evaluate: `(params, inputs) -> (logp, entropy, value)` or an `Evaluation`; with `rollout.reference` given,
        `(params, inputs, reference)`.
      optimizer: with `critic_warmup`, policy and rest get a state each, now and later: gradient norms are clipped
        apart, and the policy's schedule begins with its first step.
      config: its kl_coefficient is that of the first update.
      axis_name: mapped axis over whose members the batch is split; `rollout.reference` is whole on each.
      is_policy: which parameters logp depends on: `params -> bools`, shaped as params or a prefix of them, e.g.
        `lambda params: {"policy": True, "critic": False}`. Needed for `critic_warmup` only.
      evaluate_ptx: `(params, inputs) -> logp` of the pretraining text. Needed for `ptx_coefficient` only.

    Raises ValueError where a setting is out of range or lacks what it needs, and when tracing where the batch is
    not divisible by minibatches x microbatches.
    """
    _check_config(config, is_policy, evaluate_ptx)
    if config.critic_warmup:
        optimizer = _policy_held(
            optimizer, is_policy, config.critic_warmup * config.epochs * config.minibatches
        )

    def init(params: PyTree) -> State:
        kl_coefficient = jnp.asarray(config.kl_coefficient, jnp.float32)
        return State(params, optimizer.init(params), kl_coefficient, jnp.zeros((), jnp.int32))

    def update(state: State, rollout: Rollout, key: jax.Array):
        check_divisible(
            rollout.mask.shape[0], config.minibatches * config.microbatches, what="minibatches x microbatches"
        )
        if rollout.ptx is not None and config.ptx_coefficient is None:
            raise ValueError(
                "rollout.ptx is given, but ptx_coefficient is None: set it, or leave the text out"
            )
        sample, metrics = targets(rollout, state.kl_coefficient, config=config, axis_name=axis_name)
        loss_now = _loss_of(state, rollout.reference, evaluate, config, is_policy, evaluate_ptx)

        def minibatch(carry: tuple[PyTree, PyTree], batch: Sample):
            params, opt_state, metrics = gradient_step(
                loss_now,
                optimizer,
                *carry,
                _balanced(batch, axis_name),
                microbatches=config.microbatches,
                axis_name=axis_name,
            )
            return (params, opt_state), metrics

        def epoch(carry, key):
            return jax.lax.scan(minibatch, carry, split_blocks(sample, config.minibatches, key))

        (params, opt_state), steps = jax.lax.scan(
            epoch, (state.params, state.opt_state), jax.random.split(key, config.epochs)
        )
        metrics |= _over_steps(steps)
        kl_coefficient = _next_kl_coefficient(state, metrics, config)
        return State(params, opt_state, kl_coefficient, state.step + 1), metrics

    return Algorithm(init, update)


def _check_config(config: Config, is_policy, evaluate_ptx) -> None:
    check_kl(config.kl_placement, config.kl_estimator)
    if config.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {config.epochs}")
    if config.critic_warmup < 0:
        raise ValueError(f"critic_warmup must be at least 0 updates, got {config.critic_warmup}")
    if config.critic_warmup and is_policy is None:
        raise ValueError(
            f"critic_warmup={config.critic_warmup} must know what to hold: give `make` is_policy, e.g. "
            'is_policy=lambda params: {"policy": True, "critic": False}, or set critic_warmup=0'
        )
    if config.ptx_coefficient is not None and evaluate_ptx is None:
        raise ValueError(
            "ptx_coefficient is set: give `make` evaluate_ptx, (params, inputs) -> logp of the text, "
            "or set ptx_coefficient=None"
        )
    # An array may be traced, and is taken as it comes.
    if isinstance(config.dual_clip, int | float) and config.dual_clip <= 1:
        raise ValueError(
            f"dual_clip={config.dual_clip} must be above 1, the ratio on policy (arXiv 1912.09729 uses 3); "
            "None turns it off"
        )


def _loss_of(state: State, reference: PyTree | None, evaluate, config: Config, is_policy, evaluate_ptx):
    """`loss(params, batch)` of this update: the coefficient as it stands, the reference closed over.

    What is closed over is not cut into minibatches. While the critic warms up, the policy's parameters are
    constants: whatever the loss is made of, their gradient is exactly zero.
    """
    config = dataclasses.replace(config, kl_coefficient=state.kl_coefficient)
    evaluate_now = (
        evaluate if reference is None else lambda params, inputs: evaluate(params, inputs, reference)
    )
    loss_now = partial(loss, evaluate=evaluate_now, config=config, evaluate_ptx=evaluate_ptx)
    if not config.critic_warmup:
        return loss_now
    warming_up = state.step < config.critic_warmup

    def hold(is_held: bool, params: PyTree) -> PyTree:
        if not is_held:
            return params
        return jax.tree.map(lambda p: jnp.where(warming_up, jax.lax.stop_gradient(p), p), params)

    def held_loss(params: PyTree, batch: Sample):
        return loss_now(jax.tree.map(hold, is_policy(params), params), batch)

    return held_loss


def _policy_held(optimizer, is_policy, steps: int) -> optax.GradientTransformation:
    """Two copies of the optimiser, each with a state of its own; the policy's begins after `steps` steps.

    A zero gradient alone would not hold the policy: weight decay moves it, and Adam's step count, which corrects the
    bias of its moments, would be that of moments which have seen nothing: the policy's first steps would be up to
    (1 - b1) / sqrt(1 - b2) = 3.2 times too long.
    """
    held = optax.conditionally_mask(optimizer, lambda step, **_: jnp.asarray(step) >= steps)

    def label(params: PyTree) -> PyTree:
        return jax.tree.map(lambda is_held: "policy" if is_held else "rest", is_policy(params))

    return optax.partition({"policy": held, "rest": optimizer}, label)


def _balanced(batch: Sample, axis_name: str | None) -> Sample:
    """The minibatch with its text's weights scaled to sum to its number of actions, over the global batch.

    One division by the number of actions then makes means of both losses, each over its own items, however the
    minibatch is cut into microbatches and over devices.
    """
    if batch.ptx is None:
        return batch
    sums = across(
        {"actions": jnp.sum(batch.mask, dtype=jnp.float32), "weight": jnp.sum(batch.ptx.weight)}, axis_name
    )
    scale = sums["actions"] / jnp.where(sums["weight"] == 0, 1.0, sums["weight"])
    return batch._replace(ptx=batch.ptx._replace(weight=scale * batch.ptx.weight))


def _over_steps(steps: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics [epochs, minibatches] of the gradient steps as one number each."""
    del steps["batch/count"]
    logp_gap = steps.pop("policy/logp_gap_max")[0, 0]
    ratio_max = jnp.max(steps.pop("policy/ratio_max"))
    averages = {name: jnp.mean(x) for name, x in steps.items()}
    return averages | {"policy/logp_gap": logp_gap, "policy/ratio_max": ratio_max}


def _next_kl_coefficient(state: State, metrics: dict[str, jax.Array], config: Config) -> jax.Array:
    """Moves the coefficient towards its target; while the policy is held, KL says nothing of the coefficient."""
    if config.kl_target is None:
        return state.kl_coefficient
    moved = adaptive_kl_coefficient(
        state.kl_coefficient,
        metrics["objective/kl"],
        target=config.kl_target,
        horizon=config.kl_horizon,
        steps=metrics["batch/sequences"],
    )
    moved = jnp.where(jnp.isfinite(moved), moved, state.kl_coefficient)
    if not config.critic_warmup:
        return moved
    return jnp.where(state.step < config.critic_warmup, state.kl_coefficient, moved)
