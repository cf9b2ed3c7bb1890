"""The two ways to a policy tuned to functions of texts: by these themselves, or by a reward model of pairs that they
labelled."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.stages import finetune, host_reward, methods, policy, report, text
from experiments.stages.configs import RatingStage
from experiments.stages.preferences import Gold
from experiments.stages.prepare import Sections, prepare
from experiments.stages.task import Task
from experiments.stages.text import Examples, Text, Writer
from rlhfjax.report import Section
from rlhfjax.rewards import RewardPool
from rlhfjax.run_folder import RunFolder

# Prompts whose samples are handed to the reward at a time, where there is no iteration to take the number from.
_PROMPTS_AT_ONCE = 16


class Made(NamedTuple):
    """A tuned policy, and what it is measured with."""

    text: Text
    reference: dict
    tuned: Writer
    reward: Callable[..., Any] | None  # lm -> the reward on the device; None: the given one
    reward_params: Any
    gold_of: Callable[[Examples], Gold]
    measured: Mapping[str, float]  # of the reward model
    sections: Sequence[Section]


def on_given_reward(config: Any, name: str, stage: Any, pool: RewardPool, folder: RunFolder) -> Made:
    """Optimises the functions themselves."""
    loaded = text.open_text(config.text, folder.mesh)
    train = loaded.load("train")
    sft_rows, rows = text.divide(train, config.text.sft_share, folder.seed, finetuned=config.sft.steps > 0)
    policy.check(stage, len(rows))
    loaded.load("validation")  # early: a missing split should not cost the training
    gold_of = _gold_of(pool, stage.prompts * stage.samples)
    reference = finetune.finetune(config.sft, loaded, train, sft_rows, folder)
    problem = policy.Problem(loaded, reference, None, None, train, rows, gold_of(train))

    def learner(lm):
        if name == "grpo":
            return policy.grpo_learner(lm, stage, problem)
        return policy.ppo_learner(lm, stage, problem, reference)

    tuned = host_reward.optimise_policy(name, stage, learner, problem, pool, folder, config)
    return Made(loaded, reference, Writer(tuned), None, None, gold_of, {}, [])


def on_learned_reward(
    config: Any, name: str, stage: methods.Stage, pool: RewardPool, folder: RunFolder
) -> Made:
    """Labels pairs by the functions, learns a reward model of them, and optimises that."""
    gold_of = _gold_of(pool, config.preferences.samples * _PROMPTS_AT_ONCE)
    sections = Sections(
        config.text, config.sft, config.preferences, config.reward_model, RatingStage(), config.evaluation
    )
    prepared = prepare(sections, Task("the reward", gold_of), {name: stage}, folder)
    assert prepared.learned is not None
    tuned, problem = prepared.optimise(name, stage), prepared.problem
    measured = folder.metrics("reward_model_heldout")[0]
    return Made(
        problem.text,
        problem.reference,
        tuned,
        problem.reward,
        problem.reward_params,
        gold_of,
        {f"reward_model/{key}": value for key, value in measured.items() if key.startswith("heldout")},
        [report.reward_model_section(prepared.learned, measured, folder)],
    )


def _gold_of(pool: RewardPool, at_once: int) -> Callable[[Examples], Gold]:
    return lambda examples: host_reward.judge(pool, examples, at_once)
