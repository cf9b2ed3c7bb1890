"""Every recipe on a mesh of four devices: the numbers of one device, and the work split, not repeated."""

import math
import re
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax import mesh as on_mesh
from rlhfjax.algorithms import dpo, grpo, ilql, ppo, reward_model, sft, soft_q
from rlhfjax.config import DPO, GRPO, ILQL, PPO, SFT, Decoder, Mesh, RewardModel, SoftQ
from rlhfjax.generation import generate, sample_keys
from rlhfjax.networks import Branches, decoder, init_scalar_head
from rlhfjax.recipes import (
    Frozen,
    PackedInputs,
    Prompts,
    branch_states,
    completion_logp,
    grpo_batch,
    init_reward_model,
    init_text_values,
    make_reward_model,
    make_rlhf,
    packed_logp,
    pair_batch,
    pair_evaluate,
    ppo_batch,
    rated_episodes,
    soft_batch,
    text_actor_critic,
    text_policy,
    text_soft_q,
    text_values,
)

CONFIG = Decoder(
    vocab_size=48, width=16, layers=1, heads=4, kv_heads=4, head_size=4, mlp_width=52, max_positions=24
)
ROWS, SAMPLES, PROMPT, LENGTH = 32, 2, 6, 5
STOP = tuple(range(1, 12))
SGD = optax.sgd(1.0)
MESHES = {
    "data": Mesh(data=4, fsdp=1),
    "fsdp": Mesh(data=1, fsdp=4),
    "tensor": Mesh(data=1, fsdp=1, tensor=4),
    "data_fsdp": Mesh(data=2, fsdp=2),
    "data_tensor": Mesh(data=2, fsdp=1, tensor=2),
    "fsdp_tensor": Mesh(data=1, fsdp=2, tensor=2),
    "data_sequence": Mesh(data=2, fsdp=1, sequence=2),
    "fsdp_sequence": Mesh(data=1, fsdp=2, sequence=2),
}
# Every axis and pair of axes for these, and for all recipes the shapes that hold each axis beside another.
EVERY_SHAPE = ("sft", "ppo")
FOR_ALL = ("data_fsdp", "fsdp_tensor", "data_sequence")

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")


def language_params(seed: int) -> dict:
    params = jax.jit(decoder(CONFIG).init)(jax.random.key(seed))
    return params | {"embedding": params["embedding"] * 12.0}


POLICY, REFERENCE, TRUNK = (language_params(seed) for seed in range(3))
HEAD = init_scalar_head(jax.random.key(3), CONFIG.width)
REWARD = init_reward_model(jax.random.key(4), TRUNK, CONFIG.width)


def prompts() -> Prompts:
    generator = np.random.default_rng(0)
    length = generator.integers(1, PROMPT + 1, ROWS)
    mask = np.arange(PROMPT)[None] >= PROMPT - length[:, None]
    token = generator.integers(12, 48, (ROWS, PROMPT)) * mask
    return Prompts(jnp.asarray(token, jnp.int32), jnp.asarray(mask), jnp.arange(ROWS, dtype=jnp.int32))


def branches() -> Branches:
    generator = np.random.default_rng(1)
    length = generator.integers(1, LENGTH + 1, (ROWS, SAMPLES))
    mask = np.arange(LENGTH)[None, None] < length[..., None]
    token = generator.integers(0, 48, (ROWS, SAMPLES, LENGTH)) * mask
    return Branches(*prompts()[:2], jnp.asarray(token, jnp.int32), jnp.asarray(mask))


def score_BG() -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).normal(size=(ROWS, SAMPLES)), jnp.float32)


# Each case: (lm, mesh) -> (program, state, frozen, batch), where program(state, frozen, batch) gives (state, rest).
# Frozen parameters lie as the state's do.


