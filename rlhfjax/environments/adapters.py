"""Other libraries' environments here, and ours there. gymnax and Gymnasium are imported on first use.

gymnax is JAX: its environments become ours and run inside a compiled rollout. Gymnasium's run in Python on the
host: `rollout_on_host` steps them between calls of a jitted policy and gives the same `Trajectory`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.environments.environment import Environment, Step, check_actions, checked
from rlhfjax.environments.rollout import Act, Trajectory
from rlhfjax.environments.text.text_world import TextWorld, Utterance, decode, encode, known_part

PyTree = Any


def from_gymnax(env: Any, params: PyTree = None) -> Environment:
    """An environment of gymnax, version 1 (six values) or an older one (five).

    Version 1 resets by itself and keeps the final observation. The older ones return one `done` for an end and
    for the time limit, and lose the final observation: their `step_env`, which does not reset, is called
    instead. There an episode terminated if it would be done without a time limit, and was truncated if it is
    done only with it; `autoreset` (which `rollout` applies) does the rest.

    params: None takes the environment's own. ValueError for a step that returns neither, and for an older
    environment that is wrapped (only what is not a wrapper has a step that does not reset).
    """
    from gymnax.environments import environment as gymnax_environment  # pyright: ignore[reportMissingImports]
    from gymnax.environments import spaces  # pyright: ignore[reportMissingImports]

    params = env.default_params if params is None else params
    space = env.action_space(params)
    num_actions = int(space.n) if isinstance(space, spaces.Discrete) else None
    key = jax.eval_shape(jax.random.key, 0)
    observation, state = jax.eval_shape(env.reset, key, params)
    action = jax.eval_shape(space.sample, key)
    values = len(jax.eval_shape(env.step, key, state, action, params))
    shape = observation.shape if isinstance(observation, jax.ShapeDtypeStruct) else None
    if values == 6:
        return checked(Environment(env.reset, env.step, num_actions, shape, params=params, autoresets=True))
    if values != 5:
        raise ValueError(f"step of {env!r} returns {values} values; gymnax returns six, and five before 1.0")
    if not isinstance(env, gymnax_environment.Environment):
        raise ValueError(
            f"{type(env).__name__} wraps an environment of the older gymnax, whose step loses the final "
            "observation; give the environment itself and wrap what comes out"
        )
    return checked(Environment(env.reset_env, _older_step(env), num_actions, shape, params=params))


def _older_step(env: Any) -> Callable[..., Step]:
    """A step that does not reset, with `done` taken apart."""

    def step(key: jax.Array, state: PyTree, action: jax.Array, params: PyTree) -> Step:
        observation, after, reward, done, info = env.step_env(key, state, action, params)
        unlimited = params.replace(max_steps_in_episode=jnp.iinfo(jnp.int32).max)
        *_, ended, _ = env.step_env(key, state, action, unlimited)  # what both share is compiled once
        done, ended = jnp.asarray(done, bool), jnp.asarray(ended, bool)
        after = jax.tree.map(lambda new, old: jnp.asarray(new, jnp.asarray(old).dtype), after, state)
        return observation, after, jnp.asarray(reward, jnp.float32), ended, done & ~ended, info

    return step


def start_on_host(env: Any, seed: int | None = None) -> np.ndarray:
    """The first observations [B, ...] of a Gymnasium environment, single (B = 1) or vectorised.

    Raises ValueError for a vectorised one that does not reset in the step that ends an episode.
    """
    if not _is_vectorised(env):
        return np.asarray(env.reset(seed=seed)[0])[None]
    # This import, and the mode below, came with Gymnasium 1.1.
    from gymnasium.vector import AutoresetMode  # pyright: ignore[reportMissingImports]

    mode = env.metadata.get("autoreset_mode")
    if mode != AutoresetMode.SAME_STEP:
        raise ValueError(
            f"the vectorised environment has autoreset mode {mode}, which puts a step without an action between "
            'two episodes; make it with gymnasium.make_vec(name, num_envs=B, vectorization_mode="sync", '
            "vector_kwargs={'autoreset_mode': gymnasium.vector.AutoresetMode.SAME_STEP})"
        )
    return np.array(env.reset(seed=seed)[0])


def rollout_on_host(
    env: Any, act: Act, observation: np.ndarray, key: jax.Array, *, steps: int
) -> tuple[np.ndarray, Trajectory]:
    """`steps` steps of a Gymnasium environment, single or vectorised; NumPy [T, B, ...], as `rollout` gives.

    act: `act(observation, key) -> (action, extras)`, jitted by the caller and so compiled once: what changes
    from one rollout to the next, as parameters do, is to be an argument of what is jitted, e.g.
    `policy = jax.jit(policy)` and then `lambda observation, key: policy(params, observation, key)`.
    observation: that of `start_on_host`, or the one that the last rollout returned. The key is consumed.

    An episode that ends is followed by the next within the step; `next_observation` is the final one. ValueError
    for an action outside the environment's space.
    """
    step = _step_vectorised if _is_vectorised(env) else _step_single
    rows = []
    for t in range(steps):
        action, extras = act(jnp.asarray(observation), jax.random.fold_in(key, t))
        action = _in_space(env, np.asarray(action))
        after, reward, terminated, truncated, final = step(env, action)
        extras = jax.tree.map(np.asarray, extras)
        rows.append(Trajectory(observation, action, reward, terminated, truncated, final, extras))
        observation = after
    return observation, jax.tree.map(lambda *x: np.stack(x), *rows)


def _is_vectorised(env: Any) -> bool:
    import gymnasium  # pyright: ignore[reportMissingImports]

    return isinstance(env, gymnasium.vector.VectorEnv)


def _step_single(env: Any, action: np.ndarray) -> tuple[np.ndarray, ...]:
    observation, reward, terminated, truncated, _ = env.step(action[0])
    final = np.asarray(observation)[None]
    after = np.asarray(env.reset()[0])[None] if terminated or truncated else final
    return after, np.array([reward], np.float32), np.array([terminated]), np.array([truncated]), final


def _step_vectorised(env: Any, action: np.ndarray) -> tuple[np.ndarray, ...]:
    after, reward, terminated, truncated, info = env.step(action)
    after = np.array(after)  # the environment may write into its own array at the next step
    final = after.copy()
    for b in np.flatnonzero(terminated | truncated):
        final[b] = info["final_obs"][b]
    return after, reward.astype(np.float32), terminated.copy(), truncated.copy(), final


def _in_space(env: Any, action: np.ndarray) -> np.ndarray:
    """The actions in the type of the environment's space. Raises ValueError for one that lies outside."""
    from gymnasium import spaces  # pyright: ignore[reportMissingImports]

    space = env.single_action_space if _is_vectorised(env) else env.action_space
    if isinstance(space, spaces.Discrete):
        check_actions(action, int(space.n), int(space.start))
        return action.astype(space.dtype)
    action = action.astype(space.dtype)
    for one in action:
        if not space.contains(one):
            raise ValueError(f"action {one} lies outside the space {space}")
    return action


