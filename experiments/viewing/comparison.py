"""The page that compares runs: what differs, final numbers, the frontier, curves and texts."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.viewing.groups import Group, curves, final_numbers, frontier, group_runs, last_values
from experiments.viewing.runs import Run, members
from rlhfjax.report import Section, Table
from rlhfjax.report.html import Part, data_html, escape, page, section_html, table_html
from rlhfjax.report.logs import curve_data, sample_data, samples

MOST = 30  # final numbers that are shown at once
OVER_SEEDS = (
    "Where runs differ in the seed only: their mean, and its 95 % bootstrap interval over seeds. With two or three "
    "seeds that is hardly more than the range of the runs."
)


def comparison_html(runs: Sequence[Run]) -> str:
    """The whole page."""
    groups = group_runs([member for run in runs for member in members(run)])
    parts = [
        _part(_runs_section(runs)),
        _part(_settings_section(groups)),
        *_frontier_parts(groups),
        *_final_parts(groups),
        *_curve_parts(groups),
        *_last_parts(groups),
        *_sample_parts(runs),
    ]
    return page("Comparison of runs", _introduction(runs, groups), parts)


def _part(section: Section) -> Part:
    return Part(section.title, section_html(Path(), section))


def _introduction(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    lines = [f"{_count(len(runs), 'run')}, {_count(len(groups), 'setting')}."]
    experiments = list(dict.fromkeys(run.experiment for run in runs))
    if len(experiments) > 1:
        lines.append(
            f"The runs are of different experiments ({', '.join(experiments)}): numbers and curves of the same name "
            "are put side by side, and may measure different things."
        )
    lines += [f"{run.name}: {problem}." for run in runs for problem in run.problems]
    return "\n".join(f"<p>{escape(line)}</p>" for line in lines)


def _runs_section(runs: Sequence[Run]) -> Section:
    rows = []
    for run in runs:
        last = {line["stage"]: line["step"] for line in run.metrics}
        stages = ", ".join(f"{stage} {step}" for stage, step in last.items())
        rows.append([run.name, run.experiment, run.seed, run.state, stages, str(run.path)])
    return Section("Runs", "", Table(["run", "experiment", "seed", "state", "last steps", "folder"], rows))


def _settings_section(groups: Sequence[Group]) -> Section:
    names = list(groups[0].settings)
    if not names:
        same = "All runs have the same settings" if len(groups) == 1 else "No setting that they share differs"
        return Section("What differs", f"{same}; the seeds are {_seeds(groups)}.")
    rows = [[group.label, *(str(group.settings[name]) for name in names), group.seeds] for group in groups]
    text = "All other settings that the runs share are the same."
    return Section("What differs", text, Table(["setting", *names, "seeds"], rows))


def _seeds(groups: Sequence[Group]) -> str:
    return "; ".join(group.seeds for group in groups)


def _final_parts(groups: Sequence[Group]) -> list[Part]:
    found = [final_numbers(group) for group in groups]
    names = list(dict.fromkeys(name for numbers in found for name in numbers))
    if not names:
        return [_part(Section("Final numbers", "No run has finished: there is no summary.json yet."))]
    rows = [[name, *(numbers.get(name) for numbers in found)] for name in names]
    header = ["number", *(f"{group.label} (seed {group.seeds})" for group in groups)]
    first = _part(Section("Final numbers", OVER_SEEDS, Table(header, rows[:MOST])))
    if not rows[MOST:]:
        return [first]
    more = table_html(Table(header, rows[MOST:]), "More final numbers")
    summary = f"{_count(len(rows) - MOST, 'number')} more"
    return [Part(first.title, f"{first.html}\n<details><summary>{summary}</summary>\n{more}\n</details>")]


def _frontier_parts(groups: Sequence[Group]) -> list[Part]:
    points: list[dict[str, Any]] = []
    rows = []
    for group in groups:
        for policy, (kl, gold) in frontier(group).items():
            known = not math.isnan(gold.low)
            points.append(
                {
                    "group": group.label,
                    "label": policy,
                    "x": kl,
                    "y": gold.value,
                    "low": gold.low if known else None,
                    "high": gold.high if known else None,
                }
            )
            rows.append([policy, group.label, f"{round(kl, 4) + 0.0:.3g}", gold])
    if not points:
        return []
    caption = "Gold score against KL from the policy that each started from, with the intervals of the table."
    table = table_html(Table(["policy", "setting", "KL, nats", "gold"], rows), "Gold against KL")
    data = {"x": "KL, nats", "y": "gold", "points": points}
    return [Part("Gold against KL", data_html("points", data, caption) + table)]


def _curve_parts(groups: Sequence[Group]) -> list[Part]:
    found: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        for stage, curve in curves(group).items():
            found.setdefault(stage, []).append(curve)
    if not found:
        return []
    caption = (
        "Means over seeds; the band is the 95 % bootstrap interval of the mean. A single run has no band."
    )
    return [Part("Curves", data_html("curves", curve_data(found), caption))]


def _last_parts(groups: Sequence[Group]) -> list[Part]:
    found = [last_values(group) for group in groups]
    places = list(dict.fromkeys(place for values in found for place in values))
    if not places:
        return []
    rows = [[f"{stage}: {name}", *(x.get((stage, name)) for x in found)] for stage, name in places]
    table = table_html(Table(["metric", *(group.label for group in groups)], rows), "Last values")
    summary = f"{_count(len(places), 'metric')} at the last step of each run"
    return [Part("Last values", f"<details><summary>{summary}</summary>\n{table}\n</details>")]


def _sample_parts(runs: Sequence[Run]) -> list[Part]:
    found = [sample for run in runs for sample in samples(run.samples, run.name if len(runs) > 1 else "")]
    if not found:
        return []
    asked = Counter(prompt for prompt, _ in {(sample.prompt, sample.source) for sample in found})
    shared = [
        sample for sample in found if asked[sample.prompt] > 1
    ]  # of one source there is nothing to compare
    caption = "Texts of the runs for the same prompts. Words that only one of the two has are marked."
    return [Part("Samples", data_html("samples", sample_data(shared or found), caption))]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
