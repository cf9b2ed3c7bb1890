"""Kappa against worked examples of the literature, Bradley-Terry against closed forms and the MM algorithm."""

import math

import numpy as np
import pytest

from rlhfjax.agreement import bradley_terry, cohen_kappa, fleiss_kappa

# The worked example of Fleiss's kappa in textbooks: 10 items, 14 annotators, 5 categories.
TEXTBOOK = """
0 0 0 0 14 / 0 2 6 4 2 / 0 0 3 5 6 / 0 3 9 2 0 / 2 2 8 1 1 / 7 7 0 0 0 / 3 2 6 3 0 / 2 5 3 2 2 / 6 5 2 1 0 / 0 2 2 3 7
"""
# Fleiss 1971, table 1: diagnoses of 30 patients by 6 psychiatrists each.
FLEISS_1971 = """
0 0 0 6 0 / 0 3 0 0 3 / 0 1 4 0 1 / 0 0 0 0 6 / 0 3 0 3 0 / 2 0 4 0 0 / 0 0 4 0 2 / 2 0 3 1 0 / 2 0 0 4 0 / 0 0 0 0 6 /
1 0 0 5 0 / 1 1 0 4 0 / 0 3 3 0 0 / 1 0 0 5 0 / 0 2 0 3 1 / 0 0 5 0 1 / 3 0 0 1 2 / 5 1 0 0 0 / 0 2 0 4 0 / 1 0 2 0 3 /
0 0 0 0 6 / 0 1 0 5 0 / 0 2 0 1 3 / 2 0 0 4 0 / 1 0 0 4 1 / 0 5 0 1 0 / 4 0 0 0 2 / 0 2 0 4 0 / 1 0 5 0 0 / 0 0 0 0 6
"""


def table(text: str) -> np.ndarray:
    return np.asarray([[int(x) for x in row.split()] for row in text.strip().split("/")])


@pytest.mark.parametrize(("text", "kappa"), [(TEXTBOOK, 0.210), (FLEISS_1971, 0.430)])
def test_kappa_of_several_equals_the_published_one(text, kappa):
    found = fleiss_kappa(table(text))
    assert found.value == pytest.approx(kappa, abs=5e-4)
    assert found.low < found.value < found.high


def test_kappa_of_items_with_different_numbers_of_annotators_by_hand():
    # Agreement: 1, 1/3; shares of the first category: 1, 2/3, their mean 5/6.
    agree, chance = (1 + 1 / 3) / 2, (5 / 6) ** 2 + (1 / 6) ** 2
    found = fleiss_kappa([[2, 0], [2, 1]])
    assert found.value == pytest.approx((agree - chance) / (1 - chance))


def test_kappa_of_two_by_hand():
    # 20 and 15 of 50 agree: p = 0.7; chance 0.5 x 0.6 + 0.5 x 0.4 = 0.5.
    first, second = np.repeat([0, 0, 1, 1], [20, 5, 10, 15]), np.repeat([0, 1, 0, 1], [20, 5, 10, 15])
    found = cohen_kappa(first, second)
    assert found.value == pytest.approx(0.4)
    # The large-sample standard error of Fleiss, Cohen and Everitt 1969 is 0.127 here.
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 0.127, rel=0.1)
    assert cohen_kappa([0, 1, 0], [1, 0, 1]).value == pytest.approx(-0.8)
    assert math.isnan(cohen_kappa([1, 1, 1], [1, 1, 1]).value)


def test_bad_counts_are_named():
    with pytest.raises(ValueError, match="item 1 has 1 annotators"):
        fleiss_kappa([[2, 0], [1, 0]])
    with pytest.raises(ValueError, match="first has 2 items and second 3"):
        cohen_kappa([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="whole numbers"):
        cohen_kappa([0.5, 1.0], [0, 1])


# ------------------------------------------------------------------------------------------------------ Bradley-Terry


def minorise_maximise(wins: np.ndarray) -> np.ndarray:
    """Hunter 2004, equation 3, as loops."""
    count = len(wins)
    gamma = [1.0] * count
    for _ in range(20_000):
        for i in range(count):
            won = sum(wins[i][j] for j in range(count))
            others = (j for j in range(count) if j != i)
            gamma[i] = won / sum((wins[i][j] + wins[j][i]) / (gamma[i] + gamma[j]) for j in others)
    strength = [math.log(x) for x in gamma]
    return np.asarray(strength) - sum(strength) / count


def test_strengths_equal_those_of_minorise_maximise():
    wins = np.asarray([[0, 7, 2.5, 9], [3, 0, 4, 1], [0.5, 6, 0, 30], [1, 0, 5, 0]])
    found = bradley_terry(wins)
    np.testing.assert_allclose([x.value for x in found], minorise_maximise(wins), atol=1e-9)


def test_two_systems_in_closed_form():
    first, second = bradley_terry([[0, 12], [5, 0]])
    assert first.value - second.value == pytest.approx(math.log(12 / 5))
    # The standard error of a log odds is sqrt(1/12 + 1/5); a strength is half of it.
    assert (first.high - first.low) / 2 == pytest.approx(1.959964 * math.sqrt(1 / 12 + 1 / 5) / 2)
    first, second = bradley_terry([[0, 20], [0, 0]], prior=0.5)
    assert first.value - second.value == pytest.approx(math.log(20.5 / 0.5))


def test_answers_to_one_prompt_count_as_one_where_they_always_agree():
    one, other = np.asarray([[0, 1], [0, 0]]), np.asarray([[0, 0], [1, 0]])
    groups = np.stack([4 * one] * 12 + [4 * other] * 5)  # four annotators, of one mind on every prompt
    clustered, naive = bradley_terry(groups)[0], bradley_terry(groups.sum(0))[0]
    assert clustered.value == pytest.approx(naive.value)
    # As wide as that of 17 answers, not of 68.
    assert clustered.high - clustered.low == pytest.approx(2 * (naive.high - naive.low))


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    generator, truth = np.random.default_rng(0), np.asarray([0.8, 0.0, -0.8])
    hits = []
    for _ in range(200):
        wins = np.zeros((3, 3))
        for i, j in ((0, 1), (0, 2), (1, 2)):
            wins[i, j] = generator.binomial(60, 1 / (1 + math.exp(truth[j] - truth[i])))
            wins[j, i] = 60 - wins[i, j]
        hits += [x.low < t < x.high for x, t in zip(bradley_terry(wins), truth, strict=True)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.03)


def test_no_ranking_without_comparisons_that_join_the_systems():
    with pytest.raises(ValueError, match="system 1 never beat system 0"):
        bradley_terry([[0, 3], [0, 0]])
    apart = np.zeros((4, 4))
    apart[0, 1] = apart[1, 0] = apart[2, 3] = apart[3, 2] = 5
    with pytest.raises(ValueError, match="never beat"):
        bradley_terry(apart, prior=0.5)
    with pytest.raises(ValueError, match="against itself"):
        bradley_terry([[1, 3], [2, 0]])
