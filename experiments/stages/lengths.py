"""A reward that is exact: completions of a wanted number of words."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.stages.text import Text
from rlhfjax.networks import Branches
from rlhfjax.rewards import length_reward, word_table


def wanted_words(
    text: Text, words: int
) -> tuple[Callable[[Any, Branches], jax.Array], Callable[[np.ndarray, list[list[str]]], np.ndarray]]:
    """-|words - wanted| as a reward on the device, and as the gold score of texts on the host, [B, G] each."""
    table = word_table(text.token_bytes(), text.lm.config.vocab_size)
    of_tokens = length_reward(float(words), table)

    def reward(params: Any, branches: Branches) -> jax.Array:
        return of_tokens(params, branches.completion_BGC, branches.completion_mask_BGC)

    def gold(rows: np.ndarray, texts: list[list[str]]) -> np.ndarray:
        del rows
        return np.asarray([[-abs(len(x.split()) - words) for x in xs] for xs in texts], np.float64)

    return reward, gold
