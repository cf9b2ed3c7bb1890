"""The tokenizer in a GGUF file's metadata, built for the `tokenizers` library.

The file holds tokens, their types, and merges (byte-level BPE) or scores (SentencePiece); how text is cut before the
merges it names by a word ("tokenizer.ggml.pre"), whose meaning is llama.cpp's source (src/llama-vocab.cpp).
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from rlhfjax.data.pretrained_tokenizers import PretrainedTokenizer

__all__ = ["build_tokenizer"]

# Types of tokens.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut, by its name in the file: "gpt2" (GPT-2's own rule), "digits" (that, each digit apart) or a pattern.
_CUTS = {
    "gpt-2": "gpt2",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def build_tokenizer(metadata: Mapping[str, Any], *, where: str) -> PretrainedTokenizer:
    """The tokenizer of a GGUF file. ValueError, which begins with `where`, for a kind that cannot be built."""

    def needed(name: str) -> Any:
        if f"tokenizer.ggml.{name}" not in metadata:
            raise ValueError(f"{where} has no metadata 'tokenizer.ggml.{name}'; it holds no tokenizer")
        return metadata[f"tokenizer.ggml.{name}"]

    tokens, kind = needed("tokens"), needed("model")
    if kind == "gpt2":
        inner = _byte_level(tokens, needed("merges"), metadata.get("tokenizer.ggml.pre"), where)
    elif kind == "llama":
        space = metadata.get("tokenizer.ggml.add_space_prefix", True)
        inner = _sentencepiece(tokens, needed("scores"), space)
    else:
        raise ValueError(
            f"{where} has a tokenizer of kind {kind!r}; only 'gpt2' (byte-level BPE) and 'llama' can be built"
        )
    _add_tokens(inner, tokens, metadata.get("tokenizer.ggml.token_type", ()))
    ids = {role: metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in _ROLES.items()}
    roles = {role: tokens[i] for role, i in ids.items() if i is not None}
    stops = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and "bos" in roles:
        library = import_module("tokenizers")
        inner.post_processor = library.processors.TemplateProcessing(
            single=f"{roles['bos']} $A", special_tokens=[(roles["bos"], ids["bos"])]
        )
    return PretrainedTokenizer(inner, roles, [i for i in stops if i is not None])


def _byte_level(tokens: Sequence[str], merges: Sequence[str], pre: str | None, where: str) -> Any:
    library = import_module("tokenizers")
    if pre not in _CUTS:
        raise ValueError(f"{where} cuts text by the rule {pre!r}; only {', '.join(_CUTS)} are known")
    cut = _CUTS[pre]
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Llama 3's words that are tokens are taken whole, whatever the merges say.
    model = library.models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=cut == _LLAMA3)
    inner = library.Tokenizer(model)
    bytes_alone = library.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=cut in ("gpt2", "digits")
    )
    if cut == "gpt2":
        inner.pre_tokenizer = bytes_alone
    elif cut == "digits":
        digits = library.pre_tokenizers.Digits(individual_digits=True)
        inner.pre_tokenizer = library.pre_tokenizers.Sequence([digits, bytes_alone])
    else:
        split = library.pre_tokenizers.Split(library.Regex(cut), behavior="isolated")
        inner.pre_tokenizer = library.pre_tokenizers.Sequence([split, bytes_alone])
    if pre == "qwen2":
        inner.normalizer = library.normalizers.NFC()
    inner.decoder = library.decoders.ByteLevel()
    return inner


def _sentencepiece(tokens: Sequence[str], scores: Sequence[float], space: bool) -> Any:
    """SentencePiece's BPE: it merges the neighbours whose union has the highest score, which as merges are all ways to
    cut each token in two, by the score of the whole."""
    library = import_module("tokenizers")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for i in sorted(range(len(tokens)), key=lambda i: -scores[i]):
        token = tokens[i]
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
        merges += sorted(known, key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
    unknown = tokens[0]
    model = library.models.BPE(
        vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    inner = library.Tokenizer(model)
    replace = library.normalizers.Replace(" ", "▁")
    before = [library.normalizers.Prepend("▁")] if space else []
    inner.normalizer = library.normalizers.Sequence([*before, replace])
    steps = [library.decoders.Replace("▁", " "), library.decoders.ByteFallback(), library.decoders.Fuse()]
    inner.decoder = library.decoders.Sequence([*steps, library.decoders.Strip(" ", 1, 0)] if space else steps)
    return inner


def _add_tokens(inner: Any, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control tokens become special ones; user-defined tokens are found in text before anything else."""
    library = import_module("tokenizers")
    for text, kind in zip(tokens, types, strict=False):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            special = kind != _USER_DEFINED
            token = library.AddedToken(text, special=special, normalized=False)
            (inner.add_special_tokens if special else inner.add_tokens)([token])
