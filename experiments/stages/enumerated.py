"""Training on a language model of which everything is known: worlds, runs as one program, exact answers.

A policy here is a function `table(params) -> (logits [S, V], values [S])`: of a table the identity, of a transformer
its answer to every prefix. All that algorithms ask for is read off that table.

Shapes: B prompts (all empty), G samples of each, N sequences, T positions, S prefixes, V vocabulary, K pairs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algorithms import Algorithm, dpo, grpo, ppo
from rlhfjax.config import Decoder, Enumerable
from rlhfjax.environments import enumerable
from rlhfjax.networks import causal_mask, decoder, init_scalar_head, scalar_head

Table = Callable[[Any], tuple[jax.Array, jax.Array]]


class World(NamedTuple):
    """A reference policy, a reward, and a policy to train that begins as the reference."""

    model: Enumerable
    every: enumerable.Sequences
    table: Table
    params: Any
    logits_ref_SV: np.ndarray  # float64, as the rest here
    logp_ref_N: np.ndarray
    reward_N: np.ndarray


def tabular_world(model: Enumerable, key: jax.Array) -> World:
    """The policy is a table, the reference has logits N(0, 1), rewards are N(0, 1). The key is consumed."""
    key_logits, key_reward = jax.random.split(key)
    return _world(
        model,
        lambda params: (params["logits"], params["value"]),
        enumerable.init_tabular(model, key_logits),
        key_reward,
    )


def transformer_world(model: Enumerable, config: Decoder, key: jax.Array) -> World:
    """The policy is a decoder and the reference that decoder before training; the critic is another one."""
    key_policy, key_critic, key_head, key_reward = jax.random.split(key, 4)
    lm = decoder(config)
    params = {
        "policy": lm.init(key_policy),
        "critic": {"trunk": lm.init(key_critic), "head": init_scalar_head(key_head, config.width, scale=0.0)},
    }
    listed = enumerable.prefixes(model)
    # A first token stands for the prompt, so that the empty prefix has a position to be answered at.
    token_ST = np.concatenate([np.zeros_like(listed.token[:, :1]), listed.token[:, :-1]], axis=1)
    last_S11 = listed.mask.sum(axis=1)[:, None, None]

    def hidden(params):
        position_ST = jnp.broadcast_to(jnp.arange(model.length), token_ST.shape)
        mask_STT = causal_mask(jnp.ones(token_ST.shape, jnp.int32))
        hidden_STD, _ = lm.apply(params, jnp.asarray(token_ST), position_BT=position_ST, mask_BTS=mask_STT)
        return jnp.take_along_axis(hidden_STD, jnp.asarray(last_S11), axis=1)[:, 0]

    def table(params):
        logits_SV = lm.logits(params["policy"], hidden(params["policy"]))
        return logits_SV, scalar_head(params["critic"]["head"], hidden(params["critic"]["trunk"]))

    return _world(model, table, params, key_reward)


def _world(model: Enumerable, table: Table, params: Any, key: jax.Array) -> World:
    every = enumerable.sequences(model)
    logits_ref_SV = np.asarray(jax.jit(table)(params)[0], np.float64)
    logp_ref_N = enumerable.table_logp(logits_ref_SV, every)
    reward_N = np.asarray(jax.random.normal(key, logp_ref_N.shape), np.float64)
    return World(model, every, table, params, logits_ref_SV, logp_ref_N, reward_N)


def policy_logp(world: World, params: Any) -> np.ndarray:
    """Log-probabilities of all sequences under the trained policy, NumPy float64 [..., N] (seeds may lead)."""
    tables = np.asarray(jax.jit(world.table)(params)[0], np.float64)
    return enumerable.table_logp(tables, world.every)


# ---- on policy


def evaluate_with(world: World) -> Callable[..., tuple[jax.Array, ...]]:
    """`evaluate` of the world's policy: (logp, entropy, value, kl), the last exact."""
    reference = {"logits": jnp.asarray(world.logits_ref_SV, jnp.float32)}

    def evaluate(params, inputs: enumerable.Sequences):
        logits_SV, value_S = world.table(params)
        return enumerable.tabular_with_kl({"logits": logits_SV, "value": value_S}, inputs, reference)

    return evaluate


