"""What all algorithms share: the pair `Algorithm(init, update)` and one gradient step on a loss that returns
sums.

A loss returns a total and named sums over items, never means. The step divides once by the global "count", so
padding, ragged batches, gradient accumulation and the number of devices all give the same number to rounding.
A name that ends in `_max` is combined by maximum instead.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.ops import k1, k2, k3

PyTree = Any
Sums = dict[str, jax.Array]


class Algorithm(NamedTuple):
    """An algorithm as two pure functions. The caller jits, donates, vmaps and shards them.

    init(params) -> state
    update(state, batch, key) -> (state, metrics)
        The key is consumed. Metrics are a flat dict of float32 scalars with the same names at every step.
    """

    init: Callable[[PyTree], Any]
    update: Callable[[Any, Any, jax.Array], tuple[Any, dict[str, jax.Array]]]


class Evaluation(NamedTuple):
    """What a policy-gradient algorithm needs to know of a model at the actions of a batch, all of their shape.

    `evaluate(params, inputs)` returns it, or a plain tuple of the first two or three; with the exact KL it is
    `evaluate(params, inputs, reference)`, the last being the parameters of the reference policy.
    """

    logp: jax.Array  # float, log-probability of the action taken, nats
    entropy: jax.Array  # float, entropy of the distribution it was drawn from, nats
    value: jax.Array | None = None  # float, V(s) of the state it was chosen in; None: no critic
    kl: jax.Array | None = None  # float, exact KL(policy || reference) over all actions there, nats


class State(NamedTuple):
    """All that plain gradient descent needs to go on."""

    params: PyTree
    opt_state: PyTree
    step: jax.Array  # int32 [], updates made


_KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def check_kl(placement: str, estimator: str) -> None:
    """Raises ValueError on an unknown choice, and on k1 in the loss."""
    if placement not in ("reward", "loss"):
        raise ValueError(f'kl_placement={placement!r} is unknown; choose "reward" or "loss"')
    if estimator not in (*_KL_ESTIMATORS, "exact"):
        raise ValueError(f'kl_estimator={estimator!r} is unknown; choose "k1", "k2", "k3" or "exact"')
    if placement == "loss" and estimator == "k1":
        raise ValueError(
            'kl_estimator="k1" in the loss does nothing: its gradient, that of log pi at samples of pi, has mean '
            'zero, so it would only add noise; choose "k2" (the gradient of KL(pi || ref)), "k3" (that of '
            'KL(ref || pi)) or "exact", or kl_placement="reward"'
        )


def estimate_kl(
    estimator: str, logp: jax.Array, logp_ref: jax.Array | None, exact: jax.Array | None
) -> jax.Array:
    """What `estimator` ("k1", "k2", "k3" or "exact") makes of each action, nats; see `rlhfjax.ops.kl`.

    Raises ValueError where what it is made of is None.
    """
    name, source = ("the exact KL", exact) if estimator == "exact" else ("logp_ref", logp_ref)
    if source is None:
        raise ValueError(f'kl_estimator="{estimator}" needs {name} at every action, which is None')
    return source if estimator == "exact" else _KL_ESTIMATORS[estimator](logp, source)


def initial_state(params: PyTree, optimizer: optax.GradientTransformation) -> State:
    """The state before the first update."""
    return State(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def gradient_step(
    loss: Callable[[PyTree, PyTree], tuple[jax.Array, Sums]],
    optimizer: optax.GradientTransformation,
    params: PyTree,
    opt_state: PyTree,
    batch: PyTree,
    *,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
    """One optimiser step on the mean of `loss` over the global batch: total / count.

    Args:
      loss: `(params, batch) -> (total, sums)`, with `sums["count"]` the number or weight of items in total.
      batch: arrays with one leading batch axis, divisible by `microbatches`.
      microbatches: parts whose gradients are added; the result is the same to rounding.
      axis_name: the mapped axis (`shard_map`, `pmap`, `vmap`) over whose members the batch is split. None
        under jit, where arrays are global already.

    Returns:
      params, opt_state and the metrics: `sums` as means over the global batch, the count itself as
      "batch/count", "optimizer/gradient_norm" before clipping, and "optimizer/refused": 1 where that norm is not
      finite, and params and opt_state are what they were; else 0. An empty batch (count 0) has gradient 0.
    """
    grads, sums = _summed_gradient(loss, _varying(params, axis_name), batch, microbatches, axis_name)
    if axis_name is not None:
        grads = jax.lax.psum(grads, axis_name)
    sums = across(sums, axis_name)
    scale = 1.0 / _nonzero(sums["count"])
    grads = jax.tree.map(lambda g: g * scale, grads)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    updates, new_opt_state = optimizer.update(grads, opt_state, params)
    finite = jnp.isfinite(norm)
    params, opt_state = where_finite(
        finite, (optax.apply_updates(params, updates), new_opt_state), (params, opt_state)
    )
    metrics = means(sums) | {
        "batch/count": sums["count"],
        "optimizer/gradient_norm": norm,
        "optimizer/refused": 1.0 - finite.astype(jnp.float32),
    }
    return params, opt_state, metrics


def where_finite(finite: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where `finite`, a bool of no axis, else `old`, as a whole: one NaN in the state would never leave it."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def _summed_gradient(loss, params, batch, microbatches, axis_name):
    """Gradient (float32) and sums of the whole local batch, by a scan over its microbatches."""
    gradient = jax.value_and_grad(loss, has_aux=True)

    def one(grads, microbatch):
        (_, sums), new = gradient(params, microbatch)
        return jax.tree.map(lambda a, g: a + g.astype(jnp.float32), grads, new), sums

    zeros = _varying(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params), axis_name)
    if microbatches == 1:
        return one(zeros, batch)
    grads, stacked = jax.lax.scan(one, zeros, split_blocks(batch, microbatches))
    return grads, {name: (jnp.max if _is_max(name) else jnp.sum)(x) for name, x in stacked.items()}


def across(sums: Sums, axis_name: str | None) -> Sums:
    """Sums over the members of a mapped axis (maxima where the name ends in `_max`); None: unchanged."""
    if axis_name is None:
        return sums
    combined = jax.lax.psum({name: x for name, x in sums.items() if not _is_max(name)}, axis_name)
    return combined | {name: jax.lax.pmax(x, axis_name) for name, x in sums.items() if _is_max(name)}


def means(sums: Sums) -> dict[str, jax.Array]:
    """Divides every sum by `sums["count"]` (0 items: 0) and drops the count; maxima stay as they are."""
    count = _nonzero(sums["count"])
    return {
        name: jnp.asarray(x if _is_max(name) else x / count, jnp.float32)
        for name, x in sums.items()
        if name != "count"
    }


def split_blocks(batch: PyTree, parts: int, key: jax.Array | None = None) -> PyTree:
    """Cuts arrays [B, ...] into [parts, B / parts, ...]; each part has one row of every `parts` consecutive.

    With a key (consumed) each block is shuffled on its own. A permutation of the whole batch would be more
    random, but when B is sharded it gathers across devices, and then every device computes every part whole.
    Here no row leaves its device as long as B is divisible by parts x devices.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    check_divisible(rows, parts)
    if parts == 1:
        return jax.tree.map(lambda x: x[None], batch)
    blocks = rows // parts
    batch = jax.tree.map(lambda x: x.reshape(blocks, parts, *x.shape[1:]), batch)
    if key is not None:
        order = jax.vmap(jax.random.permutation, (0, None))(jax.random.split(key, blocks), parts)
        batch = jax.tree.map(lambda x: jax.vmap(lambda block, index: block[index])(x, order), batch)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batch)


def check_divisible(rows: int, parts: int, *, what: str = "microbatches") -> None:
    """Raises ValueError when a batch of `rows` cannot be cut into `parts` equal parts."""
    if parts < 1 or rows % parts:
        choices = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise ValueError(
            f"a batch of {rows} rows cannot be cut into {parts} equal parts ({what}); "
            f"make the batch a multiple of {parts}, or choose the number of parts among {choices}"
        )


def _is_max(name: str) -> bool:
    return name.endswith("_max")


def _nonzero(count: jax.Array) -> jax.Array:
    return jnp.where(count == 0, 1.0, count)


def _varying(tree: PyTree, axis_name: str | None) -> PyTree:
    """Marks replicated floats as differing between the members of a mapped axis; the numbers stay the same.

    `shard_map` tracks which values differ, and inserts a psum into the gradient of those that do not. Marked,
    the gradient is each member's own, and the one psum of `gradient_step` is the only one, under every kind
    of map.
    """
    if axis_name is None:
        return tree
    zero = jax.lax.axis_index(axis_name) * 0
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)
