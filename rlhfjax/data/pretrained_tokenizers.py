"""Tokenizers of other people's models: `load_tokenizer` of a folder in the Hugging Face layout.

Two kinds of `tokenizer.json` are read: byte-level ones (GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece's, whose tokens
hold "▁" for a space and "<0x0A>" for a byte (Llama 2, Mistral, Gemma, Phi-3).

Padding. A pretrained tokenizer often has no pad token, or one equal to its EOS. Padding is told by masks everywhere in
this project and never by an id, so `pad_id` is the token the files name, EOS if they name none; that EOS is still
learnt, as no mask comes from `token != pad_id`. Tokenizers made here (`train_bpe`) keep the two apart.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rlhfjax.data.tokenizer_files import read_special_tokens, read_stop_ids, update_object
from rlhfjax.data.tokenizers import bytes_of_characters, check_id, tokenizers_library

__all__ = ["PretrainedTokenizer", "load_tokenizer"]

_SPACE = "▁"
# First of the private names that stand for special tokens inside the library; 65 534 private-use characters follow.
_PRIVATE, _PRIVATE_END = 0xF0000, 0xFFFFE


class PretrainedTokenizer:
    """The tokenizer of a pretrained model, around a `tokenizers.Tokenizer`.

    inner: is copied, not changed.
    special_tokens: role -> text; "eos" is needed, "bos", "pad" and "unk" may stand beside it. All in the vocabulary.
    stop_ids: further ids that end a text, as `generation_config.json` lists them.

    Text never makes a special token: `encode` takes the characters of one for characters, even where the vocabulary
    holds the token as a piece. Only `encode_chat` makes them, at places it is told. There is no separator between a
    prompt and its completion: "sep" is a notion of base models trained here.

    ValueError for a token that is not in the vocabulary and for a decoder of another kind.
    """

    def __init__(self, inner: Any, special_tokens: Mapping[str, str], stop_ids: Sequence[int] = ()):
        if "eos" not in special_tokens:
            raise ValueError(f"special_tokens lacks the role 'eos'; it has {list(special_tokens)}")
        ids = {role: inner.token_to_id(text) for role, text in special_tokens.items()}
        for role, text in special_tokens.items():
            if ids[role] is None:
                raise ValueError(
                    f"the tokenizer has no token {text!r} for the role {role!r}; name one that it has"
                )
        self.special_tokens: dict[str, str] = dict(special_tokens)
        self.special_ids: dict[str, int] = {"pad": ids["eos"]} | ids
        self.eos_id: int = ids["eos"]
        self.pad_id: int = self.special_ids["pad"]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([ids["eos"], *stop_ids]))
        self.prefix_ids: tuple[int, ...] = _prefix(inner)
        added = inner.get_added_tokens_decoder()
        flagged = {token.content: i for i, token in added.items() if token.special}
        # Text -> id of all tokens that text must not make.
        self.special_texts: dict[str, int] = flagged | {special_tokens[role]: i for role, i in ids.items()}
        self._source: str = inner.to_str()
        self._inner = _with_renamed_specials(self._source, self.special_texts)
        self._inner.encode_special_tokens = True  # not even private names are made from text
        # Merges never make a name of several characters; Unigram's search takes any piece of its vocabulary.
        unigram = json.loads(self._source)["model"]["type"] == "Unigram"
        self._pieces_are_reachable: bool = unigram or any(len(text) == 1 for text in self.special_texts)
        self._byte_level, self._bytes = _vocabulary(inner, silent=set(self.special_texts.values()))
        self.vocab_size: int = len(self._bytes)
        for token_id in self.stop_ids:
            check_id(token_id, self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Ids of the text; no special is added. ValueError as `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores.

        ValueError for private-use characters that name special tokens inside, where the vocabulary could find them as
        a piece (Unigram, or special tokens of one character)."""
        if self._pieces_are_reachable:
            for text in texts:
                self._check_private(text)
        return [e.ids for e in self._inner.encode_batch(list(texts), add_special_tokens=False)]

    def encode_chat(self, text: str, specials: Sequence[tuple[int, int]]) -> tuple[list[int], np.ndarray]:
        """Ids of a text whose characters specials[i] = [start, end) are a special token, and those alone.

        The second result is int64 [tokens, 2]: the characters [start, end) of `text` that each token covers. Equal to
        the library's encoding of the text where all special tokens in it are listed.
        """
        self._check_private(text)
        characters = list(text)
        for start, end in specials:
            characters[start:end] = _private_name(self._index[text[start:end]], end - start)
        encoding = self._chat_inner.encode("".join(characters), add_special_tokens=False)
        return encoding.ids, np.asarray(encoding.offsets, np.int64).reshape(-1, 2)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without the specials; bytes that are no UTF-8 become U+FFFD.

        A SentencePiece tokenizer drops the one space that it puts before a text, so a completion that begins with a
        space of its own loses it.
        """
        if self._byte_level:
            return b"".join(self.token_bytes(i) for i in ids).decode(errors="replace")
        # The library's, whose U+FFFD for broken UTF-8 are counted otherwise than Python's.
        return self._inner.decode([i for i in ids if self.token_bytes(i)], skip_special_tokens=True)

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of each row."""
        return [self.decode(row) for row in ids]

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that the id stands for, b"" for a special; ValueError for an id out of range."""
        check_id(token_id, self.vocab_size)
        return self._bytes[token_id]

    def unused_tokens(self, vocab_size: int) -> tuple[int, ...]:
        """Ids below the model's `vocab_size` that no token has: what generation must not draw.

        They are for `generation.Sampling(banned_tokens=...)`. A model's embedding is often padded to a round number.
        ValueError if the model has fewer ids than the tokenizer.
        """
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} ids and the model's vocabulary {vocab_size}; they do not belong "
                "together, or the embedding has to be resized"
            )
        used = set(self._inner.get_vocab(with_added_tokens=True).values())
        return tuple(i for i in range(vocab_size) if i not in used)

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`, as `transformers` reads them.

        What the last two hold besides special tokens and stop ids is left as it is.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self._source, encoding="utf-8")
        roles = {f"{role}_token": text for role, text in self.special_tokens.items()}
        update_object(
            directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | roles
        )
        update_object(directory / "generation_config.json", {"eos_token_id": list(self.stop_ids)})

    def _check_private(self, text: str) -> None:
        last = _PRIVATE + len(self.special_texts)
        for character in text:
            if _PRIVATE <= ord(character) < last:
                raise ValueError(
                    f"the text holds the private-use character U+{ord(character):X}, which stands for a special "
                    "token here; take it out of the text"
                )

    @cached_property
    def _index(self) -> dict[str, int]:
        return {text: index for index, text in enumerate(self.special_texts)}

    @cached_property
    def _chat_inner(self) -> Any:
        return _with_renamed_specials(self._source, self.special_texts)


def load_tokenizer(
    directory: str | Path, *, eos: str | None = None, pad: str | None = None
) -> PretrainedTokenizer:
    """The tokenizer of a pretrained model's folder; see `tokenizer_files` for the files read beside `tokenizer.json`.

    eos, pad: texts of tokens to take instead of those that the files name.

    FileNotFoundError without a `tokenizer.json`; ValueError where no file names an EOS.
    """
    directory = Path(directory)
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no tokenizer at {file}; where the model has a tokenizer.model alone, transformers converts it: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    try:
        inner = tokenizers_library().Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{file} is no tokenizer that the tokenizers library reads: {error}") from error
    stop_ids = read_stop_ids(directory)
    texts = {
        role: text
        for role, text in read_special_tokens(directory).items()
        if role == "eos" or inner.token_to_id(text) is not None
    }
    if eos is not None:
        texts["eos"] = eos
    if pad is not None:
        texts["pad"] = pad
    if "eos" not in texts and stop_ids and inner.id_to_token(stop_ids[0]) is not None:
        texts["eos"] = inner.id_to_token(stop_ids[0])
    if "eos" not in texts:
        raise ValueError(
            f"no file in {directory} names an EOS token; pass eos= with the text of the token that ends a text"
        )
    try:
        return PretrainedTokenizer(inner, texts, stop_ids)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def _prefix(inner: Any) -> tuple[int, ...]:
    """Ids that the tokenizer's post-processor puts before a text, such as BOS."""
    plain = inner.encode("a", add_special_tokens=False).ids
    whole = inner.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def _private_name(index: int, length: int) -> str:
    return chr(_PRIVATE + index) * length


