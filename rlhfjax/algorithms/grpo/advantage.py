"""From the rewards of a rollout to the advantage of every action.

Shapes: B prompts, G samples of each, R rewards of a sample, T actions in time.
"""

from functools import partial

import jax
import jax.numpy as jnp

from rlhfjax.algorithms.algorithm import across, estimate_kl, means
from rlhfjax.algorithms.grpo.batch import Rollout, Sample, clean
from rlhfjax.config import GRPO as Config
from rlhfjax.ops import (
    all_equal,
    batch_mean,
    batch_std,
    discounted_returns,
    divide_by_std,
    group_mean_baseline,
    group_std,
    k1,
    leave_one_out_baseline,
    masked_sum,
    whiten,
)


def targets(
    rollout: Rollout,
    moving_baseline: jax.Array,
    *,
    config: Config,
    axis_name: str | None = None,
) -> tuple[Sample, jax.Array, dict[str, jax.Array]]:
    """Advantages of a rollout, detached; the batch's mean reward; metrics that do not depend on the update.

    Args:
      moving_baseline: float32 scalar, the baseline where it is "moving".
    """
    rollout, baseline_BR, nonfinite = clean(rollout, config)
    sample_BG, rewards = jnp.any(rollout.mask, axis=-1), rollout.reward.shape[-1]
    weight_R11 = _reward_weights(config, rewards)
    reward_BG = jnp.sum(jnp.moveaxis(rollout.reward, -1, 0) * weight_R11, axis=0)
    # What is judged: each reward apart, or their weighted sum as one.
    judged_RBG, given_RB1 = jnp.moveaxis(rollout.reward, -1, 0), jnp.swapaxes(baseline_BR, 0, 1)[..., None]
    if not config.separate_rewards:
        judged_RBG, given_RB1 = reward_BG[None], jnp.sum(given_RB1 * weight_R11, axis=0, keepdims=True)
        weight_R11 = jnp.ones((1, 1, 1))

    equal_B = jnp.all(all_equal(judged_RBG, jnp.broadcast_to(sample_BG[None], judged_RBG.shape)), axis=0)
    equal_groups = batch_mean(equal_B.astype(jnp.float32), jnp.any(sample_BG, axis=-1), axis_name=axis_name)
    if config.drop_equal_groups:
        sample_BG = sample_BG & ~equal_B[:, None]
        rollout = rollout._replace(mask=rollout.mask & sample_BG[..., None])

    penalty_BGT = _penalty(rollout, config)
    if config.kl_placement == "score":
        judged_RBG = judged_RBG - jnp.sum(penalty_BGT, axis=-1)[None]
    compare = partial(
        _compare, moving=moving_baseline, sample_BG=sample_BG, config=config, axis_name=axis_name
    )
    advantage_RBG = jnp.stack([compare(*x) for x in zip(judged_RBG, given_RB1, strict=True)])
    advantage_BG = jnp.sum(weight_R11 * advantage_RBG, axis=0)
    if config.whiten == "samples":
        advantage_BG = whiten(advantage_BG, sample_BG, axis_name=axis_name)
    advantage_BGT = jnp.where(rollout.mask, advantage_BG[..., None], 0.0)
    if config.kl_placement == "reward":
        advantage_BGT = advantage_BGT - discounted_returns(penalty_BGT, discount=1.0, mask=rollout.mask)
    if config.whiten == "actions":
        advantage_BGT = whiten(advantage_BGT, rollout.mask, axis_name=axis_name)

    mean_reward = batch_mean(jnp.sum(judged_RBG, axis=0), sample_BG, axis_name=axis_name)
    metrics = _rollout_metrics(rollout, reward_BG, penalty_BGT, advantage_BGT, config, axis_name)
    metrics |= across({"reward/nonfinite": nonfinite}, axis_name) | {"group/equal_rewards": equal_groups}
    logp_ref = None if rollout.logp_ref is None else jnp.where(rollout.mask, rollout.logp_ref, 0.0)
    sample = Sample(
        rollout.inputs, jnp.where(rollout.mask, rollout.logp, 0.0), logp_ref, advantage_BGT, rollout.mask
    )
    return jax.lax.stop_gradient(sample), mean_reward, metrics


