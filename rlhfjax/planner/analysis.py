"""What a compiled program does on one device: its memory, products, traffic, collectives.

XLA's own `cost_analysis()` takes the body of a loop once. Here the turns of loops are counted, so that a scan over
layers and a `while_loop` over tokens cost what they cost. All numbers are of one device.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rlhfjax.planner.costs import opaque, products, traffic
from rlhfjax.planner.hlo import Computation, Instruction, Program, parse, replica_groups
from rlhfjax.planner.loops import Frame, State, frames, inner, turns

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Memory(NamedTuple):
    """Bytes of one device, as the compiler has laid them out."""

    arguments: int
    outputs: int
    aliased: int  # outputs that lie where donated arguments lay
    temporary: int  # activations, caches, gradients, buffers of collectives

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporary


class Operation(NamedTuple):
    """An instruction that runs by itself: a product, a fusion, a copy."""

    name: str  # where it comes from: jit(step)/while/body/dot_general
    flops: float  # of its products, a call
    bytes: float  # of memory read and written, a call
    calls: float


class Collective(NamedTuple):
    kind: str  # one of COLLECTIVES
    name: str
    groups: tuple[tuple[int, ...], ...]  # devices that take part together; of a permute (from, to)
    bytes: float  # a call, of what a device gives; of all-gather of what it gets
    calls: float

    @property
    def size(self) -> int:
        """Devices of a group."""
        return len(self.groups[0])


class Loop(NamedTuple):
    name: str
    turns: float  # each time that it is entered
    told_by: str  # "program", "at most" (it may end before), "caller", "nobody": taken for one turn


@dataclass(frozen=True)
class Analysis:
    memory: Memory
    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]
    loops: tuple[Loop, ...]
    uncounted: Mapping[str, float]  # kernels whose operations cannot be told -> calls

    @property
    def flops(self) -> float:
        """Of all matrix products and convolutions."""
        return sum(o.flops * o.calls for o in self.operations)

    @property
    def bytes(self) -> float:
        """Of memory read and written."""
        return sum(o.bytes * o.calls for o in self.operations)


def analyse(
    compiled: Any, *, text: str | None = None, loop_turns: Mapping[str, float] | None = None
) -> Analysis:
    """What a compiled program costs on one device.

    Args:
      compiled: `jax.jit(f).lower(...).compile()`.
      text: of the program, where `aot.compile_to_read` gave it; None: asked of `compiled`.
      loop_turns: how often loops turn that the program does not tell, or that may end early: part of the loop's name
        (`Analysis.loops`; "" is part of all) -> turns, such as {"while": 128}. The first that fits is taken. A count
        that the program fixes stays.

    Raises ValueError for turns that are no number from 0 on, and for a name that is part of no such loop.
    """
    wanted = dict(loop_turns or {})
    for name, count in wanted.items():
        if not count >= 0:
            raise ValueError(f"loop_turns[{name!r}] = {count} must be 0 or more")
    program = parse(compiled.as_text() if text is None else text)
    walk = _Walk(program, wanted, _started(program))
    walk.visit(Frame(program.entry), 1.0)
    for name in set(wanted) - walk.used:
        open_loops = sorted({loop.name for loop in walk.loops if loop.told_by != "program"})
        raise ValueError(
            f"loop_turns: {name!r} is part of no loop's name that the program leaves open: {open_loops}"
        )
    return Analysis(
        _memory(compiled), tuple(walk.operations), tuple(walk.collectives), tuple(walk.loops), walk.uncounted
    )


def _memory(compiled: Any) -> Memory:
    stats = compiled.memory_analysis()
    return Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
    )


def _started(program: Program) -> frozenset[str]:
    """Channels of collectives that a TPU program starts in one fusion and carries on within others."""
    return frozenset(
        _channel(instruction)
        for computation in program.computations.values()
        if _starts(computation)
        for instruction in computation.instructions.values()
        if _collective_kind(instruction)
    )


def _starts(computation: Computation) -> bool:
    return any("AsyncCollectiveStart" in i.attributes for i in computation.instructions.values())


def _channel(instruction: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", instruction.attributes)
    return found.group(1) if found else ""


def _collective_kind(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


@dataclass
class _Walk:
    """Goes through what runs, with the number of times that it does."""

    program: Program
    wanted: Mapping[str, float]
    started: frozenset[str]
    operations: list[Operation] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)
    uncounted: dict[str, float] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def visit(self, frame: Frame, calls: float) -> None:
        for instruction in frame.computation.instructions.values():
            if instruction.opcode == "while":
                self._loop(instruction, frame, calls)
            elif instruction.opcode == "conditional":
                self._branches(instruction, calls)
            elif instruction.opcode in ("call", "async-start"):
                self.visit(inner(self.program, instruction, frame), calls)
            else:
                self._operation(instruction, frame.computation, calls)

    def _loop(self, instruction: Instruction, frame: Frame, calls: float) -> None:
        state = State(instruction, frame)
        count, told_by = self._turns(state)
        self.loops.append(Loop(instruction.op_name, count, told_by))
        body, condition = frames(self.program, state)
        self.visit(condition, calls * (count + 1))
        self.visit(body, calls * count)

    def _turns(self, state: State) -> tuple[float, str]:
        found = turns(self.program, state)
        if found and not found[1]:
            return found[0], "program"
        for name, count in self.wanted.items():
            if name in state.loop.op_name:
                self.used.add(name)
                return count, "caller"
        return (found[0], "at most") if found else (1.0, "nobody")

    def _branches(self, instruction: Instruction, calls: float) -> None:
        """The branch that costs most, as the program does not tell which is taken."""
        names = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        listed = names.group(1).split(",") if names else []
        listed = [name.strip().lstrip("%") for name in listed] or [
            instruction.called(part) or "" for part in ("true_computation", "false_computation")
        ]
        walks = []
        for name in listed:
            walk = _Walk(self.program, self.wanted, self.started)
            walk.visit(Frame(self.program.computations[name]), calls)
            walks.append(walk)
        dearest = max(walks, key=_cost)
        self.operations += dearest.operations
        self.collectives += dearest.collectives
        self.loops += dearest.loops
        self.used |= dearest.used
        self._count(dearest.uncounted)

    def _operation(self, instruction: Instruction, computation: Computation, calls: float) -> None:
        if _collective_kind(instruction):
            self._collective(instruction, computation, calls)
            return
        if instruction.opcode == "fusion":
            called = self.program.computations[instruction.called("calls") or ""]
            for part in called.instructions.values():
                if _collective_kind(part) and (_channel(part) not in self.started or _starts(called)):
                    self._collective(part, called, calls)
        flops = products(self.program, computation, instruction)
        moved = traffic(self.program, computation, instruction)
        if flops or moved:
            self.operations.append(Operation(instruction.op_name, flops, moved, calls))
        self._count(dict.fromkeys(opaque(self.program, computation, instruction), calls))

    def _collective(self, instruction: Instruction, computation: Computation, calls: float) -> None:
        kind = _collective_kind(instruction)
        assert kind
        groups = replica_groups(instruction.attributes) or (tuple(range(self.program.devices)),)
        given = [computation.instructions[operand].arrays for operand in instruction.operands]
        size = sum(array.bytes for arrays in given for array in arrays)
        if kind == "all-gather":
            size *= len(groups[0])
        self.collectives.append(Collective(kind, instruction.op_name, groups, size, calls))

    def _count(self, names: Mapping[str, float]) -> None:
        for name, calls in names.items():
            self.uncounted[name] = self.uncounted.get(name, 0.0) + calls


def _cost(walk: _Walk) -> tuple[float, float]:
    flops, moved = (sum(getattr(o, part) * o.calls for o in walk.operations) for part in ("flops", "bytes"))
    return flops, moved
