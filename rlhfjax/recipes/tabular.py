"""Tables of action values learnt in worlds of numbered states: whole runs, by the contract of `recipes.control`.

    env = frozen_lake()
    training = control_tabular(env, ControlTabular())
    run, metrics = jax.jit(lambda key: train(training, key, iterations))(jax.random.key(0))
    gap_S = optimality_gap(env.params, tabular_q.action_values(run.learner.table), discount=0.99)

Shapes: B worlds, T steps of each in an iteration, S states, A actions.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algorithms import epsilon_greedy, tabular_q
from rlhfjax.config import ControlTabular as Config
from rlhfjax.environments import Environment, Table, Trajectory, Worlds
from rlhfjax.environments.grid import optimal_values, policy_values
from rlhfjax.recipes.control.training import (
    Metrics,
    Run,
    Training,
    episode_metrics,
    falling,
    greedy,
    recorded,
    start_worlds,
)


class Learner(NamedTuple):
    """What has been learnt, and what will be done."""

    table: tabular_q.State
    action_B: jax.Array  # int32, chosen already: SARSA learns from the action that will be taken


def control_tabular(env: Environment, config: Config) -> Training:
    """A method of `rlhfjax.algorithms.tabular_q` as a `Training`; its metrics, the episodes' and "epsilon".

    Actions are epsilon-greedy in the table as it was when the iteration began (ties at random), and expected SARSA
    values that policy. The steps of an iteration are learnt one after the other, in order of time. A truncated episode
    bootstraps from its own final state.

    Float fields of the config may be traced. Raises ValueError for a world whose observations are not numbered, for
    exploring starts in a world that is no table, for q_lambda in several worlds, and for settings out of range.
    """
    states, actions = _sizes(env, config)
    if config.exploring_starts:
        env = exploring_starts(env)
    env = recorded(env)
    step_all = jax.vmap(env.step, in_axes=(0, 0, 0, None))
    made = tabular_q.make(config.algorithm)

    def init(key: jax.Array) -> Run:
        key_worlds, key_action = jax.random.split(key)
        q_SA = jnp.full((states, actions), config.initial_value, jnp.float32)
        action_B = jax.random.randint(key_action, (config.worlds,), 0, actions, jnp.int32)
        worlds = start_worlds(env, key_worlds, config.worlds)
        return Run(Learner(made.init(q_SA), action_B), worlds, None, jnp.int32(0))

    def iterate(run: Run, key: jax.Array) -> tuple[Run, Metrics]:
        key_act, key_learn = jax.random.split(key)
        progress = run.steps / (config.environment_steps * config.epsilon_fraction)
        epsilon = jnp.float32(falling(config.epsilon_start, config.epsilon_end, progress))
        q_SA = tabular_q.action_values(run.learner.table)

        def step(carry: tuple[Worlds, jax.Array], key: jax.Array):
            worlds, action_B = carry
            key_step, key_next, key_start = jax.random.split(key, 3)
            keys = jax.random.split(key_step, config.worlds)
            seen, state, reward, terminated, truncated, info = step_all(
                keys, worlds.state, action_B, env.params
            )
            final = info.pop("final_observation")
            next_B = epsilon_greedy(key_next, q_SA[final], epsilon)
            trajectory = Trajectory(
                worlds.observation, action_B, reward, terminated, truncated, final, next_B, info
            )
            first_B = epsilon_greedy(key_start, q_SA[seen], 1.0 if config.exploring_starts else epsilon)
            return (Worlds(seen, state), jnp.where(terminated | truncated, first_B, next_B)), trajectory

        carry = (run.worlds, run.learner.action_B)
        (worlds, action_B), trajectory = jax.lax.scan(step, carry, jax.random.split(key_act, config.steps))
        algorithm = tabular_q.make(dataclasses.replace(config.algorithm, epsilon=epsilon))
        table, metrics = algorithm.update(run.learner.table, _transitions(trajectory), key_learn)
        run = Run(Learner(table, action_B), worlds, None, run.steps + config.worlds * config.steps)
        return run, metrics | episode_metrics(trajectory) | {"epsilon": epsilon}

    def policy(run: Run):
        return greedy(lambda q_SA, observation: q_SA[observation], tabular_q.action_values(run.learner.table))

    def values(run: Run, observation: jax.Array) -> jax.Array:
        return tabular_q.action_values(run.learner.table)[observation]

    return Training(init, iterate, policy, values)


def exploring_starts(env: Environment) -> Environment:
    """The same world, whose episodes start in every state equally often (Sutton & Barto, section 5.3)."""
    if not isinstance(env.params, Table):
        raise ValueError(
            "exploring starts need a world that is a table (`table_world`): set exploring_starts=False"
        )
    states = env.params.start_S.shape[0]
    return env._replace(params=env.params._replace(start_S=np.full(states, 1 / states)))


def optimality_gap(table: Table, q_SA: Any, *, discount: float) -> np.ndarray:
    """V*(s) - V(s) of the policy that is greedy in q_SA, float64 [S], computed from the table; 0 is optimal.

    The first of several best actions is taken. At discount 1 a state from which the policy may go on for ever has an
    infinite gap.
    """
    best_S, _ = optimal_values(table, discount=discount)
    q_SA = np.asarray(q_SA)
    policy_SA = np.eye(q_SA.shape[1])[q_SA.argmax(axis=1)]
    if discount < 1:
        return best_S - policy_values(table, policy_SA, discount=discount)[0]
    ends_S = _ends_surely(table, policy_SA)
    # Where it does not end the numbers do not matter: those states are made to end at once, outside of the others' way.
    cut = table._replace(terminated_SAK=table.terminated_SAK | ~ends_S[:, None, None])
    value_S, _ = policy_values(cut, policy_SA, discount=discount)
    return np.where(ends_S, best_S - value_S, np.inf)


def reachable_states(table: Table, policy_SA: Any = None) -> np.ndarray:
    """bool [S], the states in which an episode may stand: from its starts, by any action or those of a policy."""
    follows_SS = _follows(table, policy_SA)
    reached_S = np.asarray(table.start_S) > 0
    for _ in range(reached_S.size):
        reached_S = reached_S | (reached_S @ follows_SS)
    return reached_S


def _ends_surely(table: Table, policy_SA: np.ndarray) -> np.ndarray:
    """bool [S], whether the policy ends the episode with probability 1 from there."""
    follows_SS = _follows(table, policy_SA)
    possible_SAK = (table.probability_SAK > 0) & (policy_SA[:, :, None] > 0)
    may_end_S = np.any(possible_SAK & table.terminated_SAK, axis=(1, 2))
    for _ in range(may_end_S.size):
        may_end_S = may_end_S | (follows_SS @ may_end_S)
    never_S = ~may_end_S
    for _ in range(never_S.size):  # what may lead to a state without an end does not end surely
        never_S = never_S | (follows_SS @ never_S)
    return ~never_S


def _follows(table: Table, policy_SA: Any = None) -> np.ndarray:
    """bool [S, S], whether the second state may follow the first, the episode going on."""
    possible_SAK = (np.asarray(table.probability_SAK) > 0) & ~np.asarray(table.terminated_SAK)
    if policy_SA is not None:
        possible_SAK = possible_SAK & (np.asarray(policy_SA)[:, :, None] > 0)
    states = possible_SAK.shape[0]
    follows_SS = np.zeros((states, states), bool)
    row_SAK = np.broadcast_to(np.arange(states)[:, None, None], possible_SAK.shape)
    np.logical_or.at(follows_SS, (row_SAK, table.next_SAK), possible_SAK)
    return follows_SS


def _transitions(trajectory: Trajectory) -> tabular_q.Transition:
    """The steps in one row, time first; `extras` are the actions chosen next."""
    batch = tabular_q.Transition(
        trajectory.observation,
        trajectory.action,
        trajectory.reward,
        trajectory.next_observation,
        trajectory.terminated,
        trajectory.truncated,
        trajectory.extras,
    )
    return jax.tree.map(lambda x: x.reshape(-1), batch)


def _sizes(env: Environment, config: Config) -> tuple[int, int]:
    """Numbers of states and actions; ValueError where world and settings do not fit."""
    if env.num_observations is None or env.observation_shape != () or env.num_actions is None:
        raise ValueError(
            "a table needs a world of numbered observations and actions (frozen_lake, cliff_walking, table_world); "
            f"this one has num_observations={env.num_observations} and observations of shape {env.observation_shape}"
        )
    for name in ("environment_steps", "worlds", "steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if config.algorithm.method == "q_lambda" and config.worlds > 1:
        raise ValueError(
            f"method='q_lambda' learns from one walk, not from worlds={config.worlds}: set worlds to 1"
        )
    return env.num_observations, env.num_actions
