"""Reinforcement learning with your own reward: any Python function of texts.

  fine-tuning -> GRPO or PPO, the reward called in threads while the device works -> evaluation by the same reward

A reward is `f(prompts, completions, **columns) -> list[float | None]`; see `experiments/rewards.py`.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from experiments.stages.configs import EvaluationStage, GRPOStage, HostRewards, PPOStage, SFTStage, Text

DESCRIPTION = "your own reward, any Python function of texts: FILE.py:FUNCTION"


@dataclass(frozen=True)
class Config(HostRewards):
    rewards: tuple[str, ...] = (
        "experiments/rewards.py:words_from_the_prompt",
        "experiments/rewards.py:no_repetition",
    )
    """Functions, each FILE.py:NAME or MODULE:NAME; the score is their weighted sum."""
    algorithm: Literal["grpo", "ppo"] = "grpo"
    """Method of policy optimisation; the section of the same name holds its settings."""
    text: Text = field(default_factory=Text)
    sft: SFTStage = field(default_factory=SFTStage)
    grpo: GRPOStage = field(default_factory=lambda: replace(GRPOStage(), missing_eos_penalty=None))
    ppo: PPOStage = field(default_factory=lambda: replace(PPOStage(), missing_eos_penalty=None))
    evaluation: EvaluationStage = field(
        default_factory=lambda: EvaluationStage(prompts=256, best_of=(4,), temperatures=())
    )


def plan(config: Config, mesh) -> list:
    """The programs of all stages, as shapes."""
    from experiments.stages.text_programs import programs_of_text

    return programs_of_text(
        config.text,
        mesh,
        sft=config.sft,
        policies={config.algorithm: getattr(config, config.algorithm)},
        evaluation=config.evaluation,
        on_host=True,
    )


def run(config: Config, folder) -> dict[str, float]:
    """Runs all stages; returns the numbers of summary.json."""
    from experiments.stages import evaluation, host_reward, report, reward_runs
    from rlhfjax.report import write_report

    name, stage = config.algorithm, getattr(config, config.algorithm)
    start = "sft" if config.sft.steps else "base"
    with host_reward.open_pool(config) as pool:  # early: a reward that cannot be found should cost nothing
        made = reward_runs.on_given_reward(config, name, stage, pool, folder)
        found = evaluation.evaluate_policies(
            config.evaluation,
            made.text,
            made.reference,
            {name: made.tuned},
            evaluation.Scorer(made.reward, made.reward_params),
            made.gold_of,
            folder,
            temperature=stage.temperature,
            start=start,
        )
    comparisons = evaluation.compare(found, stage.temperature, name, start)
    write_report(
        folder.path,
        f"{name} on {', '.join(reward.rpartition(':')[2] for reward in config.rewards)}, seed {folder.seed}",
        [
            *report.result_sections(
                {"validation": found}, {"validation": comparisons}, "the reward", stage.temperature
            ),
            report.policy_optimisation_section(folder, "the reward", name, ahead=config.ahead),
            report.text_section(found, made.text.load("validation"), stage.temperature),
        ],
    )
    return report.summarise(found, comparisons, "validation")
