"""Targets over several steps of a trajectory: n-step, lambda-returns, Q(lambda), Retrace, V-trace, path consistency.

Time is the last axis, any leading axes are independent. An array may hold several episodes one after the other,
as an environment that resets itself leaves them. Step t ends its episode where `terminated` or `truncated` is
True, and nothing that lies behind that step reaches it or what is before it. Then

    terminated[t]                  the return of step t is reward[t]
    truncated[t]                   it is reward[t] + discount[t] * next_value[t]
    the last step that counts      the same: what comes after the array was not seen either

`next_value[t]` is the value of the observation that followed action t *in its own episode*: where the environment
resets itself in the same step, of the final observation, and not of the one that the array holds at t + 1. (An
environment that resets in a step of its own has a step there that is no action: mask it out.) It is asked for
everywhere, and not taken from the array at t + 1, because that is how the two get mixed up.
`value_at_next` makes it where episodes end by themselves, as text does.

A masked position is skipped as if it had been cut out: the step after an action is the next one that counts, as
for the turns of a dialogue with the environment's tokens between. What it holds, NaN included, is never read, and
its result is 0. Gradients flow through every argument; callers that want targets apply `jax.lax.stop_gradient`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhfjax.ops._check import as_float, as_mask, as_number, require_rank
from rlhfjax.ops.returns import _accumulate, _flags, _value_at_next
from rlhfjax.ops.td import as_unit_interval, penalised_reward


class NStep(NamedTuple):
    """What lies between a step and the observation that it bootstraps from, all [..., T]."""

    reward: Array  # float32, discounted sum of the rewards between
    discount: Array  # float32, product of the discounts between; 0 where the episode terminated
    last: Array  # int32, the position whose next observation is bootstrapped from


class VTrace(NamedTuple):
    """V-trace's two results, float32 [..., T]."""

    returns: Array  # target of the value
    advantage: Array  # for the policy gradient


class _Steps(NamedTuple):
    """A trajectory after the door, all [..., T]; zeros where masked or terminated."""

    reward: Array
    discount: Array  # 0 where terminated
    next_value: Array
    cut: Array  # bool, True where the following position is of another episode, or of none
    mask: Array


