"""What model families add to the decoder, against a NumPy float64 model written from the papers: whole rows, packed
rows, a cache, branches; and one policy sampled and evaluated."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.config import Decoder, RopeScaling
from rlhfjax.generation import generate, generate_refilled, sample_keys
from rlhfjax.networks import Branches, SegmentMask, branch_hidden, causal_mask, decoder
from rlhfjax.networks.rope import rope_frequencies
from rlhfjax.recipes import text_policy

PLAIN = Decoder(
    vocab_size=17,
    width=12,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=6,
    mlp_width=10,
    max_positions=32,
    rope_theta=50.0,
)
YARN = RopeScaling("yarn", factor=4.0, original_positions=8, beta_fast=2.0, beta_slow=0.25)
CONFIGS = {
    "gemma": dataclasses.replace(
        PLAIN,
        norm_offset=True,
        post_norms=True,
        qk_norm=True,
        windows=(3, 0),
        window_rope_theta=9.0,
        rope_scaling=RopeScaling("linear", factor=8.0),
        attention_scale=0.9,
        attention_softcap=1.1,
        logit_softcap=1.7,
        embedding_scale=12**0.5,
        activation="gelu",
    ),
    "neox": dataclasses.replace(
        PLAIN,
        norm="layernorm",
        parallel_blocks=True,
        rope_fraction=0.67,
        gated_mlp=False,
        activation="gelu_exact",
        tie_embeddings=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
    ),
    "gpt2": dataclasses.replace(
        PLAIN,
        norm="layernorm",
        positions="learned",
        gated_mlp=False,
        activation="gelu",
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
    ),
    "windowed": dataclasses.replace(PLAIN, windows=(4, 2), rope_scaling=YARN, activation="relu"),
}


def randomised(config: Decoder) -> dict:
    """Random parameters, norms and biases too, large enough that a wrong term is seen."""
    shapes = jax.eval_shape(decoder(config).init, jax.random.key(0))
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: generator.normal(size=x.shape).astype(np.float32) * 0.5, shapes)


def oracle(config: Decoder, params: dict, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] of one sequence, in float64, position by position and head by head."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(p, x):
        scale = p["scale"] + config.norm_offset
        if config.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale + p["bias"]
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale

    def project(p, x):
        return x @ p["kernel"] + p.get("bias", 0.0)

    def activate(x):
        match config.activation:
            case "silu":
                return x / (1 + np.exp(-x))
            case "relu":
                return np.maximum(x, 0)
            case "gelu":
                return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def turned(head, position, layer):
        windowed = bool(config.windows and config.windows[layer])
        frequency, factor = rope_frequencies(config, windowed=windowed)
        out, half = head.copy(), len(frequency)
        for i, f in enumerate(frequency):
            a, b, angle = head[i], head[i + half], position * f
            out[i] = factor * (a * math.cos(angle) - b * math.sin(angle))
            out[i + half] = factor * (b * math.cos(angle) + a * math.sin(angle))
        return out

    def attention(p, x, layer):
        size, group = config.head_size, config.heads // config.kv_heads
        query, key, value = (project(p[n], x).reshape(len(x), -1, size) for n in ("query", "key", "value"))
        if config.qk_norm:
            query, key = norm(p["query_norm"], query), norm(p["key_norm"], key)
        if config.positions == "rotary":
            query, key = (
                np.array([[turned(h, t, layer) for h in row] for t, row in enumerate(z)])
                for z in (query, key)
            )
        scale = config.attention_scale or size**-0.5
        window = (config.windows[layer] if config.windows else 0) or len(x)
        out = np.zeros((len(x), config.heads, size))
        for t in range(len(x)):
            seen = range(max(0, t - window + 1), t + 1)
            for h in range(config.heads):
                score = np.array([query[t, h] @ key[s, h // group] * scale for s in seen])
                if config.attention_softcap:
                    score = config.attention_softcap * np.tanh(score / config.attention_softcap)
                weight = np.exp(score - score.max())
                out[t, h] = weight @ np.array([value[s, h // group] for s in seen]) / weight.sum()
        return project(p["output"], out.reshape(len(x), -1))

    def mlp(p, x):
        inner = activate(project(p["gate"], x))
        return project(p["down"], inner * project(p["up"], x) if config.gated_mlp else inner)

    x = params["embedding"][tokens] * (config.embedding_scale or 1.0)
    if config.positions == "learned":
        x = x + params["positions"][: len(tokens)]
    for layer in range(config.layers):
        p = params[f"layer_{layer}"]
        attended = attention(p["attention"], norm(p["attention_norm"], x), layer)
        attended = norm(p["attention_post_norm"], attended) if config.post_norms else attended
        out = mlp(p["mlp"], norm(p["mlp_norm"], x if config.parallel_blocks else x + attended))
        x = x + attended + (norm(p["mlp_post_norm"], out) if config.post_norms else out)
    logits = norm(params["final_norm"], x) @ params.get("unembedding", params["embedding"]).T
    return config.logit_softcap * np.tanh(logits / config.logit_softcap) if config.logit_softcap else logits


TOKENS = np.random.default_rng(1).integers(0, 17, size=9).tolist()


@pytest.fixture(scope="module", params=list(CONFIGS))
def family(request):
    config = CONFIGS[request.param]
    params = randomised(config)
    return decoder(config), params, oracle(config, params, TOKENS)


def test_rows_packed_rows_and_a_cache_equal_the_papers(family):
    lm, params, expected = family
    length, pad, slots = len(TOKENS), 2, 13

    @jax.jit
    def run(params, token_BT, position_BT, segment_BT):
        whole, _ = lm.apply(params, token_BT, position_BT=position_BT, mask_BTS=causal_mask(segment_BT))
        packed, _ = lm.apply(params, token_BT, position_BT=position_BT, mask_BTS=SegmentMask(segment_BT))
        cache, hidden = lm.init_cache(1, slots), []
        for t in range(token_BT.shape[1]):
            seen = (jnp.arange(slots) <= t) & jnp.pad(
                segment_BT[0] == segment_BT[0, t], (0, slots - length - pad)
            )
            out, cache = lm.apply(
                params,
                token_BT[:, t : t + 1],
                position_BT=position_BT[:, t : t + 1],
                mask_BTS=seen[None, None],
                cache=cache,
                slot=t,
            )
            hidden.append(out)
        return [lm.logits(params, x) for x in (whole, packed, jnp.concatenate(hidden, axis=1))]

    token = jnp.asarray([[1, 2, *TOKENS]], jnp.int32)  # another sequence, or padding, stands before it
    segment = jnp.asarray([[1] * pad + [2] * length], jnp.int32)
    position = jnp.asarray([[*range(pad), *range(length)]], jnp.int32)
    for logits in run(params, token, position, segment):
        np.testing.assert_allclose(logits[0, pad:], expected, atol=1e-4)


def test_branches_equal_the_papers(family):
    """Prompt of 5, two completions of 4: windows of 2 to 4 tokens end within prompts and within completions."""
    lm, params, expected = family
    prompt, other = TOKENS[:5], [3, 3, 8, 1]
    branches = Branches(
        jnp.asarray([[0, 0, *prompt]], jnp.int32),
        jnp.asarray([[False, False, *[True] * 5]]),
        jnp.asarray([[TOKENS[5:], other]], jnp.int32),
        jnp.ones((1, 2, 4), bool),
    )
    _, after = jax.jit(lambda params: branch_hidden(lm, params, branches))(params)
    logits = lm.logits(params, after)
    np.testing.assert_allclose(logits[0, 0], expected[5:], atol=1e-4)
    np.testing.assert_allclose(logits[0, 1], oracle(lm.config, params, prompt + other)[5:], atol=1e-4)


def test_what_is_sampled_is_what_is_evaluated(family):
    """Through the shared cache, through slots, and through branches a completion has one log-probability."""
    lm, params, _ = family
    prompt = jnp.asarray([[0, 4, 9, 2], [5, 1, 1, 3]], jnp.int32)
    mask = jnp.asarray([[False, True, True, True], [True] * 4])
    settings = {"max_new_tokens": 7, "stop_tokens": (2,)}

    @jax.jit
    def run(params):
        keys = sample_keys(jax.random.key(0), jnp.arange(2), 2)
        drawn = generate(lm, params, prompt, mask, keys, **settings)
        refilled = generate_refilled(lm, params, prompt, mask, keys, slots=2, **settings)
        branches = Branches(prompt, mask, drawn.token_BGC, drawn.mask_BGC)
        return drawn, refilled, text_policy(lm)(params, branches).logp

    drawn, refilled, logp = run(params)
    np.testing.assert_array_equal(drawn.token_BGC, refilled.token_BGC)
    np.testing.assert_allclose(drawn.logp_BGC, refilled.logp_BGC, atol=1e-4)
    np.testing.assert_allclose(drawn.logp_BGC, np.where(drawn.mask_BGC, logp, 0), atol=1e-4)
    assert int(drawn.mask_BGC.sum()) > 8


def frequencies(**scaling) -> tuple[np.ndarray, float]:
    return rope_frequencies(
        dataclasses.replace(PLAIN, head_size=8, rope_theta=1e4, rope_scaling=RopeScaling(**scaling))
    )


BASE = 1e4 ** (-np.arange(0, 8, 2) / 8)  # wavelengths 6.3, 63, 628, 6283


def test_llama3_scaling_stretches_long_waves_and_leaves_short_ones():
    scaled, factor = frequencies(
        kind="llama3",
        factor=8.0,
        original_positions=1024,
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
    )
    turns = 1024 * BASE[2] / (2 * math.pi)  # 1.63: between 1 and 4
    kept = (turns - 1) / 3
    np.testing.assert_allclose(scaled[[0, 1, 3]], [BASE[0], BASE[1], BASE[3] / 8])
    np.testing.assert_allclose(scaled[2], BASE[2] * (kept + (1 - kept) / 8))
    assert factor == 1.0


def test_yarn_blends_by_turns_over_the_original_context():
    scaled, factor = frequencies(kind="yarn", factor=4.0, original_positions=1024, truncate=False)

    def dimension(turns):  # at which a wave makes so many turns: 1024 theta^(-2 d / 8) / 2 pi = turns
        return 4 * math.log(1024 / (2 * math.pi * turns)) / math.log(1e4)

    low, high = dimension(32), dimension(1)
    stretched = np.clip((np.arange(4) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(scaled, BASE * (1 - stretched + stretched / 4))
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
    assert stretched[0] == 0 and 0 < stretched[1] < 1 and stretched[3] == 1


def test_longrope_chooses_by_the_context_of_the_decoder():
    settings = {
        "kind": "longrope",
        "factor": 2.0,
        "short_factors": (1.0, 1, 2, 2),
        "long_factors": (1.0, 3, 5, 7),
    }
    scaled, factor = frequencies(original_positions=16, **settings)  # max_positions is 32
    np.testing.assert_allclose(scaled, BASE / [1, 3, 5, 7])
    assert factor == pytest.approx(math.sqrt(1 + math.log(2) / math.log(16)))
    np.testing.assert_allclose(frequencies(original_positions=32, **settings)[0], BASE / [1, 1, 2, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": (3,)}, "for each of 2 layers"),
        ({"windows": (3, -1)}, "for each of 2 layers"),
        ({"logit_softcap": 0.0}, "logit_softcap=0.0 must be above 0"),
        ({"attention_softcap": 1.0, "attention": "splash"}, "no softcap"),
        ({"rope_fraction": 0.5}, "rotates 3 dimensions"),
        ({"rope_scaling": RopeScaling("ntk")}, "kind='ntk' is unknown"),
        ({"rope_scaling": RopeScaling("yarn")}, "needs original_positions"),
        ({"rope_scaling": RopeScaling("longrope", original_positions=8)}, "short_factors has 0 numbers"),
    ],
)
def test_contradictions_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        decoder(dataclasses.replace(PLAIN, **changes))
