"""What PPO learns from: the rollout as it comes in, and the sample that a gradient step sees."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.algorithms.algorithm import PyTree


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
    kl: jax.Array | None = None  # float, exact KL(policy || reference) at s_t; for "exact" in the reward
    reference: PyTree | None = (
        None  # shared by all rows, given to `evaluate` as a third argument; no leading axis
    )
    ptx: PyTree | None = None  # `sft.Batch` of pretraining text, leading axis B; for `ptx_coefficient`


class Sample(NamedTuple):
    """What a gradient step learns from, all [B, ..., T]; zeros where masked."""

    inputs: PyTree
    logp: jax.Array  # behaviour
    value: jax.Array  # at the rollout
    advantage: jax.Array
    returns: jax.Array  # target of the value
    mask: jax.Array
    logp_ref: jax.Array | None = None  # reference policy; for k2 and k3 in the loss
    ptx: PyTree | None = None  # `sft.Batch`; in a gradient step its weights sum to the number of actions


_FLOATS = ("logp", "logp_ref", "value", "next_value", "kl")
_FLAGS = ("mask", "terminated", "truncated")


def check(rollout: Rollout) -> None:
    """Raises ValueError or TypeError that names the field of the rollout that does not fit."""
    shape = rollout.mask.shape
    for name in (*_FLOATS, "reward", *_FLAGS):
        x = getattr(rollout, name)
        if x is None:
            continue
        if x.shape != shape:
            raise ValueError(
                f"rollout.{name} has shape {x.shape}, but rollout.mask {shape}; they must be equal"
            )
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        if name in _FLAGS and is_float:
            raise TypeError(f"rollout.{name} must be bool, got {x.dtype}: pass rollout.{name} > 0")
        if name in _FLOATS and not is_float:
            raise TypeError(f"rollout.{name} must be float, got {x.dtype}: build it as float32")
    if rollout.ptx is not None and rollout.ptx.weight.shape[:1] != shape[:1]:
        raise ValueError(
            f"rollout.ptx.weight has shape {rollout.ptx.weight.shape}; its leading axis must be that of the "
            f"rollout, {shape[0]}, so that both are cut into the same minibatches (several texts to a row: "
            f"[{shape[0]}, R, T])"
        )


def clean(rollout: Rollout) -> tuple[Rollout, jax.Array]:
    """The rollout in float32 with zeros where masked, and how many sequences had to go (float32).

    A sequence with a NaN or infinite reward is masked whole: nothing is ever learnt from it.
    """
    check(rollout)
    mask = rollout.mask.astype(bool)
    bad = jnp.any(mask & ~jnp.isfinite(rollout.reward), axis=-1, keepdims=True)
    mask = mask & ~bad
    floats = {name: getattr(rollout, name) for name in (*_FLOATS, "reward")}
    zeroed = {
        name: jnp.where(mask, x.astype(jnp.float32), 0.0) for name, x in floats.items() if x is not None
    }
    return rollout._replace(**zeroed, mask=mask), jnp.sum(bad, dtype=jnp.float32)
