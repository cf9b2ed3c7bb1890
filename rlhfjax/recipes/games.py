"""A language model plays worlds in words, and games become episodes to learn from.

    games = jax.jit(lambda params, key: play_games(lm, params, world, key, 256).games)(params, key)
    episodes = game_episodes(games)
    algorithm = ilql.make(text_values(lm).evaluate, ...)

All games advance by one token a step, said or heard, so that they share the slots of one cache, and whole games of
many turns are one compiled program with the worlds inside.

Shapes: B games, N = T + 1 tokens of a row, L tokens of an utterance, S slots of the cache, D width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algorithms import ilql
from rlhfjax.environments.text import Conversation, TextWorld, Utterance, row_length
from rlhfjax.generation import Drawn, Sampling, sample_token
from rlhfjax.networks import LanguageModel
from rlhfjax.recipes.value import Turns

PyTree = Any


class Played(NamedTuple):
    """Games, and how likely the agent's words were."""

    games: Conversation
    logp_BT: (
        jax.Array
    )  # float32 [B, T], under the distribution that was sampled from; 0 but at the agent's tokens


class _Table(NamedTuple):
    """Where a game stands between two tokens."""

    world: PyTree  # the world's state
    heard: Utterance  # what the world says: token_L [B, L], length [B]
    place_B: jax.Array  # int32, tokens of it that have been heard
    said: Utterance  # what the agent is saying: token_L [B, L], length [B]
    turn_B: jax.Array  # int32, turns that the agent has taken
    over_B: jax.Array  # bool, the game is over; its last observation may still be heard


class _Loop(NamedTuple):
    step: jax.Array  # int32 [], tokens of every row so far
    table: _Table
    hidden_BD: jax.Array  # after the last token
    cache: PyTree
    turn_BS: jax.Array  # int32, the turn of the token in each slot; -1: none
    games: Conversation
    logp_BN: jax.Array


