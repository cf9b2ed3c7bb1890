"""The star graph: where imitation learns a shortcut that planning does not take.

    7 3, 4 9, 7 4, 3 1, from 7 to 9:
    > 4 9

Paths of equal length leave one node; the agent names the nodes of the one that leads to the goal. The first of them is
the hard one: it takes looking ahead from the goal, while each next one can be read off the edge that leaves the last.
A player that guesses the first and then follows the edges is right once in as many tries as there are paths
(Bachmann & Nagarajan 2024, arXiv 2403.06963); Q-learning of language models was shown on it by Q# (arXiv 2502.20548).

Shapes: K paths, N nodes of a path after the first one, E = K N edges.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.environments.environment import Environment, Step
from rlhfjax.environments.text.conversation import Player
from rlhfjax.environments.text.text_world import PAD, TextWorld, Utterance, phrases, text_world

_WORDS = (PAD, "\n", ",", " from", " to", ":\n", "Right.\n", "Wrong.\n")
_STOP, _COMMA, _FROM, _TO, _COLON, _RIGHT, _WRONG, _FIRST = range(1, len(_WORDS) + 1)


class StarGraph(NamedTuple):
    """Parameters of the star graph."""

    right: jax.Array | float = 1.0  # reward of the path
    wrong: jax.Array | float = 0.0  # of anything else


class Star(NamedTuple):
    """State of a star graph: numbers of nodes."""

    start: jax.Array  # int32 []
    node_KN: jax.Array  # int32, each row a path away from the start
    path: jax.Array  # int32 [], the one that leads to the goal, its last node


def star_graph_world(*, paths: int = 2, length: int = 3, nodes: int = 20) -> TextWorld:
    """A star of `paths` paths, each of `length` nodes after the start, numbered at random from `nodes`.

    One turn: the edges, each from the start outwards, in random order, the start and the goal; the agent's answer is
    the path's nodes in order, without the start. Then the game has ended. Its parameters are a `StarGraph`, its state
    is a `Star`. A player that takes any path scores 1 / paths on average; the optimum is 1.

    ValueError for fewer than 2 paths, 1 node of a path, or nodes than the star has.
    """
    if paths < 2 or length < 1:
        raise ValueError(f"a star has at least 2 paths of at least 1 node, got {paths} of {length}")
    if nodes < paths * length + 1:
        raise ValueError(f"nodes={nodes} must be at least {paths * length + 1}, the nodes of the star")
    vocabulary = (*_WORDS, *(f" {node}" for node in range(nodes)))
    verdict_2 = phrases(vocabulary, ["Wrong.\n", "Right.\n"])
    said_last = 3 * paths * length + 5

    def reset(key: jax.Array, params: StarGraph) -> tuple[Utterance, Star]:
        del params
        key_nodes, key_path, key_edges = jax.random.split(key, 3)
        number = jax.random.permutation(key_nodes, nodes)[: paths * length + 1].astype(jnp.int32)
        path = jax.random.randint(key_path, (), 0, paths, jnp.int32)
        state = Star(number[0], number[1:].reshape(paths, length), path)
        return _described(state, key_edges), state

    def step(key: jax.Array, state: Star, action: Utterance, params: StarGraph) -> Step:
        del key
        answer = _path(state, state.path)
        right = jnp.all(action.token_L == answer.token_L) & (action.length == answer.length)
        reward = jnp.where(right, params.right, params.wrong).astype(jnp.float32)
        token = jnp.where(right, verdict_2.token_L[1, 0], verdict_2.token_L[0, 0])
        heard = Utterance(jnp.zeros(said_last, jnp.int32).at[0].set(token), jnp.int32(1))
        return heard, state, reward, jnp.bool_(True), jnp.bool_(False), {"success": right}

    return text_world(
        Environment(reset, step, None, None, params=StarGraph()),
        vocabulary,
        stop="\n",
        action_length=length + 1,
        observation_length=said_last,
        turns=1,
    )


def star_graph_player(world: TextWorld, *, smart: float = 0.0) -> Player:
    """Names the right path in a share `smart` of its games, and otherwise any path: the shortcut.

    It is right with probability smart + (1 - smart) / paths.
    """
    del world
    if not 0 <= smart <= 1:
        raise ValueError(f"smart={smart} must lie in [0, 1]")

    def player(key: jax.Array, state: Star) -> Utterance:
        key_whether, key_which = jax.random.split(key)
        any_path = jax.random.randint(key_which, (), 0, state.node_KN.shape[0], jnp.int32)
        knows = jax.random.uniform(key_whether) < smart
        return _path(state, jnp.where(knows, state.path, any_path))

    return player


def _path(state: Star, path: jax.Array) -> Utterance:
    """The nodes of a path, as the agent says them."""
    token_L = jnp.append(_FIRST + state.node_KN[path], _STOP).astype(jnp.int32)
    return Utterance(token_L, jnp.int32(token_L.shape[0]))


def _described(state: Star, key: jax.Array) -> Utterance:
    """All edges in random order, then from where to where."""
    paths = state.node_KN.shape[0]
    start_K1 = jnp.broadcast_to(state.start, (paths, 1))
    from_KN = jnp.concatenate([start_K1, state.node_KN[:, :-1]], axis=1)
    edge_E2 = jnp.stack([from_KN.reshape(-1), state.node_KN.reshape(-1)], axis=1)
    edge_E2 = jax.random.permutation(key, edge_E2)
    comma_E1 = jnp.full((edge_E2.shape[0], 1), _COMMA)
    edges = jnp.concatenate([_FIRST + edge_E2, comma_E1], axis=1).reshape(-1)
    goal = state.node_KN[state.path, -1]
    ends = jnp.stack(
        [jnp.int32(_FROM), _FIRST + state.start, jnp.int32(_TO), _FIRST + goal, jnp.int32(_COLON)]
    )
    token_L = jnp.concatenate([edges, ends]).astype(jnp.int32)
    return Utterance(token_L, jnp.int32(token_L.shape[0]))
