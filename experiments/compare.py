"""Several methods of policy optimisation on the same data, reward and seeds: gold score against KL.

For every seed: fine-tuning, preferences and reward model once, then each method from that same start. What the table
and the figure say of a method is the mean over seeds, with a bootstrap interval over prompts and the range over seeds.

As a script, `python experiments/compare.py RUN RUN...`, it compares runs that there are: `experiments.viewing`.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from experiments.viewing.command import main

    sys.exit(main())

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

DESCRIPTION = "several methods on the same data and seeds: gold score against KL, with intervals"


@dataclass(frozen=True)
class Config:
    methods: tuple[Literal["ppo", "grpo", "rloo", "dpo", "online_dpo", "raft", "soft_q", "ilql"], ...] = (
        "ppo",
        "grpo",
        "rloo",
        "dpo",
        "online_dpo",
        "raft",
    )
    """Methods to compare; the sections of the same names hold their settings."""
    seeds: int = 1
    """Runs of everything, from --seed on."""
    kl_weights: tuple[float, ...] = ()
    """Weights of the KL (beta), each a point of every method that has one; empty: as configured, one point."""
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
    evaluation: EvaluationStage = field(default_factory=lambda: EvaluationStage(temperatures=()))


def results() -> Config:
    """Less of everything, for the table of all tasks."""
    return Config(
        methods=("dpo", "ppo", "grpo", "ilql"),
        sft=SFTStage(steps=128),
        preferences=PreferenceStage(prompts=1280, heldout=256),
        reward=RewardStage(steps=32),
        ppo=PPOStage(steps=24),
        grpo=GRPOStage(steps=24),
        dpo=DPOStage(steps=32),
        ratings=RatingStage(prompts=1024),
        ilql=ILQLStage(steps=64, curve=()),
        evaluation=EvaluationStage(prompts=256, temperatures=(), best_of=(4,)),
    )


def plan(config: Config, mesh) -> list:
    """The programs of all stages and seeds, as shapes."""
    from experiments.stages import comparison
    from experiments.stages.text_programs import programs_of_text

    return programs_of_text(
        config.text,
        mesh,
        sft=config.sft,
        preferences=config.preferences,
        reward=config.reward,
        ratings=config.ratings,
        policies=comparison.chosen_stages(config),
        evaluation=config.evaluation,
        seeds=config.seeds,
    )


def run(config: Config, folder) -> dict[str, float]:
    """Runs all seeds; returns the numbers of summary.json."""
    from experiments.stages import comparison
    from experiments.stages.prepare import rouge_of
    from experiments.stages.task import Task
    from rlhfjax.report import write_report

    compared = comparison.compare_methods(config, Task("ROUGE-L", rouge_of), folder)
    write_report(
        folder.path,
        f"{' '.join(config.methods)}, {config.seeds} from seed {folder.seed} on",
        compared.sections,
    )
    compared.write_results("summarisation", settings=config)
    return compared.summary
