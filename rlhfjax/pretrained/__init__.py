"""Checkpoints of other projects, in and out: the Hugging Face layout, GGUF, PEFT's adapters.

`open_model` opens a model with its tokenizer and chat template from wherever it lies; the other functions do one thing
each. `python -m rlhfjax.pretrained` looks at a model, talks to it, converts and exports it.
"""

from rlhfjax.pretrained.answers import Answerer
from rlhfjax.pretrained.exports import POLICY, convert
from rlhfjax.pretrained.gguf import load_gguf, read_gguf
from rlhfjax.pretrained.hub import find_model
from rlhfjax.pretrained.huggingface import (
    load_pretrained,
    load_reward_model,
    save_pretrained,
    save_reward_model,
)
from rlhfjax.pretrained.inspection import describe
from rlhfjax.pretrained.model import Pretrained, open_model, pretrained_config
from rlhfjax.pretrained.model_card import write_model_card
from rlhfjax.pretrained.peft import load_peft, save_peft

__all__ = [
    "Answerer",
    "POLICY",
    "Pretrained",
    "convert",
    "describe",
    "find_model",
    "load_gguf",
    "load_peft",
    "load_pretrained",
    "pretrained_config",
    "load_reward_model",
    "open_model",
    "read_gguf",
    "save_peft",
    "save_pretrained",
    "save_reward_model",
    "write_model_card",
]
