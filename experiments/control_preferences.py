"""Control from preferences on CartPole and on a grid world, beside the true reward."""

from dataclasses import dataclass, field

from rlhfjax.config import ControlPreferences, Labeller

DESCRIPTION = "control from preferences: a reward learnt from compared segments, against number of labels"


@dataclass(frozen=True)
class Config:
    env: str = "cartpole"
    """cartpole; or grid: FrozenLake of 4 x 4."""
    seeds: int = 4
    """Independent runs of each row of the table; all of them are trained in one program."""
    labels: str = "0,25,100,400,1200"
    """Numbers of labels, comma-separated: queries by disagreement, a labeller who never errs."""
    random_labels: str = "25,100,400"
    """The same with queries at random; empty: none."""
    noisy_labels: str = "100,400"
    """The same with queries by disagreement and the labeller `noise`; empty: none."""
    noise: Labeller = Labeller(temperature=1.0, random=0.2)
    """Who errs."""
    episodes: int = 32
    """Whole greedy episodes of each seed at the end, the same worlds for all rows."""
    success: float = 0.8
    """grid: probability that a move goes its way; otherwise it goes to either side, each equally often."""
    training: ControlPreferences = field(default_factory=ControlPreferences)
    """Its `labels`, `capacity`, `random_queries` and `labeller` are set by the above. `training.ppo` is that of the
    true reward as well."""


def plan(config: Config, mesh) -> list:
    """The programs of all stages, as shapes."""
    from experiments.stages.control_preferences import make_study, programs_of_study

    return programs_of_study(make_study(config, mesh))


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    from experiments.stages.control_preferences import make_study, run_study
    from experiments.stages.control_preferences_report import report
    from rlhfjax.mesh import make_mesh

    study = make_study(config, make_mesh(folder.mesh))
    return report(study, run_study(study, folder), folder)
