"""How many labels does a reward model need? A power law through its accuracies at growing numbers of labels.

The excess of error over the least possible falls as excess(n) = a n^-b (Hestness et al. 2017, arXiv:1712.00409; for
language models Kaplan et al. 2020, arXiv:2001.08361): a straight line through the logarithms.

Shapes: S sizes, K held-out pairs, R resamples.
"""

from typing import NamedTuple

import numpy as np

from rlhfjax.rewards.audit.resampling import Estimate, resampled_counts


class LearningCurve(NamedTuple):
    """Accuracies on the same held-out pairs, and the law through them."""

    labels_S: np.ndarray  # int
    accuracy_S: list[Estimate]
    ceiling: float  # accuracy of the best guesser of such labels
    coefficient: float  # a: excess of error at one label
    exponent: float  # b; NaN where the accuracies do not rise


def learning_curve(
    labels_S: np.ndarray, right_SK: np.ndarray, ceiling: float, *, seed: int = 0, resamples: int = 2000
) -> LearningCurve:
    """The curve through reward models trained on `labels_S` labels.

    Args:
      right_SK: bool, whether each model ranks each held-out pair as its label does.
      ceiling: accuracy that no model exceeds: below 1 where labels are noisy (`ops.bayes_accuracy`).

    Raises ValueError for fewer than two sizes, and for a ceiling outside (0.5, 1].
    """
    labels_S, right_SK = np.asarray(labels_S), np.asarray(right_SK, np.float64)
    if (
        right_SK.ndim != 2
        or len(labels_S) != len(right_SK)
        or len(labels_S) < 2
        or (np.diff(labels_S) <= 0).any()
    ):
        raise ValueError(
            f"a learning curve needs growing numbers of labels, each with a row of pairs; got {labels_S.tolist()} and "
            f"pairs of shape {right_SK.shape}"
        )
    if not 0.5 < ceiling <= 1:
        raise ValueError(f"ceiling={ceiling} must lie above 0.5, that of a coin, and be at most 1")
    counts_RK = resampled_counts(right_SK.shape[1], resamples=resamples, seed=seed)
    accuracy_RS = counts_RK @ right_SK.T / right_SK.shape[1]
    low_S, high_S = np.percentile(accuracy_RS, [2.5, 97.5], axis=0)
    mean_S = right_SK.mean(axis=1)
    coefficient, exponent = _law(labels_S, mean_S, ceiling, right_SK.shape[1])
    return LearningCurve(
        labels_S,
        [Estimate(*map(float, three)) for three in zip(mean_S, low_S, high_S, strict=True)],
        ceiling,
        coefficient,
        exponent,
    )


def expected_accuracy(curve: LearningCurve, labels: np.ndarray) -> np.ndarray:
    """Accuracy that the law expects of so many labels; NaN without a law."""
    return curve.ceiling - curve.coefficient * np.asarray(labels, np.float64) ** -curve.exponent


def labels_for(
    labels_S: np.ndarray,
    right_SK: np.ndarray,
    ceiling: float,
    target: float,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Estimate:
    """Labels that the law says an accuracy of `target` needs, with a 95 % interval over held-out pairs.

    Infinite where the accuracies do not rise, as an end of the interval too. A law through few points says little far
    beyond them: tell nobody more than ten times the most labels that were tried.

    Raises ValueError where the target is not below the ceiling.
    """
    if not target < ceiling:
        raise ValueError(
            f"target={target} must lie below the ceiling of {ceiling:.3f}, which no reward model exceeds"
        )
    labels_S, right_SK = np.asarray(labels_S), np.asarray(right_SK, np.float64)
    counts_RK = resampled_counts(right_SK.shape[1], resamples=resamples, seed=seed)
    every = [right_SK.mean(axis=1), *(counts_RK @ right_SK.T / right_SK.shape[1])]
    needed = np.asarray([_needed(labels_S, mean_S, ceiling, target, right_SK.shape[1]) for mean_S in every])
    # Infinite ones are the largest; by rank, since between infinities nothing can be interpolated.
    low, high = np.quantile(needed[1:], [0.025, 0.975], method="nearest")
    return Estimate(float(needed[0]), float(low), float(high))


def _needed(labels_S: np.ndarray, mean_S: np.ndarray, ceiling: float, target: float, pairs: int) -> float:
    coefficient, exponent = _law(labels_S, mean_S, ceiling, pairs)
    if not exponent > 0:
        return np.inf
    return float(np.exp(min(700.0, np.log(coefficient / (ceiling - target)) / exponent)))


def _law(labels_S: np.ndarray, mean_S: np.ndarray, ceiling: float, pairs: int) -> tuple[float, float]:
    """(a, b) by least squares of the logarithms. An excess of less than half a pair is taken as that."""
    excess = np.maximum(ceiling - mean_S, 0.5 / pairs)
    slope, intercept = np.polyfit(np.log(labels_S), np.log(excess), 1)
    return (float(np.exp(intercept)), float(-slope)) if slope < -1e-9 else (np.nan, np.nan)
