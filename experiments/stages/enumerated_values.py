"""Q-learning on a language model of which everything is known: data, tables of values, exact answers.

Soft Q-learning trains the world's own policy, whose logits are values (`soft_evaluate`). The others learn tables of Q
and V (`table_evaluate`), and a policy is made of them: guided, ref exp(Q / beta) / Z at every prefix, or greedy.

Shapes: as in `enumerated`; H heads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.stages.enumerated import World
from rlhfjax.algorithms import ilql, soft_q
from rlhfjax.environments import enumerable
from rlhfjax.ops import end_of_sequence_reward

Draw = Callable[
    [jax.Array, jax.Array, tuple[int, ...]], jax.Array
]  # (key, logp_N of the policy, shape) -> index


class Ended(NamedTuple):
    """What a run is judged by."""

    logits_SV: jax.Array  # of the policy, up to a constant in each row
    value: jax.Array | None = None  # V of the empty prefix, where the method has one


# ---- data


def uniform(key: jax.Array, logp_N: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sequences drawn evenly, whatever the policy."""
    return jax.random.randint(key, shape, 0, logp_N.size)


def of_reference(world: World) -> Draw:
    """Samples of the reference, whatever the policy."""
    logp_ref_N = jnp.asarray(world.logp_ref_N, jnp.float32)
    return lambda key, logp_N, shape: enumerable.sample(key, logp_ref_N, shape)


def episodes(world: World) -> Callable[[Any, jax.Array], ilql.Episodes]:
    """From sequences [B, G] to episodes: the reward comes with the last token."""
    reward_N = jnp.asarray(world.reward_N, jnp.float32)

    def batch(params, index_BG):
        del params
        inputs = enumerable.rows(world.every, index_BG)
        finished_BG = jnp.ones(index_BG.shape, bool)
        reward = end_of_sequence_reward(reward_N[index_BG], inputs.mask, finished=finished_BG)
        return ilql.Episodes(inputs, reward, inputs.mask)

    return batch


def soft_batch(world: World) -> Callable[[Any, jax.Array], soft_q.Batch]:
    """The same with what the reference makes of the tokens."""
    logp_ref_SV = jax.nn.log_softmax(jnp.asarray(world.logits_ref_SV, jnp.float32), axis=-1)
    of_world = episodes(world)

    def batch(params, index_BG):
        inputs, reward, mask, _ = of_world(params, index_BG)
        return soft_q.Batch(inputs, logp_ref_SV[inputs.prefix, inputs.token], reward, mask)

    return batch


# ---- the policy itself as Q


def log_partition(world: World, logits_SV: jax.Array) -> jax.Array:
    """V / beta of every prefix, [S]: logsumexp of the policy's logits less that of the reference's."""
    logits_ref_SV = jnp.asarray(world.logits_ref_SV, jnp.float32)
    return jax.nn.logsumexp(logits_SV, axis=-1) - jax.nn.logsumexp(logits_ref_SV, axis=-1)


def soft_evaluate(world: World) -> soft_q.Evaluate:
    """`evaluate` of `soft_q`, of the world's policy."""

    def evaluate(params, inputs: enumerable.Sequences):
        logits_SV, _ = world.table(params)
        table = {"logits": logits_SV, "value": log_partition(world, logits_SV)}
        logp, _, value = enumerable.tabular(table, inputs)
        return soft_q.Evaluation(logp, value)

    return evaluate


# ---- tables of Q and V


def init_values(world: World, key: jax.Array, heads: int) -> dict:
    """Q [H, S, V] from N(0, 1), so that heads differ, and V [S], 0. The key is consumed."""
    shape = world.logits_ref_SV.shape
    return {"q": jax.random.normal(key, (heads, *shape)), "v": jnp.zeros(shape[0])}


