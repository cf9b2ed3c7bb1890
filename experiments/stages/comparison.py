"""Several methods from one start: running them, and what is said of them together."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.stages.evaluation import Policy, evaluate_policies
from experiments.stages.methods import Stage, kl_weight, with_kl_weight
from experiments.stages.offline import curve
from experiments.stages.prepare import prepare
from rlhfjax.figures import EvaluatedPolicy, plot_gold_against_kl
from rlhfjax.report import Section, Table, paired_difference_interval
from rlhfjax.run_folder import RunFolder

GOLD = "ROUGE-L"


def chosen_stages(config: Any) -> dict[str, Stage]:
    """Stage name -> settings, in order: a method as it is, or once for each weight of the KL.

    Raises ValueError where nothing or the same twice is asked for.
    """
    if not config.methods:
        raise ValueError("--methods is empty: name at least one")
    for name, asked in (("--methods", config.methods), ("--kl-weights", config.kl_weights)):
        if len(set(asked)) != len(asked):
            raise ValueError(f"{name} names one twice: {' '.join(map(str, asked))}")
    stages: dict[str, Stage] = {}
    for method in config.methods:
        stage = getattr(config, method)
        if config.kl_weights and kl_weight(stage) is not None:
            stages |= {f"{method}-{weight:g}": with_kl_weight(stage, weight) for weight in config.kl_weights}
        else:
            stages[method] = stage
    return stages


def one_temperature(stages: Mapping[str, Stage]) -> float:
    """The temperature that all methods share. Raises ValueError where they differ: their KL could not be compared."""
    found = {name: stage.temperature for name, stage in stages.items()}
    if len(set(found.values())) > 1:
        raise ValueError(
            f"the methods must share one temperature, at which KL is measured; they have {found}"
        )
    return next(iter(found.values()))


def run_seed(config: Any, stages: Mapping[str, Stage], temperature: float, folder: RunFolder) -> list[Policy]:
    """All stages of one seed; the policies on the validation split."""
    prepared = prepare(
        config.text,
        config.sft,
        config.preferences,
        config.reward,
        config.ratings,
        config.evaluation,
        stages,
        folder,
    )
    problem = prepared.problem
    tuned = {name: prepared.optimise(name, stage) for name, stage in stages.items()}
    points = {k: v for name, stage in stages.items() for k, v in curve(name, stage, tuned[name]).items()}
    return evaluate_policies(
        config.evaluation,
        problem.text,
        problem.reference,
        tuned,
        problem.reward,
        problem.reward_params,
        prepared.gold_of,
        folder,
        temperature=temperature,
        points=points,
    )


def merge(found: Sequence[Sequence[Policy]]) -> list[Policy]:
    """Each policy's numbers averaged over seeds, prompt by prompt: the prompts are the same for all."""
    return [
        replace(
            policies[0],
            **{
                name: np.mean([getattr(policy, name) for policy in policies], axis=0)
                for name in ("gold", "reward", "kl", "length", "finished")
            },
        )
        for policies in zip(*found, strict=True)
    ]


def method_section(
    merged: Sequence[Policy], found: Sequence[Sequence[Policy]], temperature: float
) -> Section:
    """The table of all policies, and each method's lead over the fine-tuned policy."""
    base = {
        suffix: next(p for p in merged if p.name == f"sft, {suffix}")
        for suffix in (f"temperature {temperature:g}", "greedy")
    }
    rows = []
    for number, policy in enumerate(merged):
        over = base.get(policy.name.split(", ", 1)[1])
        lead = "" if over is None or over is policy else paired_difference_interval(policy.gold, over.gold, 0)
        means = [seed[number].gold.mean() for seed in found]
        rows.append(
            [
                policy.name,
                policy.interval("gold"),
                f"{min(means):.3f} to {max(means):.3f}",
                lead,
                policy.interval("reward"),
                f"{policy.kl.mean() + 0.0:.2f}",
                policy.interval("length"),
            ]
        )
    header = ["policy", GOLD, "over seeds", "lead over sft", "reward", "KL (nats)", "tokens"]
    seeds = "One seed" if len(found) == 1 else f"Means over {len(found)} seeds"
    text = (
        f"{seeds}, on the same {len(merged[0].gold)} prompts of the validation split, one completion a prompt and "
        "seed; 95 % bootstrap intervals over prompts. The lead is over the fine-tuned policy decoded in the same way."
    )
    return Section("Methods", text, Table(header, rows))


def figure_section(merged: Sequence[Policy], folder: RunFolder, temperature: float) -> Section:
    """Gold against KL, a line per method."""
    shown = [p for p in merged if p.name.endswith(f", temperature {temperature:g}") or p.group == "best of n"]
    points = [
        EvaluatedPolicy(
            policy.name.split(", ")[0] if policy.group != "best of n" else policy.name.split(", ")[1],
            policy.group.rsplit("-", 1)[0],
            float(policy.kl.mean()),
            policy.interval("gold"),
        )
        for policy in shown
    ]
    path = folder.path / "figures"
    path.mkdir(exist_ok=True)
    figure = plot_gold_against_kl(path / "frontier.png", points, gold_label=GOLD)
    text = (
        f"Sampled at temperature {temperature:g}, that of the rollouts. A method is better than another where it lies "
        "above it at the same KL. The KL of best-of-n is its bound log n - (n-1)/n."
    )
    return Section("The frontier", text, figures=[(figure, f"{GOLD} against KL from the fine-tuned policy")])
