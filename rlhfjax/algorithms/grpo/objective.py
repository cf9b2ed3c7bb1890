"""The loss: ratio, clip, KL and aggregation.

Shapes: B prompts, G samples of each, R rewards of a sample, T actions in time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax.algorithms.algorithm import Evaluation, PyTree, Sums, estimate_kl
from rlhfjax.algorithms.grpo.batch import Sample
from rlhfjax.config import GRPO as Config
from rlhfjax.ops import clipped_surrogate, k3, masked_mean, masked_sum
from rlhfjax.ops.kl import LOG_RATIO_BOUND

# (params, inputs) or (params, inputs, reference) -> Evaluation or (logp, entropy), shaped as the actions
Evaluate = Callable[..., tuple[Any, ...]]


def loss(params: PyTree, batch: Sample, *, evaluate: Evaluate, config: Config) -> tuple[jax.Array, Sums]:
    """Summed loss over what is averaged (actions, or sequences), and metric sums.

    The sums under "policy/" are over actions; times count / sums["actions"] they are means of actions.
    """
    mask = batch.mask
    logp, entropy, _, exact = Evaluation(*evaluate(params, batch.inputs))
    logp, entropy = _at_actions("logp", logp, mask), _at_actions("entropy", entropy, mask)
    exact = None if exact is None else _at_actions("kl", exact, mask)
    policy_loss, clipped, ratio = _policy_loss(logp, batch, config)
    terms, total = {"loss/policy": policy_loss}, policy_loss
    if config.kl_coefficient is not None and config.kl_placement == "loss":
        terms["loss/kl"] = estimate_kl(config.kl_estimator, logp, batch.logp_ref, exact)
        total = total + config.kl_coefficient * terms["loss/kl"]
    if config.entropy_coefficient is not None:
        total = total - config.entropy_coefficient * entropy

    weight, count = _weights(mask, config)
    sums = {name: jnp.sum(weight * x) for name, x in (terms | {"loss/total": total}).items()}
    per_action = jax.lax.stop_gradient(
        {
            "policy/entropy": entropy,
            "policy/approximate_kl": k3(batch.logp, logp),
            "policy/ratio_mean": ratio,
            "policy/clip_fraction": clipped,
        }
    )
    sums |= {name: masked_sum(x, mask) for name, x in per_action.items()}
    sums["policy/ratio_max"] = jnp.max(jnp.where(mask, per_action["policy/ratio_mean"], 0.0))
    sums["policy/logp_gap_max"] = jnp.max(jnp.abs(jax.lax.stop_gradient(logp) - batch.logp))
    return sums["loss/total"], sums | {"count": count, "actions": jnp.sum(mask, dtype=jnp.float32)}


def _at_actions(name: str, x: jax.Array, mask: jax.Array) -> jax.Array:
    """In float32, zeros where masked: a NaN times the zero gradient of a masked action would be NaN."""
    if x.shape != mask.shape:
        raise ValueError(f"evaluate gave {name} of shape {x.shape}; the actions have shape {mask.shape}")
    return jnp.where(mask, x.astype(jnp.float32), 0.0)


def _policy_loss(logp: jax.Array, batch: Sample, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss of each action by ratio and clip; where the ratio is bounded; the ratio."""
    log_ratio = logp - batch.logp
    if config.ratio != "token":
        mean = masked_mean(log_ratio, batch.mask, axis=-1)[..., None]
        mean = jnp.broadcast_to(mean, log_ratio.shape)
        if config.ratio == "sequence_token":  # the sequence's value, the token's own gradient
            mean = jax.lax.stop_gradient(mean) + logp - jax.lax.stop_gradient(logp)
        log_ratio = jnp.where(batch.mask, mean, 0.0)
    if config.clip == "surrogate":
        policy_loss, clipped = clipped_surrogate(
            log_ratio,
            jnp.zeros_like(log_ratio),
            batch.advantage,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
        )
        return policy_loss, clipped, jnp.exp(log_ratio)
    # Clamped as the surrogate's: one impossible action gives a large number and not infinity.
    ratio = jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    if config.clip == "none":
        return -ratio * batch.advantage, jnp.zeros_like(batch.mask), ratio
    bounded = jax.lax.stop_gradient(jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high))
    return -bounded * batch.advantage * logp, ratio != bounded, ratio


def _weights(mask: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Weight of every action in the summed loss, and the count that divides the sum."""
    weight = mask.astype(jnp.float32)
    if config.aggregation == "token":
        return weight, jnp.sum(weight)
    length = jnp.sum(weight, axis=-1, keepdims=True)
    divisor = jnp.maximum(length, 1.0)  # of each sequence
    if config.aggregation == "constant":
        if config.length_constant is None:
            raise ValueError(
                'aggregation="constant" needs length_constant, e.g. the most actions of a sequence'
            )
        divisor = jnp.full_like(length, config.length_constant)
    return weight / divisor, jnp.sum(length > 0, dtype=jnp.float32)
