"""LoRA adapters as `peft` keeps them: `adapter_config.json` beside `adapter_model.safetensors`, in and out.

A folder written here loads with `peft.PeftModel.from_pretrained` on the same base, with the same logits, and the other
way round. For a family whose query, key and value are one matrix (gpt2, gpt_neox, phi3) three adapters are no
adapter of that matrix: there `merge_lora` and `save_pretrained` write the merged model.
"""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from rlhfjax.config import Decoder, LoRA
from rlhfjax.networks import with_adapters
from rlhfjax.networks.layers import LORA_A, LORA_B, PROJECTIONS, kernel_shape, projections, with_entries
from rlhfjax.pretrained.families import Family, find_family
from rlhfjax.pretrained.families_config import choose_family
from rlhfjax.pretrained.weights import Weight, weights_of
from rlhfjax.pretrained.weights_files import json_writer, read_json, write_folder

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # before the names that the base has

# What adapter_config.json may ask for that LoRA here does not do, and the values at which it asks for nothing.
_REFUSED: dict[str, tuple] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": ([], None),
    # The others change the base's weights too.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


def save_peft(
    directory: str | Path,
    config: Decoder,
    lora: LoRA,
    adapters: dict,
    *,
    base_name: str,
    family: str | None = None,
) -> None:
    """Writes adapters of a decoder, float32, for `peft`.

    Args:
      config: of the base.
      lora: what the adapters were made with; its alpha is written.
      adapters: those of `init_lora`: the same projections in every layer.
      base_name: the base as `transformers` finds it, a folder or a name on a hub.
      family: its `model_type`; None: the first that has all that the decoder has.

    Raises ValueError for adapters that `peft` could not hold: some layers only, projections that are one matrix there.
    """
    found = choose_family(config) if family is None else find_family(family)
    own = _adapters_of(adapters)
    adapted = [name for name in PROJECTIONS if any(path[-1] == name for path in own)]
    weights: dict[str, Any] = {}
    targets: dict[str, str] = {}
    for weight in _matrices(found, config):
        path = weight.path[:-1]
        if path[-1] not in adapted:
            continue
        _refuse_fused(found, weight, path)
        if path not in own:
            raise ValueError(f"there is no adapter for {'/'.join(path)}; peft wants the same in every layer")
        entries = own.pop(path)
        _check(path, entries, weight.shape, lora.rank)
        # Copied whole: a transposed view would be written in the wrong order.
        for name, x in zip(_names(weight), (entries[LORA_A], entries[LORA_B]), strict=True):
            weights[name] = jnp.array(jnp.asarray(x, jnp.float32).T)
        targets[path[-1]] = _target(found, ".".join(path[1:]), adapted)
    if own or not weights:
        raise ValueError(f"a {found.model_type} of this config has no projections {sorted(own)} to adapt")
    alpha = float(lora.alpha)
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rank_stabilised,
        "target_modules": sorted(set(targets.values())),
        "fan_in_fan_out": found.inputs_first,
        "bias": "none",
    }
    write_folder(
        Path(directory),
        {
            WEIGHTS: lambda file: save_file(weights, file, metadata={"format": "pt"}),
            CONFIG: json_writer(raw),
        },
    )


def adapter_base(directory: str | Path) -> str | None:
    """The base that a folder's adapter was made for, as its adapter_config.json names it; None where there is none.

    ValueError where the file names no base.
    """
    file = Path(directory) / CONFIG
    if not file.is_file():
        return None
    name = read_json(file).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{file} names no base: fill in base_model_name_or_path")
    return name


