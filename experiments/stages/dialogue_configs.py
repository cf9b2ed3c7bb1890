"""Settings of learning in dialogues. No jax here, so that `--help` answers at once."""

import math
from dataclasses import dataclass, field
from typing import Literal

from experiments.stages.game_configs import (
    CloneStage,
    Network,
    SoftStage,
    ValueStage,
    sarsa_values,
    value_stage,
)
from experiments.stages.game_configs import Play as PlayInGames
from rlhfjax.config import DPO, GRPO, PPO, Optimizer, SoftQ

Method = Literal["clone", "best", "dpo", "ppo", "grpo", "rloo", "ilql", "monte_carlo", "soft_q"]


def _policy_optimizer(learning_rate: float) -> Optimizer:
    return Optimizer(learning_rate=learning_rate, warmup_steps=5, b2=0.95, final_fraction=0.1)


@dataclass(frozen=True)
class PPOGames:
    """PPO on the policy's own games."""

    steps: int = 60
    """Iterations: games, then an update."""
    worlds: int = 256
    """Games of an iteration, each of another world."""
    samples: int = 1
    """Games of each world."""
    shared_trunk: bool = False
    """Whether the critic is a head on the policy, not a network of its own."""
    algorithm: PPO = field(
        default_factory=lambda: PPO(
            kl_coefficient=0.05, value_clip=math.inf, value_coefficient=0.05, epochs=1, minibatches=4
        )
    )
    optimizer: Optimizer = field(default_factory=lambda: _policy_optimizer(2e-3))


@dataclass(frozen=True)
class GRPOGames:
    """A critic-free method on the policy's own games: GRPO, RLOO and their relatives."""

    steps: int = 80
    """Iterations: games, then an update."""
    worlds: int = 32
    """Worlds of an iteration."""
    samples: int = 8
    """Games of each world: a group."""
    algorithm: GRPO = field(
        default_factory=lambda: GRPO(
            scale="batch_std",
            kl_coefficient=0.05,
            kl_placement="reward",
            kl_estimator="k1",
            aggregation="token",
            minibatches=2,
        )
    )
    optimizer: Optimizer = field(default_factory=lambda: _policy_optimizer(2e-3))


def rloo_games() -> GRPOGames:
    """RLOO (arXiv 2402.14740): leave-one-out baseline, no clip, the KL in the score."""
    algorithm = GRPO(
        baseline="leave_one_out",
        scale="none",
        clip="none",
        aggregation="constant",
        length_constant=24.0,
        kl_coefficient=0.05,
        kl_placement="score",
        kl_estimator="k1",
        minibatches=2,
    )
    return GRPOGames(algorithm=algorithm)


@dataclass(frozen=True)
class DPOGames:
    """Preferences between games of the clone: of two in the same world the one that scored higher is preferred."""

    steps: int = 200
    """Optimiser steps."""
    batch: int = 32
    """Worlds of a step, each with all pairs of its games."""
    worlds: int = 2000
    """Worlds that the clone plays in, once, before."""
    samples: int = 4
    """Games of each."""
    algorithm: DPO = field(default_factory=lambda: DPO(beta=0.1))
    optimizer: Optimizer = field(default_factory=lambda: _policy_optimizer(5e-4))


@dataclass(frozen=True)
class Play(PlayInGames):
    """How policies are tried out."""

    points: int = 10
    """Points of the learning curves of methods that do not play to learn, about."""
    games: int = 128
    """Games at each of them."""
    final_games: int = 512
    """Games of each policy at the end; the same worlds for all, also of runs with another seed."""
    best_of: int = 4
    """Games that best-of-n plays in each world, of which the best counts."""


@dataclass(frozen=True)
class Stages:
    """What is learnt from what; a section for each method."""

    methods: tuple[Method, ...] = ("best", "dpo", "ppo", "grpo", "ilql", "soft_q")
    """Methods to compare, all from the same clone; best: cloning of the best games."""
    games: int = 4000
    """Games of the players to learn from."""
    best_fraction: float = 0.1
    """Share of these that is cloned by `best`."""
    network: Network = field(default_factory=Network)
    play: Play = field(default_factory=Play)
    clone: CloneStage = field(
        default_factory=lambda: CloneStage(
            steps=1000,
            optimizer=Optimizer(kind="muon", learning_rate=2e-3, muon_learning_rate=0.01, warmup_steps=50),
        )
    )
    best: CloneStage = field(default_factory=lambda: CloneStage(steps=100))
    dpo: DPOGames = field(default_factory=DPOGames)
    ppo: PPOGames = field(default_factory=PPOGames)
    grpo: GRPOGames = field(default_factory=GRPOGames)
    rloo: GRPOGames = field(default_factory=rloo_games)
    ilql: ValueStage = field(default_factory=lambda: sarsa_values(betas=(1.0,), steps=400))
    monte_carlo: ValueStage = field(default_factory=lambda: value_stage("returns", betas=(1.0,), steps=500))
    soft_q: SoftStage = field(
        # Whole games: with a reward at the end, one-step targets would carry it back by a token an update at best.
        default_factory=lambda: SoftStage(
            steps=400,
            algorithm=SoftQ(beta=1.0, steps=(0,)),
            optimizer=Optimizer(learning_rate=5e-4, warmup_steps=20),
        )
    )
