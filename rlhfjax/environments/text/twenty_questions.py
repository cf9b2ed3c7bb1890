"""Twenty questions, answered from a table of what is true of which thing.

    I am thinking of something.
    > Is it alive?
    No.
    > Is it a pencil?
    Yes.

The agent asks about an attribute, or whether it is a certain thing; being right about that ends the game. A turn
costs 1 but the one that finds the thing, as in LMRL-Gym's game (arXiv 2311.18232), whose answers come from a language
model. Words that are no question are answered "What?" and cost a turn. The last turn ends the game, which is a rule
of it, and no limit of time.

Shapes: N things, M attributes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.environments.environment import Environment, Step
from rlhfjax.environments.text.conversation import Player, any_of
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
from rlhfjax.environments.text.things import Things, check_things, everyday_things

Array = Any  # NumPy, or JAX where traced
_QUESTION, _END = "Is it", "?\n"
_OPENING, _ANSWERS = "I am thinking of something.\n", ("No.\n", "Yes.\n", "What?\n")


class TwentyQuestions(NamedTuple):
    """Parameters of twenty questions."""

    true_NM: Array  # bool, what is true of which thing
    found: Array | float = 0.0  # reward of the question that names the thing
    missed: Array | float = -1.0  # of another question
    no_question: Array | float = -1.0  # of anything else


class Asking(NamedTuple):
    """State of a game of twenty questions."""

    target: jax.Array  # int32 [], number of the thing
    turn: jax.Array  # int32 [], turns taken
    possible_N: jax.Array  # bool, the things that all answers so far allow: what a player may know


def twenty_questions_world(things: Things | None = None, *, turns: int = 20) -> TextWorld:
    """Twenty questions about these things, each as likely; None: `everyday_things(32)`.

    Its parameters are `TwentyQuestions`, its state is `Asking`. ValueError for a table of the wrong shape, and for
    things that no attribute tells apart.
    """
    things = everyday_things(32) if things is None else things
    true_NM = check_things(things)
    count, attributes = true_NM.shape
    asked = (*things.attributes, *things.names)
    vocabulary = (PAD, _END, _QUESTION, _OPENING, *_ANSWERS, *(f" {text}" for text in asked))
    question_P = phrases(vocabulary, [f"{_QUESTION} {text}{_END}" for text in asked])
    answer_3 = phrases(vocabulary, _ANSWERS)
    opening_1 = phrases(vocabulary, [_OPENING])

    def reset(key: jax.Array, params: TwentyQuestions) -> tuple[Utterance, Asking]:
        del params
        target = jax.random.randint(key, (), 0, count, jnp.int32)
        return say(opening_1, jnp.int32(0)), Asking(target, jnp.int32(0), jnp.ones(count, bool))

    def step(key: jax.Array, state: Asking, action: Utterance, params: TwentyQuestions) -> Step:
        del key
        number = understand(action, question_P)
        asks, found = number >= 0, number - attributes == state.target
        # Whether the answer would be yes if the thing were each of them.
        is_NP = jnp.concatenate([jnp.asarray(params.true_NM), jnp.eye(count, dtype=bool)], axis=1)
        yes_N = is_NP[:, jnp.maximum(number, 0)]
        yes = yes_N[state.target]
        possible_N = state.possible_N & ((yes_N == yes) | ~asks)
        reward = jnp.where(found, params.found, jnp.where(asks, params.missed, params.no_question))
        turn = state.turn + 1
        answer = jnp.where(asks, yes.astype(jnp.int32), 2)
        after, ended = Asking(state.target, turn, possible_N), found | (turn >= turns)
        reward = reward.astype(jnp.float32)
        return say(answer_3, answer), after, reward, ended, jnp.bool_(False), {"success": found}

    return text_world(
        Environment(reset, step, None, None, params=TwentyQuestions(true_NM)),
        vocabulary,
        stop=_END,
        action_length=3,
        observation_length=1,
        turns=turns,
    )


def twenty_questions_player(world: TextWorld, *, smart: float = 0.5) -> Player:
    """Asks well in a share `smart` of its turns, and otherwise asks anything, also what it could know already.

    To ask well is to take the attribute that splits what is still possible most evenly, ties at random; of one or two
    things that are left, or where no attribute splits them, to name one.
    """
    if not 0 <= smart <= 1:
        raise ValueError(f"smart={smart} must lie in [0, 1]")
    true_NM = jnp.asarray(world.env.params.true_NM)
    count, attributes = true_NM.shape
    asked = world.vocabulary[-(attributes + count) :]
    question_P = phrases(world.vocabulary, [f"{_QUESTION}{text}{_END}" for text in asked])

    def player(key: jax.Array, state: Asking) -> Utterance:
        key_whether, key_which, key_any = jax.random.split(key, 3)
        possible_N = state.possible_N
        left = jnp.sum(possible_N)
        yes_M = jnp.sum(true_NM & possible_N[:, None], axis=0)
        even_M = jnp.minimum(yes_M, left - yes_M)
        attribute = any_of(key_which, even_M == jnp.max(even_M))
        names = (left <= 2) | (jnp.max(even_M) == 0)
        well = jnp.where(names, attributes + any_of(key_which, possible_N), attribute)
        anything = jax.random.randint(key_any, (), 0, attributes + count, jnp.int32)
        return say(question_P, jnp.where(jax.random.uniform(key_whether) < smart, well, anything))

    return player


def twenty_questions_optimum(world: TextWorld, *, work: int = 2_000_000) -> float:
    """Expected score of the optimal player, exact, by enumeration (`best_score`), with the default rewards."""
    true_NM = np.asarray(world.env.params.true_NM)
    same_NN = np.eye(len(true_NM), dtype=bool)
    win_PN = np.concatenate([np.zeros_like(true_NM.T), same_NN])
    return best_score(np.concatenate([true_NM.T, same_NN]), win_PN, turns=world.turns, work=work)
