"""Text on the host: tokenizers, datasets, packing, preference pairs. NumPy only, no jax."""

from rlhfjax.data.datasets import Pair, batch_indices, load_pairs, read_jsonl
from rlhfjax.data.packing import Encoded, Packed, encode_pairs, pack, pad_completions, pad_prompts
from rlhfjax.data.preferences import (
    PreferencePair,
    Preferences,
    accuracy_ceiling,
    draw_preferences,
    pair_indices,
    read_preferences,
    same_pairs,
    write_preferences,
)
from rlhfjax.data.tokenizers import SPECIAL_TOKENS, BPETokenizer, ByteTokenizer, Tokenizer, train_bpe

__all__ = [
    "SPECIAL_TOKENS",
    "BPETokenizer",
    "ByteTokenizer",
    "Encoded",
    "Packed",
    "Pair",
    "PreferencePair",
    "Preferences",
    "Tokenizer",
    "accuracy_ceiling",
    "batch_indices",
    "draw_preferences",
    "encode_pairs",
    "load_pairs",
    "pack",
    "pad_completions",
    "pad_prompts",
    "pair_indices",
    "read_jsonl",
    "read_preferences",
    "same_pairs",
    "train_bpe",
    "write_preferences",
]
