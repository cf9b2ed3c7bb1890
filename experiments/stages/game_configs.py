"""Settings of the experiments in worlds of words. No jax here, so that `--help` answers at once."""

from dataclasses import dataclass, field

from rlhfjax.config import ILQL, SFT, Optimizer, SoftQ


@dataclass(frozen=True)
class Network:
    """The language model, over the vocabulary of the world."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    """Of attention; they share the width."""
    mlp_width: int = 192


@dataclass(frozen=True)
class CloneStage:
    """Behaviour cloning."""

    steps: int = 600
    """Optimiser steps."""
    batch: int = 64
    """Rows of a step."""
    algorithm: SFT = field(default_factory=SFT)
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=2e-3, warmup_steps=20))


@dataclass(frozen=True)
class ValueStage:
    """Values of the agent's tokens, which guide the clone."""

    steps: int = 2000
    """Optimiser steps."""
    batch: int = 64
    """Rows of a step."""
    betas: tuple[float, ...] = (1.0, 4.0, 16.0)
    """Nats per unit of reward, each a policy: the clone's log-probability + beta (min Q - V)."""
    min_p: float = 0.1
    """Tokens that the clone gives less than so many times its largest probability are never said."""
    scale: float = 1.0
    """Of the initial values; 0 starts all of them at `bias`."""
    bias: float = 0.0
    """The value that all tokens begin with, in units of reward."""
    algorithm: ILQL = field(default_factory=lambda: ILQL(policy_coefficient=None))
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1e-3, warmup_steps=20))


@dataclass(frozen=True)
class SoftStage:
    """Soft Q-learning of the policy itself, from the clone and towards the optimum under a KL to it."""

    steps: int = 2000
    """Optimiser steps."""
    batch: int = 64
    """Rows of a step."""
    algorithm: SoftQ = field(default_factory=lambda: SoftQ(beta=0.25, polyak=0.02))
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=1e-3, warmup_steps=20))


@dataclass(frozen=True)
class Play:
    """How policies are tried out."""

    points: int = 10
    """Points of the learning curves, about."""
    games: int = 64
    """Games at each of them."""
    final_games: int = 512
    """Games of each policy at the end; the same worlds for all."""
