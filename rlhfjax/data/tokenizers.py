"""Text to token ids and back: a byte tokenizer that needs nothing, and a byte-level BPE.

Both give back exactly the text they were given, any Unicode included. Special tokens have a role ("pad",
"eos", "sep" and any other name) and are never made from text: a document that holds the characters of a
special token is encoded as those characters. `decode` leaves specials out. `pad` and `eos` are always two
tokens, so that a program that confuses padding with the end of a text fails. (Tokenizers of other people's
models are another matter: `pretrained_tokenizers`.)
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self

__all__ = ["SPECIAL_TOKENS", "BPETokenizer", "ByteTokenizer", "Tokenizer", "train_bpe"]

# Role -> text of the special token. "sep" stands between a prompt and its completion.
SPECIAL_TOKENS: Mapping[str, str] = {"pad": "<|pad|>", "eos": "<|end|>", "sep": "<|sep|>"}


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer. Ids are ints in [0, vocab_size)."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, specials included."""
        ...

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Role -> id; has at least "pad" and "eos", and "sep" where prompts end with a separator."""
        ...

    @property
    def prefix_ids(self) -> Sequence[int]:
        """Ids that stand before every text (BOS of many pretrained models), which `encode` does not add."""
        ...

    @property
    def pad_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Ids of the text; no special is added."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without the specials; bytes that are no UTF-8 become U+FFFD."""
        ...

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]: ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for, b"" for a special; `decode` joins them and reads UTF-8.

        SentencePiece's `decode` also drops a space before the text.
        """
        ...


class ByteTokenizer:
    """Ids 0-255 are bytes of UTF-8, the specials follow in the order given.

    special_tokens: role -> text, with at least the roles "pad", "eos" and "sep".
    """

    def __init__(self, special_tokens: Mapping[str, str] = SPECIAL_TOKENS):
        _check_special_tokens(special_tokens)
        self.special_ids = {role: 256 + i for i, role in enumerate(special_tokens)}
        self.pad_id, self.eos_id, self.sep_id = (self.special_ids[role] for role in SPECIAL_TOKENS)
        self.prefix_ids: tuple[int, ...] = ()
        self.vocab_size = 256 + len(special_tokens)

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes of the text."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without the specials; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode(errors="replace")

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of each row."""
        return [self.decode(row) for row in ids]

    def token_bytes(self, token_id: int) -> bytes:
        """The byte of an id below 256, b"" for a special; ValueError for an id out of range."""
        check_id(token_id, self.vocab_size)
        return bytes([token_id]) if token_id < 256 else b""


class BPETokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) in the `tokenizer.json` format.

    Wraps a `tokenizers.Tokenizer` whose decoder is ByteLevel (GPT-2, SmolLM, Qwen, Llama 3, `train_bpe`).

    special_tokens: role -> text, with at least the roles "pad", "eos" and "sep", all in the vocabulary.
    """

    def __init__(self, inner: Any, special_tokens: Mapping[str, str] = SPECIAL_TOKENS):
        _check_special_tokens(special_tokens)
        _check_byte_level(inner)
        ids = {role: inner.token_to_id(text) for role, text in special_tokens.items()}
        for role, text in special_tokens.items():
            if ids[role] is None:
                raise ValueError(
                    f"the tokenizer has no token {text!r} for the role {role!r}; "
                    "pass special_tokens={role: text} with the texts that it has"
                )
        inner.encode_special_tokens = True  # characters of a special token in a text stay characters
        self._inner = inner
        self.special_ids: dict[str, int] = ids
        self.pad_id, self.eos_id, self.sep_id = (ids[role] for role in SPECIAL_TOKENS)
        self.prefix_ids: tuple[int, ...] = ()
        self._bytes = _vocabulary_bytes(inner, silent=set(ids.values()))
        self.vocab_size = len(self._bytes)

    @classmethod
    def load(cls, path: str | Path, special_tokens: Mapping[str, str] = SPECIAL_TOKENS) -> Self:
        """Reads a `tokenizer.json`; a folder stands for the file of that name in it. ValueError for another file."""
        library = tokenizers_library()
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at {file}; BPETokenizer.save writes one")
        try:
            inner = library.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no narrower class
            raise ValueError(
                f"{file} is no tokenizer that the tokenizers library reads ({error}); make it again"
            ) from error
        try:
            return cls(inner, special_tokens)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes a `tokenizer.json`, the same bytes for the same tokenizer."""
        Path(path).write_text(self._inner.to_str(pretty=True), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of the text; no special is added."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [e.ids for e in self._inner.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without the specials; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode(errors="replace")

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of each row."""
        return [self.decode(row) for row in ids]

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that the id stands for, b"" for a special; ValueError for an id out of range."""
        check_id(token_id, self.vocab_size)
        return self._bytes[token_id]


def train_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Mapping[str, str] = SPECIAL_TOKENS
) -> BPETokenizer:
    """Learns a byte-level BPE from texts; the same texts give the same tokenizer, byte for byte.

    vocab_size counts the specials (which take the first ids) and the 256 bytes. A corpus too small for that
    many merges gives fewer ids: read `vocab_size` of the result.
    """
    library = tokenizers_library()
    _check_special_tokens(special_tokens)
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(f"vocab_size is {vocab_size}; bytes and special tokens alone need {least}")
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens.values()),
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return BPETokenizer(inner, special_tokens)


