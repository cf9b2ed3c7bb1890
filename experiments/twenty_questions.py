"""Twenty questions, answered from a table: cloning and Q-learning over tokens, from players who ask what comes."""

from dataclasses import dataclass

from experiments.stages.game_configs import Learning

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
        Task(world, twenty_questions_player(world, smart=config.smart), config.memory),
        folder,
        optimum=known_or_none(twenty_questions_optimum, world),
        players={
            "asks at random": twenty_questions_player(world, smart=0.0),
            "always asks well": twenty_questions_player(world, smart=1.0),
        },
        text="A game scores minus its questions, but for the one that names the thing.",
    )
