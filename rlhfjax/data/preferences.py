"""Preference pairs: labels drawn from a gold score by Bradley-Terry, and files of {prompt, chosen, rejected}.

Shapes: B prompts, G samples per prompt, K = G (G - 1) / 2 pairs.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhfjax.data.datasets import read_jsonl

__all__ = [
    "PreferencePair",
    "Preferences",
    "accuracy_ceiling",
    "draw_preferences",
    "pair_indices",
    "read_preferences",
    "same_pairs",
    "write_preferences",
]

# Second word of the Philox key, so that labels share no random numbers with the shuffles of the same seed.
_LABELS = int.from_bytes(b"labels", "little")


class PreferencePair(NamedTuple):
    """Two completions of one prompt, of which a judge preferred the first."""

    prompt: str
    chosen: str
    rejected: str


class Preferences(NamedTuple):
    """All pairs among the G samples of each prompt; pair k compares samples first_K[k] and second_K[k]."""

    first_K: np.ndarray  # int32 [K], shared by all prompts
    second_K: np.ndarray  # int32 [K]
    label_BK: np.ndarray  # float32 [B, K]: 1 if the first won, 0 if the second
    mask_BK: np.ndarray  # bool [B, K]: False drops the pair
    probability_BK: np.ndarray  # float32 [B, K]: the probability of label 1 that the label was drawn with


def pair_indices(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs first < second among `samples` samples, in row order: (first_K, second_K), int32."""
    if samples < 2:
        raise ValueError(f"pairs need at least 2 samples per prompt, there are {samples}")
    first_K, second_K = np.triu_indices(samples, k=1)
    return first_K.astype(np.int32), second_K.astype(np.int32)


def same_pairs(samples_BG: Sequence[Sequence[Any]]) -> np.ndarray:
    """same_BK: which pairs of `pair_indices(G)` hold equal samples (texts, or tuples of ids): bool [B, K]."""
    widths = {len(samples_G) for samples_G in samples_BG}
    if len(widths) != 1:
        raise ValueError(f"every prompt needs the same number of samples, they have {sorted(widths)}")
    pairs = list(zip(*pair_indices(widths.pop()), strict=True))
    return np.array([[samples_G[a] == samples_G[b] for a, b in pairs] for samples_G in samples_BG], bool)


def draw_preferences(
    gold_BG: np.ndarray, *, temperature: float, seed: int, same_BK: np.ndarray | None = None
) -> Preferences:
    """Draws a label for every pair: P(first wins) = sigmoid((gold_first - gold_second) / temperature).

    Bradley and Terry 1952, with the scale of RLHF (Christiano et al. 2017, arXiv:1706.03741, eq. 1).

    gold_BG: finite scores; temperature: > 0, in units of the score; a small one makes the judge sure.
    same_BK: pairs to drop because both samples are the same text (`same_pairs`).
    The result is a pure function of the arguments.
    """
    gold_BG = np.asarray(gold_BG, np.float64)
    if gold_BG.ndim != 2:
        raise ValueError(f"gold_BG must be [prompts, samples], its shape is {gold_BG.shape}")
    if not np.isfinite(gold_BG).all():
        prompt, sample = np.argwhere(~np.isfinite(gold_BG))[0]
        raise ValueError(
            f"gold_BG is {gold_BG[prompt, sample]} at prompt {prompt}, sample {sample}; give finite scores"
        )
    if not temperature > 0 or seed < 0:
        raise ValueError(f"temperature must be above 0 and seed not negative: {temperature}, {seed}")
    first_K, second_K = pair_indices(gold_BG.shape[1])
    shape_BK = (gold_BG.shape[0], len(first_K))
    if same_BK is not None and np.shape(same_BK) != shape_BK:
        raise ValueError(f"same_BK must be {shape_BK} [prompts, pairs], its shape is {np.shape(same_BK)}")

    margin_BK = (gold_BG[:, first_K] - gold_BG[:, second_K]) / temperature
    probability_BK = 0.5 * (1.0 + np.tanh(0.5 * margin_BK))  # the sigmoid, in a form that cannot overflow
    words = np.random.Philox(key=np.array([seed, _LABELS], np.uint64)).random_raw(shape_BK[0] * shape_BK[1])
    uniform_BK = (np.asarray(words) >> np.uint64(11)).reshape(shape_BK) * 2.0**-53
    return Preferences(
        first_K,
        second_K,
        label_BK=(uniform_BK < probability_BK).astype(np.float32),
        mask_BK=np.ones(shape_BK, bool) if same_BK is None else ~np.asarray(same_BK, bool),
        probability_BK=probability_BK.astype(np.float32),
    )


def accuracy_ceiling(preferences: Preferences) -> float:
    """E[max(p, 1 - p)] over the pairs kept: the accuracy of the best guesser of such labels."""
    p = preferences.probability_BK[preferences.mask_BK].astype(np.float64)
    if not p.size:
        raise ValueError("no pair is left to judge; draw more samples or sample at a higher temperature")
    return float(np.maximum(p, 1.0 - p).mean())


def read_preferences(path: str | Path) -> list[PreferencePair]:
    """Rows {prompt, chosen, rejected} of a .jsonl or .jsonl.gz file; other fields are passed over."""
    fields = PreferencePair._fields
    pairs = [PreferencePair(*(row[field] for field in fields)) for row in read_jsonl(path, fields)]
    for number, pair in enumerate(pairs, 1):
        _check_distinct(pair, where=f"{path}, row {number}")
    return pairs


def write_preferences(path: str | Path, pairs: Iterable[PreferencePair]) -> None:
    """Writes what `read_preferences` reads; the same pairs give the same bytes, in a .gz file too."""
    pairs = list(pairs)
    for number, pair in enumerate(pairs, 1):
        _check_distinct(pair, where=f"row {number}")
    content = "".join(json.dumps(pair._asdict(), ensure_ascii=False) + "\n" for pair in pairs).encode()
    Path(path).write_bytes(gzip.compress(content, mtime=0) if Path(path).suffix == ".gz" else content)


def _check_distinct(pair: PreferencePair, *, where: str) -> None:
    if pair.chosen == pair.rejected:
        raise ValueError(
            f"{where}: chosen and rejected are the same text, {pair.chosen[:60]!r}; drop the pair"
        )
