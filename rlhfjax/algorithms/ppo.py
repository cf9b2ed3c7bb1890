"""Proximal policy optimisation (arXiv 1707.06347) with a KL penalty in the reward (arXiv 1909.08593).

One update, from a rollout made with the present parameters:

  1. reward[t] - kl_coefficient * (logp[t] - logp_ref[t]) is the reward to maximise      `targets`
  2. generalised advantage estimation; advantages whitened over the global batch         `targets`
  3. epochs x minibatches gradient steps on the clipped losses                           `loss`, `update`
  4. on request, the KL coefficient moves towards its target                             `update`

The optimum of 1. is pi(y|x) = pi_ref(y|x) exp(reward(x, y) / kl_coefficient) / Z(x).

Metrics (float32 scalars; "sequence" = a row along the last axis with at least one action that counts):

    objective/reward            per sequence, as given
    objective/kl                per sequence, nats: sum of k1 = logp - logp_ref over its actions
    objective/kl_penalty        per sequence: kl_coefficient * objective/kl
    objective/return            per sequence: reward - penalty
    objective/kl_coefficient    used in this update
    reward/nonfinite            sequences with a NaN or infinite reward, masked out of everything
    batch/sequences             that count
    batch/actions               that count
    advantage/mean, advantage/std    per action, before whitening
    value/mean                  per action, at the rollout
    value/explained_variance    1 - Var[returns - value] / Var[returns], at the rollout
    value/clip_fraction         share of actions whose value gets no gradient
    loss/total, loss/policy, loss/value    per action
    policy/entropy              per action, nats
    policy/approximate_kl       KL(behaviour || trained) per action, nats, by k3
    policy/ratio_mean, policy/ratio_max    probability ratio trained / behaviour, 1 on policy
    policy/clip_fraction        share of actions whose logp gets no gradient
    policy/logp_gap             largest |logp - rollout.logp| before the first step: only rounding, where
                                rollout and update evaluate the same function
    optimizer/gradient_norm     before clipping

Loss, policy, gradient metrics and value/clip_fraction are means over the gradient steps (ratio_max: largest).

Shapes: B rows of the batch, T actions in time; between them any axes, e.g. [B prompts, G samples, T].
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.algorithms.algorithm import (
    Algorithm,
    PyTree,
    Sums,
    across,
    check_divisible,
    gradient_step,
    means,
    split_blocks,
)
from rlhfjax.config import PPO as Config
from rlhfjax.ops import (
    adaptive_kl_coefficient,
    clipped_surrogate,
    clipped_value_loss,
    explained_variance,
    gae,
    k1,
    k3,
    masked_sum,
    whiten,
)


class Rollout(NamedTuple):
    """What the policy did, all [B, ..., T] unless said otherwise. Masked places may hold anything, also NaN.

    For text, position t speaks of token t + 1, and the end-of-sequence token is an action like any other.
    """

    inputs: PyTree  # what `evaluate` needs; leading axis B
    logp: jax.Array  # float, log-probability of the action when it was taken
    logp_ref: jax.Array  # float, under the reference policy
    value: jax.Array  # float, V(s_t) when it was taken
    reward: jax.Array  # float (an integer is cast), without the KL penalty
    mask: jax.Array  # bool, True where an action was taken
    next_value: jax.Array | None = None  # float, V(s_{t+1}); None: the next value, 0 after the last action
    terminated: jax.Array | None = None  # bool, no reward can follow
    truncated: jax.Array | None = None  # bool, cut off: bootstraps from next_value


class Sample(NamedTuple):
    """What a gradient step learns from, all [B, ..., T]; zeros where masked."""

    inputs: PyTree
    logp: jax.Array  # behaviour
    value: jax.Array  # at the rollout
    advantage: jax.Array
    returns: jax.Array  # target of the value
    mask: jax.Array


class State(NamedTuple):
    """All that a run needs to go on."""

    params: PyTree
    opt_state: PyTree
    kl_coefficient: jax.Array  # float32 [], reward per nat
    step: jax.Array  # int32 [], updates made


# (params, inputs) -> (logp, entropy, value), each shaped as the actions
Evaluate = Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array, jax.Array]]


def loss(params: PyTree, batch: Sample, *, evaluate: Evaluate, config: Config) -> tuple[jax.Array, Sums]:
    """Summed clipped losses (arXiv 1707.06347 eq. 7 and 9) over the actions that count, and metric sums."""
    logp, entropy, value = evaluate(params, batch.inputs)
    for name, x in (("logp", logp), ("entropy", entropy), ("value", value)):
        if x.shape != batch.mask.shape:
            raise ValueError(
                f"evaluate gave {name} of shape {x.shape}; the actions have shape {batch.mask.shape}"
            )
    # Replaced before any arithmetic: a NaN times the zero gradient of a masked action would be NaN.
    logp, entropy, value = (jnp.where(batch.mask, x.astype(jnp.float32), 0.0) for x in (logp, entropy, value))

    policy_loss, policy_clipped = clipped_surrogate(
        logp, batch.logp, batch.advantage, clip_low=config.clip_low, clip_high=config.clip_high
    )
    value_loss, value_clipped = clipped_value_loss(value, batch.value, batch.returns, clip=config.value_clip)
    total = policy_loss + config.value_coefficient * value_loss
    if config.entropy_coefficient is not None:
        total = total - config.entropy_coefficient * entropy

    logp, entropy = jax.lax.stop_gradient((logp, entropy))
    ratio = jnp.exp(logp - batch.logp)
    per_action = {
        "loss/total": total,
        "loss/policy": policy_loss,
        "loss/value": value_loss,
        "policy/entropy": entropy,
        "policy/approximate_kl": k3(batch.logp, logp),
        "policy/ratio_mean": ratio,
        "policy/clip_fraction": policy_clipped,
        "value/clip_fraction": value_clipped,
    }
    sums = {name: masked_sum(x, batch.mask) for name, x in per_action.items()}
    sums["policy/ratio_max"] = jnp.max(jnp.where(batch.mask, ratio, 0.0))
    sums["policy/logp_gap_max"] = jnp.max(jnp.abs(logp - batch.logp))
    return sums["loss/total"], sums | {"count": jnp.sum(batch.mask, dtype=jnp.float32)}


def targets(
    rollout: Rollout, kl_coefficient: jax.Array, *, config: Config, axis_name: str | None = None
) -> tuple[Sample, dict[str, jax.Array]]:
    """Advantages and returns of a rollout, detached, and the metrics that do not depend on the update."""
    rollout, nonfinite = _clean(rollout)
    mask = rollout.mask
    kl = k1(rollout.logp, rollout.logp_ref)
    reward = rollout.reward - kl_coefficient * kl
    if config.whiten_rewards:
        reward = whiten(reward, mask, shift_mean=False, axis_name=axis_name)
    advantage, returns = gae(
        reward,
        rollout.value,
        discount=config.discount,
        lam=config.lam,
        mask=mask,
        next_value=rollout.next_value,
        terminated=rollout.terminated,
        truncated=rollout.truncated,
    )

    metrics = _rollout_metrics(rollout, kl, kl_coefficient, advantage, returns, axis_name)
    metrics["reward/nonfinite"] = across({"nonfinite": nonfinite}, axis_name)["nonfinite"]
    if config.whiten_advantages:
        advantage = whiten(advantage, mask, axis_name=axis_name)
    sample = Sample(rollout.inputs, rollout.logp, rollout.value, advantage, returns, mask)
    return jax.lax.stop_gradient(sample), metrics


def make(
    evaluate: Evaluate,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: str | None = None,
) -> Algorithm:
    """PPO as `Algorithm(init, update)` on `Rollout`; see the module for the metrics.

    Raises ValueError where epochs is less than 1, and when tracing where the batch is not divisible by
    minibatches x microbatches.
    """
    if config.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {config.epochs}")

    def init(params: PyTree) -> State:
        kl_coefficient = jnp.asarray(config.kl_coefficient, jnp.float32)
        return State(params, optimizer.init(params), kl_coefficient, jnp.zeros((), jnp.int32))

    def minibatch(carry: tuple[PyTree, PyTree], batch: Sample):
        params, opt_state = carry
        params, opt_state, metrics = gradient_step(
            partial(loss, evaluate=evaluate, config=config),
            optimizer,
            params,
            opt_state,
            batch,
            microbatches=config.microbatches,
            axis_name=axis_name,
        )
        return (params, opt_state), metrics

    def update(state: State, rollout: Rollout, key: jax.Array):
        check_divisible(
            rollout.mask.shape[0], config.minibatches * config.microbatches, what="minibatches x microbatches"
        )
        sample, metrics = targets(rollout, state.kl_coefficient, config=config, axis_name=axis_name)

        def epoch(carry, key):
            return jax.lax.scan(minibatch, carry, split_blocks(sample, config.minibatches, key))

        (params, opt_state), steps = jax.lax.scan(
            epoch, (state.params, state.opt_state), jax.random.split(key, config.epochs)
        )
        metrics |= _over_steps(steps)
        kl_coefficient = state.kl_coefficient
        if config.kl_target is not None:
            kl_coefficient = adaptive_kl_coefficient(
                kl_coefficient,
                metrics["objective/kl"],
                target=config.kl_target,
                horizon=config.kl_horizon,
                steps=metrics["batch/sequences"],
            )
        return State(params, opt_state, kl_coefficient, state.step + 1), metrics

    return Algorithm(init, update)


def _rollout_metrics(rollout, kl, kl_coefficient, advantage, returns, axis_name) -> dict[str, jax.Array]:
    """Metrics of a cleaned rollout over the global batch."""
    mask, sum_all = rollout.mask, partial(jnp.sum, dtype=jnp.float32)
    sequences, actions = sum_all(jnp.any(mask, axis=-1)), sum_all(mask)
    per_sequence = {
        "objective/reward": sum_all(rollout.reward),
        "objective/kl": sum_all(kl),
        "count": sequences,
    }
    per_action = {
        "advantage/mean": sum_all(advantage),
        "value/mean": sum_all(rollout.value),
        "count": actions,
    }
    metrics = means(across(per_sequence, axis_name)) | means(across(per_action, axis_name))
    deviation = masked_sum(jnp.square(advantage - metrics["advantage/mean"]), mask)
    variance = means(across({"variance": deviation, "count": actions}, axis_name))["variance"]
    penalty = kl_coefficient * metrics["objective/kl"]
    metrics |= across({"batch/sequences": sequences, "batch/actions": actions}, axis_name)
    return metrics | {
        "objective/kl_penalty": penalty,
        "objective/return": metrics["objective/reward"] - penalty,
        "objective/kl_coefficient": kl_coefficient,
        "advantage/std": jnp.sqrt(variance),
        "value/explained_variance": explained_variance(rollout.value, returns, mask, axis_name=axis_name),
    }


def _over_steps(steps: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics [epochs, minibatches] of the gradient steps as one number each."""
    del steps["batch/count"]
    logp_gap = steps.pop("policy/logp_gap_max")[0, 0]
    ratio_max = jnp.max(steps.pop("policy/ratio_max"))
    averages = {name: jnp.mean(x) for name, x in steps.items()}
    return averages | {"policy/logp_gap": logp_gap, "policy/ratio_max": ratio_max}


