"""Who is shown what, in which order: a function of the items, the annotator and the seed that lies with the labels.

So nothing has to be kept: an annotator who comes back finds the same tasks, each with its completions where they were.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import NamedTuple

from experiments.annotation.items import Item

LAG = 8  # tasks between an item and its repeat, at least; of few items half of them


class Task(NamedTuple):
    """One item as one annotator sees it."""

    key: str  # names the task on the page, and tells nothing of it
    item: Item
    repeat: bool
    shown: tuple[int, ...]  # numbers of the completions, in the order on the page

    @property
    def answered_as(self) -> tuple[str, bool]:
        """What may be answered once by an annotator."""
        return self.item.id, self.repeat


def tasks_of(
    items: Sequence[Item], gold: Sequence[Item], annotator: str, seed: str, *, repeats: float
) -> list[Task]:
    """All tasks of an annotator: the items in the order given, the same for all, with the gold ones spread evenly among
    them, and a share `repeats` of the items a second time, later and in the reverse order."""
    placed = [(float(i), item, False) for i, item in enumerate(items)]
    placed += [((i + 0.5) * len(items) / len(gold), item, False) for i, item in enumerate(gold)]
    lag = min(LAG, len(items) // 2)
    first = items[: len(items) - lag]
    drawn = sorted(range(len(first)), key=lambda i: _draw(seed, "repeat", annotator, first[i].id))
    again = drawn[: round(repeats * len(items))]
    placed += [(i + lag + 0.75, items[i], True) for i in again]
    return [_task(item, repeat, annotator, seed) for _, item, repeat in sorted(placed, key=lambda x: x[0])]


def _task(item: Item, repeat: bool, annotator: str, seed: str) -> Task:
    shown = list(range(len(item.completions)))
    random.Random(_draw(seed, "order", annotator, item.id)).shuffle(shown)
    key = _draw(seed, "key", annotator, item.id, str(repeat))[:16]
    return Task(key, item, repeat, tuple(reversed(shown) if repeat else shown))


def _draw(*parts: str) -> str:
    """Hexadecimal digits that look random and are a function of the parts."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "backslashreplace")).hexdigest()
