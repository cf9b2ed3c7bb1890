"""Checkpoints of other projects, in and out."""

from rlhfjax.pretrained.huggingface import (
    load_pretrained,
    load_reward_model,
    save_pretrained,
    save_reward_model,
)

__all__ = ["load_pretrained", "load_reward_model", "save_pretrained", "save_reward_model"]
