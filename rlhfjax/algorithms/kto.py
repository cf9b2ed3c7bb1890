"""Preferences without pairs: completions judged good or bad one by one. Kahneman-Tversky optimisation (KTO,
arXiv 2402.01306) and binary classifier optimisation (BCO, arXiv 2404.04656).

    log_ratio = sum over a completion's tokens of logp - logp_ref
    kto       sigmoid(-d) where good, sigmoid(d) where bad, each with its weight; d = beta (log_ratio - z)
              z = max(0, mean log_ratio of completions set against prompts that they do not answer): an
              estimate of KL(pi || pi_ref) over the whole batch, made before the step, without a gradient
    bco       -log sigmoid(d) where good, -log sigmoid(-d) where bad; d = beta log_ratio - shift
              shift = moving average over updates of the midpoint between the mean implicit rewards of the
              good and of the bad; an update uses the shift of those before it

With `reference_point="zero"` kto is the unpaired form of APO-zero (arXiv 2408.06266). BCO's density ratios,
which mend prompts that differ between the good and the bad, come as `weight_BG` from a classifier of the
caller's.

Metrics (means over the completions that count; a class without any gives 0):
    loss/total
    reward/desirable, reward/undesirable    beta * log_ratio: the implicit reward, by class
    reward/margin               their difference
    completion/accuracy         how often the sign of d agrees with the label, 0 counts half
    completion/desirable        share of good completions (mean label)
    logp/desirable, logp/undesirable    nats per completion
    objective/reference_point   z, nats; only with loss "kto" and reference point "mismatched"
    objective/reward_shift      used in this update, units of reward; only with loss "bco"
    batch/count                 completions
    optimizer/gradient_norm, optimizer/refused (see `gradient_step`)

Shapes: B prompts, G completions of each, C completion length.

>>> import jax, jax.numpy as jnp, optax
>>> from rlhfjax.config import KTO
>>> def evaluate(logits, token):  # log-probability of each token of the completions, [B, G, C]
...     return jax.nn.log_softmax(logits)[token]
>>> algorithm = make(evaluate, optax.sgd(5.0), KTO(beta=0.5, reference_point="zero"))
>>> state, update = algorithm.init(jnp.zeros(4)), jax.jit(algorithm.update)
>>> token = jnp.array([[[2], [1]]])  # one prompt, a good completion and a bad one
>>> batch = Judged(token, jnp.ones(token.shape, bool), evaluate(jnp.zeros(4), token),
...     label_BG=jnp.array([[1.0, 0.0]]), mask_BG=jnp.ones((1, 2), bool))
>>> for key in jax.random.split(jax.random.key(0), 20):
...     state, metrics = update(state, batch, key)
>>> int(jnp.argmax(state.params)), int(jnp.argmin(state.params))
(2, 1)
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.algorithms.algorithm import Algorithm, PyTree, Sums, across, gradient_step, split_blocks
from rlhfjax.config import KTO as Config
from rlhfjax.ops import bco_loss, kto_loss, masked_sum

LOSSES = ("kto", "bco")
REFERENCE_POINTS = ("mismatched", "zero")
CLASSES = ("desirable", "undesirable")


class Mismatched(NamedTuple):
    """Completions set against prompts that they do not answer. What is masked may hold anything."""

    inputs: PyTree  # what `evaluate` needs; leading axis B
    completion_mask_BGC: jax.Array  # bool, True at the tokens of a completion
    logp_ref_BGC: jax.Array  # float, of each token under the reference, nats
    mask_BG: jax.Array  # bool, True where the completion counts


class Judged(NamedTuple):
    """Prompts with completions that were judged one by one. What is masked may hold anything."""

    inputs: PyTree  # what `evaluate` needs; leading axis B
    completion_mask_BGC: jax.Array  # bool, True at the tokens of a completion
    logp_ref_BGC: jax.Array  # float, of each token under the reference, nats
    label_BG: jax.Array  # float, probability that the completion is good: 1, 0 or between
    mask_BG: jax.Array  # bool, True where the completion counts
    weight_BG: jax.Array | None = None  # float >= 0, of its loss; None: all 1
    mismatched: Mismatched | None = None  # for the reference point of kto


class State(NamedTuple):
    """All that a run needs to go on."""

    params: PyTree
    opt_state: PyTree
    reward_shift: jax.Array  # float32 [], moving average; stays 0 with kto
    step: jax.Array  # int32 [], updates made


# (params, inputs) -> logp [B, G, C] of each completion token, nats
Evaluate = Callable[[PyTree, PyTree], jax.Array]


def loss(
    params: PyTree,
    batch: Judged,
    *,
    evaluate: Evaluate,
    config: Config,
    reference_point: jax.Array | float = 0.0,
    reward_shift: jax.Array | float = 0.0,
) -> tuple[jax.Array, Sums]:
    """Summed loss over completions, and sums for the metrics.

    Args:
      reference_point: nats, z of kto; `reference_kl` estimates it.
      reward_shift: units of reward, of bco.

    Raises ValueError or TypeError that names the field of the batch which does not fit.
    """
    _check(batch)
    mask_BG = batch.mask_BG.astype(bool)
    log_ratio_BG, logp_BG = _log_ratio(params, batch, evaluate)
    label_BG = jnp.where(mask_BG, batch.label_BG.astype(jnp.float32), 0.5)
    if config.loss == "kto":
        loss_BG = kto_loss(
            log_ratio_BG,
            beta=config.beta,
            label=label_BG,
            reference_point=reference_point,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        anchor = config.beta * reference_point
    else:
        loss_BG = bco_loss(log_ratio_BG, beta=config.beta, label=label_BG, reward_shift=reward_shift)
        anchor = reward_shift
    if batch.weight_BG is not None:
        loss_BG = jnp.where(mask_BG, batch.weight_BG.astype(jnp.float32), 0.0) * loss_BG

    reward_BG, logp_BG = jax.lax.stop_gradient((config.beta * log_ratio_BG, logp_BG))
    agrees_BG = 0.5 * (1.0 + jnp.sign(reward_BG - anchor))
    per_completion = {
        "loss/total": loss_BG,
        "reward/desirable": label_BG * reward_BG,
        "reward/undesirable": (1.0 - label_BG) * reward_BG,
        "logp/desirable": label_BG * logp_BG,
        "logp/undesirable": (1.0 - label_BG) * logp_BG,
        "completion/accuracy": label_BG * agrees_BG + (1.0 - label_BG) * (1.0 - agrees_BG),
        "completion/desirable": label_BG,
    }
    sums = {name: masked_sum(x, mask_BG) for name, x in per_completion.items()}
    return sums["loss/total"], sums | {"count": jnp.sum(mask_BG, dtype=jnp.float32)}


def reference_kl(
    params: PyTree,
    batch: Mismatched,
    *,
    evaluate: Evaluate,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> jax.Array:
    """`max(0, mean log_ratio)` over the mismatched completions that count: z of KTO, nats, a float32 scalar.

    Args:
      microbatches: parts that are evaluated one after the other; the result is the same to rounding.
      axis_name: mapped axis over whose members the batch is split.

    It gets no gradient. With no completion that counts it is 0.
    """

    def summed(part: Mismatched) -> jax.Array:
        log_ratio_BG, _ = _log_ratio(params, part, evaluate)
        return masked_sum(log_ratio_BG, part.mask_BG)

    total = jnp.sum(jax.lax.map(summed, split_blocks(batch, microbatches)))
    sums = {"log_ratio": total, "count": jnp.sum(batch.mask_BG, dtype=jnp.float32)}
    sums = across(sums, axis_name)
    mean = sums["log_ratio"] / jnp.maximum(sums["count"], 1.0)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def make(
    evaluate: Evaluate,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: str | None = None,
) -> Algorithm:
    """KTO or BCO as `Algorithm(init, update)` on `Judged`; see the module for the metrics.

    Raises ValueError where config names an unknown loss or reference point, and when tracing where the batch
    lacks the mismatched completions that the reference point needs.
    """
    for name, given, choices in (
        ("loss", config.loss, LOSSES),
        ("reference_point", config.reference_point, REFERENCE_POINTS),
    ):
        if given not in choices:
            raise ValueError(f"{name}={given!r} is unknown; choose among {', '.join(choices)}")
    needs_kl = config.loss == "kto" and config.reference_point == "mismatched"

    def init(params: PyTree) -> State:
        return State(params, optimizer.init(params), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))

    def update(state: State, batch: Judged, key: jax.Array):
        del key
        extra: dict[str, jax.Array] = {}
        reference_point = jnp.zeros((), jnp.float32)
        if needs_kl:
            reference_point = reference_kl(
                state.params,
                _mismatched(batch),
                evaluate=evaluate,
                microbatches=config.microbatches,
                axis_name=axis_name,
            )
            extra["objective/reference_point"] = reference_point
        if config.loss == "bco":
            extra["objective/reward_shift"] = state.reward_shift
        params, opt_state, metrics = gradient_step(
            partial(
                loss,
                evaluate=evaluate,
                config=config,
                reference_point=reference_point,
                reward_shift=state.reward_shift,
            ),
            optimizer,
            state.params,
            state.opt_state,
            batch._replace(mismatched=None),
            microbatches=config.microbatches,
            axis_name=axis_name,
        )
        metrics = _by_class(metrics)
        shift = _moved_shift(state.reward_shift, metrics, config)
        return State(params, opt_state, shift, state.step + 1), metrics | extra

    return Algorithm(init, update)


def _log_ratio(params: PyTree, batch: Judged | Mismatched, evaluate: Evaluate) -> tuple[jax.Array, jax.Array]:
    """log_ratio and logp of every completion, both float32 [B, G], 0 where it does not count."""
    logp_BGC = evaluate(params, batch.inputs)
    shape = batch.completion_mask_BGC.shape
    for name, x in (("evaluate gave logp", logp_BGC), ("batch.logp_ref_BGC is", batch.logp_ref_BGC)):
        if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} {x.dtype} of shape {x.shape}; it must be float of the shape of "
                f"completion_mask_BGC, {shape}"
            )
    counts_BGC = batch.completion_mask_BGC.astype(bool) & batch.mask_BG.astype(bool)[:, :, None]
    # Replaced before any arithmetic: a NaN times the zero gradient of a masked token would be NaN.
    logp_BGC = jnp.where(counts_BGC, logp_BGC.astype(jnp.float32), 0.0)
    logp_ref_BGC = jnp.where(counts_BGC, batch.logp_ref_BGC.astype(jnp.float32), 0.0)
    # Token by token: the difference of two long sums would lose digits.
    return jnp.sum(logp_BGC - logp_ref_BGC, axis=2), jnp.sum(logp_BGC, axis=2)


def _by_class(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Turns means over all completions into means over the good, and over the bad."""
    good = metrics["completion/desirable"]
    for share, kind in zip((good, 1.0 - good), CLASSES, strict=True):
        for name in (f"reward/{kind}", f"logp/{kind}"):
            metrics[name] = metrics[name] / jnp.where(share > 0, share, 1.0)
    return metrics | {"reward/margin": metrics["reward/desirable"] - metrics["reward/undesirable"]}


