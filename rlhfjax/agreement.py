"""How far people agree, and what they say of systems that they compared: kappa and Bradley-Terry. NumPy only.

Shapes: N items (or independent groups of comparisons), K categories, S systems.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from rlhfjax.report import Interval

RESAMPLES = 2000


def cohen_kappa(first: Any, second: Any, *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Agreement of two annotators beyond chance: (p - c) / (1 - c) (Cohen 1960), p the share of items on which they
    agree and c that share where each answers at random with the frequencies of theirs.

    first, second: [N] categories of the same items, whole numbers from 0. 1 is perfect agreement and 0 that of chance.
    The interval is a percentile bootstrap over items. All NaN where both know one answer only: nothing is left to
    chance.
    """
    first_N, second_N = _categories(first, "first"), _categories(second, "second")
    if first_N.shape != second_N.shape:
        raise ValueError(
            f"first has {first_N.size} items and second {second_N.size}: kappa needs both of each"
        )
    categories = np.arange(max(first_N.max(), second_N.max()) + 1)
    shares_N2K = np.stack([x[:, None] == categories for x in (first_N, second_N)], axis=1).astype(float)

    def chance(share_R2K: np.ndarray) -> np.ndarray:
        return np.prod(share_R2K, axis=-2).sum(axis=-1)

    return _kappa((first_N == second_N).astype(float), shares_N2K, chance, seed, confidence)


