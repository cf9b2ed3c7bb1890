"""GGUF files, llama.cpp's format: a quantised model, its tokenizer and its chat template in one file.

The `gguf` package of llama.cpp's authors reads the file and dequantises; here is what the numbers mean to our decoder.
Weights are dequantised when they are loaded: a model takes as much memory as any other of its size and type.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.config import Decoder, RopeScaling
from rlhfjax.data.chat import ChatTemplate
from rlhfjax.data.pretrained_tokenizers import PretrainedTokenizer
from rlhfjax.pretrained.families_config import check_sizes
from rlhfjax.pretrained.gguf_tokenizer import build_tokenizer

__all__ = ["ARCHITECTURES", "GGUF", "gguf_chat_template", "gguf_tokenizer", "load_gguf", "read_gguf"]

ARCHITECTURES = ("llama", "qwen2", "qwen3")

# Ours -> theirs. Their matrices are [out, in], ours [in, out].
_MATRICES = {
    ("attention", "query"): "attn_q",
    ("attention", "key"): "attn_k",
    ("attention", "value"): "attn_v",
    ("attention", "output"): "attn_output",
    ("mlp", "gate"): "ffn_gate",
    ("mlp", "up"): "ffn_up",
    ("mlp", "down"): "ffn_down",
}
# Theirs that our decoder has no place for, and that do not change what a model of the right kind computes.
_IGNORED = ("rope_freqs.weight",)


class GGUF(NamedTuple):
    """An open GGUF file. Tensors stay on disk until they are asked for."""

    path: Path
    metadata: Mapping[str, Any]  # key -> number, text, bool or list of these
    tensors: Mapping[str, Any]  # name -> `gguf.ReaderTensor`

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, outermost dimension first; the file itself has it reversed."""
        return tuple(int(size) for size in reversed(self._tensor(name).shape))

    def array(self, name: str) -> np.ndarray:
        """A tensor dequantised, float32. ValueError if there is none or its quantisation cannot be undone."""
        tensor = self._tensor(name)
        try:
            array = _gguf_library().dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: {name} is quantised as {tensor.tensor_type.name}, which cannot be undone; take a file "
                "in F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, or Q2_K to Q6_K"
            ) from error
        return np.asarray(array, np.float32).reshape(self.shape(name))

    def value(self, key: str) -> Any:
        """Metadata that must be there; ValueError if it is not."""
        if key not in self.metadata:
            raise ValueError(f"{self.path} has no metadata {key!r}; the file is not one of a whole model")
        return self.metadata[key]

    def _tensor(self, name: str) -> Any:
        if name not in self.tensors:
            raise ValueError(f"{self.path} has no tensor {name!r}")
        return self.tensors[name]


