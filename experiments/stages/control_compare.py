"""Several methods in one world, in one run."""

from collections.abc import Mapping
from typing import Any

from experiments.stages import control
from experiments.stages.control_layout import lay_out
from experiments.stages.control_report import report
from experiments.stages.control_scenes import Scene
from rlhfjax.environments import Environment
from rlhfjax.mesh import Devices, make_mesh
from rlhfjax.run_folder import RunFolder


def compare(
    title: str,
    env: Environment,
    config: Any,
    folder: RunFolder,
    *,
    most_steps: int,
    solved: float,
    scene: Scene | None = None,
    seen: Mapping[str, tuple[Environment, Scene]] | None = None,
    text: str = "",
) -> dict[str, float]:
    """Runs the methods that `config.algorithms` names, each by the section of its name; returns summary.json.

    Args:
      title, text: of the report, and its first words.
      env, scene: the world and how it is drawn.
      config: `algorithms`, `seeds`, `points`, `episodes`, `final_episodes` and a section for each method.
      most_steps: of an episode that is evaluated.
      solved: mean return from which on it counts as solved.
      folder: the run's; its mesh says how many devices there are.
      seen: world and drawing of single methods, by name, where they see it otherwise.

    Raises:
      ValueError: bad settings, before anything is run.
    """
    jobs = make_jobs(env, config, make_mesh(folder.mesh), seen=seen)
    found = []
    for name, training, its_env, plan, layout in jobs:
        its_scene = seen[name][1] if seen and name in seen else scene
        world = control.World(title, its_env, most_steps, solved, its_scene.draw if its_scene else None)
        outcome, _ = control.run_training(name, training, world, plan, folder, layout=layout)
        found.append((outcome, its_scene))
    return report(f"{title}, {config.seeds} seeds", solved, found, folder, text)


def make_jobs(
    env: Environment,
    config: Any,
    mesh: Devices,
    *,
    seen: Mapping[str, tuple[Environment, Scene]] | None = None,
) -> list[control.Job]:
    """The methods that `config.algorithms` names; the arguments are those of `compare`. ValueError on bad settings."""
    known = [name for name in control.TRAININGS if hasattr(config, name)]
    jobs = []
    for name in control.choose(config.algorithms, known):
        own = getattr(config, name)
        its_env = seen[name][0] if seen and name in seen else env
        plan = control.make_plan(config, own)
        layout = lay_out(mesh, name, config, own)
        jobs.append(
            control.Job(name, control.make_training(name, its_env, own, layout), its_env, plan, layout)
        )
    return jobs
