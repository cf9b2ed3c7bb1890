"""The Hugging Face layout, `config.json` beside safetensors, read and written for the families in `families`.

A folder written here loads in `transformers` with the same logits, and the other way round. Reward models are sequence
classifiers there: `score.weight` in place of the output embedding.
"""

import dataclasses
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.config import Decoder
from rlhfjax.pretrained.families import Family, find_family
from rlhfjax.pretrained.families_config import (
    REWRITTEN,
    choose_family,
    read_config,
    text_config,
    write_config,
)
from rlhfjax.pretrained.weights import SCORE, Weight, assemble, read_part, weights_of
from rlhfjax.pretrained.weights_files import (
    CONFIG,
    Stored,
    json_writer,
    open_weights,
    read_json,
    remove_other_weights,
    weight_files,
    write_folder,
)

Place = Callable[[tuple[str, ...], tuple[int, ...]], Any]  # (path, shape) -> a jax Sharding, or None

DTYPES = ("float32", "bfloat16", "float16")
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# What belongs to a tokenizer or to generation, copied from the folder that a model came from.
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def load_pretrained(
    directory: str | Path,
    *,
    dtype: str | None = "float32",
    compute_dtype: str | None = None,
    place: Place | None = None,
    max_positions: int | None = None,
) -> tuple[Decoder, dict]:
    """Reads a causal language model written by `transformers` or by `save_pretrained`: (config, params).

    One tensor at a time is in host memory, or the slices of it that are asked for; never the whole file.

    Args:
      dtype: of the params: "float32", "bfloat16", "float16", or None: as they are stored.
      compute_dtype: `dtype` of the config; None: the default, "float32".
      place: (path, shape) -> the sharding that an array gets, each device reading its own slice, or None: the default
        device. The path is that in params, ("layer_0", "attention", "query", "kernel").
      max_positions: the longest context that will be used, at most that of the checkpoint; None: that. Learned
        positions beyond it are not read. It decides on the factors of a longrope (Phi-3): the short ones where it lies
        within the pretraining's context, else the long ones, at every length; transformers goes by the text's length.

    Raises FileNotFoundError for a missing file; ValueError for a damaged one, for a family, an activation, a rope
    scaling or another option that is not supported, for quantised weights, and for missing, surplus or misshapen ones;
    each names the file and what is wrong there.
    """
    family, config = _config_of(Path(directory))
    kept = _shortened(config, max_positions)
    with open_weights(Path(directory)) as stored:
        params = _read(stored, Path(directory), family, config, kept, _checked(dtype), place)
    return _computing(kept, compute_dtype), params


def huggingface_config(directory: str | Path) -> Decoder:
    """What a checkpoint's config.json says, without its weights. Raises as `load_pretrained`."""
    return _config_of(Path(directory))[1]


