"""Adapters in `peft`'s layout: what is written and refused here, and against `peft` itself where it is installed."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhfjax.config import Decoder, LoRA
from rlhfjax.networks import adapted, causal_mask, decoder, init_lora, quantise
from rlhfjax.pretrained import save_pretrained
from rlhfjax.pretrained.peft import load_peft, save_peft

CONFIG = Decoder(
    vocab_size=40, width=16, layers=2, heads=2, kv_heads=1, head_size=8, mlp_width=24, max_positions=32
)
LM = decoder(CONFIG)
BASE = jax.jit(LM.init)(jax.random.key(0))
LORA = LoRA(rank=3, alpha=7.5, projections=("query", "value", "down"))
TOKENS = np.random.default_rng(0).integers(0, 40, size=(2, 9))
GPT2: dict[str, Any] = {
    "norm": "layernorm", "positions": "learned", "gated_mlp": False, "activation": "gelu", "attention_bias": True,
    "output_bias": True, "mlp_bias": True, "kv_heads": 2,
}  # fmt: skip


def random_adapters(base=BASE, lora=LORA) -> dict:
    generator = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * generator.normal(size=x.shape), jnp.float32),
        init_lora(jax.random.key(0), base, lora),
    )


ADAPTERS: Any = random_adapters()


@pytest.fixture
def folder(tmp_path):
    save_peft(tmp_path / "adapter", CONFIG, LORA, ADAPTERS, base_name="somewhere/base")
    return tmp_path / "adapter"


def logits(config, params, lora, adapters) -> jax.Array:
    position = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)

    @jax.jit
    def of(adapters, base):
        lm = adapted(decoder(config), base, lora)
        hidden, _ = lm.apply(
            adapters,
            jnp.asarray(TOKENS),
            position_BT=position,
            mask_BTS=causal_mask(jnp.ones(TOKENS.shape, bool)),
        )
        return lm.logits(adapters, hidden)

    return of(adapters, params)


def test_what_is_written(folder):
    raw = json.loads((folder / "adapter_config.json").read_text())
    assert raw["peft_type"] == "LORA" and raw["task_type"] == "CAUSAL_LM" and raw["inference_mode"] is True
    assert (raw["r"], raw["lora_alpha"], raw["use_rslora"]) == (3, 7.5, False)
    assert raw["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert raw["base_model_name_or_path"] == "somewhere/base"
    weights = load_file(folder / "adapter_model.safetensors")
    names = {"query": "self_attn.q_proj", "value": "self_attn.v_proj", "down": "mlp.down_proj"}
    assert weights.keys() == {
        f"base_model.model.model.layers.{i}.{name}.lora_{x}.weight"
        for i in range(2)
        for name in names.values()
        for x in "AB"
    }
    for part, name in (("attention", "query"), ("attention", "value"), ("mlp", "down")):
        own = ADAPTERS["layer_1"][part][name]
        at = f"base_model.model.model.layers.1.{names[name]}"
        np.testing.assert_array_equal(weights[f"{at}.lora_A.weight"], own["lora_a"].T)
        np.testing.assert_array_equal(weights[f"{at}.lora_B.weight"], own["lora_b"].T)


@pytest.mark.parametrize("stabilised", [False, True])
def test_there_and_back(tmp_path, stabilised):
    lora = LoRA(rank=2, alpha=4.0, projections=("key", "gate", "up"), rank_stabilised=stabilised)
    adapters = random_adapters(lora=lora)
    save_peft(tmp_path, CONFIG, lora, adapters, base_name="base")
    for base in (BASE, quantise(BASE, 8)):
        got, loaded = load_peft(tmp_path, CONFIG, base)
        assert got == lora
        jax.tree.map(np.testing.assert_array_equal, loaded, adapters)


def test_of_another_base_is_refused(folder):
    deeper = replace(CONFIG, layers=3)
    with pytest.raises(
        ValueError, match="has no base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
    ):
        load_peft(folder, deeper, jax.eval_shape(decoder(deeper).init, jax.random.key(0)))
    shallower = replace(CONFIG, layers=1)
    with pytest.raises(ValueError, match="no adapter of a llama .* has: .*layers.1.mlp.down_proj.lora_A"):
        load_peft(folder, shallower, {"layer_0": BASE["layer_0"]})
    wider = replace(CONFIG, mlp_width=32)
    with pytest.raises(
        ValueError, match="down_proj.lora_A.weight has shape \\(3, 24\\), .* r=3 ask for \\(3, 32\\)"
    ):
        load_peft(folder, wider, jax.eval_shape(decoder(wider).init, jax.random.key(0)))


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("use_dora", True, "use_dora=True, which LoRA here does not do"),
        ("bias", "all", "bias='all'"),
        ("rank_pattern", {"q_proj": 8}, "rank_pattern="),
        ("modules_to_save", ["lm_head"], "modules_to_save="),
        ("init_lora_weights", "pissa", "init_lora_weights='pissa'"),
        ("peft_type", "IA3", "peft_type='IA3'; only \"LORA\""),
        ("r", 4, "q_proj.lora_A.weight has shape \\(3, 16\\), .* r=4 ask for \\(4, 16\\)"),
        ("lora_alpha", None, "has no lora_alpha"),
    ],
)
def test_what_lora_does_not_do_is_refused(folder, option, value, message):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    with pytest.raises(ValueError, match=message):
        load_peft(folder, CONFIG, BASE)


def test_damaged_files_are_told(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing \\(found: no such folder\\)"):
        load_peft(tmp_path / "nowhere", CONFIG, BASE)
    weights = load_file(folder / "adapter_model.safetensors")
    extra = {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((3, 40), np.float32)}
    save_file(weights | extra, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="no adapter of a llama .* has: .*embed_tokens.lora_embedding_A"):
        load_peft(folder, CONFIG, BASE)
    (folder / "adapter_model.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        load_peft(folder, CONFIG, BASE)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="safetensors is missing \\(found: \\['adapter_config.json'\\]"
    ):
        load_peft(folder, CONFIG, BASE)


def test_what_peft_cannot_hold_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="no adapter for layer_1/attention/query; peft wants the same in every"
    ):
        save_peft(tmp_path, CONFIG, LORA, {"layer_0": ADAPTERS["layer_0"]}, base_name="base")
    with pytest.raises(ValueError, match="query/lora_a has shape \\(16, 3\\), .* rank 4 ask for \\(16, 4\\)"):
        save_peft(tmp_path, CONFIG, LoRA(rank=4), ADAPTERS, base_name="base")
    with pytest.raises(ValueError, match="no projections \\[\\('layer_2'"):
        save_peft(
            tmp_path,
            CONFIG,
            LORA,
            ADAPTERS | {"layer_2": {"mlp": ADAPTERS["layer_1"]["mlp"]}},
            base_name="base",
        )
    gpt2 = replace(CONFIG, **GPT2)
    base = jax.jit(decoder(gpt2).init)(jax.random.key(0))
    fused = random_adapters(base)
    with pytest.raises(
        ValueError, match="query is a part of transformer.h.0.attn.c_attn.weight, .* merged instead"
    ):
        save_peft(tmp_path, gpt2, LORA, fused, base_name="base", family="gpt2")
    assert not list(tmp_path.iterdir())
    lora = LoRA(rank=2, projections=("gate", "down"))
    save_peft(tmp_path, gpt2, lora, random_adapters(base, lora), base_name="base", family="gpt2")
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["target_modules"] == ["c_fc", "mlp.c_proj"] and raw["fan_in_fan_out"] is True


def test_adapters_of_a_fused_matrix_are_refused(tmp_path):
    """phi3 has one matrix for query, key and value."""
    at = "base_model.model.model.layers.{}.self_attn.qkv_proj.lora_{}.weight"
    shapes = {"A": (3, 16), "B": (32, 3)}
    save_file(
        {at.format(i, x): np.zeros(shape, np.float32) for i in range(2) for x, shape in shapes.items()},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 3}')
    with pytest.raises(ValueError, match="in a phi3 layer_0/attention/query is a part of .*qkv_proj.weight"):
        load_peft(tmp_path, CONFIG, BASE, family="phi3")


# ------------------------------------------------------------------------------------------------- against `peft`

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"windows": (4, 4)},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma2": {
        "norm_offset": True, "post_norms": True, "activation": "gelu", "embedding_scale": 4.0,
        "attention_softcap": 50.0, "logit_softcap": 30.0, "windows": (4, 0), "attention_scale": 0.25, "kv_heads": 1,
    },
    "gpt2": GPT2,
}  # fmt: skip


def family_case(name: str) -> tuple[Decoder, dict, LoRA]:
    config = replace(CONFIG, **FAMILIES[name])
    params = jax.jit(decoder(config).init)(jax.random.key(2))
    chosen = ("output", "gate", "down") if name == "gpt2" else LoRA().projections
    return config, params, LoRA(rank=3, alpha=7.5, projections=chosen, rank_stabilised=name == "qwen3")


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_computes_the_same(tmp_path, name):
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config, params, lora = family_case(name)
    adapters = random_adapters(params, lora)
    save_pretrained(tmp_path / "base", config, params, family=name)
    save_peft(tmp_path / "adapter", config, lora, adapters, base_name=str(tmp_path / "base"), family=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        before = model(torch.tensor(TOKENS)).logits.numpy()
        model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        after = model(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(config, params, lora, adapters), after, atol=2e-4)
    assert np.abs(after - before).max() > 0.01


@pytest.mark.parametrize("name", FAMILIES)
def test_what_peft_saves_is_read(tmp_path, name):
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config, params, lora = family_case(name)
    save_pretrained(tmp_path / "base", config, params, family=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    targets = ["c_proj", "c_fc"] if name == "gpt2" else "all-linear"
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=targets, use_rslora=lora.rank_stabilised,
        fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    torch.manual_seed(0)
    model = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for key, x in model.named_parameters():
            if "lora_B" in key:
                x.copy_(0.3 * torch.randn(x.shape))
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    model.save_pretrained(tmp_path / "adapter")
    got, adapters = load_peft(tmp_path / "adapter", config, params, family=name)
    assert (got.rank, got.alpha, got.rank_stabilised) == (3, 5.0, lora.rank_stabilised)
    assert set(got.projections) == set(lora.projections)
    np.testing.assert_allclose(logits(config, params, got, adapters), expected, atol=2e-4)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"bias": "lora_only"}])
def test_what_peft_saves_of_other_kinds_is_refused(tmp_path, option):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    save_pretrained(tmp_path / "base", CONFIG, BASE)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **option)
    )
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=next(iter(option))):
        load_peft(tmp_path / "adapter", CONFIG, BASE)
