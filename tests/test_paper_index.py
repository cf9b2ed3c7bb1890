"""Every line of code in the paper index builds, and every algorithm in it takes a step that changes its parameters."""

import dataclasses
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax import config, generation, networks, ops, overoptimisation, recipes, rewards
from rlhfjax.algorithms import (
    Algorithm,
    dpo,
    dqn,
    grpo,
    ilql,
    kto,
    make_optimizer,
    ppo,
    pqn,
    reward_model,
    sft,
    soft_q,
    tabular_q,
)
from rlhfjax.environments import replay
from rlhfjax.networks import decoder

INDEX = Path(__file__).resolve().parents[1] / "docs" / "paper_index.md"
B, G, T, V = 4, 4, 3, 5
KEY = jax.random.key(0)
TOKEN = jax.random.randint(KEY, (B, G, T), 0, V)
MASK = jnp.ones((B, G, T), bool)
REWARD = jax.random.normal(jax.random.key(1), (B, G))
PARAMS = {
    "policy": {"logits": jax.random.normal(jax.random.key(2), (T, V))},
    "critic": {"value": jnp.zeros(T)},
}


def logp_of(params, token):
    logp = jax.nn.log_softmax(params["policy"]["logits"])
    return logp[jnp.arange(T), token]


def actor_critic(params, token):
    table = jax.nn.log_softmax(params["policy"]["logits"])
    entropy = -jnp.sum(jnp.exp(table) * table, axis=1)
    expand = partial(jnp.broadcast_to, shape=token.shape)
    return logp_of(params, token), expand(entropy[None, None]), expand(params["critic"]["value"][None, None])


def score(params, token):
    return jnp.sum(logp_of(params, token), axis=-1)


def text_values(params, token):
    """Two heads on the table of logits, and its maximum for a value."""
    logits = params["policy"]["logits"]
    q = jnp.stack([logits, 0.5 * logits])
    taken, best = q[:, jnp.arange(T), token], jnp.broadcast_to(jnp.max(logits, axis=1), token.shape)
    log_softmax = jax.nn.log_softmax(q)[:, jnp.arange(T), token]
    value = jnp.broadcast_to(params["critic"]["value"], token.shape)
    return ilql.Evaluation(taken, value, log_softmax, logp_of(params, token), best)


def soft_values(params, token):
    normaliser = jax.nn.logsumexp(params["policy"]["logits"], axis=1)
    return logp_of(params, token), jnp.broadcast_to(normaliser, token.shape)


def action_values(params, state):
    return params["policy"]["logits"][state]


def quantiles(params, state):
    return action_values(params, state)[..., None] + jnp.arange(3.0)[None, None]


EVALUATE = {
    "dqn": action_values,
    "pqn": action_values,
    "ilql": text_values,
    "soft_q": soft_values,
    "ppo": actor_critic,
    "grpo": lambda params, token: actor_critic(params, token)[:2],
    "dpo": logp_of,
    "kto": logp_of,
    "sft": logp_of,
    "reward_model": score,
}
LM = decoder(config.Decoder(vocab_size=V, width=4, layers=1, heads=1, kv_heads=1, head_size=4, mlp_width=4))
POLICY = jax.jit(LM.init)(KEY)
PAIRS: dict[str, Any] = {
    "first": jnp.asarray([0, 1]),
    "second": jnp.asarray([2, 3]),
    "label_BK": jnp.ones((B, 2)),
    "mask_BK": jnp.ones((B, 2), bool),
}


def default_batch(module: str, algorithm_code: str):
    """A batch of the module's own kind."""
    logp = logp_of(PARAMS, TOKEN)
    ref = logp - 0.1
    if module == "ppo":
        ends = jnp.arange(T) == T - 1
        ptx = sft.Batch(TOKEN, jnp.ones((B, G, T))) if "ptx" in algorithm_code else None
        reward = jnp.where(ends[None, None], REWARD[..., None], 0.0)
        return ppo.Rollout(TOKEN, logp, ref, jnp.zeros((B, G, T)), reward, MASK)._replace(ptx=ptx)
    if module == "grpo":
        several = "separate_rewards" in algorithm_code
        reward = jnp.stack([REWARD, -(REWARD**2)], axis=-1) if several else REWARD
        given = jnp.zeros(B) if '"given"' in algorithm_code else None
        return grpo.Rollout(TOKEN, logp, ref, reward, MASK, baseline=given)
    if module == "dpo":
        return dpo.Pairs(TOKEN, MASK, *PAIRS.values(), logp_ref_BGC=ref)
    if module == "kto":
        roll = jnp.roll(TOKEN, 1, axis=0)
        others = kto.Mismatched(roll, MASK, logp_of(PARAMS, roll) - 0.1, jnp.ones((B, G), bool))
        label = jnp.asarray(np.arange(B * G).reshape(B, G) % 2, jnp.float32)
        return kto.Judged(TOKEN, MASK, ref, label, jnp.ones((B, G), bool), mismatched=others)
    if module in VALUE_BATCHES:
        return VALUE_BATCHES[module]
    return reward_model.Preference(TOKEN, *PAIRS.values())


