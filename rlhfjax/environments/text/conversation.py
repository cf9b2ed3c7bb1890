"""Whole games in words, as rows of tokens: what data sets of text worlds are made of.

Shapes: B games, R turns, L tokens of an utterance, N = T + 1 tokens of a row; position t of all but the tokens speaks
of token t + 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.environments.text.text_world import TextWorld, Utterance, decode

PyTree = Any
Player = Callable[[jax.Array, PyTree], Utterance]
"""A scripted player: `player(key, state) -> Utterance`. It sees the state of one world and consumes the key."""


def any_of(key: jax.Array, which: jax.Array) -> jax.Array:
    """A number where `which` is True, each as likely, int32 []."""
    return jax.random.categorical(key, jnp.where(which, 0.0, -jnp.inf)).astype(jnp.int32)


class Conversation(NamedTuple):
    """Whole games, one a row, right-padded. The first observation of a game stands first, the last one last."""

    token_BN: jax.Array  # int32 [B, T + 1], 0 where nothing was said
    mask_BN: jax.Array  # bool, True on tokens that were said, by whomever
    turn_BN: (
        jax.Array
    )  # int32, the turn of each token: what the world says, then what the agent answers; from 0
    agent_BT: jax.Array  # bool [B, T], True on those that the agent said
    reward_BT: jax.Array  # float32, of a turn, at the last token that the agent said in it; elsewhere 0
    terminated_B: jax.Array  # bool, the game ended
    truncated_B: jax.Array  # bool, it was cut short by a limit: bootstrap after its last token
    success_B: jax.Array  # bool, it was won
    score_B: jax.Array  # float32, sum of its rewards
    turns_B: jax.Array  # int32, its turns


class Exchanges(NamedTuple):
    """Turns of games, [R, B], of which `running` tells those that took place."""

    said: Utterance  # token_L [R, B, action_length], length [R, B]: the agent
    heard: Utterance  # token_L [R, B, observation_length], length [R, B]: the world's reply
    reward_RB: jax.Array  # float32
    terminated_RB: jax.Array  # bool
    truncated_RB: jax.Array  # bool
    success_RB: jax.Array  # bool
    running_RB: jax.Array  # bool, False from the turn after the game's end on: nothing of those turns is read


def row_length(world: TextWorld) -> int:
    """N: tokens of the longest game of a world."""
    return world.observation_length + world.turns * (world.action_length + world.observation_length)


def converse(
    world: TextWorld,
    player: Player,
    key: jax.Array,
    count: int,
    params: PyTree = None,
    *,
    place: Callable[[PyTree], PyTree] = lambda games: games,
) -> Conversation:
    """`count` games of a scripted player: one scan over turns, `vmap` over games. To be jitted by the caller.

    params: None takes the world's own. place: lays arrays with a row for each game over devices:
    `mesh.place_rows(mesh)`. The key is consumed; each game's keys are folded from it by the game's number and the
    turn's. ValueError for a count below 1 and a player whose utterances are not of `action_length` tokens.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 game, got {count}")
    params = world.env.params if params is None else params
    key_B = place(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(count)))
    opening, state = jax.vmap(lambda key: world.env.reset(jax.random.fold_in(key, 0), params))(key_B)

    def turn(key: jax.Array, state: PyTree) -> tuple[PyTree, tuple]:
        key_player, key_step = jax.random.split(key)
        said = player(key_player, state)
        heard, after, reward, terminated, truncated, info = world.env.step(key_step, state, said, params)
        return after, (said, heard, reward.astype(jnp.float32), terminated, truncated, info["success"])

    def all_turn(carry: tuple[PyTree, jax.Array], number: jax.Array):
        state, running_B = carry
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_B, number)
        after, out = jax.vmap(turn)(keys, state)
        exchange = Exchanges(*out, running_RB=running_B)
        return (after, running_B & ~exchange.terminated_RB & ~exchange.truncated_RB), exchange

    number_R = 1 + jnp.arange(world.turns)
    _, exchanges = jax.lax.scan(all_turn, place((state, jnp.ones(count, bool))), number_R)
    return place(as_rows(opening, exchanges))


