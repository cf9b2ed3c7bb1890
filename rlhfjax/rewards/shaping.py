"""Worlds with a shaped reward: a potential of states, added so that the best policy stays the best.

See `ops.potential_shaping` for the formula and why it holds; it shapes the rewards of tokens as it is:

    reward_BT = reward_BT + potential_shaping(potential_BT, discount=1.0, mask=mask_BT)

Worlds are `environments`' tables and environments; nothing but their fields is used.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.ops import potential_shaping

__all__ = ["shaped_environment", "shaped_table"]

World = TypeVar("World", bound=Any)


def shaped_table(table: World, potential_S: np.ndarray, *, discount: float) -> World:
    """A world's `Table` with `discount * Phi(next) * (1 - terminated) - Phi(s)` added to every reward, float64.

    potential_S: float, Phi of every state. The optimal policy is that of the table; V* and Q* are lower by Phi(s).
    Raises ValueError where there is not one for each state.
    """
    states = table.probability_SAK.shape[0]
    potential_S = np.asarray(potential_S, np.float64)
    if potential_S.shape != (states,) or not np.all(np.isfinite(potential_S)):
        raise ValueError(f"potential_S must be {states} finite numbers, got shape {potential_S.shape}")
    after_SAK = np.where(table.terminated_SAK, 0.0, potential_S[table.next_SAK])
    return table._replace(reward_SAK=table.reward_SAK + discount * after_SAK - potential_S[:, None, None])


def shaped_environment(env: World, potential: Callable[[Any, Any], Any], *, discount: float) -> World:
    """An `Environment` whose reward has the shaping of a potential added.

    potential: `potential(state, params) -> float []`, of the world's own state. discount: that of the returns. An
    episode that terminated has a potential of 0 behind it; one that was truncated, that of its last state. Shape before
    `autoreset`: the state after a step must be the one that the action led to. Raises ValueError otherwise.
    """
    if env.autoresets:
        raise ValueError(
            "shape the world before autoreset: afterwards a step that ends an episode begins the next one"
        )

    def step(key: jax.Array, state: Any, action: Any, params: Any) -> tuple:
        observation, after, reward, terminated, truncated, info = env.step(key, state, action, params)
        shaping = potential_shaping(
            jnp.asarray(potential(state, params), jnp.float32),
            next_potential=jnp.asarray(potential(after, params), jnp.float32),
            terminated=terminated,
            discount=discount,
        )
        return observation, after, reward + shaping, terminated, truncated, info

    return env._replace(step=step)
