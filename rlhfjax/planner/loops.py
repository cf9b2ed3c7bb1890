"""How often the loops of a compiled program turn.

XLA writes the count of some loops beside them. Of the others it is read from the condition: a counter that begins at a
constant, grows by a constant and is compared with a constant, wherever in the program those constants are made. A
condition that asks for more besides, as that of decoding does, which ends when all sequences have ended, gives the most
turns that there may be.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlhfjax.planner.hlo import Computation, Instruction, Program


@dataclass(frozen=True, eq=False)
class Frame:
    """A computation where it runs: its parameters are a loop's state, or `operands` of the computation around."""

    computation: Computation
    outer: "Frame | None" = None
    operands: tuple[str, ...] = ()
    state: "State | None" = None


@dataclass(frozen=True, eq=False)
class State:
    """What a loop carries from turn to turn."""

    loop: Instruction
    outer: Frame  # where the loop stands


class _Element(NamedTuple):
    """One value of a loop's state at the beginning of a turn, `plus` a number."""

    state: State
    index: int
    plus: int = 0


class _Exit(NamedTuple):
    """One value of a loop's state, or all of it, when the loop has run its most turns."""

    state: State
    index: int | None = None


class _Tuple(NamedTuple):
    frame: Frame
    operands: tuple[str, ...]


_SAME = {
    "copy",
    "bitcast",
    "convert",
    "reshape",
    "broadcast",
    "copy-start",
    "copy-done",
    "optimization-barrier",
}


def frames(program: Program, state: State) -> tuple[Frame, Frame]:
    """The frames of a loop's body and of its condition."""
    body, condition = (program.computations[state.loop.called(part) or ""] for part in ("body", "condition"))
    return Frame(body, state=state), Frame(condition, state=state)


def inner(program: Program, instruction: Instruction, frame: Frame) -> Frame:
    """The frame of what a fusion or a call runs."""
    called = program.computations[instruction.called("calls", "to_apply") or ""]
    return Frame(called, frame, instruction.operands)


def turns(program: Program, state: State) -> tuple[int, bool] | None:
    """(how often a loop turns, whether it may end before), None where the text does not tell."""
    written = re.search(r'"known_trip_count":\{"n":"(\d+)"', state.loop.attributes)
    if written:
        return int(written.group(1)), False
    _, condition = frames(program, state)
    conjuncts = _conjuncts(program, condition, condition.computation.root)
    for conjunct in conjuncts:
        count = _count(program, state, *conjunct) if conjunct else None
        if count is not None:
            return count, len(conjuncts) > 1
    return None


def _conjuncts(program: Program, frame: Frame, name: str) -> list[tuple[str, Any, Any] | None]:
    """The comparisons that must all hold, as (direction, left, right); None for what is none."""
    instruction = frame.computation.instructions[name]
    if instruction.opcode in _SAME:
        return _conjuncts(program, frame, instruction.operands[0])
    if instruction.opcode == "and":
        return [part for operand in instruction.operands for part in _conjuncts(program, frame, operand)]
    if instruction.opcode in ("fusion", "call"):
        called = inner(program, instruction, frame)
        return _conjuncts(program, called, called.computation.root)
    direction = re.search(r"direction=(\w+)", instruction.attributes)
    if instruction.opcode != "compare" or direction is None:
        return [None]
    left, right = (_trace(program, frame, operand) for operand in instruction.operands)
    return [(direction.group(1), left, right)]


def _count(program: Program, state: State, direction: str, left: Any, right: Any) -> int | None:
    """Turns of a loop that goes on while `left` and `right`, one of them its counter, compare so."""
    if not _step(program, left):
        left, right = right, left
        direction = direction.translate(str.maketrans("LG", "GL"))
    step, end = _step(program, left), _fixed(program, right)
    if not step or end is None or not isinstance(left, _Element) or left.state is not state:
        return None
    start = _start(program, left)
    rising = step > 0
    if start is None or (direction != "NE" and (direction[0] == "L") != rising):
        return None
    distance = end - start - left.plus
    if direction in ("LE", "GE"):
        distance += 1 if rising else -1
    return max(0, math.ceil(distance / step))


def _step(program: Program, element: Any) -> int | None:
    """What a turn adds to a value of a loop's state; None where it is no constant."""
    if not isinstance(element, _Element | _Exit) or element.index is None:
        return None
    body, _ = frames(program, element.state)
    after = _element(program, _trace(program, body, body.computation.root), element.index)
    same = isinstance(after, _Element) and (after.state, after.index) == (element.state, element.index)
    return after.plus if same else None


def _start(program: Program, element: "_Element | _Exit") -> int | None:
    """A value of the state before the first turn, where it is a constant."""
    assert element.index is not None
    first = _trace(program, element.state.outer, element.state.loop.operands[0])
    return _fixed(program, _element(program, first, element.index))


def _fixed(program: Program, value: Any) -> int | None:
    """The constant that a value is, also one that a loop carries along unchanged, or counted up to."""
    if isinstance(value, int):
        return value
    step = _step(program, value)
    start = None if step is None else _start(program, value)
    if step is None or start is None:
        return None
    if isinstance(value, _Element):
        return start + value.plus if step == 0 else None
    counted = turns(program, value.state) if step else (0, False)
    return start + step * counted[0] if counted else None


def _trace(program: Program, frame: Frame, name: str) -> Any:
    """What an instruction's result is: an int, something of a loop's state, a tuple; None: anything else."""
    instruction = frame.computation.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "constant":
        found = re.fullmatch(r"\{?(-?\d+)\}?", instruction.inside)
        return int(found.group(1)) if found else None
    if opcode == "parameter" and frame.state is not None:
        return frame.state
    if opcode == "parameter" and frame.outer is not None:
        return _trace(program, frame.outer, frame.operands[int(instruction.inside)])
    if opcode in _SAME:
        return _trace(program, frame, operands[0])
    if opcode == "tuple":
        return _Tuple(frame, operands)
    if opcode == "while":
        return _Exit(State(instruction, frame))
    if opcode == "get-tuple-element":
        index = re.search(r"index=(\d+)", instruction.attributes)
        return _element(program, _trace(program, frame, operands[0]), int(index.group(1))) if index else None
    if opcode in ("fusion", "call"):
        called = inner(program, instruction, frame)
        return _trace(program, called, called.computation.root)
    if opcode == "add":
        return _sum(*(_trace(program, frame, operand) for operand in operands))
    return None


def _element(program: Program, value: Any, index: int) -> Any:
    if isinstance(value, _Tuple):
        return _trace(program, value.frame, value.operands[index])
    if isinstance(value, _Exit):
        return value._replace(index=index)
    return _Element(value, index) if isinstance(value, State) else None


def _sum(left: Any, right: Any) -> Any:
    if isinstance(left, int):
        left, right = right, left
    if not isinstance(right, int):
        return None
    if isinstance(left, _Element):
        return left._replace(plus=left.plus + right)
    return left + right if isinstance(left, int) else None
