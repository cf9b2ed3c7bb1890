"""Language models small enough to enumerate: all that training aims at, exactly.

With V tokens and at most T positions there are at most V^T sequences. Over all of them

    expected reward   sum_y pi(y) reward(y)
    divergence        KL(pi || ref) = sum_y pi(y) log(pi(y) / ref(y))
    objective         J(pi) = expected reward - beta * divergence
    optimum           pi*(y) = ref(y) exp(reward(y) / beta) / Z,    J(pi*) = beta log Z
    gap               J(pi*) - J(pi) = beta KL(pi || pi*)
    soft value        V*(s) = beta log sum_{y from s} ref(y | s) exp(reward(y) / beta),    V*(start) = beta log Z

(the optimum: arXiv 2305.18290, eq. 4), so that a method which claims to solve the KL-regularised problem can be
held against the answer. The exact functions take NumPy arrays and compute in float64, or JAX arrays, also traced
ones, and compute in the arrays' own type: one formula for the judge and for a differentiable program.

A state is the prefix of a sequence. Prefixes are numbered as the nodes of a tree in which every node has V
children: 0 is the empty one, and token v after prefix s gives prefix s V + v + 1. There is no prompt; tables with
leading axes are models of several prompts.

Shapes: N sequences, T positions, V vocabulary, S prefixes; `...` any leading axes.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.config import Enumerable as Config

PyTree = Any
Array = Any  # NumPy in, NumPy out; JAX in, JAX out

MOST_SEQUENCES = 2**20


class Sequences(NamedTuple):
    """Sequences, as rows of one's choice. Masked places hold token and prefix 0."""

    token: Array  # int32 [..., T]
    mask: Array  # bool [..., T], True up to the stop token and there
    prefix: Array  # int32 [..., T], number of the prefix that the token was chosen after


def sequences(config: Config) -> Sequences:
    """All sequences of the model in lexical order, NumPy [N, T].

    Without a stop token N = V^T. With one, a sequence ends at it or at T tokens, and the stop token is one of its
    tokens. Raises ValueError where the model cannot be, or has more than 2^20 sequences of full length.
    """
    _check(config)
    size, length = config.vocab_size, config.length
    token_NT = np.stack(np.unravel_index(np.arange(size**length), (size,) * length), axis=1).astype(np.int32)
    mask_NT = np.ones(token_NT.shape, bool)
    if config.stop_token is not None:
        stopped_NT = np.cumsum(token_NT == config.stop_token, axis=1) - (token_NT == config.stop_token) > 0
        # Of all that agree up to the stop token, the one with zeros behind it stands for the sequence.
        once_N = ~np.any(stopped_NT & (token_NT != 0), axis=1)
        token_NT, mask_NT = token_NT[once_N], ~stopped_NT[once_N]
    prefix_NT = np.zeros_like(token_NT)
    for t in range(1, length):
        prefix_NT[:, t] = prefix_NT[:, t - 1] * size + token_NT[:, t - 1] + 1
    return Sequences(np.where(mask_NT, token_NT, 0), mask_NT, np.where(mask_NT, prefix_NT, 0))


def prefixes(config: Config) -> Sequences:
    """All prefixes that a token can follow, as rows [S, T] of the tokens before it; row s is prefix s.

    Prefixes that hold the stop token have their row too, so that the numbers stay those of the tree; no sequence
    comes by them. The last position is always masked.
    """
    _check(config)
    rows = count_prefixes(config)
    token_ST, depth_S = np.zeros((rows, config.length), np.int32), np.zeros(rows, np.int32)
    prefix_ST = np.zeros((rows, config.length), np.int32)
    for child in range(1, rows):
        parent, token = divmod(child - 1, config.vocab_size)
        depth = depth_S[parent]
        token_ST[child], prefix_ST[child] = token_ST[parent], prefix_ST[parent]
        token_ST[child, depth], prefix_ST[child, depth], depth_S[child] = token, parent, depth + 1
    return Sequences(token_ST, np.arange(config.length)[None, :] < depth_S[:, None], prefix_ST)


def count_prefixes(config: Config) -> int:
    """S = 1 + V + ... + V^(T - 1)."""
    return sum(config.vocab_size**t for t in range(config.length))


# ---- policies


