"""Samples of the fine-tuned policy with the reward of each: recorded data, for methods that sample none.

The score is the reward that PPO optimises, normalised alike; the gold scorer is not asked, unless it is that reward.

Shapes: B prompts, G samples of each, C completion length.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import run_once
from experiments.stages.configs import PreferenceStage
from experiments.stages.configs import RatingStage as Config
from experiments.stages.policy import Problem
from experiments.stages.preferences import BATCH, Judged, sample_policy
from experiments.stages.text import Examples, Text, Writer
from rlhfjax.mesh import fetch
from rlhfjax.networks import Branches
from rlhfjax.run_folder import RunFolder


@dataclass(frozen=True)
class Rated:
    """Completions of prompts and their scores."""

    token_BGC: np.ndarray
    mask_BGC: np.ndarray
    row_B: np.ndarray  # the prompts' row numbers
    score_BG: np.ndarray  # float32


def check(config: Config, available: int) -> None:
    """Raises ValueError where there are fewer than the asked for prompts, or none is asked for."""
    if not 0 < config.prompts <= available:
        raise ValueError(
            f"ratings ask for {config.prompts} prompts; there are {available} besides those held out, and at least "
            "one is needed"
        )


def rate(
    config: Config, sampled: PreferenceStage, problem: Problem, judged: Judged, folder: RunFolder
) -> Rated:
    """Rates the samples that the reward model learnt from, and samples of further prompts where more are asked for."""
    if judged.examples is None:
        rows, others = judged.row_B[: judged.trained], problem.rows[len(judged.row_B) :]
    else:  # people judged other texts
        rows, others = problem.rows[:0], problem.rows
    check(config, len(rows) + len(others))
    known = min(config.prompts, len(rows))
    others = others[: config.prompts - known]
    rows = np.concatenate([rows[:known], others])

    def compute():
        parts = (
            [{"token_BGC": judged.token_BGC[:known], "mask_BGC": judged.mask_BGC[:known]}] if known else []
        )
        if len(others):
            key = jax.random.fold_in(jax.random.key(folder.seed), 6)
            temperatures = np.full(sampled.samples, sampled.sampling_temperature)
            parts.append(
                sample_policy(
                    problem.text,
                    Writer(problem.reference),
                    problem.examples,
                    others,
                    key,
                    temperatures=temperatures,
                )
            )
        token, mask = (np.concatenate([part[name] for part in parts]) for name in ("token_BGC", "mask_BGC"))
        reward = rewards_of(problem, rows, token, mask)
        finished = np.any(np.isin(token, problem.text.stop_tokens) & mask, axis=2)
        penalty = config.missing_eos_penalty
        score = reward if penalty is None else np.where(finished, reward, np.float32(penalty))
        if config.centred:
            score = score - score.mean(axis=1, keepdims=True)
        metrics = {
            "reward/mean": float(reward.mean()),
            "reward/std": float(reward.std()),
            "score/std": float(score.std()),
            "completions/finished": float(finished.mean()),
            "completions/count": reward.size,
        }
        return {"token": token, "mask": mask, "score": score}, metrics, []

    stored = run_once("rated_samples", folder=folder, compute=compute)
    return Rated(stored["token"], stored["mask"], rows, stored["score"])


def branches_at(
    text: Text, examples: Examples, rows: np.ndarray, token_BGC: np.ndarray, mask_BGC: np.ndarray
) -> Branches:
    """The prompts numbered `rows` with their completions."""
    completions = text.rows((jnp.asarray(token_BGC), jnp.asarray(mask_BGC)))
    return Branches(*text.batch(examples, rows)[:2], *completions)


def rewards_of(problem: Problem, rows: np.ndarray, token: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The reward of every completion of the prompts numbered `rows`, on the device or the host; float32 [B, G]."""
    if problem.reward is None:
        return np.asarray(problem.gold(rows, problem.text.decode(token, mask)), np.float32)
    reward = problem.text.jit(problem.reward)

    def of_part(part: np.ndarray) -> np.ndarray:
        branches = branches_at(problem.text, problem.examples, rows[part], token[part], mask[part])
        index = (problem.text.rows(jnp.asarray(rows[part], jnp.int32)),) if problem.numbered else ()
        return fetch(reward(problem.reward_params, branches, *index))

    # The last part is filled up, so that nothing compiles twice.
    parts = np.resize(np.arange(len(rows)), (-(-len(rows) // BATCH), BATCH))
    return np.concatenate([of_part(part) for part in parts])[: len(rows)]
