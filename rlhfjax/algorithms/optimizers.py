"""Clip by global norm, then one of a few optimisers under one of a few schedules.

Any other `optax.GradientTransformation` may be passed to an algorithm in its place.
"""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from optax.contrib import MuonDimensionNumbers, ScheduleFreeState, muon, schedule_free

from rlhfjax.algorithms.algorithm import PyTree
from rlhfjax.config import Optimizer as Config

# Tables of one row per token or position, and heads: Muon is made for maps between hidden vectors.
_NOT_HIDDEN = re.compile(r"embed|position|head")
# Quintic Newton-Schulz coefficients of Jordan (2024), pinned here so that a new optax cannot change a run.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def is_hidden_matrix(path: str, array: jax.Array) -> bool:
    """True for matrices (or stacks of them) that are neither an embedding table nor a head, by their path."""
    return array.ndim >= 2 and not _NOT_HIDDEN.search(path.lower())


def make_optimizer(
    config: Config, total_steps: int, *, orthogonalise: Callable[[str, jax.Array], bool] = is_hidden_matrix
) -> optax.GradientTransformation:
    """The optimiser that `config` describes.

    Args:
      config: its float fields may be traced.
      total_steps: optimiser steps of the whole run, for PPO updates x epochs x minibatches.
      orthogonalise: `(path, array) -> bool`, the parameters that Muon takes if that is the kind; a path reads
        "layer_0/mlp/up/kernel".

    Raises ValueError for a kind or a schedule that there is not, and for a schedule beside schedule_free.
    """
    kinds = {
        "adamw": _adamw,
        "muon": partial(_muon_and_adamw, orthogonalise=orthogonalise),
        "adafactor": _adafactor,
        "schedule_free": _schedule_free,
        "sgd": _sgd,
    }
    if config.kind not in kinds:
        raise ValueError(f"kind={config.kind!r} is unknown; choose one of {sorted(kinds)}")
    transform = kinds[config.kind](config, total_steps)
    if config.max_grad_norm is None:
        return transform
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), transform)


def evaluation_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """The parameters to evaluate, save and serve: of schedule_free the average of its steps, of the others `params`.

    Args:
      opt_state: of `make_optimizer`, e.g. `state.opt_state` of an algorithm.
      params: those that training goes on from. Rollouts of training take these: what samples must be what is trained.
    """

    averaged = [
        node
        for node in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, ScheduleFreeState))
        if isinstance(node, ScheduleFreeState)
    ]
    for (
        state
    ) in averaged:  # several where parts of the parameters have states of their own (PPO's critic_warmup)

        def average(z, y, b1=state.b1):
            return y if isinstance(z, optax.MaskedNode) else (y - (1.0 - b1) * z) / b1

        params = jax.tree.map(
            average, state.z, params, is_leaf=lambda node: isinstance(node, optax.MaskedNode)
        )
    return params


