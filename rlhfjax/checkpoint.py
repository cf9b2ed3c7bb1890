"""Save and restore the whole state of a run. The only file that imports Orbax.

A checkpoint is a folder `DIRECTORY/STEP/` with two parts: `state/`, a plain Orbax checkpoint that any Orbax
program can read (one array per leaf, named by its path in the state), and `manifest.json`, which lists every
leaf (path, kind, dtype, shape) and every file (size, SHA-256). It is written under another name and renamed
once it is whole, so a folder that carries a step's name is complete when it appears; the checksums tell of
damage that came later. Because damage is told from the manifest alone, a state of another shape is never
mistaken for a broken checkpoint.

With several processes each writes its own parts of the arrays. Process 0 names the folder once all have told it that
theirs are on the disk, so a process that fails, or dies, leaves no checkpoint that lacks something. Orbax's handler is
used without its checkpointer, whose barriers would leave the others waiting for a process that has failed.
"""

import asyncio
import hashlib
import itertools
import json
import os
import shutil
import threading
import warnings
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rlhfjax import processes

_PARTIAL = ".partial"
_DAMAGED = ".damaged"
_MANIFEST = "manifest.json"

_numbers = itertools.count()  # of the `Checkpoints` of this process: with several, the same ones in each


class Leaf(NamedTuple):
    """What a manifest says of one leaf of the state."""

    path: str  # as jax.tree_util.keystr prints it
    kind: str  # array, key, bool, int, float or complex
    dtype: str
    shape: tuple[int, ...]
    generator: str = ""  # for a key: the name of the algorithm behind it

    def __str__(self) -> str:
        if self.kind not in ("array", "key"):
            return f"a Python {self.kind}"
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Checkpoints:
    """The checkpoints of one run, in one folder on a local or shared file system.

    Usage:
      with Checkpoints(folder, keep=2) as checkpoints:
          restored = checkpoints.restore_latest(like=state)  # (step, state), or None where nothing is saved
          checkpoints.save(step, state)  # returns as soon as the state has been copied

    A state is a pytree of JAX arrays (also typed keys, also sharded), NumPy arrays and scalars, and Python
    bools, ints, floats and complex numbers. Steps only grow. One process group writes into a folder; others
    may read it. With several processes, all of them make every call, in the same order; the folder lies on a file
    system that all share; what fails on one raises an error on all, that names the process.

    Args:
      directory: where the checkpoints lie; made by the first save.
      keep: how many of the newest to keep, at least 1. With 2 or more, damage to the newest costs one
        interval only.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}: the newest checkpoint is always kept")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._name = f"checkpoints {next(_numbers)}"
        self._orbax = ocp.StandardCheckpointHandler()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps of the checkpoints in the folder, oldest first, whatever their condition."""
        if not self.directory.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.directory.iterdir() if entry.name.isdecimal())

    def save(self, step: int, state: Any) -> None:
        """Saves `state` as checkpoint `step`, in the background.

        Returns once the values have been copied: donating or overwriting the state afterwards is safe. Waits first
        for the save before it, whose failure is raised here. An older checkpoint is deleted only when the new one is
        whole and there are more than `keep`.

        Raises:
          ValueError: a checkpoint of this or a later step is there already (damaged ones are moved out of
            the way).
          TypeError: a leaf is of a kind that cannot be saved.
          OSError: the save before this one failed, for example because the disk is full.
          FailedElsewhere: one of several processes cannot save; for example, it does not see the folder.
        """
        self.wait()
        leaves, arrays = processes.together(f"{self._name}: state {step}", lambda: _describe(state))
        partial = self.directory / f"{step}{_PARTIAL}"
        processes.from_first(f"{self._name}: room for {step}", lambda: self._make_room(step, partial))
        processes.together(f"{self._name}: sight of {step}", lambda: processes.wait_to_see(partial / "state"))
        copied = threading.Event()
        self._pending = step, self._thread.submit(self._write, step, partial, leaves, arrays, copied)
        if processes.count() > 1:
            copied.wait()  # an array that lies on several hosts is copied by Orbax, not by `_storable`

    def wait(self) -> None:
        """Returns when the last save is on disk; raises OSError where it failed (older checkpoints stay)."""
        if self._pending is None:
            return
        (step, commit), self._pending = self._pending, None
        failure = commit.exception()
        if failure is not None:
            mend = "free some disk space" if "space left" in str(failure) else "see the cause above"
            raise OSError(
                f"checkpoint {step} could not be written to {self.directory} ({mend}): {failure}. "
                f"The checkpoints before it are intact: {self.steps() or 'none'}."
            ) from failure

    def close(self) -> None:
        """Waits for the last save and frees the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def restore_latest(self, like: Any) -> tuple[int, Any] | None:
        """The newest intact checkpoint as `(step, state)`, or None where there is none.

        Damaged checkpoints are skipped, each with a warning that names the folder and what is wrong with it.
        `like` and the errors are those of `restore`.
        """
        self.wait()
        step = processes.from_first(f"{self._name}: newest", self._newest_intact)
        return None if step < 0 else (step, self._read(step, like))

    def restore(self, step: int, like: Any) -> Any:
        """The state of checkpoint `step`, bit for bit as it was saved.

        Args:
          step: one of `steps()`.
          like: a pytree of the state's structure whose leaves say what to return: a JAX array or
            `jax.ShapeDtypeStruct` gives a JAX array with its sharding (and its weak type), a NumPy array or
            scalar gives NumPy, a Python number gives a Python number. Values are not read from it.

        Raises:
          FileNotFoundError: there is no such checkpoint; the message says which there are.
          ValueError: structure, shape or dtype differ from `like`; the message names the first path that
            differs.
          OSError: the checkpoint is damaged.
        """
        self.wait()
        processes.from_first(f"{self._name}: {step}", lambda: self._check(step))
        return self._read(step, like)

    def _check(self, step: int) -> None:
        """Raises where there is no checkpoint of `step`, or a damaged one."""
        folder = self.directory / str(step)
        if not folder.is_dir():
            held = f"it holds steps {self.steps()}" if self.steps() else "it holds no checkpoint"
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.directory}: {held}")
        damage = _damage(folder)
        if damage is not None:
            raise OSError(f"checkpoint {folder} is damaged: {damage}; the folder holds steps {self.steps()}")

    def _make_room(self, step: int, partial: Path) -> None:
        """Makes the folder `partial`. Moves damaged checkpoints of `step` or later aside; refuses to go back behind an
        intact one."""
        for later in [other for other in self.steps() if other >= step]:
            folder = self.directory / str(later)
            if _damage(folder) is None:
                raise ValueError(
                    f"cannot save step {step} into {self.directory}: an intact checkpoint of step {later} is "
                    "there. Steps only grow; to go on from an older one, save into a new folder."
                )
            aside = folder.with_name(f"{later}{_DAMAGED}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        self.directory.mkdir(parents=True, exist_ok=True)
        for stale in self.directory.glob(f"*{_PARTIAL}"):
            shutil.rmtree(stale)  # left by a process that was killed while it saved
        (partial / "state").mkdir(parents=True)

    def _write(
        self, step: int, partial: Path, leaves: list[Leaf], arrays: dict[str, Any], copied: threading.Event
    ) -> None:
        """In the background: writes the arrays, then the manifest, names the folder, and prunes."""

        def write() -> None:
            try:
                saving = self._orbax.async_save(_orbax_path(partial), args=ocp.args.StandardSave(arrays))
                commits = asyncio.run(saving) or []  # pyright: ignore[reportArgumentType]
            finally:
                copied.set()
            for commit in commits:
                commit.result()

        def name() -> None:
            self._orbax.finalize(_orbax_path(partial))
            _write_manifest(partial, leaves)
            partial.rename(self.directory / str(step))
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.directory / str(old))

        try:
            processes.together(f"{self._name}: {step} written", write)
            processes.from_first(f"{self._name}: {step} named", name)
        except BaseException:
            if processes.is_first():
                shutil.rmtree(partial, ignore_errors=True)  # gives a full disk its space back
            raise

    def _newest_intact(self) -> int:
        """The newest step whose checksums are right, or -1; warns of each newer one."""
        for step in reversed(self.steps()):
            damage = _damage(self.directory / str(step))
            if damage is None:
                return step
            warnings.warn(f"skipping damaged checkpoint {self.directory / str(step)}: {damage}", stacklevel=3)
        return -1

    def _read(self, step: int, like: Any) -> Any:
        folder = self.directory / str(step)
        rows = processes.together(f"{self._name}: manifest {step}", lambda: _read_manifest(folder)["leaves"])
        saved = [Leaf(path, kind, dtype, tuple(shape), impl) for path, kind, dtype, shape, impl in rows]
        targets, structure = jax.tree_util.tree_flatten_with_path(like)
        wanted = [_leaf(path, target) for path, target in targets]
        _check_same(saved, wanted, folder)
        generators = {leaf.path: leaf.generator for leaf in saved}
        pairs = [
            (leaf, target, generators[leaf.path]) for leaf, (_, target) in zip(wanted, targets, strict=True)
        ]
        placeholders = {leaf.path: _placeholder(target, generator) for leaf, target, generator in pairs}
        arrays: Any = processes.together(
            f"{self._name}: arrays {step}",
            lambda: self._orbax.restore(_orbax_path(folder), args=ocp.args.StandardRestore(placeholders)),
        )
        return structure.unflatten(
            _as_target(arrays[leaf.path], target, generator) for leaf, target, generator in pairs
        )


def _orbax_path(folder: Path) -> epath.Path:
    return epath.Path(folder / "state")


def _describe(state: Any) -> tuple[list[Leaf], dict[str, Any]]:
    """The leaves of `state` in words, and their values in a form that Orbax saves, by path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    if not flat:
        raise ValueError("there is nothing to save: the state has no leaves")
    leaves = [_leaf(path, value) for path, value in flat]
    return leaves, {leaf.path: _storable(leaf, value) for leaf, (_, value) in zip(leaves, flat, strict=True)}


