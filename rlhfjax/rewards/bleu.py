"""BLEU of one text (Papineni et al. 2002), and the exact match.

BLEU is the geometric mean of the precisions of word n-grams, n = 1 to 4, times exp(1 - reference length / length) where
the text is the shorter one. Of one text, orders that it is too short for are left out, and the k-th order without a
match counts as 1 / 2^k matches (Chen and Cherry 2014, method 3). In [0, 1]; a hundred times that is sacrebleu's
`sentence_bleu`, on the device and by default with tokenize="none": words as `str.split` gives them.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax.rewards.characters import ByteTable, Characters, fold, folded, score_against_references, words
from rlhfjax.rewards.host import paired
from rlhfjax.rewards.ngrams import clipped_matches, orders, same_lists

__all__ = [
    "bleu",
    "bleu_on_device",
    "bleu_reward",
    "exact_match_on_device",
    "exact_match_reward",
    "words_13a",
]

ORDERS = 4
Tokenize = Callable[[str], Sequence[str]]


def bleu(prediction: str, reference: str, *, tokenize: Tokenize = str.split) -> float:
    """BLEU of one text against one reference, in [0, 1]; 0 where no word of it is right.

    tokenize: text -> words; `words_13a` is what sacrebleu does by default.
    """
    a, b = tokenize(prediction), tokenize(reference)
    logs, misses = [], 0
    for n in range(1, min(ORDERS, len(a)) + 1):
        in_a, in_b = (Counter(zip(*(x[i:] for i in range(n)), strict=False)) for x in (a, b))
        common = (in_a & in_b).total()
        if n == 1 and not common:
            return 0.0
        misses += not common
        logs.append(math.log((common or 0.5**misses) / in_a.total()))
    shorter = min(0.0, 1 - len(b) / len(a)) if a else 0.0
    return math.exp(shorter + sum(logs) / len(logs)) if logs else 0.0


def bleu_reward(tokenize: Tokenize = str.split) -> Callable[..., list[float]]:
    """A host reward: `bleu` of each completion against the `reference` of its row."""

    def reward(
        prompts: Sequence[str], completions: Sequence[str], *, reference: Sequence[str], **columns: object
    ) -> list[float]:
        del prompts, columns
        return [
            bleu(completion, text, tokenize=tokenize) for completion, text in paired(completions, reference)
        ]

    return reward


def words_13a(text: str) -> list[str]:
    """Words and punctuation as the WMT's script cuts them ("13a"): by sacrebleu. Raises ValueError without it."""
    return _tokenizer_13a()(text.rstrip()).split()


def bleu_on_device(table: ByteTable) -> Callable[..., jax.Array]:
    """`reward(references, token_BT, mask_BT, index_B) -> bleu` by `str.split`, float32 [B] in [0, 1].

    table: `byte_table` of the vocabulary. Of the reward: `references(texts)` are its params; index_B int, the row of
    each; NaN where there is none.
    """

    def score(text: Characters, reference: Characters) -> jax.Array:
        a, b = (orders(words(x), ORDERS) for x in (text, reference))
        common_NB = clipped_matches(a, b)
        there_NB = a.count > 0
        misses_NB = jnp.cumsum((common_NB == 0) & there_NB, axis=0)
        matches_NB = jnp.where(
            common_NB > 0, common_NB.astype(jnp.float32), jnp.exp2(-misses_NB.astype(jnp.float32))
        )
        log_NB = jnp.where(there_NB, jnp.log(matches_NB / jnp.maximum(a.count, 1)), 0.0)
        mean_B = jnp.sum(log_NB, axis=0) / jnp.maximum(jnp.sum(there_NB, axis=0), 1)
        shorter_B = jnp.minimum(0.0, 1 - b.count[0] / jnp.maximum(a.count[0], 1))
        return jnp.where(common_NB[0] > 0, jnp.exp(shorter_B + mean_B), 0.0)

    return score_against_references(table, score)


def exact_match_reward(*, case: bool = True) -> Callable[..., list[float]]:
    """A host reward: 1.0 where a completion has the words of the `reference` of its row and no others, else 0.0.

    White space is where `str.split` cuts, and how much there is does not count. case: whether it counts; see `fold`.

    >>> exact_match_reward(case=False)([""], ["A  tool"], reference=["a tool"])
    [1.0]
    """
    as_words: Tokenize = str.split if case else lambda text: fold(text).split()

    def reward(
        prompts: Sequence[str], completions: Sequence[str], *, reference: Sequence[str], **columns: object
    ) -> list[float]:
        del prompts, columns
        return [
            float(as_words(completion) == as_words(text))
            for completion, text in paired(completions, reference)
        ]

    return reward


def exact_match_on_device(table: ByteTable, *, case: bool = True) -> Callable[..., jax.Array]:
    """`reward(references, token_BT, mask_BT, index_B) -> 0 or 1`, float32 [B]; otherwise as `bleu_on_device`."""

    def score(text: Characters, reference: Characters) -> jax.Array:
        a, b = (words(x if case else folded(x)) for x in (text, reference))
        return same_lists(a, b)

    return score_against_references(table, score)


@lru_cache(maxsize=1)
def _tokenizer_13a() -> Any:
    if find_spec("sacrebleu") is None:
        raise ValueError('words_13a needs sacrebleu: pip install "rlhfjax[eval]"; or give another `tokenize`')
    return import_module("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