def _compare(
    reward_BG: jax.Array,
    given_B1: jax.Array,
    *,
    moving: jax.Array,
    sample_BG: jax.Array,
    config: Config,
    axis_name: str | None,
) -> jax.Array:
    """One reward less its baseline, scaled: [B, G], 0 where masked."""
    baseline = {
        "group_mean": lambda: group_mean_baseline(reward_BG, sample_BG),
        "leave_one_out": lambda: leave_one_out_baseline(reward_BG, sample_BG),
        "batch_mean": lambda: batch_mean(reward_BG, sample_BG, axis_name=axis_name),
        "moving": lambda: moving,
        "given": lambda: jnp.broadcast_to(given_B1, reward_BG.shape),
        "none": lambda: 0.0,
    }[config.baseline]()
    advantage_BG = jnp.where(sample_BG, reward_BG - baseline, 0.0)
    if config.scale == "none":
        return advantage_BG
    if config.scale == "group_std":
        std = jnp.broadcast_to(group_std(reward_BG, sample_BG)[:, None], reward_BG.shape)
    else:
        std = batch_std(reward_BG, sample_BG, axis_name=axis_name)
    return divide_by_std(advantage_BG, std, epsilon=config.epsilon)


def _reward_weights(config: Config, rewards: int) -> jax.Array:
    """[R, 1, 1]; ValueError where the config names another number of rewards than the batch holds."""
    weights = config.reward_weights or (1.0,) * rewards
    if len(weights) != rewards:
        raise ValueError(
            f"reward_weights has {len(weights)} entries, but the batch {rewards} rewards a sample"
        )
    return jnp.stack([jnp.asarray(x, jnp.float32) for x in weights])[:, None, None]


def _penalty(rollout: Rollout, config: Config) -> jax.Array:
    """What each action's reward loses to the KL, [B, G, T]; zeros where it loses nothing."""
    if config.kl_coefficient is None or config.kl_placement == "loss":
        return jnp.zeros_like(rollout.logp)
    kl_BGT = estimate_kl(config.kl_estimator, rollout.logp, rollout.logp_ref, rollout.kl)
    return jnp.where(rollout.mask, config.kl_coefficient * kl_BGT, 0.0)


def _rollout_metrics(
    rollout: Rollout,
    reward_BG: jax.Array,
    penalty_BGT: jax.Array,
    advantage_BGT: jax.Array,
    config: Config,
    axis_name: str | None,
) -> dict[str, jax.Array]:
    """Metrics of a cleaned rollout over the global batch."""
    mask, sample_BG = rollout.mask, jnp.any(rollout.mask, axis=-1)
    per_sequence = {"objective/reward": masked_sum(reward_BG, sample_BG)}
    if rollout.reward.shape[-1] > 1:
        per_sequence |= {
            f"reward/{i}": masked_sum(rollout.reward[..., i], sample_BG)
            for i in range(rollout.reward.shape[-1])
        }
    if rollout.logp_ref is not None:
        per_sequence["objective/kl"] = masked_sum(k1(rollout.logp, rollout.logp_ref), mask)
    if config.kl_placement != "loss":
        per_sequence["objective/kl_penalty"] = jnp.sum(penalty_BGT)
    counts = {
        "batch/sequences": jnp.sum(sample_BG, dtype=jnp.float32),
        "batch/actions": jnp.sum(mask, dtype=jnp.float32),
    }
    metrics = means(across(per_sequence | {"count": counts["batch/sequences"]}, axis_name))
    if config.kl_placement != "loss":
        metrics["objective/return"] = metrics["objective/reward"] - metrics["objective/kl_penalty"]
    mean = batch_mean(advantage_BGT, mask, axis_name=axis_name)
    variance = batch_mean(jnp.square(advantage_BGT - mean), mask, axis_name=axis_name)
    metrics |= {"advantage/mean": mean, "advantage/std": jnp.sqrt(variance)}
    return metrics | across(counts, axis_name)
