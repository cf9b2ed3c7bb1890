"""How much a text repeats itself, in words as `str.split` gives them, in lower case: rewards on the host and device.

Share of n-grams that were there before (0: none; Welleck et al. 2019 call it seq-rep-n, arXiv 1908.04319), share that
are distinct (Li et al. 2016, distinct-n, arXiv 1510.03055), and the longest run of words that is there twice.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from rlhfjax.rewards.characters import ByteTable, Characters, Items, fold, folded, score_texts, words
from rlhfjax.rewards.ngrams import count_distinct, longest_repeat, n_grams

__all__ = [
    "distinct_on_device",
    "distinct_reward",
    "longest_repeat_on_device",
    "longest_repeat_reward",
    "repetition_on_device",
    "repetition_reward",
]


def repetition_reward(n: int = 3) -> Callable[..., list[float]]:
    """A host reward: minus the share of a completion's n-grams that stand in it before, in (-1, 0]; 0 without any."""
    _checked(n)
    return _on_host(lambda text: -_repeated(text, n) if len(text) >= n else 0.0)


def repetition_on_device(table: ByteTable, n: int = 3) -> Callable[..., jax.Array]:
    """`reward(params, token_BT, mask_BT) -> float32 [B]`, as `repetition_reward` gives it; params are not used."""
    _checked(n)

    def score(items: Items) -> jax.Array:
        grams = n_grams(items, n)
        return (count_distinct(grams) - grams.count) / jnp.maximum(grams.count, 1)

    return _on_device(table, score)


def distinct_reward(n: int = 1) -> Callable[..., list[float]]:
    """A host reward: distinct n-grams of a completion by n-grams, in [0, 1]; 0 without any."""
    _checked(n)
    return _on_host(lambda text: 1.0 - _repeated(text, n) if len(text) >= n else 0.0)


def distinct_on_device(table: ByteTable, n: int = 1) -> Callable[..., jax.Array]:
    """`reward(params, token_BT, mask_BT) -> float32 [B]`, as `distinct_reward` gives it; params are not used."""
    _checked(n)

    def score(items: Items) -> jax.Array:
        grams = n_grams(items, n)
        return count_distinct(grams) / jnp.maximum(grams.count, 1)

    return _on_device(table, score)


def longest_repeat_reward() -> Callable[..., list[float]]:
    """A host reward: minus the words of the longest run that a completion has twice; overlaps count: "a a a" has 2."""
    return _on_host(lambda text: -float(_longest(text)))


def longest_repeat_on_device(table: ByteTable) -> Callable[..., jax.Array]:
    """`reward(params, token_BT, mask_BT) -> float32 [B]`, as `longest_repeat_reward` gives it; params are not used."""
    return _on_device(table, lambda items: -longest_repeat(items))


def _on_host(score: Callable[[list[str]], float]) -> Callable[..., list[float]]:
    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
        del prompts, columns
        return [score(fold(completion).split()) for completion in completions]

    return reward


def _on_device(table: ByteTable, score: Callable[[Items], jax.Array]) -> Callable[..., jax.Array]:
    def of_text(params: object, text: Characters) -> jax.Array:
        del params
        return score(words(folded(text)))

    return score_texts(table, of_text)


def _repeated(text: list[str], n: int) -> float:
    grams = list(zip(*(text[i:] for i in range(n)), strict=False))
    return 1.0 - len(set(grams)) / len(grams)


def _longest(text: list[str]) -> int:
    """By the lengths of the runs that end at word i and at a later word j and are equal."""
    longest, run = 0, [0] * (len(text) + 1)
    for i, word in enumerate(text):
        run = [0] * (i + 2) + [run[j] + 1 if text[j] == word else 0 for j in range(i + 1, len(text))]
        longest = max(longest, *run)
    return longest


def _checked(n: int) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1, it is {n}")
