"""`config.json` of a family, read to a `Decoder` and written from it.

Whether a family can express a decoder is found by writing it and reading it back: no field is dropped silently, nor
would be one that a Decoder gets in future. Options that only matter to training in transformers (dropout,
initialisation) are not read.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rlhfjax.config import Decoder, RopeScaling
from rlhfjax.pretrained import families_rope as rope
from rlhfjax.pretrained.families import FAMILIES, MAY_BE_NULL, Family, find_family, needed
from rlhfjax.pretrained.families_rope import Raw

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_accurate": "gelu",
    "gelu_python_tanh": "gelu",
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "relu": "relu",
}
SIZES = {"vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "mlp_width", "max_positions"}
MOST, MOST_LAYERS = 2**31 - 1, 10_000
_WRITTEN = {"silu": "silu", "gelu": "gelu_pytorch_tanh", "gelu_exact": "gelu", "relu": "relu"}

# How a decoder is run, which is nothing that a checkpoint has.
_OF_THE_RUN = {"dtype", "packing", "attention", "remat", "embedding_stddev"}

# Options of rotary positions and windows in any spelling: what is written anew is not kept of an older config.json.
REWRITTEN = {
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_local_base_freq",
    "rotary_pct",
    "rotary_emb_base",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "sliding_window",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
}


def text_config(raw: Raw) -> Raw:
    """The part of config.json that speaks of the language model: all but in a `gemma3`, which sees images too."""
    if raw.get("quantization_config") is not None:
        raise ValueError(
            f"config.json has quantization_config={raw['quantization_config']}; quantised weights cannot be read: "
            "save the model in float32, float16 or bfloat16"
        )
    if raw.get("model_type") == "gemma3":
        return {"model_type": "gemma3_text", **(raw.get("text_config") or {})}
    return raw


def check_sizes(fields: Mapping[str, Any]) -> None:
    """Raises ValueError where a size is no number that a model could have: what is made of it may take for ever."""
    for name in SIZES & fields.keys():
        size, most = fields[name], MOST_LAYERS if name == "layers" else MOST
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            raise ValueError(f"{name} is {size!r}; it must be a whole number from 1 to {most}")


def read_config(raw: Raw) -> tuple[Family, Decoder]:
    """The family and the decoder of a config.json. Raises ValueError where it asks for what a Decoder cannot do."""
    raw = text_config(raw)
    family = find_family(raw.get("model_type"))
    for option, harmless in family.refused.items():
        if raw.get(option) is not None and raw[option] not in harmless:
            raise ValueError(
                f"config.json has {option}={raw[option]!r}, which a {family.model_type} cannot have here"
            )
    for option, value in family.defaults.items():
        if option not in raw or (raw[option] is None and option not in MAY_BE_NULL):
            raw = raw | {option: value(raw) if callable(value) else value}
    fields = {ours: needed(raw, option) for ours, option in family.fields.items()}
    activation = raw[family.fields["activation"]]
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"config.json has {family.fields['activation']}={activation!r}; supported: {sorted(ACTIVATIONS)}"
        )
    fields["activation"] = ACTIVATIONS[activation]
    check_sizes(fields)
    fields.setdefault("kv_heads", fields["heads"])
    fields.setdefault("head_size", fields["width"] // fields["heads"])
    check_sizes(fields)
    if "attention_scale" in fields:
        fields["attention_scale"] = fields["attention_scale"] ** -0.5
    if family.embedding_scaled:
        fields["embedding_scale"] = fields["width"] ** 0.5
    general = raw | {
        "num_hidden_layers": fields["layers"],
        "max_position_embeddings": fields["max_positions"],
    }
    decoder = Decoder(**fields, **family.fixed, **family.rope[0](general), windows=family.windows[0](general))
    return family, _plain(decoder)


def write_config(family: Family, config: Decoder) -> Raw:
    """config.json of the decoder. Raises ValueError, which names the fields, where the family does not have them."""
    raw, other = _attempt(family, config)
    if other:
        told = ", ".join(
            f"{name}={getattr(config, name)!r} (it has {value!r})" for name, value in other.items()
        )
        raise ValueError(f"a {family.model_type} cannot have {told}")
    return raw


def choose_family(config: Decoder) -> Family:
    """The first family that can express the decoder. Raises ValueError, which names what none of them has."""
    found = {name: _attempt(family, config)[1] for name, family in FAMILIES.items()}
    for name, other in found.items():
        if not other:
            return FAMILIES[name]
    nowhere = set.intersection(*(set(other) for other in found.values()))
    if nowhere:
        told = ", ".join(f"{name}={getattr(config, name)!r}" for name in sorted(nowhere))
        raise ValueError(f"no family has {told}; families: {list(FAMILIES)}")
    nearest = min(found, key=lambda name: len(found[name]))
    told = ", ".join(f"{name}={getattr(config, name)!r}" for name in found[nearest])
    raise ValueError(f"no family has all of this decoder; nearest is {nearest}, which cannot have {told}")


def _attempt(family: Family, config: Decoder) -> tuple[Raw, dict[str, Any]]:
    """What would be written, and the fields that would be read back from it with another value."""
    raw: Raw = {"model_type": family.model_type, "architectures": [family.causal]}
    for ours, option in family.fields.items():
        raw[option] = getattr(config, ours)
    activation = _WRITTEN.get(config.activation, config.activation)
    raw[family.fields["activation"]] = (
        "gelu_new" if family.model_type == "gpt2" and config.activation == "gelu" else activation
    )
    if "attention_scale" in family.fields:
        scale = config.attention_scale
        scalar = float(config.head_size) if scale is None else scale**-2
        raw["query_pre_attn_scalar"] = round(scalar) if math.isclose(scalar, round(scalar)) else scalar
    raw |= family.rope[1](config) | family.windows[1](config)
    if activation not in ACTIVATIONS:
        return raw, {"activation": sorted(set(ACTIVATIONS.values()))}
    _, back = read_config(raw)
    wanted = _plain(config)
    other = {}
    for field in dataclasses.fields(Decoder):
        value = getattr(back, field.name)
        if field.name not in _OF_THE_RUN and not _close(getattr(wanted, field.name), value):
            other[field.name] = value
    return raw, other


def _plain(config: Decoder) -> Decoder:
    """The decoder in the one way, of several with the same function, in which it is compared."""
    changes: dict[str, Any] = {"rope_scaling": rope.relevant(config.rope_scaling)}
    if not any(config.windows):
        changes["windows"] = ()
    local = config.window_rope_theta
    if not any(config.windows) or (local == config.rope_theta and config.rope_scaling.kind == "none"):
        changes["window_rope_theta"] = None
    if config.positions == "learned":
        unread = {"rope_theta", "rope_fraction", "rope_scaling", "window_rope_theta"}
        changes |= {
            field.name: field.default for field in dataclasses.fields(Decoder) if field.name in unread
        }
    scale = config.attention_scale
    if scale is not None and math.isclose(scale, config.head_size**-0.5):
        changes["attention_scale"] = None
    return dataclasses.replace(config, **changes)


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, RopeScaling) and isinstance(other, RopeScaling):
        return all(
            _close(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(RopeScaling)
        )
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other)
    return one == other
