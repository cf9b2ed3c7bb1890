"""The texts of an audit: from a file, or samples of a policy, with what is known of each by gold.

Shapes: N texts, `group_N` telling the prompt of each, U prompts, K preferences.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.loop import run_once
from experiments.options import did_you_mean
from experiments.stages.preferences import sample_policy
from experiments.stages.text import Text, Writer
from rlhfjax.data.datasets import numbered_rows
from rlhfjax.rewards.audit import Pairs
from rlhfjax.run_folder import RunFolder

KNOWN_FIELDS = ("prompt", "completion", "completions", "chosen", "rejected", "id", "gold")
NO_PAIRS = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Texts:
    """Texts, each a completion of a prompt."""

    prompts: list[str]  # [U], all different
    texts: list[str]  # [N]
    group_N: np.ndarray
    ids: list[str]  # [N], all different
    columns: dict[str, list[Any]]  # further columns of the data, a list [U] each, handed to the rewards
    gold_N: np.ndarray  # NaN where there is none
    pairs: Pairs  # preferences given as such

    @property
    def prompts_N(self) -> list[str]:
        return [self.prompts[group] for group in self.group_N]

    def columns_of(self, group: np.ndarray) -> dict[str, list[Any]]:
        """The columns of texts of these prompts."""
        return {name: [column[u] for u in group] for name, column in self.columns.items()}


class Drawn(NamedTuple):
    """How samples came about."""

    length_N: np.ndarray  # tokens
    finished_N: np.ndarray  # bool, whether each ended by itself


@dataclass
class _Rows:
    """What has been read so far."""

    prompts: dict[str, int]
    columns: list[dict[str, Any]]  # of the first row of each prompt
    texts: list[str]
    group: list[int]
    ids: dict[str, int]
    lists: dict[str, list[int]]  # the id of a row of completions -> its texts
    gold: list[float]
    winners: list[int]
    losers: list[int]

    def add(self, prompt: str, text: str, name: str, gold: float, row: Mapping[str, Any], where: str) -> int:
        if name in self.ids:
            raise ValueError(
                f"{where}: there is a text with the id {name!r} already; every id must be its own"
            )
        if prompt not in self.prompts:
            self.prompts[prompt] = len(self.prompts)
            self.columns.append({key: value for key, value in row.items() if key not in KNOWN_FIELDS})
        self.ids[name] = len(self.texts)
        self.texts.append(text)
        self.group.append(self.prompts[prompt])
        self.gold.append(gold)
        return len(self.texts) - 1


def read_texts(path: Path) -> Texts:
    """The texts of a JSONL file: each row a `prompt` with a `completion`, `completions`, or `chosen` and `rejected`.

    `id` names a row, else its number from 0 on does; the texts of a list are ID/0, ID/1, ... and those of a preference
    ID/chosen and ID/rejected. `gold` is a number, or one for each of `completions`. Other fields that the first row of
    every prompt has are columns for the rewards.

    Raises FileNotFoundError, or ValueError that names file, line and field.
    """
    found = _Rows({}, [], [], [], {}, {}, [], [], [])
    for number, (where, row) in enumerate(numbered_rows(path, ("prompt",))):
        name = str(row.get("id", number))
        kinds = [kind for kind in ("completion", "completions", "chosen") if kind in row]
        if len(kinds) != 1:
            raise ValueError(
                f"{where}: a row needs one of `completion`, `completions` and `chosen` with `rejected`; it has "
                f"{kinds or sorted(row)}"
            )
        if kinds == ["completion"]:
            gold = math.nan if row.get("gold") is None else _number(row["gold"], "gold", where)
            found.add(row["prompt"], _text(row, "completion", where), name, gold, row, where)
        elif kinds == ["completions"]:
            _add_list(found, row, name, where)
        else:
            both = [
                found.add(row["prompt"], _text(row, side, where), f"{name}/{side}", math.nan, row, where)
                for side in ("chosen", "rejected")
            ]
            found.winners.append(both[0])
            found.losers.append(both[1])
    common = set.intersection(*(set(columns) for columns in found.columns))
    return Texts(
        list(found.prompts),
        found.texts,
        np.asarray(found.group, np.int64),
        list(found.ids),
        {key: [columns[key] for columns in found.columns] for key in sorted(common)},
        np.asarray(found.gold, np.float64),
        Pairs(np.asarray(found.winners, np.int64), np.asarray(found.losers, np.int64)),
    )


def _add_list(found: _Rows, row: Mapping[str, Any], name: str, where: str) -> None:
    texts, gold = row["completions"], row.get("gold")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: field 'completions' must be a list of texts, at least one")
    if gold is not None and (not isinstance(gold, list) or len(gold) != len(texts)):
        raise ValueError(
            f"{where}: field 'gold' must be a list of {len(texts)} numbers, one for each completion"
        )
    for i, text in enumerate(texts):
        score = math.nan if gold is None or gold[i] is None else _number(gold[i], "gold", where)
        found.add(row["prompt"], text, f"{name}/{i}", score, row, where)


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    if not isinstance(row.get(field), str):
        raise ValueError(f"{where}: field {field!r} must be a text, it is {type(row.get(field)).__name__}")
    return row[field]


def _number(value: Any, field: str, where: str) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{where}: field {field!r} must be a finite number, it is {value!r}")
    return float(value)


def with_labels(texts: Texts, path: Path) -> Texts:
    """The texts with the gold labels of a JSONL file: rows {id, gold}, or {chosen, rejected} of two ids.

    A `gold` that is a list is of the row of `completions` with that id. Raises ValueError for an id that no text has,
    for one labelled twice, and for a preference between texts of two prompts.
    """
    place = {name: i for i, name in enumerate(texts.ids)}
    gold, winners, losers = texts.gold_N.copy(), texts.pairs.winner_K.tolist(), texts.pairs.loser_K.tolist()
    labelled: set[str] = set()
    unknown: list[str] = []
    for where, row in numbered_rows(path):
        pair = "chosen" in row and "rejected" in row
        if not pair and not ("id" in row and "gold" in row):
            raise ValueError(
                f"{where}: a label has the fields `id` and `gold`, or the ids `chosen` and `rejected`; this row has "
                f"{sorted(row)}"
            )
        if pair:
            names = [str(row["chosen"]), str(row["rejected"])]
            missing = [name for name in names if name not in place]
            if not missing:
                first, second = (place[name] for name in names)
                if texts.group_N[first] != texts.group_N[second]:
                    raise ValueError(f"{where}: {names[0]!r} and {names[1]!r} are texts of two prompts")
                winners.append(first)
                losers.append(second)
        else:
            name, score = str(row["id"]), row["gold"]
            scores = (
                {f"{name}/{i}": x for i, x in enumerate(score)} if isinstance(score, list) else {name: score}
            )
            missing = [each for each in scores if each not in place]
            for each, x in scores.items():
                if each in labelled:
                    raise ValueError(
                        f"{where}: {each!r} is labelled a second time; give one gold score a text"
                    )
                labelled.add(each)
                if each in place:
                    gold[place[each]] = _number(x, "gold", where)
        unknown += missing
    if unknown:
        shown = ", ".join(repr(name) for name in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(
            f"{path} labels {len(unknown)} ids that no text has: {shown}{did_you_mean(unknown[0], texts.ids)}. The ids "
            f"are {', '.join(map(repr, texts.ids[:3]))}, ..."
        )
    return replace(
        texts, gold_N=gold, pairs=Pairs(np.asarray(winners, np.int64), np.asarray(losers, np.int64))
    )


def sampled_texts(
    text: Text,
    params: dict,
    folder: RunFolder,
    *,
    split: str,
    prompts: int,
    samples: int,
    temperature: float,
    stage: str = "samples",
) -> tuple[Texts, Drawn]:
    """Completions of the first prompts of a split, as texts; the column `reference` is that of the data."""
    if prompts < 1 or samples < 1:
        raise ValueError(f"prompts={prompts} and samples={samples} must be at least 1")
    examples = text.load(split)
    # Equal prompts are one group; what counts is the first of them.
    rows = np.asarray(
        list(dict(zip(reversed(examples.prompts), reversed(range(len(examples))), strict=True)).values())
    )
    rows = np.sort(rows)[:prompts]

    def compute():
        out = sample_policy(
            text,
            Writer(params),
            examples,
            rows,
            jax.random.fold_in(jax.random.key(folder.seed), 7),
            temperatures=np.full(samples, temperature, np.float32),
            batch=min(64, len(rows)),
        )
        decoded = text.decode(out["token_BGC"], out["mask_BGC"])
        metrics = {
            "completions/finished": float(out["finished_BG"].mean()),
            "completions/mean_length": float(out["mask_BGC"].sum(axis=2).mean()),
        }
        shown = [examples.shown(row) | {"completion": decoded[i][0]} for i, row in enumerate(rows[:4])]
        arrays = {
            "texts": np.asarray(decoded).reshape(len(rows), samples),
            "finished": out["finished_BG"],
            "length": out["mask_BGC"].sum(axis=2),
        }
        return arrays, metrics, shown

    arrays = run_once(stage, folder=folder, compute=compute)
    stored = arrays["texts"]
    texts = Texts(
        [examples.prompts[row] for row in rows],
        [str(x) for x in stored.reshape(-1)],
        np.repeat(np.arange(len(rows)), samples),
        [f"{row}/{i}" for row in rows for i in range(samples)],
        {"reference": [examples.references[row] for row in rows]} if any(examples.references) else {},
        np.full(stored.size, np.nan),
        NO_PAIRS,
    )
    return texts, Drawn(arrays["length"].reshape(-1), arrays["finished"].reshape(-1))


def joined(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)
