"""Chunked token log-probabilities against the direct form: NumPy for values, autodiff for gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from rlhfjax import ops

B, T, D, V = 3, 4, 5, 11
RNG = np.random.default_rng(5)
HIDDEN = RNG.normal(size=(B, T, D)).astype(np.float32)
EMBEDDING = RNG.normal(size=(V, D)).astype(np.float32)
TOKEN = RNG.integers(0, V, (B, T)).astype(np.int32)
TEMPERATURE = RNG.uniform(0.5, 2.0, (B, 1)).astype(np.float32)
E = 6  # width of the reference
HIDDEN_REF = np.random.default_rng(6).normal(size=(B, T, E)).astype(np.float32)
EMBEDDING_REF = np.random.default_rng(7).normal(size=(V, E)).astype(np.float32)
D_LOGP, D_ENTROPY = RNG.normal(size=(2, B, T)).astype(np.float32)

# 12 rows: one chunk; two; 5 rows a chunk, made 3 chunks of 4; one row a chunk.
CHUNK_SIZES = [None, 6, 5, 1]


token_logprobs = jax.jit(ops.token_logprobs, static_argnames="chunk_size")


@jax.jit
def direct(hidden, embedding, token, temperature=1.0):
    logits = jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)
    logp = jax.nn.log_softmax(logits / jnp.broadcast_to(temperature, token.shape)[..., None])
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    return ops.TokenLogprobs(jnp.take_along_axis(logp, token[..., None], axis=-1)[..., 0], entropy)


def weighted(function, hidden, embedding, token, temperature: ArrayLike = 1.0):
    """A scalar whose gradient needs the cotangents of both outputs."""
    out = function(hidden, embedding, token, temperature=temperature)
    weights = [w.reshape(-1)[: token.size].reshape(token.shape) for w in (D_LOGP, D_ENTROPY)]
    return jnp.sum(out.logp * weights[0]) + jnp.sum(out.entropy * weights[1])


@functools.cache
def gradients(function, chunk_size=None):
    if chunk_size is not None:
        function = functools.partial(function, chunk_size=chunk_size)  # `direct` takes none
    return jax.jit(jax.grad(functools.partial(weighted, function), argnums=(0, 1)))


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_values_equal_numpy(chunk_size):
    logits = HIDDEN.astype(np.float64) @ EMBEDDING.T.astype(np.float64) / TEMPERATURE[..., None]
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    given = token_logprobs(HIDDEN, EMBEDDING, TOKEN, temperature=TEMPERATURE, chunk_size=chunk_size)
    np.testing.assert_allclose(
        given.logp, np.take_along_axis(logp, TOKEN[..., None], axis=-1)[..., 0], rtol=2e-6
    )
    np.testing.assert_allclose(given.entropy, -np.sum(np.exp(logp) * logp, axis=-1), rtol=2e-6)
    assert given.logp.dtype == given.entropy.dtype == jnp.float32


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_gradients_equal_autodiff(chunk_size):
    arguments = (HIDDEN, EMBEDDING, TOKEN, TEMPERATURE)
    expected = gradients(direct)(*arguments)
    for given, wanted in zip(gradients(ops.token_logprobs, chunk_size)(*arguments), expected, strict=True):
        np.testing.assert_allclose(given, wanted, atol=3e-6)


def test_rows_that_fit_no_number_of_chunks_are_padded():
    hidden, token = HIDDEN.reshape(-1, D)[:7], TOKEN.reshape(-1)[:7]
    given = token_logprobs(hidden, EMBEDDING, token, chunk_size=3)
    for array, wanted in zip(given, direct(hidden, EMBEDDING, token), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=2e-6)
    expected = gradients(direct)(hidden, EMBEDDING, token)
    for array, wanted in zip(
        gradients(ops.token_logprobs, 3)(hidden, EMBEDDING, token), expected, strict=True
    ):
        np.testing.assert_allclose(array, wanted, atol=3e-6)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_under_vmap_over_parameters(chunk_size):
    embeddings = np.stack([EMBEDDING, EMBEDDING[::-1]])
    temperatures = np.array([1.0, 0.6], np.float32)
    swept = jax.vmap(gradients(ops.token_logprobs, chunk_size), (None, 0, None, 0))
    expected = jax.vmap(gradients(direct), (None, 0, None, 0))(HIDDEN, embeddings, TOKEN, temperatures)
    for given, wanted in zip(swept(HIDDEN, embeddings, TOKEN, temperatures), expected, strict=True):
        np.testing.assert_allclose(given, wanted, atol=3e-6)


@pytest.mark.parametrize("chunk_size", [None, 6])
def test_bfloat16(chunk_size):
    hidden, embedding = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(EMBEDDING, jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in (hidden, embedding)]
    given = token_logprobs(hidden, embedding, TOKEN, chunk_size=chunk_size)
    # Products of bfloat16 numbers are exact in float32: nothing may be rounded to bfloat16 on the way.
    np.testing.assert_allclose(given.logp, direct(*exact, TOKEN).logp, rtol=1e-5)
    gradient = gradients(ops.token_logprobs, chunk_size)
    accumulated = re.findall(
        r"dot_general.*-> tensor<[\dx]*x(\w+)>", gradient.lower(hidden, embedding, TOKEN).as_text()
    )
    assert len(accumulated) >= 3 and set(accumulated) == {"f32"}
    d_hidden, d_embedding = gradient(hidden, embedding, TOKEN)
    assert d_hidden.dtype == d_embedding.dtype == jnp.bfloat16
    for array, wanted in zip((d_hidden, d_embedding), gradients(direct)(*exact, TOKEN), strict=True):
        np.testing.assert_allclose(array.astype(jnp.float32), wanted, atol=0.03)


@pytest.mark.parametrize("chunk_size", [None, 6])
def test_the_hidden_states_decide_the_type_and_the_embedding_keeps_its_own(chunk_size):
    """bfloat16 states and float32 parameters, as in training: products in bfloat16, the gradient in float32."""
    hidden = jnp.asarray(HIDDEN, jnp.bfloat16)
    rounded = jnp.asarray(EMBEDDING, jnp.bfloat16)
    gradient = gradients(ops.token_logprobs, chunk_size)
    program = gradient.lower(hidden, EMBEDDING, TOKEN).as_text()
    factors = re.findall(r"dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", program)
    assert len(factors) >= 3 and {x for pair in factors for x in pair} == {"bf16"}
    given = token_logprobs(hidden, EMBEDDING, TOKEN, chunk_size=chunk_size)
    wanted = token_logprobs(hidden, rounded, TOKEN, chunk_size=chunk_size)
    np.testing.assert_array_equal(given.logp, wanted.logp)
    d_hidden, d_embedding = gradient(hidden, EMBEDDING, TOKEN)
    assert (d_hidden.dtype, d_embedding.dtype) == (jnp.bfloat16, jnp.float32)
    exact = gradients(direct)(*(x.astype(jnp.float32) for x in (hidden, rounded)), TOKEN)
    np.testing.assert_allclose(d_embedding, exact[1], atol=0.02)


def test_one_position_large_logits_and_no_temperature_gradient():
    one = token_logprobs(HIDDEN[0, 0], EMBEDDING, TOKEN[0, 0])
    np.testing.assert_allclose(one.logp, direct(HIDDEN[0, 0], EMBEDDING, TOKEN[0, 0]).logp, rtol=2e-6)
    sharp = token_logprobs(HIDDEN * 1e3, EMBEDDING, TOKEN)
    np.testing.assert_allclose(sharp.logp, direct(HIDDEN * 1e3, EMBEDDING, TOKEN).logp, rtol=1e-5)
    assert np.isfinite(sharp.entropy).all() and (sharp.entropy >= 0).all()
    slope = jax.grad(lambda t: token_logprobs(HIDDEN, EMBEDDING, TOKEN, temperature=t).logp.sum())(0.7)
    assert slope == 0


def test_ids_outside_the_vocabulary_give_nan():
    token = np.array([-1, 0, V - 1, V], np.int32)
    logp = token_logprobs(HIDDEN[0], EMBEDDING, token).logp
    np.testing.assert_array_equal(np.isnan(logp), [True, False, False, True])


def test_narrow_ids_meet_a_wide_vocabulary():
    embedding = RNG.normal(size=(260, D)).astype(np.float32)
    for dtype in (np.uint8, np.int32):  # as a uint8, 258 is 2
        _, gradient = gradients(ops.token_logprobs)(HIDDEN, embedding, np.full((B, T), 2, dtype))
        expected = gradients(direct)(HIDDEN, embedding, np.full((B, T), 2, np.int32))[1]
        np.testing.assert_allclose(gradient, expected, atol=3e-6)


def test_one_chunk_has_no_loop():
    def program(chunk_size):
        return gradients(ops.token_logprobs, chunk_size).lower(HIDDEN, EMBEDDING, TOKEN).as_text()

    assert "stablehlo.while" not in program(None)
    assert "stablehlo.while" in program(6)


def test_memory_does_not_grow_with_positions_times_vocabulary():
    batch, width, vocabulary = 16, 64, 50_000

    def temporary_bytes(positions):
        shapes = [
            jax.ShapeDtypeStruct((batch, positions, width), jnp.float32),
            jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, positions), jnp.int32),
        ]

        def loss(hidden, embedding, token):
            out = ops.token_logprobs(hidden, embedding, token)
            return jnp.sum(out.logp) + jnp.sum(out.entropy)

        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    at_512, at_1024 = temporary_bytes(512), temporary_bytes(1024)
    logits_of_one_sequence = 512 * vocabulary * 4
    assert at_512 < 3 * logits_of_one_sequence < batch * logits_of_one_sequence / 5
    # What grows is per row: hidden states and their gradient, rearranged into chunks.
    assert at_1024 - at_512 < 8 * batch * 512 * width * 4 < logits_of_one_sequence


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))


SHARDED = (
    RNG.normal(size=(8, 4, D)).astype(np.float32),
    EMBEDDING,
    RNG.integers(0, V, (8, 4)).astype(np.int32),
)


def summed(hidden, embedding, token, chunk_size):
    out = ops.token_logprobs(hidden, embedding, token, chunk_size=chunk_size)
    return jnp.sum(out.logp) + 0.3 * jnp.sum(out.entropy)


# 32 rows. 12 a chunk would be 3 chunks and padding; 4 chunks of 8 need none.
@pytest.mark.parametrize(("chunk_size", "rows_per_device"), [(8, 2), (12, 2), (32, 8)])
def test_work_is_split_not_repeated_over_devices(mesh, chunk_size, rows_per_device):
    placed = [
        jax.device_put(x, NamedSharding(mesh, P(*axes)))
        for x, axes in zip(SHARDED, (("data",), (), ("data",)), strict=True)
    ]
    gradient = jax.jit(jax.grad(functools.partial(summed, chunk_size=chunk_size), argnums=(0, 1)))
    compiled = gradient.lower(*placed).compile()
    logits = set(re.findall(rf"f32\[\d+,{V}\]", str(compiled.as_text())))
    assert logits == {f"f32[{rows_per_device},{V}]"}
    for given, wanted in zip(compiled(*placed), gradient(*SHARDED), strict=True):
        np.testing.assert_allclose(given, wanted, atol=3e-6)


@pytest.mark.parametrize("chunk_size", [2, 8])
def test_inside_shard_map(mesh, chunk_size):
    gradient = jax.grad(functools.partial(summed, chunk_size=chunk_size), argnums=(0, 1))
    # The embedding is replicated: JAX adds the sum of its gradient over devices.
    split = jax.shard_map(
        gradient, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=(P("data"), P())
    )
    for given, wanted in zip(jax.jit(split)(*SHARDED), jax.jit(gradient)(*SHARDED), strict=True):
        np.testing.assert_allclose(given, wanted, atol=3e-6)


def capped(hidden, embedding, cap):
    """The logits as float64; what float32 would round is far below what a forgotten cap changes."""
    return cap * jnp.tanh(jnp.einsum("...d,vd->...v", hidden, embedding) / cap)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_capped_logits(chunk_size):
    """Values and gradients equal those of autodiff through capped logits, the temperature applied after the cap."""
    cap = 1.5

    def by_autodiff(hidden, embedding):
        logp = jax.nn.log_softmax(capped(hidden, embedding, cap) / TEMPERATURE[..., None])
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        logp = jnp.take_along_axis(logp, TOKEN[..., None], axis=-1)[..., 0]
        return jnp.sum(logp * D_LOGP) + jnp.sum(entropy * D_ENTROPY)

    def chunked(hidden, embedding):
        out = ops.token_logprobs(
            hidden, embedding, TOKEN, temperature=TEMPERATURE, softcap=cap, chunk_size=chunk_size
        )
        return jnp.sum(out.logp * D_LOGP) + jnp.sum(out.entropy * D_ENTROPY)

    given, wanted = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(HIDDEN, EMBEDDING) for f in (chunked, by_autodiff)
    )
    for x, y in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    assert abs(float(given[0]) - float(weighted(direct, HIDDEN, EMBEDDING, TOKEN, TEMPERATURE))) > 0.01


# ---------------------------------------------------------------------------------------------------------- token_kl

token_kl = jax.jit(ops.token_kl, static_argnames="chunk_size")
POLICIES = (HIDDEN, EMBEDDING, HIDDEN_REF, EMBEDDING_REF)


def direct_kl(hidden, embedding, hidden_ref, embedding_ref, temperature: ArrayLike = 1.0):
    scale = 1 / jnp.broadcast_to(temperature, hidden.shape[:-1])[..., None]
    return ops.categorical_kl(hidden @ embedding.T * scale, hidden_ref @ embedding_ref.T * scale)


def weighted_kl(function, *arguments):
    return jnp.sum(function(*arguments[:4], temperature=arguments[4]) * D_LOGP)


@functools.cache
def kl_gradients(function, chunk_size=None):
    if chunk_size is not None:
        function = functools.partial(function, chunk_size=chunk_size)
    return jax.jit(jax.grad(functools.partial(weighted_kl, function), argnums=(0, 1, 2, 3)))


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_kl_values_equal_numpy(chunk_size):
    def logp(hidden, embedding):
        logits = hidden.astype(np.float64) @ embedding.T.astype(np.float64) / TEMPERATURE[..., None]
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    p, q = logp(HIDDEN, EMBEDDING), logp(HIDDEN_REF, EMBEDDING_REF)
    given = token_kl(*POLICIES, temperature=TEMPERATURE, chunk_size=chunk_size)
    np.testing.assert_allclose(given, np.sum(np.exp(p) * (p - q), axis=-1), rtol=3e-6)
    assert given.dtype == jnp.float32


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_kl_gradients_equal_autodiff_and_the_reference_gets_none(chunk_size):
    expected = kl_gradients(direct_kl)(*POLICIES, TEMPERATURE)
    given = kl_gradients(ops.token_kl, chunk_size)(*POLICIES, TEMPERATURE)
    for array, wanted in zip(given[:2], expected[:2], strict=True):
        np.testing.assert_allclose(array, wanted, atol=5e-6)
    for array, wanted in zip(given[2:], expected[2:], strict=True):
        assert not array.any() and wanted.any()


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_kl_of_capped_logits(chunk_size):
    cap = 1.5

    def by_autodiff(hidden, embedding):
        logits, logits_ref = (
            capped(*x, cap) / TEMPERATURE[..., None] for x in ((hidden, embedding), POLICIES[2:])
        )
        return jnp.sum(ops.categorical_kl(logits, logits_ref) * D_LOGP)

    def chunked(hidden, embedding):
        settings = {"temperature": TEMPERATURE, "softcap": cap, "chunk_size": chunk_size}
        return jnp.sum(ops.token_kl(hidden, embedding, *POLICIES[2:], **settings) * D_LOGP)

    given, wanted = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(HIDDEN, EMBEDDING) for f in (chunked, by_autodiff)
    )
    for x, y in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_kl_of_a_policy_with_itself_is_zero_and_stays():
    same = (HIDDEN, EMBEDDING, HIDDEN, EMBEDDING)
    np.testing.assert_array_equal(token_kl(*same), np.zeros((B, T)))
    for array in kl_gradients(ops.token_kl, 5)(*same, TEMPERATURE):
        np.testing.assert_allclose(array, 0, atol=1e-6)
    sharp = token_kl(HIDDEN * 1e3, EMBEDDING, HIDDEN_REF * 1e3, EMBEDDING_REF)
    np.testing.assert_allclose(
        sharp, direct_kl(HIDDEN * 1e3, EMBEDDING, HIDDEN_REF * 1e3, EMBEDDING_REF), rtol=1e-5
    )
    assert np.isfinite(sharp).all()
    assert jax.grad(lambda t: token_kl(*POLICIES, temperature=t).sum())(0.7) == 0


def test_kl_in_bfloat16():
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in POLICIES]
    exact = [x.astype(jnp.float32) for x in narrow]
    np.testing.assert_allclose(token_kl(*narrow, chunk_size=6), direct_kl(*exact), rtol=1e-4)
    given = kl_gradients(ops.token_kl, 6)(*narrow, TEMPERATURE)
    for array, wanted in zip(given[:2], kl_gradients(direct_kl)(*exact, TEMPERATURE)[:2], strict=True):
        assert array.dtype == jnp.bfloat16
        np.testing.assert_allclose(array.astype(jnp.float32), wanted, atol=0.1)


def test_kl_memory_does_not_grow_with_positions_times_vocabulary():
    batch, width, vocabulary = 16, 64, 50_000

    def temporary_bytes(positions):
        hidden = jax.ShapeDtypeStruct((batch, positions, width), jnp.float32)
        embedding = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)

        def loss(*arguments):
            return jnp.sum(ops.token_kl(*arguments))

        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        memory = gradient.lower(hidden, embedding, hidden, embedding).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    at_512, at_1024 = temporary_bytes(512), temporary_bytes(1024)
    logits_of_one_sequence = 512 * vocabulary * 4
    assert at_512 < 4 * logits_of_one_sequence < batch * logits_of_one_sequence / 4 + 1
    assert at_1024 - at_512 < 8 * batch * 512 * width * 4 < logits_of_one_sequence


SHARDED_POLICIES = (
    SHARDED[0],
    EMBEDDING,
    np.random.default_rng(8).normal(size=(8, 4, E)).astype(np.float32),
    EMBEDDING_REF,
)
KL_SPECS = (P("data"), P(), P("data"), P())


def summed_kl(*arguments, chunk_size):
    return jnp.sum(jnp.square(ops.token_kl(*arguments, chunk_size=chunk_size)))


@pytest.mark.parametrize(("chunk_size", "rows_per_device"), [(8, 2), (32, 8)])
def test_kl_work_is_split_not_repeated_over_devices(mesh, chunk_size, rows_per_device):
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(SHARDED_POLICIES, KL_SPECS, strict=True)
    ]
    gradient = jax.jit(jax.grad(functools.partial(summed_kl, chunk_size=chunk_size), argnums=(0, 1)))
    compiled = gradient.lower(*placed).compile()
    assert set(re.findall(rf"f32\[\d+,{V}\]", str(compiled.as_text()))) == {f"f32[{rows_per_device},{V}]"}
    for given, wanted in zip(compiled(*placed), gradient(*SHARDED_POLICIES), strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk_size", [2, 8])
def test_kl_inside_shard_map(mesh, chunk_size):
    gradient = jax.grad(functools.partial(summed_kl, chunk_size=chunk_size), argnums=(0, 1))
    split = jax.shard_map(gradient, mesh=mesh, in_specs=KL_SPECS, out_specs=(P("data"), P()))
    for given, wanted in zip(
        jax.jit(split)(*SHARDED_POLICIES), jax.jit(gradient)(*SHARDED_POLICIES), strict=True
    ):
        np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-4)


def test_bad_kl_input_is_named():
    with pytest.raises(
        ValueError, match=r"embedding_ref must have shape \[V, D\] with D = 6, the width of hidden_ref"
    ):
        ops.token_kl(HIDDEN, EMBEDDING, HIDDEN_REF, EMBEDDING)
    with pytest.raises(ValueError, match="embedding_ref must have the vocabulary of embedding"):
        ops.token_kl(HIDDEN, EMBEDDING, HIDDEN_REF, EMBEDDING_REF[:-1])
    with pytest.raises(ValueError, match="hidden_ref must have the positions of hidden"):
        ops.token_kl(HIDDEN, EMBEDDING, HIDDEN_REF[:1], EMBEDDING_REF)
    with pytest.raises(TypeError, match="hidden_ref must be floating point"):
        ops.token_kl(HIDDEN, EMBEDDING, TOKEN, EMBEDDING_REF)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="hidden must be floating point"):
        ops.token_logprobs(TOKEN, EMBEDDING, TOKEN)
    with pytest.raises(TypeError, match=r"token must be integer, got float32\[3,4\]"):
        ops.token_logprobs(HIDDEN, EMBEDDING, D_LOGP)
    with pytest.raises(ValueError, match=r"embedding must have shape \[V, D\] with D = 5"):
        ops.token_logprobs(HIDDEN, EMBEDDING.T, TOKEN)
    with pytest.raises(ValueError, match=r"token must be of shape \[3,4\]"):
        ops.token_logprobs(HIDDEN, EMBEDDING, TOKEN[:, 1:])
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        ops.token_logprobs(HIDDEN, EMBEDDING, TOKEN, chunk_size=0)
