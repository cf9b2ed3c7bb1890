"""What the training functions of all algorithms share: the contract, the whole run, the worlds and their metrics.

Shapes: B worlds, T steps of each in an iteration, A actions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.environments import Environment, Trajectory, Worlds, autoreset, record_episodes, start
from rlhfjax.environments.replay import Replay
from rlhfjax.environments.rollout import Act
from rlhfjax.mesh import Devices, check_rows, rows, whole

PyTree = Any
Metrics = dict[str, jax.Array]


class Run(NamedTuple):
    """All that a run needs to go on."""

    learner: Any  # State of the algorithm: parameters, targets, optimiser
    worlds: Worlds  # B of them, between two steps
    replay: Replay | None  # None: the algorithm learns from fresh steps only
    steps: jax.Array  # int32 [], steps taken in all worlds together


class Training(NamedTuple):
    """A run as pure functions. The caller jits, donates the state, vmaps and shards; keys are consumed.

    init(key) -> Run
    iterate(run, key) -> (run, metrics)
        Acts for T steps in all worlds, then learns; one program. Metrics are a flat dict of float32 scalars with the
        same names at every iteration.
    policy(run) -> act
        Greedy, for `rlhfjax.environments.play`.
    values(run, observation [..., *observation_shape]) -> float32 [..., A]
        Action values; None: the algorithm has none.
    """

    init: Callable[[jax.Array], Run]
    iterate: Callable[[Run, jax.Array], tuple[Run, Metrics]]
    policy: Callable[[Run], Act]
    values: Callable[[Run, jax.Array], jax.Array] | None


def train(
    training: Training, key: jax.Array, iterations: int, *, run: Run | None = None, first: int = 0
) -> tuple[Run, Metrics]:
    """A whole run in one program: `jit` it with `iterations` static, `vmap` it over keys for seeds.

    Iteration i takes the key `fold_in(key, i)`, and the start `fold_in(key, 2 ** 31 - 1)`. So a run that is stopped
    after iteration k - 1 goes on with the same key, `run=` its state and `first=k` as if it had not been; to the same
    bits where both are made of parts of equal length. Scans of unequal length are different programs, which may round
    differently.

    Returns:
      run, metrics: of every iteration, [iterations].
    """
    if run is None:
        run = training.init(jax.random.fold_in(key, _START))

    def one(run: Run, index: jax.Array) -> tuple[Run, Metrics]:
        return training.iterate(run, jax.random.fold_in(key, index))

    return jax.lax.scan(one, run, first + jnp.arange(iterations))


_START = 2**31 - 1  # no iteration has this number


def laid(mesh: Devices | None, run: Run, *, axis: int = 0) -> Run:
    """The run, its worlds split over the mesh and the rest whole on every device; within a program.

    axis: that of the worlds, 1 behind an axis of seeds. None and one device change nothing.
    """
    if mesh is None or mesh.size == 1:
        return run
    worlds = jax.lax.with_sharding_constraint(run.worlds, rows(mesh, axis))
    rest = jax.lax.with_sharding_constraint(run._replace(worlds=None), whole(mesh))
    return rest._replace(worlds=worlds)


def check_split(mesh: Devices | None, worlds: int, batch: int) -> None:
    """Raises ValueError where worlds, or the rows that are learnt from at a time, cannot be split evenly."""
    if mesh is not None:
        check_rows(mesh, worlds, what="set of worlds")
        check_rows(mesh, batch, what="batch, or a minibatch or microbatch of it,")


def recorded(env: Environment) -> Environment:
    """The world as it is trained in: it starts anew where an episode ends, and tells returns and lengths."""
    return record_episodes(autoreset(env))


def start_worlds(env: Environment, key: jax.Array, count: int) -> Worlds:
    """`count` worlds at the start of an episode; `env` is `recorded`."""
    return start(env, key, count)


def observations(env: Environment) -> tuple[tuple[int, ...], Callable[[jax.Array], jax.Array]]:
    """The shape of what a network reads, and what makes it of a batch of observations: numbers become one-hot.

    Raises ValueError for a world without a fixed number of actions, or whose observation is no single array.
    """
    if env.num_actions is None:
        raise ValueError("these training functions need a world with numbered actions; num_actions is None")
    if env.observation_shape is None:
        raise ValueError(
            "these training functions need a world whose observation is one array; observation_shape is None: "
            "wrap the world so that it gives one"
        )
    size = env.num_observations
    if size is None:
        return env.observation_shape, lambda x: x
    return (*env.observation_shape, size), lambda x: jax.nn.one_hot(x, size)


def iterations_of(environment_steps: int, worlds: int, steps: int) -> int:
    """Iterations of a run of so many steps of all worlds together, at least 1."""
    for name, x in (("environment_steps", environment_steps), ("worlds", worlds), ("steps", steps)):
        if x < 1:
            raise ValueError(f"{name}={x} must be at least 1")
    return max(1, environment_steps // (worlds * steps))


def falling(start: jax.Array | float, end: jax.Array | float, progress: jax.Array) -> jax.Array:
    """From `start` at progress 0 to `end` at 1, linearly; then `end`."""
    return start + (end - start) * jnp.clip(progress, 0.0, 1.0)


def episode_metrics(trajectory: Trajectory) -> Metrics:
    """Of the episodes that ended in it: mean return, mean length (0 where none did), their number; and all steps."""
    ended_TB = jnp.logical_or(trajectory.terminated, trajectory.truncated)
    count = jnp.sum(ended_TB, dtype=jnp.float32)

    def mean(name: str) -> jax.Array:
        x_TB = trajectory.info[name].astype(jnp.float32)
        return jnp.sum(jnp.where(ended_TB, x_TB, 0.0)) / jnp.maximum(count, 1.0)

    return {
        "episode/return": mean("episode_return"),
        "episode/length": mean("episode_length"),
        "episode/count": count,
        "environment_steps": jnp.float32(ended_TB.size),
    }


def greedy(apply: Callable[[PyTree, jax.Array], jax.Array], params: PyTree) -> Act:
    """The action of the largest output, for `rlhfjax.environments.play`; the first of them on a tie."""

    def act(observation: jax.Array, key: jax.Array) -> tuple[jax.Array, tuple]:
        del key
        return jnp.argmax(apply(params, observation), axis=-1).astype(jnp.int32), ()

    return act