def save_pretrained(
    directory: str | Path,
    config: Decoder,
    params: dict,
    *,
    dtype: str | None = "float32",
    family: str | None = None,
    like: str | Path | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes `config.json` and `model.safetensors`, or shards and their index, as `transformers` reads them.

    An earlier checkpoint in the folder stays whole until the new one is: files are written beside it, then moved.

    Args:
      params: of this config, adapters merged. One shard at a time is gathered in host memory.
      dtype: "float32", "bfloat16", "float16", or None: each array in its own.
      family: a `model_type`; None: the first that can express the config.
      like: the folder that the model came from. Its family is kept, so are the fields of its config.json that say
        nothing of the decoder, and its files of the tokenizer, the chat template and generation are copied. Without
        it no ids of special tokens are written.
      shard_bytes: size above which weights are cut into files.

    Raises ValueError where no family, or not the one asked for, has what the config says (the field is named), and
    where the params are not those of the config.
    """
    target, raw = _described(config, family, like)
    weights = _written(target, config)
    _write(Path(directory), raw, weights, params, _checked(dtype), shard_bytes, like)


def load_reward_model(
    directory: str | Path,
    *,
    dtype: str | None = "float32",
    compute_dtype: str | None = None,
    place: Place | None = None,
    max_positions: int | None = None,
) -> tuple[Decoder, dict]:
    """Reads a sequence classifier with one label: (config, params as `recipes.init_reward_model` makes them).

    The params are {"trunk": LM params, "head": {"kernel" float32 [D], "bias"}, "gain", "bias"}, with biases 0 and gain
    1. A classifier has no output embedding: the config says tied, so that the trunk needs none. `transformers` scores
    the last token whose id is not the config's `pad_token_id`; `recipes.make_reward_model` the last of a completion.

    Arguments and errors are those of `load_pretrained`; paths start with "trunk" or "head".
    """
    directory = Path(directory)
    family, config = _config_of(directory)
    config = dataclasses.replace(config, tie_embeddings=True)
    kept = _shortened(config, max_positions)
    place = place or (lambda path, shape: None)
    with open_weights(directory) as stored:
        score = Weight(("head", "kernel"), (1, config.width), SCORE, False, 0, *[config.width] * 3)
        trunk = _read(
            stored,
            directory,
            family,
            config,
            kept,
            _checked(dtype),
            lambda path, shape: place(("trunk", *path), shape),
            also=(score,),
        )
        kernel = read_part(stored.tensor(SCORE), score, (slice(None), slice(None)))[0].astype(np.float32)
    sharding = place(("head", "kernel"), kernel.shape)
    kernel = jnp.asarray(kernel) if sharding is None else jax.device_put(kernel, sharding)
    head = {"kernel": kernel, "bias": jnp.zeros(())}
    params = {"trunk": trunk, "head": head, "gain": jnp.ones(()), "bias": jnp.zeros(())}
    return _computing(kept, compute_dtype), params


def save_reward_model(
    directory: str | Path,
    config: Decoder,
    params: dict,
    *,
    pad_token_id: int | None = None,
    dtype: str | None = "float32",
    family: str | None = None,
    like: str | Path | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a reward model as a sequence classifier with one label.

    Args:
      params: {"trunk", "head": {"kernel" [D], "bias"}}, and "gain" and "bias" where scores are normalised: the gain is
        folded into the kernel. A classifier's score has no bias, and an RMS norm before it has none that could carry
        one: gain * head bias + bias must be 0.
      pad_token_id: an id that no text ends with: `transformers` scores the last token that is another. None: that of
        `like`.

    The other arguments and errors are those of `save_pretrained`; ValueError also where there is a bias.
    """
    head, gain = params["head"], np.float32(params.get("gain", 1.0))
    bias = float(gain * np.float32(head["bias"]) + np.float32(params.get("bias", 0.0)))
    if bias != 0.0:
        raise ValueError(
            f"these scores have a bias of {bias} (gain * head bias + bias), and a sequence classifier has none; set "
            "both biases to 0 first: scores all move by the same, and what is preferred stays"
        )
    kernel = gain * np.asarray(head["kernel"], np.float32)
    if kernel.shape != (config.width,):
        raise ValueError(
            f"the head's kernel has shape {kernel.shape}, a score of this trunk ({config.width},)"
        )
    target, raw = _described(config, family, like)
    pad = raw.get("pad_token_id") if pad_token_id is None else pad_token_id
    if pad is None or not 0 <= pad < config.vocab_size:
        raise ValueError(
            f"pad_token_id={pad}: a sequence classifier needs one in [0, {config.vocab_size}) to find the last token"
        )
    raw |= {
        "architectures": [target.classifier],
        "pad_token_id": pad,
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "problem_type": "regression",
    }
    # The output embedding, where there is one, has no place in a classifier.
    trunk = {name: array for name, array in params["trunk"].items() if name != "unembedding"}
    weights = _written(target, dataclasses.replace(config, tie_embeddings=True))
    weights.append(Weight(("score",), (1, config.width), SCORE, False, 0, *[config.width] * 3))
    trunk["score"] = kernel[None]
    _write(Path(directory), raw, weights, trunk, _checked(dtype), shard_bytes, like)


def _checked(dtype: str | None) -> str | None:
    if dtype not in (*DTYPES, None):
        raise ValueError(f"dtype={dtype!r} is not supported; choose one of {DTYPES}, or None: as it is")
    return dtype


def _computing(config: Decoder, dtype: str | None) -> Decoder:
    return config if dtype is None else dataclasses.replace(config, dtype=dtype)


def _shortened(config: Decoder, max_positions: int | None) -> Decoder:
    if max_positions is None:
        return config
    if not 1 <= max_positions <= config.max_positions:
        raise ValueError(
            f"max_positions={max_positions} must lie in [1, {config.max_positions}], the checkpoint's"
        )
    return dataclasses.replace(config, max_positions=max_positions)


def _config_of(directory: Path) -> tuple[Family, Decoder]:
    raw = read_json(directory / CONFIG)
    try:
        return read_config(raw)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error


def _read(
    stored: Stored,
    directory: Path,
    family: Family,
    config: Decoder,
    kept: Decoder,
    dtype: str | None,
    place: Place | None,
    also: tuple[Weight, ...] = (),
) -> dict:
    """The params of `config`, positions as of `kept`. Names and shapes, those of `also` too, are checked before."""
    prefixes = (family.prefix, *family.other_prefixes)
    prefix = next((x for x in prefixes if x + family.embedding in stored.files), family.prefix)
    unembedding = next((x for x in family.unembedding if x in stored.files), family.unembedding[0])
    weights = weights_of(family, config, prefix=prefix, unembedding=unembedding)
    _check_stored(stored, directory, family, config, [*weights, *also])
    params: dict[str, Any] = {}
    for weight in weights:
        shape = (kept.max_positions, config.width) if weight.path == ("positions",) else weight.shape
        weight = weight._replace(shape=shape)
        sharding = place(weight.path, shape) if place is not None else None
        array = _array(stored.tensor(weight.name), weight, dtype, sharding)
        at = params
        for name in weight.path[:-1]:
            at = at.setdefault(name, {})
        at[weight.path[-1]] = array
    return params


def _array(tensor: Any, weight: Weight, dtype: str | None, sharding: Any) -> jax.Array:
    kind = jnp.dtype(dtype or _STORED[tensor.get_dtype()])

    def part(index: Any) -> np.ndarray:
        return np.ascontiguousarray(read_part(tensor, weight, index).astype(kind, copy=False))

    if sharding is None:
        return jnp.asarray(part((slice(None),) * len(weight.shape)))
    return jax.make_array_from_callback(weight.shape, sharding, part)


def _check_stored(
    stored: Stored, directory: Path, family: Family, config: Decoder, weights: list[Weight]
) -> None:
    for weight in weights:
        if weight.name not in stored.files:
            hint = f"; it has {SCORE}: see load_reward_model" if SCORE in stored.files else ""
            raise ValueError(f"{directory} has no weight {weight.name}{hint}")
        file, tensor = stored.files[weight.name], stored.tensor(weight.name)
        if tuple(tensor.get_shape()) != weight.stored_shape():
            raise ValueError(
                f"{file}: {weight.name} has shape {tuple(tensor.get_shape())}, config.json asks for "
                f"{weight.stored_shape()}"
            )
        if tensor.get_dtype() not in _STORED:
            raise ValueError(
                f"{file}: {weight.name} is stored as {tensor.get_dtype()}, which cannot be read (quantised weights "
                f"cannot either); supported: {sorted(_STORED)}"
            )
    # Some writers repeat the tied matrix.
    knowingly = set(family.unembedding) if config.tie_embeddings else set()
    surplus = {
        name: file
        for name, file in stored.files.items()
        if name not in knowingly and not any(re.search(pattern, name) for pattern in family.skipped)
    }
    for weight in weights:
        surplus.pop(weight.name, None)
    if surplus:
        hint = f" (with {SCORE} it is a classifier: see load_reward_model)" if SCORE in surplus else ""
        raise ValueError(
            f"{next(iter(surplus.values()))} has weights that a {family.model_type} of this config does not: "
            f"{sorted(surplus)[:5]}{hint}"
        )


def _described(config: Decoder, family: str | None, like: str | Path | None) -> tuple[Family, dict[str, Any]]:
    """The family to write, and its config.json but for the dtype."""
    if like is None:
        target = choose_family(config) if family is None else find_family(family)
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        return target, special | write_config(target, config)
    origin = text_config(read_json(Path(like) / CONFIG))
    target, _ = read_config(origin)
    if family not in (None, target.model_type):
        raise ValueError(f"family={family!r}, but {Path(like) / CONFIG} is of a {target.model_type}")
    origin = {name: value for name, value in origin.items() if name not in REWRITTEN}
    return target, origin | write_config(target, config)


def _written(family: Family, config: Decoder) -> list[Weight]:
    return weights_of(family, config, prefix=family.prefix, unembedding=family.unembedding[0])


def _flat(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {at: leaf for name, branch in tree.items() for at, leaf in _flat(branch, (*path, name)).items()}


def _write(
    directory: Path,
    raw: dict[str, Any],
    weights: list[Weight],
    params: dict,
    dtype: str | None,
    shard_bytes: int,
    like: str | Path | None,
) -> None:
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes} must be at least 1")
    arrays = _flat(params)
    expected = {weight.path: weight.shape for weight in weights}
    for path, shape in expected.items():
        if path not in arrays or tuple(arrays[path].shape) != shape:
            found = f"have shape {tuple(arrays[path].shape)}" if path in arrays else "are missing"
            raise ValueError(f"params {'.'.join(path)} {found}; this config needs {shape}")
    surplus = sorted(".".join(path) for path in arrays if path not in expected)
    if surplus:
        raise ValueError(
            f"params {surplus[:5]} have no place in a {raw['model_type']} of this config (adapters must be merged, "
            "quantised kernels dequantised first)"
        )
    tensors: dict[str, list[Weight]] = {}
    for weight in weights:
        tensors.setdefault(weight.name, []).append(weight)
    kinds = {
        name: jnp.dtype(dtype) if dtype else jnp.result_type(*(arrays[part.path].dtype for part in parts))
        for name, parts in tensors.items()
    }
    sizes = {
        name: math.prod(parts[0].stored_shape()) * kinds[name].itemsize for name, parts in tensors.items()
    }

    def make(name: str) -> np.ndarray:
        return assemble([(part, arrays[part.path]) for part in tensors[name]], kinds[name])

    named = str(dtype or arrays["embedding",].dtype)
    files = weight_files(sizes, make, shard_bytes)
    files[CONFIG] = json_writer(raw | {"dtype": named, "torch_dtype": named})
    if like is not None:
        for name in _BESIDE:
            origin = Path(like) / name
            if origin.exists():
                files[name] = lambda file, origin=origin: shutil.copyfile(origin, file)
    write_folder(directory, files)
    remove_other_weights(directory, files)
