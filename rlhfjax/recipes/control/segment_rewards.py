"""Rewards learnt from compared segments: the ensemble of Christiano et al. 2017 (arXiv 1706.03741, section 2.2).

Each member gives a reward r(s, a); a segment's score is the sum over its steps. The labeller is taken to prefer

    P(first) = (1 - error) sigmoid(score_first - score_second) + error / 2

and a label m (1, 0, or 1/2 for "equal") costs -m log P(first) - (1 - m) log(1 - P(first)). Every member learns from a
bootstrap sample of its own: a label counts for it k times, k drawn from a Poisson distribution of mean 1 when the label
comes in (Oza and Russell 2001: labels come one by one, and in the limit this is drawing with replacement). Those that
count 0 times, 1 in e, are held out from the member, and tell how much it overfits: its coefficient of L2 rises where
the held-out loss exceeds 1.5 times that of training and falls below 1.1, as in the paper.

Shapes: M members, N pairs that there is room for, P pairs of a minibatch, L steps of a segment, A actions.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhfjax.algorithms import make_optimizer
from rlhfjax.algorithms.algorithm import where_finite
from rlhfjax.config import SegmentReward as Config
from rlhfjax.environments import Environment
from rlhfjax.networks import mlp
from rlhfjax.ops import bradley_terry_probability, masked_sum
from rlhfjax.recipes.control.segments import Segments
from rlhfjax.recipes.control.training import observations
from rlhfjax.rewards import ensemble_mean, ensemble_scores

PyTree = Any
Metrics = dict[str, jax.Array]

# P(k <= 0), P(k <= 1), ... of a Poisson variable of mean 1, until float32 cannot tell it from 1.
_POISSON = np.cumsum(np.exp(-1.0) / np.cumprod([1, *range(1, 11)])).astype(np.float32)


class Labels(NamedTuple):
    """Labelled pairs; the first `count` of N places are filled."""

    first: Segments  # [N, L]
    second: Segments  # [N, L]
    label_N: jax.Array  # float32, 1 the first is preferred, 0 the second, 0.5 they are equal
    weight_NM: jax.Array  # int32, times that the label counts for each member; 0: held out
    count: jax.Array  # int32 []


class Ensemble(NamedTuple):
    """State of the members, all with a leading axis M."""

    params: PyTree
    opt_state: PyTree
    l2_M: jax.Array  # float32, coefficient of the squares of the kernels
    gain_M: jax.Array  # float32, normalised reward = gain * reward + bias
    bias_M: jax.Array


class RewardLearner(NamedTuple):
    """The ensemble as pure functions. Keys are consumed.

    init(key) -> Ensemble
    fit(ensemble, labels, key) -> (ensemble, metrics)
        `updates` gradient steps; no label: nothing changes. Metrics, means over steps and members: reward/loss,
        reward/heldout_loss (nats a label), reward/l2.
    normalise(ensemble, observation, action) -> ensemble
        Its gains and biases those of these steps, [...].
    reward(ensemble, observation [..., *shape], action int32 [...]) -> float32 [...]
        Mean of the members' normalised rewards.
    scores(ensemble, segments [..., L]) -> float32 [M, ...]
        Sums of the members' rewards, not normalised: what a comparison is predicted from.
    """

    init: Any
    fit: Any
    normalise: Any
    reward: Any
    scores: Any


def preference_loss(
    score_first: jax.Array, score_second: jax.Array, label: jax.Array, *, error: float | jax.Array
) -> jax.Array:
    """Negative log-likelihood of labels in nats, elementwise, of the model above; with error 0, Bradley and Terry's.

    Args:
      score_first, score_second: float, sums of rewards, of equal shapes.
      label: float of that shape, in [0, 1].
      error: share of the labels taken to be random, in [0, 1).
    """
    difference = score_first - score_second
    coin, judged = jnp.log(0.5 * jnp.asarray(error, jnp.float32)), jnp.log1p(-jnp.asarray(error, jnp.float32))

    def logp(d: jax.Array) -> jax.Array:
        return jnp.logaddexp(jnp.broadcast_to(coin, d.shape), judged + jax.nn.log_sigmoid(d))

    return -label * logp(difference) - (1.0 - label) * logp(-difference)


def disagreement(score_first: jax.Array, score_second: jax.Array) -> jax.Array:
    """Variance over the members of the predicted P(first), [...] of scores [M, ...]; at most 1/4."""
    return jnp.var(bradley_terry_probability(score_first, score_second), axis=0)


def bootstrap_weights(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """How often each label counts: int32, independent, Poisson of mean 1."""
    drawn = jax.random.uniform(key, (*shape, 1))
    edges = jnp.asarray(_POISSON).reshape((1,) * len(shape) + (-1,))
    return jnp.sum(drawn >= edges, axis=-1, dtype=jnp.int32)


def empty_labels(count: int, length: int, members: int, observation: jax.Array) -> Labels:
    """No labels yet, and room for `count`; `observation` [..., *shape] is any of their steps', for its type."""

    def segments() -> Segments:
        shape = (count, length, *observation.shape)
        steps = shape[:2]
        return Segments(
            jnp.zeros(shape, observation.dtype), jnp.zeros(steps, jnp.int32), jnp.zeros(steps, bool)
        )

    weight_NM = jnp.zeros((count, members), jnp.int32)
    return Labels(segments(), segments(), jnp.zeros(count), weight_NM, jnp.int32(0))


