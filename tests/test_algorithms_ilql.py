"""Q-learning from episodes of turns: values and gradients against a float64 loop, every bootstrap's fixed point."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from precision import float64

from rlhfjax.algorithms import ilql
from rlhfjax.algorithms.turns import at_next_action
from rlhfjax.config import ILQL

ROWS, LENGTH, STATES, ACTIONS, HEADS = 4, 6, 5, 3, 2
SGD = optax.sgd(1.0)
FULL = ILQL(discount=0.9, expectile=0.8, cql_coefficient=0.3, advantage_beta=0.7)
CONFIGS = {
    "ilql": FULL,
    "plain ilql": dataclasses.replace(FULL, advantage_beta=None, policy_coefficient=0.5),
    "sarsa": ILQL("sarsa", 0.9, lam=0.6, expectile=None, policy_coefficient=None),
    "dqn": ILQL("max", 0.9, expectile=None, cql_coefficient=None, policy_coefficient=None),
    "monte carlo": ILQL("returns", 0.9, expectile=0.5, policy_coefficient=None),
    "clipped": dataclasses.replace(FULL, weight_clip=1.1),
}


def arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def evaluate(params, inputs) -> ilql.Evaluation:
    """Tables: Q of every head, V, and the logits of a policy."""
    state, action = inputs["state"], inputs["action"]
    q, value = params["q"], params["value"]
    return ilql.Evaluation(
        taken=q[:, state, action],
        value=value[state],
        log_softmax=jax.nn.log_softmax(q)[:, state, action],
        logp=jax.nn.log_softmax(params["policy"])[state, action],
        best=jnp.max(jnp.min(q, axis=0), axis=-1)[state],
        final=value[inputs["end"]],
    )


def evaluate_target(target, inputs, params) -> ilql.Evaluation:
    """With double Q-learning: the tables in training choose, those of the target value."""
    lowest = jnp.min(target["q"], axis=0)
    best = lowest[jnp.arange(STATES), jnp.argmax(jnp.min(params["q"], axis=0), axis=-1)]
    taken = target["q"][:, inputs["state"], inputs["action"]]
    return ilql.Evaluation(taken, best=best[inputs["state"]], final=best[inputs["end"]])


def tables(seed):
    generator = np.random.default_rng(seed)
    shapes = {"q": (HEADS, STATES, ACTIONS), "value": (STATES,), "policy": (STATES, ACTIONS)}
    return {name: generator.normal(size=shape) for name, shape in shapes.items()}


def episodes(dtype: Any = np.float32) -> ilql.Episodes:
    """Ragged, the agent's tokens between others'; the last row has none. NaN where masked."""
    generator = np.random.default_rng(5)
    mask = np.array([[0, 1, 1, 0, 0, 1], [1, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0] * 6], bool)
    inputs = {
        "state": generator.integers(STATES, size=mask.shape),
        "action": generator.integers(ACTIONS, size=mask.shape),
        "end": generator.integers(STATES, size=ROWS),
    }
    reward = np.where(mask, generator.normal(size=mask.shape), np.nan).astype(dtype)
    truncated = np.array([False, True, False, False])
    return ilql.Episodes(*arrays((inputs, reward, mask, truncated)))


def log_softmax64(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def expected_targets(fixed, target, row, config):
    """y of the actions of one row, last to first, from the definitions; `row` is (places, states, ...)."""
    states, actions, rewards, end, truncated = row
    slow = target["q"].min(0)
    best = slow[np.arange(STATES), fixed["q"].min(0).argmax(-1)]
    y = np.zeros(len(states))
    for i in reversed(range(len(states))):
        is_last = i + 1 == len(states)
        if config.bootstrap == "value":
            later = fixed["value"][end] * truncated if is_last else fixed["value"][states[i + 1]]
        elif config.bootstrap == "max":
            later = best[end] * truncated if is_last else best[states[i + 1]]
        elif is_last:
            later = fixed["value"][end] * truncated
        else:
            lam = 1.0 if config.bootstrap == "returns" else config.lam
            later = (1 - lam) * slow[states[i + 1], actions[i + 1]] + lam * y[i + 1]
        y[i] = rewards[i] + config.discount * later
    return y


def expected_loss(params, fixed, target, batch, config):
    """Sum over the actions, by a loop; `fixed` are the params as constants, where no gradient flows."""
    total = 0.0
    for row in range(batch.mask.shape[0]):
        places = np.flatnonzero(batch.mask[row])
        states, actions = batch.inputs["state"][row][places], batch.inputs["action"][row][places]
        end = batch.inputs["end"][row]
        y = expected_targets(
            fixed, target, (states, actions, batch.reward[row][places], end, batch.truncated[row]), config
        )
        for s, a, goal in zip(states, actions, y, strict=True):
            for head in range(HEADS):
                total += (goal - params["q"][head, s, a]) ** 2
                if config.cql_coefficient is not None:
                    total -= config.cql_coefficient * log_softmax64(params["q"][head, s])[a]
            if config.expectile is not None:
                u = target["q"][:, s, a].min() - params["value"][s]
                total += abs(config.expectile - (u < 0)) * u**2
            if config.policy_coefficient is not None:
                weight = 1.0
                if config.advantage_beta is not None:
                    u = target["q"][:, s, a].min() - fixed["value"][s]
                    weight = min(np.exp(config.advantage_beta * u), config.weight_clip or np.inf)
                total -= config.policy_coefficient * weight * log_softmax64(params["policy"][s])[a]
    return total


def numerical_gradient(function, params, width=1e-6):
    """Central differences of a scalar function of a dict of float64 arrays."""
    gradient = jax.tree.map(np.zeros_like, params)
    for name, x in params.items():
        for i in np.ndindex(x.shape):
            ends = []
            for sign in (1, -1):
                moved = {**params, name: x.copy()}
                moved[name][i] += sign * width
                ends.append(function(moved))
            gradient[name][i] = (ends[0] - ends[1]) / (2 * width)
    return gradient


@functools.cache
def value_and_gradient(config):
    def loss(params, target, batch):
        return ilql.loss(
            params, batch, target=target, evaluate=evaluate, config=config, evaluate_target=evaluate_target
        )

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_loss_and_gradient_equal_a_loop_over_actions(name):
    config, params, target = CONFIGS[name], tables(0), tables(1)
    with float64():
        batch = episodes(np.float64)
        (total, sums), gradient = value_and_gradient(config)(params, target, batch)
        total, sums, gradient, batch = as_numpy((total, sums, gradient, batch))
    expected = expected_loss(params, params, target, batch, config)
    np.testing.assert_allclose(total, expected, rtol=1e-12)
    assert sums["count"] == 11 and np.isfinite(list(sums.values())).all()
    numerical = numerical_gradient(lambda p: expected_loss(p, params, target, batch, config), params)
    for part in params:
        np.testing.assert_allclose(gradient[part], numerical[part], rtol=1e-5, atol=1e-7, err_msg=part)


def test_the_next_state_is_that_of_the_next_action():
    """A hand-made episode: the agent says two tokens, its environment three, the agent one."""
    mask = jnp.array([[True, True, False, False, False, True]])
    value = jnp.array([[1.0, 2.0, jnp.nan, 30.0, jnp.inf, 4.0]])
    np.testing.assert_array_equal(at_next_action(value, mask), [[2.0, 4.0, 0.0, 0.0, 0.0, 0.0]])
    cut = at_next_action(value, mask, jnp.array([7.0]))
    np.testing.assert_array_equal(cut, [[2.0, 4.0, 0.0, 0.0, 0.0, 7.0]])


def test_memory_grows_with_the_tokens_and_not_with_their_square():
    def temporary(length):
        x, mask = (jax.ShapeDtypeStruct((2, length), dtype) for dtype in (jnp.float32, jnp.bool_))
        analysis = jax.jit(at_next_action).lower(x, mask).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary(4096) < 8 * temporary(1024)


def gradient_of(batch, name="ilql"):
    params, target = jax.tree.map(jnp.float32, (tables(0), tables(1)))
    return value_and_gradient(CONFIGS[name])(params, target, batch)


def test_masked_places_equal_dropped_ones_and_rows_may_stand_in_any_order():
    """The agent's tokens alone, one after the other, give the same as with the environment's between them."""
    batch = episodes()
    order = np.array([2, 0, 3, 1])
    rows = jax.tree.map(lambda x: x[order], batch)
    place = np.stack([np.argsort(~row, kind="stable") for row in np.asarray(batch.mask)])

    def packed(x):
        return jnp.take_along_axis(x, jnp.asarray(place), axis=1) if x.ndim == 2 else x

    (total, sums), gradient = gradient_of(batch)
    for other in (rows, jax.tree.map(packed, batch)):
        (same, same_sums), same_gradient = gradient_of(other)
        np.testing.assert_allclose(same, total, rtol=1e-6)
        np.testing.assert_allclose(same_sums["value/advantage"], sums["value/advantage"], rtol=1e-5)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), same_gradient, gradient
        )


def test_what_the_network_says_at_masked_places_reaches_nothing():
    batch, params, target = episodes(), *jax.tree.map(jnp.float32, (tables(0), tables(1)))
    hole = jnp.where(batch.mask, 0.0, jnp.nan)

    def spoiled(params, inputs):
        given: Any = evaluate(params, inputs)
        holes = jnp.broadcast_to(hole, given.taken.shape)
        return ilql.Evaluation(
            taken=given.taken + holes,
            value=given.value + hole,
            log_softmax=given.log_softmax + holes,
            logp=given.logp + hole,
            final=given.final,
        )

    results = []
    for each in (evaluate, spoiled):
        loss = functools.partial(ilql.loss, target=target, evaluate=each, config=FULL)
        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch))
    assert np.isfinite(results[0][0][0])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), *results)


def test_an_episode_with_a_reward_that_is_not_finite_is_left_out_whole():
    batch = episodes()
    spoiled = batch._replace(reward=batch.reward.at[2, 3].set(jnp.nan))
    without = batch._replace(mask=batch.mask.at[2].set(False))
    (total, sums), gradient = gradient_of(spoiled)
    (same, same_sums), same_gradient = gradient_of(without)
    assert total == same and sums["count"] == same_sums["count"] == 5
    jax.tree.map(np.testing.assert_array_equal, gradient, same_gradient)


@functools.cache
def compiled(config):
    algorithm = ilql.make(
        evaluate, SGD, config, target_of=lambda p: {"q": p["q"]}, evaluate_target=evaluate_target
    )
    return algorithm.init, jax.jit(algorithm.update)


def test_microbatches_change_nothing_and_the_target_follows():
    params = jax.tree.map(jnp.float32, tables(0))
    results = []
    for microbatches in (1, 2):
        init, update = compiled(dataclasses.replace(FULL, microbatches=microbatches, polyak=0.25))
        state = init(params)
        assert set(state.target) == {"q"}
        results.append(update(state, episodes(), jax.random.key(0)))
    (state, metrics), (other, _) = results
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(compare, state.params, other.params)
    np.testing.assert_allclose(
        state.target["q"], 0.75 * params["q"] + 0.25 * state.params["q"], rtol=1e-5, atol=1e-6
    )
    assert int(state.step) == 1 and metrics["batch/episodes"] == 3 and metrics["batch/without_action"] == 1
    assert [name for name in metrics if name not in str(ilql.__doc__)] == []
    assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())


def chain(first_rewards):
    """Two decisions between which the environment speaks: state 0, then state 1 or 2 by the first action."""
    reward = np.array([[0.5, 1.0, 0.0], [4.0, 0.0, 1.0], [0.0, 2.0, 3.0]])
    rows = [(a, b) for a in (0, 1) for b in range(ACTIONS)]
    state = np.array([[0, 4, 1 + a] for a, _ in rows])
    action = np.array([[a, 0, b] for a, b in rows])
    gain = np.array([[first_rewards[a], np.nan, reward[1 + a, b]] for a, b in rows], np.float32)
    mask = np.array([[True, False, True]] * len(rows))
    inputs = {"state": state, "action": action, "end": np.zeros(len(rows), int)}
    return ilql.Episodes(*arrays((inputs, gain, mask))), reward


FIXED_POINTS = {
    # Q of the first two actions: reward plus discount times what follows of each bootstrap.
    "max": (ILQL("max", 0.9, expectile=None), (4.0, 3.0)),
    "sarsa": (ILQL("sarsa", 0.9, expectile=None), (5 / 3, 5 / 3)),
    "lambda": (ILQL("sarsa", 0.9, lam=0.5, expectile=None), (5 / 3, 5 / 3)),
    "returns": (ILQL("returns", 0.9, expectile=None), (5 / 3, 5 / 3)),
    "value": (ILQL("value", 0.9, expectile=0.5), (5 / 3, 5 / 3)),
    "expectile": (ILQL("value", 0.9, expectile=0.999), (4.0, 3.0)),
}


@pytest.mark.parametrize("name", list(FIXED_POINTS))
def test_every_bootstrap_learns_the_value_that_it_stands_for(name):
    """The mean of the data's policy, or its best action; a high expectile comes close to the latter."""
    config, following = FIXED_POINTS[name]
    config = dataclasses.replace(config, cql_coefficient=None, policy_coefficient=None, polyak=1.0)
    batch, _ = chain((0.1, 0.2))
    algorithm = ilql.make(evaluate, optax.adam(optax.linear_schedule(0.1, 0.001, 2500)), config)
    params = jax.tree.map(jnp.zeros_like, jax.tree.map(jnp.float32, tables(0)))

    def step(state, key):
        return algorithm.update(state, batch, key)

    run = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(0), 3000)))
    state, _ = run(algorithm.init(params))
    expected = [0.1 + 0.9 * following[0], 0.2 + 0.9 * following[1]]
    tolerance = 0.03 if name == "expectile" else 5e-3
    np.testing.assert_allclose(state.params["q"][:, 0, :2], [expected] * 2, atol=tolerance)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bootstrap": "td"}, "choose among value, sarsa, max, returns"),
        ({"discount": 1.5}, "discount=1.5 must lie in"),
        ({"expectile": None, "advantage_beta": None}, 'bootstrap="value" needs V'),
        ({"expectile": 1.0}, "expectile=1.0 must lie between"),
        ({"polyak": 0.0}, "polyak=0.0 must lie in"),
        ({"bootstrap": "returns", "expectile": None}, "advantage_beta weights by Q - V"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, told):
    with pytest.raises(ValueError, match=told.replace("(", r"\(")):
        ilql.make(evaluate, SGD, dataclasses.replace(FULL, **change))


