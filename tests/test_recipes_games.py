"""A language model plays worlds in words: against a loop in Python from the protocol alone, token by token, and against
the forward pass that trains; games cut into pieces; a memory of few turns."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_environments_text import echo_world

from rlhfjax.algorithms import ilql
from rlhfjax.config import ILQL, Decoder
from rlhfjax.environments.text import Utterance, converse, maze_player, maze_world, phrases, row_length, say
from rlhfjax.generation import Sampling, guided, sample_token
from rlhfjax.networks import causal_mask, decoder
from rlhfjax.recipes import (
    Turns,
    best_games,
    cut_games,
    game_episodes,
    guide_params,
    init_text_values,
    play_games,
    text_logp,
    text_values,
    turn_states,
)

KEY, GAMES = jax.random.key(3), 5
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "kv_heads": 2, "head_size": 8, "mlp_width": 24}


def model(world, layers=1):
    lm = decoder(
        Decoder(vocab_size=len(world.vocabulary), max_positions=row_length(world), layers=layers, **SMALL)
    )
    # Large enough weights that the draws depend on what was said.
    params = jax.tree.map(lambda x: 2.0 * x, lm.init(jax.random.key(1)))
    return lm, params


ECHO, MAZE = echo_world(), maze_world(turns=4)
LM, PARAMS = model(ECHO)


@pytest.fixture(scope="module")
def played():
    return jax.jit(lambda params, key: play_games(LM, params, ECHO, key, 40))(PARAMS, KEY)


def row_logits(lm, params, length, memory):
    """The model's logits after a row of tokens, from one forward pass without a cache: (row, turns) -> [V]."""

    @jax.jit
    def run(token_BN, turn_BN, size):
        real_BN = jnp.arange(length)[None] < size
        seen_BNN = causal_mask(real_BN.astype(jnp.int32))
        if memory is not None:
            near_BNN = turn_BN[:, None, :] > turn_BN[:, :, None] - memory
            seen_BNN &= near_BNN | jnp.eye(length, dtype=bool)[None]
        position_BN = jnp.arange(length, dtype=jnp.int32)[None]
        hidden, _ = lm.apply(params, token_BN, position_BT=position_BN, mask_BTS=seen_BNN)
        return lm.logits(params, hidden[:, size - 1])

    def logits(row, turns):
        fill = [0] * (length - len(row))
        return run(*(jnp.asarray([[*x, *fill]], jnp.int32) for x in (row, turns)), len(row))

    return logits


def games_of_a_loop(lm, params, world, key, count, memory=None, sampling=Sampling()):  # noqa: B008
    """Game by game: rows of (token, agent, turn, reward), how each ended, and the log-probabilities."""
    found, env = [], world.env
    reset, step, logits_of = (
        jax.jit(env.reset),
        jax.jit(env.step),
        row_logits(lm, params, row_length(world), memory),
    )
    draw = jax.jit(lambda logits, key: sample_token(logits, jax.random.uniform(key)[None], sampling)[:2])
    for game in range(count):
        mine = jax.random.fold_in(key, game)
        seen, state = reset(jax.random.fold_in(mine, 0), world.env.params)
        row: list[list] = [[int(t), False, 0, 0.0] for t in np.asarray(seen.token_L)[: int(seen.length)]]
        logps, turn, terminated, truncated, info = [], 0, False, False, {}
        while not (terminated or truncated):
            key_agent, key_step = jax.random.split(jax.random.fold_in(mine, turn + 1))
            said: list[int] = []
            while len(said) < world.action_length and (not said or said[-1] != world.stop_token):
                logits = logits_of([x[0] for x in row], [x[2] for x in row])
                token, logp = draw(logits, jax.random.fold_in(key_agent, len(said)))
                said.append(int(token[0]))
                logps.append(float(logp[0]))
                row.append([said[-1], True, turn, 0.0])
            padded = jnp.asarray([*said, *[0] * (world.action_length - len(said))], jnp.int32)
            seen, state, reward, terminated, truncated, info = step(
                key_step, state, Utterance(padded, jnp.int32(len(said))), world.env.params
            )
            row[-1][3] = float(reward)
            turn += 1
            row += [[int(t), False, turn, 0.0] for t in np.asarray(seen.token_L)[: int(seen.length)]]
        found.append(
            (
                row,
                bool(terminated),
                bool(truncated) and not bool(terminated),
                bool(info["success"]),
                turn,
                logps,
            )
        )
    return found