def add_labels(labels: Labels, new: Labels) -> Labels:
    """The labels with the first `new.count` of `new` behind them; what there is no room for is left out."""
    room, offered = labels.label_N.shape[0], new.label_N.shape[0]
    taken = jnp.arange(offered) < new.count
    place = jnp.where(taken, labels.count + jnp.arange(offered), room)
    total = jnp.minimum(labels.count + new.count, room)

    def put(old: jax.Array, x: jax.Array) -> jax.Array:
        return old.at[place].set(x, mode="drop")

    return jax.tree.map(put, labels._replace(count=None), new._replace(count=None))._replace(count=total)


def reward_learner(config: Config, env: Environment) -> RewardLearner:
    """An ensemble for a world of numbered actions.

    Float fields of the config may be traced. Raises ValueError where a setting does not fit.
    """
    for name in ("members", "updates", "batch"):
        if getattr(config, name) < 1:
            raise ValueError(f"reward.{name}={getattr(config, name)} must be at least 1")
    shape, encode = observations(env)
    network = mlp(config.network, shape, env.num_actions or 0)
    shape_of_one = env.observation_shape or ()
    optimizer = make_optimizer(config.optimizer, config.updates)

    def step_reward(params: PyTree, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        observation, action = inputs
        reward_A = network.apply(params, encode(observation))
        return jnp.take_along_axis(reward_A, action[..., None], axis=-1)[..., 0]

    def score(params: PyTree, segments: Segments) -> jax.Array:
        # Padding is replaced before any arithmetic: a NaN times the zero gradient of a masked step would be NaN.
        mask = segments.mask.reshape(*segments.mask.shape, *(1,) * len(shape_of_one))
        observation = jnp.where(mask, segments.observation, jnp.zeros_like(segments.observation))
        action = jnp.where(segments.mask, segments.action, 0)
        return masked_sum(step_reward(params, (observation, action)), segments.mask, axis=-1)

    def loss(params: PyTree, l2: jax.Array, batch: Labels, weight_P: jax.Array):
        """Of one member; and its losses, trained on and held out, each as a sum and the sum of weights."""
        loss_P = preference_loss(
            score(params, batch.first), score(params, batch.second), batch.label_N, error=config.error
        )
        weight_P, held_P = weight_P.astype(jnp.float32), (weight_P == 0).astype(jnp.float32)
        fitted, weight = jnp.sum(weight_P * loss_P), jnp.sum(weight_P)
        penalty = l2 * sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params) if x.ndim > 1)
        sums = jnp.stack([fitted, weight, jnp.sum(held_P * loss_P), jnp.sum(held_P)])
        return fitted / jnp.maximum(weight, 1.0) + penalty, sums

    def step(params: PyTree, opt_state: PyTree, l2: jax.Array, batch: Labels, weight_P: jax.Array):
        slope, sums = jax.grad(loss, has_aux=True)(params, l2, batch, weight_P)
        updates, new_opt_state = optimizer.update(slope, opt_state, params)
        learnt = optax.apply_updates(params, updates), new_opt_state
        return *where_finite(jnp.isfinite(optax.global_norm(slope)), learnt, (params, opt_state)), sums

    def init(key: jax.Array) -> Ensemble:
        params = jax.vmap(network.init)(jax.random.split(key, config.members))
        every = jnp.ones(config.members, jnp.float32)
        return Ensemble(params, jax.vmap(optimizer.init)(params), config.l2 * every, every, 0.0 * every)

    def fit(ensemble: Ensemble, labels: Labels, key: jax.Array) -> tuple[Ensemble, Metrics]:
        index_UP = jax.random.randint(key, (config.updates, config.batch), 0, jnp.maximum(labels.count, 1))

        def one(carry: tuple[PyTree, PyTree], index_P: jax.Array):
            batch = jax.tree.map(lambda x: x[index_P], labels._replace(count=None))
            members = jax.vmap(step, in_axes=(0, 0, 0, None, 1))
            params, opt_state, sums = members(*carry, ensemble.l2_M, batch, batch.weight_NM)
            return (params, opt_state), sums

        learnt, sums = jax.lax.scan(one, (ensemble.params, ensemble.opt_state), index_UP)
        fitted_M, weight_M, held_M, held_weight_M = jnp.sum(sums, axis=0).T
        train_M = fitted_M / jnp.maximum(weight_M, 1.0)
        heldout_M = held_M / jnp.maximum(held_weight_M, 1.0)
        known_M = (weight_M > 0) & (held_weight_M > 0)
        l2_M = jnp.where(known_M, adapted_l2(ensemble.l2_M, train_M, heldout_M, config), ensemble.l2_M)
        fitted = ensemble._replace(params=learnt[0], opt_state=learnt[1], l2_M=l2_M)
        fitted = jax.tree.map(partial(jnp.where, labels.count > 0), fitted, ensemble)
        some = (labels.count > 0).astype(jnp.float32)
        return fitted, {
            "reward/loss": some * jnp.mean(train_M),
            "reward/heldout_loss": some * jnp.mean(heldout_M),
            "reward/l2": jnp.mean(fitted.l2_M),
        }

    def rewards(ensemble: Ensemble, observation: jax.Array, action: jax.Array) -> jax.Array:
        return ensemble_scores(step_reward)(ensemble.params, (observation, action))

    def normalise(ensemble: Ensemble, observation: jax.Array, action: jax.Array) -> Ensemble:
        reward = rewards(ensemble, observation, action)
        gain_M, bias_M = jax.vmap(partial(normaliser, centred=config.centred))(reward)
        return ensemble._replace(gain_M=gain_M, bias_M=bias_M)

    def reward(ensemble: Ensemble, observation: jax.Array, action: jax.Array) -> jax.Array:
        found = rewards(ensemble, observation, action)
        gain, bias = (x.reshape(-1, *(1,) * (found.ndim - 1)) for x in (ensemble.gain_M, ensemble.bias_M))
        return ensemble_mean(gain * found + bias)

    def scores(ensemble: Ensemble, segments: Segments) -> jax.Array:
        return ensemble_scores(score)(ensemble.params, segments)

    return RewardLearner(init, fit, normalise, reward, scores)


