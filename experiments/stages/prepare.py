"""From data to a reward: the stages that every method of policy optimisation starts from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Self

from experiments.stages import (
    evaluation,
    finetune,
    host_reward,
    labelled,
    methods,
    preferences,
    ratings,
    reward,
    text,
)
from experiments.stages.configs import EvaluationStage, PreferenceStage, RatingStage, RewardStage, SFTStage
from experiments.stages.configs import Text as TextConfig
from experiments.stages.evaluation import Policy, Scorer
from experiments.stages.policy import Problem
from experiments.stages.preferences import Gold, Judged
from experiments.stages.ratings import Rated
from experiments.stages.reward import Learned
from experiments.stages.task import OnDevice, OnHost, Task, against_references
from experiments.stages.text import Examples, Text, Writer
from rlhfjax.recipes import make_reward_model
from rlhfjax.rewards import rouge_l
from rlhfjax.run_folder import RunFolder

# Texts handed to rewards in Python at a time, outside of an iteration: their time-out is for that many.
TEXTS_AT_ONCE = 64

rouge_of = against_references(rouge_l)  # the gold score of summaries


class Sections(NamedTuple):
    """Settings of the stages before policy optimisation, and of the evaluation."""

    text: TextConfig
    sft: SFTStage
    preferences: PreferenceStage
    reward: RewardStage
    ratings: RatingStage
    evaluation: EvaluationStage

    @classmethod
    def of(cls, config: Any) -> Self:
        """The sections of these names of an experiment's settings."""
        return cls(*(getattr(config, name) for name in cls._fields))


@dataclass(frozen=True)
class Prepared:
    """A fine-tuned policy, and a reward: given, or learnt from judged samples of it."""

    problem: Problem
    task: Task
    sections: Sections
    judged: Judged | None  # None: the reward is given, and no method learns from recorded samples
    learned: Learned | None  # None: the reward is given
    heldout: dict[str, Examples]  # by split
    folder: RunFolder

    @cached_property
    def rated(self) -> Rated:
        """Samples with the reward of each; computed for the methods that ask for them."""
        config, sampled = self.sections.ratings, self.sections.preferences
        return ratings.rate(config, sampled, self.problem, self._judged(), self.folder)

    @property
    def start(self) -> str:
        """What the policy that all methods start from is called."""
        return "sft" if self.sections.sft.steps else "base"

    def optimise(self, name: str, config: methods.Stage) -> Writer:
        """Runs one method in the stage `name`; returns the policy."""
        given = self.task.reward
        return methods.optimise(
            name,
            config,
            self.problem,
            self._judged,
            lambda: self.rated,
            self.problem.reference if self.learned is None else self.learned.params["trunk"],
            self.folder,
            on_host=given if isinstance(given, OnHost) else None,
        )

    def evaluate(
        self, split: str, policies: Mapping[str, Writer], points: Mapping[str, Writer], temperature: float
    ) -> list[Policy]:
        """Measures the start, best-of-n and the policies on a split; see `evaluate_policies`."""
        problem, given = self.problem, self.task.reward
        if isinstance(given, OnDevice):
            params, of_split = given.of(problem.text, self.heldout[split])
            scorer = Scorer(lambda lm: of_split, params, numbered=True)
        elif isinstance(given, OnHost):
            scorer = Scorer(judge=_judge_of(given))
        else:
            scorer = Scorer(problem.reward, problem.reward_params)
        return evaluation.evaluate_policies(
            self.sections.evaluation,
            problem.text,
            problem.reference,
            policies,
            scorer,
            self.task.gold_of,
            self.folder,
            temperature=temperature,
            split=split,
            points=points,
            start=self.start,
        )

    def _judged(self) -> Judged:
        assert self.judged is not None  # `prepare` collects what the chosen methods need
        return self.judged


def prepare(
    sections: Sections,
    task: Task,
    chosen: Mapping[str, methods.Stage],
    folder: RunFolder,
    loaded: Text | None = None,
) -> Prepared:
    """Runs the stages before policy optimisation. The settings of the methods to come, `chosen`, are checked first.

    loaded: the opened text; None: it is opened here.

    With a given reward no reward model is trained, and samples are drawn and labelled only for methods that learn from
    them.
    """
    config, given = sections, task.reward
    loaded = loaded or text.open_text(config.text, folder.mesh)
    train = loaded.load("train")
    finetuned = config.sft.steps > 0
    sft_rows, rl_rows = text.divide(train, config.text.sft_share, folder.seed, finetuned=finetuned)
    sampled = given is None or any(map(methods.learns_from_samples, chosen.values()))
    judged, given_rows = None, len(rl_rows)  # rows left to rate
    if config.preferences.labels is not None:
        if not sampled:
            raise ValueError(
                "preferences.labels is given, and neither a reward model nor a method learns from it"
            )
        judged = labelled.collect_labels(config.preferences, loaded, folder)
        judged_prompts = judged.trained
    else:
        judged_prompts = config.preferences.prompts - config.preferences.heldout
        given_rows -= config.preferences.heldout
        if sampled:
            preferences.check(config.preferences, len(rl_rows))
    if given is None:
        reward.check(config.reward, judged_prompts)
    for stage in chosen.values():
        methods.check(stage, len(rl_rows), judged_prompts, config.ratings.prompts)
        if methods.learns_from_ratings(stage):
            ratings.check(config.ratings, given_rows)
    splits = ("validation", "test") if config.evaluation.test else ("validation",)
    heldout = {
        split: loaded.load(split) for split in splits
    }  # early: a missing split should not cost the training

    reference = finetune.finetune(config.sft, loaded, train, sft_rows, folder)
    gold = task.gold_of(train)
    problem = Problem(loaded, reference, None, None, train, rl_rows, gold)
    if isinstance(given, OnDevice):
        params, of_train = given.of(loaded, train)
        problem = replace(problem, reward=lambda lm: of_train, reward_params=params, numbered=True)
    elif isinstance(given, OnHost):
        problem = replace(problem, gold=_judge_of(given)(train))  # the reward on the host
    learned = None
    if judged is not None:
        seen = [config.reward.steps * config.reward.prompts] if given is None else []
        for note in labelled.notes(judged, seen, heldout):
            print(note, flush=True)
    elif sampled:
        score = None if given is None else partial(ratings.rewards_of, problem)
        of_samples = config.preferences, loaded, reference, train, rl_rows, gold, folder
        judged = preferences.collect_preferences(*of_samples, score=score)
    if given is None:
        assert judged is not None
        learned = reward.train_reward_model(config.reward, loaded, reference, train, judged, folder)
        of_model = partial(make_reward_model, pool=config.reward.pool)
        problem = replace(problem, reward=of_model, reward_params=learned.params)
    return Prepared(problem, task, sections, judged, learned, heldout, folder)


def _judge_of(given: OnHost) -> Callable[[Examples], Gold]:
    return lambda examples: host_reward.judge(given.pool, examples, TEXTS_AT_ONCE)