def read_gguf(path: str | Path) -> GGUF:
    """Opens a GGUF file of version 2 or 3: its metadata, and its tensors by name, on disk.

    FileNotFoundError for a missing file; ValueError for one that is no GGUF, big-endian, cut short or damaged.
    """
    path = Path(path)
    library = _gguf_library()
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    with open(path, "rb") as file:
        magic = file.read(8)
    if magic[:4] != b"GGUF":
        raise ValueError(f"{path} is no GGUF file: it begins with {magic[:4]!r}")
    if magic[4:6] == b"\0\0":
        raise ValueError(f"{path} is a big-endian GGUF file, which cannot be read; take a little-endian one")
    try:
        reader = _bounded_reader(library)(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (LookupError, ValueError, OverflowError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is cut short, damaged or of a newer format ({error}); fetch it again"
        ) from error
    return GGUF(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def load_gguf(
    source: str | Path | GGUF,
    *,
    dtype: str = "float32",
    compute_dtype: str | None = None,
    max_positions: int | None = None,
) -> tuple[Decoder, dict]:
    """Reads a model: (config, params), its weights dequantised.

    Architectures: llama (Llama, Mistral, SmolLM), qwen2, qwen3. One tensor at a time is dequantised in host memory.

    Args:
      source: a path, or a file that is open already.
      dtype: of the params: "float32" or "bfloat16".
      compute_dtype: `dtype` of the config; None: the default, "float32".
      max_positions: the longest context that will be used, at most that of the file; None: that.

    Raises as `read_gguf` does, and ValueError for another architecture, a quantisation that cannot be undone, and
    missing, surplus or misshapen tensors; each is named.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f'dtype must be "float32" or "bfloat16", it is {dtype!r}')
    gguf = source if isinstance(source, GGUF) else read_gguf(source)
    config = gguf_config(gguf)
    params = _params(gguf, config, dtype)
    if max_positions is not None and not 1 <= max_positions <= config.max_positions:
        raise ValueError(f"max_positions={max_positions} must lie in [1, {config.max_positions}], the file's")
    config = dataclasses.replace(
        config, dtype=compute_dtype or config.dtype, max_positions=max_positions or config.max_positions
    )
    return config, params


def gguf_tokenizer(gguf: GGUF) -> PretrainedTokenizer:
    """The tokenizer in the file's metadata. ValueError for a kind that cannot be built, naming those that can."""
    return build_tokenizer(gguf.metadata, where=str(gguf.path))


def gguf_chat_template(gguf: GGUF) -> ChatTemplate:
    """The chat template in the file's metadata; ValueError if it has none."""
    source = gguf.value("tokenizer.chat_template")
    tokens: list[str] = gguf.value("tokenizer.ggml.tokens")
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {role: gguf.metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in keys.items()}
    return ChatTemplate(source, {role: tokens[i] for role, i in ids.items() if i is not None})


def _gguf_library() -> Any:
    if find_spec("gguf") is None:
        raise ModuleNotFoundError('GGUF files need the gguf package: pip install "rlhfjax[chat]"')
    return import_module("gguf")


def _bounded_reader(library: Any) -> Any:
    """The library's reader, which past the end of a file reads nothing: an array said to be endless took for ever."""

    class Reader(library.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            found = super()._get(offset, dtype, count, override_order)
            if len(found) < int(count):
                raise ValueError(f"{int(count)} values at byte {offset} go beyond its end")
            return found

    return Reader


def _architecture(gguf: GGUF) -> str:
    return gguf.value("general.architecture")


def gguf_config(gguf: GGUF) -> Decoder:
    """The decoder that a file holds, from its metadata. Raises as `load_gguf`."""
    try:
        return _config(gguf)
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"{gguf.path} has metadata of another kind than its names say: {error}") from error


def _config(gguf: GGUF) -> Decoder:
    family = _architecture(gguf)
    if family not in ARCHITECTURES:
        raise ValueError(
            f"{gguf.path} is a model of architecture {family!r}; only {', '.join(ARCHITECTURES)} can be read"
        )

    def needed(name: str) -> Any:
        return gguf.value(f"{family}.{name}")

    def given(name: str, default: Any) -> Any:
        return gguf.metadata.get(f"{family}.{name}", default)

    if given("expert_count", 0):
        raise ValueError(
            f"{gguf.path} is a mixture of {given('expert_count', 0)} experts, which cannot be read"
        )
    width, heads = needed("embedding_length"), needed("attention.head_count")
    size = given("attention.key_length", width // heads)
    config = Decoder(
        vocab_size=gguf.shape("token_embd.weight")[0],
        width=width,
        layers=needed("block_count"),
        heads=heads,
        kv_heads=given("attention.head_count_kv", heads),
        head_size=size,
        mlp_width=needed("feed_forward_length"),
        max_positions=needed("context_length"),
        # Written in float32; the shortest decimal that is the same float32 is what the author meant.
        norm_epsilon=float(str(np.float32(needed("attention.layer_norm_rms_epsilon")))),
        rope_theta=float(given("rope.freq_base", 10_000.0)),
        rope_fraction=given("rope.dimension_count", size) / size,
        rope_scaling=_rope_scaling(gguf, family),
        qk_norm="blk.0.attn_q_norm.weight" in gguf.tensors,
        attention_bias="blk.0.attn_q.bias" in gguf.tensors,
        tie_embeddings="output.weight" not in gguf.tensors,
    )
    try:
        check_sizes(vars(config))
    except ValueError as error:
        raise ValueError(f"{gguf.path}: {error}") from error
    return config


def _rope_scaling(gguf: GGUF, family: str) -> RopeScaling:
    kind = gguf.metadata.get(f"{family}.rope.scaling.type", "none")
    if "rope_freqs.weight" in gguf.tensors:
        # Llama 3.1's rule as its result: what each frequency is divided by, at every length.
        divisors = tuple(float(x) for x in gguf.array("rope_freqs.weight"))
        positions = gguf.value(f"{family}.context_length")
        return RopeScaling(
            "longrope",
            original_positions=positions,
            attention_factor=1.0,
            short_factors=divisors,
            long_factors=divisors,
        )
    if kind == "linear":
        return RopeScaling("linear", factor=float(gguf.value(f"{family}.rope.scaling.factor")))
    if kind != "none":
        raise ValueError(
            f"{gguf.path} asks for rope scaling {kind!r}; only none, linear and Llama 3's can be read"
        )
    return RopeScaling()


def _params(gguf: GGUF, config: Decoder, dtype: str) -> dict:
    left = set(gguf.tensors) - set(_IGNORED)

    def take(name: str, *shape: int) -> np.ndarray:
        if gguf.shape(name) != shape:
            raise ValueError(
                f"{gguf.path}: {name} has shape {gguf.shape(name)}, the metadata asks for {shape}"
            )
        left.discard(name)
        return gguf.array(name)

    # Only the architecture "llama" has the rows of query and key reordered.
    heads = {"query": config.heads, "key": config.kv_heads} if _architecture(gguf) == "llama" else {}
    params = {
        "embedding": take("token_embd.weight", config.vocab_size, config.width),
        "final_norm": {"scale": take("output_norm.weight", config.width)},
    }
    if not config.tie_embeddings:
        params["unembedding"] = take("output.weight", config.vocab_size, config.width)
    # Array by array, so that one tensor alone stands in host memory beside its quantised form.
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    for i in range(config.layers):
        params[f"layer_{i}"] = _layer(config, f"blk.{i}", take, heads, dtype)
    if left:
        raise ValueError(f"{gguf.path} has tensors that a model of this kind does not: {sorted(left)[:5]}")
    return params


def _layer(
    config: Decoder, prefix: str, take: Callable[..., np.ndarray], heads: Mapping[str, int], dtype: str
) -> dict[str, Any]:
    width, queries, keys = config.width, config.heads * config.head_size, config.kv_heads * config.head_size
    rows = {"query": queries, "key": keys, "value": keys, "output": width}
    rows |= {"gate": config.mlp_width, "up": config.mlp_width, "down": width}
    columns = {"output": queries, "down": config.mlp_width}

    def scale(name: str, size: int) -> dict[str, Any]:
        return {"scale": jnp.asarray(take(f"{prefix}.{name}.weight", size), dtype)}

    layer: dict[str, Any] = {"attention": {}, "mlp": {}}
    for (part, name), theirs in _MATRICES.items():
        matrix = take(f"{prefix}.{theirs}.weight", rows[name], columns.get(name, width))
        layer[part][name] = {"kernel": jnp.asarray(_halves(matrix, heads.get(name)).T, dtype)}
        if config.attention_bias and name in ("query", "key", "value"):
            bias = take(f"{prefix}.{theirs}.bias", rows[name])
            layer[part][name]["bias"] = jnp.asarray(_halves(bias, heads.get(name)), dtype)
    if config.qk_norm:
        layer["attention"]["query_norm"] = scale("attn_q_norm", config.head_size)
        layer["attention"]["key_norm"] = scale("attn_k_norm", config.head_size)
    return layer | {"attention_norm": scale("attn_norm", width), "mlp_norm": scale("ffn_norm", width)}


def _halves(rows: np.ndarray, heads: int | None) -> np.ndarray:
    """Rows of query or key as our rotary positions pair them, (k, k + size / 2); llama.cpp pairs (2 k, 2 k + 1)."""
    if heads is None:
        return rows
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
