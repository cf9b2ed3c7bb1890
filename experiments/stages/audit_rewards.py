"""Rewards of an audit: opened, and asked for texts in threads.

Shapes: N texts.
"""

import re
import time
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from experiments.assets import asset
from experiments.stages.audit_model import open_reward_model
from experiments.stages.host_reward import find_reward
from rlhfjax.rewards import HostReward, RewardPool


@dataclass(frozen=True)
class Reward:
    """A reward with a short name."""

    label: str
    source: str
    function: HostReward

    @property
    def stage(self) -> str:
        """What its files and metrics are called."""
        return "scores_" + re.sub(r"\W+", "_", self.label)


class Speed(NamedTuple):
    """Seconds of a text."""

    alone: float  # in one thread
    threads: float  # in several
    workers: int


def open_rewards(names: Sequence[str], calls_of: int) -> list[Reward]:
    """Each FILE.py:NAME, MODULE:NAME, or a folder: of a run that trained a reward model, or a sequence classifier.

    Raises ValueError where one is not there, or named twice.
    """
    if not names:
        raise ValueError("rewards is empty: name a reward to audit, such as --rewards FILE.py:NAME")
    if len(set(names)) < len(names):
        raise ValueError(f"rewards={list(names)} names one of them twice")
    short = [_short(name) for name in names]
    labels = [name if short.count(label) > 1 else label for name, label in zip(names, short, strict=True)]
    return [open_reward(name, label, calls_of) for name, label in zip(names, labels, strict=True)]


def open_reward(name: str, label: str, calls_of: int) -> Reward:
    """One of them."""
    if asset(name).is_dir():
        return Reward(label, name, open_reward_model(asset(name), calls_of))
    return Reward(label, name, find_reward(name))


def _short(name: str) -> str:
    return name.rpartition(":")[2] if ":" in name else asset(name).name


@dataclass(frozen=True)
class Calls:
    """How rewards are called."""

    workers: int
    calls_of: int  # texts of one call
    timeout: float  # seconds that AT_ONCE texts may take

    def score(
        self,
        reward: Reward,
        prompts: Sequence[str],
        texts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        *,
        workers: int | None = None,
    ) -> np.ndarray:
        """What the reward gives to each text, float64 [N]; NaN where it gives None.

        Raises ValueError for what a reward must not do (raise, give texts, NaN or a wrong number of them) and
        TimeoutError, each naming the reward and a text.
        """
        applies = np.ones(len(texts), bool)

        def function(
            prompts: Sequence[str], completions: Sequence[str], row_: Sequence[int], **columns: Any
        ) -> Any:
            found = reward.function(prompts=prompts, completions=completions, **columns)
            if not isinstance(found, Sized) or len(found) != len(completions):
                return found  # the pool says what is wrong with it
            given = list(found)
            for i, x in zip(row_, given, strict=True):
                applies[i] = x is not None
            return [0.0 if x is None else x for x in given]

        score = np.zeros(len(texts), np.float64)
        with RewardPool(
            {reward.label: function},
            {reward.label: 1.0},
            workers=workers or self.workers,
            batch=self.calls_of,
            timeout=self.timeout,
        ) as pool:
            for start in range(0, len(texts), self.at_once):
                part = slice(start, min(start + self.at_once, len(texts)))
                some = {name: column[part] for name, column in columns.items()}
                some["row_"] = range(part.start, part.stop)
                wait = pool.submit(prompts[part], texts[part], some)
                try:
                    score[part] = wait()
                except TimeoutError as error:
                    raise TimeoutError(f"texts {part.start} to {part.stop - 1}: {error}") from error
                except (RuntimeError, TypeError, ValueError) as error:
                    raise ValueError(f"texts {part.start} to {part.stop - 1}: {error}") from error
        return np.where(applies, score, np.nan)

    @property
    def at_once(self) -> int:
        """Texts that `timeout` is for: four calls of every thread."""
        return 4 * self.workers * self.calls_of

    def time(
        self,
        reward: Reward,
        prompts: Sequence[str],
        texts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> Speed:
        """Seconds of a text, in one thread and in all of them."""
        found = []
        for workers in (1, self.workers):
            start = time.perf_counter()
            self.score(reward, prompts, texts, columns, workers=workers)
            found.append((time.perf_counter() - start) / len(texts))
        return Speed(found[0], found[1], self.workers)
