"""XLA's text of a compiled program, read: computations, instructions, shapes, groups of devices.

Reads what `jax.stages.Compiled.as_text()` gives on CPU, GPU and TPU. Only what an analysis needs is kept.
"""

import functools
import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([^\s,(){}=]+)")


@dataclass(frozen=True)
class Array:
    """Shape and place of one array on one device."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False  # in a TPU's fast memory, whose traffic costs next to nothing
    packed: bool = False  # numbers of four bits, two in a byte

    @property
    def bytes(self) -> float:
        if self.dtype in _BITS:
            bits = _BITS[self.dtype]
        else:
            digits = re.search(r"\d+", self.dtype)
            bits = int(digits.group()) if digits else 0
        if not self.packed and bits:
            bits = max(bits, 8)
        return math.prod(self.dims) * bits / 8

    @property
    def traffic(self) -> float:
        """Bytes of main memory that reading or writing it moves."""
        return 0.0 if self.on_chip else self.bytes


class Instruction(NamedTuple):
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its result, one or a tuple's
    operands: tuple[str, ...]
    inside: str  # the text between its brackets: a constant's value, a parameter's number
    attributes: str  # what follows the brackets

    @property
    def op_name(self) -> str:
        """Where the instruction comes from in the Python program, as JAX wrote it: jit(f)/while/body/dot_general."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else self.name

    def called(self, *attributes: str) -> str | None:
        """The computation that one of `attributes` (calls, body, ...) names."""
        for attribute in attributes:
            found = re.search(rf"\b{attribute}=%([^\s,()}}]+)", self.attributes)
            if found:
                return found.group(1)
        return None

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """`lhs_contracting_dims={1,2}` -> (1, 2)."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return _integers(found.group(1)) if found else ()


@dataclass(frozen=True, eq=False)
class Computation:
    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instruction -> those that read it."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Number -> parameter."""
        return {int(i.inside): i for i in self.instructions.values() if i.opcode == "parameter"}


@dataclass(frozen=True, eq=False)
class Program:
    computations: dict[str, Computation]
    entry: Computation
    devices: int  # that it is compiled for


def parse(text: str) -> Program:
    """Reads the text of a compiled program.

    Raises ValueError where it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = None
    header, instructions, root = "", {}, ""
    for line in text.splitlines():
        if line.startswith("  "):
            instruction = _instruction(line)
            if header and instruction is not None:
                instructions[instruction.name] = instruction
                root = instruction.name if line.lstrip().startswith("ROOT ") else root
        elif line.endswith("{") and " -> " in line:
            header, instructions, root = line, {}, ""
        elif line.startswith("}") and header:
            found = _NAME.search(header)
            if found:
                computation = Computation(found.group(1), instructions, root)
                computations[computation.name] = computation
                entry = computation if header.startswith("ENTRY") else entry
            header = ""
    if entry is None:
        raise ValueError(
            "this is no text of a compiled program (jax.stages.Compiled.as_text): it has no ENTRY"
        )
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
    return Program(computations, entry, math.prod(int(count) for count in counts))


def _instruction(line: str) -> Instruction | None:
    head, equals, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    if not equals or not head.startswith("%"):
        return None
    end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing - 1]
    opcode = rest[:opening]
    operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(inside))
    return Instruction(head[1:], opcode, arrays(shape), operands, inside, rest[closing:])


def _closing(text: str, start: int) -> int:
    """One past the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    return len(text)


def arrays(shape: str) -> tuple[Array, ...]:
    """`(f32[4,2]{1,0}, s32[])` -> its arrays."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        on_chip = re.search(r"S\([1-46-9]\)", layout) is not None and (
            "T(" in layout or layout.startswith(":")
        )
        found.append(Array(dtype, _integers(dims.replace("<=", "")), on_chip, "E(4)" in layout))
    return tuple(found)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.replace(" ", "").split(",") if x)


def replica_groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """Which devices take part in a collective together, in the three ways that XLA writes it.

    {{0,1},{2,3}}; [2,2]<=[4] or [2,2]<=[2,2]T(1,0): numbers reshaped and transposed; mesh['a'=2,'b'=2] {'b'}: along
    some axes of a mesh. The pairs of a collective-permute are given as they are. () where all devices are meant.
    """
    pairs = re.search(r"source_target_pairs=\{((?:\{[\d, ]*\},?)*)\}", attributes)
    listed = pairs or re.search(r"replica_groups=\{((?:\{[\d, ]*\},?)*)\}", attributes)
    if listed:
        return tuple(_integers(group) for group in re.findall(r"\{([\d, ]*)\}", listed.group(1)))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _tuples(_order(iota.group(2)).reshape(_integers(iota.group(1))))
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes
    )  # device_ids: ([4,16]T(1,0)) or (0,2,1,3)
    return _along_axes(*mesh.groups()) if mesh else ()


def _order(text: str) -> np.ndarray:
    """[2,4]T(1,0) -> the numbers below 8, reshaped and transposed."""
    dims, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?", text).groups()  # pyright: ignore
    devices = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
    return devices.transpose(_integers(order)) if order else devices


def _along_axes(mesh: str, device_ids: str | None, axes: str) -> tuple[tuple[int, ...], ...]:
    """'x'=2,'y'=4 and 'y', or its part 'y':(1)2 -> the groups."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    dims, moved = [], []
    for name, size in sizes.items():
        before, part = parts.get(name, (size, 1))
        if name in parts:
            moved.append(len(dims) + 1)
        dims += [before, part, size // (before * part)]
    if device_ids is None:
        devices = np.arange(math.prod(dims))
    elif device_ids.startswith("["):
        devices = _order(device_ids)
    else:
        devices = np.array(_integers(device_ids))
    last = tuple(range(len(dims) - len(moved), len(dims)))
    devices = np.moveaxis(devices.reshape(dims), moved, last)
    return _tuples(devices.reshape(-1, math.prod(part for _, part in parts.values())))


def _tuples(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(device) for device in group) for group in groups)