def adapted_l2(l2: jax.Array, train_loss: jax.Array, heldout_loss: jax.Array, config: Config) -> jax.Array:
    """The coefficient for the next round, elementwise; it stays within 1e-8 and 1, and 0 stays 0."""
    ratio = heldout_loss / jnp.maximum(train_loss, 1e-8)
    factor = jnp.where(
        ratio > config.overfit_high,
        config.l2_factor,
        jnp.where(ratio < config.overfit_low, 1.0 / config.l2_factor, 1.0),
    )
    return jnp.where(l2 > 0, jnp.clip(l2 * factor, 1e-8, 1.0), 0.0)


def normaliser(reward: jax.Array, *, centred: bool) -> tuple[jax.Array, jax.Array]:
    """(gain, bias) by which gain * reward + bias has mean 0 and deviation 1 over these steps; not centred: mean square
    1, and bias 0. Rewards that are all 0, centred all alike, get gain 1."""
    mean = jnp.mean(reward) if centred else jnp.float32(0)
    size = jnp.sqrt(jnp.mean(jnp.square(reward - mean)))
    # Equal rewards differ from their mean by rounding, which must not be blown up.
    gain = jnp.where(size > 1e-6 * (1.0 + jnp.abs(mean)), 1.0 / jnp.where(size > 0, size, 1.0), 1.0)
    return gain, -gain * mean
