"""Guess who: find out by questions who it is, then name them; a wrong name loses.

    Guess who it is.
    > Does this person wear a hat?
    No.
    > Does this person have red hair?
    Yes.
    > Is it Mina?
    Right.

Naming somebody ends the game. A question costs a little, a wrong name, or none within the turns of a game, much: so
success and the number of turns are one reward. Unlike in twenty questions a guess is no question that happens to cost
the same: one must know when one knows enough. The user may err: each answer to a question is then wrong with a
probability, each time anew, and asking again helps. Whether a name is right is always told truly.

What is no question is answered "What?" and costs as a question. The last turn ends the game, which is a rule of it, and
no limit of time.

Shapes: N people, M attributes, S beliefs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.environments.environment import Environment, Step
from rlhfjax.environments.text.conversation import Player, any_of
from rlhfjax.environments.text.text_world import (
    PAD,
    TextWorld,
    Utterance,
    phrases,
    say,
    text_world,
    understand,
)
from rlhfjax.environments.text.things import Things, check_things

Array = Any  # NumPy, or JAX where traced
_QUESTION, _NAMING, _END = "Does this person", "Is it", "?\n"
_OPENING, _ANSWERS = "Guess who it is.\n", ("No.\n", "Yes.\n", "What?\n", "Wrong.\n", "Right.\n")

ATTRIBUTES = {
    "glasses": "wear glasses",
    "hat": "wear a hat",
    "scarf": "wear a scarf",
    "earrings": "wear earrings",
    "red": "have red hair",
    "black": "have black hair",
    "curls": "have curls",
    "beard": "have a beard",
    "freckles": "have freckles",
    "blue": "have blue eyes",
    "smile": "smile",
    "old": "look old",
}

PEOPLE = {
    "Ada": "glasses earrings black smile",
    "Bruno": "hat beard curls old",
    "Chiara": "scarf earrings red curls freckles",
    "Dario": "glasses black beard blue",
    "Edda": "hat scarf blue old",
    "Farid": "black curls beard smile",
    "Greta": "glasses red freckles blue smile",
    "Hugo": "hat scarf red beard",
    "Ines": "earrings black curls old",
    "Jonas": "glasses scarf blue smile",
    "Kira": "hat earrings freckles black",
    "Leo": "red beard freckles smile old",
    "Mina": "glasses hat curls",
    "Nils": "scarf beard blue freckles",
    "Olga": "earrings red blue old",
    "Pavel": "glasses hat black old smile",
    "Quinn": "scarf curls freckles smile",
    "Rosa": "hat earrings red smile blue",
    "Sami": "glasses beard curls freckles",
    "Tara": "scarf earrings black smile",
    "Umar": "hat black beard blue curls",
    "Vera": "glasses scarf earrings old",
    "Wanda": "red curls blue",
    "Yusuf": "beard black freckles old scarf",
}


class GuessWho(NamedTuple):
    """Parameters of guess who."""

    true_NM: Array  # bool, what is true of whom
    noise: Array | float = 0.0  # probability that an answer to a question is wrong
    right: Array | float = 10.0  # reward of the right name
    wrong: Array | float = -10.0  # of a wrong one, and of a last turn that names nobody, beside its cost
    asked: Array | float = -1.0  # of a question, and of anything else that is said


class Suspecting(NamedTuple):
    """State of a game of guess who."""

    target: jax.Array  # int32 [], number of the hidden person
    turn: jax.Array  # int32 [], turns taken
    against_N: jax.Array  # int32, answers that do not fit each person: what a player may know


def people(count: int | None = None, attributes: int | None = None) -> Things:
    """People and what is true of them, by a table written for this game; no two are alike.

    count: of the people, evenly spaced through the list; None: all 24. attributes: the first ones; None: all 12.
    ValueError where there are not so many. Seven attributes tell all apart.
    """
    names, asked = tuple(PEOPLE), tuple(ATTRIBUTES)
    if attributes is not None:
        if not 1 <= attributes <= len(asked):
            raise ValueError(f"attributes={attributes} must lie between 1 and {len(asked)}")
        asked = asked[:attributes]
    if count is not None:
        if not 1 <= count <= len(names):
            raise ValueError(f"count={count} must lie between 1 and {len(names)}, the people of the table")
        names = tuple(names[i * len(names) // count] for i in range(count))
    true_NM = [[attribute in PEOPLE[name].split() for attribute in asked] for name in names]
    return Things(names, tuple(ATTRIBUTES[attribute] for attribute in asked), np.array(true_NM))


def guess_who_world(things: Things | None = None, *, turns: int = 8, noise: float = 0.0) -> TextWorld:
    """Guess who among these people, each as likely; None: `people()`. Attributes are what "does this person" asks.

    Its parameters are a `GuessWho`, its state is `Suspecting`. noise: probability that an answer is wrong.

    ValueError for a table of the wrong shape, for people whom no attribute tells apart, and for a noise outside
    [0, 0.5]: beyond, answers would say more, turned round.
    """
    things = people() if things is None else things
    true_NM = check_things(things)
    if not 0 <= noise <= 0.5:
        raise ValueError(f"noise={noise} must lie in [0, 0.5]: the share of answers that are wrong")
    count, attributes = true_NM.shape
    vocabulary = (PAD, _END, _QUESTION, _NAMING, _OPENING, *_ANSWERS)
    vocabulary = (*vocabulary, *(f" {text}" for text in (*things.attributes, *things.names)))
    said_P = phrases(vocabulary, _phrases(things.attributes, things.names))
    answer_5, opening_1 = phrases(vocabulary, _ANSWERS), phrases(vocabulary, [_OPENING])

    def reset(key: jax.Array, params: GuessWho) -> tuple[Utterance, Suspecting]:
        del params
        target = jax.random.randint(key, (), 0, count, jnp.int32)
        return say(opening_1, jnp.int32(0)), Suspecting(target, jnp.int32(0), jnp.zeros(count, jnp.int32))

    def step(key: jax.Array, state: Suspecting, action: Utterance, params: GuessWho) -> Step:
        number = understand(action, said_P)
        asks, names = (number >= 0) & (number < attributes), number >= attributes
        right = number - attributes == state.target
        true_N = jnp.asarray(params.true_NM)[:, jnp.clip(number, 0, attributes - 1)]
        yes = true_N[state.target] ^ (jax.random.uniform(key) < params.noise)
        against_N = state.against_N + (asks & (true_N != yes)).astype(jnp.int32)
        turn = state.turn + 1
        ended = names | (turn >= turns)
        lost = jnp.where(ended, params.wrong, 0.0)
        reward = jnp.where(right, params.right, jnp.where(names, params.wrong, params.asked + lost))
        answer = jnp.where(names, 3 + right, jnp.where(asks, yes, 2)).astype(jnp.int32)
        after = Suspecting(state.target, turn, against_N)
        info = {"success": right}
        return say(answer_5, answer), after, reward.astype(jnp.float32), ended, jnp.bool_(False), info

    return text_world(
        Environment(reset, step, None, None, params=GuessWho(true_NM, noise)),
        vocabulary,
        stop=_END,
        action_length=3,
        observation_length=1,
        turns=turns,
    )


def guess_who_player(
    world: TextWorld, *, smart: float = 0.5, hasty: float = 0.0, sure: float = 0.9
) -> Player:
    """Takes a turn well with probability `smart`, guesses with `hasty` whatever it knows, and else asks anything.

    To take a turn well is to name whom the answers leave with a probability of `sure`, and in the last turn whoever is
    likeliest; before, to ask for the attribute that splits the probability most evenly, ties at random. A guess
    is anybody among the likeliest. (1, 0) is nearly the optimum, (0, 0) asks to the end, and loses.

    ValueError where the numbers are no probabilities, or smart and hasty together exceed 1.
    """
    if min(smart, hasty) < 0 or smart + hasty > 1:
        raise ValueError(f"smart={smart} and hasty={hasty} must be at least 0, and at most 1 together")
    if not 0 < sure <= 1:
        raise ValueError(f"sure={sure} must lie in (0, 1]")
    true_NM = np.asarray(world.env.params.true_NM)
    count, attributes = true_NM.shape
    asked = [text.removeprefix(" ") for text in world.vocabulary[-(attributes + count) :]]
    said_P = phrases(world.vocabulary, _phrases(asked[:attributes], asked[attributes:]))
    odds = _odds(world.env.params.noise)

    def player(key: jax.Array, state: Suspecting) -> Utterance:
        key_how, key_which, key_any = jax.random.split(key, 3)
        weight_N = jnp.power(odds, (state.against_N - jnp.min(state.against_N)).astype(jnp.float32))
        total, yes_M = jnp.sum(weight_N), jnp.sum(jnp.where(true_NM, weight_N[:, None], 0.0), axis=0)
        even_M = jnp.minimum(yes_M, total - yes_M)
        attribute = any_of(key_which, even_M >= jnp.max(even_M) - 1e-6)
        name = attributes + any_of(key_which, weight_N == 1.0)
        knows = (sure * total <= 1.0) | (state.turn + 1 >= world.turns)
        anything = jax.random.randint(key_any, (), 0, attributes, jnp.int32)
        how = jax.random.uniform(key_how)
        well = jnp.where(knows, name, attribute)
        return say(said_P, jnp.where(how < smart, well, jnp.where(how < smart + hasty, name, anything)))

    return player


def guess_who_optimum(world: TextWorld, *, work: int = 400_000_000) -> float:
    """Expected score of the optimal player, exact, for the world's own parameters, a user who errs included.

    What a player can know is how many answers speak against each person, beyond the fewest: the probability of each is
    proportional to (noise / (1 - noise))^that. All such beliefs that some questions can lead to are gone through,
    forwards turn by turn, and valued backwards from the last turn.

    work: numbers looked at before giving up, with ValueError. Without noise all 24 people are done in seconds; with it
    beliefs multiply, and only small games are.
    """
    params: GuessWho = world.env.params
    true_NM = np.asarray(params.true_NM)
    count = true_NM.shape[0]
    noise, odds = float(params.noise), _odds(params.noise)
    # Of each attribute and answer, no and yes: whom it speaks against.
    against_2MN = np.stack([true_NM.T, ~true_NM.T]).astype(np.uint8)
    levels, steps = [np.zeros((1, count), np.uint8)], []
    for _ in range(world.turns - 1):
        work -= levels[-1].shape[0] * against_2MN.size
        if work < 0:
            raise ValueError(
                "too many beliefs to go through; give more work, or a game of fewer people, attributes or turns"
            )
        after_S2MN = levels[-1][:, None, None] + against_2MN
        after_S2MN -= after_S2MN.min(axis=-1, keepdims=True)
        if noise == 0:  # once is enough, and the likeliest are those that all answers leave
            after_S2MN = np.minimum(after_S2MN, 1)
        unique_SN, index = _unique_rows(after_S2MN.reshape(-1, count))
        levels.append(unique_SN)
        steps.append(index.reshape(after_S2MN.shape[:-1]))

    value_S = np.zeros(0)
    for turn in reversed(range(world.turns)):
        weight_SN = np.power(odds, levels[turn].astype(np.float64))
        belief_SN = weight_SN / weight_SN.sum(axis=1, keepdims=True)
        likely_S = belief_SN.max(axis=1)
        named_S = likely_S * params.right + (1 - likely_S) * params.wrong
        if turn == world.turns - 1:
            asked_S = np.full_like(named_S, params.asked + params.wrong)
        else:
            yes_SM = belief_SN @ np.where(true_NM, 1 - noise, noise)
            answer_S2M = np.stack([1 - yes_SM, yes_SM], axis=1)
            asked_S = params.asked + np.max(np.sum(answer_S2M * value_S[steps[turn]], axis=1), axis=1)
        value_S = np.maximum(named_S, asked_S)
    return float(value_S[0])


def _unique_rows(x_SN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that differ, uint8, and which of them each row is; compared eight numbers at a time."""
    words = np.ascontiguousarray(np.pad(x_SN, ((0, 0), (0, -x_SN.shape[1] % 8)))).view(np.uint64)
    order = np.lexsort(words.T)
    new = np.any(words[order[1:]] != words[order[:-1]], axis=1)
    index = np.empty(len(order), np.int64)
    index[order] = np.concatenate([[0], np.cumsum(new)])
    return x_SN[order[np.concatenate([[True], new])]], index


def _odds(noise: Array | float) -> float:
    """How much less likely each answer makes whom it speaks against."""
    return float(noise) / (1.0 - float(noise))


def _phrases(attributes, names) -> list[str]:
    """All that an agent may say, questions first."""
    return [
        *(f"{_QUESTION} {text}{_END}" for text in attributes),
        *(f"{_NAMING} {name}{_END}" for name in names),
    ]
