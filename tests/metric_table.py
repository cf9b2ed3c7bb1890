"""The tables of docs/metrics.md, read; and whether they have what a run has logged."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, STAGES = "What algorithms", "What the stages"
PLACEHOLDER = re.compile(r"\b(?:R|[A-Z]{4,})\b|(?<=_)(?:R|SPLIT)\b")
FILLED = {"R": r"[\d.]+", "NAME": ".+"}  # any other: anything without a slash


def table(heading: str) -> list[dict[str, str]]:
    """The rows below a heading that begins so: column -> cell, of the name and the file without backticks."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    (part,) = (part for part in page.split("\n## ") if part.startswith(heading))
    rows = [line.strip("| ").split("|") for line in part.splitlines() if line.startswith("|")]
    head, _, *body = ([cell.strip() for cell in row] for row in rows)
    return [
        {
            key: cell.strip("`") if key in ("name", "from") else cell
            for key, cell in zip(head, row, strict=True)
        }
        for row in body
    ]


@cache
def allowed() -> list[tuple[re.Pattern[str], re.Pattern[str] | None]]:
    """Of each row what its names look like, and its stages; None where the row does not name them in backticks."""
    found = []
    for row in (*table(PACKAGE), *table(STAGES)):
        stages = [as_pattern(stage).pattern for stage in re.findall(r"`(\w+)`", row.get("stage", ""))]
        found.append((as_pattern(row["name"]), re.compile("|".join(stages)) if stages else None))
    return found


@cache
def as_pattern(name: str) -> re.Pattern[str]:
    """A name of the table as a regular expression: placeholders filled, all else as it stands."""
    parts, start = [], 0
    for found in PLACEHOLDER.finditer(name):
        fill = _plain() if found[0] == "METRIC" else FILLED.get(found[0], "[^/]+")
        parts += [re.escape(name[start : found.start()]), fill]
        start = found.end()
    return re.compile("".join([*parts, re.escape(name[start:])]))


@cache
def _plain() -> str:
    names = [row["name"] for row in (*table(PACKAGE), *table(STAGES))]
    return f"(?:{'|'.join(re.escape(name) for name in names if not PLACEHOLDER.search(name))})"


def listed(stage: str, metric: str) -> bool:
    """Whether a table has the metric, in that stage."""
    return any(
        name.fullmatch(metric) and (stages is None or stages.fullmatch(stage)) for name, stages in allowed()
    )


def unlisted(folder: Path) -> Iterator[str]:
    """What runs of experiments below a folder have logged and no table has, in words: each stage's metrics once."""
    for run in sorted(file.parent for file in folder.rglob("environment.json")):  # which only run.py writes
        if not _is_ours(run):
            continue
        for log in sorted(run.rglob("metrics.jsonl")):
            names: set[tuple[str, str]] = set()
            for line in _lines(log):
                names |= {(line["stage"], name) for name in line.keys() - {"stage", "step"}}
            yield from (f"{log}: {stage}: {name}" for stage, name in sorted(names) if not listed(stage, name))


def _is_ours(run: Path) -> bool:
    """Whether it is a run of an experiment that there is: tests of the runner make up others."""
    config = run / "config.yaml"
    name = re.search(r"^experiment: (\w+)$", config.read_text() if config.is_file() else "", re.MULTILINE)
    return name is not None and (ROOT / "experiments" / f"{name[1]}.py").is_file()


def _lines(log: Path) -> Iterator[dict]:
    """The whole lines: tests tear logs on purpose."""
    for line in log.read_text(errors="replace").splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and "stage" in found:
            yield found
