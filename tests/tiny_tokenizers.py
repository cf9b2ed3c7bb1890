"""Small tokenizers of each kind that pretrained models have, trained here with the `tokenizers` library."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rlhfjax.data import PretrainedTokenizer

CORPUS = ["The cat sat on the mat.", "the dog sat on the log; naïve café", "What is 2+2? It is 4, user."] * 4
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
OTHERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
OTHERS += ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"]
ROLES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen and SmolLM; `<s>` stands before a text."""
    inner = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(r"\d| ?\p{L}+|[^\p{L}\d]"), behavior="isolated")
    byte_wise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_wise])
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [*SPECIALS, *OTHERS]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))])
    inner.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), start])
    return inner


def sentencepiece(kind: str) -> Tokenizer:
    """As Llama 2 ("prepend": "▁" before every piece between special tokens), its newer form ("metaspace": before the
    text alone), Gemma ("gemma": never), or T5 ("unigram")."""
    unigram = kind == "unigram"
    inner = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    before = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = decoders.Strip(" ", 1, 0)
    if kind == "prepend":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        inner.decoder = decoders.Sequence([*before, strip])
    elif kind == "gemma":
        inner.normalizer = replace
        inner.decoder = decoders.Sequence(before)
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=unigram)
        inner.decoder = decoders.Metaspace() if unigram else decoders.Sequence([*before, strip])
    special = [*SPECIALS, *OTHERS]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    if unigram:
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=[*special, *pieces], show_progress=False)
    inner.train_from_iterator(CORPUS, trainer)
    raw = json.loads(inner.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in pieces]
    raw["model"]["byte_fallback"] = not unigram
    return Tokenizer.from_str(json.dumps(raw))


BYTE_LEVEL = byte_level()
KINDS = {"byte": BYTE_LEVEL} | {
    name: sentencepiece(name) for name in ("prepend", "metaspace", "gemma", "unigram")
}
TOKENIZERS = {name: PretrainedTokenizer(inner, ROLES) for name, inner in KINDS.items()}


def write_folder(folder: Path, inner: Tokenizer, **files: object) -> Path:
    """A model's folder: `tokenizer.json` and other files, by their names without ".json"."""
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
