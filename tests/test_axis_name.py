"""Every algorithm with its batch split over a mapped axis: the step and the metrics of one device.

The roads: `shard_map` with and without its check of what varies, `pmap`, and `vmap` with an axis name. Their outputs
are declared to be the same on all members of the axis; the first and the last refuse to be traced where one is not.
"""

import dataclasses
import inspect
from functools import cache, partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from rlhfjax import algorithms
from rlhfjax.algorithms import dpo, dqn, grpo, ilql, kto, make_optimizer, ppo, pqn, reward_model, sft, soft_q
from rlhfjax.config import DPO, DQN, GRPO, ILQL, KTO, PPO, PQN, SFT, Optimizer, RewardModel, SoftQ

DEVICES = 4
ROWS, SAMPLES, LENGTH, WIDTH, ACTIONS = 8, 2, 5, 3, 4
EMPTY = slice(ROWS - ROWS // DEVICES, None)  # the rows of the last device
LEARNING_RATE = 0.1

pytestmark = pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs 4 devices")

# ---------------------------------------------------------------------------------------------- linear models


def log_softmax(params, inputs):
    """log pi over all actions, [..., V], of a linear policy."""
    return jax.nn.log_softmax(inputs["feature"] @ params["policy"])


def of_action(x, inputs):
    return jnp.take_along_axis(x, inputs["action"][..., None], axis=-1)[..., 0]


def token_logp(params, inputs):
    return of_action(log_softmax(params, inputs), inputs)


def actor_critic(params, inputs):
    logp_V = log_softmax(params, inputs)
    entropy = -jnp.sum(jnp.exp(logp_V) * logp_V, axis=-1)
    return of_action(logp_V, inputs), entropy, inputs["feature"] @ params["value"]


def actor(params, inputs):
    return actor_critic(params, inputs)[:2]


def step_scores(params, inputs):
    return inputs["feature"] @ params["value"]


def scores(params, inputs):
    return jnp.mean(jnp.tanh(step_scores(params, inputs)), axis=-1)


def logp_and_collision(params, inputs):
    logp_V = log_softmax(params, inputs)
    return dpo.TokenLogps(of_action(logp_V, inputs), jax.nn.logsumexp(2 * logp_V, axis=-1))


def values_and_policy(params, inputs):
    q = jnp.stack([inputs["feature"] @ params["policy"], 2 * inputs["feature"] @ params["policy"]])
    both = {"action": jnp.broadcast_to(inputs["action"], q.shape[:-1])}
    return ilql.Evaluation(
        of_action(q, both),
        value=inputs["feature"] @ params["value"],
        log_softmax=of_action(jax.nn.log_softmax(q), both),
        logp=token_logp(params, inputs),
        final=inputs["feature"][..., -1, :] @ params["value"],
    )


def policy_and_partition(params, inputs):
    logits = inputs["feature"] @ params["policy"]
    return soft_q.Evaluation(token_logp(params, inputs), jax.nn.logsumexp(logits, axis=-1))


def action_values(params, feature):
    return feature @ params["policy"]


def initial_params():
    generator = np.random.default_rng(1)
    return {
        "policy": jnp.asarray(generator.normal(size=(WIDTH, ACTIONS)) / 2, jnp.float32),
        "value": jnp.asarray(generator.normal(size=WIDTH) / 2, jnp.float32),
    }


# ---------------------------------------------------------------------------------------------- batches


class Draw:
    """Random arrays of a batch with ragged masks, so per-device means differ; with `empty`, one device has none."""

    def __init__(self, seed: int, empty: bool):
        self.generator, self.empty = np.random.default_rng(seed), empty
        shape = (ROWS, SAMPLES, LENGTH)
        self.inputs = {
            "feature": self.normal(0.0, (*shape, WIDTH)),
            "action": jnp.asarray(self.generator.integers(ACTIONS, size=shape), jnp.int32),
        }
        length = self.generator.integers(1, LENGTH + 1, size=shape[:2])
        self.mask = self.counted(np.arange(LENGTH)[None, None] < length[..., None])

    def normal(self, mean: float, shape=(ROWS, SAMPLES, LENGTH)):
        return jnp.asarray(self.generator.normal(mean, size=shape) * 0.5, jnp.float32)

    def uniform(self, *shape: int):
        return jnp.asarray(self.generator.uniform(size=shape), jnp.float32)

    def flags(self, *shape: int, rate: float = 0.6):
        return self.counted(self.generator.uniform(size=shape) < rate)

    def counted(self, mask):
        mask = np.array(mask)
        if self.empty:
            mask[EMPTY] = False
        return jnp.asarray(mask)


def ppo_rollout(draw: Draw):
    reward = draw.normal(0.0).at[1, 0].set(jnp.nan)
    noise = (draw.normal(-1.0), draw.normal(-1.0), draw.normal(0.0))
    return ppo.Rollout(draw.inputs, *noise, reward, draw.mask)


def ppo_rollout_with_text(draw: Draw):
    text = sft.Batch(draw.inputs, draw.uniform(ROWS, SAMPLES, LENGTH) * draw.flags(ROWS, SAMPLES, LENGTH))
    return ppo_rollout(draw)._replace(ptx=text)


def grpo_rollout(draw: Draw, rewards: int = 1):
    reward = jnp.round(draw.normal(0.0, (ROWS, SAMPLES, rewards)))  # with ties
    reward = reward.at[1, 0].set(jnp.inf)
    logp, logp_ref = draw.normal(-1.0), draw.normal(-1.0)
    return grpo.Rollout(draw.inputs, logp, logp_ref, reward if rewards > 1 else reward[..., 0], draw.mask)


def compared(draw: Draw):
    """first, second, label, mask of three pairs a prompt, one of them a completion with itself."""
    first, second = (jnp.broadcast_to(jnp.array(index), (ROWS, 3)) for index in ([0, 1, 0], [1, 0, 0]))
    return first, second, draw.uniform(ROWS, 3), draw.flags(ROWS, 3)


def pairs(draw: Draw):
    first, second, label, mask = compared(draw)
    label = label.at[0, 0].set(2.0)  # invalid
    return reward_model.Preference(draw.inputs, first, second, label, mask, draw.uniform(ROWS, 3))


def ranking(draw: Draw):
    order = jnp.asarray(np.argsort(draw.generator.uniform(size=(ROWS, SAMPLES))), jnp.int32)
    return reward_model.Ranking(draw.inputs, order.at[0].set(7), None, jnp.any(draw.mask, axis=-1))


def steps(draw: Draw):
    return reward_model.Steps(draw.inputs, draw.uniform(ROWS, SAMPLES, LENGTH), draw.mask)


def completion_pairs(draw: Draw):
    completion = jnp.ones((ROWS, SAMPLES, LENGTH), bool).at[:, 0, 3:].set(False)
    return dpo.Pairs(draw.inputs, completion, *compared(draw), logp_ref_BGC=-draw.uniform(*completion.shape))


def judged(draw: Draw):
    def logp_ref():
        return -2.0 - draw.uniform(ROWS, SAMPLES, LENGTH)

    label = draw.flags(ROWS, SAMPLES).astype(jnp.float32)
    other = jax.tree.map(lambda x: x[::-1], draw.inputs)
    whole = jnp.ones((ROWS, SAMPLES, LENGTH), bool)
    return kto.Judged(
        draw.inputs,
        draw.mask,
        logp_ref(),
        label,
        draw.flags(ROWS, SAMPLES, rate=0.8),
        draw.uniform(ROWS, SAMPLES),
        kto.Mismatched(other, whole, logp_ref(), draw.flags(ROWS, SAMPLES)),
    )


def episodes(draw: Draw):
    truncated = draw.flags(ROWS, SAMPLES)
    turns = draw.mask & draw.flags(ROWS, SAMPLES, LENGTH)
    return ilql.Episodes(draw.inputs, draw.normal(0.0).at[1, 0].set(jnp.nan), turns, truncated)


def paths(draw: Draw):
    return soft_q.Batch(draw.inputs, -draw.uniform(ROWS, SAMPLES, LENGTH), draw.normal(0.0), draw.mask)


def transitions(draw: Draw):
    feature, following = draw.normal(0.0, (ROWS, WIDTH)), draw.normal(0.0, (ROWS, WIDTH))
    action = draw.inputs["action"][:, 0, 0].at[0].set(-1)  # invalid
    reward, weight = draw.normal(1.0, (ROWS,)), draw.uniform(ROWS)
    mask = draw.counted(np.arange(ROWS) != 3)
    return dqn.Batch(
        feature, action, reward, following, draw.flags(ROWS, rate=0.3), weight_B=weight, mask_B=mask
    )


def steps_of_environments(draw: Draw):
    feature, following = (draw.normal(0.0, (ROWS, LENGTH, WIDTH)) for _ in range(2))
    action = draw.inputs["action"][:, 0].at[0, 0].set(ACTIONS)  # invalid
    ends = draw.flags(ROWS, LENGTH, rate=0.2), draw.flags(ROWS, LENGTH, rate=0.2)
    return pqn.Rollout(
        feature,
        action,
        draw.normal(0.5, (ROWS, LENGTH)),
        *ends,
        next_inputs=following,
        mask=draw.flags(ROWS, LENGTH),
    )


# ---------------------------------------------------------------------------------------------- cases


class Case(NamedTuple):
    algorithm: Any  # its module
    make: Any  # (config, optimizer, axis_name) -> Algorithm
    config: Any  # without microbatches
    batch: Any  # Draw -> the algorithm's batch


def case(algorithm, evaluate, config, batch, **more) -> Case:
    return Case(
        algorithm,
        lambda config, optimizer, axis_name: algorithm.make(evaluate, optimizer, config, axis_name, **more),
        config,
        batch,
    )


HELD = {
    "is_policy": lambda params: {"policy": True, "value": False},
    "evaluate_ptx": token_logp,
}
BATCH_STATISTICS = GRPO(
    baseline="batch_mean",
    scale="batch_std",
    whiten="actions",
    aggregation="token",
    kl_placement="reward",
    kl_estimator="k1",
)
MOVING = GRPO(
    baseline="moving",
    scale="none",
    clip="none",
    aggregation="constant",
    length_constant=5.0,
    kl_placement="score",
    kl_estimator="k1",
    epochs=2,
)
TWO_REWARDS = GRPO(separate_rewards=True, reward_weights=(1.0, 0.5), whiten="samples", drop_equal_groups=True)

CASES = {
    "sft": case(sft, token_logp, SFT(), lambda draw: sft.Batch(draw.inputs, draw.mask * draw.normal(1.0))),
    "reward_model": case(reward_model, scores, RewardModel(centring=0.1), pairs),
    "reward_model_ranking": case(reward_model, scores, RewardModel(), ranking),
    "reward_model_steps": case(reward_model, step_scores, RewardModel(), steps),
    "ppo": case(
        ppo, actor_critic, PPO(epochs=2, whiten_rewards=True, kl_target=0.1, kl_horizon=20), ppo_rollout
    ),
    "ppo_warm_up_and_text": case(
        ppo,
        actor_critic,
        PPO(epochs=1, critic_warmup=1, ptx_coefficient=0.5, reward_clip=0.4, advantage_clip=1.0),
        ppo_rollout_with_text,
        **HELD,
    ),
    "grpo": case(grpo, actor, GRPO(), grpo_rollout),
    "grpo_batch_statistics": case(grpo, actor, BATCH_STATISTICS, grpo_rollout),
    "grpo_moving_baseline": case(grpo, actor, MOVING, grpo_rollout),
    "grpo_two_rewards": case(grpo, actor, TWO_REWARDS, partial(grpo_rollout, rewards=2)),
    "dpo": case(dpo, token_logp, DPO(beta=0.5, nll_coefficient=0.1), completion_pairs),
    "dpo_weighted": case(dpo, logp_and_collision, DPO(weighting="aligned"), completion_pairs),
    "kto": case(kto, token_logp, KTO(beta=1.0, undesirable_weight=1.5), judged),
    "bco": case(kto, token_logp, KTO(loss="bco", beta=0.5), judged),
    "ilql": case(ilql, values_and_policy, ILQL(advantage_beta=0.5, polyak=0.3), episodes),
    "soft_q": case(soft_q, policy_and_partition, SoftQ(beta=1.0, steps=(1, 0), polyak=0.3), paths),
    "dqn": case(dqn, action_values, DQN(cql=0.1, target="polyak", polyak=0.3), transitions),
    "pqn": case(pqn, action_values, PQN(epochs=2, minibatches=1), steps_of_environments),
}

# A ragged batch, then one of which a device has nothing that counts.
DRAWS = ((0, False), (1, True))


@cache
def batches(name: str):
    return tuple(CASES[name].batch(Draw(*draw)) for draw in DRAWS)


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
