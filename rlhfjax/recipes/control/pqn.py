"""PQN in worlds of numbered actions (arXiv 2407.04811)."""

import jax
import jax.numpy as jnp

from rlhfjax.algorithms import epsilon_greedy, make_optimizer, pqn
from rlhfjax.algorithms.algorithm import check_divisible
from rlhfjax.config import ControlPQN as Config
from rlhfjax.environments import Environment, batch_first, rollout
from rlhfjax.mesh import Devices
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


def control_pqn(env: Environment, config: Config, *, mesh: Devices | None = None) -> Training:
    """PQN as a `Training`; metrics of `rlhfjax.algorithms.pqn`, the episodes', and "epsilon".

    A truncated episode bootstraps from its own final observation, and so does the end of a rollout.

    mesh: devices that the worlds of a run are split over, as in `control_ppo`.

    Float fields of the config may be traced. Raises ValueError where a setting does not fit.
    """
    shape, encode = observations(env)
    network = mlp(config.network, shape, env.num_actions or 0)
    iterations = iterations_of(config.environment_steps, config.worlds, config.steps)
    settings = config.algorithm
    check_divisible(
        config.worlds * config.steps,
        settings.minibatches * settings.microbatches,
        what="minibatches x microbatches",
    )
    check_split(
        mesh, config.worlds, config.worlds * config.steps // (settings.minibatches * settings.microbatches)
    )
    env = recorded(env)

    def evaluate(params: PyTree, observation: jax.Array) -> jax.Array:
        return network.apply(params, encode(observation))

    optimizer = make_optimizer(config.optimizer, iterations * settings.epochs * settings.minibatches)
    algorithm = pqn.make(evaluate, optimizer, settings)

    def init(key: jax.Array) -> Run:
        key_network, key_worlds = jax.random.split(key)
        learner = algorithm.init(network.init(key_network))
        return laid(mesh, Run(learner, start_worlds(env, key_worlds, config.worlds), None, jnp.int32(0)))

    def iterate(run: Run, key: jax.Array) -> tuple[Run, Metrics]:
        key_act, key_learn = jax.random.split(key)
        progress = run.steps / (config.environment_steps * config.epsilon_fraction)
        epsilon = falling(config.epsilon_start, config.epsilon_end, progress)

        def act(observation: jax.Array, key: jax.Array):
            return epsilon_greedy(key, evaluate(run.learner.params, observation), epsilon), ()

        worlds, trajectory = rollout(env, act, run.worlds, key_act, steps=config.steps)
        steps = batch_first(trajectory._replace(info=()))
        batch = pqn.Rollout(
            steps.observation,
            steps.action,
            steps.reward,
            steps.terminated,
            steps.truncated,
            steps.next_observation,
        )
        learner, metrics = algorithm.update(run.learner, batch, key_learn)
        run = Run(learner, worlds, None, run.steps + config.worlds * config.steps)
        return laid(mesh, run), metrics | episode_metrics(trajectory) | {"epsilon": epsilon}

    def policy(run: Run):
        return greedy(evaluate, run.learner.params)

    def values(run: Run, observation: jax.Array) -> jax.Array:
        return evaluate(run.learner.params, observation)

    return Training(init, iterate, policy, values)
