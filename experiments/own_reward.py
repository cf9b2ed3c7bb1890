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


def run(config: Config, folder) -> dict[str, float]:
    """Runs all stages; returns the numbers of summary.json."""
    from experiments.stages import evaluation, finetune, host_reward, policy, report, text
    from rlhfjax.report import write_report

    name, stage = config.algorithm, getattr(config, config.algorithm)
    loaded = text.open_text(config.text)
    train = loaded.load("train")
    sft_rows, rl_rows = text.divide(train, config.text.sft_share, folder.seed, finetuned=config.sft.steps > 0)
    policy.check(stage, len(rl_rows))
    heldout = loaded.load("validation")  # early: a missing split should not cost the training
    with host_reward.open_pool(config) as pool:  # early too: so should no reward that cannot be found
        reference = finetune.finetune(config.sft, loaded, train, sft_rows, folder)
        at_once = stage.prompts * stage.samples
        gold = host_reward.judge(pool, train, at_once)
        problem = policy.Problem(loaded, reference, None, None, train, rl_rows, gold)

        def learner(lm):
            if name == "grpo":
                return policy.grpo_learner(lm, config.grpo, problem)
            return policy.ppo_learner(lm, config.ppo, problem, reference)

        tuned = host_reward.optimise_policy(name, stage, learner, problem, pool, folder, config)
        found = evaluation.evaluate_policies(
            config.evaluation,
            loaded,
            reference,
            {name: text.Writer(tuned)},
            None,
            None,
            lambda examples: host_reward.judge(pool, examples, at_once),
            folder,
            temperature=stage.temperature,
        )
    comparisons = evaluation.compare(found, stage.temperature, name)
    write_report(
        folder.path,
        f"{name} on {', '.join(reward.rpartition(':')[2] for reward in config.rewards)}, seed {folder.seed}",
        [
            *report.result_sections(
                {"validation": found}, {"validation": comparisons}, "the reward", stage.temperature
            ),
            report.policy_optimisation_section(folder, "the reward", name, ahead=config.ahead),
            report.text_section(found, heldout, stage.temperature),
        ],
    )
    return report.summarise(found, comparisons, "validation")
