"""The double-T maze in words: cloning and Q-learning over tokens, against the exact optimum."""

from dataclasses import dataclass, field

from experiments.stages.game_configs import CloneStage, Learning, ValueStage, value_stage

DESCRIPTION = "a maze in words, learnt from bad players: ILQL against cloning and the exact optimum"


@dataclass(frozen=True)
class Config(Learning):
    games: int = 2000
    random: float = 0.85
    """Share of random moves in the games to learn from; the others are the best ones."""
    observed: str = "position"
    """What the agent is told: its position, or only which walls are beside it ("walls")."""
    turns: int = 100
    """Until a game is cut short."""
    memory: int | None = 1
    """Turns that attention reaches back over; None: all. One is enough where the position is told."""
    piece: int | None = 8
    """Turns of a row that is trained on; None: whole games."""
    clone: CloneStage = field(default_factory=lambda: CloneStage(steps=600))
    ilql: ValueStage = field(
        default_factory=lambda: value_stage(
            "value", discount=0.99, expectile=0.8, polyak=0.2, betas=(1.0, 16.0, 4.0), steps=4000
        )
    )
    monte_carlo: ValueStage = field(
        default_factory=lambda: value_stage("returns", discount=0.99, betas=(4.0, 16.0), steps=1000, batch=64)
    )
    dqn: ValueStage = field(
        default_factory=lambda: value_stage("max", discount=0.99, polyak=0.02, betas=(4.0, 16.0), steps=2000)
    )


def plan(config: Config, mesh) -> list:
    """The programs of all stages, as shapes."""
    from experiments.stages.game_programs import programs_of_games

    return programs_of_games(config, _task(config), mesh)


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    import numpy as np

    from experiments.stages.game_report import solve
    from rlhfjax.environments.grid import optimal_values
    from rlhfjax.environments.text import maze_player, maze_score, maze_table

    task = _task(config)
    best_SA = np.eye(4)[np.argmax(optimal_values(maze_table(), discount=1.0)[1], axis=1)]
    uniform = maze_score(np.full(best_SA.shape, 0.25), turns=config.turns)
    return solve(
        "The double-T maze in words",
        config,
        task,
        folder,
        optimum=maze_score(best_SA, turns=config.turns),
        players={"random moves": maze_player(task.world, random=1.0)},
        text=f"Of the uniform player the exact score is {uniform:.4g}.",
    )


def _task(config: Config):
    """The maze, and who played the games to learn from."""
    from experiments.stages.games import Task
    from rlhfjax.environments.text import maze_player, maze_world

    world = maze_world(observed=config.observed, turns=config.turns)
    return Task(world, maze_player(world, random=config.random), config.memory, config.piece)
