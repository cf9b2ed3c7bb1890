"""chrF, an F-score of n-grams of characters (Popovic 2015, "chrF: character n-gram F-score for automatic MT
evaluation").

White space is left out. Per order n = 1 to 6, precision = matches / n-grams of the completion, recall = matches /
n-grams of the reference; both are averaged over the orders that either text is long enough for, and

    chrF = (1 + beta^2) P R / (beta^2 P + R),    beta = 2: recall counts for more

in [0, 1]. A hundred times that is what sacrebleu gives with its defaults.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from rlhfjax.rewards.characters import (
    ByteTable,
    Characters,
    character_items,
    score_against_references,
    without_space,
)
from rlhfjax.rewards.host import paired
from rlhfjax.rewards.ngrams import clipped_matches, orders

__all__ = ["chrf", "chrf_on_device", "chrf_reward"]


def chrf(prediction: str, reference: str, *, order: int = 6, beta: float = 2.0) -> float:
    """chrF of one text against one reference, in [0, 1]; 0 where one of them has no character.

    Raises ValueError for an order below 1 and a beta that is not above 0.
    """
    _check(order, beta)
    a, b = ("".join(text.split()) for text in (prediction, reference))
    precisions, recalls = [], []
    for n in range(1, min(order, len(a), len(b)) + 1):
        in_a, in_b = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (a, b))
        common = (in_a & in_b).total()
        precisions.append(common / in_a.total())
        recalls.append(common / in_b.total())
    total = beta**2 * sum(precisions) + sum(recalls)
    return (1 + beta**2) * sum(precisions) * sum(recalls) / (len(recalls) * total) if total else 0.0


def chrf_reward(
    prompts: Sequence[str], completions: Sequence[str], *, reference: Sequence[str], **columns: object
) -> list[float]:
    """`chrf` of each completion against the reference of its row; the signature of a host reward."""
    del prompts, columns
    return [chrf(completion, text) for completion, text in paired(completions, reference)]


def chrf_on_device(table: ByteTable, *, order: int = 6, beta: float = 2.0) -> Callable[..., jax.Array]:
    """`reward(references, token_BT, mask_BT, index_B) -> chrf`, float32 [B] in [0, 1], as `chrf_reward` gives it.

    Args:
      table: `byte_table` of the vocabulary.
      order: longest n-grams.
      beta: how much more recall counts than precision.

    Of the reward: `references` are its params, `references(texts)`; index_B int, the row of each; NaN where there is
    none.
    """
    _check(order, beta)

    def score(text: Characters, reference: Characters) -> jax.Array:
        a, b = (orders(character_items(without_space(x)), order) for x in (text, reference))
        common_NB = clipped_matches(a, b).astype(jnp.float32)
        both_NB = (a.count > 0) & (b.count > 0)
        precision_B, recall_B = (jnp.sum(common_NB / jnp.maximum(x.count, 1), axis=0) for x in (a, b))
        total_B = beta**2 * precision_B + recall_B
        product_B = (1 + beta**2) * precision_B * recall_B / jnp.maximum(jnp.sum(both_NB, axis=0), 1)
        return jnp.where(total_B > 0, product_B / jnp.where(total_B > 0, total_B, 1.0), 0.0)

    return score_against_references(table, score)


def _check(order: int, beta: float) -> None:
    if order < 1 or not beta > 0:
        raise ValueError(f"chrF needs order >= 1 and beta > 0, got order={order}, beta={beta}")