def _check(rollout: Rollout) -> None:
    """Raises ValueError or TypeError that names the field of the rollout that does not fit."""
    shape = rollout.mask.shape
    for name, x in rollout._asdict().items():
        if name == "inputs" or x is None:
            continue
        if x.shape != shape:
            raise ValueError(
                f"rollout.{name} has shape {x.shape}, but rollout.mask {shape}; they must be equal"
            )
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        if name in ("mask", "terminated", "truncated") and is_float:
            raise TypeError(f"rollout.{name} must be bool, got {x.dtype}: pass rollout.{name} > 0")
        if name in ("logp", "logp_ref", "value", "next_value") and not is_float:
            raise TypeError(f"rollout.{name} must be float, got {x.dtype}: build it as float32")


def _clean(rollout: Rollout) -> tuple[Rollout, jax.Array]:
    """The rollout in float32 with zeros where masked, and how many sequences had to go (float32).

    A sequence with a NaN or infinite reward is masked whole: nothing is ever learnt from it.
    """
    _check(rollout)
    mask = rollout.mask.astype(bool)
    bad = jnp.any(mask & ~jnp.isfinite(rollout.reward), axis=-1, keepdims=True)
    mask = mask & ~bad
    floats = {name: getattr(rollout, name) for name in ("logp", "logp_ref", "value", "reward", "next_value")}
    zeroed = {
        name: jnp.where(mask, x.astype(jnp.float32), 0.0) for name, x in floats.items() if x is not None
    }
    return rollout._replace(**zeroed, mask=mask), jnp.sum(bad, dtype=jnp.float32)
