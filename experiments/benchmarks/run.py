"""Measures the steps that a run is made of: `python experiments/benchmarks/run.py [CASE ...]`.

One line of JSON per case on standard output. Without a name, all cases.
"""

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout runs as it lies, from any folder

from experiments.benchmarks import peers
from experiments.benchmarks.sizes import Sizes
from experiments.options import did_you_mean

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class Options:
    """How to measure; the sizes follow."""

    cases: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to measure, see --list; none: everything. The ceiling is always measured first."""
    repeats: int = 10
    """Timed steps of a case; with --against, of a round."""
    against: str = ""
    """A shell command that times the same step of another program and prints the result as JSON, run after
    each round of the one case named. Sizes are filled in: "other --batch {batch}"."""
    against_field: str = "seconds_median"
    """The field of that JSON that holds seconds per step; dotted where nested, as in step_s.median."""
    rounds: int = 5
    """Rounds of ours and theirs."""
    list: Flag = False
    """List the cases and stop."""
    sizes: Annotated[Sizes, tyro.conf.arg(name="")] = field(default_factory=Sizes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments`; returns the exit status."""
    options = tyro.cli(
        Options, prog="python experiments/benchmarks/run.py", description=__doc__, args=arguments
    )
    from experiments.benchmarks.cases import CASES

    if options.list:
        for name, case in CASES.items():
            print(f"{name:<15}  {(case.__doc__ or '').splitlines()[0]}")
        return 0
    try:
        run(options)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: Options) -> None:
    """Measures and prints. Raises ValueError on bad options, RuntimeError on a command that fails."""
    from experiments.benchmarks.cases import CASES
    from experiments.benchmarks.measure import measure

    _check(options, list(CASES))
    ceiling = measure(CASES["ceiling"](options.sizes), options.repeats)
    best = ceiling["model_flops"] / ceiling["seconds_min"] / 1e9
    emit("ceiling", ceiling, best)
    for name in options.cases or tuple(CASES):
        if name == "ceiling":
            continue
        case = CASES[name](options.sizes)
        record = measure_against(case, options) if options.against else measure(case, options.repeats)
        emit(name, record, best)


def measure_against(case: Any, options: Options) -> dict[str, Any]:
    """The record of a case, with its comparison to the command run after each round."""
    from experiments.benchmarks.measure import measure

    command = peers.fill_in(options.against, dataclasses.asdict(options.sizes))
    records, theirs = [], []

    def run_theirs() -> None:
        records.append(peers.run_command(command))
        theirs.append(peers.read_seconds(records[-1], options.against_field))

    record = measure(case, options.repeats, rounds=options.rounds, between=run_theirs)
    seconds, repeats = record["seconds"], options.repeats
    ours = [statistics.median(seconds[i : i + repeats]) for i in range(0, len(seconds), repeats)]
    return record | {"against": command} | peers.compare(ours, theirs) | {"their_record": records[-1]}


def emit(name: str, record: dict[str, Any], ceiling: float) -> None:
    """Prints the record as one line, with its share of the measured ceiling."""
    rate = record["gflops_per_second"]
    share = {
        "ceiling_gflops_per_second": ceiling,
        "ceiling_share": None if rate is None else rate / ceiling,
    }
    print(json.dumps({"case": name} | record | share), flush=True)


def _check(options: Options, known: list[str]) -> None:
    for name in options.cases:
        if name not in known:
            raise ValueError(
                f"no case named {name!r}{did_you_mean(name, known)} (there are: {', '.join(known)})"
            )
    if options.repeats < 1 or options.rounds < 1:
        raise ValueError(f"--repeats {options.repeats} and --rounds {options.rounds} must be at least 1")
    if options.against and len(options.cases) != 1:
        raise ValueError("--against compares one case: name it")


if __name__ == "__main__":
    # Programs kept from an earlier run would make the compile seconds a fiction.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    sys.exit(main())
