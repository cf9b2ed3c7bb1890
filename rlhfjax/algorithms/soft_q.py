"""Soft Q-learning of a language model by path consistency: the KL-regularised optimum, from any data.

The policy pi = softmax(logits) and a soft value V(s) = beta log_partition(s) are one network's: with the reference's
log-probabilities, Q(s, a) = V(s) + beta log(pi / ref)(a|s). At the optimum, and there alone, along *every* path

    V(s_t) = sum_{i<d} discount^i (r_{t+i} - beta log(pi / ref)(a_{t+i} | s_{t+i})) + discount^d V(s_{t+d})

(path consistency: arXiv 1702.08892, with a reference: 1707.01891), whoever chose the actions. So no importance weights
are needed, and with discount 1 the solution is pi* = ref exp(reward / beta) / Z with V(s_0) = beta log Z.

    loss = mean over d in `steps` of (V(s_t) - right-hand side)^2

    gradient="start"     the value at the end of the path is the target network's: with d = 1 that is Q-learning,
                         (Q(s, a) - r - discount V(s'))^2 with V the soft maximum (arXiv 2106.07704, 1702.08165)
    gradient="both"      both ends of the path are trained: path consistency learning; no target network
    steps=(0,)           paths to the end of the episode: no bootstrap, and a late reward is felt at once

States are those in which the agent chooses; words of its environment between are skipped. After the last action V is
0, or, where the episode was cut short, that of its end.

Metrics, means over actions:

    loss/total, path/error       squared and absolute, means over `steps`
    value/mean                   V(s), in units of reward
    policy/log_ratio             log(pi / ref) of the actions in the data, nats
    policy/nll                   -log pi of them
    batch/count                  number of actions
    optimizer/gradient_norm      before clipping
    optimizer/refused            share of gradient steps not made, their gradient not being finite

and counts: batch/episodes (with an action), batch/without_action (nothing to learn from), reward/nonfinite (left out).

>>> import jax, jax.numpy as jnp, optax
>>> from rlhfjax.config import SoftQ
>>> def evaluate(logits, action):  # one decision among four; the reference's logits are 0
...     log_partition = jax.nn.logsumexp(logits) - jnp.log(4.0)
...     return jax.nn.log_softmax(logits)[action], jnp.broadcast_to(log_partition, action.shape)
>>> algorithm = make(evaluate, optax.sgd(1.0), SoftQ(beta=0.5, polyak=None))
>>> action = jnp.arange(4)[:, None]
>>> batch = Batch(action, jnp.full((4, 1), -jnp.log(4.0)), 0.5 * action, jnp.ones((4, 1), bool))
>>> state, update = algorithm.init(jnp.zeros(4)), jax.jit(algorithm.update)
>>> for key in jax.random.split(jax.random.key(0), 300):
...     state, metrics = update(state, batch, key)
>>> bool(jnp.allclose(jax.nn.softmax(state.params), jax.nn.softmax(jnp.arange(4.0)), atol=1e-4))
True
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.algorithms.algorithm import Algorithm, PyTree, Sums, across, gradient_step
from rlhfjax.algorithms.turns import (
    after_the_last,
    at_actions,
    at_next_action,
    check_discount,
    clean,
    episode_counts,
)
from rlhfjax.config import SoftQ as Config
from rlhfjax.ops import masked_sum, multistep_path_consistency_error

GRADIENTS = ("start", "both")


class Batch(NamedTuple):
    """Episodes, one a row, all [B, ..., T] unless said otherwise. Masked places may hold anything, also NaN."""

    inputs: PyTree  # what `evaluate` needs; leading axis B
    logp_ref: jax.Array  # float, log-probability of the action under the reference, nats
    reward: jax.Array  # float, reward of the action
    mask: jax.Array  # bool, True where the agent chose the token
    truncated: jax.Array | None = None  # bool [B, ...], the episode was cut short; None: none was


class Evaluation(NamedTuple):
    """What path consistency needs to know of the network; `evaluate` gives it, or a tuple of the first two."""

    logp: jax.Array  # float [B, ..., T], log-probability of the action, nats
    # float [B, ..., T], V(s) / beta, nats: logsumexp of the logits less that of the reference's, so that a policy that
    # starts as the reference has V = 0; or a head of its own
    log_partition: jax.Array
    final: jax.Array | None = None  # float [B, ...], log_partition after the last token


class State(NamedTuple):
    """All that a run needs to go on."""

    params: PyTree
    target: PyTree  # slow copy of the params; None where no target network is used
    opt_state: PyTree
    step: jax.Array  # int32 [], updates made


# (params, inputs) -> Evaluation or (logp, log_partition)
Evaluate = Callable[[PyTree, PyTree], Evaluation | tuple[jax.Array, jax.Array]]


def loss(
    params: PyTree, batch: Batch, *, evaluate: Evaluate, config: Config, target: PyTree | None = None
) -> tuple[jax.Array, Sums]:
    """Summed squared errors over the actions, and sums for the metrics.

    Args:
      target: parameters whose value is bootstrapped from, with gradient="start"; None: `params`, without a gradient.

    Raises TypeError or ValueError that names what does not fit.
    """
    reward, mask, _ = clean(batch.reward, batch.mask, batch.truncated)
    logp, value, end = _evaluated(evaluate(params, batch.inputs), batch, mask, config)
    log_ratio = logp - at_actions(
        "logp_ref", batch.logp_ref, mask, "give zeros for no reference", source="the batch"
    )
    if config.gradient == "both":
        later, after = value, end
    elif target is None:
        later, after = jax.lax.stop_gradient((value, end))
    else:
        slow = _evaluated(evaluate(target, batch.inputs), batch, mask, config)
        later, after = jax.lax.stop_gradient(slow[1:])

    following = at_next_action(later, mask, after)
    squared, absolute = jnp.zeros_like(value), jnp.zeros_like(value)
    for steps in config.steps:
        error = multistep_path_consistency_error(
            value,
            reward,
            following,
            log_ratio,
            temperature=config.beta,
            discount=config.discount,
            steps=steps or None,
            mask=mask,
        )
        squared = squared + jnp.square(error) / len(config.steps)
        absolute = absolute + jnp.abs(error) / len(config.steps)
    items = {
        "loss/total": squared,
        "path/error": absolute,
        "value/mean": value,
        "policy/log_ratio": log_ratio,
        "policy/nll": -logp,
    }
    sums = {name: masked_sum(x, mask) for name, x in items.items()}
    return sums["loss/total"], sums | {"count": jnp.sum(mask, dtype=jnp.float32)}


def make(
    evaluate: Evaluate,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: str | None = None,
) -> Algorithm:
    """Soft Q-learning as `Algorithm(init, update)` on `Batch`; see the module for the metrics.

    Raises ValueError where a setting is unknown or out of range.
    """
    _check_config(config)
    # Paths to the end and "both" bootstrap from no other network.
    polyak = config.polyak if config.gradient == "start" and any(config.steps) else None

    def init(params: PyTree) -> State:
        # A copy: two names of one array could not both be donated.
        target = jax.tree.map(jnp.copy, params) if polyak is not None else None
        return State(params, target, optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(state: State, batch: Batch, key: jax.Array):
        del key
        params, opt_state, metrics = gradient_step(
            partial(loss, evaluate=evaluate, config=config, target=state.target),
            optimizer,
            state.params,
            state.opt_state,
            batch,
            microbatches=config.microbatches,
            axis_name=axis_name,
        )
        target = None if polyak is None else optax.incremental_update(params, state.target, polyak)
        _, mask, nonfinite = clean(batch.reward, batch.mask, batch.truncated)
        metrics |= across(episode_counts(mask, nonfinite), axis_name)
        return State(params, target, opt_state, state.step + 1), metrics

    return Algorithm(init, update)


def _check_config(config: Config) -> None:
    if config.gradient not in GRADIENTS:
        raise ValueError(f"gradient={config.gradient!r} is unknown; choose among {', '.join(GRADIENTS)}")
    check_discount(config.discount)
    if isinstance(config.beta, int | float) and config.beta <= 0:
        raise ValueError(f"beta={config.beta} must be above 0: it is the reward that a nat of KL costs")
    if not config.steps or min(config.steps) < 0:
        raise ValueError(
            f"steps={config.steps} must name path lengths: at least one, each 1 or more, or 0 for the whole episode"
        )
    if isinstance(config.polyak, int | float) and not 0 < config.polyak <= 1:
        raise ValueError(f"polyak={config.polyak} must lie in (0, 1], or be None for no target network")


def _evaluated(evaluation, batch: Batch, mask, config: Config):
    """logp, V(s) and the value after the last action (or None); zeros where masked."""
    evaluation = Evaluation(*evaluation)
    logp = at_actions("logp", evaluation.logp, mask, "soft Q-learning needs it")
    log_partition = at_actions("log_partition", evaluation.log_partition, mask, "soft Q-learning needs it")
    end = after_the_last(evaluation.final, batch.truncated)
    return logp, config.beta * log_partition, None if end is None else config.beta * end
