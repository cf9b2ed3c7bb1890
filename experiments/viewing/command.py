"""The command line of the comparison."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    """Compares runs, finished or not, of any experiment, in one HTML file that needs nothing else.

    To train methods side by side instead: python experiments/run.py compare.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs, or folders that hold some."""
    out: Path = Path("comparison.html")
    """The file to write."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the comparison; returns the exit status, 2 where it cannot be made."""
    options = tyro.cli(Options, prog="python experiments/compare.py", args=arguments)
    from experiments.viewing.comparison import comparison_html
    from experiments.viewing.runs import read_runs
    from rlhfjax.run_folder import write_atomically

    try:
        if not options.runs:
            raise ValueError("give at least one folder of a run, such as runs/NAME/TIME-sSEED")
        if not options.out.absolute().parent.is_dir():
            raise FileNotFoundError(
                f"--out {options.out}: there is no folder {options.out.absolute().parent}"
            )
        runs = read_runs(options.runs)
        write_atomically(options.out, comparison_html(runs))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for run in runs:
        for problem in run.problems:
            print(f"note: {run.name}: {problem}")
    print(f"{len(runs)} {'run is' if len(runs) == 1 else 'runs are'} compared in {options.out}")
    return 0
