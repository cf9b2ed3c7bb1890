"""Environments: worlds to act in, as pure functions.

`enumerable` is a language model small enough that nothing about it has to be estimated. `classic` and `grid`
are small worlds, `text` are worlds in words, `rollout` acts in many at once, `replay` keeps what happened, and
`adapters` speaks to gymnax and Gymnasium.
"""

from rlhfjax.environments import adapters, classic, enumerable, grid, replay, text
from rlhfjax.environments.adapters import from_gymnax, rollout_on_host, start_on_host, to_gymnasium
from rlhfjax.environments.classic import acrobot, bandit, cart_pole, mountain_car
from rlhfjax.environments.enumerable import Sequences
from rlhfjax.environments.environment import (
    Environment,
    autoreset,
    checked,
    one_hot,
    record_episodes,
    time_limit,
)
from rlhfjax.environments.grid import Table, catch, cliff_walking, frozen_lake, table_world
from rlhfjax.environments.rollout import Episodes, Trajectory, Worlds, batch_first, play, rollout, start
from rlhfjax.environments.text import (
    Conversation,
    TextWorld,
    Utterance,
    converse,
    maze_world,
    star_graph_world,
    twenty_questions_world,
    wordle_world,
)

__all__ = [
    "Conversation",
    "Environment",
    "Episodes",
    "Sequences",
    "Table",
    "TextWorld",
    "Trajectory",
    "Utterance",
    "Worlds",
    "acrobot",
    "adapters",
    "autoreset",
    "bandit",
    "batch_first",
    "cart_pole",
    "catch",
    "checked",
    "classic",
    "cliff_walking",
    "converse",
    "enumerable",
    "from_gymnax",
    "frozen_lake",
    "grid",
    "maze_world",
    "mountain_car",
    "one_hot",
    "play",
    "record_episodes",
    "replay",
    "rollout",
    "rollout_on_host",
    "star_graph_world",
    "start",
    "start_on_host",
    "table_world",
    "text",
    "time_limit",
    "to_gymnasium",
    "twenty_questions_world",
    "wordle_world",
]
