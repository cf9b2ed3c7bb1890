"""Supervised fine-tuning of a bigram table."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.algorithms import sft
from rlhfjax.config import SFT

VOCABULARY = 5
SGD = optax.sgd(1.0)


def evaluate(params, inputs):
    """Log-probability of each next token under a table of bigram logits."""
    logp_V = jax.nn.log_softmax(params["logits"])[inputs["token"]]
    return jnp.take_along_axis(logp_V, inputs["target"][..., None], axis=-1)[..., 0]


@functools.cache
def algorithm(microbatches=1):
    made = sft.make(evaluate, SGD, SFT(microbatches=microbatches))
    return made.init, jax.jit(made.update)


def step(params, batch, microbatches=1):
    init, update = algorithm(microbatches)
    state, metrics = update(init(params), batch, jax.random.key(0))
    assert state.step == 1
    return state.params, metrics


@pytest.fixture(scope="module")
def params():
    return {
        "logits": jnp.asarray(np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)), jnp.float32)
    }


@pytest.fixture(scope="module")
def batch():
    """Four rows of 6 with weights 0 (padding), 0.3 (prompt) and 1 (completion)."""
    generator = np.random.default_rng(1)
    token = jnp.asarray(generator.integers(VOCABULARY, size=(2, 4, 6)))
    weight = jnp.asarray(generator.choice([0.0, 0.3, 1.0], size=(4, 6)), jnp.float32)
    return sft.Batch({"token": token[0], "target": token[1]}, weight)


def test_step_equals_a_loop_over_tokens(params, batch):
    logits = np.asarray(params["logits"], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nll, gradient, count = 0.0, np.zeros_like(logits), 0.0
    for i in np.ndindex(batch.weight.shape):
        token, target = int(batch.inputs["token"][i]), int(batch.inputs["target"][i])
        weight = float(batch.weight[i])
        nll -= weight * np.log(p[token, target])
        gradient[token] += weight * (p[token] - np.eye(VOCABULARY)[target])
        count += weight
    new, metrics = step(params, batch)
    np.testing.assert_allclose(metrics["loss/nll"], nll / count, rtol=1e-5)
    np.testing.assert_allclose(metrics["batch/count"], count, rtol=1e-6)
    np.testing.assert_allclose(params["logits"] - new["logits"], gradient / count, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        metrics["optimizer/gradient_norm"], np.linalg.norm(gradient / count), rtol=1e-5
    )
    assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())
    assert [name for name in metrics if name not in sft.__doc__] == []


def test_padding_and_packing_move_nothing(params, batch):
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, 2), (3, 1))), batch)
    packed = jax.tree.map(lambda x: x.reshape(2, 12), batch)
    expected = step(params, batch)
    for other in (padded, packed):
        chex.assert_trees_all_close(step(params, other), expected, rtol=1e-5, atol=1e-7)


def test_accumulation_gives_the_same_step(params, batch):
    for microbatches in (2, 4):
        got = step(params, batch, microbatches)
        chex.assert_trees_all_close(got, step(params, batch), rtol=1e-5, atol=1e-7)


def test_logp_under_weight_zero_is_never_read(params, batch):
    """NaN where nothing is to be learnt reaches neither the loss nor the gradient."""
    batch = batch._replace(inputs=batch.inputs | {"dead": batch.weight == 0})

    def spoilt(params, inputs):
        return jnp.where(inputs["dead"], jnp.nan, evaluate(params, inputs))

    def loss(params, function):
        return sft.loss(params, batch, evaluate=function, config=SFT())[0]

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    chex.assert_trees_all_close(gradient(params, spoilt), gradient(params, evaluate), rtol=1e-6)


def test_empty_batch_moves_nothing(params, batch):
    new, metrics = step(params, batch._replace(weight=jnp.zeros_like(batch.weight)))
    chex.assert_trees_all_equal(new, params)
    assert metrics["loss/nll"] == metrics["batch/count"] == 0


def test_learns_the_conditional_frequencies(params):
    """The minimum of the weighted loss is the weighted empirical distribution, whatever the start."""
    token = jnp.array([[0, 0, 0, 0, 1, 1]])
    target = jnp.array([[1, 1, 1, 2, 3, 4]])
    batch = sft.Batch({"token": token, "target": target}, jnp.array([[1.0, 1.0, 1.0, 1.0, 0.5, 1.5]]))
    made = sft.make(evaluate, optax.adam(0.1), SFT())

    def iterate(state, key):
        return made.update(state, batch, key)

    keys = jax.random.split(jax.random.key(0), 300)
    state, metrics = jax.jit(lambda s: jax.lax.scan(iterate, s, keys))(made.init(params))
    p = jax.nn.softmax(state.params["logits"])
    np.testing.assert_allclose(p[0], [0, 0.75, 0.25, 0, 0], atol=0.02)
    np.testing.assert_allclose(p[1], [0, 0, 0, 0.25, 0.75], atol=0.02)
    assert metrics["loss/nll"][-1] < metrics["loss/nll"][0]


def test_bad_input_is_named(params, batch):
    init, update = algorithm()
    with pytest.raises(TypeError, match="batch.weight must be float, got int32"):
        jax.eval_shape(
            update, init(params), batch._replace(weight=jnp.ones((4, 6), jnp.int32)), jax.random.key(0)
        )
    with pytest.raises(ValueError, match=r"logp of shape \(4, 6\); batch.weight has shape \(4, 1\)"):
        jax.eval_shape(update, init(params), batch._replace(weight=batch.weight[:, :1]), jax.random.key(0))
    with pytest.raises(ValueError, match="4 rows cannot be cut into 3"):
        jax.eval_shape(algorithm(3)[1], init(params), batch, jax.random.key(0))
