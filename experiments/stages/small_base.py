"""An own world of text in the run's folder: rows that were made up, a tokenizer for them, and an untrained decoder."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from experiments.stages.configs import Text
from rlhfjax.config import Decoder
from rlhfjax.data import SPECIAL_TOKENS, BPETokenizer
from rlhfjax.data.tokenizers import tokenizers_library
from rlhfjax.networks import decoder
from rlhfjax.pretrained import save_pretrained
from rlhfjax.run_folder import RunFolder, write_atomically


def write_world(
    config: Text,
    shape: Decoder,
    rows: Sequence[Mapping[str, Any]],
    folder: RunFolder,
    *,
    words: Iterable[str] = (),
) -> Text:
    """Writes the rows (prompt, completion, split) into the run's folder and, unless a base is named, a base for them.

    The base is an untrained decoder of that shape, drawn from the run's seed, with a tokenizer of the rows' characters
    and of whole `words`. Returns the settings of the text with both filled in. Runs that are resumed write the same.
    """
    data, base = folder.path / "rows.jsonl", folder.path / "base"
    write_atomically(data, "".join(json.dumps(row) + "\n" for row in rows))
    if not config.base and not (base / "tokenizer.json").exists():  # written last
        tokenizer = small_tokenizer([row[x] for row in rows for x in ("prompt", "completion")], words)
        write_base(base, shape, tokenizer.vocab_size, folder.seed)
        tokenizer.save(base / "tokenizer.json")
    return dataclasses.replace(
        config,
        data=str(data.absolute()),
        prompt_field="prompt",
        completion_field="completion",
        base=config.base or str(base.absolute()),
    )


def write_base(path: Path, shape: Decoder, vocab_size: int, seed: int) -> None:
    """An untrained decoder in the Hugging Face layout, without a tokenizer."""
    path.mkdir(exist_ok=True)
    shape = dataclasses.replace(shape, vocab_size=vocab_size)
    save_pretrained(path, shape, jax.jit(decoder(shape).init)(jax.random.key(seed)))


@contextmanager
def planned_base(config: Text, shape: Decoder, vocab_size: int) -> Iterator[Text]:
    """The settings with a base that lies somewhere for as long, where none is named: for `plan`."""
    with TemporaryDirectory() as folder:
        if not config.base:
            write_base(Path(folder), shape, vocab_size, 0)
        yield dataclasses.replace(config, base=config.base or folder)


def small_tokenizer(texts: Iterable[str], words: Iterable[str] = ()) -> BPETokenizer:
    """A token for every byte that occurs in the texts, and one for each of `words` wherever it stands.

    A text with other bytes than these loses them.
    """
    library = tokenizers_library()
    byte_level = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    seen = {character for text in texts for character in text}
    alphabet = sorted({x for character in seen for x in byte_level.pre_tokenize_str(character)[0][0]})
    tokens = [*SPECIAL_TOKENS.values(), *alphabet]
    inner = library.Tokenizer(
        library.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    )
    inner.pre_tokenizer, inner.decoder = byte_level, library.decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL_TOKENS.values()))
    inner.add_tokens([library.AddedToken(word, normalized=False) for word in words])
    return BPETokenizer(inner)
