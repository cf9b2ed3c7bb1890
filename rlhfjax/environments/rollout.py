"""Acting in many worlds at once: one compiled scan over steps, `vmap` over worlds.

A policy is a function of a batch of observations, `act(observation, key) -> (action, extras)`, which consumes
the key: networks see all B worlds in one call. `extras` is whatever else is to be kept of that moment, e.g.
log-probabilities and values; `()` where there is nothing. Seeds and hyperparameters: `vmap` over the whole.
Devices: lay the B axis of `Worlds` over them, as any batch; `play`, which makes its own, is told how by `place`.

Shapes: B worlds, T steps; time first, as the scan writes it (`batch_first` turns it).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.environments.environment import Environment, autoreset, checked

PyTree = Any
Array = Any  # JAX; NumPy where the environment ran on the host
Act = Callable[[PyTree, jax.Array], tuple[jax.Array, PyTree]]


class Worlds(NamedTuple):
    """B worlds between two steps: all that a rollout needs to go on."""

    observation: PyTree  # [B, ...], what the next action is chosen by
    state: PyTree  # [B, ...]


class Trajectory(NamedTuple):
    """Steps taken, [T, B, ...]. An episode may end at any of them; the next row then is of the next episode."""

    observation: PyTree  # seen before the action
    action: Array
    reward: Array  # float [T, B]
    terminated: Array  # bool [T, B], nothing follows: do not bootstrap
    truncated: Array  # bool [T, B], cut short: bootstrap from next_observation
    next_observation: PyTree  # seen after the action, also where the episode ended: never of the next episode
    extras: PyTree = ()  # what `act` returned beside the action
    info: PyTree = ()  # what the environment returned, final observations aside


class Episodes(NamedTuple):
    """Whole episodes, one a world."""

    score_B: jax.Array  # float32, undiscounted return
    length_B: jax.Array  # int32, steps
    finished_B: jax.Array  # bool; False: still running when the steps were used up


def start(env: Environment, key: jax.Array, count: int, params: PyTree = None) -> Worlds:
    """`count` worlds at the start of an episode. params: None takes the environment's own."""
    if count < 1:
        raise ValueError(f"count must be at least 1 world, got {count}")
    params = env.params if params is None else params
    reset = jax.vmap(autoreset(env).reset, in_axes=(0, None))
    return Worlds(*reset(jax.random.split(key, count), params))


def rollout(
    env: Environment, act: Act, worlds: Worlds, key: jax.Array, *, steps: int, params: PyTree = None
) -> tuple[Worlds, Trajectory]:
    """`steps` steps in each of the worlds, which start anew where an episode ends (`autoreset` is applied here).

    To be jitted by the caller, alone or as a part of an iteration. The key is consumed; each step and world gets
    one of its own.
    """
    step_all = jax.vmap(autoreset(env).step, in_axes=(0, 0, 0, None))
    params = env.params if params is None else params
    count = jax.tree.leaves(worlds.observation)[0].shape[0]
    # Ahead of the loop, for all steps at once: of a small world's step, drawing keys is a large part.
    key_act_T, key_step_T = jax.vmap(jax.random.split, out_axes=1)(jax.random.split(key, steps))
    keys_TB = jax.vmap(lambda key: jax.random.split(key, count))(key_step_T)

    def step(worlds: Worlds, keys: tuple[jax.Array, jax.Array]) -> tuple[Worlds, Trajectory]:
        key_act, keys_B = keys
        action, extras = _act(act, worlds.observation, key_act)
        observation, state, reward, terminated, truncated, info = step_all(
            keys_B, worlds.state, action, params
        )
        final = info.pop("final_observation")
        return Worlds(observation, state), Trajectory(
            worlds.observation, action, reward, terminated, truncated, final, extras, info
        )

    return jax.lax.scan(step, worlds, (key_act_T, keys_TB))


class _Game(NamedTuple):
    worlds: Worlds
    episodes: Episodes
    step: jax.Array


def play(
    env: Environment,
    act: Act,
    key: jax.Array,
    *,
    count: int,
    most_steps: int,
    params: PyTree = None,
    place: Callable[[PyTree], PyTree] = lambda worlds: worlds,
) -> Episodes:
    """The return of one whole episode in each of `count` new worlds: an evaluation that favours no short episodes.

    Stops when all have ended, or after `most_steps`. (The mean over the episodes that happen to end within a fixed
    number of steps counts short ones more often than they occur.)

    place: lays arrays with a row for each world over devices: `mesh.place_rows(mesh)`.
    """
    key_start, key_play = jax.random.split(key)
    params = env.params if params is None else params
    step_all = jax.vmap(checked(env).step, in_axes=(0, 0, 0, None))

    def body(game: _Game) -> _Game:
        key_act, key_step = jax.random.split(jax.random.fold_in(key_play, game.step))
        action, _ = _act(act, game.worlds.observation, key_act)
        keys = jax.random.split(key_step, count)
        observation, state, reward, terminated, truncated, _ = step_all(
            keys, game.worlds.state, action, params
        )
        running_B = ~game.episodes.finished_B
        episodes = Episodes(
            game.episodes.score_B + jnp.where(running_B, reward, 0).astype(jnp.float32),
            game.episodes.length_B + running_B,
            game.episodes.finished_B | terminated | truncated,
        )
        return _Game(Worlds(observation, state), episodes, game.step + 1)

    def goes_on(game: _Game) -> jax.Array:
        return (game.step < most_steps) & ~jnp.all(game.episodes.finished_B)

    none = Episodes(jnp.zeros(count), jnp.zeros(count, jnp.int32), jnp.zeros(count, bool))
    worlds, none = place((start(env, key_start, count, params), none))
    game = _Game(worlds, none, jnp.int32(0))
    return jax.lax.while_loop(goes_on, body, game).episodes


def batch_first(x: PyTree) -> PyTree:
    """Every array of a trajectory as [B, T, ...], as algorithms want it."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), x)


def _act(act: Act, observation: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
    """Calls the policy and holds it to its contract."""
    out = act(observation, key)
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(
            f"act must return (action, extras), extras () where there are none, got {type(out).__name__}"
        )
    action, extras = out
    count = jax.tree.leaves(observation)[0].shape[0]
    if not isinstance(action, jax.Array) or action.ndim < 1 or action.shape[0] != count:
        raise TypeError(f"act must return one action for each of the {count} worlds, got {jnp.shape(action)}")
    return action, extras
