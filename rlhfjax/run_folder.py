"""The run folder: everything a run leaves behind.

    config.yaml        the whole configuration; `--resume` reads it
    environment.json   versions, devices, command line, git commit
    metrics.jsonl      one object per step: stage, step, then name: number. Deterministic values only
    perf.jsonl         seconds, rates, compile times: kept apart, since no two runs agree on them
    samples.jsonl      texts: stage, step, then whatever the experiment shows
    summary.json       flat name -> final number
    arrays/NAME.npz    results computed once between stages
    checkpoints/STAGE/ the state of each stage
    profile/STAGE/     traces of `--profile`, for TensorBoard or Perfetto
    tracked/NAME.jsonl what a tracker has been sent, so that nothing is sent twice
    .lock              empty; held by the process that works in the folder

`metrics.jsonl` and `samples.jsonl` of a run that was killed and resumed equal, byte for byte, those of one
never stopped: lines are appended whole, a half-written last line is repaired when the folder is opened, and
`truncate_after` drops what lies past the checkpoint the run continues from.

With several processes the folder lies on a file system that all share, and process 0 writes it. The others write what
they would write into a copy of their own, which is thrown away: so what a stage reads back from its logs is the same
on all, and nothing in an experiment need know which process it runs in. Checkpoints are written by all together.
"""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rlhfjax.config import Mesh
from rlhfjax.tracking import Tracker, silent

LOGS = ("metrics.jsonl", "perf.jsonl", "samples.jsonl")
# perf.jsonl is never truncated: it keeps the measurements of every attempt, and so what a crash cost.
DETERMINISTIC_LOGS = ("metrics.jsonl", "samples.jsonl")


class Copy(NamedTuple):
    """The folder `of`, as a process that does not write it has it for itself, `at` another place."""

    of: Path
    at: Path


