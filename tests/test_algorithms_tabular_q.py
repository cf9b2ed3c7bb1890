"""Tabular Q-learning and its relatives, against float64 loops written from the equations, and against the optimum
of a small random world found by value iteration."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import float64
from small_tables import table_of

from rlhfjax.algorithms import tabular_q
from rlhfjax.algorithms.exploration import epsilon_greedy, epsilon_greedy_probabilities
from rlhfjax.config import TabularQ
from rlhfjax.environments.grid import optimal_values, policy_values

STATES, ACTIONS, N = 4, 3, 40
METHODS = list(tabular_q.METHODS)
DECAYING = TabularQ(discount=0.9, step_size=0.8, decay_power=0.7, decay_visits=3.0, epsilon=0.3, lam=0.6)


def stream(seed=0, steps=N) -> Any:
    """One walk through made-up transitions with terminations and truncations, each followed by a new episode."""
    generator = np.random.default_rng(seed)
    next_state, state = generator.integers(STATES, size=steps), generator.integers(STATES, size=steps)
    action = generator.integers(ACTIONS, size=steps + 1)
    end = generator.random(steps)
    terminated, truncated = end < 0.15, (end > 0.1) & (end < 0.3)  # some are both: terminated wins
    for t in range(steps - 1):
        if not (terminated[t] or truncated[t]):
            state[t + 1] = next_state[t]
    reward = generator.normal(size=steps).astype(np.float32)
    return tabular_q.Transition(
        jnp.asarray(state),
        jnp.asarray(action[:-1]),
        jnp.asarray(reward),
        jnp.asarray(next_state),
        jnp.asarray(terminated),
        jnp.asarray(truncated),
        jnp.asarray(action[1:]),
    )


def start(seed=3):
    return np.random.default_rng(seed).normal(size=(STATES, ACTIONS)).astype(np.float32)


def expected(q, batch, coins, config):
    """The tables after the rows, by the equations, in float64."""
    tables = [np.array(q, np.float64) for _ in range(2 if config.method == "double_q" else 1)]
    visits = np.zeros((len(tables), STATES, ACTIONS), int)
    trace = np.zeros((STATES, ACTIONS))

    def alpha(n):
        if config.decay_power is None:
            return config.step_size
        k = config.decay_visits
        return config.step_size * (k / (k + n - 1)) ** config.decay_power

    for t in range(len(batch.state)):
        s, a, r, s2 = (x[t] for x in (batch.state, batch.action, batch.reward, batch.next_state))
        m = int(coins[t]) if config.method == "double_q" else 0
        mine, other = tables[m], tables[-1 - m]
        visits[m, s, a] += 1
        if config.method == "sarsa":
            future = mine[s2, batch.next_action[t]]
        elif config.method == "expected_sarsa":
            policy = np.full(ACTIONS, config.epsilon / ACTIONS)
            policy[np.argmax(mine[s2])] += 1 - config.epsilon
            future = sum(policy[b] * mine[s2, b] for b in range(ACTIONS))
        elif config.method == "double_q":
            future = other[s2, np.argmax(mine[s2])]
        else:
            future = max(mine[s2])
        error = float(r) + (0 if batch.terminated[t] else config.discount * future) - mine[s, a]
        if config.method != "q_lambda":
            mine[s, a] += alpha(visits[m, s, a]) * error
            continue
        greedy = mine[s2, batch.next_action[t]] == max(mine[s2])
        trace[s, a] = 1 if config.replacing_traces else trace[s, a] + 1
        for x in np.ndindex(STATES, ACTIONS):
            mine[x] += alpha(max(visits[0][x], 1)) * error * trace[x]
        trace *= config.discount * config.lam
        if batch.terminated[t] or batch.truncated[t] or (config.cut_traces and not greedy):
            trace[:] = 0
    return np.stack(tables), visits, trace


@functools.cache
def compiled(config):
    algorithm = tabular_q.make(config)
    return algorithm.init, jax.jit(algorithm.update)


def run(q, batch, config, key):
    init, update = compiled(config)
    return update(init(q), batch, key)


def coins_of(key, rows=N):
    return np.asarray(jax.random.randint(key, (rows,), 0, 2))


OPTIONS = [
    *(dataclasses.replace(DECAYING, method=method) for method in METHODS),
    TabularQ(discount=0.9, step_size=0.3),
    TabularQ(method="q_lambda", discount=0.9, step_size=0.3, cut_traces=False, replacing_traces=False),
    dataclasses.replace(DECAYING, method="q_lambda", replacing_traces=False),
]


@pytest.mark.parametrize("config", OPTIONS, ids=[f"{i}-{c.method}" for i, c in enumerate(OPTIONS)])
def test_tables_equal_the_loop_over_the_equation(config, key):
    with float64():
        batch = stream()
        batch = batch._replace(reward=batch.reward.astype(jnp.float64))
        state, metrics = run(jnp.asarray(start(), jnp.float64), batch, config, key)
        coins, values = coins_of(key), np.asarray(tabular_q.action_values(state))
    tables, visits, trace = expected(start(), jax.tree.map(np.asarray, batch), coins, config)
    np.testing.assert_allclose(state.q, tables, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(state.visits, visits)
    np.testing.assert_allclose(state.trace, trace if config.method == "q_lambda" else 0, rtol=0, atol=1e-12)
    np.testing.assert_allclose(values, tables.mean(0), rtol=0, atol=1e-12)
    assert metrics["batch/count"] == N and metrics["batch/invalid"] == 0


def test_one_step_of_the_seed_equation(key):
    """Q(s, a) <- Q(s, a) + alpha [r + gamma max Q(s', a') - Q(s, a)], written out."""
    q = jnp.array([[1.0, 2.0], [4.0, 3.0]])
    row = (jnp.array([0]), jnp.array([1]), jnp.array([0.5]), jnp.array([1]))
    config = TabularQ(discount=0.9, step_size=0.25)
    going_on = tabular_q.Transition(*row, jnp.array([False]), jnp.array([True]))
    state, metrics = run(q, going_on, config, key)
    np.testing.assert_allclose(state.q[0], [[1.0, 2 + 0.25 * (0.5 + 0.9 * 4 - 2)], [4.0, 3.0]], rtol=1e-6)
    np.testing.assert_allclose(metrics["td/error"], 2.1, rtol=1e-6)
    state, _ = run(q, going_on._replace(terminated=jnp.array([True])), config, key)
    np.testing.assert_allclose(state.q[0, 0, 1], 2 + 0.25 * (0.5 - 2), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_masked_rows_equal_dropped_rows(method, key):
    config = dataclasses.replace(DECAYING, method=method)
    batch = stream(steps=N // 2)
    places = jnp.arange(N // 2) * 2
    junk: Any = (99, -7, jnp.nan, 99, True, True, -1)
    spread = jax.tree.map(
        lambda x, j: jnp.full(N, j, x.dtype).at[places].set(x), batch, tabular_q.Transition(*junk)
    )
    spread = spread._replace(mask=jnp.zeros(N, bool).at[places].set(True))
    if method == "double_q":  # the coins belong to the rows
        batch, spread = spread, spread._replace(reward=jnp.where(spread.mask, spread.reward, 5.0))
    first, first_metrics = run(start(), batch, config, key)
    second, second_metrics = run(start(), spread, config, key)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    for name, x in first_metrics.items():
        np.testing.assert_allclose(x, second_metrics[name], rtol=1e-5, err_msg=name)


def test_rows_in_two_updates_equal_one(key):
    """The state carries all: traces and visits run on from one update to the next."""
    config = dataclasses.replace(DECAYING, method="q_lambda")
    batch = stream()
    init, update = compiled(config)
    whole, _ = update(init(start()), batch, key)
    state = init(start())
    for part in (slice(0, 20), slice(20, 40)):
        state, _ = update(state, jax.tree.map(lambda x, part=part: x[part], batch), key)
    np.testing.assert_allclose(state.q, whole.q, rtol=1e-6)
    np.testing.assert_allclose(state.trace, whole.trace, rtol=1e-6)
    assert state.step == 2 and whole.step == 1


def test_no_lambda_is_q_learning(key):
    config = dataclasses.replace(DECAYING, method="q_lambda", lam=0.0)
    with_traces, _ = run(start(), stream(), config, key)
    without, _ = run(start(), stream(), dataclasses.replace(config, method="q_learning"), key)
    np.testing.assert_allclose(with_traces.q, without.q, rtol=1e-5, atol=1e-6)


def world(seed=5):
    """Transition probabilities (about 0.1 of each row terminates) and expected rewards of a random world."""
    generator = np.random.default_rng(seed)
    going_on = generator.dirichlet(np.full(STATES, 0.5), size=(STATES, ACTIONS))
    return jnp.asarray(0.9 * going_on), jnp.asarray(generator.normal(size=(STATES, ACTIONS)))


def experience(transition, reward, key, rows):
    """Uniformly random states and actions, the next state drawn from the world, noisy rewards."""
    keys = jax.random.split(key, 4)
    state = jax.random.randint(keys[0], (rows,), 0, STATES)
    action = jax.random.randint(keys[1], (rows,), 0, ACTIONS)
    mass = transition[state, action]
    ends = 1 - jnp.sum(mass, axis=1, keepdims=True)
    drawn = jax.random.categorical(keys[2], jnp.log(jnp.concatenate([mass, ends], axis=1)))
    noise = 0.1 * jax.random.normal(keys[3], (rows,))
    terminated = drawn == STATES
    return tabular_q.Transition(
        state, action, reward[state, action] + noise, jnp.where(terminated, 0, drawn), terminated
    )


@pytest.mark.parametrize(
    ("method", "tolerance"), [("q_learning", 0.05), ("expected_sarsa", 0.05), ("double_q", 0.2)]
)
def test_the_table_converges_to_value_iteration(method, tolerance):
    """Step sizes that fall with the visits make it converge; the greedy policy is optimal, exactly evaluated.

    Each of two tables sees half the data, and while they disagree double Q errs low.
    """
    transition, reward = world()
    config = TabularQ(
        method=method, discount=0.9, step_size=1.0, decay_power=1.0, decay_visits=11.0, epsilon=0.0
    )
    batch = experience(transition, reward, jax.random.key(1), 60_000)
    state, _ = run(jnp.zeros((STATES, ACTIONS)), batch, config, jax.random.key(2))
    table = table_of(transition, reward)
    value, optimum = optimal_values(table, discount=0.9)
    q = np.asarray(tabular_q.action_values(state))
    assert np.max(np.abs(q - optimum)) < tolerance
    policy = np.eye(ACTIONS)[q.argmax(axis=1)]
    np.testing.assert_allclose(policy_values(table, policy, discount=0.9)[0], value, rtol=0, atol=1e-3)


def test_double_q_halves_the_overestimate():
    """Actions alike in mean, noisy rewards: the mean over 32 runs of what state 0 is thought to be worth, truly 0."""
    rows = 800
    state = jnp.arange(rows) % 2  # 0 leads to 1, in which each of 8 actions pays noise
    action = jnp.where(state == 0, 0, jnp.arange(rows) // 2 % 8)

    def value(key, method):
        algorithm = tabular_q.make(TabularQ(method=method, discount=1.0, step_size=0.2))
        reward_key, key = jax.random.split(key)
        reward = jnp.where(state == 1, jax.random.normal(reward_key, (rows,)), 0.0)
        batch = tabular_q.Transition(state, action, reward, jnp.ones(rows, jnp.int32), state == 1)
        learnt, _ = algorithm.update(algorithm.init(jnp.zeros((2, 8))), batch, key)
        return tabular_q.action_values(learnt)[0, 0]

    keys = jax.random.split(jax.random.key(0), 32)
    single, double = (
        float(jnp.mean(jax.jit(jax.vmap(functools.partial(value, method=method)))(keys)))
        for method in ("q_learning", "double_q")
    )
    assert single > 0.2
    assert abs(double) < 0.5 * single


def test_bad_rows_are_left_out_and_counted(key):
    batch = stream()
    clean = batch._replace(mask=jnp.ones(N, bool).at[jnp.array([1, 2, 3, 4])].set(False))
    bad = batch._replace(
        reward=batch.reward.at[1].set(jnp.nan),
        action=batch.action.at[2].set(ACTIONS),
        state=batch.state.at[3].set(-1),
        next_state=batch.next_state.at[4].set(STATES),
        terminated=batch.terminated.at[4].set(False),
    )
    first, _ = run(start(), clean, DECAYING, key)
    second, metrics = run(start(), bad, DECAYING, key)
    np.testing.assert_array_equal(first.q, second.q)
    assert metrics["batch/invalid"] == 4 and metrics["batch/count"] == N - 4


def test_what_follows_a_terminated_episode_is_not_read(key):
    config = dataclasses.replace(DECAYING, method="sarsa")
    batch = stream()
    junk = batch._replace(
        next_state=jnp.where(batch.terminated, 99, batch.next_state),
        next_action=jnp.where(batch.terminated, -1, batch.next_action),
    )
    first, _ = run(start(), batch, config, key)
    second, metrics = run(start(), junk, config, key)
    np.testing.assert_array_equal(first.q, second.q)
    assert metrics["batch/invalid"] == 0


def test_a_sweep_over_every_float_equals_separate_runs(key):
    floats = {
        "discount": 0.9,
        "step_size": 0.5,
        "decay_power": 0.7,
        "decay_visits": 2.0,
        "epsilon": 0.2,
        "lam": 0.5,
    }
    assert set(floats) == {f.name for f in dataclasses.fields(TabularQ) if "float" in str(f.type)}
    scale = jnp.array([0.5, 1.0])
    for method in ("expected_sarsa", "q_lambda"):
        base = TabularQ(method=method)

        def learn(values, base=base):
            algorithm = tabular_q.make(dataclasses.replace(base, **values))
            return algorithm.update(algorithm.init(start()), stream(), key)[0].q

        together = jax.vmap(learn)({name: x * scale for name, x in floats.items()})
        alone = [learn({name: x * s for name, x in floats.items()}) for s in scale]
        np.testing.assert_allclose(together, jnp.stack(alone), rtol=1e-5, atol=1e-6)


def test_metrics_are_documented_and_alike(key):
    names = []
    for method in METHODS:
        algorithm = tabular_q.make(TabularQ(method=method))
        _, metrics = jax.eval_shape(algorithm.update, algorithm.init(start()), stream(), key)
        assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())
        names.append(sorted(metrics))
    assert all(x == names[0] for x in names)
    assert [name for name in names[0] if name not in (tabular_q.__doc__ or "")] == []


def test_bad_input_is_named(key):
    with pytest.raises(ValueError, match="method='q' is unknown; choose among q_learning, sarsa"):
        tabular_q.make(TabularQ(method="q"))
    with pytest.raises(ValueError, match=r"discount=1.5 must be in \[0, 1\]"):
        tabular_q.make(TabularQ(discount=1.5))
    algorithm = tabular_q.make(TabularQ(method="sarsa"))
    with pytest.raises(TypeError, match="the initial table must be float"):
        algorithm.init(jnp.zeros((2, 2), jnp.int32))
    state, batch = algorithm.init(start()), stream()
    with pytest.raises(ValueError, match="needs batch.next_action"):
        algorithm.update(state, batch._replace(next_action=None), key)
    with pytest.raises(ValueError, match=r"batch.reward must be \[N\]"):
        algorithm.update(state, batch._replace(reward=batch.reward[None]), key)
    with pytest.raises(TypeError, match="batch.reward must be float, got int32"):
        algorithm.update(state, batch._replace(reward=batch.action), key)
    with pytest.raises(TypeError, match="batch.terminated must be bool, got float32"):
        algorithm.update(state, batch._replace(terminated=batch.reward), key)
    with pytest.raises(ValueError, match="epsilon must be a scalar or of shape"):
        epsilon_greedy_probabilities(jnp.zeros((2, 3)), jnp.zeros(3))


def test_epsilon_greedy_is_drawn_from_its_probabilities():
    q = jnp.array([[0.0, 2.0, 1.0], [3.0, 3.0, 1.0]])
    probability = epsilon_greedy_probabilities(q, jnp.array([0.3, 0.6]))
    np.testing.assert_allclose(probability, [[0.1, 0.8, 0.1], [0.4, 0.4, 0.2]], rtol=1e-6)
    draws = epsilon_greedy(jax.random.key(0), jnp.broadcast_to(q[1], (4000, 3)), 0.6)
    np.testing.assert_allclose(jnp.bincount(draws, length=3) / 4000, probability[1], atol=0.03)
    greedy = epsilon_greedy(jax.random.key(0), jnp.broadcast_to(q[0], (100, 3)), 0.0)
    assert greedy.dtype == jnp.int32 and bool(jnp.all(greedy == 1))
