"""Intervals by resampling prompts: the texts of one prompt are not independent of each other.

Shapes: N items, U prompts, R resamples, S sums.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A number and its 95 % interval; the ends are NaN where there is one prompt, the number where there is nothing."""

    value: float
    low: float
    high: float


NOTHING = Estimate(np.nan, np.nan, np.nan)


@lru_cache(maxsize=4)
def resampled_counts(prompts: int, *, resamples: int, seed: int) -> np.ndarray:
    """How often each prompt is drawn when as many are drawn with replacement: whole float64 [R, U], for products."""
    generator = np.random.default_rng(seed)
    counts_RU = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples).astype(
        np.float64
    )
    counts_RU.setflags(write=False)  # shared by the cache
    return counts_RU


def estimate_of_sums(
    sum_US: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, seed: int = 0, resamples: int = 2000
) -> Estimate:
    """A statistic of sums over prompts, with its percentile bootstrap interval over prompts (Efron and Tibshirani
    1993, section 13.3).

    Args:
      sum_US: [U, S], what each prompt adds to each sum; rows that hold a NaN are left out.
      statistic: sums [..., S] -> [...], such as a ratio of two of them.
    """
    sum_US = np.asarray(sum_US, np.float64)
    sum_US = sum_US[np.isfinite(sum_US).all(axis=1)]
    if not len(sum_US):
        return NOTHING
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(sum_US.sum(axis=0)))
        if len(sum_US) == 1:
            return Estimate(value, np.nan, np.nan)
        counts_RU = resampled_counts(len(sum_US), resamples=resamples, seed=seed)
        return _interval(value, np.asarray(statistic(counts_RU @ sum_US)))


def mean_estimate(x_U: np.ndarray, *, seed: int = 0, resamples: int = 2000) -> Estimate:
    """The mean over prompts with its interval; NaN entries are left out."""
    x_U = np.asarray(x_U, np.float64)
    return estimate_of_sums(
        np.stack([x_U, np.where(np.isfinite(x_U), 1.0, np.nan)], axis=1),
        lambda sums: sums[..., 0] / sums[..., 1],
        seed=seed,
        resamples=resamples,
    )


def estimate_of_items(
    group_N: np.ndarray, statistic: Callable[[np.ndarray], float], *, seed: int = 0, resamples: int = 200
) -> Estimate:
    """A statistic of items, `statistic(index [M]) -> float`, with its interval: prompts are drawn, each with all its
    items."""
    group_N = np.asarray(group_N)
    if not len(group_N):
        return NOTHING
    value = statistic(np.arange(len(group_N)))
    prompts, group = np.unique(group_N, return_inverse=True)
    if len(prompts) == 1:
        return Estimate(value, np.nan, np.nan)
    counts_RU = resampled_counts(len(prompts), resamples=resamples, seed=seed)
    return _interval(
        value,
        np.asarray(
            [statistic(np.repeat(np.arange(len(group)), times[group])) for times in counts_RU.astype(int)]
        ),
    )


def _interval(value: float, statistic_R: np.ndarray) -> Estimate:
    found = statistic_R[np.isfinite(statistic_R)]
    if not len(found):
        return Estimate(value, np.nan, np.nan)
    return Estimate(value, *map(float, np.percentile(found, [2.5, 97.5])))
