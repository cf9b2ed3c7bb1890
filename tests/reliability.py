"""Tries what a run must survive, many times, and prints the table of docs/reliability.md.

`python tests/reliability.py` takes a few minutes; `--cases 500` about half an hour on two cores. The quick form is
`pytest -m reliability`; with `-m "reliability and slow"` come the kills and the soak.
"""

import argparse
import contextlib
import io
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def rows(cases: int, kills: int, updates: int, only: list[str]) -> list[tuple[str, int, str]]:
    """(What was tried, how often, what came of it); a failure raises AssertionError."""
    import reliable_inputs
    import reliable_runs as runs

    tried: dict[str, Callable[[Path], tuple[int, str]]] = {
        "kill -9, a pipeline of text": lambda f: counted(runs.kills(runs.text_run, f, kills, 0)),
        "kill -9, a world of control": lambda f: counted(runs.kills(runs.control_run, f, kills, 1)),
        "checkpoint spoilt": lambda f: counted(runs.spoilt_checkpoints(f, cases, 0)),
        "checkpoint, no room": lambda f: counted(runs.full_disk(f, max(1, cases // 5), 0)),
        "checkpoint, no place": lambda f: counted(runs.no_place(f)),
        "soak": lambda f: soaked(runs.soak(f, updates, warm=updates // 10)),
    } | {
        f"spoilt file: {name}": lambda f, t=target: counted(
            reliable_inputs.fuzz(t, f, cases, derandomize=False)
        )
        for name, target in reliable_inputs.targets().items()
    }
    found = []
    for what, attempt in tried.items():
        if only and not any(part in what for part in only):
            continue
        start = time.perf_counter()
        with (
            tempfile.TemporaryDirectory(prefix="rlhfjax-") as folder,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            found.append((what, *attempt(Path(folder))))
        print(f"{what}: {found[-1][1]}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def counted(seen: dict[str, int]) -> tuple[int, str]:
    return sum(seen.values()), "; ".join(f"{what} {count}" for what, count in sorted(seen.items()))


def soaked(measured: dict[str, float]) -> tuple[int, str]:
    steps = int(measured.pop("updates"))
    assert measured["MiB at the end"] < measured["MiB after warm-up"] + 32, measured
    assert measured["seconds compiling since"] == 0, measured
    return steps, "; ".join(f"{what} {number:.0f}" for what, number in measured.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=50, help="of each file and of checkpoints")
    parser.add_argument("--kills", type=int, default=6, help="of each of two runs")
    parser.add_argument("--updates", type=int, default=500, help="of the soak, at least 200")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name holds one of these")
    options = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs a page for each disk that is full
    found = rows(options.cases, options.kills, options.updates, options.only)
    print("| tried | cases | what came of it |\n|---|---|---|")
    for what, count, outcome in found:
        print(f"| {what} | {count} | {outcome} |")


if __name__ == "__main__":
    main()
