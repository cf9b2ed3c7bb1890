"""Whole runs in worlds of control: every algorithm against its parts put together by hand, GAE and n-step paths against
loops, stopped and resumed, swept, laid over devices; and each of them learns."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhfjax.algorithms import dqn, make_optimizer, ppo, pqn
from rlhfjax.algorithms.ppo.experience import targets
from rlhfjax.checkpoint import Checkpoints
from rlhfjax.config import DQN, MLP, PPO, PQN, ControlDQN, ControlPPO, ControlPQN, Optimizer
from rlhfjax.environments import (
    Trajectory,
    batch_first,
    cart_pole,
    catch,
    cliff_walking,
    play,
    replay,
    rollout,
)
from rlhfjax.networks import mlp
from rlhfjax.recipes.control import control_dqn, control_ppo, control_pqn, iterations_of, train
from rlhfjax.recipes.control.dqn import Item, _items, _transitions
from rlhfjax.recipes.control.ppo import ppo_steps
from rlhfjax.recipes.control.training import episode_metrics, recorded

ENV = cart_pole(limit=12)  # episodes end in both ways
NETWORK = MLP(hidden=(8,), activation="tanh")
SLOWLY = Optimizer(learning_rate=1e-4, max_grad_norm=1.0)
SMALL = {
    "ppo": ControlPPO(
        environment_steps=320,
        worlds=4,
        steps=8,
        network=NETWORK,
        optimizer=Optimizer(learning_rate=1e-2, max_grad_norm=0.5),
        algorithm=PPO(kl_coefficient=0.0, discount=0.9, entropy_coefficient=0.01, epochs=2, minibatches=2),
    ),
    "pqn": ControlPQN(
        environment_steps=320,
        epsilon_end=0.05,
        epsilon_fraction=0.2,
        worlds=4,
        steps=8,
        network=dataclasses.replace(NETWORK, layer_norm=True),
        algorithm=PQN(discount=0.9, epochs=2, minibatches=2),
    ),
    "dqn": ControlDQN(
        environment_steps=320,
        epsilon_end=0.05,
        epsilon_fraction=0.2,
        worlds=4,
        steps=8,
        updates=2,
        batch=6,
        capacity=48,
        learning_starts=40,
        n_step=3,
        prioritised=True,
        network=dataclasses.replace(NETWORK, dueling=True),
        algorithm=DQN(discount=0.9, bootstrap="double", period=3),
    ),
}
MAKE = {"ppo": control_ppo, "pqn": control_pqn, "dqn": control_dqn}
NAMES = list(SMALL)


@functools.cache
def training_of(name: str):
    return MAKE[name](ENV, SMALL[name])


@functools.cache
def iterate_of(name: str):
    """The compiled iteration, and a list that grows whenever it is traced."""
    traced = []

    def iterate(run, key):
        traced.append(name)
        return training_of(name).iterate(run, key)

    return jax.jit(iterate), traced


@functools.cache
def begin_of(name: str):
    """The start of a whole run, compiled."""
    return jax.jit(lambda key: train(training_of(name), key, 0)[0])


@functools.cache
def start_of(name: str):
    return begin_of(name)(jax.random.key(7))


@functools.cache
def part_of(name: str):
    """Two iterations from a run on, compiled."""
    return jax.jit(lambda run, key, first: train(training_of(name), key, 2, run=run, first=first))


def joined(first, last):
    """The metrics of two parts of a run, one after the other."""
    return jax.tree.map(lambda *x: np.concatenate([np.asarray(part) for part in x]), first, last)


def whole_of(name: str, key: jax.Array):
    """Four iterations from the start, by one program twice: another number of iterations may round otherwise."""
    half, first = part_of(name)(begin_of(name)(key), key, 0)
    end, last = part_of(name)(half, key, 2)
    return end, joined(first, last)


def numbers(tree):
    """The leaves as NumPy arrays, keys by their bits."""

    def bits(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return [np.asarray(bits(x)) for x in jax.tree.leaves(tree)]


def stacked(trees):
    """The trees with a leading axis over them, as NumPy arrays."""
    leaves = zip(*map(numbers, trees), strict=True)
    return [np.stack(x) for x in leaves]


def assert_same_bits(one, other):
    for a, b in zip(numbers(one), numbers(other), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(one, other, rtol=1e-5, atol=1e-6):
    for a, b in zip(numbers(one), numbers(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def made_up_trajectory(steps: int, worlds: int, seed: int = 0) -> Trajectory:
    """Random steps whose observations are all different; episodes end in both ways, at times in both at once."""
    generator = np.random.default_rng(seed)
    shape = (steps, worlds)

    def normal(*size):
        return generator.normal(size=size).astype(np.float32)

    arrays = Trajectory(
        normal(*shape, 4),
        generator.integers(2, size=shape).astype(np.int32),
        normal(*shape),
        generator.uniform(size=shape) < 0.2,
        generator.uniform(size=shape) < 0.2,
        normal(*shape, 4),
        extras=-np.abs(normal(*shape)),
    )
    return jax.tree.map(jnp.asarray, arrays)


def value_of(observation: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(observation), axis=-1)


# PPO


def loop_of_gae(steps: Trajectory, discount: float, lam: float):
    """Advantages and returns [B, T] in float64; the rollout's end bootstraps as a truncation does."""
    x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), batch_first(steps))
    value_BT, next_BT = (np.sin(o).sum(axis=-1) for o in (x.observation, x.next_observation))
    advantage_BT = np.zeros(value_BT.shape)
    for b in range(value_BT.shape[0]):
        following = 0.0
        for t in reversed(range(value_BT.shape[1])):
            future = 0.0 if x.terminated[b, t] else next_BT[b, t]
            if x.terminated[b, t] or x.truncated[b, t]:
                following = 0.0
            following = x.reward[b, t] + discount * future - value_BT[b, t] + discount * lam * following
            advantage_BT[b, t] = following
    return advantage_BT, advantage_BT + value_BT


