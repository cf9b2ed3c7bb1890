"""Floating-point operations that a decoder cannot do without: its matrix products, a multiply-add as two.

XLA's own count takes the body of a loop once where it does not know the number of turns, as in decoding, and
includes what is computed and then masked away. These numbers do neither: a rate made with them is useful
work.
"""

import numpy as np

from rlhfjax.config import Decoder
from rlhfjax.networks.branches import Branches


def forward_flops(config: Decoder, *, positions: int, pairs: int, logits: int) -> float:
    """One forward pass; a backward pass costs twice as much.

    Args:
      positions: tokens read by the blocks.
      pairs: (query, key) pairs that the mask lets through, in each head.
      logits: positions whose logits over the vocabulary are made.
    """
    query_and_output = 2 * config.width * config.heads * config.head_size
    key_and_value = 2 * config.width * config.kv_heads * config.head_size
    mlp = (3 if config.gated_mlp else 2) * config.width * config.mlp_width
    attended = 2 * config.heads * config.head_size  # a score and a weighted value
    blocks = config.layers * (positions * (query_and_output + key_and_value + mlp) + pairs * attended)
    return 2.0 * (blocks + logits * config.width * config.vocab_size)


def causal_pairs(length: int) -> int:
    """Pairs of one sequence whose tokens see themselves and what precedes them."""
    return length * (length + 1) // 2


def branch_pairs(prompt: int, samples: int, completion: int) -> int:
    """Pairs of one prompt and its completions, which see the prompt and themselves."""
    return causal_pairs(prompt) + samples * (completion * prompt + causal_pairs(completion))


def branches_flops(config: Decoder, branches: Branches, *, logits: bool) -> float:
    """A forward pass over prompts and completions, of which only real tokens count.

    `branches` are host arrays (`jax.device_get`); `logits`: whether those of the completions are made.
    """
    prompt_B = np.asarray(branches.prompt_mask_BP).sum(axis=1)
    completion_BG = np.asarray(branches.completion_mask_BGC).sum(axis=2)
    pairs = (prompt_B * (prompt_B + 1) // 2).sum()
    pairs += (completion_BG * prompt_B[:, None] + completion_BG * (completion_BG + 1) // 2).sum()
    positions, completed = int(prompt_B.sum() + completion_BG.sum()), int(completion_BG.sum())
    return forward_flops(config, positions=positions, pairs=int(pairs), logits=completed * logits)
