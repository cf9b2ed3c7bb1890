"""Gold against reward as more and more samples are chosen from: where does the reward stop to help?

Shapes: N items (texts), `group_N` telling the prompt of each, U prompts, G samples, S sizes of the choice.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.ops import best_of_n_kl_bound, best_of_n_weights
from rlhfjax.rewards.audit.resampling import NOTHING, Estimate, mean_estimate


class Curve(NamedTuple):
    """Best of n by the reward, n = 1, 2, 4, ... on the same prompts."""

    n_S: np.ndarray  # int
    kl_S: np.ndarray  # nats, bound log n - (n - 1) / n
    reward_S: list[Estimate]
    gold_S: list[Estimate]  # empty without gold
    oracle_S: list[Estimate]  # gold of the best by gold: what a perfect reward would give
    gain: Estimate  # gold of the largest n less that of n = 1
    possible: Estimate  # the same of the perfect reward
    peak: int  # n of the highest mean gold
    fall: Estimate  # gold at the peak less gold at the largest n; 0 where the peak is the largest n


def best_of_n_curve(
    reward_N: np.ndarray, gold_N: np.ndarray | None, group_N: np.ndarray, *, seed: int = 0
) -> Curve | None:
    """The curve, by the unbiased estimate over all subsets (`ops.best_of_n_weights`); None without two texts a prompt.

    n goes up to the most texts that at least half of the prompts of several texts have; those prompts are taken. With
    gold, only texts that have one count.
    """
    reward = np.asarray(reward_N, np.float64)
    gold = None if gold_N is None else np.asarray(gold_N, np.float64)
    if any(x is not None and x.shape != reward.shape for x in (gold, np.asarray(group_N))):
        raise ValueError(
            f"reward {reward.shape}, gold {None if gold is None else gold.shape} and group "
            f"{np.shape(group_N)} must be vectors of one length, an entry for each text"
        )
    known = np.isfinite(reward) & (np.isfinite(gold) if gold is not None else True)
    group = np.asarray(group_N)[known]
    prompts, group, size = np.unique(group, return_inverse=True, return_counts=True)
    if not len(prompts) or size.max() < 2:
        return None
    several = np.sort(size[size > 1])
    most = int(several[len(several) // 2])
    rows = [np.flatnonzero(group == prompt) for prompt in np.flatnonzero(size >= most)]
    index_UG = np.stack([np.resize(row, size.max()) for row in rows])
    mask_UG = np.arange(size.max()) < np.asarray([len(row) for row in rows])[:, None]
    reward = reward[known]
    rank_UG = _ranks(reward[index_UG])
    n_S = 2 ** np.arange(int(np.log2(most)) + 1)
    n_S = n_S if n_S[-1] == most else np.r_[n_S, most]
    reward_SU = _means(reward[index_UG], rank_UG, mask_UG, n_S)
    kl_S = np.asarray(best_of_n_kl_bound(jnp.asarray(n_S, jnp.float32)), np.float64)
    of_reward = [mean_estimate(x, seed=seed) for x in reward_SU]
    if gold is None:
        return Curve(n_S, kl_S, of_reward, [], [], NOTHING, NOTHING, int(n_S[-1]), NOTHING)
    gold_UG = gold[known][index_UG]
    gold_SU = _means(gold_UG, rank_UG, mask_UG, n_S)
    oracle_SU = _means(gold_UG, _ranks(gold_UG), mask_UG, n_S)
    peak = int(gold_SU.mean(axis=1).argmax())
    return Curve(
        n_S,
        kl_S,
        of_reward,
        [mean_estimate(x, seed=seed) for x in gold_SU],
        [mean_estimate(x, seed=seed) for x in oracle_SU],
        mean_estimate(gold_SU[-1] - gold_SU[0], seed=seed),
        mean_estimate(oracle_SU[-1] - oracle_SU[0], seed=seed),
        int(n_S[peak]),
        mean_estimate(gold_SU[peak] - gold_SU[-1], seed=seed),
    )


def _ranks(x_UG: np.ndarray) -> np.ndarray:
    """Ranks within a prompt, in place of what float32 could tie where float64 tells it apart."""
    return np.stack([np.unique(row, return_inverse=True)[1] for row in x_UG]).astype(np.float32)


def _means(what_UG: np.ndarray, rank_UG: np.ndarray, mask_UG: np.ndarray, n_S: np.ndarray) -> np.ndarray:
    """Mean of `what` of the best of n by `rank`, float64 [S, U]."""
    weight = np.asarray(_weights(rank_UG, mask_UG, n_S.astype(np.float32)), np.float64)
    weight /= weight.sum(axis=-1, keepdims=True)  # 1 but for float32
    return (weight * np.where(mask_UG, what_UG, 0.0)).sum(axis=-1)


@jax.jit
def _weights(rank_UG: jax.Array, mask_UG: jax.Array, n_S: jax.Array) -> jax.Array:
    return jax.vmap(lambda n: best_of_n_weights(rank_UG, n=n, mask=mask_UG))(n_S)
