"""Run folders, read: finished or not, of any experiment, whole or broken. Nothing here writes, or imports jax."""

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.options import flatten, read_yaml
from rlhfjax.report.logs import Line, number, read_log, with_perf
from rlhfjax.run_folder import lock

NOT_RUNS = {"checkpoints", "arrays", "profile", "figures", "tensorboard", "wandb", "exported"}
SEED_OF_NAME = re.compile(r"(?:seed-|-s)(\d+)$")


@dataclass(frozen=True)
class Scores:
    """One method's row of results.json: the gold score of every item, and its KL in nats."""

    gold: np.ndarray
    kl: float | None


@dataclass(frozen=True)
class Run:
    """What a run folder holds. Runs of one program (a sweep, the seeds of a world) are parted: `member` is which."""

    path: Path
    name: str
    experiment: str
    seed: int | None
    settings: Mapping[str, Any]  # flat, the seed not among them
    metrics: Sequence[Line]
    samples: Sequence[Line]
    summary: Mapping[str, float]
    results: Mapping[str, Scores]
    state: str
    problems: Sequence[str]
    member: int = 0


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders and below them, each once, in the order given.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: a folder that holds no run, or nothing has been logged by any of them.
    """
    folders = list(dict.fromkeys(folder.resolve() for path in paths for folder in find_runs(path)))
    common = Path(os.path.commonpath(folders)) if len(folders) > 1 else folders[0].parent
    runs = [read_run(folder, folder.relative_to(common).as_posix()) for folder in folders]
    if not any(run.metrics or run.summary for run in runs):
        raise ValueError(
            f"nothing has been logged yet by {', '.join(run.name for run in runs)}: try again later"
        )
    return runs


def find_runs(path: Path) -> list[Path]:
    """The run in the folder `path`, and those below it: of `results` and the like, or of a folder of runs."""
    if not path.is_dir():
        what = "is a file, not the folder of a run" if path.exists() else "is not there"
        raise FileNotFoundError(f"{path} {what}; give folders such as runs/NAME/TIME-sSEED")
    found = []
    for place, folders, files in os.walk(path):
        folders[:] = sorted(set(folders) - NOT_RUNS)
        if "metrics.jsonl" in files or "config.yaml" in files:
            found.append(Path(place))
    if len(found) > 1:  # what only holds others has no numbers of its own
        found = [folder for folder in found if _has_numbers(folder) or not _holds_others(folder, found)]
    if not found:
        raise ValueError(f"{path} holds no run: there is no metrics.jsonl in it, nor in a folder below it")
    return found


def read_run(path: Path, name: str) -> Run:
    """The run in `path`. What is broken in it is left out and told in `problems`."""
    logs = {log: read_log(path / f"{log}.jsonl") for log in ("metrics", "perf", "samples")}
    problems = [problem for lines in logs.values() for problem in lines.problems]
    experiment, seed, settings = _configuration(path, problems)
    summary = _json_file(path / "summary.json", problems)
    run = Run(
        path=path,
        name=name,
        experiment=experiment,
        seed=seed,
        settings=settings,
        metrics=with_perf(logs["metrics"].rows, logs["perf"].rows),
        samples=logs["samples"].rows,
        summary={key: float(x) for key, x in summary.items() if number(x) is not None},
        results=_results(path, problems),
        state=_state(path),
        problems=problems,
    )
    if not run.metrics and not (path / "metrics.jsonl").is_file():
        problems.append("it has no metrics.jsonl")
    elif not run.metrics:
        problems.append("it has logged no metrics yet")
    return run


def members(run: Run) -> list[Run]:
    """The runs that were made by one program as runs of their own, or the run itself.

    A sweep logs METRIC/run_R, a world of control seed_R/METRIC (here "seed/METRIC"). What all have in common stays
    with the first.
    """
    if run.experiment == "sweep":
        grid = _sweep(run)
        parted = [_member(run, r, re.compile(rf"(?P<name>.+)/run_{r}")) for r in range(len(grid))]
        return [
            replace(one, seed=seed, settings={**run.settings, **settings})
            for one, (seed, settings) in zip(parted, grid, strict=True)
        ] or [run]
    names = {name for line in run.metrics for name in line}
    seeds = sorted({int(found[1]) for name in names if (found := re.match(r"seed_(\d+)/", name))})
    parted = [_member(run, r, re.compile(rf"(?P<name>seed)_{r}/.+")) for r in seeds]
    return [replace(one, seed=(run.seed or 0) + r) for one, r in zip(parted, seeds, strict=True)] or [run]


def _member(run: Run, index: int, own: re.Pattern[str]) -> Run:
    """Run number `index` of one program: the metrics that `own` matches, and for the first what no run owns."""
    anyone = re.compile(r"seed_\d+/.+|.+/run_\d+")

    def named(name: str) -> str | None:
        if own.fullmatch(name):
            return re.sub(r"/run_\d+$", "", re.sub(r"^seed_\d+/", "seed/", name))
        return name if name in ("stage", "step") or (index == 0 and not anyone.fullmatch(name)) else None

    lines = [{new: x for name, x in line.items() if (new := named(name))} for line in run.metrics]
    first = {} if index == 0 else {"summary": {}, "results": {}, "samples": ()}
    return replace(run, metrics=[line for line in lines if len(line) > 2], member=index, **first)


def _sweep(run: Run) -> list[tuple[int, dict[str, Any]]]:
    """Of every run of a sweep its seed and what differs: every combination, seeds innermost."""
    columns = []
    for text in run.settings.get("vary") or ():
        path, _, listed = str(text).partition("=")
        columns.append([(f"ppo.{path.strip().replace('-', '_')}", x.strip()) for x in listed.split(",")])
    rows = [dict(row) for row in itertools.product(*columns)]
    seeds = range(int(run.settings.get("seeds") or 1))
    return [((run.seed or 0) + seed, row) for row in rows for seed in seeds]


def _configuration(path: Path, problems: list[str]) -> tuple[str, int | None, dict[str, Any]]:
    """Experiment, seed and settings: from config.yaml, or from that of the run whose part this is."""
    for place in (path, *list(path.parents)[:3]):
        if not (place / "config.yaml").is_file():
            continue
        try:
            config = read_yaml(place / "config.yaml")
        except ValueError as error:
            problems.append(str(error))
            break
        experiment, seed = str(config.pop("experiment", place.name)), config.pop("seed", None)
        if place != path:  # a part, such as results/TASK/seed-N
            task = path.relative_to(place).parts[0]
            experiment = task
            config = config[task] if isinstance(config.get(task), dict) else config
            named = SEED_OF_NAME.search(path.name)
            seed = int(named[1]) if named else seed
        return experiment, seed if isinstance(seed, int) else None, flatten(config)
    problems.append("it has no config.yaml that can be read: its settings are not known")
    return path.parent.name, None, {}


def _state(path: Path) -> str:
    if (path / "summary.json").is_file():
        return "finished"
    with suppress(OSError):
        try:
            with lock(path):
                pass
        except RuntimeError:
            return "running"
    return "stopped by an error" if (path / "error.txt").is_file() else "not finished"


def _results(path: Path, problems: list[str]) -> dict[str, Scores]:
    try:
        rows = _json_file(path / "results.json", problems).get("rows", [])
        return {
            str(row["method"]): Scores(np.asarray(row["gold"], np.float64), number(row["kl"])) for row in rows
        }
    except (KeyError, TypeError, ValueError):
        problems.append("results.json is not one of ours and left out")
        return {}


def _json_file(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        problems.append(f"{path.name} cannot be read and is left out")
        return {}
    return content


def _has_numbers(folder: Path) -> bool:
    return any(
        (folder / name).is_file() and (folder / name).stat().st_size
        for name in ("metrics.jsonl", "summary.json", "results.json")
    )


def _holds_others(folder: Path, found: Sequence[Path]) -> bool:
    return any(folder in other.parents for other in found)
