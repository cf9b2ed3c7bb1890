"""Completions for the tests of rewards: real text, odd characters, cut ones, bytes that are no UTF-8, and nothing."""

import gzip
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rlhfjax.data import train_bpe
from rlhfjax.rewards import byte_table

ASSET = Path(__file__).parent.parent / "experiments" / "assets" / "debian_summaries.jsonl.gz"
with gzip.open(ASSET, "rt", encoding="utf-8") as _lines:
    ROWS = [json.loads(line) for line, _ in zip(_lines, range(150), strict=False)]
ODD = "Aé 🎉\u00a0ß\u2003İK\u212aſΣ ςZ\n\t\x1c\u3000的a\u0301 :) --no! (GOOD), don't\r\n 12.5\ufffd\ud7ff\U0010ffff."
TOKENIZER = train_bpe([row["summary"] for row in ROWS] + [ODD] * 4, vocab_size=400)
TABLE = byte_table([TOKENIZER.token_bytes(i) for i in range(TOKENIZER.vocab_size)], vocab_size=410)
LENGTH, EACH = 16, 40


def _batch() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    real = [TOKENIZER.encode(row["summary"])[:LENGTH] for row in ROWS[:EACH]]
    pieces = [TOKENIZER.encode(c) for c in ODD]  # each character by its bytes, where no token has it
    odd = [[i for k in random.integers(0, len(pieces), 8) for i in pieces[k]][:LENGTH] for _ in range(EACH)]
    pool = np.array(
        [i for i in range(TOKENIZER.vocab_size) if max(TOKENIZER.token_bytes(i), default=0) > 127]
    )
    broken = random.choice(pool, (EACH, LENGTH)).tolist()
    anything = random.integers(0, TOKENIZER.vocab_size, (EACH, LENGTH)).tolist()
    rows = [*real, *odd, *broken, *anything, [], [TOKENIZER.eos_id]]
    token = np.full((len(rows), LENGTH), 405, np.int32)  # an id that no token has
    mask = np.zeros(token.shape, bool)
    for i, row in enumerate(rows):
        token[i, : len(row)], mask[i, : len(row)] = row, True
    mask[2::3] &= random.random(mask[2::3].shape) < 0.8  # holes
    return token, mask


TOKEN_BT, MASK_BT = (jnp.asarray(x) for x in _batch())
TEXTS = [
    TOKENIZER.decode(token[mask].tolist())
    for token, mask in zip(np.asarray(TOKEN_BT), np.asarray(MASK_BT), strict=True)
]
# References: what was said with a little changed, texts of others, the same, and nothing.
REFERENCES = [
    [text, text[3:] + "x", TEXTS[i - 7].upper() + " " + text, ROWS[i % len(ROWS)]["summary"], "", " \n"][
        i % 6
    ]
    for i, text in enumerate(TEXTS)
]
assert len(set(TEXTS)) > 0.9 * len(TEXTS) and "" in TEXTS and sum("\ufffd" in text for text in TEXTS) > EACH
