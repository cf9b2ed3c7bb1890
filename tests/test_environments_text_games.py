"""Maze, Wordle, twenty questions and the star graph against simulators in plain Python and known answers."""

import math
from collections import Counter
from functools import cache, partial
from statistics import fmean

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.environments.grid import optimal_values, policy_values
from rlhfjax.environments.text import (
    DOUBLE_T,
    MOVES,
    Things,
    Utterance,
    best_score,
    converse,
    decode,
    encode,
    every_box,
    everyday_things,
    five_letter_words,
    maze_player,
    maze_score,
    maze_table,
    maze_world,
    nonsense_words,
    star_graph_player,
    star_graph_world,
    twenty_questions_optimum,
    twenty_questions_player,
    twenty_questions_world,
    wordle_optimum,
    wordle_player,
    wordle_words,
    wordle_world,
)
from rlhfjax.environments.text.wordle import marks

KEY = jax.random.key(0)


def spoken(world, text: str) -> Utterance:
    """A text as an action."""
    ids = encode(world, text)
    token_L = np.full(world.action_length, 1, np.int32)  # what stands after its end is not read
    token_L[: len(ids)] = ids
    return Utterance(jnp.asarray(token_L), jnp.int32(len(ids)))


def heard(world, observation: Utterance) -> str:
    return decode(world, np.asarray(observation.token_L)[: int(observation.length)].tolist())


def played(world, player, count: int):
    """Games as NumPy arrays."""
    return jax.device_get(jax.jit(partial(converse, world, player, count=count))(KEY))


def transcript(world, games, game: int) -> tuple[str, list[tuple[str, str, float]]]:
    """The opening, then what the agent said, what it was answered and what that earned."""
    size = int(games.mask_BN[game].sum())
    token = np.asarray(games.token_BN[game])[:size].tolist()
    agent = [False, *np.asarray(games.agent_BT[game])[: size - 1].tolist()]
    reward = [0.0, *np.asarray(games.reward_BT[game])[: size - 1].tolist()]
    opening, turns, t = [], [], 0
    while t < size and not agent[t]:
        opening.append(token[t])
        t += 1
    while t < size:
        start = t
        while t < size and agent[t]:
            t += 1
        middle = t
        while t < size and not agent[t]:
            t += 1
        texts = decode(world, token[start:middle]), decode(world, token[middle:t])
        turns.append((*texts, sum(reward[start:middle])))
    return decode(world, opening), turns


# ---- the maze


class WalkedMaze:
    """The double T by its pictures: no table, no numbers of cells."""

    steps = {"move up\n": (-1, 0), "move down\n": (1, 0), "move left\n": (0, -1), "move right\n": (0, 1)}

    def __init__(self, row: int, column: int):
        self.row, self.column = row, column

    def told(self, text: str) -> tuple[float, bool]:
        down, right = self.steps[text]
        if DOUBLE_T[self.row + down][self.column + right] != "#":
            self.row, self.column = self.row + down, self.column + right
        won = DOUBLE_T[self.row][self.column] == "G"
        return (0.0 if won else -1.0), won

    def place(self) -> str:
        return f"You are in row {self.row}, column {self.column}.\n"

    def walls(self) -> str:
        around = {"above": (-1, 0), "below": (1, 0), "left": (0, -1), "right": (0, 1)}
        names = [name for name, (r, c) in around.items() if DOUBLE_T[self.row + r][self.column + c] == "#"]
        return f"Walls: {' '.join(names) if names else 'none'}.\n"


def starts() -> list[tuple[int, int]]:
    return [(r, c) for r, row in enumerate(DOUBLE_T) for c, cell in enumerate(row) if cell == " "]


@pytest.fixture(scope="module")
def mazes():
    """Worlds, and 48 games of a player in each, both started alike."""
    worlds = [maze_world(turns=40), maze_world(observed="walls", turns=40)]
    return [(world, played(world, maze_player(world, random=0.6), 48)) for world in worlds]


