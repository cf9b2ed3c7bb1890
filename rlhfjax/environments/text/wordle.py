"""Wordle of adjustable size: letters, words, tries.

    Guess a word of 5 letters.
    > crane
    __!?_
    > stamp
    ...

Each letter of a guess is marked: "!" in its place, "?" elsewhere in the word, "_" not in it, or not once more. A try
costs 1 but the one that finds the word; so a game scores minus its misses. Words that are not in the list, or are no
words at all, are answered with "Not a word." and cost a try. The last try ends the game: it is a rule of it, and
what has been said tells how many are left. (So too in LMRL-Gym's Wordle, arXiv 2311.18232, with other texts.)

Shapes: W words, N letters of a word.
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import permutations, product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.environments.environment import Environment, Step
from rlhfjax.environments.text.conversation import Player
from rlhfjax.environments.text.guessing import best_score
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
MARKS = ("_", "?", "!")
"""Text of the marks 0 (not in the word), 1 (elsewhere in it), 2 (in its place)."""


class Wordle(NamedTuple):
    """Parameters of a game of Wordle."""

    word_WN: Array  # int32, the words as tokens of the world's vocabulary
    found: Array | float = 0.0  # reward of the guess that is the word
    missed: Array | float = -1.0  # of another word of the list
    no_word: Array | float = -1.0  # of anything else


class Guessing(NamedTuple):
    """State of a game of Wordle."""

    target: jax.Array  # int32 [], number of the hidden word
    turn: jax.Array  # int32 [], tries taken
    possible_W: jax.Array  # bool, the words that all marks so far allow: what a player may know


def five_letter_words(count: int | None = None) -> tuple[str, ...]:
    """The list of common English words of five letters that comes with this package, or `count` evenly spaced ones.

    Its file tells where the words come from, and their licence.
    """
    words = _five_letters()
    if count is None:
        return words
    if not 1 <= count <= len(words):
        raise ValueError(f"count={count} must lie between 1 and {len(words)}, the words of the list")
    return tuple(words[i * len(words) // count] for i in range(count))


def nonsense_words(
    count: int, *, letters: int = 3, alphabet: str = "abcdefgh", repeats: bool = False, seed: int = 0
) -> tuple[str, ...]:
    """`count` different strings of letters of the alphabet, sorted; without `repeats` no letter comes twice in one.

    Each set of strings is as likely. ValueError where there are not so many.
    """
    if len(set(alphabet)) != len(alphabet):
        raise ValueError(f"alphabet {alphabet!r} has a letter twice")
    every = product(alphabet, repeat=letters) if repeats else permutations(alphabet, letters)
    every = ["".join(word) for word in every]
    if letters < 1 or not 1 <= count <= len(every):
        raise ValueError(
            f"{count} words of {letters} letters were asked for; the alphabet {alphabet!r} gives {len(every)}"
        )
    chosen = np.random.default_rng(seed).choice(len(every), count, replace=False)
    return tuple(every[i] for i in sorted(chosen))


def wordle_world(words: Sequence[str] | None = None, *, tries: int = 6) -> TextWorld:
    """A game of Wordle with these words, each as likely to be the hidden one; None: 100 English ones.

    A small game: `wordle_world(nonsense_words(40), tries=5)`. Its parameters are a `Wordle`, its state is a
    `Guessing`. ValueError for words of unequal length, with other letters than a to z, or twice.
    """
    words = five_letter_words(100) if words is None else tuple(words)
    _check_words(words)
    letters = len(words[0])
    opening, no_word = f"Guess a word of {letters} letters.\n", "Not a word.\n"
    vocabulary = (PAD, "\n", *MARKS, opening, no_word, *sorted(set("".join(words))))
    guess_W = phrases(vocabulary, [word + "\n" for word in words])
    opening_1, no_word_1 = (phrases(vocabulary, [text], letters + 1) for text in (opening, no_word))
    line_break, first_mark = vocabulary.index("\n"), vocabulary.index(MARKS[0])

    def reset(key: jax.Array, params: Wordle) -> tuple[Utterance, Guessing]:
        del params
        target = jax.random.randint(key, (), 0, len(words), jnp.int32)
        return say(opening_1, jnp.int32(0)), Guessing(target, jnp.int32(0), jnp.ones(len(words), bool))

    def step(key: jax.Array, state: Guessing, action: Utterance, params: Wordle) -> Step:
        del key
        guess = understand(action, guess_W)
        valid, found = guess >= 0, guess == state.target
        word_WN = jnp.asarray(params.word_WN)
        guess_N = word_WN[jnp.maximum(guess, 0)]
        mark_WN = jax.vmap(marks, in_axes=(None, 0))(guess_N, word_WN)
        mark_N = mark_WN[state.target]
        agrees_W = jnp.all(mark_WN == mark_N[None, :], axis=1) | ~valid
        seen = Utterance(
            jnp.append(first_mark + mark_N, line_break).astype(jnp.int32), jnp.int32(letters + 1)
        )
        seen = jax.tree.map(lambda x, y: jnp.where(valid, x, y), seen, say(no_word_1, jnp.int32(0)))
        reward = jnp.where(found, params.found, jnp.where(valid, params.missed, params.no_word))
        turn = state.turn + 1
        after = Guessing(state.target, turn, state.possible_W & agrees_W)
        ended = found | (turn >= tries)
        return seen, after, reward.astype(jnp.float32), ended, jnp.bool_(False), {"success": found}

    return text_world(
        Environment(reset, step, None, None, params=Wordle(guess_W.token_L[:, :letters])),
        vocabulary,
        stop="\n",
        action_length=letters + 1,
        observation_length=letters + 1,
        turns=tries,
    )


def marks(guess_N: jax.Array, target_N: jax.Array) -> jax.Array:
    """The marks of a guess, int32 [N]: 2 in its place, 1 elsewhere in the word, 0 not in it.

    A letter is marked as often as the word has it: first where it is in its place, then from the left.
    """
    right_N = guess_N == target_N
    same_NN = guess_N[:, None] == guess_N[None, :]
    # Of each letter of the guess, its places in the word that no letter in its place takes up.
    spare_NN = (guess_N[:, None] == target_N[None, :]) & ~right_N[None, :]
    earlier_NN = same_NN & ~right_N[None, :] & jnp.tri(guess_N.shape[0], k=-1, dtype=bool)
    elsewhere_N = ~right_N & (jnp.sum(earlier_NN, axis=1) < jnp.sum(spare_NN, axis=1))
    return jnp.where(right_N, 2, elsewhere_N).astype(jnp.int32)


def wordle_player(world: TextWorld, *, smart: float = 0.4) -> Player:
    """Guesses a word that all marks so far allow in a share `smart` of its tries, and otherwise any of the list.

    1 never contradicts what it was told (and is not the optimum, which also guesses to find out), 0 ignores it.
    """
    if not 0 <= smart <= 1:
        raise ValueError(f"smart={smart} must lie in [0, 1]")
    guess_W = phrases(world.vocabulary, [word + "\n" for word in wordle_words(world)])

    def player(key: jax.Array, state: Guessing) -> Utterance:
        key_whether, key_which = jax.random.split(key)
        thinks = jax.random.uniform(key_whether) < smart
        allowed_W = state.possible_W | ~thinks
        guess = jax.random.categorical(key_which, jnp.where(allowed_W, 0.0, -jnp.inf))
        return say(guess_W, guess.astype(jnp.int32))

    return player


def wordle_words(world: TextWorld) -> tuple[str, ...]:
    """The words of a world, in the order of its state's numbers."""
    word_WN = np.asarray(world.env.params.word_WN)
    return tuple("".join(world.vocabulary[i] for i in word_N) for word_N in word_WN)