def load_peft(
    directory: str | Path, config: Decoder, base_params: dict, *, family: str | None = None
) -> tuple[LoRA, dict]:
    """Reads a LoRA adapter written by `peft` or by `save_peft`: (config, adapters in float32).

    Args:
      config, base_params: the base, as `load_pretrained` gives it; quantised or not.
      family: as for `save_peft`.

    Raises FileNotFoundError for a missing file; ValueError, which names the option or the tensor, for a damaged file,
    for what LoRA here does not do (DoRA, biases, other trained modules, ranks by layer), and for an adapter that does
    not fit the base: tensors that are missing, too many, or of another shape.
    """
    found = choose_family(config) if family is None else find_family(family)
    raw, tensors = _read(Path(directory))
    file, rank = Path(directory) / WEIGHTS, raw["r"]
    matrices = [x for x in _matrices(found, config) if any(name in tensors for name in _names(x))]
    adapted = [name for name in PROJECTIONS if any(x.path[-2] == name for x in matrices)]
    bases = projections(base_params)
    adapters: dict[str, Any] = {}
    for weight in _matrices(found, config):
        path = weight.path[:-1]
        if path[-1] not in adapted:
            continue
        _refuse_fused(found, weight, path)
        if path not in bases:
            raise ValueError(f"base_params have no {'/'.join(path)}, which the config says they have")
        inputs, outputs = kernel_shape(bases[path])
        entries = {}
        shapes = ((rank, inputs), (outputs, rank))
        for entry, name, shape in zip((LORA_A, LORA_B), _names(weight), shapes, strict=True):
            if name not in tensors:
                raise ValueError(f"{file} has no {name}; the other layers have: is it for another base?")
            tensor = tensors.pop(name)
            if tensor.shape != shape:
                raise ValueError(
                    f"{file}: {name} has shape {tensor.shape}, the base and r={rank} ask for {shape}: "
                    "is it for another base?"
                )
            entries[entry] = jnp.asarray(tensor, jnp.float32).T
        adapters = with_entries(adapters, path, entries)
    if tensors or not adapters:
        raise ValueError(
            f"{file} has tensors that no adapter of a {found.model_type} of this config has: {sorted(tensors)[:5]}"
        )
    lora = LoRA(rank, float(raw["lora_alpha"]), tuple(adapted), bool(raw.get("use_rslora", False)))
    with_adapters(base_params, adapters, lora)
    return lora, adapters


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    for file in (CONFIG, WEIGHTS):
        if not (directory / file).exists():
            there = sorted(x.name for x in directory.iterdir()) if directory.is_dir() else "no such folder"
            raise FileNotFoundError(f"{directory / file} is missing (found: {there})")
    raw = read_json(directory / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise ValueError(
            f'{directory / CONFIG} has peft_type={raw.get("peft_type")!r}; only "LORA" can be read'
        )
    for option, harmless in _REFUSED.items():
        if option in raw and raw[option] not in harmless:
            raise ValueError(
                f"{directory / CONFIG} has {option}={raw[option]!r}, which LoRA here does not do; merge it with peft "
                "(merge_and_unload) and load the merged model"
            )
    for option, kind in (("r", int), ("lora_alpha", int | float)):
        if raw.get(option) is None:
            raise ValueError(f"{directory / CONFIG} has no {option}")
        if not isinstance(raw[option], kind) or not 0 < raw[option] < math.inf:
            raise ValueError(
                f"{directory / CONFIG}: {option} is {raw[option]!r}; it must be a number above 0"
            )
    try:
        return raw, load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS} is damaged: {error}") from error


def _adapters_of(adapters: dict, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], dict]:
    if LORA_A in adapters or LORA_B in adapters:
        return {path: adapters}
    found: dict[tuple[str, ...], dict] = {}
    for name, value in adapters.items():
        found |= _adapters_of(value, (*path, name))
    return found


def _matrices(family: Family, config: Decoder) -> list[Weight]:
    """Where the projections' kernels lie in the base, by the names that `peft` gives them."""
    weights = weights_of(family, config, prefix=_PREFIX + family.prefix, unembedding="")
    return [weight for weight in weights if weight.path[-1] == "kernel"]


def _names(weight: Weight) -> tuple[str, str]:
    """Of the two matrices of an adapter: [rank, inputs], [outputs, rank]."""
    module = weight.name.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _target(family: Family, ours: str, adapted: list[str]) -> str:
    """The name of a projection in target_modules: as short as `peft` can tell it from those without an adapter."""
    theirs = family.projections[ours]
    last = theirs.rsplit(".", 1)[-1]
    same = [x for x, name in family.projections.items() if name.rsplit(".", 1)[-1] == last]
    return last if all(x.rsplit(".", 1)[-1] in adapted for x in same) else theirs


def _refuse_fused(family: Family, weight: Weight, path: tuple[str, ...]) -> None:
    if weight.size != weight.length:
        raise ValueError(
            f"in a {family.model_type} {'/'.join(path)} is a part of {weight.name.removeprefix(_PREFIX)}, whose "
            "adapter it cannot be: export merged instead (merge_lora and save_pretrained), or load what peft has merged"
        )


def _check(path: tuple[str, ...], entries: dict, shape: tuple[int, ...], rank: int) -> None:
    for entry, wanted in ((LORA_A, (shape[0], rank)), (LORA_B, (rank, shape[1]))):
        found = entries[entry].shape if entry in entries else "none"
        if found != wanted:
            raise ValueError(
                f"{'/'.join((*path, entry))} has shape {found}, the config and rank {rank} ask for {wanted}"
            )
