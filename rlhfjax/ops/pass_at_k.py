"""pass@k and maj@k: from N samples of a problem, how k of them would have done.

    pass@k = 1 - C(N - c, k) / C(N, k)        (Chen et al. 2021, arXiv:2107.03374, eq. 1)

c of the N samples being right: the share of all subsets of k that hold a right one. (1 - (1 - c / N)^k, with the
share c / N in place of the unknown chance, draws with replacement and is biased low.)
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhfjax.ops._check import as_index, as_mask, as_number, require_rank


def pass_at_k(correct: ArrayLike, *, k: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """Unbiased estimate of the chance that at least one of k samples is right, float32 [...].

    As a product, `1 - prod_{i = N - c + 1}^{N} (1 - k / i)`: no factorial, no overflow.

    Args:
      correct: bool [..., N], whether each sample of a problem is right.
      k: scalar, 1 <= k <= samples that count; may be traced.
      mask: bool [..., N], True where the sample counts; others may hold anything. None: all do.

    Returns:
      float32 [...]; NaN where fewer than k samples count.

    Raises:
      ValueError: k below 1 or above N, where k is a Python number. TypeError: `correct` is not bool (or 0/1).

    >>> float(pass_at_k([True, False, False, False], k=2))  # three of the six pairs hold the right one
    0.5
    """
    correct, mask = _samples(correct, mask)
    k = _number_of("k", k, correct.shape[-1])
    counted = jnp.sum(mask, axis=-1, dtype=jnp.float32)[..., None]
    right = jnp.sum(correct & mask, axis=-1, dtype=jnp.float32)[..., None]
    i_N = jnp.broadcast_to(jnp.arange(1, correct.shape[-1] + 1, dtype=jnp.float32), correct.shape)
    # Where fewer than k are wrong every subset holds a right one: one factor, that of i = k, is 0.
    factor_N = jnp.where((i_N > counted - right) & (i_N <= counted), 1 - k / i_N, 1.0)
    passed = 1 - jnp.prod(factor_N, axis=-1)
    return jnp.where(counted[..., 0] < k, jnp.nan, passed)


def majority(answer: ArrayLike, mask: ArrayLike | None = None) -> Array:
    """Weight of each sample in a majority vote, float32 [..., N]: the samples with the commonest answer share 1.

    `sum(weight * correct)` is the chance that the voted answer is right, where answers tied for the most votes are
    drawn from evenly (self-consistency, arXiv:2203.11171).

    Args:
      answer: integer [..., N], equal where two samples gave the same answer.
      mask: bool [..., N], True where the sample votes. None: all do. Where none does, all weights are 0.
    """
    answer = jnp.asarray(answer)
    require_rank("answer", answer, 1, "[..., N]")
    answer = as_index("answer", answer, answer.shape)
    mask = as_mask("mask", mask, answer.shape)
    same_NN = (answer[..., :, None] == answer[..., None, :]) & mask[..., None, :]
    votes_N = jnp.where(mask, jnp.sum(same_NN, axis=-1), 0)
    first_N = mask & (votes_N == jnp.max(votes_N, axis=-1, keepdims=True))
    # Every answer with the most votes has as many samples as another: evenly over samples is evenly over answers.
    return first_N / jnp.maximum(jnp.sum(first_N, axis=-1, keepdims=True), 1).astype(jnp.float32)


def majority_at_k(answer: ArrayLike, correct: ArrayLike, *, k: int) -> Array:
    """Unbiased estimate of the chance that the majority of k samples is right (maj@k), float32 [...].

    The mean over the N // k groups of k consecutive samples; what is left over at the end is not used.

    Args:
      answer: integer [..., N], equal where two samples gave the same answer.
      correct: bool [..., N], whether it is right.
      k: samples that vote, static; 1 <= k <= N.
    """
    answer = jnp.asarray(answer)
    require_rank("answer", answer, 1, "[..., N]")
    correct = as_mask("correct", correct, answer.shape)
    total = answer.shape[-1]
    if not 1 <= k <= total:
        raise ValueError(f"k must lie between 1 and the {total} samples of a problem, got {k}")
    groups = total // k
    shape = (*answer.shape[:-1], groups, k)
    answer, correct = (x[..., : groups * k].reshape(shape) for x in (answer, correct))
    return jnp.mean(jnp.sum(majority(answer) * correct, axis=-1), axis=-1)


def _samples(correct: ArrayLike, mask: ArrayLike | None) -> tuple[jax.Array, jax.Array]:
    correct = jnp.asarray(correct)
    require_rank("correct", correct, 1, "[..., N]")
    return as_mask("correct", correct, correct.shape), as_mask("mask", mask, correct.shape)


def _number_of(name: str, k: ArrayLike, total: int) -> jax.Array:
    if isinstance(k, int) and not 1 <= k <= total:
        raise ValueError(f"{name} must lie between 1 and the {total} samples of a problem, got {k}")
    return as_number(name, k)