def table_evaluate(params: dict, inputs: enumerable.Sequences) -> ilql.Evaluation:
    """`evaluate` of `ilql`, of these tables."""
    best_S = jnp.max(jnp.min(params["q"], axis=0), axis=-1)
    return ilql.Evaluation(
        taken=params["q"][:, inputs.prefix, inputs.token],
        value=params["v"][inputs.prefix],
        best=best_S[inputs.prefix],
    )


def guided_policy(world: World, params: dict, beta: jax.Array) -> Ended:
    """log ref + (min Q - V) / beta, of which V cancels."""
    logits_ref_SV = jnp.asarray(world.logits_ref_SV, jnp.float32)
    return Ended(logits_ref_SV + jnp.min(params["q"], axis=0) / beta, params["v"][0])


def greedy_policy(params: dict) -> Ended:
    """The token of the largest value, always."""
    q_SV = jnp.min(params["q"], axis=0)
    highest_S1 = jnp.max(q_SV, axis=-1, keepdims=True)
    return Ended(jnp.where(q_SV == highest_S1, 0.0, -jnp.inf), highest_S1[0, 0])


# ---- where these end, in float64


def backward(world: World, state_value: Callable[[np.ndarray, np.ndarray], float]):
    """Q [S, V] and V [S] of every prefix, NumPy float64, from the last position backwards:

        Q(s, a) = reward of the whole sequence, or V(s a);    V(s) = state_value(Q(s, .), log ref(. | s))

    0 at prefixes behind a stop token.
    """
    rows, size = world.logits_ref_SV.shape
    every, logits_ref_SV = world.every, world.logits_ref_SV
    logp_ref_SV = logits_ref_SV - np.log(np.sum(np.exp(logits_ref_SV), axis=1, keepdims=True))
    q_SV, value_S, ends_SV = np.zeros((rows, size)), np.zeros(rows), np.zeros((rows, size), bool)
    last = (np.arange(every.mask.shape[0]), np.sum(every.mask, axis=1) - 1)
    edge = (every.prefix[last], every.token[last])
    q_SV[edge], ends_SV[edge] = world.reward_N, True
    seen_S = np.isin(np.arange(rows), every.prefix[every.mask])
    for prefix in np.flatnonzero(seen_S)[::-1]:  # children have larger numbers
        child_V = np.minimum(prefix * size + 1 + np.arange(size), rows - 1)
        q_SV[prefix] = np.where(ends_SV[prefix], q_SV[prefix], value_S[child_V])
        value_S[prefix] = state_value(q_SV[prefix], logp_ref_SV[prefix])
    return q_SV, value_S


def guided_optimum(world: World, state_value, *, beta: float) -> np.ndarray:
    """Log-probabilities [N] of ref exp(Q / beta) / Z, prefix by prefix, with the Q of `backward`."""
    return enumerable.table_logp(world.logits_ref_SV + backward(world, state_value)[0] / beta, world.every)


def mean_value(q_V: np.ndarray, logp_V: np.ndarray) -> float:
    """Of the policy itself: what Monte-Carlo returns of its samples teach."""
    return float(np.exp(logp_V) @ q_V)


def expectile_value(q_V: np.ndarray, logp_V: np.ndarray, *, expectile: float) -> float:
    """The v at which sum_a p(a) |expectile - 1(q(a) < v)| (q(a) - v) = 0: the minimum of the expectile loss."""
    order = np.argsort(q_V)
    q_V, p_V = q_V[order], np.exp(logp_V)[order]
    for below in range(q_V.size):  # the smallest `below` values lie under v
        weight_V = p_V * np.where(np.arange(q_V.size) < below, 1 - expectile, expectile)
        v = float(weight_V @ q_V / weight_V.sum())
        if v <= q_V[below]:
            return v
    return float(q_V[-1])


def best_sequence(world: World) -> np.ndarray:
    """Log-probabilities [N] of the policy that always says the sequence of the largest reward."""
    return np.where(np.arange(world.reward_N.size) == np.argmax(world.reward_N), 0.0, -np.inf)
