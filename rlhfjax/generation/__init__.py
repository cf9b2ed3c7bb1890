"""Prefill, decoding and sampling. This room knows token ids, not tokenizers."""

from rlhfjax.generation.generate import Generation, generate, sample_keys
from rlhfjax.generation.guided import guided
from rlhfjax.generation.sampling import Sampling, filter_logits, sample_token

__all__ = ["Generation", "Sampling", "filter_logits", "generate", "guided", "sample_keys", "sample_token"]
