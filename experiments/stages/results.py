"""What each task's run leaves for the table of all tasks: results.json, a row a method.

The items of a row are what its interval is taken over: prompts, games or episodes, the same ones in the same order for
every method of a run, so that methods can be compared item by item.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhfjax.run_folder import RunFolder, read_lines, write_atomically

FILE = "results.json"


@dataclass(frozen=True)
class Row:
    """One method on one task."""

    method: str
    gold: np.ndarray  # [items] gold score of each
    kl: (
        float | None
    )  # nats a sequence from the policy that it started from; None: not defined, or not measured
    seconds: float  # of the method's own stages, without what all methods share
    command: str  # what to type to make this row


@dataclass(frozen=True)
class Results:
    """All methods of one run of a task."""

    task: str
    metric: str  # name and unit of the gold score; higher is better
    rows: Sequence[Row]


def write_results(folder: RunFolder, *, task: str, metric: str, rows: Sequence[Row]) -> None:
    """Writes results.json of the run. ValueError for a score that is not finite, or the same method twice."""
    names = [row.method for row in rows]
    if len(set(names)) != len(names):
        raise ValueError(f"results of {task} name a method twice: {', '.join(names)}")
    for row in rows:
        if np.ndim(row.gold) != 1 or not np.all(np.isfinite(row.gold)):
            raise ValueError(f"the gold scores of {row.method} on {task} must be a vector of finite numbers")
    content = {
        "task": task,
        "metric": metric,
        "rows": [
            {
                "method": row.method,
                "gold": [float(x) for x in row.gold],
                "kl": None if row.kl is None else float(row.kl),
                "seconds": float(row.seconds),
                "command": row.command,
            }
            for row in rows
        ],
    }
    write_atomically(folder.path / FILE, json.dumps(content) + "\n")


def read_results(path: Path) -> Results:
    """The results of the run in the folder `path`. FileNotFoundError where it has left none, ValueError where they
    are damaged."""
    file = path / FILE
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: the run has not ended; continue it with --resume {path}")
    try:
        content = json.loads(file.read_text())
        rows = [Row(**row | {"gold": np.asarray(row["gold"], np.float64)}) for row in content["rows"]]
        return Results(str(content["task"]), str(content["metric"]), rows)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged ({error}); delete it, and --resume {path} to write it again"
        ) from error


def stage_seconds(folder: RunFolder, *stages: str) -> float:
    """Seconds that these stages have taken, compilation and those of earlier sessions included (perf.jsonl)."""
    return sum(
        line.get("seconds") or 0.0
        for line in read_lines(folder.path / "perf.jsonl")
        if line["stage"] in stages
    )
