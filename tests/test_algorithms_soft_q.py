"""Soft Q-learning: against a float64 loop, at the closed form, and from uniform data to the exact optimum."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from precision import float64
from test_algorithms_ilql import arrays, as_numpy, log_softmax64, numerical_gradient

from rlhfjax.algorithms import soft_q
from rlhfjax.config import Enumerable, SoftQ
from rlhfjax.environments import enumerable

ROWS, STATES, ACTIONS = 4, 5, 3
SGD = optax.sgd(1.0)
BASE = SoftQ(beta=0.4, discount=0.9)
CONFIGS = {
    "one step": BASE,
    "two steps": dataclasses.replace(BASE, steps=(2,)),
    "to the end": dataclasses.replace(BASE, steps=(0,)),
    "several": dataclasses.replace(BASE, steps=(1, 0)),
    "both": dataclasses.replace(BASE, gradient="both"),
    "both, two steps": dataclasses.replace(BASE, gradient="both", steps=(2,)),
    "no target": dataclasses.replace(BASE, polyak=None),
}


def evaluate(params, inputs) -> soft_q.Evaluation:
    """A table of logits, shifted by the reference's."""
    log_partition = jax.nn.logsumexp(params["logits"], axis=-1) - inputs["normaliser_ref"][0]
    logp = jax.nn.log_softmax(params["logits"])[inputs["state"], inputs["action"]]
    return soft_q.Evaluation(logp, log_partition[inputs["state"]], log_partition[inputs["end"]])


def table(seed):
    return {"logits": np.random.default_rng(seed).normal(size=(STATES, ACTIONS))}


REFERENCE = table(9)["logits"]


def paths(dtype: Any = np.float32) -> soft_q.Batch:
    """Ragged, others' tokens between the agent's; the last row has no action. NaN where masked."""
    generator = np.random.default_rng(5)
    mask = np.array([[0, 1, 1, 0, 0, 1], [1, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0] * 6], bool)
    state, action = generator.integers(STATES, size=mask.shape), generator.integers(ACTIONS, size=mask.shape)
    normaliser = np.log(np.exp(REFERENCE).sum(-1))
    inputs = {
        "state": state,
        "action": action,
        "end": generator.integers(STATES, size=ROWS),
        "normaliser_ref": np.tile(normaliser.astype(dtype), (ROWS, 1)),
    }
    logp_ref = np.where(mask, log_softmax64(REFERENCE)[state, action], np.nan).astype(dtype)
    reward = np.where(mask, generator.normal(size=mask.shape), np.nan).astype(dtype)
    truncated = np.array([False, True, False, False])
    return soft_q.Batch(*arrays((inputs, logp_ref, reward, mask, truncated)))


def value64(params, config):
    return config.beta * np.log(np.exp(params["logits"]).sum(-1) / np.exp(REFERENCE).sum(-1))


def expected_loss(params, target, batch, config):
    """Sum of squared errors by a loop over actions and paths; `target` is where the end's value comes from."""
    value, total = value64(params, config), 0.0
    later = value64(params if target is None else target, config)
    logp = log_softmax64(params["logits"])
    for row in range(ROWS):
        places = np.flatnonzero(batch.mask[row])
        states, actions = batch.inputs["state"][row][places], batch.inputs["action"][row][places]
        ends = [*later[states], later[batch.inputs["end"][row]] * batch.truncated[row]]
        gain = [
            batch.reward[row, t] - config.beta * (logp[s, a] - batch.logp_ref[row, t])
            for t, s, a in zip(places, states, actions, strict=True)
        ]
        for i in range(len(places)):
            for steps in config.steps:
                stop = min(i + steps, len(places)) if steps else len(places)
                right = sum(config.discount ** (j - i) * gain[j] for j in range(i, stop))
                right += config.discount ** (stop - i) * ends[stop]
                total += (value[states[i]] - right) ** 2 / len(config.steps)
    return total


