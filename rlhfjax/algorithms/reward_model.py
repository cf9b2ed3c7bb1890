"""A reward model from pairwise preferences (Bradley and Terry 1952; Christiano et al. 2017; Ziegler et al.
2019).

    loss = mean over pairs of -label * log sigmoid(d) - (1 - label) * log sigmoid(-d)
    d    = score_first - score_second

Every prompt has G scored completions and K pairs among them, so a completion is computed once however many
pairs it is in. Plain pairs are G = 2, K = 1, first = [0], second = [1], label = 1.

Metrics (means over the pairs that count):
    loss/total            nats, with centring
    loss/preference       nats, the Bradley-Terry part
    pair/accuracy         agreement with the label, a tie counts half; at most E max(p, 1 - p) under noise
    pair/margin           score of the preferred completion above the other, units of score
    score/mean, score/std of the completions in pairs
    batch/count           pairs
    optimizer/gradient_norm

Shapes: B prompts, G completions of each, K pairs of each.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.algorithms.algorithm import Algorithm, PyTree, State, Sums, gradient_step, initial_state
from rlhfjax.config import RewardModel as Config
from rlhfjax.ops import bradley_terry_loss, masked_mean, masked_sum, masked_variance


class Preference(NamedTuple):
    """Prompts with the pairs of their completions. A masked pair may hold anything."""

    inputs: PyTree  # what `evaluate` needs; leading axis B
    first: jax.Array  # int [B, K], or [K] for all prompts alike: index into the G completions
    second: jax.Array  # the same for the other of the pair
    label_BK: jax.Array  # float, probability that the first is preferred: 1, 0 or between
    mask_BK: jax.Array  # bool, True where the pair counts


# (params, inputs) -> float scores [B, G]
Evaluate = Callable[[PyTree, PyTree], jax.Array]


def loss(params: PyTree, batch: Preference, *, evaluate: Evaluate, config: Config) -> tuple[jax.Array, Sums]:
    """Summed preference loss over pairs, and sums for the metrics. Raises TypeError on an integer label."""
    batch = _with_pairs_per_prompt(batch)
    score_BG = evaluate(params, batch.inputs).astype(jnp.float32)
    if score_BG.ndim != 2 or score_BG.shape[0] != batch.label_BK.shape[0]:
        raise ValueError(
            f"evaluate must give scores [B, G], B = {batch.label_BK.shape[0]}; it gave shape {score_BG.shape}"
        )
    mask_BK = batch.mask_BK.astype(bool)
    # Replaced before any arithmetic: a NaN times the zero gradient of a masked pair would be NaN.
    first_BK = jnp.where(mask_BK, jnp.take_along_axis(score_BG, batch.first, axis=1), 0.0)
    second_BK = jnp.where(mask_BK, jnp.take_along_axis(score_BG, batch.second, axis=1), 0.0)
    label_BK = batch.label_BK.astype(jnp.float32)

    preference_BK = bradley_terry_loss(first_BK, second_BK, label=label_BK)
    total_BK = preference_BK + config.centring * jnp.square(first_BK + second_BK)
    margin_BK = first_BK - second_BK
    wins_BK = 0.5 * (1.0 + jnp.sign(margin_BK))
    per_pair = {
        "loss/total": total_BK,
        "loss/preference": preference_BK,
        "pair/accuracy": label_BK * wins_BK + (1.0 - label_BK) * (1.0 - wins_BK),
        "pair/margin": (2.0 * label_BK - 1.0) * margin_BK,
        "score/mean": 0.5 * (first_BK + second_BK),
        "score/mean_square": 0.5 * (jnp.square(first_BK) + jnp.square(second_BK)),
    }
    sums = {name: masked_sum(x, mask_BK) for name, x in per_pair.items()}
    return sums["loss/total"], sums | {"count": jnp.sum(mask_BK, dtype=jnp.float32)}


def make(
    evaluate: Evaluate,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: str | None = None,
) -> Algorithm:
    """Reward modelling as `Algorithm(init, update)` on `Preference`; see the module for the metrics."""

    def update(state: State, batch: Preference, key: jax.Array):
        del key
        params, opt_state, metrics = gradient_step(
            partial(loss, evaluate=evaluate, config=config),
            optimizer,
            state.params,
            state.opt_state,
            _with_pairs_per_prompt(batch),
            microbatches=config.microbatches,
            axis_name=axis_name,
        )
        variance = metrics.pop("score/mean_square") - jnp.square(metrics["score/mean"])
        metrics["score/std"] = jnp.sqrt(jnp.maximum(variance, 0.0))
        return State(params, opt_state, state.step + 1), metrics

    return Algorithm(partial(initial_state, optimizer=optimizer), update)


def normalisation(score: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """`(gain, bias)` such that gain * score + bias has mean 0 and standard deviation 1 over the given scores.

    Meant for the scores of the reference policy's own samples, so that a KL coefficient means the same for
    every reward model (Ziegler et al. 2019, 2.2). The deviation is the population's. Scores that are all
    alike get gain 1.

    Args:
      score: float, any shape.
      mask: bool, shape of score, True where it counts; None: all do.

    Returns:
      Two float32 scalars.
    """
    mask = jnp.ones(score.shape, bool) if mask is None else mask
    mean, std = masked_mean(score, mask), jnp.sqrt(masked_variance(score, mask))
    # Equal scores differ from their mean by rounding, which must not be blown up to deviation 1.
    gain = jnp.where(std > 1e-6 * (1.0 + jnp.abs(mean)), 1.0 / jnp.where(std > 0, std, 1.0), 1.0)
    return gain, -gain * mean


def _with_pairs_per_prompt(batch: Preference) -> Preference:
    """Gives the indices the shape [B, K] of the labels, so that all arrays can be cut along the batch."""
    shape = batch.label_BK.shape
    if not jnp.issubdtype(batch.label_BK.dtype, jnp.floating):
        raise TypeError(
            f"batch.label_BK must be a float probability, got {batch.label_BK.dtype}: cast it to float32"
        )
    if len(shape) != 2 or batch.mask_BK.shape != shape:
        raise ValueError(f"label_BK {shape} and mask_BK {batch.mask_BK.shape} must have one shape [B, K]")
    for name, index in (("first", batch.first), ("second", batch.second)):
        if index.shape not in (shape, shape[1:]):
            raise ValueError(f"batch.{name} must be [K] = {shape[1:]} or [B, K] = {shape}, got {index.shape}")
    first, second = jnp.broadcast_to(batch.first, shape), jnp.broadcast_to(batch.second, shape)
    return batch._replace(first=first, second=second)
