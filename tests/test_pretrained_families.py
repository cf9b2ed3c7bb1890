"""Every family: its config.json in both spellings, its weights there and back, and what none can express.

Then each against `transformers`, skipped where that is missing: logits, cached decoding, gradients, files both ways. A
random checkpoint of each family, and of each of its options that changes numbers, is made there and read here.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhfjax.config import Decoder, RopeScaling
from rlhfjax.networks import causal_mask, decoder, scalar_head
from rlhfjax.pretrained import load_pretrained, load_reward_model, save_pretrained, save_reward_model
from rlhfjax.pretrained.families import FAMILIES
from rlhfjax.pretrained.families_config import choose_family, read_config, write_config
from rlhfjax.pretrained.weights import assemble, read_part, weights_of

# What all but a GPT-2 say, and what a Decoder makes of it.
SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
READ = Decoder(
    vocab_size=50, width=24, mlp_width=36, layers=4, heads=4, kv_heads=2, head_size=6, max_positions=64
)
COMMON = SIZES | {"num_key_value_heads": 2, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
YARN4 = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
# name -> (transformers 4, transformers 5, what both mean)
SPELLINGS = {
    "llama": (
        {"rope_theta": 500_000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": True},
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000},
            "dtype": "bfloat16",
            "tie_word_embeddings": True,
            "head_dim": 6,
        },
        {"rope_theta": 5e5},
    ),
    "llama scaled": (
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        {
            "rope_parameters": {
                "rope_theta": 5e5,
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 1,
                "high_freq_factor": 4,
                "original_max_position_embeddings": 16,
            },
            "mlp_bias": False,
        },
        {
            "rope_theta": 5e5,
            "rope_scaling": RopeScaling("llama3", 8.0, 16, 1.0, 4.0),
            "tie_embeddings": False,
        },
    ),
    "mistral": (
        {"sliding_window": 8, "rope_theta": 1e4},
        {"sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "head_dim": 6},
        {"windows": (8, 8, 8, 8), "tie_embeddings": False},
    ),
    "qwen2": (
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3, "rope_scaling": YARN4},
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 3,
            "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
            "rope_parameters": YARN4 | {"rope_type": "yarn", "rope_theta": 1e4},
        },
        {
            "windows": (0, 0, 0, 8),
            "attention_bias": True,
            "tie_embeddings": False,
            "rope_scaling": RopeScaling("yarn", 2.0, 32),
        },
    ),
    "qwen3": (
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1, "rope_theta": 1e6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "sliding_window": None},
        {"head_size": 128, "qk_norm": True, "rope_theta": 1e6, "tie_embeddings": False},
    ),
    "gemma2": (
        {"head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": 8, "final_logit_softcapping": None},
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": 50.0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        {
            "head_size": 8,
            "windows": (8, 0, 8, 0),
            "attention_scale": 0.25,
            "attention_softcap": 50.0,
            "activation": "gelu",
            "norm_offset": True,
            "post_norms": True,
            "embedding_scale": 24**0.5,
        },
    ),
    "gemma3_text": (
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "sliding_window_pattern": 3,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {
            "head_size": 8,
            "windows": (8, 8, 0, 8),
            "rope_theta": 1e6,
            "window_rope_theta": 1e4,
            "rope_scaling": RopeScaling("linear", 8.0),
            "qk_norm": True,
            "activation": "gelu",
            "norm_offset": True,
            "post_norms": True,
            "embedding_scale": 24**0.5,
        },
    ),
    "gpt_neox": (
        {"rotary_pct": 0.34, "rotary_emb_base": 500, "layer_norm_eps": 1e-6, "hidden_act": "gelu"},
        {
            "rope_parameters": {"partial_rotary_factor": 0.34, "rope_theta": 500, "rope_type": "default"},
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
            "use_parallel_residual": True,
            "attention_bias": True,
        },
        {
            "kv_heads": 4,
            "norm": "layernorm",
            "gated_mlp": False,
            "activation": "gelu_exact",
            "parallel_blocks": True,
            "rope_fraction": 0.34,
            "rope_theta": 500.0,
            "attention_bias": True,
            "output_bias": True,
            "mlp_bias": True,
            "tie_embeddings": False,
        },
    ),
    "phi3": (
        {
            "original_max_position_embeddings": 16,
            "rope_scaling": {"type": "su", "short_factor": [1.0, 1.5, 2], "long_factor": [2, 3, 4]},
            "sliding_window": 8,
        },
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.0, 1.5, 2],
                "long_factor": [2, 3, 4],
                "original_max_position_embeddings": 16,
            },
            "sliding_window": 8,
        },
        {
            "windows": (8, 8, 8, 8),
            "tie_embeddings": False,
            "rope_scaling": RopeScaling(
                "longrope", 4.0, 16, short_factors=(1.0, 1.5, 2.0), long_factors=(2.0, 3.0, 4.0)
            ),
        },
    ),
}


def spelled(name: str, which: int) -> dict:
    return COMMON | {"model_type": name.split()[0]} | SPELLINGS[name][which]


@pytest.mark.parametrize("which", [0, 1], ids=["v4", "v5"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_both_spellings_are_read(name, which):
    family, config = read_config(spelled(name, which))
    assert family.model_type == name.split()[0]
    assert config == dataclasses.replace(READ, norm_epsilon=1e-6, **SPELLINGS[name][2])


def test_a_gpt2_that_leaves_out_what_it_may_is_read():
    raw = {"model_type": "gpt2", "vocab_size": 50, "n_embd": 24, "n_layer": 4, "n_head": 4, "n_positions": 64}
    expected = dataclasses.replace(
        READ,
        mlp_width=96,
        kv_heads=4,
        norm="layernorm",
        positions="learned",
        gated_mlp=False,
        activation="gelu",
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
    )
    assert read_config(raw | {"n_ctx": 64, "resid_pdrop": 0.1})[1] == expected
    assert read_config(raw | {"n_inner": None, "activation_function": "gelu_new"})[1] == expected
    for option, value in (
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
    ):
        with pytest.raises(ValueError, match=f"{option}={value}, which a gpt2 cannot have"):
            read_config(raw | {option: value})


@pytest.mark.parametrize("which", [0, 1], ids=["v4", "v5"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_what_is_written_is_read_as_it_was_in_both_spellings(name, which):
    family, config = read_config(spelled(name, which))
    raw = json.loads(json.dumps(write_config(family, config)))
    assert read_config(raw)[1] == config
    # transformers 4 does not know rope_parameters, nor transformers 5 the others where it has these.
    older = {"rope_theta", "rope_local_base_freq", "rope_scaling", "rotary_pct", "rotary_emb_base"}
    assert read_config({x: y for x, y in raw.items() if x not in older})[1] == config
    assert read_config({x: y for x, y in raw.items() if x != "rope_parameters"})[1] == config


MULTI = {"mscale": 0.707, "mscale_all_dim": 1.414}


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("llama", {"rope_scaling": {"type": "yarn"}}, RopeScaling("yarn", 1.0, 64)),
        ("llama", {"rope_scaling": YARN4 | {"beta_fast": 16}}, RopeScaling("yarn", 2.0, 32, beta_fast=16.0)),
        (
            "llama",
            {"rope_scaling": YARN4 | {"attention_factor": 3.0}},
            RopeScaling("yarn", 2.0, 32, attention_factor=3.0),
        ),
        (
            "llama",
            {"rope_scaling": YARN4 | MULTI},
            # 0.1 ln 2 = 0.0693147
            RopeScaling(
                "yarn",
                2.0,
                32,
                attention_factor=(1 + 0.707 * 0.0693147180559945) / (1 + 1.414 * 0.0693147180559945),
            ),
        ),
        ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 3}}, RopeScaling("linear", 3.0)),
        (
            "phi3",
            {"rope_scaling": {"type": "yarn", "short_factor": [1, 1, 1], "long_factor": [2, 2, 2]}},
            RopeScaling("longrope", 4.0, 16, short_factors=(1.0,) * 3, long_factors=(2.0,) * 3),
        ),
    ],
)
def test_scalings_in_other_words(name, changes, expected):
    read = read_config(spelled(name, 0) | changes)[1].rope_scaling
    without = {"attention_factor": None}
    assert dataclasses.replace(read, **without) == dataclasses.replace(expected, **without)
    assert read.attention_factor == (
        expected.attention_factor and pytest.approx(expected.attention_factor, rel=1e-12)
    )


@pytest.mark.parametrize(
    ("name", "changes", "windows"),
    [
        ("mistral", {"sliding_window": None}, ()),
        ("phi3", {"sliding_window": None}, ()),
        ("qwen2", {"use_sliding_window": False}, ()),
        ("qwen2", {"max_window_layers": 0}, (8, 8, 8, 8)),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"] * 2}, (8, 0, 8, 0)),
        ("gemma3_text", {"sliding_window_pattern": 2}, (8, 0, 8, 0)),
        ("gemma2", {"layer_types": ["full_attention"] * 4}, ()),
    ],
)
def test_windows_in_other_words(name, changes, windows):
    assert read_config(spelled(name, 0) | changes)[1].windows == windows


def test_windows_that_are_left_out_are_those_of_transformers():
    raw = {name: value for name, value in spelled("mistral", 0).items() if name != "sliding_window"}
    assert read_config(raw)[1].windows == (4096,) * 4
    assert read_config(raw | {"model_type": "phi3"})[1].windows == ()
    raw = {name: value for name, value in spelled("gemma2", 0).items() if name != "sliding_window"}
    assert read_config(raw)[1].windows == (4096, 0, 4096, 0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma2", {"sliding_window": None}, "sliding_attention, but no sliding_window"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "by type of layer: full_attention and"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "stretches layers with a window",
        ),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "sliding_window=8 has"),
        ("phi3", {"attention_bias": True}, "attention_bias=True, which a phi3"),
        (
            "phi3",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "'linear', which cannot be read; supported: .*longrope",
        ),
        (
            "phi3",
            {
                "original_max_position_embeddings": 16,
                "rope_scaling": {"type": "su", "original_max_position_embeddings": 8},
            },
            "=16 and 8",
        ),
        ("gpt_neox", {"hidden_act": "gelu_10"}, "hidden_act='gelu_10'"),
    ],
)
def test_options_that_no_decoder_obeys_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        read_config(spelled(name, 0) | changes)


def test_the_first_family_that_can_is_chosen():
    for name in SPELLINGS:
        family, config = read_config(spelled(name, 0))
        chosen = choose_family(config).model_type
        # Without its longrope a Phi-3 is a Mistral in other files, and longrope any family may have.
        assert chosen == {"phi3": "mistral"}.get(name, family.model_type)
    assert choose_family(dataclasses.replace(READ, rope_fraction=1.0, windows=(0,) * 4)).model_type == "llama"
    for changes, message in (
        ({"norm": "layernorm", "qk_norm": True}, "no family has all of this decoder; nearest is"),
        ({"activation": "tanh"}, "no family has activation='tanh'"),
        ({"windows": (4, 8, 4, 8)}, r"no family has windows=\(4, 8, 4, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_family(dataclasses.replace(READ, **changes))
    with pytest.raises(ValueError, match=r"a gpt2 cannot have .*kv_heads=2 \(it has 4\)"):
        write_config(FAMILIES["gpt2"], READ)


def decoders() -> dict[str, Decoder]:
    """A small decoder of every family."""
    found = {name: read_config(spelled(name, 0))[1] for name in SPELLINGS if name != "llama scaled"}
    raw = {"model_type": "gpt2", "vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
    found["gpt2"] = read_config(raw)[1]
    found["qwen3"] = dataclasses.replace(found["qwen3"], head_size=8)
    return {name: dataclasses.replace(x, layers=2, windows=x.windows[-2:]) for name, x in found.items()}


@functools.cache
def random_params(name: str) -> dict:
    """Random params of `decoders()[name]`, in bfloat16."""
    shapes = jax.eval_shape(decoder(decoders()[name]).init, jax.random.key(0))
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: generator.normal(size=x.shape).astype(jnp.bfloat16), shapes)


def test_every_family_has_a_decoder_here():
    assert sorted(decoders()) == sorted(FAMILIES)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_weights_survive_the_round_trip_to_the_bit(name, tmp_path):
    config, params = decoders()[name], random_params(name)
    save_pretrained(tmp_path, config, params, family=name, dtype=None, shard_bytes=5_000)
    loaded_config, loaded = load_pretrained(tmp_path, dtype=None)
    assert loaded_config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_fused_weights_lie_as_transformers_has_them(tmp_path):
    """Against the layouts in words: thirds of columns, heads of (q, k, v), rows of q then k then v, gate then up."""
    for name in ("gpt2", "gpt_neox", "phi3"):
        save_pretrained(tmp_path / name, decoders()[name], random_params(name), family=name, dtype=None)
    files = {name: load_file(tmp_path / name / "model.safetensors") for name in ("gpt2", "gpt_neox", "phi3")}
    layers = {name: random_params(name)["layer_1"] for name in files}

    def kernels(name, *which):
        return [layers[name]["attention"][x]["kernel"] for x in which]

    same = np.testing.assert_array_equal
    query, key, value = kernels("gpt2", "query", "key", "value")
    fused = files["gpt2"]["transformer.h.1.attn.c_attn.weight"]
    same(fused, np.concatenate([query, key, value], axis=1))
    same(files["gpt2"]["transformer.h.1.mlp.c_fc.weight"], layers["gpt2"]["mlp"]["gate"]["kernel"])
    query, key, value = kernels("gpt_neox", "query", "key", "value")
    fused = files["gpt_neox"]["gpt_neox.layers.1.attention.query_key_value.weight"]
    for head in range(4):
        for part, kernel in enumerate((query, key, value)):
            rows = fused[18 * head + 6 * part : 18 * head + 6 * part + 6]
            same(rows, kernel[:, 6 * head : 6 * head + 6].T)
    same(
        files["gpt_neox"]["gpt_neox.layers.1.attention.query_key_value.bias"][6:12],
        layers["gpt_neox"]["attention"]["key"]["bias"][:6],
    )
    query, key, value = kernels("phi3", "query", "key", "value")
    fused = files["phi3"]["model.layers.1.self_attn.qkv_proj.weight"]
    same(fused, np.concatenate([query.T, key.T, value.T]))
    fused = files["phi3"]["model.layers.1.mlp.gate_up_proj.weight"]
    same(fused[:36], layers["phi3"]["mlp"]["gate"]["kernel"].T)
    same(fused[36:], layers["phi3"]["mlp"]["up"]["kernel"].T)


class Recorded:
    """A stored tensor that counts what is read of it."""

    def __init__(self, array):
        self.array, self.read = array, 0

    def __getitem__(self, index):
        part = self.array[index]
        self.read += part.size
        return part


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_parts_are_read_without_the_rest(name):
    config, family, params = decoders()[name], FAMILIES[name], random_params(name)
    weights = weights_of(family, config, prefix="", unembedding="head")
    of_tensor = {}
    for weight in weights:
        array = functools.reduce(lambda tree, key: tree[key], weight.path, params)
        of_tensor.setdefault(weight.name, []).append((weight, array))
    for parts in of_tensor.values():
        stored = assemble(parts, jnp.bfloat16)
        for weight, array in parts:
            assert stored.shape == weight.stored_shape()
            half, whole = array.shape[-1] // 2, (slice(None),) * array.ndim
            columns, rows = (*whole[:-1], slice(half, None)), (slice(1, 3), *whole[1:])
            # Of heads of (q, k, v) the whole of a head is read.
            times = weight.stride // weight.size if weight.stride != weight.length else 1
            for index in (whole, columns, rows):
                tensor = Recorded(stored)
                np.testing.assert_array_equal(read_part(tensor, weight, index), array[index])
                least = max(array[index].size, weight.size if times > 1 else 0)
                assert tensor.read <= times * least


def test_older_files_are_read(tmp_path):
    """A GPT-2 without a prefix, a GPT-NeoX with another output name, both with buffers; a Gemma 3 that sees images."""
    bare = {"masked_bias": np.full(1, -1e4, np.float32), "bias": np.ones((1, 1, 4, 4), bool)}

    def rename(name, change, extra, **config):
        save_pretrained(tmp_path / name, decoders()[name], random_params(name), family=name, dtype=None)
        weights = load_file(tmp_path / name / "model.safetensors")
        weights = {change(key): value for key, value in weights.items()} | extra
        save_file(weights, tmp_path / name / "model.safetensors")
        raw = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config.get("nest", lambda x: x)(raw)))
        loaded_config, loaded = load_pretrained(tmp_path / name, dtype=None)
        assert loaded_config == decoders()[name]
        jax.tree.map(np.testing.assert_array_equal, loaded, random_params(name))

    buffers = {f"h.1.attn.{key}": value for key, value in bare.items()}
    rename("gpt2", lambda key: key.removeprefix("transformer."), buffers)
    buffers = {f"gpt_neox.layers.0.attention.{key}": value for key, value in bare.items()}
    buffers["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    rename("gpt_neox", lambda key: key.replace("embed_out", "lm_head"), buffers)
    seen = {"vision_tower.conv.weight": np.ones(3, np.float32)}
    nest = {"nest": lambda raw: {"model_type": "gemma3", "text_config": raw, "vision_config": {}}}
    rename("gemma3_text", lambda key: "language_model." + key, seen, **nest)
    seen = {"model.multi_modal_projector.weight": np.ones(3, np.float32)}
    rename("gemma3_text", lambda key: key.replace("model.", "model.language_model."), seen, **nest)


def test_learned_positions_may_be_cut(tmp_path):
    config, params = decoders()["gpt2"], random_params("gpt2")
    save_pretrained(tmp_path, config, params, dtype=None)
    shorter, loaded = load_pretrained(tmp_path, dtype=None, max_positions=5)
    assert shorter == dataclasses.replace(config, max_positions=5)
    np.testing.assert_array_equal(loaded["positions"], params["positions"][:5])
    save_pretrained(tmp_path / "shorter", shorter, loaded, dtype=None, like=tmp_path)
    assert load_pretrained(tmp_path / "shorter")[0] == shorter


def test_a_shorter_context_leaves_a_longrope_as_it_was():
    """The factor is that of the whole context, so that what multiplies cosine and sine stays."""
    family, config = read_config(spelled("phi3", 0))
    raw = write_config(family, config)
    # The three fields that transformers 4 allows.
    assert set(raw["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    shorter = dataclasses.replace(config, max_positions=16)
    raw = write_config(family, shorter)
    assert raw["rope_scaling"]["factor"] == raw["rope_parameters"]["factor"] == 4.0
    assert read_config(raw)[1] == shorter


# Against transformers

LENGTH, PADDING, PREFILL = 12, (0, 3, 5), 7
SMALL = {
    "vocab_size": 23,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2 = {
    "vocab_size": 23,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Of their attention one head's size is the width over the heads.
PLAIN = {name: value for name, value in SMALL.items() if name != "head_dim"} | {"hidden_size": 32}
NEOX = {name: value for name, value in PLAIN.items() if name not in ("num_key_value_heads", "rms_norm_eps")}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.3],
    "long_factor": [1.5, 4.0],
    "partial_rotary_factor": 0.5,
}
BY_LAYER = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
# name -> (config class, options, max_positions to load with)
CASES = {
    "llama": ("Llama", SMALL, None),
    "llama tied, biased": (
        "Llama",
        SMALL | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        None,
    ),
    "llama3 rope": ("Llama", SMALL | {"rope_parameters": LLAMA3}, None),
    "llama linear rope": ("Llama", SMALL | {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}, None),
    "mistral": ("Mistral", SMALL | {"sliding_window": 4}, None),
    "qwen2": ("Qwen2", SMALL, None),
    "qwen2 yarn": ("Qwen2", PLAIN | {"rope_parameters": YARN}, None),
    "qwen2 late window": (
        "Qwen2",
        SMALL | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        None,
    ),
    "qwen3": ("Qwen3", SMALL | {"attention_bias": True}, None),
    "gemma2": (
        "Gemma2",
        SMALL
        | {
            "sliding_window": 4,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        None,
    ),
    "gemma3": (
        "Gemma3Text",
        SMALL
        | {
            "sliding_window": 4,
            "query_pre_attn_scalar": 20,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": BY_LAYER,
        },
        None,
    ),
    "gpt2": ("GPT2", GPT2, None),
    "gpt2 exact gelu, shorter": ("GPT2", GPT2 | {"activation_function": "gelu", "n_inner": 20}, 16),
    "gpt_neox": (
        "GPTNeoX",
        NEOX
        | {"attention_bias": False, "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 80.0}},
        None,
    ),
    "gpt_neox not parallel": (
        "GPTNeoX",
        NEOX | {"use_parallel_residual": False, "hidden_act": "relu"},
        None,
    ),
    "phi3": ("Phi3", PLAIN | {"sliding_window": 5}, None),
    "phi3 longrope, short": (
        "Phi3",
        PLAIN | {"rope_parameters": LONG, "original_max_position_embeddings": 16},
        16,
    ),
    "phi3 longrope, long": (
        "Phi3",
        PLAIN | {"rope_parameters": LONG, "original_max_position_embeddings": 8},
        None,
    ),
}
EACH_FAMILY = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi3"]


@functools.cache
def libraries():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch, transformers


def randomise(model):
    """Weights of a size at which every part of the network moves the output."""
    torch, _ = libraries()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim == 2:
                inputs_first = type(model).__name__.startswith("GPT2") and ".c_" in name
                x.normal_(std=1.3 * x.shape[0 if inputs_first else 1] ** -0.5)
            else:
                x.add_(torch.randn(x.shape) * 0.4)
    return model


def batch(pad: int = 0, right: bool = False):
    """(token [B, T], real [B, T], position [B, T]), padded on the left, or on the right."""
    token = np.random.default_rng(1).integers(1, 23, size=(len(PADDING), LENGTH))
    real = np.arange(LENGTH)[None] >= np.array(PADDING)[:, None]
    real = real[:, ::-1] if right else real
    position = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    return np.where(real, token, pad), real, position


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name) -> (their model, its folder), made once."""

    @functools.cache
    def make(name: str):
        torch, transformers = libraries()
        kind, options, _ = CASES[name]
        options = json.loads(json.dumps(options))  # transformers changes what it is given
        config = getattr(transformers, kind + "Config")(**options)
        config._attn_implementation = "eager"
        model = randomise(transformers.AutoModelForCausalLM.from_config(config)).eval()
        folder = tmp_path_factory.mktemp("theirs")
        model.save_pretrained(folder)
        return model, folder

    return make


