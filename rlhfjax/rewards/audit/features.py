"""Shallow features of texts: what a reward should not be a disguise of.

Shapes: N items (texts), `group_N` telling the prompt of each.
"""

import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rlhfjax.rewards.audit.agreement import spearman_estimate, within_prompt_tau
from rlhfjax.rewards.audit.resampling import Estimate


def words(text: str) -> float:
    """Words, cut at white space."""
    return float(len(text.split()))


def distinct_2(text: str) -> float:
    """Different pairs of neighbouring words / all of them (arXiv:1510.03055); 1 where there are none."""
    split = text.lower().split()
    pairs = list(zip(split, split[1:], strict=False))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def punctuation(text: str) -> float:
    """Share of characters that are ASCII punctuation; 0 of an empty text."""
    return sum(character in string.punctuation for character in text) / max(1, len(text))


def overlap(prompt: str, text: str) -> float:
    """Share of the text's words that the prompt has; 0 of an empty text."""
    known, split = set(prompt.lower().split()), text.lower().split()
    return sum(word in known for word in split) / max(1, len(split))


FEATURES: Mapping[str, Callable[[str, str], float]] = {
    "words": lambda prompt, text: words(text),
    "characters": lambda prompt, text: float(len(text)),
    "distinct-2": lambda prompt, text: distinct_2(text),
    "punctuation": lambda prompt, text: punctuation(text),
    "words from the prompt": overlap,
}


def shallow_features(prompts_N: Sequence[str], texts_N: Sequence[str]) -> dict[str, np.ndarray]:
    """Name -> float64 [N], of every feature."""
    return {
        name: np.asarray([feature(p, t) for p, t in zip(prompts_N, texts_N, strict=True)], np.float64)
        for name, feature in FEATURES.items()
    }


def feature_correlations(
    reward_N: np.ndarray, features: Mapping[str, np.ndarray], group_N: np.ndarray, *, seed: int = 0
) -> dict[str, tuple[Estimate, Estimate]]:
    """Name -> (Spearman's correlation over all texts, tau-b among the texts of one prompt)."""
    return {
        name: (
            spearman_estimate(reward_N, x_N, group_N, seed=seed),
            within_prompt_tau(reward_N, x_N, group_N, seed=seed),
        )
        for name, x_N in features.items()
    }


def reward_words(
    reward_N: np.ndarray, texts_N: Sequence[str], group_N: np.ndarray, *, count: int = 8
) -> list[str]:
    """The words whose presence goes with a high reward, the strongest first, at most `count`.

    By the t statistic of the reward, its prompt's mean taken off, between texts with the word and without; of words in
    at least three texts (and 1 % of them) that are not in all. Fewer where fewer go with a higher reward.
    """
    reward, group = np.asarray(reward_N, np.float64), np.unique(group_N, return_inverse=True)[1]
    known = np.isfinite(reward)
    size = np.bincount(group[known], minlength=group.max() + 1)
    mean = np.bincount(group[known], weights=reward[known], minlength=len(size)) / np.maximum(size, 1)
    # Prompts of a single text have nothing to compare it with: all texts are compared then.
    alone = not (size > 1).any()
    residual = reward - (reward[known].mean() if alone and known.any() else mean[group])
    having = [set(text.lower().split()) for text in texts_N]
    total = int(known.sum())
    least = max(3, total // 100)
    frequency = Counter(word for word_set, ok in zip(having, known, strict=True) if ok for word in word_set)
    strength = {}
    for word, number in frequency.items():
        if least <= number < total:
            present = np.asarray([word in word_set for word_set in having]) & known
            absent = ~present & known
            gap = residual[present].mean() - residual[absent].mean()
            error = residual[known].std() * np.sqrt(1 / number + 1 / (total - number))
            if gap > 0 and error > 0:
                strength[word] = gap / error
    return sorted(strength, key=lambda word: (-strength[word], word))[:count]
