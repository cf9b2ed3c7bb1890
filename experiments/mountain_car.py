"""A table and PQN on MountainCar, several seeds at once."""

from dataclasses import dataclass, field

from rlhfjax.config import PQN, ControlDQN, ControlPPO, ControlPQN, ControlTabular, TabularQ

DESCRIPTION = "a table and PQN drive a weak car up a hill: curves, steps to solve, a game"


@dataclass(frozen=True)
class Config:
    algorithms: str = "tabular,pqn"
    """Which to run, comma-separated: tabular, ppo, pqn, dqn. Without a reward on the way, PPO and DQN seldom see the
    hill in a run of this length."""
    seeds: int = 4
    """Independent runs of each, trained together."""
    points: int = 20
    """Points of the curves, about; at each the greedy policy is evaluated."""
    episodes: int = 32
    """Whole episodes of each seed in such an evaluation."""
    final_episodes: int = 128
    """Whole episodes of each seed in the last one."""
    solved: float = -110.0
    """Mean return from which on it counts as solved, as Gymnasium has it."""
    bins: tuple[int, int] = (30, 30)
    """Of position and velocity, as the table sees them."""
    tabular: ControlTabular = field(
        default_factory=lambda: ControlTabular(
            environment_steps=4_000_000,
            exploring_starts=False,
            epsilon_start=0.02,
            epsilon_end=0.0,
            epsilon_fraction=1.0,
            algorithm=TabularQ(
                method="sarsa", discount=1.0, step_size=0.5, decay_power=0.6, decay_visits=50.0
            ),
        )
    )
    """Its values start at 0, above any that is true, and so every place is tried."""
    ppo: ControlPPO = field(default_factory=ControlPPO)
    pqn: ControlPQN = field(
        default_factory=lambda: ControlPQN(
            environment_steps=500_000,
            epsilon_end=0.02,
            algorithm=PQN(discount=0.99, lam=0.9, epochs=4, minibatches=8),
        )
    )
    dqn: ControlDQN = field(default_factory=lambda: ControlDQN(environment_steps=200_000))


LOW, HIGH = (-1.2, -0.07), (0.6, 0.07)  # position and velocity


def plan(config: Config, mesh) -> list:
    """The programs of all methods, as shapes."""
    from experiments.stages.control_compare import make_jobs
    from experiments.stages.control_programs import programs_of_jobs

    env, seen = _worlds(config)
    return programs_of_jobs(make_jobs(env, config, mesh, seen=seen), most_steps=200)


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    from experiments.stages.control_compare import compare
    from experiments.stages.control_scenes import MOUNTAIN_CAR, of_scaled

    env, seen = _worlds(config)
    text = "Networks see position and velocity between -1 and 1; the table sees which cell of a grid they lie in."
    return compare(
        "MountainCar",
        env,
        config,
        folder,
        most_steps=200,
        solved=config.solved,
        scene=of_scaled(MOUNTAIN_CAR, LOW, HIGH),
        seen=seen,
        text=text,
    )


def _worlds(config: Config):
    """The world as networks see it; world and drawing as the table sees it, by name."""
    from experiments.stages.control_scenes import MOUNTAIN_CAR, of_binned
    from experiments.stages.control_worlds import binned, scaled
    from rlhfjax.environments import mountain_car

    env = mountain_car()
    of_table = binned(env, LOW, HIGH, config.bins), of_binned(MOUNTAIN_CAR, LOW, HIGH, config.bins)
    return scaled(env, LOW, HIGH), {"tabular": of_table}
