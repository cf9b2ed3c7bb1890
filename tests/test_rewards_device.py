"""The word counter of the device against str.split on the decoded text, for any tokens."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.data import ByteTokenizer, Tokenizer, pad_completions, train_bpe
from rlhfjax.rewards.device import length_reward, word_count, word_table

reproducible = settings(derandomize=True, database=None, deadline=None)
ASSET = Path(__file__).parent.parent / "experiments" / "assets" / "debian_summaries.jsonl.gz"
with gzip.open(ASSET, "rt", encoding="utf-8") as _lines:
    SUMMARIES = [json.loads(line)["summary"] for line, _ in zip(_lines, range(400), strict=False)]

# White space of one, two and three bytes, and characters that begin with the same bytes.
ODD = [
    "a b",
    " \t\n",
    "\x1c\x85",
    "a\xa0b©",
    "\u1680\u2003\u2014\u3000\u3001",
    "x\u2028 \u205f\ufeff",
    "é 🎉",
]
BYTES = ByteTokenizer()
BPE = train_bpe(SUMMARIES + ODD * 8, vocab_size=512)
LENGTH = 8


def table_of(tokenizer: Tokenizer, vocab_size: int | None = None):
    return word_table([tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)], vocab_size)


TABLES = {"byte": table_of(BYTES, vocab_size=512), "bpe": table_of(BPE)}
count = jax.jit(word_count)


def counted(name: str, token_BT, mask_BT) -> list[int]:
    return count(jnp.asarray(token_BT), jnp.asarray(mask_BT), TABLES[name]).tolist()


def split(tokenizer: Tokenizer, token_BT, mask_BT) -> list[int]:
    return [len(tokenizer.decode(t[m].tolist()).split()) for t, m in zip(token_BT, mask_BT, strict=True)]


def test_equal_on_real_text():
    ids = BPE.encode_batch(SUMMARIES)
    token_BT, mask_BT = pad_completions(ids, max(map(len, ids)), BPE.pad_id)
    assert counted("bpe", token_BT, mask_BT) == [len(summary.split()) for summary in SUMMARIES]


@pytest.mark.parametrize("name, tokenizer", [("byte", BYTES), ("bpe", BPE)])
def test_equal_on_random_tokens_and_masks(name, tokenizer):
    random = np.random.default_rng(0)
    token_BT = random.integers(0, tokenizer.vocab_size, (20_000, LENGTH), dtype=np.int32)
    mask_BT = random.random((20_000, LENGTH)) < 0.8
    assert counted(name, token_BT, mask_BT) == split(tokenizer, token_BT, mask_BT)


def test_equal_on_every_kind_of_white_space_cut_anywhere():
    """Bytes of odd texts in random order: characters are cut, mixed and left incomplete at the end."""
    random = np.random.default_rng(1)
    pool = np.frombuffer("".join(ODD).encode(), np.uint8).astype(np.int32)
    pieces = [np.frombuffer(c.encode(), np.uint8).astype(np.int32) for c in "".join(ODD)]
    rows = [np.concatenate([pieces[i] for i in random.integers(0, len(pieces), 8)])[:8] for _ in range(5_000)]
    token_BT = np.concatenate([np.stack(rows), random.choice(pool, (15_000, 8))])
    mask_BT = np.ones_like(token_BT, bool)
    assert counted("byte", token_BT, mask_BT) == split(BYTES, token_BT, mask_BT)


@reproducible
@given(st.lists(st.sampled_from("".join(ODD)), max_size=LENGTH // 4).map("".join))
def test_equal_on_any_text(text):
    token_BT, mask_BT = pad_completions([BYTES.encode(text + "a")], 12, BYTES.pad_id)
    assert counted("byte", token_BT, mask_BT) == [len((text + "a").split())]


def test_masked_positions_and_leading_axes_do_not_matter():
    token_BT = np.array([BYTES.encode("a b c ab")], np.int32)
    mask_BT = np.array([[True, True, True, False, False, True, True, True]])  # "a b" + " ab"
    assert counted("byte", token_BT, mask_BT) == [3]
    changed = np.where(mask_BT, token_BT, ord(" "))
    assert counted("byte", changed, mask_BT) == [3]
    single = word_count(jnp.asarray(token_BT[0]), jnp.asarray(mask_BT[0]), TABLES["byte"])
    assert single.shape == () and single.dtype == jnp.int32 and int(single) == 3
    mapped = jax.vmap(lambda token, mask: word_count(token, mask, TABLES["byte"]))(
        jnp.asarray(token_BT), jnp.asarray(mask_BT)
    )
    assert mapped.tolist() == [3]


def test_the_reward_is_the_distance_in_words():
    reward = jax.jit(length_reward(4.5, TABLES["byte"]))
    token_BT = jnp.asarray([BYTES.encode("ab cd  e"), BYTES.encode("abcdefgh")])
    score_B = reward(None, token_BT, jnp.ones_like(token_BT, bool))
    assert score_B.dtype == jnp.float32
    assert score_B.tolist() == [-1.5, -3.5]


def test_ids_above_the_tokenizer_are_silent():
    token = jnp.asarray(BYTES.encode("a") + [400] + BYTES.encode("b"))
    assert int(word_count(token, jnp.ones(3, bool), TABLES["byte"])) == 1
    assert TABLES["byte"].next_VS.shape[0] == 512
    with pytest.raises(ValueError, match="vocab_size is 3 and there are 259 tokens"):
        table_of(BYTES, vocab_size=3)


def test_wrong_arrays_are_refused():
    token, mask = jnp.zeros(4, jnp.int32), jnp.ones(4, bool)
    with pytest.raises(AssertionError):
        word_count(token.astype(jnp.float32), mask, TABLES["byte"])
    with pytest.raises(AssertionError):
        word_count(token, mask.astype(jnp.int32), TABLES["byte"])
    with pytest.raises(AssertionError):
        word_count(token, mask[:3], TABLES["byte"])
