"""Rollouts and whole iterations of RLHF with the prompts split over a mapped axis: the tokens, and the step, of one
device.

What varies is not checked by `shard_map` here (check_vma=False): the loops over tokens start from constants. In its
place all devices' states and metrics are looked at.
"""

from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from rlhfjax.algorithms import Algorithm, grpo, ppo
from rlhfjax.config import GRPO, PPO, Decoder
from rlhfjax.generation import Sampling, generate, generate_refilled, sample_keys
from rlhfjax.networks import decoder, init_scalar_head
from rlhfjax.recipes import (
    RLHF,
    Frozen,
    Prompts,
    grpo_batch,
    make_rlhf,
    ppo_batch,
    text_actor_critic,
    text_policy,
)

DEVICES = 2
PROMPTS, PROMPT, SAMPLES, NEW = 4, 4, 2, 6
LM = decoder(
    Decoder(
        vocab_size=40, width=16, layers=1, heads=2, kv_heads=1, head_size=8, mlp_width=24, max_positions=16
    )
)
STOP = tuple(range(1, 10))
pytestmark = pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs 2 devices")


@cache
def model(seed: int) -> dict:
    """With logits sharp enough that completions end at different lengths."""
    params = jax.jit(LM.init)(jax.random.key(seed))
    return params | {"embedding": params["embedding"] * 15.0}


@cache
def prompts() -> Prompts:
    generator = np.random.default_rng(0)
    mask = np.arange(PROMPT)[None] >= np.array([2, 0, 1, 3])[:, None]
    token = np.where(mask, generator.integers(10, 40, size=mask.shape), 0)
    return Prompts(jnp.asarray(token, jnp.int32), jnp.asarray(mask), jnp.arange(7, 7 + PROMPTS))


def by_shard_map(f, split: tuple[bool, ...]):
    """Arguments split or whole; every output with a leading axis of devices."""
    specs = tuple(PartitionSpec("data") if x else PartitionSpec() for x in split)
    return jax.jit(
        jax.shard_map(
            lambda *x: jax.tree.map(lambda y: y[None], f(*x)),
            mesh=Mesh(np.array(jax.devices()[:DEVICES]), ("data",)),
            in_specs=specs,
            out_specs=PartitionSpec("data"),
            check_vma=False,
        )
    )


def cut(tree):
    return jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), tree)


def by_pmap(f, split: tuple[bool, ...]):
    axes = tuple(0 if x else None for x in split)
    mapped = jax.pmap(f, "data", in_axes=axes, devices=jax.devices()[:DEVICES])
    return lambda *x: mapped(*(cut(y) if of_each else y for y, of_each in zip(x, split, strict=True)))


def by_vmap(f, split: tuple[bool, ...]):
    mapped = jax.vmap(f, in_axes=tuple(0 if x else None for x in split), axis_name="data")
    return jax.jit(
        lambda *x: mapped(*(cut(y) if of_each else y for y, of_each in zip(x, split, strict=True)))
    )


ROADS = {"shard_map": by_shard_map, "pmap": by_pmap, "vmap": by_vmap}


def joined(tree):
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), tree)


# ---------------------------------------------------------------------------------------------- generation


def roll_out(params, prompts: Prompts, key, *, slots: int | None = None):
    how = generate if slots is None else partial(generate_refilled, slots=slots)
    return how(
        LM,
        params,
        prompts.token_BP,
        prompts.mask_BP,
        sample_keys(key, prompts.index_B, SAMPLES),
        max_new_tokens=NEW,
        stop_tokens=STOP,
        sampling=Sampling(temperature=0.9),
    )


@cache
def on_one_device():
    out = jax.jit(roll_out)(model(0), prompts(), jax.random.key(3))
    lengths = np.asarray(out.mask_BGC).sum(axis=-1)
    assert len(np.unique(lengths)) > 2  # so that devices and slots end at different times
    return out


