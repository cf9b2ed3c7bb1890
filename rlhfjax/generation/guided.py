"""Decoding that a value guides: the distribution softmax(base logits + beta * advantage), in the usual generator.

With advantage = min_i Q_i(s, .) - V(s) that is log pi + beta (min Q - V) of ILQL (arXiv 2206.11871), with Q of a frozen
policy value-augmented sampling (2405.06639), with soft values of scale 1 / beta the optimum of the KL-regularised
problem. V shifts all logits of a state alike and cancels; a bound on the advantage gives it a meaning.

`guided` makes one language model of the two networks. It is a `LanguageModel` like any other: `generate` drives it
unchanged, its cache holds that of both, and beta is one of its params, so another beta compiles nothing anew.

Shapes: B sequences, T positions, V vocabulary, D width.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhfjax.generation.filters import filter_logits
from rlhfjax.networks.decoder import LanguageModel
from rlhfjax.networks.q_heads import q_advantage


def guided(
    lm: LanguageModel,
    trunk: LanguageModel | None = None,
    *,
    advantage: Callable[[dict, jax.Array], jax.Array] = q_advantage,
    top_k: int = 0,
    min_p: float = 0.0,
) -> LanguageModel:
    """`lm` guided by a value, as a language model with params {"base", "guide", "beta"}.

    Args:
      lm: the base policy, params["base"] its params.
      trunk: reads the tokens for the value, with params["guide"]["trunk"]; None: the value reads the hidden states
        of the base policy.
      advantage: `(params["guide"], hidden [..., D]) -> [..., V]`, in units of reward; for a bound on it,
        `lambda params, hidden: jnp.minimum(q_advantage(params, hidden), 0.0)`.
      top_k: only the base policy's k most likely tokens can be drawn; 0: all. Static.
      min_p: only tokens that the base policy gives at least min_p times its largest probability can be drawn, so that
        no value of a token that nobody says is trusted (discrete BCQ, arXiv 1910.01708); 0: all. Static.

    params["beta"] is nats per unit of reward, a scalar or [B, 1]. Where it is 0 the distribution is that of the base
    policy exactly, whatever the value says, also NaN.

    The result has no output embedding: log-probabilities are `jax.nn.log_softmax(model.logits(params, hidden))`.
    Nothing is to be initialised: params are those of trained networks. Both raise ValueError.
    """
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be at least 0; 0 keeps all tokens")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} must lie in [0, 1]; 0 keeps all tokens")
    width, layers = lm.config.width, lm.config.layers
    positions = lm.config.max_positions
    if trunk is not None:
        positions = min(positions, trunk.config.max_positions)

    def apply(params, token_BT, *, position_BT, mask_BTS, cache=None, slot=0):
        where = {"position_BT": position_BT, "mask_BTS": mask_BTS, "slot": slot}
        # The cache of both: the layers of one after those of the other.
        base_cache, guide_cache = (None, None) if cache is None else (cache[:layers], cache[layers:])
        hidden, base_cache = lm.apply(params["base"], token_BT, cache=base_cache, **where)
        if trunk is not None:
            read, guide_cache = trunk.apply(params["guide"]["trunk"], token_BT, cache=guide_cache, **where)
            hidden = jnp.concatenate([hidden, read], axis=-1)  # of the wider type, so that nothing is rounded
        return hidden, None if cache is None else (*base_cache, *(guide_cache or ()))

    def logits(params: dict, hidden: jax.Array) -> jax.Array:
        of_base = lm.logits(params["base"], hidden[..., :width].astype(lm.config.dtype))
        if top_k or min_p:
            rows = of_base.reshape(-1, of_base.shape[-1])
            of_base = filter_logits(rows, top_k, 1.0, min_p).reshape(of_base.shape)
        read = hidden if trunk is None else hidden[..., width:].astype(trunk.config.dtype)
        gain = advantage(params["guide"], read)
        if gain.shape != of_base.shape:
            raise ValueError(f"the advantage has shape {gain.shape}; the logits have shape {of_base.shape}")
        beta = jnp.asarray(params["beta"], jnp.float32)
        beta = jnp.broadcast_to(beta if beta.ndim == 0 else beta[..., None], gain.shape)
        return of_base + jnp.where(beta == 0, 0.0, beta * gain)

    def init_cache(batch: int, slots: int):
        of_guide = () if trunk is None else trunk.init_cache(batch, slots)
        return (*lm.init_cache(batch, slots), *of_guide)

    def for_decoding(params: dict) -> dict:
        params = params | {"base": lm.for_decoding(params["base"])}
        if trunk is None:
            return params
        return params | {"guide": params["guide"] | {"trunk": trunk.for_decoding(params["guide"]["trunk"])}}

    def absent(*_):
        raise ValueError(
            "a guided model has no embedding and no init: its logits are `logits(params, hidden)`, its params those "
            'of trained networks, {"base", "guide", "beta"}'
        )

    config = dataclasses.replace(lm.config, max_positions=positions)
    return LanguageModel(config, absent, apply, absent, logits, init_cache, for_decoding)
