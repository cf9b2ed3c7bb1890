"""The table of all tasks: every task's run with several seeds, and what they have in common said side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.stages.results import FILE, Results, Row, read_results
from rlhfjax.figures import plot_intervals
from rlhfjax.report import Interval, Section, Table, nested_bootstrap_interval
from rlhfjax.run_folder import LOGS, RunFolder


class Job(NamedTuple):
    """A task: the experiment that it is run by, as the command line names it, and its settings."""

    experiment: str
    run: Callable[[Any, RunFolder], dict[str, float]]
    config: Any


def run_all(tasks: Mapping[str, Job], seeds: int, folder: RunFolder) -> dict[str, list[Results]]:
    """Runs every task with each of the seeds, in folders of their own; those that have ended are not run again."""
    found: dict[str, list[Results]] = {}
    for name, (experiment, run, config) in tasks.items():
        for seed in range(folder.seed, folder.seed + seeds):
            part = _part(folder, name, experiment, seed)
            print(f"{name}, seed {seed}, in {part.path}", flush=True)
            if not (part.path / FILE).exists():
                part.write_summary(run(config, part))
            found.setdefault(name, []).append(read_results(part.path))
        _check_alike(name, found[name])
        jax.clear_caches()  # programs of one task are of no use to the next
    return found


def _check_alike(name: str, runs: Sequence[Results]) -> None:
    methods = [[row.method for row in run.rows] for run in runs]
    if any(other != methods[0] for other in methods):
        raise ValueError(f"the runs of {name} have other methods for other seeds: {methods}")


def _part(folder: RunFolder, name: str, experiment: str, seed: int) -> RunFolder:
    path = folder.path / name / f"seed-{seed}"
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    for log in LOGS:
        (path / log).touch()
    part = replace(folder, path=path, experiment=experiment, seed=seed)
    part.repair()
    return part


def sections(found: Mapping[str, Sequence[Results]], folder: RunFolder) -> list[Section]:
    """A table a task, a row a method, and all of them in one figure."""
    gold = {
        f"{runs[0].task}\n({runs[0].metric})": {
            row.method: _over_runs([run.rows[i].gold for run in runs]) for i, row in enumerate(runs[0].rows)
        }
        for runs in found.values()
    }
    path = folder.path / "figures"
    path.mkdir(exist_ok=True)
    figure = plot_intervals(path / "results.png", gold)
    text = (
        "Means over runs of several seeds. Intervals: 95 %, over runs and the items of each (two-stage bootstrap); "
        "beside them the lowest and the highest run. The lead is taken item by item. Seconds are those of the method's "
        "own stages; what all methods share, such as fine-tuning, is not in them."
    )
    tables = [
        _task_section(runs, list(of.values())) for runs, of in zip(found.values(), gold.values(), strict=True)
    ]
    return [Section("All tasks", text, figures=[(figure, "Gold scores")]), *tables]


def numbers(found: Mapping[str, Sequence[Results]]) -> dict[str, float]:
    """TASK/METHOD/gold and the like, means over the runs."""
    summary: dict[str, float] = {}
    for name, runs in found.items():
        for i, row in enumerate(runs[0].rows):
            same = [run.rows[i] for run in runs]
            kls = [x.kl for x in same if x.kl is not None]
            summary[f"{name}/{row.method}/gold"] = float(np.mean([x.gold.mean() for x in same]))
            summary |= {f"{name}/{row.method}/kl": float(np.mean(kls))} if kls else {}
            summary[f"{name}/{row.method}/seconds"] = float(np.mean([x.seconds for x in same]))
    return summary


def _task_section(runs: Sequence[Results], gold: Sequence[Interval]) -> Section:
    first, baseline = runs[0], [run.rows[0] for run in runs]
    rows = []
    for i, row in enumerate(first.rows):
        same = [run.rows[i] for run in runs]
        means = [float(x.gold.mean()) for x in same]
        kls = [x.kl for x in same if x.kl is not None]
        rows.append(
            [
                row.method,
                gold[i],
                f"{min(means):.3g} to {max(means):.3g}",
                "" if i == 0 else _lead(same, baseline),
                f"{round(np.mean(kls), 2) + 0.0:.2f}" if kls else "",
                f"{np.mean([x.seconds for x in same]):.0f}",
                row.command,
            ]
        )
    header = [
        "method",
        first.metric,
        "over seeds",
        f"lead over {first.rows[0].method}",
        "KL, nats",
        "s",
        "command",
    ]
    return Section(first.task, "", Table(header, rows))


def _lead(rows: Sequence[Row], baseline: Sequence[Row]) -> Interval | str:
    pairs = list(zip(rows, baseline, strict=True))
    if any(row.gold.shape != base.gold.shape for row, base in pairs):
        return ""  # other items: no difference item by item
    return _over_runs([row.gold - base.gold for row, base in pairs])


def _over_runs(groups: Sequence[np.ndarray]) -> Interval:
    return nested_bootstrap_interval(groups, 0, resamples=4000)
