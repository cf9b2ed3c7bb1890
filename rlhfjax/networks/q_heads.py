"""Heads that value every token of a vocabulary, or a state, from a hidden state: MLPs with one hidden layer.

Several heads are one set of arrays with a leading axis: twin Q is two heads and the smaller of both. A state value V
is a head whose vocabulary is 1. Q of single tokens is computed without an array of positions x vocabulary.

Shapes: H heads, V vocabulary, D width of the hidden states, F width of the hidden layer, N positions.
"""

import chex
import jax
import jax.numpy as jnp

from rlhfjax.ops import token_logprobs


def init_q_heads(
    key: jax.Array,
    width: int,
    vocabulary: int,
    *,
    heads: int = 2,
    hidden: int | None = None,
    scale: float = 1.0,
    bias: float = 0.0,
) -> dict:
    """H heads relu(x A + a) W^T + w, float32: A N(0, 2 / D), W N(0, scale^2 / F), a = 0, w = `bias`.

    Args:
      width: of the hidden states, D.
      vocabulary: values of each head, V; 1 for a state value.
      hidden: F; None: 2 D, as ILQL has it (arXiv 2206.11871).
      scale: 0 starts all values at `bias`.
      bias: the value to begin with, in units of reward.

    The key is consumed. Heads differ; target networks are copies of them.
    """
    if heads < 1 or vocabulary < 1 or (hidden is not None and hidden < 1):
        raise ValueError(f"heads={heads}, vocabulary={vocabulary} and hidden={hidden} must be at least 1")
    inner_size = 2 * width if hidden is None else hidden
    key_inner, key_outer = jax.random.split(key)
    inner = jax.random.normal(key_inner, (heads, width, inner_size)) * (2.0 / width) ** 0.5
    outer = jax.random.normal(key_outer, (heads, vocabulary, inner_size)) * scale * inner_size**-0.5
    return {
        "inner": inner,
        "inner_bias": jnp.zeros((heads, inner_size)),
        "outer": outer,
        "outer_bias": jnp.full((heads, vocabulary), bias, jnp.float32),
    }


def q_values(params: dict, hidden: jax.Array) -> jax.Array:
    """Values of all tokens, float32 [H, ..., V] from hidden [..., D]. For a few positions, as in decoding."""
    outer, bias = params["outer"], params["outer_bias"]
    shape = (bias.shape[0], *(1,) * (hidden.ndim - 1), bias.shape[1])
    return jnp.einsum("h...f,hvf->h...v", _features(params, hidden), outer) + bias.reshape(shape)


def q_of_tokens(params: dict, hidden: jax.Array, token: jax.Array) -> jax.Array:
    """Values of one token each, float32 [H, ..., ] from hidden [..., D] and token int [...], valid ids."""
    taken = jnp.sum(_features(params, hidden) * params["outer"][:, token], axis=-1)
    return taken + params["outer_bias"][:, token]


def q_log_softmax(
    params: dict,
    hidden: jax.Array,
    token: jax.Array,
    *,
    temperature: jax.Array | float = 1.0,
    chunk_size: int | None = None,
) -> jax.Array:
    """log softmax(Q_i / temperature) at one token each, float32 [H, ...]; `token_logprobs` says what a chunk is.

    Q - temperature * this is temperature * logsumexp(Q / temperature).
    """
    features = _features(params, hidden)
    one = jnp.ones_like(features[..., :1])
    features = jnp.concatenate([features, one], axis=-1)
    table = jnp.concatenate([params["outer"], params["outer_bias"][..., None]], axis=-1)
    rows = [
        token_logprobs(x, w, token, temperature=temperature, chunk_size=chunk_size).logp
        for x, w in zip(features, table, strict=True)
    ]
    return jnp.stack(rows)


def best_token(params: dict, hidden: jax.Array, *, chunk_size: int = 256) -> tuple[jax.Array, jax.Array]:
    """The token with the highest min over heads of Q, int32 [...], and that value, float32 [...].

    Positions are taken `chunk_size` at a time. No gradient flows.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    params, hidden = jax.lax.stop_gradient((params, hidden))

    def of_position(hidden_D: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_V = jnp.min(q_values(params, hidden_D), axis=0)
        return jnp.argmax(q_V).astype(jnp.int32), jnp.max(q_V)

    hidden_ND = hidden.reshape(-1, hidden.shape[-1])
    token_N, value_N = jax.lax.map(of_position, hidden_ND, batch_size=min(chunk_size, hidden_ND.shape[0]))
    return token_N.reshape(hidden.shape[:-1]), value_N.reshape(hidden.shape[:-1])


def state_value(params: dict, hidden: jax.Array) -> jax.Array:
    """float32 [...] from hidden [..., D] and a single head of vocabulary 1."""
    chex.assert_equal(params["outer_bias"].shape, (1, 1))
    return q_values(params, hidden)[0, ..., 0]


def q_advantage(params: dict, hidden: jax.Array) -> jax.Array:
    """min_i Q_i - V of every token, float32 [..., V], from params {"q", "v"}; without "v", min_i Q_i."""
    lowest = jnp.min(q_values(params["q"], hidden), axis=0)
    if "v" not in params:
        return lowest
    return lowest - state_value(params["v"], hidden)[..., None]


def _features(params: dict, hidden: jax.Array) -> jax.Array:
    """The hidden layer of each head, float32 [H, ..., F]."""
    inner, bias = params["inner"], params["inner_bias"]
    chex.assert_equal(hidden.shape[-1], inner.shape[1])
    shape = (bias.shape[0], *(1,) * (hidden.ndim - 1), bias.shape[1])
    return jax.nn.relu(jnp.einsum("...d,hdf->h...f", hidden.astype(jnp.float32), inner) + bias.reshape(shape))
