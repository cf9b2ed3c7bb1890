"""What the labels say: agreement, consistency, accuracy on gold pairs, and a ranking of the systems.

Shapes: N items, K categories (the completions of an item, and "tie"), S systems.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from rlhfjax.agreement import bradley_terry, cohen_kappa, fleiss_kappa
from rlhfjax.data import Label, comparisons
from rlhfjax.report import Interval, Table, bootstrap_interval, wilson_interval

RESAMPLES = 2000
PRIOR = 0.5  # wins each way that the ranking adds between systems that met: the first wins do not make one infinite


class Numbers(NamedTuple):
    """What is there so far; parts of which nothing is known yet are None or empty."""

    labels: int
    kappa: Interval | None
    kappa_name: str  # whose
    agreement: Interval | None  # share of pairs of annotators that give an item the same answer
    shared: int  # items with answers of two annotators or more
    ranking: list[tuple[str, Interval, int]]  # system, strength, comparisons; the best first
    no_ranking: str  # why there is none
    annotators: list[dict[str, Any]]


def numbers_of(labels: Sequence[Label]) -> Numbers:
    """All of it, from the labels that count."""
    kappa, name, agreement, shared = _agreement(labels)
    ranking, why = _ranking(labels)
    names = dict.fromkeys(label.annotator for label in labels)
    each = [_of_annotator(name, [x for x in labels if x.annotator == name]) for name in names]
    return Numbers(len(labels), kappa, name, agreement, shared, ranking, why, each)


def _agreement(labels: Iterable[Label]) -> tuple[Interval | None, str, Interval | None, int]:
    """Kappa, its name, plain agreement, items. Of first answers; a skipped item has none."""
    answers: dict[str, dict[str, int]] = defaultdict(dict)
    ties = max((len(label.completions) for label in labels), default=2)  # the category behind all numbers
    for label in labels:
        if not label.repeat and label.choice != "skip":
            answers[label.item][label.annotator] = ties if label.choice == "tie" else int(label.choice)
    shared = [given for given in answers.values() if len(given) > 1]
    if not shared:
        return None, "kappa", None, 0
    same_N = [np.mean([a == b for a, b in combinations(given.values(), 2)]) for given in shared]
    agreement = bootstrap_interval(
        same_N, 0, resamples=RESAMPLES
    )  # pairs of answers to one item are not independent
    names = sorted({name for given in shared for name in given})
    if len(names) == 2:
        first, second = ([given[name] for given in shared] for name in names)
        return cohen_kappa(first, second), "Cohen's kappa", agreement, len(shared)
    count_NK = np.stack([np.bincount(list(given.values()), minlength=ties + 1) for given in shared])
    return fleiss_kappa(count_NK), "Fleiss' kappa", agreement, len(shared)


def _ranking(labels: Sequence[Label]) -> tuple[list[tuple[str, Interval, int]], str]:
    """Bradley-Terry over first answers, a tie half a win each way; answers to one prompt are one group."""
    compared = [x for x in comparisons(labels) if x.systems is not None and x.systems[0] != x.systems[1]]
    names = sorted({name for x in compared for name in x.systems or ()})
    if len(names) < 2:
        return [], "no two named systems have been compared yet"
    place = {name: i for i, name in enumerate(names)}
    group = {prompt: i for i, prompt in enumerate(dict.fromkeys(x.prompt for x in compared))}
    wins_NSS = np.zeros((len(group), len(names), len(names)))
    for x in compared:
        first, second = (place[name] for name in x.systems or ())
        wins_NSS[group[x.prompt], first, second] += x.label
        wins_NSS[group[x.prompt], second, first] += 1 - x.label
    try:
        strengths = bradley_terry(wins_NSS, prior=PRIOR)
    except ValueError:
        return [], "not all systems have been compared with each other, not even through others"
    met = wins_NSS.sum(axis=(0, 2)) + wins_NSS.sum(axis=(0, 1))
    rows = [(name, strengths[i], int(met[i])) for i, name in enumerate(names)]
    return sorted(rows, key=lambda row: -row[1].value), ""


def _of_annotator(name: str, labels: Sequence[Label]) -> dict[str, Any]:
    """Answers of one annotator: how many, how consistent, how often right, and whether the place on the page counts."""
    first = {label.item: label.choice for label in labels if not label.repeat}
    again = [
        label for label in labels if label.repeat and "skip" not in (label.choice, first.get(label.item))
    ]
    again = [label for label in again if label.item in first]
    gold = [
        x for x in labels if x.gold is not None and not x.repeat and x.choice != "skip"
    ]  # a tie is no right answer
    chosen = [x for x in labels if x.choice not in ("tie", "skip") and len(x.completions) == 2]
    return {
        "annotator": name or "(no name)",
        "labels": len(labels),
        "ties": sum(x.choice == "tie" for x in labels),
        "skipped": sum(x.choice == "skip" for x in labels),
        "consistent": _share(sum(x.choice == first[x.item] for x in again), len(again)),
        "repeats": len(again),
        "right": _share(sum(x.choice == x.gold for x in gold), len(gold)),
        "gold": len(gold),
        "first": _share(sum(x.choice == x.shown[0] for x in chosen), len(chosen)),
        "seconds": float(np.median([x.seconds for x in labels])),
    }


def _share(count: int, total: int) -> Interval | None:
    return wilson_interval(count, total) if total else None


def tables_of(numbers: Numbers) -> list[tuple[str, Table]]:
    """Titled tables, for the page and the terminal."""
    overall = [["labels", numbers.labels], ["items with answers of two or more", numbers.shared]]
    if numbers.agreement is not None and numbers.kappa is not None:
        overall += [["same answer", _percent(numbers.agreement)]]
        overall += [[numbers.kappa_name, _number(numbers.kappa)]]
    ranked = [
        [name, _number(strength), f"{_against_average(strength.value):.0%}", count]
        for name, strength, count in numbers.ranking
    ] or [[numbers.no_ranking, "", "", ""]]
    each = [
        [
            one["annotator"],
            one["labels"],
            one["ties"],
            one["skipped"],
            _percent(one["consistent"], f" of {one['repeats']}"),
            _percent(one["right"], f" of {one['gold']}"),
            _percent(one["first"]),
            f"{one['seconds']:.1f}",
        ]
        for one in numbers.annotators
    ]
    columns = ["annotator", "labels", "ties", "skipped", "same on repeats", "right on gold"]
    return [
        ("Agreement", Table(["", "all annotators"], overall)),
        ("Systems", Table(["system", "strength", "beats the average", "comparisons"], ranked)),
        ("Annotators", Table([*columns, "chose the first shown", "seconds (median)"], each)),
    ]


def text_of(numbers: Numbers) -> str:
    """The tables for a terminal."""
    return "\n\n".join(f"{title}\n\n{_aligned(table)}" for title, table in tables_of(numbers))


def _aligned(table: Table) -> str:
    """In columns; what could steer a terminal is shown as an escape."""
    rows = [[_visible(str(cell)) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _visible(text: str) -> str:
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


def _against_average(strength: float) -> float:
    return 1 / (1 + np.exp(-strength))


def _percent(share: Interval | None, of: str = "") -> str:
    if share is None:
        return "-"
    if np.isnan(share.low):
        return f"{share.value:.0%} (one item)"
    return f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]{of}"


def _number(value: Interval) -> str:
    if np.isnan(value.value):
        return "not defined: only one answer is used"
    if np.isnan(value.low):
        return f"{value.value:.2f} (one item)"
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"
