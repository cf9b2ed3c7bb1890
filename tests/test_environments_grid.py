"""Tables against Gymnasium's, worlds against their tables, exact values against loops; Catch against bsuite's rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.environments import Table, catch, cliff_walking, frozen_lake, grid, table_world

TABLES = {
    "lake": (grid.frozen_lake_table(), "FrozenLake-v1", {}),
    "firm lake": (grid.frozen_lake_table(slippery=False), "FrozenLake-v1", {"is_slippery": False}),
    "large lake": (grid.frozen_lake_table(grid.LARGE_LAKE), "FrozenLake8x8-v1", {}),
    "better shoes": (grid.frozen_lake_table(success=0.8), "FrozenLake-v1", {"success_rate": 0.8}),
    "cliff": (grid.cliff_walking_table(), "CliffWalking-v1", {}),
    "slippery cliff": (grid.cliff_walking_table(slippery=True), "CliffWalkingSlippery-v1", {}),
}


def outcomes(listed) -> dict[tuple, float]:
    """Probability of each (state, reward, end)."""
    found: dict[tuple, float] = {}
    for probability, *what in listed:
        what = (int(what[0]), float(what[1]), bool(what[2]))
        found[what] = found.get(what, 0.0) + probability
    return {what: p for what, p in found.items() if p > 0}


@pytest.mark.parametrize("name", TABLES)
def test_every_transition_equals_gymnasium(name):
    gymnasium = pytest.importorskip("gymnasium", minversion="1.2")  # success_rate, slippery cliff
    table, theirs, options = TABLES[name]
    oracle = gymnasium.make(theirs, **options).unwrapped
    states, actions, _ = table.probability_SAK.shape
    assert (states, actions) == (oracle.observation_space.n, oracle.action_space.n)
    np.testing.assert_array_equal(table.start_S, oracle.initial_state_distrib)
    for s in range(states):
        for a in range(actions):
            ours, wanted = outcomes(zip(*(x[s, a] for x in table[:4]), strict=True)), outcomes(oracle.P[s][a])
            assert ours.keys() == wanted.keys(), (s, a)
            for what, p in wanted.items():
                assert ours[what] == pytest.approx(p, abs=1e-15)


def test_lake_by_hand():
    """Without Gymnasium: from the first field to the right, slippery."""
    table = grid.frozen_lake_table()
    assert outcomes(zip(*(x[0, 2] for x in table[:4]), strict=True)) == {
        (4, 0.0, False): pytest.approx(1 / 3),
        (1, 0.0, False): pytest.approx(1 / 3),
        (0, 0.0, False): pytest.approx(1 / 3),
    }
    assert outcomes(zip(*(x[14, 2] for x in table[:4]), strict=True)) == {
        (14, 0.0, False): pytest.approx(1 / 3),
        (15, 1.0, True): pytest.approx(1 / 3),
        (10, 0.0, False): pytest.approx(1 / 3),
    }
    assert outcomes(zip(*(x[5, 1] for x in table[:4]), strict=True)) == {(5, 0.0, True): pytest.approx(1)}


@pytest.mark.parametrize("name", ["lake", "slippery cliff"])
def test_steps_are_drawn_from_the_table(name):
    table = TABLES[name][0]
    env = table_world(table)
    draws, state, action = 3000, 14 if name == "lake" else 25, 2
    step = jax.jit(jax.vmap(env.step, (0, None, None, None)))
    keys = jax.random.split(jax.random.key(0), draws)
    observation, after, reward, terminated, truncated, _ = step(keys, jnp.int32(state), action, table)
    np.testing.assert_array_equal(observation, after)
    assert observation.dtype == jnp.int32 and reward.dtype == jnp.float32 and not truncated.any()
    seen = np.stack([after, reward, terminated], axis=1)
    wanted = outcomes(zip(*(x[state, action] for x in table[:4]), strict=True))
    rows, counts = np.unique(seen, axis=0, return_counts=True)
    assert {(int(s), float(r), bool(e)) for s, r, e in rows} == wanted.keys()
    for (s, r, e), count in zip(rows, counts, strict=True):
        p = wanted[int(s), float(r), bool(e)]
        assert abs(count / draws - p) < 5 * (p * (1 - p) / draws) ** 0.5


def test_every_step_of_a_firm_world_is_the_table():
    table = grid.cliff_walking_table()
    env = cliff_walking()
    state, action = map(jnp.ravel, jnp.meshgrid(jnp.arange(48), jnp.arange(4), indexing="ij"))
    keys = jax.random.split(jax.random.key(0), 192)
    step = jax.jit(jax.vmap(env.step, (0, 0, 0, None)))
    _, after, reward, terminated, _, _ = step(keys, state.astype(jnp.int32), action, env.params)
    np.testing.assert_array_equal(after, table.next_SAK.ravel())
    np.testing.assert_array_equal(reward, table.reward_SAK.ravel())
    np.testing.assert_array_equal(terminated, table.terminated_SAK.ravel())
    assert int(env.reset(jax.random.key(0), env.params)[0]) == 36


def test_limits_and_sizes():
    env = frozen_lake(limit=2)
    assert (env.num_actions, env.num_observations, env.observation_shape) == (4, 16, ())
    _, state = env.reset(jax.random.key(0), env.params)
    _, state, *_, first, _ = env.step(jax.random.key(0), state, 0, env.params)
    *_, second, _ = env.step(jax.random.key(1), state, 0, env.params)
    assert not first and second


def test_another_lake_of_the_same_size_is_a_parameter():
    env = frozen_lake(slippery=True)
    other = grid.frozen_lake_table(("SHFF", "FHFH", "FFFH", "HFFG"))
    after = env.step(
        jax.random.key(0), env.reset(jax.random.key(0), other)[1]._replace(state=jnp.int32(2)), 0, other
    )
    assert int(after[0]) in (1, 2, 6)
    stacked = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), env.params, other)
    observation, _ = jax.vmap(env.reset, (None, 0))(jax.random.key(0), stacked)
    assert observation.shape == (2,)


def random_table(seed: int = 0, states: int = 5, actions: int = 3, outcomes: int = 2) -> Table:
    rng = np.random.default_rng(seed)
    shape = (states, actions, outcomes)
    return Table(
        rng.dirichlet(np.ones(outcomes), shape[:2]),
        rng.integers(0, states, shape).astype(np.int32),
        rng.normal(size=shape),
        rng.random(shape) < 0.3,
        np.full(states, 1 / states),
    )


def backed_up(table: Table, value, s: int, a: int, discount: float) -> float:
    total = 0.0
    for p, after, r, end in zip(*(x[s, a] for x in table[:4]), strict=True):
        total += p * (r + discount * (0.0 if end else value[after]))
    return total


def test_values_solve_bellmans_equations():
    table, discount = random_table(), 0.9
    states, actions, _ = table.probability_SAK.shape
    value, q = grid.optimal_values(table, discount=discount)
    wanted = [[backed_up(table, value, s, a, discount) for a in range(actions)] for s in range(states)]
    np.testing.assert_allclose(q, wanted, rtol=1e-12)
    np.testing.assert_allclose(value, np.max(wanted, axis=1), rtol=1e-12, atol=1e-13)
    policy = np.random.default_rng(1).dirichlet(np.ones(actions), states)
    value, q = grid.policy_values(table, policy, discount=discount)
    wanted = [[backed_up(table, value, s, a, discount) for a in range(actions)] for s in range(states)]
    np.testing.assert_allclose(q, wanted, rtol=1e-12)
    np.testing.assert_allclose(value, np.sum(policy * wanted, axis=1), rtol=1e-12)
    assert np.all(grid.optimal_values(table, discount=discount)[0] >= value)


def test_known_optima():
    """The cliff's shortest way has 13 steps; slippery, the greedy policy of Q* is worth V*."""
    value, q = grid.optimal_values(grid.cliff_walking_table(), discount=1.0)
    assert value[36] == -13
    table = grid.frozen_lake_table()
    value, q = grid.optimal_values(table, discount=0.99)
    greedy = np.eye(4)[np.argmax(q, axis=1)]
    np.testing.assert_allclose(grid.policy_values(table, greedy, discount=0.99)[0], value, atol=1e-12)
    assert value[0] == pytest.approx(0.5420, abs=1e-4)


