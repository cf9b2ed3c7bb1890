"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and the ways to stretch them to longer contexts."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.config import Decoder, RopeScaling

SCALINGS = ("none", "linear", "llama3", "yarn", "longrope")


def rotary(
    x_BHTK: jax.Array, position_BT: jax.Array, frequency: np.ndarray, factor: float = 1.0
) -> jax.Array:
    """Turns pairs of dimensions by position times frequency; halves are paired as in GPT-NeoX and Llama.

    Args:
      x: [B, H, T, K], of which the first 2 R dimensions of a head are turned; computed in float32.
      position: int [B, T].
      frequency: float [R], radians per position (`rope_frequencies`).
      factor: what the turned dimensions are multiplied by (yarn, longrope).
    """
    half = len(frequency)
    angle = position_BT.astype(jnp.float32)[:, None, :, None] * frequency.astype(np.float32)[None, None, None]
    cos, sin = factor * jnp.cos(angle), factor * jnp.sin(angle)
    first, second, rest = jnp.split(x_BHTK, [half, 2 * half], axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x_BHTK.dtype), rest], axis=-1)


def rope_frequencies(config: Decoder, *, windowed: bool = False) -> tuple[np.ndarray, float]:
    """(radians per position, float64 [R]; the factor of cosine and sine) of a layer with or without a window."""
    rotated = int(config.head_size * config.rope_fraction)
    theta, scaling = config.rope_theta, config.rope_scaling
    if windowed and config.window_rope_theta is not None:
        theta, scaling = config.window_rope_theta, RopeScaling()
    frequency = theta ** (-np.arange(0, rotated, 2) / rotated)
    if scaling.kind == "linear":
        return frequency / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequency, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(frequency, theta, rotated, scaling), _yarn_factor(scaling)
    if scaling.kind == "longrope":
        long = config.max_positions > scaling.original_positions
        divisor = np.asarray(scaling.long_factors if long else scaling.short_factors)
        return frequency / divisor, _longrope_factor(scaling)
    return frequency, 1.0


def check_rope(config: Decoder) -> None:
    """Raises ValueError where the rotary settings contradict each other."""
    scaling, rotated = config.rope_scaling, int(config.head_size * config.rope_fraction)
    if scaling.kind not in SCALINGS:
        raise ValueError(f"rope_scaling.kind={scaling.kind!r} is unknown; choose one of {SCALINGS}")
    if not 0 < config.rope_fraction <= 1 or rotated < 2 or rotated % 2:
        raise ValueError(
            f"rope_fraction={config.rope_fraction} of head_size={config.head_size} rotates {rotated} dimensions of a "
            "head; it must be an even number of them"
        )
    if scaling.kind in ("llama3", "yarn", "longrope") and scaling.original_positions < 1:
        raise ValueError(
            f"rope_scaling.kind={scaling.kind!r} needs original_positions, the pretraining's context"
        )
    if scaling.kind == "longrope":
        for name in ("short_factors", "long_factors"):
            if len(getattr(scaling, name)) != rotated // 2:
                raise ValueError(
                    f"rope_scaling.{name} has {len(getattr(scaling, name))} numbers; one is needed for each of the "
                    f"{rotated // 2} frequencies"
                )


def _llama3(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long waves are stretched, short ones left, those between blended (Llama 3.1)."""
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = scaling.original_positions * frequency / (2 * math.pi)  # over the original context
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def _yarn(frequency: np.ndarray, theta: float, rotated: int, scaling: RopeScaling) -> np.ndarray:
    """NTK-by-parts (arXiv 2309.00071, 3.2): a ramp over dimensions between beta_slow and beta_fast turns."""

    def dimension(turns: float) -> float:
        wavelength = scaling.original_positions / (turns * 2 * math.pi)
        return rotated * math.log(wavelength) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    ramp = (np.arange(len(frequency)) - low) / max(high - low, 1e-3)
    stretched = np.clip(ramp, 0.0, 1.0)
    return (1 - stretched) * frequency + stretched * frequency / scaling.factor


def _yarn_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0


def _longrope_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_positions))
