"""Q-learning of language models from recorded episodes: ILQL (arXiv 2206.11871) and its plainer relatives.

At every action of the agent, with Q^ the target network and s' the state of the agent's *next action* (the words of
the environment between are no state of it; after the last action all values are 0, or, cut short, those of the end):

    Q loss        sum over heads i of (y - Q_i(s, a))^2
      bootstrap="value"      y = r + discount V(s')                             ILQL
                "sarsa"      y = r + discount ((1 - lam) min_i Q^_i(s', a') + lam y')     value of the data's policy
                "max"        y = r + discount max_a min_i Q^_i(s', a)           DQN; double where evaluate_target is
                "returns"    y = sum of the discounted rewards from here on     Monte Carlo
    V loss        |expectile - 1(u < 0)| u^2,  u = min_i Q^_i(s, a) - V(s)      expectile regression (arXiv 2110.06169)
    CQL           sum over heads of -log softmax(Q_i(s, .) / temperature)(a)    as ILQL has it
    policy        -w log pi(a|s),  w = exp(advantage_beta u), or 1: cloning

    total = Q loss + V loss + cql_coefficient CQL + policy_coefficient policy

Targets and w get no gradient. After every step Q^ <- Q^ + polyak (Q - Q^). "sarsa" on samples of a frozen policy is
TD(lambda) of its value. A policy is then sampled from log pi + beta (min_i Q_i - V): `rlhfjax.generation.guided`.

Metrics, means over actions:

    loss/total, loss/q           loss/q is summed over the heads
    loss/value, loss/cql, loss/policy    where the config has that term, without its coefficient
    q/taken, q/target            mean of the heads' Q(s, a); y
    q/error                      |y - Q(s, a)|, mean of the heads
    value/mean, value/advantage  V(s) and u, where V is learnt
    policy/weight                w, where the policy is learnt
    batch/count                  number of actions
    optimizer/gradient_norm      before clipping
    optimizer/refused            share of gradient steps not made, their gradient not being finite

and counts: batch/episodes (with an action), batch/without_action (nothing to learn from), reward/nonfinite (left out).

>>> import jax, jax.numpy as jnp, optax
>>> from rlhfjax.config import ILQL
>>> def evaluate(params, action):  # a bandit: [heads, B, T] and [B, T]
...     q = params["q"][:, action]
...     logits = jax.nn.log_softmax(params["q"])[:, action]
...     return Evaluation(q, jnp.broadcast_to(params["v"], action.shape), logits)
>>> config = ILQL(policy_coefficient=None, cql_coefficient=None, expectile=0.9, polyak=0.5)
>>> algorithm = make(evaluate, optax.sgd(0.2), config)
>>> state = algorithm.init({"q": jnp.zeros((2, 4)), "v": jnp.zeros(())})
>>> action = jnp.arange(8)[:, None] % 4
>>> episodes = Episodes(action, reward=action.astype(jnp.float32), mask=jnp.ones(action.shape, bool))
>>> update = jax.jit(algorithm.update)
>>> for key in jax.random.split(jax.random.key(0), 200):
...     state, metrics = update(state, episodes, key)
>>> [round(float(q), 2) for q in state.params["q"][0]]
[0.0, 1.0, 2.0, 3.0]
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.algorithms.algorithm import Algorithm, PyTree, Sums, across, gradient_step
from rlhfjax.algorithms.turns import (
    Episodes,
    after_the_last,
    at_actions,
    at_next_action,
    check_discount,
    clean,
    episode_counts,
)
from rlhfjax.config import ILQL as Config
from rlhfjax.ops import expectile_loss, lambda_returns, masked_sum

__all__ = ["Config", "Episodes", "Evaluation", "State", "loss", "make"]

BOOTSTRAPS = ("value", "sarsa", "max", "returns")


class Evaluation(NamedTuple):
    """What the losses need to know of the values at the actions: not all Q, of which a vocabulary has too many.

    Of the target network only `taken` is read or, with bootstrap "max", `best` (and its `final`).
    """

    taken: jax.Array  # float [heads, B, ..., T], Q_i(s, a) of the action taken
    value: jax.Array | None = None  # float [B, ..., T], V(s)
    log_softmax: jax.Array | None = None  # float [heads, B, ..., T], log softmax(Q_i / temperature) at a
    logp: jax.Array | None = None  # float [B, ..., T], log-probability of the action, nats
    best: jax.Array | None = None  # float [B, ..., T], max over actions of min over heads
    final: jax.Array | None = None  # float [B, ...], V (of the target network: best) after the last token


class State(NamedTuple):
    """All that a run needs to go on."""

    params: PyTree
    target: PyTree  # slow copy of what `target_of` picks
    opt_state: PyTree
    step: jax.Array  # int32 [], updates made


Evaluate = Callable[[PyTree, PyTree], Evaluation]  # (params, inputs)
EvaluateTarget = Callable[[PyTree, PyTree, PyTree], Evaluation]  # (target, inputs, params)


def loss(
    params: PyTree,
    batch: Episodes,
    *,
    target: PyTree,
    evaluate: Evaluate,
    config: Config,
    evaluate_target: EvaluateTarget | None = None,
) -> tuple[jax.Array, Sums]:
    """Summed losses over the actions, and sums for the metrics; see the module for the terms.

    Args:
      target: parameters of the target network; they get no gradient.
      evaluate_target: None: `evaluate` with the target's parameters.

    Raises ValueError where `evaluate` does not give what the config needs.
    """
    reward, mask, _ = clean(batch.reward, batch.mask, batch.truncated)
    online = evaluate(params, batch.inputs)
    taken = at_actions("taken", online.taken, mask, "Q-learning needs it", heads=True)
    value = None
    if config.expectile is not None:
        value = at_actions("value", online.value, mask, "expectile is set; set expectile=None for no V")
    slow = _target_evaluation(params, batch, target, evaluate, evaluate_target)
    slow_taken = at_actions(
        "taken", slow.taken, mask, "Q-learning needs it", heads=True, source="evaluate_target"
    )
    slow_taken = jnp.min(slow_taken, axis=0)
    y = jax.lax.stop_gradient(
        _targets(reward, mask, batch.truncated, online, value, slow, slow_taken, config)
    )
    error = y[None] - taken
    items = {"loss/q": jnp.sum(jnp.square(error), axis=0)}
    total = items["loss/q"]
    advantage = None
    if value is not None and config.expectile is not None:
        advantage = slow_taken - value
        items["loss/value"] = expectile_loss(advantage, expectile=config.expectile)
        total = total + items["loss/value"]
        items |= {"value/mean": value, "value/advantage": advantage}
    if config.cql_coefficient is not None:
        why = "cql_coefficient is set; set cql_coefficient=None for no such term"
        log_softmax = at_actions("log_softmax", online.log_softmax, mask, why, heads=True)
        items["loss/cql"] = -jnp.sum(log_softmax, axis=0)
        total = total + config.cql_coefficient * items["loss/cql"]
    if config.policy_coefficient is not None:
        items |= _policy_loss(online, mask, advantage, config)
        total = total + config.policy_coefficient * items["loss/policy"]
    items |= {"q/taken": jnp.mean(taken, axis=0), "q/target": y, "q/error": jnp.mean(jnp.abs(error), axis=0)}
    sums = {name: masked_sum(x, mask) for name, x in ({"loss/total": total} | items).items()}
    return sums["loss/total"], sums | {"count": jnp.sum(mask, dtype=jnp.float32)}


def make(
    evaluate: Evaluate,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: str | None = None,
    *,
    target_of: Callable[[PyTree], PyTree] | None = None,
    evaluate_target: EvaluateTarget | None = None,
) -> Algorithm:
    """Q-learning on episodes as `Algorithm(init, update)` on `Episodes`; see the module for the metrics.

    Args:
      evaluate: `(params, inputs) -> Evaluation`.
      target_of: the part of the params that the target network copies; None: all of them.
      evaluate_target: `(target, inputs, params) -> Evaluation` of that part; params are those in training, which
        choose the action of double Q-learning. None: `evaluate(target, inputs)`.

    Raises ValueError where a setting is unknown, out of range or contradicts another.
    """
    _check_config(config)
    if target_of is not None and evaluate_target is None:
        raise ValueError("target_of picks a part of the params: give evaluate_target, which evaluates it")
    pick = target_of or (lambda params: params)

    def init(params: PyTree) -> State:
        # A copy: two names of one array could not both be donated.
        target = jax.tree.map(jnp.copy, pick(params))
        return State(params, target, optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(state: State, batch: Episodes, key: jax.Array):
        del key
        loss_now = partial(
            loss, target=state.target, evaluate=evaluate, config=config, evaluate_target=evaluate_target
        )
        params, opt_state, metrics = gradient_step(
            loss_now,
            optimizer,
            state.params,
            state.opt_state,
            batch,
            microbatches=config.microbatches,
            axis_name=axis_name,
        )
        target = optax.incremental_update(pick(params), state.target, config.polyak)
        _, mask, nonfinite = clean(batch.reward, batch.mask, batch.truncated)
        metrics |= across(episode_counts(mask, nonfinite), axis_name)
        return State(params, target, opt_state, state.step + 1), metrics

    return Algorithm(init, update)


def _check_config(config: Config) -> None:
    if config.bootstrap not in BOOTSTRAPS:
        raise ValueError(f"bootstrap={config.bootstrap!r} is unknown; choose among {', '.join(BOOTSTRAPS)}")
    check_discount(config.discount)
    if config.bootstrap == "value" and config.expectile is None:
        raise ValueError('bootstrap="value" needs V: set expectile, or choose another bootstrap')
    if isinstance(config.expectile, int | float) and not 0 < config.expectile < 1:
        raise ValueError(f"expectile={config.expectile} must lie between 0 and 1; 0.5 is the mean")
    if isinstance(config.polyak, int | float) and not 0 < config.polyak <= 1:
        raise ValueError(f"polyak={config.polyak} must lie in (0, 1]; 1 copies the network at every step")
    if config.advantage_beta is not None and config.expectile is None:
        raise ValueError("advantage_beta weights by Q - V and needs V: set expectile, or advantage_beta=None")


def _target_evaluation(params, batch: Episodes, target, evaluate, evaluate_target) -> Evaluation:
    if evaluate_target is None:
        return jax.lax.stop_gradient(evaluate(target, batch.inputs))
    fixed = jax.lax.stop_gradient(params)
    return jax.lax.stop_gradient(evaluate_target(target, batch.inputs, fixed))


def _targets(reward, mask, truncated, online, value, slow, slow_taken, config: Config) -> jax.Array:
    """y of every action, [B, ..., T]."""
    if config.bootstrap == "max":
        why = 'bootstrap="max" needs it of the target network'
        later = at_actions("best", slow.best, mask, why, source="evaluate_target")
    else:
        later = value if config.bootstrap == "value" else slow_taken
    final = slow.final if config.bootstrap == "max" else online.final
    following = at_next_action(later, mask, after_the_last(final, truncated))
    lam = {"sarsa": config.lam, "returns": 1.0}.get(config.bootstrap, 0.0)
    return lambda_returns(reward, following, discount=config.discount, lam=lam, mask=mask)


def _policy_loss(online: Evaluation, mask, advantage, config: Config) -> dict[str, jax.Array]:
    """Weighted negative log-likelihood of the actions, and their weights."""
    logp = at_actions("logp", online.logp, mask, "policy_coefficient is set; None trains no policy")
    weight = jnp.ones_like(logp)
    if config.advantage_beta is not None:
        weight = jnp.exp(config.advantage_beta * jax.lax.stop_gradient(advantage))
        if config.weight_clip is not None:
            weight = jnp.minimum(weight, config.weight_clip)
    return {"loss/policy": -weight * logp, "policy/weight": weight}
