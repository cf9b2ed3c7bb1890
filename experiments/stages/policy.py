"""PPO on text: the compiled iteration, its state, and what is logged of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import Show, run_stage
from experiments.stages.configs import PPOStage as Config
from experiments.stages.text import Examples, Text
from rlhfjax.algorithms import make_optimizer, ppo
from rlhfjax.algorithms.algorithm import check_divisible
from rlhfjax.data import batch_indices
from rlhfjax.networks import init_scalar_head
from rlhfjax.recipes import Experience, Frozen, make_rlhf, text_actor_critic
from rlhfjax.run_folder import RunFolder

COLUMNS = {
    "objective/score": "reward",
    "gold": "gold",
    "objective/kl": "KL",
    "policy/entropy": "entropy",
    "policy/clip_fraction": "clipped",
    "completions/mean_length": "length",
}


def make_critic(trunk: dict, width: int) -> dict:
    """A critic on a copy of `trunk` (the reward model's, which has learnt what is rewarded), its head at zero.

    A head taken over from the reward model would speak of whole completions; of half-written ones it begins far off
    (explained variance -2 where 0 is free), and the policy would pay for it in its first steps.
    """
    return {"trunk": trunk, "head": init_scalar_head(jax.random.key(0), width, scale=0.0)}


def check(config: Config, available: int) -> None:
    """Raises ValueError where the batch cannot be drawn or cut, or the optimiser contradicts the steps.

    For the start of an experiment: a mistake should not cost the minutes of the stages before this one.
    """
    parts = config.algorithm.minibatches * config.algorithm.microbatches
    check_divisible(config.prompts, parts, what="minibatches x microbatches")
    if config.prompts > available:
        raise ValueError(f"ppo asks for {config.prompts} prompts a step; there are {available} to draw from")
    make_optimizer(config.optimizer, _updates(config))


def optimise_policy(
    config: Config,
    text: Text,
    reference: dict,
    critic: dict,
    reward: Callable[[Any, Any], jax.Array],
    reward_params: Any,
    examples: Examples,
    rows: np.ndarray,
    folder: RunFolder,
    *,
    gold: Callable[[np.ndarray, list[list[str]]], np.ndarray],
    name: str = "ppo",
) -> dict:
    """Runs PPO from the reference against `reward`; returns the policy's parameters.

    `gold(rows, texts)` scores completions on the host, [B, G]. It is logged and never learnt from.
    """
    evaluate = text_actor_critic(text.lm, temperature=config.temperature, shared_trunk=config.shared_trunk)
    algorithm = ppo.make(evaluate, make_optimizer(config.optimizer, _updates(config)), config.algorithm)
    rlhf = make_rlhf(
        text.lm,
        algorithm,
        evaluate,
        reward=reward,
        samples=config.samples,
        max_new_tokens=text.config.completion_length,
        stop_tokens=text.stop_tokens,
        temperature=config.temperature,
        missing_eos_penalty=config.missing_eos_penalty,
    )
    iterate = jax.jit(rlhf.iterate, donate_argnums=0)
    key = jax.random.fold_in(jax.random.key(folder.seed), 4)
    frozen = Frozen(reference, reward_params)
    if config.shared_trunk:
        critic = {"head": critic["head"]}

    def init():
        # Copied: the state is donated, and reference and reward model must outlive it.
        return algorithm.init(jax.tree.map(jnp.array, {"policy": reference, "critic": critic}))

    def batch(step: int):
        return text.batch(examples, rows[batch_indices(folder.seed, step, config.prompts, len(rows))])

    per_step = config.prompts * (text.config.prompt_length + config.samples * text.config.completion_length)

    def step(state, prompts, i):
        state, metrics, experience = iterate(state, frozen, prompts, jax.random.fold_in(key, i))
        metrics |= {
            "perf/generated_tokens": metrics["batch/actions"],
            "perf/trained_tokens": jnp.float32(per_step * config.algorithm.epochs),
        }
        return state, metrics, (prompts.index_B, experience)

    def score_texts(experience: tuple[np.ndarray, Experience]):
        index, (branches, _, _) = experience
        texts = text.decode(*map(np.asarray, branches[2:]))
        return texts, np.asarray(gold(index, texts))

    def measure(i: int, experience) -> dict[str, float]:
        del i
        return {"gold": float(score_texts(experience)[1].mean())}

    def samples(i: int, experience) -> list[dict[str, Any]]:
        del i
        index, (_, _, score) = experience
        texts, golds = score_texts(experience)
        return [
            {
                "prompt": examples.prompts[index[b]],
                "reference": examples.references[index[b]],
                "completion": texts[b][0],
                "reward": float(score[b, 0]),
                "gold": float(golds[b, 0]),
            }
            for b in range(min(4, len(index)))
        ]

    state = run_stage(
        name,
        folder=folder,
        init=init,
        step=step,
        batch=batch,
        steps=config.steps,
        checkpoint_every=25,
        show=Show(columns=COLUMNS, every=1, measure=measure, samples=samples, samples_every=25),
    )
    return state.params["policy"]


def _updates(config: Config) -> int:
    return config.steps * config.algorithm.epochs * config.algorithm.minibatches
