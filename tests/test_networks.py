"""The decoder against independent NumPy code, and the invariances its mask and cache must have."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.config import Decoder
from rlhfjax.networks import (
    Branches,
    branch_hidden,
    causal_mask,
    decoder,
    init_scalar_head,
    scalar_head,
)
from rlhfjax.ops import token_logprobs

LLAMA = Decoder(
    vocab_size=11, width=16, layers=2, heads=4, kv_heads=2, head_size=6, mlp_width=20, max_positions=32
)
GPT2 = dataclasses.replace(
    LLAMA,
    kv_heads=4,
    norm="layernorm",
    positions="learned",
    gated_mlp=False,
    activation="gelu",
    tie_embeddings=False,
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
)


@functools.cache
def randomised(config: Decoder, seed: int = 0):
    """A model whose every parameter, norms and biases too, differs from its initial value."""
    lm = decoder(config)
    generator = np.random.default_rng(seed)

    def moved(x):
        return jnp.asarray(np.asarray(x) + 0.2 * generator.normal(size=x.shape).astype(np.float32))

    return lm, jax.tree.map(moved, jax.jit(lm.init)(jax.random.key(seed)))


@functools.cache
def pass_of(config: Decoder):
    """Hidden states and logits of packed rows in one pass, compiled."""
    lm = decoder(config)

    def run(params, token_BT, segment_BT, position_BT):
        hidden, _ = lm.apply(params, token_BT, position_BT=position_BT, mask_BTS=causal_mask(segment_BT))
        return hidden, lm.logits(params, hidden)

    return jax.jit(run)


def one_pass(config: Decoder, params, tokens, segment=None, position=None):
    """Hidden states and logits, each [T, ...], of one row, by default one sequence."""
    token = np.asarray([tokens], np.int32)
    segment = np.ones_like(token) if segment is None else np.asarray([segment], np.int32)
    position = (
        np.arange(token.shape[1], dtype=np.int32)[None]
        if position is None
        else np.asarray([position], np.int32)
    )
    return (np.asarray(x)[0] for x in pass_of(config)(params, token, segment, position))


@functools.cache
def branches_of(config: Decoder):
    """`branch_hidden`, compiled."""
    return jax.jit(functools.partial(branch_hidden, decoder(config)))


def numpy_decoder(config: Decoder, params, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] of one sequence in float64, token by token and head by head, from the papers' equations."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, w):
        if config.norm == "layernorm":
            x = x - x.mean()
        out = x / np.sqrt((x * x).mean() + config.norm_epsilon) * w["scale"]
        return out + w.get("bias", 0.0)

    def linear(x, w):
        return x @ w["kernel"] + w.get("bias", 0.0)

    def rotate(vector, position):
        half = len(vector) // 2
        out = np.empty_like(vector)
        for i in range(half):
            angle = position / config.rope_theta ** (2 * i / len(vector))
            a, b = vector[i], vector[i + half]
            out[i] = a * np.cos(angle) - b * np.sin(angle)
            out[i + half] = a * np.sin(angle) + b * np.cos(angle)
        return out

    def activate(x):
        if config.activation == "silu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    stream = [p["embedding"][t].copy() for t in tokens]
    if config.positions == "learned":
        stream = [x + p["positions"][i] for i, x in enumerate(stream)]
    for i in range(config.layers):
        layer, size = p[f"layer_{i}"], config.head_size
        normed = [norm(x, layer["attention_norm"]) for x in stream]
        q, k, v = (
            [linear(x, layer["attention"][n]).reshape(-1, size) for x in normed]
            for n in ("query", "key", "value")
        )
        if config.positions == "rotary":
            q = [np.stack([rotate(head, t) for head in x]) for t, x in enumerate(q)]
            k = [np.stack([rotate(head, t) for head in x]) for t, x in enumerate(k)]
        for t in range(len(tokens)):
            heads = []
            for h in range(config.heads):
                shared = h // (config.heads // config.kv_heads)
                score = np.array([q[t][h] @ k[s][shared] for s in range(t + 1)]) / np.sqrt(size)
                weight = np.exp(score - score.max())
                weight /= weight.sum()
                heads.append(sum(w * v[s][shared] for s, w in enumerate(weight)))
            stream[t] = stream[t] + linear(np.concatenate(heads), layer["attention"]["output"])
        for t in range(len(tokens)):
            x = norm(stream[t], layer["mlp_norm"])
            inner = activate(linear(x, layer["mlp"]["gate"]))
            if config.gated_mlp:
                inner = inner * linear(x, layer["mlp"]["up"])
            stream[t] = stream[t] + linear(inner, layer["mlp"]["down"])
    table = p["embedding" if config.tie_embeddings else "unembedding"]
    return np.stack([norm(x, p["final_norm"]) @ table.T for x in stream])


def logits_of(config: Decoder, params, tokens, segment=None, position=None):
    _, logits = one_pass(config, params, tokens, segment, position)
    return logits


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_decoder_equals_numpy(config):
    _, params = randomised(config)
    tokens = [3, 1, 4, 1, 5, 9, 2]
    np.testing.assert_allclose(
        logits_of(config, params, tokens), numpy_decoder(config, params, tokens), atol=2e-5, rtol=2e-5
    )


def test_packed_segments_equal_separate_sequences():
    _, params = randomised(LLAMA)
    first, second = [3, 1, 4], [1, 5, 9, 2]
    packed = logits_of(
        LLAMA,
        params,
        [*first, *second, 0],
        segment=[1] * 3 + [2] * 4 + [0],
        position=[0, 1, 2, 0, 1, 2, 3, 0],
    )
    np.testing.assert_allclose(packed[:3], logits_of(LLAMA, params, first), atol=1e-5)
    np.testing.assert_allclose(packed[3:7], logits_of(LLAMA, params, second), atol=1e-5)
    assert np.all(np.isfinite(packed))


def test_causality_by_gradient():
    lm, params = randomised(LLAMA)
    token = jnp.asarray([[3, 1, 4, 1, 5]], jnp.int32)

    def at_two(embedding_rows):
        swapped = params | {"embedding": params["embedding"].at[token[0]].set(embedding_rows)}
        mask_BTS = causal_mask(jnp.ones(token.shape, jnp.int32))
        hidden, _ = lm.apply(swapped, token, position_BT=jnp.arange(5)[None], mask_BTS=mask_BTS)
        return hidden[0, 2].sum()

    gradient = jax.jit(jax.grad(at_two))(np.asarray(params["embedding"])[np.asarray(token)[0]])
    gradient = np.abs(gradient).sum(axis=1)
    assert gradient[2] > 0 and gradient[0] > 0
    assert gradient[4] == 0  # token 5 stands only after position 2


def test_cached_steps_equal_one_pass():
    lm, params = randomised(LLAMA)
    tokens = np.asarray([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]], np.int32)
    whole = [one_pass(LLAMA, params, row) for row in tokens]
    whole = np.stack([hidden for hidden, _ in whole])
    step = jax.jit(lm.apply)
    cache = lm.init_cache(2, 8)
    for start, end in ((0, 3), (3, 4), (4, 6)):
        visible = np.arange(8)[None, :] <= np.arange(start, end)[:, None]
        hidden, cache = step(
            params,
            tokens[:, start:end],
            position_BT=np.tile(np.arange(start, end, dtype=np.int32), (2, 1)),
            mask_BTS=np.tile(visible[None], (2, 1, 1)),
            cache=cache,
            slot=start,
        )
        np.testing.assert_allclose(hidden, whole[:, start:end], atol=1e-5)


def make_branches() -> Branches:
    prompt = jnp.asarray([[0, 0, 3, 4], [5, 6, 7, 8]], jnp.int32)
    prompt_mask = jnp.asarray([[0, 0, 1, 1], [1, 1, 1, 1]], bool)
    completion = jnp.asarray([[[1, 2, 9], [4, 0, 0]], [[7, 7, 0], [2, 3, 4]]], jnp.int32)
    mask = jnp.asarray([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [1, 1, 1]]], bool)
    return Branches(prompt, prompt_mask, completion, mask)


def test_branches_equal_each_completion_alone():
    _, params = randomised(LLAMA)
    branches = make_branches()
    before, after = map(np.asarray, branches_of(LLAMA)(params, branches))
    for b, prompt in enumerate([[3, 4], [5, 6, 7, 8]]):
        for g in range(2):
            length = np.asarray(branches.completion_mask_BGC)[b, g].sum()
            tokens = [*prompt, *np.asarray(branches.completion_BGC)[b, g, :length].tolist()]
            alone, _ = one_pass(LLAMA, params, tokens)
            start = len(prompt)
            np.testing.assert_allclose(after[b, g, :length], alone[start:], atol=1e-5)
            np.testing.assert_allclose(before[b, g, :length], alone[start - 1 : -1], atol=1e-5)


def test_branches_do_not_depend_on_padding():
    _, params = randomised(LLAMA)
    branches = make_branches()
    arrays = [np.asarray(x) for x in branches]
    prompt, prompt_mask = (np.pad(x, ((0, 0), (2, 0))) for x in arrays[:2])
    completion, mask = (np.pad(x, ((0, 0), (0, 0), (0, 2))) for x in arrays[2:])
    completion = np.where(mask, completion, 10)
    wider = Branches(*map(jnp.asarray, (prompt, prompt_mask, completion, mask)))
    before, _ = branches_of(LLAMA)(params, branches)
    before_wide, _ = branches_of(LLAMA)(params, wider)
    mask = arrays[3]
    np.testing.assert_allclose(np.asarray(before)[mask], np.asarray(before_wide)[:, :, :3][mask], atol=1e-5)


def test_scalar_head_starts_as_the_papers_say():
    head = jax.jit(init_scalar_head, static_argnums=1)(jax.random.key(0), 4095)
    assert abs(np.std(head["kernel"]) - 4096**-0.5) < 0.03 * 4096**-0.5
    assert float(head["bias"]) == 0.0
    hidden = np.random.default_rng(1).normal(size=(2, 3, 4095)).astype(np.float32)
    np.testing.assert_allclose(
        jax.jit(scalar_head)(head | {"bias": jnp.float32(2.0)}, hidden),
        np.asarray(hidden, np.float64) @ np.asarray(head["kernel"], np.float64) + 2.0,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"norm": "batchnorm"}, "norm='batchnorm' is unknown"),
        ({"head_size": 5}, "an even number"),
        ({"layers": 0}, "layers must be at least 1"),
    ],
)
def test_contradictory_decoders_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        decoder(dataclasses.replace(LLAMA, **change))


def test_wrong_ranks_and_types_are_refused():
    lm, params = randomised(LLAMA)
    token = jnp.asarray(np.ones((1, 3), np.int32))
    mask_BTS = jnp.asarray(np.ones((1, 3, 3), bool))
    with pytest.raises(AssertionError):
        lm.apply(params, jnp.asarray(np.ones(3, np.int32)), position_BT=token, mask_BTS=mask_BTS)
    with pytest.raises(AssertionError):
        lm.apply(params, token.astype(jnp.float32), position_BT=token, mask_BTS=mask_BTS)


def test_bfloat16_computes_over_float32_parameters():
    """Hidden states near those of float32, and gradients in the parameters' own type, near theirs too."""
    narrow = dataclasses.replace(LLAMA, dtype="bfloat16")
    _, params = randomised(LLAMA)
    branches = make_branches()
    real = np.asarray(branches.completion_mask_BGC)

    def run(config):
        lm = decoder(config)

        def loss(params):
            before, _ = branch_hidden(lm, params, branches)
            logp = token_logprobs(before, lm.embedding(params), branches.completion_BGC).logp
            return -jnp.sum(jnp.where(real, logp, 0.0)) / real.sum(), (before, logp)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    ((loss, (hidden, logp)), gradient), ((exact, (wide, wide_logp)), wide_gradient) = run(narrow), run(LLAMA)
    assert hidden.dtype == jnp.bfloat16 and wide.dtype == logp.dtype == jnp.float32
    assert float(loss) != float(exact)
    np.testing.assert_allclose(np.asarray(hidden, np.float32)[real], wide[real], atol=0.1)
    np.testing.assert_allclose(logp[real], wide_logp[real], atol=0.1)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(wide_gradient), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=0.1 * np.abs(theirs).max())
