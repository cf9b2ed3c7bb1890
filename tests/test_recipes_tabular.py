"""Whole runs of the tabular methods: optimal on FrozenLake and CliffWalking, by the exact table; each step by the
equation; stopped and resumed, and swept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_tables import table_of

from rlhfjax.algorithms import tabular_q
from rlhfjax.config import ControlTabular, TabularQ
from rlhfjax.environments import bandit, catch, cliff_walking, frozen_lake, play, table_world
from rlhfjax.environments.grid import optimal_values, policy_values
from rlhfjax.recipes.control import iterations_of, train
from rlhfjax.recipes.tabular import control_tabular, exploring_starts, optimality_gap, reachable_states

METHODS = list(tabular_q.METHODS)
SMALL = ControlTabular(environment_steps=4_000, worlds=4, steps=5)


def method(config: ControlTabular, name: str, **changes) -> ControlTabular:
    """The settings with another method; traces need a single walk."""
    if name == "q_lambda":
        config = dataclasses.replace(config, worlds=1, steps=config.worlds * config.steps)
    return dataclasses.replace(
        config, algorithm=dataclasses.replace(config.algorithm, method=name, **changes)
    )


def learnt(env, config, seeds=2) -> np.ndarray:
    """The tables of whole runs, [seeds, S, A]."""
    training = control_tabular(env, config)
    iterations = iterations_of(config.environment_steps, config.worlds, config.steps)

    def table(key):
        run, _ = train(training, key, iterations)
        return tabular_q.action_values(run.learner.table)

    return np.asarray(jax.jit(jax.vmap(table))(jax.random.split(jax.random.key(1), seeds)))


@pytest.mark.parametrize(
    ("name", "environment_steps"),
    [
        pytest.param("q_learning", 120_000, id="q_learning"),  # the method that needs the fewest
        *(pytest.param(name, None, marks=pytest.mark.slow, id=f"{name}, defaults") for name in METHODS),
    ],
)
def test_the_greedy_policy_is_optimal_on_the_slippery_lake(name, environment_steps):
    """Its value, computed from the table, is within 1e-3 of V* in every state; Q itself is near Q*."""
    env = frozen_lake()
    assert env.params.probability_SAK.max() < 0.34  # it is slippery
    config = ControlTabular()
    if environment_steps is not None:
        config = dataclasses.replace(config, environment_steps=environment_steps)
    q_RSA = learnt(env, method(config, name))
    best_S, best_SA = optimal_values(env.params, discount=0.99)
    for q_SA in q_RSA:
        assert optimality_gap(env.params, q_SA, discount=0.99).max() < 1e-3
        np.testing.assert_allclose(q_SA.max(axis=1), best_S, atol=0.08)
        np.testing.assert_allclose(q_SA, best_SA, atol=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_greedy_policy_is_optimal_on_the_cliff(name):
    """Nothing is random there, and the step size may stay: Q itself becomes Q*, wherever one may stand."""
    env = cliff_walking(limit=100)
    # These two are done early: the others value exploration, which takes long to fall, or learn two tables.
    steps = 60_000 if name in ("q_learning", "q_lambda") else 150_000
    config = method(
        ControlTabular(environment_steps=steps), name, discount=1.0, step_size=0.5, decay_power=None
    )
    best_S, best_SA = optimal_values(env.params, discount=1.0)
    standing_S = reachable_states(env.params)
    assert standing_S.sum() == 37  # neither the cliff nor the goal
    for q_SA in learnt(env, config):
        assert optimality_gap(env.params, q_SA, discount=1.0)[standing_S].max() < 1e-9
        np.testing.assert_allclose(q_SA.max(axis=1)[standing_S], best_S[standing_S], atol=1e-3)
        np.testing.assert_allclose(
            q_SA[standing_S], best_SA[standing_S], atol=5e-2 if name == "double_q" else 1e-3
        )


def test_the_policy_of_a_table_walks_along_the_cliff():
    env = cliff_walking(limit=100)
    best_SA = optimal_values(env.params, discount=1.0)[1]
    training = control_tabular(env, ControlTabular())
    value_of = training.values
    assert value_of is not None

    @jax.jit
    def walked(q_SA):
        run = training.init(jax.random.key(0))
        run = run._replace(learner=run.learner._replace(table=run.learner.table._replace(q=q_SA[None])))
        games = play(env, training.policy(run), jax.random.key(0), count=3, most_steps=20)
        return games.score_B, value_of(run, jnp.array([36, 35]))

    score_B, value_SA = walked(np.float32(best_SA))
    np.testing.assert_array_equal(score_B, -13.0)
    np.testing.assert_allclose(value_SA, best_SA[[36, 35]], rtol=1e-6)


def test_sarsa_learns_the_safe_path_if_it_goes_on_exploring():
    """Sutton & Barto, example 6.6: of one who stumbles, the values hold that he does; Q-learning's do not."""
    env = cliff_walking(limit=100)
    base = ControlTabular(environment_steps=100_000, epsilon_start=0.2, epsilon_end=0.2)
    paths = {}
    for name in ("q_learning", "expected_sarsa"):
        config = method(base, name, discount=1.0, step_size=0.2, decay_power=None)
        greedy_S = learnt(env, config, seeds=1)[0].argmax(axis=1)
        state, path = 36, [36]
        while state != 47 and len(path) < 40:
            state = int(env.params.next_SAK[state, greedy_S[state], 0])
            path.append(state)
        paths[name] = path
    assert len(paths["q_learning"]) == 14
    assert all(24 <= s < 36 for s in paths["q_learning"][1:-1])  # along the cliff
    assert len(paths["expected_sarsa"]) > 14
    assert sum(24 <= s < 36 for s in paths["expected_sarsa"]) <= 4  # away from it