@pytest.mark.slow
@pytest.mark.parametrize("slots", [None, 3])
@pytest.mark.parametrize("road", ROADS)
def test_every_road_draws_the_tokens_of_one_device(road, slots):
    """One key on all devices; a completion's own comes from its prompt's number. Each device has a queue of its own."""
    f = ROADS[road](partial(roll_out, slots=slots), (False, True, False))
    out = joined(f(model(0), prompts(), jax.random.key(3)))
    for name, x in on_one_device()._asdict().items():
        exact = name in ("token_BGC", "mask_BGC", "finished_BG")
        np.testing.assert_allclose(getattr(out, name), x, rtol=0, atol=0 if exact else 1e-4, err_msg=name)


# ---------------------------------------------------------------------------------------------- iterations


def even(params, branches):
    """A reward of another mean on every device: even tokens, as a share of the most there may be."""
    return params * jnp.mean(
        (branches.completion_BGC % 2 == 0) & branches.completion_mask_BGC, axis=2, dtype=jnp.float32
    )


def composed(name: str, axis_name: str | None) -> tuple[Algorithm, RLHF]:
    """(Algorithm, RLHF) by PPO with refilled slots, or by GRPO with statistics of the batch."""
    sgd, critic = optax.sgd(0.1), text_actor_critic(LM)
    more: dict[str, Any] = {}
    if name == "ppo":
        algorithm = ppo.make(critic, sgd, PPO(epochs=1, whiten_rewards=True, kl_target=1.0), axis_name)
        as_batch, more["slots"] = ppo_batch(LM, critic), 3
    else:
        config = GRPO(baseline="batch_mean", scale="batch_std", aggregation="token")
        algorithm = grpo.make(text_policy(LM), sgd, config, axis_name)
        as_batch, more["policy"] = grpo_batch(LM), lambda params: params
    rlhf = make_rlhf(
        LM,
        algorithm,
        as_batch,
        reward=even,
        samples=SAMPLES,
        max_new_tokens=NEW,
        stop_tokens=STOP,
        missing_eos_penalty=-0.5,
        axis_name=axis_name,
        **more,
    )
    return algorithm, rlhf


def start(name: str):
    if name == "grpo":
        return model(0)
    head = init_scalar_head(jax.random.key(5), LM.config.width) | {"bias": jnp.float32(0.3)}
    return {"policy": model(0), "critic": {"trunk": model(1), "head": head}}


@cache
def iterated_on_one_device(name: str):
    algorithm, rlhf = composed(name, None)
    state = algorithm.init(start(name))
    frozen = Frozen(model(2), jnp.float32(2.0))
    return jax.tree.map(np.asarray, jax.jit(rlhf.iterate)(state, frozen, prompts(), jax.random.key(4)))


@pytest.mark.parametrize(
    ("name", "road"),
    [
        pytest.param(name, road, marks=() if (name, road) == ("grpo", "shard_map") else pytest.mark.slow)
        for name in ("ppo", "grpo")
        for road in ROADS
    ],
)
def test_an_iteration_is_that_of_one_device(name, road):
    """Rollout, reward and update; all state and metrics are the same on every device."""
    algorithm, rlhf = composed(name, "data")
    state, frozen = algorithm.init(start(name)), Frozen(model(2), jnp.float32(2.0))
    run = ROADS[road](rlhf.iterate, (False, False, True, False))
    got_state, got_metrics, experience = run(state, frozen, prompts(), jax.random.key(4))
    expected_state, expected_metrics, expected = iterated_on_one_device(name)
    np.testing.assert_array_equal(joined(experience.generation.token_BGC), expected.generation.token_BGC)
    np.testing.assert_allclose(joined(experience.score_BG), expected.score_BG, atol=1e-6)
    moves = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - y).max(), state, expected_state)
    assert max(jax.tree.leaves(moves.params)) > 1e-3
    for device in range(DEVICES):
        own_state, own = jax.tree.map(lambda x, d=device: np.asarray(x)[d], (got_state, got_metrics))
        chex.assert_trees_all_close(own_state, expected_state, rtol=1e-4, atol=2e-6)
        for metric in own:
            np.testing.assert_allclose(
                own[metric], expected_metrics[metric], rtol=1e-3, atol=1e-5, err_msg=metric
            )
