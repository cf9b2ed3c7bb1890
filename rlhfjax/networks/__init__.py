"""Networks behind plain functions: `init(key) -> params`, `apply(params, ...) -> out`.

Modules never leave this room: a State, a checkpoint and an algorithm hold nested dictionaries of arrays only.
"""

from rlhfjax.networks.branches import Branches, branch_hidden, branch_mask, pad_prompt_positions
from rlhfjax.networks.decoder import Cache, LanguageModel, causal_mask, decoder
from rlhfjax.networks.heads import init_scalar_head, scalar_head
from rlhfjax.networks.induction import with_induction_heads

__all__ = [
    "Branches",
    "Cache",
    "LanguageModel",
    "branch_hidden",
    "branch_mask",
    "causal_mask",
    "decoder",
    "init_scalar_head",
    "pad_prompt_positions",
    "scalar_head",
    "with_induction_heads",
]
