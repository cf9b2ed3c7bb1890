"""Attention: NumPy in float64 is the oracle; completions of one prompt never cost scores for one another."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled

from rlhfjax.config import Decoder
from rlhfjax.networks import (
    Branches,
    BranchMask,
    SegmentMask,
    attend,
    attention,
    branch_hidden,
    branch_mask,
    decoder,
)
from rlhfjax.networks.attention import kernel_for

B, H, N, K, P, G, C = 2, 4, 2, 8, 3, 3, 4
T = P + G * C
GENERATOR = np.random.default_rng(0)
QUERY, KEY, VALUE = (
    GENERATOR.normal(size=(B, *shape)).astype(np.float32) for shape in ((H, T, K), (N, K, T), (N, T, K))
)
MASK = BranchMask(
    jnp.asarray(np.array([[0, 1, 1], [1, 1, 1]], bool)),
    jnp.asarray(np.arange(C)[None, None] < np.array([[4, 2, 0], [1, 3, 4]])[:, :, None]),
)
REAL_BT = np.concatenate([MASK.prompt_BP, MASK.completion_BGC.reshape(B, -1)], axis=1)
GPU = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")


def expected(seen) -> np.ndarray:
    """Query by query, over the keys that `seen(b, t)` lists."""
    out = np.zeros((B, H, T, K))
    for b, h, t in np.ndindex(B, H, T):
        n, keys = h // (H // N), seen(b, t)
        score = QUERY[b, h, t].astype(np.float64) @ KEY[b, n][:, keys] / np.sqrt(K)
        weight = np.exp(score - score.max())
        out[b, h, t] = (weight / weight.sum()) @ VALUE[b, n][keys]
    return out


def seen_by(b: int, t: int) -> list[int]:
    """The keys that position t of row b sees: told by what a branch is, not by a mask."""
    prompt = [s for s in range(P) if MASK.prompt_BP[b, s]]
    if t < P:
        keys = [s for s in prompt if s <= t]
    else:
        g, c = divmod(t - P, C)
        own = [P + g * C + i for i in range(c + 1) if MASK.completion_BGC[b, g, i]]
        keys = prompt + own
    return keys if t in keys else [*keys, t]


@functools.cache
def with_gradient(kernel: str, dense: bool):
    """Output and the gradients of queries, keys and values, compiled."""

    def run(query, key, value, mask):
        def of(query, key, value):
            return attend(query, key, value, branch_mask(*mask) if dense else mask, kernel)

        out, pull = jax.vjp(of, query, key, value)
        return out, pull(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    return jax.jit(run)


@pytest.mark.parametrize("dense", [False, True], ids=["branches", "array"])
def test_every_query_sees_its_branch_and_its_prompt(dense):
    out, _ = with_gradient("xla", dense)(QUERY, KEY, VALUE, MASK)
    np.testing.assert_allclose(out, expected(seen_by), atol=1e-5)


def test_branches_have_the_gradients_of_the_whole_square():
    one, two = (with_gradient("xla", dense)(QUERY, KEY, VALUE, MASK) for dense in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, two)


def test_no_scores_of_one_completion_for_another():
    """Compiled shapes: with 8 completions the greatest array is far below the square of the row."""
    samples, length, prompt = 8, 16, 16
    total = prompt + samples * length

    def program(mask):
        shapes = ((1, 1, total, K), (1, 1, K, total), (1, 1, total, K))
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        loss = jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v, mask)))
        analysis: Any = jax.jit(loss).lower(*arrays).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    mask = BranchMask(jnp.ones((1, prompt), bool), jnp.ones((1, samples, length), bool))
    square = 4 * total * total
    assert program(mask) < square < program(branch_mask(*mask))


@pytest.mark.parametrize("remat", ["attention", "dots", "block"])
def test_remat_gives_the_same_gradient_and_keeps_less(remat):
    """Told by what is kept for the backward pass: XLA's CPU backend undoes it, so that no compiled size would tell."""
    config = Decoder(vocab_size=16, width=16, layers=2, heads=2, kv_heads=2, head_size=8, mlp_width=32)
    branches = _branches(batch=2, prompt=8, samples=2, length=24)
    params = compiled(decoder(config).init, jax.random.key(0))

    def gradient(config):
        def loss(params):
            return jnp.mean(jnp.sin(branch_hidden(decoder(config), params, branches)[0]))

        kept = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))
        return compiled(jax.grad(loss), params), sum(x.size * x.dtype.itemsize for x in kept)

    (whole, memory), (again, less) = gradient(config), gradient(dataclasses.replace(config, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, again)
    weights = (
        4 * 2 * 2 * 2 * 2 * 24 * (8 + 24)
    )  # float32 scores of all completions, batch and heads, in both layers
    assert less < memory - weights / 2


def _branches(batch, prompt, samples, length):
    token = np.arange(batch * samples * length, dtype=np.int32).reshape(batch, samples, length) % 16
    arrays = (np.ones((batch, prompt), np.int32), np.ones((batch, prompt), bool), token, token >= 0)
    return Branches(*map(jnp.asarray, arrays))


def test_auto_takes_the_fused_kernel_only_where_it_serves(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert kernel_for("auto", jnp.bfloat16, 64, 2) == "cudnn"
    for dtype, size, queries in ((jnp.float32, 64, 2), (jnp.bfloat16, 12, 2), (jnp.bfloat16, 64, 1)):
        assert kernel_for("auto", jnp.dtype(dtype), size, queries) == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert kernel_for("auto", jnp.bfloat16, 64, 2) == "xla"
    assert kernel_for("cudnn", jnp.float32, 12, 1) == "cudnn"  # who asks for it gets it, or its own error


def test_a_branch_mask_that_does_not_fit_is_told():
    lm = decoder(Decoder(vocab_size=16, width=16, layers=1, heads=2, kv_heads=2, head_size=8, mlp_width=32))
    params = jax.eval_shape(lm.init, jax.random.key(0))
    token = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def apply(token, mask, cache=None):
        call = functools.partial(lm.apply, mask_BTS=mask, cache=cache)
        return jax.eval_shape(lambda p, t: call(p, t, position_BT=t), params, token)

    apply(token, MASK)
    with pytest.raises(
        ValueError, match="not the rows of the mask: 2 of a prompt of 3 and 3 completions of 4"
    ):
        apply(jax.ShapeDtypeStruct((B, T + 1), jnp.int32), MASK)
    with pytest.raises(ValueError, match="with a cache give the mask as an array"):
        apply(token, MASK, lm.init_cache(B, T))


@pytest.mark.parametrize(("field", "value"), [("remat", "all"), ("attention", "flash")])
def test_an_unknown_choice_is_refused(field, value):
    with pytest.raises(ValueError, match=f"decoder {field}='{value}' is unknown; choose one of"):
        decoder(dataclasses.replace(Decoder(), **{field: value}))


def test_completions_as_rows_of_their_own_are_the_same(monkeypatch):
    """What surrounds cuDNN's kernel, with XLA's products in its place."""
    monkeypatch.setattr(attention, "_cudnn", attention._xla)
    one, two = (
        compiled(lambda q, k, v, kernel: attend(q, k, v, MASK, kernel), QUERY, KEY, VALUE, kernel=kernel)
        for kernel in ("xla", "cudnn")
    )
    np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 3])