@dataclass(frozen=True)
class RunFolder:
    """One run: where it writes, and the settings the runner gave it.

    `seed` is the root of all randomness of the run. `max_steps`, where given, caps the steps of every stage
    (a smoke run). `profile` is how many steps of each stage are traced. `mesh` is how the devices are laid out.
    `copy` is given on a process that writes into a copy, of which nothing is kept (`own_copy`).
    """

    path: Path
    experiment: str = "experiment"
    seed: int = 0
    max_steps: int | None = None
    profile: int = 0
    tracker: Tracker = field(default_factory=silent)
    mesh: Mesh = field(default_factory=Mesh)
    copy: Copy | None = None

    @property
    def shared(self) -> Path:
        """The folder that all processes share: `path`, but for those that write into a copy."""
        return self.path if self.copy is None else self.copy.of / self.path.relative_to(self.copy.at)

    def checkpoints(self, stage: str) -> Path:
        """The folder that holds the checkpoints of `stage`, of all processes."""
        return self.shared / "checkpoints" / stage

    def log_metrics(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one step's deterministic numbers to metrics.jsonl; one that is not finite as null."""
        append_line(self.path / "metrics.jsonl", {"stage": stage, "step": step} | _finite_or_none(metrics))

    def log_perf(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Appends measurements (seconds, tokens per second) to perf.jsonl."""
        append_line(self.path / "perf.jsonl", {"stage": stage, "step": step} | _finite_or_none(values))

    def log_samples(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends one line per row of texts and numbers to samples.jsonl."""
        for row in rows:
            append_line(self.path / "samples.jsonl", {"stage": stage, "step": step} | _finite_or_none(row))

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far, of one stage or of all."""
        return [line for line in read_lines(self.path / "metrics.jsonl") if stage in (None, line["stage"])]

    def write_summary(self, values: Mapping[str, float]) -> None:
        """Writes summary.json: flat name -> final number, in the order given, all or nothing."""
        write_atomically(self.path / "summary.json", json.dumps(_finite_or_none(values), indent=2) + "\n")

    def sync(self) -> None:
        """Forces the logs to the disk. Called before a checkpoint is saved: its lines must outlive it."""
        for name in DETERMINISTIC_LOGS:
            if (self.path / name).exists():
                with open(self.path / name, "rb") as file:
                    os.fsync(file.fileno())

    def repair(self) -> None:
        """Drops a half-written last line (a killed process, a full disk) of each log, and nothing else.

        For the process that holds the `lock` only: to any other, a line being written looks half written.
        """
        for name in LOGS:
            path = self.path / name
            kept = b"".join(_raw_lines(path))
            if path.exists() and len(kept) != path.stat().st_size:
                write_atomically(path, kept)

    def truncate_after(self, stage: str, step: int) -> None:
        """Forgets what `stage` wrote past `step`, and all that later stages wrote.

        A later stage is one whose lines follow the first line of `stage`. Its checkpoints continue from a
        state that is about to be computed again, so they are set aside under checkpoints/ as STAGE.stale-N;
        nothing is deleted. On a process with a copy, from that only.
        """
        logs = {name: _raw_lines(self.path / name) for name in DETERMINISTIC_LOGS}
        owners = {name: [json.loads(line)["stage"] for line in lines] for name, lines in logs.items()}
        later = dict.fromkeys(
            other
            for order in owners.values()
            if stage in order
            for other in order[order.index(stage) :]
            if other != stage
        )
        for name, lines in logs.items():
            kept = [
                line
                for line, owner in zip(lines, owners[name], strict=True)
                if owner not in later and (owner != stage or json.loads(line)["step"] <= step)
            ]
            if len(kept) != len(lines):
                write_atomically(self.path / name, b"".join(kept))
        for other in later if self.copy is None else ():
            _set_aside(self.checkpoints(other))
            _set_aside(self.path / "arrays" / f"{other}.npz")


def create(
    directory: Path,
    config_yaml: str,
    *,
    experiment: str,
    seed: int,
    max_steps: int | None = None,
    exact: bool = False,
) -> RunFolder:
    """Makes a new run folder and writes its config.yaml.

    The folder is `directory`/EXPERIMENT/TIME-sSEED, or `directory` itself where `exact`. Raises
    FileExistsError where an exact folder is there already and not empty.
    """
    if exact:
        path = directory
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(
                f"{path} is there already: choose another --run-dir, or continue it with --resume {path}"
            )
        path.mkdir(parents=True, exist_ok=True)
    else:
        path = _fresh_directory(directory / experiment, f"{time.strftime('%Y%m%d-%H%M%S')}-s{seed}")
    (path / "checkpoints").mkdir()
    for name in LOGS:
        (path / name).touch()
    # Written last: a folder with a config.yaml is whole, and can be resumed.
    write_atomically(path / "config.yaml", config_yaml)
    return RunFolder(path, experiment, seed, max_steps)


@contextmanager
def own_copy(folder: RunFolder) -> Iterator[RunFolder]:
    """For a process that does not write `folder`: a copy of its logs, to write into while the context lasts."""
    with tempfile.TemporaryDirectory(prefix="rlhfjax-") as name:
        at = Path(name) / folder.path.name
        at.mkdir()
        for log in LOGS:
            shutil.copyfile(folder.path / log, at / log)
        yield replace(folder, path=at, copy=Copy(of=folder.path, at=at))


def write_environment(path: Path, checkout: Path, mesh: Mesh = Mesh()) -> None:  # noqa: B008  (frozen)
    """Writes environment.json: what this run, and each resumption of it, ran on. Imports jax."""
    import jax

    versions = {}
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy", "rlhfjax"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    session = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "mesh": asdict(mesh),
        "processes": jax.process_count(),
        "cpu_count": os.cpu_count(),
        "git_commit": _git_commit(checkout),
    }
    file = path / "environment.json"
    sessions = _sessions(file)
    write_atomically(file, json.dumps({"sessions": [*sessions, session]}, indent=2) + "\n")


def _sessions(file: Path) -> list[Any]:
    """What environment.json has so far. A damaged one is set aside: what is written there decides nothing."""
    if not file.exists():
        return []
    try:
        return [*json.loads(file.read_text())["sessions"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        _set_aside(file)
        return []


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds the folder for this process; two processes in one run would interleave their lines.

    The kernel drops the lock when the process dies, however it dies. Raises RuntimeError where another
    process holds it. Where the file system has no locks (some shared ones), there is none, and a note says so.
    """
    import fcntl  # POSIX only, as is the runner

    # A file of its own: an editor that saves config.yaml puts another file in its place, which nobody has locked.
    with open(path / ".lock", "a+b") as file:  # over NFS only what may be written may be locked
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another process is working in {path}: wait for it to end, or stop it"
            ) from None
        except OSError as error:
            print(f"note: {path} cannot be locked ({error.strerror}): start no second run in it")
        yield


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one JSON object as one line, and hands it to the operating system before returning.

    Where the disk is full the half-written line is taken back and an OSError says what to do.
    """
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, line)
            while written < len(line):
                written += os.write(descriptor, line[written:])
        except OSError as error:
            if os.path.isfile(path):
                os.ftruncate(descriptor, size)
            raise OSError(error.errno, _cannot_write(path, error)) from error
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the file at `path` by `content`: a reader, or a crash, sees the old file or the new one."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, _cannot_write(path, error)) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a .jsonl file, without a half-written last one; none where there is no file."""
    return [json.loads(line) for line in _raw_lines(path)]


def _raw_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not _is_record(lines[-1]):
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not _is_record(line):
            raise ValueError(
                f"{path}, line {number} is not one of ours: {line[:80]!r}; mend or delete that line"
            )
    return lines


def _is_record(line: bytes) -> bool:
    try:
        row = json.loads(line)
        return line.endswith(b"\n") and isinstance(row["stage"], str) and isinstance(row["step"], int)
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def _finite_or_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity; a reader of ours sees null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _fresh_directory(parent: Path, name: str) -> Path:
    for attempt in range(1000):
        path = parent / (name if attempt == 0 else f"{name}-{attempt + 1}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue  # another run began in the same second
    raise FileExistsError(f"{parent / name} and a thousand more like it are there already")


def _set_aside(path: Path) -> None:
    if path.exists():
        number = next(n for n in range(1, 1000) if not path.with_name(f"{path.name}.stale-{n}").exists())
        path.rename(path.with_name(f"{path.name}.stale-{number}"))


def _git_commit(checkout: Path) -> str | None:
    """The commit of `checkout`, with "-dirty" where files differ from it; None where it is no git one."""
    git = ["git", "-C", str(checkout)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        status = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def _cannot_write(path: Path, error: OSError) -> str:
    return (
        f"cannot write {path} ({error.strerror}). What was saved before is intact: "
        f"make room, then continue with --resume"
    )
