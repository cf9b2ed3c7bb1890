"""Reward models that are a language model with a scalar head: of a whole completion, or of every step in it.

Params: {"trunk": LM params, "head", "gain", "bias"}; of an ensemble, the same with a leading axis M.

Shapes: M members, B prompts, G completions of each, C completion length, D width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhfjax.networks import Branches, LanguageModel, branch_hidden, init_scalar_head, scalar_head
from rlhfjax.ops import masked_mean


def init_reward_model(key: jax.Array, trunk: dict, width: int) -> dict:
    """Reward-model params from a language model's: the trunk, a scalar head N(0, 1/sqrt(d+1)), gain 1 and bias 0."""
    head = init_scalar_head(key, width)
    return {"trunk": trunk, "head": head, "gain": jnp.ones(()), "bias": jnp.zeros(())}


def init_reward_ensemble(key: jax.Array, trunk: dict, width: int, members: int) -> dict:
    """Params of M reward models, stacked: M copies of the trunk, M heads drawn apart.

    For `reward_model.ensemble` and `rewards.ensemble_reward`. Where the trunk stays frozen, leave it out of the
    params and close over it instead: then it is held once.
    """
    init = jax.vmap(init_reward_model, (0, None, None))
    return init(jax.random.split(key, members), trunk, width)


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
        return _normalised(params, score)

    return evaluate


def make_process_reward_model(lm: LanguageModel) -> Callable[[dict, Branches], jax.Array]:
    """`evaluate` of `reward_model.Steps`: a logit at every completion token, float32 [B, G, C] (arXiv 2305.20050).

    sigmoid(logit) is the probability that the step which ends at this token is right, once it has been read;
    what stands at other tokens is never trained and means nothing. Params are those of `init_reward_model`.
    `rewards.step_reward` makes PPO's reward of it, `rewards.solution_score` a score per completion.
    """

    def evaluate(params: dict, branches: Branches) -> jax.Array:
        _, after_BGCD = branch_hidden(lm, params["trunk"], branches)
        return _normalised(params, scalar_head(params["head"], after_BGCD))

    return evaluate


def _normalised(params: dict, score: jax.Array) -> jax.Array:
    gain, bias = jax.lax.stop_gradient((params["gain"], params["bias"]))
    return gain * score + bias
