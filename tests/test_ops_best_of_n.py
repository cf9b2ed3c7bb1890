"""Best of n against enumeration of all draws from five answers, two of them tied, in float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled

from rlhfjax import ops

P = np.array([0.1, 0.3, 0.05, 0.35, 0.2])
SCORE = np.array([0.5, -1.0, 2.0, 0.5, 0.1])  # answers 0 and 3 are tied
DISTINCT = np.array([0.5, -1.0, 2.0, 0.7, 0.1])
GOLD = np.array([1.0, -0.5, 0.2, 3.0, -2.0])
LOGP = jnp.asarray(np.log(P).astype(np.float32))

distribution = jax.jit(ops.best_of_n_distribution)
divergence = jax.jit(ops.best_of_n_kl)


def enumerated(score, n):
    """Probability that each answer is kept, over all n-tuples; tied draws are kept with equal probability."""
    q = np.zeros(len(P))
    for draw in itertools.product(range(len(P)), repeat=n):
        best = [y for y in draw if score[y] == max(score[y] for y in draw)]
        for y in best:
            q[y] += np.prod(P[list(draw)]) / len(best)
    return q


@pytest.mark.parametrize("score", [SCORE, DISTINCT], ids=["ties", "distinct"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_distribution_and_kl_equal_enumeration(score, n):
    q = enumerated(score, n)
    np.testing.assert_allclose(np.exp(distribution(LOGP, np.float32(score), n=n)), q, rtol=2e-5)
    np.testing.assert_allclose(
        divergence(LOGP, np.float32(score), n=n), np.sum(q * np.log(q / P)), rtol=1e-5, atol=1e-6
    )


def test_keeping_the_first_of_tied_draws_is_the_same_distribution():
    draws = np.array(list(itertools.product(range(len(P)), repeat=3)))
    kept = np.take_along_axis(
        draws, np.asarray(compiled(ops.best_of_n, np.float32(SCORE[draws])))[:, None], axis=1
    )
    q = np.bincount(kept[:, 0], weights=P[draws].prod(axis=1))
    np.testing.assert_allclose(q, enumerated(SCORE, 3), rtol=1e-12)


def test_many_draws_in_float32():
    """Where F(y)^n underflows or is near 1."""
    n = 100_000
    p = np.array([0.5, 0.499, 1e-3 - 1e-5, 1e-5], np.float64)
    upper = 1 - np.cumsum(p)
    with np.errstate(divide="ignore"):
        expected = np.exp(n * np.log1p(-np.maximum(upper, 0))) - np.exp(
            n * np.log1p(-np.minimum(upper + p, 1))
        )
    got = np.exp(distribution(np.float32(np.log(p)), np.arange(4, dtype=np.float32), n=n))
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(got.sum(), 1.0, rtol=1e-4)


def test_impossible_answers_stay_impossible():
    logp = np.append(np.asarray(LOGP), np.float32(-np.inf))
    score = np.append(np.float32(SCORE), np.float32(5.0))
    q = np.exp(distribution(logp, score, n=3))
    np.testing.assert_allclose(q, np.append(enumerated(SCORE, 3), 0.0), rtol=2e-5)
    np.testing.assert_allclose(
        divergence(logp, score, n=3), divergence(LOGP, np.float32(SCORE), n=3), rtol=1e-5
    )


def test_the_formula_for_continuous_scores_is_a_bound_and_the_limit():
    np.testing.assert_allclose(compiled(ops.best_of_n_kl_bound, 4.0), math.log(4) - 3 / 4, rtol=1e-6)
    assert float(compiled(ops.best_of_n_kl_bound, 1.0)) == 0.0
    # 20,000 equally likely answers of distinct scores are almost continuous.
    many = 20_000
    kl = divergence(np.full(many, -math.log(many), np.float32), np.arange(many, dtype=np.float32), n=8)
    np.testing.assert_allclose(kl, compiled(ops.best_of_n_kl_bound, 8.0), rtol=1e-3)
    n = np.array([1.0, 2.0, 5.0, 50.0, 1000.0], np.float32)
    over_n = compiled(jax.vmap(lambda n: ops.best_of_n_kl(LOGP, np.float32(SCORE), n=n)), n)
    over_n, bound = np.asarray(over_n), np.asarray(compiled(ops.best_of_n_kl_bound, n))
    assert (over_n <= bound + 1e-6).all()
    np.testing.assert_allclose(over_n[-1], -math.log(0.05), rtol=1e-5)  # the best answer alone is left


def test_weights_equal_enumeration_of_subsets():
    """Also of a row in which one sample does not count, and with ties."""
    score = np.array([[0.3, 1.0, 1.0, -2.0, 0.5, 1.0], [0.3, np.nan, 2.0, -2.0, 0.5, 0.3]], np.float32)
    mask = np.array([[True] * 6, [True, False, True, True, True, True]])
    for n in (1, 2, 3, 5):
        expected = np.zeros(score.shape)
        for row, members in enumerate(np.flatnonzero(m) for m in mask):
            subsets = list(itertools.combinations(members, n))
            for subset in subsets:
                best = [i for i in subset if score[row, i] == score[row, list(subset)].max()]
                for i in best:
                    expected[row, i] += 1 / len(best) / len(subsets)
        np.testing.assert_allclose(
            compiled(ops.best_of_n_weights, score, n=n, mask=mask), expected, rtol=1e-5
        )


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_estimate_is_unbiased(n):
    """Its mean over all 5^4 sets of four samples is the exact gold of the best of n."""
    draws = np.array(list(itertools.product(range(len(P)), repeat=4)))
    chance = P[draws].prod(axis=1)
    gold, score = np.float32(GOLD[draws]), np.float32(SCORE[draws])
    estimate = np.asarray(jax.jit(lambda g, s: ops.best_of_n_mean(g, s, n=n))(gold, score), np.float64)
    np.testing.assert_allclose(chance @ estimate, enumerated(SCORE, n) @ GOLD, rtol=1e-5)
    by_itself = np.asarray(compiled(ops.best_of_n_mean, gold, n=n), np.float64)
    np.testing.assert_allclose(chance @ by_itself, enumerated(GOLD, n) @ GOLD, rtol=1e-5)


def test_weights_of_many_samples_stay_exact():
    """Against integer binomials, where factorials would overflow."""
    total, n = 2000, 37
    weights = np.asarray(compiled(ops.best_of_n_weights, np.arange(total, dtype=np.float32), n=n))
    whole = math.comb(total, n)
    for i in (total, total - 1, 1900, 1500, 800):
        np.testing.assert_allclose(weights[i - 1], math.comb(i - 1, n - 1) / whole, rtol=1e-4)
    assert (weights[: n - 1] == 0).all()


def test_too_few_samples_give_nan_for_their_row_only():
    mask = np.array([[True, True, True], [True, False, False]])
    got = compiled(ops.best_of_n_mean, np.ones((2, 3), np.float32), n=2, mask=mask)
    np.testing.assert_array_equal(got, [1.0, np.nan])


def test_choice_of_the_best():
    score = np.array([[1.0, 3.0, 3.0], [9.0, -5.0, np.nan], [-np.inf, 0.0, 0.0]], np.float32)
    mask = np.array([[True, True, True], [False, True, False], [True, False, False]])
    np.testing.assert_array_equal(jax.jit(ops.best_of_n)(score, mask), [1, 1, 0])
    assert jax.eval_shape(ops.best_of_n, score[:1]).dtype == jnp.int32


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="n must lie between 1 and the 3 samples of a prompt, got 4"):
        ops.best_of_n_mean(jnp.ones(3), n=4)
    with pytest.raises(TypeError, match="gold must be floating point"):
        ops.best_of_n_mean(np.arange(3), n=1)
    with pytest.raises(ValueError, match="logp must be a vector"):
        ops.best_of_n_kl(LOGP[None], SCORE[None], n=2)
    with pytest.raises(ValueError, match="score must be of shape"):
        ops.best_of_n_distribution(LOGP, jnp.zeros(3), n=2)
