"""Clip by global norm, then AdamW; or Muon for the hidden matrices and AdamW for the rest.

Any other `optax.GradientTransformation` may be passed to an algorithm in its place.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from optax.contrib import MuonDimensionNumbers, muon

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
      orthogonalise: `(path, array) -> bool`, the parameters that Muon takes if `config.muon`; a path reads
        "layer_0/mlp/up/kernel".
    """
    transform = _adamw(config, total_steps)
    if config.muon:

        def labels(params: PyTree) -> PyTree:
            def label(path, array):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                return "muon" if orthogonalise(name, array) else "adam"

            return jax.tree_util.tree_map_with_path(label, params)

        transform = optax.partition({"muon": _muon(config, total_steps), "adam": transform}, labels)
    if config.max_grad_norm is None:
        return transform
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), transform)


def schedule(config: Config, peak: float, total_steps: int) -> Callable[[ArrayLike], jax.Array]:
    """Step size at optimiser step 0, 1, ...: linear warm-up, linear decay to `final_fraction` of the peak.

    Raises ValueError where the warm-up leaves no step of the run.
    """
    warmup = config.warmup_steps
    if not 0 <= warmup < total_steps:
        raise ValueError(
            f"warmup_steps={warmup} must be at least 0 and less than the run's {total_steps} steps"
        )

    def step_size(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        rise = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        progress = jnp.clip((step - warmup) / (total_steps - warmup), 0.0, 1.0)
        return peak * rise * (1.0 - (1.0 - config.final_fraction) * progress)

    return step_size


def _adamw(config: Config, total_steps: int) -> optax.GradientTransformation:
    return optax.adamw(
        schedule(config, config.learning_rate, total_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
    )


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
