"""Small networks for observations that are vectors: a policy, a value, or action values, dueling on request.

Shapes: A outputs (actions), N numbers for each (quantiles), D width.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.config import MLP as Config

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "silu": jax.nn.silu, "gelu": jax.nn.gelu}


class MLP(NamedTuple):
    """A network as pure functions of its parameters.

    init(key) -> params, a nested dict of float32 arrays. The key is consumed.
    apply(params, observation) -> float32 [..., A], or [..., A, N] if numbers for each output were asked for;
        observation float or integer [..., *observation_shape], any leading axes.
    """

    init: Callable[[jax.Array], dict]
    apply: Callable[[dict, jax.Array], jax.Array]


def mlp(
    config: Config, observation_shape: tuple[int, ...], outputs: int, *, quantiles: int | None = None
) -> MLP:
    """A multi-layer perceptron on the flattened observation.

    With `config.dueling`, Q(s, a) = V(s) + advantage(s, a) - mean over actions of the advantage (arXiv 1511.06581,
    eq. 9), from two linear heads on the last hidden layer; with quantiles that holds for each of them.

    Args:
      observation_shape: of one observation; () for a number.
      outputs: A, e.g. the number of actions.
      quantiles: N numbers for each output, [..., A, N]; None: one, [..., A].

    Kernels start normal with variance 2 / inputs (arXiv 1502.01852), those of the heads times
    `output_scale` ** 2, biases at 0. Raises ValueError on an unknown activation.
    """
    if config.activation not in ACTIVATIONS:
        raise ValueError(
            f"activation={config.activation!r} is unknown; choose among {', '.join(ACTIVATIONS)}"
        )
    size = math.prod(observation_shape)
    numbers = 1 if quantiles is None else quantiles
    heads = {"output": outputs * numbers} | ({"value": numbers} if config.dueling else {})

    def init(key: jax.Array) -> dict:
        keys = iter(jax.random.split(key, len(config.hidden) + len(heads)))
        widths = (size, *config.hidden)
        params = {
            f"hidden_{i}": _layer(next(keys), widths[i], width) | _norm(width, config)
            for i, width in enumerate(config.hidden)
        }
        return params | {
            name: _layer(next(keys), widths[-1], width, config.output_scale) for name, width in heads.items()
        }

    def apply(params: dict, observation: jax.Array) -> jax.Array:
        leading = observation.shape[: observation.ndim - len(observation_shape)]
        if observation.shape != (*leading, *observation_shape):
            raise ValueError(f"an observation has shape {observation_shape}, got {observation.shape}")
        x = observation.reshape(-1, size).astype(jnp.float32)
        for i in range(len(config.hidden)):
            x = _affine(params[f"hidden_{i}"], x)
            if config.layer_norm:
                x = _normalised(params[f"hidden_{i}"], x)
            x = ACTIVATIONS[config.activation](x)
        out = _affine(params["output"], x).reshape(-1, outputs, numbers)
        if config.dueling:
            value = _affine(params["value"], x)[:, None, :]
            out = value + out - jnp.mean(out, axis=1, keepdims=True)
        return (
            out.reshape(*leading, outputs) if quantiles is None else out.reshape(*leading, outputs, numbers)
        )

    return MLP(init, apply)


def _layer(key: jax.Array, inputs: int, outputs: int, scale: float = 1.0) -> dict:
    kernel = jax.random.normal(key, (inputs, outputs), jnp.float32) * (scale * (2 / inputs) ** 0.5)
    return {"kernel": kernel, "bias": jnp.zeros(outputs, jnp.float32)}


def _norm(width: int, config: Config) -> dict:
    if not config.layer_norm:
        return {}
    return {"norm_scale": jnp.ones(width, jnp.float32), "norm_bias": jnp.zeros(width, jnp.float32)}


def _affine(layer: dict, x_BD: jax.Array) -> jax.Array:
    return x_BD @ layer["kernel"] + layer["bias"][None]


def _normalised(layer: dict, x_BD: jax.Array) -> jax.Array:
    centred = x_BD - jnp.mean(x_BD, axis=1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-6) * layer["norm_scale"][None] + layer["norm_bias"][None]