def ppo_batch(world: World) -> Callable[..., ppo.Rollout]:
    """From params and sampled sequences to what PPO learns from; the reward comes with the last token."""
    evaluate, reward_N, logp_ref_NT = evaluate_with(world), _float32(world.reward_N), _reference_tokens(world)

    def batch(params, index_BG):
        inputs = enumerable.rows(world.every, index_BG)
        logp, _, value, kl = evaluate(params, inputs)
        last = inputs.mask & ~jnp.pad(inputs.mask[..., 1:], [(0, 0), (0, 0), (0, 1)])
        reward = jnp.where(last, reward_N[index_BG][..., None], 0.0)
        return ppo.Rollout(inputs, logp, logp_ref_NT[index_BG], value, reward, inputs.mask, kl=kl)

    return batch


def grpo_batch(world: World) -> Callable[..., grpo.Rollout]:
    """From params and sampled sequences to what the critic-free methods learn from."""
    evaluate, reward_N, logp_ref_NT = evaluate_with(world), _float32(world.reward_N), _reference_tokens(world)

    def batch(params, index_BG):
        inputs = enumerable.rows(world.every, index_BG)
        logp, _, _, kl = evaluate(params, inputs)
        return grpo.Rollout(inputs, logp, logp_ref_NT[index_BG], reward_N[index_BG], inputs.mask, kl=kl)

    return batch


def train_online(
    world: World,
    algorithm: Algorithm,
    as_batch: Callable[..., Any],
    key: jax.Array,
    *,
    steps: int,
    shape: tuple[int, int],
    draw: Callable[..., jax.Array] = enumerable.sample,
) -> Any:
    """A whole run as one scan, to be jitted: sample [B, G] sequences of the policy, update, `steps` times. The params.

    `draw(key, logp_N, shape)` gives the numbers of the sequences, where they are not to be the policy's. The key is
    consumed.
    """
    every = jax.tree.map(jnp.asarray, world.every)

    def evaluate(params, inputs):
        logits_SV, value_S = world.table(params)
        return enumerable.tabular({"logits": logits_SV, "value": value_S}, inputs)

    def iterate(state, key):
        key_sample, key_update = jax.random.split(key)
        logp_N = enumerable.sequence_logp(evaluate, state.params, every)
        index_BG = draw(key_sample, logp_N, shape)
        state, _ = algorithm.update(state, as_batch(state.params, index_BG), key_update)
        return state, None

    state, _ = jax.lax.scan(iterate, algorithm.init(world.params), jax.random.split(key, steps))
    return state.params


# ---- pairs


class Labelled(NamedTuple):
    """Pairs of sequences with the share of judgements that preferred the first."""

    first_K: np.ndarray
    second_K: np.ndarray
    label_K: np.ndarray


def all_pairs(world: World) -> Labelled:
    """Every pair of different sequences once, each with the exact probability sigmoid(r_first - r_second)."""
    first_K, second_K = np.triu_indices(world.reward_N.size, 1)
    return Labelled(first_K, second_K, _sigmoid(world.reward_N[first_K] - world.reward_N[second_K]))


def random_pairs(world: World, count: int, rng: np.random.Generator) -> Labelled:
    """Pairs drawn evenly, labels exact."""
    everything = all_pairs(world)
    chosen = rng.integers(everything.label_K.size, size=count)
    return Labelled(*(x[chosen] for x in everything))


def judged(pairs: Labelled, judgements: int, rng: np.random.Generator) -> Labelled:
    """The same pairs, each judged so many times by a judge who prefers the first with the pair's probability."""
    return pairs._replace(label_K=rng.binomial(judgements, pairs.label_K) / judgements)


def pair_batch(world: World, pairs: Labelled, label_K: jax.Array | None = None) -> dpo.Pairs:
    """One prompt whose completions are all sequences; `label_K` in place of the pairs' own where it is traced."""
    label_K = _float32(pairs.label_K) if label_K is None else label_K
    return dpo.Pairs(
        inputs=jax.tree.map(lambda x: jnp.asarray(x)[None], world.every),
        completion_mask_BGC=jnp.asarray(world.every.mask)[None],
        first=jnp.asarray(pairs.first_K)[None],
        second=jnp.asarray(pairs.second_K)[None],
        label_BK=label_K[None],
        mask_BK=jnp.ones((1, label_K.size), bool),
        logp_ref_BGC=_reference_tokens(world)[None],
    )