def test_the_maze_goes_as_its_picture_does(mazes):
    (world, games), walls = mazes
    seen = set()
    for game in range(48):
        opening, turns = transcript(world, games, game)
        walk = next(WalkedMaze(r, c) for r, c in starts() if WalkedMaze(r, c).place() == opening)
        hidden_opening, hidden_turns = transcript(walls[0], walls[1], game)
        assert hidden_opening == walk.walls() and len(hidden_turns) == len(turns)
        seen.add(opening)
        for (text, answer, reward), (same_text, sides, same_reward) in zip(turns, hidden_turns, strict=True):
            expected, won = walk.told(text)
            assert reward == same_reward == expected and text == same_text
            assert answer == ("You have reached the goal.\n" if won else walk.place())
            assert sides == ("You have reached the goal.\n" if won else walk.walls())
        assert won == bool(games.success_B[game]) == bool(games.terminated_B[game])
        assert bool(games.truncated_B[game]) == (not won) and (won or len(turns) == world.turns == 40)
    assert len(seen) > 15
    assert 0 < games.truncated_B.sum() < 48


def test_words_that_are_no_move_cost_and_move_nothing():
    world = maze_world(turns=5)
    step = jax.jit(world.env.step)
    first, state = world.env.reset(KEY, world.env.params)
    said = [[5, 1, 1], [2, 3, 4], [1, 1, 1], [2, 2, 1], [2, 3, 1]]
    sizes = [0, 3, 1, 2, 2]
    for turn, (ids, size) in enumerate(zip(said, sizes, strict=True), 1):
        action = Utterance(jnp.array(ids, jnp.int32), jnp.int32(size))
        seen, state, reward, terminated, truncated, _ = step(KEY, state, action, world.env.params)
        assert heard(world, seen) == heard(world, first) and float(reward) == -4.0
        assert not terminated and bool(truncated) == (turn == 5)


def test_the_goal_at_the_last_turn_ends_and_is_not_cut_short():
    world = maze_world(("####", "# G#", "####"), turns=1)
    _, state = world.env.reset(KEY, world.env.params)
    out = world.env.step(KEY, state, spoken(world, "move right\n"), world.env.params)
    assert heard(world, out[0]) == "You have reached the goal.\n"
    assert float(out[2]) == 0.0 and bool(out[3]) and not bool(out[4]) and bool(out[5]["success"])


def test_the_optimum_of_the_double_t():
    """Distances by hand: 3 cells of the corridor, the two doors beside it, ..., 4 ends at 12."""
    table = maze_table()
    value_S, q_SA = optimal_values(table, discount=1.0)
    distances = [
        1,
        2,
        3,
        *[4] * 2,
        *[5] * 2,
        *[6] * 2,
        *[7] * 2,
        *[8] * 2,
        *[9] * 2,
        *[10] * 2,
        *[11] * 4,
        *[12] * 4,
    ]
    assert sorted(-value_S[table.start_S > 0]) == [d - 1 for d in distances]
    assert math.isclose(table.start_S @ value_S, -171 / 25)
    assert math.isclose(maze_score(np.eye(4)[np.argmax(q_SA, axis=1)]), -171 / 25)


def test_random_players_of_the_maze():
    """Uniform: exact within the limit, and far worse without; the player's own share lies between."""
    uniform_SA = np.full((26, 4), 0.25)
    assert math.isclose(maze_score(uniform_SA), -85.13958, abs_tol=1e-5)
    assert math.isclose(maze_score(uniform_SA, turns=1), -24 / 25 - (1 / 25) * 0.75)
    table = maze_table()
    forever_S, _ = policy_values(table, uniform_SA, discount=1.0)
    assert math.isclose(maze_score(uniform_SA, turns=40_000), table.start_S @ forever_S, rel_tol=1e-9)
    best_SA = np.eye(4)[np.argmax(optimal_values(table, discount=1.0)[1], axis=1)]
    world = maze_world()
    games = played(world, maze_player(world), 600)
    expected = maze_score(0.85 * uniform_SA + 0.15 * best_SA)
    assert math.isclose(expected, -51.675, abs_tol=1e-3)
    error = float(np.std(games.score_B)) / math.sqrt(600)
    assert abs(float(games.score_B.mean()) - expected) < 4 * error
    best = played(world, maze_player(world, random=0.0), 64)
    assert best.success_B.all() and set(np.asarray(best.score_B)) <= {-float(d) for d in range(12)}


