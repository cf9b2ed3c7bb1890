"""Is there anything to learn from a reward? Its spread, above all among the texts of one prompt, its ties and noise.

Shapes: N items (texts), `group_N` telling the prompt of each, U prompts. A reward that does not apply is NaN.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhfjax.rewards.audit.agreement import pairs_within
from rlhfjax.rewards.audit.resampling import NOTHING, Estimate, estimate_of_sums, mean_estimate


class Spread(NamedTuple):
    """How a reward is distributed."""

    applies: float  # share of texts that get a number
    mean: float
    std: float
    levels: int  # different numbers
    mode: float  # share of texts that get the commonest one
    groups: int  # prompts with several different texts
    zero: Estimate  # share of those prompts whose texts all get the same
    within_std: float  # root mean variance among the texts of one prompt
    within_share: float  # of all variance, the part within prompts
    ties: Estimate  # share of pairs of different texts of one prompt that get the same


def spread(reward_N: np.ndarray, group_N: np.ndarray, texts_N: Sequence[str], *, seed: int = 0) -> Spread:
    """The spread of a reward over texts and among the different texts of one prompt.

    A group whose rewards are all equal gives no gradient: every advantage is 0 (arXiv:2503.14476 drops such groups).
    Equal texts of a prompt are no tie, and a prompt whose texts are all equal is no group.
    """
    reward, group = np.asarray(reward_N, np.float64), np.asarray(group_N)
    if not reward.shape == group.shape == (len(texts_N),):
        raise ValueError(
            f"reward {reward.shape}, group {group.shape} and {len(texts_N)} texts must be of one length"
        )
    known = np.isfinite(reward)
    applies = float(known.mean())
    reward, group = reward[known], group[known]
    texts = np.unique(np.asarray(list(texts_N), dtype=object)[known].astype(str), return_inverse=True)[1]
    if not len(reward):
        return Spread(0.0, np.nan, np.nan, 0, np.nan, 0, NOTHING, np.nan, np.nan, NOTHING)
    _, counts = np.unique(reward, return_counts=True)
    first, second = pairs_within(group)
    differ = texts[first] != texts[second]
    first, second = first[differ], second[differ]
    prompt = np.unique(group[first], return_inverse=True)[1]
    tied = np.bincount(prompt, weights=reward[first] == reward[second])
    pairs = np.bincount(prompt)
    sums = np.stack([tied, pairs], axis=1) if len(pairs) else np.zeros((0, 2))
    within = within_variance(reward, group)
    return Spread(
        applies=applies,
        mean=float(reward.mean()),
        std=float(reward.std()),
        levels=len(counts),
        mode=float(counts.max() / len(reward)),
        groups=len(pairs),
        zero=mean_estimate((tied == pairs).astype(float), seed=seed),
        within_std=float(np.sqrt(within)),
        within_share=float(min(1.0, within / reward.var())) if reward.std() > 0 else np.nan,
        ties=estimate_of_sums(sums, lambda s: s[..., 0] / s[..., 1], seed=seed),
    )


def within_variance(x_N: np.ndarray, group_N: np.ndarray) -> float:
    """Variance among the items of one group, pooled: sum of squares / (items - groups), over groups of two and more."""
    group = np.unique(group_N, return_inverse=True)[1]
    count = np.bincount(group)
    mean = np.bincount(group, weights=x_N) / count
    square = np.bincount(group, weights=np.square(x_N - mean[group]))[count > 1].sum()
    freedom = (count[count > 1] - 1).sum()
    return float(square / freedom) if freedom else np.nan


class Noise(NamedTuple):
    """What differs between equal texts."""

    texts: int  # scored again, or equal to another one
    changed: float  # share of texts, or of pairs of equal ones, whose number differs
    std: float  # of one call
    reliability: float  # share of the variance within prompts that is not noise: 1 none, 0 all


def repeat_noise(first_N: np.ndarray, second_N: np.ndarray, *, within_std: float) -> Noise:
    """The noise of a reward asked twice for the same texts, in `within_std` (of `spread`) as the unit of signal."""
    first, second = (np.asarray(x, np.float64) for x in (first_N, second_N))
    known = np.isfinite(first) & np.isfinite(second)
    # A text that the reward applies to only once is noise too, but has no size.
    only_once = np.isfinite(first) != np.isfinite(second)
    difference = (first - second)[known]
    if not len(first) or not (known | only_once).any():
        return Noise(0, np.nan, np.nan, np.nan)
    std = float(np.sqrt(np.mean(np.square(difference)) / 2)) if len(difference) else np.nan
    changed = (np.count_nonzero(difference) + only_once.sum()) / (known | only_once).sum()
    return Noise(int((known | only_once).sum()), float(changed), std, _reliability(std, within_std))


def duplicate_noise(
    reward_N: np.ndarray, prompts_N: Sequence[str], texts_N: Sequence[str], *, within_std: float
) -> Noise:
    """The same, from equal texts of equal prompts that are in the data several times."""
    reward = np.asarray(reward_N, np.float64)
    known = np.isfinite(reward)
    same: dict[tuple[str, str], int] = {}
    key = np.asarray(
        [same.setdefault(pair, len(same)) for pair in zip(prompts_N, texts_N, strict=True)], np.int64
    )
    reward, key = reward[known], key[known]
    first, second = pairs_within(key)
    if not len(first):
        return Noise(0, np.nan, np.nan, np.nan)
    std = float(np.sqrt(within_variance(reward, key)))
    changed = float(np.mean(reward[first] != reward[second]))
    return Noise(len(np.unique(np.r_[first, second])), changed, std, _reliability(std, within_std))


def calls_for(reliability: float, target: float = 0.9) -> int:
    """Calls to average for noise to be at most 1 - target of the variance within prompts (Spearman and Brown 1910)."""
    if reliability >= target:
        return 1
    if reliability <= 0:
        raise ValueError(
            f"reliability={reliability}: what is all noise does not become a signal by averaging"
        )
    return int(np.ceil(target * (1 - reliability) / (reliability * (1 - target)) - 1e-9))


def _reliability(std: float, within_std: float) -> float:
    return float(np.clip(1 - (std / within_std) ** 2, 0.0, 1.0)) if within_std > 0 else np.nan
