"""Correlations: of numbers, of ranks, and of ranks among the texts of one prompt. NumPy, in float64.

Shapes: N items. A correlation with something constant does not exist and is NaN.
"""

import numpy as np


def average_ranks(x_N: np.ndarray) -> np.ndarray:
    """Ranks from 1 on, float64 [N]; tied items share the mean of theirs."""
    _, inverse, count = np.unique(x_N, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[inverse]


def pearson(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Pearson's correlation; NaN where one of both is constant."""
    x, y = (z - z.mean() for z in _vectors(x_N, y_N))
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if np.ptp(x_N) > 0 and np.ptp(y_N) > 0 and size > 0 else np.nan


def spearman(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Spearman's rank correlation: Pearson's of `average_ranks`; NaN where one of both is constant."""
    x, y = _vectors(x_N, y_N)
    return pearson(average_ranks(x), average_ranks(y))


def kendall_tau_b(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Kendall's tau-b: (concordant - discordant pairs) / sqrt(pairs untied in x * pairs untied in y).

    Kendall 1945; discordant pairs are counted in O(N log N), after Knight 1966. NaN where one of both is constant.
    """
    x, y = _vectors(x_N, y_N)
    x, y = (np.unique(z, return_inverse=True)[1].astype(np.int64) for z in (x, y))
    order = np.lexsort((y, x))
    discordant = _inversions(y[order])
    pairs = len(x) * (len(x) - 1) // 2
    tied_x, tied_y, tied_both = _tied(x), _tied(y), _tied(x * (y.max() + 1) + y)
    concordant = pairs - tied_x - tied_y + tied_both - discordant
    untied = float(pairs - tied_x) * float(pairs - tied_y)
    return float((concordant - discordant) / np.sqrt(untied)) if untied > 0 else np.nan


def _tied(level_N: np.ndarray) -> int:
    """Pairs of equal items."""
    count = np.unique(level_N, return_counts=True)[1].astype(np.int64)
    return int((count * (count - 1) // 2).sum())


def _inversions(level_N: np.ndarray) -> int:
    """Pairs i < j with level_i > level_j, of integers >= 0.

    Bit by bit from the highest: two items whose higher bits agree are decided by the bit at hand. The items are kept
    in stable order of their higher bits, so those that agree stand together.
    """
    level, found = level_N, 0
    for bit in reversed(range(int(level.max()).bit_length())):
        one = (level >> bit) & 1
        above = level >> (bit + 1)
        ones_before = np.cumsum(one) - one
        start = np.flatnonzero(np.r_[True, above[1:] != above[:-1]])
        run = np.repeat(start, np.diff(np.r_[start, len(level)]))
        found += int((ones_before - ones_before[run])[one == 0].sum())
        level = level[np.argsort(level >> bit, kind="stable")]
    return found


def _vectors(x_N: np.ndarray, y_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x_N, np.float64), np.asarray(y_N, np.float64)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise ValueError(
            f"a correlation is of two vectors of equal length; their shapes are {x.shape}, {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a correlation is of finite numbers; leave out the items that have none")
    return x, y
