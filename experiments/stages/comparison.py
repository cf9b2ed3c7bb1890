"""Several methods from one start, on any task on text: running them, and what is said of them together.

A task is a value (`task.Task`): its gold score and, where it is given, its reward, on the device (`task.OnDevice`) or
in Python (`task.OnHost`); without one a reward model is learnt from pairs that a noisy judge labels by the gold score.
The settings are any frozen dataclass with

    methods, kl_weights, seeds          as in experiments/compare.py
    text, sft, preferences, reward, ratings, evaluation       the sections of the stages (reward: for a learned one)
    a section per method that may be named: ppo, grpo, rloo, dpo, online_dpo, raft, soft_q, ilql

and an experiment is then

    def run(config, folder):
        compared = comparison.compare_methods(config, Task("chrF", gold_of, OnDevice(of)), folder)
        write_report(folder.path, "Translation", compared.sections)
        compared.write_results("translate", settings=config)
        return compared.summary

The start (fine-tuned, or the base where sft.steps is 0) and best-of-n by the reward (`evaluation.best_of`) are measured
beside the methods without being named. With a given reward DPO's pairs are labelled by it (with the noise of
`preferences.label_temperature`, in units of the reward), the ratings for Q-learning are its values, and PPO's critic
and ILQL's values start from the reference, not from the reward model's trunk. Weights of the KL are in units of the
reward; only a learned one has deviation 1.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.options import flatten, to_mapping
from experiments.stages import report, results
from experiments.stages.evaluation import Policy
from experiments.stages.length_matched import (
    AtEqualLength,
    against_start,
    length_numbers,
    length_section,
)
from experiments.stages.methods import Stage, kl_weight, with_kl_weight
from experiments.stages.offline import curve
from experiments.stages.prepare import Prepared, Sections, prepare
from experiments.stages.task import Task
from experiments.stages.text import Text, Writer
from rlhfjax.figures import EvaluatedPolicy, Panel, plot_gold_against_kl, plot_panels
from rlhfjax.report import Section, Table, bootstrap_interval, paired_difference_interval
from rlhfjax.run_folder import RunFolder

# What a method's row is called in the table of all tasks, where that is not its name.
ROWS = {"soft_q": "q-learning (soft_q)", "ilql": "q-learning (ilql)", "online_dpo": "online dpo"}


@dataclass(frozen=True)
class Compared:
    """All methods and seeds of a task, measured."""

    task: Task
    temperature: float
    stages: Mapping[str, Stage]
    folder: RunFolder
    parts: Sequence[RunFolder]  # of each seed
    prepared: Prepared  # of the first seed
    writers: Sequence[Mapping[str, Writer]]  # of each seed: the start, and every method's policy
    found: Mapping[str, Sequence[Sequence[Policy]]]  # split -> seed -> policy
    merged: Mapping[str, Sequence[Policy]]  # split -> policy, means over the seeds
    measured: Mapping[
        str, Mapping[str, np.ndarray]
    ]  # split -> measure -> [policies, B], means over the seeds

    @property
    def sections(self) -> list[Section]:
        """Of a report: tables by split, and the frontier."""
        tables = [
            method_section(
                split,
                self.merged[split],
                found,
                self.measured[split],
                temperature=self.temperature,
                gold_name=self.task.gold_name,
                start=self.prepared.start,
            )
            for split, found in self.found.items()
        ]
        merged, examples = self.merged["validation"], self.prepared.heldout["validation"]
        return [
            *tables,
            *(
                length_section(self.at_equal_length(split), self.task.gold_name, split)
                for split in self.merged
            ),
            frontier_section(merged, self.folder, self.temperature, self.task.gold_name),
            *curves_sections(self.stages, self.parts[0], self.folder, self.task.gold_name),
            report.text_section(merged, examples, self.temperature),
        ]

    def at_equal_length(self, split: str) -> dict[str, AtEqualLength]:
        """Every policy against the start."""
        return against_start(self.found[split], self.prepared.start, self.temperature)

    @property
    def summary(self) -> dict[str, float]:
        """Flat names and numbers for summary.json; those of the test split begin with "test/"."""
        numbers = {}
        for split, merged in self.merged.items():
            prefix = "" if split == "validation" else f"{split}/"
            numbers |= {f"{prefix}{name}": value for name, value in report.policy_numbers(merged).items()}
            lengths = length_numbers(self.at_equal_length(split))
            numbers |= {f"{prefix}{name}": value for name, value in lengths.items()}
            for measure, value_PB in self.measured[split].items():
                numbers |= {
                    f"{prefix}{policy.name}/{measure}": float(value_B.mean())
                    for policy, value_B in zip(merged, value_PB, strict=True)
                }
        return numbers

    def write_results(self, task: str, *, flags: str = "", settings: Any = None) -> None:
        """Writes results.json: the start, best-of-n and every method, sampled at the temperature of the rollouts, at
        which KL and best-of-n are defined; beside them the start decoded greedily. On the last split evaluated.

        flags: of the command line, beside --methods and --seed, in the commands that make the rows.
        settings: of the experiment; a row's command names those of them that differ from the defaults, too.
        """
        split = list(self.merged)[-1]
        changed = {} if settings is None else changed_flags(settings)
        rows = [
            row for policy in self.merged[split] if (row := self._row(policy, flags, changed)) is not None
        ]
        results.write_results(
            self.folder, task=task, metric=f"{self.task.gold_name}, {split} split", rows=rows
        )

    def _row(self, policy: Policy, flags: str, changed: Mapping[str, str]) -> results.Row | None:
        """The policy's row in the table of all tasks; None: it has none."""
        start, (label, how) = self.prepared.start, policy.name.split(", ", 1)
        method, weight = _method(label, self.stages)
        kl: float | None = float(policy.kl.mean())
        if policy.group == "best of n":
            name, own = how, ()
        elif policy.name == f"{start}, greedy":
            name, own, kl = policy.name, (), None
        elif policy.group in (start, *self.stages) and how == f"temperature {self.temperature:g}":
            # The values of ILQL are learnt once for all weights, in the stage of the method's name.
            name, own = ROWS.get(method, method) + (f" {weight}" if weight else ""), {label, method}
        else:
            return None
        command = ["python experiments/run.py", self.folder.experiment, flags, f"--seed {self.folder.seed}"]
        if label in self.stages:
            command += [f"--methods {method}", f"--kl-weights {weight}" if weight else ""]
        # Of the methods only its own settings, and not which others were compared.
        others = {_method(name, self.stages)[0] for name in self.stages} - {method}
        others |= {"methods", "kl_weights", "seeds"}
        command += [flag for key, flag in changed.items() if key.split(".")[0] not in others]
        seconds = np.mean([results.stage_seconds(part, *own) for part in self.parts])
        return results.Row(name, policy.gold, kl, float(seconds), " ".join(filter(None, command)))


