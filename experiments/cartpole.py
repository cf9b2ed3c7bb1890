"""PPO, PQN and DQN on CartPole, several seeds at once."""

from dataclasses import dataclass, field

from rlhfjax.config import ControlDQN, ControlPPO, ControlPQN

DESCRIPTION = "PPO, PQN and DQN keep a pole upright: curves, steps to solve, a game"


@dataclass(frozen=True)
class Config:
    algorithms: str = "ppo,pqn,dqn"
    """Which to run, comma-separated."""
    seeds: int = 8
    """Independent runs of each, trained together."""
    points: int = 20
    """Points of the curves, about; at each the greedy policy is evaluated."""
    episodes: int = 16
    """Whole episodes of each seed in such an evaluation."""
    final_episodes: int = 64
    """Whole episodes of each seed in the last one."""
    solved: float = 475.0
    """Mean return from which on it counts as solved; 500 is the best there is."""
    ppo: ControlPPO = field(default_factory=ControlPPO)
    pqn: ControlPQN = field(default_factory=ControlPQN)
    dqn: ControlDQN = field(default_factory=ControlDQN)


def plan(config: Config, mesh) -> list:
    """The programs of all methods, as shapes."""
    from experiments.stages.control_compare import make_jobs
    from experiments.stages.control_programs import programs_of_jobs
    from rlhfjax.environments import cart_pole

    return programs_of_jobs(make_jobs(cart_pole(), config, mesh), most_steps=500)


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    from experiments.stages import control_scenes
    from experiments.stages.control_compare import compare
    from rlhfjax.environments import cart_pole

    return compare(
        "CartPole",
        cart_pole(),
        config,
        folder,
        most_steps=500,
        solved=config.solved,
        scene=control_scenes.CART_POLE,
    )
