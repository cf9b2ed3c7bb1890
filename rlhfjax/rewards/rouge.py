"""ROUGE as a score and as a reward (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries").

Words are the runs of [a-z0-9] in the lower-cased text, without stemming: the numbers equal those of the
`rouge-score` package with use_stemmer=False.
"""

import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["longest_common_subsequence", "rouge_l", "rouge_l_reward", "rouge_n"]

_WORD = re.compile("[a-z0-9]+")


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, 2PR / (P + R) in [0, 1]; 0 if either text has no word.

    P = LCS / words of the prediction, R = LCS / words of the reference (Lin 2004, section 3, with beta = 1).
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
    if len(completions) != len(reference):
        raise ValueError(f"{len(completions)} completions but {len(reference)} references; give one for each")
    return [rouge_l(completion, text) for completion, text in zip(completions, reference, strict=True)]


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