def test_rows_of_a_step_have_the_advantages_of_the_trajectory():
    trajectory = made_up_trajectory(9, 5)
    terminated, truncated = np.asarray(trajectory.terminated), np.asarray(trajectory.truncated)
    assert (truncated & ~terminated).any() and terminated.any()
    config = PPO(kl_coefficient=0.0, discount=0.9, lam=0.8, whiten_advantages=False)
    rows = compiled(lambda steps: ppo_steps(steps, value_of, config), trajectory)
    sample, _ = compiled(lambda rows: targets(rows, jnp.float32(0), config=config), rows)
    rows, sample, trajectory = jax.tree.map(np.asarray, (rows, sample, trajectory))
    advantage_BT, returns_BT = loop_of_gae(trajectory, 0.9, 0.8)
    assert rows.mask.shape == (45, 1) and rows.mask.all()
    np.testing.assert_allclose(sample.advantage.reshape(5, 9), advantage_BT, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sample.returns.reshape(5, 9), returns_BT, rtol=1e-5, atol=1e-5)
    observation, action = rows.inputs  # the rows are in the order of those
    np.testing.assert_array_equal(observation[13, 0], trajectory.observation[4, 1])
    np.testing.assert_array_equal(action.reshape(5, 9), trajectory.action.T)
    np.testing.assert_array_equal(rows.logp.reshape(5, 9), trajectory.extras.T)