def test_mazes_that_are_none():
    for layout, message in [
        (("###", "#G#"), "wall all round"),
        (("####", "# G", "####"), "rows of equal length"),
        (("####", "#xG#", "####"), "rows of equal length"),
        (("####", "#  #", "####"), "needs a goal"),
        (("###", "#G#", "###"), "needs a goal G and an open cell"),
        (("#####", "# #G#", "#####"), "no way leads to a goal from 1 cells"),
        ((), "rows of equal length"),
    ]:
        with pytest.raises(ValueError, match=message):
            maze_world(layout)
    with pytest.raises(ValueError, match="got 'smell'"):
        maze_world(observed="smell")
    with pytest.raises(ValueError, match="random=1.5"):
        maze_player(maze_world(), random=1.5)
    with pytest.raises(ValueError, match="rows sum to 1"):
        maze_score(np.ones((26, 4)))
    assert tuple(WalkedMaze.steps) == MOVES


# ---- Wordle


def marked(guess: str, target: str) -> str:
    """The marks by the rule: letters in their place are taken first, then the others from the left."""
    left = Counter(t for g, t in zip(guess, target, strict=True) if g != t)
    out = ""
    for g, t in zip(guess, target, strict=True):
        if g == t:
            out += "!"
        elif left[g] > 0:
            left[g] -= 1
            out += "?"
        else:
            out += "_"
    return out


def test_marks_with_double_letters():
    letters = jax.jit(lambda guess, target: marks(guess, target))
    as_array = lambda word: jnp.array([ord(x) for x in word], jnp.int32)  # noqa: E731
    for guess, target, expected in [
        ("crane", "crane", "!!!!!"),
        ("speed", "abide", "__?_?"),  # one e of the two: the first
        ("geese", "these", "__!!!"),  # both e's are in their place: none is left for the other
        ("allow", "level", "_??__"),
        ("eerie", "three", "?_!_!"),
        ("llama", "label", "!??__"),
        ("aabbb", "bbaaa", "?????"[:4] + "_"),
    ]:
        assert marked(guess, target) == expected
        assert "".join("_?!"[m] for m in letters(as_array(guess), as_array(target))) == expected, guess
    words = np.random.default_rng(0).integers(0, 3, (200, 2, 5)).astype(np.int32)
    ours = np.asarray(jax.vmap(letters)(words[:, 0], words[:, 1]))
    for row, (guess, target) in zip(ours, words, strict=True):
        theirs = marked("".join(map(str, guess)), "".join(map(str, target)))
        assert "".join("_?!"[m] for m in row) == theirs


WORDLE = ("aab", "aba", "abc", "bca", "cab", "cba", "ccc")


def test_games_of_wordle_go_by_the_rules():
    world = wordle_world(WORDLE, tries=4)
    assert wordle_words(world) == WORDLE and world.action_length == world.observation_length == 4
    games = played(world, wordle_player(world, smart=0.5), 64)
    for game in range(64):
        opening, turns = transcript(world, games, game)
        assert opening == "Guess a word of 3 letters.\n"
        allowed = [w for w in WORDLE if all(marked(said[:3], w) + "\n" == got for said, got, _ in turns)]
        assert allowed, "the marks fit no word"
        won = turns[-1][1] == "!!!\n"
        assert won == bool(games.success_B[game]) and bool(games.terminated_B[game])
        assert won or len(turns) == 4
        assert not any(got == "!!!\n" for _, got, _ in turns[:-1])
        assert [reward for *_, reward in turns] == [-1.0] * (len(turns) - won) + [0.0] * won
    assert 0 < int(games.success_B.sum()) < 64 and not games.truncated_B.any()