def sft_case(lm, mesh):
    del mesh
    generator = np.random.default_rng(3)
    token = jnp.asarray(generator.integers(0, 48, (ROWS, 17)), jnp.int32)
    segment = jnp.asarray(np.sort(generator.integers(0, 3, (ROWS, 16)))[:, ::-1], jnp.int32)
    position = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), segment.shape)
    weight = jnp.asarray(generator.uniform(size=(ROWS, 16)) * (segment > 0), jnp.float32)
    batch = sft.Batch(PackedInputs(token[:, :-1], token[:, 1:], position, segment), weight)
    algorithm = sft.make(packed_logp(lm), SGD, SFT(microbatches=2))
    return update_of(algorithm), algorithm.init(POLICY), {}, batch


def reward_model_case(lm, mesh):
    del mesh
    algorithm = reward_model.make(make_reward_model(lm), SGD, RewardModel(centring=0.1))
    index, label = (
        jnp.zeros((ROWS, 1), jnp.int32),
        jnp.asarray(np.random.default_rng(4).uniform(size=(ROWS, 1))),
    )
    pairs = reward_model.Preference(
        branches(), index, index + 1, label.astype(jnp.float32), jnp.ones((ROWS, 1), bool)
    )
    return update_of(algorithm), algorithm.init(REWARD), {}, pairs


def dpo_case(lm, mesh):
    del mesh
    algorithm = dpo.make(pair_evaluate(lm), SGD, DPO(beta=0.2))

    def program(state, reference, seen):
        pairs = pair_batch(
            seen,
            completion_logp(lm, reference, seen),
            first=jnp.asarray([0]),
            second=jnp.asarray([1]),
            label_BK=jnp.ones((ROWS, 1)),
            mask_BK=jnp.ones((ROWS, 1), bool),
        )
        return algorithm.update(state, pairs, jax.random.key(0))

    return program, algorithm.init(POLICY), REFERENCE, branches()


def ilql_case(lm, mesh):
    del mesh
    values = text_values(lm, states=branch_states)
    algorithm = ilql.make(values.evaluate, SGD, ILQL(), **values.target())
    params = init_text_values(jax.random.key(5), lm, POLICY)
    return update_of(algorithm), algorithm.init(params), {}, rated_episodes(branches(), score_BG())


def soft_q_case(lm, mesh):
    del mesh
    algorithm = soft_q.make(text_soft_q(lm, states=branch_states), SGD, SoftQ(beta=0.1))

    def program(state, reference, episodes):
        return algorithm.update(
            state, soft_batch(lm, reference, episodes, states=branch_states), jax.random.key(0)
        )

    return program, algorithm.init(POLICY), REFERENCE, rated_episodes(branches(), score_BG())


def update_of(algorithm):
    return lambda state, frozen, batch: algorithm.update(state, batch, jax.random.key(0))


def rlhf_case(lm, mesh, algorithm, as_batch, params, *, slots=None, policy):
    rlhf = make_rlhf(
        lm,
        algorithm,
        as_batch,
        reward=make_reward_model(lm),
        samples=SAMPLES,
        max_new_tokens=LENGTH,
        stop_tokens=STOP,
        policy=policy,
        slots=slots,
        mesh=mesh,
    )

    def program(state, frozen, prompts):
        state, metrics, experience = rlhf.iterate(state, frozen, prompts, jax.random.key(7))
        return state, (metrics, experience)

    return program, algorithm.init(params), Frozen(REFERENCE, REWARD), prompts()


def ppo_case(lm, mesh, slots=None):
    evaluate = text_actor_critic(lm)
    algorithm = ppo.make(evaluate, SGD, PPO(minibatches=2, epochs=2, whiten_rewards=True))
    params = {"policy": POLICY, "critic": {"trunk": TRUNK, "head": HEAD}}
    return rlhf_case(
        lm, mesh, algorithm, ppo_batch(lm, evaluate), params, slots=slots, policy=lambda p: p["policy"]
    )


def grpo_case(lm, mesh):
    algorithm = grpo.make(text_policy(lm), SGD, GRPO(kl_coefficient=0.1))
    return rlhf_case(lm, mesh, algorithm, grpo_batch(lm), POLICY, policy=lambda p: p)


