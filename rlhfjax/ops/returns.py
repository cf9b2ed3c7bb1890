"""From rewards to advantages and returns. Time is the last axis; any leading axes are independent sequences.

The recursions are rank 1 and vmapped. A masked position is skipped as if it had been cut out of the sequence:
values and advantages are carried across it, and what it holds, NaN included, is never read. Gradients flow
through every argument; callers that want targets apply `jax.lax.stop_gradient`.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhfjax.ops._check import as_float, as_mask, as_number, require_rank


def gae(
    reward: ArrayLike,
    value: ArrayLike,
    *,
    discount: ArrayLike,
    lam: ArrayLike,
    mask: ArrayLike | None = None,
    next_value: ArrayLike | None = None,
    terminated: ArrayLike | None = None,
    truncated: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Generalised advantage estimates and the lambda-returns that go with them (arXiv:1506.02438, eq. 16).

        delta[t]     = reward[t] + discount[t] * next_value[t] * (1 - terminated[t]) - value[t]
        advantage[t] = delta[t] + discount[t] * lam * (1 - terminated[t] or truncated[t]) * advantage[t + 1]
        returns[t]   = advantage[t] + value[t]

    An episode that terminated has no future. One that was truncated (time limit) has a future that was not
    seen: it bootstraps from the value of its final observation, and its advantage does not run on into the
    next episode.

    Args:
      reward: float [..., T], reward of action t.
      value: float [..., T], V(s_t).
      discount: per step, a scalar or [..., T].
      lam: scalar in [0, 1]: 0 is one-step TD, 1 is Monte Carlo.
      mask: bool [..., T], True where position t counts. None: all do.
      next_value: float [..., T], V(s_{t+1}); at a truncation the value of the final observation, not of the
        next episode's first. None: the value at the next position that counts, and 0 after the last one, i.e.
        the last action terminates the episode, as the end of a response does.
      terminated: bool [..., T], True where action t ended the episode; wins over `truncated`.
      truncated: bool [..., T], True where the episode was cut short after action t. Needs `next_value`.

    Returns:
      advantage, returns: float32 [..., T]; 0 where masked out.

    >>> advantage, returns = gae([0.0, 1.0], [0.5, 0.5], discount=1.0, lam=1.0)  # the rewards to come, less the value
    >>> advantage.tolist(), returns.tolist()
    ([0.5, 0.5], [1.0, 1.0])
    """
    reward = as_float("reward", reward)
    require_rank("reward", reward, 1, "[..., T]")
    shape = reward.shape
    mask_T = as_mask("mask", mask, shape)
    if truncated is not None and next_value is None:
        raise ValueError(
            "truncated needs next_value, the value of the observation after each action: "
            "without it a truncated episode would bootstrap from the start of the next one"
        )
    ended_T = _flags("terminated", terminated, shape)
    cut_T = ended_T | _flags("truncated", truncated, shape)

    value_T = jnp.where(mask_T, as_float("value", value, shape), 0)
    discount_T = jnp.where(mask_T, as_number("discount", discount, shape), 0)
    if next_value is None:
        next_value = _value_at_next(value_T, mask_T)
    next_value_T = jnp.where(ended_T, 0, as_float("next_value", next_value, shape))

    delta_T = reward + discount_T * next_value_T - value_T
    decay_T = jnp.where(cut_T, 0, discount_T * as_number("lam", lam))
    advantage_T = jnp.where(mask_T, _accumulate(delta_T, decay_T, mask_T), 0)
    return advantage_T, advantage_T + value_T


