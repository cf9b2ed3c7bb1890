"""Best of n: draw n answers, keep the one with the highest score. Its distribution, its KL, and what it gains.

With p the distribution of one draw, p(level) the probability of the scores tied with y's, F(y) that of a
score at most y's and F_(y) that of a lower one:

    q(y) = p(y) / p(level) * (F(y)^n - F_(y)^n)
    KL(q || p) = E_q[log q - log p] <= log n - (n - 1) / n

Among tied draws each is equally likely to be kept; as the draws are alike, keeping the first comes to the same.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhfjax.ops._check import as_float, as_mask, as_number, require_rank


def best_of_n(score: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """Index of the highest score along the last axis, int32 [...]; of tied ones the first.

    Args:
      score: float [..., N], scores of the answers to one prompt.
      mask: bool [..., N], True where the answer may be chosen; others may hold anything. None: all may. Where
        none may, 0.

    >>> int(best_of_n([0.1, 0.7, 0.4]))
    1
    """
    score = as_float("score", score)
    require_rank("score", score, 1, "[..., N]")
    mask = as_mask("mask", mask, score.shape)
    # An eligible -inf must still win over an entry that is not eligible.
    score = jnp.where(mask, jnp.maximum(score, jnp.finfo(score.dtype).min), -jnp.inf)
    return jnp.argmax(score, axis=-1).astype(jnp.int32)


def best_of_n_kl_bound(n: ArrayLike) -> Array:
    """`log n - (n - 1) / n`, nats: KL(best of n || one draw) where no two draws score alike, elementwise.

    Exact for continuous scores (arXiv:2210.10760 and others use it). With finitely many answers it is an
    upper bound (arXiv:2401.01879), which may be far off: the KL never exceeds -log p of the best answers, and
    the bound grows for ever.
    """
    n = as_number("n", n, jnp.shape(n))
    return jnp.log(n) - (n - 1) / n


def best_of_n_distribution(logp: ArrayLike, score: ArrayLike, *, n: ArrayLike) -> Array:
    """Log-probability that each answer is the best of n draws, float32 [N]; see the module for the formula.

    Args:
      logp: float [N], log-probabilities of all answers, which sum to 1; -inf for the impossible.
      score: float [N], finite; equal scores are ties.
      n: scalar >= 1, draws; n = 1 gives logp back.

    Cost N log N. Vectors only: `vmap` over prompts or over n.
    """
    logp = _vector("logp", logp)
    return logp + _log_gain(logp, as_float("score", score, logp.shape), as_number("n", n))


def best_of_n_kl(logp: ArrayLike, score: ArrayLike, *, n: ArrayLike) -> Array:
    """Exact KL(best of n || one draw) on enumerated answers, nats, float32 scalar; arguments as above.

    `sum_y q(y) log(q(y) / p(y))`: at most `best_of_n_kl_bound(n)`, and less with every tie.
    """
    logp = _vector("logp", logp)
    gain = _log_gain(logp, as_float("score", score, logp.shape), as_number("n", n))
    q = jnp.exp(logp + gain)
    return jnp.sum(q * jnp.where(q > 0, gain, 0.0))


def best_of_n_weights(score: ArrayLike, *, n: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """Probability that each of N samples is the best of n drawn from them without replacement, [..., N].

    The i-th lowest of N distinct scores is so with probability C(i - 1, n - 1) / C(N, n); tied ones share
    evenly. `sum(weights * gold)` is the mean of the best's gold over all C(N, n) subsets: an unbiased
    estimate of the gold of best-of-n, of less variance than the mean over N / n groups of n. (Plugging the N
    samples into the distribution of n draws instead draws with replacement, and is biased low.)

    Args:
      score: float [..., N], finite where it counts.
      n: scalar, 1 <= n <= samples that count.
      mask: bool [..., N], True where the sample counts; others may hold anything. None: all do.

    Returns:
      float32 [..., N], which sum to 1; 0 where masked; NaN in a row with fewer than n samples that count.

    Raises:
      ValueError: n below 1 or above N, where n is a Python number.
    """
    score = as_float("score", score)
    require_rank("score", score, 1, "[..., N]")
    total = score.shape[-1]
    if isinstance(n, int) and not 1 <= n <= total:
        raise ValueError(f"n must lie between 1 and the {total} samples of a prompt, got {n}")
    mask = as_mask("mask", mask, score.shape)
    rows = jax.vmap(_weights, (0, 0, None))(
        jnp.where(mask, score, 0.0).reshape(-1, total), mask.reshape(-1, total), as_number("n", n)
    )
    return rows.reshape(score.shape)


def best_of_n_mean(
    gold: ArrayLike, score: ArrayLike | None = None, *, n: ArrayLike, mask: ArrayLike | None = None
) -> Array:
    """Unbiased estimate of E[gold of the best of n by `score`] from N >= n samples of a prompt, float32 [...].

    Args:
      gold: float [..., N], what is measured, in its own unit.
      score: float [..., N], what is chosen by. None: by gold itself, E[max gold of n].
      n, mask: as in `best_of_n_weights`, and so are the errors.

    >>> round(float(best_of_n_mean([0.0, 1.0, 2.0], n=2)), 3)  # the pairs' maxima are 1, 2 and 2
    1.667
    """
    gold = as_float("gold", gold)
    mask = as_mask("mask", mask, gold.shape)
    by = gold if score is None else as_float("score", score, gold.shape)
    return jnp.sum(best_of_n_weights(by, n=n, mask=mask) * jnp.where(mask, gold, 0.0), axis=-1)


def _log_gain(logp_N: Array, score_N: Array, n: Array) -> Array:
    """log q(y) - log p(y) of every answer; 0 where p is 0."""
    order = jnp.argsort(score_N)
    p, score = jnp.exp(logp_N)[order], score_N[order]
    first = jnp.searchsorted(score, score, side="left")  # of those tied with it
    beyond = jnp.searchsorted(score, score, side="right")
    level = jax.ops.segment_sum(p, first, num_segments=len(p))[first]
    # The distribution function from both ends: near 1 its logarithm is that of what is missing.
    zero = jnp.zeros(1, p.dtype)
    at_most = jnp.concatenate([zero, jnp.cumsum(p)])[first] + level
    above = jnp.concatenate([jnp.cumsum(p[::-1])[::-1], zero])[beyond]
    log_at_most = jnp.where(above < 0.5, jnp.log1p(-jnp.clip(above, 0, 0.5)), jnp.log(_nonzero(at_most)))
    # F^n - F_^n = F^n (1 - (1 - level / F)^n), which subtracts no two numbers that are almost equal.
    missed = n * jnp.log1p(-jnp.minimum(level / _nonzero(at_most), 1.0))
    gain = n * log_at_most + jnp.log(-jnp.expm1(missed)) - jnp.log(_nonzero(level))
    gain = jnp.where(level > 0, gain, 0.0)
    return jnp.zeros_like(gain).at[order].set(gain)


def _weights(score_N: Array, mask_N: Array, n: Array) -> Array:
    """`best_of_n_weights` of one row."""
    total = len(score_N)
    order = jnp.lexsort((score_N, mask_N))  # those that do not count come first
    score, mask = score_N[order], mask_N[order]
    rank = jnp.arange(1, total + 1) - jnp.sum(~mask)  # 1 for the lowest that counts
    # C(i, n) / C(N, n), from C(i - 1, n) = C(i, n) (i - n) / i downwards: no factorial, no overflow.
    rank = jnp.maximum(rank, 1).astype(score.dtype)
    shrink = jnp.where(mask, jnp.maximum(rank - n, 0) / rank, 1.0)
    share = jnp.append(jnp.cumprod(shrink[::-1])[::-1][1:], 1.0)
    weight = jnp.where(mask & (rank >= n), share * n / rank, 0.0)
    key = jnp.cumsum(jnp.append(True, (score[1:] != score[:-1]) | (mask[1:] != mask[:-1]))) - 1
    shared = jax.ops.segment_sum(weight, key, num_segments=total)
    tied = jax.ops.segment_sum(jnp.ones(total), key, num_segments=total)
    weight = jnp.where(mask, (shared / jnp.maximum(tied, 1))[key], 0.0)
    weight = jnp.where(jnp.sum(mask) < n, jnp.nan, weight)
    return jnp.zeros_like(weight).at[order].set(weight)


def _vector(name: str, x: ArrayLike) -> Array:
    x = as_float(name, x)
    if x.ndim != 1:
        raise ValueError(
            f"{name} must be a vector [N] of all answers, got shape {x.shape}: vmap over prompts"
        )
    return x


def _nonzero(x: Array) -> Array:
    return jnp.where(x > 0, x, 1.0)
