"""Checkpoints in the Hugging Face layout: round trips, shards, placing, reward models, and damaged files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhfjax.config import Decoder, RopeScaling
from rlhfjax.networks import decoder
from rlhfjax.pretrained import (
    huggingface,
    load_pretrained,
    load_reward_model,
    save_pretrained,
    save_reward_model,
    weights_files,
)
from rlhfjax.pretrained.weights import read_part

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
    # Who may read the config may read the weights.
    assert len({x.stat().st_mode for x in saved.iterdir()}) == 1
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
        ({"model_type": "mamba"}, r"model_type 'mamba' is not supported; supported: \['gemma2', .*'llama'"),
        ({"model_type": None}, "model_type None is not supported"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "scaling 'dynamic'.*supported: .*yarn",
        ),
        ({"rope_scaling": {"type": "linear"}}, r"'linear' without \['factor'\]"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0}},
            r"without \['low_freq_factor', 'high_freq_factor'\]",
        ),
        ({"rope_parameters": {"full_attention": {}}}, "by type of layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, which a llama"),
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'; supported: .*'silu'"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, r"layer_types \['chunked_attention'\]"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        ({"quantization_config": {"bits": 4}}, "quantised weights cannot be read"),
        ({"intermediate_size": None}, "config.json has no intermediate_size"),
        ({"model_type": "mistral", "mlp_bias": True}, "mlp_bias=True, which a mistral"),
        ({"attention_bias": True}, r"has no weight model.layers.0.self_attn.q_proj.bias"),
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


@pytest.mark.parametrize("dtype", ["int8", "float64"])
def test_an_unknown_dtype_is_refused(saved, dtype):
    with pytest.raises(ValueError, match=f"dtype='{dtype}' is not supported; choose one of"):
        load_pretrained(saved, dtype=dtype)
    with pytest.raises(ValueError, match=f"dtype='{dtype}'"):
        save_pretrained(saved, CONFIG, PARAMS[CONFIG], dtype=dtype)


def test_weights_of_another_kind_are_refused(saved):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(saved, lambda w: w.update({name: w[name].astype(np.int8)}))
    with pytest.raises(ValueError, match=f"{name} is stored as I8, .*supported: .*'BF16'"):
        load_pretrained(saved)


def without(tree: dict, *path: str) -> dict:
    """A copy of nested dictionaries without one branch."""
    first, *rest = path
    if not rest:
        return {name: branch for name, branch in tree.items() if name != first}
    return tree | {first: without(tree[first], *rest)}


def test_params_that_are_not_the_configs_are_refused(saved):
    params = PARAMS[CONFIG]
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    adapted = params | {"layer_0": params["layer_0"] | {"lora_a": np.ones(2, np.float32)}}
    for wrong, message in (
        (without(params, "layer_1", "mlp", "up"), "params layer_1.mlp.up.kernel are missing"),
        (
            params | {"embedding": np.ones((3, 12), np.float32)},
            r"embedding have shape \(3, 12\); .* \(19, 12\)",
        ),
        (adapted, r"\['layer_0.lora_a'\] have no place in a llama .*must be merged"),
    ):
        with pytest.raises(ValueError, match=message):
            save_pretrained(saved, CONFIG, wrong)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def bits(folder):
    """All tensors of a folder, in order of name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in sorted(found.items())}


def test_shards_hold_the_same_and_replace_the_whole(saved):
    whole = bits(saved)
    save_pretrained(saved, CONFIG, PARAMS[CONFIG], shard_bytes=3_000)
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    shards = sorted(x.name for x in saved.glob("*.safetensors"))
    assert len(shards) > 3 and shards == sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(len(x[2]) for x in whole.values())
    for shard in shards:
        held = load_file(saved / shard)
        assert sum(x.nbytes for x in held.values()) <= 3_000
        assert all(index["weight_map"][name] == shard for name in held)
    assert bits(saved) == whole
    _, loaded = load_pretrained(saved)
    jax.tree.map(np.testing.assert_array_equal, loaded, PARAMS[CONFIG])
    save_pretrained(saved, CONFIG, PARAMS[CONFIG])
    assert sorted(x.name for x in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_faults_of_shards_are_named(saved):
    save_pretrained(saved, CONFIG, PARAMS[CONFIG], shard_bytes=3_000)
    index_file = saved / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    name, shard = sorted(index["weight_map"].items())[-1]
    index["weight_map"]["model.absent"] = shard
    index_file.write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=f"{shard} has no weight model.absent, which model.safetensors.index"
    ):
        load_pretrained(saved)
    del index["weight_map"]["model.absent"]
    index_file.write_text(json.dumps(index))
    content = (saved / shard).read_bytes()
    (saved / shard).write_bytes(content[:-8])
    with pytest.raises(ValueError, match=f"{shard} is damaged"):
        load_pretrained(saved)
    (saved / shard).unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard} is missing"):
        load_pretrained(saved)


