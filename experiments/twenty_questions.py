"""Twenty questions, answered from a table: cloning and Q-learning over tokens, from players who ask what comes."""

from dataclasses import dataclass, field

from experiments.stages.game_configs import CloneStage, Network, Play, SoftStage, ValueStage
from rlhfjax.config import ILQL, Optimizer

DESCRIPTION = "twenty questions with a symbolic oracle, learnt from middling players: ILQL against cloning"


@dataclass(frozen=True)
class Config:
    algorithms: str = "clone,best,monte_carlo,ilql"
    """Which to run, comma-separated: clone, best, ilql, monte_carlo, dqn, soft_q."""
    games: int = 8000
    """Games to learn from."""
    smart: float = 0.5
    """Share of questions in them that split what is possible best; the others are any."""
    things: int = 16
    """Things that may be thought of."""
    turns: int = 20
    """Questions of a game."""
    memory: int = 0
    """Turns that attention reaches back over; 0: all."""
    best_fraction: float = 0.1
    """Share of the games that are cloned by `best`."""
    network: Network = field(default_factory=Network)
    play: Play = field(default_factory=Play)
    clone: CloneStage = field(
        default_factory=lambda: CloneStage(
            steps=1500, batch=32, optimizer=Optimizer(learning_rate=3e-3, warmup_steps=50)
        )
    )
    best: CloneStage = field(default_factory=lambda: CloneStage(steps=100))
    """From the clone."""
    ilql: ValueStage = field(
        default_factory=lambda: ValueStage(
            steps=1500,
            batch=32,
            betas=(2.0, 8.0),
            algorithm=ILQL(discount=1.0, expectile=0.8, polyak=0.1, policy_coefficient=None),
        )
    )
    monte_carlo: ValueStage = field(
        default_factory=lambda: ValueStage(
            steps=1000,
            batch=32,
            betas=(2.0, 8.0),
            algorithm=ILQL(
                bootstrap="returns", discount=1.0, expectile=None, policy_coefficient=None, polyak=1.0
            ),
        )
    )
    dqn: ValueStage = field(
        default_factory=lambda: ValueStage(
            betas=(2.0, 8.0),
            algorithm=ILQL(
                bootstrap="max", discount=1.0, expectile=None, polyak=0.1, policy_coefficient=None
            ),
        )
    )
    soft_q: SoftStage = field(default_factory=SoftStage)


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    from experiments.stages.game_report import known_or_none, solve
    from experiments.stages.games import Task
    from rlhfjax.environments.text import (
        everyday_things,
        twenty_questions_optimum,
        twenty_questions_player,
        twenty_questions_world,
    )

    world = twenty_questions_world(everyday_things(config.things), turns=config.turns)
    return solve(
        f"Twenty questions about {config.things} things",
        config,
        Task(world, twenty_questions_player(world, smart=config.smart), config.memory or None),
        folder,
        optimum=known_or_none(twenty_questions_optimum, world),
        players={
            "asks at random": twenty_questions_player(world, smart=0.0),
            "always asks well": twenty_questions_player(world, smart=1.0),
        },
        text="A game scores minus its questions, but for the one that names the thing.",
    )
