"""PPO in worlds of numbered actions: `rlhfjax.algorithms.ppo`, the file that trains language models, with two MLPs."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.algorithms import make_optimizer, ppo
from rlhfjax.algorithms.algorithm import check_divisible
from rlhfjax.config import ControlPPO as Config
from rlhfjax.environments import Environment, Trajectory, Worlds, batch_first, rollout
from rlhfjax.environments.rollout import Act
from rlhfjax.mesh import Devices
from rlhfjax.networks import mlp
from rlhfjax.ops import gae
from rlhfjax.recipes.control.training import (
    Metrics,
    PyTree,
    Run,
    Training,
    check_split,
    episode_metrics,
    greedy,
    iterations_of,
    laid,
    observations,
    recorded,
    start_worlds,
)


class Parts(NamedTuple):
    """PPO in a world, in pieces: for a loop that does something between acting and learning.

    init(key) -> Run
    act(run, key) -> (worlds, trajectory)
        `config.steps` steps in all worlds; `trajectory.extras` are log-probabilities of the actions.
    learn(run, trajectory, key) -> (run, metrics)
        One update on what was done by the policy of `run`; of the trajectory's reward, whatever it is.
    policy(run) -> act
        Greedy.
    """

    init: Callable[[jax.Array], Run]
    act: Callable[[Run, jax.Array], tuple[Worlds, Trajectory]]
    learn: Callable[[Run, Trajectory, jax.Array], tuple[Run, Metrics]]
    policy: Callable[[Run], Act]


def control_ppo(env: Environment, config: Config, *, mesh: Devices | None = None) -> Training:
    """PPO as a `Training`; parameters {"policy", "critic"}, metrics of `rlhfjax.algorithms.ppo` and the episodes'.

    A truncated episode bootstraps from the critic's value of its own final observation, and so does the end of a
    rollout. The reference policy of the KL terms is that of the rollout. Each row of the batch is one step, so that
    minibatches mix worlds and times, as those of arXiv 1707.06347 do; in the metrics a sequence is one step, and its
    reward the lambda-return.

    mesh: devices that the worlds of a run are split over, and with them acting and every minibatch; parameters are
    whole on each. None: for one device, or seeds over several.

    Float fields of the config may be traced. Raises ValueError where a setting does not fit.
    """
    parts = ppo_parts(env, config, mesh=mesh)

    def iterate(run: Run, key: jax.Array) -> tuple[Run, Metrics]:
        key_act, key_learn = jax.random.split(key)
        worlds, trajectory = parts.act(run, key_act)
        return parts.learn(run._replace(worlds=worlds), trajectory, key_learn)

    return Training(parts.init, iterate, parts.policy, None)


def ppo_parts(env: Environment, config: Config, *, mesh: Devices | None = None) -> Parts:
    """What `control_ppo` is made of; the arguments and errors are its own."""
    shape, encode = observations(env)
    actor = mlp(config.network, shape, env.num_actions or 0)
    critic = mlp(dataclasses.replace(config.network, output_scale=1.0, dueling=False), shape, 1)
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

    def value_of(params: PyTree, observation: jax.Array) -> jax.Array:
        return critic.apply(params["critic"], encode(observation))[..., 0]

    def log_policy(params: PyTree, observation: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(actor.apply(params["policy"], encode(observation)))

    def evaluate(params: PyTree, inputs: tuple[jax.Array, jax.Array]):
        observation, action = inputs
        logp_A = log_policy(params, observation)
        logp = jnp.take_along_axis(logp_A, action[..., None], axis=-1)[..., 0]
        return logp, -jnp.sum(jnp.exp(logp_A) * logp_A, axis=-1), value_of(params, observation)

    optimizer = make_optimizer(config.optimizer, iterations * settings.epochs * settings.minibatches)
    algorithm = ppo.make(evaluate, optimizer, settings)

    def init(key: jax.Array) -> Run:
        key_actor, key_critic, key_worlds = jax.random.split(key, 3)
        params = {"policy": actor.init(key_actor), "critic": critic.init(key_critic)}
        worlds = start_worlds(env, key_worlds, config.worlds)
        return laid(mesh, Run(algorithm.init(params), worlds, None, jnp.int32(0)))

    def act(run: Run, key: jax.Array) -> tuple[Worlds, Trajectory]:
        params = run.learner.params

        def choose(observation: jax.Array, key: jax.Array):
            logp_BA = log_policy(params, observation)
            action_B = jax.random.categorical(key, logp_BA).astype(jnp.int32)
            return action_B, jnp.take_along_axis(logp_BA, action_B[:, None], axis=1)[:, 0]

        return rollout(env, choose, run.worlds, key, steps=config.steps)

    def learn(run: Run, trajectory: Trajectory, key_learn: jax.Array) -> tuple[Run, Metrics]:
        batch = ppo_steps(trajectory, partial(value_of, run.learner.params), settings)
        learner, metrics = algorithm.update(run.learner, batch, key_learn)
        run = Run(learner, run.worlds, None, run.steps + config.worlds * config.steps)
        return laid(mesh, run), metrics | episode_metrics(trajectory)

    def policy(run: Run):
        return greedy(log_policy, run.learner.params)

    return Parts(init, act, learn, policy)


def ppo_steps(trajectory: Trajectory, value_of, config: ppo.Config) -> ppo.Rollout:
    """The trajectory as rows of one step each, [B * T, 1]; its `extras` are the log-probabilities of the actions.

    Of a step alone, PPO makes advantage = reward - value and returns = reward, if the step is said to terminate.
    Given the lambda-return in place of the reward, these are exactly the advantage and the return of the whole
    trajectory.
    """
    trajectory = batch_first(trajectory)
    value = value_of(trajectory.observation)
    _, returns = gae(
        trajectory.reward,
        value,
        discount=config.discount,
        lam=config.lam,
        next_value=value_of(trajectory.next_observation),
        terminated=trajectory.terminated,
        truncated=trajectory.truncated,
    )

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(-1, 1, *x.shape[2:])

    inputs = (trajectory.observation, trajectory.action)
    inputs, logp, value, returns = jax.tree.map(rows, (inputs, trajectory.extras, value, returns))
    every = jnp.ones(returns.shape, bool)
    return ppo.Rollout(inputs, logp, logp, value, returns, every, terminated=every)
