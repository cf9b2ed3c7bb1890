"""gymnax and Gymnasium through the adapters against their own steps; ours through Gymnasium's checker."""

import warnings
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.environments import (
    Environment,
    autoreset,
    cart_pole,
    catch,
    from_gymnax,
    frozen_lake,
    rollout,
    rollout_on_host,
    start,
    start_on_host,
    to_gymnasium,
)

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def gymnasium():
    return pytest.importorskip("gymnasium", minversion="1.1")


@pytest.fixture(scope="module")
def gymnax():
    return pytest.importorskip("gymnax")


def push(observation, key):
    """Falls after about ten steps: always to the right, but for a few."""
    return jax.random.bernoulli(key, 0.9, observation.shape[:1]).astype(jnp.int32), observation.sum(axis=-1)


def follows(trajectory, after) -> np.ndarray:
    """Within an episode the next observation is what was reached; elsewhere it is another."""
    ended = np.logical_or(trajectory.terminated, trajectory.truncated)
    following = np.concatenate([trajectory.observation[1:], after[None]])
    same = np.all(following == trajectory.next_observation, axis=-1)
    np.testing.assert_array_equal(same, ~ended)
    return ended


def test_gymnax_terminates_truncates_and_keeps_final_observations(gymnax):
    """CartPole under a limit of 10 steps, either version: the flags are those of the state reached and of the clock."""
    source, params = gymnax.make("CartPole-v1")
    params = params.replace(max_steps_in_episode=10)
    env = from_gymnax(source, params)
    assert (env.num_actions, env.observation_shape) == (2, (4,))
    worlds = start(env, KEY, 16)
    after, trajectory = jax.jit(partial(rollout, env, push, steps=30))(worlds, jax.random.key(1))
    ended = follows(trajectory, np.asarray(after.observation))
    x, _, angle, _ = np.moveaxis(np.asarray(trajectory.next_observation), -1, 0)
    fell = (np.abs(x) > params.x_threshold) | (np.abs(angle) > params.theta_threshold_radians)
    np.testing.assert_array_equal(trajectory.terminated, fell)
    length = np.zeros(ended.shape, int)
    run = np.zeros(ended.shape[1], int)
    for t in range(len(ended)):
        run += 1
        length[t] = run
        run[ended[t]] = 0
    np.testing.assert_array_equal((trajectory.truncated & ~fell), (length == 10) & ~fell)
    assert fell.any() and (trajectory.truncated & ~fell).any()


def test_gymnax_steps_are_its_own(gymnax):
    source, params = gymnax.make("Catch-bsuite")
    env, ours = from_gymnax(source), catch()
    observation, state = env.reset(KEY, env.params)
    theirs, their_state = source.reset(KEY, params)
    np.testing.assert_array_equal(observation, theirs)
    board, falling = ours.reset(KEY, ())
    falling = falling._replace(ball_column=jnp.int32(jnp.argmax(observation[0])))
    for action in (0, 2, 2, 1, 2, 0, 0, 1, 1):
        observation, state, reward, terminated, *_, info = env.step(KEY, state, action, env.params)
        theirs, their_state, their_reward, *_ = source.step_env(KEY, their_state, action, params)
        # gymnax and bsuite: our own Catch takes the same way to the same end.
        board, falling, our_reward, our_end, *_ = ours.step(KEY, falling, action, ())
        reached = info.get("final_observation", observation)
        np.testing.assert_array_equal(reached, theirs)
        np.testing.assert_array_equal(reached, board)
        assert float(reward) == float(their_reward) == float(our_reward)
        assert bool(terminated) == bool(our_end)
    assert terminated


