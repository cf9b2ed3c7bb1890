"""Trackers: where metrics go besides the run folder's own metrics.jsonl.

A tracker is a pair of functions. `open_trackers` turns the names typed on the command line into one
tracker; code that builds its own passes a `Tracker` instead. The third-party packages are imported only
when asked for.

A run that is resumed computes the steps past its checkpoint again. What was sent of them is not sent twice: each
tracker notes what it has sent in `tracked/NAME.jsonl` of the run folder, and goes on in the same run of its service.
A service that keeps steps in memory for a while loses them where the process is killed: those are sent again.
"""

import difflib
import importlib.util
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Metrics = Mapping[str, float]
SENT = "tracked"  # folder of a run: what each tracker has sent


class Tracker(NamedTuple):
    """`log(stage, step, metrics)` sends one step's numbers; `close()` flushes and ends."""

    log: Callable[[str, int, Metrics], None]
    close: Callable[[], None]


def silent() -> Tracker:
    """A tracker that sends nothing."""
    return Tracker(log=lambda stage, step, metrics: None, close=lambda: None)


def combine(trackers: list[Tracker]) -> Tracker:
    """One tracker that logs to each of `trackers` in turn."""

    def log(stage: str, step: int, metrics: Metrics) -> None:
        for tracker in trackers:
            tracker.log(stage, step, metrics)

    def close() -> None:
        for tracker in trackers:
            tracker.close()

    return Tracker(log=log, close=close)


def tensorboard(directory: Path, config: Mapping[str, Any], name: str) -> Tracker:
    """TensorBoard event files in `directory`/tensorboard, one tag "STAGE/METRIC" per metric.

    A step is on the disk when `log` returns: a SummaryWriter leaves it to a thread, and a kill would lose what has been
    noted as sent.
    """
    del config, name
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.summary import scalar

    folder = directory / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    # Files are named by the second; one resumed within that must not be written over.
    writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")

    def log(stage: str, step: int, metrics: Metrics) -> None:
        event = Event(wall_time=time.time(), step=step)
        for metric, value in metrics.items():
            event.summary.value.extend(scalar(f"{stage}/{metric}", value).value)
        writer.write_event(event)
        writer.flush()

    def close() -> None:
        writer.close()

    return Tracker(log=log, close=close)


def wandb(directory: Path, config: Mapping[str, Any], name: str) -> Tracker:
    """Weights & Biases, project "rlhfjax". WANDB_MODE=offline in the environment keeps it on this machine."""
    import wandb as package  # pyright: ignore[reportMissingImports]

    run = package.init(
        project="rlhfjax",
        name=name,
        id=_identity(directory / SENT / "wandb.jsonl"),
        resume="allow",
        dir=str(directory),
        config=dict(config),
    )
    stages: set[str] = set()

    def log(stage: str, step: int, metrics: Metrics) -> None:
        # wandb's own step may only grow, and ours starts again at every stage: so each stage logs its own.
        if stage not in stages:
            stages.add(stage)
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        run.log({f"{stage}/step": step} | {f"{stage}/{metric}": value for metric, value in metrics.items()})

    return Tracker(log=log, close=run.finish)


def trackio(directory: Path, config: Mapping[str, Any], name: str) -> Tracker:
    """Trackio's local dashboard, project "rlhfjax"; `trackio show` opens it."""
    import trackio as package  # pyright: ignore[reportMissingImports]

    # Trackio knows a run by its name; two folders of the same name are two runs.
    own = f"{name}-{_identity(directory / SENT / 'trackio.jsonl')}"
    run = package.init(project="rlhfjax", name=own, config=dict(config), resume="allow")

    def log(stage: str, step: int, metrics: Metrics) -> None:
        run.log({f"{stage}/step": step} | {f"{stage}/{metric}": value for metric, value in metrics.items()})

    return Tracker(log=log, close=run.finish)


