"""Tokenizers of other people's models: the library's ids and texts, specials apart from text, what the files name."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import BYTE_LEVEL, KINDS, OTHERS, ROLES, SPECIALS, TOKENIZERS, write_folder
from tokenizers import AddedToken, Tokenizer, models

from rlhfjax.data import PretrainedTokenizer, load_tokenizer, pack
from rlhfjax.data.packing import encode_pairs
from rlhfjax.data.tokenizers import Tokenizer as Protocol

reproducible = settings(derandomize=True, database=None, deadline=None, max_examples=50)
EACH = pytest.mark.parametrize("kind", KINDS)
# Any byte can be written by these; the unigram one has an unknown token.
WHOLE = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unigram"])
TEXTS = ["the cat", " two  spaces ", "naïve\n\n\tcafé", "4 🎉", "the dog.", "a▁b"]


def ids_of_library(inner: Tokenizer, text: str) -> list[int]:
    return inner.encode(text, add_special_tokens=False).ids


def test_they_are_tokenizers_like_the_others():
    offered: list[Protocol] = list(TOKENIZERS.values())  # checked by the type checker
    assert all("sep" not in tokenizer.special_ids for tokenizer in offered)


@EACH
@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_texts_are_the_librarys(kind, text):
    inner, tokenizer = KINDS[kind], TOKENIZERS[kind]
    ids = ids_of_library(inner, text)
    assert tokenizer.encode(text) == ids and tokenizer.encode_batch([text]) == [ids]
    assert tokenizer.decode(ids) == inner.decode(ids) == tokenizer.decode_batch([ids])[0]


@WHOLE
@reproducible
@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
def test_any_text_comes_back(kind, text):
    tokenizer = TOKENIZERS[kind]
    if kind == "metaspace":
        text = text.lstrip(" ")  # it puts no second space before a text that begins with one
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert joined in (text, " " + text)  # SentencePiece's space before a text


@EACH
@reproducible
@given(ids=st.lists(st.integers(0, 300)))
def test_decoding_any_ids_agrees_with_the_library(kind, ids):
    tokenizer = TOKENIZERS[kind]
    ids = [i % tokenizer.vocab_size for i in ids]
    assert tokenizer.decode(ids) == KINDS[kind].decode(ids, skip_special_tokens=True)


def test_bytes_of_each_way_to_write_them():
    byte_level, prepend = TOKENIZERS["byte"], TOKENIZERS["prepend"]
    assert byte_level.token_bytes(BYTE_LEVEL.get_vocab()["Ġthe"]) == b" the"
    vocabulary = KINDS["prepend"].get_vocab()
    word = next(piece for piece in vocabulary if piece.startswith("▁") and len(piece) > 3)
    assert prepend.token_bytes(vocabulary[word]) == word.replace("▁", " ").encode()
    assert prepend.token_bytes(vocabulary["<0xE9>"]) == b"\xe9"
    for tokenizer in (byte_level, prepend):
        single = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
        assert single >= {bytes([byte]) for byte in range(256)}


@EACH
def test_text_never_makes_a_special_token(kind):
    """Unigram's vocabulary holds "<s>" as a piece, which its search would take."""
    tokenizer = TOKENIZERS[kind]
    hostile = "the " + "".join([*SPECIALS, *OTHERS])
    ids = tokenizer.encode(hostile)
    unknown = {tokenizer.special_ids["unk"]} if kind == "unigram" else set()
    assert not set(tokenizer.special_texts.values()) - unknown & set(ids)
    if kind != "unigram":
        assert tokenizer.decode(ids) == hostile
    # Nor does the private-use text that stands for one inside the library.
    for index, text in enumerate(tokenizer.special_texts):
        private = chr(0xF0000 + index) * len(text)
        if kind == "unigram":
            with pytest.raises(ValueError, match=f"U.F{index:04X}"):
                tokenizer.encode(private)
        else:
            assert not set(tokenizer.special_texts.values()) & set(tokenizer.encode(private))


@EACH
def test_specials_that_are_told_are_those_the_library_finds(kind):
    text = "<s>the cat<|im_end|>\n<|im_start|> sat </s>"
    marks = [text.index(token) for token in ("<s>", "<|im_end|>", "<|im_start|>", "</s>")]
    spans = [(start, text.index(">", start) + 1) for start in marks]
    ids, offsets = TOKENIZERS[kind].encode_chat(text, spans)
    assert ids == ids_of_library(KINDS[kind], text)
    special = set(TOKENIZERS[kind].special_texts.values()) - {0}  # unigram's unknown "\n"
    assert [tuple(offsets[i]) for i, token in enumerate(ids) if token in special] == spans
    # The same text with one of them told to be characters.
    ids, offsets = TOKENIZERS[kind].encode_chat(text, [spans[0], spans[3]])
    assert [i for i in ids if i in special] == [TOKENIZERS[kind].special_texts[t] for t in ("<s>", "</s>")]
    assert offsets[-1].tolist() == list(spans[3])


def test_private_characters_that_stand_for_specials_are_refused():
    with pytest.raises(ValueError, match=r"U\+F0001"):
        TOKENIZERS["byte"].encode_chat("the \U000f0001", [])


def test_a_special_token_of_one_character_is_not_made_from_text():
    inner = Tokenizer.from_str(KINDS["gemma"].to_str())
    inner.add_special_tokens(["§"])
    tokenizer = PretrainedTokenizer(inner, ROLES)
    special = set(tokenizer.special_texts.values())
    assert not special & set(tokenizer.encode("a § b"))
    index = list(tokenizer.special_texts).index("§")
    with pytest.raises(ValueError, match=f"U.F{index:04X}"):
        tokenizer.encode(f"a {chr(0xF0000 + index)} b")