def test_ppo_loss_of_rows_is_that_of_whole_trajectories():
    trajectory = made_up_trajectory(6, 4, seed=1)
    config = PPO(kl_coefficient=0.0, discount=0.95, lam=0.9, value_coefficient=0.5, entropy_coefficient=0.1)

    def evaluate(params, inputs):
        observation, action = inputs
        logp_A = jax.nn.log_softmax(observation @ params["policy"])
        logp = jnp.take_along_axis(logp_A, action[..., None], axis=-1)[..., 0]
        return logp, -jnp.sum(jnp.exp(logp_A) * logp_A, axis=-1), observation @ params["value"]

    def rollouts(trajectory):
        x = batch_first(trajectory)
        inputs, value = (x.observation, x.action), value_of(x.observation)
        whole = ppo.Rollout(
            inputs,
            x.extras,
            x.extras,
            value,
            x.reward,
            jnp.ones(value.shape, bool),
            next_value=value_of(x.next_observation),
            terminated=x.terminated,
            truncated=x.truncated,
        )
        return ppo_steps(trajectory, value_of, config), whole

    params = {
        "policy": np.asarray([[1, -1], [1, 1], [1, 1], [1, 1]], np.float32),
        "value": np.arange(4, dtype=np.float32),
    }

    def total(params, rollout):
        sample, _ = targets(rollout, jnp.float32(0), config=config)
        return ppo.loss(params, sample, evaluate=evaluate, config=config)

    found, expected = (
        jax.jit(jax.value_and_grad(total, has_aux=True))(params, rollout)
        for rollout in compiled(rollouts, trajectory)
    )
    assert found[0][1]["policy/clip_fraction"] > 0 and found[0][1]["count"] == 24
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_ppo_iteration_is_its_parts_put_together(key):
    config, run = SMALL["ppo"], start_of("ppo")
    actor = mlp(config.network, (4,), 2)
    critic = mlp(dataclasses.replace(config.network, output_scale=1.0), (4,), 1)

    def evaluate(params, inputs):
        observation, action = inputs
        logp_A = jax.nn.log_softmax(actor.apply(params["policy"], observation))
        logp = jnp.sum(jax.nn.one_hot(action, 2) * logp_A, axis=-1)
        return (
            logp,
            -jnp.sum(jnp.exp(logp_A) * logp_A, -1),
            critic.apply(params["critic"], observation)[..., 0],
        )

    algorithm = ppo.make(evaluate, make_optimizer(config.optimizer, 10 * 2 * 2), config.algorithm)

    def by_hand(run, key):
        key_act, key_learn = jax.random.split(key)
        params = run.learner.params

        def act(observation, key):
            logp_BA = jax.nn.log_softmax(actor.apply(params["policy"], observation))
            action_B = jax.random.categorical(key, logp_BA)
            return action_B, evaluate(params, (observation, action_B))[0]

        worlds, steps = rollout(recorded(ENV), act, run.worlds, key_act, steps=8)
        batch = ppo_steps(steps, lambda x: critic.apply(params["critic"], x)[..., 0], config.algorithm)
        return worlds, algorithm.update(run.learner, batch, key_learn)

    worlds, (learner, metrics) = jax.jit(by_hand)(run, key)
    after, found = iterate_of("ppo")[0](run, key)
    assert_close(after.worlds, worlds)
    assert_close(after.learner, learner, rtol=1e-4, atol=1e-5)
    assert_close({name: found[name] for name in metrics}, metrics, rtol=1e-4, atol=1e-5)
    assert int(after.steps) == 32 and found["policy/logp_gap"] < 1e-5 and found["environment_steps"] == 32


# PQN


def test_a_pqn_iteration_is_its_parts_put_together():
    """The second iteration: in the middle of the fall of epsilon, and some episodes are cut short in it."""
    config = SMALL["pqn"]
    run, _ = iterate_of("pqn")[0](start_of("pqn"), jax.random.key(4))
    assert int(run.steps) == 32
    network = mlp(config.network, (4,), 2)
    algorithm = pqn.make(network.apply, make_optimizer(config.optimizer, 10 * 2 * 2), config.algorithm)
    epsilon = 1.0 - 0.95 * 32 / (0.2 * 320)

    def by_hand(run, key):
        key_act, key_learn = jax.random.split(key)

        def act(observation, key):
            best_BA = jax.nn.one_hot(jnp.argmax(network.apply(run.learner.params, observation), axis=1), 2)
            logits_BA = jnp.log((1 - epsilon) * best_BA + epsilon / 2)
            return jax.random.categorical(key, logits_BA), ()

        worlds, steps = rollout(recorded(ENV), act, run.worlds, key_act, steps=8)
        x = batch_first(steps)
        batch = pqn.Rollout(
            x.observation, x.action, x.reward, x.terminated, x.truncated, next_inputs=x.next_observation
        )
        cut = jnp.any(x.truncated & ~x.terminated)
        return worlds, algorithm.update(run.learner, batch, key_learn), cut

    worlds, (learner, metrics), cut = jax.jit(by_hand)(run, jax.random.key(5))
    assert cut
    after, found = iterate_of("pqn")[0](run, jax.random.key(5))
    assert_close(after.worlds, worlds)
    assert_close(after.learner, learner, rtol=1e-4, atol=1e-5)
    assert_close({name: found[name] for name in metrics}, metrics, rtol=1e-4, atol=1e-5)
    assert found["epsilon"] == pytest.approx(epsilon) and int(after.steps) == 64