def generation_case(lm, mesh):
    del mesh

    def program(params, frozen, batch):
        keys = sample_keys(jax.random.key(8), batch.index_B, SAMPLES)
        made = generate(
            lm, params, batch.token_BP, batch.mask_BP, keys, max_new_tokens=LENGTH, stop_tokens=STOP
        )
        return params, made

    return program, POLICY, {}, prompts()


CASES = {
    "sft": sft_case,
    "reward_model": reward_model_case,
    "dpo": dpo_case,
    "ilql": ilql_case,
    "soft_q": soft_q_case,
    "ppo": ppo_case,
    "ppo_refilled": partial(ppo_case, slots=2),
    "grpo": grpo_case,
    "generation": generation_case,
}


@cache
def on_one(name):
    """(what one device gives, its compiled program)."""
    program, *arguments = CASES[name](decoder(CONFIG), None)
    compiled = jax.jit(program).lower(*arguments).compile()
    return jax.device_get(compiled(*arguments)), compiled


def shapes(compiled) -> set[tuple[int, ...]]:
    """Of all arrays of numbers in a program, as each device has them."""
    found = re.findall(r"(?:f32|s32|pred)\[([\d,]+)\]", compiled.as_text() or "")
    return {tuple(map(int, shape.split(","))) for shape in found}


def laid_out(name, mesh):
    """(compiled program, its arguments) on the mesh."""
    lm = on_mesh.gathered_to_decode(mesh, decoder(CONFIG, place=on_mesh.activations(mesh)))
    program, state, frozen, batch = CASES[name](lm, mesh)
    arguments = on_mesh.put(mesh, state), on_mesh.put(mesh, frozen), on_mesh.put_rows(mesh, batch)
    return jax.jit(on_mesh.kept(mesh, program)).lower(*arguments).compile(), arguments


EACH = [(name, shape) for name in CASES for shape in MESHES if name in EVERY_SHAPE or shape in FOR_ALL]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), EACH)
def test_a_recipe_gives_the_numbers_of_one_device_and_splits_the_work(name, shape):
    mesh = on_mesh.make_mesh(MESHES[shape])
    compiled, arguments = laid_out(name, mesh)
    state, rest = on_mesh.fetch(compiled(*arguments))
    (expected_state, expected_rest), whole = on_one(name)
    start = jax.device_get(arguments[0])

    def moved(end):
        return jax.tree.map(lambda a, b: a - b, end, start)

    chex.assert_trees_all_close(moved(state), moved(expected_state), rtol=2e-4, atol=2e-6)
    chex.assert_trees_all_close(rest, expected_rest, rtol=2e-4, atol=2e-5)

    # No device has an array of all rows (halves of `tensor` share rows, and some widths), nor temporaries of all.
    here, there = shapes(compiled), shapes(whole)
    # Heads of values, which are no layer of the decoder, go by rows but not by what `sequence` splits.
    parts = on_mesh.row_parts(mesh) // (mesh.shape["sequence"] if name == "ilql" else 1)
    assert max(map(math.prod, here)) * parts <= max(map(math.prod, there))
    used, at_once = compiled.memory_analysis(), whole.memory_analysis()
    assert used is not None and at_once is not None
    assert used.temp_size_in_bytes < 0.75 * at_once.temp_size_in_bytes
    if mesh.shape["tensor"] > 1:  # hidden layers are split, not copied: parameters, activations and gradients
        assert CONFIG.mlp_width // mesh.shape["tensor"] in {x for shape in here for x in shape}
        assert CONFIG.mlp_width not in {x for shape in here for x in shape}
    # Parameters and optimiser state are split, and come out as they went in.
    out_state = compiled.output_shardings[0]
    assert jax.tree.all(
        jax.tree.map(lambda out, x: out.is_equivalent_to(x.sharding, x.ndim), out_state, arguments[0])
    )
    share = mesh.shape["fsdp"] * mesh.shape["tensor"]
    held = [(x.addressable_shards[0].data.nbytes, x.nbytes) for x in jax.tree.leaves(arguments[0])]
    assert sum(part for part, _ in held) < sum(all_of for _, all_of in held) * (1 / share + 0.1)
