"""What one instruction of a compiled program costs: operations of its products, bytes of memory read and written."""

import json
import math
import re
from collections.abc import Iterator

import numpy as np

from rlhfjax.planner.hlo import Array, Computation, Instruction, Program

# Nothing is computed or moved, or it is counted elsewhere: the body of a loop, the start of a copy.
_FREE = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
    }
    | {"while", "conditional", "call", "copy-done", "async-start", "async-update", "async-done", "domain"}
    | {"optimization-barrier", "add-dependency", "infeed", "outfeed"}
)
_FREE_CALLS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone"}
_NO_PRODUCTS = _FREE_CALLS | {"ConcatBitcast", "GatherScatterIndicesBitpacked", "Sharding", "TopK"}
_OPAQUE = {"ragged-dot", "scaled-dot", "fft", "cholesky", "triangular-solve"}


def products(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Floating-point operations of its matrix products and convolutions, a multiply-add as two; those of a fusion are
    the sum of what it holds. Sums, exponentials and the like are not counted."""
    if instruction.opcode == "dot":
        left = _operand(computation, instruction, 0)
        contracted = math.prod(left.dims[d] for d in instruction.numbers("lhs_contracting_dims"))
        return 2.0 * math.prod(instruction.arrays[0].dims) * contracted
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction)
    if instruction.opcode == "custom-call":
        return _custom_call(computation, instruction) or 0.0
    if instruction.opcode == "fusion":
        called = program.computations[instruction.called("calls") or ""]
        return sum(products(program, called, part) for part in called.instructions.values())
    return 0.0


def opaque(program: Program, computation: Computation, instruction: Instruction) -> Iterator[str]:
    """Names of what an instruction runs whose operations cannot be told."""
    if instruction.opcode in _OPAQUE:
        yield instruction.opcode
    elif instruction.opcode == "custom-call":
        target = _target(instruction)
        if target not in _NO_PRODUCTS and _custom_call(computation, instruction) is None:
            yield target
    elif instruction.opcode == "fusion":
        called = program.computations[instruction.called("calls") or ""]
        for part in called.instructions.values():
            yield from opaque(program, called, part)


def traffic(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes of main memory that it reads and writes: operands and results, of a fusion only those of the whole.

    Of an array that is only sliced or gathered from the slices count, and of one that is updated in place the update.
    """
    opcode = instruction.opcode
    if opcode in _FREE or (opcode == "custom-call" and _target(instruction) in _FREE_CALLS):
        return 0.0
    if opcode == "fusion":
        called = program.computations[instruction.called("calls") or ""]
        read = sum(
            _read(program, called, called.parameters[number].name, computation.instructions[operand])
            for number, operand in enumerate(instruction.operands)
            if number in called.parameters
        )
        return read + _written(called, instruction)
    written = sum(array.traffic for array in instruction.arrays)
    if opcode == "copy-start":
        return sum(array.traffic for array in instruction.arrays[:2])
    if opcode in ("dynamic-slice", "slice", "gather", "broadcast", "iota"):
        read = min(written, _sum(computation, instruction.operands[:1]))
        return written + read
    if opcode == "dynamic-update-slice":
        return 2 * _sum(computation, instruction.operands[1:2])
    if opcode == "scatter":
        count = (len(instruction.operands) - 1) // 2
        return 3 * _sum(computation, instruction.operands[count + 1 :]) + _sum(
            computation, instruction.operands[count : count + 1]
        )
    return written + _sum(computation, instruction.operands)


def _read(program: Program, called: Computation, name: str, given: Instruction) -> float:
    """What a fusion reads of one of its arguments."""
    whole = sum(array.traffic for array in given.arrays)
    total = 0.0
    for user in called.users[name]:
        first = bool(user.operands) and user.operands[0] == name
        if user.opcode in ("dynamic-slice", "slice", "gather") and first:
            total += sum(array.bytes for array in user.arrays)
        elif user.opcode == "dynamic-update-slice" and first:
            continue  # written in place
        elif user.opcode in ("bitcast", "reshape", "tuple"):
            total += _read(program, called, user.name, given)
        elif user.opcode == "fusion":
            inner = program.computations[user.called("calls") or ""]
            for number, operand in enumerate(user.operands):
                if operand == name:
                    total += _read(program, inner, inner.parameters[number].name, given)
        else:
            return whole
    return min(total, whole)


def _written(called: Computation, fusion: Instruction) -> float:
    """What a fusion writes."""
    root = called.instructions[called.root]
    roots = [called.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for part, array in zip(roots, fusion.arrays, strict=False):
        while part.opcode in ("bitcast", "reshape", "copy"):
            part = called.instructions[part.operands[0]]
        if part.opcode == "dynamic-update-slice" and not array.on_chip:
            total += _operand(called, part, 1).bytes
        elif part.opcode != "parameter":
            total += array.traffic
    return total


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """As XLA counts them: pairs of a place of the kernel and of the result that lie within the input.

    TPU programs write matrix products so, a batch of them as a dilated window.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels, instruction.attributes
    left, kernel = (_operand(computation, instruction, number).dims for number in (0, 1))
    out = instruction.arrays[0].dims
    left_labels, kernel_labels, out_labels = labels.groups()
    pairs = 1
    for axis in (c for c in out_labels if c.isdigit()):
        window = {
            key: value[int(axis)]
            for key, value in _window(instruction.attributes).items()
            if len(value) > int(axis)
        }
        pairs *= _pairs(
            left[left_labels.index(axis)],
            kernel[kernel_labels.index(axis)],
            out[out_labels.index(axis)],
            window,
        )
    groups = {
        key: int(value)
        for key, value in re.findall(r"(feature|batch)_group_count=(\d+)", instruction.attributes)
    }
    batch = left[left_labels.index("b")] / groups.get("batch", 1)
    features = kernel[kernel_labels.index("i")] * out[out_labels.index("f")]
    return 2.0 * pairs * batch * features


def _window(attributes: str) -> dict[str, list[str]]:
    """window={size=3x3 pad=1_1x1_1} -> its parts by axis."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    parts = found.group(1).split() if found else []
    return {key: value.split("x") for key, _, value in (part.partition("=") for part in parts)}


def _pairs(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Pairs (place of the kernel, place of the result) along one axis that meet a place of the input."""
    low = int(window.get("pad", "0_0").split("_")[0])
    stride, dilate, spread = (int(window.get(key, 1)) for key in ("stride", "rhs_dilate", "lhs_dilate"))
    at_KO = np.arange(out)[None, :] * stride - low + np.arange(kernel)[:, None] * dilate
    return int(np.sum((at_KO % spread == 0) & (at_KO >= 0) & (at_KO // spread < size)))


def _custom_call(computation: Computation, instruction: Instruction) -> float | None:
    """Operations of the matrix products of NVIDIA's libraries, and of kernels that say what they cost; else None."""
    told = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
    if told:
        return float(told.group(1))
    numbers = re.search(r'"dot_dimension_numbers":(\{[^}]*\})', instruction.attributes)
    if "gemm" not in _target(instruction) and "matmul" not in _target(instruction) or not numbers:
        return None
    contracting = json.loads(numbers.group(1)).get("lhs_contracting_dimensions", ())
    left = _operand(computation, instruction, 0).dims
    return 2.0 * math.prod(instruction.arrays[0].dims) * math.prod(left[int(d)] for d in contracting)


def _target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found.group(1) if found else "custom-call"


def _operand(computation: Computation, instruction: Instruction, number: int) -> Array:
    return computation.instructions[instruction.operands[number]].arrays[0]


def _sum(computation: Computation, names: tuple[str, ...]) -> float:
    return sum(array.traffic for name in names for array in computation.instructions[name].arrays)