def wordle_optimum(world: TextWorld, *, work: int = 2_000_000) -> float:
    """Expected score of the optimal player, exact, by enumeration (`best_score`), with the default rewards.

    For small games; ValueError where it is too large for `work`. What is no word tells nothing, so it never helps.
    """
    words = wordle_words(world)
    letter_WN = jnp.asarray([[ord(letter) for letter in word] for word in words], jnp.int32)
    mark_WWN = jax.vmap(lambda guess: jax.vmap(lambda target: marks(guess, target))(letter_WN))(letter_WN)
    answer_WW = np.sum(np.asarray(mark_WWN) * 3 ** np.arange(len(words[0])), axis=2)
    return best_score(answer_WW, np.eye(len(words), dtype=bool), turns=world.turns, work=work)


@cache
def _five_letters() -> tuple[str, ...]:
    text = files("rlhfjax.environments.text").joinpath("five_letters.txt").read_text("utf-8")
    return tuple(word for line in text.splitlines() if not line.startswith("#") for word in line.split())


def _check_words(words: tuple[str, ...]) -> None:
    if not words:
        raise ValueError("Wordle needs at least one word")
    wrong = [word for word in words if len(word) != len(words[0])]
    if wrong:
        raise ValueError(
            f"all words must be as long as {words[0]!r}, {len(words[0])} letters; {wrong[0]!r} is not"
        )
    wrong = [word for word in words if not (word.isascii() and word.isalpha() and word.islower())]
    if wrong:
        raise ValueError(f"words are of the letters a to z in lower case; {wrong[0]!r} is not")
    if len(set(words)) != len(words):
        raise ValueError(f"words must differ; {next(w for w in words if words.count(w) > 1)!r} comes twice")
