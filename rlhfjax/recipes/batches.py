"""From a scored rollout of text to the batch of an algorithm: the `as_batch` of `make_rlhf`.

Each function here makes one: `as_batch(state, frozen, branches, generation, score) -> batch`, where state is the
algorithm's, and score is float [B, G], or [B, G, R] for several rewards. To train by another rule, write another.

What is learnt from are the tokens of `generation.mask_BGC`; those of `branches.completion_mask_BGC` are seen. They
differ where somebody else speaks between the turns of the model (`chat_rollout`).

Shapes: B prompts, G samples of each, R rewards of a sample, C completion length.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax.algorithms import grpo, ppo, sft
from rlhfjax.algorithms.algorithm import Evaluation, PyTree
from rlhfjax.generation import Generation
from rlhfjax.networks import Branches, LanguageModel, branch_hidden
from rlhfjax.ops import (
    all_equal,
    best_of_n,
    end_of_sequence_reward,
    first_chosen,
    soft_overlong_penalty,
    token_kl,
    token_logprobs,
)
from rlhfjax.recipes.preference import pair_batch
from rlhfjax.recipes.text import completion_logp

AsBatch = Callable[[Any, Any, Branches, Generation, jax.Array], PyTree]


def text_policy(lm: LanguageModel, *, temperature: jax.Array | float = 1.0) -> Callable[..., Evaluation]:
    """`evaluate` of `grpo` on text: `(params, branches) -> Evaluation(logp, entropy)`, each float32 [B, G, C].

    Params are the language model's. `temperature` is that of the rollout: behaviour, current and reference policies
    must share it. Given a third argument, the reference's params, it evaluates that too, for the exact
    KL(policy || reference) over the vocabulary at every action; the reference gets no gradient.
    """

    def evaluate(params: dict, branches: Branches, reference: dict | None = None) -> Evaluation:
        before, _ = branch_hidden(lm, params, branches)
        embedding = lm.embedding(params)
        token, softcap = branches.completion_BGC, lm.config.logit_softcap
        logp, entropy = token_logprobs(before, embedding, token, temperature=temperature, softcap=softcap)
        if reference is None:
            return Evaluation(logp, entropy)
        before_ref, _ = branch_hidden(lm, reference, branches)
        embedding_ref = lm.embedding(reference)
        kl = token_kl(before, embedding, before_ref, embedding_ref, temperature=temperature, softcap=softcap)
        return Evaluation(logp, entropy, kl=kl)

    return evaluate


def ppo_batch(
    lm: LanguageModel,
    evaluate: Callable[..., tuple[Any, ...]],
    *,
    temperature: jax.Array | float = 1.0,
    exact_kl: bool = False,
) -> AsBatch:
    """Rollouts for `ppo`: the score stands at the last action of its completion.

    Args:
      evaluate: the algorithm's, e.g. `text_actor_critic(lm)`, for the values at the rollout.
      temperature: that of the rollout.
      exact_kl: for kl_estimator "exact", in the reward or in the loss.
    """

    def as_batch(state, frozen, branches: Branches, generation: Generation, score_BG: jax.Array):
        reference = (frozen.reference,) if exact_kl else ()
        evaluation = Evaluation(*evaluate(state.params, branches, *reference))
        return ppo.Rollout(
            inputs=branches,
            logp=generation.plain_logp_BGC,  # what `evaluate` gives, at the same temperature
            logp_ref=completion_logp(lm, frozen.reference, branches, temperature),
            value=_given("value", evaluation.value),
            reward=end_of_sequence_reward(score_BG, generation.mask_BGC, finished=generation.finished_BG),
            mask=generation.mask_BGC,
            kl=_given("kl", evaluation.kl) if exact_kl else None,
            reference=frozen.reference if exact_kl else None,
        )

    return as_batch


def grpo_batch(
    lm: LanguageModel,
    *,
    temperature: jax.Array | float = 1.0,
    reference: bool = True,
    exact_kl: Callable[..., tuple[Any, ...]] | None = None,
    mask_truncated: bool = False,
    overlong: tuple[int, int] | None = None,
    greedy: bool = False,
) -> AsBatch:
    """Rollouts for `grpo`.

    Args:
      temperature: that of the rollout.
      reference: whether log-probabilities under `frozen.reference` are computed; without a KL none are needed.
      exact_kl: the algorithm's `evaluate`, where kl_estimator is "exact"; None elsewhere.
      mask_truncated: leaves out completions that no stop token ended, also of the baselines (DAPO's overlong
        filtering, arXiv 2503.14476, leaves them out of the loss).
      overlong: (limit, cache) of `soft_overlong_penalty`, added to the score, to the first of several; in actions.
      greedy: the last completion of each prompt is not learnt from; its score is the baseline (ReMax, arXiv
        2310.10505). For `make_rlhf(greedy=True)` and baseline "given".
    """

    def as_batch(state, frozen, branches: Branches, generation: Generation, score: jax.Array):
        if overlong is not None:
            length_BG = jnp.sum(generation.mask_BGC, axis=2, dtype=jnp.int32)
            penalty_BG = soft_overlong_penalty(length_BG, limit=overlong[0], cache=overlong[1])
            score = score + penalty_BG if score.ndim == 2 else score.at[..., 0].add(penalty_BG)
        baseline = score[:, -1] if greedy else None
        if greedy:
            branches, generation = _samples(branches, generation, slice(-1))
            score = score[:, :-1]
        mask_BGC = generation.mask_BGC
        if mask_truncated:
            mask_BGC = mask_BGC & generation.finished_BG[..., None]
        kl = None
        if exact_kl is not None:
            kl = _given("kl", Evaluation(*exact_kl(state.params, branches, frozen.reference)).kl)
        return grpo.Rollout(
            inputs=branches,
            logp=generation.plain_logp_BGC,  # what `evaluate` gives, at the same temperature
            logp_ref=completion_logp(lm, frozen.reference, branches, temperature) if reference else None,
            reward=score,
            mask=mask_BGC,
            baseline=baseline,
            reference=None if exact_kl is None else frozen.reference,
            kl=kl,
        )

    return as_batch


def best_worst_pairs(lm: LanguageModel, *, temperature: jax.Array | float = 1.0) -> AsBatch:
    """Pairs for `dpo`: of each prompt the completions of highest and lowest score, the first preferred.

    Preference optimisation on the policy's own samples (online DPO, arXiv 2402.04792, with a reward in place of its
    judge). Where scores are all equal, or fewer than two are finite, the prompt gives no pair.
    """

    def as_batch(state, frozen, branches: Branches, generation: Generation, score_BG: jax.Array):
        del state
        finite_BG = jnp.isfinite(score_BG)
        best_B, worst_B = best_of_n(score_BG, finite_BG), best_of_n(-score_BG, finite_BG)
        pair_B2 = jnp.stack([best_B, worst_B], axis=1)
        pair = _chosen(branches, pair_B2)
        pairs = pair_batch(
            pair,
            completion_logp(lm, frozen.reference, pair, temperature),
            first=jnp.asarray([0]),
            second=jnp.asarray([1]),
            label_BK=jnp.ones_like(score_BG, shape=(score_BG.shape[0], 1), dtype=jnp.float32),
            mask_BK=~all_equal(score_BG, finite_BG)[:, None],
        )
        return pairs._replace(completion_mask_BGC=_of_chosen(generation.mask_BGC, pair_B2))

    return as_batch


def best_of_samples() -> AsBatch:
    """The completion of highest score of each prompt, as text to imitate with `sft`: RAFT (arXiv 2304.06767),
    expert iteration, rejection sampling. Ties go to the first. A prompt without a finite score is left out.
    """

    def as_batch(state, frozen, branches: Branches, generation: Generation, score_BG: jax.Array):
        del state, frozen
        finite_BG = jnp.isfinite(score_BG)
        best_B1 = best_of_n(score_BG, finite_BG)[:, None]
        some_B11 = jnp.any(finite_BG, axis=1)[:, None, None]
        weight_B1C = jnp.where(some_B11 & _of_chosen(generation.mask_BGC, best_B1), 1.0, 0.0)
        return sft.Batch(inputs=_chosen(branches, best_B1), weight=weight_B1C.astype(jnp.float32))

    return as_batch


def keep_informative(as_batch: AsBatch, prompts: int) -> AsBatch:
    """Of more prompts than an update takes, the first `prompts` whose scores are not all equal (dynamic sampling,
    arXiv 2503.14476, 3.2), handed to `as_batch`. If there are too few, others fill up, in order.

    Static in shape: draw, say, twice as many prompts as are kept. Prompts are gathered across the batch, so this
    costs communication where the batch is split over devices. "group/equal_rewards" is then the share that had
    to be filled up; a NaN or infinite score is not compared.
    """

    def of_some(state, frozen, branches: Branches, generation: Generation, score: jax.Array):
        by_reward = score[None] if score.ndim == 2 else jnp.moveaxis(score, -1, 0)
        informative_B = jnp.any(~all_equal(by_reward, jnp.isfinite(by_reward)), axis=0)
        index = first_chosen(informative_B, prompts)
        branches, generation, score = jax.tree.map(lambda x: x[index], (branches, generation, score))
        return as_batch(state, frozen, branches, generation, score)

    return of_some


def _chosen(branches: Branches, index_BK: jax.Array) -> Branches:
    """Each prompt with K of its completions."""
    return branches._replace(
        completion_BGC=_of_chosen(branches.completion_BGC, index_BK),
        completion_mask_BGC=_of_chosen(branches.completion_mask_BGC, index_BK),
    )


def _of_chosen(x_BGC: jax.Array, index_BK: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BGC, index_BK[:, :, None], axis=1)


def _samples(branches: Branches, generation: Generation, which: slice) -> tuple[Branches, Generation]:
    """A slice of the samples of every prompt."""
    branches = branches._replace(
        completion_BGC=branches.completion_BGC[:, which],
        completion_mask_BGC=branches.completion_mask_BGC[:, which],
    )
    return branches, Generation(*(x[:, which] for x in generation))


def _given(name: str, x: jax.Array | None) -> jax.Array:
    if x is None:
        raise ValueError(f"evaluate gave no {name}; give an `evaluate` whose Evaluation has it")
    return x
