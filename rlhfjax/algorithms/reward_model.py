"""A reward model from preferences (Bradley and Terry 1952; Christiano et al. 2017; Ziegler et al. 2019).

What was judged is told by the type of the batch; the algorithm is one.

`Preference`: which of two is better. With d = score_first - score_second, margin m (0 where none is given),

    loss = mean over pairs of -label * log sigmoid(d - m) - (1 - label) * log sigmoid(-d - m)

    (margin: Llama 2, arXiv 2307.09288). Every prompt has G scored completions and K pairs among them, so a
    completion is computed once however many pairs it is in. Plain pairs are G = 2, K = 1, first = [0],
    second = [1], label = 1.

`Ranking`: an order of k completions, or of their top places only (Plackett 1975, Luce 1959),

    loss = mean over choices of -log softmax(scores of those not yet placed)[the one placed]

    Best of four (Ziegler et al. 2019, arXiv 1909.08593) is k = 4 and one place: see `best_choice`.

`Steps`: whether each step of a solution is right (process rewards, arXiv 2305.20050),

    loss = mean over steps of -label * log sigmoid(score) - (1 - label) * log sigmoid(-score)

    where `evaluate` gives a score at every token, and a label stands at the last token of a step.

Label smoothing e takes a label for wrong with probability e: a pair's or a step's label becomes
(1 - e) label + e (1 - label), and a choice falls on each of the others with probability e / (their number).

Metrics (means over the pairs, choices or steps that count):
    loss/total            nats, with centring
    loss/preference       nats, the likelihood alone
    pair/accuracy         agreement with the label, a tie counts half; at most E max(p, 1 - p) under noise
    pair/margin           score of the preferred completion above the other, units of score
    choice/accuracy       the chosen one has the highest score of those left; tied ones share
    choice/margin         score of the chosen one above the best of the others left
    step/accuracy         agreement of the score's sign with the label, a tie counts half
    step/label            mean label: what share of the steps is right
    score/mean, score/std of the completions in pairs, of those left in each choice, or of the steps
    batch/count           pairs, choices or steps
    batch/invalid         those left out as bad input: a label outside 0..1, a margin below 0, a pair of
                          completions that are not there, an order that is not one (one a ranking)
    optimizer/gradient_norm, optimizer/refused

Shapes: M members of an ensemble, B prompts, G completions of each, K pairs of each, C tokens of a completion.

>>> import jax, optax
>>> from rlhfjax.config import RewardModel
>>> feature = jax.random.normal(jax.random.key(0), (8, 2, 3))  # B prompts, 2 completions, 3 features
>>> pairs = Preference(feature, jnp.array([0]), jnp.array([1]), jnp.ones((8, 1)), jnp.ones((8, 1), bool))
>>> algorithm = make(lambda params, feature: feature @ params, optax.sgd(1.0), RewardModel(centring=0.01))
>>> state, metrics = jax.jit(algorithm.update)(algorithm.init(jnp.zeros(3)), pairs, jax.random.key(1))
>>> float(metrics["pair/accuracy"])  # of the parameters before the step: all ties
0.5
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.algorithms.algorithm import Algorithm, PyTree, State, Sums, gradient_step, initial_state
from rlhfjax.config import RewardModel as Config
from rlhfjax.ops import (
    bradley_terry_loss,
    masked_mean,
    masked_sum,
    masked_variance,
    plackett_luce_loss,
    smoothed_label,
)


class Preference(NamedTuple):
    """Prompts with the pairs of their completions. A masked pair may hold anything."""

    inputs: PyTree  # what `evaluate` needs; leading axis B
    first: jax.Array  # int [B, K], or [K] for all prompts alike: index into the G completions
    second: jax.Array  # the same for the other of the pair
    label_BK: jax.Array  # float, probability that the first is preferred: 1, 0 or between
    mask_BK: jax.Array  # bool, True where the pair counts
    margin_BK: jax.Array | None = None  # float >= 0, lead asked of the preferred, units of score; None: 0


class Ranking(NamedTuple):
    """Prompts with their completions in order of preference. What is masked may hold anything."""

    inputs: PyTree  # what `evaluate` needs; leading axis B
    order_BG: jax.Array  # int, the completions from the best to the worst: a permutation of 0..G-1
    places: jax.Array | int | None = None  # int [B] or one for all: top places that were judged; None: all
    mask_BG: jax.Array | None = None  # bool, by completion (not by place): True where it took part; None: all


class Steps(NamedTuple):
    """Completions whose steps were judged. What is masked may hold anything."""

    inputs: PyTree  # what `evaluate` needs; leading axis B
    label_BGC: jax.Array  # float, probability that the step that ends at this token is right
    mask_BGC: jax.Array  # bool, True where a label stands


Batch = Preference | Ranking | Steps

# (params, inputs) -> float scores [B, G], for Steps [B, G, C]
Evaluate = Callable[[PyTree, PyTree], jax.Array]


def loss(params: PyTree, batch: Batch, *, evaluate: Evaluate, config: Config) -> tuple[jax.Array, Sums]:
    """Summed negative log-likelihood over pairs, choices or steps, and sums for the metrics.

    Raises TypeError on an integer label, ValueError on shapes that do not fit.
    """
    batch = _per_prompt(batch)
    score = evaluate(params, batch.inputs).astype(jnp.float32)
    if isinstance(batch, Preference):
        items, mask, invalid = _pairs(batch, score, config)
    elif isinstance(batch, Ranking):
        items, mask, invalid = _choices(batch, score, config)
    else:
        items, mask, invalid = _steps(batch, score, config)
    sums = {name: masked_sum(x, mask) for name, x in items.items()}
    sums |= {"count": jnp.sum(mask, dtype=jnp.float32), "batch/invalid": jnp.sum(invalid, dtype=jnp.float32)}
    return sums["loss/total"], sums


def make(
    evaluate: Evaluate,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: str | None = None,
) -> Algorithm:
    """Reward modelling as `Algorithm(init, update)` on any of the batches; see the module for the metrics."""

    def update(state: State, batch: Batch, key: jax.Array):
        del key
        params, opt_state, metrics = gradient_step(
            partial(loss, evaluate=evaluate, config=config),
            optimizer,
            state.params,
            state.opt_state,
            _per_prompt(batch),
            microbatches=config.microbatches,
            axis_name=axis_name,
        )
        variance = metrics.pop("score/mean_square") - jnp.square(metrics["score/mean"])
        metrics["score/std"] = jnp.sqrt(jnp.maximum(variance, 0.0))
        # The step made a mean of it; rounded, it is the number again.
        metrics["batch/invalid"] = jnp.round(
            metrics["batch/invalid"] * jnp.maximum(metrics["batch/count"], 1.0)
        )
        return State(params, opt_state, state.step + 1), metrics

    return Algorithm(partial(initial_state, optimizer=optimizer), update)


def ensemble(algorithm: Algorithm, members: int, *, batch_axes: PyTree = 0) -> Algorithm:
    """M reward models trained as one program: `algorithm` under `vmap`, each with its own params and data.

    Members that start from different heads and see the pairs in different order agree where the data decide
    and differ where they do not (arXiv 2310.02743; `rewards.ensemble_reward` makes one reward of them).

    Args:
      algorithm: of one member, e.g. `make(...)`.
      members: M >= 1.
      batch_axes: which leaves of the batch have a leading axis M, as `in_axes` of `jax.vmap`: 0 all, None none
        (one batch for all), or e.g. `Preference(None, None, None, None, 0)` for inputs and labels in common
        and pairs of each member's own.

    Returns:
      init(params), params with a leading axis M, -> state with it. update(state, batch, key) -> (state,
      metrics): those of the algorithm as means over the members, and "ensemble/loss_std", the deviation of
      their losses. Raises ValueError where the leading axis of the params is not M.
    """
    if members < 1:
        raise ValueError(f"an ensemble needs at least one member, members is {members}")

    def init(params: PyTree):
        for path, x in jax.tree_util.tree_leaves_with_path(params):
            if jnp.shape(x)[:1] != (members,):
                name = jax.tree_util.keystr(path)
                raise ValueError(
                    f"params{name} has shape {jnp.shape(x)}; its leading axis must be the {members} members"
                )
        return jax.vmap(algorithm.init)(params)

    def update(state, batch: PyTree, key: jax.Array):
        keys = jax.random.split(key, members)
        state, metrics = jax.vmap(algorithm.update, (0, batch_axes, 0))(state, batch, keys)
        spread = jnp.std(metrics["loss/total"])
        return state, {name: jnp.mean(x) for name, x in metrics.items()} | {"ensemble/loss_std": spread}

    return Algorithm(init, update)


def best_choice(inputs: PyTree, best_B: jax.Array, samples: int, mask_BG: jax.Array | None = None) -> Ranking:
    """The ranking in which only the best of `samples` completions was chosen (best_B, int): one place."""
    place_G = jnp.arange(samples)
    # The chosen one first; the others may come in any order.
    order_BG = jnp.argsort(jnp.where(place_G[None] == best_B[:, None], -1, place_G[None]), axis=1)
    outside_B = (best_B < 0) | (best_B >= samples)
    return Ranking(inputs, jnp.where(outside_B[:, None], -1, order_BG), 1, mask_BG)


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


# Each of the three gives: quantities per item, which items count, and which are bad input.


def _pairs(batch: Preference, score_BG: jax.Array, config: Config):
    _check_scores(score_BG, (batch.label_BK.shape[0],), "[B, G]", 2)
    samples = score_BG.shape[1]
    given_BK = batch.mask_BK.astype(bool)
    valid_BK = _is_probability(batch.label_BK)
    for index_BK in (batch.first, batch.second):
        valid_BK &= (index_BK >= 0) & (index_BK < samples)
    if batch.margin_BK is not None:
        valid_BK &= batch.margin_BK >= 0.0
    mask_BK = given_BK & valid_BK
    # Replaced before any arithmetic: a NaN times the zero gradient of a masked pair would be NaN.
    first_BK = jnp.where(mask_BK, jnp.take_along_axis(score_BG, batch.first, axis=1), 0.0)
    second_BK = jnp.where(mask_BK, jnp.take_along_axis(score_BG, batch.second, axis=1), 0.0)
    label_BK = jnp.where(mask_BK, batch.label_BK.astype(jnp.float32), 0.5)
    lead_BK = 0.0 if batch.margin_BK is None else jnp.where(mask_BK, batch.margin_BK, 0.0)

    smoothed_BK = smoothed_label(label_BK, config.label_smoothing)
    preference_BK = bradley_terry_loss(first_BK, second_BK, label=smoothed_BK, margin=lead_BK)
    margin_BK = first_BK - second_BK
    items = {
        "loss/total": preference_BK + config.centring * jnp.square(first_BK + second_BK),
        "loss/preference": preference_BK,
        "pair/accuracy": _agreement(margin_BK, label_BK),
        "pair/margin": (2.0 * label_BK - 1.0) * margin_BK,
        "score/mean": 0.5 * (first_BK + second_BK),
        "score/mean_square": 0.5 * (jnp.square(first_BK) + jnp.square(second_BK)),
    }
    return items, mask_BK, given_BK & ~valid_BK


def _choices(batch: Ranking, score_BG: jax.Array, config: Config):
    _check_scores(score_BG, batch.order_BG.shape, "[B, G]", 2)
    samples = score_BG.shape[1]
    everyone_BG = jnp.broadcast_to(jnp.arange(samples)[None], score_BG.shape)
    valid_B1 = jnp.all(jnp.sort(batch.order_BG, axis=1) == everyone_BG, axis=1, keepdims=True)
    order_BG = jnp.where(valid_B1, batch.order_BG, everyone_BG)
    took_part_BG = valid_B1 if batch.mask_BG is None else valid_B1 & batch.mask_BG.astype(bool)
    part_BG = jnp.take_along_axis(jnp.broadcast_to(took_part_BG, score_BG.shape), order_BG, axis=1)
    ranked_BG = jnp.where(part_BG, jnp.take_along_axis(score_BG, order_BG, axis=1), 0.0)
    preference_BG, mask_BG = plackett_luce_loss(
        ranked_BG, mask=part_BG, places=batch.places, label_smoothing=config.label_smoothing
    )
    # Over those left at each place: [b, place, q].
    left = jnp.triu(jnp.ones((samples, samples), bool))[None] & part_BG[:, None, :]
    number = jnp.maximum(jnp.sum(left, axis=2), 1)
    score = jnp.broadcast_to(ranked_BG[:, None, :], left.shape)
    mean_BG = jnp.sum(jnp.where(left, score, 0.0), axis=2) / number
    best_of_others = jnp.max(jnp.where(left & ~jnp.eye(samples, dtype=bool)[None], score, -jnp.inf), axis=2)
    tied = jnp.sum(left & (score == ranked_BG[:, :, None]), axis=2)
    items = {
        "loss/total": preference_BG + config.centring * jnp.square(2.0 * mean_BG),
        "loss/preference": preference_BG,
        "choice/accuracy": (ranked_BG >= best_of_others) / jnp.maximum(tied, 1),
        "choice/margin": ranked_BG - best_of_others,
        "score/mean": mean_BG,
        "score/mean_square": jnp.sum(jnp.where(left, jnp.square(score), 0.0), axis=2) / number,
    }
    return items, mask_BG, ~valid_B1


def _steps(batch: Steps, score_BGC: jax.Array, config: Config):
    _check_scores(score_BGC, batch.label_BGC.shape, "[B, G, C]", 3)
    given_BGC = batch.mask_BGC.astype(bool)
    valid_BGC = _is_probability(batch.label_BGC)
    mask_BGC = given_BGC & valid_BGC
    score_BGC = jnp.where(mask_BGC, score_BGC, 0.0)
    label_BGC = jnp.where(mask_BGC, batch.label_BGC.astype(jnp.float32), 0.5)
    # sigmoid(score) is the chance of a pair of which the other has score 0.
    zero, smoothed_BGC = jnp.zeros_like(score_BGC), smoothed_label(label_BGC, config.label_smoothing)
    preference_BGC = bradley_terry_loss(score_BGC, zero, label=smoothed_BGC)
    items = {
        "loss/total": preference_BGC + config.centring * jnp.square(score_BGC),
        "loss/preference": preference_BGC,
        "step/accuracy": _agreement(score_BGC, label_BGC),
        "step/label": label_BGC,
        "score/mean": score_BGC,
        "score/mean_square": jnp.square(score_BGC),
    }
    return items, mask_BGC, given_BGC & ~valid_BGC


def _agreement(margin: jax.Array, label: jax.Array) -> jax.Array:
    """Probability that the sign of the margin is the label's: a tie counts half."""
    wins = 0.5 * (1.0 + jnp.sign(margin))
    return label * wins + (1.0 - label) * (1.0 - wins)