def tabular(params: dict, inputs: Sequences) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`evaluate` of a table: (logp, entropy, value) of the rows' tokens, each float [..., T].

    Params: {"logits": float [S, V], "value": float [S]}: a policy that can be any policy, and a critic likewise.
    Masked places hold what prefix 0 and token 0 give: finite, and to be masked.
    """
    logp_SV = jax.nn.log_softmax(params["logits"], axis=-1)
    entropy_S = -jnp.sum(jnp.exp(logp_SV) * logp_SV, axis=-1)
    return logp_SV[inputs.prefix, inputs.token], entropy_S[inputs.prefix], params["value"][inputs.prefix]


def tabular_with_kl(params: dict, inputs: Sequences, reference: dict) -> tuple[jax.Array, ...]:
    """`evaluate` of a table with the exact divergence: (logp, entropy, value, kl), each float [..., T].

    `reference` has the params of the reference; kl is KL(policy || reference) of the next token, over all V.
    """
    logp_SV = jax.nn.log_softmax(params["logits"], axis=-1)
    logp_ref_SV = jax.lax.stop_gradient(jax.nn.log_softmax(reference["logits"], axis=-1))
    kl_S = jnp.sum(jnp.exp(logp_SV) * (logp_SV - logp_ref_SV), axis=-1)
    return (*tabular(params, inputs), kl_S[inputs.prefix])


def init_tabular(config: Config, key: jax.Array, *, scale: float = 1.0) -> dict:
    """Params of a table: logits N(0, scale^2), values 0, float32. The key is consumed."""
    rows = count_prefixes(config)
    logits_SV = scale * jax.random.normal(key, (rows, config.vocab_size), jnp.float32)
    return {"logits": logits_SV, "value": jnp.zeros(rows, jnp.float32)}


def sequence_logp(evaluate: Callable[..., Any], params: PyTree, inputs: Sequences) -> Array:
    """Log-probability of every row, [...], nats, under any `evaluate(params, inputs) -> (logp [..., T], ...)`."""
    logp, mask = evaluate(params, inputs)[0], inputs.mask
    library = _library(logp)
    return library.sum(library.where(mask, logp, 0.0), axis=-1)


def table_logp(logits_SV: Array, inputs: Sequences) -> Array:
    """Log-probability of every row, [...], nats, from a table of logits; in float64 where it is NumPy."""
    (logits_SV,), library = _floats(logits_SV)
    logits_SV = logits_SV - library.max(logits_SV, axis=-1, keepdims=True)
    logp_SV = logits_SV - library.log(library.sum(library.exp(logits_SV), axis=-1, keepdims=True))
    return library.sum(library.where(inputs.mask, logp_SV[inputs.prefix, inputs.token], 0.0), axis=-1)


def sample(key: jax.Array, logp_N: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Independent sequences from their distribution: int32 [*shape], which of the N. The key is consumed.

    By the inverse of the cumulative distribution: one uniform number a sample. Of any policy: `rows` gives the
    sequences themselves.
    """
    upto_N = jnp.cumsum(jnp.exp(logp_N))
    uniform = jax.random.uniform(key, shape, upto_N.dtype) * upto_N[-1]
    return jnp.minimum(jnp.searchsorted(upto_N, uniform, side="right"), logp_N.size - 1).astype(jnp.int32)


def rows(inputs: Sequences, index: Array) -> Sequences:
    """The sequences of these numbers: [..., T] from [N, T] and an index [...]."""
    return Sequences(*(jnp.asarray(x)[index] for x in inputs))


# ---- what is exact, of the log-probabilities of all sequences


def expected_reward(logp: Array, reward: Array) -> Array:
    """sum_y pi(y) reward(y), [...] from float [..., N] each. A sequence of probability 0 adds nothing."""
    (logp, reward), library = _floats(logp, reward)
    possible = logp > -np.inf
    return library.sum(library.where(possible, library.exp(logp) * reward, 0.0), axis=-1)


def kl(logp: Array, logp_ref: Array) -> Array:
    """KL(pi || ref) of whole sequences in nats, [...] from float [..., N] each; with the arguments exchanged, the
    other direction. Infinite where the reference excludes what the policy does not.
    """
    (logp, logp_ref), library = _floats(logp, logp_ref)
    possible = logp > -np.inf
    ratio = library.where(possible, logp, 0.0) - library.where(possible, logp_ref, 0.0)
    return library.sum(library.where(possible, library.exp(logp) * ratio, 0.0), axis=-1)


def objective(logp: Array, logp_ref: Array, reward: Array, *, beta: Array) -> Array:
    """J = expected reward - beta KL(pi || ref), [...] from float [..., N] each; beta in reward per nat."""
    return expected_reward(logp, reward) - beta * kl(logp, logp_ref)


