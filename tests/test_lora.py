"""LoRA: the maths against NumPy, and that every recipe trains adapters on a base that it shares and leaves alone."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.algorithms import dpo, grpo, ppo
from rlhfjax.config import DPO, GRPO, PPO, Decoder, LoRA
from rlhfjax.generation import generate, sample_keys
from rlhfjax.networks import (
    Branches,
    adapted,
    causal_mask,
    decoder,
    init_lora,
    init_scalar_head,
    merge_lora,
    with_adapters,
)
from rlhfjax.networks.layers import Projection, projections
from rlhfjax.recipes import (
    Frozen,
    Prompts,
    completion_logp,
    grpo_batch,
    make_rlhf,
    pair_batch,
    pair_evaluate,
    ppo_batch,
    text_actor_critic,
    text_policy,
)

CONFIG = Decoder(
    vocab_size=30, width=16, layers=1, heads=2, kv_heads=1, head_size=8, mlp_width=24, max_positions=16
)
LM = decoder(CONFIG)
BASE = jax.jit(LM.init)(jax.random.key(0))
BASE = BASE | {"embedding": BASE["embedding"] * 15}
LORA = LoRA(rank=3, alpha=6.0)
FRESH: Any = init_lora(jax.random.key(1), BASE, LORA)
KEYS = iter(jax.random.split(jax.random.key(2), 100))
ADAPTERS: Any = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(KEYS), x.shape), FRESH)
TOKENS = jax.random.randint(jax.random.key(3), (2, 7), 0, CONFIG.vocab_size)


def logits(lm, params, tokens=TOKENS) -> jax.Array:
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = causal_mask(jnp.ones(tokens.shape, bool))
    return lm.logits(params, lm.apply(params, tokens, position_BT=position, mask_BTS=mask)[0])


@jax.jit
def plain_logits(params) -> jax.Array:
    return logits(LM, params)


@partial(jax.jit, static_argnums=2)
def adapted_logits(adapters, base, config=LORA) -> jax.Array:
    return logits(adapted(LM, base, config), adapters)


# ------------------------------------------------------------------------------------------------------- the maths


@pytest.mark.parametrize("stabilised", [False, True])
def test_projection_equals_float64(stabilised):
    generator = np.random.default_rng(0)
    kernel, a, b, x, bias = (generator.normal(size=s) for s in ((5, 4), (5, 3), (3, 4), (2, 6, 5), (4,)))
    scale = 6 / (np.sqrt(3) if stabilised else 3)
    expected = x @ (kernel + scale * a @ b) + bias
    base = {"query": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}}
    adapters = {"query": {"lora_a": jnp.asarray(a, jnp.float32), "lora_b": jnp.asarray(b, jnp.float32)}}
    config = LoRA(rank=3, alpha=6.0, rank_stabilised=stabilised)
    projection = Projection(4, True, 1.0)
    for params in (with_adapters(base, adapters, config), merge_lora(base, adapters, config)):
        out: Any = projection.apply({"params": params["query"]}, jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(out, expected, atol=1e-5)
    low: Any = projection.apply(
        {"params": with_adapters(base, adapters, config)["query"]}, jnp.asarray(x, jnp.bfloat16)
    )
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), expected, atol=0.5)
    assert set(merge_lora(base, adapters, config)["query"]) == {"kernel", "bias"}


def test_fresh_adapters():
    """As `peft` draws them: kaiming_uniform_(a=sqrt(5)) of [rank, inputs] is uniform within +-inputs ** -0.5."""
    config = LoRA(rank=8, projections=("down", "query"))
    wide = decoder(
        Decoder(vocab_size=8, width=64, layers=2, heads=2, kv_heads=2, head_size=32, mlp_width=256)
    )
    shapes = jax.eval_shape(wide.init, jax.random.key(0))
    adapters: Any = jax.jit(lambda key: init_lora(key, shapes, config))(jax.random.key(5))
    assert {name: list(x) for name, x in adapters["layer_1"].items()} == {
        "attention": ["query"],
        "mlp": ["down"],
    }
    assert adapters.keys() == {"layer_0", "layer_1"}
    drawn = []
    for layer in adapters.values():
        for entries, inputs, outputs in (
            (layer["attention"]["query"], 64, 64),
            (layer["mlp"]["down"], 256, 64),
        ):
            assert entries.keys() == {"lora_a", "lora_b"}
            assert entries["lora_a"].shape == (inputs, 8) and entries["lora_b"].shape == (8, outputs)
            assert entries["lora_a"].dtype == entries["lora_b"].dtype == jnp.float32
            assert not np.any(entries["lora_b"])
            drawn.append(np.ravel(entries["lora_a"]) * inputs**0.5)
    for x in drawn:
        assert np.abs(x).max() <= 1 and np.abs(x.mean()) < 4 / np.sqrt(3 * x.size)
        np.testing.assert_allclose(x.std(), 3**-0.5, rtol=0.05)
    assert len({float(x[0]) for x in drawn}) == 4


def test_fresh_adapters_change_no_bit_and_none_cost_nothing():
    expected = plain_logits(BASE)
    np.testing.assert_array_equal(adapted_logits(FRESH, BASE), expected)
    np.testing.assert_array_equal(adapted_logits({}, BASE), expected)
    assert with_adapters(BASE, {}, LORA) is BASE
    whole = with_adapters(BASE, ADAPTERS, LORA)
    assert all(x is y for x, y in zip(kernels(whole), kernels(BASE), strict=True))
    assert whole["embedding"] is BASE["embedding"]


def kernels(params: dict) -> list:
    return [entries["kernel"] for entries in projections(params).values()]


def test_adapted_equals_merged():
    expected = plain_logits(merge_lora(BASE, ADAPTERS, LORA))
    np.testing.assert_allclose(adapted_logits(ADAPTERS, BASE), expected, atol=1e-4)
    assert np.abs(expected - plain_logits(BASE)).max() > 0.5


def test_gradient_is_the_chain_rule_through_merged_kernels():
    def loss(kernels_lost, lm):
        return jnp.mean(jnp.square(logits(lm, kernels_lost)))

    @jax.jit
    def of_adapters(adapters, base):
        return jax.grad(lambda a: loss(a, adapted(LM, base, LORA)))(adapters)

    got = of_adapters(ADAPTERS, BASE)
    whole = jax.jit(jax.grad(lambda params: loss(params, LM)))(merge_lora(BASE, ADAPTERS, LORA))
    assert jax.tree.structure(got) == jax.tree.structure(ADAPTERS)
    there = projections(whole)
    for (part, name), entries in {(p, n): x for p, y in got["layer_0"].items() for n, x in y.items()}.items():
        d_kernel = np.asarray(there["layer_0", part, name]["kernel"], np.float64)
        own = ADAPTERS["layer_0"][part][name]
        a, b = (np.asarray(own[x], np.float64) for x in ("lora_a", "lora_b"))
        np.testing.assert_allclose(entries["lora_a"], 2.0 * d_kernel @ b.T, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(entries["lora_b"], 2.0 * a.T @ d_kernel, rtol=1e-3, atol=1e-4)
        assert np.abs(entries["lora_b"]).max() > 1e-2


def test_alpha_may_be_swept():
    alphas = jnp.array([2.0, 6.0])
    swept = jax.jit(jax.vmap(lambda alpha: logits(adapted(LM, BASE, LoRA(rank=3, alpha=alpha)), ADAPTERS)))(
        alphas
    )
    for got, alpha in zip(swept, (2.0, 6.0), strict=True):
        np.testing.assert_allclose(got, adapted_logits(ADAPTERS, BASE, LoRA(rank=3, alpha=alpha)), atol=1e-4)
    assert np.abs(swept[0] - swept[1]).max() > 0.1


def test_decoding_equals_that_of_the_merged_model():
    prompt, mask = TOKENS[:, :4], jnp.ones((2, 4), bool)
    options: Any = {"max_new_tokens": 5, "stop_tokens": ()}

    @jax.jit
    def decode(adapters, base, key):
        lm = adapted(LM, base, LORA)
        return generate(lm, adapters, prompt, mask, sample_keys(key, jnp.arange(2), 2), **options)

    @jax.jit
    def decode_merged(params, key):
        return generate(LM, params, prompt, mask, sample_keys(key, jnp.arange(2), 2), **options)

    got = decode(ADAPTERS, BASE, jax.random.key(4))
    expected = decode_merged(merge_lora(BASE, ADAPTERS, LORA), jax.random.key(4))
    np.testing.assert_array_equal(got.token_BGC, expected.token_BGC)
    np.testing.assert_allclose(got.logp_BGC, expected.logp_BGC, atol=1e-3)

    low = decoder(dataclasses.replace(CONFIG, dtype="bfloat16"))
    ready = jax.eval_shape(lambda a, base: adapted(low, base, LORA).for_decoding(a), ADAPTERS, BASE)
    entries = projections(ready)["layer_0", "mlp", "down"]
    assert {x.dtype for name, x in entries.items() if name != "lora_scale"} == {jnp.dtype(jnp.bfloat16)}


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        init_lora(jax.random.key(0), BASE, LoRA(rank=0))
    with pytest.raises(
        ValueError, match="projections=\\['q_proj'\\] are unknown; choose among \\('query', 'key'"
    ):
        init_lora(jax.random.key(0), BASE, LoRA(projections=("q_proj",)))
    with pytest.raises(ValueError, match="none of the projections \\('up',\\), only \\['gate'\\]"):
        init_lora(
            jax.random.key(0), {"mlp": {"gate": {"kernel": jnp.ones((2, 2))}}}, LoRA(projections=("up",))
        )
    with pytest.raises(ValueError, match="adapters for layer_0/mlp/inner, which the base does not have"):
        with_adapters(BASE, {"layer_0": {"mlp": {"inner": {}}}}, LORA)
    with pytest.raises(
        ValueError, match="/lora_a has shape \\(16, 3\\), the base and rank 4 ask for \\(16, 4\\)"
    ):
        with_adapters(BASE, ADAPTERS, LoRA(rank=4))
    lost = {"layer_0": {"mlp": {"down": {"lora_a": jnp.ones((24, 3))}}}}
    with pytest.raises(ValueError, match="layer_0/mlp/down/lora_b has shape none, .* ask for \\(3, 16\\)"):
        with_adapters(BASE, lost, LORA)
    with pytest.raises(ValueError, match="adapter without its scale"):
        Projection(4, False, 1.0).apply(
            {"params": {"kernel": jnp.ones((5, 4)), "lora_a": jnp.ones((5, 2)), "lora_b": jnp.ones((2, 4))}},
            jnp.ones((1, 5)),
        )


# ----------------------------------------------------------------------------------------------------- the recipes

SAMPLES, LENGTH = 2, 3
PROMPTS = Prompts(TOKENS[:, :3], jnp.ones((2, 3), bool), jnp.arange(2))
SETTINGS: Any = {"samples": SAMPLES, "max_new_tokens": LENGTH, "stop_tokens": (0,)}
HEAD = init_scalar_head(jax.random.key(6), CONFIG.width)
ADAM = optax.adam(0.01)


def reward(params, branches: Branches) -> jax.Array:
    del params
    return jnp.sum((branches.completion_BGC > 15) & branches.completion_mask_BGC, axis=2, dtype=jnp.float32)


def ppo_on(lm, optimizer=ADAM):
    evaluate = text_actor_critic(lm)
    algorithm = ppo.make(evaluate, optimizer, PPO(epochs=1, kl_coefficient=0.1))
    return algorithm, make_rlhf(lm, algorithm, ppo_batch(lm, evaluate), reward=reward, **SETTINGS)


def grpo_on(lm):
    algorithm = grpo.make(text_policy(lm), ADAM, GRPO())
    return algorithm, make_rlhf(
        lm, algorithm, grpo_batch(lm), reward=reward, policy=lambda params: params, **SETTINGS
    )


def actor_critic(policy, trunk) -> Any:
    return {"policy": policy, "critic": {"trunk": trunk, "head": HEAD}}


def test_ppo_on_adapters_equals_ppo_on_a_whole_model_that_is_held_elsewhere():
    """The oracle knows nothing of `adapted`: whole models, of which the optimiser moves LoRA's entries alone."""
    before = jax.tree.map(np.array, BASE)

    @jax.jit
    def iterate(state, base, key):
        _, rlhf = ppo_on(adapted(LM, base, LORA))
        return rlhf.iterate(state, Frozen({}, None), PROMPTS, key)

    def moved(path, _):
        return "moved" if {str(x.key) for x in path} & {"lora_a", "lora_b", "head"} else "held"

    partly = optax.partition(
        {"moved": ADAM, "held": optax.set_to_zero()}, lambda p: jax.tree_util.tree_map_with_path(moved, p)
    )
    algorithm, oracle = ppo_on(LM, partly)
    whole = partial(with_adapters, config=LORA)
    iterate_whole = jax.jit(oracle.iterate)
    state = ppo_on(LM)[0].init(actor_critic(FRESH, FRESH))
    expected = algorithm.init(actor_critic(whole(BASE, FRESH), whole(BASE, FRESH)))
    for i in range(2):
        key = jax.random.key(20 + i)
        state, metrics, seen = iterate(state, BASE, key)
        expected, metrics_whole, seen_whole = iterate_whole(expected, Frozen(BASE, None), PROMPTS, key)
        np.testing.assert_array_equal(seen.generation.token_BGC, seen_whole.generation.token_BGC)
        del metrics_whole["optimizer/gradient_norm"]  # that of the held parameters too
        for name, x in metrics_whole.items():
            np.testing.assert_allclose(metrics[name], x, rtol=1e-3, atol=1e-5, err_msg=name)
        assert (abs(float(metrics["objective/kl"])) < 1e-5) == (i == 0)
    for role in ("policy", "critic"):
        got, others = state.params[role], expected.params[role]
        got, others = (got["trunk"], others["trunk"]) if role == "critic" else (got, others)
        assert {x for entries in projections(others).values() for x in entries} >= {"lora_a", "lora_b"}
        for (part, name), entries in {
            (p, n): x for p, y in got["layer_0"].items() for n, x in y.items()
        }.items():
            for entry, x in entries.items():
                np.testing.assert_allclose(x, others["layer_0"][part][name][entry], rtol=1e-3, atol=1e-4)
            assert np.abs(entries["lora_b"]).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, before, BASE)


