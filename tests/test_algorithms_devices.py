"""One batch on one device and on four: the same step, and a quarter of the work on each."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhfjax.algorithms import ppo, reward_model, sft
from rlhfjax.config import PPO, SFT, RewardModel

DEVICES = 4
ROWS, SAMPLES, LENGTH, WIDTH, ACTIONS = 32, 2, 7, 3, 13
SGD = optax.sgd(1.0)

pytestmark = pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs 4 devices")


def score_actions(params, inputs):
    """A linear policy and value on features: all actions are scored, [B, G, T, V], then the taken ones."""
    logits = inputs["feature"] @ params["policy"]
    logp_V = jax.nn.log_softmax(logits)
    logp = jnp.take_along_axis(logp_V, inputs["action"][..., None], axis=-1)[..., 0]
    return logp, -jnp.sum(jnp.exp(logp_V) * logp_V, axis=-1), inputs["feature"] @ params["value"]


def score_completions(params, inputs):
    """Scores [B, G] by way of a [B, G, T, V] array, so that the work can be found in the compiled program."""
    return jnp.mean(jnp.tanh(inputs["feature"] @ params["policy"]), axis=(-2, -1))


def cases():
    """name -> (make, evaluate, config for one minibatch, config with many parts, batch)."""
    generator = np.random.default_rng(0)
    shape = (ROWS, SAMPLES, LENGTH)
    inputs = {
        "feature": jnp.asarray(generator.normal(size=(*shape, WIDTH)), jnp.float32),
        "action": jnp.asarray(generator.integers(ACTIONS, size=shape)),
    }
    length = generator.integers(1, LENGTH + 1, size=shape[:2])  # ragged: per-device means would differ
    mask = jnp.asarray(np.arange(LENGTH)[None, None] < length[..., None])

    def noise(mean):
        return jnp.asarray(generator.normal(mean, size=shape) * 0.5, jnp.float32)

    rollout = ppo.Rollout(inputs, noise(-3.0), noise(-3.0), noise(0.0), noise(0.0), mask)
    label = jnp.asarray(generator.uniform(size=(ROWS, 1)), jnp.float32)
    pairs = reward_model.Preference(inputs, jnp.array([0]), jnp.array([1]), label, mask[:, 0, 3:4])
    return {
        "ppo": (
            ppo.make,
            score_actions,
            PPO(epochs=2, whiten_rewards=True),
            PPO(epochs=2, minibatches=2, microbatches=2, kl_target=1.0),
            rollout,
        ),
        "reward_model": (
            reward_model.make,
            score_completions,
            RewardModel(centring=0.1),
            RewardModel(centring=0.1, microbatches=2),
            pairs._replace(
                first=jnp.broadcast_to(pairs.first, label.shape),
                second=jnp.broadcast_to(pairs.second, label.shape),
            ),
        ),
        "sft": (
            sft.make,
            lambda params, inputs: score_actions(params, inputs)[0],
            SFT(),
            SFT(microbatches=2),
            sft.Batch(inputs, mask.astype(jnp.float32)),
        ),
    }


CASES = cases()


def initial_params():
    generator = np.random.default_rng(1)
    return {
        "policy": jnp.asarray(generator.normal(size=(WIDTH, ACTIONS)), jnp.float32),
        "value": jnp.asarray(generator.normal(size=WIDTH), jnp.float32),
    }


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:DEVICES]), ("data",))


def on_one_device(name, config_index):
    make, evaluate, *configs, batch = CASES[name]
    algorithm = make(evaluate, SGD, configs[config_index])
    return jax.jit(algorithm.update)(algorithm.init(initial_params()), batch, jax.random.key(0))


def assert_same_step(got, expected):
    (state, metrics), (expected_state, expected_metrics) = got, expected
    start = initial_params()

    def moved(params):
        return {name: np.asarray(params[name]) - np.asarray(start[name]) for name in start}

    chex.assert_trees_all_close(moved(state.params), moved(expected_state.params), rtol=1e-4, atol=1e-6)
    as_numpy = jax.tree.map(np.asarray, (metrics, expected_metrics))
    chex.assert_trees_all_close(*as_numpy, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_sharded_batch_gives_the_same_step_and_work_is_split_not_repeated(name, mesh):
    """jit with the batch sharded: the SGD step of one device, and no device computes another's rows."""
    make, evaluate, _, config, batch = CASES[name]
    algorithm = make(evaluate, SGD, config)
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    everywhere = NamedSharding(mesh, PartitionSpec())
    state, key = jax.device_put((algorithm.init(initial_params()), jax.random.key(0)), everywhere)
    compiled = jax.jit(algorithm.update).lower(state, batch, key).compile()
    assert_same_step(compiled(state, batch, key), on_one_device(name, 1))

    parts = getattr(config, "minibatches", 1) * config.microbatches
    per_row = SAMPLES * LENGTH * ACTIONS
    shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text() or "")
    sizes = {math.prod(map(int, shape.split(","))) for shape in shapes}
    assert ROWS // parts // DEVICES * per_row in sizes
    too_large = [size for size in sizes if size % per_row == 0 and size > ROWS // parts // DEVICES * per_row]
    assert too_large == []
