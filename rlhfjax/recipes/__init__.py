"""Compositions: networks, generation, rewards and an algorithm made into one loop. What notebooks import whole."""

from rlhfjax.recipes.batches import (
    AsBatch,
    best_of_samples,
    best_worst_pairs,
    grpo_batch,
    keep_informative,
    ppo_batch,
    text_policy,
)
from rlhfjax.recipes.preference import (
    equal_completions,
    judged_batch,
    judged_evaluate,
    mismatched_branches,
    pair_batch,
    pair_evaluate,
    reference_logp,
)
from rlhfjax.recipes.reward_model import (
    init_reward_ensemble,
    init_reward_model,
    make_process_reward_model,
    make_reward_model,
)
from rlhfjax.recipes.rlhf import RLHF, Experience, Frozen, Prompts, make_rlhf
from rlhfjax.recipes.text import (
    PackedInputs,
    completion_logp,
    packed_logp,
    policy_parameters,
    text_actor_critic,
)

__all__ = [
    "AsBatch",
    "Experience",
    "Frozen",
    "PackedInputs",
    "Prompts",
    "RLHF",
    "best_of_samples",
    "best_worst_pairs",
    "completion_logp",
    "equal_completions",
    "grpo_batch",
    "init_reward_ensemble",
    "init_reward_model",
    "judged_batch",
    "judged_evaluate",
    "keep_informative",
    "make_process_reward_model",
    "make_reward_model",
    "make_rlhf",
    "mismatched_branches",
    "packed_logp",
    "pair_batch",
    "pair_evaluate",
    "policy_parameters",
    "ppo_batch",
    "reference_logp",
    "text_actor_critic",
    "text_policy",
]
