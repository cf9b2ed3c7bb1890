"""Networks behind plain functions: `init(key) -> params`, `apply(params, ...) -> out`.

Modules never leave this room: a State, a checkpoint and an algorithm hold nested dictionaries of arrays only.
"""

from rlhfjax.networks.attention import BranchMask, SegmentMask, attend, branch_mask, causal_mask
from rlhfjax.networks.branches import Branches, branch_hidden, pad_prompt_positions
from rlhfjax.networks.decoder import Cache, LanguageModel, decoder
from rlhfjax.networks.heads import init_scalar_head, scalar_head
from rlhfjax.networks.induction import with_induction_heads
from rlhfjax.networks.lora import adapted, init_lora, merge_lora, with_adapters
from rlhfjax.networks.mlp import MLP, mlp
from rlhfjax.networks.q_heads import (
    best_token,
    init_q_heads,
    q_advantage,
    q_log_softmax,
    q_of_tokens,
    q_values,
    state_value,
)
from rlhfjax.networks.quantised import dequantise, quantisation_error, quantise

__all__ = [
    "BranchMask",
    "Branches",
    "Cache",
    "LanguageModel",
    "MLP",
    "SegmentMask",
    "adapted",
    "attend",
    "best_token",
    "branch_hidden",
    "branch_mask",
    "causal_mask",
    "decoder",
    "dequantise",
    "init_lora",
    "init_q_heads",
    "init_scalar_head",
    "merge_lora",
    "mlp",
    "pad_prompt_positions",
    "q_advantage",
    "q_log_softmax",
    "q_of_tokens",
    "q_values",
    "quantisation_error",
    "quantise",
    "scalar_head",
    "state_value",
    "with_adapters",
    "with_induction_heads",
]
