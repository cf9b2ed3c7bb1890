"""PPO, PQN and DQN on Acrobot, several seeds at once."""

from dataclasses import dataclass, field

from rlhfjax.config import ControlDQN, ControlPPO, ControlPQN

DESCRIPTION = "PPO, PQN and DQN swing two links up: curves, steps to solve, a game"


@dataclass(frozen=True)
class Config:
    algorithms: str = "ppo,pqn,dqn"
    """Which to run, comma-separated."""
    seeds: int = 4
    """Independent runs of each, trained together."""
    points: int = 20
    """Points of the curves, about; at each the greedy policy is evaluated."""
    episodes: int = 16
    """Whole episodes of each seed in such an evaluation."""
    final_episodes: int = 64
    """Whole episodes of each seed in the last one."""
    solved: float = -100.0
    """Mean return from which on it counts as solved, as Gymnasium has it."""
    ppo: ControlPPO = field(default_factory=lambda: ControlPPO(environment_steps=150_000))
    pqn: ControlPQN = field(default_factory=lambda: ControlPQN(environment_steps=200_000))
    dqn: ControlDQN = field(default_factory=lambda: ControlDQN(environment_steps=80_000))


def plan(config: Config, mesh) -> list:
    """The programs of all methods, as shapes."""
    from experiments.stages.control_compare import make_jobs
    from experiments.stages.control_programs import programs_of_jobs
    from rlhfjax.environments import acrobot

    return programs_of_jobs(make_jobs(acrobot(), config, mesh), most_steps=500)


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    from experiments.stages.control_compare import compare
    from experiments.stages.control_scenes import ACROBOT
    from rlhfjax.environments import acrobot

    return compare("Acrobot", acrobot(), config, folder, most_steps=500, solved=config.solved, scene=ACROBOT)