def test_bad_tables():
    with pytest.raises(ValueError, match="letters S, F, H, G"):
        grid.frozen_lake_table(("SFX", "FFG"))
    with pytest.raises(ValueError, match="with an S"):
        grid.frozen_lake_table(("FF", "FG"))
    with pytest.raises(ValueError, match="equal length"):
        grid.frozen_lake_table(("SF", "FFG"))
    table = random_table()
    with pytest.raises(ValueError, match="sum to 1"):
        table_world(table._replace(probability_SAK=table.probability_SAK * 2))
    with pytest.raises(ValueError, match="numbers of states, 0 to 4"):
        table_world(table._replace(next_SAK=table.next_SAK + 1))
    with pytest.raises(ValueError, match="four arrays"):
        table_world(table._replace(reward_SAK=table.reward_SAK[0]))
    with pytest.raises(ValueError, match=r"discount must lie in \[0, 1\], got 1.5"):
        grid.optimal_values(table, discount=1.5)
    with pytest.raises(ValueError, match="rows sum to 1"):
        grid.policy_values(table, np.ones((5, 3)), discount=0.9)


def catch_oracle(column: int, actions, rows: int, columns: int):
    """bsuite's rules in a loop: (board, reward, end) after every action."""
    paddle, seen = columns // 2, []
    for row, action in enumerate(actions, start=1):
        paddle = min(max(paddle + action - 1, 0), columns - 1)
        board = np.zeros((rows, columns), np.float32)
        board[row, column] = 1
        board[rows - 1, paddle] = 1
        end = row == rows - 1
        seen.append((board, (1.0 if paddle == column else -1.0) if end else 0.0, end))
    return seen


@pytest.mark.parametrize("seed", range(4))
def test_catch_against_a_loop(seed):
    rows, columns = 6, 3
    env = catch(rows, columns)
    observation, state = env.reset(jax.random.key(seed), ())
    column = int(np.argmax(observation[0]))
    assert observation[rows - 1, 1] == 1 and observation.sum() == 2
    actions = np.random.default_rng(seed).integers(0, 3, rows - 1)
    step = jax.jit(env.step)
    for action, (board, reward, end) in zip(
        actions, catch_oracle(column, actions, rows, columns), strict=True
    ):
        observation, state, *rest, _ = step(jax.random.key(0), state, action, ())
        np.testing.assert_array_equal(observation, board)
        assert (float(rest[0]), bool(rest[1]), bool(rest[2])) == (reward, end, False)


def test_catch_starts_everywhere_and_refuses_what_is_no_board():
    env = catch()
    keys = jax.random.split(jax.random.key(0), 200)
    observation, _ = jax.vmap(env.reset, (0, None))(keys, ())
    assert observation.shape == (200, 10, 5)
    assert set(np.argmax(np.asarray(observation)[:, 0], axis=1)) == set(range(5))
    with pytest.raises(ValueError, match="at least 2 rows"):
        catch(1, 5)