def sending_once(tracker: Tracker, file: Path, *, lag: float = 0.0) -> Tracker:
    """The tracker, which sends a step of a stage only if `file` has no line of it, and then adds one.

    A process killed between the two sends that one step again. Where one was killed, the steps of its last `lag`
    seconds, which the service may not have kept, are sent again at once, from the logs of the run.
    """
    notes = _lines(file)
    doubtful = _doubtful(notes, lag)
    sent = {(line["stage"], line["step"]) for line in notes if "stage" in line} - doubtful

    def log(stage: str, step: int, metrics: Metrics) -> None:
        if (stage, step) not in sent:
            tracker.log(stage, step, metrics)
            sent.add((stage, step))
            _append(file, {"stage": stage, "step": step, "time": round(time.time(), 1)})

    def close() -> None:
        tracker.close()
        _append(file, {"closed": True})

    if doubtful:
        for (stage, step), metrics in _logged(file.parent.parent).items():
            if (stage, step) in doubtful:
                log(stage, step, metrics)
    return Tracker(log=log, close=close)


def _doubtful(notes: Sequence[Mapping[str, Any]], lag: float) -> set[tuple[str, int]]:
    """The steps noted within `lag` seconds of the last note, where nothing was closed after them."""
    closed = max((i for i, note in enumerate(notes) if "closed" in note), default=-1)
    noted = [note for note in notes[closed + 1 :] if "time" in note]
    return {(note["stage"], note["step"]) for note in noted if note["time"] > noted[-1]["time"] - lag}


def _logged(directory: Path) -> dict[tuple[str, int], dict[str, float]]:
    """What the run in the folder has logged so far, as it is sent: (stage, step) -> metrics and measurements."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for log, prefix in (("metrics", ""), ("perf", "perf/")):
        for line in _lines(directory / f"{log}.jsonl"):
            values = {prefix + name: x for name, x in line.items() if name not in ("stage", "step")}
            known = {name: math.nan if x is None else x for name, x in values.items()}
            if not prefix or (line["stage"], line["step"]) in found:
                found.setdefault((line["stage"], line["step"]), {}).update(known)
    return found


def _identity(file: Path) -> str:
    """The name by which a service knows the run in this folder: made once, and kept in the file."""
    found = next((line["id"] for line in _lines(file) if "id" in line), None)
    if found is None:
        found = secrets.token_hex(4)
        _append(file, {"id": found})
    return found


def _lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of ours; a half-written one counts for nothing."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [line for line in found if isinstance(line, dict)]


def _append(file: Path, record: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab+") as stream:
        torn = stream.seek(0, 2) > 0
        if torn:
            stream.seek(-1, 2)
            torn = stream.read() != b"\n"
        stream.write(b"\n" * torn + json.dumps(record).encode() + b"\n")


class Choice(NamedTuple):
    """A tracker that `--log` can name: the package it needs, the extra that has it, and the function that opens it.

    `lag()`: seconds within which the service keeps what it was given in memory only, and loses it with the process.
    """

    package: str
    extra: str
    open: Callable[[Path, Mapping[str, Any], str], Tracker]
    lag: Callable[[], float] = lambda: 0.0


def _wandb_lag() -> float:
    # Offline its service writes blocks of 32 kB, and nothing of the last one before the end.
    return math.inf if os.environ.get("WANDB_MODE") == "offline" else 60.0


TRACKERS = {
    "tensorboard": Choice("tensorboardX", "log", tensorboard),
    "wandb": Choice("wandb", "wandb", wandb, _wandb_lag),
    "trackio": Choice("trackio", "trackio", trackio, lambda: 5.0),  # a thread writes twice a second
}


def parse_names(text: str) -> tuple[str, ...]:
    """Splits "jsonl,tensorboard" into the trackers to open; jsonl is always written, so it is dropped here.

    Raises ValueError on a name that is not a tracker, with the nearest one, and ImportError where its
    package is missing.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = ["jsonl", *TRACKERS]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"--log: no tracker named {name!r}{hint} (there are: {', '.join(known)})")
        if name in TRACKERS and importlib.util.find_spec(TRACKERS[name].package) is None:
            package, extra = TRACKERS[name][:2]
            raise ImportError(
                f'--log {name} needs the package {package}, which is not installed: pip install "rlhfjax[{extra}]"'
            )
    return tuple(dict.fromkeys(name for name in names if name != "jsonl"))


def open_trackers(text: str, directory: Path, config: Mapping[str, Any], name: str) -> Tracker:
    """Opens the trackers that `text` ("jsonl,tensorboard") names, for the run `name` in `directory`."""
    opened = []
    for tracker in parse_names(text):
        choice = TRACKERS[tracker]
        notes = directory / SENT / f"{tracker}.jsonl"
        opened.append(sending_once(choice.open(directory, config, name), notes, lag=choice.lag()))
    return combine(opened)
