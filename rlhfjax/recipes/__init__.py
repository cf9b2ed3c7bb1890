"""Compositions: networks, generation, rewards and an algorithm made into one loop. What notebooks import whole."""

from rlhfjax.recipes.rlhf import RLHF, Experience, Frozen, Prompts, make_rlhf
from rlhfjax.recipes.text import (
    PackedInputs,
    completion_logp,
    init_reward_model,
    make_reward_model,
    packed_logp,
    text_actor_critic,
)

__all__ = [
    "RLHF",
    "Experience",
    "Frozen",
    "PackedInputs",
    "Prompts",
    "completion_logp",
    "init_reward_model",
    "make_reward_model",
    "make_rlhf",
    "packed_logp",
    "text_actor_critic",
]