def test_grpo_on_adapters_of_a_packed_model():
    lm = decoder(dataclasses.replace(CONFIG, packing=0.9, remat="block"))

    @jax.jit
    def iterate(state, base, key):
        _, rlhf = grpo_on(adapted(lm, base, LORA))
        return rlhf.iterate(state, Frozen({}, None), PROMPTS, key)

    state = grpo_on(LM)[0].init(FRESH)
    for i in range(2):
        state, metrics, _ = iterate(state, BASE, jax.random.key(30 + i))
        assert all(np.isfinite(x) for x in metrics.values())
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(state.params)) > 1e-3
    assert jax.tree.structure(state.params) == jax.tree.structure(FRESH)


def test_dpo_on_adapters_prefers_what_is_preferred():
    branches = Branches(
        PROMPTS.token_BP, PROMPTS.mask_BP, TOKENS[:, None, 3:6].repeat(2, axis=1) + jnp.arange(2)[None, :, None],
        jnp.ones((2, 2, 3), bool),
    )  # fmt: skip
    pair = {"first": jnp.array([0]), "second": jnp.array([1]), "label_BK": jnp.ones((2, 1))}

    @jax.jit
    def steps(state, base):
        lm = adapted(LM, base, LORA)
        algorithm = dpo.make(pair_evaluate(lm), optax.adam(0.02), DPO())
        batch = pair_batch(branches, completion_logp(lm, {}, branches), **pair)

        def step(state, key):
            return algorithm.update(state, batch, key)

        return jax.lax.scan(step, state, jax.random.split(jax.random.key(0), 30))

    state, metrics = steps(dpo.make(pair_evaluate(LM), optax.adam(0.02), DPO()).init(FRESH), BASE)
    np.testing.assert_allclose(metrics["loss/total"][0], np.log(2), rtol=1e-4)  # policy and reference are one
    assert metrics["loss/total"][-1] < 0.2
    got = jax.jit(lambda a, base: completion_logp(adapted(LM, base, LORA), a, branches))(state.params, BASE)
    reference = jax.jit(partial(completion_logp, LM))(BASE, branches)
    lead = np.sum(np.asarray(got - reference), axis=2)
    assert np.all(lead[:, 0] > lead[:, 1])


