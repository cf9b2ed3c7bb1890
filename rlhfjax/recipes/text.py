"""What the algorithms need to know of a language model on text: `evaluate` functions.

Shapes: B prompts or packed rows, T positions, G completions of a prompt, C completion length, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from rlhfjax.algorithms.algorithm import Evaluation
from rlhfjax.networks import (
    Branches,
    LanguageModel,
    SegmentMask,
    branch_hidden,
    scalar_head,
)
from rlhfjax.ops import token_kl, token_logprobs


class PackedInputs(NamedTuple):
    """Packed rows for a language model; position t of `target` is the token after position t."""

    token_BT: jax.Array  # int32
    target_BT: jax.Array  # int32
    position_BT: jax.Array  # int32, from 0 in each segment
    segment_BT: jax.Array  # int32, 0 = padding


def packed_logp(lm: LanguageModel) -> Callable[[dict, PackedInputs], jax.Array]:
    """`evaluate` of supervised fine-tuning: log-probability of every target, float32 [B, T]."""

    def evaluate(params: dict, inputs: PackedInputs) -> jax.Array:
        mask = SegmentMask(inputs.segment_BT)
        hidden, _ = lm.apply(params, inputs.token_BT, position_BT=inputs.position_BT, mask_BTS=mask)
        softcap = lm.config.logit_softcap
        return token_logprobs(hidden, lm.embedding(params), inputs.target_BT, softcap=softcap).logp

    return evaluate


def completion_logp(
    lm: LanguageModel, params: dict, branches: Branches, temperature: jax.Array | float = 1.0
) -> jax.Array:
    """Log-probability of every completion token, float32 [B, G, C]; meaningless where the mask is False."""
    before, _ = branch_hidden(lm, params, branches)
    token, softcap = branches.completion_BGC, lm.config.logit_softcap
    return token_logprobs(before, lm.embedding(params), token, temperature=temperature, softcap=softcap).logp


def text_actor_critic(
    lm: LanguageModel, *, temperature: jax.Array | float = 1.0, shared_trunk: bool = False
) -> Callable[..., Evaluation]:
    """`evaluate` of PPO on text: `(params, branches) -> Evaluation(logp, entropy, value)`, each float32 [B, G, C].

    Params: {"policy": LM params, "critic": {"trunk": LM params, "head"}}; with `shared_trunk` the critic has no trunk
    and its head reads the policy's hidden states. The value of an action is that of the state it is chosen in.
    `temperature` is that of the rollout: behaviour, current and reference policies must share it.

    A critic usually begins as the reward model (arXiv 2403.17031): its trunk, which has learnt what is rewarded, and
    a head at zero, `init_scalar_head(key, width, scale=0.0)`; the reward model's own head speaks of whole completions
    and is far off for begun ones (arXiv 2503.01491), unless `critic_warmup` comes first.

    Given a third argument, the reference's LM params, it evaluates that too, for the exact KL(policy || reference)
    over the vocabulary at every action: a second forward pass, and logits of both. The reference gets no gradient.
    """

    def evaluate(params: dict, branches: Branches, reference: dict | None = None) -> Evaluation:
        policy, critic, softcap = params["policy"], params["critic"], lm.config.logit_softcap
        before, _ = branch_hidden(lm, policy, branches)
        logp, entropy = token_logprobs(
            before,
            lm.embedding(policy),
            branches.completion_BGC,
            temperature=temperature,
            softcap=softcap,
        )
        kl = None
        if reference is not None:
            before_ref, _ = branch_hidden(lm, reference, branches)
            kl = token_kl(
                before,
                lm.embedding(policy),
                before_ref,
                lm.embedding(reference),
                temperature=temperature,
                softcap=softcap,
            )
        if not shared_trunk:
            before, _ = branch_hidden(lm, critic["trunk"], branches)
        return Evaluation(logp, entropy, scalar_head(critic["head"], before), kl)

    return evaluate


def policy_parameters(params: dict) -> dict:
    """`is_policy` of `ppo.make` for `text_actor_critic`: what `critic_warmup` holds.

    With a shared trunk that is the trunk too, and the critic's head alone warms up.
    """
    return {name: name == "policy" for name in params}