def _is_probability(label: jax.Array) -> jax.Array:
    return (label >= 0.0) & (label <= 1.0)  # False for NaN


def _per_prompt(batch: Batch) -> Batch:
    """The batch with every array cut along the batch: indices and masks that were given once, or not at all."""
    if isinstance(batch, Ranking):
        return _ranking_per_prompt(batch)
    if not isinstance(batch, (Preference, Steps)):
        raise TypeError(f"a batch is a Preference, a Ranking or Steps, not {type(batch).__name__}")
    paired = isinstance(batch, Preference)
    name, label, mask = ("BK", batch[3], batch[4]) if paired else ("BGC", batch[1], batch[2])
    axes = ", ".join(name)
    if not jnp.issubdtype(label.dtype, jnp.floating):
        raise TypeError(
            f"batch.label_{name} must be a float probability, got {label.dtype}: cast it to float32"
        )
    if label.ndim != len(name) or mask.shape != label.shape:
        raise ValueError(
            f"label_{name} {label.shape} and mask_{name} {mask.shape} must have one shape [{axes}]"
        )
    return _pairs_per_prompt(batch) if isinstance(batch, Preference) else batch


def _pairs_per_prompt(batch: Preference) -> Preference:
    shape = batch.label_BK.shape
    for name, index in (("first", batch.first), ("second", batch.second)):
        if index.shape not in (shape, shape[1:]):
            raise ValueError(f"batch.{name} must be [K] = {shape[1:]} or [B, K] = {shape}, got {index.shape}")
    if batch.margin_BK is not None and batch.margin_BK.shape != shape:
        raise ValueError(f"batch.margin_BK must be [B, K] = {shape}, got {batch.margin_BK.shape}")
    first, second = jnp.broadcast_to(batch.first, shape), jnp.broadcast_to(batch.second, shape)
    return batch._replace(first=first, second=second)