def to_gymnasium(
    env: Environment | TextWorld,
    params: PyTree = None,
    *,
    observation_space: Any = None,
    to_host: Callable[[Any], Any] | None = None,
) -> Any:
    """Ours as a `gymnasium.Env`: `observation, info = env.reset(seed=0)`, `env.step(action)`. Steps are jitted.

    observation_space: None is `Discrete` for numbered observations and otherwise a `Box` without bounds.
    to_host: what is made of an observation (NumPy) before it is handed over, together with an `observation_space`
    that contains it. Numbered observations become ints.

    A text world is spoken to and answers in strings, `env.step("move up")`; its stop token is said for one who does
    not. Its spaces are `gymnasium.spaces.Text`, and samples of actions are tokens of its vocabulary, joined.

    The world's randomness is that of the seed given to `reset`; without one it goes on from the last.
    ValueError for an action outside the space, and for a step after an end without a reset. Of a text world outside
    are what is no string, a text with a part that is not in the vocabulary (which is named), and one that is too long.
    """
    from gymnasium import spaces  # pyright: ignore[reportMissingImports]

    if isinstance(env, TextWorld):
        world, env = env, env.env
        params = env.params if params is None else params
        if observation_space is not None or to_host is not None:
            raise ValueError("a text world answers in strings; leave out observation_space and to_host")
        spoken = _spoken_space(world)
        most = world.observation_length * max(map(len, world.vocabulary))
        heard = spaces.Text(max(most, 1), min_length=0, charset=_letters(world))
        return _wrapped(
            env, params, spoken, heard, lambda text: _said(world, text), lambda x: _heard(world, x)
        )
    env = checked(env)
    if env.num_actions is None:
        raise ValueError("to_gymnasium needs numbered actions; this environment's num_actions is None")
    num_actions, numbered = env.num_actions, env.num_observations
    params = env.params if params is None else params

    def to_action(action: Any) -> jax.Array:
        check_actions(np.asarray(action), num_actions)
        return jnp.int32(action)

    if observation_space is None:
        observation_space = _default_space(env, params)
    if to_host is None:
        to_host = np.asarray if numbered is None else int
    return _wrapped(env, params, spaces.Discrete(num_actions), observation_space, to_action, to_host)


