"""Trackers: where metrics go besides the run folder's own metrics.jsonl.

A tracker is a pair of functions. `open_trackers` turns the names typed on the command line into one
tracker; code that builds its own passes a `Tracker` instead. The third-party packages are imported only
when asked for.
"""

import difflib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Metrics = Mapping[str, float]


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
    """TensorBoard event files in `directory`/tensorboard, one tag "STAGE/METRIC" per metric."""
    del config, name
    import tensorboardX

    writer = tensorboardX.SummaryWriter(str(directory / "tensorboard"))

    def log(stage: str, step: int, metrics: Metrics) -> None:
        for metric, value in metrics.items():
            writer.add_scalar(f"{stage}/{metric}", value, step)
        writer.flush()

    return Tracker(log=log, close=writer.close)


def wandb(directory: Path, config: Mapping[str, Any], name: str) -> Tracker:
    """Weights & Biases, project "rlhfjax". WANDB_MODE=offline in the environment keeps it on this machine."""
    import wandb as package  # pyright: ignore[reportMissingImports]

    run = package.init(
        project="rlhfjax",
        name=name,
        id=name.replace("/", "-"),
        resume="allow",
        dir=str(directory),
        config=dict(config),
    )

    def log(stage: str, step: int, metrics: Metrics) -> None:
        # wandb's own step may only grow, and ours starts again at every stage: so each stage logs its own.
        run.log({f"{stage}/step": step} | {f"{stage}/{metric}": value for metric, value in metrics.items()})

    return Tracker(log=log, close=run.finish)


def trackio(directory: Path, config: Mapping[str, Any], name: str) -> Tracker:
    """Trackio's local dashboard, project "rlhfjax"; `trackio show` opens it."""
    del directory
    import trackio as package  # pyright: ignore[reportMissingImports]

    run = package.init(project="rlhfjax", name=name, config=dict(config))

    def log(stage: str, step: int, metrics: Metrics) -> None:
        run.log({f"{stage}/step": step} | {f"{stage}/{metric}": value for metric, value in metrics.items()})

    return Tracker(log=log, close=run.finish)


class Choice(NamedTuple):
    """A tracker that `--log` can name: the package it needs, and the function that opens it."""

    package: str
    open: Callable[[Path, Mapping[str, Any], str], Tracker]


TRACKERS = {
    "tensorboard": Choice("tensorboardX", tensorboard),
    "wandb": Choice("wandb", wandb),
    "trackio": Choice("trackio", trackio),
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
            package = TRACKERS[name].package
            raise ImportError(
                f"--log {name} needs the package {package}, which is not installed: pip install {package}"
            )
    return tuple(dict.fromkeys(name for name in names if name != "jsonl"))


def open_trackers(text: str, directory: Path, config: Mapping[str, Any], name: str) -> Tracker:
    """Opens the trackers that `text` ("jsonl,tensorboard") names, for the run `name` in `directory`."""
    return combine([TRACKERS[tracker].open(directory, config, name) for tracker in parse_names(text)])
