"""Another program by turns with ours, so that both meet the machine in the same mood.

The other program measures itself: any command whose output ends in a line of JSON with its seconds per step,
be it a benchmark of another library in its own virtual environment or this one in another checkout.
"""

import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any


def fill_in(command: str, sizes: Mapping[str, Any]) -> str:
    """`command` with its {names} replaced by sizes. Raises ValueError on a name that is none."""
    try:
        return command.format_map(sizes)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"--against {command!r}: cannot fill in {error}; write {{batch}} for a size, {{{{ for a brace "
            f"(sizes: {', '.join(sizes)})"
        ) from None


def run_command(command: str) -> dict[str, Any]:
    """Runs `command` in the shell; returns the last line of its output that is a JSON object.

    Raises RuntimeError where the command fails or prints none.
    """
    run = subprocess.run(command, shell=True, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"--against ended with status {run.returncode}: {command}\n{run.stderr[-2000:]}")
    for line in reversed(run.stdout.splitlines()):
        with suppress(ValueError):  # any other output may stand beside it
            record = json.loads(line)
            if isinstance(record, dict):
                return record
    raise RuntimeError(f"--against printed no line of JSON: {command}\n{run.stdout[-2000:]}")


def read_seconds(record: dict[str, Any], field: str) -> float:
    """The number at a dotted path, "step_s.median". Raises ValueError where there is none."""
    value: Any = record
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"--against-field {field} is not in the record, which has {', '.join(record)}")
        value = value[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"--against-field {field} must be a number of seconds, got {value!r}")
    return float(value)


def compare(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Of seconds per step, one of each per round. The ratio is the median of theirs / ours."""
    return {
        "ours_seconds": list(ours),
        "their_seconds": list(theirs),
        "ours_seconds_median": statistics.median(ours),
        "their_seconds_median": statistics.median(theirs),
        "ratio": statistics.median(
            b / a for a, b in zip(ours, theirs, strict=True)
        ),  # above 1: ours is faster
    }
