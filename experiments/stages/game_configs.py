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


def value_stage(
    bootstrap: str,
    *,
    betas: tuple[float, ...],
    polyak: float = 1.0,
    discount: float = 1.0,
    expectile: float | None = None,
    lam: float = 0.0,
    steps: int = 1500,
    batch: int = 32,
) -> ValueStage:
    """Values of a frozen clone: ILQL's ("value", "sarsa"), those of returns ("returns") or DQN's ("max")."""
    algorithm = ILQL(
        bootstrap, discount=discount, lam=lam, expectile=expectile, polyak=polyak, policy_coefficient=None
    )
    return ValueStage(steps=steps, batch=batch, betas=betas, algorithm=algorithm)


def sarsa_values(*, betas: tuple[float, ...], steps: int = 2000) -> ValueStage:
    """ILQL with SARSA(0.9) targets: one-step ones take many more updates where what happened long ago matters."""
    return value_stage("sarsa", lam=0.9, expectile=0.7, polyak=0.2, betas=betas, steps=steps)


@dataclass(frozen=True)
class Learning:
    """What the experiments in worlds of words have in common; each gives its own defaults."""

    algorithms: str = "clone,best,monte_carlo,ilql"
    """Which to run, comma-separated: clone, best, ilql, monte_carlo, dqn, soft_q."""
    games: int = 8000
    """Games to learn from."""
    best_fraction: float = 0.1
    """Share of the games that are cloned by `best`."""
    network: Network = field(default_factory=Network)
    play: Play = field(default_factory=Play)
    clone: CloneStage = field(
        default_factory=lambda: CloneStage(
            steps=3000, batch=64, optimizer=Optimizer(learning_rate=2e-3, warmup_steps=50)
        )
    )
    best: CloneStage = field(default_factory=lambda: CloneStage(steps=100))
    """From the clone: the best games alone are too few to learn the world's language from."""
    ilql: ValueStage = field(default_factory=lambda: sarsa_values(betas=(2.0, 8.0)))
    monte_carlo: ValueStage = field(
        default_factory=lambda: value_stage("returns", betas=(2.0, 8.0), steps=1000)
    )
    dqn: ValueStage = field(default_factory=lambda: value_stage("max", polyak=0.1, betas=(2.0, 8.0)))
    soft_q: SoftStage = field(default_factory=SoftStage)
