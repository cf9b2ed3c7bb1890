"""Text worlds as Gymnasium's environments: strings in, strings out."""

import warnings

import jax
import numpy as np
import pytest

from rlhfjax.environments import (
    maze_world,
    star_graph_world,
    to_gymnasium,
    twenty_questions_world,
    wordle_world,
)
from rlhfjax.environments.text import every_box

gymnasium = pytest.importorskip("gymnasium", minversion="1.1")

ROOM = ("#####", "#  G#", "#####")


def test_the_classic_loop_on_a_text_task():
    """A room of two cells: from either the goal is to the right."""
    env = to_gymnasium(maze_world(ROOM, turns=4))
    observation, info = env.reset(seed=0)
    assert observation in ("You are in row 1, column 1.\n", "You are in row 1, column 2.\n") and info == {}
    turns = 0
    terminated = truncated = False
    while not terminated and not truncated:
        observation, reward, terminated, truncated, info = env.step("move right")
        turns += 1
        assert reward == (0.0 if terminated else -1.0) and isinstance(reward, float)
    assert observation == "You have reached the goal.\n" and turns <= 2 and info["success"]
    assert env.observation_space.contains(observation)
    with pytest.raises(ValueError, match="call reset"):
        env.step("move right")
    seen = {env.reset()[0] for _ in range(20)}
    assert len(seen) == 2  # without a seed it goes on


def test_time_limits_and_words_that_are_not_understood():
    env = to_gymnasium(maze_world(ROOM, turns=2))
    first, _ = env.reset(seed=1)
    for turn, text in enumerate(["move", " up down"], 1):
        observation, reward, terminated, truncated, info = env.step(text)
        assert (observation, reward, terminated, truncated) == (first, -4.0, False, turn == 2)
        assert not info["success"]


def test_the_stop_token_may_be_said_or_left_out():
    env = to_gymnasium(wordle_world(("ab", "ba"), tries=3))
    answers = []
    for text in ("ab", "ab\n"):
        assert env.reset(seed=3)[0] == "Guess a word of 2 letters.\n"
        answers.append(env.step(text)[:3])
    assert answers[0] == answers[1] and answers[0][0] in ("!!\n", "??\n")


@pytest.mark.parametrize(
    "action, message",
    [
        ("move north", "' north' at character 4"),
        ("walk", "'walk' at character 0"),
        (2, "told strings, got int"),
        (None, "told strings, got NoneType"),
        ("move up up", "4 tokens with the stop token; this world listens to 3"),
    ],
)
def test_bad_words_are_named(action, message):
    env = to_gymnasium(maze_world(ROOM))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)
    assert not env.action_space.contains(action)


def test_the_spaces_hold_what_can_be_said():
    world = twenty_questions_world(every_box(2))
    env = to_gymnasium(world)
    assert env.action_space.contains("Is it big") and env.action_space.contains("Is it big?\n")
    assert not env.action_space.contains("Is it big red") and not env.action_space.contains("big")
    env.action_space.seed(0)
    samples = {env.action_space.sample() for _ in range(50)}
    assert len(samples) > 10 and all(env.action_space.contains(text) for text in samples)
    for text in sorted(samples):
        env.reset(seed=0)
        assert env.observation_space.contains(env.step(text)[0])
    with pytest.raises(ValueError, match="without a mask"):
        env.action_space.sample(mask=(None, None))
    with pytest.raises(ValueError, match="answers in strings"):
        to_gymnasium(world, to_host=np.asarray)


def test_gymnasiums_checker_is_content():
    from gymnasium.utils.env_checker import check_env

    for world in (maze_world(ROOM), star_graph_world(paths=2, length=2, nodes=6)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*(render|spec).*")
            check_env(to_gymnasium(world), skip_render_check=True)


def test_parameters_go_through():
    world = maze_world(ROOM)
    env = to_gymnasium(world, world.env.params._replace(step=-7.0))
    env.reset(seed=0)
    assert env.step("move up")[1] == -7.0
    assert jax.tree.leaves(world.env.params)
