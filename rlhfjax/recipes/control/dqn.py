"""DQN and its relatives in worlds of numbered actions, with replay in device memory.

Shapes: B transitions of an update, N of the replay, L steps of a path.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.algorithms import dqn, epsilon_greedy, make_optimizer
from rlhfjax.config import ControlDQN as Config
from rlhfjax.environments import Environment, Trajectory, replay, rollout
from rlhfjax.mesh import Devices, place_rows
from rlhfjax.networks import mlp
from rlhfjax.recipes.control.training import (
    Metrics,
    PyTree,
    Run,
    Training,
    check_split,
    episode_metrics,
    falling,
    greedy,
    iterations_of,
    laid,
    observations,
    recorded,
    start_worlds,
)


class Item(NamedTuple):
    """What the replay holds of a step."""

    observation: jax.Array
    action: jax.Array
    reward: jax.Array
    next_observation: jax.Array  # at the end of an episode its final one
    terminated: jax.Array
    truncated: jax.Array


def control_dqn(env: Environment, config: Config, *, mesh: Devices | None = None) -> Training:
    """DQN as a `Training`; metrics of `rlhfjax.algorithms.dqn` (means over the updates of an iteration, 0 before the
    first one), the episodes', "epsilon", and "replay/count", the transitions held.

    Every iteration acts for worlds x steps, then makes `updates` updates once the replay holds `learning_starts`. A
    truncated episode bootstraps from its own final observation. Paths of n steps end with their episode, and at the
    newest step that is stored.

    mesh: devices that the worlds of a run are split over, as in `control_ppo`, and the batch of every update. Each
    holds the whole replay, so that it takes its part of a sample from its own memory.

    Float fields of the config may be traced. Raises ValueError where a setting does not fit.
    """
    _check(config)
    check_split(mesh, config.worlds, config.batch)
    shape, encode = observations(env)
    settings = config.algorithm
    quantiles = config.quantiles if settings.quantiles else None
    network = mlp(config.network, shape, env.num_actions or 0, quantiles=quantiles)
    iterations = iterations_of(config.environment_steps, config.worlds, config.steps)
    env = recorded(env)

    def evaluate(params: PyTree, observation: jax.Array) -> jax.Array:
        return network.apply(params, encode(observation))

    def action_values(params: PyTree, observation: jax.Array) -> jax.Array:
        q = evaluate(params, observation)
        return jnp.mean(q, axis=-1) if settings.quantiles else q

    algorithm = dqn.make(evaluate, make_optimizer(config.optimizer, iterations * config.updates), settings)
    learn_once = partial(
        _update, algorithm=algorithm, evaluate=evaluate, config=config, place=place_rows(mesh)
    )

    def init(key: jax.Array) -> Run:
        key_network, key_worlds = jax.random.split(key)
        learner = algorithm.init(network.init(key_network))
        worlds = start_worlds(env, key_worlds, config.worlds)
        first = jax.tree.map(lambda x: x[0], worlds.observation)
        example = Item(first, jnp.int32(0), jnp.float32(0), first, jnp.bool_(False), jnp.bool_(False))
        held = replay.init(example, config.capacity, prioritised=config.prioritised)
        return laid(mesh, Run(learner, worlds, held, jnp.int32(0)))

    def iterate(run: Run, key: jax.Array) -> tuple[Run, Metrics]:
        key_act, key_learn = jax.random.split(key)
        progress = run.steps / config.environment_steps
        epsilon = falling(config.epsilon_start, config.epsilon_end, progress / config.epsilon_fraction)
        beta = falling(config.beta, 1.0, progress)

        def act(observation: jax.Array, key: jax.Array):
            return epsilon_greedy(key, action_values(run.learner.params, observation), epsilon), ()

        worlds, trajectory = rollout(env, act, run.worlds, key_act, steps=config.steps)
        assert run.replay is not None
        held = replay.add(run.replay, _items(trajectory))
        keys = jax.random.split(key_learn, config.updates)

        def learn(carry):
            carry, steps = jax.lax.scan(lambda c, k: learn_once(c[0], c[1], k, beta), carry, keys)
            return carry, {
                name: (jnp.max if name.endswith("_max") else jnp.mean)(x) for name, x in steps.items()
            }

        def wait(carry):
            return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(learn, carry)[1])

        ready = replay.can_sample(held, max(config.batch, config.learning_starts))
        (learner, held), metrics = jax.lax.cond(ready, learn, wait, (run.learner, held))
        run = Run(learner, worlds, held, run.steps + config.worlds * config.steps)
        metrics |= {"epsilon": epsilon, "replay/count": held.count.astype(jnp.float32)}
        return laid(mesh, run), metrics | episode_metrics(trajectory)

    def policy(run: Run):
        return greedy(action_values, run.learner.params)

    def values(run: Run, observation: jax.Array) -> jax.Array:
        return action_values(run.learner.params, observation)

    return Training(init, iterate, policy, values)


def _check(config: Config) -> None:
    if config.batch > config.capacity or config.batch < 1:
        raise ValueError(
            f"batch={config.batch} must lie between 1 and the replay's capacity of {config.capacity}"
        )
    if config.learning_starts > config.capacity:
        raise ValueError(
            f"learning_starts={config.learning_starts} is more than the replay's capacity of {config.capacity}: "
            "no update would ever be made"
        )
    if config.updates < 1 or config.n_step < 1:
        raise ValueError(f"updates={config.updates} and n_step={config.n_step} must be at least 1")
    if config.capacity % config.worlds or config.capacity < config.worlds * max(config.steps, config.n_step):
        raise ValueError(
            f"capacity={config.capacity} must be a multiple of {config.worlds} worlds, and hold at least "
            f"steps={config.steps} and n_step={config.n_step} steps of each"
        )
    if config.algorithm.bootstrap == "sarsa":
        raise ValueError(
            'bootstrap="sarsa" needs the next action, which replay does not hold: choose "expected"'
        )


def _items(trajectory: Trajectory) -> Item:
    """Steps in the order of the replay: those of all worlds at one time beside each other."""
    fields = {name: getattr(trajectory, name) for name in Item._fields}
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), Item(**fields))


def _update(
    learner,
    held: replay.Replay,
    key: jax.Array,
    beta: jax.Array,
    *,
    algorithm,
    evaluate,
    config: Config,
    place: Callable[[dqn.Batch], dqn.Batch],
):
    """One update on a sample of the replay: ((learner, replay), metrics)."""
    key_sample, key_update = jax.random.split(key)
    sample = replay.sample(key_sample, held, config.batch, beta=beta)
    weight = sample.weight if config.prioritised else None
    batch = place(_transitions(held, sample, config)._replace(weight_B=weight))
    learner, metrics = algorithm.update(learner, batch, key_update)
    if config.prioritised:
        error = dqn.td_error(
            learner.params,
            batch,
            evaluate=evaluate,
            config=config.algorithm,
            target_params=learner.target_params,
        )
        held = replay.update_priorities(held, sample.index, error, alpha=config.alpha)
    return (learner, held), metrics


def _transitions(held: replay.Replay, sample: replay.Sample, config: Config) -> dqn.Batch:
    """The sampled steps as a batch, each with the path of n steps that begins with it."""
    if config.n_step == 1:
        x: Item = sample.batch
        return dqn.Batch(x.observation, x.action, x.reward, x.next_observation, x.terminated)
    path = replay.windows(held, sample.index, config.n_step, stride=config.worlds)
    x = path.batch
    batch = dqn.Batch(
        x.observation, x.action, x.reward, x.next_observation, x.terminated, mask_B=path.mask_BL
    )
    batch = dqn.n_step_transitions(
        batch, discount=config.algorithm.discount, steps=config.n_step, truncated=x.truncated
    )
    return jax.tree.map(lambda x: x[:, 0], batch)
