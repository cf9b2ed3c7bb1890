"""Supervised fine-tuning: minimises the weighted mean negative log-likelihood of the data.

    loss = - sum(weight * logp) / sum(weight)

Weights tell what is learnt: 1 for completion tokens, 0 for padding, something between for an auxiliary loss
on the prompt. The mean runs over the global batch, so it does not change with padding, packing or the number
of devices.

Metrics: "loss/nll" (nats per unit of weight), "batch/count" (the sum of weights), "optimizer/gradient_norm",
"optimizer/refused".

>>> import jax, jax.numpy as jnp, optax
>>> from rlhfjax.config import SFT
>>> def evaluate(logits, token):  # log-probability of each token, [B, T]
...     return jax.nn.log_softmax(logits)[token]
>>> algorithm = make(evaluate, optax.sgd(1.0), SFT())
>>> state, update = algorithm.init(jnp.zeros(4)), jax.jit(algorithm.update)
>>> batch = Batch(jnp.array([[2, 2, 3]]), weight=jnp.array([[1.0, 1.0, 0.0]]))  # the last token does not count
>>> for key in jax.random.split(jax.random.key(0), 20):
...     state, metrics = update(state, batch, key)
>>> int(jnp.argmax(state.params))
2
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.algorithms.algorithm import Algorithm, PyTree, State, Sums, gradient_step, initial_state
from rlhfjax.config import SFT as Config


class Batch(NamedTuple):
    """What one update learns from. All arrays share their leading axis."""

    inputs: PyTree  # what `evaluate` needs
    weight: jax.Array  # [B, ...] float; 0 where nothing is to be learnt


# (params, inputs) -> logp, shaped as the weights: log-probability of each target, nats
Evaluate = Callable[[PyTree, PyTree], jax.Array]


def loss(params: PyTree, batch: Batch, *, evaluate: Evaluate, config: Config) -> tuple[jax.Array, Sums]:
    """Summed negative log-likelihood and its sums. A logp under weight 0 may be anything, also NaN.

    Raises TypeError where the weight is not a float, ValueError where logp and weight differ in shape.
    """
    del config
    if not jnp.issubdtype(batch.weight.dtype, jnp.floating):
        raise TypeError(f"batch.weight must be float, got {batch.weight.dtype}: cast it to float32")
    logp = evaluate(params, batch.inputs)
    if logp.shape != batch.weight.shape:
        raise ValueError(
            f"evaluate gave logp of shape {logp.shape}; batch.weight has shape {batch.weight.shape}"
        )
    weight = batch.weight.astype(jnp.float32)
    total = -jnp.sum(weight * jnp.where(weight == 0, 0.0, logp.astype(jnp.float32)))
    return total, {"count": jnp.sum(weight), "loss/nll": total}


def make(
    evaluate: Evaluate,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: str | None = None,
) -> Algorithm:
    """Supervised fine-tuning as `Algorithm(init, update)` on `Batch`; see the module for the metrics."""

    def update(state: State, batch: Batch, key: jax.Array):
        del key
        params, opt_state, metrics = gradient_step(
            partial(loss, evaluate=evaluate, config=config),
            optimizer,
            state.params,
            state.opt_state,
            batch,
            microbatches=config.microbatches,
            axis_name=axis_name,
        )
        return State(params, opt_state, state.step + 1), metrics

    return Algorithm(partial(initial_state, optimizer=optimizer), update)
