"""Rotary positions in `config.json`, in the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5
(`rope_parameters`), and attention windows (`sliding_window`, `layer_types`).

Every function here goes one way between the raw dictionary of `config.json` and fields of a `Decoder`; `families` says
which family uses which.
"""

import dataclasses
import math
from typing import Any

from rlhfjax.config import Decoder, RopeScaling

Raw = dict[str, Any]

# Of every kind of scaling: our fields, and theirs within `rope_scaling`.
SCALINGS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
    },
    "longrope": {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "short_factors": "short_factor",
        "long_factors": "long_factor",
        "attention_factor": "attention_factor",
    },
}
_STRETCHED_FROM = "original_max_position_embeddings"
_THETA = 10_000.0  # where a config gives none


def relevant(scaling: RopeScaling) -> RopeScaling:
    """The scaling without what its kind does not read, so that equal ones compare equal."""
    names = SCALINGS.get(scaling.kind, {})
    return RopeScaling(kind=scaling.kind, **{name: getattr(scaling, name) for name in names})


def _parameters(raw: Raw) -> Raw:
    """One flat dictionary of what is said about rotary positions, `rope_scaling` first, as transformers reads them."""
    found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in found.values()):
        raise ValueError(
            f"config.json has rotary positions by type of layer ({sorted(found)}), which only a gemma3_text has"
        )
    return found


def _scaling(
    found: Raw, raw: Raw, *, kinds: tuple[str, ...], stretched_from: int | None = None
) -> RopeScaling:
    kind = found.get("rope_type") or found.get("type") or "default"
    kind = "longrope" if kind == "su" else kind
    if kind == "default":
        return RopeScaling()
    if kind not in kinds:
        raise ValueError(
            f"config.json asks for rope scaling {kind!r}, which cannot be read; supported: {('default', *kinds)}"
        )
    positions = raw["max_position_embeddings"]
    values = {ours: found[theirs] for ours, theirs in SCALINGS[kind].items() if found.get(theirs) is not None}
    if "original_positions" in SCALINGS[kind]:
        original = stretched_from or raw.get(_STRETCHED_FROM)
        if original and values.get("original_positions", original) != original:
            raise ValueError(
                f"config.json has {_STRETCHED_FROM}={original} and {values['original_positions']} in its rope scaling"
            )
        values["original_positions"] = original or values.get("original_positions", positions)
        # Made explicit, as it must not move when max_positions is lowered.
        values.setdefault("factor", positions / values["original_positions"])
    optional = ("beta_fast", "beta_slow", "truncate", "attention_factor")
    missing = [name for ours, name in SCALINGS[kind].items() if ours not in values and ours not in optional]
    if missing:
        raise ValueError(f"config.json has rope scaling {kind!r} without {missing}")
    if kind == "yarn" and "attention_factor" not in values:
        above, below = found.get("mscale"), found.get("mscale_all_dim")
        if above and below:  # DeepSeek's way to say it
            values["attention_factor"] = _yarn_mscale(values["factor"], above) / _yarn_mscale(
                values["factor"], below
            )
    for name in ("short_factors", "long_factors"):
        if name in values:
            values[name] = tuple(float(x) for x in values[name])
    for name in ("factor", "low_frequency_factor", "high_frequency_factor", "beta_fast", "beta_slow"):
        if name in values:
            values[name] = float(values[name])
    return RopeScaling(kind=kind, **values)


def _yarn_mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _scaling_parameters(scaling: RopeScaling) -> Raw:
    if scaling.kind == "none":
        return {"rope_type": "default"}
    if scaling.kind not in SCALINGS:
        raise ValueError(f"rope_scaling.kind={scaling.kind!r} is unknown; supported: {['none', *SCALINGS]}")
    values = {theirs: getattr(scaling, ours) for ours, theirs in SCALINGS[scaling.kind].items()}
    values = {name: list(x) if isinstance(x, tuple) else x for name, x in values.items() if x is not None}
    return {"rope_type": scaling.kind, **values}


_ANY = ("linear", "llama3", "yarn", "longrope")