def _leaf(path: tuple[Any, ...], value: Any) -> Leaf:
    name = jax.tree_util.keystr(path) or "the state itself"
    for kind in (bool, int, float, complex):
        if type(value) is kind:
            return Leaf(name, kind.__name__, np.dtype(kind).name, ())
    if not isinstance(value, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic):
        raise TypeError(
            f"{name} is a {type(value).__name__}, which a checkpoint cannot hold: keep arrays and numbers in "
            "the state, and text and functions in the configuration"
        )
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        generator = str(jax.random.key_impl(value)) if isinstance(value, jax.Array) else ""
        return Leaf(name, "key", str(value.dtype), tuple(value.shape), generator)
    if value.dtype.kind in "OSUMm":
        raise TypeError(
            f"{name} is a NumPy array of {value.dtype}, which a checkpoint cannot hold: use numbers"
        )
    return Leaf(name, "array", value.dtype.name, tuple(value.shape))


def _storable(leaf: Leaf, value: Any) -> jax.Array | np.ndarray:
    """What Orbax gets to save: a copy in host memory, since the caller may overwrite or donate the value."""
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(f"{leaf.path} is a ShapeDtypeStruct, which has no values to save")
    if leaf.kind == "key":
        value = jax.random.key_data(value)
    elif leaf.kind == "int" and not -(2**63) <= value < 2**63:
        raise TypeError(f"{leaf.path} is {value}, which does not fit in 64 bits: a checkpoint cannot hold it")
    if 0 in np.shape(value):
        return np.zeros(
            1, value.dtype
        )  # Orbax refuses arrays without elements; the manifest keeps their shape
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return value
    return np.array(value)


