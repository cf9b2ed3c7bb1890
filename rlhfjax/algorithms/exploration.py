"""How an agent that has action values acts while it learns.

Shapes: A actions.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def epsilon_greedy_probabilities(q: jax.Array, epsilon: ArrayLike) -> jax.Array:
    """`(1 - epsilon) greedy + epsilon uniform`, where the best actions share the greedy part if several tie.

    Args:
      q: float [..., A], action values; an action that is not available has -inf, and is never taken.
      epsilon: in [0, 1], a scalar or of shape q.shape[:-1] (one for each environment).

    Returns:
      float [..., A], sums to 1. It has no gradient: it is constant but for jumps.

    >>> [round(p, 2) for p in epsilon_greedy_probabilities(jnp.array([0.0, 1.0]), 0.1).tolist()]
    [0.05, 0.95]
    """
    epsilon = jnp.asarray(epsilon, q.dtype)
    if epsilon.ndim and epsilon.shape != q.shape[:-1]:
        raise ValueError(f"epsilon must be a scalar or of shape {q.shape[:-1]}, got {epsilon.shape}")
    epsilon = jnp.broadcast_to(epsilon, q.shape[:-1])[..., None]
    q = jax.lax.stop_gradient(q)
    best = q == jnp.max(q, axis=-1, keepdims=True)
    available = q > -jnp.inf
    greedy, uniform = (x / jnp.sum(x, axis=-1, keepdims=True, dtype=q.dtype) for x in (best, available))
    return (1 - epsilon) * greedy + epsilon * uniform


def epsilon_greedy(key: jax.Array, q: jax.Array, epsilon: ArrayLike) -> jax.Array:
    """A draw from `epsilon_greedy_probabilities`, int32 of shape q.shape[:-1]. The key is consumed.

    Ties are broken at random: a table that starts at 0 everywhere would otherwise walk one way for ever.
    """
    probability = epsilon_greedy_probabilities(q, epsilon)
    return jax.random.categorical(key, jnp.log(probability), axis=-1).astype(jnp.int32)
