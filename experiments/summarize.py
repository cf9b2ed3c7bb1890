"""All of RLHF on real text: summaries of software descriptions, in minutes on a laptop.

  fine-tuning -> samples and a noisy judge's preferences -> reward model -> PPO -> evaluation with its controls

The gold scorer (ROUGE-L against the real summary) draws the judge's labels and measures the result; PPO never sees it.
"""

from dataclasses import dataclass, field

from experiments.stages.configs import EvaluationStage, PPOStage, PreferenceStage, RewardStage, SFTStage, Text

DESCRIPTION = "RLHF on real text: SFT, preferences, reward model, PPO, evaluation (the default)"


@dataclass(frozen=True)
class Config:
    text: Text = field(default_factory=Text)
    sft: SFTStage = field(default_factory=SFTStage)
    preferences: PreferenceStage = field(default_factory=PreferenceStage)
    reward: RewardStage = field(default_factory=RewardStage)
    ppo: PPOStage = field(default_factory=PPOStage)
    evaluation: EvaluationStage = field(default_factory=EvaluationStage)


def run(config: Config, folder) -> dict[str, float]:
    """Runs all stages; returns the numbers of summary.json."""
    import numpy as np

    from experiments.stages import evaluation, finetune, policy, preferences, report, reward, text
    from rlhfjax.recipes import make_reward_model
    from rlhfjax.report import write_report
    from rlhfjax.rewards import rouge_l

    loaded = text.open_text(config.text)
    train = loaded.load("train")
    sft_rows, rl_rows = text.divide(train, config.text.sft_share, folder.seed)
    preferences.check(config.preferences, len(rl_rows))
    reward.check(config.reward, config.preferences.prompts - config.preferences.heldout)
    policy.check(config.ppo, len(rl_rows))
    splits = ("validation", "test") if config.evaluation.test else ("validation",)
    heldout = {
        split: loaded.load(split) for split in splits
    }  # early: a missing split should not cost the training

    reference = finetune.finetune(config.sft, loaded, train, sft_rows, folder)
    judged = preferences.collect_preferences(config.preferences, loaded, reference, train, rl_rows, folder)
    learned = reward.train_reward_model(config.reward, loaded, reference, train, judged, folder)
    measured = folder.metrics("reward_model_heldout")[0]

    def gold_of(examples):
        def gold(rows, texts):
            return np.asarray(
                [[rouge_l(x, examples.references[r]) for x in xs] for r, xs in zip(rows, texts, strict=True)]
            )

        return gold

    score = make_reward_model(loaded.lm, pool=config.reward.pool)
    tuned = policy.optimise_policy(
        config.ppo,
        loaded,
        reference,
        policy.make_critic(learned.params["trunk"], loaded.lm.config.width),
        score,
        learned.params,
        train,
        rl_rows,
        folder,
        gold=gold_of(train),
    )
    found, comparisons, summary = {}, {}, {}
    for split in splits:
        found[split] = evaluation.evaluate_policies(
            config.evaluation,
            loaded,
            reference,
            {"ppo": tuned},
            score,
            learned.params,
            gold_of,
            folder,
            temperature=config.ppo.temperature,
            split=split,
        )
        comparisons[split] = evaluation.compare(found[split], config.ppo.temperature)
        summary |= report.summarise(found[split], comparisons[split], split)
    gold_name = "ROUGE-L"
    write_report(
        folder.path,
        f"Summaries of software descriptions, seed {folder.seed}",
        [
            *report.result_sections(found, comparisons, gold_name, config.ppo.temperature),
            report.frontier_section(found["validation"], folder, gold_name),
            report.policy_optimisation_section(folder, gold_name),
            report.reward_model_section(learned, measured, folder),
            report.text_section(found["validation"], heldout["validation"], config.ppo.temperature),
        ],
    )
    return summary | {
        f"reward_model/{name}": value for name, value in measured.items() if name[:7] == "heldout"
    }
