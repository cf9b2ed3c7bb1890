"""Models of preferences over scores.

Bradley and Terry (1952), of two:    P(first preferred) = sigmoid(score_first - score_second)
Plackett (1975) and Luce (1959), of a ranking: its places are filled from the best on, each by a choice among
those that are left, P(i chosen) = softmax(score of those left)[i]. Of two it is Bradley and Terry's.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhfjax.ops._check import as_float, as_index, as_mask, as_number, require_rank
from rlhfjax.ops.masked import masked_mean


def bradley_terry_loss(
    score_chosen: ArrayLike, score_rejected: ArrayLike, *, label: ArrayLike = 1.0, margin: ArrayLike = 0.0
) -> Array:
    """Negative log-likelihood of a preference, elementwise, in nats; with `d = score_chosen - score_rejected`

        -label * log sigmoid(d - margin) - (1 - label) * log sigmoid(-d - margin)

    At the defaults, `-log sigmoid(d)` (arXiv:2203.02155 eq. 1). Swapping the two scores and replacing the
    label by `1 - label` changes nothing.

    Args:
      score_chosen: float, any shape: score of the first answer, by convention the preferred one.
      score_rejected: the same shape: score of the second.
      label: scalar or the same shape: probability in [0, 1] that the first is preferred (1 - label smoothing,
        or a share of raters).
      margin: scalar or the same shape, >= 0: lead asked of the preferred answer, in units of score
        (arXiv:2307.09288 eq. 2).

    Returns:
      float32, shape of score_chosen.

    >>> round(float(bradley_terry_loss(1.0, 1.0)), 3)  # log 2: a tie
    0.693
    """
    score_chosen = as_float("score_chosen", score_chosen)
    difference = score_chosen - as_float("score_rejected", score_rejected, score_chosen.shape)
    label = as_number("label", label, score_chosen.shape)
    margin = as_number("margin", margin, score_chosen.shape)
    logp_first = jax.nn.log_sigmoid(difference - margin)
    logp_second = jax.nn.log_sigmoid(-difference - margin)
    return -label * logp_first - (1 - label) * logp_second


def bradley_terry_probability(
    score_chosen: ArrayLike, score_rejected: ArrayLike, *, temperature: ArrayLike = 1.0
) -> Array:
    """`sigmoid((score_chosen - score_rejected) / temperature)`: probability that the first is preferred,
    elementwise.

    Args:
      score_chosen, score_rejected: float, equal shapes.
      temperature: scalar or the same shape, > 0, in units of score: the larger, the noisier the rater.
    """
    score_chosen = as_float("score_chosen", score_chosen)
    difference = score_chosen - as_float("score_rejected", score_rejected, score_chosen.shape)
    return jax.nn.sigmoid(difference / as_number("temperature", temperature, score_chosen.shape))


def plackett_luce_loss(
    score: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    places: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
) -> tuple[Array, Array]:
    """Negative log-likelihood of a ranking by its choices, in nats; with s_1 the score of the best

        loss_p = log sum_{q >= p} exp(s_q) - s_p        choice of place p among those not yet placed

    The sum over places is the ranking's (Plackett 1975). One place, p = 1, is the choice of the best of n:
    -log softmax(s)[1] (Ziegler et al. 2019, arXiv:1909.08593, best of 4).

    Args:
      score: float [..., G], from the best to the worst.
      mask: bool [..., G], True where the entry takes part; others are left out of every choice and may hold
        anything, also NaN. None: all do.
      places: int, scalar or [...]: how many top places are judged; the order of the rest says nothing. None:
        all.
      label_smoothing: scalar in [0, 1): probability that a choice fell on one of the others, uniformly.

    Returns:
      loss, float32 [..., G], 0 where no choice was made; and which choices count, bool [..., G]: those at a
      judged place with at least two left to choose from.
    """
    score = as_float("score", score)
    require_rank("score", score, 1, "[..., G]")
    mask = as_mask("mask", mask, score.shape)
    entries, lead = score.shape[-1], score.shape[:-1]
    shape = (*lead, entries, entries)  # [..., p, q]: q may be chosen at place p
    itself = jnp.broadcast_to(jnp.eye(entries, dtype=bool), shape)
    left = jnp.broadcast_to(jnp.triu(jnp.ones((entries, entries), bool)), shape) & mask[..., None, :]
    choices = jnp.sum(left, -1, dtype=jnp.int32)
    counts = mask & (choices > 1)
    if places is not None:
        place = jnp.cumsum(mask, -1, dtype=jnp.int32) - 1
        counts &= place < _per_ranking("places", places, lead)[..., None]

    # Replaced before any arithmetic; where nothing is left, the entry itself keeps the softmax finite.
    logits = jnp.broadcast_to(jnp.where(mask, score, 0.0)[..., None, :], shape)
    logp = jax.nn.log_softmax(jnp.where(left | itself, logits, -jnp.inf))
    chosen = jnp.sum(jnp.where(itself, logp, 0.0), -1)
    others = jnp.sum(jnp.where(left & ~itself, logp, 0.0), -1) / jnp.maximum(choices - 1, 1)
    smoothing = as_number("label_smoothing", label_smoothing)
    return jnp.where(counts, -(1 - smoothing) * chosen - smoothing * others, 0.0), counts


def fit_temperature(
    logit: ArrayLike, label: ArrayLike, mask: ArrayLike | None = None, *, iterations: int = 40
) -> Array:
    """The temperature T > 0 that makes `sigmoid(logit / T)` the likeliest on held-out labels
    (arXiv:1706.04599).

    Least mean of `-label * log sigmoid(a logit) - (1 - label) * log sigmoid(-a logit)` over a = 1 / T: convex
    in a, so the root of the slope by Newton's method, kept in a bracket by bisection. Accuracy stays as it
    is. T > 1 says that the scores were too sure, T < 1 that they were too shy.

    a stays within 1e-3 and 1e3, in units of 1 / root mean square of the logits. Labels that are all predicted
    rightly have no best T: the one given is so small that every prediction is certain in float32. Labels that
    are predicted worse than by chance give the largest T.

    Args:
      logit: float, any shape: score_first - score_second of pairs, or the logit of a step.
      label: scalar or the same shape: probability in [0, 1] of the first, or that the step is right.
      mask: bool, the same shape: True where an item counts, others may hold anything. None: all do.
      iterations: steps of the search; 40 are enough for float32.

    Returns:
      float32 scalar; 1 where nothing counts or all logits are 0.
    """
    logit = as_float("logit", logit)
    mask = as_mask("mask", mask, logit.shape)
    label = jnp.where(mask, jnp.broadcast_to(as_number("label", label, logit.shape), logit.shape), 0.5)
    unit = jnp.sqrt(masked_mean(jnp.square(jnp.where(mask, logit, 0.0)), mask))
    scaled = jnp.where(mask, logit, 0.0) / jnp.where(unit > 0, unit, 1.0)

    def search(_, carry):
        low, high, a = carry
        p = jax.nn.sigmoid(a * scaled)
        slope = masked_mean((p - label) * scaled, mask)
        curvature = masked_mean(p * (1 - p) * jnp.square(scaled), mask)
        low, high = jnp.where(slope < 0, a, low), jnp.where(slope > 0, a, high)
        newton = a - slope / jnp.where(curvature > 0, curvature, 1.0)
        inside = (newton > low) & (newton < high) & (curvature > 0)
        # Bisection of the logarithm: the bracket spans six powers of ten.
        return low, high, jnp.where(slope == 0, a, jnp.where(inside, newton, jnp.sqrt(low * high)))

    ends = tuple(jnp.asarray(x, scaled.dtype) for x in (1e-3, 1e3, 1.0))
    a = jax.lax.fori_loop(0, iterations, search, ends)[2]
    return jnp.where(unit > 0, unit / a, 1.0)


def bayes_accuracy(probability: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """Accuracy of the best possible judge of noisy preferences: the mean of `max(p, 1 - p)` over pairs that
    count.

    No reward model can be expected to exceed it on labels drawn with these probabilities, however good it is.

    Args:
      probability: float, any shape: probability that the first answer of a pair is labelled as preferred.
      mask: bool, the same shape: True where a pair counts. None: all do.

    Returns:
      float32 scalar in [0.5, 1].
    """
    probability = as_float("probability", probability)
    return masked_mean(jnp.maximum(probability, 1 - probability), as_mask("mask", mask, probability.shape))


def _per_ranking(name: str, x: ArrayLike, shape: tuple[int, ...]) -> Array:
    """int32 of `shape`, from an integer array of it or one integer for all."""
    return jnp.broadcast_to(as_index(name, x, shape if jnp.ndim(x) else ()), shape)
