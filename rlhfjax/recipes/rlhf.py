"""One iteration of RLHF on text: rollout -> reward -> batch -> update, by whichever algorithm.

With a reward on the device the iteration is one compiled program, `iterate`. With a reward on the host (Python,
strings) it is two, `rollout` and `learn`, with the score computed between them; `iterate` is nothing but their
composition.

Shapes: B prompts, G samples of each, P prompt length, C completion length.
"""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.algorithms.algorithm import Algorithm
from rlhfjax.generation import Generation, Sampling, generate, generate_refilled, sample_keys
from rlhfjax.mesh import Devices, each_on_its_rows
from rlhfjax.networks import Branches, LanguageModel
from rlhfjax.ops import batch_mean
from rlhfjax.recipes.batches import AsBatch


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
    score_BG: jax.Array  # float32, the reward of the whole completion; [B, G, R] where there are several


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
    as_batch: AsBatch,
    *,
    reward: Callable[..., jax.Array] | None = None,
    numbered: bool = False,
    samples: int,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    banned_tokens: tuple[int, ...] = (),
    temperature: float = 1.0,
    missing_eos_penalty: float | None = None,
    greedy: bool = False,
    policy: Callable[[Any], dict] = itemgetter("policy"),
    slots: int | None = None,
    mesh: Devices | None = None,
    axis_name: str | None = None,
) -> RLHF:
    """Composes an iteration.

    Args:
      algorithm: e.g. `ppo.make(evaluate, ...)` with `evaluate = text_actor_critic(lm)`.
      as_batch: `as_batch(state, frozen, branches, generation, score) -> batch` of the algorithm, e.g.
        `ppo_batch(lm, evaluate)` or `grpo_batch(lm)`; see `rlhfjax.recipes.batches`.
      reward: `reward(params, branches) -> float [B, G]`, or [B, G, R] for several rewards, on the device. None:
        scores come from the host, to `learn`. One of completions alone is made into it by `completion_reward`.
      numbered: the reward is called as `reward(params, branches, index_B)`, with the prompts' own numbers, by which it
        looks up what belongs to each: a reference, an answer.
      samples: completions of each prompt, G.
      banned_tokens: ids that are never drawn: those of a padded vocabulary, which no text has. The plain distribution,
        whose log-probabilities are learnt from, still has them.
      missing_eos_penalty: the score of a completion that no stop token ended, in place of its reward ("EOS trick",
        arXiv 2403.17031); None leaves its reward.
      greedy: one more completion of each prompt, the last, is decoded greedily, for a baseline (ReMax). It is scored,
        and counted in no metric.
      policy: the language model's params among the algorithm's: the entry "policy", or `lambda params: params`.
      slots: completions decoded at a time on each device, so that short ones do not wait for long ones
        (`generate_refilled`); None decodes all together. The completions are the same.
      mesh: the devices that the batch is split over (`rlhfjax.mesh`), for `slots` only: each refills its own.
      axis_name: mapped axis (`shard_map`, `pmap`, `vmap`) over whose members the prompts are split: metrics are of all,
        where the algorithm has it too.

    A score that is not finite is never trained on, finished or not: its completion is masked out, and counted in
    "reward/nonfinite" (by `ppo` and `grpo`).
    """

    if numbered and reward is None:
        raise ValueError("numbered=True is for a reward on the device; give one, or leave it out")
    drawn = samples + 1 if greedy else samples

    def roll_out(params, prompts: Prompts, key_BG: jax.Array) -> Generation:
        banned = jnp.asarray(banned_tokens, jnp.int32) if banned_tokens else None
        sampling = Sampling(temperature, banned_tokens=banned)
        if greedy:
            heat_G = jnp.where(jnp.arange(drawn) == samples, 0.0, temperature)
            sampling = sampling._replace(temperature=jnp.tile(heat_G, key_BG.shape[0]))
        make = generate if slots is None else partial(generate_refilled, slots=slots)
        return make(
            lm,
            params,
            prompts.token_BP,
            prompts.mask_BP,
            key_BG,
            max_new_tokens=max_new_tokens,
            stop_tokens=stop_tokens,
            sampling=sampling,
        )

    if slots is not None and mesh is not None:
        roll_out = each_on_its_rows(mesh, roll_out)

    def rollout(state, prompts: Prompts, key: jax.Array) -> Generation:
        return roll_out(policy(state.params), prompts, sample_keys(key, prompts.index_B, drawn))

    learn_from = make_learn(
        algorithm, as_batch, missing_eos_penalty=missing_eos_penalty, samples=samples, axis_name=axis_name
    )

    def learn(
        state, frozen: Frozen, prompts: Prompts, generation: Generation, score: jax.Array, key: jax.Array
    ):
        return learn_from(state, frozen, as_branches(prompts, generation), generation, score, key)

    def iterate(state, frozen: Frozen, prompts: Prompts, key: jax.Array):
        if reward is None:
            raise ValueError(
                "iterate needs a reward on the device; with one on the host call rollout, then learn"
            )
        key_rollout, key_learn = jax.random.split(key)
        generation = rollout(state, prompts, key_rollout)
        numbers = (prompts.index_B,) if numbered else ()
        score_BG = reward(frozen.reward, as_branches(prompts, generation), *numbers)
        state, metrics = learn(state, frozen, prompts, generation, score_BG, key_learn)
        return state, metrics, Experience(as_branches(prompts, generation), generation, score_BG)

    return RLHF(rollout, learn, iterate)


