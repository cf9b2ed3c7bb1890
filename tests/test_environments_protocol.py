"""The protocol: its checks, time limits, autoreset and the wrappers, on a counter whose every number is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from rlhfjax.environments import (
    Environment,
    autoreset,
    cart_pole,
    checked,
    one_hot,
    record_episodes,
    time_limit,
)


def counter(end: int = 3) -> Environment:
    """Counts from 10: observation = state, action 0 or 1 is added to 1; terminates at 10 + end or above."""

    def reset(key, params):
        return jnp.int32(10), jnp.int32(10)

    def step(key, state, action, params):
        state = state + 1 + action
        return state, state, state.astype(jnp.float32), state >= 10 + end, jnp.bool_(False), {"state": state}

    return Environment(reset, step, 2, (), 20)


def walk(env: Environment, actions) -> list[tuple]:
    """Steps through in Python; every row as plain numbers."""
    key = jax.random.key(0)
    _, state = env.reset(key, env.params)
    rows = []
    for action in actions:
        key, key_step = jax.random.split(key)
        observation, state, reward, terminated, truncated, info = env.step(
            key_step, state, action, env.params
        )
        rows.append((int(observation), float(reward), bool(terminated), bool(truncated), info))
    return rows


def test_autoreset_gives_the_next_episode_and_keeps_the_final_observation():
    rows = walk(autoreset(counter()), [0, 0, 0, 1, 1])
    assert [row[0] for row in rows] == [11, 12, 10, 12, 10]
    assert [row[1] for row in rows] == [
        11,
        12,
        13,
        12,
        14,
    ]  # the reward is that of the action, not of the reset
    assert [row[2] for row in rows] == [False, False, True, False, True]
    assert [int(row[4]["final_observation"]) for row in rows] == [11, 12, 13, 12, 14]
    assert [int(row[4]["state"]) for row in rows] == [11, 12, 13, 12, 14]


def test_a_time_limit_truncates_at_its_step_and_starts_anew():
    rows = walk(autoreset(time_limit(counter(), 2)), [0, 0, 0, 0, 0])
    assert [row[0] for row in rows] == [11, 10, 11, 10, 11]
    assert [row[2] for row in rows] == [False] * 5
    assert [row[3] for row in rows] == [False, True, False, True, False]
    assert [int(row[4]["final_observation"]) for row in rows] == [11, 12, 11, 12, 11]


def test_an_episode_may_terminate_at_its_limit():
    rows = walk(time_limit(counter(), 3), [0, 0, 0])
    assert [row[2:4] for row in rows] == [(False, False), (False, False), (True, True)]


def test_no_limit_is_the_same_world():
    env = counter()
    assert time_limit(env, None) is env
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        time_limit(env, 0)


def test_autoreset_twice_is_autoreset_once():
    env = autoreset(counter())
    assert autoreset(env) is env


def test_the_next_episode_starts_from_a_key_of_its_own():
    env = autoreset(time_limit(cart_pole(None), 1))
    _, state = env.reset(jax.random.key(0), env.params)
    first, _, *_, info = env.step(jax.random.key(1), state, 0, env.params)
    second = env.step(jax.random.key(2), state, 0, env.params)[0]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, info["final_observation"])


def test_one_hot_also_of_the_final_observation():
    env = autoreset(one_hot(counter()))
    assert env.observation_shape == (20,) and env.num_observations is None
    _, state = env.reset(jax.random.key(0), ())
    for _ in range(3):
        observation, state, *_, info = env.step(jax.random.key(0), state, 0, ())
    assert observation.dtype == jnp.float32
    assert np.argmax(observation) == 10 and np.sum(observation) == 1
    assert np.argmax(info["final_observation"]) == 13


def test_recorded_episodes():
    rows = walk(record_episodes(autoreset(counter())), [0, 0, 0, 1, 1, 0])
    assert [float(row[4]["episode_return"]) for row in rows] == [11, 23, 36, 12, 26, 11]
    assert [int(row[4]["episode_length"]) for row in rows] == [1, 2, 3, 1, 2, 1]


def test_wrappers_in_the_wrong_order_are_refused():
    env = autoreset(counter())
    with pytest.raises(ValueError, match="time_limit goes inside of autoreset"):
        time_limit(env, 3)
    with pytest.raises(ValueError, match="one_hot goes inside of autoreset"):
        one_hot(env)
    with pytest.raises(ValueError, match="outside of autoreset"):
        record_episodes(counter())
    with pytest.raises(ValueError, match="num_observations is None"):
        one_hot(cart_pole())


@pytest.mark.parametrize("action", [-1, 2, 100])
def test_an_action_outside_the_space(action):
    env = autoreset(counter())
    _, state = env.reset(jax.random.key(0), ())
    with pytest.raises(ValueError, match=f"action {action} lies outside the space: 0 to 1"):
        env.step(jax.random.key(0), state, action, ())
    # Traced it cannot raise: the reward is NaN, and a checked program names the action.
    reward = jax.jit(env.step)(jax.random.key(0), state, action, ())[2]
    assert np.isnan(reward)
    error, _ = checkify.checkify(jax.jit(env.step), errors=checkify.user_checks)(
        jax.random.key(0), state, jnp.int32(action), ()
    )
    assert f"action {action} lies outside 0 to 1" in (error.get() or "")


@pytest.mark.parametrize("action", [0, 1])
def test_an_action_inside_the_space_is_no_error(action):
    env = checked(counter())
    checked_step = checkify.checkify(jax.jit(env.step), errors=checkify.user_checks)
    error, out = checked_step(jax.random.key(0), jnp.int32(10), jnp.int32(action), ())
    assert error.get() is None and float(out[2]) == 11 + action


def test_an_action_of_another_kind():
    env = checked(counter())
    for action in (0.5, jnp.zeros(())):
        with pytest.raises(TypeError, match="integer"):
            env.step(jax.random.key(0), jnp.int32(10), action, ())
    with pytest.raises(TypeError, match=r"one integer from 0 to 1, got int32\[4\]; .*vmap"):
        jax.eval_shape(env.step, jax.random.key(0), jnp.int32(10), jnp.zeros(4, jnp.int32), ())


WRONG = {
    "five values": (lambda o: (o[0], o[1], o[2], o[3] | o[4], o[5]), ValueError, "got 5 values; five values are"),
    "four values": (lambda o: o[:4], ValueError, r"terminated, truncated, info\), got 4 values(?!;)"),
    "a list": (list, ValueError, "got list"),
    "reward of integers": (lambda o: (*o[:2], jnp.int32(1), *o[3:]), TypeError, "reward as one floating"),
    "reward of a batch": (lambda o: (*o[:2], jnp.ones(2), *o[3:]), TypeError, r"got float32\[2\]"),
    "terminated in numbers": (lambda o: (*o[:3], jnp.float32(0), *o[4:]), TypeError, "terminated as one bool"),
    "truncated in numbers": (lambda o: (*o[:4], jnp.int32(0), o[5]), TypeError, "truncated as one bool"),
    "info": (lambda o: (*o[:5], None), TypeError, "info as a dict, got NoneType"),
    "observation": (lambda o: (jnp.zeros(3), *o[1:]), ValueError, r"observation of shape \(3,\)"),
    "state type": (lambda o: (o[0], o[1].astype(jnp.float32), *o[2:]), TypeError, r"from int32\[\] into float32"),
    "state tree": (lambda o: (o[0], (o[1], o[1]), *o[2:]), TypeError, "structure"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_environment_against_the_protocol(name):
    change, error, message = WRONG[name]
    env = counter()
    wrong = env._replace(step=lambda *args: change(env.step(*args)))
    for make in (checked, autoreset):
        with pytest.raises(error, match=message):
            jax.eval_shape(make(wrong).step, jax.random.key(0), jnp.int32(10), jnp.int32(0), ())


def test_a_reset_against_the_protocol():
    env = counter()
    with pytest.raises(ValueError, match=r"reset must return \(observation, state\), got 3 values"):
        checked(env._replace(reset=lambda key, params: (1, 2, 3))).reset(jax.random.key(0), ())
    with pytest.raises(ValueError, match=r"reset returned an observation of shape \(2,\)"):
        checked(env._replace(reset=lambda key, params: (jnp.zeros(2), 0))).reset(jax.random.key(0), ())
