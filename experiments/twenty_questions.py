"""Twenty questions, answered from a table: cloning and Q-learning over tokens, from players who ask what comes."""

from dataclasses import dataclass, field

from experiments.stages.game_configs import CloneStage, Learning, ValueStage, sarsa_values, value_stage
from rlhfjax.config import Optimizer

DESCRIPTION = "twenty questions with a symbolic oracle, learnt from middling players: ILQL against cloning"


@dataclass(frozen=True)
class Config(Learning):
    smart: float = 0.5
    """Share of questions in the games that split what is possible best; the others are any."""
    things: int = 16
    """Things that may be thought of."""
    turns: int = 20
    """Questions of a game."""
    memory: int | None = None
    """Turns that attention reaches back over; None: all."""
    clone: CloneStage = field(
        default_factory=lambda: CloneStage(
            steps=2000, optimizer=Optimizer(learning_rate=2e-3, warmup_steps=50)
        )
    )
    ilql: ValueStage = field(default_factory=lambda: sarsa_values(betas=(2.0, 8.0), steps=600))
    monte_carlo: ValueStage = field(
        default_factory=lambda: value_stage("returns", betas=(2.0, 8.0), steps=500)
    )


def plan(config: Config, mesh) -> list:
    """The programs of all stages, as shapes."""
    from experiments.stages.game_programs import programs_of_games

    return programs_of_games(config, _task(config), mesh)


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    from experiments.stages.game_report import known_or_none, solve
    from rlhfjax.environments.text import twenty_questions_optimum, twenty_questions_player

    task = _task(config)
    world = task.world
    return solve(
        f"Twenty questions about {config.things} things",
        config,
        task,
        folder,
        optimum=known_or_none(twenty_questions_optimum, world),
        players={
            "asks at random": twenty_questions_player(world, smart=0.0),
            "always asks well": twenty_questions_player(world, smart=1.0),
        },
        text="A game scores minus its questions, but for the one that names the thing.",
    )


def _task(config: Config):
    """The game, and who played the games to learn from."""
    from experiments.stages.games import Task
    from rlhfjax.environments.text import (
        everyday_things,
        twenty_questions_player,
        twenty_questions_world,
    )

    world = twenty_questions_world(everyday_things(config.things), turns=config.turns)
    return Task(world, twenty_questions_player(world, smart=config.smart), config.memory)
