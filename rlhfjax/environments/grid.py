"""Small worlds with numbered states, given by a table of all that can happen, and Catch.

A table is exact: `optimal_values` and `policy_values` compute from it, in float64, what methods that learn from
samples are held against. Transitions, rewards and ends are those of Gymnasium's environments of these names.

Shapes: S states, A actions, K outcomes of an action.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.environments.environment import Environment, Step, checked, time_limit

Array = Any  # NumPy, or JAX where a table is passed as parameters

LAKE = ("SFFF", "FHFH", "FFFH", "HFFG")
LARGE_LAKE = (
    "SFFFFFFF",
    "FFFFFFFF",
    "FFFHFFFF",
    "FFFFFHFF",
    "FFFHFFFF",
    "FHHFFFHF",
    "FHFFHFHF",
    "FFFHFFFG",
)
"""The lakes of 4 x 4 and 8 x 8: S start, F frozen, H hole, G goal."""


class Table(NamedTuple):
    """All that can happen: action a in state s has outcome k with its probability. Outcomes may coincide."""

    probability_SAK: Array  # float, sums to 1 over k
    next_SAK: Array  # int32, the state that follows
    reward_SAK: Array  # float
    terminated_SAK: Array  # bool, the episode ends with it
    start_S: Array  # float, probability that an episode starts in s


def table_world(table: Table, limit: int | None = None) -> Environment:
    """The world of a table. Observations are the numbers of states; the table is the world's parameters.

    Parameters of the same shapes give another world without another compilation, also under vmap. `limit`: steps
    until truncation.
    """
    states, actions, _ = table.probability_SAK.shape
    _check_table(table)

    def reset(key: jax.Array, params: Table) -> tuple[jax.Array, jax.Array]:
        state = _draw(key, jnp.asarray(params.start_S))
        return state, state

    def step(key: jax.Array, state: jax.Array, action: jax.Array, params: Table) -> Step:
        k = _draw(key, jnp.asarray(params.probability_SAK)[state, action])
        after, reward, terminated = (
            jnp.asarray(x)[state, action, k]
            for x in (params.next_SAK, params.reward_SAK, params.terminated_SAK)
        )
        return after, after, reward, terminated, jnp.bool_(False), {}

    return time_limit(checked(Environment(reset, step, actions, (), states, table)), limit)


def frozen_lake(
    layout: Sequence[str] = LAKE, *, slippery: bool = True, success: float = 1 / 3, limit: int | None = 100
) -> Environment:
    """A frozen lake is crossed without falling into a hole: left 0, down 1, right 2, up 3.

    Reward 1 at the goal, 0 elsewhere; goal and holes terminate. `limit`: steps until truncation (Gymnasium: 100
    on the small lake, 200 on the large one). See `frozen_lake_table`.
    """
    return table_world(frozen_lake_table(layout, slippery=slippery, success=success), limit)


def cliff_walking(*, slippery: bool = False, limit: int | None = None) -> Environment:
    """From one end of a cliff to the other (Sutton & Barto, example 6.6): up 0, right 1, down 2, left 3.

    Reward -1 a step, -100 over the edge, which leads back to the start; the goal terminates. `limit`: steps until
    truncation; Gymnasium has none. See `cliff_walking_table`.
    """
    return table_world(cliff_walking_table(slippery=slippery), limit)


def frozen_lake_table(
    layout: Sequence[str] = LAKE, *, slippery: bool = True, success: float = 1 / 3
) -> Table:
    """Table of a lake, NumPy float64. State row * columns + column.

    On slippery ice a move goes its way with probability `success`, and otherwise to either side, each equally
    often. At the rim of the lake a move goes nowhere. Raises ValueError for letters other than S, F, H, G, rows of
    unequal length, and a lake without a start.
    """
    rows = ["".join(row) for row in layout]
    letters = "".join(rows)
    if len({len(row) for row in rows}) != 1 or set(letters) - set("SFHG") or "S" not in letters:
        raise ValueError(f"a lake is rows of equal length of the letters S, F, H, G with an S, got {rows}")
    letter_S = np.array(list(letters))
    ended_S = np.isin(letter_S, ["H", "G"])
    side = (1 - success) / 2
    turns = ((-1, side), (0, success), (1, side)) if slippery else ((0, 1.0),)
    to_SA = _moves(len(rows), len(rows[0]), ((0, -1), (1, 0), (0, 1), (-1, 0)))
    probability_SAK, next_SAK = _slip(to_SA, turns)
    # Nothing follows after the end; the state stays where it is, as in Gymnasium's table.
    own_SAK = np.broadcast_to(np.arange(len(letters))[:, None, None], next_SAK.shape)
    next_SAK = np.where(ended_S[:, None, None], own_SAK, next_SAK).astype(np.int32)
    reward_SAK = ((letter_S == "G")[next_SAK] & ~ended_S[:, None, None]).astype(np.float64)
    start_S = (letter_S == "S") / np.sum(letter_S == "S")
    return Table(probability_SAK, next_SAK, reward_SAK, ended_S[next_SAK], start_S)


def cliff_walking_table(*, slippery: bool = False) -> Table:
    """Table of the cliff, NumPy float64: 4 rows of 12, start at the lower left, goal at the lower right.

    On slippery ground a move goes its way or to either side, with probability 1/3 each. The states of the cliff
    and of the goal are never stood in; their rows are those of any other place, as in Gymnasium's table.
    """
    rows, columns = 4, 12
    start, goal = rows * columns - columns, rows * columns - 1
    turns = ((-1, 1 / 3), (0, 1 / 3), (1, 1 / 3)) if slippery else ((0, 1.0),)
    to_SA = _moves(rows, columns, ((-1, 0), (0, 1), (1, 0), (0, -1)))
    probability_SAK, next_SAK = _slip(to_SA, turns)
    fell_SAK = (next_SAK > start) & (next_SAK < goal)
    next_SAK = np.where(fell_SAK, start, next_SAK).astype(np.int32)
    reward_SAK = np.where(fell_SAK, -100.0, -1.0)
    start_S = (np.arange(rows * columns) == start).astype(np.float64)
    return Table(probability_SAK, next_SAK, reward_SAK, next_SAK == goal, start_S)


def optimal_values(table: Table, *, discount: float) -> tuple[np.ndarray, np.ndarray]:
    """V* [S] and Q* [S, A] of a table, float64, by value iteration until nothing moves any more.

        Q[s, a] = sum_k probability (reward + discount (1 - terminated) V[next]),   V[s] = max_a Q[s, a]

    discount: in [0, 1]; at 1 the optimal policy must end surely. Raises ValueError where it does not settle.
    """
    table = _check_table(table)
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must lie in [0, 1], got {discount}")
    value_S = np.zeros(table.probability_SAK.shape[0])
    for _ in range(200_000):
        q_SA = _look_ahead(table, value_S, discount)
        before_S, value_S = value_S, q_SA.max(axis=1)
        if np.max(np.abs(value_S - before_S)) <= 1e-15 * (1 + np.max(np.abs(value_S))):
            return value_S, _look_ahead(table, value_S, discount)
    raise ValueError("the values did not settle in 200,000 sweeps; choose a discount below 1")


def policy_values(table: Table, policy_SA: Array, *, discount: float) -> tuple[np.ndarray, np.ndarray]:
    """V [S] and Q [S, A] of a policy on a table, float64, by solving Bellman's linear equations.

    policy_SA: probabilities, each row sums to 1. discount: in [0, 1]; at 1 the policy must end surely from every
    state, or the equations have no single solution and numpy.linalg.LinAlgError is raised.
    """
    table = _check_table(table)
    policy_SA = np.asarray(policy_SA, np.float64)
    states, actions, _ = table.probability_SAK.shape
    if policy_SA.shape != (states, actions) or not np.allclose(policy_SA.sum(axis=1), 1):
        raise ValueError(
            f"policy_SA must be probabilities [{states}, {actions}] whose rows sum to 1, got {policy_SA.shape}"
        )
    going_SAK = table.probability_SAK * ~table.terminated_SAK * policy_SA[:, :, None]
    follows_SS = np.zeros((states, states))
    row_SAK = np.broadcast_to(np.arange(states)[:, None, None], going_SAK.shape)
    np.add.at(follows_SS, (row_SAK, table.next_SAK), going_SAK)
    reward_S = np.sum(table.probability_SAK * table.reward_SAK * policy_SA[:, :, None], axis=(1, 2))
    value_S = np.linalg.solve(np.eye(states) - discount * follows_SS, reward_S)
    return value_S, _look_ahead(table, value_S, discount)


class Falling(NamedTuple):
    """State of Catch."""

    ball_row: jax.Array  # int32
    ball_column: jax.Array  # int32
    paddle: jax.Array  # int32, its column


def catch(rows: int = 10, columns: int = 5) -> Environment:
    """A ball falls one row a step and is caught with a paddle in the lowest row: left 0, stay 1, right 2.

    observation: float32 [rows, columns], 1 at the ball and at the paddle. Reward +1 (caught) or -1 at the last
    step, 0 before. After Mnih et al. 2014 and bsuite (Osband et al. 2020). With the paddle starting in the
    middle every ball can be caught if rows - 1 >= columns // 2.
    """
    if rows < 2 or columns < 1:
        raise ValueError(f"catch needs at least 2 rows and 1 column, got {rows} and {columns}")

    def observe(state: Falling) -> jax.Array:
        cell_RC = jnp.arange(rows * columns).reshape(rows, columns)
        ball = cell_RC == state.ball_row * columns + state.ball_column
        paddle = cell_RC == (rows - 1) * columns + state.paddle
        return (ball | paddle).astype(jnp.float32)

    def reset(key: jax.Array, params: tuple) -> tuple[jax.Array, Falling]:
        del params
        column = jax.random.randint(key, (), 0, columns, jnp.int32)
        state = Falling(jnp.int32(0), column, jnp.int32(columns // 2))
        return observe(state), state

    def step(key: jax.Array, state: Falling, action: jax.Array, params: tuple) -> Step:
        del key, params
        paddle = jnp.clip(state.paddle + action - 1, 0, columns - 1)
        state = Falling(state.ball_row + 1, state.ball_column, paddle)
        landed = state.ball_row == rows - 1
        reward = jnp.where(landed, jnp.where(paddle == state.ball_column, 1.0, -1.0), 0.0)
        return observe(state), state, reward.astype(jnp.float32), landed, jnp.bool_(False), {}

    return checked(Environment(reset, step, 3, (rows, columns)))


def _draw(key: jax.Array, probability_K: jax.Array) -> jax.Array:
    """A number k by its probability, int32. What rounding leaves over goes to the last."""
    if probability_K.shape[0] == 1:
        return jnp.int32(0)
    below_K = jnp.cumsum(probability_K)[:-1]
    return jnp.sum(jax.random.uniform(key, dtype=below_K.dtype) >= below_K, dtype=jnp.int32)


def _moves(rows: int, columns: int, steps: Sequence[tuple[int, int]]) -> np.ndarray:
    """The state that each move leads to from each; the rim holds. int [S, A]"""
    row_S, column_S = np.divmod(np.arange(rows * columns), columns)
    to = [np.clip(row_S + r, 0, rows - 1) * columns + np.clip(column_S + c, 0, columns - 1) for r, c in steps]
    return np.stack(to, axis=1)


def _slip(to_SA: np.ndarray, turns: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Probability and next state [S, A, K] where the move a + turn is made in place of move a."""
    next_SAK = np.stack([np.roll(to_SA, -turn, axis=1) for turn, _ in turns], axis=2)
    probability_K = np.array([probability for _, probability in turns])
    return np.broadcast_to(probability_K, next_SAK.shape).copy(), next_SAK.astype(np.int32)


def _look_ahead(table: Table, value_S: np.ndarray, discount: float) -> np.ndarray:
    after_SAK = np.where(table.terminated_SAK, 0, value_S[table.next_SAK])
    return np.sum(table.probability_SAK * (table.reward_SAK + discount * after_SAK), axis=2)


def _check_table(table: Table) -> Table:
    """The table as NumPy. Raises ValueError where it is none."""
    table = Table(*map(np.asarray, table))
    shape = table.probability_SAK.shape
    if len(shape) != 3 or any(x.shape != shape for x in table[:4]) or table.start_S.shape != shape[:1]:
        raise ValueError(f"a table is four arrays [S, A, K] and start [S], got {[x.shape for x in table]}")
    if not np.allclose(table.probability_SAK.sum(axis=2), 1) or not np.isclose(table.start_S.sum(), 1):
        raise ValueError("the probabilities of a table must sum to 1, over outcomes and over starts")
    if table.next_SAK.min() < 0 or table.next_SAK.max() >= shape[0]:
        raise ValueError(f"next_SAK must be numbers of states, 0 to {shape[0] - 1}")
    return table
