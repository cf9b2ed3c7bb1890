"""Rewards that run in Python on texts.

A host reward is a function f(prompts, completions, **columns) -> list[float | None], as in TRL: lists of N
texts and the columns of the data go in; a number for each sample comes out, or None where it does not apply.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from numbers import Real
from typing import Any

import numpy as np

__all__ = ["HostReward", "score_on_host"]

HostReward = Callable[..., Sequence[float | None]]


def score_on_host(
    functions: Mapping[str, HostReward],
    weights: Mapping[str, float],
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> np.ndarray:
    """Weighted sum of the functions' rewards: float32 [N], summed in float64.

    functions, weights: by the same names. columns: each with N entries, handed to every function as keywords.
    A None adds nothing. ValueError, naming function, sample and completion, for a NaN or infinity, a wrong
    number of rewards, or a sample to which no function applies; TypeError for a reward that is no number.
    """
    _check_inputs(functions, weights, prompts, completions, columns)
    total_N = np.zeros(len(completions), np.float64)
    applies_N = np.zeros(len(completions), bool)
    for name, function in functions.items():
        rewards = function(prompts=prompts, completions=completions, **columns)
        if not isinstance(rewards, Sized):
            raise TypeError(f"reward {name!r} gave {type(rewards).__name__}; give a list of numbers")
        if len(rewards) != len(completions):
            raise ValueError(
                f"reward {name!r} gave {len(rewards)} numbers for {len(completions)} completions"
            )
        for i, reward in enumerate(rewards):
            if reward is not None:
                total_N[i] += weights[name] * _checked(reward, name, i, completions[i])
                applies_N[i] = True
    if not applies_N.all():
        i = int(np.argmin(applies_N))
        raise ValueError(
            f"every reward of {list(functions)} gave None for sample {i} ({_clip(completions[i])}); "
            "at least one must apply to each sample"
        )
    with np.errstate(over="ignore"):  # told below, by name
        score_N = total_N.astype(np.float32)
    if not np.isfinite(score_N).all():
        i = int(np.argmin(np.isfinite(score_N)))
        raise ValueError(
            f"the rewards of sample {i} sum to {total_N[i]}, beyond float32 ({_clip(completions[i])})"
        )
    return score_N


def _check_inputs(
    functions: Mapping[str, HostReward],
    weights: Mapping[str, float],
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> None:
    if not functions or functions.keys() != weights.keys():
        raise ValueError(f"weights {sorted(weights)} must name the rewards {sorted(functions)}, at least one")
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"the weight of reward {name!r} is {weight}")
    for name, column in {"prompts": prompts, **columns}.items():
        if len(column) != len(completions):
            raise ValueError(f"{name!r} has {len(column)} entries for {len(completions)} completions")


def _checked(reward: Any, name: str, index: int, completion: str) -> float:
    """The reward as a finite float. A NumPy or JAX scalar is a number; a text of digits is not."""
    scalar = reward.item() if getattr(reward, "shape", None) == () else reward
    where = f"reward {name!r} gave {reward!r} for sample {index} ({_clip(completion)})"
    if not isinstance(scalar, Real):
        raise TypeError(f"{where}; give a number or None")
    if not math.isfinite(scalar):
        raise ValueError(f"{where}; give a finite number, or None where the reward does not apply")
    return float(scalar)


def _clip(text: str, width: int = 60) -> str:
    return repr(text if len(text) <= width else text[:width] + "...")