def read_rope(raw: Raw) -> dict[str, Any]:
    """Of a family that rotates whole heads, all layers alike."""
    found = _parameters(raw)
    share = found.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0):
        raise ValueError(
            f"config.json has partial_rotary_factor={share}, which a {raw['model_type']} cannot have"
        )
    theta = found.get("rope_theta", raw.get("rope_theta")) or _THETA
    return {"rope_theta": float(theta), "rope_scaling": _scaling(found, raw, kinds=_ANY)}


def write_rope(config: Decoder) -> Raw:
    """Both spellings; transformers 5 prefers `rope_scaling`, where there is one, and takes the base from beside it."""
    scaling = _scaling_parameters(config.rope_scaling)
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling.kind == "none" else scaling,
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling},
    }


def read_partial_rope(raw: Raw) -> dict[str, Any]:
    """Of a GPT-NeoX: `rotary_pct` and `rotary_emb_base` in transformers 4."""
    found = _parameters(raw)
    return {
        "rope_theta": float(found.get("rope_theta", raw.get("rotary_emb_base")) or _THETA),
        "rope_fraction": float(found.get("partial_rotary_factor", raw.get("rotary_pct", 0.25))),
        "rope_scaling": _scaling(found, raw, kinds=_ANY),
    }


def write_partial_rope(config: Decoder) -> Raw:
    raw = write_rope(config)
    del raw["rope_theta"]
    raw["rope_parameters"]["partial_rotary_factor"] = config.rope_fraction
    if raw["rope_scaling"]:
        raw["rope_scaling"]["partial_rotary_factor"] = config.rope_fraction
    return raw | {"rotary_emb_base": config.rope_theta, "rotary_pct": config.rope_fraction}


def read_phi3_rope(raw: Raw) -> dict[str, Any]:
    """Of a Phi-3: the context of the pretraining stands beside the scaling, and `yarn` meant longrope once."""
    found = dict(_parameters(raw))
    kind = found.get("rope_type") or found.get("type")
    if kind == "yarn":
        found["rope_type"] = "longrope"
    share = found.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    return {
        "rope_theta": float(found.get("rope_theta", raw.get("rope_theta")) or _THETA),
        "rope_fraction": 1.0 if share is None else float(share),
        "rope_scaling": _scaling(
            found, raw, kinds=("longrope",), stretched_from=raw.get(_STRETCHED_FROM) or 4096
        ),
    }


def write_phi3_rope(config: Decoder) -> Raw:
    if config.rope_scaling.kind not in (
        "none",
        "longrope",
    ):  # left out, which is noticed where it is read back
        config = dataclasses.replace(config, rope_scaling=RopeScaling())
    raw, scaling = write_rope(config), config.rope_scaling
    raw["rope_parameters"]["partial_rotary_factor"] = config.rope_fraction
    raw["partial_rotary_factor"] = config.rope_fraction
    raw[_STRETCHED_FROM] = scaling.original_positions or config.max_positions
    implied = scaling.original_positions and config.max_positions / scaling.original_positions
    if scaling.kind == "longrope" and scaling.attention_factor is None and implied == scaling.factor:
        # The three fields that transformers 4 allows. It refuses others, which is right: it would not read them.
        names = ("short_factor", "long_factor")
        raw["rope_scaling"] = {"type": "longrope", **{x: raw["rope_scaling"][x] for x in names}}
    return raw


def read_layered_rope(raw: Raw) -> dict[str, Any]:
    """Of a Gemma 3: layers with a window have a base of their own and are never stretched."""
    nested = raw.get("rope_parameters") or {}
    if set(nested) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"config.json has rope_parameters {sorted(nested)}; a {raw['model_type']} has them by type of layer: "
            "full_attention and sliding_attention"
        )
    whole = (nested.get("full_attention") or {}) | (raw.get("rope_scaling") or {})
    windowed = nested.get("sliding_attention") or {}
    if windowed.get("rope_type", windowed.get("type", "default")) != "default":
        raise ValueError(f"config.json stretches layers with a window: {windowed}; this cannot be read")
    return {
        "rope_theta": float(whole.get("rope_theta", raw.get("rope_theta")) or 1_000_000.0),
        "rope_scaling": _scaling(whole, raw, kinds=_ANY),
        "window_rope_theta": float(windowed.get("rope_theta", raw.get("rope_local_base_freq")) or _THETA),
    }