def make_learn(
    algorithm: Algorithm,
    as_batch: AsBatch,
    *,
    missing_eos_penalty: float | None = None,
    samples: int | None = None,
    axis_name: str | None = None,
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """`learn(state, frozen, branches, generation, score_BG, key) -> (state, metrics)` from completions however they
    were made, such as whole conversations (`chat_rollout`). Pure; the key is consumed.

    Args:
      samples: of each prompt, those that metrics speak of; None: all.

    For the others see `make_rlhf`, whose `learn` it is. `branches` says what is seen, `generation` what is learnt from.
    """

    def learn(
        state, frozen: Frozen, branches: Branches, generation: Generation, score: jax.Array, key: jax.Array
    ):
        score = jnp.asarray(score)
        batch = as_batch(
            state, frozen, branches, generation, _penalised(score, generation, missing_eos_penalty)
        )
        state, metrics = algorithm.update(state, batch, key)
        sampled = Generation(*(x[:, :samples] for x in generation))
        seen_BGC = branches.completion_mask_BGC[:, :samples]
        return state, metrics | _completion_metrics(sampled, seen_BGC, score[:, :samples], axis_name)

    return learn


def iterate_many(
    rlhf: RLHF, state: Any, frozen: Frozen, prompts: Prompts, key_K: jax.Array
) -> tuple[Any, dict[str, jax.Array], Experience]:
    """K iterations as one program: `rlhf.iterate` under a scan, for a host that has nothing to do in between.

    Args:
      prompts: arrays with a first axis K, the batch of each iteration.
      key_K: a key for each.

    Returns:
      state, metrics with a first axis K, and the last iteration's experience.

    Raises ValueError where K is 0, or not the same for prompts and keys.
    """
    lengths = {x.shape[0] if x.ndim else None for x in (*prompts, key_K)}
    if len(lengths) != 1 or lengths & {0, None}:
        raise ValueError(
            f"prompts and keys must share a first axis of at least 1 iteration, got prompts {prompts.token_BP.shape} "
            f"and keys {key_K.shape}"
        )

    def one(carry, x):
        state, metrics, experience = rlhf.iterate(carry[0], frozen, *x)
        return (state, experience), metrics

    first = jax.tree.map(lambda x: x[0], (prompts, key_K))
    shapes = jax.eval_shape(lambda: rlhf.iterate(state, frozen, *first)[2])
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (state, experience), metrics = jax.lax.scan(one, (state, nothing), (prompts, key_K))
    return state, metrics, experience


def completion_reward(reward: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A reward of completions, `reward(params, token_BT, mask_BT[, index_B]) -> float [B]`, as one of an iteration:
    `(params, branches[, index_B]) -> float [B, G]`. Every sample has its prompt's number.
    """

    def of_branches(params: Any, branches: Branches, *index: jax.Array) -> jax.Array:
        batch, samples, _ = branches.completion_BGC.shape
        token_BT, mask_BT = (x.reshape(batch * samples, -1) for x in branches[2:])
        numbers = (jnp.repeat(index_B, samples, total_repeat_length=batch * samples) for index_B in index)
        return reward(params, token_BT, mask_BT, *numbers).reshape(batch, samples)

    return of_branches


def as_branches(prompts: Prompts, generation: Generation) -> Branches:
    """The rollout as rows of one prompt and its G completions."""
    return Branches(prompts.token_BP, prompts.mask_BP, generation.token_BGC, generation.mask_BGC)


def _penalised(score: jax.Array, generation: Generation, missing_eos_penalty: float | None) -> jax.Array:
    """The score, replaced where no stop token ended the completion; one that is not finite stays what it is."""
    if missing_eos_penalty is None:
        return score
    finished = generation.finished_BG
    finished = finished if score.ndim == 2 else jnp.broadcast_to(finished[..., None], score.shape)
    return jnp.where(finished | ~jnp.isfinite(score), score, missing_eos_penalty)


def _completion_metrics(
    generation: Generation, seen_BGC: jax.Array, score: jax.Array, axis_name: str | None
) -> dict[str, jax.Array]:
    """Of several rewards, "objective/score" is that of all of them alike."""

    def mean(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return batch_mean(x.astype(jnp.float32), mask, axis_name=axis_name)

    finite = jnp.isfinite(score)
    score_mean = mean(score, finite)
    return {
        "objective/score": score_mean,
        "objective/score_std": jnp.sqrt(mean(jnp.square(score - score_mean), finite)),
        "completions/mean_length": mean(jnp.sum(generation.mask_BGC, axis=2)),
        "completions/finished": mean(generation.finished_BG),
        "completions/padding": 1.0 - mean(seen_BGC),
    }
