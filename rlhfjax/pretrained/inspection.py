"""What a model is, in words."""

from pathlib import Path

import jax

from rlhfjax.config import Decoder
from rlhfjax.pretrained.model import Pretrained, open_model

_CONVERSATION = [{"role": "user", "content": "Hi"}]


def describe(name: str | Path) -> str:
    """Architecture, size, tokenizer and chat template of the model that `name` stands for (see `find_model`)."""
    model = open_model(name, dtype="bfloat16")
    config, tokenizer = model.config, model.tokenizer
    count = sum(x.size for x in jax.tree.leaves(model.params))
    lines = [
        str(model.source),
        f"  parameters      {count:,} ({2e-9 * count:.2f} GB in bfloat16, {4e-9 * count:.2f} GB in float32)",
        f"  decoder         {config.layers} layers, width {config.width}, {config.heads} heads of {config.head_size} "
        f"({config.kv_heads} for keys and values), MLP {config.mlp_width}",
        f"  vocabulary      {config.vocab_size:,} ({len(model.unused_tokens)} of them unknown to the tokenizer), "
        f"{'tied' if config.tie_embeddings else 'untied'} embeddings",
        f"  context         {config.max_positions:,} tokens",
        f"  cache           {cache_bytes(config):,} bytes a token in bfloat16",
        f"  differs from Llama in  {', '.join(_unlike_llama(config)) or 'nothing'}",
        f"  special tokens  {', '.join(f'{role} {text!r}' for role, text in tokenizer.special_tokens.items())}",
        f"  stops at        {', '.join(map(str, model.stop_tokens))}",
    ]
    return "\n".join([*lines, *_template_lines(model)])


def cache_bytes(config: Decoder, bytes_each: int = 2) -> int:
    """Bytes of keys and values that one token takes in the cache."""
    return 2 * config.layers * config.kv_heads * config.head_size * bytes_each


def _unlike_llama(config: Decoder) -> list[str]:
    plain = Decoder()
    sizes = {"vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "mlp_width", "max_positions"}
    other = sizes | {"norm_epsilon", "rope_theta", "tie_embeddings", "dtype", "embedding_stddev", "windows"}
    found = {
        name: value
        for name, value in vars(config).items()
        if name not in other and value != getattr(plain, name)
    }
    described = [f"{name}={value}" for name, value in found.items()]
    if any(config.windows):
        windowed = [i for i, window in enumerate(config.windows) if window]
        described.append(f"windows of {max(config.windows)} in {len(windowed)} of {config.layers} layers")
    return described


def _template_lines(model: Pretrained) -> list[str]:
    if model.template is None:
        return ["  chat template   none"]
    text = model.template.render(_CONVERSATION, add_generation_prompt=True)
    return ["  chat template   renders a user's Hi as", *(f"    {line}" for line in text.splitlines())]
