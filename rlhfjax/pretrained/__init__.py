"""Checkpoints of other projects, in and out."""

from rlhfjax.pretrained.huggingface import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