def as_rows(opening: Utterance, exchanges: Exchanges) -> Conversation:
    """Turns as rows of tokens without gaps; memory linear in the tokens.

    opening: the first observations, token_L [B, L] and length [B]. An agent's turn of no tokens has no place for a
    reward, and its reward counts in the score only.
    """
    chunk_BK, real_BK, turn_BK, agent_BK, reward_BK = _laid_out(opening, exchanges)
    # What was not said is written to a place past the end, where nothing is kept.
    place_BK = jnp.where(real_BK, jnp.cumsum(real_BK, axis=1) - 1, chunk_BK.shape[1])

    @jax.vmap  # row by row, so that each device packs its own
    def packed_row(x_K: jax.Array, place_K: jax.Array) -> jax.Array:
        return jnp.zeros_like(x_K).at[place_K].set(x_K, mode="drop")

    def packed(x_BK: jax.Array) -> jax.Array:
        return packed_row(x_BK, place_BK)

    running_RB = exchanges.running_RB
    cut_RB = exchanges.truncated_RB & ~exchanges.terminated_RB  # where both, it terminated
    return Conversation(
        token_BN=packed(chunk_BK),
        mask_BN=packed(real_BK),
        turn_BN=packed(turn_BK),
        agent_BT=packed(agent_BK)[:, 1:],
        reward_BT=packed(reward_BK)[:, 1:],
        terminated_B=jnp.any(exchanges.terminated_RB & running_RB, axis=0),
        truncated_B=jnp.any(cut_RB & running_RB, axis=0),
        success_B=jnp.any(exchanges.success_RB & running_RB, axis=0),
        score_B=jnp.sum(jnp.where(running_RB, exchanges.reward_RB, 0.0), axis=0),
        turns_B=jnp.sum(running_RB, axis=0, dtype=jnp.int32),
    )


def _laid_out(opening: Utterance, exchanges: Exchanges) -> tuple[jax.Array, ...]:
    """Every slot that a token may have been said in, in order, [B, K]: tokens, whether said, turns, by the agent,
    rewards."""
    turns, games = exchanges.reward_RB.shape
    said, heard = exchanges.said, exchanges.heard
    spoken = said.token_L.shape[-1]
    said = said._replace(length=jnp.minimum(said.length, spoken))
    place_L = jnp.arange(spoken)[None, None, :]
    last_RBL = (place_L == said.length[..., None] - 1) & exchanges.running_RB[..., None]
    reward_RBL = jnp.where(last_RBL, exchanges.reward_RB[..., None], 0.0)

    def real(x: Utterance) -> jax.Array:
        return jnp.arange(x.token_L.shape[-1])[None, None, :] < x.length[..., None]

    def all_slots(first_BL: jax.Array, agent_RBL: jax.Array, world_RBL: jax.Array) -> jax.Array:
        turn_BRL = jnp.swapaxes(jnp.concatenate([agent_RBL, world_RBL], axis=2), 0, 1)
        return jnp.concatenate([first_BL, turn_BRL.reshape(games, -1)], axis=1)

    first_BL = jnp.arange(opening.token_L.shape[-1])[None, :] < opening.length[:, None]
    running_RBL = exchanges.running_RB[..., None]
    real_BK = all_slots(first_BL, real(said) & running_RBL, real(heard) & running_RBL)
    token_BK = all_slots(opening.token_L, said.token_L, heard.token_L)
    nobody = jnp.zeros((turns, games, heard.token_L.shape[-1]), bool)
    agent_BK = all_slots(jnp.zeros_like(first_BL), jnp.ones(said.token_L.shape, bool), nobody) & real_BK
    reward_BK = all_slots(jnp.zeros(first_BL.shape), reward_RBL, nobody.astype(jnp.float32))
    turn_R11 = jnp.arange(turns)[:, None, None]
    turn_BK = all_slots(
        jnp.zeros(first_BL.shape, jnp.int32),
        jnp.broadcast_to(turn_R11, said.token_L.shape),
        jnp.broadcast_to(turn_R11 + 1, heard.token_L.shape),
    )
    return token_BK, real_BK, turn_BK, agent_BK, reward_BK


def render(world: TextWorld, conversation: Conversation, game: int = 0) -> str:
    """A game as text for people, on the host: the agent's words after "> ", and how it ended."""
    token_N, mask_N, agent_T = (
        np.asarray(x)[game] for x in (conversation.token_BN, conversation.mask_BN, conversation.agent_BT)
    )
    agent_N = np.concatenate([[False], agent_T])[mask_N]
    token_N = token_N[mask_N]
    border = np.flatnonzero(np.diff(agent_N)) + 1
    lines = []
    for part, agent in zip(np.split(token_N, border), np.split(agent_N, border), strict=True):
        text = decode(world, part.tolist()).strip()
        if text or agent[0]:
            lines.append(f"> {text}" if agent[0] else text)
    ends = ((conversation.terminated_B, "ended"), (conversation.truncated_B, "was cut short"))
    end = next((text for flag, text in ends if flag[game]), "goes on")
    end = "was won" if conversation.success_B[game] else end
    turns, score = int(conversation.turns_B[game]), float(conversation.score_B[game])
    return "\n".join([*lines, f"[the game {end} after {turns} turn{'s' * (turns != 1)}, score {score:g}]"])
