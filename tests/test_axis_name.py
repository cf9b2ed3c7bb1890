"""Every algorithm with its batch split over a mapped axis: the step and the metrics of one device.

The roads: `shard_map` with and without its check of what varies, `pmap`, and `vmap` with an axis name. Their outputs
are declared to be the same on all members of the axis; the first and the last refuse to be traced where one is not.
"""

import dataclasses
import inspect
from functools import cache, partial

import chex
import jax
import numpy as np
import optax
import pytest
from axis_cases import CASES, DEVICES, actor_critic, batches, initial_params
from jax.sharding import Mesh, PartitionSpec

from rlhfjax import algorithms
from rlhfjax.algorithms import make_optimizer, ppo
from rlhfjax.config import PPO, Optimizer

LEARNING_RATE = 0.1

pytestmark = pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs 4 devices")


def two_updates(update, state, of: str):
    """[(state, metrics)] of one update and another from there, as NumPy."""
    results = []
    for batch in batches(of):
        state, metrics = jax.block_until_ready(update(state, batch, jax.random.key(0)))
        results.append(jax.tree.map(np.asarray, (state, metrics)))
    return results


@cache
def on_one_device(name: str):
    _, make, config, _ = CASES[name]
    algorithm = make(config, optax.sgd(LEARNING_RATE), None)
    return two_updates(jax.jit(algorithm.update), algorithm.init(initial_params()), name)


# ---------------------------------------------------------------------------------------------- roads


def by_shard_map(update, check_vma: bool = True):
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    whole, split = PartitionSpec(), PartitionSpec("data")
    return jax.jit(
        jax.shard_map(update, mesh=mesh, in_specs=(whole, split, whole), out_specs=whole, check_vma=check_vma)
    )


def cut(batch):
    """[B, ...] as [devices, B / devices, ...]."""
    return jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)


def by_pmap(update):
    mapped = jax.pmap(update, "data", in_axes=(None, 0, None), out_axes=None)
    return lambda state, batch, key: mapped(state, cut(batch), key)


def by_vmap(update):
    mapped = jax.vmap(update, in_axes=(None, 0, None), out_axes=None, axis_name="data")
    return jax.jit(lambda state, batch, key: mapped(state, cut(batch), key))


ROADS = {
    "shard_map": by_shard_map,
    "shard_map_unchecked": partial(by_shard_map, check_vma=False),
    "pmap": by_pmap,
    "vmap": by_vmap,
}


def assert_same_updates(got, expected):
    """States, metrics and moves of the parameters, update by update."""
    before = jax.tree.map(np.asarray, initial_params())
    for (state, metrics), (expected_state, expected_metrics) in zip(got, expected, strict=True):
        moves = [
            jax.tree.map(lambda x, y: (x - y) / LEARNING_RATE, s.params, before)
            for s in (state, expected_state)
        ]
        assert max(np.abs(x).max() for x in moves[1].values()) > 3e-3  # else agreement would prove nothing
        chex.assert_trees_all_close(*moves, rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(state, expected_state, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-4, atol=1e-5)
        before = expected_state.params


# Of every algorithm one road; the other combinations, and cases that differ little, are slow only by their number.
QUICK = {
    "shard_map": ("sft", "soft_q"),
    "shard_map_unchecked": ("reward_model", "ilql"),
    "pmap": ("grpo_batch_statistics", "dqn"),
    "vmap": ("reward_model_steps", "ppo", "grpo_moving_baseline", "grpo_two_rewards", "dpo", "kto", "pqn"),
}


ALL = [
    pytest.param(name, road, marks=() if name in QUICK[road] else pytest.mark.slow, id=f"{name}-{road}")
    for name in CASES
    for road in ROADS
]


@pytest.mark.parametrize(("name", "road"), ALL)
def test_every_road_gives_the_updates_of_one_device(name, road):
    """With microbatches under shard_map, without on one device: they change nothing either."""
    _, make, config, _ = CASES[name]
    if road == "shard_map":
        config = dataclasses.replace(config, microbatches=2)
    algorithm = make(config, optax.sgd(LEARNING_RATE), "data")
    update = ROADS[road](algorithm.update)
    got = two_updates(update, algorithm.init(initial_params()), name)
    assert_same_updates(got, on_one_device(name))


def test_every_algorithm_with_an_axis_is_among_the_cases():
    """`tabular_q` has none: it learns from one transition after the other."""
    modules = {x for x in map(partial(getattr, algorithms), algorithms.__all__) if hasattr(x, "make")}
    takes_axis = {x for x in modules if "axis_name" in inspect.signature(x.make).parameters}
    assert takes_axis == {case.algorithm for case in CASES.values()}
    assert takes_axis == {CASES[name].algorithm for names in QUICK.values() for name in names}


# ---------------------------------------------------------------------------------------------- optimisers

OPTIMIZERS = {
    kind: Optimizer(
        kind=kind, schedule="constant", learning_rate=LEARNING_RATE, max_grad_norm=0.01, weight_decay=0.1
    )
    for kind in ("muon", "adafactor", "schedule_free", "sgd")
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "muon" else pytest.mark.slow) for kind in OPTIMIZERS]
)
def test_optimisers_see_the_global_gradient(kind):
    """Clipping by the global norm (here far below it), orthogonalisation, factored moments, averaging."""
    _, make, config, _ = CASES["sft"]
    optimizer = make_optimizer(OPTIMIZERS[kind], total_steps=10)
    split, alone = (make(config, optimizer, axis_name) for axis_name in ("data", None))
    expected = two_updates(jax.jit(alone.update), alone.init(initial_params()), "sft")
    assert expected[0][1]["optimizer/gradient_norm"] > 0.02
    got = two_updates(by_shard_map(split.update), split.init(initial_params()), "sft")
    assert_same_updates(got, expected)


# ---------------------------------------------------------------------------------------------- minibatches


def test_with_minibatches_each_device_deals_its_own_rows():
    """Two minibatches: each has, of every device, one of its two rows, the same one everywhere by the key's choice. The
    update is then that of one device on one such half of the batch and then on the other."""
    config = PPO(epochs=1, whiten_advantages=False)  # so that a half needs nothing of the other
    rollout, optimizer = batches("ppo")[0], optax.sgd(3.0)
    alone = jax.jit(ppo.make(actor_critic, optimizer, config).update)
    algorithm = ppo.make(actor_critic, optimizer, dataclasses.replace(config, minibatches=2), "data")
    update, start = by_vmap(algorithm.update), algorithm.init(initial_params())
    halves = [jax.tree.map(lambda x, first=first: x[first::2], rollout) for first in (0, 1)]

    def in_turn(order):
        state = start
        for half in order:
            state, _ = alone(state, half, jax.random.key(0))
        return state.params

    expected = [in_turn(halves), in_turn(halves[::-1])]
    assert not np.allclose(expected[0]["policy"], expected[1]["policy"], atol=1e-3)
    chosen = set()
    for seed in range(6):
        state, _ = update(start, rollout, jax.random.key(seed))
        same = [
            all(
                np.allclose(x, y, atol=1e-5)
                for x, y in zip(*map(jax.tree.leaves, (state.params, other)), strict=True)
            )
            for other in expected
        ]
        assert sum(same) == 1
        chosen.add(same.index(True))
    assert chosen == {0, 1}
