"""Runs that differ in the seed only, put together: curves with bands, numbers with intervals."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.viewing.runs import Run
from rlhfjax.report import Interval, bootstrap_interval, nested_bootstrap_interval
from rlhfjax.report.logs import NOT_METRICS, POINTS, number

RESAMPLES = 1000
MANY = 3  # settings that a label can name


@dataclass(frozen=True)
class Group:
    """Runs of one experiment with the same settings, and what sets them apart from the other groups, in words."""

    label: str
    experiment: str
    runs: Sequence[Run]  # those of one program parted
    settings: Mapping[str, Any]  # those that differ between groups

    @property
    def seeds(self) -> str:
        return ", ".join("?" if run.seed is None else str(run.seed) for run in self.runs)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """The groups, in the order of their first runs."""
    found: dict[tuple[str, tuple], list[Run]] = {}
    for run in runs:
        # A run whose settings are not known is like no other.
        settings = tuple(sorted((key, repr(x)) for key, x in run.settings.items())) or (("run", run.name),)
        found.setdefault((run.experiment, settings), []).append(run)
    differing = differing_settings([own[0] for own in found.values()])
    groups = []
    for (experiment, _), own in found.items():
        settings = {name: own[0].settings.get(name, "") for name in differing}
        groups.append(Group(_label(experiment, own, settings, len(found)), experiment, own, settings))
    return _told_apart(groups)


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """The settings that are not the same in all runs of an experiment; of several experiments what they share."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    shared = [name for name in names if sum(name in run.settings for run in runs) > 1]
    alike = len({run.experiment for run in runs}) == 1
    return [
        name
        for name in (names if alike else shared)
        if len({repr(run.settings[name]) for run in runs if name in run.settings}) > 1
        or (alike and any(name not in run.settings for run in runs))
    ]


def curves(group: Group) -> dict[str, dict[str, Any]]:
    """Stage -> the group's curve: means over its runs, and where there are several the interval of the mean."""
    by_stage: dict[str, list[dict[int, dict[str, Any]]]] = {}
    for run in group.runs:
        own: dict[str, dict[int, dict[str, Any]]] = {}
        for line in run.metrics:
            own.setdefault(line["stage"], {})[line["step"]] = line
        for stage, lines in own.items():
            by_stage.setdefault(stage, []).append(lines)
    found = {stage: _curve(group.label, runs) for stage, runs in by_stage.items()}
    return {stage: curve for stage, curve in found.items() if len(curve["step"]) > 1}


def final_numbers(group: Group) -> dict[str, Interval | float]:
    """Name -> number of the runs' summaries; over several seeds the mean, with its interval.

    Of one run the interval is the summary's own (NAME_low, NAME_high and the like), over items, if it has one.
    """
    summaries = [run.summary for run in group.runs if run.summary]
    names = dict.fromkeys(name for summary in summaries for name in summary)
    ends = {name: _ends(name, names) for name in names}
    are_ends = {end for pair in ends.values() for end in pair}
    found: dict[str, Interval | float] = {}
    for name in (name for name in names if name not in are_ends):
        values = [summary[name] for summary in summaries if name in summary]
        own = [summaries[0][end] for end in ends[name] if end in summaries[0]]
        shown = name.removesuffix("/value") if ends[name] else name
        if len(values) > 1:
            found[shown] = bootstrap_interval(values, 0, resamples=RESAMPLES)
        elif len(own) == 2:
            found[shown] = Interval(values[0], *own)
        else:
            found[shown] = values[0]
    return found


def frontier(group: Group) -> dict[str, tuple[float, Interval]]:
    """Policy -> (KL in nats, gold), of results.json, item by item, or of the summary's P/kl and P/gold."""
    found: dict[str, tuple[float, Interval]] = {}
    with_results = [run.results for run in group.runs if run.results]
    for method in dict.fromkeys(name for results in with_results for name in results):
        rows = [results[method] for results in with_results if method in results]
        kls = [row.kl for row in rows if row.kl is not None]
        if kls:
            gold = nested_bootstrap_interval([row.gold for row in rows], 0, resamples=RESAMPLES)
            found[method] = (float(np.mean(kls)), gold)
    if found:
        return found
    numbers = final_numbers(group)
    for name, gold in numbers.items():
        policy = name.removesuffix("/gold")
        kl = numbers.get(f"{policy}/kl")
        if policy != name and kl is not None:
            own = gold if isinstance(gold, Interval) else Interval(gold, np.nan, np.nan)
            found[policy] = (kl.value if isinstance(kl, Interval) else kl, own)
    return found