def test_a_smart_player_never_contradicts_what_it_was_told():
    world = wordle_world(WORDLE, tries=7)
    games = played(world, wordle_player(world, smart=1.0), 64)
    for game in range(64):
        _, turns = transcript(world, games, game)
        for i, (guess, *_) in enumerate(turns):
            assert all(marked(said[:3], guess[:3]) + "\n" == got for said, got, _ in turns[:i])
    assert games.success_B.all()


def test_what_is_no_word_is_a_lost_try():
    world = wordle_world(WORDLE, tries=3)
    _, state = world.env.reset(KEY, world.env.params)
    state = state._replace(target=jnp.int32(2))
    step = jax.jit(world.env.step)
    for turn, text in enumerate(["bbb\n", "ab", "\n"], 1):
        seen, after, reward, terminated, truncated, info = step(
            KEY, state, spoken(world, text), world.env.params._replace(no_word=-3.0)
        )
        assert heard(world, seen) == "Not a word.\n" and float(reward) == -3.0
        np.testing.assert_array_equal(after.possible_W, state.possible_W)
        assert bool(terminated) == (turn == 3) and not truncated and not info["success"]
        state = after
    seen, state, *_ = step(KEY, state, spoken(world, "aab\n"), world.env.params)
    assert heard(world, seen) == "!??\n".replace("!??", marked("aab", "abc"))
    np.testing.assert_array_equal(
        state.possible_W, [marked("aab", w) == marked("aab", "abc") for w in WORDLE]
    )


def test_the_optimum_of_wordle_by_going_through_all():
    words, tries = WORDLE, 3

    @cache
    def misses(things: frozenset, turns: int) -> float:
        """Total, with no cleverness: every guess, every answer."""
        if not turns or not things:
            return 0.0
        totals = []
        for guess in words:
            cells = {}
            for target in things - {guess}:
                cells.setdefault(marked(guess, target), set()).add(target)
            totals.append(sum(len(c) + misses(frozenset(c), turns - 1) for c in cells.values()))
        return min(totals)

    for few in (1, 2, tries):
        expected = -misses(frozenset(words), few) / len(words)
        assert math.isclose(wordle_optimum(wordle_world(words, tries=few)), expected)
    assert wordle_optimum(wordle_world(("abc",), tries=2)) == 0.0
    assert wordle_optimum(wordle_world(("ab", "ba"), tries=2)) == -0.5
    nano = wordle_world(nonsense_words(40), tries=5)
    assert math.isclose(wordle_optimum(nano), -1.525)


