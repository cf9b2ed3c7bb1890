"""Quantised models: what is stored against NumPy in float64, and how little of it lies in memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.config import Decoder, LoRA
from rlhfjax.networks import (
    adapted,
    causal_mask,
    decoder,
    dequantise,
    merge_lora,
    quantisation_error,
    quantise,
)
from rlhfjax.networks.layers import Projection, projections

CONFIG = Decoder(
    vocab_size=50, width=32, layers=2, heads=2, kv_heads=1, head_size=16, mlp_width=64, max_positions=16
)
LM = decoder(CONFIG)
PARAMS = jax.jit(LM.init)(jax.random.key(0))
PARAMS = PARAMS | {"embedding": PARAMS["embedding"] * 20}
TOKENS = jax.random.randint(jax.random.key(1), (2, 8), 0, CONFIG.vocab_size)
STORED = {
    (bits, group): quantise(PARAMS, bits, group=group) for bits, group in ((8, None), (8, 16), (4, None))
}
CASES = list(STORED)
NAMES = {8: "kernel_int8", 4: "kernel_nf4"}

# arXiv 2305.14314, appendix E, to seven digits.
NORMAL_FLOAT = np.array(
    [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    + [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
)


def kernel_of(stored: dict) -> np.ndarray:
    """What is stored, in float64, number by number."""
    scale = np.asarray(stored["kernel_scale"], np.float64)
    groups, outputs = scale.shape
    if "kernel_int8" in stored:
        whole = np.asarray(stored["kernel_int8"], np.float64)
        return np.array([whole[i] * scale[i * groups // len(whole)] for i in range(len(whole))])
    packed = np.asarray(stored["kernel_nf4"])
    size = 2 * len(packed) // groups
    kernel = np.zeros((groups * size, outputs))
    for i in range(groups * size):
        group, place = divmod(i, size)
        byte = packed[group * size // 2 + place % (size // 2)]
        code = byte % 16 if place < size // 2 else byte // 16
        kernel[i] = NORMAL_FLOAT[code] * scale[group]
    return kernel


def logits(params: dict, lm=LM) -> jax.Array:
    position = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    mask = causal_mask(jnp.ones(TOKENS.shape, bool))
    return lm.logits(params, lm.apply(params, TOKENS, position_BT=position, mask_BTS=mask)[0])


LOGITS = jax.jit(logits)


@pytest.mark.parametrize("bits, group", CASES)
def test_what_is_stored_is_near_the_kernels(bits, group):
    params, before = STORED[bits, group], projections(PARAMS)
    assert projections(params).keys() == before.keys()
    for path, stored in projections(params).items():
        kernel, got = np.asarray(before[path]["kernel"], np.float64), kernel_of(stored)
        np.testing.assert_allclose(projections(dequantise(params))[path]["kernel"], got, rtol=1e-6, atol=1e-7)
        error = np.linalg.norm(got - kernel) / np.linalg.norm(kernel)
        if bits == 8:
            half_step = (
                np.repeat(np.asarray(stored["kernel_scale"]), len(kernel) // len(stored["kernel_scale"]), 0)
                / 2
            )
            assert np.all(np.abs(got - kernel) <= half_step * (1 + 1e-5)), path
            assert error < 0.008
        else:
            assert error < 0.080  # with the largest magnitude for a scale it is 0.087
            # Of all codes each number has the nearest, under its scale.
            scale = np.repeat(np.asarray(stored["kernel_scale"], np.float64), 32, axis=0)
            nearest = np.abs(NORMAL_FLOAT[:, None, None] * scale - kernel).min(axis=0)
            np.testing.assert_allclose(np.abs(got - kernel), nearest, atol=1e-6)
    for name in ("embedding", "final_norm"):
        assert params[name] is PARAMS[name]


def test_bytes():
    def size(params: dict) -> int:
        return sum(x.nbytes for entries in projections(params).values() for x in entries.values())

    plain = size(PARAMS)
    assert {x: size(STORED[x]) / plain for x in CASES} == {
        (8, None): pytest.approx(1 / 4 + 256 / 9216),  # a float32 for each output
        (8, 16): pytest.approx(1 / 4 + 1 / 16),
        (4, None): pytest.approx(4.5 / 32),
    }
    assert size(STORED[8, None]) / plain < 0.30 and size(STORED[4, None]) / plain < 0.17


@pytest.mark.parametrize("bits, group", CASES)
@pytest.mark.parametrize("outputs", [64, 33])  # in halves, and in one piece
def test_product_and_its_gradient_equal_float64(bits, group, outputs):
    generator = np.random.default_rng(0)
    kernel, x, weight = (generator.normal(size=s) for s in ((64, outputs), (2, 3, 64), (2, 3, outputs)))
    params = quantise({"up": {"kernel": jnp.asarray(kernel, jnp.float32)}}, bits, group=group)["up"]
    assert set(params) == {NAMES[bits], "kernel_scale"}
    projection = Projection(outputs, False, 1.0)

    @jax.jit
    def value_and_gradient(x):
        def total(x):
            out: Any = projection.apply({"params": params}, x)
            return jnp.sum(out * jnp.asarray(weight, out.dtype)), out

        (_, out), gradient = jax.value_and_grad(total, has_aux=True)(x)
        return out, gradient

    out, gradient = value_and_gradient(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(out, x @ kernel_of(params), atol=2e-5)
    np.testing.assert_allclose(gradient, weight @ kernel_of(params).T, atol=2e-5)
    out, gradient = value_and_gradient(jnp.asarray(x, jnp.bfloat16))
    assert out.dtype == gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), x @ kernel_of(params), atol=0.2)
    np.testing.assert_allclose(gradient.astype(jnp.float32), weight @ kernel_of(params).T, atol=0.2)


@pytest.mark.parametrize("bits, group", CASES)
def test_model_equals_that_of_the_dequantised(bits, group):
    params = STORED[bits, group]
    expected = LOGITS(dequantise(params))
    np.testing.assert_allclose(LOGITS(params), expected, atol=2e-4)
    decoding = jax.jit(LM.for_decoding)(params)
    np.testing.assert_allclose(LOGITS(decoding), expected, atol=2e-4)
    for path, entries in projections(decoding).items():
        stored = projections(params)[path]
        # On a CPU four bits are written out, once for all tokens; eight stay as they are.
        assert ("kernel_transposed" in entries) == (bits == 4)
        assert all(x.dtype == stored[name].dtype for name, x in entries.items() if name in stored)


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_on_a_quantised_base(bits):
    """Their gradients are those on the dequantised base, whose merged kernels hold both."""
    config, base = LoRA(rank=2), STORED[bits, None]
    adapters = jax.jit(lambda key: adapted(LM, base, config).init(key))(jax.random.key(2))
    adapters = jax.tree.map(lambda x: x + 0.02, adapters)

    @jax.jit
    def gradient(adapters, base):
        lm = adapted(LM, base, config)
        return jax.value_and_grad(lambda a: jnp.mean(jnp.square(logits(a, lm))))(adapters)

    got, expected = gradient(adapters, base), gradient(adapters, dequantise(base))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), got, expected)
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(got[1])) > 1e-3
    merged = LOGITS(merge_lora(base, adapters, config))
    np.testing.assert_allclose(float(jnp.mean(jnp.square(merged))), float(got[0]), rtol=1e-4)


@pytest.mark.parametrize("bits, share", [(8, 0.5), (4, 0.4)])
def test_no_more_than_a_kernel_at_a_time_is_there_in_full(bits, share):
    """Forward and backward through four layers: a program that keeps the dequantised kernels has more than 1."""
    lm = decoder(Decoder(vocab_size=8, width=64, layers=4, heads=2, kv_heads=2, head_size=32, mlp_width=512))
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    plain = sum(4 * x.size for x in jax.tree.leaves(shapes))
    config = LoRA(rank=1, projections=("query", "down"))
    base = jax.eval_shape(lambda params: quantise(params, bits), shapes)
    adapters = jax.eval_shape(lambda key, base: adapted(lm, base, config).init(key), jax.random.key(0), base)

    def loss(adapters, base):
        token = jnp.ones((1, 2), jnp.int32)
        out, _ = adapted(lm, base, config).apply(
            adapters, token, position_BT=token, mask_BTS=jnp.ones((1, 2, 2), bool)
        )
        return jnp.sum(out)

    memory: Any = jax.jit(jax.grad(loss)).lower(adapters, base).compile().memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < share * plain


def test_quantisation_error_equals_numpy():
    params, other = PARAMS, STORED[4, None]
    measure = jax.jit(lambda params, other: quantisation_error(LM, params, other, TOKENS))
    got = measure(params, other)
    before, after = (np.asarray(LOGITS(x), np.float64) for x in (params, other))
    probability, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (before, after))
    kl = [
        (p * np.log(p / q)).sum() for p, q in zip(probability.reshape(16, -1), q.reshape(16, -1), strict=True)
    ]
    change = (after - after.mean(-1, keepdims=True)) - (before - before.mean(-1, keepdims=True))
    expected = {
        "logits": np.linalg.norm(change) / np.linalg.norm(before - before.mean(-1, keepdims=True)),
        "kl": np.mean(kl),
        "agreement": np.mean(before.argmax(-1) == after.argmax(-1)),
    }
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(got[name], x, rtol=1e-3, atol=1e-5, err_msg=name)
    assert 0.01 < got["logits"] < 0.5
    eight = measure(params, STORED[8, None])
    assert eight["logits"] < 0.2 * got["logits"]


def test_what_is_all_zero_stays_zero():
    kernel = jnp.zeros((32, 2)).at[:, 1].set(1.0)
    for bits in (8, 4):
        stored = quantise({"down": {"kernel": kernel, "bias": jnp.ones(2)}}, bits)["down"]
        np.testing.assert_allclose(kernel_of(stored), kernel, atol=1e-2)
        assert np.all(kernel_of(stored)[:, 0] == 0) and stored["bias"].shape == (2,)


def test_skipped_projections_keep_their_kernels():
    params = quantise(PARAMS, 4, skip=("layer_0", "down"))
    kept = {path for path, entries in projections(params).items() if "kernel" in entries}
    assert kept == {path for path in projections(PARAMS) if path[0] == "layer_0" or path[-1] == "down"}
    assert params["layer_0"] is PARAMS["layer_0"]


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="bits=3 must be 8 or 4"):
        quantise(PARAMS, 3)
    with pytest.raises(ValueError, match="group=24 must be .* the 32 inputs of layer_0/attention/"):
        quantise(PARAMS, 4, group=24)
    with pytest.raises(ValueError, match="skip=\\('head',\\) must name .*'layer_0', 'layer_1'"):
        quantise(PARAMS, skip=("head",))
    with pytest.raises(
        ValueError, match="has no kernel to quantise, only \\['kernel_int8', 'kernel_scale'\\]"
    ):
        quantise(STORED[8, None])
