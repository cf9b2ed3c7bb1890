"""Numbers and how sure they are: bootstrap and Wilson intervals, calibration, accuracy by margin. NumPy only."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A number and the interval around it, in the number's unit; the ends are NaN if it rests on one item."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.4g} (one item)"
        decimals = _decimals(self.high - self.low)
        if decimals > 6:
            return f"{self.value:.2g} [{self.low:.2g}, {self.high:.2g}]"
        return f"{self.value:.{decimals}f} [{self.low:.{decimals}f}, {self.high:.{decimals}f}]"


class CalibrationBin(NamedTuple):
    """Predictions that fell between two edges, beside what happened."""

    count: int
    predicted: float  # mean predicted probability; NaN where the bin is empty
    observed: (
        Interval  # share of outcomes that were true, with its Wilson interval; NaN where the bin is empty
    )


class MarginBin(NamedTuple):
    """Pairs whose margin, told by the judge, fell between two edges, and how a model did on them."""

    low: float  # least and greatest margin in the bin, in the judge's unit
    high: float
    count: int
    accuracy: Interval  # share in which the model prefers the same one, with its Wilson interval


def bootstrap_interval(
    values: Any,
    seed: int,
    *,
    confidence: float = 0.95,
    statistic: Callable[..., Any] = np.mean,
    resamples: int = 10_000,
) -> Interval:
    """The percentile bootstrap interval of a statistic (Efron and Tibshirani 1993, section 13.3).

    Args:
      values: [N] independent items. Several samples of one prompt are not independent: average them per
        prompt first.
      seed: the same values and seed give the same interval.
      confidence: share of repetitions whose interval holds the true value, 0 < confidence < 1.
      statistic: `f(array, axis=-1)`, such as `np.mean` or `np.median`.
      resamples: how many times the N items are drawn again with replacement.

    Returns:
      The statistic of the values and its interval. One item gives NaN ends: it says nothing of its own
      spread.

    Raises:
      ValueError: no items, a NaN or infinite one (its place is named), or another rank than 1.
    """
    items = _finite_vector(values, "values")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    value = float(statistic(items, axis=-1))
    if items.size == 1:
        return Interval(value, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    block = max(1, 1_000_000 // items.size)  # rows at a time, so that memory does not grow with resamples
    statistics = np.concatenate(
        [
            statistic(
                items[generator.integers(items.size, size=(min(block, resamples - start), items.size))],
                axis=-1,
            )
            for start in range(0, resamples, block)
        ]
    )
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(statistics, [tail, 100.0 - tail])
    return Interval(value, float(low), float(high))


def nested_bootstrap_interval(
    groups: Sequence[Any], seed: int, *, confidence: float = 0.95, resamples: int = 10_000
) -> Interval:
    """The bootstrap interval of a mean over runs, each measured on items: runs are drawn with replacement, then the
    items of each run drawn (the two-stage bootstrap, Davison and Hinkley 1997, section 3.8).

    It holds what comes of the choice of items and what comes of the seed of a run. With three runs the second is told
    roughly: read it beside the lowest and the highest run.

    Args:
      groups: a vector of items [N] for each run, the lengths may differ; the value is the mean of their means.
      seed, confidence, resamples: as in `bootstrap_interval`; so is the interval of one group.

    Raises:
      ValueError: no groups, or what `bootstrap_interval` refuses.
    """
    if not len(groups):
        raise ValueError("there are no groups to take an interval over")
    items = [_finite_vector(group, f"group {number}") for number, group in enumerate(groups)]
    if len(items) == 1:
        return bootstrap_interval(items[0], seed, confidence=confidence, resamples=resamples)
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    generator = np.random.default_rng(seed)
    statistics = np.empty(resamples)
    for number in range(resamples):
        drawn = (items[g] for g in generator.integers(len(items), size=len(items)))
        statistics[number] = np.mean([x[generator.integers(x.size, size=x.size)].mean() for x in drawn])
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(statistics, [tail, 100.0 - tail])
    return Interval(float(np.mean([x.mean() for x in items])), float(low), float(high))


def paired_difference_interval(
    values: Any, baseline: Any, seed: int, *, confidence: float = 0.95, resamples: int = 10_000
) -> Interval:
    """The bootstrap interval of mean(values - baseline), both [N], item i of each from the same prompt.

    Pairing takes out how hard each prompt is, so the interval is narrower than that of two separate samples.

    Raises:
      ValueError: unequal lengths, or what `bootstrap_interval` refuses.
    """
    left, right = _finite_vector(values, "values"), _finite_vector(baseline, "baseline")
    if left.shape != right.shape:
        raise ValueError(
            f"values has {left.size} items and baseline {right.size}: a paired difference needs equal numbers"
        )
    return bootstrap_interval(left - right, seed, confidence=confidence, resamples=resamples)


def wilson_interval(successes: float, trials: int, *, z: float = 1.959964) -> Interval:
    """The interval of a share (Wilson 1927): sensible also for few trials and for shares of 0 and 1.

    Args:
      successes, trials: counts, 0 <= successes <= trials and trials > 0. A tie may count as half a success.
      z: half-width in standard errors; the default gives 95 %.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(
            f"{successes} successes of {trials} trials: need 0 <= successes <= trials and trials > 0"
        )
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # Rounding must not put an end on the wrong side of the share, at 0 and at 1.
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def calibration(probability: Any, outcome: Any, *, bins: int = 10) -> list[CalibrationBin]:
    """How often what was predicted with some probability came true, in `bins` equal bins over [0, 1].

    Args:
      probability: [N] predicted probabilities, for example that the chosen answer of a pair wins.
      outcome: [N] what happened, 0 or 1 (or bool).
      bins: how many; a probability on an edge counts to the bin above it, and 1 to the last.

    Raises:
      ValueError: a probability outside [0, 1], an outcome other than 0 or 1, or unequal lengths.
    """
    predicted, happened = _finite_vector(probability, "probability"), _finite_vector(outcome, "outcome")
    if predicted.shape != happened.shape:
        raise ValueError(f"probability has {predicted.size} items and outcome {happened.size}")
    if predicted.min() < 0 or predicted.max() > 1:
        raise ValueError(f"probability must lie in [0, 1]; it spans {predicted.min()} to {predicted.max()}")
    if not np.isin(happened, (0.0, 1.0)).all():
        raise ValueError(f"outcome must be 0 or 1; it holds {happened[~np.isin(happened, (0.0, 1.0))][0]}")
    place = np.minimum((predicted * bins).astype(int), bins - 1)
    found = []
    for index in range(bins):
        inside = place == index
        count = int(inside.sum())
        if count == 0:
            found.append(CalibrationBin(0, math.nan, Interval(math.nan, math.nan, math.nan)))
        else:
            share = wilson_interval(int(happened[inside].sum()), count)
            found.append(CalibrationBin(count, float(predicted[inside].mean()), share))
    return found


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Expected calibration error: |observed - predicted| averaged over bins, weighted by their counts.

    Guo et al. 2017, arXiv:1706.04599, eq. 3. In units of probability; 0 is perfect.
    """
    filled = [entry for entry in bins if entry.count]
    total = sum(entry.count for entry in filled)
    return sum(entry.count * abs(entry.observed.value - entry.predicted) for entry in filled) / total


def accuracy_by_margin(difference: Any, margin: Any, *, bins: int = 5) -> list[MarginBin]:
    """Accuracy of a reward model on pairs that are easy and pairs that are hard, as the judge's margin tells.

    A model is expected to be right about pairs far apart and no better than chance about those nearly equal;
    where it fails on the former, the mean accuracy hides it.

    Args:
      difference: [N] score of one completion of a pair above the other's, by the model. 0 counts half.
      margin: [N] the same difference by the judge: of a gold score, or of ratings (how much better). Pairs of
        margin 0 have no better completion and are left out.
      bins: groups of about equal numbers, by the size of the margin. Equal margins are never parted, so few
        grades give fewer bins.

    Returns:
      The bins from the hardest pairs on. Their intervals take pairs as independent: with several pairs of one
      prompt they are too narrow.

    Raises:
      ValueError: unequal lengths, a NaN or infinite item, bins below 1, or no pair with a margin.
    """
    predicted, judged = _finite_vector(difference, "difference"), _finite_vector(margin, "margin")
    if predicted.shape != judged.shape:
        raise ValueError(f"difference has {predicted.size} items and margin {judged.size}")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    kept = judged != 0
    if not kept.any():
        raise ValueError("every margin is 0: there is no better completion to agree on")
    size = np.abs(judged[kept])
    agreement = 0.5 * (1.0 + np.sign(predicted[kept]) * np.sign(judged[kept]))
    # By rank, not by value; all of one size go where the first of them goes.
    first = np.searchsorted(np.sort(size), size, side="left")
    place = first * bins // size.size
    found = []
    for index in np.unique(place):
        inside = place == index
        share = wilson_interval(float(agreement[inside].sum()), int(inside.sum()))
        found.append(
            MarginBin(float(size[inside].min()), float(size[inside].max()), int(inside.sum()), share)
        )
    return found


def _finite_vector(values: Any, name: str) -> np.ndarray:
    """`values` as float64 [N], N > 0, or a ValueError that says what is wrong with it."""
    vector = np.asarray(values, np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} must have one axis, of items; its shape is {vector.shape}")
    if vector.size == 0:
        raise ValueError(f"{name} is empty: there is nothing to measure")
    if not np.isfinite(vector).all():
        place = int(np.argmin(np.isfinite(vector)))
        raise ValueError(f"{name}[{place}] is {vector[place]}: every item must be finite")
    return vector


def _decimals(width: float) -> int:
    """Decimals that show two figures of an interval's width: a number should claim no more than is known."""
    if not 0.0 < width < math.inf:
        return 3
    return max(0, 1 - math.floor(math.log10(width)))