def test_five_values_are_taken_apart(gymnax):
    """An environment written for the older protocol: counts to 3, or to its limit of 2."""
    from gymnax.environments import environment, spaces

    class Counter(environment.Environment):
        def reset_env(self, key, params):
            return jnp.zeros(1), environment.EnvState(time=jnp.int32(0))

        def step_env(self, key, state, action, params):
            state = state.replace(time=state.time + 1 + action)
            done = (state.time == 3) | (state.time >= params.max_steps_in_episode)
            return state.time[None].astype(jnp.float32), state, 1.0, done, {}

        def step(self, key, state, action, params=None):  # resets, and loses the final observation
            observation, state, reward, done, info = self.step_env(key, state, action, params)
            state = jax.tree.map(lambda x: jnp.where(done, 0, x), state)
            return jnp.where(done, 0, observation), state, reward, done, info

        def action_space(self, params):
            return spaces.Discrete(3)

    env = from_gymnax(Counter(), environment.EnvParams(max_steps_in_episode=2))
    assert env.num_actions == 3 and not env.autoresets

    def chosen(observation, key):
        return jnp.asarray([0, 1, 2]), ()

    _, trajectory = rollout(env, chosen, start(env, KEY, 3), KEY, steps=2)
    assert trajectory.terminated.tolist() == [[False, False, True], [False, False, True]]
    assert trajectory.truncated.tolist() == [[False, True, False], [True, True, False]]
    assert trajectory.next_observation[..., 0].tolist() == [[1, 2, 3], [2, 2, 3]]
    assert trajectory.observation[..., 0].tolist() == [[0, 0, 0], [1, 0, 0]]


def test_an_older_gymnax_environment_that_is_wrapped_is_refused(gymnax):
    source, params = gymnax.make("CartPole-v1")

    def five(key, state, action, params):
        return (*source.step(key, state, action, params)[:4], {})

    wrapped = SimpleNamespace(
        step=five, reset=source.reset, default_params=params, action_space=source.action_space
    )
    with pytest.raises(ValueError, match="wraps an environment of the older gymnax"):
        from_gymnax(wrapped)
    wrapped.step = lambda *args: five(*args)[:3]
    with pytest.raises(ValueError, match="returns 3 values"):
        from_gymnax(wrapped)


def vectorised(gymnasium, count: int = 3, limit: int = 11):
    return gymnasium.make_vec(
        "CartPole-v1",
        num_envs=count,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP},
        max_episode_steps=limit,
    )


def test_host_rollout_of_a_vectorised_environment(gymnasium):
    env = vectorised(gymnasium)
    traces = []

    @jax.jit
    def policy(observation, key):
        traces.append(1)
        return push(observation, key)

    observation = start_on_host(env, seed=0)
    after, trajectory = rollout_on_host(env, policy, observation, KEY, steps=20)
    after, second = rollout_on_host(env, policy, after, jax.random.key(1), steps=60)
    assert len(traces) == 1
    ended = follows(second, after)
    x, _, angle, _ = np.moveaxis(second.next_observation, -1, 0)
    np.testing.assert_array_equal(second.terminated, (np.abs(x) > 2.4) | (np.abs(angle) > 12 * np.pi / 180))
    assert ended.any() and second.terminated.any() and second.truncated.any()
    assert trajectory.observation.shape == (20, 3, 4) and trajectory.reward.dtype == np.float32
    np.testing.assert_allclose(trajectory.extras, trajectory.observation.sum(axis=-1), rtol=1e-5, atol=1e-6)
    # The same actions in environments of one's own.
    env.reset(seed=0)
    for t in range(20):
        wanted, reward, terminated, truncated, _ = env.step(trajectory.action[t])
        following = trajectory.observation[t + 1] if t < 19 else second.observation[0]
        np.testing.assert_array_equal(wanted, following)
        np.testing.assert_array_equal(reward, trajectory.reward[t])
        np.testing.assert_array_equal(terminated, trajectory.terminated[t])
        np.testing.assert_array_equal(truncated, trajectory.truncated[t])


def test_host_rollout_of_a_single_environment(gymnasium):
    env = gymnasium.make("CartPole-v1", max_episode_steps=8)
    observation = start_on_host(env, seed=0)
    after, trajectory = rollout_on_host(env, jax.jit(push), observation, KEY, steps=30)
    assert trajectory.observation.shape == (30, 1, 4) and after.shape == (1, 4)
    assert follows(trajectory, after).any() and trajectory.truncated.any()
    np.testing.assert_array_equal(trajectory.reward, np.ones((30, 1)))