def test_the_tpus_kernel_agrees(samples):
    """By Pallas' interpreter, values and gradients; lengths are no multiples of the kernel's blocks."""
    mask = MASK._replace(completion_BGC=MASK.completion_BGC[:, :samples])
    end = P + samples * C
    arrays = QUERY[:, :, :end], KEY[..., :end], VALUE[:, :, :end]
    real = REAL_BT[:, None, :end, None]

    def run(query, key, value, kernel):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask, kernel), query, key, value)
        return out * real, pull(real * jnp.cos(out))

    one, two = (compiled(functools.partial(run, kernel=kernel), *arrays) for kernel in ("xla", "splash"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, two)


def test_the_tpus_kernel_agrees_on_packed_rows():
    segment = np.array([[1] * 5 + [2] * 7 + [0] * 3, [1] * 15], np.int32)
    real = (segment > 0)[:, None, :, None]

    def run(query, key, value, kernel):
        mask = SegmentMask(jnp.asarray(segment))
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask, kernel), query, key, value)
        return out * real, pull(real * jnp.cos(out))

    one, two = (
        compiled(functools.partial(run, kernel=kernel), QUERY, KEY, VALUE) for kernel in ("xla", "splash")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, two)


def test_cudnn_in_float32_and_keys_unlike_values_are_refused():
    with pytest.raises(
        ValueError, match='attention="cudnn" needs dtype="bfloat16", this decoder has \'float32\''
    ):
        decoder(Decoder(attention="cudnn"))
    with pytest.raises(AssertionError, match="shape"):
        attend(jnp.asarray(QUERY), jnp.asarray(KEY[..., 1:]), jnp.asarray(VALUE), MASK)


@GPU
@pytest.mark.parametrize("dense", [False, True], ids=["branches", "array"])
def test_the_fused_kernel_agrees(dense):
    """With bfloat16 inputs, values and gradients; T = 15 is odd, which the kernel alone does not take."""
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (QUERY, KEY, VALUE)]
    fused = with_gradient("cudnn", dense)(*arrays, MASK)
    exact = with_gradient("xla", dense)(*(x.astype(jnp.float32) for x in arrays), MASK)
    real = REAL_BT[:, None, :, None]
    for ours, theirs in zip(jax.tree.leaves(fused), jax.tree.leaves(exact), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(ours), theirs, atol=0.05, rtol=0.05)
    np.testing.assert_allclose(np.float32(fused[0] * real), exact[0] * real, atol=0.03)
