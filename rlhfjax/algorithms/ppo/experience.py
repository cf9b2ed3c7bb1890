"""From a rollout to what a gradient step learns from: penalised rewards, advantages, returns."""

from functools import partial

import jax
import jax.numpy as jnp

from rlhfjax.algorithms.algorithm import across, estimate_kl, means
from rlhfjax.algorithms.ppo.batch import Rollout, Sample, clean
from rlhfjax.config import PPO as Config
from rlhfjax.ops import explained_variance, gae, k1, masked_sum, whiten


def targets(
    rollout: Rollout, kl_coefficient: jax.Array, *, config: Config, axis_name: str | None = None
) -> tuple[Sample, dict[str, jax.Array]]:
    """Advantages and returns of a rollout, detached, and the metrics that do not depend on the update."""
    rollout, nonfinite = clean(rollout)
    mask = rollout.mask
    reward, reward_metrics = _penalised(rollout, kl_coefficient, config, axis_name)
    if config.whiten_rewards:
        reward = whiten(reward, mask, shift_mean=False, axis_name=axis_name)
    estimate = partial(
        gae,
        reward,
        rollout.value,
        discount=config.discount,
        mask=mask,
        next_value=rollout.next_value,
        terminated=rollout.terminated,
        truncated=rollout.truncated,
    )
    advantage, returns = estimate(lam=config.lam)
    if config.critic_lam is not None:
        _, returns = estimate(lam=config.critic_lam)

    metrics = _rollout_metrics(rollout, kl_coefficient, advantage, returns, axis_name) | reward_metrics
    metrics["reward/nonfinite"] = across({"nonfinite": nonfinite}, axis_name)["nonfinite"]
    if config.whiten_advantages:
        advantage = whiten(advantage, mask, axis_name=axis_name)
    if config.advantage_clip is not None:
        metrics["advantage/clip_fraction"] = _share(
            jnp.abs(advantage) > config.advantage_clip, mask, axis_name
        )
        advantage = jnp.clip(advantage, -config.advantage_clip, config.advantage_clip)
    sample = Sample(
        rollout.inputs,
        rollout.logp,
        rollout.value,
        advantage,
        returns,
        mask,
        logp_ref=rollout.logp_ref if config.kl_placement == "loss" else None,
        ptx=rollout.ptx,
    )
    return jax.lax.stop_gradient(sample), metrics


def _penalised(rollout: Rollout, kl_coefficient, config: Config, axis_name):
    """Reward of every action with the KL penalty, if that is its place, and metrics of what was done to it."""
    reward, mask, metrics = rollout.reward, rollout.mask, {}
    if config.reward_clip is not None:
        beyond = jnp.any(mask & (jnp.abs(reward) > config.reward_clip), axis=-1)
        metrics["reward/clip_fraction"] = _share(beyond, jnp.any(mask, axis=-1), axis_name)
        reward = jnp.clip(reward, -config.reward_clip, config.reward_clip)
    if config.kl_placement == "loss":
        return reward, metrics
    if config.kl_estimator == "exact" and rollout.kl is None:
        raise ValueError(
            'kl_estimator="exact" in the reward needs rollout.kl, the exact KL(policy || reference) at every '
            "action when it was taken: build the rollout with kl=evaluate(params, inputs, reference).kl"
        )
    kl = estimate_kl(config.kl_estimator, rollout.logp, rollout.logp_ref, rollout.kl)
    if config.kl_estimator != "k1":
        sums = {"kl": masked_sum(kl, mask), "count": jnp.sum(jnp.any(mask, axis=-1), dtype=jnp.float32)}
        metrics["objective/kl_estimate"] = means(across(sums, axis_name))["kl"]
    return reward - kl_coefficient * kl, metrics


def _share(flag: jax.Array, mask: jax.Array, axis_name: str | None) -> jax.Array:
    """Share of the places that count at which `flag` is True, over the global batch."""
    sums = {"share": masked_sum(flag, mask), "count": jnp.sum(mask, dtype=jnp.float32)}
    return means(across(sums, axis_name))["share"]


def _rollout_metrics(rollout, kl_coefficient, advantage, returns, axis_name) -> dict[str, jax.Array]:
    """Metrics of a cleaned rollout over the global batch."""
    mask, sum_all = rollout.mask, partial(jnp.sum, dtype=jnp.float32)
    sequences, actions = sum_all(jnp.any(mask, axis=-1)), sum_all(mask)
    per_sequence = {
        "objective/reward": sum_all(rollout.reward),
        "objective/kl": sum_all(k1(rollout.logp, rollout.logp_ref)),
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