def discounted_returns(
    reward: ArrayLike, *, discount: ArrayLike, mask: ArrayLike | None = None, bootstrap: ArrayLike = 0.0
) -> Array:
    """Discounted sum of the rewards from each position on: `G[t] = reward[t] + discount[t] * G[t + 1]`.

    Args:
      reward: float [..., T].
      discount: per step, a scalar or [..., T].
      mask: bool [..., T], True where position t counts. None: all do.
      bootstrap: `G` after the last position: a scalar or [...], 0 where the episode terminated there.

    Returns:
      float32 [..., T]; 0 where masked out.

    >>> discounted_returns([0.0, 0.0, 1.0], discount=0.5).tolist()
    [0.25, 0.5, 1.0]
    """
    reward = as_float("reward", reward)
    require_rank("reward", reward, 1, "[..., T]")
    mask_T = as_mask("mask", mask, reward.shape)
    discount = as_number("discount", discount, reward.shape)
    after = as_number("bootstrap", bootstrap, reward.shape[:-1])
    return jnp.where(mask_T, _accumulate(reward, discount, mask_T, after), 0)


def end_of_sequence_reward(
    score: ArrayLike, mask: ArrayLike, *, finished: ArrayLike, missing_eos_penalty: ArrayLike | None = None
) -> Array:
    """Places one score per sequence on its last position that counts; every other position gets 0.

    With a penalty given, a sequence that did not end by itself gets the penalty in place of its score,
    whatever the score was (the "EOS trick" of arXiv:2403.17031, where it is -1). A sequence without a
    counting position gets no reward.

    Args:
      score: float [...], reward of each whole sequence.
      mask: bool [..., T], True at the positions of the response.
      finished: bool [...], True where the sequence ended with an end-of-sequence token.
      missing_eos_penalty: scalar that replaces the score of an unfinished sequence (so usually negative).
        None: keep the score.

    Returns:
      float32 [..., T].

    >>> end_of_sequence_reward(2.0, [True, True, False], finished=True).tolist()
    [0.0, 2.0, 0.0]
    """
    mask = jnp.asarray(mask)
    require_rank("mask", mask, 1, "[..., T]")
    mask_T = as_mask("mask", mask, mask.shape)
    score = as_float("score", score, mask.shape[:-1])
    finished = as_mask("finished", finished, score.shape)
    if missing_eos_penalty is not None:
        score = jnp.where(finished, score, as_number("missing_eos_penalty", missing_eos_penalty))
    counting_from_here_T = jnp.cumsum(mask_T[..., ::-1], axis=-1)[..., ::-1]
    last_T = mask_T & (counting_from_here_T == 1)
    return jnp.where(last_T, score[..., None], 0)


def _flags(name: str, x: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    return jnp.zeros(shape, bool) if x is None else as_mask(name, x, shape)


def _accumulate(x_T: Array, decay_T: Array, mask_T: Array, after: ArrayLike = 0.0) -> Array:
    """`y[t] = x[t] + decay[t] * y[t + 1]` with `y[T] = after`; a masked position passes y on unchanged."""
    x_T = jnp.where(mask_T, x_T, 0)
    decay_T = jnp.where(mask_T, decay_T, 1).astype(x_T.dtype)
    # `zeros_like`, and not `zeros`: under `shard_map` the carry must vary over devices as x does.
    after = jnp.zeros_like(x_T, shape=x_T.shape[:-1]) + after

    def scan_time(x_T: Array, decay_T: Array, after: Array) -> Array:
        def step(y: Array, x_and_decay: tuple[Array, Array]) -> tuple[Array, Array]:
            x, decay = x_and_decay
            y = x + decay * y
            return y, y

        return jax.lax.scan(step, after, (x_T, decay_T), reverse=True)[1]

    for _ in range(x_T.ndim - 1):
        scan_time = jax.vmap(scan_time)
    return scan_time(x_T, decay_T, after)


def _value_at_next(value_T: Array, mask_T: Array) -> Array:
    """The value at the next position that counts, 0 after the last."""
    value_from_here_T = _accumulate(value_T, jnp.zeros_like(value_T), mask_T)
    return jnp.concatenate([value_from_here_T[..., 1:], jnp.zeros_like(value_T[..., :1])], axis=-1)