# DQN


def test_paths_from_replay_end_with_their_episode_and_at_the_newest_step():
    """Five steps of each of two worlds are held, the ring having gone round twice; against a loop."""
    config = dataclasses.replace(SMALL["dqn"], worlds=2, n_step=3, capacity=10)
    trajectory = made_up_trajectory(12, 2, seed=13)

    @jax.jit
    def filled(trajectory):
        first = jax.tree.map(lambda x: x[0], _items(trajectory))
        held = replay.init(Item(*first), 10)
        for t in range(0, 12, 3):
            held = replay.add(held, _items(jax.tree.map(lambda x, t=t: x[t : t + 3], trajectory)))
        index = jnp.arange(10)
        return held, replay.Sample(jax.tree.map(lambda x: x[index], held.item), index, jnp.ones(10))

    def batch_of(held, sample, config):
        return jax.tree.map(
            np.asarray, compiled(lambda held, sample: _transitions(held, sample, config), held, sample)
        )

    held, sample = filled(trajectory)
    batch = batch_of(held, sample, config)
    x = jax.tree.map(np.asarray, trajectory)
    seen, ends = set(), set()
    for i in range(10):
        ((t, b),) = np.argwhere((x.observation == np.asarray(batch.inputs)[i]).all(axis=-1))
        seen.add((int(t), int(b)))
        reward, length = 0.0, 0
        while length < 3 and t + length < 12:
            last = t + length
            reward += 0.9**length * x.reward[last, b]
            length += 1
            if x.terminated[last, b] or x.truncated[last, b]:
                break
        if length < 3:
            cut = bool(x.truncated[last, b])
            ends.add("terminated" if x.terminated[last, b] else "truncated" if cut else "newest")
        assert batch.action_B[i] == x.action[t, b]
        assert batch.reward_B[i] == pytest.approx(reward, rel=1e-5)
        assert batch.discount_B[i] == pytest.approx(0.0 if x.terminated[last, b] else 0.9**length, rel=1e-6)
        np.testing.assert_array_equal(batch.next_inputs[i], x.next_observation[last, b])
        assert bool(batch.terminated_B[i]) == x.terminated[last, b]
    assert seen == {(t, b) for t in range(7, 12) for b in range(2)}
    assert ends == {"terminated", "truncated", "newest"}
    one = batch_of(held, sample, dataclasses.replace(config, n_step=1))
    np.testing.assert_array_equal(one.reward_B, held.item.reward)
    np.testing.assert_array_equal(one.next_inputs, held.item.next_observation)
    assert one.discount_B is None


def dqn_by_hand(run, key, updates: bool):
    """An iteration of DQN with prioritised replay."""
    config = SMALL["dqn"]
    network = mlp(config.network, (4,), 2)
    algorithm = dqn.make(network.apply, make_optimizer(config.optimizer, 10 * 2), config.algorithm)
    progress = run.steps / 320
    epsilon = jnp.maximum(1.0 - 0.95 * progress / 0.2, 0.05)
    key_act, key_learn = jax.random.split(key)

    def act(observation, key):
        best_BA = jax.nn.one_hot(jnp.argmax(network.apply(run.learner.params, observation), axis=1), 2)
        return jax.random.categorical(key, jnp.log((1 - epsilon) * best_BA + epsilon / 2)), ()

    worlds, steps = rollout(recorded(ENV), act, run.worlds, key_act, steps=8)
    held = replay.add(run.replay, _items(steps))
    learner, found = run.learner, []
    for k in jax.random.split(key_learn, config.updates) if updates else ():
        key_sample, key_update = jax.random.split(k)
        sample = replay.sample(key_sample, held, config.batch, beta=0.4 + 0.6 * progress)
        batch = _transitions(held, sample, config)._replace(weight_B=sample.weight)
        learner, metrics = algorithm.update(learner, batch, key_update)
        error = dqn.td_error(
            learner.params,
            batch,
            evaluate=network.apply,
            config=config.algorithm,
            target_params=learner.target_params,
        )
        held = replay.update_priorities(held, sample.index, error, alpha=0.6)
        found.append(metrics)
    return worlds, held, learner, found, epsilon