def changed_flags(settings: Any) -> dict[str, str]:
    """Dotted key -> the flag that sets it, of the settings that differ from their defaults."""
    defaults = flatten(to_mapping(type(settings)()))
    flags = {}
    for key, value in flatten(to_mapping(settings)).items():
        if value == defaults.get(key):
            continue
        section, _, name = f"--{key.replace('_', '-')}".rpartition(".")
        if value is False:  # --section.no-name
            section, name = (section, f"no-{name}") if section else ("", f"--no-{name.removeprefix('--')}")
        words = (
            []
            if isinstance(value, bool)
            else [str(x) for x in (value if isinstance(value, list) else [value])]
        )
        flags[key] = " ".join([f"{section}.{name}" if section else name, *map(shlex.quote, words)])
    return flags


def _method(label: str, stages: Mapping[str, Stage]) -> tuple[str, str]:
    """Method and weight of the KL of a stage: ("ppo", "0.1") of "ppo-0.1", ("ppo", "") of "ppo"."""
    method, _, weight = label.rpartition("-")
    return (method, weight) if method and label in stages else (label, "")


def compare_methods(config: Any, task: Task, folder: RunFolder, loaded: Text | None = None) -> Compared:
    """Runs all methods and seeds of the settings; see the top of this file.

    loaded: the opened text; None: `config.text` is opened. The seeds' runs lie in folders seed-N of the run's.

    Raises ValueError for settings that contradict each other, before anything is trained.
    """
    stages = chosen_stages(config)
    temperature = one_temperature(stages)
    if config.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {config.seeds}")
    parts, prepared, writers, found = [], [], [], []
    for seed in range(folder.seed, folder.seed + config.seeds):
        path = folder.path / f"seed-{seed}"
        path.mkdir(exist_ok=True)
        parts.append(replace(folder, path=path, seed=seed))
        parts[-1].repair()
        print(f"seed {seed}, in {path}", flush=True)
        before, tuned, by_split = run_seed(config, task, stages, temperature, parts[-1], loaded)
        prepared.append(before)
        writers.append({before.start: Writer(before.problem.reference), **tuned})
        found.append(by_split)
    splits = {split: [by_split[split] for by_split in found] for split in found[0]}
    first = prepared[0]
    measured = {
        split: {
            name: np.mean([_measure(score(first.heldout[split]), policies) for policies in of_split], axis=0)
            for name, score in task.measures.items()
        }
        for split, of_split in splits.items()
    }
    merged = {split: merge(of_split) for split, of_split in splits.items()}
    return Compared(task, temperature, stages, folder, parts, first, writers, splits, merged, measured)


