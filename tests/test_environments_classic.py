"""Classic control against Gymnasium, state by state and action by action, in float64; the bandit against its law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.environments import acrobot, bandit, cart_pole, classic, mountain_car

# Ours, the name there, our state, Gymnasium's order of it, and what to draw its numbers from.
WORLDS = {
    "cart_pole": (cart_pole, "CartPole-v1", classic.Cart, [2.6, 3.0, 0.25, 3.0]),
    "acrobot": (acrobot, "Acrobot-v1", classic.Links, [3.1, 3.1, 12.0, 28.0]),
    "mountain_car": (mountain_car, "MountainCar-v0", classic.Car, [1.2, 0.07]),
}


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def states(name: str, count: int) -> np.ndarray:
    """States in and out of range, some at rest."""
    rng = np.random.default_rng(0)
    drawn = rng.uniform(-1, 1, (count, len(WORLDS[name][3]))) * WORLDS[name][3]
    drawn[:3] = 0
    if name == "mountain_car":
        drawn[:, 0] = np.clip(drawn[:, 0] - 0.2, -1.2, 0.6)
        drawn[3:9] = [[-1.19, -0.07]] * 2 + [[-1.2, -0.001]] * 2 + [[0.49, 0.05]] * 2
    if name == "acrobot":
        drawn = drawn.astype(np.float32).astype(np.float64)  # as Gymnasium's reset
    return drawn


@pytest.mark.parametrize("name", WORLDS)
def test_every_step_equals_gymnasium(name, x64):
    gymnasium = pytest.importorskip("gymnasium")
    make, theirs, kind, _ = WORLDS[name]
    env, oracle = make(None), gymnasium.make(theirs).unwrapped
    start = states(name, 60)
    actions = np.arange(len(start)) % env.num_actions
    oracle.reset(seed=0)
    wanted = []
    for state, action in zip(start, actions, strict=True):
        oracle.state = state if name != "mountain_car" else tuple(state)
        oracle.steps_beyond_terminated = None  # of CartPole: every start counts as a first
        observation, reward, terminated, _, _ = oracle.step(action)
        wanted.append((np.array(oracle.state), observation, reward, terminated))
    step = jax.jit(jax.vmap(env.step, (0, 0, 0, None)))
    keys = jax.random.split(jax.random.key(0), len(start))
    observation, state, reward, terminated, truncated, _ = step(keys, kind(*start.T), actions, env.params)
    assert state[0].dtype == np.float64 and observation.dtype == np.float32
    np.testing.assert_allclose(np.stack(state, axis=1), [w[0] for w in wanted], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(observation, [w[1] for w in wanted], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(reward, [w[2] for w in wanted])
    np.testing.assert_array_equal(terminated, [w[3] for w in wanted])
    assert not truncated.any()
    assert terminated.any() and not terminated.all()


@pytest.mark.parametrize("name", WORLDS)
def test_a_whole_episode_equals_gymnasium_from_its_start(name):
    """In float32 each step is compared from Gymnasium's own state, its time limit included."""
    gymnasium = pytest.importorskip("gymnasium")
    make, theirs, kind, _ = WORLDS[name]
    limit = 25
    env, oracle = make(limit), gymnasium.make(theirs, max_episode_steps=limit)
    oracle.reset(seed=1)
    _, state = env.reset(jax.random.key(0), env.params)
    step = jax.jit(env.step)
    rng = np.random.default_rng(0)
    for _ in range(limit):
        action = int(rng.integers(env.num_actions))
        theirs_state = [np.float32(x) for x in oracle.unwrapped.state]
        state = state._replace(state=kind(*map(jnp.float32, theirs_state)))
        wanted, wanted_reward, *wanted_flags, _ = oracle.step(action)
        observation, state, reward, *flags, _ = step(jax.random.key(0), state, action, env.params)
        np.testing.assert_allclose(observation, wanted, rtol=1e-5, atol=1e-5)
        assert (float(reward), *map(bool, flags)) == (wanted_reward, *wanted_flags)
        if any(wanted_flags):
            break
    assert any(wanted_flags)


@pytest.mark.parametrize("name", WORLDS)
def test_starts_lie_in_gymnasiums_range(name):
    gymnasium = pytest.importorskip("gymnasium")
    make, theirs, *_ = WORLDS[name]
    env, oracle = make(), gymnasium.make(theirs)
    keys = jax.random.split(jax.random.key(0), 400)
    ours = np.asarray(jax.jit(jax.vmap(env.reset, (0, None)))(keys, env.params)[0])
    drawn = np.stack([oracle.reset(seed=i)[0] for i in range(400)])
    spread = np.ptp(drawn, axis=0) + 1e-3
    np.testing.assert_allclose(ours.min(axis=0), drawn.min(axis=0), atol=0.03 * spread.max())
    np.testing.assert_allclose(ours.max(axis=0), drawn.max(axis=0), atol=0.03 * spread.max())
    assert np.all(np.abs(ours.mean(axis=0) - drawn.mean(axis=0)) < 0.12 * spread)


def test_cart_pole_against_its_equations(x64):
    """From Barto, Sutton & Anderson, in the form without division by parts: two linear equations."""
    x, v, angle, spin, force = 0.3, -0.7, 0.11, 0.9, 10.0
    m, total, length, g, tau = 0.1, 1.1, 0.5, 9.8, 0.02
    # [total, m l cos; cos, 4/3 l] [x'', angle''] = [force + m l spin^2 sin, g sin]
    sin, cos = np.sin(angle), np.cos(angle)
    rates = np.linalg.solve(
        [[total, m * length * cos], [cos, 4 / 3 * length]],
        [force + m * length * spin**2 * sin, g * sin],
    )
    env = cart_pole(None)
    state = classic.Cart(*map(jnp.float64, (x, v, angle, spin)))
    after = env.step(jax.random.key(0), state, 1, env.params)[1]
    wanted = [x + tau * v, v + tau * rates[0], angle + tau * spin, spin + tau * rates[1]]
    np.testing.assert_allclose(np.array(after), wanted, rtol=1e-12)


def test_constants_are_parameters_and_can_be_mapped_over():
    env = cart_pole(None)
    _, state = env.reset(jax.random.key(0), env.params)
    forces = jnp.asarray([0.0, 10.0, 20.0])
    step = jax.vmap(lambda force: env.step(jax.random.key(0), state, 1, env.params._replace(force=force))[0])
    velocity = step(forces)[:, 1]
    assert velocity[0] < velocity[1] < velocity[2]
    one = env.step(jax.random.key(0), state, 1, env.params)[0]
    np.testing.assert_allclose(step(forces)[1], one, rtol=1e-6)


def test_bandit_draws_from_its_arms():
    env = bandit((1.0, -2.0), stddev=0.5)
    keys = jax.random.split(jax.random.key(0), 4000)
    action = jnp.arange(4000) % 2
    step = jax.vmap(env.step, (0, None, 0, None))
    observation, state, reward, terminated, truncated, _ = step(keys, (), action, env.params)
    assert state == () and not observation.any() and terminated.all() and not truncated.any()
    for arm, mean in enumerate((1.0, -2.0)):
        drawn = np.asarray(reward)[np.asarray(action) == arm]
        assert abs(drawn.mean() - mean) < 5 * 0.5 / 2000**0.5
        assert abs(drawn.std() - 0.5) < 0.05
    assert (env.num_actions, env.num_observations, env.observation_shape) == (2, 1, ())
    with pytest.raises(ValueError, match="at least one arm"):
        bandit(())
