"""One-step targets, temporal-difference errors and the losses made of them, one number per transition.

A transition is (s, action, reward, s'), with `terminated` True where no reward can follow it. What a terminated
transition holds of s', NaN included, is never read. A transition that was only cut short, by a time limit, is
like any other here: it bootstraps from s', which must be the final observation of its episode and not the first
of the next one. So these ops take no `truncated`; those over trajectories (`rlhfjax.ops.multistep`) do.

Targets are differentiable in every argument: a semi-gradient method applies `jax.lax.stop_gradient`. There is no
mask: an entry depends on its own transition only, so a caller drops entries from the sum, and replaces what a
masked one holds before it comes here if that may be NaN (0 * NaN is NaN in a gradient).

Shapes: any leading axes, the same for all arguments; A actions, N quantiles, M quantiles of the target, last. An
action that is not available has q = -inf. Where the actions are a large vocabulary, no [..., A] array is needed:
`td_target` takes any value of s', and the maximum or log-sum-exp may be computed in chunks.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhfjax.ops._check import as_float, as_index, as_mask, as_number, require_rank


def td_target(
    reward: ArrayLike, next_value: ArrayLike, *, discount: ArrayLike, terminated: ArrayLike | None = None
) -> Array:
    """`reward + discount * next_value`, and `reward` alone where the transition terminated.

    Args:
      reward: float, any shape.
      next_value: float, the same shape: value of s'; also that of a final observation at a time limit.
      discount: in [0, 1], a scalar or the same shape.
      terminated: bool, the same shape: True where no reward can follow. None: nowhere.

    Returns:
      float32, shape of reward.

    Raises:
      ValueError: a discount given as a Python number lies outside [0, 1].
    """
    reward, ended = _transition(reward, terminated)
    return _bootstrap(reward, as_float("next_value", next_value, reward.shape), discount, ended)


def td_error(
    value: ArrayLike,
    reward: ArrayLike,
    next_value: ArrayLike,
    *,
    discount: ArrayLike,
    terminated: ArrayLike | None = None,
) -> Array:
    """`td_target(reward, next_value) - value`: what TD(0) and Q-learning step along (Sutton and Barto, ch. 6).

    Arguments as of `td_target`; `value` is V(s) or Q(s, action), float, the same shape.
    """
    target = td_target(reward, next_value, discount=discount, terminated=terminated)
    return target - as_float("value", value, target.shape)


def q_learning_target(
    reward: ArrayLike, next_q: ArrayLike, *, discount: ArrayLike, terminated: ArrayLike | None = None
) -> Array:
    """`reward + discount * max_a next_q[a]` (Watkins 1989).

    Args:
      reward: float [...].
      next_q: float [..., A], Q(s', .).
      discount: in [0, 1], a scalar or [...].
      terminated: bool [...], True where no reward can follow. None: nowhere.

    Returns:
      float32 [...].
    """
    reward, ended = _transition(reward, terminated)
    next_q = _after("next_q", next_q, ended)
    return _bootstrap(reward, jnp.max(next_q, axis=-1), discount, ended)


def double_q_target(
    reward: ArrayLike,
    next_q: ArrayLike,
    next_q_selector: ArrayLike,
    *,
    discount: ArrayLike,
    terminated: ArrayLike | None = None,
) -> Array:
    """`reward + discount * next_q[argmax_a next_q_selector[a]]`: one estimate chooses, another one values.

    Double Q-learning (van Hasselt 2010). In double DQN (arXiv:1509.06461) the network being trained chooses, and
    the target network values. The first of several equal maxima is chosen.

    Args:
      next_q: float [..., A], the Q(s', .) that values.
      next_q_selector: float [..., A], the Q(s', .) that chooses; gets no gradient.

    The other arguments and the result are those of `q_learning_target`.
    """
    reward, ended = _transition(reward, terminated)
    next_q = _after("next_q", next_q, ended)
    chosen = jnp.argmax(_after("next_q_selector", next_q_selector, ended, next_q.shape), axis=-1)
    return _bootstrap(reward, _taken(next_q, chosen), discount, ended)


def sarsa_target(
    reward: ArrayLike,
    next_q: ArrayLike,
    next_action: ArrayLike,
    *,
    discount: ArrayLike,
    terminated: ArrayLike | None = None,
) -> Array:
    """`reward + discount * next_q[next_action]`, of the action that was taken in s' (Sutton and Barto, sec. 6.4).

    Args:
      next_q: float [..., A], Q(s', .).
      next_action: integer [...]; not read where the transition terminated.

    The other arguments and the result are those of `q_learning_target`.
    """
    reward, ended = _transition(reward, terminated)
    next_action = jnp.where(ended, 0, as_index("next_action", next_action, reward.shape))
    next_q = _after("next_q", next_q, ended)
    return _bootstrap(reward, _taken(next_q, next_action), discount, ended)


def expected_sarsa_target(
    reward: ArrayLike,
    next_q: ArrayLike,
    next_probability: ArrayLike,
    *,
    discount: ArrayLike,
    terminated: ArrayLike | None = None,
) -> Array:
    """`reward + discount * sum_a next_probability[a] next_q[a]` (van Seijen et al. 2009).

    Args:
      next_q: float [..., A], Q(s', .); may be -inf where the probability is 0.
      next_probability: float [..., A], pi(. | s') of the policy to be evaluated.

    The other arguments and the result are those of `q_learning_target`.
    """
    reward, ended = _transition(reward, terminated)
    next_q = _after("next_q", next_q, ended)
    probability = _after("next_probability", next_probability, ended, next_q.shape)
    # 0 * -inf would be NaN.
    next_q = jnp.where((probability == 0) & (next_q == -jnp.inf), 0, next_q)
    return _bootstrap(reward, jnp.sum(probability * next_q, axis=-1), discount, ended)


def quantile_target(
    reward: ArrayLike,
    next_quantile: ArrayLike,
    next_q_selector: ArrayLike | None = None,
    *,
    discount: ArrayLike,
    terminated: ArrayLike | None = None,
) -> Array:
    """Quantiles of `reward + discount * Z(s', a*)`, a* the best action by its mean (arXiv:1710.10044, algorithm 1).

    Args:
      reward: float [...].
      next_quantile: float [..., A, N], quantiles of the return of every action in s'.
      next_q_selector: float [..., A], the Q(s', .) whose maximum is a*, for a double estimate. None: the mean of
        `next_quantile`.
      discount: in [0, 1], a scalar or [...].
      terminated: bool [...], True where no reward can follow. None: nowhere.

    Returns:
      float32 [..., N]; all N are the reward where the transition terminated.
    """
    reward, ended = _transition(reward, terminated)
    next_quantile = as_float("next_quantile", next_quantile)
    require_rank("next_quantile", next_quantile, 2, "[..., A, N]")
    next_quantile = jnp.where(ended[..., None, None], 0, next_quantile)
    if next_q_selector is None:
        next_q_selector = jnp.mean(next_quantile, axis=-1)
    selector = _after("next_q_selector", next_q_selector, ended, next_quantile.shape[:-1])
    chosen = jnp.argmax(selector, axis=-1)
    best = jnp.take_along_axis(next_quantile, chosen[..., None, None], axis=-2)[..., 0, :]
    discount = as_unit_interval("discount", discount, reward.shape)
    return reward[..., None] + jnp.broadcast_to(discount, reward.shape)[..., None] * best


def soft_value(q: ArrayLike, *, temperature: ArrayLike, logp_ref: ArrayLike | None = None) -> Array:
    """`temperature * log sum_a exp(logp_ref[a] + q[a] / temperature)`: the value of the best soft policy.

    The largest `E_pi[q] - temperature * KL(pi || ref)` that any pi reaches. Without a reference each action has
    weight 1 (and not 1 / A), and it is the largest `E_pi[q] + temperature * entropy(pi)`. As the temperature goes
    to 0 it goes to the maximum.

    Args:
      q: float [..., A].
      temperature: scalar > 0, units of q per nat.
      logp_ref: float [..., A], log-probabilities of the reference policy, in nats. None: zeros.

    Returns:
      float32 [...].
    """
    temperature = as_number("temperature", temperature)
    return temperature * jax.nn.logsumexp(_soft_logits(q, temperature, logp_ref), axis=-1)


def soft_log_policy(q: ArrayLike, *, temperature: ArrayLike, logp_ref: ArrayLike | None = None) -> Array:
    """`logp_ref + (q - soft_value(q)) / temperature`, [..., A] in nats: the policy whose value that is.

    Arguments as of `soft_value`.
    """
    return jax.nn.log_softmax(_soft_logits(q, as_number("temperature", temperature), logp_ref), axis=-1)


def munchausen_reward(
    reward: ArrayLike,
    logp: ArrayLike,
    *,
    temperature: ArrayLike,
    scale: ArrayLike = 0.9,
    floor: ArrayLike = -1.0,
) -> Array:
    """`reward + scale * clip(temperature * logp, floor, 0)`, the augmented reward of arXiv:2007.14430.

    Munchausen DQN bootstraps from the soft value: the target is `td_target(munchausen_reward(...), soft_value(next_q,
    temperature=temperature), ...)`, both of the target network. Its setting is a temperature of 0.03.

    Args:
      reward: float, any shape.
      logp: float, the same shape: log pi(action | s) in nats, pi = `soft_log_policy` of the target network.
      temperature: scalar > 0, reward per nat.
      scale: scalar in [0, 1], share of the scaled log-policy that is added.
      floor: scalar <= 0, units of reward: bound of the scaled log-policy of an action that has become improbable.

    Returns:
      float32, shape of reward.
    """
    reward = as_float("reward", reward)
    logp = as_float("logp", logp, reward.shape)
    bonus = jnp.clip(as_number("temperature", temperature) * logp, as_number("floor", floor), 0)
    return reward + as_number("scale", scale) * bonus


def path_consistency_error(
    value: ArrayLike,
    reward: ArrayLike,
    next_value: ArrayLike,
    log_ratio: ArrayLike,
    *,
    temperature: ArrayLike,
    discount: ArrayLike,
    terminated: ArrayLike | None = None,
) -> Array:
    """`reward - temperature * log_ratio + discount * next_value - value`, 0 at the soft optimum (arXiv:1702.08892).

    At the optimum it is 0 on every transition, whoever acted; so its square may be minimised on any data. Where
    the policy is `soft_log_policy(q)` and `value` is `soft_value(q)`, `temperature * log_ratio + value` is Q(s,
    action). Over several steps: `multistep_path_consistency_error`.

    Args:
      value: float, any shape: soft value of s.
      reward: float, the same shape.
      next_value: float, the same shape: soft value of s'.
      log_ratio: float, the same shape: log pi(action | s) - log pi_ref(action | s) in nats; without a reference
        log pi(action | s).
      temperature: scalar > 0, reward per nat.
      discount: in [0, 1], a scalar or the same shape.
      terminated: bool, the same shape: True where no reward can follow. None: nowhere.

    Returns:
      float32, shape of value.
    """
    penalised = penalised_reward(reward, log_ratio, temperature=temperature)
    return td_error(value, penalised, next_value, discount=discount, terminated=terminated)


def huber_loss(error: ArrayLike, *, threshold: ArrayLike = 1.0) -> Array:
    """`error^2 / 2` up to `threshold`, beyond it `threshold * (|error| - threshold / 2)`; elementwise (Huber 1964).

    Its gradient is the error clipped to +-threshold, the "error clipping" of DQN.

    Args:
      error: float, any shape.
      threshold: scalar > 0, units of the error.
    """
    size = jnp.abs(as_float("error", error))
    threshold = as_number("threshold", threshold)
    quadratic = jnp.minimum(size, threshold)
    return quadratic * (size - 0.5 * quadratic)


def expectile_loss(error: ArrayLike, *, expectile: ArrayLike) -> Array:
    """`|expectile - 1(error < 0)| * error^2`, elementwise (arXiv:2110.06169, sec. 4.1).

    With `error = Q(s, a) - V(s)` an expectile near 1 makes V the value of the best actions among those seen; 0.5 is
    half the squared error.

    Args:
      error: float, any shape: target - prediction.
      expectile: scalar in [0, 1].
    """
    error = as_float("error", error)
    expectile = as_unit_interval("expectile", expectile)
    return jnp.where(error < 0, 1 - expectile, expectile) * jnp.square(error)


def quantile_huber_loss(
    quantile: ArrayLike,
    target: ArrayLike,
    *,
    threshold: ArrayLike | None = 1.0,
    probability: ArrayLike | None = None,
) -> Array:
    """Loss of quantile regression, of QR-DQN (arXiv:1710.10044):

        sum_i mean_j |probability[i] - 1(u[i, j] < 0)| * huber(u[i, j]),    u[i, j] = target[j] - quantile[i]

    Args:
      quantile: float [..., N], predicted quantiles of the return of the action taken.
      target: float [..., M], samples or quantiles of the target; see `quantile_target`.
      threshold: scalar > 0, of the Huber loss, units of return; None: |u| in its place, whose minimum are the
        quantiles themselves.
      probability: float [N] or [..., N], the level of each quantile in [0, 1]. None: the midpoints (2 i + 1) / (2 N).

    Returns:
      float32 [...].
    """
    quantile = as_float("quantile", quantile)
    require_rank("quantile", quantile, 1, "[..., N]")
    target = as_float("target", target)
    require_rank("target", target, 1, "[..., M]")
    target = as_float("target", target, (*quantile.shape[:-1], target.shape[-1]))
    n = quantile.shape[-1]
    if probability is None:
        probability = (2 * jnp.arange(n, dtype=quantile.dtype) + 1) / (2 * n)
    level = as_float("probability", probability)
    if level.ndim == 1:
        level = jnp.broadcast_to(level, quantile.shape)
    level = as_float("probability", level, quantile.shape)[..., None]
    error = target[..., None, :] - quantile[..., :, None]
    size = jnp.abs(error) if threshold is None else huber_loss(error, threshold=threshold)
    return jnp.sum(jnp.mean(jnp.where(error < 0, 1 - level, level) * size, axis=-1), axis=-1)


def cql_penalty(q: ArrayLike, action: ArrayLike, *, temperature: ArrayLike = 1.0) -> Array:
    """`temperature * log sum_a exp(q[a] / temperature) - q[action]`: the regulariser CQL(H) of arXiv:2006.04779.

    Pushes down the values of actions that the data does not hold. Divided by the temperature it is the
    cross-entropy of softmax(q / temperature), the form in which language models use it.

    Args:
      q: float [..., A].
      action: integer [...], the action in the data.
      temperature: scalar > 0, units of q.

    Returns:
      float32 [...], >= 0.
    """
    q = as_float("q", q)
    require_rank("q", q, 1, "[..., A]")
    action = as_index("action", action, q.shape[:-1])
    return soft_value(q, temperature=temperature) - _taken(q, action)


def penalised_reward(reward: ArrayLike, log_ratio: ArrayLike, *, temperature: ArrayLike) -> Array:
    """`reward - temperature * log_ratio`, elementwise: the reward less the price of leaving the reference."""
    reward = as_float("reward", reward)
    return reward - as_number("temperature", temperature) * as_float("log_ratio", log_ratio, reward.shape)


def as_unit_interval(name: str, x: ArrayLike, shape: tuple[int, ...] = ()) -> Array:
    """`x`, a scalar or of `shape`. A Python number outside [0, 1] is refused; an array is not looked into."""
    if isinstance(x, int | float) and not 0 <= x <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {x}")
    return as_number(name, x, shape)


def _transition(reward: ArrayLike, terminated: ArrayLike | None) -> tuple[Array, Array]:
    """The reward as a float, and where no reward can follow."""
    reward = as_float("reward", reward)
    if terminated is None:
        return reward, jnp.zeros(reward.shape, bool)
    return reward, as_mask("terminated", terminated, reward.shape)


def _after(name: str, x: ArrayLike, ended: Array, shape: tuple[int, ...] | None = None) -> Array:
    """`x` [..., A] of s', 0 where there is no s'; before any arithmetic, so that no NaN comes from there."""
    x = as_float(name, x)
    require_rank(name, x, 1, "[..., A]")
    x = as_float(name, x, (*ended.shape, x.shape[-1]) if shape is None else shape)
    return jnp.where(ended[..., None], 0, x)


def _bootstrap(reward: Array, next_value: Array, discount: ArrayLike, ended: Array) -> Array:
    discount = as_unit_interval("discount", discount, reward.shape)
    return reward + discount * jnp.where(ended, 0, next_value)


def _taken(q: Array, action: Array) -> Array:
    """q[action] along the last axis."""
    return jnp.take_along_axis(q, action[..., None], axis=-1)[..., 0]


def _soft_logits(q: ArrayLike, temperature: Array, logp_ref: ArrayLike | None) -> Array:
    q = as_float("q", q)
    require_rank("q", q, 1, "[..., A]")
    logits = q / temperature
    return logits if logp_ref is None else logits + as_float("logp_ref", logp_ref, q.shape)
