"""Every line of code in the paper index builds, and every algorithm in it takes a step that changes its parameters."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax import config, ops, recipes, rewards
from rlhfjax.algorithms import Algorithm, dpo, grpo, kto, ppo, reward_model, sft
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


EVALUATE = {
    "ppo": actor_critic,
    "grpo": lambda params, token: actor_critic(params, token)[:2],
    "dpo": logp_of,
    "kto": logp_of,
    "sft": logp_of,
    "reward_model": score,
}
LM = decoder(config.Decoder(vocab_size=V, width=4, layers=1, heads=1, kv_heads=1, head_size=4, mlp_width=4))
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
    return reward_model.Preference(TOKEN, *PAIRS.values())


def namespace(module: str) -> dict[str, Any]:
    names = {name: getattr(config, name) for name in ("PPO", "GRPO", "DPO", "KTO", "SFT", "RewardModel")}
    modules = {"ppo": ppo, "grpo": grpo, "dpo": dpo, "kto": kto, "sft": sft, "reward_model": reward_model}
    values = {
        "inputs": TOKEN,
        "best_B": jnp.zeros(B, jnp.int32),
        "order_BG": jnp.broadcast_to(jnp.arange(G), (B, G)),
        "margin_BK": jnp.full((B, 2), 0.5),
        "label_BGC": jnp.ones((B, G, T)),
        "mask_BGC": MASK,
        "score": REWARD,
        "gold": REWARD,
        "logp": jnp.log(jnp.full(8, 1 / 8)),
        "score_of_outcome": jnp.arange(8.0),
        "length": jnp.arange(1, 5),
        "logit": REWARD,
        "label": jnp.ones((B, G)),
        "lm": LM,
        "is_policy": lambda params: {"policy": True, "critic": False},
        "evaluate_ptx": logp_of,
        "evaluate_steps": logp_of,
    }
    return (
        names
        | modules
        | values
        | PAIRS
        | {
            "ops": ops,
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
    made = [eval(piece, namespace(module)) for piece in code]
    batches = [x for x in made if type(x).__module__ == "rlhfjax.algorithms.reward_model"]
    algorithms = [(piece, x) for piece, x in zip(code, made, strict=True) if isinstance(x, Algorithm)]
    for piece, algorithm in algorithms:
        batch = batches[0] if batches else default_batch(piece.split(".", 1)[0], piece)
        # A warm-up holds the policy; the critic learns.
        state, metrics = jax.jit(algorithm.update)(algorithm.init(PARAMS), batch, KEY)
        assert all(np.isfinite(x) for x in metrics.values()), paper
        moved = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (PARAMS, state.params)), strict=True)]
        assert any(moved), f"{paper}: {piece} changed nothing"
    if not algorithms:
        for x in made:
            assert callable(x) or isinstance(x, recipes.RLHF) or np.all(np.isfinite(np.asarray(x))), paper


def test_the_index_names_papers_by_number():
    assert len(ROWS) > 45
    assert sum(bool(re.search(r"\d{4}\.\d{5}", name)) for name, _ in ROWS) > 40