def schedule(config: Config, peak: float, total_steps: int) -> Callable[[ArrayLike], jax.Array]:
    """Step size at optimiser step 0, 1, ...: linear warm-up to the peak, then what `config.schedule` says.

    With p the share of the steps after the warm-up that are done and f = final_fraction, a step is the peak times
      linear: 1 - (1 - f) p
      cosine: f + (1 - f) (1 + cos(pi p)) / 2  (arXiv 1608.03983)
      constant: 1
      inverse_sqrt: sqrt(w / (step + 1)), w the warm-up's steps, at least 1  (arXiv 1706.03762)
      wsd: 1, then linear over the last share decay_fraction of p  (arXiv 2404.06395)

    Raises ValueError for another name, and where the warm-up leaves no step of the run.
    """
    warmup, final = config.warmup_steps, config.final_fraction
    if not 0 <= warmup < total_steps:
        raise ValueError(
            f"warmup_steps={warmup} must be at least 0 and less than the run's {total_steps} steps"
        )

    def progress(step: jax.Array) -> jax.Array:
        return jnp.clip((step - warmup) / (total_steps - warmup), 0.0, 1.0)

    def wsd(step: jax.Array) -> jax.Array:
        fallen = (progress(step) - (1.0 - config.decay_fraction)) / config.decay_fraction
        return 1.0 - (1.0 - final) * jnp.clip(fallen, 0.0, 1.0)

    shapes: dict[str, Callable[[jax.Array], jax.Array]] = {
        "linear": lambda step: 1.0 - (1.0 - final) * progress(step),
        "cosine": lambda step: final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress(step))),
        "constant": lambda step: jnp.ones(step.shape),
        "inverse_sqrt": lambda step: jnp.sqrt(max(warmup, 1) / jnp.maximum(step + 1, max(warmup, 1))),
        "wsd": wsd,
    }
    if config.schedule not in shapes:
        raise ValueError(f"schedule={config.schedule!r} is unknown; choose one of {sorted(shapes)}")
    shape = shapes[config.schedule]

    def step_size(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        rise = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        return peak * rise * shape(step)

    return step_size


def _matrices(params: PyTree) -> PyTree:
    """What decays: matrices, embeddings and LoRA's among them, and no norms, biases or other vectors."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def _decayed(
    config: Config, total_steps: int, *direction: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Steps along a direction, with decoupled decay, as large as the schedule says."""
    return optax.chain(
        *direction,
        optax.add_decayed_weights(config.weight_decay, _matrices),
        optax.scale_by_learning_rate(schedule(config, config.learning_rate, total_steps)),
    )


def _adamw(config: Config, total_steps: int) -> optax.GradientTransformation:
    return optax.adamw(
        schedule(config, config.learning_rate, total_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_matrices,
    )


def _sgd(config: Config, total_steps: int) -> optax.GradientTransformation:
    return _decayed(config, total_steps, optax.trace(decay=config.b1))


def _adafactor(config: Config, total_steps: int) -> optax.GradientTransformation:
    """Without the paper's relative step size, so that `learning_rate` means what it does for Adam and that LoRA's b,
    which starts at zero, moves; updates clipped at a root mean square of 1, decay rate 1 - step ** -0.8 (section 9)."""
    direction = (optax.scale_by_factored_rms(decay_rate=0.8), optax.clip_by_block_rms(1.0))
    return _decayed(config, total_steps, *direction)


def _schedule_free(config: Config, total_steps: int) -> optax.GradientTransformation:
    if config.schedule != "constant":
        raise ValueError(
            f'kind="schedule_free" averages in place of a decay: give schedule="constant", not {config.schedule!r}'
        )
    step_size = schedule(config, config.learning_rate, total_steps)
    rms = optax.scale_by_rms(config.b2, eps=config.eps, eps_in_sqrt=False, bias_correction=True)
    # It counts its steps from 1, its base from 0; both must read the same warm-up.
    return schedule_free(
        _decayed(config, total_steps, rms), lambda step: step_size(jnp.asarray(step) - 1), b1=config.b1
    )


def _muon_and_adamw(
    config: Config, total_steps: int, *, orthogonalise: Callable[[str, jax.Array], bool]
) -> optax.GradientTransformation:
    def labels(params: PyTree) -> PyTree:
        def label(path, array):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return "muon" if orthogonalise(name, array) else "adam"

        return jax.tree_util.tree_map_with_path(label, params)

    return optax.partition({"muon": _muon(config, total_steps), "adam": _adamw(config, total_steps)}, labels)


def _muon(config: Config, total_steps: int) -> optax.GradientTransformation:
    def dimension_numbers(params: PyTree) -> PyTree:
        # The last two axes are the matrix; axes before them stack layers.
        return jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), params)

    return muon(
        schedule(config, config.muon_learning_rate, total_steps),
        ns_coeffs=_NEWTON_SCHULZ,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=dimension_numbers,
    )