@pytest.mark.parametrize("name", list(CONFIGS))
def test_loss_and_gradient_equal_a_loop_over_paths(name):
    config, params = CONFIGS[name], table(0)
    target = None if name == "no target" else table(1)
    # With "both" the end is trained too; without a target network it is the params' own, held fixed.
    fixed = {"both": None, "both, two steps": None, "no target": params}.get(name, target)
    with float64():
        batch = paths(np.float64)
        loss = functools.partial(soft_q.loss, evaluate=evaluate, config=config, target=target)
        (total, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
        total, sums, gradient, batch = as_numpy((total, sums, gradient, batch))
    np.testing.assert_allclose(total, expected_loss(params, fixed, batch, config), rtol=1e-12)
    assert sums["count"] == 11 and np.isfinite(list(sums.values())).all()
    numerical = numerical_gradient(lambda p: expected_loss(p, fixed, batch, config), params)
    np.testing.assert_allclose(gradient["logits"], numerical["logits"], rtol=1e-5, atol=1e-7)


# ---- the enumerable language model

BETA = 0.5
WORLD = Enumerable(vocab_size=4, length=2)
STOPPING = Enumerable(vocab_size=3, length=3, stop_token=0)


@functools.cache
def world(config):
    """All sequences, the reference's table, rewards, and a batch with every sequence once: uniform data."""
    inputs = enumerable.sequences(config)
    generator = np.random.default_rng(2)
    logits_ref = generator.normal(size=(enumerable.count_prefixes(config), config.vocab_size))
    reward = generator.normal(size=inputs.mask.shape[0])
    logp_ref = log_softmax64(logits_ref)[inputs.prefix, inputs.token]
    last = np.cumsum(inputs.mask[:, ::-1], axis=1)[:, ::-1] == 1
    rewards = np.where(last & inputs.mask, reward[:, None], 0.0)
    batch = arrays((inputs, logp_ref.astype(np.float32), rewards.astype(np.float32), inputs.mask))
    return inputs, logits_ref, reward, soft_q.Batch(*batch)


def enumerated_evaluate(config):
    normaliser_ref = np.log(np.exp(world(config)[1]).sum(-1)).astype(np.float32)

    def evaluate(params, inputs):
        log_partition = jax.nn.logsumexp(params["logits"], axis=-1) - normaliser_ref
        logp, _, _ = enumerable.tabular(params | {"value": log_partition}, inputs)
        return logp, log_partition[inputs.prefix]

    return evaluate


def optimum(config):
    """The optimal policy's log-probabilities, its logits in this parametrisation, and all soft values, exactly."""
    inputs, logits_ref, reward, _ = world(config)
    logp_ref = enumerable.table_logp(logits_ref, inputs)
    best = enumerable.optimal_policy(logp_ref, reward, beta=BETA)
    value = enumerable.soft_value(config, logp_ref, reward, inputs, beta=BETA)
    logits = enumerable.conditional_logp(config, best, inputs) + value[:, None] / BETA
    return best, logits + np.log(np.exp(logits_ref).sum(-1, keepdims=True)), value


@pytest.mark.parametrize("config", [WORLD, STOPPING], ids=["all of one length", "with a stop token"])
@pytest.mark.parametrize("steps", [(1,), (2,), (0,)])
def test_no_path_has_an_error_at_the_closed_form(config, steps):
    """Q* = V* + beta log(pi* / ref), V*(start) = beta log Z: every path is consistent, every gradient 0."""
    _, logits, value = optimum(config)
    batch = world(config)[3]
    settings = SoftQ(beta=BETA, steps=steps, gradient="both")
    loss = functools.partial(soft_q.loss, evaluate=enumerated_evaluate(config), config=settings)
    params = {"logits": jnp.asarray(logits, jnp.float32)}
    (total, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    assert total < 1e-10 and np.abs(gradient["logits"]).max() < 1e-4
    expected = np.sum(np.where(batch.mask, value[batch.inputs.prefix], 0.0))
    np.testing.assert_allclose(sums["value/mean"], expected, rtol=1e-4, atol=1e-4)


def distance(config, logits):
    """Total variation from pi*, and the error of V(start) against beta log Z."""
    inputs, logits_ref, reward, _ = world(config)
    logp_ref = enumerable.table_logp(logits_ref, inputs)
    best = enumerable.optimal_policy(logp_ref, reward, beta=BETA)
    logits = np.asarray(logits, np.float64)
    variation = enumerable.total_variation(enumerable.table_logp(logits, inputs), best)
    start = BETA * np.log(np.exp(logits[0]).sum() / np.exp(logits_ref[0]).sum())
    return variation, abs(start - enumerable.optimal_objective(logp_ref, reward, beta=BETA))


@functools.cache
def trained(config, settings, draw=None, steps=4000):
    """Logits after training; `draw(logits, key)` gives the numbers of the sequences of a step, None: all, once each."""
    inputs, logits_ref, _, batch = world(config)
    schedule = optax.cosine_decay_schedule(0.05, steps)
    algorithm = soft_q.make(enumerated_evaluate(config), optax.adam(schedule), settings)

    def step(state, key):
        of_step = batch
        if draw is not None:
            index = draw(state.params["logits"], key)
            of_step = jax.tree.map(lambda x: x[index], batch)
        return algorithm.update(state, of_step, key)

    run = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(0), steps))[0])
    return run(algorithm.init({"logits": jnp.asarray(logits_ref, jnp.float32)})).params["logits"]


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (WORLD, SoftQ(beta=BETA, polyak=0.05)),
        (WORLD, SoftQ(beta=BETA, polyak=None, steps=(1, 0))),
        (WORLD, SoftQ(beta=BETA, gradient="both")),
        (WORLD, SoftQ(beta=BETA, steps=(0,))),
        (STOPPING, SoftQ(beta=BETA, polyak=0.05, steps=(1, 2))),
    ],
    ids=["one step", "mixed", "both ends", "to the end", "with a stop token"],
)
def test_uniform_off_policy_data_lead_to_the_optimum(config, settings):
    assert distance(config, world(config)[1])[0] > 0.1  # it starts at the reference, far away
    variation, start = distance(config, trained(config, settings))
    assert variation < 1e-3 and start < 1e-3


