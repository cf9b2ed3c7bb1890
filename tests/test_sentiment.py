"""Sentiment control: the grammar against a reader of its own, scorers on the device against the host, whole runs."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import start
from test_reasoning_run import SHAPE, STEP, TINY, folder_at

from experiments.stages import configs, guards, sentiment, sentiment_texts, small_base, text
from experiments.stages.results import read_results
from rlhfjax.networks import Branches

CONFIG = configs.Text(base="", data="", prompt_length=10, completion_length=24)
ADJECTIVES = (*sentiment_texts.POSITIVE, *sentiment_texts.NEGATIVE)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> text.Text:
    rows = sentiment_texts.review_rows(0, {"train": 30, "validation": 6, "test": 4})
    folder = folder_at(tmp_path_factory.mktemp("world") / "run")
    words = sentiment_texts.words_of_reviews()
    return text.open_text(small_base.write_world(CONFIG, SHAPE, rows, folder, words=words))


# ---- the reviews


def is_review(completion: str) -> bool:
    """Whether it is a review, word by word: no regular expression."""
    if not completion.endswith("."):
        return False
    words = completion[:-1].split(" ")
    if words[:2] != ["it", "was"]:
        return False
    words = words[2:]
    while True:
        if words and words[0] in sentiment_texts.ADVERBS:
            words = words[1:]
        if not words or words[0] not in ADJECTIVES:
            return False
        words = words[1:]
        if not words:
            return True
        begins = words[0] in ("and", "but") and words[1:2] == ["the"] and words[3:4] == ["was"]
        if not begins or words[2] not in sentiment_texts.NOUNS:
            return False
        words = words[4:]


def broken(completions: list[str]) -> list[str]:
    """Each with a word left out, put twice, or put in the place of another."""
    generator = np.random.default_rng(0)
    found = []
    for completion in completions:
        words = completion.split(" ")
        i, j = generator.integers(len(words), size=2)
        found.append(" ".join(words[:i] + words[i + 1 :]))
        found.append(" ".join([*words[:i], words[i], *words[i:]]))
        found.append(" ".join([*words[:i], words[j], *words[i + 1 :]]))
    return found


def test_the_grammar_is_that_of_a_reader_word_by_word():
    reviews = [sentiment_texts.review(1, i)[1] for i in range(200)]
    texts = reviews + broken(reviews) + ["", "it was good", "it was good.\n", "It was good.", "it was  good."]
    expected = [float(is_review(x)) for x in texts]
    assert sentiment_texts.valid([""] * len(texts), texts) == expected
    assert expected[:200] == [1.0] * 200 and 20 < sum(expected[200:]) < 300


def test_reviews_are_of_one_to_three_clauses_and_as_often_good_as_bad():
    reviews = [sentiment_texts.review(2, i) for i in range(400)]
    assert {x.count(" was ") for _, x in reviews} == {1, 2, 3}
    words = [word.strip(".") for _, x in reviews for word in x.split()]
    good = sum(word in sentiment_texts.POSITIVE for word in words)
    bad = sum(word in sentiment_texts.NEGATIVE for word in words)
    assert 0.42 < good / (good + bad) < 0.58
    assert len(set(sentiment_texts.POSITIVE) | set(sentiment_texts.NEGATIVE)) == len(ADJECTIVES) >= 200


def test_no_prompt_lies_in_two_splits():
    rows = sentiment_texts.review_rows(3, {"train": 300, "validation": 40, "test": 40})
    by_split = {
        x: {row["prompt"] for row in rows if row["split"] == x} for x in ("train", "validation", "test")
    }
    assert [sum(row["split"] == x for row in rows) for x in by_split] == [300, 40, 40]
    assert not by_split["train"] & (by_split["validation"] | by_split["test"])


def test_every_word_of_a_review_is_one_token(loaded):
    train = loaded.load("train")
    assert train.dropped == 0
    for reference, ids in zip(train.references, train.completions, strict=True):
        assert len(ids) == len(reference.split()) + 1 + 1  # the full stop, and the end


# ---- the scorers


def test_vader_knows_the_adjectives_and_nothing_else_of_a_review():
    pytest.importorskip("vaderSentiment")
    score = {word: sentiment_texts.vader([""], [f"it was {word}."])[0] for word in ADJECTIVES}
    assert min(score[word] for word in sentiment_texts.POSITIVE) > 0.1
    assert max(score[word] for word in sentiment_texts.NEGATIVE) < -0.1
    others = (*sentiment_texts.NOUNS, *sentiment_texts.THINGS, *sentiment_texts.KINDS)
    assert set(sentiment_texts.vader([""] * len(others), [f"the {word}." for word in others])) == {0.0}
    weights = sentiment_texts.lexicon()
    # VADER's own squashing of one word's weight.
    for word in ("superb", "awful"):
        x = weights[word]
        np.testing.assert_allclose(score[word], x / np.sqrt(x * x + 15), atol=1e-4)


def test_without_vader_the_lexicon_is_of_the_packages_own_signs(monkeypatch):
    monkeypatch.setattr("experiments.stages.sentiment_texts.find_spec", lambda name: None)
    weights = sentiment_texts.lexicon()
    assert {weights[word] for word in sentiment_texts.POSITIVE} == {2.0}
    assert {weights[word] for word in sentiment_texts.NEGATIVE} == {-2.0}
    sentiment_texts._vader.cache_clear()
    with pytest.raises(ValueError, match="VADER is not installed: pip install vaderSentiment"):
        sentiment_texts.vader([""], ["good"])
    with pytest.raises(ValueError, match="VADER is not installed"):
        sentiment.open_scorer("vader", 0.0)


def test_lexicon_and_grammar_on_the_device_are_those_on_the_host(loaded):
    reviews = [sentiment_texts.review(4, i)[1] for i in range(6)]
    texts = (
        reviews
        + broken(reviews)[:14]
        + ["superb superb superb", "", " it was good.", "it was Bad but the plot"]
    )
    ids = loaded.tokenizer.encode_batch(texts)
    assert max(map(len, ids)) <= 64
    token, mask = np.zeros((len(texts), 1, 64), np.int32), np.zeros((len(texts), 1, 64), bool)
    for i, row in enumerate(ids):
        token[i, 0, : len(row)], mask[i, 0, : len(row)] = row, True
    prompts = loaded.batch(loaded.load("train"), np.zeros(len(texts), int))
    branches = Branches(prompts.token_BP, prompts.mask_BP, jnp.asarray(token), jnp.asarray(mask))
    params, reward = sentiment.lexicon_and_grammar(loaded, 0.5)
    got = jax.jit(reward)(params, branches, prompts.index_B)[:, 0]
    texts = [loaded.tokenizer.decode(row).strip() for row in ids]
    words = np.asarray(sentiment.squashed_lexicon()([""] * len(texts), texts))
    grammar = np.asarray(sentiment_texts.valid([""] * len(texts), texts))
    np.testing.assert_allclose(got, words + 0.5 * grammar, atol=1e-6)
    assert len(set(words.round(3))) >= 10 and 6 < grammar.sum() < 20
    plain = jax.jit(sentiment.lexicon_and_grammar(loaded, 0.0).reward)(None, branches, prompts.index_B)[:, 0]
    np.testing.assert_allclose(plain, words, atol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="--valid-weight -1 must not be negative"):
        sentiment.as_task(-1, None)


# ---- whole runs

SETTINGS: dict[str, Any] = {
    name: TINY[name] for name in ("decoder", "sft", "preferences", "dpo", "evaluation")
} | {
    "methods": ["dpo", "unguarded", "guarded"],
    "reviews": 60,
    "heldout": 8,
    "text": {"completion_length": 12},
    "unguarded": STEP,
    "guarded": STEP | {"steps": 4, "guards": {"window": 1, "patience": 1}},
}


def metrics_of(folder: Path, stage: str) -> list[dict[str, float]]:
    lines = (json.loads(line) for line in (folder / "seed-0" / "metrics.jsonl").open())
    return [line for line in lines if line["stage"] == stage]


@pytest.mark.slow
def test_a_run_tells_grammaticality_and_a_guard_raises_the_kl(tmp_path):
    folder = tmp_path / "run"
    assert start("sentiment", SETTINGS, folder) == 0
    # An untrained policy writes no review: the guard acts at once, and the other one only says so.
    unguarded, guarded = metrics_of(folder, "unguarded"), metrics_of(folder, "guarded")
    assert all(row[sentiment.VALID] < 0.8 for row in unguarded + guarded)
    raised = [row["objective/kl_coefficient"] for row in guarded]
    assert raised[0] == 0.0 and raised[-1] >= 0.05
    assert all(row["objective/kl_coefficient"] == 0.0 for row in unguarded)
    assert guards.PREFIX + "valid" == sentiment.VALID
    methods = [row.method for row in read_results(folder).rows]
    assert methods == ["sft", "sft, greedy", "best of 2", "dpo", "unguarded", "guarded"]
    report = (folder / "report.md").read_text()
    assert "unguarded ends at a reward of" in report and "valid" in report
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 <= summary["guarded, greedy/valid"] <= 1


@pytest.mark.slow
def test_vader_itself_may_be_the_reward(tmp_path):
    pytest.importorskip("vaderSentiment")
    settings = SETTINGS | {"methods": ["unguarded"], "scorer": "vader", "valid_weight": 0.5}
    assert start("sentiment", settings, tmp_path / "run") == 0
    assert len(metrics_of(tmp_path / "run", "unguarded")) == 2
