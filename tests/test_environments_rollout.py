"""Rollouts against a Python loop over single worlds, resets included; evaluation; sharding; whole runs under vmap."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhfjax.environments import (
    Environment,
    Worlds,
    autoreset,
    batch_first,
    cart_pole,
    catch,
    frozen_lake,
    play,
    record_episodes,
    rollout,
    start,
)

B, T = 4, 8
LAKE = frozen_lake(limit=3)  # ends in holes, and at its limit


def wander(observation, key):
    """Uniform over four actions; keeps what it drew from."""
    return jax.random.randint(key, observation.shape[:1], 0, 4), {"seen": observation}


@pytest.fixture(scope="module")
def lake_run():
    worlds = start(LAKE, jax.random.key(0), B)
    run = jax.jit(partial(rollout, LAKE, wander, steps=T))
    after, trajectory = run(worlds, jax.random.key(1))
    return worlds, after, trajectory


def at(tree, place):
    """The tree of every array's entry at a place."""
    return jax.tree.map(lambda x: x[place], tree)


def test_a_rollout_is_a_loop(lake_run):
    """The same keys, one world and one step at a time, with the reset written out."""
    worlds, after, trajectory = lake_run
    for b in range(B):
        observation, state = at(worlds, b)
        for t, key in enumerate(jax.random.split(jax.random.key(1), T)):
            key_act, key_step = jax.random.split(key)
            action = jax.random.randint(key_act, (B,), 0, 4)[b]
            key_world, key_reset = jax.random.split(jax.random.split(key_step, B)[b])
            final, state, reward, terminated, truncated, _ = LAKE.step(key_world, state, action, LAKE.params)
            row = at(trajectory, (t, b))
            assert int(row.observation) == int(observation) == int(row.extras["seen"])
            assert int(row.action) == int(action) and float(row.reward) == float(reward)
            assert (bool(row.terminated), bool(row.truncated)) == (bool(terminated), bool(truncated))
            assert int(row.next_observation) == int(final)
            observation = final
            if terminated or truncated:
                observation, state = LAKE.reset(key_reset, LAKE.params)
        assert int(after.observation[b]) == int(observation)


def test_episodes_follow_one_another(lake_run):
    """What is seen next is what was reached, or a start where the episode ended; both ends occur."""
    _, after, trajectory = lake_run
    ended = np.asarray(trajectory.terminated | trajectory.truncated)
    following = np.concatenate([trajectory.observation[1:], after.observation[None]])
    np.testing.assert_array_equal(following, np.where(ended, 0, trajectory.next_observation))
    assert trajectory.truncated.any() and trajectory.info == {}
    assert trajectory.reward.shape == (T, B) and trajectory.terminated.dtype == bool


def test_autoreset_before_is_the_same(lake_run):
    worlds, after, trajectory = lake_run
    again = rollout(autoreset(LAKE), wander, worlds, jax.random.key(1), steps=T)
    jax.tree.map(np.testing.assert_array_equal, again, (after, trajectory))


def test_a_rollout_goes_on_where_another_stopped():
    """Nothing but `Worlds` is carried: two halves from the halves of one split are the whole."""
    env = cart_pole(5)

    def push(observation, key):
        return (observation[:, 2] > 0).astype(jnp.int32), ()

    worlds = start(env, jax.random.key(0), B)
    run = jax.jit(partial(rollout, env, push, steps=4))
    middle, first = run(worlds, jax.random.key(1))
    end, second = run(middle, jax.random.key(2))
    assert int(end.state.elapsed[0]) == 8 % 5
    np.testing.assert_array_equal(second.observation[0], first.next_observation[-1])
    assert second.truncated[0].all() and not first.truncated.any()


def test_seeds_and_parameters_are_vmapped():
    env = cart_pole(4)

    def push(observation, key):
        return jnp.ones(observation.shape[0], jnp.int32), ()

    def run(key, force):
        params = env.params._replace(force=force)
        key_start, key_run = jax.random.split(key)
        worlds = start(env, key_start, 2, params)
        return rollout(env, push, worlds, key_run, steps=3, params=params)[1].next_observation

    keys, forces = jax.random.split(jax.random.key(0), 3), jnp.asarray([1.0, 10.0, 20.0])
    together = jax.jit(jax.vmap(run))(keys, forces)
    for i in range(3):
        np.testing.assert_allclose(together[i], run(keys[i], forces[i]), rtol=1e-5, atol=1e-6)