def sampled(logits, key):
    """Thirty-two sequences of the policy itself."""
    logp = enumerable.table_logp(logits, jax.tree.map(jnp.asarray, world(WORLD)[0]))
    return enumerable.sample(key, logp, (32,))


def uniform(logits, key):
    return jax.random.randint(key, (32,), 0, 16)


@pytest.mark.parametrize("draw", [sampled, uniform], ids=["on policy", "off policy"])
def test_samples_lead_to_the_optimum_whoever_drew_them(draw):
    """At the optimum the error is 0 on every path, so samples leave no noise."""
    variation, start = distance(WORLD, trained(WORLD, SoftQ(beta=BETA, polyak=0.05), draw))
    assert variation < 1e-3 and start < 1e-3


# ---- the update


def test_microbatches_change_nothing_and_the_target_follows():
    params, results = {"logits": jnp.asarray(table(0)["logits"], jnp.float32)}, []
    for microbatches in (1, 2):
        config = dataclasses.replace(BASE, microbatches=microbatches, polyak=0.25)
        algorithm = soft_q.make(evaluate, SGD, config)
        results.append(jax.jit(algorithm.update)(algorithm.init(params), paths(), jax.random.key(0)))
    (state, metrics), (other, _) = results
    np.testing.assert_allclose(state.params["logits"], other.params["logits"], rtol=1e-5, atol=1e-6)
    expected = 0.75 * np.asarray(params["logits"]) + 0.25 * np.asarray(state.params["logits"])
    np.testing.assert_allclose(state.target["logits"], expected, rtol=1e-5, atol=1e-6)
    assert metrics["batch/episodes"] == 3 and metrics["batch/without_action"] == 1
    assert [name for name in metrics if name not in str(soft_q.__doc__)] == []
    assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())


def test_masked_places_equal_dropped_ones_and_rows_may_stand_in_any_order():
    batch, params = paths(), {"logits": jnp.asarray(table(0)["logits"], jnp.float32)}
    order = np.array([2, 0, 3, 1])
    place = np.stack([np.argsort(~row, kind="stable") for row in np.asarray(batch.mask)])

    def packed(x):
        return np.take_along_axis(x, place, axis=1) if x.shape == place.shape else x

    loss = functools.partial(soft_q.loss, evaluate=evaluate, config=CONFIGS["several"], target=params)
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, _), expected = gradient(params, batch)
    rows = jax.tree.map(np.asarray, batch)
    for other in (jax.tree.map(lambda x: x[order], rows), jax.tree.map(packed, rows)):
        (same, _), given = gradient(params, other)
        np.testing.assert_allclose(same, total, rtol=1e-6)
        np.testing.assert_allclose(given["logits"], expected["logits"], rtol=1e-5, atol=1e-6)


def test_without_use_for_a_target_network_there_is_none():
    params = {"logits": jnp.zeros((STATES, ACTIONS))}
    for config in (CONFIGS["no target"], CONFIGS["both"], CONFIGS["to the end"]):
        assert soft_q.make(evaluate, SGD, config).init(params).target is None
    assert soft_q.make(evaluate, SGD, BASE).init(params).target is not None


def test_coefficients_may_be_swept_by_vmap():
    params, batch = {"logits": jnp.zeros((STATES, ACTIONS))}, paths()

    def total(beta, polyak):
        algorithm = soft_q.make(evaluate, SGD, dataclasses.replace(BASE, beta=beta, polyak=polyak))
        return algorithm.update(algorithm.init(params), batch, jax.random.key(0))[1]["loss/total"]

    swept = jax.jit(jax.vmap(total))(jnp.array([0.4, 0.8]), jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(swept[0], jax.jit(total)(jnp.float32(0.4), jnp.float32(0.1)), rtol=1e-6)
    assert swept[0] != swept[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"gradient": "end"}, "choose among start, both"),
        ({"discount": -0.1}, "discount=-0.1 must lie in"),
        ({"beta": 0.0}, "beta=0.0 must be above 0"),
        ({"steps": ()}, "must name path lengths"),
        ({"steps": (-1,)}, "must name path lengths"),
        ({"polyak": 0.0}, "polyak=0.0 must lie in"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, told):
    with pytest.raises(ValueError, match=told):
        soft_q.make(evaluate, SGD, dataclasses.replace(BASE, **change))


def test_a_batch_that_does_not_fit_is_refused():
    batch, params = paths(), {"logits": jnp.zeros((STATES, ACTIONS))}

    def run(batch, evaluate=evaluate):
        return soft_q.loss(params, batch, evaluate=evaluate, config=BASE)

    with pytest.raises(TypeError, match="batch.reward must be float"):
        run(batch._replace(reward=batch.mask.astype(jnp.int32)))
    with pytest.raises(ValueError, match="logp_ref of shape"):
        run(batch._replace(logp_ref=batch.logp_ref[:, :-1]))
    with pytest.raises(ValueError, match="gave no final value"):
        run(batch, lambda p, x: evaluate(p, x)[:2])
    with pytest.raises(ValueError, match="gave log_partition of shape"):
        run(batch, lambda p, x: evaluate(p, x)._replace(log_partition=jnp.zeros((2, ROWS, 6))))