def test_host_rollout_of_continuous_actions(gymnasium):
    env = gymnasium.make("Pendulum-v1")
    observation = start_on_host(env, seed=0)

    def torque(size, observation, key):
        return jnp.full((observation.shape[0], 1), size), ()

    _, trajectory = rollout_on_host(env, partial(torque, 1.5), observation, KEY, steps=2)
    assert trajectory.action.shape == (2, 1, 1)
    with pytest.raises(ValueError, match="lies outside the space Box"):
        rollout_on_host(env, partial(torque, 2.5), observation, KEY, steps=1)


def test_bad_host_environments_and_actions(gymnasium):
    env = gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
    with pytest.raises(ValueError, match="NEXT_STEP.*autoreset_mode"):
        start_on_host(env)
    env = vectorised(gymnasium)
    observation = start_on_host(env, seed=0)
    with pytest.raises(ValueError, match="action 2 lies outside the space: 0 to 1"):
        rollout_on_host(env, lambda o, k: (jnp.asarray([0, 2, 1]), ()), observation, KEY, steps=1)
    with pytest.raises(TypeError, match="actions must be integers from 0 to 1, got float32"):
        rollout_on_host(env, lambda o, k: (jnp.zeros(3), ()), observation, KEY, steps=1)


WORLDS = {
    "lake": frozen_lake,
    "cart_pole": cart_pole,
    "catch": catch,
    "autoreset": lambda: autoreset(frozen_lake(limit=2)),
}


@pytest.mark.parametrize("name", WORLDS)
def test_ours_passes_gymnasiums_checker(gymnasium, name):
    from gymnasium.utils.env_checker import check_env

    env = to_gymnasium(WORLDS[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises bounds, and rendering
        check_env(env, skip_render_check=True)


def test_the_classic_loop(gymnasium):
    """Seeds repeat; the steps are ours; an end asks for a reset and gives the final observation."""
    source = frozen_lake(limit=4)
    for world in (source, autoreset(source)):
        env = to_gymnasium(world)
        episodes = []
        for _ in range(2):
            observation, info = env.reset(seed=7)
            assert observation == 0 and type(observation) is int and info == {}
            seen, ended = [], False
            while not ended:
                observation, reward, terminated, truncated, info = env.step(1)
                ended = terminated or truncated
                seen.append((observation, reward, terminated, truncated))
            with pytest.raises(ValueError, match="call reset"):
                env.step(1)
            episodes.append(seen)
        assert episodes[0] == episodes[1]
        assert truncated or observation in (5, 7, 11, 12, 15)
        assert observation != 0 or truncated
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action 4 lies outside the space: 0 to 3"):
        env.step(4)


def words() -> Environment:
    """A text of two tokens is written; observation: what has been written so far, -1 is nothing yet."""

    def reset(key, params):
        text = jnp.full(2, -1, jnp.int32)
        return text, text

    def step(key, text, action, params):
        text = jnp.where(text[0] < 0, jnp.stack([action, -1]), jnp.stack([text[0], action]))
        return text, text, jnp.float32(text[0] == text[1]), text[1] >= 0, jnp.bool_(False), {}

    return Environment(reset, step, 3, (2,))


def test_the_classic_loop_on_a_text(gymnasium):
    spell = "abc"

    def to_text(tokens):
        return "".join(spell[token] for token in np.asarray(tokens) if token >= 0)

    space = gymnasium.spaces.Text(min_length=0, max_length=2, charset=spell)
    env = to_gymnasium(words(), observation_space=space, to_host=to_text)
    observation, _ = env.reset(seed=0)
    assert observation == ""
    assert env.step(1)[:4] == ("b", 0.0, False, False)
    assert env.step(1)[:4] == ("bb", 1.0, True, False)
    plain = to_gymnasium(words())
    plain.reset(seed=0)
    assert plain.observation_space.contains(plain.step(2)[0])


def test_what_cannot_become_gymnasiums(gymnasium):
    with pytest.raises(ValueError, match="numbered actions"):
        to_gymnasium(words()._replace(num_actions=None))
    several = words()._replace(
        observation_shape=None,
        reset=lambda key, params: ({"a": jnp.zeros(2), "b": jnp.zeros(3)}, jnp.int32(0)),
    )
    with pytest.raises(ValueError, match="pytree of several arrays"):
        to_gymnasium(several)