def _is_placed(target: Any) -> bool:
    """Whether Orbax can lay the value straight over the several devices that `target` wants."""
    sharding = getattr(target, "sharding", None)
    return sharding is not None and len(sharding.device_set) > 1 and 0 not in target.shape


def _stored_as(target: Any, generator: str) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of a leaf's numbers: its own, or for a key those of its words, one dimension more."""
    if generator:
        words = jax.random.key_data(jax.random.key(0, impl=generator))
        return (*target.shape, *words.shape), words.dtype
    return np.shape(target), getattr(target, "dtype", type(target))


def _placeholder(target: Any, generator: str) -> Any:
    """Tells Orbax how to read a leaf: straight onto its devices if they are several, else to the host."""
    if _is_placed(target) and not generator:
        return jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=target.sharding)
    shape, dtype = _stored_as(target, generator)
    return np.empty(1 if 0 in shape else shape, dtype)


def _as_target(value: Any, target: Any, generator: str) -> Any:
    """Gives a restored value the type and the place that `target` has."""
    if type(target) in (bool, int, float, complex):
        return type(target)(value)
    if isinstance(target, np.generic):
        return target.dtype.type(value)
    if _is_placed(target) and not generator:
        return _weakened(value) if getattr(target, "weak_type", False) else value
    if 0 in target.shape:
        value = np.empty(*_stored_as(target, generator))
    if isinstance(target, np.ndarray):
        return value
    if target.sharding is not None and not target.sharding.is_fully_addressable:
        return _laid(value, target.sharding, generator)
    if generator:
        value = jax.random.wrap_key_data(jnp.asarray(value), impl=generator)
    elif getattr(target, "weak_type", False):
        value = _weakened(jnp.asarray(value, target.dtype))
    # An uncommitted array stays so: committing it would forbid mixing it with arrays on other devices.
    placed = target.sharding is not None and getattr(target, "committed", True)
    return jax.device_put(value, target.sharding if placed else None)


