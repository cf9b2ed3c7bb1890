"""Texts on the device: from tokens to characters and words, the same that Python sees in `decode(ids)`.

Characters are code points. Bytes that are no UTF-8 become U+FFFD, one for each longest beginning of a character, as
`bytes.decode(errors="replace")` has it: a character may be cut between two tokens, or at the end. Words and runs of
them are compared by two hashes of 32 bits: unequal ones are taken for equal once in 2^64.

A tokenizer whose `decode` drops a space before the text (SentencePiece) has it here; `split` does not see it.

Shapes: B texts, T tokens, L bytes of the longest token, N = T * L characters at most, V vocabulary, R rows of data,
M characters of the longest reference.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "ByteTable",
    "Characters",
    "References",
    "byte_table",
    "characters",
    "fold",
    "references",
]

CODES = 0x110000  # code points
REPLACEMENT = 0xFFFD


class ByteTable(NamedTuple):
    """The bytes of every token."""

    byte_VL: np.ndarray | jax.Array  # uint8, 0 behind the token's last
    length_V: np.ndarray | jax.Array  # int32


class Characters(NamedTuple):
    """Texts as code points."""

    code_BN: jax.Array  # int32, 0 behind the last
    length_B: jax.Array  # int32

    @property
    def mask_BN(self) -> jax.Array:
        """bool, True on characters."""
        return jnp.arange(self.code_BN.shape[1])[None, :] < self.length_B[:, None]


class References(NamedTuple):
    """Texts that completions are compared with, a row for each row of the data. Made once, on the host."""

    code_RM: np.ndarray | jax.Array  # uint8, uint16 or int32, 0 behind the last
    length_R: np.ndarray | jax.Array  # int32


class Items(NamedTuple):
    """Lists of things to be compared, each known by a pair of hashes."""

    first: jax.Array  # uint32 [..., N]
    second: jax.Array  # uint32 [..., N]
    count: jax.Array  # int32 [...]: how many there are; behind them anything


class CodeMap(NamedTuple):
    """A number for every code point, in pages of 256 of which equal ones are kept once."""

    page: np.ndarray  # int32 [4352], the page of a code point's higher bits
    value: np.ndarray  # int32 [pages, 256]


# ---- made on the host


def byte_table(token_bytes: Sequence[bytes], vocab_size: int | None = None) -> ByteTable:
    """The bytes of a vocabulary: NumPy arrays, made once on the host.

        byte_table([tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)], lm.config.vocab_size)

    token_bytes: the bytes that each id stands for, b"" for special tokens.
    vocab_size: rows of the table, if a model has more ids than the tokenizer; those stand for no bytes.
    """
    size = len(token_bytes) if vocab_size is None else vocab_size
    if not 0 < len(token_bytes) <= size:
        raise ValueError(
            f"vocab_size is {size} and there are {len(token_bytes)} tokens; give one at least, and no more"
        )
    length_V = np.zeros(size, np.int32)
    length_V[: len(token_bytes)] = [len(token) for token in token_bytes]
    byte_VL = np.zeros((size, max(1, int(length_V.max()))), np.uint8)
    for v, token in enumerate(token_bytes):
        byte_VL[v, : len(token)] = list(token)
    return ByteTable(byte_VL, length_V)


def references(texts: Sequence[str]) -> References:
    """References of rewards on the device: row i is the text of row i of the data. NumPy arrays.

    They are the params of such a reward: place them on the device once, and hand them in.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"references must be a list of texts, at least one, got {texts!r:.60}")
    for r, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"references[{r}] must be a text, got {text!r:.60}")
    codes = [np.frombuffer(text.encode("utf-32-le"), np.uint32) for text in texts]
    length_R = np.array([len(code) for code in codes], np.int32)
    largest = max((int(code.max()) for code in codes if len(code)), default=0)
    kind = np.uint8 if largest < 2**8 else np.uint16 if largest < 2**16 else np.int32
    code_RM = np.zeros((len(texts), max(1, int(length_R.max()))), kind)
    for r, code in enumerate(codes):
        code_RM[r, : len(code)] = code
    return References(code_RM, length_R)


def code_map(value: np.ndarray) -> CodeMap:
    """The map of numbers [0x110000], int."""
    found: dict[bytes, int] = {}
    page = [found.setdefault(row.tobytes(), len(found)) for row in value.astype(np.int32).reshape(-1, 256)]
    return CodeMap(np.array(page, np.int32), np.frombuffer(b"".join(found), np.int32).reshape(-1, 256))


