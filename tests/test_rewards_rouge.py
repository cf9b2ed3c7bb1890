"""ROUGE against the rouge-score package, and its subsequence against a search through all of them."""

import gzip
import json
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from rlhfjax.rewards.rouge import longest_common_subsequence, rouge_l, rouge_l_reward, rouge_n

reproducible = settings(derandomize=True, database=None, deadline=None)
ASSET = Path(__file__).parent.parent / "experiments" / "assets" / "debian_summaries.jsonl.gz"
SCORER = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
texts = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(["a", "b", "c", "A1", "é", "Ka,", ".", "\n"])).map(" ".join),
)


def check(prediction: str, reference: str) -> None:
    expected = SCORER.score(target=reference, prediction=prediction)
    assert rouge_l(prediction, reference) == pytest.approx(expected["rougeL"].fmeasure, abs=1e-12)
    for n in (1, 2):
        assert rouge_n(prediction, reference, n) == pytest.approx(expected[f"rouge{n}"].fmeasure, abs=1e-12)


@reproducible
@given(texts, texts)
def test_equal_to_rouge_score_on_any_text(prediction, reference):
    check(prediction, reference)


def test_equal_to_rouge_score_on_real_text():
    with gzip.open(ASSET, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(300), strict=False)]
    for row, other in zip(rows, rows[1:], strict=False):
        check(row["document"], row["summary"])
        check(row["summary"], other["document"])


@pytest.mark.parametrize("prediction, reference", [("", ""), ("", "a"), ("a", ""), ("é!", "a"), ("a", "b")])
def test_nothing_in_common_is_zero(prediction, reference):
    assert rouge_l(prediction, reference) == 0.0
    assert rouge_n(prediction, reference, 1) == rouge_n(prediction, reference, 2) == 0.0


def test_the_value_by_hand():
    # LCS "the cat mat" = 3 words of 5 and of 4: F1 = 2 * 3 / 9.
    assert rouge_l("The cat is... a MAT", "the cat on mat") == pytest.approx(2 / 3, abs=1e-15)
    assert rouge_n("a b a b", "a b c", 2) == pytest.approx(2 * 1 / (3 + 2), abs=1e-15)
    with pytest.raises(ValueError, match="at least 1"):
        rouge_n("a", "a", 0)


@reproducible
@given(*[st.lists(st.sampled_from("abc"), max_size=7)] * 2)
def test_the_subsequence_is_the_longest_of_all(a, b):
    def subsequences(words):
        return {tuple(c) for n in range(len(words) + 1) for c in combinations(words, n)}

    assert longest_common_subsequence(a, b) == max(map(len, subsequences(a) & subsequences(b)))


def test_the_reward_reads_its_reference_column():
    rewards = rouge_l_reward(["p", "q"], ["a b", "c"], reference=["a b", "d"], other=[1, 2])
    assert rewards == [1.0, 0.0]
    with pytest.raises(ValueError, match="2 completions but 1 references"):
        rouge_l_reward(["p", "q"], ["a b", "c"], reference=["a b"])
