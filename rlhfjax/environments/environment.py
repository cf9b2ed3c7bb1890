"""The protocol of a world to act in, what wraps one, and the checks at its door.

    observation, state = env.reset(key, params)
    observation, state, reward, terminated, truncated, info = env.step(key, state, action, params)

These are gymnax's six values (version 1). Everything is a pure function of one world; `vmap` makes many of them. An
episode that terminated has no future, and nothing is bootstrapped from it. One that was truncated was cut short
by a limit on its steps: its future was there, was not seen, and is bootstrapped from the value of the
observation after its last action. Where both are True, terminated wins.

Wrappers are functions from an environment to an environment, applied from the inside out:
`record_episodes(autoreset(one_hot(time_limit(world, 100))))`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

PyTree = Any
Step = tuple[PyTree, PyTree, jax.Array, jax.Array, jax.Array, dict[str, Any]]


class Environment(NamedTuple):
    """A world as two pure functions. The key is consumed; params is a pytree that may be traced and vmapped."""

    reset: Callable[[jax.Array, PyTree], tuple[PyTree, PyTree]]  # (key, params) -> observation, state
    # (key, state, action, params) -> observation, state, reward, terminated, truncated, info
    step: Callable[[jax.Array, PyTree, Any, PyTree], Step]
    num_actions: int | None  # actions are int32 [] from 0 to num_actions - 1; None: they are no numbers
    observation_shape: tuple[int, ...] | None  # of one observation; None: it is a pytree of several arrays
    num_observations: int | None = (
        None  # observations are int32 [] from 0 to num_observations - 1; None: arrays
    )
    params: PyTree = ()  # the default parameters of the world
    autoresets: bool = False  # whether a step that ends an episode gives the next one's first observation


def checked(env: Environment) -> Environment:
    """The same environment, with a door: every world of this package comes through it.

    While tracing, reset and step are held to the protocol: two and six values, a reward that is one floating
    point number, flags that are one bool, observations and states that keep their shapes and types. TypeError
    or ValueError says which value is wrong.

    An action outside the space raises ValueError where it is concrete. Where it is traced nothing can be
    raised: the reward is NaN, so that no training goes on quietly, and `jax.experimental.checkify` reports it by
    name if the program was transformed with `errors=checkify.user_checks`. It is never moved into the space.
    """

    def reset(key: jax.Array, params: PyTree) -> tuple[PyTree, PyTree]:
        out = env.reset(key, params)
        _check_values("reset", out, ("observation", "state"))
        _check_observation("reset", out[0], env.observation_shape)
        return out

    def step(key: jax.Array, state: PyTree, action: jax.Array, params: PyTree) -> Step:
        action, inside = _check_action(action, env.num_actions)
        out = env.step(key, state, action, params)
        _check_values(
            "step", out, ("observation", "state", "reward", "terminated", "truncated", "info"), _FIVE
        )
        observation, after, reward, terminated, truncated, info = out
        _check_observation("step", observation, env.observation_shape)
        _check_same_state(state, after)
        reward = _check_scalar("reward", reward, jnp.floating)
        terminated = _check_scalar("terminated", terminated, jnp.bool_)
        truncated = _check_scalar("truncated", truncated, jnp.bool_)
        if not isinstance(info, dict):
            raise TypeError(f"step must return info as a dict, got {type(info).__name__}")
        return observation, after, jnp.where(inside, reward, jnp.nan), terminated, truncated, info

    return env._replace(reset=reset, step=step)


class Timed(NamedTuple):
    """State of a world with a time limit."""

    state: PyTree
    elapsed: jax.Array  # int32 [], steps taken in this episode


def time_limit(env: Environment, steps: int | None) -> Environment:
    """Truncates an episode at its step number `steps`, unless it ended before. None: no limit, the same world.

    As with Gymnasium's wrapper an episode may terminate and be truncated at once; terminated wins.
    """
    if steps is None:
        return env
    if steps < 1:
        raise ValueError(f"a time limit needs at least 1 step, got {steps}")
    _refuse_autoreset("time_limit", env)

    def reset(key: jax.Array, params: PyTree) -> tuple[PyTree, Timed]:
        observation, state = env.reset(key, params)
        return observation, Timed(state, jnp.int32(0))

    def step(key: jax.Array, timed: Timed, action: jax.Array, params: PyTree) -> Step:
        observation, state, reward, terminated, truncated, info = env.step(key, timed.state, action, params)
        elapsed = timed.elapsed + 1
        return observation, Timed(state, elapsed), reward, terminated, truncated | (elapsed >= steps), info

    return env._replace(reset=reset, step=step)


def autoreset(env: Environment) -> Environment:
    """Starts the next episode within the step that ended one, and keeps what the last one ended on.

    After such a step observation and state are those of a reset; `info["final_observation"]` is at every step
    the observation that the action led to, i.e. the one to bootstrap a truncated episode from. Reward and the
    two flags are those of the step. An environment that does so already is returned as it is.
    """
    if env.autoresets:
        return env
    env = checked(env)

    def step(key: jax.Array, state: PyTree, action: jax.Array, params: PyTree) -> Step:
        key_step, key_reset = jax.random.split(key)
        final, state, reward, terminated, truncated, info = env.step(key_step, state, action, params)
        fresh = env.reset(key_reset, params)
        ended = terminated | truncated
        observation, state = jax.tree.map(lambda new, old: jnp.where(ended, new, old), fresh, (final, state))
        return observation, state, reward, terminated, truncated, info | {"final_observation": final}

    return env._replace(step=step, autoresets=True)


def one_hot(env: Environment) -> Environment:
    """Numbered observations as float32 [num_observations] with a single 1, for networks."""
    size = env.num_observations
    if size is None:
        raise ValueError(
            "one_hot needs an environment with numbered observations; this one's num_observations is None"
        )
    _refuse_autoreset("one_hot", env)

    def reset(key: jax.Array, params: PyTree) -> tuple[jax.Array, PyTree]:
        observation, state = env.reset(key, params)
        return jax.nn.one_hot(observation, size), state

    def step(key: jax.Array, state: PyTree, action: jax.Array, params: PyTree) -> Step:
        observation, after, reward, terminated, truncated, info = env.step(key, state, action, params)
        return jax.nn.one_hot(observation, size), after, reward, terminated, truncated, info

    return env._replace(reset=reset, step=step, observation_shape=(size,), num_observations=None)


class Recorded(NamedTuple):
    """State of a world whose episodes are recorded."""

    state: PyTree
    score: jax.Array  # float32 [], undiscounted sum of the rewards of this episode so far
    length: jax.Array  # int32 [], its steps so far


def record_episodes(env: Environment) -> Environment:
    """Adds to info `episode_return` and `episode_length`, this step included; read them where an episode ended.

    Goes outside of autoreset, which must have been applied.
    """
    if not env.autoresets:
        raise ValueError("record_episodes goes outside of autoreset: record_episodes(autoreset(env))")

    def reset(key: jax.Array, params: PyTree) -> tuple[PyTree, Recorded]:
        observation, state = env.reset(key, params)
        return observation, Recorded(state, jnp.float32(0), jnp.int32(0))

    def step(key: jax.Array, recorded: Recorded, action: jax.Array, params: PyTree) -> Step:
        observation, state, reward, terminated, truncated, info = env.step(
            key, recorded.state, action, params
        )
        score, length = recorded.score + reward.astype(jnp.float32), recorded.length + 1
        info = info | {"episode_return": score, "episode_length": length}
        ended = terminated | truncated
        recorded = Recorded(state, jnp.where(ended, 0.0, score), jnp.where(ended, 0, length))
        return observation, recorded, reward, terminated, truncated, info

    return env._replace(reset=reset, step=step)


_FIVE = (
    "; five values are the older protocol, whose `done` does not tell an end from a time limit: "
    "return terminated and truncated in its place (for an environment of gymnax there is from_gymnax)"
)


def _refuse_autoreset(wrapper: str, env: Environment) -> None:
    if env.autoresets:
        raise ValueError(
            f"{wrapper} goes inside of autoreset: autoreset({wrapper}(env, ...)), for what the environment "
            "gives after an end belongs to the next episode already"
        )


def _check_values(function: str, out: Any, names: tuple[str, ...], hint: str = "") -> None:
    if not isinstance(out, tuple) or len(out) != len(names):
        got = f"{len(out)} values" if isinstance(out, tuple) else type(out).__name__
        hint = hint if isinstance(out, tuple) and len(out) == 5 else ""
        raise ValueError(f"{function} must return ({', '.join(names)}), got {got}{hint}")


def _check_observation(function: str, observation: PyTree, shape: tuple[int, ...] | None) -> None:
    if shape is not None and jnp.shape(observation) != tuple(shape):
        raise ValueError(
            f"{function} returned an observation of shape {jnp.shape(observation)}; "
            f"the environment's observation_shape is {tuple(shape)}"
        )


def _check_scalar(name: str, x: Any, kind: Any) -> jax.Array:
    x = jnp.asarray(x)
    if x.shape != () or not jnp.issubdtype(x.dtype, kind):
        wanted = {jnp.floating: "floating point number", jnp.bool_: "bool"}[kind]
        raise TypeError(
            f"step must return {name} as one {wanted}, got {x.dtype.name}{list(x.shape)}; convert it there"
        )
    return x


def _check_same_state(before: PyTree, after: PyTree) -> None:
    """A state must keep its structure, shapes and types, or no loop could carry it."""
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise TypeError(
            f"step turned a state of structure {jax.tree.structure(before)} "
            f"into one of structure {jax.tree.structure(after)}"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, old), new in pairs:
        old, new = jax.typeof(old), jax.typeof(new)
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise TypeError(
                f"step turned leaf {jax.tree_util.keystr(path) or '(the whole)'} of the state from "
                f"{old} into {new}; convert it there"
            )


def _check_action(action: Any, num_actions: int | None) -> tuple[jax.Array, jax.Array]:
    """The action as an array, and whether it lies in the space. Raises where that can be known now."""
    concrete = not isinstance(action, Tracer)
    if concrete and num_actions is not None:
        check_actions(np.asarray(action), num_actions)
    action = jnp.asarray(action)
    if num_actions is None:
        return action, jnp.bool_(True)
    if action.shape != () or not jnp.issubdtype(action.dtype, jnp.integer):
        raise TypeError(
            f"an action must be one integer from 0 to {num_actions - 1}, got {action.dtype.name}"
            f"{list(action.shape)}; a batch of actions goes through jax.vmap(env.step, (0, 0, 0, None))"
        )
    inside = (action >= 0) & (action < num_actions)
    checkify.debug_check(inside, f"action {{action}} lies outside 0 to {num_actions - 1}", action=action)
    return action.astype(jnp.int32), inside


def check_actions(action: np.ndarray, num_actions: int, first: int = 0) -> None:
    """Raises TypeError for actions that are no integers, ValueError for those outside the space; on the host."""
    last = first + num_actions - 1
    if not np.issubdtype(action.dtype, np.integer):
        raise TypeError(f"actions must be integers from {first} to {last}, got {action.dtype.name}")
    outside = (action < first) | (action > last)
    if outside.any():
        raise ValueError(f"action {action[outside].flat[0]} lies outside the space: {first} to {last}")