def n_step(
    reward: ArrayLike,
    *,
    discount: ArrayLike,
    steps: int,
    mask: ArrayLike | None = None,
    terminated: ArrayLike | None = None,
    truncated: ArrayLike | None = None,
) -> NStep:
    """Transitions over at most `steps` steps, for a replay whose values are computed later:

        target[t] = reward[t] + discount[t] * V(next observation of step last[t])

    A path that reaches the end of its episode or of the array before `steps` is shorter; its discount is the
    product over the steps it has.

    Args:
      reward: float [..., T], reward of action t.
      discount: per step, in [0, 1], a scalar or [..., T].
      steps: >= 1.
      mask: bool [..., T], True where position t counts. None: all do.
      terminated: bool [..., T], True where no reward can follow action t; wins over `truncated`. None: nowhere.
      truncated: bool [..., T], True where the episode was cut short after action t. None: nowhere.

    Returns:
      NStep of [..., T]; where masked out 0, 0 and the position itself.

    Raises:
      ValueError: steps is not a positive Python int.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive Python int, got {steps!r}")
    # The value is not needed: zeros take its place.
    taken = _steps(reward, jnp.zeros(jnp.shape(reward)), discount, mask, terminated, truncated)
    # `zeros_like`, so that under `shard_map` positions, which the loop carries too, vary over devices as rewards do.
    zeros_T = jnp.zeros_like(taken.reward, jnp.int32)
    position_T = zeros_T + jnp.broadcast_to(jnp.arange(zeros_T.shape[-1], dtype=jnp.int32), zeros_T.shape)

    def scan_time(taken: _Steps, position_T: Array) -> NStep:
        def step(after: NStep, now: tuple[_Steps, Array]) -> tuple[NStep, NStep]:
            here, position = now
            # Entry k - 1 of `after` and of `paths` is the path of at most k steps from the next step and from here.
            empty = NStep(jnp.zeros_like(here.reward), jnp.ones_like(here.discount), position)
            shorter = jax.tree.map(lambda first, rest: jnp.append(first, rest[:-1]), empty, after)
            shorter = jax.tree.map(lambda first, path: jnp.where(here.cut, first, path), empty, shorter)
            paths = NStep(
                here.reward + here.discount * shorter.reward, here.discount * shorter.discount, shorter.last
            )
            paths = jax.tree.map(lambda path, old: jnp.where(here.mask, path, old), paths, after)
            return paths, jax.tree.map(lambda path: path[-1], paths)

        nothing = jax.tree.map(
            lambda x: jnp.zeros_like(x, shape=(steps,)), NStep(taken.reward, taken.discount, position_T)
        )
        return jax.lax.scan(step, nothing, (taken, position_T), reverse=True)[1]

    for _ in range(position_T.ndim - 1):
        scan_time = jax.vmap(scan_time)
    path = scan_time(taken, position_T)
    zero = jnp.zeros_like(path.reward)
    skipped = NStep(zero, zero, position_T)
    return jax.tree.map(lambda kept, other: jnp.where(taken.mask, kept, other), path, skipped)


def n_step_returns(
    reward: ArrayLike,
    next_value: ArrayLike,
    *,
    discount: ArrayLike,
    steps: int,
    mask: ArrayLike | None = None,
    terminated: ArrayLike | None = None,
    truncated: ArrayLike | None = None,
) -> Array:
    """Sum of the rewards of at most `steps` steps, discounted, and the value after the last of them:

        G[t] = reward[t] + discount[t] * (... reward[last] + discount[last] * next_value[last])

    with `last = t + steps - 1`, or the end of the episode or of the array before it. (Sutton and Barto, ch. 7.)

    Args:
      next_value: float [..., T], value of the observation after action t: V, or max Q, or of a double estimate.

    The other arguments are those of `n_step`. Returns float32 [..., T].
    """
    path = n_step(
        reward, discount=discount, steps=steps, mask=mask, terminated=terminated, truncated=truncated
    )
    taken = _steps(reward, next_value, discount, mask, terminated, truncated)
    return path.reward + path.discount * jnp.take_along_axis(taken.next_value, path.last, axis=-1)


def lambda_returns(
    reward: ArrayLike,
    next_value: ArrayLike,
    *,
    discount: ArrayLike,
    lam: ArrayLike,
    mask: ArrayLike | None = None,
    terminated: ArrayLike | None = None,
    truncated: ArrayLike | None = None,
) -> Array:
    """The target of TD(lambda), a mixture of all n-step returns (Sutton and Barto, ch. 12):

        G[t] = reward[t] + discount[t] * ((1 - lam) * next_value[t] + lam * G[t + 1])

    with `next_value[t]` in place of the bracket where the episode was cut short, and 0 where it terminated. What
    `next_value` is decides the method: V gives TD(lambda), Q(s', a') of the action taken SARSA(lambda), the
    expectation of Q expected SARSA, the maximum Peng's Q(lambda), `soft_value` soft Q-learning. lam = 0 is one
    step, lam = 1 Monte Carlo. `gae` gives the same returns where its `value` and `next_value` are of one network.

    Args:
      reward: float [..., T], reward of action t.
      next_value: float [..., T], value of the observation after action t.
      discount: per step, in [0, 1], a scalar or [..., T].
      lam: in [0, 1], a scalar or [..., T]; lam[t] is the weight of G[t + 1].
      mask: bool [..., T], True where position t counts. None: all do.
      terminated: bool [..., T], True where no reward can follow action t; wins over `truncated`. None: nowhere.
      truncated: bool [..., T], True where the episode was cut short after action t. None: nowhere.

    Returns:
      float32 [..., T]; 0 where masked out.
    """
    taken = _steps(reward, next_value, discount, mask, terminated, truncated)
    lam_T = as_unit_interval("lam", lam, taken.mask.shape)
    lam_T = jnp.where(taken.mask & ~taken.cut, lam_T, 0)
    one_step_T = taken.reward + taken.discount * (1 - lam_T) * taken.next_value
    return jnp.where(taken.mask, _accumulate(one_step_T, taken.discount * lam_T, taken.mask), 0)


def q_lambda_returns(
    reward: ArrayLike,
    next_q: ArrayLike,
    *,
    discount: ArrayLike,
    lam: ArrayLike,
    greedy: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    terminated: ArrayLike | None = None,
    truncated: ArrayLike | None = None,
) -> Array:
    """The target of Q(lambda): `lambda_returns` with `next_value[t] = max_a next_q[t, a]`.

    Peng's (Peng and Williams 1994; the target of PQN, arXiv:2407.04811) mixes whatever was done. Watkins' (1989)
    stops at the first action that was not greedy, which is given by `greedy`: lam counts at t only where the next
    action, greedy[t + 1], was the one that the maximum speaks of.

    Args:
      next_q: float [..., T, A], Q of the observation after action t.
      greedy: bool [..., T], True where action t was a greedy one: Watkins'. None: Peng's.

    The other arguments and the result are those of `lambda_returns`.
    """
    reward = as_float("reward", reward)
    require_rank("reward", reward, 1, "[..., T]")
    mask_T = as_mask("mask", mask, reward.shape)
    next_q = as_float("next_q", next_q)
    require_rank("next_q", next_q, 2, "[..., T, A]")
    next_q = as_float("next_q", next_q, (*reward.shape, next_q.shape[-1]))
    # Replaced before the maximum, whose gradient at NaN is NaN.
    read_T = mask_T & ~_flags("terminated", terminated, reward.shape)
    next_value_T = jnp.max(jnp.where(read_T[..., None], next_q, 0), axis=-1)
    if greedy is not None:
        greedy_T = as_mask("greedy", greedy, reward.shape).astype(reward.dtype)
        lam = as_unit_interval("lam", lam, reward.shape) * _value_at_next(greedy_T, mask_T)
    return lambda_returns(
        reward,
        next_value_T,
        discount=discount,
        lam=lam,
        mask=mask_T,
        terminated=terminated,
        truncated=truncated,
    )


def retrace(
    reward: ArrayLike,
    q: ArrayLike,
    next_value: ArrayLike,
    log_ratio: ArrayLike,
    *,
    discount: ArrayLike,
    lam: ArrayLike,
    mask: ArrayLike | None = None,
    terminated: ArrayLike | None = None,
    truncated: ArrayLike | None = None,
) -> Array:
    """The target of Retrace for Q (arXiv:1606.02647), off policy:

        G[t] = reward[t] + discount[t] * (next_value[t] + c[t + 1] * (G[t + 1] - q[t + 1])),
        c[t] = lam * min(1, exp(log_ratio[t]))

    without the term in c at the end of an episode, cut short or not.

    Args:
      reward: float [..., T], reward of action t.
      q: float [..., T], Q(s_t, action_t).
      next_value: float [..., T], the expectation of Q under the policy to be evaluated, of the observation after
        action t.
      log_ratio: float [..., T], log pi(action_t | s_t) - log mu(action_t | s_t) in nats: the policy to be evaluated
        over the one that acted.
      discount: per step, in [0, 1], a scalar or [..., T].
      lam: in [0, 1], a scalar or [..., T].
      mask, terminated, truncated: as in `lambda_returns`.

    Returns:
      float32 [..., T]; 0 where masked out.
    """
    taken = _steps(reward, next_value, discount, mask, terminated, truncated)
    shape = taken.mask.shape
    q_T = jnp.where(taken.mask, as_float("q", q, shape), 0)
    trace_T = as_unit_interval("lam", lam, shape) * _clipped_ratio(log_ratio, 1.0, taken.mask)
    next_trace_T = jnp.where(taken.cut, 0, _value_at_next(trace_T, taken.mask))
    delta_T = taken.reward + taken.discount * taken.next_value - q_T
    correction_T = _accumulate(delta_T, taken.discount * next_trace_T, taken.mask)
    return jnp.where(taken.mask, q_T + correction_T, 0)


def vtrace(
    reward: ArrayLike,
    value: ArrayLike,
    next_value: ArrayLike,
    log_ratio: ArrayLike,
    *,
    discount: ArrayLike,
    lam: ArrayLike = 1.0,
    clip_rho: ArrayLike = 1.0,
    clip_trace: ArrayLike = 1.0,
    clip_policy: ArrayLike = 1.0,
    mask: ArrayLike | None = None,
    terminated: ArrayLike | None = None,
    truncated: ArrayLike | None = None,
) -> VTrace:
    """V-trace (arXiv:1802.01561, eq. 1): the target of V and the advantage, off policy. With ratio = exp(log_ratio):

        rho[t] = min(clip_rho, ratio[t]),    c[t] = lam * min(clip_trace, ratio[t])
        delta[t] = rho[t] * (reward[t] + discount[t] * next_value[t] - value[t])
        returns[t] = value[t] + delta[t] + discount[t] * c[t] * (returns[t + 1] - value[t + 1])
        advantage[t] = min(clip_policy, ratio[t]) * (reward[t] + discount[t] * G[t] - value[t]),
        G[t] = (1 - lam) * next_value[t] + lam * returns[t + 1]

    At the end of an episode the term in c is dropped and G is `next_value`. `clip_rho` decides whose value the fixed
    point is (infinite: the policy's own), `clip_trace` only how fast it is reached.

    Args:
      reward: float [..., T], reward of action t.
      value: float [..., T], V(s_t).
      next_value: float [..., T], V of the observation after action t.
      log_ratio: float [..., T], log pi(action_t | s_t) - log mu(action_t | s_t) in nats: the policy being trained
        over the one that acted.
      discount: per step, in [0, 1], a scalar or [..., T].
      lam: in [0, 1], a scalar or [..., T]; 1 in the paper.
      clip_rho, clip_trace, clip_policy: scalars > 0; rho-bar and c-bar of the paper, and the bound of the ratio in
        the advantage.
      mask, terminated, truncated: as in `lambda_returns`.

    Returns:
      VTrace of float32 [..., T]; 0 where masked out.
    """
    taken = _steps(reward, next_value, discount, mask, terminated, truncated)
    shape = taken.mask.shape
    value_T = jnp.where(taken.mask, as_float("value", value, shape), 0)
    lam_T = jnp.where(taken.mask & ~taken.cut, as_unit_interval("lam", lam, shape), 0)
    trace_T = lam_T * _clipped_ratio(log_ratio, clip_trace, taken.mask)
    td_error_T = taken.reward + taken.discount * taken.next_value - value_T
    delta_T = _clipped_ratio(log_ratio, clip_rho, taken.mask) * td_error_T
    returns_T = value_T + _accumulate(delta_T, taken.discount * trace_T, taken.mask)
    returns_T = jnp.where(taken.mask, returns_T, 0)
    after_T = (1 - lam_T) * taken.next_value + lam_T * _value_at_next(returns_T, taken.mask)
    ratio_T = _clipped_ratio(log_ratio, clip_policy, taken.mask)
    advantage_T = ratio_T * (taken.reward + taken.discount * after_T - value_T)
    return VTrace(returns_T, jnp.where(taken.mask, advantage_T, 0))


def multistep_path_consistency_error(
    value: ArrayLike,
    reward: ArrayLike,
    next_value: ArrayLike,
    log_ratio: ArrayLike,
    *,
    temperature: ArrayLike,
    discount: ArrayLike,
    steps: int | None = None,
    mask: ArrayLike | None = None,
    terminated: ArrayLike | None = None,
    truncated: ArrayLike | None = None,
) -> Array:
    """Path consistency over several steps, 0 on every path at the soft optimum (arXiv:1702.08892):

        C[t] = sum of (reward - temperature * log_ratio) over the path, discounted, + the value after it - value[t]

    `steps=None` takes the path from each step to the end of its episode (or of the array); 1 is
    `path_consistency_error`. Without discount, and with one reward at the end of a text, it is the multi-step
    objective of arXiv:2106.07704.

    Args:
      value: float [..., T], soft value of s_t.
      reward: float [..., T], reward of action t.
      next_value: float [..., T], soft value of the observation after action t.
      log_ratio: float [..., T], log pi(action_t | s_t) - log pi_ref(action_t | s_t) in nats; without a reference
        log pi.
      temperature: scalar > 0, reward per nat.
      discount: per step, in [0, 1], a scalar or [..., T].
      steps: length of the paths, >= 1, or None.
      mask, terminated, truncated: as in `lambda_returns`.

    Returns:
      float32 [..., T]; 0 where masked out.
    """
    shape = jnp.shape(reward)
    mask_T = as_mask("mask", mask, shape)
    # Replaced before they meet: 0 * NaN would be NaN in the gradient.
    reward_T, log_ratio_T, value_T = (
        jnp.where(mask_T, as_float(name, x, shape), 0)
        for name, x in (("reward", reward), ("log_ratio", log_ratio), ("value", value))
    )
    penalised_T = penalised_reward(reward_T, log_ratio_T, temperature=temperature)
    flags = {"mask": mask_T, "terminated": terminated, "truncated": truncated}
    if steps is None:
        path_T = lambda_returns(penalised_T, next_value, discount=discount, lam=1.0, **flags)
    else:
        path_T = n_step_returns(penalised_T, next_value, discount=discount, steps=steps, **flags)
    return path_T - value_T


def value_at_next(value: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """`value` at the next position that counts, 0 after the last: `next_value` of one episode that ends there.

    For an array of one whole episode, as a text is. Not for arrays in which an episode was cut short: the value of
    its final observation is not among those of the steps.

    Args:
      value: float [..., T], V(s_t), or any value of the state that action t was taken in.
      mask: bool [..., T], True where position t counts. None: all do.

    Returns:
      float32 [..., T]; 0 where masked out.
    """
    value = as_float("value", value)
    require_rank("value", value, 1, "[..., T]")
    mask_T = as_mask("mask", mask, value.shape)
    return jnp.where(mask_T, _value_at_next(value, mask_T), 0)


def _steps(
    reward: ArrayLike,
    next_value: ArrayLike,
    discount: ArrayLike,
    mask: ArrayLike | None,
    terminated: ArrayLike | None,
    truncated: ArrayLike | None,
) -> _Steps:
    reward = as_float("reward", reward)
    require_rank("reward", reward, 1, "[..., T]")
    shape = reward.shape
    mask_T = as_mask("mask", mask, shape)
    ended_T = _flags("terminated", terminated, shape)
    counting_from_here_T = jnp.cumsum(mask_T[..., ::-1], axis=-1)[..., ::-1]
    return _Steps(
        reward=jnp.where(mask_T, reward, 0),
        discount=jnp.where(mask_T & ~ended_T, as_unit_interval("discount", discount, shape), 0),
        next_value=jnp.where(mask_T & ~ended_T, as_float("next_value", next_value, shape), 0),
        cut=ended_T | _flags("truncated", truncated, shape) | (counting_from_here_T == 1),
        mask=mask_T,
    )


def _clipped_ratio(log_ratio: ArrayLike, clip: ArrayLike, mask_T: Array) -> Array:
    """`min(clip, exp(log_ratio))`, 0 where masked. The minimum is taken of the logarithms: exp cannot overflow."""
    log_ratio_T = jnp.where(mask_T, as_float("log_ratio", log_ratio, mask_T.shape), 0)
    log_clip = jnp.log(as_number("clip", clip))
    return jnp.where(mask_T, jnp.exp(jnp.minimum(log_ratio_T, log_clip)), 0)
