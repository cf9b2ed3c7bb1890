"""Lexicons: the device against the host, the host against a count by hand and against VADER's own list of words."""

import string

import jax
import numpy as np
import pytest
from reward_texts import MASK_BT, TABLE, TEXTS, TOKEN_BT
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer, SentiText

from rlhfjax.rewards import lexicon_on_device, lexicon_reward, vader_lexicon
from rlhfjax.rewards.characters import fold
from rlhfjax.rewards.lexicon import Of

WEIGHTS = {
    "good": 2.0,
    ":)": 1.5,
    "DON'T": -1.0,
    "no": -0.25,
    "K": 0.125,
    "σ": 4.0,
    "library": 0.5,
    "--": 8.0,
}

OFS: tuple[Of, Of] = ("sum", "mean")


def test_the_sum_by_hand():
    reward = lexicon_reward(WEIGHTS)
    texts = [
        "Good, good: GOOD! goods",
        ":) :)) (don't)",
        "No no--no --no! -- \u212a",
        "Σ ς",
        "",
        "...",
        "not a word",
    ]
    assert reward(texts, texts) == [6.0, 1.5 - 1.0, -0.25 - 0.25 + 8.0 + 0.125, 4.0, 0.0, 0.0, 0.0]
    assert lexicon_reward(WEIGHTS, "mean")(texts, texts)[:2] == [6.0 / 4, 0.5 / 3]


def test_the_device_gives_what_the_host_gives():
    found = {fold(word) for text in TEXTS for word in text.split()}
    weights = {word: i % 13 / 7 for i, word in enumerate(sorted(found)) if i % 2} | {"good": 1.0, ":)": 3.0}
    made = {of: lexicon_on_device(TABLE, weights, of) for of in OFS}
    got = jax.jit(lambda token, mask: {of: reward(None, token, mask) for of, reward in made.items()})(
        TOKEN_BT, MASK_BT
    )
    for of in OFS:
        expected = lexicon_reward(weights, of)(TEXTS, TEXTS, other=TEXTS)
        assert len(set(expected)) > 30 and got[of].dtype == np.float32
        np.testing.assert_allclose(got[of], expected, atol=1e-6)


def test_two_words_of_one_first_hash_are_told_apart(monkeypatch):
    """As if the first hash were useless: the second decides."""
    from rlhfjax.rewards import lexicon

    hashes, between = lexicon.hashes_of, lexicon.hashes_between
    monkeypatch.setattr(lexicon, "hashes_of", lambda texts: hashes(texts) * np.array([0, 1], np.uint32))

    def of_second(*where):
        first, second = between(*where)
        return first * np.uint32(0), second

    monkeypatch.setattr(lexicon, "hashes_between", of_second)
    got = jax.jit(lexicon_on_device(TABLE, WEIGHTS))(None, TOKEN_BT, MASK_BT)
    np.testing.assert_allclose(got, lexicon_reward(WEIGHTS)(TEXTS, TEXTS), atol=1e-6)


def test_vaders_words_are_found_where_vader_finds_them():
    """VADER does not look a word up as it stands where more than two characters are left of it, as of "d-:<"."""
    lexicon, own = vader_lexicon(), SentimentIntensityAnalyzer().lexicon
    assert len(lexicon) > 7_000 and min(lexicon.values()) >= -4 and max(lexicon.values()) <= 4
    alone = [word for word in [*own, "the"] if len(word.split()) == 1]
    inner = {word: word.strip(string.punctuation) for word in alone}
    texts = [word for word in alone if inner[word] == word or len(inner[word]) <= 2]
    texts += [f"({word.upper()})!" for word in alone if inner[word] == word and len(word) > 2]
    expected = [own.get(SentiText(text).words_and_emoticons[0].lower(), 0.0) for text in texts]
    assert lexicon_reward(lexicon)(texts, texts) == expected


def test_a_lexicon_that_cannot_be_is_refused():
    for weights, what in (
        ({}, "at least one word"),
        ({"fed up": 1.0}, "'fed up' is no word"),
        ({"": 1.0}, "'' is no word"),
        ({" a": 1.0}, "' a' is no word"),
        ({"a": float("nan")}, "weight of 'a' is nan"),
        ({"a": 1.0, "A": 2.0}, "'a' has two weights, 1.0 and 2.0"),
    ):
        for make in (lexicon_reward, lambda weights: lexicon_on_device(TABLE, weights)):
            with pytest.raises(ValueError, match=what):
                make(weights)
    assert lexicon_reward({"a": 1.0, "A": 1.0})([""], ["a"]) == [1.0]
    with pytest.raises(ValueError, match="of must be 'sum' or 'mean'"):
        lexicon_reward({"a": 1.0}, "max")  # pyright: ignore[reportArgumentType]
