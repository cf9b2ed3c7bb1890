"""What is to be compared: prompts with completions, from a file or a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from experiments.arrays import read_arrays
from rlhfjax.data import item_id
from rlhfjax.data.datasets import check_text, numbered_rows
from rlhfjax.data.labels import check_completions, check_number, check_systems

MOST = 9  # completions of an item: each has a key
SAMPLES = "preferences"  # the stage of a run whose texts are samples of one policy


@dataclass(frozen=True)
class Item:
    """A prompt and the completions to choose among."""

    id: str
    prompt: str
    completions: tuple[str, ...]
    systems: tuple[str, ...] | None = None  # who wrote each; None: not known
    gold: int | None = None  # number of the completion that is known to be better


def read_items(path: Path) -> list[Item]:
    """Rows {prompt, completions, systems?, id?, gold?} of a JSONL file. An item that occurs twice is kept once.

    Raises ValueError naming the line for a bad row, and for two different items with one id.
    """
    found: dict[str, Item] = {}
    for where, row in numbered_rows(path):
        check_text(row, "prompt", where=where)
        completions = check_completions(row, where)
        if len(completions) > MOST:
            raise ValueError(f"{where}: {len(completions)} completions; the page has keys for {MOST}")
        gold = check_number(row, "gold", len(completions), where) if row.get("gold") is not None else None
        name = str(row.get("id", item_id(row["prompt"], completions)))
        item = Item(name, row["prompt"], completions, check_systems(row, len(completions), where), gold)
        if found.setdefault(name, item) != item:
            raise ValueError(f"{where}: id {name!r} is that of another item above; give each its own")
    return list(found.values())


def read_gold(path: Path) -> list[Item]:
    """Items of a file that check annotators: each says which completion is better."""
    items = read_items(path)
    without = next((item.id for item in items if item.gold is None), None)
    if without is not None:
        raise ValueError(f"{path}: item {without!r} has no `gold`, the number of its better completion")
    return items


def items_of_run(run: Path, stage: str, systems: Sequence[str], at_once: int) -> list[Item]:
    """Texts that a run left in arrays/`stage`.npz, `at_once` of each prompt.

    Of an evaluation (validation, test) each prompt gets some of the systems, all combinations of them in turn, so that
    each meets each equally often; by default those sampled as the first is. Of `preferences`, a prompt's samples of the
    fine-tuned policy. Equal texts are shown once, and prompts that are left with one left out.
    """
    names, prompts, text_SB = _texts_of_run(run, stage)
    if stage == SAMPLES:
        chosen = list(range(len(names)))
        if systems:
            raise ValueError("--systems chooses policies of an evaluation; --stage preferences has one only")
    else:
        chosen = [_index(names, name) for name in systems or _sampled_alike(names)]
    if not 2 <= at_once <= min(MOST, len(chosen)):
        raise ValueError(
            f"--at-once {at_once} must lie between 2 and the {len(chosen)} systems {[names[i] for i in chosen]}"
        )
    groups = list(combinations(chosen, at_once))
    items = []
    for number, prompt in enumerate(prompts):
        group = groups[0] if stage == SAMPLES else groups[number % len(groups)]
        first_with = {str(text_SB[i][number]): i for i in reversed(group)}
        written = [i for i in group if first_with[str(text_SB[i][number])] == i]
        if len(written) > 1:
            texts = tuple(str(text_SB[i][number]) for i in written)
            owners = None if stage == SAMPLES else tuple(names[i] for i in written)
            items.append(Item(item_id(prompt, texts), prompt, texts, owners))
    if not items:
        raise ValueError(f"{run}: these systems wrote the same for all {len(prompts)} prompts")
    return list({item.id: item for item in items}.values())


def as_gold(items: Sequence[Item], gold: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """(items to label, pairs that check annotators); what is known of an item makes it one of the latter."""
    checks = {item.id: item for item in (*gold, *items) if item.gold is not None}
    return [replace(item) for item in items if item.id not in checks], list(checks.values())


def _texts_of_run(run: Path, stage: str) -> tuple[list[str], list[str], np.ndarray]:
    path = run / "arrays" / f"{stage}.npz"
    if not path.is_file():
        there = ", ".join(sorted(x.stem for x in (run / "arrays").glob("*.npz"))) or "none"
        raise ValueError(
            f"{run} has no texts of a stage {stage!r} ({path} is not there; there are: {there}): end the run, or "
            "choose another --stage"
        )
    arrays = read_arrays(path)
    if "prompt" not in arrays or "texts" not in arrays:
        raise ValueError(
            f"{path} does not say which prompts its texts answer: it was written before runs kept them, or by "
            "another kind of experiment; give a JSONL file of items instead"
        )
    texts, prompts = arrays["texts"], [str(x) for x in arrays["prompt"]]
    if stage == SAMPLES:
        return [f"sample {i + 1}" for i in range(texts.shape[1])], prompts, texts.T
    return [str(x) for x in arrays["name"]], prompts, texts


def _sampled_alike(names: Sequence[str]) -> list[str]:
    """The systems that are decoded as the first is: `sft, temperature 0.7` and `ppo, temperature 0.7`."""
    how = names[0].rpartition(", ")[2]
    return [name for name in names if name.rpartition(", ")[2] == how]


def _index(names: Sequence[str], name: str) -> int:
    if name not in names:
        raise ValueError(f"no system {name!r} in this run; there are {list(names)}")
    return list(names).index(name)
