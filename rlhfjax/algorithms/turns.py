"""Episodes in which agent and environment take turns: what the value-based algorithms on text learn from.

In a row of tokens some were chosen by the agent, the others were said by its environment. The next state of an
action is the state in which the agent chooses its next token: past the environment's reply, not at its first word.
`at_next_action` finds it by one scan over the row, linear in time and memory.

Shapes: B episodes, T positions in time; position t speaks of token t + 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.algorithms.algorithm import PyTree
from rlhfjax.ops import end_of_sequence_reward, value_at_next


class Episodes(NamedTuple):
    """One episode a row, all [B, ..., T] unless said otherwise. Masked places may hold anything, also NaN."""

    inputs: PyTree  # what `evaluate` needs; leading axis B
    reward: jax.Array  # float, reward of the action: all that is earned before the next one
    mask: jax.Array  # bool, True where the agent chose the token
    truncated: jax.Array | None = None  # bool [B, ...], the episode was cut short; None: none was


def at_next_action(x: jax.Array, mask: jax.Array, final: jax.Array | None = None) -> jax.Array:
    """What `x` is at the agent's next action: float [..., T], 0 where masked out.

    Args:
      x: float [..., T], e.g. the value of the state in which an action is chosen.
      mask: bool [..., T], True at actions; other places of x are not read.
      final: float [...], what follows the last action; None: 0, the episode ends there.

    Gradients flow through x and final.
    """
    following = value_at_next(x, mask)
    if final is None:
        return following
    return following + end_of_sequence_reward(final, mask, finished=jnp.ones(final.shape, bool))


def clean(reward: jax.Array, mask: jax.Array, truncated: jax.Array | None = None):
    """`(reward, mask, nonfinite)`: zeros where masked, and which episodes [B, ...] are left out.

    An episode with a reward that is NaN or infinite is left out whole. Raises TypeError where the reward is no float
    or the mask no bool, ValueError where shapes differ.
    """
    if not jnp.issubdtype(reward.dtype, jnp.floating):
        raise TypeError(f"batch.reward must be float, got {reward.dtype}: cast it to float32")
    if mask.dtype != bool or (truncated is not None and truncated.dtype != bool):
        raise TypeError(
            "batch.mask and batch.truncated must be bool: True where an action counts, was cut short"
        )
    if reward.ndim < 2 or mask.shape != reward.shape:
        raise ValueError(
            f"batch.reward {reward.shape} and batch.mask {mask.shape} must have one shape [B, ..., T]"
        )
    if truncated is not None and truncated.shape != reward.shape[:-1]:
        raise ValueError(
            f"batch.truncated {truncated.shape} must be one flag an episode, {reward.shape[:-1]}"
        )
    nonfinite = jnp.any(mask & ~jnp.isfinite(reward), axis=-1)
    mask = mask & ~nonfinite[..., None]
    return jnp.where(mask, _wide(reward), 0.0), mask, nonfinite


def at_actions(
    name: str,
    x: jax.Array | None,
    mask: jax.Array,
    why: str,
    *,
    heads: bool = False,
    source: str = "evaluate",
) -> jax.Array:
    """`x`, shaped as the actions or with `heads` [heads, *actions], in float32 or wider, zeros where masked out.

    Raises ValueError where x is None, saying `why` it is needed, or has another shape; `source` is who gave it.
    """
    if x is None:
        raise ValueError(f"{source} gave no {name}: {why}")
    if x.shape[int(heads) :] != mask.shape or x.ndim != mask.ndim + heads:
        wanted = f"it must be [heads, *{mask.shape}]" if heads else f"the actions have shape {mask.shape}"
        raise ValueError(f"{source} gave {name} of shape {x.shape}; {wanted}")
    # Replaced before any arithmetic: a NaN times the zero gradient of a masked action would be NaN.
    return jnp.where(jnp.broadcast_to(mask, x.shape), _wide(x), 0.0)


def after_the_last(final: jax.Array | None, truncated: jax.Array | None) -> jax.Array | None:
    """The value after the last action, float [B, ...]: `final` where the episode was cut short, elsewhere 0.

    None where no episode was. Raises ValueError where one may have been and `final` is None.
    """
    if truncated is None:
        return None
    if final is None:
        raise ValueError(
            "batch.truncated is given, but evaluate gave no final value to bootstrap from: let it give `final`, the "
            "value after the episode's last token, or set truncated=None"
        )
    if final.shape != truncated.shape:
        raise ValueError(f"evaluate gave final of shape {final.shape}; truncated has shape {truncated.shape}")
    return jnp.where(truncated, _wide(final), 0.0)


def episode_counts(mask: jax.Array, nonfinite: jax.Array) -> dict[str, jax.Array]:
    """Sums for the metrics: episodes that are learnt from, those without an action, those left out."""
    has_action = jnp.any(mask, axis=-1)
    flags = {
        "batch/episodes": has_action,
        "batch/without_action": ~has_action & ~nonfinite,
        "reward/nonfinite": nonfinite,
    }
    return {name: jnp.sum(flag, dtype=jnp.float32) for name, flag in flags.items()}


def check_discount(discount) -> None:
    """Raises ValueError outside [0, 1]. An array may be traced, and is taken as it comes."""
    if isinstance(discount, int | float) and not 0 <= discount <= 1:
        raise ValueError(f"discount={discount} must lie in [0, 1]")


def _wide(x: jax.Array) -> jax.Array:
    """`x` in float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
