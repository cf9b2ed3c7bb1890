"""Scalar heads: a reward or a value from a hidden state.

Shapes: D width.
"""

import chex
import jax
import jax.numpy as jnp


def init_scalar_head(key: jax.Array, width: int, *, scale: float = 1.0) -> dict:
    """A linear head to one number: kernel N(0, scale / sqrt(width + 1)), bias 0.

    The deviation 1 / sqrt(width + 1) is that of lm-human-preferences (Ziegler et al. 2019) and of "The N
    implementation details of RLHF with PPO"; scale = 0 starts a value head at zero. The key is consumed.
    """
    kernel = jax.random.normal(key, (width,), jnp.float32) * scale * (width + 1) ** -0.5
    return {"kernel": kernel, "bias": jnp.zeros((), jnp.float32)}


def scalar_head(params: dict, hidden: jax.Array) -> jax.Array:
    """float32 [...] from hidden [..., D]: hidden @ kernel + bias, computed in float32."""
    chex.assert_equal(hidden.shape[-1], params["kernel"].shape[0])
    return hidden.astype(jnp.float32) @ params["kernel"] + params["bias"]
