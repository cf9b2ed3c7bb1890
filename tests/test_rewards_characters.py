"""Texts on the device against `bytes.decode`, `str.split` and `str.lower`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reward_texts import MASK_BT, REFERENCES, TABLE, TEXTS, TOKEN_BT

from rlhfjax.data import ByteTokenizer
from rlhfjax.rewards import byte_table, characters, fold, references
from rlhfjax.rewards.characters import (
    folded,
    hashes_of,
    reference_characters,
    score_against_references,
    space_map,
    without_space,
    words,
)

BYTES = ByteTokenizer()
BYTE_TABLE = byte_table([BYTES.token_bytes(i) for i in range(BYTES.vocab_size)])
READ = jax.jit(characters)


def as_texts(found) -> list[str]:
    return [
        "".join(map(chr, row[:n].tolist()))
        for row, n in zip(np.asarray(found.code_BN), np.asarray(found.length_B), strict=True)
    ]


def test_characters_are_those_of_the_decoded_text():
    assert as_texts(READ(TOKEN_BT, MASK_BT, TABLE)) == TEXTS


def test_bytes_that_are_no_utf8_become_what_python_makes_of_them():
    """All bytes at random, and those at the borders of what may follow what."""
    random = np.random.default_rng(1)
    borders = bytes.fromhex("41 7f 80 8f 90 9f a0 bf c0 c1 c2 df e0 e1 ec ed ee ef f0 f1 f3 f4 f5 ff")
    token = np.concatenate([random.integers(0, 256, (1000, 8)), random.choice(list(borders), (6000, 8))])
    mask = random.random(token.shape) < 0.9
    found = as_texts(READ(jnp.asarray(token), jnp.asarray(mask), BYTE_TABLE))
    assert found == [bytes(t[m].tolist()).decode(errors="replace") for t, m in zip(token, mask, strict=True)]


def test_characters_of_every_length_are_read():
    borders = [*range(0x7F0, 0x820), *range(0xD7F0, 0xD800), *range(0xE000, 0xE010), *range(0xFFF0, 0x10010)]
    codes = np.array(
        [*range(0x100), *borders, *range(0x900, 0xD7F0, 89), *range(0x10010, 0x110000, 997), 0x10FFFF]
    )
    text = codes.astype("<u4").tobytes().decode("utf-32-le")
    every = np.frombuffer(text.encode(), np.uint8)[None, :].astype(np.int32)
    found = READ(jnp.asarray(every), jnp.ones(every.shape, bool), BYTE_TABLE)
    assert int(found.length_B[0]) == len(codes)
    np.testing.assert_array_equal(np.asarray(found.code_BN)[0, : len(codes)], codes)


def test_lower_case_and_white_space_are_pythons():
    every = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert fold("İ") == "İ" and fold("ΑΣ") == "ασ"  # unlike str.lower
    others = every.replace("İ", "")
    assert fold(others) == others.lower()  # a sigma has letters around it there
    table = space_map()
    spaces = np.flatnonzero(table.value[table.page].reshape(-1))
    assert "".join(map(chr, spaces)) == "".join(c for c in every if c.isspace())
    assert as_texts(folded(READ(TOKEN_BT, MASK_BT, TABLE))) == [fold(text) for text in TEXTS]
    assert as_texts(without_space(READ(TOKEN_BT, MASK_BT, TABLE))) == ["".join(t.split()) for t in TEXTS]


def test_words_are_those_of_split_by_their_hashes():
    found = jax.jit(lambda token, mask: words(characters(token, mask, TABLE)))(TOKEN_BT, MASK_BT)
    expected = [text.split() for text in TEXTS]
    assert found.count.tolist() == [len(row) for row in expected]
    for i, row in enumerate(expected):
        pairs = np.stack([found.first[i, : len(row)], found.second[i, : len(row)]], axis=1)
        np.testing.assert_array_equal(pairs, hashes_of(row))
    distinct = sorted({word for row in expected for word in row})
    assert len(np.unique(hashes_of(distinct), axis=0)) == len(distinct) > 300


def test_hashes_see_order_length_and_every_bit():
    texts = ["ab", "ba", "a", "aa", "aaa", "b", "", "\x00", "\x00\x00", "á", "\U00010061"]
    for which in (0, 1):
        assert len(set(hashes_of(texts)[:, which].tolist())) == len(texts)


def test_references_are_looked_up_by_row():
    made = references(REFERENCES)
    index = jnp.asarray([3, 0, 3, len(REFERENCES) - 1, len(REFERENCES), -1])
    found, known = reference_characters(made, index)
    assert known.tolist() == [True] * 4 + [False] * 2
    assert as_texts(found)[:4] == [REFERENCES[i] for i in (3, 0, 3, -1)]
    assert references(["ab", "é"]).code_RM.dtype == np.uint8
    assert references(["ab", "的"]).code_RM.dtype == np.uint16
    assert references(["ab", "🎉"]).code_RM.dtype == np.int32
    for texts in ([], "abc"):
        with pytest.raises(ValueError, match="references must be a list of texts"):
            references(texts)
    with pytest.raises(TypeError, match=r"references\[1\] must be a text, got 2"):
        references(["a", 2])  # pyright: ignore[reportArgumentType]


def test_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match="vocab_size is 3 and there are 259 tokens"):
        byte_table([BYTES.token_bytes(i) for i in range(259)], 3)
    for token, mask in ((TOKEN_BT[0], MASK_BT[0]), (TOKEN_BT, MASK_BT.astype(int)), (TOKEN_BT, MASK_BT[:3])):
        with pytest.raises(AssertionError, match="token_BT must be integer"):
            characters(token, mask, TABLE)
    score = score_against_references(TABLE, lambda text, reference: text.length_B - reference.length_B)
    rows = jnp.zeros(len(TOKEN_BT), jnp.int32)
    with pytest.raises(ValueError, match="index_B .3,. must have a row for each of token_BT"):
        score(references(["a"]), TOKEN_BT, MASK_BT, rows[:3])
    with pytest.raises(AssertionError, match="index_B must be integer"):
        score(references(["a"]), TOKEN_BT, MASK_BT, rows.astype(float))
    with pytest.raises(TypeError, match="must be `references.texts.`, got list"):
        score(["a"], TOKEN_BT, MASK_BT, rows)  # pyright: ignore[reportArgumentType]
