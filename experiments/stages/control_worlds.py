"""Worlds seen in another way: observations scaled for a network, or counted for a table."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax.environments import Environment


def scaled(env: Environment, low: Sequence[float], high: Sequence[float]) -> Environment:
    """The world with observations mapped from [low, high] to [-1, 1], linearly; nothing is cut off."""
    centre, half = (
        jnp.asarray([sign * a / 2 + b / 2 for a, b in zip(low, high, strict=True)]) for sign in (1, -1)
    )
    return observed(env, lambda x: (x - centre) / half)


def binned(env: Environment, low: Sequence[float], high: Sequence[float], bins: Sequence[int]) -> Environment:
    """The world with its observation's place in a grid over [low, high] as a number; what lies outside counts
    as the rim.

    The number is not a state in the sense of Markov: what a table learns of it is an approximation.
    """
    lowest, highest, size = jnp.asarray(low), jnp.asarray(high), jnp.asarray(bins)
    stride = jnp.asarray([math.prod(bins[i + 1 :]) for i in range(len(bins))])

    def number(x: jax.Array) -> jax.Array:
        place = jnp.floor((x - lowest) / (highest - lowest) * size).astype(jnp.int32)
        return jnp.sum(jnp.clip(place, 0, size - 1) * stride).astype(jnp.int32)

    seen = observed(env, number)
    return seen._replace(observation_shape=(), num_observations=math.prod(bins))


def observed(env: Environment, view: Callable[[jax.Array], jax.Array]) -> Environment:
    """The world with `view(observation)` in place of each observation; of the same shape."""

    def reset(key: jax.Array, params: Any):
        observation, state = env.reset(key, params)
        return view(observation), state

    def step(key: jax.Array, state: Any, action: jax.Array, params: Any):
        observation, *rest = env.step(key, state, action, params)
        return view(observation), *rest

    return env._replace(reset=reset, step=step)