def test_a_disk_that_fills_up_spoils_nothing(saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    written = []

    def fill(tensors, file, metadata):
        if len(written) == 2:
            raise OSError("no space left on device")
        written.append(file)
        save_file(tensors, file, metadata)

    monkeypatch.setattr(weights_files, "save_file", fill)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(saved, UNTIED, PARAMS[UNTIED], shard_bytes=3_000)
    assert len(written) == 2
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_arrays_go_straight_to_their_devices(saved, monkeypatch):
    mesh = jax.make_mesh((4,), ("model",))
    entries = []

    def read(tensor, weight, index):
        entries.append((weight.path, index, read_part(tensor, weight, index).size))
        return read_part(tensor, weight, index)

    monkeypatch.setattr(huggingface, "read_part", read)

    def place(path, shape):
        if path[-1] != "kernel":
            return None
        axis = 0 if path[-2] in ("output", "down") else 1
        spec = ("model", None) if axis == 0 else (None, "model")
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    _, loaded = load_pretrained(saved, place=place)
    jax.tree.map(np.testing.assert_array_equal, loaded, PARAMS[CONFIG])
    kernel = loaded["layer_1"]["attention"]["output"]["kernel"]
    assert {x.data.shape for x in kernel.addressable_shards} == {(6, 12)}
    assert len(kernel.sharding.device_set) == 4
    of_kernel = [size for path, _, size in entries if path == ("layer_1", "attention", "output", "kernel")]
    assert of_kernel == [6 * 12] * 4
    assert loaded["embedding"].sharding.device_set == {jax.devices()[0]}


def test_dtypes_are_as_asked_or_as_stored(tmp_path):
    save_pretrained(tmp_path, CONFIG, PARAMS[CONFIG], dtype="bfloat16")
    for asked, given in ((None, jnp.bfloat16), ("float16", jnp.float16), ("float32", jnp.float32)):
        config, loaded = load_pretrained(tmp_path, dtype=asked, compute_dtype="bfloat16")
        assert config == dataclasses.replace(CONFIG, dtype="bfloat16")
        assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(given)}
    stored = bits(tmp_path)
    config, loaded = load_pretrained(tmp_path, dtype=None)
    assert config == CONFIG
    save_pretrained(tmp_path, config, loaded, dtype=None)
    assert bits(tmp_path) == stored
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_fewer_positions_may_be_kept(saved):
    assert load_pretrained(saved, max_positions=7)[0] == dataclasses.replace(CONFIG, max_positions=7)
    for wrong in (0, 41):
        with pytest.raises(ValueError, match=rf"max_positions={wrong} must lie in \[1, 40\]"):
            load_pretrained(saved, max_positions=wrong)


def test_what_lies_beside_a_model_goes_with_it(saved, tmp_path):
    change_config(saved, bos_token_id=3, eos_token_id=[4, 5], rope_scaling={"type": "linear", "factor": 2.0})
    change_config(saved, custom={"kept": 1}, architectures=["Other"])
    beside = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for name in (*beside, "training_args.bin"):
        (saved / name).write_text(f"this is {name}")
    config, params = load_pretrained(saved)
    plain = dataclasses.replace(config, rope_scaling=CONFIG.rope_scaling)
    save_pretrained(tmp_path / "new", plain, params, like=saved)
    assert sorted(x.name for x in (tmp_path / "new").iterdir()) == sorted(
        [*beside, "config.json", "model.safetensors"]
    )
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "this is tokenizer.json"
    raw = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["custom"]) == (3, [4, 5], {"kept": 1})
    assert raw["architectures"] == ["LlamaForCausalLM"]
    assert load_pretrained(tmp_path / "new")[0] == plain  # nothing of the older scaling is left
    with pytest.raises(ValueError, match="family='qwen2', but .* is of a llama"):
        save_pretrained(tmp_path / "new", plain, params, like=saved, family="qwen2")
    with pytest.raises(ValueError, match=r"a llama cannot have norm='layernorm' \(it has 'rmsnorm'\)"):
        save_pretrained(tmp_path / "new", dataclasses.replace(plain, norm="layernorm"), params, like=saved)
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        save_pretrained(tmp_path / "new", plain, params, like=tmp_path / "nowhere")


