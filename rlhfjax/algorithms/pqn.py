"""Q-learning on fresh rollouts of many environments: no target network, no replay (PQN, arXiv 2407.04811).

    target[t] = reward[t] + discount * ((1 - lam) * max_a Q(s[t+1], a) + lam * target[t+1])
    loss      = mean over steps of (target[t] - Q(s[t], action[t]))^2 / 2

the targets of a rollout being Peng's Q(lambda) returns under the parameters that it begins with, once for all its
epochs and minibatches. In place of the bracket stands max_a Q(s[t+1], a) where the episode was truncated and at
the last step of the rollout, and 0 where it terminated. The network should normalise its layers
(`rlhfjax.networks.mlp`, layer_norm): that is what holds the values without a target network.

Metrics (means over the optimiser steps of an update, each a mean over the steps that count):
    loss/total        before each optimiser step
    td/error          |target - Q(s, a)|
    td/error_max      the largest, over all optimiser steps
    q/taken           Q(s, a)
    q/target          what it is moved towards
    batch/count       environment steps in the rollout that count
    batch/invalid     rows left out as bad input: a reward that is not finite, an action that is none
    optimizer/gradient_norm, optimizer/refused

Shapes: B environments, T steps of each, N = B * T, A actions.

>>> import jax, jax.numpy as jnp, optax
>>> from rlhfjax.config import PQN
>>> algorithm = make(lambda q, state: q[state], optax.sgd(1.0), PQN(discount=0.9, epochs=1, minibatches=1))
>>> row = jnp.zeros((1, 4), int)  # in state 0, action 0 gives 1 and leads back to state 0
>>> rollout = Rollout(row, row, row + 1.0, row > 0, next_inputs=row)
>>> state, update = algorithm.init(jnp.zeros((2, 2))), jax.jit(algorithm.update)
>>> for key in jax.random.split(jax.random.key(0), 200):
...     state, metrics = update(state, rollout, key)
>>> round(float(state.params[0, 0]), 2)  # 1 / (1 - 0.9)
10.0
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.algorithms.algorithm import (
    Algorithm,
    PyTree,
    State,
    Sums,
    across,
    check_divisible,
    gradient_step,
    initial_state,
    split_blocks,
)
from rlhfjax.algorithms.dqn import zeros_where_masked
from rlhfjax.config import PQN as Config
from rlhfjax.ops import huber_loss, lambda_returns, masked_sum


class Rollout(NamedTuple):
    """Steps of B environments. What is masked may hold anything; give `next_inputs` or `next_value`."""

    inputs: PyTree  # observations, leading axes [B, T]
    action: jax.Array  # int [B, T]
    reward: jax.Array  # float [B, T]
    terminated: jax.Array  # bool [B, T], True where no reward can follow
    truncated: jax.Array | None = (
        None  # bool [B, T], True where the episode was cut short after; None: nowhere
    )
    next_inputs: PyTree | None = (
        None  # observations after each action; at the end of an episode its final one
    )
    next_value: jax.Array | None = None  # float [B, T], max_a Q of them, kept from the rollout: saves a pass
    mask: jax.Array | None = None  # bool [B, T], True where it counts; None: all do


class Sample(NamedTuple):
    """What a gradient step learns from; zeros where masked."""

    inputs: PyTree  # leading axis N
    action_N: jax.Array  # int
    target_N: jax.Array  # float
    mask_N: jax.Array  # bool


# (params, inputs) -> float Q [N, A]; inputs have one leading axis. An action that is not available has -inf.
Evaluate = Callable[[PyTree, PyTree], jax.Array]


def loss(params: PyTree, sample: Sample, *, evaluate: Evaluate, config: Config) -> tuple[jax.Array, Sums]:
    """Summed loss over steps, and sums for the metrics. The target gets no gradient."""
    q_NA = _action_values(evaluate(params, sample.inputs), sample.action_N.shape)
    mask_N = sample.mask_N
    q_NA = jnp.where(mask_N[:, None], q_NA, 0)
    taken_N = jnp.take_along_axis(q_NA, sample.action_N[:, None], axis=1)[:, 0]
    error_N = jnp.where(mask_N, jax.lax.stop_gradient(sample.target_N), 0) - taken_N
    td_N = 0.5 * jnp.square(error_N) if config.huber is None else huber_loss(error_N, threshold=config.huber)
    items = {
        "loss/total": td_N,
        "td/error": jnp.abs(error_N),
        "q/taken": taken_N,
        "q/target": sample.target_N,
    }
    sums = {name: masked_sum(x, mask_N) for name, x in items.items()}
    sums |= {"td/error_max": jnp.max(jnp.where(mask_N, jnp.abs(error_N), 0), initial=0)}
    return sums["loss/total"], sums | {"count": jnp.sum(mask_N, dtype=jnp.float32)}


def targets(
    params: PyTree, rollout: Rollout, *, evaluate: Evaluate, config: Config
) -> tuple[Sample, jax.Array]:
    """What gradient steps learn from, N = B * T with time inside, and the number of bad rows (float32).

    Raises ValueError or TypeError that names the field of the rollout that does not fit.
    """
    _check(rollout)
    rows, length = rollout.action.shape
    mask = jnp.ones((rows, length), bool) if rollout.mask is None else rollout.mask.astype(bool)
    q = jax.eval_shape(evaluate, params, _flat(rollout.inputs))
    actions = _action_values(q, (rows * length,)).shape[1]
    bad = mask & ~(jnp.isfinite(rollout.reward) & (rollout.action >= 0) & (rollout.action < actions))
    # A reward reaches all steps before it: the row goes as a whole.
    bad = jnp.any(bad, axis=1, keepdims=True)
    mask = mask & ~bad
    rollout = zeros_where_masked(rollout._replace(mask=None), mask)

    next_value = rollout.next_value
    if next_value is None:
        next_q = _action_values(evaluate(params, _flat(rollout.next_inputs)), (rows * length,))
        next_value = jnp.max(next_q, axis=1).reshape(rows, length)
    target = lambda_returns(
        rollout.reward,
        next_value,
        discount=config.discount,
        lam=config.lam,
        mask=mask,
        terminated=rollout.terminated,
        truncated=rollout.truncated,
    )
    sample = _flat((rollout.inputs, rollout.action, jax.lax.stop_gradient(target), mask))
    return Sample(*sample), jnp.sum(bad, dtype=jnp.float32)


def make(
    evaluate: Evaluate,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: str | None = None,
) -> Algorithm:
    """PQN as `Algorithm(init, update)` on `Rollout`; see the module for the metrics.

    The key decides the minibatches: each has one of every `minibatches` consecutive steps of the rollout.

    Raises ValueError where a number is out of range, and when tracing where the steps of a rollout are not divisible
    by minibatches x microbatches.
    """
    for name in ("discount", "lam"):
        value = getattr(config, name)
        # An array may be traced, and is taken as it comes.
        if isinstance(value, int | float) and not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be in [0, 1]")
    if config.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {config.epochs}")

    def update(state: State, rollout: Rollout, key: jax.Array):
        sample, invalid = targets(state.params, rollout, evaluate=evaluate, config=config)
        check_divisible(
            sample.mask_N.shape[0],
            config.minibatches * config.microbatches,
            what="minibatches x microbatches",
        )

        def minibatch(carry: tuple[PyTree, PyTree], batch: Sample):
            params, opt_state, metrics = gradient_step(
                partial(loss, evaluate=evaluate, config=config),
                optimizer,
                *carry,
                batch,
                microbatches=config.microbatches,
                axis_name=axis_name,
            )
            return (params, opt_state), metrics

        def epoch(carry, key):
            return jax.lax.scan(minibatch, carry, split_blocks(sample, config.minibatches, key))

        (params, opt_state), steps = jax.lax.scan(
            epoch, (state.params, state.opt_state), jax.random.split(key, config.epochs)
        )
        counts = {"batch/count": jnp.sum(sample.mask_N, dtype=jnp.float32), "batch/invalid": invalid}
        metrics = _over_steps(steps) | across(counts, axis_name)
        return State(params, opt_state, state.step + 1), metrics

    return Algorithm(partial(initial_state, optimizer=optimizer), update)


def _over_steps(steps: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics [epochs, minibatches] of the gradient steps as one number each."""
    return {name: (jnp.max if name.endswith("_max") else jnp.mean)(x) for name, x in steps.items()}


