"""Preference labels against the Bradley-Terry law, and preference files."""

import math

import numpy as np
import pytest

from rlhfjax.data.preferences import (
    PreferencePair,
    accuracy_ceiling,
    draw_preferences,
    pair_indices,
    read_preferences,
    same_pairs,
    write_preferences,
)

GOLD = np.array([[0.1, 0.5, 0.3], [2.0, -1.0, 2.0]])


def test_all_pairs_once():
    first_K, second_K = pair_indices(4)
    assert list(zip(first_K.tolist(), second_K.tolist(), strict=True)) == [
        (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="at least 2 samples"):
        pair_indices(1)


def test_probabilities_are_the_sigmoid_of_the_margin():
    drawn = draw_preferences(GOLD, temperature=0.4, seed=3)
    for b, gold_G in enumerate(GOLD.tolist()):
        for k, (i, j) in enumerate([(0, 1), (0, 2), (1, 2)]):
            expected = 1 / (1 + math.exp(-(gold_G[i] - gold_G[j]) / 0.4))
            assert drawn.probability_BK[b, k] == pytest.approx(expected, rel=1e-6)
    assert drawn.label_BK.dtype == drawn.probability_BK.dtype == np.float32
    assert drawn.first_K.dtype == np.int32 and drawn.mask_BK.all()


def test_labels_follow_the_probabilities():
    drawn = draw_preferences(np.tile([[0.0, 0.7]], (20_000, 1)), temperature=1.0, seed=0)
    p = 1 / (1 + math.exp(0.7))
    assert set(np.unique(drawn.label_BK)) == {0.0, 1.0}
    assert drawn.label_BK.mean() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 20_000))
    other = draw_preferences(np.tile([[0.0, 0.7]], (20_000, 1)), temperature=1.0, seed=1)
    agreement = (drawn.label_BK == other.label_BK).mean()  # of two independent draws: p^2 + (1 - p)^2
    assert agreement == pytest.approx(p * p + (1 - p) ** 2, abs=0.02)


def test_a_seed_fixes_the_labels_and_a_cold_judge_is_sure():
    once, again = (draw_preferences(GOLD, temperature=1.0, seed=5) for _ in range(2))
    np.testing.assert_array_equal(once.label_BK, again.label_BK)
    cold = draw_preferences(GOLD, temperature=1e-9, seed=5)
    np.testing.assert_array_equal(cold.label_BK[0], [0.0, 0.0, 1.0])
    assert cold.probability_BK[1].tolist() == [1.0, 0.5, 0.0]


def test_equal_texts_make_no_pair():
    same_BK = same_pairs([["x", "y", "x"], ["u", "v", "w"]])
    assert same_BK.tolist() == [[False, True, False], [False] * 3]
    drawn = draw_preferences(GOLD, temperature=1.0, seed=0, same_BK=same_BK)
    np.testing.assert_array_equal(drawn.mask_BK, ~same_BK)
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        same_pairs([["x", "y"], ["u", "v", "w"]])


def test_the_ceiling_is_the_accuracy_of_one_who_knows_the_gold_score():
    gold_BG = np.linspace(-1, 1, 60_000).reshape(-1, 3)[:, [0, 2, 1]] * 7 % 1.3
    same_BK = np.zeros((20_000, 3), bool)
    same_BK[:, 2] = True
    drawn = draw_preferences(gold_BG, temperature=0.5, seed=2, same_BK=same_BK)
    guess_BK = gold_BG[:, drawn.first_K] > gold_BG[:, drawn.second_K]
    accuracy = (guess_BK == drawn.label_BK)[drawn.mask_BK].mean()
    assert accuracy_ceiling(drawn) == pytest.approx(accuracy, abs=0.01)
    p = drawn.probability_BK[:, :2].astype(np.float64)
    assert accuracy_ceiling(drawn) == pytest.approx(np.where(p > 0.5, p, 1 - p).mean(), rel=1e-12)
    with pytest.raises(ValueError, match="no pair is left"):
        accuracy_ceiling(drawn._replace(mask_BK=np.zeros_like(same_BK)))


@pytest.mark.parametrize(
    "gold, temperature, same, message",
    [
        (GOLD[0], 1.0, None, r"\[prompts, samples\]"),
        (GOLD, 0.0, None, "temperature must be above 0 .*: 0.0"),
        (GOLD, math.nan, None, "temperature"),
        (np.where(GOLD == 0.5, np.nan, GOLD), 1.0, None, "prompt 0, sample 1"),
        (GOLD, 1.0, np.zeros((2, 2), bool), r"same_BK must be \(2, 3\)"),
    ],
)
def test_bad_scores_are_refused(gold, temperature, same, message):
    with pytest.raises(ValueError, match=message):
        draw_preferences(gold, temperature=temperature, seed=0, same_BK=same)


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_files_come_back_and_repeat_byte_for_byte(tmp_path, name):
    pairs = [PreferencePair("p", "good é", "bad"), PreferencePair("p\n", "a", "b")]
    write_preferences(tmp_path / name, pairs)
    content = (tmp_path / name).read_bytes()
    write_preferences(tmp_path / name, iter(pairs))
    assert (tmp_path / name).read_bytes() == content
    assert name.endswith(".jsonl") or content[4:8] == bytes(4)  # gzip's time stamp
    assert read_preferences(tmp_path / name) == pairs


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": "p", "chosen": "a"}\n')
    with pytest.raises(ValueError, match="bad.jsonl:2: no field 'rejected'"):
        read_preferences(path)
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "a"}\n')
    with pytest.raises(ValueError, match="bad.jsonl, row 1: chosen and rejected are the same text"):
        read_preferences(path)
    with pytest.raises(ValueError, match="row 1: chosen and rejected"):
        write_preferences(path, [PreferencePair("p", "a", "a")])
