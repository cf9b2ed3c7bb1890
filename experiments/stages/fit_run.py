"""The checks of `experiments/fit.py`, in order, and what follows from them.

Shapes: U prompts, G samples of each, N = U G texts.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.loop import run_once
from experiments.stages import finetune, fit_labels, fit_report, fit_rules, text
from experiments.stages.audit_rewards import Calls, Reward, open_reward
from experiments.stages.audit_texts import Drawn, Texts, sampled_texts
from experiments.stages.configs import EvaluationStage, PreferenceStage
from experiments.stages.fit_labels import Learnable
from experiments.stages.fit_report import Found
from experiments.stages.text import Examples, Text
from experiments.stages.text_programs import programs_of_text
from rlhfjax.mesh import make_mesh
from rlhfjax.report import write_report
from rlhfjax.rewards import audit
from rlhfjax.rewards.audit import NOTHING, Estimate
from rlhfjax.run_folder import RunFolder


def plan(config: Any, mesh: Any) -> list:
    """The programs of fine-tuning, sampling and the reward models, as shapes."""
    pairs = PreferenceStage(prompts=max(config.labels, default=0) + config.heldout, samples=2)
    drawn = EvaluationStage(
        prompts=config.prompts, batch=min(64, config.prompts), temperatures=(), best_of=(config.samples - 1,)
    )
    steps = sum(
        max(fit_labels.LEAST_STEPS, math.ceil(config.epochs * n / min(config.reward_model.prompts, n)))
        for n in config.labels
    )
    return programs_of_text(
        config.text,
        mesh,
        sft=config.sft,
        preferences=pairs if config.labels and config.preferences is None else None,
        reward=replace(config.reward_model, steps=steps) if config.labels else None,
        policies={},
        evaluation=drawn,
    )


def run(config: Any, folder: RunFolder) -> dict[str, float]:
    """Makes the checks of a `fit.Config`; returns the numbers of summary.json."""
    calls = Calls(config.workers, config.calls_of, config.timeout)
    reward, loaded, train, rows, params = _start(config, folder)
    labels = tuple(config.labels)
    texts, drawn = sampled_texts(
        loaded,
        params,
        folder,
        split=config.split,
        prompts=config.prompts,
        samples=config.samples,
        temperature=config.temperature,
    )
    scores = None if reward is None else _score(reward, texts, calls, folder)
    learnable = None
    if labels:
        if config.preferences is not None:
            labelled = fit_labels.read(
                config.preferences, loaded, labels=labels, heldout=config.heldout, seed=folder.seed
            )
        else:
            assert reward is not None and scores is not None
            within = audit.spread(scores[0], texts.group_N, texts.texts).within_std
            labelled = None
            if within > 0:
                labelled = fit_labels.simulate(
                    loaded,
                    params,
                    train,
                    rows,
                    _gold(reward, train, calls),
                    labels=labels,
                    heldout=config.heldout,
                    temperature=config.temperature,
                    label_temperature=config.label_noise * within,
                    folder=folder,
                )
        if labelled is not None:
            learnable = fit_labels.learn(
                config.reward_model,
                loaded,
                params,
                labelled,
                labels=labels,
                epochs=config.epochs,
                ceiling=config.ceiling,
                learnt=config.learnt,
                calls_of=config.calls_of,
                folder=folder,
            )
    if scores is None:
        assert learnable is not None
        scores = _score(learnable.largest, texts, calls, folder)
    found = measure(config, reward, texts, scores, learnable, drawn)
    planned = _planned(config, found)
    write_report(
        folder.path,
        f"Does it fit? {fit_report.name_of(config)}",
        fit_report.sections(config, found, planned, folder.path),
    )
    print(f"worth it: {found.advice.worth}; method: {fit_rules.NAMES[found.advice.method]}", flush=True)
    return fit_report.summarise(found)


def _start(config: Any, folder: RunFolder) -> tuple[Reward | None, Text, Examples, np.ndarray, dict]:
    """The reward, the text, the training data with the rows to sample from, and the policy to start from."""
    fit_labels.check(config.labels, config.heldout, config.learnt)
    if config.samples < 4:
        raise ValueError(f"samples={config.samples} must be at least 4")
    reward = None
    if config.reward != "none":
        reward = open_reward(config.reward, config.reward.rpartition(":")[2], config.calls_of)
    elif config.preferences is None or not config.labels:
        raise ValueError("there is no reward: give --reward, or --preferences and --labels to learn one from")
    loaded = text.open_text(config.text, folder.mesh)
    train = loaded.load("train")
    loaded.load(config.split)  # early: a missing split should not cost the training
    if config.preferences is not None:
        fit_labels.read(
            config.preferences, loaded, labels=config.labels, heldout=config.heldout, seed=folder.seed
        )
    finetuned = config.sft.steps > 0
    sft_rows, rows = text.divide(train, config.text.sft_share, folder.seed, finetuned=finetuned)
    params = finetune.finetune(config.sft, loaded, train, sft_rows, folder)
    return reward, loaded, train, rows, params


def _score(reward: Reward, texts: Texts, calls: Calls, folder: RunFolder) -> tuple[np.ndarray, ...]:
    """(rewards, rewards of a second call, rewards of the data's own completions, seconds of a text)."""

    def compute():
        first, second = (
            calls.score(reward, texts.prompts_N, texts.texts, texts.columns_of(texts.group_N))
            for _ in range(2)
        )
        if not np.isfinite(first).any():
            raise ValueError(f"reward {reward.label!r} gave None for all texts: it applies to none")
        every = np.arange(len(texts.prompts))
        given = np.zeros(0)
        if "reference" in texts.columns:
            given = calls.score(reward, texts.prompts, texts.columns["reference"], texts.columns_of(every))
        some = np.arange(min(32, len(texts.texts)))
        speed = calls.time(
            reward,
            [texts.prompts_N[i] for i in some],
            [texts.texts[i] for i in some],
            texts.columns_of(texts.group_N[some]),
        )
        arrays = {"first": first, "second": second, "given": given, "seconds": np.asarray(min(speed[:2]))}
        return arrays, {"reward/mean": float(np.nanmean(first)), "reward/std": float(np.nanstd(first))}, []

    stored = run_once("reward", folder=folder, compute=compute)
    return stored["first"], stored["second"], stored["given"], stored["seconds"]


def _gold(reward: Reward, examples: Examples, calls: Calls):
    """The reward as a scorer of samples: (rows, texts [B][G]) -> [B, G]."""

    def gold(rows: np.ndarray, texts: list[list[str]]) -> np.ndarray:
        count = len(texts[0])
        every = [row for row in rows for _ in range(count)]
        columns = (
            {"reference": [examples.references[row] for row in every]} if any(examples.references) else {}
        )
        score = calls.score(
            reward, [examples.prompts[row] for row in every], [x for group in texts for x in group], columns
        )
        if not np.isfinite(score).all():
            raise ValueError(
                f"reward {reward.label!r} gave None for a sample: labels cannot be simulated from it"
            )
        return score.reshape(len(rows), count)

    return gold


def measure(
    config: Any,
    reward: Reward | None,
    texts: Texts,
    scores: tuple[np.ndarray, ...],
    learnable: Learnable | None,
    drawn: Drawn,
) -> Found:
    """The facts, and the advice that follows."""
    first, second, given, seconds = scores
    group = texts.group_N
    spread = audit.spread(first, group, texts.texts)
    noise = audit.repeat_noise(first, second, within_std=spread.within_std)
    # Chosen by one call and measured by the other: chosen by its own noise, everything gains.
    curve = audit.best_of_n_curve(first, second, group) if spread.levels > 1 else None
    first_UG = first.reshape(len(texts.prompts), -1)
    lead = NOTHING
    if (
        len(given)
        and np.isfinite(given).all()
        and reward is not None
        and not _is_reference(given, spread.levels)
    ):
        lead = audit.mean_estimate(given - np.nanmax(first_UG, axis=1))
    solved = config.solved
    if solved is None and np.isin(first[np.isfinite(first)], (0.0, 1.0)).all():
        solved = 1.0
    never = math.nan if solved is None else float((np.nanmax(first_UG, axis=1) < solved).mean())
    facts = fit_rules.Facts(
        gain=curve.gain if curve is not None else Estimate(0.0, 0.0, 0.0),
        n=config.samples,
        gain_of_4=_gain_of(curve, 4),
        std=spread.std,
        flat=spread.zero if spread.groups else Estimate(1.0, math.nan, math.nan),
        constant=spread.levels < 2,
        reliability=noise.reliability if np.isfinite(noise.reliability) else 1.0,
        reference_lead=lead,
        never_solved=never,
        mean=spread.mean,
        seconds=float(seconds),
        cut=float(1 - drawn.finished_N.mean()),
        has_reward=reward is not None,
        has_references="reference" in texts.columns,
        pairs=max(config.labels, default=0) if config.preferences is not None else 0,
        pairs_needed=learnable.needed.value if learnable is not None else math.nan,
        online=config.online,
    )
    return Found(facts, fit_rules.advise(facts), spread, noise, curve, learnable, texts, first, drawn)


def _is_reference(given: np.ndarray, levels: int) -> bool:
    """Whether the reward measures nearness to the data's completions, which then are the best by definition."""
    return levels > 1 and bool(np.ptp(given) <= 1e-6 * max(1.0, abs(given).max()))


def _gain_of(curve: Any, n: int) -> float:
    if curve is None or n not in curve.n_S:
        return 0.0
    return curve.gold_S[list(curve.n_S).index(n)].value - curve.gold_S[0].value


def _planned(config: Any, found: Found) -> str:
    """The table of a plan for the method that is advised, in Markdown; "" without one."""
    if config.compute == "none" or found.advice.method == "best_of_n":
        return ""
    from experiments import planning
    from rlhfjax.ops import compiling_for

    name = found.advice.method
    chosen, target = planning.target_of(config.compute, config.compute_devices)
    mesh = make_mesh(devices=target.devices, memory=chosen.memory)
    policies = {} if name == "sft" else {name: getattr(config, name)}
    learned = found.facts.has_reward is False and name not in ("sft", "dpo")
    with compiling_for(target.platform):
        programs = programs_of_text(
            config.text,
            mesh,
            sft=config.sft if name == "sft" else None,
            reward=config.reward_model if learned else None,
            policies=policies,
            evaluation=config.evaluation,
            on_host=not learned and name in ("grpo", "ppo"),
        )
        planned = planning.plan_programs(
            programs, chosen, target, mesh, config.device_hour, lambda line: None
        )
    return fit_report.plan_table(planned, config.device_hour)
