"""What the page asks and answers, without HTTP: the next task of an annotator, a label, one taken back, the numbers."""

import secrets
import time
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.annotation.items import Item
from experiments.annotation.numbers import numbers_of, tables_of
from experiments.annotation.store import Store
from experiments.annotation.tasks import Task, tasks_of
from rlhfjax.data import LabelBook

LONGEST_NAME = 64
A_DAY = 86_400.0


class NotThere(Exception):
    """What was asked for is not there (any more)."""


@dataclass(frozen=True)
class Session:
    """What is to be labelled and where the labels go."""

    items: list[Item]
    gold: list[Item]
    store: Store
    repeats: float = 0.1  # share of the items shown a second time
    annotator: str = ""  # who annotates; "": the page asks
    panel: bool = True  # whether the page shows numbers
    cache: dict[str, list[Task]] = field(default_factory=dict)

    def state(self, annotator: str, notice: str = "") -> dict[str, Any]:
        """What the page shows: the next task, and how far the annotator is. Nothing in it tells who wrote what."""
        name = self._name(annotator)
        book = self.store.refresh()
        tasks = self._tasks(name)
        answered = {(item, repeat) for item, who, repeat in book.tasks if who == name}
        skipped = {x.item for x in book.labels.values() if x.annotator == name and x.choice == "skip"}
        left = [x for x in tasks if x.answered_as not in answered and not (x.repeat and x.item.id in skipped)]
        last = next((x.label for x in reversed(book.labels.values()) if x.annotator == name), None)
        done = sum(task.answered_as in answered for task in tasks)
        found = {"annotator": name, "done": done, "total": done + len(left), "last": last, "notice": notice}
        return found | {"task": _shown(left[0]) if left else None}

    def answer(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps one label, on the disk before this returns; then as `state`. The same label again changes nothing.

        Raises ValueError for a label that cannot be, and NotThere where its task is not there (any more).
        """
        name, label = self._name(given.get("annotator")), _label_name(given.get("label"))
        task = next((x for x in self._tasks(name) if x.key == given.get("key")), None)
        if task is None:
            raise NotThere("this pair is not among the items any more; the next one is shown")
        row = _row(task, name, label, given)
        kept = ""

        def make(book: LabelBook) -> dict[str, Any] | None:
            nonlocal kept
            if label in book.known:  # a retry, the reply to which was lost
                saved = book.labels.get(label)
                if saved is not None and saved.choice != row["choice"]:
                    kept = "Your first answer to the pair before had been saved, and was kept: undo to change it."
                return None
            if (task.item.id, name, task.repeat) in book.tasks:
                kept = "This pair was answered before, perhaps in another window. That answer was kept."
                return None
            return row

        self.store.append(make)
        return self.state(name, kept)

    def undo(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Takes a label of the annotator back; then as `state`. The line stays in the file, and one is added."""
        name, label = self._name(given.get("annotator")), _label_name(given.get("label"))

        def make(book: LabelBook) -> dict[str, Any] | None:
            known = book.labels.get(label)
            if known is None or known.annotator != name:
                return None
            return {"undo": label, "annotator": name, "time": _now()}

        done = self.store.append(make)
        return self.state(name, "Taken back: answer it again." if done else "")

    def numbers(self) -> dict[str, Any]:
        """Tables of the panel, as texts."""
        if not self.panel:
            raise NotThere("this page shows no numbers")
        tables = tables_of(numbers_of(list(self.store.refresh().labels.values())))
        return {
            "tables": [
                {
                    "title": title,
                    "header": list(table.header),
                    "rows": [[*map(str, row)] for row in table.rows],
                }
                for title, table in tables
            ]
        }

    def _tasks(self, name: str) -> list[Task]:
        if name not in self.cache:
            seed = self.store.book.seed or ""
            self.cache[name] = tasks_of(self.items, self.gold, name, seed, repeats=self.repeats)
        return self.cache[name]

    def _name(self, given: Any) -> str:
        return self.annotator or check_name(given)


def check_name(given: Any) -> str:
    """An annotator's name, in one spelling; ValueError for what is none."""
    name = unicodedata.normalize("NFC", given).strip() if isinstance(given, str) else ""
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise ValueError(f"a name has 1 to {LONGEST_NAME} printable characters")
    return name


def _shown(task: Task) -> dict[str, Any]:
    return {
        "key": task.key,
        "label": secrets.token_hex(16),  # the name of the label to come
        "prompt": task.item.prompt,
        "completions": [task.item.completions[i] for i in task.shown],
    }


def _row(task: Task, name: str, label: str, given: Mapping[str, Any]) -> dict[str, Any]:
    choice, seconds = given.get("choice"), given.get("seconds")
    if choice not in ("tie", "skip"):
        if type(choice) is not int or not 0 <= choice < len(task.shown):
            raise ValueError(f"choice must be 0 to {len(task.shown) - 1}, tie or skip, not {choice!r:.40}")
        choice = task.shown[choice]
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < A_DAY:
        raise ValueError(f"seconds must be a number from 0, less than a day, not {seconds!r:.40}")
    item = task.item
    return {
        "label": label,
        "item": item.id,
        "annotator": name,
        "prompt": item.prompt,
        "completions": list(item.completions),
        "systems": None if item.systems is None else list(item.systems),
        "shown": list(task.shown),
        "choice": choice,
        "repeat": task.repeat,
        "gold": item.gold,
        "seconds": round(float(seconds), 3),
        "time": _now(),
    }


def _label_name(given: Any) -> str:
    if not isinstance(given, str) or not 0 < len(given) <= 64 or not given.isalnum() or not given.isascii():
        raise ValueError("label must be a name of letters and digits, at most 64")
    return given


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
