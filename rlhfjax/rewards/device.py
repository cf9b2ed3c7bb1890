"""Rewards that stay on the device: reward(params, token_BT, mask_BT) -> float32 [B], inside jit.

The length reward counts words without decoding. A small automaton reads the bytes of UTF-8 (is a word open?
which prefix of a white space of several bytes has been read?), and a token makes all steps of its bytes at
once: two tables [V, S] that `word_table` makes on the host. The count equals `len(decode(ids).split())` for
any ids, also where a character is cut between two tokens or the bytes are no UTF-8.

Shapes: B sequences, T positions, V vocabulary, S states.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["WordTable", "length_reward", "word_count", "word_table"]


class WordTable(NamedTuple):
    """A word counter as a finite automaton over tokens; state 0 is the beginning of a text."""

    next_VS: np.ndarray | jax.Array  # int32: state after token v in state s
    words_VS: np.ndarray | jax.Array  # int32: words that token v begins in state s
    end_S: np.ndarray | jax.Array  # int32: words that the end of the text begins: a cut character is one


def word_table(token_bytes: Sequence[bytes], vocab_size: int | None = None) -> WordTable:
    """The word counter of a vocabulary: NumPy arrays, made once on the host.

    token_bytes: the bytes that each id stands for, b"" for special tokens.
    vocab_size: rows of the table, if a model has more ids than the tokenizer; those stand for no bytes.
    """
    size = len(token_bytes) if vocab_size is None else vocab_size
    if not 0 < len(token_bytes) <= size:
        raise ValueError(
            f"vocab_size is {size} and there are {len(token_bytes)} tokens; give one at least, and no more"
        )
    next_byte, word_byte, end_S = _byte_automaton()
    next_VS = np.tile(np.arange(len(end_S)), (size, 1))
    words_VS = np.zeros((size, len(end_S)), np.int64)
    for place in range(max(map(len, token_bytes))):
        rows = np.array([v for v, token in enumerate(token_bytes) if len(token) > place])
        byte = np.array([token_bytes[v][place] for v in rows])
        state = next_VS[rows]
        words_VS[rows] += word_byte[byte[:, None], state]
        next_VS[rows] = next_byte[byte[:, None], state]
    return WordTable(next_VS.astype(np.int32), words_VS.astype(np.int32), end_S.astype(np.int32))


def word_count(token: jax.Array, mask: jax.Array, table: WordTable) -> jax.Array:
    """Words of each sequence, cut at white space as `str.split` does: int32 [...] of token and mask [..., T].

    token: integer ids, each a row of the table; mask: bool, False drops the position.
    """
    chex.assert_type([token, mask], [int, bool])
    chex.assert_equal_shape([token, mask])
    table = jax.tree.map(jnp.asarray, table)

    def step(state: jax.Array, item: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        token, mask = item
        words = jnp.where(mask, table.words_VS[token, state], 0)
        return jnp.where(mask, table.next_VS[token, state], state), words

    start = jnp.zeros(token.shape[:-1], jnp.int32)
    state, words = jax.lax.scan(step, start, (jnp.moveaxis(token, -1, 0), jnp.moveaxis(mask, -1, 0)))
    return words.sum(0) + table.end_S[state]


def length_reward(target_words: float, table: WordTable) -> Callable[..., jax.Array]:
    """reward(params, token_BT, mask_BT) -> -|words - target_words|, float32 [B]; params are not used."""

    def reward(params: object, token_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
        del params
        return -jnp.abs(word_count(token_BT, mask_BT, table).astype(jnp.float32) - target_words)

    return reward


# Characters at which str.split cuts; the ASCII ones are one byte, the others two or three.
_WHITE_SPACE = [chr(c).encode() for c in range(0x110000) if not 0xD800 <= c < 0xE000 and chr(c).isspace()]


def _byte_automaton() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """next_byte [256, S], word_byte [256, S], end_S: the word counter over single bytes.

    A state is (prefix of a white space read so far, is a word open). Bytes that turn out to be no white space
    are part of a word, whatever they are: a character, or U+FFFD in the place of bytes that are no UTF-8.
    """
    prefixes = [b"", *sorted({space[:n] for space in _WHITE_SPACE for n in range(1, len(space))})]
    states = [(prefix, word) for prefix in prefixes for word in (False, True)]
    index = {state: i for i, state in enumerate(states)}
    next_byte = np.zeros((256, len(states)), np.int64)
    word_byte = np.zeros((256, len(states)), np.int64)
    for (prefix, word), i in index.items():
        for byte in range(256):
            (after, open_after), begun = _read_byte(prefix, word, bytes([byte]), prefixes)
            next_byte[byte, i] = index[after, open_after]
            word_byte[byte, i] = begun
    end_S = np.array([prefix != b"" and not word for prefix, word in states], np.int64)
    return next_byte, word_byte, end_S


def _read_byte(
    prefix: bytes, word: bool, byte: bytes, prefixes: list[bytes]
) -> tuple[tuple[bytes, bool], int]:
    """The state after one byte, and how many words (0 or 1) it begins."""
    if prefix + byte in _WHITE_SPACE:
        return (b"", False), 0
    if prefix + byte in prefixes:
        return (prefix + byte, word), 0
    if prefix:  # what was held back is part of a word after all; the byte itself may yet begin a white space
        state, begun = _read_byte(b"", True, byte, prefixes)
        return state, begun + (not word)
    return (b"", True), int(not word)
