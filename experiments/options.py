"""Configuration in and out of YAML: nested frozen dataclasses, with errors that name the key, the file and
the mend.

A YAML key is the flag without its dashes: `--ppo.clip-low 0.1` is

    ppo:
      clip_low: 0.1
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

Config = TypeVar("Config")


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass as nested plain dictionaries, lists, strings and numbers, ready for YAML."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys: {"ppo": {"clip": 1}} -> {"ppo.clip": 1}."""
    flat = {}
    for key, value in mapping.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """One line "key: saved OLD, given NEW" for each dotted key whose values differ."""
    old, new = flatten(saved), flatten(given)
    return [
        f"{key}: saved {old.get(key, 'nothing')!r}, given {new.get(key, 'nothing')!r}"
        for key in dict.fromkeys([*old, *new])
        if key not in old or key not in new or old[key] != new[key]
    ]


def override(config: Config, mapping: Mapping[str, Any], *, source: str, prefix: str = "") -> Config:
    """`config` with the fields that `mapping` names replaced, section by section; the others stay.

    Raises ValueError naming `source` and the dotted key: a key that is no field (with the nearest one), a
    value of the wrong type. A whole number is taken for a float; a float is never taken for a whole number,
    and true is not 1.
    """
    if not isinstance(mapping, Mapping):
        raise ValueError(
            f"{source}: {prefix.rstrip('.') or 'the file'} must be a section of keys, not {mapping!r}"
        )
    hints = typing.get_type_hints(type(config))
    known = {field.name: field for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    changes = {}
    for key, value in mapping.items():
        name = str(key).replace("-", "_")
        if name not in known:
            dotted = [prefix + path for path in _all_keys(config)]
            raise ValueError(
                f"{source}: unknown key {prefix + str(key)!r}{did_you_mean(prefix + name, dotted)}"
            )
        current = getattr(config, name)
        if dataclasses.is_dataclass(current) and value is not None:
            changes[name] = override(current, value, source=source, prefix=f"{prefix}{name}.")
        else:
            changes[name] = _coerce(value, hints[name], f"{source}: {prefix}{name}")
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises FileNotFoundError, or ValueError that names file and line."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values (key: value), not {type(content).__name__}")
    return content


def write_yaml(mapping: Mapping[str, Any]) -> str:
    """The mapping as YAML text, in its own order; short lists on one line."""
    return yaml.dump(dict(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'X'?" where a known word is near, compared whole and by the last part of a dotted
    key; else ""."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:
        leaf = word.rsplit(".", 1)[-1]
        leaves = {key.rsplit(".", 1)[-1]: key for key in known}
        near = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    return f"; did you mean {near[0]!r}?" if near else ""


class _Dumper(yaml.SafeDumper):
    """Sections as blocks, lists on one line."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def _all_keys(config: Any) -> list[str]:
    """Every dotted key of `config`, sections included."""
    keys = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        keys.append(field.name)
        if dataclasses.is_dataclass(value):
            keys += [f"{field.name}.{key}" for key in _all_keys(value)]
    return keys


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _coerce(value: Any, kind: Any, where: str) -> Any:
    """`value` as the type `kind`, or a ValueError that says what was wanted at `where`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _coerce(value, arguments[0], where)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, arguments, where)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ValueError(
            f"{where} must be one of {list(arguments)}, not {value!r}"
            f"{did_you_mean(str(value), map(str, arguments))}"
        )
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, not {value!r}")
        kinds = (
            [arguments[0]] * len(value) if origin is list or arguments[-1] is Ellipsis else list(arguments)
        )
        if len(kinds) != len(value):
            raise ValueError(f"{where} must have {len(kinds)} entries, not {len(value)}")
        return origin(
            _coerce(item, each, f"{where}[{i}]")
            for i, (item, each) in enumerate(zip(value, kinds, strict=True))
        )
    return _coerce_plain(value, kind, where)


def _coerce_union(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    for kind in kinds[:-1]:
        try:
            return _coerce(value, kind, where)
        except ValueError:
            continue
    return _coerce(value, kinds[-1], where)


def _coerce_plain(value: Any, kind: Any, where: str) -> Any:
    if kind is float and isinstance(value, str):
        value = _number(value)  # YAML 1.1 reads 1e-3 as a text, since it has no dot
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is Any or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
        return value
    raise ValueError(f"{where} must be {_WORDS.get(kind, kind)}, not {value!r}")


_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a text", Path: "a path"}


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