def test_dqn_iterations_are_their_parts_put_together():
    """Nothing is learnt before the replay holds `learning_starts`; then priorities and parameters move."""
    iterate, hand = iterate_of("dqn")[0], jax.jit(dqn_by_hand, static_argnames="updates")
    run = start_of("dqn")
    for i in range(3):
        key, before = jax.random.fold_in(jax.random.key(2), i), run
        run, metrics = iterate(before, key)
        worlds, held, learner, found, epsilon = hand(before, key, updates=i > 0)  # 32 steps, then 48 at most
        assert_close(run.worlds, worlds)
        assert_close((run.learner, run.replay), (learner, held), rtol=1e-4, atol=1e-5)
        assert metrics["epsilon"] == pytest.approx(float(epsilon)) and int(run.learner.step) == 2 * i
        assert metrics["replay/count"] == min(32 * (i + 1), 48)
        priorities = np.asarray(run.replay.priorities.tree)[64:112]
        if i == 0:
            assert_same_bits(run.learner, before.learner)
            own = set(metrics) - {"epsilon", "replay/count", *SHARED}
            assert all(metrics[name] == 0 for name in own) and "loss/total" in own
            assert set(priorities) == {0.0, 1.0}  # none of the items that are not there, all others alike
        else:
            for name in found[0]:
                combine = max if name.endswith("_max") else np.mean
                expected = combine([float(x[name]) for x in found])
                assert metrics[name] == pytest.approx(expected, rel=1e-4, abs=1e-5), name
            assert metrics["loss/td"] != metrics["loss/total"]  # importance weights
            assert len(set(priorities)) > 2


def test_without_priorities_nothing_is_weighted():
    config = dataclasses.replace(SMALL["dqn"], prioritised=False, learning_starts=1, n_step=1, quantiles=5)
    config = dataclasses.replace(config, algorithm=DQN(bootstrap="max", quantiles=True, period=1))
    training = control_dqn(ENV, config)
    run = jax.jit(training.init)(jax.random.key(0))
    assert run.replay is not None and run.replay.priorities is None
    run, metrics = jax.jit(training.iterate)(run, jax.random.key(1))
    assert metrics["loss/td"] == metrics["loss/total"] > 0
    assert training.values is not None
    # Action values of a distribution are its means.
    q_BA = np.asarray(jax.jit(training.values)(run, run.worlds.observation))
    network = mlp(config.network, (4,), 2, quantiles=5)
    q_BAN = np.asarray(jax.jit(network.apply)(run.learner.params, run.worlds.observation))
    np.testing.assert_allclose(q_BA, q_BAN.mean(axis=-1), rtol=1e-6)
    act = jax.jit(lambda run, key: training.policy(run)(run.worlds.observation, key))
    action_B, _ = act(run, jax.random.key(0))
    np.testing.assert_array_equal(action_B, np.argmax(q_BA, axis=1))


# All of them