def test_lists_of_words():
    words = five_letter_words()
    assert len(words) > 500 and list(words) == sorted(set(words))
    assert all(len(word) == 5 and word.isascii() and word.islower() for word in words)
    assert len(five_letter_words(100)) == len(set(five_letter_words(100))) == 100
    assert wordle_words(wordle_world()) == five_letter_words(100)
    nonsense = nonsense_words(40)
    assert nonsense == nonsense_words(40) != nonsense_words(40, seed=1)
    assert len(set(nonsense)) == 40 and all(len(set(word)) == 3 for word in nonsense)
    assert set("".join(nonsense)) <= set("abcdefgh")
    assert len(nonsense_words(8, letters=3, alphabet="ab", repeats=True)) == 8


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: wordle_world(("abc", "ab")), "'ab' is not"),
        (lambda: wordle_world(("abc", "Abd")), "'Abd' is not"),
        (lambda: wordle_world(("abc", "abc")), "'abc' comes twice"),
        (lambda: wordle_world(()), "at least one word"),
        (lambda: wordle_world(("abc",), tries=0), "turns=0"),
        (lambda: five_letter_words(10**6), "must lie between 1 and"),
        (lambda: nonsense_words(7, letters=2, alphabet="abc"), "gives 6"),
        (lambda: nonsense_words(2, alphabet="aab"), "has a letter twice"),
        (lambda: wordle_player(wordle_world(("abc",)), smart=-1), "smart=-1"),
        (lambda: wordle_optimum(wordle_world(), work=100), "too many sets"),
    ],
)
def test_bad_games_of_wordle(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- twenty questions


def test_games_of_twenty_questions_are_answered_from_the_table():
    things = everyday_things(12)
    true = {name: {a for a, is_so in zip(things.attributes, row, strict=True) if is_so} for name, row in
            zip(things.names, things.true_NM, strict=True)}  # fmt: skip
    world = twenty_questions_world(things, turns=6)
    games = played(world, twenty_questions_player(world, smart=0.6), 48)
    for game in range(48):
        opening, turns = transcript(world, games, game)
        assert opening == "I am thinking of something.\n"
        asked = [said.removeprefix("Is it ").removesuffix("?\n") for said, *_ in turns]
        fits = lambda name, text: text == name or text in true[name]  # noqa: E731
        answers = [answer == "Yes.\n" for _, answer, _ in turns]
        allowed = [n for n in true if all(fits(n, a) == yes for a, yes in zip(asked, answers, strict=True))]
        assert allowed, "the answers fit nothing"
        won = asked[-1] in true and answers[-1]
        assert won == bool(games.success_B[game]) and (won or len(turns) == 6)
        assert [reward for *_, reward in turns] == [-1.0] * (len(turns) - won) + [0.0] * won
    assert 0 < int(games.success_B.sum()) < 48
    assert games.terminated_B.all() and not games.truncated_B.any()


def test_what_is_no_question():
    world = twenty_questions_world(every_box(2), turns=2)
    opening, state = world.env.reset(KEY, world.env.params)
    assert heard(world, opening) == "I am thinking of something.\n"
    for turn, text in enumerate(["Is it?\n", "Is itIs it?\n"], 1):
        seen, after, reward, terminated, _, info = world.env.step(
            KEY, state, spoken(world, text), world.env.params
        )
        assert heard(world, seen) == "What?\n" and float(reward) == -1.0 and not info["success"]
        np.testing.assert_array_equal(after.possible_N, state.possible_N)
        assert bool(terminated) == (turn == 2)
        state = after


def test_a_complete_table_takes_one_question_an_attribute_but_the_last():
    """Of the two things that are left one is named: right half of the time, and otherwise the other is known."""
    for attributes in (1, 2, 3, 4):
        things = every_box(attributes)
        assert (
            len(set(things.names)) == 2**attributes
            and len(np.unique(things.true_NM, axis=0)) == 2**attributes
        )
        world = twenty_questions_world(things)
        assert math.isclose(twenty_questions_optimum(world), -(attributes - 0.5))
    player = twenty_questions_player(world, smart=1.0)
    games = played(world, player, 400)
    assert set(np.asarray(games.score_B)) == {-3.0, -4.0} and games.success_B.all()
    assert abs(float(games.score_B.mean()) + 3.5) < 0.1
    for row in everyday_things().true_NM, everyday_things(20).true_NM:
        assert len(np.unique(row, axis=0)) == len(row)


def test_best_score_equals_a_search_without_cleverness():
    draw = np.random.default_rng(3)
    for _ in range(4):
        answer = np.concatenate([draw.integers(0, 3, (4, 6)), np.eye(6, dtype=int)])
        win = np.concatenate([np.zeros((4, 6), bool), np.eye(6, dtype=bool)])

        @cache
        def misses(things: frozenset, turns: int, answer=answer, win=win) -> float:
            if not turns or not things:
                return 0.0
            totals = []
            for row, wins in zip(answer, win, strict=True):
                cells = {}
                for thing in things:
                    if not wins[thing]:
                        cells.setdefault(row[thing], set()).add(thing)
                totals.append(sum(len(c) + misses(frozenset(c), turns - 1) for c in cells.values()))
            return min(totals)

        for turns in (1, 2, 3, 5):
            expected = -misses(frozenset(range(6)), turns) / 6
            assert math.isclose(best_score(answer, win, turns=turns), expected, abs_tol=1e-12)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: every_box(7), "between 1 and 6"),
        (lambda: everyday_things(0), "between 1 and"),
        (
            lambda: twenty_questions_world(Things(("a", "b"), ("x",), np.zeros((2, 1), bool))),
            "tells b from a",
        ),
        (lambda: twenty_questions_world(Things(("a",), ("x",), np.zeros((1, 2), bool))), r"bool \[1, 1\]"),
        (lambda: twenty_questions_world(Things(("a",), ("x",), np.zeros((1, 1)))), "float64"),
        (lambda: twenty_questions_world(every_box(2), turns=0), "turns=0"),
        (lambda: twenty_questions_player(twenty_questions_world(every_box(2)), smart=2), "smart=2"),
        (lambda: best_score(np.zeros((2, 3)), np.zeros((2, 2)), turns=1), "both be"),
        (lambda: best_score(np.zeros((1, 2)), np.ones((1, 2)), turns=1), "at most one"),
        (lambda: best_score(np.zeros((1, 2)), np.eye(2)[:1], turns=1), "no query finds thing 1"),
        (lambda: best_score(np.eye(2), np.eye(2), turns=0), "at least 1 turn"),
    ],
)
def test_bad_games_of_questions(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- the star graph


def solved(text: str) -> tuple[str, list[str]]:
    """The path that answers a star graph, and the nodes beside the start, from the text alone."""
    edges, ends = text.removesuffix(":\n").split(", from ")
    start, goal = ends.split(" to ")
    follows, first = {}, []
    for edge in edges.strip().split(","):
        a, b = edge.split()
        if a == start:
            first.append(b)
        else:
            assert a not in follows
            follows[a] = b
    for node in first:
        path = [node]
        while path[-1] in follows:
            path.append(follows[path[-1]])
        if path[-1] == goal:
            return "".join(f" {node}" for node in path) + "\n", first
    raise AssertionError(f"no path leads to the goal in {text!r}")


def test_star_graphs_and_the_shortcut():
    world = star_graph_world(paths=3, length=2, nodes=9)
    games = played(world, star_graph_player(world), 300)
    firsts, orders = Counter(), set()
    for game in range(40):
        opening, turns = transcript(world, games, game)
        answer, first = solved(opening)
        (said, verdict, reward), = turns  # fmt: skip
        assert said.count(" ") == 2 and said.split()[0] in first
        right = said == answer
        assert reward == float(right) and verdict == ("Right.\n" if right else "Wrong.\n")
        assert bool(games.success_B[game]) == right
        firsts[first.index(answer.split()[0])] += 1
        orders.add(tuple(first))
    assert games.terminated_B.all() and not games.truncated_B.any()
    assert len(firsts) == 3 and len(orders) == 40
    # The shortcut is right once in three; four standard errors.
    assert abs(float(games.score_B.mean()) - 1 / 3) < 4 * math.sqrt(2 / 9 / 300)
    knows = played(world, star_graph_player(world, smart=1.0), 32)
    assert fmean(map(float, knows.score_B)) == 1.0


def test_other_answers_to_a_star_graph_are_wrong():
    world = star_graph_world(paths=2, length=3, nodes=7)
    opening, state = world.env.reset(KEY, world.env.params)
    text = heard(world, opening)
    answer, _ = solved(text)
    nodes = answer.split()
    step = jax.jit(world.env.step)
    for said, right in [
        (answer, True),
        (answer[:-1], False),  # without the stop token
        ("".join(f" {node}" for node in nodes[:2]) + "\n", False),
        ("".join(f" {node}" for node in reversed(nodes)) + "\n", False),
        ("\n", False),
        ("".join(f" {node}" for node in [*nodes[:2], nodes[0]]) + "\n", False),
    ]:
        seen, _, reward, terminated, _, info = step(KEY, state, spoken(world, said), world.env.params)
        assert float(reward) == float(right) and bool(terminated) and bool(info["success"]) == right, said
        assert heard(world, seen) == ("Right.\n" if right else "Wrong.\n")
    for settings, message in [
        ({"paths": 1}, "at least 2 paths"),
        ({"length": 0}, "at least 1 node"),
        ({"paths": 3, "length": 3, "nodes": 9}, "must be at least 10"),
    ]:
        with pytest.raises(ValueError, match=message):
            star_graph_world(**settings)
    with pytest.raises(ValueError, match="smart=3"):
        star_graph_player(world, smart=3)