@lru_cache(maxsize=1)
def lower_codes() -> np.ndarray:
    """Of every code point its lower case, where that is one code point; else itself. int32 [0x110000]."""
    lower = np.arange(CODES, dtype=np.int32)
    for code in range(0x20000):  # no letter above has a case
        if not 0xD800 <= code < 0xE000 and len(small := chr(code).lower()) == 1:
            lower[code] = ord(small)
    return lower


@lru_cache(maxsize=1)
def _lower_of() -> dict[int, int]:
    lower = lower_codes()
    changed = np.flatnonzero(lower != np.arange(CODES))
    return dict(zip(changed.tolist(), lower[changed].tolist(), strict=True))


def fold(text: str) -> str:
    """The text in lower case, character by character, so that none is added and none depends on its neighbours.

    That is `str.lower` except for U+0130, which stays, and for a capital sigma at the end of a word.
    """
    return text.translate(_lower_of())


@lru_cache(maxsize=1)
def space_map() -> CodeMap:
    """1 where `str.split` cuts."""
    spaces = np.zeros(CODES, np.int32)
    spaces[[code for code in range(0x4000) if chr(code).isspace()]] = 1
    return code_map(spaces)


@lru_cache(maxsize=1)
def lower_map() -> CodeMap:
    """`fold` of one character."""
    return code_map(lower_codes())


# ---- on the device


def characters(token_BT: jax.Array, mask_BT: jax.Array, table: ByteTable) -> Characters:
    """What the tokens say, character by character; N = T * L.

    token_BT: integer ids, each a row of the table; mask_BT: bool, False drops the position.
    """
    what = "token_BT must be integer [B, T] and mask_BT bool of the same shape"
    chex.assert_rank([token_BT, mask_BT], 2, custom_message=what)
    chex.assert_type([token_BT, mask_BT], [int, bool], custom_message=what)
    chex.assert_equal_shape([token_BT, mask_BT], custom_message=what)
    byte_VL, length_V = (jnp.asarray(x) for x in table)
    batch, longest = token_BT.shape[0], byte_VL.shape[1]
    length_BT1 = jnp.where(mask_BT, length_V[token_BT], 0)[:, :, None]
    real_BTL = jnp.arange(longest, dtype=jnp.int32)[None, None, :] < length_BT1
    byte_BN = byte_VL[token_BT].astype(jnp.int32).reshape(batch, -1)
    byte_BN, length_B = packed(byte_BN, real_BTL.reshape(batch, -1))
    code_BN, begins_BN = _decoded(byte_BN)
    begins_BN &= jnp.arange(byte_BN.shape[1])[None, :] < length_B[:, None]
    return Characters(*packed(code_BN, begins_BN))


def reference_characters(references: References, index_B: jax.Array) -> tuple[Characters, jax.Array]:
    """The references of these rows, and bool [B]: whether there is such a row."""
    if not isinstance(references, References):
        raise TypeError(f"params of this reward must be `references(texts)`, got {type(references).__name__}")
    chex.assert_rank(index_B, 1, custom_message="index_B must be integer [B], the row of each completion")
    chex.assert_type(index_B, int, custom_message="index_B must be integer [B], the row of each completion")
    rows = references.length_R.shape[0]
    known_B = (index_B >= 0) & (index_B < rows)
    row_B = jnp.clip(index_B, 0, rows - 1)
    code_BM = jnp.asarray(references.code_RM)[row_B].astype(jnp.int32)
    return Characters(code_BM, jnp.asarray(references.length_R)[row_B].astype(jnp.int32)), known_B