@pytest.mark.parametrize(
    ("world", "memory", "sampling"),
    [
        (ECHO, None, Sampling()),
        (ECHO, 1, Sampling()),
        (MAZE, 2, Sampling(temperature=0.7, top_p=0.9)),
        (ECHO, None, Sampling(temperature=0.0)),
    ],
)
def test_games_equal_a_loop_over_the_protocol(world, memory, sampling):
    lm, params = model(world, layers=2)
    run = partial(play_games, lm, world=world, count=GAMES, memory=memory, sampling=sampling)
    played = jax.jit(lambda params, key: run(params, key=key))(params, KEY)
    games = jax.tree.map(np.asarray, played.games)
    for i, expected in enumerate(games_of_a_loop(lm, params, world, KEY, GAMES, memory, sampling)):
        row, terminated, truncated, success, turns, logps = expected
        n = len(row)
        token, agent, turn, reward = (np.array(x) for x in zip(*row, strict=True))
        np.testing.assert_array_equal(games.token_BN[i, :n], token)
        assert (
            not games.token_BN[i, n:].any() and not games.mask_BN[i, n:].any() and games.mask_BN[i, :n].all()
        )
        np.testing.assert_array_equal(games.agent_BT[i, : n - 1], agent[1:])
        np.testing.assert_array_equal(games.turn_BN[i, :n], turn)
        np.testing.assert_allclose(games.reward_BT[i, : n - 1], reward[1:])
        assert games.reward_BT[i, n - 1 :].sum() == 0
        assert (games.terminated_B[i], games.truncated_B[i], games.success_B[i]) == (
            terminated,
            truncated,
            success,
        )
        assert games.turns_B[i] == turns and games.score_B[i] == pytest.approx(reward.sum())
        np.testing.assert_allclose(played.logp_BT[i][games.agent_BT[i]], logps, atol=2e-5)
        assert not np.any(np.asarray(played.logp_BT[i])[~games.agent_BT[i]])


def test_worlds_of_the_test_have_both_ends(played):
    games = played.games
    assert (
        games.terminated_B.any()
        and games.truncated_B.any()
        and not (games.terminated_B & games.truncated_B).any()
    )
    assert len(np.unique(games.turns_B)) > 1


@pytest.mark.parametrize("memory", [None, 1, 2])
def test_logp_while_playing_is_that_of_the_forward_pass_that_trains(memory):
    """And so the ring of slots holds what the memory reaches, and nothing else is seen."""
    world = maze_world(turns=7)
    lm, params = model(world, layers=2)
    played = jax.jit(lambda params: play_games(lm, params, world, KEY, 6, memory=memory))(params)
    episodes = game_episodes(played.games)
    logp = jax.jit(text_logp(lm, states=partial(turn_states, memory=memory)))(params, episodes.inputs)
    np.testing.assert_allclose(jnp.where(episodes.mask, logp, 0.0), played.logp_BT, atol=2e-5)


def test_memory_forgets(played):
    """With one layer and a memory of one turn, what was said in earlier turns changes nothing."""
    turns = game_episodes(played.games).inputs
    other = turns._replace(token_BN=jnp.where(turns.turn_BN == 0, 3, turns.token_BN))
    states = {memory: jax.jit(partial(turn_states, LM, memory=memory)) for memory in (1, None)}
    later_BT = np.asarray((turns.turn_BN > 0) & turns.mask_BN)[:, :-1]
    for memory, run in states.items():
        same = np.isclose(run(PARAMS, turns).before, run(PARAMS, other).before, atol=1e-6).all(axis=-1)
        assert same[later_BT].all() == (memory == 1)


