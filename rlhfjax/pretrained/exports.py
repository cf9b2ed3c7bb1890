"""A model from wherever it lies, written whole in the Hugging Face layout, its tokenizer and template beside it."""

from pathlib import Path

from rlhfjax.data import save_tokenizer
from rlhfjax.pretrained.hub import find_model
from rlhfjax.pretrained.huggingface import save_pretrained
from rlhfjax.pretrained.model import open_model
from rlhfjax.pretrained.model_card import CARD, card_of_merged
from rlhfjax.pretrained.peft import adapter_base

POLICY = "policy"  # the folder of a run that holds its policy


def convert(
    model: str | Path, to: str | Path, *, dtype: str = "bfloat16", shard_bytes: int = 5_000_000_000
) -> None:
    """Writes the model that `model` stands for (see `find_model`) into the folder `to`.

    A LoRA adapter is merged into its base. Of a folder the tokenizer's files are copied as they are; those of a GGUF
    file are made from what it says.

    Args:
      dtype: of the weights, "float32", "bfloat16" or "float16".

    Raises what `open_model` and `save_pretrained` do.
    """
    to, source = Path(to), find_model(model)
    origin = source
    while (base_name := adapter_base(origin)) is not None:
        origin = find_model(base_name)
    opened = open_model(source)
    like = origin if origin.is_dir() else None
    save_pretrained(to, opened.config, opened.params, dtype=dtype, like=like, shard_bytes=shard_bytes)
    if like is None:
        save_tokenizer(to, opened.tokenizer, opened.template)
    if (base_name := adapter_base(source)) is not None and (source / CARD).is_file():
        (to / CARD).write_text(card_of_merged((source / CARD).read_text(), base_name))