@pytest.mark.parametrize("name", ["q_learning", "sarsa", "expected_sarsa"])
def test_each_step_obeys_the_equation(name):
    """One step an update, three worlds in turn; the action that is learnt from is the one taken next."""
    env = frozen_lake(slippery=False, limit=None)
    base = ControlTabular(
        environment_steps=300, worlds=3, steps=1, epsilon_start=0.5, epsilon_end=0.5, initial_value=-2.0
    )
    training = control_tabular(env, method(base, name, discount=0.9, step_size=0.3, decay_power=None))
    iterate = jax.jit(training.iterate)
    run, q_SA, ends = jax.jit(training.init)(jax.random.key(3)), np.full((16, 4), -2.0), 0
    for i in range(80):
        before = run
        run, metrics = iterate(before, jax.random.fold_in(jax.random.key(4), i))
        state_B, action_B = np.asarray(before.worlds.observation), np.asarray(before.learner.action_B)
        next_B, next_action_B = np.asarray(run.worlds.observation), np.asarray(run.learner.action_B)
        for b in range(3):
            s, a = state_B[b], action_B[b]
            after, reward = int(env.params.next_SAK[s, a, 0]), env.params.reward_SAK[s, a, 0]
            if env.params.terminated_SAK[s, a, 0]:
                future, ends = 0.0, ends + 1
            elif name == "sarsa":
                assert next_B[b] == after
                future = q_SA[after, next_action_B[b]]
            elif name == "q_learning":
                future = q_SA[after].max()
            else:
                best = q_SA[after] == q_SA[after].max()
                future = np.sum((0.5 * best / best.sum() + 0.5 / 4) * q_SA[after])
            q_SA[s, a] += 0.3 * (reward + 0.9 * future - q_SA[s, a])
        np.testing.assert_allclose(np.asarray(run.learner.table.q)[0], q_SA, rtol=1e-5, atol=1e-5)
        assert metrics["epsilon"] == 0.5 and metrics["environment_steps"] == 3
    assert ends > 0


def test_a_time_limit_is_no_end():
    """A state that pays 1 for ever, cut off after 3 steps: worth 1 / (1 - discount), not 1 + d + d^2."""
    table = table_of(np.ones((1, 1, 1)), np.ones((1, 1)))
    env = table_world(table, limit=3)
    config = ControlTabular(
        environment_steps=2_000, worlds=1, steps=10, algorithm=TabularQ(discount=0.9, step_size=0.5)
    )
    for name in ("q_learning", "sarsa", "q_lambda"):
        q_RSA = learnt(env, method(config, name), seeds=1)
        np.testing.assert_allclose(q_RSA, 10.0, rtol=1e-3, err_msg=name)


def test_a_time_limit_bootstraps_from_where_it_was_reached():
    """From state 0 one comes to state 1, which pays 1 for ever; the limit sends back to 0, which is worth less."""
    table = table_of(np.array([[[0.0, 1.0]], [[0.0, 1.0]]]), np.array([[0.0], [1.0]]))
    env = table_world(table._replace(start_S=np.array([1.0, 0.0])), limit=2)
    config = ControlTabular(
        environment_steps=2_000,
        worlds=1,
        steps=10,
        exploring_starts=False,
        algorithm=TabularQ(discount=0.9, step_size=0.5),
    )
    np.testing.assert_allclose(learnt(env, config, seeds=1)[0, :, 0], [9.0, 10.0], rtol=1e-3)