@jax.jit
def _weakened(array: jax.Array) -> jax.Array:
    """A weakly typed array promotes differently, so losing the mark would change the numbers that follow."""
    return jnp.full(array.shape, array.dtype.type(0).item()).at[...].set(array)


def _laid(value: np.ndarray, sharding: Any, generator: str) -> jax.Array:
    """A key, or an array without elements, over the devices of several processes, each of which has the whole."""
    array = jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    return jax.random.wrap_key_data(array, impl=generator) if generator else array


def _check_same(saved: list[Leaf], wanted: list[Leaf], folder: Path) -> None:
    """Raises ValueError at the first leaf where the checkpoint and the state that is asked for differ."""
    there, asked = {leaf.path: leaf for leaf in saved}, {leaf.path: leaf for leaf in wanted}
    for leaf in wanted:
        if leaf.path not in there:
            raise ValueError(
                f"checkpoint {folder} has no {leaf.path}, which `like` has; it was saved by another program"
            )
        if there[leaf.path][:4] != leaf[:4]:
            raise ValueError(
                f"checkpoint {folder} has {leaf.path} as {there[leaf.path]}, but `like` as {leaf}"
            )
    for leaf in saved:
        if leaf.path not in asked:
            raise ValueError(f"checkpoint {folder} has {leaf.path} ({leaf}), which `like` has not")


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path, leaves: list[Leaf]) -> None:
    files = {str(path.relative_to(folder)): [path.stat().st_size, _digest(path)] for path in _files(folder)}
    body = json.dumps({"leaves": leaves, "files": files})
    with (folder / _MANIFEST).open("w") as file:
        json.dump({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}, file)
        file.flush()
        os.fsync(file.fileno())


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's body. Raises ValueError where it is not what was written."""
    outer = json.loads((folder / _MANIFEST).read_bytes())
    if hashlib.sha256(outer["body"].encode()).hexdigest() != outer["sha256"]:
        raise ValueError("its checksum is wrong")
    return json.loads(outer["body"])


def _damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint in `folder`, in words; None where nothing is."""
    try:
        files = _read_manifest(folder)["files"]
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{_MANIFEST} cannot be read ({error})"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if _digest(path) != digest:
            return f"the checksum of {name} is wrong"
    return None
