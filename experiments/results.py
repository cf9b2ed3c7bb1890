"""Every task, methods side by side, over seeds, by one command.

Each task is an experiment of its own, run here with the settings below; what has ended is not run again on --resume.
"""

from dataclasses import dataclass, field

from experiments import compare, control_preferences, dialogue, reasoning, sentiment, translate
from experiments.compare import Config as Summarize
from experiments.control_preferences import Config as ControlPreferences
from experiments.dialogue import Config as Dialogue
from experiments.reasoning import Config as Reasoning
from experiments.sentiment import Config as Sentiment
from experiments.translate import Config as Translate

DESCRIPTION = "every task, its methods side by side, over seeds: one table"
TASKS = {
    "summarize": compare,
    "translate": translate,
    "dialogue": dialogue,
    "sentiment": sentiment,
    "reasoning": reasoning,
    "control_preferences": control_preferences,
}


@dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = tuple(TASKS)
    """Which tasks to run, in this order."""
    seeds: int = 3
    """Runs of each, from --seed on."""
    summarize: Summarize = field(default_factory=compare.results)
    translate: Translate = field(default_factory=translate.results)
    dialogue: Dialogue = field(default_factory=Dialogue)
    sentiment: Sentiment = field(default_factory=Sentiment)
    reasoning: Reasoning = field(
        default_factory=lambda: Reasoning(methods=("dpo", "ppo", "grpo", "soft_q", "ilql"))
    )
    control_preferences: ControlPreferences = field(default_factory=ControlPreferences)


def plan(config: Config, mesh) -> list:
    """The programs of every task, once."""
    return [program for name in _chosen(config) for program in TASKS[name].plan(getattr(config, name), mesh)]


def run(config: Config, folder) -> dict[str, float]:
    """Runs all tasks; returns the numbers of summary.json."""
    from experiments.stages import all_results
    from rlhfjax.report import write_report

    tasks = {
        name: all_results.Job(TASKS[name].__name__.rpartition(".")[2], TASKS[name].run, getattr(config, name))
        for name in _chosen(config)
    }
    found = all_results.run_all(tasks, config.seeds, folder)
    write_report(
        folder.path,
        f"All tasks, {config.seeds} runs of each from seed {folder.seed} on",
        all_results.sections(found, folder),
    )
    return all_results.numbers(found)


def _chosen(config: Config) -> tuple[str, ...]:
    from experiments.options import did_you_mean

    for name in config.tasks:
        if name not in TASKS:
            raise ValueError(
                f"no task named {name!r}{did_you_mean(name, TASKS)} (there are: {', '.join(TASKS)})"
            )
    if not config.tasks or len(set(config.tasks)) < len(config.tasks) or config.seeds < 1:
        raise ValueError(
            f"give at least one task, none twice, and one seed; got {config.tasks}, {config.seeds}"
        )
    return config.tasks
