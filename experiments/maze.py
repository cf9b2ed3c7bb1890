"""The double-T maze in words: cloning and Q-learning over tokens, against the exact optimum."""

from dataclasses import dataclass, field

from experiments.stages.game_configs import CloneStage, Network, Play, SoftStage, ValueStage
from rlhfjax.config import ILQL

DESCRIPTION = "a maze in words, learnt from bad players: ILQL against cloning and the exact optimum"


@dataclass(frozen=True)
class Config:
    algorithms: str = "clone,best,monte_carlo,ilql"
    """Which to run, comma-separated: clone, best, ilql, monte_carlo, dqn, soft_q."""
    games: int = 2000
    """Games to learn from."""
    random: float = 0.85
    """Share of random moves in them; the others are the best ones."""
    observed: str = "position"
    """What the agent is told: its position, or only which walls are beside it ("walls")."""
    turns: int = 100
    """Until a game is cut short."""
    memory: int = 1
    """Turns that attention reaches back over. One is enough where the position is told."""
    piece: int = 8
    """Turns of a row that is trained on; 0: whole games."""
    best_fraction: float = 0.1
    """Share of the games that are cloned by `best`."""
    network: Network = field(default_factory=Network)
    play: Play = field(default_factory=Play)
    clone: CloneStage = field(default_factory=lambda: CloneStage(steps=600))
    best: CloneStage = field(default_factory=lambda: CloneStage(steps=100))
    """From the clone: the best games begin near the goal, and from them alone the rest of the maze is unknown."""
    ilql: ValueStage = field(
        default_factory=lambda: ValueStage(
            steps=4000,
            batch=32,
            betas=(1.0, 16.0, 4.0),
            algorithm=ILQL(discount=0.99, expectile=0.8, polyak=0.2, policy_coefficient=None),
        )
    )
    monte_carlo: ValueStage = field(
        default_factory=lambda: ValueStage(
            steps=1000,
            betas=(4.0, 16.0),
            algorithm=ILQL(
                bootstrap="returns", discount=0.99, expectile=None, policy_coefficient=None, polyak=1.0
            ),
        )
    )
    dqn: ValueStage = field(
        default_factory=lambda: ValueStage(
            betas=(4.0, 16.0),
            algorithm=ILQL(
                bootstrap="max", discount=0.99, expectile=None, polyak=0.02, policy_coefficient=None
            ),
        )
    )
    soft_q: SoftStage = field(default_factory=SoftStage)


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    import numpy as np

    from experiments.stages.game_report import solve
    from experiments.stages.games import Task
    from rlhfjax.environments.grid import optimal_values
    from rlhfjax.environments.text import maze_player, maze_score, maze_table, maze_world

    world = maze_world(observed=config.observed, turns=config.turns)
    best_SA = np.eye(4)[np.argmax(optimal_values(maze_table(), discount=1.0)[1], axis=1)]
    uniform = maze_score(np.full(best_SA.shape, 0.25), turns=config.turns)
    return solve(
        "The double-T maze in words",
        config,
        Task(world, maze_player(world, random=config.random), config.memory or None, config.piece or None),
        folder,
        optimum=maze_score(best_SA, turns=config.turns),
        players={"random moves": maze_player(world, random=1.0)},
        text=f"Of the uniform player the exact score is {uniform:.4g}.",
    )
