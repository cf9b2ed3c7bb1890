"""From data to a reward: the stages that every method of policy optimisation starts from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from experiments.stages import finetune, methods, preferences, ratings, reward, text
from experiments.stages.configs import EvaluationStage, PreferenceStage, RatingStage, RewardStage, SFTStage
from experiments.stages.configs import Text as TextConfig
from experiments.stages.policy import Problem
from experiments.stages.preferences import Gold, Judged
from experiments.stages.ratings import Rated
from experiments.stages.reward import Learned
from experiments.stages.text import Examples, Writer
from rlhfjax.recipes import make_reward_model
from rlhfjax.rewards import rouge_l
from rlhfjax.run_folder import RunFolder


@dataclass(frozen=True)
class Prepared:
    """A fine-tuned policy, judged samples of it, and a reward learnt from them."""

    problem: Problem
    judged: Judged
    learned: Learned
    gold_of: Callable[[Examples], Gold]
    heldout: dict[str, Examples]  # by split
    sampled: PreferenceStage
    ratings: RatingStage
    folder: RunFolder

    @cached_property
    def rated(self) -> Rated:
        """Samples with the reward of each; computed for the methods that ask for them."""
        return ratings.rate(self.ratings, self.sampled, self.problem, self.judged, self.folder)

    def optimise(self, name: str, config: methods.Stage) -> Writer:
        """Runs one method in the stage `name`; returns the policy."""
        return methods.optimise(
            name,
            config,
            self.problem,
            self.judged,
            lambda: self.rated,
            self.learned.params["trunk"],
            self.folder,
        )


def prepare(
    text_config: TextConfig,
    sft: SFTStage,
    preference: PreferenceStage,
    reward_config: RewardStage,
    rating: RatingStage,
    evaluation: EvaluationStage,
    chosen: Mapping[str, methods.Stage],
    folder: RunFolder,
    gold_of: Callable[[Examples], Gold] | None = None,
) -> Prepared:
    """Runs the stages before policy optimisation. The settings of the methods to come, `chosen`, are checked first.

    `gold_of` gives the scorer that the judge goes by; None: ROUGE-L against the completions of the data.
    """
    gold_of = gold_of or rouge_of
    loaded = text.open_text(text_config, folder.mesh)
    train = loaded.load("train")
    sft_rows, rl_rows = text.divide(train, text_config.sft_share, folder.seed, finetuned=sft.steps > 0)
    preferences.check(preference, len(rl_rows))
    judged_prompts = preference.prompts - preference.heldout
    reward.check(reward_config, judged_prompts)
    for config in chosen.values():
        methods.check(config, len(rl_rows), judged_prompts, rating.prompts)
        if methods.learns_from_ratings(config):
            ratings.check(rating, len(rl_rows) - preference.heldout)
    splits = ("validation", "test") if evaluation.test else ("validation",)
    heldout = {
        split: loaded.load(split) for split in splits
    }  # early: a missing split should not cost the training

    reference = finetune.finetune(sft, loaded, train, sft_rows, folder)
    gold = gold_of(train)
    judged = preferences.collect_preferences(preference, loaded, reference, train, rl_rows, gold, folder)
    learned = reward.train_reward_model(reward_config, loaded, reference, train, judged, folder)
    score = partial(make_reward_model, pool=reward_config.pool)
    problem = Problem(loaded, reference, score, learned.params, train, rl_rows, gold)
    return Prepared(problem, judged, learned, gold_of, heldout, preference, rating, folder)


def rouge_of(examples: Examples) -> Gold:
    """The gold scorer of these pairs: ROUGE-L against the real summary."""

    def gold(rows, texts):
        return np.asarray(
            [[rouge_l(x, examples.references[r]) for x in xs] for r, xs in zip(rows, texts, strict=True)]
        )

    return gold
