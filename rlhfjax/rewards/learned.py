"""Rewards from learned models: ensembles of them, and models that judge every step.

A combination takes the scores of all members, float [M, ...], to one score [...]:

    ensemble_mean         mean
    ensemble_worst        min                           worst-case optimisation, arXiv 2310.02743
    mean_minus_variance   mean - penalty * variance     uncertainty-weighted optimisation, arXiv 2310.02743
    mean_minus_std        mean - penalty * std          the same in units of score

Members must be on one scale before they are combined: normalise each on the reference's own samples
(`reward_model.normalisation`), or the one with the widest scores decides.

Shapes: M members, B prompts, G completions of each, C tokens of a completion.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax.ops import masked_sum

__all__ = [
    "ensemble_disagreement",
    "ensemble_mean",
    "ensemble_reward",
    "ensemble_scores",
    "ensemble_worst",
    "mean_minus_std",
    "mean_minus_variance",
    "solution_score",
    "step_ends",
    "step_reward",
    "worst_step_score",
]

Combine = Callable[[jax.Array], jax.Array]


def ensemble_scores(evaluate: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any], jax.Array]:
    """scores(params, inputs) -> [M, ...] of a reward model `evaluate` whose params have a leading axis M."""
    return jax.vmap(evaluate, (0, None))


def ensemble_reward(
    evaluate: Callable[[Any, Any], jax.Array], combine: Combine | None = None
) -> Callable[[Any, Any], jax.Array]:
    """reward(params, inputs) -> [...] of an ensemble, in place of one model's `evaluate`.

    combine: one of the combinations, `partial(mean_minus_std, penalty=0.5)`, or any function of scores
    [M, ...]; None: the mean.
    """
    combine = ensemble_mean if combine is None else combine

    def reward(params: Any, inputs: Any) -> jax.Array:
        return combine(ensemble_scores(evaluate)(params, inputs))

    return reward


def ensemble_mean(score: jax.Array) -> jax.Array:
    """Mean of the members, [...] of [M, ...]."""
    return jnp.mean(_members(score), axis=0)


def ensemble_worst(score: jax.Array) -> jax.Array:
    """The least score of any member: what one member doubts is not rewarded (arXiv 2310.02743)."""
    return jnp.min(_members(score), axis=0)


def mean_minus_variance(score: jax.Array, *, penalty: float | jax.Array) -> jax.Array:
    """`mean - penalty * variance`, the population's over the members (arXiv 2310.02743); penalty in 1 / score."""
    return jnp.mean(_members(score), axis=0) - penalty * jnp.var(_members(score), axis=0)


def mean_minus_std(score: jax.Array, *, penalty: float | jax.Array) -> jax.Array:
    """`mean - penalty * std`: a lower bound, penalty in standard deviations of the members."""
    return jnp.mean(_members(score), axis=0) - penalty * ensemble_disagreement(score)


def ensemble_disagreement(score: jax.Array) -> jax.Array:
    """Standard deviation over the members (the population's), [...] of [M, ...]; 0 for one member."""
    return jnp.std(_members(score), axis=0)


def step_ends(token: jax.Array, mask: jax.Array, separators: tuple[int, ...]) -> jax.Array:
    """Where a step ends: at every token of `separators`, and at the last one of the completion, bool [..., C].

    Args:
      token: int [..., C].
      mask: bool [..., C], a run of True from the first position: the completion.
      separators: token ids, for example that of a line break. Of two in a row the second ends a step as well.
    """
    if token.shape != mask.shape:
        raise ValueError(f"token {token.shape} and mask {mask.shape} must have one shape [..., C]")
    mask = mask.astype(bool)
    after = jnp.concatenate([mask[..., 1:], jnp.zeros_like(mask[..., :1])], axis=-1)
    separator = jnp.any(jnp.stack([token == s for s in separators]), axis=0) if separators else False
    return mask & (~after | separator)


def step_reward(
    logit: jax.Array, mask: jax.Array, *, of: Callable[[jax.Array], jax.Array] = jax.nn.log_sigmoid
) -> jax.Array:
    """The reward of every action from a model of steps: `of(logit)` where a step ends, 0 elsewhere.

    With the default, log sigmoid, the rewards of a completion add up (discount 1) to `solution_score`: as none
    is above 0, few steps pay. With `jax.nn.sigmoid` none is below 0, and many steps pay. Neither is neutral:
    watch the number of steps.

    Args:
      logit: float [..., C], what the model gives at every token.
      mask: bool [..., C], True at the last token of a step; elsewhere the logit may be anything, also NaN.

    Returns:
      float32 [..., C], the reward of PPO's rollout.
    """
    logit, mask = _steps(logit, mask)
    return jnp.where(mask, of(logit), 0.0).astype(jnp.float32)


def solution_score(logit: jax.Array, mask: jax.Array) -> jax.Array:
    """Log-probability that every step is right, were they independent: sum of log sigmoid over steps, [...].

    The product of the steps' probabilities ranks solutions in arXiv 2305.20050. Arguments as above; nats; 0
    where there is no step.
    """
    logit, mask = _steps(logit, mask)
    return masked_sum(jax.nn.log_sigmoid(logit), mask, axis=-1)


def worst_step_score(logit: jax.Array, mask: jax.Array) -> jax.Array:
    """Log-probability that the doubtfullest step is right, [...]: the least instead of the product."""
    logit, mask = _steps(logit, mask)
    return jnp.min(jnp.where(mask, jax.nn.log_sigmoid(logit), 0.0), axis=-1)  # none is above 0


def _members(score: jax.Array) -> jax.Array:
    if score.ndim < 1 or not jnp.issubdtype(score.dtype, jnp.floating):
        raise TypeError(f"scores of an ensemble must be float [M, ...], got {score.dtype} {score.shape}")
    return score.astype(jnp.float32)


def _steps(logit: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    if logit.shape != mask.shape:
        raise ValueError(f"logit {logit.shape} and mask {mask.shape} must have one shape [..., C]")
    if not jnp.issubdtype(logit.dtype, jnp.floating):
        raise TypeError(f"logit must be float, got {logit.dtype}")
    mask = mask.astype(bool)
    return jnp.where(mask, logit.astype(jnp.float32), 0.0), mask