def _moved_shift(shift: jax.Array, metrics: dict[str, jax.Array], config: Config) -> jax.Array:
    """The reward shift after an update. A batch without good or without bad completions, or with a reward that is not
    finite, does not move it."""
    if config.loss != "bco":
        return shift
    good = metrics["completion/desirable"]
    midpoint = 0.5 * (metrics["reward/desirable"] + metrics["reward/undesirable"])
    moved = config.shift_decay * shift + (1.0 - config.shift_decay) * midpoint
    return jnp.where((good > 0) & (good < 1) & jnp.isfinite(moved), moved, shift)


def _mismatched(batch: Judged) -> Mismatched:
    if batch.mismatched is None:
        raise ValueError(
            "batch.mismatched is missing: kto estimates its reference point from completions of other "
            'prompts; give them, or set reference_point="zero"'
        )
    return batch.mismatched


def _check(batch: Judged) -> None:
    """Raises ValueError or TypeError that names the field of the batch that does not fit."""
    shape = batch.completion_mask_BGC.shape
    if len(shape) != 3:
        raise ValueError(f"batch.completion_mask_BGC must be [B, G, C], got shape {shape}")
    for name in ("label_BG", "mask_BG", "weight_BG"):
        x = getattr(batch, name)
        if x is None:
            continue
        if x.shape != shape[:2]:
            raise ValueError(f"batch.{name} must be [B, G] = {shape[:2]}, got shape {x.shape}")
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        if name == "mask_BG" and is_float:
            raise TypeError(f"batch.mask_BG must be bool, got {x.dtype}: pass batch.mask_BG > 0")
        if name != "mask_BG" and not is_float:
            raise TypeError(f"batch.{name} must be float, got {x.dtype}: cast it to float32")
