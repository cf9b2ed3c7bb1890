"""A tiny world for the tests of the experiments: pairs on disk, a base model, and settings to match."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhfjax.config import Decoder
from rlhfjax.data import train_bpe
from rlhfjax.networks import decoder
from rlhfjax.pretrained import save_pretrained

WORDS = ("red", "sun", "ox", "tea", "map", "kit", "oak", "jar")
ROWS, TRAIN = 60, 48  # the rest is the validation split
SINGLE_BYTES = 3 + 256  # ids below are specials and bytes


def write_pairs(path: Path) -> None:
    """Documents of five to seven words; a summary is three of them."""
    generator = np.random.default_rng(0)
    rows = []
    for i in range(ROWS):
        document = generator.choice(WORDS, size=generator.integers(5, 8)).tolist()
        row = {"document": " ".join(document), "summary": " ".join(document[1:4])}
        rows.append(row | {"split": "train" if i < TRAIN else "validation"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_base(folder: Path, data: Path, *, max_positions: int = 32) -> None:
    """An untrained decoder of one layer whose completions differ in length."""
    folder.mkdir()
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    tokenizer = train_bpe([row["document"] for row in rows], 290)
    tokenizer.save(folder / "tokenizer.json")
    shape = Decoder(
        vocab_size=tokenizer.vocab_size,
        width=16,
        layers=1,
        heads=2,
        kv_heads=2,
        head_size=8,
        mlp_width=16,
        max_positions=max_positions,
        embedding_stddev=0.3,
    )
    params = jax.jit(decoder(shape).init)(jax.random.key(0))
    # Words are likelier than single bytes, and after a word the text may end: a third of the completions do.
    table = np.array(params["embedding"])
    table[SINGLE_BYTES:] *= 2
    table[tokenizer.eos_id] = table[SINGLE_BYTES:].sum(axis=0)
    save_pretrained(folder, shape, params | {"embedding": table})


def write_world(folder: Path) -> dict[str, Any]:
    """Writes pairs and base into `folder`; returns settings of `summarize` that end within seconds."""
    data, base = folder / "pairs.jsonl", folder / "base"
    write_pairs(data)
    write_base(base, data)
    optimizer = {"warmup_steps": 1}
    return {
        "text": {
            "data": str(data),
            "base": str(base),
            "prompt_length": 10,
            "completion_length": 6,
        },
        "sft": {"steps": 3, "rows": 2, "length": 24, "optimizer": dict(optimizer)},
        "preferences": {"prompts": 12, "heldout": 4, "samples": 3},
        "reward": {"steps": 3, "prompts": 4, "optimizer": dict(optimizer)},
        "ppo": {"steps": 3, "prompts": 4, "samples": 2, "optimizer": dict(optimizer)},
        "evaluation": {"prompts": 6, "batch": 4, "temperatures": [0.5], "best_of": [2]},
    }