def last_values(group: Group) -> dict[tuple[str, str], Interval | float]:
    """(stage, metric) -> its value at the last step that each run has logged."""
    rows: dict[tuple[str, str], list[float]] = {}
    for run in group.runs:
        last = {line["stage"]: line for line in run.metrics}
        for stage, line in last.items():
            for name, value in line.items():
                if name not in NOT_METRICS and number(value) is not None:
                    rows.setdefault((stage, name), []).append(float(value))
    return {
        place: x[0] if len(x) == 1 else bootstrap_interval(x, 0, resamples=RESAMPLES)
        for place, x in rows.items()
    }


def _curve(label: str, runs: Sequence[Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    steps = sorted({step for lines in runs for step in lines})
    stride = -(-len(steps) // POINTS)
    steps = sorted({*steps[::stride], steps[-1]})
    names = {name for lines in runs for line in lines.values() for name in line} - set(NOT_METRICS)
    curve: dict[str, Any] = {"label": label, "step": steps, "values": {}, "low": {}, "high": {}}
    for name in sorted(names):
        value_RT = np.array(
            [[_float(lines.get(step, {}).get(name)) for step in steps] for lines in runs], np.float64
        )
        if np.isfinite(value_RT).any():
            mean, low, high = _band(value_RT)
            curve["values"][name] = _listed(mean)
            if np.isfinite(low).any():
                curve["low"][name], curve["high"][name] = _listed(low), _listed(high)
    return curve


def _band(value_RT: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean over the runs that have a value, and the ends of its percentile bootstrap interval, NaN for one run."""
    known_RT = np.isfinite(value_RT)
    filled_RT = np.where(known_RT, value_RT, 0.0)
    count_T = known_RT.sum(axis=0)
    mean_T = np.where(count_T > 0, filled_RT.sum(axis=0) / np.maximum(count_T, 1), np.nan)
    low_T, high_T = np.full((2, len(mean_T)), np.nan)
    several = count_T > 1
    if several.any():
        runs = len(value_RT)
        drawn = np.random.default_rng(0).integers(runs, size=(RESAMPLES, runs))
        times_BR = np.stack([(drawn == r).sum(axis=1) for r in range(runs)], axis=1).astype(np.float64)
        with np.errstate(invalid="ignore"):  # 0 / 0 where only runs without a value were drawn
            mean_BT = (times_BR @ filled_RT[:, several]) / (times_BR @ known_RT[:, several])
        low_T[several], high_T[several] = np.nanpercentile(mean_BT, [2.5, 97.5], axis=0)
    return mean_T, low_T, high_T


def _ends(name: str, names: Container[str]) -> tuple[str, ...]:
    """What a summary calls the low and the high end of the number's interval; nothing where it has none."""
    for before in (f"{name}_", f"{name}/", f"{name}, ", f"{name.removesuffix('value')}"):
        if before != name and f"{before}low" in names and f"{before}high" in names:
            return f"{before}low", f"{before}high"
    return ()


def _label(experiment: str, runs: Sequence[Run], settings: Mapping[str, Any], groups: int) -> str:
    own = {name: value for name, value in settings.items() if name in runs[0].settings}
    if groups == 1 or not own or len(own) > MANY:
        return f"{experiment}, {runs[0].name}" if groups > 1 else experiment
    last = [name.rsplit(".", 1)[-1] for name in settings]
    return ", ".join(
        f"{name if last.count(short) > 1 else short} {value}"
        for name, value in own.items()
        if (short := name.rsplit(".", 1)[-1])
    )


def _told_apart(groups: Sequence[Group]) -> list[Group]:
    labels = [group.label for group in groups]
    return [
        group
        if labels.count(group.label) == 1
        else Group(f"{group.label} ({group.runs[0].name})", group.experiment, group.runs, group.settings)
        for group in groups
    ]


def _float(value: Any) -> float:
    known = number(value)
    return np.nan if known is None else float(known)


def _listed(values: np.ndarray) -> list[float | None]:
    return [float(f"{x:.6g}") if np.isfinite(x) else None for x in values]
