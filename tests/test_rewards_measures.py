"""Repetition, lengths and verifiers: the host form by hand or by a plain search, the device form by the host form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reward_texts import MASK_BT, TABLE, TEXTS, TOKEN_BT, TOKENIZER

from rlhfjax.data import ByteTokenizer, pad_completions
from rlhfjax.rewards import (
    byte_table,
    character_count,
    count_words,
    distinct_on_device,
    distinct_reward,
    last_number,
    last_number_on_device,
    last_number_reward,
    longest_repeat_on_device,
    longest_repeat_reward,
    marked_answer,
    marked_answer_on_device,
    marked_answer_reward,
    near_length_on_device,
    near_length_reward,
    over_length_on_device,
    over_length_reward,
    references,
    repetition_on_device,
    repetition_reward,
    token_count,
    verifier_reward,
    word_count,
    word_table,
)

BYTES = ByteTokenizer()
BYTE_TABLE = byte_table([BYTES.token_bytes(i) for i in range(BYTES.vocab_size)])
WORDS = partial(word_count, table=word_table([TOKENIZER.token_bytes(i) for i in range(400)], 410))
RANDOM = np.random.default_rng(0)


def as_bytes(texts: list[str]):
    rows = [[*BYTES.encode(text), BYTES.eos_id] for text in texts]
    return tuple(jnp.asarray(x) for x in pad_completions(rows, max(map(len, rows)), BYTES.pad_id))


# ---- repetition and lengths

LOOPING = [" ".join(RANDOM.choice(["a", "A", "bé", "c", ","], n)) for n in RANDOM.integers(0, 14, 40)]
REPETITION = {
    "repeated": (repetition_reward(2), repetition_on_device(BYTE_TABLE, 2)),
    "distinct": (distinct_reward(), distinct_on_device(BYTE_TABLE)),
    "longest": (longest_repeat_reward(), longest_repeat_on_device(BYTE_TABLE)),
}


def test_repetition_by_hand():
    texts = ["a b a b a b", "A a", "a", "", "the cat the dog the cat sat", "x x x"]
    assert repetition_reward(2)(texts, texts) == pytest.approx([-3 / 5, 0, 0, 0, -1 / 6, -1 / 2])
    assert distinct_reward(1)(texts, texts) == pytest.approx([2 / 6, 1 / 2, 1, 0, 4 / 7, 1 / 3])
    assert longest_repeat_reward()(texts, texts) == [-4, -1, 0, 0, -2, -2]


def test_the_longest_repeat_is_the_longest_of_all():
    for text, got in zip(LOOPING, longest_repeat_reward()(LOOPING, LOOPING), strict=True):
        words = text.lower().split()
        runs = [tuple(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
        assert -got == max((len(run) for run in runs if runs.count(run) > 1), default=0)


def test_repetition_on_the_device():
    found = jax.jit(lambda *x: {name: device(None, *x) for name, (_, device) in REPETITION.items()})(
        *as_bytes(LOOPING)
    )
    for name, (host, _) in REPETITION.items():
        expected = host(LOOPING, LOOPING)
        assert len(set(expected)) > 4 and found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], expected, atol=1e-6, err_msg=name)


def test_lengths():
    texts = ["one two three", "é", ""]
    assert near_length_reward(2)(texts, texts) == [-1, -1, -2]
    assert near_length_reward(2, len)(texts, texts) == [-11, -1, -2]
    assert over_length_reward(1.5, slope=2.0)(texts, texts) == [-3.0, 0.0, 0.0]
    letters = partial(character_count, table=TABLE)
    found = jax.jit(
        lambda *x: (
            near_length_on_device(3.5, WORDS)(None, *x),
            over_length_on_device(9, letters, slope=0.5)(None, *x),
            near_length_on_device(4, token_count)(None, *x),
        )
    )(TOKEN_BT, MASK_BT)
    expected = (
        near_length_reward(3.5, count_words)(TEXTS, TEXTS),
        over_length_reward(9, len, slope=0.5)(TEXTS, TEXTS),
        [-abs(n - 4) for n in np.asarray(MASK_BT).sum(axis=1)],
    )
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == jnp.float32 and len(set(wanted)) > 3
        np.testing.assert_array_equal(got, np.asarray(wanted, np.float32))


# ---- verifiers

NUMBERS = {
    "so 3 + 4 = 7": 7,
    "1,234.50 dollars.": 1234.5,
    "at -5": -5,
    "3-5": 5,
    "x-5, y--6": -6,
    "1.5.25": 25,
    "1.-5": -5,
    "7.": 7,
    "12,": 12,
    "1,2,3": 123,
    "0.125": 0.125,
    "-0": 0,
    "٣ é": None,
    "no": None,
    "": None,
    "2 -": 2,
    "-": None,
    "9,,8": 8,
    "(-4)": -4,
    "16777215": 16777215,
}


def test_the_last_number():
    assert {text: last_number(text) for text in NUMBERS} == NUMBERS


def test_numbers_and_marked_answers_on_the_device():
    pieces = ["1", "2", "0", ",", ".", "-", " ", "x", "é", "\n", "=", "=="]
    drawn = ["".join(RANDOM.choice(pieces, n)) for n in RANDOM.integers(0, 12, 300)]
    texts = [*NUMBERS, *drawn]
    found = [last_number(text) for text in texts]
    answers = [3.0 if x is None else x + (i % 3 == 2) for i, x in enumerate(found)]
    marked = [(marked_answer(text, "==") or "1 2") + "0" * (i % 3 == 2) for i, text in enumerate(texts)]
    index = jnp.arange(len(texts)).at[0].set(-1)

    @jax.jit
    def score(answer_R, given, token_BT, mask_BT, index_B):
        return (
            last_number_on_device(BYTE_TABLE, tolerance=1e-4)(answer_R, token_BT, mask_BT, index_B),
            marked_answer_on_device(BYTE_TABLE, "==")(given, token_BT, mask_BT, index_B),
        )

    made = score(np.asarray(answers, np.float32), references(marked), *as_bytes(texts), index)
    expected = (
        last_number_reward(tolerance=1e-4)(texts, texts, answer=answers),
        marked_answer_reward("==")(texts, texts, answer=marked),
    )
    for got, wanted in zip(made, expected, strict=True):
        assert np.isnan(got[0]) and got.dtype == jnp.float32
        assert got[1:].tolist() == wanted[1:]
        assert sum(x == 1.0 for x in wanted) > 40 < sum(x == 0.0 for x in wanted)


def test_marked_answers():
    assert marked_answer("a = b = c d \nmore", "=") == "c d"
    assert marked_answer("nothing", "####") is None and marked_answer("####", "####") == ""
    reward = marked_answer_reward("####")
    assert reward(["p"] * 3, ["#### 1  2", "1 2", "####1"], answer=["1 2", "1 2", 1]) == [1.0, 0.0, 1.0]


def test_answers_of_the_data():
    reward = last_number_reward(tolerance=0.5)
    assert reward(["p"] * 4, ["1.5", "x", "2", "2"], answer=[1, 1, None, "#### 1,002"]) == [
        1.0,
        0.0,
        None,
        0.0,
    ]
    with pytest.raises(ValueError, match="the data has no column 'answer'; it has .'reference'."):
        reward(["p"], ["1"], reference=["1"])
    for answer in ("none", float("nan")):
        with pytest.raises(ValueError, match="the answer .* holds no number"):
            reward(["p"], ["1"], answer=[answer])
    seen = verifier_reward(lambda prompt, text, answer: prompt + text == answer, column="whole")
    assert seen(["a", "a", "a"], ["b", "c", "d"], whole=["ab", "ab", None]) == [1.0, 0.0, None]


def test_what_cannot_be_is_refused():
    for make, words in (
        (lambda: repetition_reward(0), "n must be at least 1"),
        (lambda: repetition_on_device(TABLE, 0), "n must be at least 1"),
        (lambda: distinct_reward(0), "n must be at least 1"),
        (lambda: distinct_on_device(TABLE, 0), "n must be at least 1"),
        (lambda: over_length_reward(3, slope=-1.0), "slope must be above 0"),
        (lambda: over_length_reward(-1), "a length must be finite and at least 0, it is -1"),
        (lambda: near_length_on_device(float("nan"), token_count), "a length must be finite"),
        (lambda: over_length_on_device(3, token_count, slope=0.0), "slope must be above 0"),
        (lambda: last_number_reward(tolerance=-1.0), "tolerance must be at least 0"),
        (lambda: last_number_on_device(TABLE, tolerance=float("nan")), "tolerance must be at least 0"),
        (lambda: marked_answer_reward(""), "the marker must be some characters"),
        (lambda: marked_answer_on_device(TABLE, "a\n"), "the marker must be some characters"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
