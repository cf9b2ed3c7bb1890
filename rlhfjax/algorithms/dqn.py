"""Q-learning with a network, a target network and replayed transitions (DQN, Mnih et al. 2015) and its relatives.

    target = reward + discount * value(next observation), the second term only if the episode did not terminate
    loss   = mean over transitions of weight * (huber(target - Q(s, a)) + cql * (log sum_a' exp Q(s, a') - Q(s, a)))

The target gets no gradient. Q^ being the target network,

    bootstrap "max"       value = max_a' Q^(s', a')
              "double"    value = Q^(s', argmax_a' Q(s', a'))                             (arXiv 1509.06461)
              "sarsa"     value = Q^(s', a'), a' the next action of the batch
              "expected"  value = sum_a' pi(a'|s') Q^(s', a'), pi epsilon-greedy in Q^
              "soft"      value = temperature * log sum_a' exp(Q^(s', a') / temperature)
    munchausen            with "soft": the reward gains munchausen * clip(temperature * log pi(a|s), floor, 0),
                          pi the softmax of Q^(s, .) / temperature                        (arXiv 2007.14430)
    quantiles             Q is a distribution, and huber is that of quantile regression   (arXiv 1710.10044)

N-step targets come with the batch: `n_step_transitions` makes it of a rollout. Dueling is a matter of the network
(`rlhfjax.networks.mlp`). Importance weights of prioritised replay come as `weight_B`; `td_error` gives the
priorities. A truncated episode bootstraps like any other: `next_inputs` must be its own final observation.

Metrics (means over the transitions that count, before the step):
    loss/total        weighted
    loss/td           without weights
    loss/cql          log sum exp Q - Q(s, a), nats; also where it is no part of the loss
    td/error          |target - Q(s, a)| (of the means, with quantiles)
    td/error_max      the largest
    q/taken           Q(s, a)
    q/target          what it is moved towards
    batch/count       transitions
    batch/invalid     those left out as bad input: an action that is none, a reward that is not finite
    optimizer/gradient_norm, optimizer/refused

Shapes: B transitions, A actions, N quantiles.

>>> import jax, jax.numpy as jnp, optax
>>> from rlhfjax.config import DQN
>>> algorithm = make(lambda q, state: q[state], optax.sgd(1.0), DQN(discount=0.9, period=1))
>>> one = jnp.array([0])  # in state 0, action 0 gives 1 and leads back to state 0
>>> batch = Batch(one, one, jnp.array([1.0]), one, jnp.array([False]))
>>> state, update = algorithm.init(jnp.zeros((2, 2))), jax.jit(algorithm.update)
>>> for key in jax.random.split(jax.random.key(0), 200):
...     state, metrics = update(state, batch, key)
>>> round(float(state.params[0, 0]), 2)  # 1 / (1 - 0.9)
10.0
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax.algorithms.algorithm import Algorithm, PyTree, Sums, gradient_step
from rlhfjax.algorithms.exploration import epsilon_greedy_probabilities
from rlhfjax.config import DQN as Config
from rlhfjax.ops import (
    cql_penalty,
    double_q_target,
    expected_sarsa_target,
    huber_loss,
    masked_sum,
    munchausen_reward,
    n_step,
    q_learning_target,
    quantile_huber_loss,
    quantile_target,
    sarsa_target,
    soft_log_policy,
    soft_value,
    td_target,
)

BOOTSTRAPS = ("max", "double", "sarsa", "expected", "soft")
TARGETS = ("periodic", "polyak")


class Batch(NamedTuple):
    """Transitions. What is masked may hold anything, and so may what follows a terminated one."""

    inputs: PyTree  # observations, what `evaluate` needs; leading axis B
    action_B: jax.Array  # int
    reward_B: jax.Array  # float; with n-step targets the discounted sum of the rewards between
    next_inputs: PyTree  # the observations bootstrapped from; at a time limit the final one of the episode
    terminated_B: jax.Array  # bool, True where no reward can follow
    discount_B: jax.Array | None = None  # float, worth of the value of next_inputs; None: config.discount
    next_action_B: jax.Array | None = None  # int, taken in next_inputs; for "sarsa"
    weight_B: jax.Array | None = None  # float >= 0, of its loss (prioritised replay); None: 1
    mask_B: jax.Array | None = None  # bool, True where it counts; None: all do


class State(NamedTuple):
    """All that a run needs to go on, but for the replay, which is the caller's."""

    params: PyTree
    target_params: PyTree
    opt_state: PyTree
    step: jax.Array  # int32 [], updates made


