"""Tabular Q-learning and its relatives on FrozenLake, against the optimum computed from its table."""

from dataclasses import dataclass, field

from rlhfjax.config import ControlTabular

DESCRIPTION = "tabular Q-learning and its relatives on FrozenLake, against the exact optimum"
LARGE = "8x8"
SMALL = "4x4"


@dataclass(frozen=True)
class Config:
    algorithms: str = "q_learning,sarsa,expected_sarsa,double_q,q_lambda"
    """Which methods to run, comma-separated."""
    seeds: int = 8
    """Independent runs of each, trained together."""
    points: int = 20
    """Points of the curves, about."""
    episodes: int = 64
    """Whole episodes of each seed that are played greedily at each point."""
    final_episodes: int = 256
    """Whole episodes of each seed at the end."""
    lake: str = SMALL
    """4x4, 8x8, or rows of S start, F frozen, H hole, G goal with / between them: SFF/FHF/FFG."""
    slippery: bool = True
    """Whether a move goes its way with probability 1/3 only, and to either side otherwise."""
    limit: int = 100
    """Steps until an episode is truncated."""
    training: ControlTabular = field(default_factory=ControlTabular)
    """Its method is that of `algorithms`; q_lambda acts in one world, for as many steps."""


def plan(config: Config, mesh) -> list:
    """The programs of all methods, as shapes."""
    from experiments.stages.control_programs import programs_of_jobs
    from experiments.stages.control_tables import EXACT, make_jobs
    from rlhfjax.environments import frozen_lake

    env = frozen_lake(_lake(config), slippery=config.slippery, limit=config.limit)
    return programs_of_jobs(make_jobs(env, config, mesh), most_steps=config.limit, on_host=EXACT)


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    from experiments.stages.control_tables import Map, solve
    from rlhfjax.environments import frozen_lake

    layout = _lake(config)
    env = frozen_lake(layout, slippery=config.slippery, limit=config.limit)
    text = "The lake is slippery." if config.slippery else "The lake is not slippery."
    return solve("FrozenLake", env, Map(layout, "←↓→↑"), config, folder, most_steps=config.limit, text=text)


def _lake(config: Config) -> tuple[str, ...]:
    """Its rows of letters."""
    from rlhfjax.environments.grid import LAKE, LARGE_LAKE

    return {SMALL: LAKE, LARGE: LARGE_LAKE}.get(config.lake, tuple(config.lake.split("/")))
