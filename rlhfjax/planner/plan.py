"""A plan: what an iteration needs, how long it takes, what it costs, in words."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from rlhfjax.accelerators import Accelerator
from rlhfjax.planner.analysis import Analysis, Collective
from rlhfjax.planner.memory import Usage, in_bytes
from rlhfjax.planner.seconds import Efficiency, Seconds, collective_seconds, expected_seconds


class Part(NamedTuple):
    """A program of an iteration, and how often it runs in it."""

    analysis: Analysis
    runs: float = 1.0


@dataclass(frozen=True)
class Plan:
    """One iteration on `devices` of `accelerator`. All numbers of memory and work are of one device."""

    title: str
    accelerator: Accelerator
    devices: int
    parameters: int  # numbers, of all models
    usage: Usage  # of the program that needs most
    programs: Mapping[str, Part]  # such as rollout and update
    compiled_for: str  # `Target.words`
    iterations: int = 1
    price: float | None = None  # of a device, an hour
    usable: float = (
        0.9  # share of the memory that a program may take: the rest is the runtime's, and fragments
    )
    efficiency: Efficiency = field(default_factory=Efficiency)

    @property
    def memory(self) -> float:
        """Bytes of a device that programs may take."""
        return self.accelerator.memory * self.usable

    @property
    def fits(self) -> bool:
        return self.usage.total <= self.memory

    @property
    def flops(self) -> float:
        """Of an iteration and device."""
        return sum(part.analysis.flops * part.runs for part in self.programs.values())

    @property
    def seconds(self) -> Seconds:
        """Of an iteration."""
        found = [self.seconds_of(name) for name in self.programs]
        return Seconds(*(sum(parts) for parts in zip(*found, strict=True)))

    @property
    def device_hours(self) -> float:
        """Of the whole run."""
        return self.seconds.total * self.iterations * self.devices / 3600

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.device_hours * self.price

    def seconds_of(self, name: str) -> Seconds:
        """Of one program, all its runs in an iteration."""
        part = self.programs[name]
        once = expected_seconds(part.analysis, self.accelerator, self.efficiency)
        return Seconds(*(x * part.runs for x in once))


_LIMITS = {
    "products": "products (compute)",
    "memory": "memory bandwidth",
    "overhead": "starting of many small operations",
    "links": "links between devices",
    "network": "network between hosts or slices",
}


def describe(plan: Plan, advice: Iterable[str] = ()) -> str:
    """The plan as Markdown: what it needs, whether it fits, how long it takes, what it costs, on what assumptions."""
    sections = [f"# {plan.title}", _summary(plan), _memory(plan)]
    sections += ["\n".join(f"- {line}" for line in advice)] if list(advice := list(advice)) else []
    sections += [_programs(plan)]
    sections += (
        [_collectives(plan)] if any(part.analysis.collectives for part in plan.programs.values()) else []
    )
    return "\n\n".join([*sections, _assumptions(plan)]) + "\n"


def _summary(plan: Plan) -> str:
    seconds = plan.seconds
    longest = getattr(seconds, seconds.limit)
    rows = [
        ("devices", f"{plan.devices} x {plan.accelerator.names[0]}"),
        ("parameters", _short(plan.parameters).strip()),
        ("memory of a device", f"{in_bytes(plan.usage.total)} of {in_bytes(plan.memory)}: {_verdict(plan)}"),
        (
            "products of an iteration",
            f"{_short(plan.flops * plan.devices)}FLOP, {_short(plan.flops)}FLOP a device",
        ),
        ("seconds of an iteration", f"{seconds.total:.3g}"),
        (
            "what limits",
            f"{_LIMITS[seconds.limit]}, {_share(longest, seconds.total)} of the time",
        ),
        ("share of the peak", _share(plan.flops, seconds.total * plan.accelerator.flops)),
        (f"run of {plan.iterations} iterations", f"{_duration(seconds.total * plan.iterations)}"),
        ("device hours", f"{plan.device_hours:.3g}"),
    ]
    if plan.cost is not None:
        rows.append((f"cost, at {plan.price:g} a device hour", f"{plan.cost:.2f}"))
    return _table(("", ""), rows)


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return f"fits, {in_bytes(plan.memory - plan.usage.total)} left"
    return f"does NOT fit, {in_bytes(plan.usage.total - plan.memory)} too much"


def _memory(plan: Plan) -> str:
    rows = [
        (name, in_bytes(size), _share(size, plan.usage.total))
        for name, size in plan.usage.parts().items()
        if size
    ]
    return _table(("memory of a device", "bytes", "share"), rows)


def _programs(plan: Plan) -> str:
    rows = []
    for name, part in plan.programs.items():
        seconds, runs = plan.seconds_of(name), part.runs
        sent = sum(c.bytes * c.calls for c in part.analysis.collectives) * runs
        rows.append(
            (
                name,
                f"{_short(part.analysis.flops * runs)}FLOP",
                in_bytes(part.analysis.bytes * runs),
                in_bytes(sent),
                f"{seconds.total:.3g}",
                *(_share(x, seconds.total) for x in seconds),
            )
        )
    head = ("program, of a device and iteration", "work", "memory traffic", "collectives", "seconds")
    return _table((*head, *Seconds._fields), rows)


def _collectives(plan: Plan) -> str:
    """By kind and size of the group, most bytes first; "" where there are none."""
    found: dict[tuple[str, str, int], list[tuple[Collective, float]]] = {}
    for name, part in plan.programs.items():
        for collective in part.analysis.collectives:
            key = (name, collective.kind, collective.size)
            found.setdefault(key, []).append((collective, collective.calls * part.runs))
    rows = []
    for (name, kind, size), calls in found.items():
        moved = sum(collective.bytes * times for collective, times in calls)
        seconds = sum(
            sum(collective_seconds(c, plan.accelerator, plan.efficiency)) * times for c, times in calls
        )
        rows.append(
            (moved, (name, kind, size, f"{sum(t for _, t in calls):.0f}", in_bytes(moved), f"{seconds:.3g}"))
        )
    rows.sort(key=lambda row: -row[0])
    head = ("program", "collective", "devices of a group", "calls", "bytes", "seconds")
    return _table(head, [cells for _, cells in rows]) if rows else ""


def _assumptions(plan: Plan) -> str:
    efficiency, accelerator = plan.efficiency, plan.accelerator
    links = ""
    if plan.devices > 1:
        links = (
            f", {in_bytes(accelerator.link)}/s to others of an island of {accelerator.island}, "
            f"{in_bytes(accelerator.network)}/s beyond"
        )
    lines = [
        f"The program is {plan.compiled_for}.",
        f"A device ({accelerator.names[0]}) has {_short(accelerator.flops)}FLOP/s, "
        f"{in_bytes(accelerator.bandwidth)}/s of memory{links}. Source: {accelerator.source}.",
        f"Of that are reached {efficiency.products:.0%} of the products, {efficiency.memory:.0%} of the memory's "
        f"bandwidth, {efficiency.links:.0%} of links and network; an operation takes {efficiency.overhead * 1e6:g} us "
        "to start. Nothing overlaps.",
        f"Programs have {plan.usable:.0%} of the memory. On GPUs JAX takes 75 % at once, unless "
        "XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.",
    ]
    for name, part in plan.programs.items():
        lines += _loops(name, part)
        for kernel, calls in part.analysis.uncounted.items():
            lines.append(
                f"The products of {kernel} ({calls:g} calls in {name}) are not known and not counted."
            )
    return "\n".join(f"- {line}" for line in lines)


def _loops(name: str, part: Part) -> list[str]:
    """What is taken for granted of loops whose turns the program leaves open."""
    found: dict[tuple[str, str], list[str]] = {}
    for loop in part.analysis.loops:
        found.setdefault((loop.name, loop.told_by), []).append(f"{loop.turns:g}")
    lines = []
    for (loop, told_by), turns in found.items():
        words = f"The loop {loop} of {name} is taken to turn {', then '.join(turns)} times"
        if told_by == "at most":
            lines.append(f"{words}: the most; a loop over tokens ends sooner where all sequences do.")
        elif told_by == "caller":
            lines.append(f"{words}, as asked for.")
        elif told_by == "nobody":
            lines.append(f"{words}, for want of a number (`loop_turns`).")
    return lines


def _table(head: tuple, rows: Iterable[tuple]) -> str:
    cells = [tuple(str(cell) for cell in row) for row in [head, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _short(number: float) -> str:
    """1.5e9 -> '1.5 G', 150 -> '150 '; a unit may follow."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"