SHARED = {"episode/return", "episode/length", "episode/count", "environment_steps"}


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_alike_and_nothing_is_compiled_twice(name):
    iterate, traced = iterate_of(name)
    run, found = start_of(name), []
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(run)]
    for i in range(3):  # DQN: waiting, then learning
        run, metrics = iterate(run, jax.random.key(i))
        found.append(metrics)
    assert traced == [name]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(run)] == shapes
    own = {"ppo": "policy/entropy", "pqn": "epsilon", "dqn": "replay/count"}[name]
    for metrics in found:
        assert metrics.keys() == found[0].keys() >= SHARED | {own}
        assert all(x.shape == () and x.dtype == jnp.float32 and jnp.isfinite(x) for x in metrics.values())
        assert metrics["environment_steps"] == 32
    assert int(run.steps) == 96


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_stopped_has_the_bits_of_a_whole_one(name, key, tmp_path):
    """Through a checkpoint on disk, replay and worlds included; the whole one, iteration by iteration, is a loop."""
    whole, metrics = whole_of(name, key)
    half, first = part_of(name)(begin_of(name)(key), key, 0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, half)
        checkpoints.wait()
        restored = checkpoints.restore_latest(like=jax.eval_shape(lambda: half))
    assert restored is not None and restored[0] == 2
    end, last = part_of(name)(restored[1], key, 2)
    assert_same_bits(end, whole)
    assert_same_bits(joined(first, last), metrics)
    assert not np.array_equal(numbers(half.learner)[0], numbers(end.learner)[0])  # it has gone on
    run, found = begin_of(name)(key), []
    for i in range(4):
        run, one = iterate_of(name)[0](run, jax.random.fold_in(key, i))
        found.append(one)
    assert_close((whole, metrics), (run, stacked(found)), rtol=2e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_seeds_together_equal_seeds_alone(name):
    keys = jax.random.split(jax.random.key(5), 2)
    runs, metrics = jax.jit(jax.vmap(lambda key: train(training_of(name), key, 4)))(keys)
    alone = [whole_of(name, key) for key in keys]
    assert_close((runs, metrics), stacked(alone), rtol=2e-3, atol=1e-4)
    assert not np.allclose(metrics["loss/total"][0], metrics["loss/total"][1])


def floats_of(config) -> dict[str, float]:
    """The fields that hold a float and are read, by their dotted names."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{name}": x for name, x in floats_of(value).items()}
        elif isinstance(value, float):
            found[field.name] = value
    return found


def with_floats(config, values):
    """The config with those of `floats_of` in their places."""
    own = {}
    for name, x in values.items():
        first, _, rest = name.partition(".")
        if rest:
            own.setdefault(first, {})[rest] = x
        else:
            own[first] = x
    replaced = {
        name: with_floats(getattr(config, name), x) if isinstance(x, dict) else x for name, x in own.items()
    }
    return dataclasses.replace(config, **replaced)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "pqn", pytest.param("dqn", marks=pytest.mark.slow)])
def test_a_sweep_over_every_float_equals_separate_runs(name, key):
    """The training is built within the vmap; each float of the config, nested ones too, is traced."""
    config = SMALL[name]
    values = floats_of(config)
    assert {"optimizer.learning_rate", "algorithm.discount"} < set(values)
    assert ("algorithm.clip_low" in values) == (name == "ppo")
    assert ({"epsilon_start", "epsilon_end", "epsilon_fraction"} <= set(values)) == (name != "ppo")

    def last(values):
        run, metrics = train(MAKE[name](ENV, with_floats(config, values)), key, 2)
        return run.learner.params, metrics

    one = jax.jit(last)
    scale = (1.0, 0.5)
    alone = [one({n: jnp.float32(x * s) for n, x in values.items()}) for s in scale]
    together = jax.jit(jax.vmap(last))({n: jnp.float32(x) * jnp.array(scale) for n, x in values.items()})
    assert_close(together, stacked(alone), rtol=2e-3, atol=1e-4)
    constant = jax.tree.map(lambda x: x[:2], whole_of(name, key)[1])
    assert_close(alone[0][1], constant, rtol=2e-3, atol=1e-4)  # as where they are no arrays
    difference = [np.abs(a - b).max() for a, b in zip(*map(numbers, alone), strict=True)]
    assert max(difference) > 1e-3  # the floats are read


@pytest.mark.parametrize("name", ["pqn", "dqn"])
def test_the_share_of_random_actions_falls_linearly(name):
    """From 1 to 0.05 over a fifth of the 320 steps; then it stays."""
    for steps, epsilon in ((0, 1.0), (16, 0.7625), (32, 0.525), (64, 0.05), (96, 0.05), (320, 0.05)):
        run = start_of(name)._replace(steps=jnp.int32(steps))
        assert iterate_of(name)[0](run, jax.random.key(0))[1]["epsilon"] == pytest.approx(epsilon), steps


def test_episodes_are_counted_where_they_end():
    trajectory = made_up_trajectory(7, 3, seed=4)
    generator = np.random.default_rng(0)
    score, length = generator.normal(size=(7, 3)), generator.integers(1, 9, size=(7, 3))
    info = {"episode_return": jnp.float32(score), "episode_length": jnp.int32(length)}
    found = episode_metrics(trajectory._replace(info=info))
    ended = np.asarray(trajectory.terminated | trajectory.truncated)
    assert found["episode/return"] == pytest.approx(score[ended].mean(), rel=1e-5)
    assert found["episode/length"] == pytest.approx(length[ended].mean(), rel=1e-5)
    assert found["episode/count"] == ended.sum() and found["environment_steps"] == 21
    never = jnp.zeros((7, 3), bool)
    found = episode_metrics(trajectory._replace(info=info, terminated=never, truncated=never))
    assert found["episode/return"] == found["episode/length"] == found["episode/count"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_numbered_observations_are_read_one_hot(name):
    """Weights of the first layer: one row a state."""
    training = MAKE[name](cliff_walking(limit=20), SMALL[name])
    run = jax.jit(training.init)(jax.random.key(0))
    params = run.learner.params["policy"] if name == "ppo" else run.learner.params
    assert params["hidden_0"]["kernel"].shape == (48, 8)
    if training.values is None:
        return
    values, states = jax.jit(training.values), jnp.arange(48)
    kernel = params["hidden_0"]["kernel"].at[3].set(jnp.arange(8.0))
    other = params | {"hidden_0": params["hidden_0"] | {"kernel": kernel}}
    moved = values(run._replace(learner=run.learner._replace(params=other)), states) - values(run, states)
    np.testing.assert_array_equal(np.flatnonzero(np.abs(moved).max(axis=1) > 1e-6), [3])


# Devices


def in_rows(config, **changes):
    """A hidden layer of 13, whose rows can be told in a compiled program; an optimiser that shows the gradient."""
    return dataclasses.replace(
        config,
        worlds=8,
        steps=16,
        environment_steps=1280,
        network=dataclasses.replace(config.network, hidden=(13,)),
        optimizer=Optimizer(learning_rate=1e-6, b1=0.5, max_grad_norm=None),
        algorithm=dataclasses.replace(config.algorithm, epochs=1, minibatches=2),
    )


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
@pytest.mark.parametrize("name", ["ppo", "pqn"])
def test_worlds_over_devices_give_the_same_gradient_and_work_is_split_not_repeated(name, key):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    training = MAKE[name](ENV, in_rows(SMALL[name]))
    run = jax.jit(training.init)(jax.random.key(1))
    after, metrics = jax.block_until_ready(jax.jit(training.iterate)(run, key))

    everywhere = NamedSharding(mesh, PartitionSpec())
    placed = jax.device_put(run, everywhere)
    worlds = jax.device_put(run.worlds, NamedSharding(mesh, PartitionSpec("data")))
    placed, key = placed._replace(worlds=worlds), jax.device_put(key, everywhere)
    compiled = jax.jit(training.iterate).lower(placed, key).compile()
    found, found_metrics = jax.block_until_ready(compiled(placed, key))
    assert_close(found.worlds, after.worlds)
    # The moments of Adam hold the gradients; what it makes of rounding in those that are 0 is not compared.
    assert_close(found.learner.opt_state, after.learner.opt_state, rtol=1e-3, atol=1e-5)
    assert_close(found_metrics, metrics, rtol=1e-4, atol=1e-5)

    shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text() or "")
    sizes = {math.prod(map(int, shape.split(","))) for shape in shapes}
    # Rows of the hidden layer on each device: 16 of a minibatch, 32 where the whole rollout is valued, 2 in acting.
    assert 16 * 13 in sizes
    assert [size for size in sizes if size % 13 == 0 and size > 32 * 13] == []
    assert 8 * 13 not in sizes


# Learning


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_learns_to_catch(name, key):
    """Four rows, three columns: a ball falls three steps, and every one of them can be caught."""
    env, network = catch(4, 3), MLP(hidden=(16,), layer_norm=name == "pqn")
    changes = {
        "ppo": {"environment_steps": 8_000, "steps": 32},
        "pqn": {"environment_steps": 8_000, "worlds": 16, "steps": 8, "epsilon_end": 0.0},
        "dqn": {
            "environment_steps": 4_000,
            "updates": 16,
            "capacity": 4_000,
            "learning_starts": 200,
            "epsilon_end": 0.0,
        },
    }
    default = {"ppo": ControlPPO(), "pqn": ControlPQN(), "dqn": ControlDQN()}[name]
    config = dataclasses.replace(default, network=network, **changes[name])
    training = MAKE[name](env, config)
    iterations = iterations_of(config.environment_steps, config.worlds, config.steps)

    def learn(key):
        run, metrics = train(training, key, iterations)
        return play(env, training.policy(run), key, count=32, most_steps=4).score_B, metrics["episode/return"]

    score_B, return_T = jax.jit(learn)(key)
    assert (score_B == 1).all()
    assert return_T[:2].mean() < 0.5 < 0.9 < return_T[-2:].mean()


# Input that does not fit


def changed(name: str, **changes):
    return lambda: MAKE[name](ENV, dataclasses.replace(SMALL[name], **changes))


def method(name: str, **changes):
    return changed(name, algorithm=dataclasses.replace(SMALL[name].algorithm, **changes))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (changed("ppo", environment_steps=0), "environment_steps=0 must be at least 1"),
        (changed("pqn", worlds=0), "worlds=0 must be at least 1"),
        (changed("dqn", steps=0), "steps=0 must be at least 1"),
        (method("ppo", minibatches=5), "a batch of 32 rows cannot be cut into 5 equal parts"),
        (method("pqn", minibatches=4, microbatches=3), "32 rows cannot be cut into 12 equal parts"),
        (method("pqn", lam=1.5), "lam=1.5 must be in"),
        (changed("dqn", batch=49), "batch=49 must lie between 1 and the replay's capacity of 48"),
        (changed("dqn", batch=0), "batch=0 must lie between 1"),
        (changed("dqn", learning_starts=49), "learning_starts=49 is more than the replay's capacity of 48"),
        (changed("dqn", updates=0), "updates=0 and n_step=3 must be at least 1"),
        (changed("dqn", n_step=0), "updates=2 and n_step=0 must be at least 1"),
        (changed("dqn", capacity=50), "capacity=50 must be a multiple of 4 worlds"),
        (changed("dqn", steps=13), "capacity=48 must be a multiple of 4 worlds, and hold at least steps=13"),
        (changed("dqn", n_step=13), "n_step=13 steps of each"),
        (method("dqn", bootstrap="sarsa"), 'bootstrap="sarsa" needs the next action.*choose "expected"'),
        (method("dqn", bootstrap="maxx"), "bootstrap='maxx' is unknown"),
    ],
)
def test_settings_that_do_not_fit_are_named(make, why):
    with pytest.raises(ValueError, match=why):
        make()


@pytest.mark.parametrize("name", NAMES)
def test_a_world_that_does_not_fit_is_named(name):
    with pytest.raises(ValueError, match="numbered actions; num_actions is None"):
        MAKE[name](ENV._replace(num_actions=None), SMALL[name])
    with pytest.raises(ValueError, match="observation is one array; observation_shape is None"):
        MAKE[name](ENV._replace(observation_shape=None), SMALL[name])


def test_iterations_of_a_run():
    assert iterations_of(100, 4, 8) == 3 and iterations_of(96, 4, 8) == 3 and iterations_of(31, 4, 8) == 1
    with pytest.raises(ValueError, match="environment_steps=0 must be at least 1"):
        iterations_of(0, 4, 8)
