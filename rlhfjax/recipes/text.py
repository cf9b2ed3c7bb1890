"""What the algorithms need to know of a language model on text: `evaluate` functions.

Shapes: B prompts or packed rows, T positions, G completions of a prompt, C completion length, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.networks import (
    Branches,
    LanguageModel,
    branch_hidden,
    causal_mask,
    init_scalar_head,
    scalar_head,
)
from rlhfjax.ops import masked_mean, token_logprobs


class PackedInputs(NamedTuple):
    """Packed rows for a language model; position t of `target` is the token after position t."""

    token_BT: jax.Array  # int32
    target_BT: jax.Array  # int32
    position_BT: jax.Array  # int32, from 0 in each segment
    segment_BT: jax.Array  # int32, 0 = padding


def packed_logp(lm: LanguageModel) -> Callable[[dict, PackedInputs], jax.Array]:
    """`evaluate` of supervised fine-tuning: log-probability of every target, float32 [B, T]."""

    def evaluate(params: dict, inputs: PackedInputs) -> jax.Array:
        mask = causal_mask(inputs.segment_BT)
        hidden, _ = lm.apply(params, inputs.token_BT, position_BT=inputs.position_BT, mask_BTS=mask)
        return token_logprobs(hidden, lm.embedding(params), inputs.target_BT).logp

    return evaluate


def completion_logp(
    lm: LanguageModel, params: dict, branches: Branches, temperature: jax.Array | float = 1.0
) -> jax.Array:
    """Log-probability of every completion token, float32 [B, G, C]; meaningless where the mask is False."""
    before, _ = branch_hidden(lm, params, branches)
    return token_logprobs(before, lm.embedding(params), branches.completion_BGC, temperature=temperature).logp


def text_actor_critic(
    lm: LanguageModel, *, temperature: float = 1.0, shared_trunk: bool = False
) -> Callable[[dict, Branches], tuple[jax.Array, jax.Array, jax.Array]]:
    """`evaluate` of PPO on text: (logp, entropy, value), each float32 [B, G, C].

    Params: {"policy": LM params, "critic": {"trunk": LM params, "head"}}; with `shared_trunk` the critic has no trunk
    and its head reads the policy's hidden states. The value of an action is that of the state it is chosen in.
    `temperature` is that of the rollout: behaviour, current and reference policies must share it.
    """

    def evaluate(params: dict, branches: Branches):
        policy, critic = params["policy"], params["critic"]
        before, _ = branch_hidden(lm, policy, branches)
        logp, entropy = token_logprobs(
            before, lm.embedding(policy), branches.completion_BGC, temperature=temperature
        )
        if not shared_trunk:
            before, _ = branch_hidden(lm, critic["trunk"], branches)
        return logp, entropy, scalar_head(critic["head"], before)

    return evaluate


def init_reward_model(key: jax.Array, trunk: dict, width: int) -> dict:
    """Reward-model params from a language model's: the trunk, a scalar head N(0, 1/sqrt(d+1)), gain 1 and bias 0."""
    head = init_scalar_head(key, width)
    return {"trunk": trunk, "head": head, "gain": jnp.ones(()), "bias": jnp.zeros(())}


def make_reward_model(lm: LanguageModel, *, pool: str = "last") -> Callable[[dict, Branches], jax.Array]:
    """`evaluate` of reward learning, and the reward of `make_rlhf`: a score per completion, float32 [B, G].

    The head reads the hidden state at the completion's last token ("last", the field's standard), or the mean over
    its tokens ("mean"). `gain` and `bias` normalise the score and get no gradient. An empty completion is an error of
    the caller: its score is that of position 0.
    """
    if pool not in ("last", "mean"):
        raise ValueError(f'reward-model pool={pool!r} is unknown; choose "last" or "mean"')

    def evaluate(params: dict, branches: Branches) -> jax.Array:
        _, after_BGCD = branch_hidden(lm, params["trunk"], branches)
        mask_BGC = branches.completion_mask_BGC
        if pool == "last":
            last_BG = jnp.maximum(jnp.sum(mask_BGC, axis=2, dtype=jnp.int32) - 1, 0)
            score = scalar_head(
                params["head"], jnp.take_along_axis(after_BGCD, last_BG[:, :, None, None], axis=2)[:, :, 0]
            )
        else:
            score = masked_mean(scalar_head(params["head"], after_BGCD), mask_BGC, axis=2)
        gain, bias = jax.lax.stop_gradient((params["gain"], params["bias"]))
        return gain * score + bias

    return evaluate