def theirs(model, token, real, position):
    torch, _ = libraries()
    inputs = {"input_ids": token, "attention_mask": real.astype(np.int64), "position_ids": position}
    return model(**{name: torch.tensor(np.ascontiguousarray(x)) for name, x in inputs.items()}).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_cache_and_gradients_are_those_of_transformers(made, name):
    torch, _ = libraries()
    model, folder = made(name)
    token, real, position = batch()
    expected = theirs(model, token, real, position)
    counts = torch.tensor(real[:, 1:] & real[:, :-1])
    target = torch.tensor(token[:, 1:, None])
    model.zero_grad()
    (-torch.log_softmax(expected[:, :-1], -1).gather(2, target)[..., 0] * counts).sum().backward()
    expected = expected.detach().numpy()

    config, params = load_pretrained(folder, max_positions=CASES[name][2])
    lm = decoder(config)
    mask = causal_mask(jnp.asarray(real, jnp.int32))

    def loss(params):
        hidden, _ = lm.apply(params, jnp.asarray(token), position_BT=jnp.asarray(position), mask_BTS=mask)
        logits = lm.logits(params, hidden)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), jnp.asarray(token)[:, 1:, None], 2)
        return -jnp.sum(logp[..., 0] * (real[:, 1:] & real[:, :-1])), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(np.asarray(logits)[real], expected[real], atol=1e-4)
    assert np.std(expected[real]) > 0.3  # else 1e-4 would say little

    family = FAMILIES[model.config.model_type]
    grads = {n: x.grad.numpy() for n, x in model.named_parameters()}
    parts = {}
    for weight in weights_of(family, config, prefix=family.prefix, unembedding="lm_head.weight"):
        parts.setdefault(weight.name, []).append(
            (weight, functools.reduce(lambda x, k: x[k], weight.path, gradient))
        )
    assert sorted(parts) == sorted(grads)
    for weight_name, of_weight in parts.items():
        ours = assemble(of_weight, np.float32)
        reference = grads[weight_name]
        if weight_name == "transformer.wpe.weight":
            reference = reference[: config.max_positions]
        error = np.linalg.norm(ours - reference) / np.linalg.norm(reference)
        assert error < 1e-3, (weight_name, error)

    @jax.jit
    def step(params, token, position, seen, cache, slot):
        hidden, cache = lm.apply(params, token, position_BT=position, mask_BTS=seen, cache=cache, slot=slot)
        return lm.logits(params, hidden), cache

    cache, found = lm.init_cache(len(PADDING), LENGTH), []
    for start, end in [(0, PREFILL)] + [(t, t + 1) for t in range(PREFILL, LENGTH)]:
        out, cache = step(
            params,
            jnp.asarray(token[:, start:end]),
            jnp.asarray(position[:, start:end]),
            mask[:, start:end],
            cache,
            start,
        )
        found.append(np.asarray(out))
    np.testing.assert_allclose(np.concatenate(found, 1)[real], expected[real], atol=1e-4)