def test_a_batch_that_does_not_fit_is_refused():
    batch, params = episodes(), jax.tree.map(jnp.float32, tables(0))

    def run(batch, evaluate=evaluate, config=FULL):
        return ilql.loss(params, batch, target=params, evaluate=evaluate, config=config)

    with pytest.raises(TypeError, match="batch.reward must be float"):
        run(batch._replace(reward=batch.mask.astype(jnp.int32)))
    with pytest.raises(TypeError, match="must be bool"):
        run(batch._replace(mask=batch.mask.astype(jnp.float32)))
    with pytest.raises(ValueError, match=r"must have one shape \[B, ..., T\]"):
        run(batch._replace(mask=batch.mask[:, :-1]))
    with pytest.raises(ValueError, match="one flag an episode"):
        run(batch._replace(truncated=batch.mask))
    with pytest.raises(ValueError, match="gave no final value"):
        run(batch, lambda p, x: evaluate(p, x)._replace(final=None))
    with pytest.raises(ValueError, match="gave no value: expectile is set"):
        run(batch, lambda p, x: evaluate(p, x)._replace(value=None))
    with pytest.raises(ValueError, match="it must be"):
        run(batch, lambda p, x: evaluate(p, x)._replace(taken=evaluate(p, x).taken[0]))
    with pytest.raises(ValueError, match="target_of picks a part"):
        ilql.make(evaluate, SGD, FULL, target_of=lambda p: p["q"])
