"""pass@k and maj@k against enumeration of all subsets, and of all draws."""

import itertools
import math

import jax
import numpy as np
import pytest
from compiling import compiled

from rlhfjax import ops


def test_pass_at_k_equals_the_share_of_subsets_with_a_right_one():
    total = 6
    correct = np.array([[i < c for i in range(total)] for c in range(total + 1)])
    for k in range(1, total + 1):
        subsets = list(itertools.combinations(range(total), k))
        expected = [np.mean([row[list(subset)].any() for subset in subsets]) for row in correct]
        np.testing.assert_allclose(compiled(ops.pass_at_k, correct, k=k), expected, rtol=1e-6)


def test_pass_at_k_is_unbiased_and_its_plain_form_is_not():
    p, total, k = 0.3, 5, 3
    draws = np.array(list(itertools.product([False, True], repeat=total)))
    chance = np.prod(np.where(draws, p, 1 - p), axis=1)
    found = np.asarray(compiled(ops.pass_at_k, draws, k=k), np.float64)
    exact = 1 - (1 - p) ** k
    np.testing.assert_allclose(chance @ found, exact, rtol=1e-6)
    assert chance @ (1 - (1 - draws.mean(1)) ** k) < exact - 0.05


def test_pass_at_k_of_many_samples_stays_exact():
    """Against whole numbers, where factorials overflow, and a chance far below float32's epsilon of 1."""
    total = 2000
    for right, k in ((1, 1), (3, 7), (500, 4), (1990, 12), (1, 2000)):
        expected = 1 - math.comb(total - right, k) / math.comb(total, k)
        got = compiled(ops.pass_at_k, np.arange(total) < right, k=np.float32(k))
        np.testing.assert_allclose(got, expected, rtol=2e-4)


def test_samples_that_do_not_count_change_nothing_and_too_few_give_nan():
    mask = np.array([[True, False, True, True], [True, False, False, False]])
    correct = np.array([[False, True, True, False], [True, True, True, True]])
    got = compiled(ops.pass_at_k, correct, k=2, mask=mask)
    np.testing.assert_allclose(got, [2 / 3, np.nan], rtol=1e-6)


def test_k_may_be_traced_and_mapped():
    correct = np.array([True, False, False, False])
    got = jax.jit(jax.vmap(lambda k: ops.pass_at_k(correct, k=k)))(np.arange(1, 5))
    np.testing.assert_allclose(got, [0.25, 0.5, 0.75, 1.0], rtol=1e-6)


def test_majority_is_that_of_a_count():
    generator = np.random.default_rng(0)
    answer = generator.integers(0, 4, (50, 7))
    mask = generator.random((50, 7)) < 0.8
    mask[0] = False
    got = np.asarray(compiled(ops.majority, answer, mask=mask))
    for row, counts, weight in zip(answer, mask, got, strict=True):
        votes = {a: int(np.sum(row[counts] == a)) for a in row[counts]}
        most = max(votes.values(), default=0)
        winners = [a for a, n in votes.items() if n == most]
        expected = [
            1 / len(winners) / most if counted and a in winners else 0.0
            for a, counted in zip(row, counts, strict=True)
        ]
        np.testing.assert_allclose(weight, expected, rtol=1e-6)


def test_majority_at_k_is_unbiased():
    """Over all draws of five answers, two groups of two and one left over, against all draws of two."""
    p = np.array([0.5, 0.3, 0.2])  # the first answer is right
    draws = np.array(list(itertools.product(range(3), repeat=5)))
    found = np.asarray(compiled(ops.majority_at_k, draws, draws == 0, k=2), np.float64)
    exact = p[0] ** 2 + 2 * p[0] * (1 - p[0]) / 2  # both vote for it, or a tie that the draw decides
    np.testing.assert_allclose(p[draws].prod(1) @ found, exact, rtol=1e-6)
    three = np.array([[0, 1, 0, 2, 2, 1, 9], [1, 1, 2, 0, 0, 0, 9]])
    np.testing.assert_allclose(compiled(ops.majority_at_k, three, three == 0, k=3), [0.5, 0.5])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="k must lie between 1 and the 3 samples of a problem, got 4"):
        ops.pass_at_k(np.ones(3, bool), k=4)
    with pytest.raises(ValueError, match="k must lie between 1 and the 3 samples of a problem, got 0"):
        ops.majority_at_k(np.zeros(3, np.int32), np.ones(3, bool), k=0)
    with pytest.raises(TypeError, match="correct must be bool"):
        ops.pass_at_k(np.ones(3, np.float32), k=1)
    with pytest.raises(TypeError, match="answer must be integer"):
        ops.majority(np.ones(3, np.float32))