def tensors(folder):
    """All tensors in a folder, as bits."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= {name: (x.dtype, x.shape, x.tobytes()) for name, x in load_file(file).items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EACH_FAMILY)
def test_what_is_loaded_and_saved_is_the_same_to_the_bit(made, name, dtype, tmp_path):
    torch, transformers = libraries()
    model, folder = made(name)
    if dtype != "float32":
        folder = tmp_path / "half"
        model = type(model).from_pretrained(
            made(name)[1], dtype=getattr(torch, dtype), attn_implementation="eager"
        )
        model.save_pretrained(folder)
    config, params = load_pretrained(folder, dtype=None)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    family = model.config.model_type
    save_pretrained(tmp_path / "ours", config, params, dtype=None, family=family, shard_bytes=6_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    assert tensors(tmp_path / "ours") == tensors(folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="auto", attn_implementation="eager"
    )
    assert type(again) is type(model) and again.dtype == getattr(torch, dtype)
    token, real, position = batch()
    with torch.no_grad():
        both = [theirs(x.eval(), token, real, position).float().numpy()[real] for x in (model, again)]
    np.testing.assert_array_equal(*both)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_config_survives_there_and_back(made, name, tmp_path):
    """Written by us, read and written by transformers, read by us; with the same logits there."""
    torch, transformers = libraries()
    model, folder = made(name)
    config, params = load_pretrained(folder)
    save_pretrained(tmp_path / "ours", config, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    token, real, position = batch()
    with torch.no_grad():
        both = [theirs(x.eval(), token, real, position).numpy()[real] for x in (model, again)]
    np.testing.assert_allclose(*both, atol=1e-6)
    again.save_pretrained(tmp_path / "back")
    assert load_pretrained(tmp_path / "back")[0] == config


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH_FAMILY)
def test_reward_models_score_as_sequence_classifiers(name, tmp_path):
    torch, transformers = libraries()
    kind, options, _ = CASES[name]
    options = json.loads(json.dumps(options)) | {"pad_token_id": 0, "num_labels": 1}
    model = transformers.AutoModelForSequenceClassification.from_config(
        getattr(transformers, kind + "Config")(**options), attn_implementation="eager"
    )
    model = randomise(model).eval()
    model.save_pretrained(tmp_path / "theirs")
    config, params = load_reward_model(tmp_path / "theirs")
    lm = decoder(config)

    @jax.jit
    def scores(params, token, real, position, last):
        hidden, _ = lm.apply(params["trunk"], token, position_BT=position, mask_BTS=causal_mask(real))
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return params["gain"] * scalar_head(params["head"], hidden) + params["bias"]

    params = params | {"gain": jnp.asarray(-2.5)}
    save_reward_model(tmp_path / "ours", config, params, pad_token_id=0, family=model.config.model_type)
    written = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    assert type(written) is type(model)
    for right in (False, True):
        token, real, position = batch(right=right)
        last = np.max(np.where(real, np.arange(LENGTH), 0), axis=1)
        ours = scores(params, *map(jnp.asarray, (token, real.astype(np.int32), position, last)))
        with torch.no_grad():
            expected = theirs(model, token, real, position).numpy()[:, 0]
            back = theirs(written, token, real, position).numpy()[:, 0]
        assert np.std(expected) > 0.03
        np.testing.assert_allclose(ours, -2.5 * expected, atol=1e-4)
        np.testing.assert_allclose(back, ours, atol=1e-4)
