"""What the critic-free methods learn from, and its checks.

Shapes: B prompts, G samples of each, R rewards of a sample, T actions in time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.algorithms.algorithm import PyTree
from rlhfjax.config import GRPO as Config


class Rollout(NamedTuple):
    """What the policy did. Masked places may hold anything, also NaN.

    For text, position t speaks of token t + 1, and the end-of-sequence token is an action like any other. A
    sample without any action that counts does not exist: no baseline or mean knows of it.
    """

    inputs: PyTree  # what `evaluate` needs; leading axis B
    logp: jax.Array  # float [B, G, T], log-probability of the action when it was taken
    logp_ref: jax.Array | None  # float [B, G, T], under the reference policy; None: not needed, not known
    reward: jax.Array  # float (an integer is cast) [B, G], or [B, G, R] for R rewards, without the KL
    mask: jax.Array  # bool [B, G, T], True where an action was taken
    baseline: jax.Array | None = None  # float [B] or [B, R]: for baseline "given"
    reference: PyTree | None = None  # parameters of the reference, handed to `evaluate` as third argument
    kl: jax.Array | None = (
        None  # float [B, G, T], exact KL(policy || reference) at s_t; for "exact" off the reward
    )


class Sample(NamedTuple):
    """What a gradient step learns from, all [B, G, T]; zeros where masked."""

    inputs: PyTree
    logp: jax.Array  # behaviour
    logp_ref: jax.Array | None
    advantage: jax.Array
    mask: jax.Array


def clean(rollout: Rollout, config: Config) -> tuple[Rollout, jax.Array, jax.Array]:
    """The rollout in float32 with zeros where masked and reward [B, G, R]; the given baseline [B, R]; how many samples
    had to go (float32).

    A sample with a NaN or infinite reward or baseline is masked whole: nothing is ever learnt from it.
    """
    _check(rollout, config)
    mask_BGT = rollout.mask.astype(bool)
    reward = rollout.reward.astype(jnp.float32)
    reward_BGR = reward if reward.ndim == 3 else reward[..., None]
    finite_BG = jnp.all(jnp.isfinite(reward_BGR), axis=-1)
    baseline_BR = jnp.zeros_like(reward_BGR, shape=(reward_BGR.shape[0], reward_BGR.shape[-1]))
    if rollout.baseline is not None and config.baseline == "given":
        baseline_BR = rollout.baseline.astype(jnp.float32).reshape(baseline_BR.shape)
        known_B1 = jnp.all(jnp.isfinite(baseline_BR), axis=-1, keepdims=True)
        finite_BG, baseline_BR = finite_BG & known_B1, jnp.where(known_B1, baseline_BR, 0.0)
    nonfinite = jnp.sum(jnp.any(mask_BGT, axis=-1) & ~finite_BG, dtype=jnp.float32)
    mask_BGT = mask_BGT & finite_BG[..., None]
    reward_BGR = jnp.where(jnp.any(mask_BGT, axis=-1, keepdims=True), reward_BGR, 0.0)
    per_action = {
        name: jnp.where(mask_BGT, getattr(rollout, name).astype(jnp.float32), 0.0)
        for name in ("logp", "logp_ref", "kl")
        if getattr(rollout, name) is not None
    }
    rollout = rollout._replace(reward=reward_BGR, mask=mask_BGT, **per_action)
    return rollout, baseline_BR, nonfinite


def _check(rollout: Rollout, config: Config) -> None:
    """Raises ValueError or TypeError that names the field of the rollout that does not fit."""
    shape = rollout.mask.shape
    if len(shape) != 3:
        raise ValueError(f"rollout.mask must be [B prompts, G samples, T], got shape {shape}")
    if jnp.issubdtype(rollout.mask.dtype, jnp.floating):
        raise TypeError(f"rollout.mask must be bool, got {rollout.mask.dtype}: pass rollout.mask > 0")
    for name in ("logp", "logp_ref", "kl"):
        x = getattr(rollout, name)
        if x is None:
            continue
        if x.shape != shape:
            raise ValueError(
                f"rollout.{name} has shape {x.shape}, but rollout.mask {shape}; they must be equal"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"rollout.{name} must be float, got {x.dtype}: build it as float32")
    reward = rollout.reward.shape
    if reward[:2] != shape[:2] or len(reward) > 3:
        raise ValueError(f"rollout.reward must be [B, G] = {shape[:2]} or [B, G, R], got {reward}")
    baseline = rollout.baseline
    if baseline is None and config.baseline == "given":
        raise ValueError('baseline="given" needs rollout.baseline, e.g. the reward of a greedy completion')
    if baseline is not None and baseline.shape != (shape[0], *reward[2:]):
        raise ValueError(
            f"rollout.baseline must be {(shape[0], *reward[2:])}, one a prompt and reward, got {baseline.shape}"
        )
    compares = config.baseline in ("group_mean", "leave_one_out") or config.scale == "group_std"
    if compares and shape[1] < 2:
        raise ValueError(
            f'a group of one sample has nothing to be compared with under baseline="{config.baseline}", '
            f'scale="{config.scale}"; draw at least 2 samples of each prompt, or choose baseline "batch_mean", '
            f'"moving", "given" or "none" and scale "batch_std" or "none"'
        )
