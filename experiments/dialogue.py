"""A dialogue with a symbolic user: the agent asks, the user answers, success and the number of turns are the reward.

  games of middling players -> a clone of them -> each method from that clone -> the same worlds for all, to compare

Offline methods learn from the games of the players (best, ilql, monte_carlo, soft_q) or from pairs of the clone's
games (dpo); ppo, grpo and rloo play to learn. The optimum is known exactly.
"""

from dataclasses import dataclass
from typing import Literal

from experiments.stages.dialogue_configs import Stages

DESCRIPTION = "a dialogue with a symbolic user (guess who, twenty questions): PPO, GRPO, DPO and Q-learning"


@dataclass(frozen=True)
class Config(Stages):
    world: Literal["guess_who", "twenty_questions"] = "guess_who"
    """What is played."""
    things: int = 16
    """People or things that may be hidden; at most 24 people."""
    attributes: int = 8
    """guess_who: what can be asked, at most 12; in twenty_questions it is always 20."""
    turns: int = 7
    """Of a game."""
    noise: float = 0.0
    """guess_who: probability that the user answers a question wrongly."""
    smart: float = 0.4
    """Share of turns that the players of the data take well."""
    hasty: float = 0.1
    """guess_who: share in which they guess, whatever they know; in the others they ask anything."""


def plan(config: Config, mesh) -> list:
    """The programs of all stages, as shapes."""
    from experiments.stages.dialogue_programs import programs_of_dialogue

    return programs_of_dialogue(config, _task(config), mesh)


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    from experiments.stages.dialogue_report import solve
    from experiments.stages.game_report import known_or_none
    from rlhfjax.environments import text

    task = _task(config)
    optimum, player = (
        (text.guess_who_optimum, text.guess_who_player)
        if config.world == "guess_who"
        else (text.twenty_questions_optimum, text.twenty_questions_player)
    )
    return solve(
        config.world.replace("_", " "),
        config,
        task,
        folder,
        optimum=known_or_none(optimum, task.world),
        players={
            "asks anything": player(task.world, smart=0.0),
            "always asks well": player(task.world, smart=1.0),
        },
        flags=f"--world {config.world}",
    )


def _task(config: Config):
    """The game, and who played the games to learn from. ValueError for a noise where the user cannot err."""
    from experiments.stages.games import Task
    from rlhfjax.environments import text

    if config.world == "guess_who":
        world = text.guess_who_world(
            text.people(config.things, config.attributes), turns=config.turns, noise=config.noise
        )
        return Task(world, text.guess_who_player(world, smart=config.smart, hasty=config.hasty))
    if config.noise:
        raise ValueError(f"noise={config.noise}: only the user of guess_who errs; leave it at 0")
    world = text.twenty_questions_world(text.everyday_things(config.things), turns=config.turns)
    return Task(world, text.twenty_questions_player(world, smart=config.smart))
