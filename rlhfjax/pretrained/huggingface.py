"""The Hugging Face layout of a Llama: `config.json` beside `model.safetensors`, read and written.

A folder written here loads in `transformers` with the same logits, and the other way round. A `tokenizer.json` beside
them is the tokenizer's own affair (`data.BPETokenizer.load`).
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from rlhfjax.config import Decoder

WEIGHTS, CONFIG = "model.safetensors", "config.json"

# Ours -> theirs. Their matrices are [out, in], ours [in, out].
_MATRICES = {
    ("attention", "query"): "self_attn.q_proj",
    ("attention", "key"): "self_attn.k_proj",
    ("attention", "value"): "self_attn.v_proj",
    ("attention", "output"): "self_attn.o_proj",
    ("mlp", "gate"): "mlp.gate_proj",
    ("mlp", "up"): "mlp.up_proj",
    ("mlp", "down"): "mlp.down_proj",
}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def save_pretrained(directory: str | Path, config: Decoder, params: dict, *, dtype: str = "float32") -> None:
    """Writes `config.json` and `model.safetensors` of a Llama, weights in `dtype` (float32, float16 or bfloat16).

    Raises ValueError where the decoder is no Llama (layer norms, learned positions, plain MLP).
    """
    _refuse_other_families(config)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: jnp.asarray(x, dtype) for name, x in _to_llama(config, params).items()}
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(_llama_config(config, dtype), indent=2, sort_keys=True)
    (directory / CONFIG).write_text(text + "\n")


def load_pretrained(directory: str | Path) -> tuple[Decoder, dict]:
    """Reads a Llama written by `transformers` or by `save_pretrained`: (config, params in float32).

    Raises FileNotFoundError for a missing file, ValueError for a damaged one, another family, and missing, surplus or
    misshapen weights; each names the file or the weight.
    """
    directory = Path(directory)
    for file in (CONFIG, WEIGHTS):
        if not (directory / file).exists():
            there = sorted(x.name for x in directory.iterdir()) if directory.is_dir() else "no such folder"
            raise FileNotFoundError(f"{directory / file} is missing (found: {there})")
    try:
        config = _decoder_config(json.loads((directory / CONFIG).read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{directory / CONFIG} is not JSON: {error}") from error
    try:
        weights = load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS} is damaged: {error}") from error
    return config, jax.tree.map(jnp.asarray, _from_llama(config, weights, directory / WEIGHTS))


def _refuse_other_families(config: Decoder) -> None:
    wanted = {
        "norm": "rmsnorm",
        "positions": "rotary",
        "gated_mlp": True,
        "activation": "silu",
        "attention_bias": False,
        "output_bias": False,
        "mlp_bias": False,
    }
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise ValueError(f"a Llama has {field}={value!r}, this decoder {getattr(config, field)!r}")


def _llama_config(config: Decoder, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "mlp_bias": False,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
    }


def _decoder_config(raw: dict[str, Any]) -> Decoder:
    def needed(name: str) -> Any:
        if raw.get(name) is None:
            raise ValueError(f"config.json has no {name}")
        return raw[name]

    if raw.get("model_type") != "llama":
        raise ValueError(
            f'config.json has model_type {raw.get("model_type")!r}; only "llama" can be read yet'
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f'config.json has hidden_act={raw["hidden_act"]!r}; only "silu" can be read yet')
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"config.json asks for rope scaling {rope}, which cannot be read yet")
    for bias in ("attention_bias", "mlp_bias"):
        if raw.get(bias):
            raise ValueError(f"config.json has {bias}=true, which cannot be read yet")
    heads = needed("num_attention_heads")
    return Decoder(
        vocab_size=needed("vocab_size"),
        width=needed("hidden_size"),
        layers=needed("num_hidden_layers"),
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_size=raw.get("head_dim") or needed("hidden_size") // heads,
        mlp_width=needed("intermediate_size"),
        max_positions=needed("max_position_embeddings"),
        norm_epsilon=needed("rms_norm_eps"),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        tie_embeddings=raw.get("tie_word_embeddings", False),
    )


def _to_llama(config: Decoder, params: dict) -> dict[str, jax.Array]:
    weights = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
    }
    if not config.tie_embeddings:
        weights["lm_head.weight"] = params["unembedding"]
    for i in range(config.layers):
        layer, prefix = params[f"layer_{i}"], f"model.layers.{i}"
        for (part, name), theirs in _MATRICES.items():
            # Copied whole: a transposed view would be written in the wrong order.
            weights[f"{prefix}.{theirs}.weight"] = jnp.array(layer[part][name]["kernel"].T)
        for name, theirs in _NORMS.items():
            weights[f"{prefix}.{theirs}.weight"] = layer[name]["scale"]
    return weights


def _from_llama(config: Decoder, weights: dict[str, jax.Array], file: Path) -> dict:
    left = dict(weights)

    def take(name: str, *shape: int) -> np.ndarray:
        if name not in left:
            raise ValueError(f"{file} has no weight {name}")
        array = np.asarray(left.pop(name), np.float32)
        if array.shape != shape:
            raise ValueError(f"{file}: {name} has shape {array.shape}, config.json asks for {shape}")
        return array

    width, queries, keys = config.width, config.heads * config.head_size, config.kv_heads * config.head_size
    shapes = {
        "query": (queries, width),
        "key": (keys, width),
        "value": (keys, width),
        "output": (width, queries),
        "gate": (config.mlp_width, width),
        "up": (config.mlp_width, width),
        "down": (width, config.mlp_width),
    }
    params: dict[str, Any] = {
        "embedding": take("model.embed_tokens.weight", config.vocab_size, width),
        "final_norm": {"scale": take("model.norm.weight", width)},
    }
    if config.tie_embeddings:
        left.pop("lm_head.weight", None)  # some writers repeat the tied matrix
    else:
        params["unembedding"] = take("lm_head.weight", config.vocab_size, width)
    for i in range(config.layers):
        prefix, layer = f"model.layers.{i}", {"attention": {}, "mlp": {}}
        for (part, name), theirs in _MATRICES.items():
            layer[part][name] = {"kernel": take(f"{prefix}.{theirs}.weight", *shapes[name]).T.copy()}
        for name, theirs in _NORMS.items():
            layer[name] = {"scale": take(f"{prefix}.{theirs}.weight", width)}
        params[f"layer_{i}"] = layer
    if left:
        raise ValueError(f"{file} has weights that a Llama of this config does not: {sorted(left)[:5]}")
    return params