# (params, inputs) -> float Q [B, A], with quantiles [B, A, N]. An action that is not available has -inf.
Evaluate = Callable[[PyTree, PyTree], jax.Array]


def loss(
    params: PyTree, batch: Batch, *, evaluate: Evaluate, config: Config, target_params: PyTree
) -> tuple[jax.Array, Sums]:
    """Summed loss over transitions, and sums for the metrics; see the module.

    Args:
      target_params: of the network that the next state is valued by; `params` for none. Gets no gradient.

    Raises ValueError or TypeError that names the field of the batch, or the setting, that does not fit.
    """
    batch, mask_B, invalid = _ready(params, batch, evaluate, config)
    q = _action_values(evaluate(params, batch.inputs), batch, config)
    target = _targets(params, batch, evaluate, config, target_params)
    # Replaced before any arithmetic: a NaN times the zero gradient of a masked transition would be NaN.
    q, target = jnp.where(_like(mask_B, q), q, 0), jnp.where(_like(mask_B, target), target, 0)
    taken = _taken(q, batch.action_B)
    q_BA, taken_B, target_B = (jnp.mean(x, axis=-1) if config.quantiles else x for x in (q, taken, target))
    if config.quantiles:
        td_B = quantile_huber_loss(taken, target, threshold=config.huber)
    elif config.huber is None:
        td_B = 0.5 * jnp.square(target - taken)
    else:
        td_B = huber_loss(target - taken, threshold=config.huber)
    cql_B = cql_penalty(q_BA, batch.action_B)
    total_B = td_B if config.cql is None else td_B + config.cql * cql_B
    error_B = jnp.abs(target_B - taken_B)
    items = {
        "loss/total": total_B if batch.weight_B is None else batch.weight_B * total_B,
        "loss/td": td_B,
        "loss/cql": cql_B,
        "td/error": error_B,
        "q/taken": taken_B,
        "q/target": target_B,
    }
    sums = {name: masked_sum(x, mask_B) for name, x in items.items()}
    sums |= {"td/error_max": jnp.max(jnp.where(mask_B, error_B, 0), initial=0)}
    sums |= {
        "count": jnp.sum(mask_B, dtype=jnp.float32),
        "batch/invalid": jnp.sum(invalid, dtype=jnp.float32),
    }
    return sums["loss/total"], sums


def targets(
    params: PyTree, batch: Batch, *, evaluate: Evaluate, config: Config, target_params: PyTree
) -> jax.Array:
    """What Q(s, action) is moved towards, float32 [B], with quantiles [B, N]; no gradient, 0 where masked.

    Arguments as of `loss`.
    """
    batch, mask_B, _ = _ready(params, batch, evaluate, config)
    target = _targets(params, batch, evaluate, config, target_params)
    return jnp.where(_like(mask_B, target), target, 0)


def td_error(
    params: PyTree, batch: Batch, *, evaluate: Evaluate, config: Config, target_params: PyTree
) -> jax.Array:
    """`target - Q(s, action)` of each transition, float32 [B], of the means with quantiles; 0 where masked.

    Its size is the priority of prioritised replay (arXiv 1511.05952). It costs the forward passes of a loss; after
    an update it is fresh, while that of the update's own pass is of the parameters before it.
    """
    batch, mask_B, _ = _ready(params, batch, evaluate, config)
    q = _action_values(evaluate(params, batch.inputs), batch, config)
    error = _targets(params, batch, evaluate, config, target_params) - _taken(q, batch.action_B)
    error_B = jnp.mean(error, axis=-1) if config.quantiles else error
    return jnp.where(mask_B, error_B, 0)


def n_step_transitions(
    batch: Batch, *, discount: jax.Array | float, steps: int, truncated: jax.Array | None = None
) -> Batch:
    """Transitions over at most `steps` steps, of a rollout: every field of the batch [B, T, ...] in time.

    The reward becomes the discounted sum until the observation bootstrapped from, `discount_B` what the value of
    that is worth, and what speaks of the next state is that of the last step. Paths end with their episode and
    with the rollout, and are shorter there. Nothing reaches across the end of an episode.

    Args:
      batch: a rollout of one-step transitions, leading axes [B, T]; weights are not for rollouts.
      discount: per step, in [0, 1].
      steps: >= 1; 1 leaves the transitions as they are.
      truncated: bool [B, T], True where the episode was cut short after this step. None: nowhere.

    Returns:
      A batch with leading axes [B, T], to be flattened by the caller.
    """
    path = n_step(
        batch.reward_B,
        discount=discount,
        steps=steps,
        mask=batch.mask_B,
        terminated=batch.terminated_B,
        truncated=truncated,
    )

    def at_last(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.vmap(lambda row, index: row[index])(x, path.last), tree)

    return batch._replace(
        reward_B=path.reward,
        discount_B=path.discount,
        next_inputs=at_last(batch.next_inputs),
        terminated_B=at_last(batch.terminated_B),
        next_action_B=at_last(batch.next_action_B),
    )


