"""`--dry-run`: what an experiment needs, takes and costs on devices that need not be there.

Every program of its stages is compiled from shapes for the accelerator that is asked for, and read: see
`rlhfjax.planner`. No data is loaded and no weight.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from experiments.programs import Program
from rlhfjax.config import Mesh
from rlhfjax.report import Table, markdown_table

AT_ONCE = 8  # compilers, at most: each takes gigabytes for a large model
DEEP = 12  # layers; a program of more is told from those of
DEPTHS = (4, 8)


@dataclass(frozen=True)
class Planned:
    """A program, compiled and read."""

    program: Program
    plan: Any  # rlhfjax.planner.Plan, of one run of it


def dry_run(
    title: str,
    build: Callable[[Any], Sequence[Program]],
    layout: Mesh,
    *,
    accelerator: str,
    devices: int,
    price: float | None,
    stages: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """The plan of an experiment, as Markdown.

    Args:
      build: mesh -> its programs.
      accelerator: a name or a file that `rlhfjax.accelerators.lookup` knows; "here": what JAX has, compiled for it.
      devices: how many of it; 0: as many as the layout names, at least 1.
      price: of a device, an hour; None: no cost is given.
      stages: those to plan; empty: all.
      say: is told what is being compiled.

    Raises ValueError where the mesh cannot be laid over so many devices, or a batch not over the mesh.
    """

    devices = devices or math.prod(size or 1 for size in dataclasses.asdict(layout).values())
    chosen, target = target_of(accelerator, devices)
    mesh = _mesh(layout, target, chosen.memory)
    with _traced_for(target.platform):
        compiled = partial(plan_programs, chosen=chosen, target=target, mesh=mesh, price=price, say=say)
        planned = compiled(_chosen(build(mesh), stages, title))
        main = max(planned, key=lambda one: one.plan.seconds.total * one.program.runs)
        program = main.program
        double = [program.at(2 * program.rows)] if program.at is not None else []
        variants = {} if main.plan.fits else {flags: make() for flags, make in program.variants.items()}
        more = compiled([*double, *variants.values()])
        largest = _largest_batch(main, more[0] if double else None, mesh)
        advice = _advice(main, dict(zip(variants, more[len(double) :], strict=True)), mesh)
    return "\n\n".join([_whole_run(title, planned, main, mesh), *_details(main, advice, largest)]) + "\n"


def _chosen(programs: Sequence[Program], stages: Sequence[str], title: str) -> list[Program]:
    there = {program.stage for program in programs}
    if unknown := sorted(set(stages) - there):
        raise ValueError(
            f"--stages {' '.join(unknown)}: {title} has {', '.join(sorted(there)) or 'none to plan'}"
        )
    found = [program for program in programs if not stages or program.stage in stages]
    if not found:
        raise ValueError(f"{title}: with these settings it compiles nothing to plan")
    return found


def target_of(name: str, count: int) -> tuple[Any, Any]:
    """(the accelerator, what to compile for)."""
    import jax

    # The number of virtual CPUs is fixed when JAX first uses one; where it has, there are enough or an error tells.
    with contextlib.suppress(RuntimeError):
        if name != "here":
            jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    jax.config.update("jax_enable_compilation_cache", False)  # of programs that are not run
    from rlhfjax import planner
    from rlhfjax.accelerators import accelerator, lookup, measured

    if name == "here" and (found := accelerator()) is not None:
        if count > len(jax.devices()):
            raise ValueError(
                f"--devices {count}: there are {len(jax.devices())} here; for more of them name the accelerator: "
                f"--accelerator {found.names[0]}"
            )
        words = f"compiled for {count} of the devices that are here"
        return found, planner.Target(jax.devices()[:count], jax.default_backend(), words)
    chosen = measured(count) if name in ("here", "cpu") else lookup(name)
    return chosen, planner.aot_devices(chosen, count)


def _mesh(layout: Mesh, target: Any, memory: float) -> Any:
    from rlhfjax.mesh import make_mesh

    return make_mesh(layout, target.devices, memory=memory)


def _traced_for(platform: str) -> contextlib.AbstractContextManager[None]:
    from rlhfjax.ops import compiling_for

    return compiling_for(platform)


def plan_programs(
    programs: Sequence[Program],
    chosen: Any,
    target: Any,
    mesh: Any,
    price: float | None,
    say: Callable[[str], None],
) -> list[Planned]:
    """Compiles and reads the programs, several at a time: a compiler uses one core or little more."""
    from rlhfjax import planner

    # Traced here and not in the threads, which do not know what kind of device it is for.
    lowered = [[of.lower() for of in _at_depths(program)] for program in programs]
    words = [f"compiling {of.stage}: {of.name}, {of.rows or 'no'} rows" for of in programs]

    def analysed(one: Any) -> Any:
        compiled, text = planner.compile_to_read(one, target.platform)
        return planner.analyse(compiled, text=text)

    found = []
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        waiting = [[pool.submit(analysed, one) for one in several] for several in lowered]
        for program, told, several in zip(programs, words, waiting, strict=True):
            say(told)
            read = [one.result() for one in several]
            if len(read) > 1:
                read = [planner.deepened(read[0], read[1], DEPTHS, program.depth)]
            found.append(_planned(program, read[0], chosen, target, mesh, price))
    return found


def _planned(
    program: Program, analysis: Any, chosen: Any, target: Any, mesh: Any, price: float | None
) -> Planned:
    from rlhfjax import planner

    used = planner.usage(analysis.memory, **dict(program.parts))
    models = (program.parts.get("parameters", ()), program.parts.get("frozen", ()))
    plan = planner.Plan(
        title=f"{program.stage}: {program.name}",
        accelerator=chosen,
        devices=mesh.size,
        parameters=planner.count(models),
        usage=used,
        programs={program.name: planner.Part(analysis)},
        compiled_for=target.words + _of_depths(program),
        iterations=round(program.runs),
        price=price,
        efficiency=planner.TIMED if "cpu" in chosen.names else planner.Efficiency(),
    )
    return Planned(program, plan)


def _at_depths(program: Program) -> list[Program]:
    """What is compiled: a deep program is told from two shallow ones, which take minutes less."""
    if program.shallow is None or not _is_deep(program):
        return [program]
    return [program.shallow(depth) for depth in DEPTHS]


def _is_deep(program: Program) -> bool:
    return program.shallow is not None and program.depth > DEEP


def _of_depths(program: Program) -> str:
    first, second = DEPTHS
    if not _is_deep(program):
        return ""
    return f", with {first} and with {second} of its {program.depth} layers, through which a straight line is laid"


def _largest_batch(main: Planned, double: Planned | None, mesh: Any) -> str:
    """The largest number of rows that fits, in words, from what they and twice as many need."""
    from rlhfjax import planner
    from rlhfjax.mesh import row_parts

    if double is None:
        return ""
    rows, twice = main.program.rows, double.program.rows
    needs = planner.line((rows, main.plan.usage.total), (twice, double.plan.usage.total))
    most = planner.fit(needs, main.plan.memory, multiple=row_parts(mesh))
    if not most:
        return "No batch fits."
    return (
        f"The largest batch that fits: {most} rows (a straight line through what {rows} and {twice} need), "
        f"{planner.in_bytes(needs(most))}."
    )


def _whole_run(title: str, planned: Sequence[Planned], main: Planned, mesh: Any) -> str:
    """The table of all programs."""
    from rlhfjax.planner import in_bytes

    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    rows = []
    hours = 0.0
    for program, plan in ((one.program, one.plan) for one in planned):
        once = plan.seconds.total
        hours += once * program.runs * plan.devices / 3600
        rows.append(
            [
                program.stage,
                program.name,
                f"{program.runs:g}",
                f"{in_bytes(plan.usage.total)}{'' if plan.fits else ' (too much)'}",
                f"{plan.flops * plan.devices:.2e}",
                f"{once:.3g}",
                _time(once * program.runs),
            ]
        )
    table = Table(
        ["stage", "program", "runs", "bytes of a device", "FLOP of products", "seconds", "in all"], rows
    )
    words = [
        f"# Plan: {title}",
        f"{main.plan.devices} x {main.plan.accelerator.names[0]}, mesh {axes}.",
        markdown_table(table),
    ]
    total = f"In all {_time(hours * 3600 / main.plan.devices)}, {hours:.3g} device hours"
    if main.plan.price is not None:
        total += f", {hours * main.plan.price:.2f} at {main.plan.price:g} a device hour"
    hosts = sorted({one.program.uncounted for one in planned if one.program.uncounted})
    besides = "; ".join([*hosts, "compiling, loading and checkpoints"])
    return "\n\n".join([*words, f"{total}. Not counted: {besides}."])


def _advice(main: Planned, changed: dict[str, Planned], mesh: Any) -> list[str]:
    """What would make it fit, each change estimated or compiled; nothing where it fits."""
    from rlhfjax import planner

    plan, parts = main.plan, main.program.parts
    if plan.fits:
        return []
    savings = planner.estimated_savings(plan.usage, parts.get("parameters", ()), fsdp=mesh.shape["fsdp"])
    savings |= {flags: plan.usage.total - with_it.plan.usage.total for flags, with_it in changed.items()}
    return planner.advice(plan.usage, plan.memory, savings)


def _details(main: Planned, advice: Sequence[str], largest: str) -> list[str]:
    """The plan of the program that takes longest, and advice."""
    from rlhfjax import planner

    plan = main.plan
    # One level below the title of the whole.
    described = planner.describe(replace(plan, title=f"{plan.title} (what takes longest)"), advice)
    return ["#" + described.strip(), *([largest] if largest else [])]


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
