"""Checkpoints in the Hugging Face layout: the round trip, the other implementation, and damaged files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhfjax.config import Decoder
from rlhfjax.networks import causal_mask, decoder
from rlhfjax.pretrained import load_pretrained, save_pretrained

CONFIG = Decoder(
    vocab_size=19,
    width=12,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=6,
    mlp_width=20,
    max_positions=40,
    norm_epsilon=1e-6,
    rope_theta=500.0,
)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)


def randomised(config: Decoder) -> dict:
    """Random parameters, norms too."""
    shapes = jax.eval_shape(decoder(config).init, jax.random.key(0))
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda x: generator.normal(size=x.shape).astype(np.float32), shapes)


PARAMS = {config: randomised(config) for config in (CONFIG, UNTIED)}


@pytest.fixture
def saved(tmp_path):
    """A folder with a good checkpoint, for a test to spoil."""
    save_pretrained(tmp_path, CONFIG, PARAMS[CONFIG])
    return tmp_path


def change_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_the_round_trip_is_exact(config, tmp_path):
    save_pretrained(tmp_path / "made" / "here", config, PARAMS[config])
    loaded_config, loaded = load_pretrained(str(tmp_path / "made" / "here"))
    assert loaded_config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(PARAMS[config])
    jax.tree.map(np.testing.assert_array_equal, loaded, PARAMS[config])


@pytest.mark.parametrize(("dtype", "relative"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_is_a_rounding(dtype, relative, tmp_path):
    save_pretrained(tmp_path, CONFIG, PARAMS[CONFIG], dtype=dtype)
    loaded_config, loaded = load_pretrained(tmp_path)
    assert loaded_config == CONFIG
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(PARAMS[CONFIG]), strict=True):
        assert isinstance(ours, jax.Array) and ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=relative, atol=1e-7)
        assert not np.array_equal(ours, theirs)
    size = (tmp_path / "model.safetensors").stat().st_size
    save_pretrained(tmp_path, CONFIG, PARAMS[CONFIG])
    assert size < 0.7 * (tmp_path / "model.safetensors").stat().st_size


def test_the_layout_is_that_of_a_llama(saved):
    assert sorted(x.name for x in saved.iterdir()) == ["config.json", "model.safetensors"]
    raw = json.loads((saved / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 19,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 20,
        "max_position_embeddings": 40,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    assert {name: raw[name] for name in expected} == expected
    weights, layer = load_file(saved / "model.safetensors"), PARAMS[CONFIG]["layer_1"]
    assert len(weights) == 2 + 2 * 9
    theirs = {
        "self_attn.q_proj": layer["attention"]["query"]["kernel"].T,
        "self_attn.k_proj": layer["attention"]["key"]["kernel"].T,
        "self_attn.v_proj": layer["attention"]["value"]["kernel"].T,
        "self_attn.o_proj": layer["attention"]["output"]["kernel"].T,
        "mlp.gate_proj": layer["mlp"]["gate"]["kernel"].T,
        "mlp.up_proj": layer["mlp"]["up"]["kernel"].T,
        "mlp.down_proj": layer["mlp"]["down"]["kernel"].T,
        "input_layernorm": layer["attention_norm"]["scale"],
        "post_attention_layernorm": layer["mlp_norm"]["scale"],
    }
    for name, array in theirs.items():
        np.testing.assert_array_equal(weights[f"model.layers.1.{name}.weight"], array)
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], PARAMS[CONFIG]["embedding"])
    np.testing.assert_array_equal(weights["model.norm.weight"], PARAMS[CONFIG]["final_norm"]["scale"])


def test_configs_of_older_writers_are_read(saved):
    """No head_dim, no rope_parameters, and the tied matrix written twice."""
    raw = json.loads((saved / "config.json").read_text())
    for name in ("head_dim", "rope_parameters", "num_key_value_heads"):
        del raw[name]
    raw |= {"hidden_size": 12, "num_attention_heads": 2, "rope_theta": 300.0}
    (saved / "config.json").write_text(json.dumps(raw))
    config = dataclasses.replace(CONFIG, heads=2, kv_heads=2, rope_theta=300.0)
    params = randomised(config)
    weights_only = saved / "other"
    save_pretrained(weights_only, config, params)
    (weights_only / "model.safetensors").rename(saved / "model.safetensors")
    change_weights(saved, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"]}))
    loaded_config, loaded = load_pretrained(saved)
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_transformers_gives_the_same_logits(config, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    save_pretrained(tmp_path, config, PARAMS[config])
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, size=(2, 9))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    lm, token = decoder(config), jnp.asarray(tokens, jnp.int32)
    position = jnp.broadcast_to(jnp.arange(9), token.shape)
    hidden, _ = lm.apply(
        PARAMS[config], token, position_BT=position, mask_BTS=causal_mask(jnp.ones_like(token))
    )
    np.testing.assert_allclose(lm.logits(PARAMS[config], hidden), expected, atol=1e-4)
    theirs.save_pretrained(tmp_path / "back")
    loaded_config, loaded = load_pretrained(tmp_path / "back")
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, PARAMS[config])


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, file):
    (saved / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file} is missing \(found: \["):
        load_pretrained(saved)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_pretrained(saved / "nowhere")


def test_a_damaged_file_is_named(saved):
    weights = (saved / "model.safetensors").read_bytes()
    for damaged in (weights[:-40], b"", b"garbage" + weights):
        (saved / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            load_pretrained(saved)
    (saved / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; only \"llama\""),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope scaling"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"intermediate_size": None}, "intermediate_size"),
    ],
)
def test_what_cannot_be_read_is_refused(saved, changes, message):
    change_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        load_pretrained(saved)


def test_a_config_without_a_needed_field_is_refused(saved):
    raw = json.loads((saved / "config.json").read_text())
    del raw["rms_norm_eps"]
    (saved / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="config.json has no rms_norm_eps"):
        load_pretrained(saved)


def test_weights_that_do_not_fit_are_named(saved):
    name = "model.layers.1.mlp.up_proj.weight"
    whole = load_file(saved / "model.safetensors")
    for change, message in (
        (lambda w: w.pop(name), f"has no weight {name}"),
        (
            lambda w: w.update({name: w[name].T.copy()}),
            rf"{name} has shape \(12, 20\), .* asks for \(20, 12\)",
        ),
        (lambda w: w.update({"model.extra": w[name]}), r"does not: \['model.extra'\]"),
    ):
        save_file(whole, saved / "model.safetensors")
        change_weights(saved, change)
        with pytest.raises(ValueError, match=message):
            load_pretrained(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"norm": "layernorm"},
        {"positions": "learned"},
        {"gated_mlp": False},
        {"activation": "gelu"},
        {"mlp_bias": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_decoder_that_is_no_llama_is_not_written(change, tmp_path):
    with pytest.raises(ValueError, match=f"a Llama has {next(iter(change))}="):
        save_pretrained(tmp_path / "model", dataclasses.replace(CONFIG, **change), PARAMS[CONFIG])
    assert not (tmp_path / "model").exists()
