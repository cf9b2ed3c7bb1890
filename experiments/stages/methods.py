"""The methods of policy optimisation, by name: what each is made of, from the same start and the same reward."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from experiments.stages import host_reward, offline, policy
from experiments.stages.configs import (
    DPOStage,
    GRPOStage,
    ILQLStage,
    OnlineDPOStage,
    PPOStage,
    RAFTStage,
    SoftQStage,
)
from experiments.stages.pairs import check_pairs, train_on_pairs
from experiments.stages.policy import Learner, Problem
from experiments.stages.preferences import Judged
from experiments.stages.ratings import Rated
from experiments.stages.task import OnHost
from experiments.stages.text import Writer
from rlhfjax.config import DPO
from rlhfjax.networks import LanguageModel
from rlhfjax.run_folder import RunFolder

Stage = PPOStage | GRPOStage | DPOStage | OnlineDPOStage | RAFTStage | SoftQStage | ILQLStage
# In the order of the tables. Each is also the section of its options.
METHODS = ("ppo", "grpo", "rloo", "dpo", "online_dpo", "raft", "soft_q", "ilql")


def check(config: Stage, available: int, judged: int, rated: int) -> None:
    """Raises ValueError where a stage asks for more prompts than there are, or contradicts itself.

    There are `available` to sample for, `judged` with preferences among their samples, `rated` with scores.

    For the start of an experiment: a mistake should not cost the minutes of the stages before.
    """
    if isinstance(config, DPOStage):
        check_pairs(config, judged)
    elif isinstance(config, offline.Config):
        offline.check(config, rated)
    else:
        policy.check(config, available)


def learns_from_ratings(config: Stage) -> bool:
    """Whether the method learns from rated samples, without sampling."""
    return isinstance(config, offline.Config)


def learns_from_samples(config: Stage) -> bool:
    """Whether the method learns from recorded samples of the start: pairs of them, or their ratings."""
    return isinstance(config, DPOStage) or learns_from_ratings(config)


def optimise(
    name: str,
    config: Stage,
    problem: Problem,
    judged: Callable[[], Judged],
    rated: Callable[[], Rated],
    critic_trunk: dict,
    folder: RunFolder,
    *,
    on_host: OnHost | None = None,
) -> Writer:
    """Runs the method in the stage `name`; returns the policy.

    `critic_trunk` is what PPO's critic and ILQL's values start from, usually the reward model's. `judged` is called by
    the methods that learn from pairs, `rated` by those that learn from rated samples. `on_host`: the reward in Python,
    for a problem without one on the device.
    """
    if isinstance(config, DPOStage):
        return Writer(train_on_pairs(name, config, problem, judged(), folder))
    if isinstance(config, SoftQStage):
        return offline.train_soft_q(name, config, problem, rated(), folder)
    if isinstance(config, ILQLStage):
        return offline.train_values(config, problem, rated(), critic_trunk, folder)

    learner = partial(make_learner, config=config, problem=problem, critic_trunk=critic_trunk)
    if on_host is not None:
        given = on_host.pool, folder, on_host.settings
        return Writer(host_reward.optimise_policy(name, config, learner, problem, *given))
    return Writer(policy.optimise_policy(name, config, learner, problem, folder))


def make_learner(lm: LanguageModel, config: policy.Config, problem: Problem, critic_trunk: dict) -> Learner:
    """What a method on the policy's own samples learns with."""
    if isinstance(config, PPOStage):
        return policy.ppo_learner(lm, config, problem, critic_trunk)
    if isinstance(config, GRPOStage):
        return policy.grpo_learner(lm, config, problem)
    if isinstance(config, OnlineDPOStage):
        return policy.online_dpo_learner(lm, config, problem)
    return policy.raft_learner(lm, config, problem)


def kl_weight(config: Stage) -> float | None:
    """The weight of the KL in a method's objective, reward per nat; None where it has none."""
    if isinstance(config, RAFTStage):
        return None
    if isinstance(config, offline.Config):
        return offline.kl_weight(config)
    return config.algorithm.beta if isinstance(config.algorithm, DPO) else config.algorithm.kl_coefficient


def with_kl_weight(config: Stage, weight: float) -> Stage:
    """The stage with another weight of the KL. Raises ValueError where the method has none."""
    if isinstance(config, RAFTStage):
        raise ValueError("raft has no KL weight; its distance from the reference is that of its steps")
    if isinstance(config, offline.Config):
        return offline.with_kl_weight(config, weight)
    name = "beta" if isinstance(config.algorithm, DPO) else "kl_coefficient"
    return replace(config, algorithm=replace(config.algorithm, **{name: weight}))
