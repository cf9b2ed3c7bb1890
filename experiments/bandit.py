"""A table, PPO, PQN and DQN on a bandit of ten arms, several seeds at once."""

from dataclasses import dataclass, field

from rlhfjax.config import PPO, ControlDQN, ControlPPO, ControlPQN, ControlTabular, Optimizer, TabularQ

DESCRIPTION = "a table, PPO, PQN and DQN find the best of ten arms: curves, steps to solve"


@dataclass(frozen=True)
class Config:
    algorithms: str = "tabular,ppo,pqn,dqn"
    """Which to run, comma-separated."""
    seeds: int = 8
    """Independent runs of each, trained together."""
    points: int = 20
    """Points of the curves, about; at each the greedy policy is evaluated."""
    episodes: int = 2_000
    """Pulls of each seed in such an evaluation."""
    final_episodes: int = 10_000
    """Pulls of each seed in the last one."""
    mean: tuple[float, ...] = (0.2, -0.8, 1.5, 0.4, 1.2, -1.4, -0.1, -1.1, 0.8, -0.5)
    """Mean reward of each arm."""
    stddev: float = 1.0
    """Standard deviation of the reward of every arm."""
    margin: float = 0.15
    """It counts as solved within so much of the best arm's mean."""
    tabular: ControlTabular = field(
        default_factory=lambda: ControlTabular(
            environment_steps=10_000,
            steps=5,
            exploring_starts=False,
            epsilon_end=0.02,
            algorithm=TabularQ(step_size=1.0, decay_power=1.0),
        )
    )
    """Step sizes fall as 1 / visits: every value is the mean of what was seen."""
    ppo: ControlPPO = field(
        default_factory=lambda: ControlPPO(
            environment_steps=20_000,
            algorithm=PPO(kl_coefficient=0.0, value_coefficient=0.5, epochs=4, minibatches=4),
        )
    )
    pqn: ControlPQN = field(
        default_factory=lambda: ControlPQN(
            environment_steps=60_000, epsilon_end=0.02, optimizer=Optimizer(learning_rate=3e-4)
        )
    )
    dqn: ControlDQN = field(
        default_factory=lambda: ControlDQN(environment_steps=10_000, optimizer=Optimizer(learning_rate=3e-4))
    )


def plan(config: Config, mesh) -> list:
    """The programs of all methods, as shapes."""
    from experiments.stages.control_compare import make_jobs
    from experiments.stages.control_programs import programs_of_jobs
    from rlhfjax.environments import bandit

    return programs_of_jobs(make_jobs(bandit(config.mean, config.stddev), config, mesh), most_steps=1)


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    from experiments.stages.control_compare import compare
    from rlhfjax.environments import bandit

    env = bandit(config.mean, config.stddev)
    best = max(config.mean)
    return compare(
        f"A bandit of {len(config.mean)} arms",
        env,
        config,
        folder,
        most_steps=1,
        solved=best - config.margin,
        text=f"The best arm, number {config.mean.index(best)}, pays {best:g} in the mean.",
    )