def test_worlds_laid_over_devices_give_the_same_and_stay_there(lake_run):
    worlds, after, trajectory = lake_run
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    laid = jax.device_put(worlds, NamedSharding(mesh, PartitionSpec("data")))
    run = jax.jit(partial(rollout, LAKE, wander, steps=T))
    found = run(laid, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, found, (after, trajectory))
    assert found[0].state.state.sharding.shard_shape((B,)) == (1,)
    assert found[1].reward.sharding.shard_shape((T, B)) == (T, 1)


def test_batch_first():
    env = catch(4, 3)

    def still(observation, key):
        return jnp.ones(observation.shape[0], jnp.int32), ()

    _, trajectory = rollout(env, still, start(env, jax.random.key(0), 3), jax.random.key(1), steps=2)
    turned = batch_first(trajectory)
    assert turned.observation.shape == (3, 2, 4, 3) and turned.reward.shape == (3, 2)
    np.testing.assert_array_equal(turned.observation[2, 1], trajectory.observation[1, 2])


def corridor() -> Environment:
    """Action 1 goes on and pays 1, action 0 ends; a world's number of steps is its own."""

    def reset(key, params):
        return jnp.float32(0), jnp.float32(0)

    def step(key, state, action, params):
        state = state + 1
        return state, state, jnp.float32(1), action == 0, jnp.bool_(False), {}

    return Environment(reset, step, 2, ())


def test_play_counts_each_world_to_its_first_end():
    last = jnp.asarray([1, 4, 2, 99])

    def leave(observation, key):
        return (observation + 1 < last).astype(jnp.int32), ()

    for env in (corridor(), autoreset(corridor())):
        episodes = play(env, leave, jax.random.key(0), count=4, most_steps=6)
        np.testing.assert_array_equal(episodes.score_B, [1, 4, 2, 6])
        np.testing.assert_array_equal(episodes.length_B, [1, 4, 2, 6])
        np.testing.assert_array_equal(episodes.finished_B, [True, True, True, False])


def test_records_reach_the_trajectory():
    env = record_episodes(autoreset(corridor()))

    def leave(observation, key):
        return (observation < 2).astype(jnp.int32), ()

    worlds = start(env, jax.random.key(0), 2)
    assert isinstance(worlds, Worlds)
    _, trajectory = rollout(env, leave, worlds, jax.random.key(1), steps=4)
    np.testing.assert_array_equal(trajectory.info["episode_return"][:, 0], [1, 2, 3, 1])
    np.testing.assert_array_equal(trajectory.next_observation[:, 0], [1, 2, 3, 1])
    np.testing.assert_array_equal(trajectory.observation[:, 0], [0, 1, 2, 0])


def test_bad_policies_and_worlds():
    worlds = start(LAKE, jax.random.key(0), B)
    go = partial(rollout, LAKE, worlds=worlds, key=jax.random.key(0), steps=1)
    with pytest.raises(TypeError, match=r"act must return \(action, extras\)"):
        go(act=lambda observation, key: observation)
    with pytest.raises(TypeError, match="one action for each of the 4 worlds"):
        go(act=lambda observation, key: (jnp.int32(0), ()))
    with pytest.raises(ValueError, match="at least 1 world"):
        start(LAKE, jax.random.key(0), 0)
    five = corridor()._replace(step=lambda key, state, action, params: (state, state, 1.0, False, {}))
    with pytest.raises(ValueError, match="got 5 values"):
        rollout(
            five, lambda o, k: (jnp.zeros(1, jnp.int32), ()), start(five, jax.random.key(0), 1),
            jax.random.key(0), steps=1,
        )  # fmt: skip
    outside = rollout(LAKE, lambda o, k: (jnp.full(B, 4), ()), worlds, jax.random.key(0), steps=1)[1]
    assert np.isnan(outside.reward).all()