def _ranking_per_prompt(batch: Ranking) -> Ranking:
    order_BG, mask_BG = batch.order_BG, batch.mask_BG
    if not jnp.issubdtype(order_BG.dtype, jnp.integer) or order_BG.ndim != 2:
        raise TypeError(
            f"batch.order_BG must be integer [B, G], got {order_BG.dtype} {order_BG.shape}: best first"
        )
    if mask_BG is not None and mask_BG.shape != order_BG.shape:
        raise ValueError(f"batch.mask_BG {mask_BG.shape} must have order_BG's shape {order_BG.shape}")
    if batch.places is None:
        return batch
    places = jnp.asarray(batch.places)
    if places.shape not in ((), order_BG.shape[:1]):
        raise ValueError(f"batch.places must be [B] = {order_BG.shape[:1]} or a scalar, got {places.shape}")
    return batch._replace(places=jnp.broadcast_to(places, order_BG.shape[:1]))


def _check_scores(score: jax.Array, leading: tuple[int, ...], axes: str, rank: int) -> None:
    """Refuses scores of the wrong rank, or whose leading axes are not those of the batch."""
    if score.ndim != rank or score.shape[: len(leading)] != leading:
        sizes = ", ".join(f"{a} = {n}" for a, n in zip(axes.strip("[]").split(", "), leading, strict=False))
        raise ValueError(f"evaluate must give scores {axes}, {sizes}; it gave shape {score.shape}")
