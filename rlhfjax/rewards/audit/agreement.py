"""How far a reward agrees with gold scores or preferences, or with any other number of the same texts.

Rewards of a text are NaN where the reward does not apply, gold where it is not known; such items are left out.

Shapes: N items (texts), `group_N` telling the prompt of each, U prompts, K pairs.
"""

from typing import NamedTuple

import jax
import numpy as np

from rlhfjax.ops import fit_temperature
from rlhfjax.rewards.audit.ranks import average_ranks, kendall_tau_b
from rlhfjax.rewards.audit.resampling import NOTHING, Estimate, estimate_of_items, estimate_of_sums


class Pairs(NamedTuple):
    """Pairs of texts of one prompt, as indices of items: the first is the better one."""

    winner_K: np.ndarray
    loser_K: np.ndarray


def pairs_within(group_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of items of one prompt, (first_K, second_K) with first < second."""
    group = np.unique(group_N, return_inverse=True)[1] if len(group_N) else np.zeros(0, np.int64)
    order = np.argsort(group, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(group))[:-1]) if len(group) else []
    found = [(m[i], m[j]) for m in members for i, j in [np.triu_indices(len(m), k=1)]]
    first, second = (
        np.concatenate([pair[side] for pair in found]) if found else np.zeros(0, np.int64) for side in (0, 1)
    )
    return first, second


def gold_pairs(gold_N: np.ndarray, group_N: np.ndarray) -> Pairs:
    """The pairs of one prompt whose gold scores differ."""
    first, second = pairs_within(group_N)
    gold = np.asarray(gold_N, np.float64)
    above, below = gold[first] > gold[second], gold[first] < gold[second]  # False where one is NaN
    return Pairs(np.where(above, first, second)[above | below], np.where(above, second, first)[above | below])


def pair_accuracy(reward_N: np.ndarray, pairs: Pairs, group_N: np.ndarray, *, seed: int = 0) -> Estimate:
    """Share of pairs in which the better text has the higher reward; equal rewards count half.

    The interval is over prompts.
    """
    margin, group = _margins(reward_N, pairs, group_N)
    if not len(margin):
        return NOTHING
    group = np.unique(group, return_inverse=True)[1]
    right = np.bincount(group, weights=0.5 * (1 + np.sign(margin)))
    return estimate_of_sums(
        np.stack([right, np.bincount(group)], axis=1), lambda sums: sums[..., 0] / sums[..., 1], seed=seed
    )


def within_prompt_tau(x_N: np.ndarray, y_N: np.ndarray, group_N: np.ndarray, *, seed: int = 0) -> Estimate:
    """Kendall's tau-b over the pairs of texts of one prompt: what choosing among samples depends on.

    Differences between prompts play no part. NaN where x or y never differs within a prompt.
    """
    x, y, group = _both(x_N, y_N, group_N)
    first, second = pairs_within(group)
    if not len(first):
        return NOTHING
    sign_x, sign_y = (np.sign(z[first] - z[second]) for z in (x, y))
    prompt = np.unique(group[first], return_inverse=True)[1]
    sums = [np.bincount(prompt, weights=z) for z in (sign_x * sign_y, abs(sign_x), abs(sign_y))]
    return estimate_of_sums(
        np.stack(sums, axis=1), lambda s: s[..., 0] / np.sqrt(s[..., 1] * s[..., 2]), seed=seed
    )


def spearman_estimate(x_N: np.ndarray, y_N: np.ndarray, group_N: np.ndarray, *, seed: int = 0) -> Estimate:
    """Spearman's correlation over all texts, with an interval over prompts.

    For the interval the ranks stay those among all texts, so that it is one of sums.
    """
    x, y, group = _both(x_N, y_N, group_N)
    if not len(x):
        return NOTHING
    x, y = average_ranks(x), average_ranks(y)
    x, y = x - x.mean(), y - y.mean()
    prompt = np.unique(group, return_inverse=True)[1]
    sums = np.stack(
        [np.bincount(prompt, weights=z) for z in (np.ones(len(x)), x, y, x * x, y * y, x * y)], axis=1
    )

    def correlation(s: np.ndarray) -> np.ndarray:
        n, x, y, xx, yy, xy = (s[..., i] for i in range(6))
        return (xy - x * y / n) / np.sqrt((xx - x * x / n) * (yy - y * y / n))

    return estimate_of_sums(sums, correlation, seed=seed)


def kendall_estimate(x_N: np.ndarray, y_N: np.ndarray, group_N: np.ndarray, *, seed: int = 0) -> Estimate:
    """Kendall's tau-b over all texts, with an interval over prompts."""
    x, y, group = _both(x_N, y_N, group_N)
    return estimate_of_items(group, lambda index: kendall_tau_b(x[index], y[index]), seed=seed)


class Calibration(NamedTuple):
    """How sure a reward is of pairs, and how right: P(the higher is better) = sigmoid(margin / temperature)."""

    temperature: float  # fitted, in units of reward
    probability_K: np.ndarray  # float64 [K], at least 0.5: that the text of higher reward is the better one
    right_K: np.ndarray  # bool [K]


def calibrate(reward_N: np.ndarray, pairs: Pairs) -> Calibration:
    """Fits the one temperature of Bradley and Terry on the pairs whose rewards differ (arXiv:1706.04599).

    Two texts whose rewards differ by the temperature are told apart rightly 73 % of the time, if the fit is good.
    """
    margin, _ = _margins(reward_N, pairs, np.zeros(len(reward_N), np.int64))
    margin = margin[margin != 0]
    if not len(margin):
        return Calibration(np.nan, np.zeros(0), np.zeros(0, bool))
    # Scaled, since rewards may be beyond float32.
    unit = np.sqrt(np.mean(np.square(margin / np.abs(margin).max()))) * np.abs(margin).max()
    # Filled up, so that few programs are compiled.
    scaled = np.zeros(2 ** int(np.ceil(np.log2(len(margin)))), np.float32)
    scaled[: len(margin)] = margin / unit
    temperature = float(_fitted(scaled, np.arange(len(scaled)) < len(margin))) * unit
    return Calibration(temperature, 0.5 * (1 + np.tanh(np.abs(margin) / (2 * temperature))), margin > 0)


@jax.jit
def _fitted(margin_K: jax.Array, mask_K: jax.Array) -> jax.Array:
    return fit_temperature(margin_K, 1.0, mask_K)


def _margins(reward_N: np.ndarray, pairs: Pairs, group_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reward of the better less that of the worse, and the prompt, of the pairs where both have one."""
    reward = np.asarray(reward_N, np.float64)
    margin = reward[pairs.winner_K] - reward[pairs.loser_K]
    known = np.isfinite(margin)
    return margin[known], np.asarray(group_N)[pairs.winner_K][known]


def _both(x_N: np.ndarray, y_N: np.ndarray, group_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y, group = np.asarray(x_N, np.float64), np.asarray(y_N, np.float64), np.asarray(group_N)
    if not x.shape == y.shape == group.shape or x.ndim != 1:
        raise ValueError(
            f"two numbers and a prompt for each text: their shapes are {x.shape}, {y.shape}, {group.shape}"
        )
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known], group[known]
