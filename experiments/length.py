"""The same loop with a reward that is exact: completions of a wanted number of words. No reward model.

It shows within a minute that the machinery works: the distance from the wanted length falls.
"""

from dataclasses import dataclass, field, replace

from experiments.stages.configs import EvaluationStage, PPOStage, SFTStage, Text
from rlhfjax.config import PPO

DESCRIPTION = "an exact reward, the number of words, to see the loop work within a minute"


@dataclass(frozen=True)
class Config:
    words: int = 4
    """Words wanted; the reward is -|words - this|."""
    text: Text = field(default_factory=Text)
    sft: SFTStage = field(default_factory=lambda: SFTStage(steps=60))
    ppo: PPOStage = field(
        default_factory=lambda: replace(
            PPOStage(),
            steps=20,
            algorithm=PPO(kl_coefficient=0.1, epochs=1, minibatches=2, value_coefficient=0.1),
        )
    )
    evaluation: EvaluationStage = field(
        default_factory=lambda: EvaluationStage(prompts=64, best_of=(4,), temperatures=())
    )


def plan(config: Config, mesh) -> list:
    """The programs of all stages, as shapes."""
    from experiments.stages.text_programs import programs_of_text

    return programs_of_text(
        config.text, mesh, sft=config.sft, policies={"ppo": config.ppo}, evaluation=config.evaluation
    )


def run(config: Config, folder) -> dict[str, float]:
    """Runs all stages; returns the numbers of summary.json."""
    from experiments.stages import evaluation, finetune, policy, report, text
    from experiments.stages.lengths import wanted_words
    from rlhfjax.report import write_report

    loaded = text.open_text(config.text, folder.mesh)
    train = loaded.load("train")
    sft_rows, rl_rows = text.divide(train, config.text.sft_share, folder.seed, finetuned=config.sft.steps > 0)
    policy.check(config.ppo, len(rl_rows))
    heldout = loaded.load("validation")  # early: a missing split should not cost the training
    reference = finetune.finetune(config.sft, loaded, train, sft_rows, folder)
    reward, gold = wanted_words(loaded, config.words)
    problem = policy.Problem(loaded, reference, lambda lm: reward, None, train, rl_rows, gold)
    tuned = policy.optimise_policy(
        "ppo", config.ppo, lambda lm: policy.ppo_learner(lm, config.ppo, problem, reference), problem, folder
    )
    found = evaluation.evaluate_policies(
        config.evaluation,
        loaded,
        reference,
        {"ppo": text.Writer(tuned)},
        evaluation.Scorer(problem.reward),
        lambda examples: gold,
        folder,
        temperature=config.ppo.temperature,
    )
    comparisons = evaluation.compare(found, config.ppo.temperature)
    gold_name = f"-|words - {config.words}|"
    write_report(
        folder.path,
        f"Completions of {config.words} words, seed {folder.seed}",
        [
            *report.result_sections(
                {"validation": found}, {"validation": comparisons}, gold_name, config.ppo.temperature
            ),
            report.policy_optimisation_section(folder, gold_name),
            report.text_section(found, heldout, config.ppo.temperature),
        ],
    )
    return report.summarise(found, comparisons, "validation")