def _wrapped(
    env: Environment,
    params: PyTree,
    actions: Any,
    observations: Any,
    to_action: Callable[[Any], Any],
    to_host: Callable[[Any], Any],
) -> Any:
    """The `gymnasium.Env` itself. to_action: checks an action and makes it what `env.step` takes."""
    import gymnasium  # pyright: ignore[reportMissingImports]

    reset, step = jax.jit(env.reset), jax.jit(env.step)

    class Wrapped(gymnasium.Env):
        """A pure environment behind the interface of Gymnasium; it holds the state."""

        metadata = {"render_modes": []}

        def __init__(self) -> None:
            self.action_space = actions
            self.observation_space = observations
            self._key, self._step, self._state = jax.random.key(0), 0, None

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
            super().reset(seed=seed)
            self._key, self._step = jax.random.key(int(self.np_random.integers(2**31))), 0
            observation, self._state = reset(jax.random.fold_in(self._key, 0), params)
            return to_host(observation), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
            if self._state is None:
                raise ValueError("the episode has ended, or none was begun: call reset() before step()")
            action = to_action(action)
            self._step += 1
            key = jax.random.fold_in(self._key, self._step)
            out = step(key, self._state, action, params)
            observation, self._state, reward, terminated, truncated, info = out
            observation = info.pop("final_observation") if env.autoresets else observation
            if terminated or truncated:
                self._state = None
            info = jax.tree.map(np.asarray, info)
            return to_host(observation), float(reward), bool(terminated), bool(truncated), info

    return Wrapped()


def _letters(world: TextWorld) -> str:
    return "".join(sorted(set("".join(world.vocabulary[1:]))))


def _said(world: TextWorld, text: Any) -> Utterance:
    """What an agent says, as an utterance, with the stop token. ValueError where it cannot be said."""
    ids = _with_stop(world, encode(world, text))
    if len(ids) > world.action_length:
        raise ValueError(
            f"{text!r} has {len(ids)} tokens with the stop token; this world listens to {world.action_length}"
        )
    token_L = np.zeros(world.action_length, np.int32)
    token_L[: len(ids)] = ids
    return Utterance(jnp.asarray(token_L), jnp.int32(len(ids)))


def _with_stop(world: TextWorld, ids: list[int]) -> list[int]:
    return ids if ids and ids[-1] == world.stop_token else [*ids, world.stop_token]


def _heard(world: TextWorld, observation: Utterance) -> str:
    return decode(world, np.asarray(observation.token_L)[: int(observation.length)].tolist())


def _spoken_space(world: TextWorld) -> Any:
    """The texts that can be said in a world, as a space of Gymnasium."""
    from gymnasium import spaces  # pyright: ignore[reportMissingImports]

    class Spoken(spaces.Text):
        """Texts of a world's vocabulary."""

        def sample(self, mask: Any = None, probability: Any = None) -> str:
            if mask is not None or probability is not None:
                raise ValueError("texts of a world's vocabulary are sampled without a mask or probabilities")
            count = int(self.np_random.integers(world.action_length))
            ids = self.np_random.integers(1, len(world.vocabulary), count)
            return decode(world, [int(i) for i in ids if i != world.stop_token])

        def contains(self, x: Any) -> bool:
            if not super().contains(x):
                return False
            ids, end = known_part(world.vocabulary, x)
            return end == len(x) and len(_with_stop(world, ids)) <= world.action_length

    most = world.action_length * max(map(len, world.vocabulary))
    return Spoken(most, min_length=0, charset=_letters(world))


def _default_space(env: Environment, params: PyTree) -> Any:
    from gymnasium import spaces  # pyright: ignore[reportMissingImports]

    if env.num_observations is not None:
        return spaces.Discrete(env.num_observations)
    shape = jax.eval_shape(env.reset, jax.eval_shape(jax.random.key, 0), params)[0]
    if not isinstance(shape, jax.ShapeDtypeStruct):
        raise ValueError(
            "the observations are a pytree of several arrays; give observation_space and to_host"
        )
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return spaces.Box(-np.inf, np.inf, shape.shape, np.dtype(shape.dtype).type)
    if shape.dtype == bool:
        return spaces.MultiBinary(shape.shape)
    limits = np.iinfo(shape.dtype)
    return spaces.Box(limits.min, limits.max, shape.shape, np.dtype(shape.dtype).type)
