"""PPO, PQN and DQN on Catch, several seeds at once."""

from dataclasses import dataclass, field

from rlhfjax.config import ControlDQN, ControlPPO, ControlPQN

DESCRIPTION = "PPO, PQN and DQN catch a falling ball: curves, steps to solve, a game"


@dataclass(frozen=True)
class Config:
    algorithms: str = "ppo,pqn,dqn"
    """Which to run, comma-separated."""
    seeds: int = 8
    """Independent runs of each, trained together."""
    points: int = 20
    """Points of the curves, about; at each the greedy policy is evaluated."""
    episodes: int = 64
    """Whole episodes of each seed in such an evaluation."""
    final_episodes: int = 256
    """Whole episodes of each seed in the last one."""
    rows: int = 10
    """Rows that the ball falls through."""
    columns: int = 5
    """Columns that it may fall in."""
    solved: float = 0.99
    """Mean return from which on it counts as solved; 1 is the best there is."""
    ppo: ControlPPO = field(default_factory=lambda: ControlPPO(environment_steps=60_000))
    pqn: ControlPQN = field(default_factory=lambda: ControlPQN(environment_steps=60_000, epsilon_end=0.0))
    dqn: ControlDQN = field(default_factory=lambda: ControlDQN(environment_steps=20_000, epsilon_end=0.0))


def plan(config: Config, mesh) -> list:
    """The programs of all methods, as shapes."""
    from experiments.stages.control_compare import make_jobs
    from experiments.stages.control_programs import programs_of_jobs
    from rlhfjax.environments import catch

    return programs_of_jobs(
        make_jobs(catch(config.rows, config.columns), config, mesh), most_steps=config.rows
    )


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    from experiments.stages.control_compare import compare
    from experiments.stages.control_scenes import catch_scene
    from rlhfjax.environments import catch

    env = catch(config.rows, config.columns)
    scene = catch_scene(config.rows, config.columns)
    return compare("Catch", env, config, folder, most_steps=config.rows, solved=config.solved, scene=scene)
