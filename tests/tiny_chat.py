"""A tiny chat model on disk, as a pretrained one lies there: weights, tokenizer, special tokens, chat template."""

import json
from pathlib import Path

import jax
import numpy as np
from tiny_tokenizers import BYTE_LEVEL, write_folder

from rlhfjax.config import Decoder
from rlhfjax.data import CHATML
from rlhfjax.networks import decoder
from rlhfjax.pretrained import save_pretrained

END = "<|im_end|>"
ALIKE = 3  # ids of the model beyond those of the tokenizer
QUESTIONS = ("the cat", "the mat", "a dog", "the log", "the user", "a cafe", "2+2", "the sat")


def write_chat_model(folder: Path) -> Path:
    """An untrained decoder of one layer; an answer ends soon or late, and its vocabulary is padded."""
    write_folder(
        folder,
        BYTE_LEVEL,
        tokenizer_config={"eos_token": END, "bos_token": "<s>", "chat_template": CHATML},
    )
    end = BYTE_LEVEL.token_to_id(END)
    shape = Decoder(
        vocab_size=BYTE_LEVEL.get_vocab_size() + ALIKE,
        width=16,
        layers=1,
        heads=2,
        kv_heads=1,
        head_size=8,
        mlp_width=16,
        max_positions=128,
        embedding_stddev=0.3,
    )
    params = jax.jit(decoder(shape).init)(jax.random.key(0))
    table = np.array(params["embedding"])
    table[end] = table.sum(axis=0) * 0.3  # likely after anything
    # Likelier still, whichever sign the end's logit has, and never to be drawn.
    table[-ALIKE:] = 2.0 * np.stack([table[end], -table[end], table[end]])
    save_pretrained(folder, shape, params | {"embedding": table})
    return folder


def write_prompts(path: Path) -> Path:
    """Prompts of a user, and conversations with an answer for fine-tuning."""
    rows = [
        {"split": "validation" if i % 4 == 3 else "train", "prompt": f"What of {what}{mark}"}
        for mark in ("?", "!", ".")
        for i, what in enumerate(QUESTIONS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
