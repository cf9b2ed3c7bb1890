"""Which items are worth an answer: those on which several reward models disagree come first.

Shapes: M reward models, G completions of an item.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.annotation.items import Item
from experiments.arrays import read_arrays

CALLS_OF = 64  # texts scored at a time


def by_disagreement(items: Sequence[Item], rewards: Sequence[Path]) -> list[Item]:
    """The items, those first whose reward models disagree most: by the standard deviation over them of the probability
    that a completion is the best of its item (of two: sigmoid of the difference in score), mean over its completions.

    rewards: folders as `experiments/audit.py` takes them; a run of several seeds is as many models. Imports jax.
    Raises ValueError for fewer than two models.
    """
    folders = [folder for reward in rewards for folder in _models_of(reward)]
    if len(folders) < 2:
        raise ValueError(
            f"--select disagreement needs two reward models or more, there are {[str(x) for x in folders]}: give "
            "--reward for each, or a run of several seeds"
        )
    scores = [_scores(items, folder) for folder in folders]
    doubt = disagreement([len(item.completions) for item in items], scores)
    return [items[i] for i in np.argsort(-doubt, kind="stable")]


def disagreement(counts: Sequence[int], scores: Sequence[Sequence[float]]) -> np.ndarray:
    """The spread of each item, [N], from the scores [M] of all completions in a row, `counts` of each item."""
    ends = np.cumsum(counts)[:-1]
    parts_M = np.split(np.asarray(scores, np.float64), ends, axis=1)
    return np.asarray([_softmax(part_MG).std(axis=0).mean() for part_MG in parts_M])


def _softmax(score_MG: np.ndarray) -> np.ndarray:
    power_MG = np.exp(score_MG - score_MG.max(axis=1, keepdims=True))
    return power_MG / power_MG.sum(axis=1, keepdims=True)


def _models_of(folder: Path) -> list[Path]:
    """The folder, or the runs in it of several seeds; with the further members of an ensemble that it trained."""
    seeds, members = (
        sorted(x.parent.parent for x in folder.glob(f"{name}-*/checkpoints/reward_model"))
        for name in ("seed", "member")
    )
    return seeds if seeds and not (folder / "checkpoints" / "reward_model").is_dir() else [folder, *members]


def _scores(items: Sequence[Item], folder: Path) -> list[float]:
    """Scores of all completions, in log odds: a run's are normalised, which is undone here."""
    from experiments.stages.audit_model import open_reward_model

    print(f"scores by {folder}", flush=True)
    score: Any = open_reward_model(folder, CALLS_OF)
    prompts = [item.prompt for item in items for _ in item.completions]
    found = np.asarray(score(prompts, [text for item in items for text in item.completions]))
    normalised = folder / "arrays" / "reward_model_heldout.npz"
    if normalised.is_file():
        found = found / float(read_arrays(normalised)["gain"])
    return found.tolist()