@functools.cache
def small_training():
    env = frozen_lake()
    return control_tabular(env, method(SMALL, "sarsa"))


def test_a_run_in_parts_has_the_bits_of_a_whole_one(key):
    training = small_training()
    whole, metrics = jax.jit(lambda: train(training, key, 6))()
    part = jax.jit(lambda run, first: train(training, key, 3, run=run, first=first))
    run = jax.jit(lambda: train(training, key, 0)[0])()
    run, _ = part(run, 0)
    run, last = part(jax.tree.map(jnp.asarray, jax.device_get(run)), 3)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(run), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.asarray(metrics["td/error"])[3:], last["td/error"])
    assert int(whole.steps) == 6 * 20


def test_seeds_together_equal_seeds_alone():
    training = small_training()
    keys = jax.random.split(jax.random.key(5), 3)
    one = jax.jit(lambda key: train(training, key, 4)[0].learner.table.q)
    together = jax.jit(jax.vmap(lambda key: train(training, key, 4)[0].learner.table.q))(keys)
    np.testing.assert_allclose(together, np.stack([one(key) for key in keys]), rtol=1e-6, atol=1e-7)


def test_a_sweep_over_floats_equals_separate_runs(key):
    env = frozen_lake()

    def run(values):
        changes = {name: values[name] for name in ("discount", "step_size", "decay_power")}
        config = dataclasses.replace(
            SMALL,
            **{name: x for name, x in values.items() if name not in changes},
            algorithm=TabularQ(method="expected_sarsa", **changes),
        )
        return train(control_tabular(env, config), key, 4)[0].learner.table.q

    values = {
        "epsilon_start": 0.8,
        "epsilon_end": 0.1,
        "epsilon_fraction": 0.2,
        "initial_value": 0.5,
        "discount": 0.9,
        "step_size": 0.5,
        "decay_power": 0.7,
    }
    floats = {f.name for f in dataclasses.fields(ControlTabular) if "float" in str(f.type)}
    assert floats <= set(values)
    scale, one = np.asarray([0.5, 1.0], np.float32), jax.jit(run)
    together = jax.jit(jax.vmap(run))({name: x * scale for name, x in values.items()})
    alone = [one({name: np.float32(x * s) for name, x in values.items()}) for s in scale]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-5, atol=1e-6)


def test_exploration_falls_and_starts_explore(key):
    env = frozen_lake()
    config = dataclasses.replace(SMALL, epsilon_start=0.8, epsilon_end=0.2, epsilon_fraction=0.5)
    _, metrics = jax.jit(lambda: train(control_tabular(env, config), key, 200))()
    metrics = jax.tree.map(np.asarray, metrics)
    assert metrics["epsilon"][0] == pytest.approx(0.8) and metrics["epsilon"][50] == pytest.approx(0.5)
    np.testing.assert_allclose(metrics["epsilon"][100:], 0.2, rtol=1e-6)
    # At the start of an episode any state and any action comes, greedy or not; without exploring starts one state.
    greedy = dataclasses.replace(SMALL, worlds=256, steps=1, epsilon_start=0.0, epsilon_end=0.0)
    for exploring, most in ((True, 16), (False, 1)):
        training = control_tabular(env, dataclasses.replace(greedy, exploring_starts=exploring))
        run = jax.jit(training.init)(key)
        assert len(np.unique(run.worlds.observation)) == most
    np.testing.assert_allclose(exploring_starts(env).params.start_S, 1 / 16)
    assert env.params.start_S[0] == 1  # the world itself is as it was


def test_first_actions_explore_too(key):
    """Every step ends an episode; the table prefers action 1, and nothing is random but the start."""
    table = table_of(np.zeros((2, 3, 2)), np.array([[0.0, 1.0, 0.0]] * 2))
    for exploring in (True, False):
        config = ControlTabular(
            environment_steps=10,
            worlds=300,
            steps=2,
            epsilon_start=0.0,
            epsilon_end=0.0,
            exploring_starts=exploring,
        )
        training = control_tabular(table_world(table), config)
        run, _ = jax.jit(lambda training=training: train(training, key, 2))()
        share = np.bincount(np.asarray(run.learner.action_B), minlength=3) / 300
        np.testing.assert_allclose(share, [1 / 3] * 3 if exploring else [0, 1, 0], atol=0.1)


