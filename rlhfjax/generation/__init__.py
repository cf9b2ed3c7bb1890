"""Prefill, decoding and sampling. This room knows token ids, not tokenizers."""

from rlhfjax.generation.filters import filter_logits
from rlhfjax.generation.generate import Generation, generate, sample_keys
from rlhfjax.generation.guided import guided
from rlhfjax.generation.refill import generate_refilled
from rlhfjax.generation.sampling import Drawn, sample_token
from rlhfjax.generation.settings import Sampling

__all__ = [
    "Drawn",
    "Generation",
    "Sampling",
    "filter_logits",
    "generate",
    "generate_refilled",
    "guided",
    "sample_keys",
    "sample_token",
]