def make(
    evaluate: Evaluate,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: str | None = None,
) -> Algorithm:
    """The configured method as `Algorithm(init, update)` on `Batch`; see the module for the metrics.

    Raises ValueError on choices that are unknown or contradict each other, or a number out of range.
    """
    check_config(config)

    def init(params: PyTree) -> State:
        # A copy: two names of one buffer cannot both be donated.
        target_params = jax.tree.map(jnp.copy, params)
        return State(params, target_params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(state: State, batch: Batch, key: jax.Array):
        del key
        params, opt_state, metrics = gradient_step(
            partial(loss, evaluate=evaluate, config=config, target_params=state.target_params),
            optimizer,
            state.params,
            state.opt_state,
            batch,
            microbatches=config.microbatches,
            axis_name=axis_name,
        )
        # The step made a mean of it; rounded, it is the number again.
        invalid = jnp.round(metrics["batch/invalid"] * jnp.maximum(metrics["batch/count"], 1.0))
        target_params = _followed(state.target_params, params, state.step + 1, config)
        return State(params, target_params, opt_state, state.step + 1), metrics | {"batch/invalid": invalid}

    return Algorithm(init, update)


def check_config(config: Config) -> None:
    """Raises ValueError on choices that are unknown or contradict each other, or a number out of range."""
    for name, choices in (("bootstrap", BOOTSTRAPS), ("target", TARGETS)):
        if getattr(config, name) not in choices:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is unknown; choose among {', '.join(choices)}"
            )
    for name in ("discount", "epsilon", "polyak"):
        value = getattr(config, name)
        # An array may be traced, and is taken as it comes.
        if isinstance(value, int | float) and not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be in [0, 1]")
    if config.period < 1:
        raise ValueError(f"period must be at least 1 update, got {config.period}")
    if config.munchausen is not None and config.bootstrap != "soft":
        raise ValueError(f'munchausen needs bootstrap="soft", not {config.bootstrap!r}; or set it to None')
    if config.quantiles and config.bootstrap in ("expected", "soft"):
        raise ValueError(
            f'quantiles are those of one action in the next state: choose bootstrap="max", "double" or "sarsa", '
            f"not {config.bootstrap!r}"
        )


def _targets(params: PyTree, batch: Batch, evaluate: Evaluate, config: Config, target_params: PyTree):
    """`targets` of a batch that was checked; what is masked may come out as anything."""
    # Of the parameters, and not of the target: so nothing is kept for a backward pass that will not come.
    params, target_params = jax.lax.stop_gradient((params, target_params))
    next_q = _action_values(evaluate(target_params, batch.next_inputs), batch, config)
    selector = None
    if config.bootstrap == "double":
        selector = evaluate(params, batch.next_inputs)
        selector = jnp.mean(selector, axis=-1) if config.quantiles else selector
    if config.quantiles and config.bootstrap == "sarsa":
        selector = jax.nn.one_hot(batch.next_action_B, next_q.shape[1])
    reward_B = batch.reward_B
    if config.munchausen is not None:
        q = _action_values(evaluate(target_params, batch.inputs), batch, config)
        log_policy = soft_log_policy(q, temperature=config.temperature)
        reward_B = munchausen_reward(
            reward_B,
            _taken(log_policy, batch.action_B),
            temperature=config.temperature,
            scale=config.munchausen,
            floor=config.munchausen_clip,
        )
    discount = config.discount if batch.discount_B is None else batch.discount_B
    rest = {"discount": discount, "terminated": batch.terminated_B}
    if config.quantiles:
        return quantile_target(reward_B, next_q, selector, **rest)
    if selector is not None:
        return double_q_target(reward_B, next_q, selector, **rest)
    if config.bootstrap == "sarsa":
        return sarsa_target(reward_B, next_q, _next_action(batch), **rest)
    if config.bootstrap == "expected":
        policy = epsilon_greedy_probabilities(next_q, config.epsilon)
        return expected_sarsa_target(reward_B, next_q, policy, **rest)
    if config.bootstrap == "soft":
        return td_target(reward_B, soft_value(next_q, temperature=config.temperature), **rest)
    return q_learning_target(reward_B, next_q, **rest)


