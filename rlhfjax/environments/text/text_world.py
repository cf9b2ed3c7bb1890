"""Worlds that are talked to: what an utterance is, what a text world is, and words to tokens and back.

A text world is an `Environment` whose observations and actions are utterances. It has a small vocabulary of its
own, of whole phrases, words or letters, so that everything is known about its text. What an agent says is understood
where it is exactly one of the world's phrases, its stop token included; anything else has a consequence that the
world defines, and is never an error: it happens inside a compiled program.

Shapes: L tokens of an utterance, P phrases.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.environments.environment import Environment, Step, checked

PyTree = Any
PAD = "<pad>"
"""Text of token 0 of every vocabulary: it fills what nobody said. It is never encoded."""


class Utterance(NamedTuple):
    """What was said. What stands after `length` is not read."""

    token_L: jax.Array  # int32 [L], padded
    length: jax.Array  # int32 [], tokens that were said


class TextWorld(NamedTuple):
    """A world in words.

    `env` follows the six-value protocol: its actions are utterances of `action_length` tokens, its observations of
    `observation_length`. A game's first observation has at least one token; later ones may have none. An agent
    speaks until it says `stop_token`, which belongs to what it says, or has said `action_length` tokens. `info` of
    a step has "success": bool, whether the game was won by it.
    """

    env: Environment
    vocabulary: tuple[
        str, ...
    ]  # text of each token; spaces belong to the tokens, so joined they are the text
    stop_token: int
    action_length: int  # most tokens of what the agent says, the stop token included
    observation_length: int  # most tokens of what the world says
    turns: int  # most turns of a game


def text_world(
    env: Environment,
    vocabulary: Sequence[str],
    *,
    stop: str,
    action_length: int,
    observation_length: int,
    turns: int,
) -> TextWorld:
    """A text world whose door is held: reset and step give and take utterances of these lengths.

    Raises ValueError for a vocabulary that does not begin with "<pad>", or has a text twice or an empty one, and for
    a stop token that is not in it. While tracing, TypeError for an action that is no `Utterance` of
    int32 [action_length] and int32 []; so too where the world's own words are not as announced.
    """
    vocabulary = tuple(vocabulary)
    if not vocabulary or vocabulary[0] != PAD:
        raise ValueError(f'a vocabulary begins with "{PAD}", got {vocabulary[:1]}')
    if "" in vocabulary or len(set(vocabulary)) != len(vocabulary):
        raise ValueError(
            f"the texts of a vocabulary must differ and must not be empty; {_twice(vocabulary)} are not so"
        )
    if stop not in vocabulary[1:]:
        raise ValueError(f"the stop token {stop!r} is not in the vocabulary")
    if min(action_length, observation_length, turns) < 1:
        raise ValueError(
            f"a text world needs at least 1 token a side and 1 turn, got action_length={action_length}, "
            f"observation_length={observation_length}, turns={turns}"
        )
    env = env._replace(num_actions=None, observation_shape=None)

    def reset(key: jax.Array, params: PyTree) -> tuple[Utterance, PyTree]:
        observation, state = checked(env).reset(key, params)
        _check_utterance("reset's observation", observation, observation_length)
        return observation, state

    def step(key: jax.Array, state: PyTree, action: Utterance, params: PyTree) -> Step:
        _check_utterance("the action", action, action_length)
        said = Utterance(jnp.asarray(action.token_L), jnp.asarray(action.length))

        def step_of(key: jax.Array, state: PyTree, action: jax.Array, params: PyTree) -> Step:
            del action  # `checked` takes one array for an action; what was said goes past it
            return env.step(key, state, said, params)

        out = checked(env._replace(step=step_of)).step(key, state, jnp.int32(0), params)
        _check_utterance("step's observation", out[0], observation_length)
        return out

    return TextWorld(
        env=env._replace(reset=reset, step=step),
        vocabulary=vocabulary,
        stop_token=vocabulary.index(stop),
        action_length=action_length,
        observation_length=observation_length,
        turns=turns,
    )


def encode(world: TextWorld, text: str) -> list[int]:
    """Token ids of a text, on the host: at each place the longest text of the vocabulary that fits.

    Raises ValueError for what is no string and, with the part that is unknown, where none fits.
    """
    return encode_with(world.vocabulary, text)


def encode_with(vocabulary: Sequence[str], text: str) -> list[int]:
    """`encode` with a vocabulary that has no world yet."""
    if not isinstance(text, str):
        raise ValueError(f"a text world is told strings, got {type(text).__name__}")
    ids, place = known_part(vocabulary, text)
    if place < len(text):
        raise ValueError(
            f"{text[place : place + 20]!r} at character {place} of {text!r} is not in the world's vocabulary, "
            f"which is {_some(vocabulary)}"
        )
    return ids


def known_part(vocabulary: Sequence[str], text: str) -> tuple[list[int], int]:
    """Token ids of a text as far as the vocabulary knows it, and the character at which that ends."""
    number = {piece: i for i, piece in enumerate(vocabulary) if i}
    longest = max(map(len, number), default=0)
    ids, place = [], 0
    while place < len(text):
        fits = (text[place : place + n] for n in range(longest, 0, -1))
        piece = next((piece for piece in fits if piece in number), None)
        if piece is None:
            break
        ids.append(number[piece])
        place += len(piece)
    return ids, place


def decode(world: TextWorld, ids: Sequence[int]) -> str:
    """Text of token ids, on the host; padding is left out. Raises ValueError for an id outside the vocabulary."""
    ids = [int(i) for i in ids]
    outside = [i for i in ids if not 0 <= i < len(world.vocabulary)]
    if outside:
        raise ValueError(f"token {outside[0]} lies outside the vocabulary, 0 to {len(world.vocabulary) - 1}")
    return "".join(world.vocabulary[i] for i in ids if i)


def phrases(vocabulary: Sequence[str], texts: Sequence[str], length: int | None = None) -> Utterance:
    """Texts as utterances, NumPy: token_L [P, L] and length [P]; L is `length`, or that of the longest.

    Raises ValueError for a text that cannot be encoded or is longer.
    """
    ids = [encode_with(vocabulary, text) for text in texts]
    longest = max(map(len, ids), default=0)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(
            f"{texts[int(np.argmax([len(x) for x in ids]))]!r} has {longest} tokens, more than {length}"
        )
    token_PL = np.zeros((len(ids), length), np.int32)
    for p, row in enumerate(ids):
        token_PL[p, : len(row)] = row
    return Utterance(token_PL, np.array([len(row) for row in ids], np.int32))  # pyright: ignore[reportArgumentType]


def say(phrases: Utterance, number: jax.Array, length: int | None = None) -> Utterance:
    """Phrase `number`, int32 [], of phrases [P, L], padded to `length` tokens."""
    token_PL = jnp.asarray(phrases.token_L)
    token_L = token_PL[number]
    if length is not None:
        token_L = jnp.pad(token_L, (0, length - token_PL.shape[1]))
    return Utterance(token_L, jnp.asarray(phrases.length)[number])


def understand(said: Utterance, phrases: Utterance) -> jax.Array:
    """The number of the phrase that was said, int32 [], or -1 where it is none of them.

    said: an utterance [L]. phrases: [P, L'] and [P], L' <= L; they must differ. What stands after either's length is
    not read.
    """
    token_PL, length_P = jnp.asarray(phrases.token_L), jnp.asarray(phrases.length)
    width = token_PL.shape[1]
    if width > said.token_L.shape[0]:
        raise ValueError(f"phrases of {width} tokens do not fit into an utterance of {said.token_L.shape[0]}")
    past_PL = jnp.arange(width)[None, :] >= length_P[:, None]
    same_PL = (token_PL == said.token_L[None, :width]) | past_PL
    same_P = jnp.all(same_PL, axis=1) & (length_P == said.length)
    return jnp.where(jnp.any(same_P), jnp.argmax(same_P), -1).astype(jnp.int32)


def _check_utterance(name: str, said: Any, length: int) -> None:
    if not isinstance(said, Utterance):
        raise TypeError(f"{name} must be an Utterance(token_L, length), got {type(said).__name__}")
    got = [(jnp.shape(x), jnp.asarray(x).dtype) for x in said]
    if got != [((length,), jnp.int32), ((), jnp.int32)]:
        raise TypeError(
            f"{name} must be an Utterance of int32 [{length}] and int32 [], got "
            + " and ".join(f"{dtype.name}{list(shape)}" for shape, dtype in got)
            + "; a batch goes through jax.vmap"
        )


def _twice(vocabulary: Sequence[str]) -> list[str]:
    return sorted({text for text in vocabulary if not text or vocabulary.count(text) > 1})


def _some(vocabulary: Sequence[str], most: int = 40) -> str:
    shown = ", ".join(repr(text) for text in vocabulary[1 : most + 1])
    return shown + (f" and {len(vocabulary) - most - 1} more" if len(vocabulary) > most + 1 else "")