def test_padding_changes_nothing_under_a_memory(played):
    turns = game_episodes(played.games).inputs
    padded = Turns(
        *(jnp.pad(x, ((0, 0), (0, 3)), constant_values=v) for x, v in zip(turns, (6, False, 9), strict=True))
    )
    run = jax.jit(partial(turn_states, LM, PARAMS, memory=1))
    short, long = run(turns), run(padded)
    where = np.asarray(turns.mask_BN)[:, 1:]
    np.testing.assert_allclose(short.before[where], long.before[:, :-3][where], atol=1e-5)
    np.testing.assert_allclose(short.final, long.final, atol=1e-5)


def test_a_game_does_not_depend_on_those_beside_it(played):
    few = jax.jit(lambda params: play_games(LM, params, ECHO, KEY, 3))(PARAMS)
    for x, y in zip(jax.tree.leaves(few.games), jax.tree.leaves(played.games), strict=True):
        np.testing.assert_array_equal(x, y[:3])
    # Rows multiplied three at a time are not rounded as forty are: 3e-6 was seen on one machine.
    np.testing.assert_allclose(few.logp_BT, played.logp_BT[:3], atol=2e-5)


def test_the_same_key_gives_the_worlds_of_a_scripted_player(played):
    said_2 = phrases(ECHO.vocabulary, ["one.", "two."])
    talk = jax.jit(lambda key: converse(ECHO, lambda key, state: say(said_2, jnp.int32(0), 3), key, 40))(KEY)
    np.testing.assert_array_equal(talk.token_BN[:, :2], played.games.token_BN[:, :2])


def test_scripted_games_tell_the_turn_of_every_token():
    world = maze_world(turns=5)
    games = jax.jit(lambda key: converse(world, maze_player(world, random=0.5), key, 20))(KEY)
    for i in range(20):
        n = int(games.mask_BN[i].sum())
        # Two tokens tell a place, three make a move; the goal is one token.
        expected = [0, 0] + [x for t in range(int(games.turns_B[i])) for x in (t, t, t, t + 1, t + 1)]
        np.testing.assert_array_equal(games.turn_BN[i, :n], expected[:n])
        assert not games.turn_BN[i, n:].any()


def test_guided_by_nothing_it_plays_as_the_policy(played):
    params = init_text_values(jax.random.key(5), LM, PARAMS)
    model = guided(LM, trunk=LM)
    play = jax.jit(lambda params: play_games(model, params, ECHO, KEY, 40))
    same = play(guide_params(params, 0.0))
    for x, y in zip(jax.tree.leaves(same), jax.tree.leaves(played), strict=True):
        np.testing.assert_array_equal(x, y)
    other = play(guide_params(params, 5.0))
    assert np.any(other.games.token_BN != played.games.token_BN)


# ---- games as data


def data(turns=9, count=12):
    world = maze_world(turns=turns)
    return world, jax.jit(lambda key: converse(world, maze_player(world, random=0.9), key, count))(KEY)


