"""Rewards made of rewards: weighted sums, one scale, bounds, and "does not apply".

On the device a reward is any `reward(params, *inputs) -> float32`: of tokens, of branches, or a learned model. The
functions here keep that form, so that they nest. Where a reward does not apply to a sample it gives `Applied`, on the
host None. A sample to which no reward of a sum applies is an error on the host, which names it; on the device, where
nothing can be raised, it is NaN, which is never trained on and is counted in "reward/nonfinite".

    reward = weighted_sum(
        {"chrf": chrf_on_device(table), "repeats": repetition_on_device(table)},
        {"chrf": 1.0, "repeats": 0.3},
        numbered=("chrf",),
    )
    score_B = reward({"chrf": references(texts)}, token_BT, mask_BT, index_B)

The running scale is a state like any other: `Moments` goes into the rewards' params, comes out of `update_moments`, and
is saved with the run.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from rlhfjax.rewards.host import HostReward, scores_of

__all__ = [
    "Applied",
    "Moments",
    "clipped",
    "clipped_on_host",
    "init_moments",
    "normalised",
    "normalised_on_host",
    "scaled",
    "scaled_by",
    "unscaled",
    "update_moments",
    "weighted_sum",
    "weighted_sum_on_host",
    "where_applies",
    "where_applies_on_host",
]


class Applied(NamedTuple):
    """A reward that does not apply to every sample."""

    score: jax.Array  # float32; where it does not apply, anything
    applies: jax.Array  # bool, of the same shape


Reward = Callable[..., "jax.Array | Applied"]


# ---- on the device


def weighted_sum(
    rewards: Mapping[str, Reward], weights: Mapping[str, Any], *, numbered: Collection[str] = ()
) -> Callable[..., jax.Array]:
    """`reward(params, *inputs) -> float32`: the weighted sum of the rewards that apply, NaN where none does.

    Args:
      rewards: by name.
      weights: by the same names, numbers or traced scalars.
      numbered: names of those that look something up by the prompt's number. If there are any, the last input is
        index_B, which the others are not given.

    Of the reward: params is a dict by name, of those rewards that have any; None: none has. A score of NaN where its
    reward applies makes the sum NaN.

    Raises ValueError for names that do not fit, here and, in params, when the reward is traced; and for a weight that
    is not finite.
    """
    _check_names(rewards, weights)
    if set(numbered) - set(rewards):
        raise ValueError(f"numbered={sorted(numbered)} must be among the rewards {sorted(rewards)}")

    def reward(params: Mapping[str, Any] | None, *inputs: Any) -> jax.Array:
        given = {} if params is None else params
        if not isinstance(given, Mapping) or set(given) - set(rewards):
            raise ValueError(
                f"params must be a dict by the names of rewards, {sorted(rewards)}, got "
                f"{sorted(given) if isinstance(given, Mapping) else type(given).__name__}"
            )
        if numbered and len(inputs) < 2:
            raise ValueError(f"the rewards {sorted(numbered)} need index_B as the last input")
        plain = inputs[:-1] if numbered else inputs
        total, anything = jnp.float32(0), jnp.bool_(False)
        for name, function in rewards.items():
            score, applies = _applied(function(given.get(name), *(inputs if name in numbered else plain)))
            total = total + jnp.where(applies, weights[name] * score, 0.0)
            anything = anything | applies
        return jnp.where(anything, total, jnp.nan)

    return reward


def where_applies(reward: Reward, applies: Callable[..., jax.Array]) -> Callable[..., Applied]:
    """The reward where `applies(params, *inputs)`, bool, is True (and it applies by itself); elsewhere none."""

    def of_some(params: Any, *inputs: Any) -> Applied:
        score, also = _applied(reward(params, *inputs))
        return Applied(score, applies(params, *inputs) & also)

    return of_some


def normalised(reward: Reward, mean: float, std: float) -> Reward:
    """`(reward - mean) / std`, by fixed numbers, such as those of the reference's own samples (`update_moments`).

    Raises ValueError for a std that is not above 0.
    """
    _check_scale(mean, std)
    return _of_score(reward, lambda score: (score - mean) / std)


def clipped(reward: Reward, low: float, high: float) -> Reward:
    """The reward held between two bounds. NaN stays NaN. Raises ValueError where low is not below high."""
    _check_bounds(low, high)
    return _of_score(reward, lambda score: jnp.clip(score, low, high))


class Moments(NamedTuple):
    """Count, mean and variance of all scores so far: float32 scalars."""

    count: jax.Array
    mean: jax.Array
    variance: jax.Array  # the population's


def init_moments() -> Moments:
    """Before the first score: a scale of mean 0 and standard deviation 1."""
    return Moments(jnp.float32(0), jnp.float32(0), jnp.float32(0))


def update_moments(moments: Moments, score: jax.Array) -> Moments:
    """With the scores of one more batch, float of any shape; what is not finite is left out (Chan et al. 1979)."""
    score = jnp.asarray(score, jnp.float32)
    finite = jnp.isfinite(score)
    count = jnp.sum(finite, dtype=jnp.float32)
    mean = jnp.sum(jnp.where(finite, score, 0.0)) / jnp.maximum(count, 1)
    square = jnp.sum(jnp.where(finite, jnp.square(score - mean), 0.0))
    both = moments.count + count
    share = count / jnp.maximum(both, 1)
    off = mean - moments.mean
    squares = moments.variance * moments.count + square + jnp.square(off) * moments.count * share
    return Moments(both, moments.mean + off * share, squares / jnp.maximum(both, 1))


def scaled_by(moments: Moments, score: jax.Array) -> jax.Array:
    """`(score - mean) / std`; std counts as 1 as long as the scores so far do not differ."""
    return (score - moments.mean) / _std(moments)


def unscaled(moments: Moments, score: jax.Array) -> jax.Array:
    """The score that `scaled_by` made this one of, to update the moments with."""
    return score * _std(moments) + moments.mean


def scaled(reward: Reward) -> Reward:
    """The reward on a running scale. Its params are (moments, params of the reward).

    frozen = Frozen(reference, (moments, params))
    state, metrics, experience = iterate(state, frozen, prompts, key)
    moments = update_moments(moments, unscaled(moments, experience.score_BG))
    """

    def on_scale(params: tuple[Moments, Any], *inputs: Any) -> jax.Array | Applied:
        moments, own = params
        return _of_score(reward, lambda score: scaled_by(moments, score))(own, *inputs)

    return on_scale


# ---- on the host


def weighted_sum_on_host(functions: Mapping[str, HostReward], weights: Mapping[str, float]) -> HostReward:
    """A host reward: the weighted sum of those that apply, None where none does; bad answers are told by name.

    Errors as of `score_on_host`.

    >>> from rlhfjax.rewards import near_length_reward, regex_reward
    >>> both = {"digits": regex_reward("[0-9]+"), "length": near_length_reward(1)}
    >>> weighted_sum_on_host(both, {"digits": 1.0, "length": 0.5})(["", ""], ["42", "4 2"])
    [1.0, -0.5]
    """
    _check_names(functions, weights)

    def reward(
        prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        total: list[float | None] = [None] * len(completions)
        for name, function in functions.items():
            for i, score in enumerate(scores_of(name, function, prompts, completions, columns)):
                if score is not None:
                    total[i] = (total[i] or 0.0) + weights[name] * score
        return total

    return reward


def where_applies_on_host(function: HostReward, applies: Callable[..., Sequence[bool]]) -> HostReward:
    """The host reward where `applies(prompts, completions, **columns)` is True, elsewhere None."""

    def reward(
        prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        flags = applies(prompts=prompts, completions=completions, **columns)
        if len(flags) != len(completions):
            raise ValueError(f"applies gave {len(flags)} flags for {len(completions)} completions")
        scores = function(prompts=prompts, completions=completions, **columns)
        return [score if flag else None for score, flag in zip(scores, flags, strict=True)]

    return reward


def normalised_on_host(function: HostReward, mean: float, std: float) -> HostReward:
    """The host reward as `(reward - mean) / std`; None stays None. Raises ValueError for a std not above 0."""
    _check_scale(mean, std)
    return _of_each(function, lambda score: (score - mean) / std)


def clipped_on_host(function: HostReward, low: float, high: float) -> HostReward:
    """The host reward held between two bounds; None and NaN stay. Raises ValueError where low is not below high."""
    _check_bounds(low, high)
    return _of_each(function, lambda score: score if math.isnan(score) else min(max(score, low), high))


def _applied(out: jax.Array | Applied) -> Applied:
    return out if isinstance(out, Applied) else Applied(out, jnp.ones(out.shape, bool))


def _of_score(reward: Reward, change: Callable[[jax.Array], jax.Array]) -> Reward:
    def changed(params: Any, *inputs: Any) -> jax.Array | Applied:
        out = reward(params, *inputs)
        return out._replace(score=change(out.score)) if isinstance(out, Applied) else change(out)

    return changed


def _of_each(function: HostReward, change: Callable[[float], float]) -> HostReward:
    def changed(
        prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        scores = function(prompts=prompts, completions=completions, **columns)
        return [None if score is None else change(score) for score in scores]

    return changed


def _std(moments: Moments) -> jax.Array:
    return jnp.where(moments.variance > 0, jnp.sqrt(moments.variance), 1.0)


def _check_names(rewards: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    if not rewards or rewards.keys() != weights.keys():
        raise ValueError(f"weights {sorted(weights)} must name the rewards {sorted(rewards)}, at least one")
    for name, weight in weights.items():
        if not isinstance(weight, Tracer) and not math.isfinite(weight):
            raise ValueError(f"the weight of reward {name!r} is {weight}")


def _check_scale(mean: float, std: float) -> None:
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(f"a scale needs a finite mean and a std above 0, got mean={mean}, std={std}")


def _check_bounds(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"low={low} must be below high={high}")