def _with_renamed_specials(source: str, texts: Mapping[str, int]) -> Any:
    """The tokenizer of a `tokenizer.json`, each special token renamed to as many private-use characters.

    The names cannot stand in text by accident, so the library finds special tokens where they are meant alone, with
    all that it does about them (white space, what is put before a text) unchanged.
    """
    if _PRIVATE + len(texts) > _PRIVATE_END:
        raise ValueError(
            f"the tokenizer has {len(texts)} special tokens, more than {_PRIVATE_END - _PRIVATE}"
        )
    names = {text: _private_name(index, len(text)) for index, text in enumerate(texts)}
    raw = json.loads(source)
    raw["post_processor"] = None  # it would cut the white space off the offsets
    raw["truncation"] = raw["padding"] = None
    added = {token["content"]: token for token in raw["added_tokens"]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for text, token_id in texts.items():
        added[text] = (
            {**flags, "id": token_id} | added.get(text, {}) | {"content": names[text], "special": True}
        )
    raw["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    model = raw["model"]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    try:
        inner = tokenizers_library().Tokenizer.from_str(json.dumps(raw, ensure_ascii=False))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"its special tokens cannot be told from text: {error}") from error
    for text, token_id in texts.items():
        found = inner.token_to_id(names[text])
        if found != token_id:
            raise ValueError(f"the special token {text!r} has id {token_id} and is read back as {found}")
    return inner


def _vocabulary(inner: Any, silent: set[int]) -> tuple[bool, list[bytes]]:
    """(Whether the decoder is byte-level; bytes of every id, b"" for specials and ids without a token)."""
    decoder = json.loads(inner.to_str())["decoder"] or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    byte_level = "ByteLevel" in kinds
    replaces = any(step.get("type") == "Replace" and _SPACE in str(step.get("pattern")) for step in steps)
    if not (byte_level or replaces or "Metaspace" in kinds):
        raise ValueError(
            f"the tokenizer's decoder is {decoder.get('type')} of {sorted(map(str, kinds))}; only byte-level ones "
            '(ByteLevel) and SentencePiece\'s (Metaspace, or Replace of "▁") can be read'
        )
    added = inner.get_added_tokens_decoder()
    vocabulary = inner.get_vocab(with_added_tokens=True)
    table = [b""] * (1 + max(vocabulary.values()))
    for text, token_id in vocabulary.items():
        if token_id in silent:
            continue
        if token_id in added:
            table[token_id] = text.encode()
        elif byte_level:
            table[token_id] = bytes_of_characters(text)
        elif "ByteFallback" in kinds and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            table[token_id] = bytes([int(text[3:5], 16)])
        else:
            table[token_id] = text.replace(_SPACE, " ").encode()
    return byte_level, table
