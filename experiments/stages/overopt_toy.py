"""Over-optimisation of which everything is known: a language model that can be enumerated, and proxies that are wrong
on purpose.

The gold score of a sequence is its quality less what two habits cost, each above its mean: a style, and length (how
many of its tokens are words, the upper half of the vocabulary; the others are blanks). Quality and style are each
sequence's own, N(0, 1) and independent. Under the reference every score has mean 0 and standard deviation 1. The
proxies, after the taxonomy of arXiv 1803.04585:

    noise      gold + N(0, 1) of each sequence's own (regressional): gold rises more slowly, and does not turn
    outliers   gold + Student's t with 3 degrees of freedom: the tail is heavier than that of gold, so that what is best
               by the proxy is luck (arXiv 2407.14503: catastrophic Goodhart)
    spurious   rewards the style, and does not know what it costs (causal)
    length     rewards length, and does not know what it costs (causal, and extremal: there is a longest)

Shapes: N sequences, P points of a curve.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.stages.enumerated import (
    World,
    evaluate_with,
    grpo_batch,
    ppo_batch,
    tabular_world,
    train_online,
)
from experiments.stages.hard_labels import capped
from experiments.stages.overopt_configs import Toy as Config
from rlhfjax.algorithms import grpo, make_optimizer, ppo
from rlhfjax.config import GRPO, PPO, Optimizer
from rlhfjax.environments import enumerable
from rlhfjax.ops import best_of_n_distribution

KINDS = ("noise", "outliers", "spurious", "length")
METHODS = {
    # Whitening would blow up advantages that vanish at the optimum, and the noise of the steps with them.
    "ppo": PPO(
        whiten_advantages=False, epochs=2, minibatches=2, value_clip=float("inf"), value_coefficient=1.0
    ),
    "rloo": GRPO(
        baseline="leave_one_out",
        scale="none",
        clip="none",
        aggregation="constant",
        length_constant=1.0,
        kl_placement="score",
        kl_estimator="k1",
    ),
}


class Scores(NamedTuple):
    """The scores of all sequences, float64 [N]."""

    gold: np.ndarray
    proxies: dict[str, np.ndarray]  # by kind


class Points(NamedTuple):
    """Policies along a curve, float64 [P] each."""

    kl: np.ndarray  # nats, from the reference
    proxy: np.ndarray
    gold: np.ndarray


def make_world(config: Config, seed: int) -> tuple[World, Scores]:
    """The reference and the scores of one seed. The world's reward is gold."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    world = tabular_world(config.model, key)
    # Near to uniform: where few sequences had most of the probability, luck of these would be the whole curve.
    params = world.params | {"logits": config.evenness * world.params["logits"]}
    logits_SV = np.asarray(params["logits"], np.float64)
    logp_ref_N = enumerable.table_logp(logits_SV, world.every)
    scores = make_scores(config, logp_ref_N, world.every, np.random.default_rng([seed, 2]))
    known = {"params": params, "logits_ref_SV": logits_SV, "logp_ref_N": logp_ref_N, "reward_N": scores.gold}
    return world._replace(**known), scores


