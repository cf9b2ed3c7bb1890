"""Tokenizers: exact round trips, special tokens that no text can make, one file for one corpus."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.data import tokenizers
from rlhfjax.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, train_bpe

reproducible = settings(derandomize=True, database=None, deadline=None)
CORPUS = ["The cat sat on the mat.", "the dog sat on the log; naïve café", "a cat, a dog <|end|>"] * 4
BPE = train_bpe(CORPUS, vocab_size=290)
BOTH = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["byte", "bpe"])


def test_both_offer_the_same_interface():
    offered: list[Tokenizer] = [ByteTokenizer(), BPE]  # checked by the type checker
    assert [tokenizer.vocab_size for tokenizer in offered] == [259, 290]


@BOTH
@reproducible
@given(text=st.text())
def test_any_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@BOTH
def test_bpe_learns_and_bytes_do_not(tokenizer):
    ids = tokenizer.encode("the cat")
    assert len(ids) == (7 if tokenizer.vocab_size == 259 else 2)


@BOTH
def test_batches_equal_single_texts(tokenizer):
    texts = ["", "the mat", "ﬀ 🎉 <|pad|>"]
    ids = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == ids
    assert tokenizer.decode_batch(ids) == texts


@BOTH
def test_special_tokens_are_apart_and_silent(tokenizer):
    pad, eos, sep = tokenizer.pad_id, tokenizer.eos_id, tokenizer.sep_id
    assert len({pad, eos, sep}) == 3
    assert tokenizer.special_ids == {"pad": pad, "eos": eos, "sep": sep}
    assert tokenizer.decode([pad, *tokenizer.encode("mat"), sep, eos]) == "mat"
    assert tokenizer.token_bytes(eos) == b""


@BOTH
def test_text_never_makes_a_special_token(tokenizer):
    hostile = "ends <|end|> here<|pad|><|sep|>"
    ids = tokenizer.encode(hostile)
    assert not {tokenizer.pad_id, tokenizer.eos_id, tokenizer.sep_id} & set(ids)
    assert tokenizer.decode(ids) == hostile


@BOTH
def test_bytes_that_are_no_text_become_replacement_characters(tokenizer):
    lone = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xe9"]
    assert tokenizer.decode(lone) == "\ufffd"


@BOTH
def test_every_byte_has_its_token(tokenizer):
    single = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    assert single >= {bytes([byte]) for byte in range(256)}


@BOTH
def test_ids_out_of_range_are_refused(tokenizer):
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=str(wrong)):
            tokenizer.decode([wrong])


@reproducible
@given(ids=st.lists(st.integers(0, BPE.vocab_size - 1)))
def test_decoding_agrees_with_the_library(ids):
    assert BPE.decode(ids) == BPE._inner.decode(ids, skip_special_tokens=True)


def test_training_and_saving_are_deterministic(tmp_path):
    train_bpe(CORPUS, vocab_size=290).save(tmp_path / "again.json")
    BPE.save(tmp_path / "tokenizer.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_loading_gives_the_tokenizer_that_was_saved(tmp_path):
    BPE.save(tmp_path / "tokenizer.json")
    loaded = BPETokenizer.load(tmp_path)
    text = "the naïve dog <|end|> 🎉"
    assert loaded.encode(text) == BPE.encode(text)
    assert loaded.special_ids == BPE.special_ids
    assert loaded.decode(loaded.encode(text)) == text


def test_more_special_tokens_take_part_by_their_role():
    roles = {"pad": "[P]", "eos": "[E]", "sep": "[S]", "german": "[DE]"}
    assert train_bpe(CORPUS, 290, roles).special_ids == {"pad": 0, "eos": 1, "sep": 2, "german": 3}
    assert ByteTokenizer(roles).special_ids["german"] == 259
    assert ByteTokenizer(roles).vocab_size == 260


def test_added_tokens_that_are_not_special_decode_to_their_text():
    from tokenizers import AddedToken, Tokenizer

    inner = Tokenizer.from_str(BPE._inner.to_str())
    inner.add_tokens([AddedToken("<tool é>", special=False)])
    tokenizer = BPETokenizer(inner)
    assert tokenizer.decode(tokenizer.encode("a <tool é> b")) == "a <tool é> b"
    assert tokenizer.token_bytes(290) == "<tool é>".encode()


@pytest.mark.parametrize(
    "special_tokens, message",
    [
        ({"pad": "<p>", "eos": "<e>"}, "sep"),
        ({"pad": "<e>", "eos": "<e>", "sep": "<s>"}, "distinct"),
        ({"pad": "", "eos": "<e>", "sep": "<s>"}, "not empty"),
    ],
)
def test_bad_special_tokens_are_refused(special_tokens, message):
    with pytest.raises(ValueError, match=message):
        ByteTokenizer(special_tokens)
    with pytest.raises(ValueError, match=message):
        train_bpe(CORPUS, 290, special_tokens)


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        BPETokenizer.load(tmp_path / "nowhere.json")
    BPE.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="'<unknown>' for the role 'eos'"):
        BPETokenizer.load(tmp_path, {"pad": "<|pad|>", "eos": "<unknown>", "sep": "<|sep|>"})
    with pytest.raises(ValueError, match="258"):
        train_bpe(CORPUS, vocab_size=258)


def test_a_vocabulary_that_is_not_of_bytes_is_refused():
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match="byte-level"):
        BPETokenizer(Tokenizer(models.BPE()))


def test_the_missing_library_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(tokenizers, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "rlhfjax\[text\]"'):
        train_bpe(CORPUS, vocab_size=290)
