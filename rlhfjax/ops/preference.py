"""The Bradley-Terry model of preferences (Bradley and Terry, 1952):

P(first preferred) = sigmoid(score_first - score_second)
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhfjax.ops._check import as_float, as_mask, as_number
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