def play_games(
    lm: LanguageModel,
    params: dict,
    world: TextWorld,
    key: jax.Array,
    count: int,
    *,
    samples: int = 1,
    memory: int | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008  (immutable)
    world_params: PyTree = None,
    place: Callable[[PyTree], PyTree] = lambda games: games,
) -> Played:
    """`count` games of a language model, to be jitted by the caller; it ends when all games have.

    Args:
      lm, params: any `LanguageModel` over the world's vocabulary, also a `guided` one.
      key: consumed. Every game's keys are folded from it by the game's number and the turn's, as `converse` does: the
        same key gives the same worlds, so that players can be compared game by game.
      samples: games of each world, one behind the other: what is hidden and what chance does in a world is the same in
        all of them, what the agent draws is not. World i is that of the i-th game where there is one of each.
      memory: turns that attention reaches back over, as in `turn_states`; the cache holds no more. None: all.
      sampling: of the agent's tokens; scalars or [count]. Steps are those of a turn, and a repetition is one of
        anything said or heard in the game.
      world_params: None takes the world's own.
      place: lays arrays with a row for each game over devices, `mesh.place_rows(mesh)`, where the model lies on them.

    A turn ends with the stop token, or after `world.action_length` tokens. Raises ValueError where the model's
    vocabulary is not the world's, where its positions do not hold the longest game, or where `count` is no multiple of
    `samples`.
    """
    columns = _check(lm, world, count, samples, memory)
    env_params = world.env.params if world_params is None else world_params
    slots = (
        columns if memory is None else min(columns, memory * (world.observation_length + world.action_length))
    )
    key_B = place(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(count) // samples))
    sample_B = place(jnp.arange(count) % samples)
    reach = columns if memory is None else memory

    def choose(state: _Loop) -> Drawn:
        """The agent's next token and its log-probability, [B], wherever it is its turn to speak."""
        key_agent_B, _ = _turn_keys(key_B, state.table.turn_B)
        if samples > 1:
            key_agent_B = jax.vmap(jax.random.fold_in)(key_agent_B, sample_B)
        keys = jax.vmap(jax.random.fold_in)(key_agent_B, state.table.said.length)
        uniform_B = jax.vmap(jax.random.uniform)(keys)
        return sample_token(
            lm.logits(params, state.hidden_BD),
            uniform_B,
            sampling,
            step=state.table.said.length,
            seen_RT=jnp.where(state.games.mask_BN, state.games.token_BN, -1),
            stop_tokens=jnp.asarray([world.stop_token], jnp.int32),
        )

    def body(state: _Loop) -> _Loop:
        table = state.table
        hears_B = table.place_B < table.heard.length
        speaks_B = ~hears_B & ~table.over_B
        drawn = choose(state)
        place_B = jnp.minimum(table.place_B, table.heard.token_L.shape[1] - 1)
        heard_B = jnp.take_along_axis(table.heard.token_L, place_B[:, None], axis=1)[:, 0]
        token_B = jnp.where(speaks_B, drawn.token_R, jnp.where(hears_B, heard_B, 0))
        slot = state.step % slots
        turn_BS = jax.lax.dynamic_update_slice_in_dim(state.turn_BS, table.turn_B[:, None], slot, axis=1)
        seen_BS = (turn_BS >= 0) & (turn_BS > table.turn_B[:, None] - reach)
        hidden_B1D, cache = lm.apply(
            params,
            token_B[:, None],
            position_BT=jnp.broadcast_to(state.step, (count, 1)),
            mask_BTS=seen_BS[:, None, :],
            cache=state.cache,
            slot=slot,
        )
        games = _recorded(state.games, state.step, token_B, hears_B, speaks_B, table.turn_B)
        logp_BN = _write(state.logp_BN, state.step, jnp.where(speaks_B, drawn.logp_R, 0.0))
        table, games = _advance(
            world, env_params, key_B, table, games, state.step, token_B, hears_B, speaks_B
        )
        return _Loop(state.step + 1, table, hidden_B1D[:, 0], cache, turn_BS, games, logp_BN)

    def goes_on(state: _Loop) -> jax.Array:
        ended_B = state.table.over_B & (state.table.place_B >= state.table.heard.length)
        return (state.step < columns) & ~jnp.all(ended_B)

    params = lm.for_decoding(params)
    start = _start(lm, params, world, env_params, key_B, slots=slots, columns=columns)
    rows = ("table", "hidden_BD", "turn_BS", "games", "logp_BN")  # the model lays its cache itself
    start = start._replace(**place({name: getattr(start, name) for name in rows}))
    out = jax.lax.while_loop(goes_on, body, start)
    games = out.games._replace(
        agent_BT=out.games.agent_BT[:, 1:],
        reward_BT=out.games.reward_BT[:, 1:],
        turns_B=out.table.turn_B,
    )
    return Played(games, out.logp_BN[:, 1:])


def game_episodes(games: Conversation) -> ilql.Episodes:
    """Games as episodes, one a row: what `ilql`, `soft_batch` and `cloned_episodes` learn from."""
    inputs = Turns(games.token_BN, games.mask_BN, games.turn_BN)
    return ilql.Episodes(inputs, games.reward_BT, games.agent_BT, games.truncated_B)


def cut_games(games: Conversation, turns: int) -> Conversation:
    """Long games as several short ones of `turns` turns, on the host: NumPy, rows in the order of the games.

    A piece ends with the observation that follows its last turn, and counts as truncated there, so that it bootstraps
    from it. With a memory of one turn nothing is lost by it; with a longer one the first turns of a piece remember
    less than they did in the game. The scores are those of the pieces.

    ValueError for turns below 1.
    """
    if turns < 1:
        raise ValueError(f"turns={turns} of a piece must be at least 1")
    games = jax.tree.map(np.asarray, games)
    last_B = np.max(np.where(games.mask_BN, games.turn_BN, 0), axis=1)
    pieces = [
        (b, first, min(first + turns, int(games.turns_B[b])))
        for b in range(len(last_B))
        for first in range(0, max(int(games.turns_B[b]), 1), turns)
    ]
    game_P, first_P, end_P = np.array(pieces).T
    turn_PN, real_PN = games.turn_BN[game_P], games.mask_BN[game_P]
    agent_PN = np.pad(games.agent_BT, ((0, 0), (1, 0)))[game_P]
    reward_PN = np.pad(games.reward_BT, ((0, 0), (1, 0)))[game_P]
    in_turn_PN = (turn_PN >= first_P[:, None]) & (turn_PN < end_P[:, None])
    after_PN = (turn_PN == end_P[:, None]) & ~agent_PN
    kept_PN = real_PN & (in_turn_PN | after_PN)
    # A stable sort brings what is kept to the front of its row.
    order_PN = np.argsort(~kept_PN, axis=1, kind="stable")[:, : int(kept_PN.sum(axis=1).max())]

    def packed(x_PN: Any) -> Any:
        return np.take_along_axis(np.where(kept_PN, x_PN, np.zeros((), x_PN.dtype)), order_PN, axis=1)

    final_P = end_P == games.turns_B[game_P]
    reward_PN = packed(reward_PN)
    return Conversation(
        token_BN=packed(games.token_BN[game_P]),
        mask_BN=packed(real_PN),
        turn_BN=packed(turn_PN - first_P[:, None]),
        agent_BT=packed(agent_PN)[:, 1:],
        reward_BT=reward_PN[:, 1:],
        terminated_B=games.terminated_B[game_P] & final_P,
        truncated_B=~final_P | games.truncated_B[game_P],
        success_B=games.success_B[game_P] & final_P,
        score_B=reward_PN.sum(axis=1),
        turns_B=(end_P - first_P).astype(np.int32),
    )


def best_games(games: Conversation, fraction: float) -> Conversation:
    """The `ceil(fraction * games)` of the highest score, on the host; ties go to the first.

    ValueError for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must lie in (0, 1]; 1 keeps all games")
    score_B = np.asarray(games.score_B)
    keep = np.argsort(-score_B, kind="stable")[: int(np.ceil(fraction * score_B.size))]
    return jax.tree.map(lambda x: np.asarray(x)[np.sort(keep)], games)


def _check(lm: LanguageModel, world: TextWorld, count: int, samples: int, memory: int | None) -> int:
    """Tokens of the longest game; ValueError where model and world do not fit."""
    columns = row_length(world)
    if count < 1:
        raise ValueError(f"count must be at least 1 game, got {count}")
    if samples < 1 or count % samples:
        raise ValueError(f"count={count} games must be a multiple of samples={samples} of each world")
    if memory is not None and memory < 1:
        raise ValueError(f"memory={memory} must be at least 1 turn; None remembers all")
    if lm.config.vocab_size != len(world.vocabulary):
        raise ValueError(
            f"the model has vocab_size={lm.config.vocab_size}, the world speaks {len(world.vocabulary)} tokens"
        )
    if columns > lm.config.max_positions:
        raise ValueError(
            f"a game of this world has up to {columns} tokens; the model has max_positions={lm.config.max_positions}"
        )
    return columns


def _turn_keys(key_B: jax.Array, turn_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys [B] of the agent and of the world in this turn, as `converse` derives them."""
    pair_B = jax.vmap(lambda key, turn: jax.random.split(jax.random.fold_in(key, turn + 1)))(key_B, turn_B)
    return pair_B[:, 0], pair_B[:, 1]


def _start(lm, params, world, env_params, key_B, *, slots: int, columns: int) -> _Loop:
    count = key_B.shape[0]
    opening, state = jax.vmap(lambda key: world.env.reset(jax.random.fold_in(key, 0), env_params))(key_B)
    none_B, flags_B = jnp.zeros(count, jnp.int32), jnp.zeros(count, bool)
    nothing = Utterance(jnp.zeros((count, world.action_length), jnp.int32), none_B)
    table = _Table(state, opening, none_B, nothing, none_B, flags_B)
    row_BN = jnp.zeros((count, columns), jnp.int32)
    games = Conversation(
        row_BN, row_BN > 0, row_BN, row_BN > 0, row_BN.astype(jnp.float32), flags_B, flags_B, flags_B,
        jnp.zeros(count), none_B,
    )  # fmt: skip
    cache = lm.init_cache(count, slots)
    one = jnp.zeros((count, 1), jnp.int32)
    hidden, _ = jax.eval_shape(
        lambda: lm.apply(
            params, one, position_BT=one, mask_BTS=jnp.ones((count, 1, slots), bool), cache=cache, slot=0
        )
    )
    turn_BS = jnp.full((count, slots), -1, jnp.int32)
    hidden_BD = jnp.zeros((count, hidden.shape[-1]), hidden.dtype)
    return _Loop(jnp.int32(0), table, hidden_BD, cache, turn_BS, games, games.reward_BT)


def _write(x_BN: jax.Array, step: jax.Array, x_B: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_BN, x_B[:, None].astype(x_BN.dtype), step, axis=1)


def _recorded(games: Conversation, step, token_B, hears_B, speaks_B, turn_B) -> Conversation:
    """The games with one more token."""
    real_B = hears_B | speaks_B
    return games._replace(
        token_BN=_write(games.token_BN, step, token_B),
        mask_BN=_write(games.mask_BN, step, real_B),
        turn_BN=_write(games.turn_BN, step, jnp.where(real_B, turn_B, 0)),
        agent_BT=_write(games.agent_BT, step, speaks_B),
    )


def _advance(world, env_params, key_B, table, games, step, token_B, hears_B, speaks_B):
    """The token heard or said; where the agent has done speaking, the world's answer."""
    place_B = table.said.length
    spoken = world.action_length
    here_BL = (jnp.arange(spoken)[None, :] == place_B[:, None]) & speaks_B[:, None]
    said = Utterance(
        jnp.where(here_BL, token_B[:, None], table.said.token_L), place_B + speaks_B.astype(jnp.int32)
    )
    done_B = speaks_B & ((token_B == world.stop_token) | (said.length >= spoken))
    table = table._replace(place_B=table.place_B + hears_B, said=said)

    def answered():
        _, key_world_B = _turn_keys(key_B, table.turn_B)
        heard, state, reward_B, terminated_B, truncated_B, info = jax.vmap(
            world.env.step, in_axes=(0, 0, 0, None)
        )(key_world_B, table.world, said, env_params)
        over_B = terminated_B | truncated_B | (table.turn_B + 1 >= world.turns)
        after = _Table(
            state,
            heard,
            jnp.zeros_like(place_B),
            jax.tree.map(jnp.zeros_like, said),
            table.turn_B + 1,
            over_B,
        )
        reward_B = jnp.where(done_B, reward_B.astype(jnp.float32), 0.0)
        return _where(done_B, after, table), games._replace(
            reward_BT=_write(games.reward_BT, step, reward_B),
            terminated_B=games.terminated_B | (done_B & terminated_B),
            truncated_B=games.truncated_B | (done_B & truncated_B & ~terminated_B),
            success_B=games.success_B | (done_B & info["success"]),
            score_B=games.score_B + reward_B,
        )

    return jax.lax.cond(jnp.any(done_B), answered, lambda: (table, games))


def _where(flag_B: jax.Array, x: PyTree, y: PyTree) -> PyTree:
    def pick(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(flag_B.reshape(flag_B.shape + (1,) * (x.ndim - 1)), x, y)

    return jax.tree.map(pick, x, y)