def test_rotary_positions_are_not_mixed_with_those_of_the_origin(saved, tmp_path):
    scaling = RopeScaling("linear", 2.0)
    change_config(saved, original_max_position_embeddings=16, rope_scaling={"type": "linear", "factor": 4.0})
    stretched = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("yarn", 2.0, 20))
    for config in (dataclasses.replace(CONFIG, rope_scaling=scaling), stretched):
        save_pretrained(tmp_path / "new", config, PARAMS[CONFIG], like=saved)
        assert load_pretrained(tmp_path / "new")[0] == config


def test_a_model_may_be_written_over_where_it_came_from(saved):
    (saved / "tokenizer.json").write_text("words")
    config, params = load_pretrained(saved)
    save_pretrained(saved, config, jax.tree.map(lambda x: 2 * x, params), like=saved)
    assert (saved / "tokenizer.json").read_text() == "words"
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 2 * y), load_pretrained(saved)[1], params)


# Reward models

HEAD = {"kernel": np.linspace(-1.0, 2.0, 12, dtype=np.float32), "bias": np.zeros((), np.float32)}


def reward(**changes):
    gain, zero = np.asarray(0.5, np.float32), np.zeros((), np.float32)
    return {"trunk": PARAMS[UNTIED], "head": HEAD, "gain": gain, "bias": zero} | changes


def test_reward_models_survive_the_round_trip(tmp_path):
    save_reward_model(tmp_path, UNTIED, reward(), pad_token_id=2)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForSequenceClassification"]
    assert (raw["pad_token_id"], len(raw["id2label"])) == (2, 1)
    weights = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(weights["score.weight"], 0.5 * HEAD["kernel"][None])
    assert "lm_head.weight" not in weights
    config, params = load_reward_model(tmp_path)
    assert config == CONFIG  # as tied: a classifier has no output embedding
    jax.tree.map(np.testing.assert_array_equal, params["trunk"], without(PARAMS[UNTIED], "unembedding"))
    np.testing.assert_array_equal(params["head"]["kernel"], 0.5 * HEAD["kernel"])
    assert (params["gain"], params["bias"], params["head"]["bias"]) == (1.0, 0.0, 0.0)


def test_reward_models_are_placed_too(tmp_path):
    save_reward_model(tmp_path, UNTIED, reward(), pad_token_id=2, dtype="bfloat16")
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    asked = {}

    def place(path, shape):
        asked[path] = shape
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    _, params = load_reward_model(tmp_path, place=place, dtype=None)
    assert asked["head", "kernel"] == (12,) and asked["trunk", "embedding"] == (19, 12)
    assert len(params["head"]["kernel"].sharding.device_set) == 2
    assert (
        params["trunk"]["embedding"].dtype == jnp.bfloat16 and params["head"]["kernel"].dtype == jnp.float32
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": np.float32(0.25)}, r"a bias of 0.25 .*set both biases to 0"),
        ({"head": HEAD | {"bias": np.float32(1.0)}}, "a bias of 0.5"),
        ({"head": HEAD | {"kernel": np.ones(3, np.float32)}}, r"shape \(3,\), a score of this trunk \(12,\)"),
    ],
)
def test_scores_that_a_classifier_cannot_give_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_reward_model(tmp_path / "model", UNTIED, reward(**changes), pad_token_id=0)
    assert not (tmp_path / "model").exists()


def test_biases_of_scores_may_cancel(tmp_path):
    cancels = reward(head=HEAD | {"bias": np.float32(2.0)}, bias=np.float32(-1.0))
    save_reward_model(tmp_path, UNTIED, cancels, pad_token_id=0)
    assert load_reward_model(tmp_path)[1]["bias"] == 0.0


def test_the_padding_of_a_classifier_must_be_known(saved, tmp_path):
    for pad in (None, -1, 19):
        with pytest.raises(ValueError, match=rf"pad_token_id={pad}: .* in \[0, 19\)"):
            save_reward_model(tmp_path / "model", UNTIED, reward(), pad_token_id=pad)
    change_config(saved, pad_token_id=7)
    save_reward_model(tmp_path / "model", UNTIED, reward(), like=saved)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["pad_token_id"] == 7


def test_language_models_and_classifiers_are_told_apart(saved, tmp_path):
    for config in (CONFIG, UNTIED):
        save_reward_model(tmp_path / "score", config, reward(), pad_token_id=0)
        with pytest.raises(ValueError, match="see load_reward_model"):
            load_pretrained(tmp_path / "score")
    with pytest.raises(ValueError, match="has no weight score.weight"):
        load_reward_model(saved)
    change = {"score.weight": np.ones((2, 12), np.float32)}
    change_weights(tmp_path / "score", lambda w: w.update(change))
    with pytest.raises(ValueError, match=r"score.weight has shape \(2, 12\), config.json asks for \(1, 12\)"):
        load_reward_model(tmp_path / "score")
