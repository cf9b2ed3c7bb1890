"""What annotators are shown and in what order, the file that keeps their labels, and what the labels say."""

import fcntl
import json
import os
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import annotate
from experiments.annotation.items import Item, as_gold, items_of_run, read_items
from experiments.annotation.numbers import numbers_of, text_of
from experiments.annotation.session import Session
from experiments.annotation.store import open_store
from experiments.annotation.tasks import LAG, tasks_of
from rlhfjax.data import Label, read_labels, read_preferences

PAGE = Path(annotate.__file__).parent / "annotation"
ITEMS = [Item(f"i{i}", f"prompt {i}", (f"a{i}", f"b{i}"), ("sft", "ppo")) for i in range(60)]
GOLD = [Item(f"g{i}", f"check {i}", ("right", "wrong"), None, 0) for i in range(6)]


# --------------------------------------------------------------------------------------------------------------- tasks


def test_orders_are_remembered_and_differ_between_annotators():
    one, again = (tasks_of(ITEMS, GOLD, "ada", "seed", repeats=0.2) for _ in range(2))
    assert one == again
    other, reseeded = (
        tasks_of(ITEMS, GOLD, "bob", "seed", repeats=0.2),
        tasks_of(ITEMS, [], "ada", "x", repeats=0),
    )
    for tasks in (one, other, reseeded):
        left = Counter(task.shown[0] for task in tasks if not task.repeat)
        assert 0.25 < left[0] / left.total() < 0.75
    shown = [{x.item.id: x.shown for x in tasks if not x.repeat} for tasks in (one, other, reseeded)]
    assert shown[0] != shown[1] and any(shown[0][name] != order for name, order in shown[2].items())
    assert {x.key for x in one}.isdisjoint(x.key for x in other)


def test_a_share_is_repeated_later_in_the_reverse_order_and_gold_is_spread():
    tasks = tasks_of(ITEMS, GOLD, "ada", "seed", repeats=0.2)
    first = {x.item.id: (i, x.shown) for i, x in enumerate(tasks) if not x.repeat}
    again = [(i, x) for i, x in enumerate(tasks) if x.repeat]
    assert len(again) == 12 and len(tasks) == 60 + 6 + 12 == len({x.key for x in tasks})
    for i, task in again:
        place, shown = first[task.item.id]
        assert i - place >= LAG and task.shown == shown[::-1] and task.item.gold is None
    places = [first[item.id][0] for item in GOLD]
    assert places == sorted(places) and min(np.diff(places)) >= 8 and places[0] > 2
    assert [x.item.id for x in tasks if not x.repeat and x.item.gold is None] == [x.id for x in ITEMS]
    assert (
        len(tasks_of(ITEMS[:3], [], "ada", "s", repeats=1.0)) == 5
    )  # of few, those that have another between


def test_the_repeat_of_a_skipped_item_is_not_asked(tmp_path):
    session = Session(ITEMS[:4], [], open_store(tmp_path / "l.jsonl"), repeats=0.5, annotator="ada")
    state, seen = session.state("ada"), 0
    assert state["total"] == 6
    while state["task"]:
        given = {"key": state["task"]["key"], "label": state["task"]["label"], "seconds": 1}
        state, seen = session.answer(given | {"choice": "skip"}), seen + 1
    assert seen == 4 == state["done"] == state["total"]


# --------------------------------------------------------------------------------------------------------------- items


def test_items_of_a_file(tmp_path):
    path = tmp_path / "items.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "completions": ["a", ""], "systems": ["x", "y"]},
        {"prompt": "p", "completions": ["a", ""], "systems": ["x", "y"]},
        {"prompt": "q", "completions": ["a", "b", "c"], "id": 7, "gold": 2},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_items(path)
    assert [(x.prompt, x.completions, x.gold) for x in found] == [
        ("p", ("a", ""), None),
        ("q", ("a", "b", "c"), 2),
    ]
    assert as_gold(found, GOLD)[0] == found[:1] and as_gold(found, GOLD)[1] == [*GOLD, found[1]]
    for row, why in (
        ({"prompt": "q", "completions": ["a", "x"], "id": 7}, "items.jsonl:4: id '7' is that of another"),
        ({"prompt": "q", "completions": list("abcdefghij")}, "keys for 9"),
        ({"prompt": "q", "completions": ["a", 3]}, r"completions\[1\]' must be a text"),
    ):
        path.write_text("".join(json.dumps(x) + "\n" for x in [*rows, row]))
        with pytest.raises(ValueError, match=why):
            read_items(path)


