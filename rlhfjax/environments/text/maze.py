"""The double T maze in words (LMRL-Gym, arXiv 2311.18232): the layout, rewards and limit are that benchmark's.

    You are in row 1, column 2.
    > move right
    You are in row 1, column 3.
    > move down
    ...

An episode starts anywhere but at the goal. A move into a wall, or words that are no move, change nothing. The limit of
turns truncates. The maze is also a table, `maze_table`, from which the answers are computed exactly: the optimal
score of the double T is -171/25 = -6.84 on average over the starts.

Shapes: S open cells, row by row, A moves, P phrases.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.environments.environment import Environment, Step
from rlhfjax.environments.grid import Table, optimal_values
from rlhfjax.environments.text.conversation import Player
from rlhfjax.environments.text.text_world import (
    PAD,
    TextWorld,
    Utterance,
    phrases,
    say,
    text_world,
    understand,
)

Array = Any  # NumPy, or JAX where traced

DOUBLE_T = (
    "#############",
    "#     #     #",
    "### ##### ###",
    "### ##### ###",
    "### ##### ###",
    "###       ###",
    "###### ######",
    "###### ######",
    "######G######",
    "#############",
)
"""Two rooms with dead ends at both sides lead into one corridor to the goal: # wall, G goal."""

MOVES = ("move up\n", "move down\n", "move left\n", "move right\n")
_STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))
_SIDES = (" above", " below", " left", " right")


class Maze(NamedTuple):
    """Parameters of a maze: where moves lead, and what they cost."""

    next_SA: Array  # int32
    goal_S: Array  # bool
    step: Array | float = -1.0  # reward of a move, also of one into a wall
    goal: Array | float = 0.0  # of the move that reaches the goal
    misunderstood: Array | float = -4.0  # of words that are no move


class Walk(NamedTuple):
    """State of a maze."""

    cell: jax.Array  # int32 [], number of the open cell
    turn: jax.Array  # int32 [], turns taken


def maze_world(
    layout: Sequence[str] = DOUBLE_T, *, observed: str = "position", turns: int = 100
) -> TextWorld:
    """A maze in words. Its parameters are a `Maze`, its state a `Walk`.

    Args:
      layout: rows of equal length of "#" (wall), " " (open) and "G" (goal), with a wall all round.
      observed: "position" tells row and column, which is all there is to know; "walls" only which sides are walls, so
        that the agent must remember the way it came.
      turns: until truncation.

    The agent says "move up", "move down", "move left" or "move right" and a line break. ValueError for another layout
    or an `observed` of another name.
    """
    cell_S, next_SA, goal_S = _read(layout)
    if observed not in ("position", "walls"):
        raise ValueError(f'observed must be "position" or "walls", got {observed!r}')
    describe = _positions if observed == "position" else _walls
    pieces, text_S = describe(cell_S, next_SA)
    reached = "You have reached the goal.\n"
    vocabulary = (PAD, "\n", "move", " up", " down", " left", " right", reached)
    vocabulary += tuple(piece for piece in pieces if piece not in vocabulary)
    move_A = phrases(vocabulary, MOVES)
    text_S = [reached if goal else text for text, goal in zip(text_S, goal_S, strict=True)]
    seen_S = phrases(vocabulary, text_S)

    def reset(key: jax.Array, params: Maze) -> tuple[Utterance, Walk]:
        start_S = jnp.where(jnp.asarray(params.goal_S), -jnp.inf, 0.0)
        cell = jax.random.categorical(key, start_S).astype(jnp.int32)
        return say(seen_S, cell), Walk(cell, jnp.int32(0))

    def step(key: jax.Array, state: Walk, action: Utterance, params: Maze) -> Step:
        del key
        move = understand(action, move_A)
        cell = jnp.where(move >= 0, jnp.asarray(params.next_SA)[state.cell, jnp.maximum(move, 0)], state.cell)
        ended = jnp.asarray(params.goal_S)[cell]
        cost = jnp.where(move >= 0, params.step, params.misunderstood)
        reward = jnp.where(ended, params.goal, cost).astype(jnp.float32)
        turn = state.turn + 1
        cut = ~ended & (turn >= turns)
        return say(seen_S, cell), Walk(cell, turn), reward, ended, cut, {"success": ended}

    return text_world(
        Environment(reset, step, None, None, params=Maze(next_SA, goal_S)),
        vocabulary,
        stop="\n",
        action_length=3,
        observation_length=seen_S.token_L.shape[1],
        turns=turns,
    )


def maze_table(layout: Sequence[str] = DOUBLE_T, *, step: float = -1.0, goal: float = 0.0) -> Table:
    """The maze as a table, NumPy: states are the open cells row by row, actions are in the order of `MOVES`.

    Its optimal values are those of the game without the limit, which no shortest way of the double T comes near.
    """
    _, next_SA, goal_S = _read(layout)
    return _table(next_SA, goal_S, step, goal)


