"""All of RLHF on real text: summaries of software descriptions, in minutes on a laptop.

  fine-tuning -> samples and a noisy judge's preferences -> reward model -> PPO -> evaluation with its controls

The gold scorer (ROUGE-L against the real summary) draws the judge's labels and measures the result; no method of
policy optimisation sees it. `--algorithm` puts another in the place of PPO.
"""

from dataclasses import dataclass, field
from typing import Literal

from experiments.stages.configs import (
    DPOStage,
    EvaluationStage,
    GRPOStage,
    ILQLStage,
    OnlineDPOStage,
    PPOStage,
    PreferenceStage,
    RAFTStage,
    RatingStage,
    RewardStage,
    SFTStage,
    SoftQStage,
    Text,
    rloo_stage,
)

DESCRIPTION = "RLHF on real text: SFT, preferences, reward model, PPO, evaluation (the default)"


@dataclass(frozen=True)
class Config:
    algorithm: Literal["ppo", "grpo", "rloo", "dpo", "online_dpo", "raft", "soft_q", "ilql"] = "ppo"
    """Method of policy optimisation; the section of the same name holds its settings."""
    text: Text = field(default_factory=Text)
    sft: SFTStage = field(default_factory=SFTStage)
    preferences: PreferenceStage = field(default_factory=PreferenceStage)
    reward: RewardStage = field(default_factory=RewardStage)
    ppo: PPOStage = field(default_factory=PPOStage)
    grpo: GRPOStage = field(default_factory=GRPOStage)
    rloo: GRPOStage = field(default_factory=rloo_stage)
    dpo: DPOStage = field(default_factory=DPOStage)
    online_dpo: OnlineDPOStage = field(default_factory=OnlineDPOStage)
    raft: RAFTStage = field(default_factory=RAFTStage)
    ratings: RatingStage = field(default_factory=RatingStage)
    soft_q: SoftQStage = field(default_factory=SoftQStage)
    ilql: ILQLStage = field(default_factory=ILQLStage)
    evaluation: EvaluationStage = field(default_factory=EvaluationStage)


def plan(config: Config, mesh) -> list:
    """The programs of all stages, as shapes."""
    from experiments.stages.text_programs import programs_of_text

    return programs_of_text(
        config.text,
        mesh,
        sft=config.sft,
        preferences=config.preferences,
        reward=config.reward,
        ratings=config.ratings,
        policies={config.algorithm: getattr(config, config.algorithm)},
        evaluation=config.evaluation,
    )


def run(config: Config, folder) -> dict[str, float]:
    """Runs all stages; returns the numbers of summary.json."""
    from experiments.stages import evaluation, offline, report
    from experiments.stages.length_matched import against_start, length_numbers, length_section
    from experiments.stages.prepare import Sections, prepare, rouge_of
    from experiments.stages.task import Task
    from rlhfjax.report import write_report

    name, stage = config.algorithm, getattr(config, config.algorithm)
    gold_name = "ROUGE-L"
    prepared = prepare(Sections.of(config), Task(gold_name, rouge_of), {name: stage}, folder)
    assert prepared.learned is not None
    tuned = prepared.optimise(name, stage)
    found, comparisons, lengths, summary = {}, {}, [], {}
    for split in prepared.heldout:
        points = offline.curve(name, stage, tuned)
        found[split] = prepared.evaluate(split, {name: tuned}, points, stage.temperature)
        comparisons[split] = evaluation.compare(found[split], stage.temperature, name)
        matched = against_start([found[split]], prepared.start, stage.temperature)
        lengths.append(length_section(matched, gold_name, split))
        summary |= report.summarise(found[split], comparisons[split], split)
        summary |= {f"{split}/{key}": value for key, value in length_numbers(matched).items()}
    measured = folder.metrics("reward_model_heldout")[0]
    write_report(
        folder.path,
        f"Summaries of software descriptions, {name}, seed {folder.seed}",
        [
            *report.result_sections(found, comparisons, gold_name, stage.temperature),
            *lengths,
            report.frontier_section(found["validation"], folder, gold_name),
            report.policy_optimisation_section(folder, gold_name, name),
            report.reward_model_section(prepared.learned, measured, folder),
            report.text_section(found["validation"], prepared.heldout["validation"], stage.temperature),
        ],
    )
    return summary | {
        f"reward_model/{key}": value for key, value in measured.items() if key.startswith("heldout")
    }
