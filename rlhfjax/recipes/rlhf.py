"""One iteration of RLHF on text: rollout -> reward -> advantages -> epochs of updates.

With a reward on the device the iteration is one compiled program, `iterate`. With a reward on the host (Python,
strings) it is two, `rollout` and `learn`, with the score computed between them; `iterate` is nothing but their
composition.

Shapes: B prompts, G samples of each, P prompt length, C completion length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.algorithms.algorithm import Algorithm
from rlhfjax.algorithms.ppo import Rollout
from rlhfjax.generation import Generation, Sampling, generate, sample_keys
from rlhfjax.networks import Branches, LanguageModel
from rlhfjax.ops import end_of_sequence_reward, masked_mean
from rlhfjax.recipes.text import completion_logp


class Prompts(NamedTuple):
    """A batch of prompts."""

    token_BP: jax.Array  # int32, left-padded
    mask_BP: jax.Array  # bool
    index_B: jax.Array  # int32, the prompt's own number: its samples' keys derive from it


class Frozen(NamedTuple):
    """Parameters that an iteration reads and never changes."""

    reference: Any  # policy params of the reference
    reward: Any  # what the reward function takes as params


class Experience(NamedTuple):
    """What a rollout saw, and how it was scored."""

    branches: Branches
    generation: Generation
    score_BG: jax.Array  # float32, the reward of the whole completion


class RLHF(NamedTuple):
    """An iteration as pure functions. The caller jits, donates the state, vmaps and shards.

    rollout(state, prompts, key) -> Generation
    learn(state, frozen, prompts, generation, score_BG, key) -> (state, metrics)
    iterate(state, frozen, prompts, key) -> (state, metrics, Experience)
        For a reward on the device. Keys are consumed.
    """

    rollout: Callable[..., Generation]
    learn: Callable[..., tuple[Any, dict[str, jax.Array]]]
    iterate: Callable[..., tuple[Any, dict[str, jax.Array], Experience]]


def make_rlhf(
    lm: LanguageModel,
    algorithm: Algorithm,
    evaluate: Callable[[Any, Branches], tuple[jax.Array, jax.Array, jax.Array]],
    *,
    reward: Callable[[Any, Branches], jax.Array] | None = None,
    samples: int,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    temperature: float = 1.0,
    missing_eos_penalty: float | None = None,
) -> RLHF:
    """Composes an iteration.

    Args:
      algorithm, evaluate: e.g. `ppo.make(evaluate, ...)` with `evaluate = text_actor_critic(lm)`; its state's params
        hold the sampling policy under "policy".
      reward: `reward(params, branches) -> float [B, G]` on the device. None: scores come from the host, to `learn`.
      samples: completions of each prompt, G.
      missing_eos_penalty: the score of a completion that no stop token ended, in place of its reward ("EOS trick",
        arXiv 2403.17031); None leaves its reward.

    A score that is not finite is never trained on: its completion is masked out, and counted in "reward/nonfinite".
    """

    def rollout(state, prompts: Prompts, key: jax.Array) -> Generation:
        return generate(
            lm,
            state.params["policy"],
            prompts.token_BP,
            prompts.mask_BP,
            sample_keys(key, prompts.index_B, samples),
            max_new_tokens=max_new_tokens,
            stop_tokens=stop_tokens,
            sampling=Sampling(temperature),
        )

    def learn(
        state, frozen: Frozen, prompts: Prompts, generation: Generation, score_BG: jax.Array, key: jax.Array
    ):
        branches = as_branches(prompts, generation)
        _, _, value = evaluate(state.params, branches)
        batch = Rollout(
            inputs=branches,
            logp=generation.logp_BGC,
            logp_ref=completion_logp(lm, frozen.reference, branches, temperature),
            value=value,
            reward=end_of_sequence_reward(
                score_BG,
                generation.mask_BGC,
                finished=generation.finished_BG,
                missing_eos_penalty=missing_eos_penalty,
            ),
            mask=generation.mask_BGC,
        )
        state, metrics = algorithm.update(state, batch, key)
        return state, metrics | _completion_metrics(generation, score_BG)

    def iterate(state, frozen: Frozen, prompts: Prompts, key: jax.Array):
        if reward is None:
            raise ValueError(
                "iterate needs a reward on the device; with one on the host call rollout, then learn"
            )
        key_rollout, key_learn = jax.random.split(key)
        generation = rollout(state, prompts, key_rollout)
        score_BG = reward(frozen.reward, as_branches(prompts, generation))
        state, metrics = learn(state, frozen, prompts, generation, score_BG, key_learn)
        return state, metrics, Experience(as_branches(prompts, generation), generation, score_BG)

    return RLHF(rollout, learn, iterate)


def as_branches(prompts: Prompts, generation: Generation) -> Branches:
    """The rollout as rows of one prompt and its G completions."""
    return Branches(prompts.token_BP, prompts.mask_BP, generation.token_BGC, generation.mask_BGC)


def _completion_metrics(generation: Generation, score_BG: jax.Array) -> dict[str, jax.Array]:
    length_BG = jnp.sum(generation.mask_BGC, axis=2, dtype=jnp.float32)
    finite = jnp.isfinite(score_BG)
    mean = masked_mean(score_BG, finite)
    return {
        "objective/score": mean,
        "objective/score_std": jnp.sqrt(masked_mean(jnp.square(score_BG - mean), finite)),
        "completions/mean_length": jnp.mean(length_BG),
        "completions/finished": jnp.mean(generation.finished_BG.astype(jnp.float32)),
        "completions/padding": 1.0 - jnp.mean(generation.mask_BGC.astype(jnp.float32)),
    }
