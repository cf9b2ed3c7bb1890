"""The star graph: a clone takes the shortcut, any path; values may tell which one leads to the goal."""

from dataclasses import dataclass, field

from experiments.stages.game_configs import CloneStage, Learning, ValueStage, sarsa_values, value_stage

DESCRIPTION = (
    "the star graph, where a clone takes any path: do Monte-Carlo values and ILQL find the right one?"
)


@dataclass(frozen=True)
class Config(Learning):
    games: int = 20_000
    smart: float = 0.0
    """Share of games to learn from in which the right path is named; in the others any path is."""
    paths: int = 2
    """Paths from the start."""
    length: int = 2
    """Nodes of a path after the start."""
    nodes: int = 8
    """Numbers that nodes may have."""
    best_fraction: float = 0.4
    """Share of the games that are cloned by `best`; about 1 / paths of them are right."""
    best: CloneStage = field(default_factory=lambda: CloneStage(steps=1000, batch=32))
    """From the clone."""
    ilql: ValueStage = field(default_factory=lambda: sarsa_values(betas=(8.0, 32.0)))
    monte_carlo: ValueStage = field(
        default_factory=lambda: value_stage("returns", betas=(8.0, 32.0), steps=2000)
    )
    dqn: ValueStage = field(default_factory=lambda: value_stage("max", polyak=0.1, betas=(8.0, 32.0)))


def plan(config: Config, mesh) -> list:
    """The programs of all stages, as shapes."""
    from experiments.stages.game_programs import programs_of_games

    return programs_of_games(config, _task(config), mesh)


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    from experiments.stages.game_report import solve
    from rlhfjax.environments.text import star_graph_player

    task = _task(config)
    return solve(
        f"Star graphs of {config.paths} paths of {config.length}",
        config,
        task,
        folder,
        optimum=1.0,
        players={"any path": star_graph_player(task.world, smart=0.0)},
        text="A game scores 1 if the path that is named leads to the goal.",
    )


def _task(config: Config):
    """The graphs, and who played the games to learn from."""
    from experiments.stages.games import Task
    from rlhfjax.environments.text import star_graph_player, star_graph_world

    world = star_graph_world(paths=config.paths, length=config.length, nodes=config.nodes)
    return Task(world, star_graph_player(world, smart=config.smart))
