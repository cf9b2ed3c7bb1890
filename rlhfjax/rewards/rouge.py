"""ROUGE as a score and as a reward (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries").

Words are the runs of [a-z0-9] in the lower-cased text, without stemming: the numbers equal those of the
`rouge-score` package with use_stemmer=False. The forms on the device give the same to float32's precision.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.rewards.characters import (
    CODES,
    ByteTable,
    Characters,
    CodeMap,
    Items,
    code_map,
    look_up,
    runs,
    score_against_references,
)
from rlhfjax.rewards.host import paired
from rlhfjax.rewards.ngrams import clipped_matches, n_grams, subsequence_length

__all__ = [
    "longest_common_subsequence",
    "rouge_l",
    "rouge_l_on_device",
    "rouge_l_reward",
    "rouge_n",
    "rouge_n_on_device",
    "rouge_n_reward",
]

_WORD = re.compile("[a-z0-9]+")


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, 2PR / (P + R) in [0, 1]; 0 if either text has no word.

    P = LCS / words of the prediction, R = LCS / words of the reference (Lin 2004, section 3, with beta = 1).

    >>> round(rouge_l("a tool for mail", "tool to sort mail"), 2)  # "tool mail": 2 of 4 words of each
    0.5
    """
    a, b = _words(prediction), _words(reference)
    return _f1(longest_common_subsequence(a, b), len(a), len(b))


def rouge_n(prediction: str, reference: str, n: int) -> float:
    """F1 of the n-grams of words that both texts have, each counted as often as both have it. In [0, 1]."""
    if n < 1:
        raise ValueError(f"n must be at least 1, it is {n}")
    a, b = _ngrams(_words(prediction), n), _ngrams(_words(reference), n)
    return _f1((a & b).total(), a.total(), b.total())


def rouge_l_reward(
    prompts: Sequence[str], completions: Sequence[str], *, reference: Sequence[str], **columns: object
) -> list[float]:
    """`rouge_l` of each completion against the reference of its row; the signature of a host reward."""
    del prompts, columns
    return [rouge_l(completion, text) for completion, text in paired(completions, reference)]


def rouge_n_reward(n: int) -> Callable[..., list[float]]:
    """A host reward: `rouge_n` of each completion against the `reference` of its row."""
    rouge_n("", "", n)

    def reward(
        prompts: Sequence[str], completions: Sequence[str], *, reference: Sequence[str], **columns: object
    ) -> list[float]:
        del prompts, columns
        return [rouge_n(completion, text, n) for completion, text in paired(completions, reference)]

    return reward


def rouge_l_on_device(table: ByteTable) -> Callable[..., jax.Array]:
    """`reward(references, token_BT, mask_BT, index_B) -> rouge_l`, float32 [B] in [0, 1].

    table: `byte_table` of the vocabulary. Of the reward: `references(texts)` are its params; index_B int, the row of
    each; NaN where there is none.
    """

    def score(text: Characters, reference: Characters) -> jax.Array:
        a, b = _word_items(text), _word_items(reference)
        return _f1_of(subsequence_length(a, b), a, b)

    return score_against_references(table, score)


def rouge_n_on_device(table: ByteTable, n: int) -> Callable[..., jax.Array]:
    """`reward(references, token_BT, mask_BT, index_B) -> rouge_n`, float32 [B]; otherwise as `rouge_l_on_device`."""
    rouge_n("", "", n)

    def score(text: Characters, reference: Characters) -> jax.Array:
        a, b = n_grams(_word_items(text), n), n_grams(_word_items(reference), n)
        return _f1_of(clipped_matches(a, b), a, b)

    return score_against_references(table, score)


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence of two lists of words.

    Bit-parallel (Hyyro 2004, "Bit-parallel LCS-length computation revisited"): bit i of `row` is 0 where the
    length grows at a[i], and one addition on integers of |a| bits does the work of a whole row of the table.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & full
    return len(a) - row.bit_count()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _f1(common: int, in_prediction: int, in_reference: int) -> float:
    """2PR / (P + R) in one division: P = common / in_prediction, R = common / in_reference."""
    return 2.0 * common / (in_prediction + in_reference) if common else 0.0


_DOTTED_I = (
    0x130  # the only character whose lower case is a letter of a to z with something behind it, no letter
)


@lru_cache(maxsize=1)
def _letters() -> CodeMap:
    """Of each code point the letter of [a-z0-9] that its lower case begins with; 0: none."""
    letters = np.zeros(CODES, np.int32)
    for code in range(0x20000):  # no letter above has a case
        if not 0xD800 <= code < 0xE000 and _WORD.match(small := chr(code).lower()):
            letters[code] = ord(small[0])
    return code_map(letters)


def _word_items(text: Characters) -> Items:
    letter_BN = look_up(_letters(), text.code_BN)
    return runs(letter_BN, text.mask_BN & (letter_BN > 0), text.code_BN == _DOTTED_I)


def _f1_of(common_B: jax.Array, a: Items, b: Items) -> jax.Array:
    return 2.0 * common_B / jnp.maximum(a.count + b.count, 1)