def test_the_optimum_is_the_best_of_all_policies():
    generator = np.random.default_rng(5)
    transition_SAS = 0.9 * generator.dirichlet(np.full(4, 0.5), size=(4, 3))
    reward_SA = generator.normal(size=(4, 3))
    table = table_of(transition_SAS, reward_SA)
    best_S = np.full(4, -np.inf)
    for policy in np.ndindex(3, 3, 3, 3):
        rows = np.arange(4), np.array(policy)
        value_S = np.linalg.solve(np.eye(4) - 0.95 * transition_SAS[rows], reward_SA[rows])
        best_S = np.maximum(best_S, value_S)
        gap_S = optimality_gap(table, np.eye(3)[list(policy)], discount=0.95)
        np.testing.assert_allclose(gap_S, optimal_values(table, discount=0.95)[0] - value_S, atol=1e-12)
    np.testing.assert_allclose(optimal_values(table, discount=0.95)[0], best_S, rtol=0, atol=1e-12)


def test_a_policy_that_never_ends_has_an_infinite_gap_without_discount():
    table = cliff_walking().params
    _, best_SA = optimal_values(table, discount=1.0)
    np.testing.assert_allclose(optimality_gap(table, best_SA, discount=1.0), 0, atol=1e-12)
    lost_SA = best_SA.copy()
    lost_SA[0] = [1, 0, 0, 0]  # up, in the upper left corner: for ever there
    lost_SA[1] = [0, 0, 0, 1]  # left, into that corner
    gap_S = optimality_gap(table, lost_SA, discount=1.0)
    assert np.isinf(gap_S[[0, 1]]).all() and np.isfinite(gap_S[2:]).all()
    assert optimality_gap(table, lost_SA, discount=0.9)[0] == pytest.approx(
        optimal_values(table, discount=0.9)[0][0] + 1 / (1 - 0.9)
    )
    # On slippery ground a state that only may lead to the trap has none either, and values of the rest are exact.
    slippery = frozen_lake(("SFFF", "FFFF", "FFFG")).params
    policy = np.zeros((12, 4))
    policy[:, 3] = 1  # always up: slips sideways, but never down
    gap_S = optimality_gap(slippery, policy, discount=1.0)
    assert np.isinf(gap_S[:11]).all()
    policy[:] = [0, 1, 0, 0]  # always down, slips along the lower rim until it is at the goal
    gap_S = optimality_gap(slippery, policy, discount=1.0)
    np.testing.assert_allclose(gap_S, 0, atol=1e-9)
    np.testing.assert_allclose(policy_values(slippery, policy, discount=1.0)[0][:11], 1.0)


def test_reachable_states():
    assert reachable_states(frozen_lake(slippery=False).params).sum() == 11  # an end is not stood in
    lake = frozen_lake(("SHF", "HFF", "FFG"), slippery=False).params
    np.testing.assert_array_equal(np.flatnonzero(reachable_states(lake)), [0])
    right = np.eye(4)[np.full(48, 1)]
    np.testing.assert_array_equal(np.flatnonzero(reachable_states(cliff_walking().params, right)), [36])


@pytest.mark.parametrize("name", METHODS)
def test_metrics_are_alike(name):
    training = control_tabular(frozen_lake(), method(SMALL, name))
    run = jax.eval_shape(training.init, jax.random.key(0))
    after, metrics = jax.eval_shape(training.iterate, run, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), run
    )
    assert {"episode/return", "episode/length", "episode/count", "environment_steps", "epsilon"} < set(
        metrics
    )
    assert all(x.shape == () and x.dtype == jnp.float32 for x in metrics.values())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="a table needs a world of numbered observations"):
        control_tabular(catch(), SMALL)
    with pytest.raises(ValueError, match="exploring starts need a world that is a table"):
        control_tabular(bandit((0.0, 1.0)), SMALL)
    with pytest.raises(ValueError, match="one walk, not from worlds=4: set worlds to 1"):
        control_tabular(frozen_lake(), dataclasses.replace(SMALL, algorithm=TabularQ(method="q_lambda")))
    with pytest.raises(ValueError, match="worlds=0 must be at least 1"):
        control_tabular(frozen_lake(), dataclasses.replace(SMALL, worlds=0))
    with pytest.raises(ValueError, match="method='q' is unknown"):
        control_tabular(frozen_lake(), dataclasses.replace(SMALL, algorithm=TabularQ(method="q")))
