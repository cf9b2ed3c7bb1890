"""The families of pretrained decoders, as tables: what `config.json` calls the fields of a `Decoder`, and the names and
layouts of the weights. `families_config` and `weights` read them in both directions.

What they say is what transformers' `modeling_*.py` and `configuration_*.py` do.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from rlhfjax.config import Decoder
from rlhfjax.pretrained import families_rope as rope
from rlhfjax.pretrained.families_rope import Raw

# Null says that there is no such cap; of every other option, that it is left out.
MAY_BE_NULL = ("attn_logit_softcapping", "final_logit_softcapping")

Windows = tuple[Callable[[Raw], tuple[int, ...]], Callable[[Decoder], Raw]]
Rope = tuple[Callable[[Raw], dict[str, Any]], Callable[[Decoder], Raw]]


class Family(NamedTuple):
    """One `model_type`. `projections` may give several of ours one name of theirs: a fused matrix, in that order."""

    model_type: str
    causal: str  # name of the class with a language-model head
    classifier: str  # and of that with a score
    fields: dict[str, str]  # a Decoder's field -> its option in config.json
    defaults: dict[str, Any]  # options that config.json may leave out; a function is given the config
    fixed: dict[str, Any]  # fields that all of this family share, where they differ from a Decoder's defaults
    refused: dict[str, tuple]  # options that no Decoder obeys -> the values at which they do nothing
    rope: Rope
    windows: Windows
    prefix: str  # of all weights but the output embedding; in checkpoints without a head often left out
    embedding: str
    final_norm: str
    layer: str  # prefix of a layer's weights
    norms: dict[str, str]  # ours -> theirs
    projections: dict[str, str]
    unembedding: tuple[str, ...] = ("lm_head.weight",)  # the first is written, any is read
    other_prefixes: tuple[str, ...] = ("",)
    positions: str | None = None  # learned ones
    inputs_first: bool = False  # matrices are [in, out], as ours
    by_head: bool = False  # fused matrices hold one head's query, key and value after the other
    # Regular expressions: buffers that older writers kept.
    skipped: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)
    embedding_scaled: bool = False  # by width ** 0.5


_SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
_LLAMA_FIELDS = {
    **_SIZES,
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "norm_epsilon": "rms_norm_eps",
    "activation": "hidden_act",
}
_ATTENTION_BIASES = {"attention_bias": "attention_bias", "output_bias": "attention_bias"}
_LLAMA_DEFAULTS = {
    "num_key_value_heads": lambda raw: needed(raw, "num_attention_heads"),
    "head_dim": lambda raw: needed(raw, "hidden_size") // needed(raw, "num_attention_heads"),
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_LLAMA_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"}
_LLAMA_PROJECTIONS = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_NO_BIAS = {"attention_bias": (False,), "mlp_bias": (False,)}

_LLAMA = Family(
    model_type="llama",
    causal="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    fields={**_LLAMA_FIELDS, **_ATTENTION_BIASES, "mlp_bias": "mlp_bias"},
    defaults={**_LLAMA_DEFAULTS, "attention_bias": False, "mlp_bias": False},
    fixed={},
    refused={},
    rope=(rope.read_rope, rope.write_rope),
    windows=(rope.read_no_windows, rope.write_no_windows),
    prefix="model.",
    embedding="embed_tokens.weight",
    final_norm="norm",
    layer="layers.{}.",
    norms=_LLAMA_NORMS,
    projections=_LLAMA_PROJECTIONS,
)
_MISTRAL = _LLAMA._replace(
    model_type="mistral",
    causal="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
    fields=_LLAMA_FIELDS,
    defaults=_LLAMA_DEFAULTS,
    refused=_NO_BIAS,
    windows=(partial(rope.read_one_window, left_out=4096), rope.write_one_window),
)
_QWEN2 = _LLAMA._replace(
    model_type="qwen2",
    causal="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    fields=_LLAMA_FIELDS,
    defaults=_LLAMA_DEFAULTS,
    fixed={"attention_bias": True},
    refused={"mlp_bias": (False,)},
    windows=(rope.read_late_windows, rope.write_late_windows),
)
_QWEN3 = _QWEN2._replace(
    model_type="qwen3",
    causal="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    fields={**_LLAMA_FIELDS, **_ATTENTION_BIASES},
    defaults={**_LLAMA_DEFAULTS, "attention_bias": False, "head_dim": 128},
    fixed={"qk_norm": True},
    norms={**_LLAMA_NORMS, **_HEAD_NORMS},
)
_GEMMA_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_GEMMA2 = _LLAMA._replace(
    model_type="gemma2",
    causal="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    fields={
        **_LLAMA_FIELDS,
        **_ATTENTION_BIASES,
        "activation": "hidden_activation",
        "attention_scale": "query_pre_attn_scalar",
        "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
    },
    defaults={
        "vocab_size": 256_000,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    fixed={"norm_offset": True, "post_norms": True},
    refused={"use_bidirectional_attention": (False,), "mlp_bias": (False,)},
    windows=(rope.read_alternating_windows, rope.write_windows_by_layer),
    norms=_GEMMA_NORMS,
    embedding_scaled=True,
)
_GEMMA3 = _GEMMA2._replace(
    model_type="gemma3_text",
    causal="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    fields={ours: name for ours, name in _GEMMA2.fields.items() if ours != "attention_softcap"},
    defaults={
        **_GEMMA2.defaults,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "final_logit_softcapping": None,
    },
    fixed={**_GEMMA2.fixed, "qk_norm": True},
    refused={**_GEMMA2.refused, "attn_logit_softcapping": ()},
    rope=(rope.read_layered_rope, rope.write_layered_rope),
    windows=(rope.read_patterned_windows, rope.write_windows_by_layer),
    norms={**_GEMMA_NORMS, **_HEAD_NORMS},
    # Those of a gemma3, which sees images too, as transformers 4 and 5 write it.
    other_prefixes=("", "language_model.model.", "model.language_model."),
    unembedding=("lm_head.weight", "language_model.lm_head.weight"),
    skipped=(*_GEMMA2.skipped, r"^(model\.)?(vision_tower|multi_modal_projector)\."),
)
_GPT2 = Family(
    model_type="gpt2",
    causal="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
    fields={
        "vocab_size": "vocab_size",
        "width": "n_embd",
        "layers": "n_layer",
        "heads": "n_head",
        "mlp_width": "n_inner",
        "max_positions": "n_positions",
        "norm_epsilon": "layer_norm_epsilon",
        "activation": "activation_function",
        "tie_embeddings": "tie_word_embeddings",
    },
    defaults={
        "n_inner": lambda raw: 4 * needed(raw, "n_embd"),
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    },
    fixed={
        "norm": "layernorm",
        "positions": "learned",
        "gated_mlp": False,
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    },
    refused={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    rope=(rope.no_rope, rope.write_no_rope),
    windows=(rope.read_no_windows, rope.write_no_windows),
    prefix="transformer.",
    embedding="wte.weight",
    positions="wpe.weight",
    final_norm="ln_f",
    layer="h.{}.",
    norms={"attention_norm": "ln_1", "mlp_norm": "ln_2"},
    projections={
        "attention.query": "attn.c_attn",
        "attention.key": "attn.c_attn",
        "attention.value": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "mlp.gate": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
    inputs_first=True,
    skipped=(r"\.attn\.(masked_)?bias$",),
)
_GPT_NEOX = Family(
    model_type="gpt_neox",
    causal="GPTNeoXForCausalLM",
    classifier="GPTNeoXForSequenceClassification",
    fields={
        **_SIZES,
        **_ATTENTION_BIASES,
        "norm_epsilon": "layer_norm_eps",
        "activation": "hidden_act",
        "parallel_blocks": "use_parallel_residual",
    },
    defaults={
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    fixed={"norm": "layernorm", "gated_mlp": False, "mlp_bias": True},
    refused={},
    rope=(rope.read_partial_rope, rope.write_partial_rope),
    windows=(rope.read_no_windows, rope.write_no_windows),
    prefix="gpt_neox.",
    embedding="embed_in.weight",
    final_norm="final_layer_norm",
    layer="layers.{}.",
    norms=_LLAMA_NORMS,
    projections={
        "attention.query": "attention.query_key_value",
        "attention.key": "attention.query_key_value",
        "attention.value": "attention.query_key_value",
        "attention.output": "attention.dense",
        "mlp.gate": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    },
    unembedding=("embed_out.weight", "lm_head.weight"),
    by_head=True,
    skipped=(r"rotary_emb\.inv_freq$", r"\.attention\.(masked_)?bias$"),
)
_PHI3 = _LLAMA._replace(
    model_type="phi3",
    causal="Phi3ForCausalLM",
    classifier="Phi3ForSequenceClassification",
    fields=_LLAMA_FIELDS,
    defaults=_LLAMA_DEFAULTS,
    refused=_NO_BIAS,
    rope=(rope.read_phi3_rope, rope.write_phi3_rope),
    windows=(rope.read_one_window, rope.write_one_window),
    projections={
        "attention.query": "self_attn.qkv_proj",
        "attention.key": "self_attn.qkv_proj",
        "attention.value": "self_attn.qkv_proj",
        "attention.output": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_up_proj",
        "mlp.up": "mlp.gate_up_proj",
        "mlp.down": "mlp.down_proj",
    },
)

# In the order in which a decoder that several can express is written.
FAMILIES = {
    family.model_type: family
    for family in (_LLAMA, _MISTRAL, _QWEN2, _QWEN3, _GEMMA2, _GEMMA3, _GPT2, _GPT_NEOX, _PHI3)
}


def find_family(model_type: str | None) -> Family:
    """The family of a `model_type`; ValueError, which lists them, where there is none."""
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {sorted(FAMILIES)}")
    return FAMILIES[model_type]


def needed(raw: Raw, option: str) -> Any:
    """The option's value. Raises ValueError where config.json does not have it."""
    if raw.get(option) is None and not (option in raw and option in MAY_BE_NULL):
        raise ValueError(f"config.json has no {option}")
    return raw[option]
