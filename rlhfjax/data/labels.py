"""Labels that people gave: a file to which choices among completions are appended, and the comparisons in it.

A line is one choice, whole in itself:

    {"label": "5f0c...", "item": "90ab...", "annotator": "ada", "prompt": "...", "completions": ["...", "..."],
     "systems": ["sft", "ppo"], "shown": [1, 0], "choice": 1, "repeat": false, "gold": null, "seconds": 4.2,
     "time": "2026-11-27T09:00:00Z"}

`choice` is the number of a completion, in the order of `completions` and not of `shown`, or "tie" or "skip". Only
`prompt`, `completions` and `choice` are needed; `prompt`, `chosen` and `rejected` do as well. Two other lines exist:
{"undo": LABEL} takes a label back, and {"seed": TEXT} is what the orders were drawn from.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from rlhfjax.data.datasets import check_text, numbered_rows

__all__ = ["Comparison", "Label", "LabelBook", "comparisons", "item_id", "read_labels"]


class Label(NamedTuple):
    """One choice of one annotator."""

    label: str  # names this choice: the same one posted twice counts once
    item: str
    annotator: str
    prompt: str
    completions: tuple[str, ...]
    systems: tuple[str, ...] | None  # who wrote each; None: not known
    shown: tuple[int, ...]  # numbers of the completions, in the order in which they stood on the page
    choice: int | str  # number of a completion, "tie" or "skip"
    repeat: bool  # shown to this annotator before, to see whether the answer is the same
    gold: (
        int | None
    )  # number of the completion that is known to be better, of a pair that checks the annotator
    seconds: float
    time: str

    @property
    def task(self) -> tuple[str, str, bool]:
        """What may be answered once only."""
        return self.item, self.annotator, self.repeat


class Comparison(NamedTuple):
    """Two completions of a prompt, and what one annotator said of them."""

    prompt: str
    first: str
    second: str
    label: float  # 1: the first is better, 0: the second, 0.5: neither
    annotator: str
    systems: tuple[str, str] | None


@dataclass
class LabelBook:
    """What the lines of a file amount to, line by line."""

    labels: dict[str, Label] = field(default_factory=dict)  # those that count, in the order of the file
    known: set[str] = field(default_factory=set)  # all that were ever given, those taken back too
    tasks: dict[tuple[str, str, bool], str] = field(
        default_factory=dict
    )  # what is answered -> by which label
    seed: str | None = None

    def take(self, row: Mapping[str, Any], where: str) -> None:
        """Enters one line. Of two labels with one name, or two answers of one task, the first counts.

        Raises ValueError naming `where` for a line that is none.
        """
        if "undo" in row:
            gone = self.labels.pop(str(row["undo"]), None)
            if gone is not None:
                del self.tasks[gone.task]
        elif "seed" in row:
            self.seed = self.seed or str(row["seed"])
        else:
            label = parse_label(row, where)
            if label.label not in self.known and label.task not in self.tasks:
                self.labels[label.label] = label
                self.tasks[label.task] = label.label
            self.known.add(label.label)


def item_id(prompt: str, completions: Iterable[str]) -> str:
    """A name for a prompt with its completions, the same wherever these are."""
    return hashlib.sha256(json.dumps([prompt, list(completions)]).encode()).hexdigest()[:16]


def parse_label(row: Mapping[str, Any], where: str) -> Label:
    """One line as a label; ValueError says what is wrong with it, and `where`."""
    if "chosen" in row and "completions" not in row:
        row = {**row, "completions": [row["chosen"], row.get("rejected")], "choice": 0}
    check_text(row, "prompt", where=where)
    completions = check_completions(row, where)
    systems, choice = check_systems(row, len(completions), where), row.get("choice")
    if choice not in ("tie", "skip"):
        choice = check_number(row, "choice", len(completions), where, or_else='"tie" or "skip"')
    gold = check_number(row, "gold", len(completions), where) if row.get("gold") is not None else None
    shown = row.get("shown", list(range(len(completions))))
    if not isinstance(shown, list) or sorted(shown, key=str) != list(range(len(completions))):
        raise ValueError(f"{where}: shown must hold the numbers of the completions, it is {shown!r}")
    seconds = row.get("seconds") or 0.0
    if not isinstance(seconds, int | float) or abs(seconds) > 1e300:
        raise ValueError(f"{where}: seconds must be a number, it is {seconds!r}")
    return Label(
        label=str(row.get("label", where)),
        # Without a name of its own an answer is a task of its own: pairs without annotators may repeat.
        item=str(row.get("item", item_id(row["prompt"], completions) if "annotator" in row else where)),
        annotator=str(row.get("annotator", "")),
        prompt=row["prompt"],
        completions=completions,
        systems=systems,
        shown=tuple(shown),
        choice=choice,
        repeat=row.get("repeat") is True,
        gold=gold,
        seconds=float(seconds),
        time=str(row.get("time", "")),
    )


def check_completions(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The completions of a row: two texts or more, of which one may be empty."""
    found = row.get("completions")
    if not isinstance(found, list) or len(found) < 2:
        raise ValueError(f"{where}: completions must be a list of two texts or more, it is {found!r:.80}")
    for number, text in enumerate(found):
        if text != "":  # a policy may say nothing
            check_text({f"completions[{number}]": text}, f"completions[{number}]", where=where)
    return tuple(found)


def check_systems(row: Mapping[str, Any], count: int, where: str) -> tuple[str, ...] | None:
    """Who wrote each completion, where the row says so."""
    found = row.get("systems")
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != count or not all(isinstance(x, str) for x in found):
        raise ValueError(
            f"{where}: systems must name one for each of the {count} completions, it is {found!r}"
        )
    return tuple(found)


def check_number(row: Mapping[str, Any], name: str, count: int, where: str, *, or_else: str = "") -> int:
    """The number of one of `count` completions."""
    found = row.get(name)
    if type(found) is not int or not 0 <= found < count:
        raise ValueError(
            f"{where}: {name} must be the number of a completion, 0 to {count - 1}"
            f"{', or ' + or_else if or_else else ''}; it is {found!r}"
        )
    return found


def read_labels(path: str | Path) -> list[Label]:
    """The labels of a file that count: without those taken back, and each answer once.

    A half-written last line, as a killed process leaves one, is passed over. ValueError for any other bad line.
    """
    rows = numbered_rows(path, torn=True)
    book = LabelBook()
    for where, row in rows:
        book.take(row, where)
    return list(book.labels.values())


def comparisons(labels: Iterable[Label]) -> list[Comparison]:
    """Pairs to learn from: each judgement of each annotator by itself, so that a pair on which people differ says so.

    A choice among more than two is one comparison with each of the others; a tie is one of every two, with label 0.5.
    Skipped are what was skipped, second answers to the same, pairs that check the annotator, and equal texts.
    """
    return [
        Comparison(
            label.prompt,
            label.completions[i],
            label.completions[j],
            0.5 if label.choice == "tie" else float(label.choice == i),
            label.annotator,
            None if label.systems is None else (label.systems[i], label.systems[j]),
        )
        for label in labels
        if label.choice != "skip" and not label.repeat and label.gold is None
        for i, j in combinations(range(len(label.completions)), 2)
        if (label.choice == "tie" or label.choice in (i, j)) and label.completions[i] != label.completions[j]
    ]