def test_pieces_make_up_the_games():
    _, games = data()
    pieces = cut_games(games, 4)
    assert {int(x) for x in pieces.turns_B} >= {1, 4} and pieces.turns_B.max() == 4
    at = 0
    for i in range(12):
        count = -(-int(games.turns_B[i]) // 4)
        row: list = []
        for p in range(at, at + count):
            n = int(pieces.mask_BN[p].sum())
            assert pieces.mask_BN[p, :n].all() and pieces.turn_BN[p, 0] == 0
            # The observation that ends a piece begins the next one.
            start = 0 if p == at else 2
            agent = np.append(False, pieces.agent_BT[p])
            reward = np.append(0.0, pieces.reward_BT[p])
            row += list(zip(pieces.token_BN[p, start:n], agent[start:n], reward[start:n], strict=True))
            last = p == at + count - 1
            assert pieces.truncated_B[p] == (not last or games.truncated_B[i])
            assert pieces.terminated_B[p] == (last and games.terminated_B[i])
        n = int(games.mask_BN[i].sum())
        token, agent, reward = (np.array(x) for x in zip(*row, strict=True))
        np.testing.assert_array_equal(token, games.token_BN[i, :n])
        np.testing.assert_array_equal(agent[1:], games.agent_BT[i, : n - 1])
        np.testing.assert_allclose(reward[1:], games.reward_BT[i, : n - 1])
        at += count
    assert at == len(pieces.turns_B)
    assert pieces.score_B.sum() == pytest.approx(float(games.score_B.sum()))


@pytest.mark.parametrize("bootstrap", ["value", "max"])
def test_with_a_memory_of_one_turn_pieces_have_the_loss_of_the_games(bootstrap):
    """Value and gradient: a piece bootstraps from the observation that follows it, as the game does."""
    world, games = data()
    lm, policy = model(world, layers=2)
    params = init_text_values(jax.random.key(5), lm, policy)
    values = text_values(lm, states=partial(turn_states, memory=1))
    config = ILQL(
        bootstrap, discount=0.9, expectile=0.7 if bootstrap == "value" else None, policy_coefficient=1.0
    )

    @jax.jit
    def gradient(params, episodes):
        target = jax.tree.map(lambda x: 0.9 * x, values.target_of(params))
        loss = partial(
            ilql.loss, evaluate=values.evaluate, config=config, evaluate_target=values.evaluate_target
        )
        return jax.value_and_grad(lambda p: loss(p, episodes, target=target)[0])(params)

    whole, cut = (
        gradient(params, jax.tree.map(jnp.asarray, game_episodes(x))) for x in (games, cut_games(games, 3))
    )
    assert whole[0] == pytest.approx(float(cut[0]), rel=1e-5)
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(whole[1]))
    for x, y in zip(jax.tree.leaves(whole[1]), jax.tree.leaves(cut[1]), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * scale)


def test_the_best_games_are_kept_in_their_order():
    _, games = data()
    score_B = jnp.asarray([-9.0, -3.0, -9.0, -1.0, -5.0, -9.0, -3.0, -9.0, -9.0, -9.0, -9.0, -9.0])
    games = games._replace(score_B=score_B)
    kept = best_games(games, 0.25)
    np.testing.assert_array_equal(kept.score_B, [-3.0, -1.0, -3.0])
    order = np.argsort(-np.asarray(games.score_B), kind="stable")[:3]
    np.testing.assert_array_equal(kept.score_B, np.asarray(games.score_B)[np.sort(order)])
    np.testing.assert_array_equal(kept.token_BN, np.asarray(games.token_BN)[np.sort(order)])


def refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_what_does_not_fit_is_refused_by_name():
    play = partial(play_games, LM, PARAMS, ECHO, KEY)
    refused(lambda: play(0), "count must be at least 1")
    refused(lambda: play(2, memory=0), "memory=0 must be at least 1")
    refused(lambda: play_games(LM, PARAMS, MAZE, KEY, 2), "vocab_size=7, the world speaks")
    short = decoder(Decoder(vocab_size=7, max_positions=row_length(ECHO) - 1, layers=1, **SMALL))
    refused(lambda: play_games(short, PARAMS, ECHO, KEY, 2), "max_positions=16")
    refused(
        lambda: turn_states(LM, PARAMS, Turns(jnp.ones((1, 3), jnp.int32), jnp.ones((1, 3), bool)), memory=1),
        "turn_BN",
    )
    _, games = data()
    refused(lambda: cut_games(games, 0), "turns=0")
    refused(lambda: best_games(games, 0.0), "fraction=0.0")
