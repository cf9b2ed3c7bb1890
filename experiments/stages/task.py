"""What a comparison on text optimises, and what it measures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.stages.configs import HostRewards
from experiments.stages.preferences import Gold
from experiments.stages.text import Examples, Text
from rlhfjax.networks import Branches
from rlhfjax.rewards import RewardPool


class DeviceReward(NamedTuple):
    """A given reward on the device, of completions of some examples' prompts.

    reward(params, branches, index_B) -> float32 [B, G], pure; `index_B` (int32) numbers the prompts among the examples.
    """

    params: Any  # arrays that it reads, such as references by number: arguments of the compiled program
    reward: Callable[[Any, Branches, jax.Array], jax.Array]


@dataclass(frozen=True)
class OnDevice:
    """A reward that is given, on the device: `of(text, examples)` is the one of these examples."""

    of: Callable[[Text, Examples], DeviceReward]


@dataclass(frozen=True)
class OnHost:
    """A reward that is given, in Python: the functions of an open pool, and how they are called.

    Each is called with the examples' references as the column `reference`.
    """

    pool: RewardPool
    settings: HostRewards


@dataclass(frozen=True)
class Task:
    """A task on text: its gold score, and the reward that methods optimise.

    Without a reward one is learnt, from pairs that a noisy judge labels by the gold score; else the gold score is
    measured only, and pairs and ratings are labelled by the reward.
    """

    gold_name: str
    gold_of: Callable[[Examples], Gold]
    reward: OnDevice | OnHost | None = None
    # More scores of texts, by name: measured at the end, never learnt from.
    measures: Mapping[str, Callable[[Examples], Gold]] = field(default_factory=dict)


def against_references(score: Callable[[str, str], float]) -> Callable[[Examples], Gold]:
    """A gold score from a score of (completion, reference): each completion against the one of its row in the data."""

    def of(examples: Examples) -> Gold:
        def gold(rows: np.ndarray, texts: list[list[str]]) -> np.ndarray:
            return np.asarray(
                [[score(x, examples.references[r]) for x in xs] for r, xs in zip(rows, texts, strict=True)]
            )

        return gold

    return of
