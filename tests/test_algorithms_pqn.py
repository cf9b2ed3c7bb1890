"""PQN with a linear network, against float64 loops over the rollout, and against rlax where it has the target."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rlax
from precision import float64
from small_tables import optimal_action_values

from rlhfjax.algorithms import pqn
from rlhfjax.config import PQN

B, T, WIDTH, ACTIONS = 4, 6, 3, 4
SGD = optax.sgd(1.0)
ONE_STEP = PQN(discount=0.9, lam=0.7, epochs=1, minibatches=1)


def evaluate(params, observation):
    return jnp.tensordot(observation, params, 1)


def kernel(seed=1):
    return np.random.default_rng(seed).normal(size=(WIDTH, ACTIONS))


def rollout64(seed=0) -> Any:
    """Environments that reset themselves: after an end, the next observation is not the one at t + 1."""
    generator = np.random.default_rng(seed)
    end = generator.random((B, T))
    final = generator.normal(size=(B, T, WIDTH))
    observation = generator.normal(size=(B, T + 1, WIDTH))
    ended = end < 0.4
    next_observation = np.where(ended[..., None], final, observation[:, 1:])
    fields: Any = (
        observation[:, :-1],
        generator.integers(ACTIONS, size=(B, T)),
        generator.normal(size=(B, T)),
        end < 0.2,
        (end > 0.15) & ended,  # some are both: terminated wins
        next_observation,
    )
    return pqn.Rollout(*fields)


def as_arrays(tree, dtype=None) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype if np.asarray(x).dtype == np.float64 else None), tree)


def expected_targets(w, rollout, config, mask=None):
    """Backwards through every row by the definition; a masked step is skipped."""
    target = np.zeros((B, rollout.reward.shape[1]))
    for b in range(B):
        after = None  # the target of the next step that counts
        for t in reversed(range(rollout.reward.shape[1])):
            if mask is not None and not mask[b, t]:
                continue
            greedy = max(rollout.next_inputs[b, t] @ w)
            if rollout.terminated[b, t]:
                future = 0.0
            elif rollout.truncated[b, t] or after is None:
                future = greedy
            else:
                future = (1 - config.lam) * greedy + config.lam * after
            after = target[b, t] = rollout.reward[b, t] + config.discount * future
    return target


def expected_loss(w, rollout, target, config) -> float:
    """Mean over steps, by a loop."""
    total = 0.0
    for b, t in np.ndindex(B, T):
        error = target[b, t] - rollout.inputs[b, t] @ w[:, rollout.action[b, t]]
        size = abs(error)
        threshold = np.inf if config.huber is None else config.huber
        total += 0.5 * error**2 if size <= threshold else threshold * (size - 0.5 * threshold)
    return total / (B * T)


@functools.cache
def compiled(config):
    algorithm = pqn.make(evaluate, SGD, config)
    return algorithm.init, jax.jit(algorithm.update)


def step(w, rollout, config, seed=0):
    init, update = compiled(config)
    return update(init(jnp.asarray(w)), rollout, jax.random.key(seed))


@functools.cache
def targets_of(config):
    """The targets of a rollout, compiled."""
    return jax.jit(functools.partial(pqn.targets, evaluate=evaluate, config=config))


def test_there_is_something_to_tell_apart():
    rollout = rollout64()
    inside = (rollout.terminated | rollout.truncated)[:, :-1]
    assert np.any(rollout.terminated & rollout.truncated) and np.any(rollout.truncated & ~rollout.terminated)
    assert 0 < inside.sum() < inside.size


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_targets_equal_the_loop(lam):
    config = dataclasses.replace(ONE_STEP, lam=lam)
    w, rollout = kernel(), rollout64()
    with float64():
        sample, bad = targets_of(config)(w, as_arrays(rollout))
        assert sample.target_N.dtype == jnp.float64
    np.testing.assert_allclose(
        np.reshape(sample.target_N, (B, T)), expected_targets(w, rollout, config), rtol=0, atol=1e-12
    )
    np.testing.assert_array_equal(np.reshape(sample.action_N, (B, T)), rollout.action)
    assert bad == 0


def test_targets_equal_those_of_rlax():
    """Within one episode: r + discount ((1 - lam) max Q(s[t+1]) + lam G[t+1]), from max Q of the last observation.

    A scan that starts one step late, or takes max Q(s[t+2]), is off by tenths on such data.
    """
    w = kernel()
    rollout = rollout64()._replace(truncated=None)
    rollout = rollout._replace(
        next_inputs=np.concatenate([rollout.inputs[:, 1:], rollout.next_inputs[:, -1:]], 1)
    )
    with float64():
        sample, _ = targets_of(ONE_STEP)(w, as_arrays(rollout))
        q, next_q = (x @ w for x in (rollout.inputs, rollout.next_inputs))
        discount = 0.9 * (1.0 - rollout.terminated)
        theirs = jax.jit(jax.vmap(rlax.q_lambda, (0, 0, 0, 0, 0, None)))
        lam = np.full(T, ONE_STEP.lam)
        error = np.asarray(theirs(q, rollout.action, rollout.reward, discount, next_q, lam))
        expected = error + np.take_along_axis(q, rollout.action[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(np.reshape(sample.target_N, (B, T)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("huber", [None, 0.6])
def test_one_step_equals_the_gradient_of_the_loop(huber):
    config = dataclasses.replace(ONE_STEP, huber=huber)
    w, rollout = kernel(), rollout64()
    target = expected_targets(w, rollout, config)
    with float64():
        state, metrics = step(w, as_arrays(rollout), config)
        moved = w - np.asarray(state.params)
    gradient = np.zeros_like(w)
    for i in np.ndindex(w.shape):
        width = np.zeros_like(w)
        width[i] = 1e-6
        up, down = (expected_loss(w + x, rollout, target, config) for x in (width, -width))
        gradient[i] = (up - down) / 2e-6
    np.testing.assert_allclose(moved, gradient, rtol=1e-6, atol=1e-8)
    taken = np.take_along_axis(rollout.inputs @ w, rollout.action[..., None], 2)[..., 0]
    expected = {
        "loss/total": expected_loss(w, rollout, target, config),
        "td/error": np.mean(abs(target - taken)),
        "td/error_max": np.max(abs(target - taken)),
        "q/taken": np.mean(taken),
        "q/target": np.mean(target),
        "batch/count": B * T,
        "batch/invalid": 0,
        "optimizer/gradient_norm": np.linalg.norm(gradient),
        "optimizer/refused": 0,
    }
    assert set(expected) == set(metrics)
    for name, x in expected.items():
        np.testing.assert_allclose(metrics[name], x, rtol=1e-5, err_msg=name)


def test_values_kept_from_the_rollout_stand_for_the_observations():
    w, rollout = kernel(), rollout64()
    kept = rollout._replace(next_inputs=None, next_value=(rollout.next_inputs @ w).max(-1))
    first, second = (step(np.float32(w), as_arrays(x, jnp.float32), ONE_STEP)[0] for x in (rollout, kept))
    np.testing.assert_allclose(first.params, second.params, rtol=1e-5, atol=1e-6)


def test_masked_steps_equal_dropped_steps():
    """Anything may lie under the mask, NaN in the observations too."""
    w, rollout = np.float32(kernel()), as_arrays(rollout64(), jnp.float32)
    places = np.array([0, 2, 3, 4, 6, 7])
    junk: Any = (np.nan, 99, np.nan, True, True, np.nan)

    def pad(x, j):
        out = np.full((B, T + 2, *x.shape[2:]), j, x.dtype)
        out[:, places] = x
        return jnp.asarray(out)

    padded = jax.tree.map(pad, rollout, pqn.Rollout(*junk))
    mask = np.tile(np.isin(np.arange(T + 2), places), (B, 1))
    padded = padded._replace(mask=jnp.asarray(mask))
    (first, metrics), (second, padded_metrics) = (step(w, x, ONE_STEP) for x in (rollout, padded))
    np.testing.assert_allclose(first.params, second.params, rtol=1e-5, atol=1e-6)
    for name, x in metrics.items():
        np.testing.assert_allclose(x, padded_metrics[name], rtol=1e-5, err_msg=name)


def test_nothing_after_a_terminated_step_is_read():
    w, rollout = np.float32(kernel()), as_arrays(rollout64(), jnp.float32)
    junk = rollout._replace(
        next_inputs=jnp.where(rollout.terminated[..., None], jnp.nan, rollout.next_inputs)
    )
    first, second = (step(w, x, ONE_STEP)[0] for x in (rollout, junk))
    np.testing.assert_allclose(first.params, second.params, rtol=1e-6)


def test_a_bad_row_is_left_out_whole_and_counted():
    w, rollout = np.float32(kernel()), as_arrays(rollout64(), jnp.float32)
    clean = rollout._replace(mask=jnp.ones((B, T), bool).at[jnp.array([1, 2])].set(False))
    bad = rollout._replace(
        reward=rollout.reward.at[1, 3].set(jnp.nan), action=rollout.action.at[2, 0].set(ACTIONS)
    )
    first, _ = step(w, clean, ONE_STEP)
    second, metrics = step(w, bad, ONE_STEP)
    np.testing.assert_allclose(first.params, second.params, rtol=1e-6)
    assert metrics["batch/invalid"] == 2 and metrics["batch/count"] == (B - 2) * T


def test_microbatches_and_the_order_of_rows_change_nothing():
    w, rollout = np.float32(kernel()), as_arrays(rollout64(), jnp.float32)
    whole, _ = step(w, rollout, ONE_STEP)
    parts, _ = step(w, rollout, dataclasses.replace(ONE_STEP, microbatches=3))
    other, _ = step(w, jax.tree.map(lambda x: np.asarray(x)[::-1], rollout), ONE_STEP)
    np.testing.assert_allclose(whole.params, parts.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole.params, other.params, rtol=1e-5, atol=1e-6)


def test_members_of_a_mapped_axis_make_one_step():
    """Each sees one environment of the four; all end where one that sees all does."""
    w, rollout = np.float32(kernel()), as_arrays(rollout64(), jnp.float32)
    whole, metrics = step(w, rollout, ONE_STEP)
    algorithm = pqn.make(evaluate, SGD, ONE_STEP, axis_name="data")
    mapped = jax.jit(jax.vmap(algorithm.update, (None, 0, None), axis_name="data"))
    parts = jax.tree.map(lambda x: np.asarray(x)[:, None], rollout)
    state, numbers = mapped(algorithm.init(jnp.asarray(w)), parts, jax.random.key(0))
    state, numbers = jax.tree.map(np.asarray, (state, numbers))
    for i in range(B):
        np.testing.assert_allclose(state.params[i], whole.params, rtol=1e-5, atol=1e-6)
        for name, x in metrics.items():
            np.testing.assert_allclose(numbers[name][i], x, rtol=1e-5, err_msg=name)


def test_targets_are_held_over_epochs_and_minibatches():
    """Four steps on the same targets, by a loop in the order that the key gives."""
    config = dataclasses.replace(ONE_STEP, epochs=2, minibatches=2)
    w, rollout, slow = np.float32(kernel()), as_arrays(rollout64(), jnp.float32), optax.sgd(0.1)
    algorithm = pqn.make(evaluate, slow, config)
    state, _ = jax.jit(algorithm.update)(algorithm.init(jnp.asarray(w)), rollout, jax.random.key(0))
    sample, _ = targets_of(config)(w, rollout)
    expected = np.asarray(w, np.float64)
    split = jax.jit(lambda sample, key: pqn.split_blocks(sample, 2, key))
    for key in jax.random.split(jax.random.key(0), 2):
        parts = split(sample, key)
        for i in range(2):
            x, action, target, _ = (np.asarray(field)[i] for field in parts)
            gradient = np.zeros_like(expected)
            for n in range(len(action)):
                gradient[:, action[n]] += (x[n] @ expected[:, action[n]] - target[n]) * x[n] / len(action)
            expected = expected - 0.1 * gradient
    np.testing.assert_allclose(state.params, expected, rtol=1e-4, atol=1e-5)
    assert state.step == 1


def test_a_table_converges_to_value_iteration():
    """A small deterministic world, walked at random and cut off at the end of every rollout."""
    states, actions, length = 4, 2, 200
    generator = np.random.default_rng(0)
    following = generator.integers(states, size=(states, actions))
    reward = jnp.asarray(generator.normal(size=(states, actions)), jnp.float32)
    transition = jax.nn.one_hot(jnp.asarray(following), states)
    path, choice = [0], generator.integers(actions, size=length)
    for t, action in enumerate(choice):
        cut = t % 10 == 8  # after which the walk is put elsewhere
        path.append(int(generator.integers(states) if cut else following[path[-1], action]))
    state, action = jnp.asarray(path[:-1])[None], jnp.asarray(choice)[None]
    never = jnp.zeros((1, length), bool)
    truncated = (jnp.arange(length)[None] % 10) == 8
    next_state = jnp.asarray(following)[state, action]
    rollout = pqn.Rollout(state, action, reward[state, action], never, truncated, next_state)
    # Peng's returns follow whoever acted; lam = 0 is one-step Q-learning, whose fixed point is the optimum.
    config = PQN(discount=0.9, lam=0.0, epochs=4, minibatches=1)
    algorithm = pqn.make(lambda q, s: q[s], optax.sgd(3.0), config)
    run = jax.jit(
        lambda s: jax.lax.scan(
            lambda s, key: algorithm.update(s, rollout, key), s, jax.random.split(jax.random.key(0), 300)
        )[0]
    )
    learnt = run(algorithm.init(jnp.zeros((states, actions)))).params
    optimum = optimal_action_values(transition, reward, discount=0.9)
    assert len(np.unique(np.stack([state, action]), axis=2)[0, 0]) == states * actions
    np.testing.assert_allclose(learnt, optimum, atol=1e-3)


def test_a_sweep_over_every_float_equals_separate_runs():
    floats: dict[str, Any] = {
        f.name: f.default for f in dataclasses.fields(PQN) if "float" in str(f.type)
    } | {"huber": 0.5}
    w, rollout = jnp.asarray(np.float32(kernel())), as_arrays(rollout64(), jnp.float32)
    scale = np.array([0.5, 1.0], np.float32)

    def learn(values):
        algorithm = pqn.make(evaluate, SGD, PQN(epochs=1, minibatches=2, **values))
        return algorithm.update(algorithm.init(w), rollout, jax.random.key(0))[0].params

    together = jax.jit(jax.vmap(learn))({name: x * scale for name, x in floats.items()})
    one = jax.jit(learn)
    alone = np.stack([one({name: x * s for name, x in floats.items()}) for s in scale])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_metrics_are_documented():
    _, update = compiled(ONE_STEP)
    state = pqn.make(evaluate, SGD, ONE_STEP).init(jnp.zeros((WIDTH, ACTIONS)))
    _, metrics = jax.eval_shape(update, state, as_arrays(rollout64(), jnp.float32), jax.random.key(0))
    assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())
    assert [name for name in metrics if name not in (pqn.__doc__ or "")] == []


def test_bad_input_is_named():
    def update(changes, **settings):
        algorithm = pqn.make(evaluate, SGD, PQN(**settings))
        rollout = as_arrays(rollout64(), jnp.float32)._replace(**changes)
        jax.eval_shape(algorithm.update, algorithm.init(jnp.asarray(kernel())), rollout, jax.random.key(0))

    rollout = rollout64()
    with pytest.raises(ValueError, match=r"discount=1.5 must be in \[0, 1\]"):
        update({}, discount=1.5)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        update({}, epochs=0)
    with pytest.raises(ValueError, match="24 rows cannot be cut into 5 equal parts"):
        update({}, minibatches=5)
    with pytest.raises(ValueError, match="rollout.next_inputs is missing"):
        update({"next_inputs": None})
    with pytest.raises(TypeError, match=r"rollout.action must be integer \[B, T\], got float32"):
        update({"action": jnp.asarray(rollout.reward, jnp.float32)})
    with pytest.raises(TypeError, match="rollout.reward must be float, got int32"):
        update({"reward": jnp.asarray(rollout.action)})
    with pytest.raises(ValueError, match=r"rollout.truncated has shape \(4, 5\)"):
        update({"truncated": jnp.zeros((B, T - 1), bool)})
    wrong = pqn.make(lambda p, x: jnp.zeros(3), SGD, ONE_STEP)
    with pytest.raises(ValueError, match=r"evaluate must give action values \[N, A\] with N = 24"):
        jax.eval_shape(wrong.update, wrong.init(jnp.zeros(1)), as_arrays(rollout), jax.random.key(0))