STATE, NEXT, ACTION = (
    jax.random.randint(jax.random.key(i), (B, 4), 0, n) for i, n in ((3, T), (4, T), (5, V))
)
STEPS, ENDS = jax.random.normal(jax.random.key(6), (B, 4)), jnp.arange(4) == 3
ENDED = jnp.broadcast_to(ENDS[None], (B, 4))
TRANSITIONS = dqn.Batch(STATE, ACTION, STEPS, NEXT, ENDED, next_action_B=ACTION)
EPISODES = ilql.Episodes(TOKEN, jnp.where(jnp.arange(T) == T - 1, REWARD[..., None], 0.0), MASK)
VALUE_BATCHES = {
    "dqn": jax.tree.map(lambda x: x.reshape(-1), TRANSITIONS),
    "pqn": pqn.Rollout(STATE, ACTION, STEPS, ENDED, next_inputs=NEXT),
    "tabular_q": tabular_q.Transition(STATE[0], ACTION[0], STEPS[0], NEXT[0], ENDS, next_action=ACTION[1]),
    "ilql": EPISODES,
    "soft_q": soft_q.Batch(TOKEN, logp_of(PARAMS, TOKEN) - 0.1, EPISODES.reward, MASK),
    "sft": sft.Batch(TOKEN, jnp.ones((B, G, T))),
}


@cache
def namespace(module: str) -> dict[str, Any]:
    """What the code of a row may name."""
    algorithms = (ppo, grpo, dpo, kto, sft, reward_model, dqn, pqn, tabular_q, ilql, soft_q)
    modules = {x.__name__.rsplit(".", 1)[1]: x for x in algorithms} | {"replay": replay}
    modules |= {"networks": networks, "generation": generation}
    names = {name: x for name, x in vars(config).items() if dataclasses.is_dataclass(x)}
    values = {
        "evaluate_quantiles": quantiles,
        "trajectory": TRANSITIONS,
        "episodes": EPISODES,
        "next_q": jnp.ones((*REWARD.shape, 3)),
        "value": jnp.ones_like(REWARD),
        "next_value": jnp.ones_like(REWARD),
        "log_ratio": jnp.zeros_like(REWARD),
        "example": jnp.float32(0),
        "held": replay.add(replay.init(jnp.float32(0), 8, prioritised=True), jnp.arange(8.0)),
        "index": jnp.arange(4),
        "error": jnp.arange(4.0),
        "key": KEY,
        "policy": POLICY,
        "inputs": TOKEN,
        "best_B": jnp.zeros(B, jnp.int32),
        "order_BG": jnp.broadcast_to(jnp.arange(G), (B, G)),
        "margin_BK": jnp.full((B, 2), 0.5),
        "label_BGC": jnp.ones((B, G, T)),
        "mask_BGC": MASK,
        "score": REWARD,
        "gold": REWARD,
        "reward": REWARD,
        "logp": jnp.log(jnp.full(8, 1 / 8)),
        "score_of_outcome": jnp.arange(8.0),
        "length": jnp.arange(1, 5),
        "logit": REWARD,
        "label": jnp.ones((B, G)),
        "correct": REWARD > 0,
        "potential": REWARD,
        "d": np.array([0.5, 1.0, 2.0]),
        "gain": np.array([0.2, 0.3, 0.1]),
        "lm": LM,
        "is_policy": lambda params: {"policy": True, "critic": False},
        "evaluate_ptx": logp_of,
        "evaluate_steps": logp_of,
        "make_optimizer": make_optimizer,
    }
    return (
        names
        | modules
        | values
        | PAIRS
        | {
            "ops": ops,
            "overoptimisation": overoptimisation,
            "rewards": rewards,
            "recipes": recipes,
            "partial": partial,
            "optimizer": optax.sgd(0.1),
            "evaluate": EVALUATE.get(module, score),
        }
    )


def rows() -> list[tuple[str, list[str]]]:
    lines = [line for line in INDEX.read_text().splitlines() if line.startswith("| ") and "`" in line]
    return [
        (line.split("|")[1].strip(), re.findall(r"`([^`]+)`", line.rsplit(" | ", 1)[1])) for line in lines
    ]


ROWS = rows()


@pytest.mark.parametrize(
    ("paper", "code"), ROWS, ids=[f"{i}-{name[:30]}" for i, (name, _) in enumerate(ROWS)]
)
def test_a_row_of_the_index_runs(paper, code):
    module = code[0].split(".", 1)[0]
    made = [eval(piece, dict(namespace(module))) for piece in code]
    batches = [x for x in made if type(x).__module__ == "rlhfjax.algorithms.reward_model"]
    algorithms = [(piece, x) for piece, x in zip(code, made, strict=True) if isinstance(x, Algorithm)]
    for piece, algorithm in algorithms:
        module = piece.split(".", 1)[0]
        batch = batches[0] if batches else default_batch(module, piece)
        start = PARAMS["policy"]["logits"] if module == "tabular_q" else PARAMS
        # A warm-up holds the policy; the critic learns.
        state, metrics = jax.jit(algorithm.update)(algorithm.init(start), batch, KEY)
        assert all(np.isfinite(x) for x in metrics.values()), paper
        end = state.q[0] if module == "tabular_q" else state.params
        moved = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (start, end)), strict=True)]
        assert any(moved), f"{paper}: {piece} changed nothing"
    for x in (x for x in made if not isinstance(x, Algorithm)):
        assert all(is_sound(leaf) for leaf in jax.tree.leaves(x)), paper


def is_sound(leaf: Any) -> bool:
    """A function, a configuration, or numbers that are finite."""
    return callable(leaf) or dataclasses.is_dataclass(leaf) or bool(np.all(np.isfinite(np.asarray(leaf))))


def test_the_index_names_papers_by_number():
    assert len(ROWS) > 75
    assert sum(bool(re.search(r"\d{4}\.\d{5}", name)) for name, _ in ROWS) > 60