def test_white_space_that_a_special_token_takes_with_it_stays_so():
    inner = Tokenizer.from_str(BYTE_LEVEL.to_str())
    inner.add_special_tokens([AddedToken("<|user|>", rstrip=True, normalized=False, special=True)])
    text = "<|user|>\n the"
    ids, _ = PretrainedTokenizer(inner, ROLES).encode_chat(text, [(0, 8)])
    assert ids == ids_of_library(inner, text)
    assert len(ids) == 2  # "\n " is gone with it


def test_padding_equal_to_eos_leaves_eos_to_be_learnt():
    tokenizer = TOKENIZERS["byte"]
    assert tokenizer.pad_id == tokenizer.eos_id
    encoded = encode_pairs(tokenizer, [("the", " cat")], prompt_length=9, completion_length=9)  # type: ignore[list-item]
    assert encoded.prompts[0][0] == tokenizer.special_ids["bos"] == tokenizer.prefix_ids[0]
    packed = pack(encoded.prompts, encoded.completions, length=12, pad_id=tokenizer.pad_id)
    target = packed.token_RT[:, 1:]
    assert (target[packed.completion_RT] == tokenizer.eos_id).sum() == 1
    assert (target == tokenizer.eos_id).sum() > 1  # the others are padding, which no mask counts
    assert not (packed.completion_RT | packed.prompt_RT)[packed.segment_RT == 0].any()


def test_roles_and_stops_come_from_the_files(tmp_path):
    inner = Tokenizer.from_str(BYTE_LEVEL.to_str())
    ids = {text: inner.token_to_id(text) for text in SPECIALS}
    folder = write_folder(
        tmp_path,
        inner,
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "pad_token": None, "bos_token": "<s>"},
        special_tokens_map={"eos_token": "</s>", "pad_token": "<unk>"},
        generation_config={"eos_token_id": [ids["</s>"], ids["<|im_end|>"]]},
    )
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (ids["<|im_end|>"], ids["<unk>"])
    assert tokenizer.stop_ids == (ids["<|im_end|>"], ids["</s>"])
    assert tokenizer.special_tokens == {"bos": "<s>", "eos": "<|im_end|>", "pad": "<unk>"}
    assert load_tokenizer(folder, pad="</s>").pad_id == ids["</s>"]
    assert load_tokenizer(folder, eos="</s>").eos_id == ids["</s>"]


def test_a_special_token_that_is_no_text_is_named(tmp_path):
    folder = write_folder(tmp_path, BYTE_LEVEL, tokenizer_config={"bos_token": "\ud800", "eos_token": "</s>"})
    with pytest.raises(ValueError, match=r"tokenizer_config.json: bos_token='\\ud800' is no text"):
        load_tokenizer(folder)


def test_a_special_token_that_others_are_merged_from_is_named(tmp_path):
    merge = json.loads(BYTE_LEVEL.to_str())["model"]["merges"][0]
    folder = write_folder(tmp_path, BYTE_LEVEL, tokenizer_config={"eos_token": "".join(merge)})
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*special tokens cannot be told from text"):
        load_tokenizer(folder)


def test_eos_may_be_told_by_its_id_alone(tmp_path):
    folder = write_folder(tmp_path, BYTE_LEVEL, config={"eos_token_id": 2})
    assert load_tokenizer(folder).special_tokens == {"eos": "</s>"}


def test_ids_without_a_token_are_named_and_a_large_vocabulary_is_refused():
    tokenizer = TOKENIZERS["byte"]
    size = tokenizer.vocab_size
    assert tokenizer.unused_tokens(size + 2) == (size, size + 1)
    assert tokenizer.unused_tokens(size) == ()
    with pytest.raises(ValueError, match=f"{size} ids and the model's vocabulary {size - 1}"):
        tokenizer.unused_tokens(size - 1)
    raw = json.loads(BYTE_LEVEL.to_str())
    raw["model"]["vocab"]["rare"] = size + 3
    holes = PretrainedTokenizer(Tokenizer.from_str(json.dumps(raw)), ROLES)
    assert holes.unused_tokens(size + 4) == (size, size + 1, size + 2)
    assert holes.token_bytes(size) == b""


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json; where the model has a tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is no tokenizer"):
        load_tokenizer(tmp_path)
    write_folder(tmp_path, BYTE_LEVEL)
    with pytest.raises(ValueError, match="no file .* names an EOS token; pass eos="):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no token '<none>' for the role 'eos'"):
        load_tokenizer(tmp_path, eos="<none>")
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="generation_config.json: a JSON object is needed, this is list"):
        load_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is not JSON"):
        load_tokenizer(tmp_path)
    word_level = Tokenizer(models.WordLevel({"</s>": 0}, unk_token="</s>"))
    with pytest.raises(ValueError, match="decoder is None"):
        PretrainedTokenizer(word_level, {"eos": "</s>"})
    with pytest.raises(ValueError, match="lacks the role 'eos'"):
        PretrainedTokenizer(BYTE_LEVEL, {"bos": "<s>"})
    for wrong in (-1, TOKENIZERS["byte"].vocab_size):
        with pytest.raises(ValueError, match=str(wrong)):
            TOKENIZERS["byte"].decode([wrong])


@EACH
def test_encodings_are_those_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind], eos_token="</s>", bos_token="<s>"
    )
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert TOKENIZERS[kind].encode(text) == ids
        whole = theirs(text)["input_ids"]
        assert [*TOKENIZERS[kind].prefix_ids, *ids] == whole
        ours = TOKENIZERS[kind].decode(whole)
        assert ours == theirs.decode(whole, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert np.shape(ids)