def tokenizers_library() -> Any:
    """The `tokenizers` library, imported only where it is used."""
    if find_spec("tokenizers") is None:
        raise ModuleNotFoundError(
            'BPETokenizer and train_bpe need the tokenizers library: pip install "rlhfjax[text]" '
            "(ByteTokenizer needs nothing)"
        )
    return import_module("tokenizers")


def _check_special_tokens(special_tokens: Mapping[str, str]) -> None:
    missing = [role for role in SPECIAL_TOKENS if role not in special_tokens]
    if missing:
        raise ValueError(f"special_tokens lacks the roles {missing}; it has {list(special_tokens)}")
    if len(set(special_tokens.values())) < len(special_tokens) or "" in special_tokens.values():
        raise ValueError(f"special tokens must be distinct and not empty: {dict(special_tokens)}")


def _check_byte_level(inner: Any) -> None:
    decoder = json.loads(inner.to_str())["decoder"] or {}
    if "ByteLevel" not in [decoder.get("type"), *(d.get("type") for d in decoder.get("decoders", ()))]:
        raise ValueError(
            f"the tokenizer is not a byte-level one (its decoder is {decoder.get('type')}), "
            "so its tokens are no strings of bytes; use one with a ByteLevel decoder"
        )


def _vocabulary_bytes(inner: Any, silent: set[int]) -> list[bytes]:
    """Bytes of every id; b"" for special tokens, the ids in `silent` and ids that the file leaves out."""
    vocabulary = inner.get_vocab(with_added_tokens=True)
    added = inner.get_added_tokens_decoder()
    table = [b""] * (1 + max(vocabulary.values()))
    for text, token_id in vocabulary.items():
        if token_id in silent or (token_id in added and added[token_id].special):
            continue
        # An added token is written as plain text, a token of the BPE in the alphabet of _BYTE_OF.
        table[token_id] = text.encode() if token_id in added else bytes_of_characters(text)
    return table


def bytes_of_characters(text: str) -> bytes:
    """Bytes of a token that a byte-level file writes with one character a byte; other text is UTF-8 itself."""
    if all(c in _BYTE_OF for c in text):
        return bytes(_BYTE_OF[c] for c in text)
    return text.encode()


def check_id(token_id: int, vocab_size: int) -> None:
    """ValueError unless the id is in [0, vocab_size)."""
    if not 0 <= token_id < vocab_size:
        raise ValueError(f"token id {token_id} is not in [0, {vocab_size})")


def _byte_of_character() -> dict[str, int]:
    """The characters that byte-level BPE files write bytes with (GPT-2, `bytes_to_unicode` in encoder.py).

    Printable Latin-1 stands for itself, each other byte for the next character from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_of_character()
