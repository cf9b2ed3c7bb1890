"""Segments of trajectories: how they are cut, what they are worth, and a labeller that compares them.

A segment is up to L steps in a row of one world. It ends early where its episode terminates: what is left of it is
padding, is masked, and counts nothing. So a segment in which the episode terminates is a shorter one, with fewer
rewards in its sum, which is how an end is seen where the reward itself does not tell it (CartPole: 1 at every step). An
episode that is merely cut off by a limit on its steps must not look like one that has ended: no segment contains such a
cut.

Shapes: T steps, B worlds, N segments or pairs, L steps of a segment.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from rlhfjax.config import Labeller
from rlhfjax.environments import Trajectory
from rlhfjax.ops import masked_sum


class Segments(NamedTuple):
    """Segments, with any leading axes. What is masked may hold anything."""

    observation: jax.Array  # [..., L, *observation_shape], before the action
    action: jax.Array  # int32 [..., L]
    mask: jax.Array  # bool [..., L], True from the first step on, up to a termination; all False: no segment


def cut_segments(
    key: jax.Array, trajectory: Trajectory, *, count: int, length: int
) -> tuple[Segments, jax.Array]:
    """`count` segments of `length` steps, drawn evenly, with replacement, from all places where one fits.

    A place fits where the trajectory goes on for `length` more steps and the episode is not truncated before it
    terminates. Where none fits, all masks are False.

    Args:
      trajectory: [T, B, ...], T at least `length`, as `rollout` gives it.

    Returns:
      segments [N, L], and their true returns, float32 [N]: sums of the trajectory's reward.

    Raises ValueError on a segment longer than the trajectory.
    """
    steps, worlds = trajectory.reward.shape
    if not 1 <= length <= steps:
        raise ValueError(f"a segment of {length} steps cannot be cut from a trajectory of {steps}")
    starts = steps - length + 1
    within_L = jnp.arange(length)
    mask_LSB, cut_SB = _windows(trajectory, length)
    fits_F = ~cut_SB.reshape(starts * worlds)
    number_F = jnp.cumsum(fits_F, dtype=jnp.int32)
    rank_N = jax.random.randint(key, (count,), 0, jnp.maximum(number_F[-1], 1))
    # The place with so many fitting ones before it.
    place_N = jnp.minimum(jnp.searchsorted(number_F, rank_N, side="right"), starts * worlds - 1)
    start_N, world_N = jnp.divmod(place_N, worlds)
    step_NL = start_N[:, None] + within_L[None]

    def taken(x: jax.Array) -> jax.Array:
        return x[step_NL, world_N[:, None]]

    mask_NL = mask_LSB[:, start_N, world_N].T & (number_F[-1] > 0)
    segments = Segments(taken(trajectory.observation), taken(trajectory.action), mask_NL)
    return segments, masked_sum(taken(trajectory.reward).astype(jnp.float32), mask_NL, axis=1)


def answer_probabilities(
    return_first: jax.Array, return_second: jax.Array, labeller: Labeller
) -> tuple[jax.Array, jax.Array]:
    """Probabilities of the answers "the first" and "they are equal", elementwise; "the second" is what is left.

    With d = R_first - R_second and coin = labeller.random,

        |d| <= tie:  "equal" 1 - coin,   "the first" coin / 2
        else:        "equal" 0,          "the first" (1 - coin) sigmoid(d / temperature) + coin / 2

    The parts of the labeller may be traced. Raises ValueError where one is out of range.
    """
    check_labeller(labeller)
    difference = return_first - return_second
    cold = labeller.temperature <= 0.0
    better = jnp.where(
        cold,
        0.5 * (1.0 + jnp.sign(difference)),
        jax.nn.sigmoid(difference / jnp.where(cold, 1.0, labeller.temperature)),
    )
    equal = jnp.abs(difference) <= labeller.tie
    sober = 1.0 - labeller.random
    first = jnp.where(equal, 0.0, sober * better) + 0.5 * labeller.random
    return first, jnp.where(equal, sober, 0.0)


def answers(
    key: jax.Array, return_first: jax.Array, return_second: jax.Array, labeller: Labeller
) -> jax.Array:
    """What the labeller says: 1 "the first", 0 "the second", 0.5 "they are equal"; float32, elementwise."""
    first, equal = answer_probabilities(return_first, return_second, labeller)
    drawn = jax.random.uniform(key, first.shape)
    return jnp.where(drawn < first, 1.0, jnp.where(drawn < first + equal, 0.5, 0.0))


def check_labeller(labeller: Labeller) -> None:
    """Raises ValueError on a temperature below 0 or a share of random answers outside [0, 1]; not where traced."""
    if not isinstance(labeller.temperature, Tracer) and not labeller.temperature >= 0:
        raise ValueError(f"labeller.temperature={labeller.temperature} must be at least 0")
    if not isinstance(labeller.random, Tracer) and not 0 <= labeller.random <= 1:
        raise ValueError(f"labeller.random={labeller.random} is a share: it must lie in [0, 1]")


def _windows(trajectory: Trajectory, length: int) -> tuple[jax.Array, jax.Array]:
    """Of the window that starts at each step of each world: its mask [L, S, B]; and whether it is cut off [S, B]."""
    starts = trajectory.reward.shape[0] - length + 1
    going_SB = jnp.ones((starts, trajectory.reward.shape[1]), bool)
    cut_SB = ~going_SB
    masks = []
    for i in range(length):
        masks.append(going_SB)
        terminated_SB = trajectory.terminated[i : i + starts]
        cut_SB |= going_SB & trajectory.truncated[i : i + starts] & ~terminated_SB
        going_SB &= ~terminated_SB
    return jnp.stack(masks), cut_SB
