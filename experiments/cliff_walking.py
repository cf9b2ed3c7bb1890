"""Tabular Q-learning and its relatives on CliffWalking, against the optimum computed from its table."""

from dataclasses import dataclass, field

from rlhfjax.config import ControlTabular, TabularQ

DESCRIPTION = "tabular Q-learning and its relatives on CliffWalking, against the exact optimum"


@dataclass(frozen=True)
class Config:
    algorithms: str = "q_learning,sarsa,expected_sarsa,double_q,q_lambda"
    """Which methods to run, comma-separated."""
    seeds: int = 8
    """Independent runs of each, trained together."""
    points: int = 20
    """Points of the curves, about."""
    episodes: int = 8
    """Whole episodes of each seed that are played greedily at each point."""
    final_episodes: int = 8
    """Whole episodes of each seed at the end."""
    slippery: bool = False
    """Whether a move goes its way with probability 1/3 only, and to either side otherwise."""
    limit: int = 100
    """Steps until an episode is truncated; Gymnasium's has no such limit, and a greedy policy may walk for ever."""
    training: ControlTabular = field(
        default_factory=lambda: ControlTabular(
            environment_steps=200_000, algorithm=TabularQ(discount=1.0, step_size=0.5)
        )
    )
    """Its method is that of `algorithms`; q_lambda acts in one world, for as many steps. With an epsilon_end of 0.1,
    sarsa learns the safe path along the upper rim, which is best for one who stumbles that often."""


def plan(config: Config, mesh) -> list:
    """The programs of all methods, as shapes."""
    from experiments.stages.control_programs import programs_of_jobs
    from experiments.stages.control_tables import EXACT, make_jobs
    from rlhfjax.environments import cliff_walking

    env = cliff_walking(slippery=config.slippery, limit=config.limit)
    return programs_of_jobs(make_jobs(env, config, mesh), most_steps=config.limit, on_host=EXACT)


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    from experiments.stages.control_tables import Map, solve
    from rlhfjax.environments import cliff_walking

    env = cliff_walking(slippery=config.slippery, limit=config.limit)
    drawn = Map(("." * 12, "." * 12, "." * 12, "S" + "C" * 10 + "G"), "↑→↓←")
    return solve("CliffWalking", env, drawn, config, folder, most_steps=config.limit)