def optimal_policy(logp_ref: Array, reward: Array, *, beta: Array) -> Array:
    """Log-probabilities of pi* = ref exp(reward / beta) / Z, float [..., N]: the maximum of `objective`."""
    (logp_ref, reward), library = _floats(logp_ref, reward)
    tilted = logp_ref + reward / beta
    return tilted - _logsumexp(tilted, library)[..., None]


def optimal_objective(logp_ref: Array, reward: Array, *, beta: Array) -> Array:
    """J(pi*) = beta log Z, [...]: the value of the best policy."""
    (logp_ref, reward), library = _floats(logp_ref, reward)
    return beta * _logsumexp(logp_ref + reward / beta, library)


def total_variation(logp: Array, logp_other: Array) -> Array:
    """Half the sum of |pi(y) - other(y)|, [...] in [0, 1]: the largest difference of any event's probability."""
    (logp, logp_other), library = _floats(logp, logp_other)
    return 0.5 * library.sum(abs(library.exp(logp) - library.exp(logp_other)), axis=-1)


def policy_gradient(
    evaluate: Callable[..., Any],
    params: PyTree,
    inputs: Sequences,
    logp_ref_N: Array,
    reward_N: Array,
    *,
    beta: Array,
) -> PyTree:
    """Exact gradient of `objective` in the params, like the params: what an unbiased estimator has as its mean.

    `inputs` are all `sequences`. By differentiation of the sum over them; in the params' own type.
    """

    def exact(params):
        logp_N = sequence_logp(evaluate, params, inputs)
        return objective(logp_N, jnp.asarray(logp_ref_N), jnp.asarray(reward_N), beta=beta)

    return jax.grad(exact)(params)


# ---- what is exact, of the states


def conditional_logp(config: Config, logp_N: Array, inputs: Sequences) -> Array:
    """The table of a distribution of sequences: log-probability of every token after every prefix, [S, V].

    `inputs` are all `sequences`. `table_logp` of the result is `logp_N` again. A prefix that cannot be has 0
    throughout, so that the table is finite there.
    """
    edge_NT = np.asarray(inputs.prefix) * config.vocab_size + np.asarray(inputs.token)
    rows, size = count_prefixes(config), config.vocab_size
    edge_SV = _log_mass(logp_N, edge_NT, inputs.mask, rows * size).reshape(rows, size)
    state_S = _log_mass(logp_N, inputs.prefix, inputs.mask, rows)
    library = _library(edge_SV)
    possible_S1 = (state_S > -np.inf)[:, None]
    return library.where(possible_S1, edge_SV - library.where(possible_S1, state_S[:, None], 0.0), 0.0)


def soft_value(
    config: Config, logp_ref_N: Array, reward_N: Array, inputs: Sequences, *, beta: Array
) -> Array:
    """V*(s) = beta log E[exp(reward / beta)] over what the reference says after prefix s, float [S], in reward.

    `inputs` are all `sequences`; the reward is that of the whole sequence. 0 at a prefix that cannot be.
    """
    (logp_ref_N, reward_N), library = _floats(logp_ref_N, reward_N)
    count = count_prefixes(config)
    tilted_S = _log_mass(logp_ref_N + reward_N / beta, inputs.prefix, inputs.mask, count)
    plain_S = _log_mass(logp_ref_N, inputs.prefix, inputs.mask, count)
    possible_S = plain_S > -np.inf
    difference_S = library.where(possible_S, tilted_S, 0.0) - library.where(possible_S, plain_S, 0.0)
    return beta * difference_S