def write_run(path: Path, **changes: Any) -> Path:
    names = ["sft, temperature 0.7", "sft, greedy", "ppo, temperature 0.7", "dpo, temperature 0.7"]
    texts = [[f"{name[:3]} {i}" if i else "all say this" for i in range(7)] for name in names]
    arrays = {"name": names, "prompt": [f"prompt {i}" for i in range(7)], "texts": texts} | changes
    (path / "arrays").mkdir(parents=True)
    kept: dict[str, Any] = {name: np.asarray(x) for name, x in arrays.items() if x}
    np.savez(path / "arrays" / "validation.npz", **kept)
    return path


def test_items_of_a_run_pair_the_systems_evenly(tmp_path):
    run = write_run(tmp_path / "run")
    items = items_of_run(run, "validation", [], 2)
    for item in items:
        assert [text[:3] for text in item.completions] == [name[:3] for name in item.systems or ()]
    assert [x.prompt for x in items] == [f"prompt {i}" for i in range(1, 7)]  # all said the same to the first
    met = Counter(item.systems for item in items)
    assert (
        set(met.values()) == {2}
        and len(met) == 3
        and not any("greedy" in "".join(pair or ()) for pair in met)
    )
    three = items_of_run(
        run, "validation", ["dpo, temperature 0.7", "sft, greedy", "sft, temperature 0.7"], 3
    )
    assert three[0].completions == ("dpo 1", "sft 1")  # equal texts once
    with pytest.raises(ValueError, match="no system 'ppo' in this run"):
        items_of_run(run, "validation", ["ppo", "sft, greedy"], 2)
    with pytest.raises(ValueError, match="--at-once 4 must lie between 2 and the 3 systems"):
        items_of_run(run, "validation", [], 4)
    with pytest.raises(ValueError, match="does not say which prompts"):
        items_of_run(write_run(tmp_path / "old", prompt=None), "validation", [], 2)


# --------------------------------------------------------------------------------------------------------------- store


def test_a_torn_line_is_cut_a_whole_one_kept_and_another_file_left_alone(tmp_path):
    path = tmp_path / "labels.jsonl"
    store = open_store(path)
    row = {"label": "1", "prompt": "p", "completions": ["a", "b"], "choice": 0}
    assert store.append(lambda book: row)
    whole = path.read_bytes()
    for torn in (b"{", b'{"label": "2", "prom', b'{"undo": "1'):
        path.write_bytes(whole + torn)
        assert [x.label for x in read_labels(path)] == ["1"]
        assert len(open_store(path).book.labels) == 1 and path.read_bytes() == whole
    path.write_bytes(whole[:-1])  # all but the end of the line came through
    assert len(open_store(path).book.labels) == 1 and path.read_bytes() == whole
    for other in (b"shopping: milk", whole + b"my own note"):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="ends in what is no label"):
            open_store(path)
        assert path.read_bytes() == other


def test_what_another_process_appends_is_seen_and_its_seed_shared(tmp_path):
    path = tmp_path / "labels.jsonl"
    one, other = open_store(path), open_store(path)
    row = {"label": "1", "prompt": "p", "completions": ["a", "b"], "choice": 0}
    assert one.append(lambda book: row)
    assert not other.append(lambda book: None if "1" in book.known else row)
    assert one.book.seed == other.book.seed and one.book.seed
    os.truncate(path, 10)
    with pytest.raises(ValueError, match="has become shorter"):
        one.refresh()


def test_a_server_waits_for_another_that_writes(tmp_path):
    path = tmp_path / "labels.jsonl"
    store, done = open_store(path), threading.Event()
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: (store.append(lambda book: None), done.set()))
        thread.start()
        assert not done.wait(0.2)
    assert done.wait(10)
    thread.join()


# ------------------------------------------------------------------------------------------------------------- numbers


def label(number: int, item: str, annotator: str, choice: Any, **more: Any) -> Label:
    given = Label(
        str(number), item, annotator, item, ("a", "b"), ("sft", "ppo"), (0, 1), choice, False, None, 2.0, ""
    )
    return given._replace(**more)


