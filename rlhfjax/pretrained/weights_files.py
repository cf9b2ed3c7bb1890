"""Folders of safetensors files: opened without reading them, and written without spoiling what they replace."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class Stored(NamedTuple):
    """The tensors of an open checkpoint: the file that each lies in, and the tensor, of which slices can be read."""

    files: dict[str, Path]
    tensor: Callable[[str], Any]


def read_json(file: Path) -> dict[str, Any]:
    """The dictionary in a JSON file. Raises FileNotFoundError, or ValueError where it is none."""
    if not file.exists():
        folder = file.parent
        there = sorted(x.name for x in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{file} is missing (found: {there})")
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds {type(found).__name__}, not a dictionary")
    return found


@contextlib.contextmanager
def open_weights(directory: Path) -> Iterator[Stored]:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises FileNotFoundError where a file is missing, ValueError where one is damaged or lacks what the index says.
    """
    with contextlib.ExitStack() as stack:
        wanted: dict[str, str] = {}
        shards = [WEIGHTS]
        if not (directory / WEIGHTS).exists() and (directory / INDEX).exists():
            wanted = read_json(directory / INDEX).get("weight_map") or {}
            shards = sorted(set(wanted.values()))
        opened = {shard: stack.enter_context(_open(directory / shard)) for shard in shards}
        files = {name: shard for shard, file in opened.items() for name in file.keys()}  # noqa: SIM118
        for name, shard in wanted.items():
            if files.get(name) != shard:
                raise ValueError(f"{directory / shard} has no weight {name}, which {INDEX} says is there")
        yield Stored(
            {name: directory / shard for name, shard in files.items()},
            lambda name: opened[files[name]].get_slice(name),
        )


def _open(file: Path) -> Any:
    if not file.exists():
        folder = file.parent
        there = sorted(x.name for x in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{file} is missing (found: {there})")
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def weight_files(
    sizes: dict[str, int], make: Callable[[str], np.ndarray], shard_bytes: int
) -> dict[str, Callable[[Path], Any]]:
    """The files for tensors of these sizes in bytes, each as a function that writes it: one, or shards and an index.

    No shard is larger than `shard_bytes` unless a single tensor is; `make` is called when its shard is written, so
    that one shard at a time is in memory.
    """
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size

    def writer(names: list[str]) -> Callable[[Path], Any]:
        return lambda file: save_file({name: make(name) for name in names}, file, metadata={"format": "pt"})

    if len(shards) == 1:
        return {WEIGHTS: writer(shards[0])}
    called = {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards)}
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: file for file, names in called.items() for name in names},
    }
    return {file: writer(names) for file, names in called.items()} | {INDEX: json_writer(index)}


def json_writer(content: dict[str, Any]) -> Callable[[Path], Any]:
    """Writes it, indented and sorted."""
    return lambda file: file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_folder(directory: Path, files: dict[str, Callable[[Path], Any]]) -> None:
    """Writes all the files, in a folder within, and moves them in place once the last is whole: what stops it before
    leaves an earlier checkpoint as it was. ValueError where `directory` is a file."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; give the name of a folder")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=directory) as name:
        temporary = Path(name)
        for file, write in files.items():
            write(temporary / file)
        # safetensors makes files that only their owner may read, whatever the umask says.
        (temporary / ".usual").touch()
        usual = (temporary / ".usual").stat().st_mode
        for file in files:
            (temporary / file).chmod(usual)
            os.replace(temporary / file, directory / file)


def remove_other_weights(directory: Path, kept: Container[str]) -> None:
    """Deletes the weights of an earlier checkpoint that are not among the files `kept`."""
    for old in (WEIGHTS, INDEX, "model-*-of-*.safetensors"):
        for file in directory.glob(old):
            if file.name not in kept:
                file.unlink()