def write_layered_rope(config: Decoder) -> Raw:
    raw = write_rope(config)
    local = config.rope_theta if config.window_rope_theta is None else config.window_rope_theta
    return {
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": local,
        "rope_scaling": raw["rope_scaling"],
        "rope_parameters": {
            "full_attention": raw["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def no_rope(raw: Raw) -> dict[str, Any]:
    """Of a family with learned positions."""
    return {}


def write_no_rope(config: Decoder) -> Raw:
    return {}


# Windows


def read_no_windows(raw: Raw) -> tuple[int, ...]:
    _typed_layers(raw, ("full_attention",))
    return ()


def write_no_windows(config: Decoder) -> Raw:
    return {}


def read_one_window(raw: Raw, *, left_out: int = 0) -> tuple[int, ...]:
    """Of a Mistral or Phi-3: one window for all layers, or none; `left_out` where config.json says nothing."""
    window = raw.get("sliding_window", left_out) or 0
    _typed_layers(raw, ("sliding_attention",) if window else ("full_attention",))
    return (window,) * raw["num_hidden_layers"] if window else ()


def write_one_window(config: Decoder) -> Raw:
    return {"sliding_window": _window(config) or None}


def read_late_windows(raw: Raw) -> tuple[int, ...]:
    """Of a Qwen: `layer_types`, or a window from layer `max_window_layers` on, if `use_sliding_window` says so."""
    window = (raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None) or 0
    kinds = _typed_layers(raw, ("full_attention", "sliding_attention"))
    if kinds is None:
        first, layers = raw.get("max_window_layers", 28), raw["num_hidden_layers"]
        return tuple(window if layer >= first else 0 for layer in range(layers)) if window else ()
    return _windows_of(kinds, window)


def write_late_windows(config: Decoder) -> Raw:
    kinds = _kinds(config)
    first = kinds.index("sliding_attention") if "sliding_attention" in kinds else config.layers
    return {
        "use_sliding_window": any(config.windows),
        "sliding_window": _window(config) or None,
        "max_window_layers": first,
        "layer_types": kinds,
    }


def read_alternating_windows(raw: Raw) -> tuple[int, ...]:
    """Of a Gemma 2: every other layer, from the first on, where `layer_types` does not say otherwise."""
    return _patterned(raw, 2)


def read_patterned_windows(raw: Raw) -> tuple[int, ...]:
    """Of a Gemma 3: all but each sixth layer, where nothing else is said."""
    return _patterned(raw, raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6)


def write_windows_by_layer(config: Decoder) -> Raw:
    return {"sliding_window": _window(config) or None, "layer_types": _kinds(config)}


def _patterned(raw: Raw, pattern: int) -> tuple[int, ...]:
    kinds = _typed_layers(raw, ("full_attention", "sliding_attention"))
    if kinds is None:
        kinds = [
            "sliding_attention" if (layer + 1) % pattern else "full_attention"
            for layer in range(raw["num_hidden_layers"])
        ]
    window = raw.get("sliding_window", 4096)
    return _windows_of(kinds, window or 0)


def _typed_layers(raw: Raw, allowed: tuple[str, ...]) -> list[str] | None:
    kinds = raw.get("layer_types")
    if kinds is None:
        return None
    unknown = sorted(set(kinds) - set(allowed))
    if unknown:
        raise ValueError(
            f"config.json has layer_types {unknown}; a {raw['model_type']} with sliding_window="
            f"{raw.get('sliding_window')} has {list(allowed)}"
        )
    if len(kinds) != raw["num_hidden_layers"]:
        raise ValueError(
            f"config.json has {len(kinds)} layer_types for {raw['num_hidden_layers']} layers (num_hidden_layers)"
        )
    return kinds


def _windows_of(kinds: list[str], window: int) -> tuple[int, ...]:
    if "sliding_attention" not in kinds:
        return ()
    if not window:
        raise ValueError("config.json has layer_types with sliding_attention, but no sliding_window")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _kinds(config: Decoder) -> list[str]:
    windows = config.windows or (0,) * config.layers
    return ["sliding_attention" if window else "full_attention" for window in windows]


def _window(config: Decoder) -> int:
    """The window of the layers that have one; that two differ is noticed when the written config is read back."""
    return max(config.windows, default=0)
