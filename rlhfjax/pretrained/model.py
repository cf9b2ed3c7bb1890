"""A pretrained model with all that belongs to it, from wherever it lies."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax

from rlhfjax.config import Decoder
from rlhfjax.data import (
    ChatTemplate,
    PretrainedTokenizer,
    end_of_turn,
    load_chat_template,
    load_tokenizer,
)
from rlhfjax.networks import merge_lora
from rlhfjax.pretrained.gguf import gguf_chat_template, gguf_config, gguf_tokenizer, load_gguf, read_gguf
from rlhfjax.pretrained.hub import find_model
from rlhfjax.pretrained.huggingface import Place, huggingface_config, load_pretrained
from rlhfjax.pretrained.peft import adapter_base, load_peft


class Pretrained(NamedTuple):
    """A model, its tokenizer and its chat template."""

    source: Path  # folder or GGUF file
    config: Decoder
    params: dict
    tokenizer: PretrainedTokenizer
    template: ChatTemplate | None  # None: it has none
    stop_tokens: tuple[int, ...]  # ids that end a text or an assistant's turn
    unused_tokens: tuple[int, ...]  # ids of the model that the tokenizer does not have, not to be drawn


def pretrained_config(source: str | Path) -> Decoder:
    """The decoder that a folder in the Hugging Face layout or a GGUF file holds, without its weights.

    Raises as `load_pretrained` and `load_gguf` do.
    """
    source = Path(source)
    return gguf_config(read_gguf(source)) if source.is_file() else huggingface_config(source)


def open_model(
    name: str | Path,
    *,
    dtype: str = "float32",
    compute_dtype: str = "float32",
    place: Place | None = None,
    max_positions: int | None = None,
    revision: str | None = None,
) -> Pretrained:
    """Opens the model that `name` stands for (see `find_model`): the Hugging Face layout, GGUF, or a LoRA adapter in
    PEFT's layout, which is merged into its base.

    Args:
      dtype: of the params, "float32" or "bfloat16".
      compute_dtype: `dtype` of the config.
      place, max_positions: as in `load_pretrained`; `place` is for the Hugging Face layout.

    Raises what `find_model`, `load_pretrained`, `load_gguf`, `load_peft` and `load_tokenizer` do, and ValueError where
    the tokenizer has more ids than the model.
    """
    source = find_model(name, revision=revision)
    if (base_name := adapter_base(source)) is not None:
        base = open_model(
            base_name, dtype=dtype, compute_dtype=compute_dtype, place=place, max_positions=max_positions
        )
        lora, adapters = load_peft(source, base.config, base.params)
        merged = jax.jit(partial(merge_lora, config=lora))(base.params, adapters)
        params = jax.tree.map(lambda new, old: new.astype(old.dtype), merged, base.params)
        return base._replace(source=source, params=params)
    if source.is_file():
        gguf = read_gguf(source)
        config, params = load_gguf(
            gguf, dtype=dtype, compute_dtype=compute_dtype, max_positions=max_positions
        )
        tokenizer = gguf_tokenizer(gguf)
        template = gguf_chat_template(gguf) if "tokenizer.chat_template" in gguf.metadata else None
    else:
        config, params = load_pretrained(
            source, dtype=dtype, compute_dtype=compute_dtype, place=place, max_positions=max_positions
        )
        tokenizer = load_tokenizer(source)
        try:
            template = load_chat_template(source)
        except FileNotFoundError:
            template = None
    stops = tokenizer.stop_ids if template is None else end_of_turn(template, tokenizer)
    return Pretrained(
        source, config, params, tokenizer, template, stops, tokenizer.unused_tokens(config.vocab_size)
    )