def _flat(tree: PyTree) -> PyTree:
    """[B, T, ...] as [B * T, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _action_values(q: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`q` in float32 or wider. Raises ValueError on another shape than [N, A]."""
    if len(q.shape) != 2 or q.shape[:1] != shape:
        raise ValueError(
            f"evaluate must give action values [N, A] with N = {shape[0]}; it gave shape {q.shape}"
        )
    return q if isinstance(q, jax.ShapeDtypeStruct) else q.astype(jnp.promote_types(q.dtype, jnp.float32))


def _check(rollout: Rollout) -> None:
    """Raises ValueError or TypeError that names the field of the rollout that does not fit."""
    shape = rollout.action.shape
    if len(shape) != 2 or not jnp.issubdtype(rollout.action.dtype, jnp.integer):
        raise TypeError(f"rollout.action must be integer [B, T], got {rollout.action.dtype} of shape {shape}")
    if rollout.next_inputs is None and rollout.next_value is None:
        raise ValueError(
            "rollout.next_inputs is missing: give the observations after each action (at the end of an "
            "episode its final one), or next_value, the largest action value of them"
        )
    for name in ("reward", "next_value", "terminated", "truncated", "mask"):
        x = getattr(rollout, name)
        if x is None:
            continue
        if x.shape != shape:
            raise ValueError(
                f"rollout.{name} has shape {x.shape}, but rollout.action {shape}; they must be equal"
            )
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        if is_float != (name in ("reward", "next_value")):
            raise TypeError(f"rollout.{name} must be {'bool' if is_float else 'float'}, got {x.dtype}")