def make_scores(
    config: Config, logp_ref_N: np.ndarray, every: enumerable.Sequences, generator: np.random.Generator
) -> Scores:
    """Gold and the proxies of all sequences `every`."""
    standard = partial(standardise, logp_ref_N)
    quality_N, style_N = (standard(generator.normal(size=logp_ref_N.shape)) for _ in range(2))
    words_N = np.sum(every.token >= config.model.vocab_size // 2, axis=1, where=every.mask, dtype=np.float64)
    long_N = standard(np.asarray(words_N))
    luck_N = generator.normal(size=logp_ref_N.shape)
    outlier_N = generator.standard_t(3, size=logp_ref_N.shape) / np.sqrt(3.0)
    style_cost_N, length_cost_N = (config.cost * np.maximum(x, 0.0) ** 2 for x in (style_N, long_N))
    gold_N = quality_N - style_cost_N - length_cost_N
    proxies = {
        "noise": gold_N + config.error * luck_N,
        "outliers": gold_N + config.error * outlier_N,
        "spurious": quality_N - length_cost_N + config.error * style_N,
        "length": quality_N - style_cost_N + config.error * long_N,
    }
    return Scores(standard(gold_N), {kind: standard(x) for kind, x in proxies.items()})


def standardise(logp_ref_N: np.ndarray, score_N: np.ndarray) -> np.ndarray:
    """The score with mean 0 and standard deviation 1 under the reference."""
    p_N = np.exp(logp_ref_N)
    centred_N = score_N - p_N @ score_N / p_N.sum()
    return centred_N / np.sqrt(p_N @ centred_N**2 / p_N.sum())


def measure(world: World, gold_N: np.ndarray, proxy_N: np.ndarray, logp_PN: np.ndarray) -> Points:
    """Exact KL, proxy and gold of policies given by their log-probabilities of all sequences [P, N]."""
    return Points(
        np.maximum(enumerable.kl(logp_PN, world.logp_ref_N[None]), 0.0),
        enumerable.expected_reward(logp_PN, proxy_N[None]),
        enumerable.expected_reward(logp_PN, gold_N[None]),
    )


def best_of_n_points(world: World, gold_N: np.ndarray, proxy_N: np.ndarray, counts: Sequence[int]) -> Points:
    """Best of n by the proxy, exactly, for every n of `counts`."""
    logp_N, score_N, n_P = (jnp.asarray(x, jnp.float32) for x in (world.logp_ref_N, proxy_N, counts))
    logp_PN = _best_of_each(logp_N, score_N, n_P)
    return measure(world, gold_N, proxy_N, np.asarray(logp_PN, np.float64))


@jax.jit
def _best_of_each(logp_N: jax.Array, score_N: jax.Array, n_P: jax.Array) -> jax.Array:
    return jax.vmap(lambda n: best_of_n_distribution(logp_N, score_N, n=n))(n_P)


def optimum_points(world: World, gold_N: np.ndarray, proxy_N: np.ndarray, betas: Sequence[float]) -> Points:
    """The optimum of proxy - beta KL, exactly, for every beta."""
    logp_PN = np.stack([enumerable.optimal_policy(world.logp_ref_N, proxy_N, beta=beta) for beta in betas])
    return measure(world, gold_N, proxy_N, logp_PN)


def trainer(config: Config, world: World, method: str, key: jax.Array, max_steps: int | None):
    """`train(proxy [R, N], beta [R]) -> logits [R, S, V]` of whole runs of a method, all in one program; not jitted."""
    settings, steps = METHODS[method], capped(config.steps, max_steps)

    def train(proxy_N: jax.Array, beta: jax.Array) -> jax.Array:
        own, of_proxy = replace(settings, kl_coefficient=beta), world._replace(reward_N=proxy_N)  # pyright: ignore
        algorithm, batch = (ppo, ppo_batch) if isinstance(own, PPO) else (grpo, grpo_batch)
        updates = steps * own.epochs * own.minibatches
        optimizer = make_optimizer(Optimizer(learning_rate=config.learning_rate, max_grad_norm=None), updates)
        made = algorithm.make(evaluate_with(of_proxy), optimizer, own)
        shape = (config.prompts, config.samples)
        return train_online(of_proxy, made, batch(of_proxy), key, steps=steps, shape=shape)["logits"]

    return jax.vmap(train)


def runs(config: Config, scores: Scores) -> tuple[list[tuple[str, float]], np.ndarray, np.ndarray]:
    """(kind, beta) of every trained run, with the proxies [R, N] and betas [R] that `trainer` takes."""
    pairs = [(kind, beta) for kind in config.kinds for beta in config.trained_betas]
    proxy_RN = np.stack([scores.proxies[kind] for kind, _ in pairs]).astype(np.float32)
    return pairs, proxy_RN, np.asarray([beta for _, beta in pairs], np.float32)


def exact(config: Config, seed: int) -> tuple[dict[str, np.ndarray], dict[str, float], list]:
    """All exact curves, as `run_once` asks for them: KIND/bon/kl and so on."""
    world, scores = make_world(config, seed)
    arrays: dict[str, np.ndarray] = {}
    for kind in config.kinds:
        proxy_N = scores.proxies[kind]
        bon = best_of_n_points(world, scores.gold, proxy_N, config.best_of)
        rl = optimum_points(world, scores.gold, proxy_N, config.betas)
        for name, points in (("bon", bon), ("rl", rl)):
            arrays |= {f"{kind}/{name}/{field}": x for field, x in points._asdict().items()}
    p_N = np.exp(world.logp_ref_N)
    correlation = {
        f"{kind}/correlation": float(p_N @ (scores.proxies[kind] * scores.gold)) for kind in config.kinds
    }
    return arrays, correlation | {"sequences": float(len(scores.gold))}, []


def trained(
    config: Config, seed: int, method: str, max_steps: int | None
) -> tuple[dict[str, np.ndarray], dict[str, float], list]:
    """How the runs of one method ended beside the optimum, as `run_once` asks for it: [R] each."""
    world, scores = make_world(config, seed)
    pairs, proxy_RN, beta_R = runs(config, scores)
    key = jax.random.fold_in(jax.random.key(seed), 3)
    logits_RSV = jax.jit(trainer(config, world, method, key, max_steps))(proxy_RN, beta_R)
    found: dict[str, list[Any]] = {}
    for (kind, beta), logits_SV in zip(pairs, np.asarray(logits_RSV, np.float64), strict=True):
        proxy_N = scores.proxies[kind]
        logp_N = enumerable.table_logp(logits_SV, world.every)
        best_N = enumerable.optimal_policy(world.logp_ref_N, proxy_N, beta=beta)
        points = measure(world, scores.gold, proxy_N, np.stack([logp_N, best_N]))
        row = {f"trained/{name}": x[0] for name, x in points._asdict().items()}
        row |= {f"exact/{name}": x[1] for name, x in points._asdict().items()}
        row["total_variation"] = enumerable.total_variation(logp_N, best_N)
        for name, value in row.items():
            found.setdefault(name, []).append(float(value))
    arrays = {name: np.asarray(values) for name, values in found.items()}
    metrics = {"total_variation": float(arrays["total_variation"].max())}
    return arrays, metrics, []


def check(config: Config) -> None:
    """Raises ValueError where the curves would be of too few points, or a name is unknown."""
    for name, known in (("kinds", KINDS), ("trained", tuple(METHODS))):
        asked = getattr(config, name)
        if len(set(asked)) != len(asked) or not set(asked) <= set(known):
            raise ValueError(f"toy.{name}={list(asked)} must be different ones of {', '.join(known)}")
    if not config.kinds:
        raise ValueError("toy.kinds is empty: name at least one proxy")
    for name in ("best_of", "betas", "trained_betas"):
        values = getattr(config, name)
        if any(x <= 0 for x in values) or len(set(values)) < (1 if name == "trained_betas" else 4):
            raise ValueError(
                f"toy.{name}={list(values)} must be different numbers above 0, at least four for a fit"
            )