def maze_score(policy_SA: np.ndarray, layout: Sequence[str] = DOUBLE_T, *, turns: int = 100) -> float:
    """Expected score of a policy on the maze within its limit, exact, float64, with the rewards -1 and 0.

    policy_SA: probabilities of the moves in each cell, rows sum to 1. Averaged over the starts.
    """
    table = maze_table(layout)
    policy_SA = np.asarray(policy_SA, np.float64)
    if policy_SA.shape != table.next_SAK.shape[:2] or not np.allclose(policy_SA.sum(axis=1), 1):
        raise ValueError(
            f"policy_SA must be probabilities {list(table.next_SAK.shape[:2])} whose rows sum to 1, "
            f"got {policy_SA.shape}"
        )
    next_SA, reward_SA, ended_SA = (
        x[..., 0] for x in (table.next_SAK, table.reward_SAK, table.terminated_SAK)
    )
    value_S = np.zeros(len(next_SA))
    for _ in range(turns):
        value_S = np.sum(policy_SA * (reward_SA + np.where(ended_SA, 0.0, value_S[next_SA])), axis=1)
    return float(table.start_S @ value_S)


def maze_player(world: TextWorld, *, random: float = 0.85) -> Player:
    """Moves at random in a share `random` of its turns, and otherwise by a shortest way to the goal.

    0 is the optimal player, 1 the uniform one. The first of several best moves is taken.
    """
    if not 0 <= random <= 1:
        raise ValueError(f"random={random} must lie in [0, 1]")
    params = world.env.params
    table = _table(np.asarray(params.next_SA), np.asarray(params.goal_S))
    best_S = jnp.asarray(np.argmax(optimal_values(table, discount=1.0)[1], axis=1), jnp.int32)
    move_A = phrases(world.vocabulary, MOVES)

    def player(key: jax.Array, state: Walk) -> Utterance:
        key_whether, key_which = jax.random.split(key)
        any_move = jax.random.randint(key_which, (), 0, len(MOVES), jnp.int32)
        strays = jax.random.uniform(key_whether) < random
        return say(move_A, jnp.where(strays, any_move, best_S[state.cell]))

    return player


def _table(next_SA: np.ndarray, goal_S: np.ndarray, step: float = -1.0, goal: float = 0.0) -> Table:
    ended_SA = goal_S[next_SA]
    return Table(
        np.ones((*next_SA.shape, 1)),
        next_SA[..., None],
        np.where(ended_SA, goal, step)[..., None],
        ended_SA[..., None],
        ~goal_S / np.sum(~goal_S),
    )


def _read(layout: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells [S, 2] as row and column, where moves lead [S, A], and which cells are goals [S]."""
    rows = list(layout)
    if not rows or len({len(row) for row in rows}) != 1 or set("".join(rows)) - set("# G"):
        raise ValueError(f'a maze is rows of equal length of "#", " " and "G", got {rows}')
    letter_RC = np.array([list(row) for row in rows])
    border = np.concatenate([letter_RC[0], letter_RC[-1], letter_RC[:, 0], letter_RC[:, -1]])
    if np.any(border != "#"):
        raise ValueError("a maze needs a wall all round")
    cell_S = np.argwhere(letter_RC != "#")
    goal_S = letter_RC[cell_S[:, 0], cell_S[:, 1]] == "G"
    if not goal_S.any() or goal_S.all():
        raise ValueError("a maze needs a goal G and an open cell to start in")
    number_RC = np.full(letter_RC.shape, -1)
    number_RC[cell_S[:, 0], cell_S[:, 1]] = np.arange(len(cell_S))
    to_SA = np.stack([number_RC[cell_S[:, 0] + r, cell_S[:, 1] + c] for r, c in _STEPS], axis=1)
    next_SA = np.where(to_SA >= 0, to_SA, np.arange(len(cell_S))[:, None]).astype(np.int32)
    _check_reachable(next_SA, goal_S)
    return cell_S, next_SA, goal_S


def _check_reachable(next_SA: np.ndarray, goal_S: np.ndarray) -> None:
    reaches_S = goal_S.copy()
    for _ in range(len(goal_S)):
        reaches_S = reaches_S | reaches_S[next_SA].any(axis=1)
    if not reaches_S.all():
        raise ValueError(f"no way leads to a goal from {np.sum(~reaches_S)} cells of the maze")


def _positions(cell_S: np.ndarray, next_SA: np.ndarray) -> tuple[list[str], list[str]]:
    """Pieces of text, and the text of each cell: where it is."""
    del next_SA
    rows = [f"You are in row {r}" for r in sorted(set(cell_S[:, 0]))]
    columns = [f", column {c}.\n" for c in sorted(set(cell_S[:, 1]))]
    return rows + columns, [f"You are in row {r}, column {c}.\n" for r, c in cell_S]


def _walls(cell_S: np.ndarray, next_SA: np.ndarray) -> tuple[list[str], list[str]]:
    """Pieces of text, and the text of each cell: which of its sides are walls."""
    pieces = ["Walls:", *_SIDES, " none", ".\n"]
    texts = []
    for s in range(len(cell_S)):
        sides = [side for side, to in zip(_SIDES, next_SA[s], strict=True) if to == s]
        texts.append(f"Walls:{''.join(sides) or ' none'}.\n")
    return pieces, texts
