"""Guards: bounds on what a run logs, and what is to be done where they are not kept. No JAX.

A guard is written as NAME<BOUND:ACTION or NAME>BOUND:ACTION and names what must not happen:

    gold<0.12:stop                     end the stage where gold falls below 0.12
    gold<start*0.8:raise               raise the KL coefficient where gold falls below 80 % of what it was
    completions/mean_length>20:warn    say so where completions grow beyond 20 tokens
    words.py:valid<start-0.1:stop      the same of a function of texts

It speaks of the mean of the last `window` values, and acts when that has been out of bounds `patience` times in a
row, and again after every so many more. `start` is the mean of the first `window` values; until there are so many, a
guard with `start` holds. A value that is missing or not finite is passed over.

`observe` is a pure function of what a guard remembers and the next value, so that whoever tells it the same values
again, after a crash for example, comes to the same decisions.
"""

import math
import re
from typing import Literal, NamedTuple, cast

Action = Literal["warn", "raise", "stop"]
ACTIONS = ("warn", "raise", "stop")

_WRITTEN = re.compile(
    r"\s*(?P<name>[^<>]*[^<>\s])\s*(?P<side>[<>])\s*(?P<bound>[^<>]*?)\s*:\s*(?P<action>\w+)\s*"
)
_BOUND = re.compile(r"(?:start\s*(?P<how>[-+*])\s*)?(?P<number>[-+]?[\d.]+(?:[eE][-+]?\d+)?)")


class Guard(NamedTuple):
    """One guard: broken where the mean lies beyond factor * start + offset."""

    text: str  # as it was written
    name: str  # of a metric, or of a function of texts
    above: bool  # broken above the bound; else below it
    factor: float  # 0: the bound does not depend on the start
    offset: float
    action: Action


class Memory(NamedTuple):
    """What a guard remembers of the values so far."""

    recent: tuple[float, ...] = ()  # the last ones, at most `window`
    start: float | None = None  # mean of the first `window`
    broken: int = 0  # values in a row at which it did not hold
    held: int = 0  # the last step at which it held


class Verdict(NamedTuple):
    """What a guard says to one value."""

    mean: float  # the moving mean; NaN before the first value
    bound: float  # NaN while the start is not known
    broken: int  # values in a row at which it did not hold
    acts: bool  # whether its action is due


def parse_guard(text: str) -> Guard:
    """Reads a guard. Raises ValueError, with the mend, where it is none."""
    found = _WRITTEN.fullmatch(text)
    if found is None:
        raise ValueError(
            f"guard {text!r} must read NAME<BOUND:ACTION or NAME>BOUND:ACTION, for example gold<0.1:stop"
        )
    bound, action = _BOUND.fullmatch(found["bound"]), found["action"]
    try:
        number = math.nan if bound is None else float(bound["number"])
    except ValueError:
        number = math.nan
    if bound is None or not math.isfinite(number):
        raise ValueError(
            f"guard {text!r}: the bound {found['bound']!r} must be a number, or start-NUMBER, start+NUMBER or "
            "start*NUMBER for one that goes by the first steps"
        )
    if action not in ACTIONS:
        raise ValueError(f"guard {text!r}: the action {action!r} must be warn, raise or stop")
    factor, offset = {
        None: (0.0, number),
        "+": (1.0, number),
        "-": (1.0, -number),
        "*": (number, 0.0),
    }[bound["how"]]
    return Guard(text, found["name"], found["side"] == ">", factor, offset, cast(Action, action))


def observe(
    guard: Guard, memory: Memory, step: int, value: float | None, *, window: int, patience: int
) -> tuple[Memory, Verdict]:
    """What the guard says to `value` of step `step`, and what it remembers then.

    Args:
      value: None or not finite: there is none at this step, and the memory stays as it is.
      window: values in the moving mean, at least 1. The first means are of fewer.
      patience: values in a row that must be out of bounds, at least 1.

    Raises ValueError where window or patience is below 1.
    """
    if window < 1 or patience < 1:
        raise ValueError(f"a guard's window ({window}) and patience ({patience}) must be at least 1")
    if value is None or not math.isfinite(value):
        return memory, Verdict(_mean(memory.recent), _bound(guard, memory.start), memory.broken, acts=False)
    recent, start = (*memory.recent, float(value))[-window:], memory.start
    if start is None and len(recent) == window:
        start = _mean(recent)
    mean, bound = _mean(recent), _bound(guard, start)
    broken = mean > bound if guard.above else mean < bound  # NaN: neither
    if not broken:
        return Memory(recent, start, 0, step), Verdict(mean, bound, 0, acts=False)
    times = memory.broken + 1
    return Memory(recent, start, times, memory.held), Verdict(mean, bound, times, times % patience == 0)


def _mean(values: tuple[float, ...]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _bound(guard: Guard, start: float | None) -> float:
    if guard.factor == 0.0:
        return guard.offset
    return math.nan if start is None else guard.factor * start + guard.offset