def _followed(target_params: PyTree, params: PyTree, step: jax.Array, config: Config) -> PyTree:
    """The target network after update number `step`."""
    if config.target == "periodic":
        due = step % config.period == 0
        return jax.tree.map(lambda t, p: jnp.where(due, p, t), target_params, params)
    return jax.tree.map(lambda t, p: (t + config.polyak * (p - t)).astype(t.dtype), target_params, params)


def _action_values(q: jax.Array, batch: Batch, config: Config) -> jax.Array:
    """`q` in float32 or wider. Raises ValueError on another shape than [B, A], with quantiles [B, A, N]."""
    axes = "[B, A, N]" if config.quantiles else "[B, A]"
    if len(q.shape) != len(axes.split(",")) or q.shape[0] != batch.action_B.shape[0]:
        raise ValueError(
            f"evaluate must give action values {axes} with B = {batch.action_B.shape[0]}; it gave shape {q.shape}"
        )
    return q if isinstance(q, jax.ShapeDtypeStruct) else q.astype(jnp.promote_types(q.dtype, jnp.float32))


def _taken(q: jax.Array, action_B: jax.Array) -> jax.Array:
    """[B] of [B, A], or [B, N] of [B, A, N]: those of the action."""
    return jnp.take_along_axis(q, _like(action_B, q), axis=1)[:, 0]


def _like(x_B: jax.Array, other: jax.Array) -> jax.Array:
    """`x` with as many axes as the other."""
    return x_B.reshape(-1, *[1] * (other.ndim - 1))


def _next_action(batch: Batch) -> jax.Array:
    if batch.next_action_B is None:
        raise ValueError('bootstrap="sarsa" needs batch.next_action_B, the action taken in next_inputs')
    return batch.next_action_B


def zeros_where_masked(tree: PyTree, mask: jax.Array) -> PyTree:
    """Every leaf with zeros where `mask` is False; mask has the leading axes of all.

    A network that reads NaN has a NaN gradient, also where nothing depends on what it made of it.
    """

    def zeroed(x: jax.Array) -> jax.Array:
        keep = mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
        return jnp.where(keep, x, jnp.zeros((), x.dtype))

    return jax.tree.map(zeroed, tree)


def _ready(params: PyTree, batch: Batch, evaluate: Evaluate, config: Config):
    """The batch with zeros where nothing counts, where something does, and what was given but is bad input."""
    _check(batch, config)
    given_B = jnp.ones(batch.action_B.shape, bool) if batch.mask_B is None else batch.mask_B.astype(bool)
    batch = batch._replace(mask_B=None)
    q = _action_values(jax.eval_shape(evaluate, params, batch.inputs), batch, config)
    actions = q.shape[1]
    valid_B = (batch.action_B >= 0) & (batch.action_B < actions)
    for x_B in (batch.reward_B, batch.discount_B, batch.weight_B):
        valid_B &= True if x_B is None else jnp.isfinite(x_B)
    if config.bootstrap == "sarsa":
        next_B = _next_action(batch)
        valid_B &= batch.terminated_B.astype(bool) | ((next_B >= 0) & (next_B < actions))
    mask_B = given_B & valid_B
    return zeros_where_masked(batch, mask_B), mask_B, given_B & ~valid_B


def _check(batch: Batch, config: Config) -> None:
    """Raises ValueError or TypeError that names what does not fit."""
    check_config(config)
    if config.bootstrap == "sarsa":
        _next_action(batch)
    shape = batch.action_B.shape
    kinds: dict[str, Any] = {name: jnp.integer for name in ("action_B", "next_action_B")}
    kinds |= {name: jnp.floating for name in ("reward_B", "discount_B", "weight_B")}
    for name in (*kinds, "terminated_B", "mask_B"):
        x = getattr(batch, name)
        if x is None:
            continue
        if x.ndim != 1 or x.shape != shape:
            raise ValueError(f"batch.{name} must be [B] = {shape[:1]}, got shape {x.shape}")
        if name in kinds and not jnp.issubdtype(x.dtype, kinds[name]):
            kind = "float" if kinds[name] is jnp.floating else "integer"
            raise TypeError(f"batch.{name} must be {kind}, got {x.dtype}: convert it")
        if name not in kinds and jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"batch.{name} must be bool, got {x.dtype}: pass batch.{name} > 0")