def _measure(score: Any, policies: Sequence[Policy]) -> np.ndarray:
    """The scores of every policy's texts, [policies, B]."""
    rows = np.arange(len(policies[0].texts))
    return np.stack([np.asarray(score(rows, [[x] for x in policy.texts]))[:, 0] for policy in policies])


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


def run_seed(
    config: Any,
    task: Task,
    stages: Mapping[str, Stage],
    temperature: float,
    folder: RunFolder,
    loaded: Text | None = None,
) -> tuple[Prepared, dict[str, Writer], dict[str, list[Policy]]]:
    """All stages of one seed: what the methods started from, what they made of it, and the policies by split."""
    prepared = prepare(Sections.of(config), task, stages, folder, loaded)
    tuned = {name: prepared.optimise(name, stage) for name, stage in stages.items()}
    points: dict[str, Writer] = {}
    for name, stage in stages.items():
        points |= curve(name, stage, tuned[name])
    found = {split: prepared.evaluate(split, tuned, points, temperature) for split in prepared.heldout}
    return prepared, tuned, found


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
    split: str,
    merged: Sequence[Policy],
    found: Sequence[Sequence[Policy]],
    measured: Mapping[str, np.ndarray],
    *,
    temperature: float,
    gold_name: str,
    start: str = "sft",
) -> Section:
    """The table of all policies, and each method's lead over the policy that all started from."""
    base = {
        suffix: next(p for p in merged if p.name == f"{start}, {suffix}")
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
                *(bootstrap_interval(value_PB[number], 0) for value_PB in measured.values()),
            ]
        )
    header = [
        "policy",
        gold_name,
        "over seeds",
        f"lead over {start}",
        "reward",
        "KL (nats)",
        "tokens",
        *measured,
    ]
    seeds = "One seed" if len(found) == 1 else f"Means over {len(found)} seeds"
    text = (
        f"{seeds}, on the same {len(merged[0].gold)} prompts of the {split} split, one completion a prompt and "
        f"seed; 95 % bootstrap intervals over prompts. The lead is over {start} decoded in the same way."
    )
    return Section(f"Methods, {split} split", text, Table(header, rows))


# Metric of a step -> the title of its panel, on the left what it is in.
CURVES = {
    "objective/score": ("reward", "Reward of the samples"),
    "gold": ("gold", "Gold score of the samples"),
    "objective/kl": ("nats", "KL from the start"),
}


def curves_sections(
    stages: Mapping[str, Stage], part: RunFolder, folder: RunFolder, gold_name: str
) -> list[Section]:
    """What the methods that sample logged along their steps, in the first seed's run; nothing without one."""
    logged = {name: part.metrics(name) for name in stages}
    panels = []
    for metric, (label, title) in CURVES.items():
        curves = {
            name: ([line["step"] for line in lines], [line[metric] for line in lines])
            for name, lines in logged.items()
            if lines and metric in lines[0]
        }
        if curves:
            panels.append(Panel(gold_name if label == "gold" else label, curves, title=title))
    if not panels:
        return []
    path = plot_panels(_figures(folder) / "curves.png", panels)
    return [
        Section(
            "Along the steps", f"Seed {part.seed}.", figures=[(path, "Methods that sample, a point a step")]
        )
    ]


def frontier_section(
    merged: Sequence[Policy], folder: RunFolder, temperature: float, gold_name: str
) -> Section:
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
    figure = plot_gold_against_kl(_figures(folder) / "frontier.png", points, gold_label=gold_name)
    text = (
        f"Sampled at temperature {temperature:g}, that of the rollouts. A method is better than another where it lies "
        "above it at the same KL. The KL of best-of-n is its bound log n - (n-1)/n."
    )
    return Section(
        "The frontier",
        text,
        figures=[(figure, f"{gold_name} against KL from the policy that all started from")],
    )


def _figures(folder: RunFolder) -> Path:
    path = folder.path / "figures"
    path.mkdir(exist_ok=True)
    return path