def pair_evaluate(world: World) -> Callable[..., jax.Array]:
    """`evaluate` of the methods on pairs: logp [B, G, C]."""

    def evaluate(params, inputs):
        logits_SV, value_S = world.table(params)
        return enumerable.tabular({"logits": logits_SV, "value": value_S}, inputs)[0]

    return evaluate


def train_on_pairs(
    world: World,
    algorithm: Algorithm,
    batch: dpo.Pairs,
    *,
    steps: int,
    watch: Callable[[jax.Array], Any] | None = None,
) -> tuple[Any, Any]:
    """`steps` updates on one and the same batch, as one scan: the params, and of every step the training loss with
    what `watch` makes of the policy's log-probabilities [N]."""
    every, key = jax.tree.map(jnp.asarray, world.every), jax.random.key(0)

    def step(state, _):
        seen = None
        if watch is not None:
            seen = watch(
                jnp.sum(jnp.where(every.mask, pair_evaluate(world)(state.params, every), 0.0), axis=-1)
            )
        state, metrics = algorithm.update(state, batch, key)
        return state, (metrics["loss/total"], seen)

    state, seen = jax.lax.scan(step, algorithm.init(world.params), None, length=steps)
    return state.params, seen


# ---- the exact answers of the methods on pairs, in float64


def sigmoid_optimum(world: World, pairs: Labelled, *, beta: float, smoothing: float = 0.0) -> np.ndarray:
    """Where DPO and cDPO end on these pairs, log-probabilities [N]: ref exp(u / beta) / Z, with scores u that maximise

        sum over pairs of q log sigmoid(u_first - u_second) + (1 - q) log sigmoid(u_second - u_first),
        q = (1 - smoothing) label + smoothing (1 - label)

    by Newton's method. Any policy is of that form. Without smoothing and with exact labels u is the reward up to a
    constant; with smoothing every pair asks for sigmoid(u_first - u_second) = q, all of which cannot be had at once.
    The pairs must connect all sequences, and the labels not be so one-sided that a score is infinite.
    """
    label_K = (1 - smoothing) * pairs.label_K + smoothing * (1 - pairs.label_K)
    count, score_N = world.reward_N.size, np.zeros(world.reward_N.size)
    for _ in range(50):
        probability_K = _sigmoid(score_N[pairs.first_K] - score_N[pairs.second_K])
        slope_N = _difference(pairs, label_K - probability_K, count)
        curvature = _laplacian(pairs, probability_K * (1 - probability_K), count)
        # Scores are fixed up to a constant: that direction is given curvature 1.
        score_N = score_N + np.linalg.solve(curvature + 1 / count, slope_N)
    return enumerable.optimal_policy(world.logp_ref_N, score_N, beta=beta)


def ipo_optimum(world: World, pairs: Labelled, *, beta: float) -> np.ndarray:
    """Where IPO (arXiv 2310.12036) ends, [N]: least squares of the pairs' log-ratios on (2 label - 1) / (2 beta).

    Over all pairs it is ref(y) exp(P(y preferred) / beta) / Z, P the mean over the other of the pair.
    """
    count = world.reward_N.size
    slope_N = _difference(pairs, (2 * pairs.label_K - 1) / (2 * beta), count)
    log_ratio_N = np.linalg.solve(_laplacian(pairs, np.ones(pairs.label_K.size), count) + 1 / count, slope_N)
    return enumerable.optimal_policy(world.logp_ref_N, log_ratio_N, beta=1.0)


def _difference(pairs: Labelled, x_K: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(pairs.first_K, x_K, count) - np.bincount(pairs.second_K, x_K, count)


def _laplacian(pairs: Labelled, weight_K: np.ndarray, count: int) -> np.ndarray:
    matrix = np.zeros((count, count))
    np.add.at(matrix, (pairs.first_K, pairs.second_K), -weight_K)
    np.add.at(matrix, (pairs.second_K, pairs.first_K), -weight_K)
    return matrix - np.diag(matrix.sum(axis=1))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _float32(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _reference_tokens(world: World) -> jax.Array:
    """Log-probability of every token of every sequence under the reference, float32 [N, T]."""
    logp_SV = jax.nn.log_softmax(_float32(world.logits_ref_SV), axis=-1)
    return logp_SV[world.every.prefix, world.every.token]
