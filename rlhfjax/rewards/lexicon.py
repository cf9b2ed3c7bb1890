"""Rewards by a lexicon: a number for each word that counts, and the sum or the mean over a completion's words.

Words are what `str.split` gives, in lower case. A word is looked up as it stands, so that ":)" can be found, and if it
is not there without the ASCII punctuation around it.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.rewards.characters import (
    CODES,
    ByteTable,
    Characters,
    code_map,
    fold,
    folded,
    hashes_between,
    hashes_of,
    look_up,
    run_places,
    score_texts,
    space_map,
)

__all__ = ["lexicon_on_device", "lexicon_reward", "vader_lexicon"]

Of = Literal["sum", "mean"]


def lexicon_reward(weights: Mapping[str, float], of: Of = "sum") -> Callable[..., list[float]]:
    """A host reward: the sum of the weights of a completion's words, or their mean over all words; 0 without words.

    weights: word -> weight, in lower or upper case alike. Raises ValueError where there is none, a word is empty or has
    white space in it, has two weights, or one that is not finite.
    """
    weight_of = _checked(weights, of)

    def one(completion: str) -> float:
        words = fold(completion).split()
        total = sum(
            weight_of[word] if word in weight_of else weight_of.get(word.strip(string.punctuation), 0.0)
            for word in words
        )
        return total if of == "sum" else total / max(1, len(words))

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
        del prompts, columns
        return [one(completion) for completion in completions]

    return reward


def lexicon_on_device(
    table: ByteTable, weights: Mapping[str, float], of: Of = "sum"
) -> Callable[..., jax.Array]:
    """`reward(params, token_BT, mask_BT) -> float32 [B]`, as `lexicon_reward` gives it; params are not used.

    table: `byte_table` of the vocabulary. For the rest, and errors, see `lexicon_reward`.
    """
    weight_of = _checked(weights, of)
    words = list(weight_of)
    hash_K2 = hashes_of(words)
    order = np.lexsort((hash_K2[:, 1], hash_K2[:, 0]))
    first_K, second_K = hash_K2[order].T
    weight_K = np.array(list(weight_of.values()), np.float32)[order]
    reach = int(np.unique(first_K, return_counts=True)[1].max())

    def weight_and_found(first_BN: jax.Array, second_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
        place_BN = jnp.searchsorted(jnp.asarray(first_K), first_BN)
        weight_BN, found_BN = jnp.zeros(first_BN.shape), jnp.zeros(first_BN.shape, bool)
        for step in range(reach):  # words of one first hash lie side by side
            at_BN = jnp.minimum(place_BN + step, len(words) - 1)
            same_BN = (jnp.asarray(first_K)[at_BN] == first_BN) & (jnp.asarray(second_K)[at_BN] == second_BN)
            weight_BN = jnp.where(same_BN, jnp.asarray(weight_K)[at_BN], weight_BN)
            found_BN |= same_BN
        return weight_BN, found_BN

    def score(params: object, text: Characters) -> jax.Array:
        del params
        code_BN = folded(text).code_BN
        inside_BN = text.mask_BN & (look_up(space_map(), text.code_BN) == 0)
        start_BN, index_BN, end_BN = run_places(inside_BN)
        # The first and last character of each word that is no punctuation.
        plain_BN = inside_BN & (look_up(_PUNCTUATION, code_BN) == 0)
        last_BN = jax.lax.cummax(jnp.where(plain_BN, index_BN, -1), axis=1)
        behind = code_BN.shape[1]
        following_BN = jax.lax.cummin(jnp.where(plain_BN, index_BN, behind), axis=1, reverse=True)
        core_BN = jnp.minimum(jnp.take_along_axis(following_BN, start_BN, axis=1), behind - 1)
        whole_BN, is_there_BN = weight_and_found(*hashes_between(code_BN, start_BN, index_BN))
        inner_BN, _ = weight_and_found(*hashes_between(code_BN, core_BN, last_BN))
        inner_BN = jnp.where(last_BN >= core_BN, inner_BN, 0.0)
        total_B = jnp.sum(jnp.where(end_BN, jnp.where(is_there_BN, whole_BN, inner_BN), 0.0), axis=1)
        return total_B if of == "sum" else total_B / jnp.maximum(jnp.sum(end_BN, axis=1), 1)

    return score_texts(table, score)


def vader_lexicon() -> dict[str, float]:
    """VADER's words, word -> mean rating from -4 to 4 (Hutto and Gilbert 2014), of the package vaderSentiment.

    VADER itself does more with them: it heeds negation, degree, capitals and exclamation. Words with a space or an
    upper case letter in them are left out, since VADER does not find them either.

    Raises ValueError without the package.
    """
    if find_spec("vaderSentiment") is None:
        raise ValueError("VADER's lexicon is in the package vaderSentiment: pip install vaderSentiment")
    analyzer = import_module("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    return {word: x for word, x in analyzer.lexicon.items() if len(word.split()) == 1 and word == fold(word)}


_PUNCTUATION = code_map(np.isin(np.arange(CODES), [ord(c) for c in string.punctuation]))


def _checked(weights: Mapping[str, float], of: str) -> dict[str, float]:
    """The weights by word in lower case."""
    if of not in ("sum", "mean"):
        raise ValueError(f"of must be 'sum' or 'mean', got {of!r}")
    if not weights:
        raise ValueError("a lexicon needs at least one word")
    found: dict[str, float] = {}
    for word, weight in weights.items():
        if len(word.split()) != 1 or word.split()[0] != word:
            raise ValueError(f"{word!r} is no word: it must be without white space, and not empty")
        if not np.isfinite(weight):
            raise ValueError(f"the weight of {word!r} is {weight}")
        if found.setdefault(fold(word), float(weight)) != weight:
            raise ValueError(
                f"{fold(word)!r} has two weights, {found[fold(word)]} and {weight}; case does not count"
            )
    return found
