"""DQN and its relatives with a linear network, against a float64 loop over transitions written from the papers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compiled
from precision import float64
from small_tables import optimal_action_values

from rlhfjax.algorithms import dqn
from rlhfjax.config import DQN

B, WIDTH, ACTIONS, QUANTILES = 6, 3, 4, 5
SGD = optax.sgd(1.0)
# Thresholds are such that some items fall on either side.
BASE = DQN(discount=0.9, huber=0.7, epsilon=0.3, temperature=0.4, munchausen_clip=-0.5, cql=0.2)
CONFIGS = {
    "max": dataclasses.replace(BASE, bootstrap="max"),
    "double": BASE,
    "sarsa": dataclasses.replace(BASE, bootstrap="sarsa"),
    "expected": dataclasses.replace(BASE, bootstrap="expected", huber=None),
    "soft": dataclasses.replace(BASE, bootstrap="soft", cql=None),
    "munchausen": dataclasses.replace(BASE, bootstrap="soft", munchausen=0.8),
    "quantiles-max": dataclasses.replace(BASE, bootstrap="max", quantiles=True),
    "quantiles-double": dataclasses.replace(BASE, quantiles=True, cql=None),
    "quantiles-sarsa": dataclasses.replace(BASE, bootstrap="sarsa", quantiles=True, huber=None),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def evaluate(params, observation):
    """Q linear in the observation: [B, A], or [B, A, N]."""
    return jnp.tensordot(observation, params["kernel"], 1)


def kernel(config, seed):
    shape = (WIDTH, ACTIONS, QUANTILES) if config.quantiles else (WIDTH, ACTIONS)
    return np.random.default_rng(seed).normal(size=shape)


def transitions(rows=B, seed=3) -> Any:
    """Float64 NumPy transitions, every optional field given, some terminated; no mask."""
    generator = np.random.default_rng(seed)
    fields: Any = (
        generator.normal(size=(rows, WIDTH)),
        generator.integers(ACTIONS, size=rows),
        generator.normal(size=rows),
        generator.normal(size=(rows, WIDTH)),
        np.arange(rows) % 3 == 1,
        generator.choice([0.9, 0.81], size=rows),
        generator.integers(ACTIONS, size=rows),
        generator.uniform(0.5, 1.5, size=rows),
    )
    return dqn.Batch(*fields)


def as_arrays(batch):
    """In the widest type that is switched on."""
    return jax.tree.map(jnp.asarray, batch)


def values64(kernel, observation):
    return np.tensordot(observation, kernel, 1)


def expected_target(w, w_target, batch, i, config):
    """One target by the definition: a number, or an array of quantiles."""
    reward = batch.reward_B[i]
    if config.munchausen is not None:
        q = values64(w_target, batch.inputs[i]) / config.temperature
        log_policy = q[batch.action_B[i]] - np.log(sum(np.exp(q)))
        reward += config.munchausen * max(config.munchausen_clip, min(0, config.temperature * log_policy))
    discount = config.discount if batch.discount_B is None else batch.discount_B[i]
    next_q = values64(w_target, batch.next_inputs[i])
    online = values64(w, batch.next_inputs[i])
    if config.bootstrap == "max":
        value = next_q[np.argmax(next_q.mean(-1) if config.quantiles else next_q)]
    elif config.bootstrap == "double":
        value = next_q[np.argmax(online.mean(-1) if config.quantiles else online)]
    elif config.bootstrap == "sarsa":
        value = next_q[batch.next_action_B[i]]
    elif config.bootstrap == "expected":
        policy = np.full(ACTIONS, config.epsilon / ACTIONS)
        policy[np.argmax(next_q)] += 1 - config.epsilon
        value = sum(policy * next_q)
    else:
        value = config.temperature * np.log(sum(np.exp(next_q / config.temperature)))
    if batch.terminated_B[i]:
        value = 0 * value
    return reward + discount * value


def huber64(x, threshold):
    size = abs(x)
    return 0.5 * x**2 if size <= threshold else threshold * (size - 0.5 * threshold)


def td_loss64(target, taken, config):
    if not config.quantiles:
        error = target - taken
        return 0.5 * error**2 if config.huber is None else huber64(error, config.huber)
    total = 0.0
    for i in range(QUANTILES):
        for j in range(QUANTILES):
            u = target[j] - taken[i]
            level = (2 * i + 1) / (2 * QUANTILES)
            size = abs(u) if config.huber is None else huber64(u, config.huber)
            total += abs(level - (u < 0)) * size / QUANTILES
    return total


def expected_sums(w, batch, targets, config):
    """The loss of the whole batch and what the metrics are made of, by a loop."""
    sums: dict[str, Any] = dict.fromkeys(
        ("loss/total", "loss/td", "loss/cql", "td/error", "q/taken", "q/target"), 0.0
    )
    for i in range(len(batch.action_B)):
        q = values64(w, batch.inputs[i])
        taken = q[batch.action_B[i]]
        mean_q = q.mean(-1) if config.quantiles else q
        cql = np.log(sum(np.exp(mean_q))) - mean_q[batch.action_B[i]]
        td = td_loss64(targets[i], taken, config)
        sums["loss/td"] += td
        sums["loss/cql"] += cql
        sums["loss/total"] += batch.weight_B[i] * (td + (config.cql or 0.0) * cql)
        sums["td/error"] += abs(np.mean(targets[i]) - np.mean(taken))
        sums["q/taken"] += np.mean(taken)
        sums["q/target"] += np.mean(targets[i])
    return sums


def numerical_gradient(function, x, width=1e-6):
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = width
        gradient[i] = (function(x + step) - function(x - step)) / (2 * width)
    return gradient


@functools.cache
def compiled_loss(config):
    """`(w, w_target, batch) -> ((total, sums), gradient)`, jitted once for each configuration."""

    def loss(w, w_target, batch):
        return dqn.loss(
            {"kernel": w}, batch, evaluate=evaluate, config=config, target_params={"kernel": w_target}
        )

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@configs
def test_loss_and_gradient_equal_the_loop(config):
    w, w_target, batch = kernel(config, 1), kernel(config, 2), transitions()
    targets = [expected_target(w, w_target, batch, i, config) for i in range(B)]
    with float64():
        (total, sums), gradient = compiled_loss(config)(*as_arrays((w, w_target, batch)))
        arguments = {
            "evaluate": evaluate,
            "config": config,
            "target_params": {"kernel": jnp.asarray(w_target)},
        }
        got = dqn.targets({"kernel": jnp.asarray(w)}, as_arrays(batch), **arguments)
        error = dqn.td_error({"kernel": jnp.asarray(w)}, as_arrays(batch), **arguments)
        assert got.dtype == total.dtype == jnp.float64
    np.testing.assert_allclose(got, np.stack(targets), rtol=0, atol=1e-12)
    expected = expected_sums(w, batch, targets, config)
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-12, atol=1e-12, err_msg=name)
    assert sums["count"] == B and sums["batch/invalid"] == 0
    taken = np.stack([values64(w, batch.inputs[i])[batch.action_B[i]] for i in range(B)])
    mean_error = (np.stack(targets) - taken).reshape(B, -1).mean(1)
    np.testing.assert_allclose(error, mean_error, rtol=0, atol=1e-12)
    np.testing.assert_allclose(sums["td/error_max"], max(abs(mean_error)), rtol=1e-12)
    # The targets are held: they get no gradient.
    numerical = numerical_gradient(lambda x: expected_sums(x, batch, targets, config)["loss/total"], w)
    np.testing.assert_allclose(gradient, numerical, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["max", "munchausen", "quantiles-double"])
def test_no_network_gets_a_gradient_through_the_target(name):
    """Also where the network being trained is its own target network."""
    config = CONFIGS[name]
    w, batch = kernel(config, 1).astype(np.float32), as_arrays(transitions())

    def loss(w):
        arguments = {"evaluate": evaluate, "config": config}
        return dqn.loss({"kernel": w}, batch, target_params={"kernel": w}, **arguments)[0]

    held = compiled_loss(config)(w, w, batch)[1]
    np.testing.assert_allclose(compiled(jax.grad(loss), w), held, rtol=1e-5, atol=1e-6)


def test_the_cases_are_on_both_sides_of_their_kinks():
    """Huber's threshold, Munchausen's floor and the double estimate all matter to the transitions above."""
    batch = transitions()
    config = CONFIGS["munchausen"]
    w, w_target = kernel(config, 1), kernel(config, 2)
    floors, errors, choices = set(), set(), set()
    for i in range(B):
        q = values64(w_target, batch.inputs[i])
        soft = config.temperature * np.log(sum(np.exp(q / config.temperature)))
        floors.add(bool(q[batch.action_B[i]] - soft < config.munchausen_clip))
        target = expected_target(w, w_target, batch, i, CONFIGS["double"])
        errors.add(bool(abs(target - values64(w, batch.inputs[i])[batch.action_B[i]]) > BASE.huber))
        greedy = [np.argmax(values64(x, batch.next_inputs[i])) for x in (w, w_target)]
        choices.add(greedy[0] == greedy[1])
    assert floors == errors == choices == {True, False}


def test_defaults_stand_for_the_missing_fields():
    """No discounts: the configured one. No weights: 1 each."""
    config = CONFIGS["double"]
    w, w_target = (kernel(config, i).astype(np.float32) for i in (1, 2))
    bare = as_arrays(transitions()._replace(discount_B=None, weight_B=None))
    full = bare._replace(discount_B=jnp.full(B, config.discount), weight_B=jnp.ones(B))
    first, second = (compiled_loss(config)(w, w_target, batch) for batch in (bare, full))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@configs
def test_masked_transitions_equal_dropped_ones(config):
    """Anything may lie under the mask, NaN in the observations too."""
    w, w_target = (kernel(config, i).astype(np.float32) for i in (1, 2))
    batch = as_arrays(transitions())
    junk: Any = (np.nan, 99, np.nan, np.inf, True, np.nan, -5, np.nan)
    places = np.array([0, 2, 3, 5, 6, 8])

    def pad(x, j):
        out = np.full((B + 3, *x.shape[1:]), j, x.dtype)
        out[places] = x
        return jnp.asarray(out)

    padded = jax.tree.map(pad, batch, dqn.Batch(*junk))
    padded = padded._replace(mask_B=jnp.asarray(np.isin(np.arange(B + 3), places)))
    first, second = (compiled_loss(config)(w, w_target, x) for x in (batch, padded))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert np.isfinite(second[1]).all()


@pytest.mark.parametrize("name", ["double", "sarsa", "munchausen", "quantiles-double"])
def test_what_follows_a_terminated_transition_is_not_read(name):
    config = CONFIGS[name]
    w, w_target = (kernel(config, i).astype(np.float32) for i in (1, 2))
    batch = as_arrays(transitions())
    ended = batch.terminated_B
    junk = batch._replace(
        next_inputs=jnp.where(ended[:, None], jnp.nan, batch.next_inputs),
        next_action_B=jnp.where(ended, 99, batch.next_action_B),
    )
    first, second = (compiled_loss(config)(w, w_target, x) for x in (batch, junk))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_bad_transitions_are_left_out_and_counted():
    config = CONFIGS["sarsa"]
    w, w_target = (kernel(config, i).astype(np.float32) for i in (1, 2))
    batch = as_arrays(transitions())
    clean = batch._replace(mask_B=jnp.arange(B) > 3)
    bad = batch._replace(
        action_B=batch.action_B.at[0].set(ACTIONS),
        reward_B=batch.reward_B.at[1].set(jnp.inf),
        next_action_B=batch.next_action_B.at[2].set(-1),
        weight_B=batch.weight_B.at[3].set(jnp.nan),
    )
    (total, sums), gradient = compiled_loss(config)(w, w_target, bad)
    (expected, _), expected_gradient = compiled_loss(config)(w, w_target, clean)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6)
    assert sums["batch/invalid"] == 4 and sums["count"] == B - 4
    algorithm = dqn.make(evaluate, SGD, config)
    _, metrics = jax.jit(algorithm.update)(algorithm.init({"kernel": w}), bad, jax.random.key(0))
    assert metrics["batch/invalid"] == 4 and metrics["batch/count"] == B - 4


def update(config, batch, w, steps=1):
    """States and metrics of some updates on one batch."""
    algorithm = dqn.make(evaluate, SGD, config)
    step, state, history = jax.jit(algorithm.update), algorithm.init({"kernel": w}), []
    for i in range(steps):
        state, metrics = step(state, batch, jax.random.key(i))
        history.append((state, metrics))
    return history


def test_microbatches_and_the_order_of_transitions_change_nothing():
    batch, w = as_arrays(transitions()), kernel(BASE, 1).astype(np.float32)
    order = np.array([3, 1, 5, 0, 2, 4])
    [(whole, metrics)] = update(BASE, batch, w)
    [(parts, parts_metrics)] = update(dataclasses.replace(BASE, microbatches=3), batch, w)
    [(other, other_metrics)] = update(BASE, jax.tree.map(lambda x: np.asarray(x)[order], batch), w)
    for state, numbers in ((parts, parts_metrics), (other, other_metrics)):
        np.testing.assert_allclose(whole.params["kernel"], state.params["kernel"], rtol=1e-5, atol=1e-6)
        for name, x in metrics.items():
            np.testing.assert_allclose(x, numbers[name], rtol=1e-5, err_msg=name)


def test_members_of_a_mapped_axis_make_one_step():
    """Each sees two of the six transitions; all end where one that sees all six does."""
    batch, w = as_arrays(transitions()), kernel(BASE, 1).astype(np.float32)
    [(whole, metrics)] = update(BASE, batch, w)
    algorithm = dqn.make(evaluate, SGD, BASE, axis_name="data")
    parts = jax.tree.map(lambda x: np.asarray(x).reshape(3, 2, *x.shape[1:]), batch)
    mapped = jax.jit(jax.vmap(algorithm.update, (None, 0, None), axis_name="data"))
    state, numbers = mapped(algorithm.init({"kernel": w}), parts, jax.random.key(0))
    state, numbers = jax.tree.map(np.asarray, (state, numbers))
    for i in range(3):
        np.testing.assert_allclose(state.params["kernel"][i], whole.params["kernel"], rtol=1e-5, atol=1e-6)
        for name, x in metrics.items():
            np.testing.assert_allclose(numbers[name][i], x, rtol=1e-5, err_msg=name)


def test_n_steps_of_one_are_the_transitions_themselves():
    rollout = jax.tree.map(
        lambda x: np.asarray(x[None], np.float32 if x.dtype == float else None), transitions()
    )
    rollout = rollout._replace(discount_B=None, weight_B=None)
    got: Any = compiled(dqn.n_step_transitions, rollout, discount=0.9, steps=1)
    np.testing.assert_allclose(got.discount_B, np.where(rollout.terminated_B, 0, 0.9), rtol=1e-6)
    for a, b in zip(jax.tree.leaves(got._replace(discount_B=None)), jax.tree.leaves(rollout), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_periodic_target_is_copied_and_an_average_follows():
    batch, w = as_arrays(transitions()), kernel(BASE, 1).astype(np.float32)
    history = update(dataclasses.replace(BASE, period=3), batch, w, steps=4)
    kernels = [np.asarray(state.params["kernel"]) for state, _ in history]
    expected = [w, w, kernels[2], kernels[2]]
    for (state, _), target in zip(history, expected, strict=True):
        np.testing.assert_array_equal(state.target_params["kernel"], target)
    assert history[-1][0].step == 4
    target = w
    for state, _ in update(dataclasses.replace(BASE, target="polyak", polyak=0.3), batch, w, steps=3):
        target = 0.7 * target + 0.3 * np.asarray(state.params["kernel"])
        np.testing.assert_allclose(state.target_params["kernel"], target, rtol=1e-5)


def test_a_table_converges_to_value_iteration():
    """Every (state, action) of a small world, its next states by their probability: DQN solves it exactly."""
    states, actions = 4, 2
    generator = np.random.default_rng(0)
    transition = jnp.asarray(0.9 * generator.dirichlet(np.full(states, 0.5), size=(states, actions)))
    reward = jnp.asarray(generator.normal(size=(states, actions)), jnp.float32)
    grid = np.stack(np.meshgrid(*map(np.arange, (states, actions, states + 1)), indexing="ij"), -1)
    s, a, next_s = (jnp.asarray(x) for x in grid.reshape(-1, 3).T)
    ends = 1 - jnp.sum(transition, axis=2, keepdims=True)
    weight = jnp.concatenate([transition, ends], axis=2)[s, a, next_s]
    batch = dqn.Batch(
        s, a, reward[s, a], jnp.where(next_s < states, next_s, 0), next_s == states, weight_B=weight
    )
    optimum = optimal_action_values(transition, reward, discount=0.9)
    for name in ("max", "double"):
        config = DQN(discount=0.9, bootstrap=name, huber=None, target="polyak", polyak=0.5)
        algorithm = dqn.make(lambda q, state: q[state], optax.sgd(0.5 * states * actions * 5), config)
        run = jax.jit(
            lambda state, a=algorithm: jax.lax.scan(
                lambda state, key: a.update(state, batch, key),
                state,
                jax.random.split(jax.random.key(0), 300),
            )[0]
        )
        state = run(algorithm.init(jnp.zeros((states, actions))))
        np.testing.assert_allclose(state.params, optimum, atol=1e-3)


def test_n_step_transitions_equal_a_walk_through_the_rollout():
    rows, length, steps = 2, 7, 3
    generator = np.random.default_rng(3)
    shape = (rows, length)
    fields = transitions(rows * length)
    terminated, truncated = generator.random(shape) < 0.2, generator.random(shape) < 0.2
    assert np.any(terminated) and np.any(truncated)
    rollout = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), fields)._replace(
        terminated_B=terminated, discount_B=None, weight_B=None
    )
    with float64():
        got: Any = jax.tree.map(
            np.asarray,
            compiled(
                dqn.n_step_transitions, as_arrays(rollout), discount=0.9, steps=steps, truncated=truncated
            ),
        )
    for b, t in np.ndindex(shape):
        reward, k = 0.0, 0
        for k in range(steps):
            reward += 0.9**k * rollout.reward_B[b, t + k]
            if terminated[b, t + k] or truncated[b, t + k] or t + k == length - 1:
                break
        ended = terminated[b, t + k]
        np.testing.assert_allclose(got.reward_B[b, t], reward, rtol=1e-12)
        np.testing.assert_allclose(got.discount_B[b, t], 0 if ended else 0.9 ** (k + 1), rtol=1e-12)
        np.testing.assert_array_equal(got.next_inputs[b, t], rollout.next_inputs[b, t + k])
        assert got.terminated_B[b, t] == ended
        assert got.next_action_B[b, t] == rollout.next_action_B[b, t + k]
    np.testing.assert_array_equal(got.inputs, rollout.inputs)


def test_a_sweep_over_every_float_equals_separate_runs():
    floats: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(DQN) if "float" in str(f.type)}
    floats |= {"huber": 0.5, "cql": 0.1, "munchausen": 0.9, "temperature": 0.5, "polyak": 0.3}
    batch, w = as_arrays(transitions()._replace(discount_B=None)), kernel(BASE, 1).astype(np.float32)
    scale = np.array([0.5, 1.0], np.float32)

    for bootstrap in ("soft", "expected"):
        base = DQN(bootstrap=bootstrap, target="polyak")

        def learn(values, base=base):
            values = (
                values if base.bootstrap == "soft" else {k: v for k, v in values.items() if k != "munchausen"}
            )
            algorithm = dqn.make(evaluate, SGD, dataclasses.replace(base, **values))
            state, _ = algorithm.update(algorithm.init({"kernel": w}), batch, jax.random.key(0))
            return state.params["kernel"], state.target_params["kernel"]

        together = jax.jit(jax.vmap(learn))({name: x * scale for name, x in floats.items()})
        one = jax.jit(learn)
        alone = [one({name: x * s for name, x in floats.items()}) for s in scale]
        for i in range(2):
            np.testing.assert_allclose(together[i], np.stack([x[i] for x in alone]), rtol=1e-5, atol=1e-6)


def test_metrics_are_documented_and_alike():
    names = []
    for config in CONFIGS.values():
        algorithm = dqn.make(evaluate, SGD, config)
        state = jax.eval_shape(algorithm.init, {"kernel": jnp.asarray(kernel(config, 1), jnp.float32)})
        _, metrics = jax.eval_shape(algorithm.update, state, as_arrays(transitions()), jax.random.key(0))
        assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())
        names.append(sorted(metrics))
    assert all(x == names[0] for x in names)
    assert [name for name in names[0] if name not in (dqn.__doc__ or "")] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bootstrap": "maximum"}, "bootstrap='maximum' is unknown; choose among max, double"),
        ({"target": "soft"}, "target='soft' is unknown; choose among periodic, polyak"),
        ({"discount": 1.5}, r"discount=1.5 must be in \[0, 1\]"),
        ({"polyak": -0.1}, r"polyak=-0.1 must be in \[0, 1\]"),
        ({"period": 0}, "period must be at least 1"),
        ({"munchausen": 0.9}, 'munchausen needs bootstrap="soft"'),
        ({"quantiles": True, "bootstrap": "soft"}, "quantiles are those of one action"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dqn.make(evaluate, SGD, DQN(**settings))


def test_bad_input_is_named():
    def loss(batch, **settings):
        config = DQN(**settings)
        w = {"kernel": jnp.asarray(kernel(config, 1), jnp.float32)}
        dqn.loss(w, batch, evaluate=evaluate, config=config, target_params=w)

    batch = as_arrays(transitions())
    with pytest.raises(ValueError, match="needs batch.next_action_B"):
        loss(batch._replace(next_action_B=None), bootstrap="sarsa")
    with pytest.raises(ValueError, match=r"batch.reward_B must be \[B\] = \(6,\), got shape \(6, 1\)"):
        loss(batch._replace(reward_B=batch.reward_B[:, None]))
    with pytest.raises(TypeError, match="batch.reward_B must be float, got int32"):
        loss(batch._replace(reward_B=batch.action_B))
    with pytest.raises(TypeError, match="batch.action_B must be integer, got float32"):
        loss(batch._replace(action_B=batch.reward_B))
    with pytest.raises(TypeError, match="batch.terminated_B must be bool"):
        loss(batch._replace(terminated_B=batch.reward_B))
    wrong = DQN()
    w = {"kernel": jnp.zeros((WIDTH, ACTIONS, QUANTILES))}
    with pytest.raises(ValueError, match=r"evaluate must give action values \[B, A\] with B = 6"):
        dqn.loss(w, batch, evaluate=evaluate, config=wrong, target_params=w)
