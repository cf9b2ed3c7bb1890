"""From labels to a reward model: what is read, what is learnt from, and the whole loop on a tiny world."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import start
from tiny_text import write_base, write_pairs, write_world

from experiments.annotation.items import items_of_run
from experiments.annotation.selection import by_disagreement, disagreement
from experiments.annotation.session import Session
from experiments.annotation.store import open_store
from experiments.stages import configs, labelled, preferences, text
from rlhfjax import run_folder
from rlhfjax.data import Comparison, comparisons, read_labels


def write_rows(path: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def row(name: str, choice: Any, **more: Any) -> dict[str, Any]:
    given = {"label": name, "item": "i", "annotator": "ada", "prompt": "p", "completions": ["a", "b", "c"]}
    return given | {"choice": choice} | more


# ------------------------------------------------------------------------------------------------------------- reading


def test_labels_that_count(tmp_path):
    path = write_rows(
        tmp_path / "labels.jsonl",
        [
            {"seed": "x"},
            row("1", 0),
            row("1", 1),  # the same label again
            row("2", 1),  # the same task again
            row("3", 2, annotator="bob"),
            row("4", "tie", item="j"),
            {"undo": "4"},
            row("4", "tie", item="j"),  # stays taken back
            row("5", "skip", item="j"),
            row("6", 0, repeat=True),
        ],
        tail='{"label": "7", "item": "k"',
    )
    assert [(x.label, x.choice) for x in read_labels(path)] == [("1", 0), ("3", 2), ("5", "skip"), ("6", 0)]
    with open(path, "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"labels.jsonl:11: not JSON"):
        read_labels(path)


def test_comparisons_of_choices_ties_and_pairs_that_check(tmp_path):
    rows = [
        row("1", 1, systems=["x", "y", "z"]),
        row("2", "tie", item="j", completions=["a", "b"]),
        row("3", 0, item="k", gold=0),
        row("4", 0, item="i", repeat=True),
        row("5", "skip", item="l"),
        row("6", 0, item="m", completions=["a", "a", "b"]),
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
    ]
    found = comparisons(read_labels(write_rows(tmp_path / "labels.jsonl", rows)))
    one = Comparison("q", "good", "bad", 1.0, "", None)
    assert found == [
        Comparison("p", "a", "b", 0.0, "ada", ("x", "y")),
        Comparison("p", "b", "c", 1.0, "ada", ("y", "z")),
        Comparison("p", "a", "b", 0.5, "ada", None),
        Comparison("p", "a", "b", 1.0, "ada", None),
        one,
        one,  # pairs without annotators may well be of two
    ]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"choice": 3}, "choice must be the number of a completion, 0 to 2"),
        ({"choice": None}, "choice"),
        ({"completions": ["a"]}, "two texts or more"),
        ({"completions": ["a", "\ud800"]}, "half a surrogate pair"),
        ({"systems": ["x"]}, "one for each of the 3 completions"),
        ({"gold": 7}, "gold must be the number"),
        ({"shown": [0, 0, 1]}, "shown must hold"),
        ({"prompt": ""}, "empty 'prompt'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, changes, why):
    path = write_rows(tmp_path / "labels.jsonl", [row("1", 0), row("2", 0) | changes])
    with pytest.raises(ValueError, match=f"labels.jsonl:2: .*{why}"):
        read_labels(path)


# ------------------------------------------------------------------------------------------------------------ encoding


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> text.Text:
    folder = tmp_path_factory.mktemp("world")
    write_pairs(folder / "pairs.jsonl")
    write_base(folder / "base", folder / "pairs.jsonl")
    config = configs.Text(prompt_length=10, completion_length=6)
    return text.open_text(
        dataclasses.replace(config, data=str(folder / "pairs.jsonl"), base=str(folder / "base"))
    )


def test_labels_become_pairs_of_tokens_and_a_prompt_is_on_one_side(loaded, tmp_path):
    rows = [
        row(
            f"{i}{who}",
            choice,
            item=str(i),
            annotator=who,
            prompt=f"red sun {i}",
            completions=["ox", "tea map"],
        )
        for i in range(10)
        for who, choice in (("ada", 0), ("bob", i % 2), ("cyd", "tie"))
    ]
    rows.append(row("long", 0, item="long", prompt="red sun", completions=["ox", "ox " * 30]))
    rows.append(row("full", 1, item="full", prompt="red sun 0", completions=["", "ox ox ox ox ox ox"]))
    arrays, left_out = labelled.encode_labels(
        write_rows(tmp_path / "labels.jsonl", rows), loaded, heldout=100, seed=0
    )
    assert left_out == 1 and arrays["token"].shape == (31, 2, 6)
    heldout = int(arrays["heldout"])
    assert set(arrays["row"][-heldout:]).isdisjoint(arrays["row"][:-heldout])
    assert len(set(arrays["row"][-heldout:])) == 2  # a fifth of ten prompts
    texts = loaded.decode(arrays["token"], arrays["mask"])
    for i, place in enumerate(arrays["row"]):
        number = int(str(arrays["prompt"][place]).split()[-1])
        if texts[i] == ["ox", "tea map"]:
            # Those who decided were of one mind about even items, of two about odd ones.
            assert arrays["probability"][i] == (1.0, 0.5)[number % 2]
            assert arrays["token"][i, 0, 1] == loaded.tokenizer.eos_id
        else:
            assert texts[i] == ["", "ox ox ox ox ox ox"] and arrays["label"][i] == 0.0
            assert arrays["token"][i, 0, 0] == loaded.tokenizer.eos_id
            assert loaded.tokenizer.eos_id not in arrays["token"][i, 1]  # no room: as one that was cut off
    assert sorted(arrays["label"]) == [0.0] * 6 + [0.5] * 10 + [1.0] * 15


def test_too_few_labels_are_said(loaded, tmp_path):
    path = write_rows(tmp_path / "labels.jsonl", [row("1", 0, completions=["ox", "tea"])])
    with pytest.raises(ValueError, match="1 comparisons, of which those that fit .* are of 1 prompts"):
        labelled.encode_labels(path, loaded, heldout=9, seed=0)
    ties = [row(str(i), "tie", item=str(i), prompt=f"p {i}", completions=["ox", "tea"]) for i in range(4)]
    with pytest.raises(ValueError, match="are ties; label more"):
        labelled.encode_labels(write_rows(path, ties), loaded, heldout=9, seed=0)


def test_a_run_goes_on_with_the_labels_it_began_with(loaded, tmp_path):
    rows = [row(str(i), i % 2, item=str(i), prompt=f"p {i}", completions=["ox", "tea"]) for i in range(6)]
    path = write_rows(tmp_path / "labels.jsonl", rows)
    folder = run_folder.create(tmp_path / "run", "experiment: fake\n", experiment="fake", seed=0, exact=True)
    config = configs.PreferenceStage(labels=path)
    before = labelled.collect_labels(config, loaded, folder)
    write_rows(path, rows[:3])
    after = labelled.collect_labels(config, loaded, folder)
    np.testing.assert_array_equal(before.token_BGC, after.token_BGC)
    branches = [
        preferences.branches_of(loaded, loaded.load("train"), x, np.arange(3)) for x in (before, after)
    ]
    ids = branches[0].prompt_BP[branches[0].prompt_mask_BP].tolist()
    assert after.examples is not None and ids == sum((after.examples.ids[i] for i in after.row_B[:3]), [])
    assert before.trained == 5 and before.heldout == 1
    assert labelled.notes(before, [40], {"test": after.examples}) == [
        "note: 6 of the labelled prompts are of the test split, on which policies are measured",
        "note: the reward model goes 8 times over its 5 labels: fewer steps may do better",
    ]


# ----------------------------------------------------------------------------------------------------------- selection


def test_disagreement_is_the_spread_of_the_probability_that_the_first_is_preferred():
    scores = [[1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0]]
    high, low = 1 / (1 + np.exp(-1.0)), 1 / (1 + np.exp(1.0))
    found = disagreement([2, 3], scores)
    np.testing.assert_allclose(found, [float(np.std([high, low])), 0.0], atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- all of it


@pytest.mark.slow
def test_texts_of_a_run_are_labelled_and_train_the_next_one(tmp_path, capsys):
    settings = write_world(tmp_path)
    settings |= {"algorithm": "dpo", "dpo": {"steps": 2, "prompts": 4, "optimizer": {"warmup_steps": 1}}}
    first = tmp_path / "first"
    assert start("summarize", settings, first) == 0
    compared = items_of_run(first, "validation", [], 2)
    assert {x.systems for x in compared} == {("sft, temperature 0.7", "dpo, temperature 0.7")}
    lines = [json.loads(x) for x in (first / "samples.jsonl").read_text().splitlines()]
    of_prompt = {x["prompt"]: x for x in lines if x["stage"] == "validation"}
    for item in compared:
        assert item.completions == tuple(of_prompt[item.prompt][name] for name in item.systems or ())
    items = items_of_run(first, "preferences", [], 3)
    assert len(items) > 6 and all(len(set(x.completions)) == len(x.completions) for x in items)

    path = tmp_path / "labels.jsonl"
    session = Session(items, [], open_store(path), annotator="ada")
    state = session.state("ada")
    while state["task"]:  # the longest is the best
        longest = max(state["task"]["completions"], key=len)
        choice = state["task"]["completions"].index(longest)
        given = {"key": state["task"]["key"], "label": state["task"]["label"], "choice": choice, "seconds": 1}
        state = session.answer(given)
    second = tmp_path / "second"
    capsys.readouterr()
    assert start("summarize", settings, second, "--preferences.labels", str(path)) == 0
    metrics = [json.loads(x) for x in (second / "metrics.jsonl").read_text().splitlines()]
    (collected,) = (x for x in metrics if x["stage"] == "preferences")
    assert collected["labels"] == len(comparisons(read_labels(path))) - collected["labels/too_long"]
    (measured,) = (x for x in metrics if x["stage"] == "reward_model_heldout")
    assert 0 <= measured["heldout/accuracy"] <= measured["heldout/accuracy_ceiling"] == 1.0
    assert "which people gave" in (second / "report.md").read_text()
    chosen = by_disagreement(items, [first, second])
    assert sorted(x.id for x in chosen) == sorted(x.id for x in items)
    with pytest.raises(ValueError, match="two reward models or more"):
        by_disagreement(items, [first])
