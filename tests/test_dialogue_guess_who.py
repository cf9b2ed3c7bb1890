"""Guess who against a simulator in plain Python and a search over histories; its table, its players, users who err."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_environments_text_games import heard, played, spoken, transcript

from rlhfjax.environments.text import (
    Things,
    converse,
    guess_who_optimum,
    guess_who_player,
    guess_who_world,
    people,
)
from rlhfjax.environments.text.guess_who import ATTRIBUTES, PEOPLE

KEY, TURNS = jax.random.key(0), 5
THINGS = people(6, 8)
WORLD = guess_who_world(THINGS, turns=TURNS)


def hidden(games, game: int) -> int:
    """Who it is, from the answers to names alone; -1 where nobody was named rightly."""
    _, turns = transcript(WORLD, games, game)
    name = turns[-1][0].removeprefix("Is it ").removesuffix("?\n")
    return THINGS.names.index(name) if turns[-1][1] == "Right.\n" else -1


@pytest.fixture(scope="module")
def games():
    return played(WORLD, guess_who_player(WORLD, smart=0.6, hasty=0.15), 60)


def test_games_are_those_of_a_plain_simulator(games):
    """Questions by the table, names by who it is, rewards, and the last turn."""
    ends = set()
    for game in range(60):
        opening, turns = transcript(WORLD, games, game)
        assert opening == "Guess who it is.\n"
        possible = set(range(6))
        for number, (said, answer, reward) in enumerate(turns, start=1):
            last = number == TURNS
            if said.startswith("Is it "):
                who = THINGS.names.index(said.removeprefix("Is it ").removesuffix("?\n"))
                assert number == len(turns) and answer in ("Right.\n", "Wrong.\n")
                assert reward == (10.0 if answer == "Right.\n" else -10.0)
                assert games.success_B[game] == (answer == "Right.\n")
                possible = possible & {who} if answer == "Right.\n" else possible - {who}
                ends.add(answer)
            else:
                attribute = said.removeprefix("Does this person ").removesuffix("?\n")
                column = THINGS.true_NM[:, THINGS.attributes.index(attribute)]
                assert answer in ("Yes.\n", "No.\n")
                possible &= set(np.flatnonzero(column == (answer == "Yes.\n")).tolist())
                assert reward == (-11.0 if last else -1.0)
                if last:
                    ends.add("turns")
            assert possible  # the user has one person in mind
        assert games.terminated_B[game] and not games.truncated_B[game]
        assert games.score_B[game] == pytest.approx(sum(reward for *_, reward in turns))
    assert ends == {"Right.\n", "Wrong.\n", "turns"}


def test_everybody_is_hidden_equally_often():
    world = guess_who_world(THINGS, turns=TURNS)
    targets = jax.vmap(lambda key: world.env.reset(key, world.env.params)[1].target)(
        jax.random.split(KEY, 3000)
    )
    np.testing.assert_allclose(np.bincount(targets, minlength=6) / 3000, 1 / 6, atol=0.03)


@pytest.mark.parametrize("said", ["Does this person Ada?\n", "Is it wear a hat?\n", "Yes.\n", "?\n", ""])
def test_what_is_no_question(said):
    _, state = WORLD.env.reset(KEY, WORLD.env.params)
    answer, after, reward, terminated, _, info = WORLD.env.step(
        KEY, state, spoken(WORLD, said), WORLD.env.params
    )
    assert heard(WORLD, answer) == "What?\n" and reward == -1.0 and not terminated and not info["success"]
    np.testing.assert_array_equal(after.against_N, state.against_N)
    assert after.turn == 1


def test_a_user_who_errs_does_so_as_often_as_it_is_told_to():
    world = guess_who_world(THINGS, turns=TURNS, noise=0.2)
    _, state = world.env.reset(KEY, world.env.params)
    question, name = spoken(world, "Does this person wear glasses?\n"), spoken(world, "Is it Ada?\n")

    @jax.jit
    @jax.vmap
    def answers(key):
        asked = world.env.step(key, state, question, world.env.params)
        named = world.env.step(key, state._replace(target=jnp.int32(0)), name, world.env.params)
        return asked[0].token_L[0], asked[1].against_N, named[5]["success"]

    token, against_BN, right = jax.device_get(answers(jax.random.split(KEY, 4000)))
    truth = bool(THINGS.true_NM[int(state.target), 0])
    yes = np.array([world.vocabulary[i] == "Yes.\n" for i in token])
    assert np.mean(yes != truth) == pytest.approx(0.2, abs=0.03)
    # What was answered speaks against those of whom it is not so.
    np.testing.assert_array_equal(against_BN, THINGS.true_NM[:, 0][None] != yes[:, None])
    assert right.all()  # whether a name is right is told truly


def expected_score(things: Things, turns: int, noise: float) -> float:
    """The optimum by a search over histories: every sequence of questions and answers on its own."""
    names, attributes = things.true_NM.shape

    @cache
    def value(history: tuple, left: int) -> float:
        weight = np.ones(names) / names
        for attribute, answer in history:
            weight *= np.where(things.true_NM[:, attribute] == answer, 1 - noise, noise)
        total = weight.sum()
        best = 10.0 * weight.max() / total - 10.0 * (1 - weight.max() / total)
        for attribute in range(attributes):
            asked = -1.0
            for answer in (False, True):
                chance = (
                    np.sum(weight * np.where(things.true_NM[:, attribute] == answer, 1 - noise, noise))
                    / total
                )
                if chance > 0:
                    asked += chance * (
                        -10.0 if left == 1 else value((*history, (attribute, answer)), left - 1)
                    )
            best = max(best, asked)
        return best

    return value((), turns)


@pytest.mark.parametrize(("noise", "turns"), [(0.0, 3), (0.0, 4), (0.15, 4), (0.5, 2)])
def test_the_optimum_is_that_of_a_search_over_histories(noise, turns):
    things = Things(THINGS.names, THINGS.attributes[:4], THINGS.true_NM[:, [0, 1, 2, 6]])
    world = guess_who_world(things, turns=turns, noise=noise)
    assert guess_who_optimum(world) == pytest.approx(expected_score(things, turns, noise), abs=1e-9)


def test_known_optima():
    """2^n people whom n attributes tell apart take n questions; with too few turns one guesses among those left."""
    assert guess_who_optimum(guess_who_world(people(16, 8), turns=7)) == pytest.approx(5.9375)
    number_N = np.arange(8)
    true_NM = (number_N[:, None] >> np.arange(3)) & 1 == 1
    things = Things(tuple(f"n{i}" for i in range(8)), ("a", "b", "c"), true_NM)
    assert guess_who_optimum(guess_who_world(things, turns=4)) == pytest.approx(7.0)
    assert guess_who_optimum(guess_who_world(things, turns=3)) == pytest.approx(
        -2.0
    )  # two questions, one of two


@pytest.mark.slow
def test_players_of_various_skill():
    """Who always takes a turn well is at the optimum where splits can be even, who never does loses all."""
    world = guess_who_world(people(16, 8), turns=7)

    @partial(jax.jit, static_argnums=(0, 1))
    def score(smart, hasty):
        games = converse(world, guess_who_player(world, smart=smart, hasty=hasty), KEY, 400)
        return jnp.mean(games.score_B), jnp.mean(games.success_B, dtype=jnp.float32)

    (best, won), (middling, _), (worst, never) = score(1.0, 0.0), score(0.5, 0.1), score(0.0, 0.0)
    assert best == pytest.approx(guess_who_optimum(world), abs=0.2) and won == 1.0
    assert worst == -17.0 and never == 0.0 and worst < middling < best - 5.0


def test_a_careful_player_asks_again_where_the_user_errs():
    things = Things(("Ann", "Bob"), ("smile",), np.array([[True], [False]]))
    world = guess_who_world(things, turns=9, noise=0.2)
    games = played(world, guess_who_player(world, smart=1.0, sure=0.9), 300)
    # 0.8 is not sure enough, 0.8^2 / (0.8^2 + 0.2^2) = 0.94 is.
    assert games.turns_B.min() == 3 and np.mean(games.success_B) == pytest.approx(0.94, abs=0.04)


def test_the_table():
    things = people()
    assert things.true_NM.shape == (24, 12) and len(set(things.names)) == 24
    for name, words in PEOPLE.items():
        row = things.true_NM[things.names.index(name)]
        assert {list(ATTRIBUTES)[m] for m in np.flatnonzero(row)} == set(words.split())
    assert len(np.unique(people(24, 7).true_NM, axis=0)) == 24


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: people(25), "count=25"),
        (lambda: people(4, 0), "attributes=0"),
        (lambda: guess_who_world(people(24, 3)), "no attribute tells"),
        (lambda: guess_who_world(noise=0.6), r"noise=0.6 must lie in \[0, 0.5\]"),
        (lambda: guess_who_player(WORLD, smart=0.8, hasty=0.3), "hasty=0.3"),
        (lambda: guess_who_player(WORLD, sure=0.0), "sure=0.0"),
        (lambda: guess_who_optimum(guess_who_world(people(8)), work=1000), "too many beliefs"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