def some_labels() -> list[Label]:
    """Cohen's 20, 5, 10, 15 of 50 between two annotators, with repeats and gold pairs."""
    both = [(0, 0)] * 20 + [(0, 1)] * 5 + [(1, 0)] * 10 + [(1, 1)] * 15
    found = [
        label(2 * i + who, f"i{i}", ("ada", "bob")[who], choices[who])
        for i, choices in enumerate(both)
        for who in (0, 1)
    ]
    found += [label(200 + i, f"i{i}", "ada", int(i == 0), repeat=True, shown=(1, 0)) for i in range(4)]
    found += [label(300 + i, f"g{i}", "bob", ("tie", 1, 1)[i], gold=1, systems=None) for i in range(3)]
    return [*found, label(400, "s", "ada", "skip"), label(401, "s", "bob", 1, systems=None)]


def test_numbers_by_hand():
    found = numbers_of(some_labels())
    assert found.kappa_name == "Cohen's kappa" and found.shared == 50
    assert found.kappa is not None and found.kappa.value == pytest.approx(0.4)
    assert found.agreement is not None and found.agreement.value == pytest.approx(0.7)
    ada, bob = found.annotators
    assert (ada["labels"], ada["skipped"], ada["repeats"], ada["consistent"].value) == (55, 1, 4, 0.75)
    assert (bob["gold"], bob["right"].value, bob["ties"]) == (3, pytest.approx(2 / 3), 1)
    assert ada["first"].value == pytest.approx((25 + 1) / 54)  # a repeat is shown the other way round
    # sft won 25 + 30 of the 100 first answers: half a win is added to each.
    (first, strength, count), (second, other, _) = found.ranking
    assert (first, second, count) == ("sft", "ppo", 100)
    assert strength.value - other.value == pytest.approx(np.log(55.5 / 45.5))
    assert strength.low < strength.value < strength.high
    assert re.search(r"\n  ada +55 +0 +1 +75% \[", text_of(found))


def test_three_annotators_get_the_kappa_of_several_and_a_tie_is_half_a_win():
    labels = [*some_labels(), label(500, "i0", "cyd", "tie")]
    found = numbers_of(labels)
    assert found.kappa_name == "Fleiss' kappa"
    assert found.ranking[0][1].value - found.ranking[1][1].value == pytest.approx(np.log(56 / 46))
    empty = numbers_of([])
    assert empty.kappa is None and empty.ranking == [] and "no two named systems" in text_of(empty)


# -------------------------------------------------------------------------------------------------------- command line


def test_report_and_export(tmp_path, capsys):
    path, out = tmp_path / "labels.jsonl", tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "p", "completions": ["a", "b"], "choice": 1, "annotator": "ada"},
        {"prompt": "q", "completions": ["a", "b"], "choice": "tie", "annotator": "ada"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert annotate.main(["report", str(path)]) == 0 and re.search(r"\n  ada +2 ", capsys.readouterr().out)
    assert annotate.main(["export", str(path), str(out)]) == 0
    assert "1 ties left out" in capsys.readouterr().out
    assert [tuple(x) for x in read_preferences(out)] == [("p", "b", "a")]


# ---------------------------------------------------------------------------------------------------------------- page


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_of_the_page_has_the_contrast_of_aa_in_both_schemes():
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", part))
        for part in re.findall(r":root \{(.*?)\}", (PAGE / "page.css").read_text(), re.S)
    ]
    assert len(schemes) == 2
    for colours in schemes:
        pairs = [("on-accent", "accent")]
        pairs += [(x, y) for x in ("ink", "quiet", "mark", "error", "accent") for y in ("ground", "paper")]
        for text, ground in pairs:
            dark, light = sorted((luminance(colours[text]), luminance(colours[ground])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


@pytest.mark.parametrize("seconds", ["\ud800", [1], 10**400])
def test_seconds_that_are_no_number_are_named(tmp_path, seconds):
    path = tmp_path / "labels.jsonl"
    path.write_text(
        json.dumps({"prompt": "p", "completions": ["a", "b"], "choice": 0, "seconds": seconds}) + "\n"
    )
    with pytest.raises(ValueError, match="labels.jsonl.*seconds must be a number"):
        read_labels(path)