def token_kl_optimum(
    config: Config,
    logits_ref_SV: Array,
    reward_N: Array,
    inputs: Sequences,
    *,
    beta: float,
    forward: bool = False,
) -> np.ndarray:
    """Where a KL term in the loss leads, action by action: NumPy float64 log-probabilities [N].

    Such a term holds every decision by its own divergence and is blind to that of later ones. With Q of the reward
    alone, under the very policy sought, its fixed point is at every prefix s

        pi(a | s) = ref(a | s) exp(Q(s, a) / beta) / Z(s)            KL(pi || ref): k2 and exact in the loss
        pi(a | s) = beta ref(a | s) / (beta + V(s) - Q(s, a))        KL(ref || pi), `forward`: k3 in the loss

    with V the mean of Q; found from the last position backwards, for no decision depends on an earlier one. Only
    for a single position is the first the optimum pi*.
    """
    rows, size = count_prefixes(config), config.vocab_size
    logp_ref_SV = np.asarray(logits_ref_SV, np.float64)
    logp_ref_SV = logp_ref_SV - _logsumexp(logp_ref_SV, np)[:, None]
    leaf_SV = np.zeros((rows, size))
    end_N = np.sum(inputs.mask, axis=1) - 1
    each = np.arange(end_N.size)
    leaf_SV[inputs.prefix[each, end_N], inputs.token[each, end_N]] = np.asarray(reward_N, np.float64)
    final_SV = np.zeros((rows, size), bool)
    final_SV[inputs.prefix[each, end_N], inputs.token[each, end_N]] = True
    logp_SV, value_S = np.zeros((rows, size)), np.zeros(rows)
    for prefix in range(rows - 1, -1, -1):  # children have larger numbers
        child_V = np.minimum(prefix * size + 1 + np.arange(size), rows - 1)
        q_V = np.where(final_SV[prefix], leaf_SV[prefix], value_S[child_V])
        solve = _forward_optimum if forward else _reverse_optimum
        logp_SV[prefix] = solve(logp_ref_SV[prefix], q_V, beta)
        value_S[prefix] = np.exp(logp_SV[prefix]) @ q_V
    return table_logp(logp_SV, inputs)


def _reverse_optimum(logp_ref_V: np.ndarray, q_V: np.ndarray, beta: float) -> np.ndarray:
    return optimal_policy(logp_ref_V, q_V, beta=beta)


def _forward_optimum(logp_ref_V: np.ndarray, q_V: np.ndarray, beta: float) -> np.ndarray:
    """beta ref / (level - q), the level such that it sums to 1, by bisection: it lies within beta of the largest."""
    low, high = q_V.max(), q_V.max() + beta
    for _ in range(200):
        level = 0.5 * (low + high)
        # One at the lowest level is enough to decide, and a division by 0 is infinite, which is right.
        with np.errstate(divide="ignore"):
            total = np.sum(beta * np.exp(logp_ref_V) / (level - q_V))
        low, high = (level, high) if total > 1 else (low, level)
    return np.log(beta) + logp_ref_V - np.log(high - q_V)


def _log_mass(logp_N: Array, index_NT: Array, mask_NT: Array, count: int) -> Array:
    """log of the summed exp(logp) of the sequences that come by each of `count` places; -inf where none does."""
    (logp_N,), library = _floats(logp_N)
    index_M, logp_M = (
        np.asarray(index_NT)[mask_NT],
        library.broadcast_to(logp_N[:, None], index_NT.shape)[mask_NT],
    )
    highest = library.full(count, -np.inf, logp_N.dtype)
    total = library.zeros(count, logp_N.dtype)
    if library is np:
        np.maximum.at(highest, index_M, logp_M)
    else:
        highest = jax.lax.stop_gradient(highest.at[index_M].max(logp_M))
    finite = library.where(highest > -np.inf, highest, 0.0)
    share_M = library.exp(logp_M - finite[index_M])
    if library is np:
        np.add.at(total, index_M, share_M)
    else:
        total = total.at[index_M].add(share_M)
    positive = total > 0
    return library.where(positive, library.log(library.where(positive, total, 1.0)) + finite, -np.inf)


def _logsumexp(x: Array, library: ModuleType) -> Array:
    highest = library.max(x, axis=-1, keepdims=True)
    return library.log(library.sum(library.exp(x - highest), axis=-1)) + highest[..., 0]


def _library(*arrays: Array) -> ModuleType:
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def _floats(*arrays: Array) -> tuple[tuple[Array, ...], ModuleType]:
    """The arrays as JAX arrays of float32 or wider if one of them is JAX's, otherwise as NumPy float64."""
    if _library(*arrays) is np:
        return tuple(np.asarray(x, np.float64) for x in arrays), np
    return tuple(
        jnp.asarray(x).astype(jnp.promote_types(jnp.asarray(x).dtype, jnp.float32)) for x in arrays
    ), jnp


def _check(config: Config) -> None:
    """Raises ValueError where the model cannot be, or cannot be enumerated."""
    for name in ("vocab_size", "length"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.stop_token is not None and not 0 <= config.stop_token < config.vocab_size:
        raise ValueError(f"stop_token {config.stop_token} is not among the {config.vocab_size} tokens")
    if config.vocab_size**config.length > MOST_SEQUENCES:
        raise ValueError(
            f"{config.vocab_size}^{config.length} sequences are too many to enumerate (at most 2^20); "
            "make vocab_size or length smaller"
        )