def test_one_copy_of_the_base_serves_policy_critic_and_reference():
    """Two networks and the reference, with moments for both: the program has room for one base and little else."""
    config = Decoder(  # wide enough that the activations of 18 positions are small beside it
        vocab_size=30,
        width=512,
        layers=2,
        heads=2,
        kv_heads=2,
        head_size=32,
        mlp_width=1024,
        max_positions=16,
    )
    lora = LoRA(rank=1, projections=("query", "down"))
    # The transposed kernels that a rollout makes on CPU are a copy of their own, for its time.
    lm = decoder(config)._replace(for_decoding=lambda params: params)
    base = jax.eval_shape(lm.init, jax.random.key(0))

    def iterate(state, base, key):
        _, rlhf = ppo_on(adapted(lm, base, lora))
        return rlhf.iterate(state, Frozen({}, None), PROMPTS, key)

    def start(key, base):
        adapters = adapted(lm, base, lora).init(key)
        head = init_scalar_head(key, config.width)
        return ppo_on(lm)[0].init({"policy": adapters, "critic": {"trunk": adapters, "head": head}})

    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(start, key, base)
    memory: Any = jax.jit(iterate).lower(state, base, key).compile().memory_analysis()
    size = sum(4 * x.size for x in jax.tree.leaves(base))
    assert size <= memory.argument_size_in_bytes < 1.1 * size
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 1.5 * size
