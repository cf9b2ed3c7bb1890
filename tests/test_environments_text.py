"""Utterances, words to tokens and back, the door of a text world, and games as rows of tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled

from rlhfjax.environments.environment import Environment
from rlhfjax.environments.text import (
    Exchanges,
    TextWorld,
    Utterance,
    as_rows,
    converse,
    decode,
    encode,
    maze_world,
    phrases,
    render,
    row_length,
    say,
    text_world,
    understand,
)
from rlhfjax.recipes.value import Turn, turn_episodes

KEY = jax.random.key(0)
WORDS = ("<pad>", ".", "go", " on", " one", "one", "two")


def utterance(ids, length: int, size: int | None = None) -> Utterance:
    """`ids` padded to `length` tokens with a token that is not to be read."""
    size = len(ids) if size is None else size
    return Utterance(jnp.asarray([*ids, *[5] * (length - len(ids))], jnp.int32), jnp.int32(size))


def echo_world(**changes) -> TextWorld:
    """Says "one" or "two" at first; ends, won, when it is told the same; is cut short after 3 turns."""
    said_2 = phrases(WORDS, ["one.", "two."])

    def reset(key, params):
        target = jax.random.randint(key, (), 0, 2, jnp.int32)
        return say(said_2, target), (target, jnp.int32(0))

    def step(key, state, action, params):
        target, turn = state
        won = understand(action, said_2) == target
        reward = jnp.where(won, 10.0, -action.length.astype(jnp.float32))
        # Silent where it was told nothing.
        heard = Utterance(jnp.array([2, 1], jnp.int32), jnp.where(action.length == 0, 0, 2).astype(jnp.int32))
        return heard, (target, turn + 1), reward, won, turn >= 2, {"success": won}

    options: dict = dict(stop=".", action_length=3, observation_length=2, turns=3) | changes
    return text_world(Environment(reset, step, None, None), WORDS, **options)


def rows_of_a_loop(world, player, key, count: int) -> list[tuple[list[Turn], bool, float, bool]]:
    """The games one by one, in Python, from the protocol alone: turns, truncated, score, won."""
    games, params = [], world.env.params

    @jax.jit
    def opened(key, game):
        mine = jax.random.fold_in(key, game)
        return world.env.reset(jax.random.fold_in(mine, 0), params)

    @jax.jit
    def played(key, game, number, state):
        key_player, key_step = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, game), number))
        said = player(key_player, state)
        return said, world.env.step(key_step, state, said, params)

    for game in range(count):
        seen, state = opened(key, game)
        turns = [Turn(np.asarray(seen.token_L)[: int(seen.length)].tolist(), False)]
        score, over, number = 0.0, False, 0
        while not over:
            number += 1
            said, (seen, state, reward, terminated, truncated, info) = played(key, game, number, state)
            turns.append(Turn(np.asarray(said.token_L)[: int(said.length)].tolist(), True, float(reward)))
            turns.append(Turn(np.asarray(seen.token_L)[: int(seen.length)].tolist(), False))
            score, over = score + float(reward), bool(terminated) or bool(truncated)
        games.append((turns, bool(truncated) and not bool(terminated), score, bool(info["success"])))
    return games


def test_words_to_tokens_and_back():
    world = echo_world()
    assert encode(world, "go one.") == [2, 4, 1]  # " one", the longest, and not " on"
    assert encode(world, "go on.") == [2, 3, 1]
    assert encode(world, "") == []
    assert decode(world, [2, 4, 0, 1, 0]) == "go one."
    assert decode(world, encode(world, "twogo on one.")) == "twogo on one."


@pytest.mark.parametrize(
    "text, part", [("go three.", "' three.' at character 2"), ("Go", "'Go'"), ("<pad>", "'<pad>'")]
)
def test_an_unknown_word_is_named(text, part):
    with pytest.raises(ValueError, match=part):
        encode(echo_world(), text)


def test_other_bad_words():
    world = echo_world()
    with pytest.raises(ValueError, match="told strings, got int"):
        encode(world, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="token 7 lies outside"):
        decode(world, [1, 7])
    with pytest.raises(ValueError, match="'go on.' has 3 tokens, more than 2"):
        phrases(WORDS, ["go on.", "two."], 2)


def test_understanding_reads_exactly_what_was_said():
    said_P = phrases(WORDS, ["two.", "go on.", "go."])
    heard = jax.jit(lambda x: understand(x, said_P))
    for ids, size, number in [
        ([6, 1, 0], 2, 0),
        ([6, 1, 6], 2, 0),  # what stands after the length is not read
        ([6, 1, 1], 3, -1),
        ([2, 3, 1], 3, 1),
        ([2, 3, 1], 2, -1),  # not said to its end
        ([2, 1, 1], 2, 2),
        ([3, 2, 1], 3, -1),
        ([0, 0, 0], 0, -1),
    ]:
        assert int(heard(utterance(ids, 5, size))) == number, ids
    batch = jax.vmap(heard)(
        Utterance(jnp.array([[6, 1, 0], [2, 3, 1]], jnp.int32), jnp.array([2, 3], jnp.int32))
    )
    assert batch.tolist() == [0, 1]
    with pytest.raises(ValueError, match="phrases of 3 tokens do not fit into an utterance of 2"):
        understand(utterance([6, 1], 2), said_P)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stop": "?"}, "stop token '\\?' is not in the vocabulary"),
        ({"stop": "<pad>"}, "stop token '<pad>' is not"),
        ({"turns": 0}, "turns=0"),
        ({"action_length": 0}, "action_length=0"),
    ],
)
def test_a_text_world_is_held_to_its_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        echo_world(**changes)


def test_a_vocabulary_has_each_text_once():
    env = echo_world().env
    for words, message in [
        (WORDS[1:], 'begins with "<pad>"'),
        ((*WORDS, "two"), "two"),
        ((*WORDS, ""), "empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            text_world(env, words, stop=".", action_length=3, observation_length=2, turns=3)


def test_the_door_refuses_other_utterances():
    world = echo_world()
    _, state = world.env.reset(KEY, ())
    step = jax.jit(world.env.step)
    with pytest.raises(TypeError, match="must be an Utterance"):
        step(KEY, state, jnp.zeros(3, jnp.int32), ())
    with pytest.raises(TypeError, match=r"int32 \[3\] and int32 \[\], got int32\[4\] and int32\[\]"):
        step(KEY, state, utterance([6, 1], 4), ())
    with pytest.raises(TypeError, match="got float32"):
        step(KEY, state, Utterance(jnp.zeros(3), jnp.int32(0)), ())
    with pytest.raises(TypeError, match="step's observation must be an Utterance of int32 \\[4\\]"):
        echo_world(observation_length=4).env.step(KEY, state, utterance([6, 1], 3), ())
    with pytest.raises(TypeError, match="reset's observation"):
        echo_world(observation_length=4).env.reset(KEY, ())
    five: Any = lambda *x: world.env.step(*x)[:5]  # noqa: E731
    five = Environment(world.env.reset, five, None, None)
    broken = text_world(five, WORDS, stop=".", action_length=3, observation_length=2, turns=3)
    with pytest.raises(ValueError, match="step must return .* got 5 values"):
        broken.env.step(KEY, state, utterance([6, 1], 3), ())


def test_rows_of_hand_made_turns():
    """Three games of two turns; what was not said holds numbers that must not come through."""
    opening = Utterance(jnp.array([[1, 9], [2, 3], [4, 9]], jnp.int32), jnp.array([1, 2, 1], jnp.int32))
    said = Utterance(
        jnp.array([[[5, 6, 9], [5, 9, 9], [7, 8, 9]], [[6, 9, 9], [9, 9, 9], [5, 5, 5]]], jnp.int32),
        jnp.array([[2, 1, 2], [1, 2, 3]], jnp.int32),
    )
    heard = Utterance(
        jnp.array([[[7, 9], [9, 9], [1, 9]], [[8, 8], [9, 9], [2, 9]]], jnp.int32),
        jnp.array([[1, 0, 1], [2, 1, 1]], jnp.int32),
    )
    rows = jax.jit(as_rows)(
        opening,
        Exchanges(
            said,
            heard,
            reward_RB=jnp.array([[-1.0, 3.0, -1.0], [-2.0, jnp.nan, -4.0]]),
            terminated_RB=jnp.array([[False, True, False], [True, False, False]]),
            truncated_RB=jnp.array([[False, False, False], [True, True, True]]),
            success_RB=jnp.array([[False, True, False], [False, False, False]]),
            running_RB=jnp.array([[True, True, True], [True, False, True]]),
        ),
    )
    o = 0
    expected = [
        [1, 5, 6, 7, 6, 8, 8, o, o, o, o, o],
        [2, 3, 5, o, o, o, o, o, o, o, o, o],
        [4, 7, 8, 1, 5, 5, 5, 2],
    ]
    expected[2] += [o] * 4
    np.testing.assert_array_equal(rows.token_BN, expected)
    np.testing.assert_array_equal(rows.mask_BN.sum(axis=1), [7, 3, 8])
    np.testing.assert_array_equal(rows.mask_BN, np.asarray(expected) > 0)
    agent = [[1, 1, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1, 0]]
    reward = [[0, -1, 0, -2], [0, 3], [0, -1, 0, 0, 0, -4]]
    for b in range(3):
        np.testing.assert_array_equal(np.flatnonzero(rows.agent_BT[b]), np.flatnonzero(agent[b]))
        np.testing.assert_array_equal(rows.reward_BT[b], reward[b] + [0] * (11 - len(reward[b])))
    np.testing.assert_array_equal(rows.terminated_B, [True, True, False])
    np.testing.assert_array_equal(rows.truncated_B, [False, False, True])  # where both, it terminated
    np.testing.assert_array_equal(rows.success_B, [False, True, False])
    np.testing.assert_array_equal(rows.score_B, [-3.0, 3.0, -5.0])
    np.testing.assert_array_equal(rows.turns_B, [2, 1, 2])
    assert (
        rows.token_BN.dtype == jnp.int32
        and rows.reward_BT.dtype == jnp.float32
        and rows.mask_BN.dtype == bool
    )


def speaker(key, state):
    """Any of three things, one of them in two tokens, one of them too long to be understood."""
    texts = phrases(WORDS, ["one.", "two.", "go on."])
    return say(texts, jax.random.randint(key, (), 0, 3), 3)


def test_games_equal_a_loop_in_python_and_the_rows_of_turn_episodes():
    world, count = echo_world(), 24
    games = jax.jit(lambda key: converse(world, speaker, key, count))(KEY)
    looped = rows_of_a_loop(world, speaker, KEY, count)
    turns, truncated, score, won = zip(*looped, strict=True)
    assert 2 < sum(truncated) < count - 2 and sum(won) > 2
    expected = turn_episodes(turns, row_length(world), truncated=truncated)
    np.testing.assert_array_equal(games.token_BN, expected.inputs.token_BN)
    np.testing.assert_array_equal(games.mask_BN, expected.inputs.mask_BN)
    np.testing.assert_array_equal(games.agent_BT, expected.mask)
    np.testing.assert_array_equal(games.reward_BT, expected.reward)
    np.testing.assert_array_equal(games.truncated_B, expected.truncated)
    np.testing.assert_array_equal(games.score_B, score)
    np.testing.assert_array_equal(games.success_B, won)
    np.testing.assert_array_equal(games.turns_B, [sum(turn.agent for turn in game) for game in turns])
    # A game does not know how many others there are.
    fewer = compiled(lambda key: converse(world, speaker, key, 3), KEY)
    jax.tree.map(lambda few, all_: np.testing.assert_array_equal(few, np.asarray(all_)[:3]), fewer, games)


def test_a_player_that_says_nothing():
    """No token, no place for a reward in the row: it counts in the score."""
    world = echo_world()
    silent = lambda key, state: utterance([], 3, 0)  # noqa: E731
    games = jax.tree.map(np.asarray, compiled(lambda key: converse(world, silent, key, 2), KEY))
    assert games.mask_BN.sum(axis=1).tolist() == [2, 2] and not games.agent_BT.any()
    assert games.truncated_B.all() and games.turns_B.tolist() == [3, 3]


def test_rewards_are_parameters():
    world = maze_world(turns=4)
    lost = lambda key, state: utterance([], 3, 0)  # noqa: E731
    params = world.env.params
    costs = np.asarray([-4.0, -0.5], np.float32)
    score = lambda cost: converse(world, lost, KEY, 1, params._replace(misunderstood=cost)).score_B  # noqa: E731
    scores = compiled(jax.vmap(score), costs)
    np.testing.assert_array_equal(np.asarray(scores)[:, 0], [-16.0, -2.0])


def test_bad_calls_of_converse():
    with pytest.raises(ValueError, match="at least 1 game"):
        converse(echo_world(), speaker, KEY, 0)
    with pytest.raises(TypeError, match=r"int32 \[3\].* got int32\[2\]"):
        converse(echo_world(), lambda key, state: utterance([6, 1], 2), KEY, 1)


def test_a_game_for_people():
    world = echo_world()
    told = jnp.array([[6, 5, 6], [2, 1, 0]], jnp.int32)
    player = lambda key, state: say(Utterance(told, jnp.array([0, 2], jnp.int32)), 1 * (state[1] > 0))  # noqa: E731
    games = compiled(lambda key: converse(world, player, key, 1), KEY)
    first = decode(world, np.asarray(games.token_BN)[0, :2].tolist())
    assert render(world, games).split("\n") == [
        first,
        "> go.",
        "go.",
        "> go.",
        "go.",
        "[the game was cut short after 3 turns, score -4]",
    ]
