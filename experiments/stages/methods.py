"""The methods of policy optimisation, by name: what each is made of, from the same start and the same reward."""

from dataclasses import replace

from experiments.stages import policy
from experiments.stages.configs import DPOStage, GRPOStage, OnlineDPOStage, PPOStage, RAFTStage
from experiments.stages.pairs import check_pairs, train_on_pairs
from experiments.stages.policy import Problem
from experiments.stages.preferences import Judged
from rlhfjax.config import DPO
from rlhfjax.run_folder import RunFolder

Stage = PPOStage | GRPOStage | DPOStage | OnlineDPOStage | RAFTStage
# In the order of the tables. Each is also the section of its options.
METHODS = ("ppo", "grpo", "rloo", "dpo", "online_dpo", "raft")


def check(config: Stage, available: int, judged: int) -> None:
    """Raises ValueError where a stage asks for more than there is, or contradicts itself.

    For the start of an experiment: a mistake should not cost the minutes of the stages before.
    """
    if isinstance(config, DPOStage):
        check_pairs(config, judged)
    else:
        policy.check(config, available)


def optimise(
    name: str, config: Stage, problem: Problem, judged: Judged, critic_trunk: dict, folder: RunFolder
) -> dict:
    """Runs the method in the stage `name`; returns the policy's parameters.

    `critic_trunk` is what PPO's critic starts from, usually the reward model's.
    """
    if isinstance(config, DPOStage):
        return train_on_pairs(name, config, problem, judged, folder)
    if isinstance(config, PPOStage):
        learner = policy.ppo_learner(config, problem, critic_trunk)
    elif isinstance(config, GRPOStage):
        learner = policy.grpo_learner(config, problem)
    elif isinstance(config, OnlineDPOStage):
        learner = policy.online_dpo_learner(config, problem)
    else:
        learner = policy.raft_learner(config, problem)
    return policy.optimise_policy(name, config, learner, problem, folder)


def kl_weight(config: Stage) -> float | None:
    """The weight of the KL in a method's objective, reward per nat; None where it has none."""
    if isinstance(config, RAFTStage):
        return None
    return config.algorithm.beta if isinstance(config.algorithm, DPO) else config.algorithm.kl_coefficient


def with_kl_weight(config: Stage, weight: float) -> Stage:
    """The stage with another weight of the KL. Raises ValueError where the method has none."""
    if isinstance(config, RAFTStage):
        raise ValueError("raft has no KL weight; its distance from the reference is that of its steps")
    name = "beta" if isinstance(config.algorithm, DPO) else "kl_coefficient"
    return replace(config, algorithm=replace(config.algorithm, **{name: weight}))