def packed(x_BN: jax.Array, keep_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is kept of each row, without gaps, 0 behind it; and how much that is, int32 [B]."""
    place_BN = jnp.where(keep_BN, jnp.cumsum(keep_BN, axis=1, dtype=jnp.int32) - 1, x_BN.shape[1])

    @jax.vmap  # row by row, so that each device packs its own
    def packed_row(x_N: jax.Array, place_N: jax.Array) -> jax.Array:
        return jnp.zeros_like(x_N).at[place_N].set(x_N, mode="drop")

    return packed_row(x_BN, place_BN), jnp.sum(keep_BN, axis=1, dtype=jnp.int32)


def look_up(table: CodeMap, code: jax.Array) -> jax.Array:
    """The number of each code point, int32."""
    return jnp.asarray(table.value)[jnp.asarray(table.page)[code >> 8], code & 255]


def without_space(text: Characters) -> Characters:
    """The characters that are no white space."""
    return Characters(*packed(text.code_BN, text.mask_BN & (look_up(space_map(), text.code_BN) == 0)))


def folded(text: Characters) -> Characters:
    """`fold` of each text."""
    return text._replace(code_BN=look_up(lower_map(), text.code_BN))


def words(text: Characters) -> Items:
    """The words that `str.split` gives, in order."""
    return runs(text.code_BN, text.mask_BN & (look_up(space_map(), text.code_BN) == 0))


def runs(code_BN: jax.Array, inside_BN: jax.Array, cut_BN: jax.Array | None = None) -> Items:
    """The runs of characters that lie inside, in order. cut_BN: bool, a run ends behind this character; None: none."""
    start_BN, index_BN, end_BN = run_places(inside_BN, cut_BN)
    # Without the barrier the compiler computes sums over the row anew for every place that is written.
    first_BN, second_BN = jax.lax.optimization_barrier(hashes_between(code_BN, start_BN, index_BN))
    first_BW, count_B = packed(first_BN, end_BN)
    second_BW, _ = packed(second_BN, end_BN)
    most = (code_BN.shape[1] + 1) // 2 if cut_BN is None else code_BN.shape[1]
    return Items(first_BW[:, :most], second_BW[:, :most], count_B)


class Places(NamedTuple):
    """Of each character inside a run: where the run starts; its own index; whether it is the run's last."""

    start_BN: jax.Array
    index_BN: jax.Array
    end_BN: jax.Array


def run_places(inside_BN: jax.Array, cut_BN: jax.Array | None = None) -> Places:
    """The runs of True, cut where `runs` says."""
    none_B1 = jnp.zeros_like(inside_BN[:, :1])
    cut_BN = jnp.zeros_like(inside_BN) if cut_BN is None else cut_BN
    before_BN = jnp.concatenate([none_B1, (inside_BN & ~cut_BN)[:, :-1]], axis=1)
    after_BN = jnp.concatenate([inside_BN[:, 1:], none_B1], axis=1)
    index_BN = jnp.broadcast_to(jnp.arange(inside_BN.shape[1], dtype=jnp.int32)[None, :], inside_BN.shape)
    start_BN = jax.lax.cummax(jnp.where(inside_BN & ~before_BN, index_BN, 0), axis=1)
    return Places(start_BN, index_BN, inside_BN & (~after_BN | cut_BN))


def score_texts(
    table: ByteTable, score: Callable[[Any, Characters], jax.Array]
) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """`reward(params, token_BT, mask_BT) -> float32 [B]` from a score of characters."""

    def reward(params: Any, token_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
        return score(params, characters(token_BT, mask_BT, table)).astype(jnp.float32)

    return reward


def score_against_references(
    table: ByteTable, score: Callable[[Characters, Characters], jax.Array]
) -> Callable[[References, jax.Array, jax.Array, jax.Array], jax.Array]:
    """`reward(references, token_BT, mask_BT, index_B) -> float32 [B]` from a score of completions and references.

    NaN where there is no row `index_B`: such a completion is never trained on, and counted.
    """

    def reward(
        references: References, token_BT: jax.Array, mask_BT: jax.Array, index_B: jax.Array
    ) -> jax.Array:
        if index_B.shape != token_BT.shape[:1]:
            raise ValueError(f"index_B {index_B.shape} must have a row for each of token_BT {token_BT.shape}")
        reference, known_B = reference_characters(references, index_B)
        score_B = score(characters(token_BT, mask_BT, table), reference)
        return jnp.where(known_B, score_B, jnp.nan).astype(jnp.float32)

    return reward


# ---- hashes. Of codes c_0 c_1 ...: sum of mix(c_i) * MULTIPLIER^i mod 2^32, twice.

_SALT = (0x9E3779B9, 0x85EBCA6B)
_MULTIPLIER = (0x01000193, 0xC2B2AE35)  # odd, so that they can be divided by


def character_items(text: Characters) -> Items:
    """Every character as an item."""
    first_BN, second_BN = (_mixed(text.code_BN, salt) for salt in _SALT)
    return Items(first_BN, second_BN, text.length_B)


def hashes_between(code_BN: jax.Array, start_BN: jax.Array, end_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two hashes of the characters from start to end, both inclusive, uint32 [B, N]; 0 where start > end."""
    pairs = []
    for salt, multiplier in zip(_SALT, _MULTIPLIER, strict=True):
        power_N, inverse_N = _powers(multiplier, code_BN.shape[1])
        total_BN = jnp.cumsum(_mixed(code_BN, salt) * power_N[None, :], axis=1, dtype=jnp.uint32)
        before_BN = jnp.pad(total_BN, ((0, 0), (1, 0)))
        upto_BN = jnp.take_along_axis(before_BN, end_BN + 1, axis=1)
        hash_BN = (upto_BN - jnp.take_along_axis(before_BN, start_BN, axis=1)) * inverse_N[start_BN]
        pairs.append(jnp.where(start_BN <= end_BN, hash_BN, 0))
    return pairs[0], pairs[1]


def hashes_of(texts: Sequence[str]) -> np.ndarray:
    """The two hashes of each text as a whole, on the host: uint32 [len(texts), 2]."""
    found = np.zeros((len(texts), 2), np.uint32)
    for i, text in enumerate(texts):
        code_N = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        for k, (salt, multiplier) in enumerate(zip(_SALT, _MULTIPLIER, strict=True)):
            power_N = _host_powers(multiplier, len(code_N))
            found[i, k] = np.sum(_mixed(code_N, salt) * power_N, dtype=np.uint32)
    return found


def joined_hash(before: jax.Array, after: jax.Array, which: int) -> jax.Array:
    """Hash number `which` (0 or 1) of a list that goes on with one more item."""
    return _mixed(before * np.uint32(_MULTIPLIER[which]) + after, _SALT[which])


def _mixed(code: Any, salt: int) -> Any:
    """32 bits that depend on all bits of the code (the finaliser of MurmurHash3); NumPy or JAX."""
    x = code.astype(np.uint32) ^ np.uint32(salt)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _powers(multiplier: int, count: int) -> tuple[jax.Array, jax.Array]:
    """MULTIPLIER^i and its inverse mod 2^32, uint32 [count] each."""
    inverse = pow(multiplier, -1, 2**32)
    return jnp.asarray(_host_powers(multiplier, count)), jnp.asarray(_host_powers(inverse, count))


@lru_cache(maxsize=256)
def _host_powers(multiplier: int, count: int) -> np.ndarray:
    powers = np.full(count, multiplier, np.uint32)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint32)


def _decoded(byte_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(code_BN, begins_BN): the character that begins at each byte, and whether one does (Unicode 15, table 3-7).

    Behind the text stand zeros, which continue no character.
    """
    next_ = [jnp.pad(byte_BN, ((0, 0), (0, k)))[:, k:] for k in (1, 2, 3)]
    two, three, four = (
        (byte_BN >= low) & (byte_BN <= high) for low, high in ((0xC2, 0xDF), (0xE0, 0xEF), (0xF0, 0xF4))
    )
    # The first continuation is held tighter behind some bytes: no overlong forms, no surrogates, no end of Unicode.
    low_BN = jnp.where(byte_BN == 0xE0, 0xA0, jnp.where(byte_BN == 0xF0, 0x90, 0x80))
    high_BN = jnp.where(byte_BN == 0xED, 0x9F, jnp.where(byte_BN == 0xF4, 0x8F, 0xBF))
    have1 = (two | three | four) & (next_[0] >= low_BN) & (next_[0] <= high_BN)
    have2 = have1 & (three | four) & _continues(next_[1])
    have3 = have2 & four & _continues(next_[2])
    taken_BN = _shifted(have1, 1) | _shifted(have2, 2) | _shifted(have3, 3)
    bits = [x & 0x3F for x in next_]
    code_BN = jnp.where(byte_BN < 0x80, byte_BN, REPLACEMENT)
    code_BN = jnp.where(two & have1, (byte_BN & 0x1F) << 6 | bits[0], code_BN)
    code_BN = jnp.where(three & have2, (byte_BN & 0x0F) << 12 | bits[0] << 6 | bits[1], code_BN)
    of_four_BN = (byte_BN & 0x07) << 18 | bits[0] << 12 | bits[1] << 6 | bits[2]
    return jnp.where(have3, of_four_BN, code_BN), ~taken_BN


def _continues(byte: jax.Array) -> jax.Array:
    return (byte >= 0x80) & (byte <= 0xBF)


def _shifted(x_BN: jax.Array, by: int) -> jax.Array:
    return jnp.pad(x_BN, ((0, 0), (by, 0)))[:, : x_BN.shape[1]]
