"""What the logs of a run have for a page: curves and samples, thinned to what a browser shows at once."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhfjax.report.sections import visible
from rlhfjax.report.units import unit_of

POINTS = 400  # of a curve
ROWS = 400  # of samples, the newest
LONGEST = 4000  # characters of a sample
NOT_METRICS = ("stage", "step")
SO_FAR = "environment_steps so far"  # a line of metrics.jsonl has those since the line before

Line = dict[str, Any]


class Lines(NamedTuple):
    """The whole lines of a log, and what was wrong with the others, in words."""

    rows: list[Line]
    problems: list[str]


class Sample(NamedTuple):
    """One text of a model: where it comes from, what it answers, and itself."""

    source: str
    prompt: str
    text: str


def read_log(path: Path) -> Lines:
    """The lines of a .jsonl file; a broken one is left out and told of, and so is a half-written last one."""
    rows, problems = [], []
    pieces = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, piece in enumerate(pieces, start=1):
        if not piece.strip():
            continue
        try:
            row = json.loads(piece)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("stage"), str) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number == len(pieces):
            problems.append(
                f"{path.name}: the last line is half written (the run was killed, or still writes)"
            )
        else:
            problems.append(f"{path.name}, line {number} is not one of ours and left out: {piece[:60]!r}")
    return Lines(rows, problems)


def curves(rows: Sequence[Line], label: str = "") -> dict[str, list[dict[str, Any]]]:
    """Stage -> one curve of each metric, `{"label", "step", "values": {metric: numbers}}`; null where there is none.

    Stages of one step have no curve. Of more than `POINTS` steps every k-th is kept, and the last.
    """
    by_stage: dict[str, list[Line]] = {}
    for row in rows:
        by_stage.setdefault(row["stage"], []).append(row)
    return {stage: [_curve(_thinned(lines), label)] for stage, lines in by_stage.items() if len(lines) > 1}


def curve_data(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The data of a "curves" view: the curves of each stage, and the units of what they show."""
    names = {name for curves in stages.values() for curve in curves for name in curve["values"]}
    units = {name: unit for name in sorted(names) if (unit := unit_of(name)) is not None}
    return {"units": units, "stages": stages}


def with_perf(rows: Sequence[Line], perf: Sequence[Line]) -> list[Line]:
    """The metrics with the measurements of the same stage and step beside them, as "perf/NAME", and `SO_FAR`."""
    measured = {(row["stage"], row["step"]): row for row in perf}
    merged: list[Line] = []
    taken: dict[str, float] = {}
    for row in rows:
        more = measured.get((row["stage"], row["step"]), {})
        line = row | {f"perf/{name}": x for name, x in more.items() if name not in NOT_METRICS}
        steps = number(row.get("environment_steps"))
        if steps is not None:
            line[SO_FAR] = taken[row["stage"]] = taken.get(row["stage"], 0) + steps
        merged.append(line)
    return merged


def samples(rows: Sequence[Line], label: str = "") -> list[Sample]:
    """The texts of samples.jsonl: the first text of a row is the prompt, each other one a sample of its own."""
    found = []
    for row in rows[-ROWS:]:
        texts = {name: shown(x) for name, x in row.items() if isinstance(x, str) and name not in NOT_METRICS}
        if len(texts) > 1:
            prompt, *rest = texts
            place = f"{row['stage']}, step {row['step']}" if row["step"] else row["stage"]
            start = f"{label}: {place}" if label else place
            found += [Sample(f"{start}: {name}", texts[prompt], texts[name]) for name in rest]
    return found


def sample_data(found: Sequence[Sample]) -> dict[str, Any]:
    """The data of a "samples" view: of every source its texts by the number of their prompt."""
    prompts: dict[str, int] = {}
    sources: dict[str, dict[int, str]] = {}
    for sample in found:
        number = prompts.setdefault(sample.prompt, len(prompts))
        sources.setdefault(sample.source, {}).setdefault(number, sample.text)
    return {
        "prompts": list(prompts),
        "sources": [{"label": label, "texts": texts} for label, texts in sources.items()],
    }


def shown(text: str) -> str:
    """The text as a page shows it: control characters as escapes, line breaks kept, the end of a long one cut."""
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return "".join(x if x == "\n" else visible(x) for x in text.replace("\r\n", "\n"))


def _thinned(lines: list[Line]) -> list[Line]:
    stride = -(-len(lines) // POINTS)
    kept = lines[::stride]
    return kept if kept[-1] is lines[-1] else [*kept, lines[-1]]


def _curve(lines: Sequence[Line], label: str) -> dict[str, Any]:
    names = dict.fromkeys(name for line in lines for name in line if name not in NOT_METRICS)
    values = {name: [number(line.get(name)) for line in lines] for name in names}
    return {
        "label": label,
        "step": [line["step"] for line in lines],
        "values": {name: x for name, x in values.items() if any(y is not None for y in x)},
    }


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None: JSON has no NaN."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    return value if good else None
