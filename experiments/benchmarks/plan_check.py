"""A plan held against what happens: memory and seconds of an experiment's programs, predicted and measured here.

    python experiments/benchmarks/plan_check.py summarize chat

Each program is run on arguments of its shapes (weights are random, masks full), so that loops over tokens turn as often
as they can. Measured on a CPU is the growth of the process's resident memory, on an accelerator what its allocator
says. A quiet machine is needed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from experiments import planning, run
from experiments.programs import Program
from rlhfjax.config import Mesh
from rlhfjax.mesh import make_mesh
from rlhfjax.planner import in_bytes
from rlhfjax.report import Table, markdown_table

STATUS, PEAK_OF = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", default=["summarize"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    chosen, target = planning.target_of("here", 1)
    mesh = make_mesh(Mesh(data=1), target.devices)
    rows = []
    for name in arguments.experiments:
        module = run.load_experiment(name, run.HERE)
        programs = module.plan(module.Config(), mesh)
        plans = planning.plan_programs(programs, chosen, target, mesh, None, lambda line: None)
        for program, planned in zip(programs, plans, strict=True):
            memory, seconds = measured(program, arguments.repeats)
            told = planned.plan.usage.total, planned.plan.seconds.total
            rows.append(
                [
                    name,
                    f"{program.stage}: {program.name}",
                    in_bytes(told[0]),
                    in_bytes(memory),
                    f"{told[0] / memory:.2f}",
                    f"{told[1]:.3g}",
                    f"{seconds:.3g}",
                    f"{told[1] / seconds:.2f}",
                ]
            )
            print(rows[-1], file=sys.stderr, flush=True)
    header = [
        "experiment",
        "program",
        "memory, told",
        "measured",
        "ratio",
        "seconds, told",
        "measured",
        "ratio",
    ]
    print(f"{jax.devices()[0].device_kind}, {chosen.source}\n")
    print(markdown_table(Table(header, rows)))


def measured(program: Program, repeats: int) -> tuple[float, float]:
    """(bytes, seconds) of a run of the program."""
    bound = getattr(program.function, "args", ())
    compiled = program.lower().compile()
    before = resident()
    arguments = list(jax.tree.map(filled, (*bound, *program.arguments)))
    state = len(bound)  # the first of the program's own arguments, which it returns first where it changes it
    updates = program.name in ("update", "iteration")

    def once() -> float:
        start = time.perf_counter()
        out = jax.block_until_ready(compiled(*arguments))
        seconds = time.perf_counter() - start
        if updates:
            arguments[state] = out[0]
        return seconds

    once()
    reset_peak()
    seconds = statistics.median(once() for _ in range(repeats))
    return peak() - before, seconds


def filled(shape: Any) -> jax.Array:
    """An array of a shape: small normal numbers, masks of True, ids and counts of 0."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    if shape.dtype == bool:
        x = np.ones(shape.shape, bool)
    elif jnp.issubdtype(shape.dtype, jnp.floating):
        x = 0.02 * np.random.default_rng(0).standard_normal(shape.shape, np.float32)
    else:
        x = np.zeros(shape.shape)
    return jax.device_put(jnp.asarray(x, shape.dtype), shape.sharding)


def resident() -> float:
    """Bytes in use now."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else 1024.0 * _field("VmRSS")


def reset_peak() -> None:
    """Forgets the peak so far; an accelerator's allocator cannot, and has none before the first run."""
    if not jax.devices()[0].memory_stats():
        PEAK_OF.write_text("5")


def peak() -> float:
    """Most bytes in use since `reset_peak`."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else 1024.0 * _field("VmHWM")


def _field(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


if __name__ == "__main__":
    main()