def fleiss_kappa(count: Any, *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Agreement of several annotators beyond chance (Fleiss 1971): (p - c) / (1 - c), p the mean share of pairs of
    annotators that agree on an item and c the sum of the squared frequencies of the categories.

    count: [N, K] how many put item n in category k. Items may have different numbers of annotators, from two on: the
    frequency of a category is then the mean over items of its share (Gwet 2014, section 2.3). With equal numbers it
    is Fleiss's. The interval is a percentile bootstrap over items; all NaN where only one category is used.
    """
    count_NK = np.asarray(count, np.float64)
    if count_NK.ndim != 2 or not count_NK.size:
        raise ValueError(
            f"count must be [items, categories] with something in it, its shape is {count_NK.shape}"
        )
    if (count_NK < 0).any() or (count_NK != np.round(count_NK)).any():
        raise ValueError("count must hold numbers of annotators: whole, and not below 0")
    total_N = count_NK.sum(axis=1)
    if total_N.min() < 2:
        raise ValueError(
            f"item {int(total_N.argmin())} has {int(total_N.min())} annotators; leave out those with fewer than 2"
        )
    agree_N = (count_NK * (count_NK - 1)).sum(axis=1) / (total_N * (total_N - 1))

    def chance(share_R1K: np.ndarray) -> np.ndarray:
        return np.square(share_R1K).sum(axis=(-1, -2))

    return _kappa(agree_N, (count_NK / total_N[:, None])[:, None], chance, seed, confidence)


def bradley_terry(wins: Any, *, prior: float = 0.0, z: float = 1.959964) -> list[Interval]:
    """Strengths s of systems that were compared in pairs: P(i beats j) = sigmoid(s_i - s_j) (Bradley and Terry 1952),
    by maximum likelihood, with mean 0, each with its interval.

    Args:
      wins: [S, S] how often the row's system beat the column's; a tie counts half to each. Or [N, S, S], of N
        independent groups (the prompts): comparisons within one need not be independent then.
      prior: wins that are added each way between two systems that met; 0.5 keeps a system that never lost finite, and
        for two systems makes s_1 - s_2 the log odds of Haldane and Anscombe.
      z: half-width in standard errors; the default gives 95 %. The standard error is that of the Fisher information;
        with groups, that of the sandwich over groups where it is larger.

    Returns:
      S intervals, in nats of odds.

    Raises:
      ValueError: no such numbers exist, since systems can be split in two sets of which none of the one ever beat one
      of the other (Ford 1957); or what is given is no table of wins.
    """
    wins_NSS = np.asarray(wins, np.float64)
    wins_NSS = wins_NSS[None] if wins_NSS.ndim == 2 else wins_NSS
    systems = wins_NSS.shape[-1]
    if wins_NSS.ndim != 3 or wins_NSS.shape[1:] != (systems, systems) or systems < 2:
        raise ValueError(
            f"wins must be [S, S] or [N, S, S] of two systems or more, its shape is {np.shape(wins)}"
        )
    wins_SS = wins_NSS.sum(axis=0)
    if not np.isfinite(wins_SS).all() or wins_NSS.min(initial=0.0) < 0 or np.diagonal(wins_SS).any():
        raise ValueError("wins must be finite, not below 0, and 0 for a system against itself")
    wins_SS = wins_SS + prior * (wins_SS + wins_SS.T > 0)
    _check_connected(wins_SS)
    strength_S = _maximise(wins_SS)
    chance_SS = _sigmoid(strength_S[:, None] - strength_S)
    covariance_SS = _pseudo_inverse(_information(wins_SS, chance_SS))
    variance_S = np.diagonal(covariance_SS)
    if len(wins_NSS) > 1:
        met_NSS = wins_NSS + wins_NSS.swapaxes(1, 2)
        score_NS = (wins_NSS - met_NSS * chance_SS).sum(axis=2) @ covariance_SS
        variance_S = np.maximum(variance_S, np.square(score_NS).sum(axis=0))
    half_S = z * np.sqrt(variance_S)
    return [Interval(float(s), float(s - h), float(s + h)) for s, h in zip(strength_S, half_S, strict=True)]


def _maximise(wins_SS: np.ndarray) -> np.ndarray:
    """Newton's method on the concave log-likelihood; a step is halved until it climbs."""
    met_SS, strength_S = wins_SS + wins_SS.T, np.zeros(len(wins_SS))

    def likelihood(strength_S: np.ndarray) -> float:
        return float((wins_SS * -np.logaddexp(0.0, strength_S - strength_S[:, None])).sum())

    for _ in range(200):
        chance_SS = _sigmoid(strength_S[:, None] - strength_S)
        slope_S = (wins_SS - met_SS * chance_SS).sum(axis=1)
        step_S = _pseudo_inverse(_information(wins_SS, chance_SS)) @ slope_S
        before, size = likelihood(strength_S), 1.0
        while likelihood(strength_S + size * step_S) < before and size > 1e-12:
            size /= 2
        strength_S = strength_S + size * step_S
        if np.abs(step_S).max() < 1e-12:
            break
    return strength_S - strength_S.mean()


def _information(wins_SS: np.ndarray, chance_SS: np.ndarray) -> np.ndarray:
    weight_SS = (wins_SS + wins_SS.T) * chance_SS * (1 - chance_SS)
    return np.diag(weight_SS.sum(axis=1)) - weight_SS


def _pseudo_inverse(laplacian_SS: np.ndarray) -> np.ndarray:
    """Of a matrix whose null space is the constant vectors."""
    mean = np.full_like(laplacian_SS, 1 / len(laplacian_SS))
    return np.linalg.inv(laplacian_SS + mean) - mean


def _check_connected(wins_SS: np.ndarray) -> None:
    reach_SS = (wins_SS > 0) | np.eye(len(wins_SS), dtype=bool)
    for _ in wins_SS:
        reach_SS = reach_SS @ reach_SS
    if not reach_SS.all():
        above, below = np.argwhere(~reach_SS.T)[0]
        raise ValueError(
            f"there is no ranking yet: system {below} never beat system {above}, nor one that did so through others; "
            "compare more, or give a prior"
        )


def _kappa(
    agree_N: np.ndarray,
    share_NAK: np.ndarray,
    chance: Callable[[np.ndarray], np.ndarray],
    seed: int,
    confidence: float,
) -> Interval:
    """(mean agreement - chance) / (1 - chance); chance is a function of the categories' mean shares [..., A, K]."""

    def kappa(weight_RN: np.ndarray) -> np.ndarray:
        c_R = chance(np.tensordot(weight_RN, share_NAK, axes=(-1, 0)))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(c_R < 1 - 1e-12, (weight_RN @ agree_N - c_R) / (1 - c_R), np.nan)

    count = len(agree_N)
    value = float(kappa(np.full(count, 1 / count)))
    if math.isnan(value) or count == 1:
        return Interval(value, math.nan, math.nan)
    drawn_RN = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.nanpercentile(kappa(drawn_RN / count), [tail, 100.0 - tail])
    return Interval(value, float(low), float(high))


def _categories(values: Any, name: str) -> np.ndarray:
    found_N = np.asarray(values)
    if found_N.ndim != 1 or not found_N.size or found_N.dtype.kind not in "iu" or found_N.min() < 0:
        raise ValueError(
            f"{name} must be a vector of whole numbers from 0, one for each item; it is {found_N!r:.80}"
        )
    return found_N


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))
