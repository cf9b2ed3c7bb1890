"""Over-optimisation on text: best-of-n and RL against a learned reward, at many strengths, from one start.

Shapes: B prompts, S samples of each, K values of n, M values of beta.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import run_once
from experiments.stages import ratings, reward
from experiments.stages.configs import EvaluationStage, RatingStage
from experiments.stages.methods import with_kl_weight
from experiments.stages.overopt_configs import Curves as Config
from experiments.stages.policy import Problem
from experiments.stages.preferences import BRANCHES, sample_policy
from experiments.stages.prepare import Prepared, Sections, prepare, rouge_of
from experiments.stages.task import Task
from experiments.stages.text import Writer
from rlhfjax.ops import best_of_n_kl_bound, best_of_n_mean
from rlhfjax.recipes import make_reward_model
from rlhfjax.rewards import ensemble_reward, mean_minus_std
from rlhfjax.run_folder import RunFolder

GOLD = "ROUGE-L"
PARTS = 10  # points along a run


def check(config: Config, stage: Any) -> None:
    """Raises ValueError where a curve cannot be measured."""
    counts, betas = config.best_of, config.betas
    if not counts or counts[0] != 1 or list(counts) != sorted(set(counts)) or counts[-1] > config.samples:
        raise ValueError(
            f"curves.best_of={list(counts)} must rise from 1 to at most curves.samples={config.samples}"
        )
    if len(set(betas)) != len(betas) or not betas or min(betas) < 0:
        raise ValueError(f"curves.betas={list(betas)} must be different numbers of at least 0")
    if config.ensemble < 1 or config.penalty < 0 or (config.penalty > 0 and config.ensemble == 1):
        raise ValueError(
            f"curves.ensemble={config.ensemble} must be at least 1, and curves.penalty={config.penalty} at least 0: a "
            "penalty is for reward models that disagree, of which there must be two"
        )
    if config.prompts < 2:
        raise ValueError(f"curves.prompts={config.prompts} must be at least 2, for intervals")
    for beta in betas:
        with_kl_weight(stage, beta)


def stages_of(config: Config, name: str, stage: Any) -> dict[str, Any]:
    """Stage name -> settings, for every beta."""
    return {f"{name}-{beta:g}": with_kl_weight(stage, beta) for beta in config.betas}


def sections_of(config: Any) -> Sections:
    """The sections of the experiment; the evaluation is that of the curves."""
    evaluation = EvaluationStage(prompts=config.curves.prompts, temperatures=(), best_of=())
    return Sections(config.text, config.sft, config.preferences, config.reward, RatingStage(), evaluation)


def run_seed(config: Any, name: str, stage: Any, folder: RunFolder) -> dict[str, np.ndarray]:
    """All stages of one seed: gold and reward of every prompt at every point.

    bon/n, bon/kl [K], bon/gold, bon/reward [K, B]; rl/beta [M], rl/kl, rl/gold, rl/reward [M, B]; start/gold,
    start/reward [B]; along/kl, along/gold, along/reward [parts], of the run of the smallest beta.
    """
    curves = config.curves
    stages = stages_of(curves, name, stage)
    prepared = prepare(sections_of(config), Task(GOLD, rouge_of), stages, folder)
    prepared = replace(prepared, problem=with_ensemble(config, prepared, folder))
    found = best_of_n_arrays(curves, prepared, stage.temperature, folder)
    tuned = {label: prepared.optimise(label, one) for label, one in stages.items()}
    policies = {
        p.group: p
        for p in prepared.evaluate("validation", {}, tuned, stage.temperature)
        if "greedy" not in p.name
    }
    found |= {"rl/beta": np.asarray(curves.betas), "start/gold": policies[prepared.start].gold}
    found["start/reward"] = policies[prepared.start].reward
    for field in ("kl", "gold", "reward"):
        found[f"rl/{field}"] = np.stack([getattr(policies[label], field) for label in stages])
    return found | along_the_run(folder, f"{name}-{min(curves.betas):g}")


def with_ensemble(config: Any, prepared: Prepared, folder: RunFolder) -> Problem:
    """The problem, its reward that of an ensemble where one is asked for.

    The members beyond the first are trained in folders of their own, on the same labels.
    """
    problem, curves = prepared.problem, config.curves
    if curves.ensemble == 1:
        return problem
    assert prepared.judged is not None
    members = [problem.reward_params]
    for number in range(1, curves.ensemble):
        path = folder.path / f"member-{number}"
        path.mkdir(exist_ok=True)
        # Another seed: another head, and the prompts in another order.
        part = replace(folder, path=path, seed=folder.seed + 1000 * number)
        part.repair()
        given = config.reward, problem.text, problem.reference, problem.examples, prepared.judged, part
        members.append(reward.train_reward_model(*given).params)
    combine = partial(mean_minus_std, penalty=curves.penalty)

    def of_ensemble(lm):
        return ensemble_reward(make_reward_model(lm, pool=config.reward.pool), combine)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    return replace(problem, reward=of_ensemble, reward_params=stacked)


def best_of_n_arrays(
    config: Config, prepared: Prepared, temperature: float, folder: RunFolder
) -> dict[str, np.ndarray]:
    """Gold and reward of the best of n by the reward, by the unbiased estimator; of every prompt, in `run_once`."""
    problem, examples = prepared.problem, prepared.heldout["validation"]
    rows = np.arange(min(config.prompts, len(examples)))

    def compute():
        key = jax.random.fold_in(jax.random.key(folder.seed), 6)
        heat = np.full(config.samples, temperature)
        out = sample_policy(problem.text, Writer(problem.reference), examples, rows, key, temperatures=heat)
        gold_BS = np.asarray(
            prepared.task.gold_of(examples)(rows, problem.text.decode(out["token_BGC"], out["mask_BGC"]))
        )
        reward_BS = rewards_in_groups(replace(problem, examples=examples), rows, out)
        golds, rewards = (
            np.stack([np.asarray(best_of_n_mean(x, reward_BS, n=n)) for n in config.best_of])
            for x in (gold_BS, reward_BS)
        )
        arrays = {
            "bon/n": np.asarray(config.best_of),
            "bon/kl": np.asarray(best_of_n_kl_bound(np.asarray(config.best_of, np.float32)), np.float64),
            "bon/gold": golds.astype(np.float64),
            "bon/reward": rewards.astype(np.float64),
        }
        metrics = {
            f"best of {n}/{field}": float(arrays[f"bon/{field}"][k].mean())
            for k, n in enumerate(config.best_of)
            for field in ("gold", "reward")
        }
        return arrays, metrics, []

    return run_once("best_of_n", folder=folder, compute=compute)


def rewards_in_groups(problem: Problem, rows: np.ndarray, out: dict[str, np.ndarray]) -> np.ndarray:
    """The reward of every completion [B, S], a few of a prompt at a time: attention's cost grows with their square."""
    samples = out["token_BGC"].shape[1]
    width = min(samples, BRANCHES)
    groups = -(-samples // width)
    columns = np.resize(np.arange(samples), groups * width)  # filled up, so that nothing compiles twice
    token, mask = (
        out[name][:, columns].reshape(len(rows) * groups, width, -1) for name in ("token_BGC", "mask_BGC")
    )
    score = ratings.rewards_of(problem, np.repeat(rows, groups), token, mask)
    return score.reshape(len(rows), groups * width)[:, :samples]


def along_the_run(folder: RunFolder, stage: str) -> dict[str, np.ndarray]:
    """Means of the rollouts over tenths of a run, and of the samples that the reward was normalised on."""
    lines = folder.metrics(stage)
    parts = np.array_split(np.arange(len(lines)), min(PARTS, len(lines)))
    fields = {"kl": "objective/kl", "gold": "gold", "reward": "objective/score"}
    found = {
        f"along/{field}": np.asarray([np.mean([lines[i][metric] for i in part]) for part in parts])
        for field, metric in fields.items()
    }
    return found | {"along/start": np.asarray(folder.metrics("preferences")[0]["gold/mean"])}


def merge(found: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Means over seeds, prompt by prompt: the prompts are the same for all."""
    return {name: np.mean([x[name] for x in found], axis=0) for name in found[0]}
