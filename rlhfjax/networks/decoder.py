"""A decoder-only language model with honest configuration (Llama, Mistral, Qwen, Gemma, GPT-2, GPT-NeoX, Phi-3).

One function serves training, prefill and decoding: `apply` takes tokens, their positions and a mask that says which
key each query may see. The key-value cache is passed in and returned, so nothing here holds state.

Shapes: B sequences, T query positions, S key positions, V vocabulary, D width, H query heads, N key-value heads,
K head size.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhfjax.config import Decoder as Config
from rlhfjax.networks.attention import (
    KERNELS,
    BranchMask,
    Mask,
    SegmentMask,
    as_array,
    attend,
    kernel_for,
    within_window,
)
from rlhfjax.networks.layers import (
    NF4,
    SCALES,
    TRANSPOSED,
    Norm,
    Projection,
    dequantised,
    matrix_first,
)
from rlhfjax.networks.rope import check_rope, rope_frequencies, rotary
from rlhfjax.ops import backend


class LayerCache(NamedTuple):
    """Keys and values of one layer, already rotated to their positions."""

    # Each lies as the product that reads it wants it: any other order is copied at every token.
    key: jax.Array  # [B, N, K, S]
    value: jax.Array  # [B, N, S, K]
    position: jax.Array | None = None  # int32 [B, S], of each slot's token; in layers with a window only


Cache = tuple[LayerCache, ...]

# (activation, a letter for each of its axes) -> the activation, laid over devices; see `decoder`.
Place = Callable[[jax.Array, str], jax.Array]


def _anywhere(x: jax.Array, axes: str) -> jax.Array:
    del axes
    return x


_FEW_ROWS = 16  # up to which `matrix_first` is faster with the embedding of a vocabulary


class LanguageModel(NamedTuple):
    """A language model as pure functions of its parameters.

    init(key) -> params
        A nested dict of float32 arrays. The key is consumed.
    apply(params, token_BT, *, position_BT, mask_BTS, cache=None, slot=0) -> (hidden_BTD, cache)
        Final normalised hidden states. `token` and `position` int32, `mask` bool, True where the query may see the key.
        Without a cache S = T and the keys are the tokens themselves; the mask may then be a `BranchMask`, whose rows
        cost less, or a `SegmentMask`, which a kernel may read as it is. With one, the new keys are written to slots
        slot .. slot + T - 1 of its S slots before attention.
    embedding(params) -> [V, D]
        The output embedding: logits = hidden @ embedding.T, capped if `config.logit_softcap`. Kept apart from `apply`,
        so that log-probabilities can be computed in chunks (`ops.token_logprobs`) without a [B, T, V] array.
    logits(params, hidden) -> float32 [..., V]
    init_cache(batch, slots) -> Cache
        Zeros; B = batch, S = slots.
    for_decoding(params) -> params
        The same params as `apply` and `logits` read them fastest for few tokens at a time; for no other use. What a
        loop that decodes calls once before it.
    """

    config: Config
    init: Callable[..., dict]
    apply: Callable[..., tuple[jax.Array, Any]]
    embedding: Callable[[dict], jax.Array]
    logits: Callable[[dict, jax.Array], jax.Array]
    init_cache: Callable[[int, int], Cache]
    for_decoding: Callable[[dict], dict] = lambda params: params


def _norm(config: Config, name: str) -> Norm:
    return Norm(config.norm, config.norm_epsilon, config.norm_offset, name=name)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245); multi-head where kv_heads equals heads.

    window: the last tokens that a token sees, itself included; 0: all.
    """

    config: Config
    window: int = 0
    place: Place = _anywhere

    @nn.compact
    def __call__(self, x_BTD, position_BT, mask_BTS, cache: LayerCache | None, slot):
        config = self.config
        batch, length, _ = x_BTD.shape
        size = config.head_size

        # In training the tokens of a row may be split over devices, while decoding there are none to split.
        lead = "BT" if cache is None else "R-"
        flat = self.place is _anywhere

        def project(name, heads, axis):
            out = Projection(heads * size, config.attention_bias, config.width**-0.5, flat, name=name)(x_BTD)
            return self.place(out.reshape(batch, length, heads, size), f"{lead}{axis}-")

        query, key, value = (
            project(name, heads, axis)
            for name, heads, axis in (
                ("query", config.heads, "H"),
                ("key", config.kv_heads, "N"),
                ("value", config.kv_heads, "N"),
            )
        )
        if config.qk_norm:
            query, key = _norm(config, "query_norm")(query), _norm(config, "key_norm")(key)
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        if config.positions == "rotary":
            frequency, factor = rope_frequencies(config, windowed=self.window > 0)
            query, key = (rotary(x, position_BT, frequency, factor) for x in (query, key))
        if config.attention_scale is not None:
            query = query * (config.attention_scale * size**0.5)  # what attends divides by sqrt(size)
        key = key.swapaxes(2, 3)
        key_position_BS = position_BT
        if cache is not None:
            write = jax.lax.dynamic_update_slice_in_dim
            key = write(cache.key, key.astype(cache.key.dtype), slot, axis=3)
            value = write(cache.value, value.astype(cache.value.dtype), slot, axis=2)
            if cache.position is not None:
                key_position_BS = write(cache.position, position_BT.astype(jnp.int32), slot, axis=1)
        # Each device has all keys that its queries may see.
        key, value = (self.place(x, f"{lead[0]}N--") for x in (key, value))
        if cache is not None:
            cache = LayerCache(key, value, None if cache.position is None else key_position_BS)
        if self.window and self.window < _longest(mask_BTS):
            mask_BTS = as_array(mask_BTS) & within_window(position_BT, key_position_BS, self.window)
        softcap = config.attention_softcap
        kernel = kernel_for(config.attention, query.dtype, size, length, softcap)
        attended = jax.checkpoint(attend, static_argnums=(4, 5)) if config.remat == "attention" else attend
        out = attended(query, key.astype(query.dtype), value.astype(query.dtype), mask_BTS, kernel, softcap)
        stddev = (config.heads * size * 2 * config.layers) ** -0.5
        out = out.swapaxes(1, 2).reshape(batch, length, -1)
        return Projection(config.width, config.output_bias, stddev, flat, name="output")(out), cache


def _longest(mask: Mask) -> int:
    """Tokens of the longest sequence that there may be: no window as long hides anything."""
    if isinstance(mask, BranchMask):
        return mask.prompt_BP.shape[1] + mask.completion_BGC.shape[2]
    return mask.segment_BT.shape[1] if isinstance(mask, SegmentMask) else mask.shape[2]


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": nn.gelu,
    "gelu_exact": partial(nn.gelu, approximate=False),
    "relu": nn.relu,
}


class MLP(nn.Module):
    config: Config
    place: Place = _anywhere

    @nn.compact
    def __call__(self, x: jax.Array, lead: str) -> jax.Array:
        config, flat = self.config, self.place is _anywhere
        inner = Projection(config.mlp_width, config.mlp_bias, config.width**-0.5, flat, name="gate")(x)
        inner = self.place(inner, f"{lead}F")
        inner = _ACTIVATIONS[config.activation](inner)
        if config.gated_mlp:
            inner = inner * Projection(
                config.mlp_width, config.mlp_bias, config.width**-0.5, flat, name="up"
            )(x)
        stddev = (config.mlp_width * 2 * config.layers) ** -0.5
        return Projection(config.width, config.mlp_bias, stddev, flat, name="down")(inner)


class Block(nn.Module):
    config: Config
    window: int = 0
    place: Place = _anywhere

    @nn.compact
    def __call__(self, x, position, mask, cache, slot):
        config = self.config
        lead = "BT" if cache is None else "R-"

        def after(name: str, out: jax.Array) -> jax.Array:
            return _norm(config, name)(out) if config.post_norms else out

        attended, cache = Attention(config, self.window, self.place, name="attention")(
            _norm(config, "attention_norm")(x), position, mask, cache, slot
        )
        attended = after("attention_post_norm", attended)
        read = x if config.parallel_blocks else x + attended
        out = after(
            "mlp_post_norm", MLP(config, self.place, name="mlp")(_norm(config, "mlp_norm")(read), lead)
        )
        out = x + attended + out if config.parallel_blocks else read + out
        return self.place(out, f"{lead}-"), cache


# What the backward pass of a block computes again.
_REMAT: dict[str, Callable[[type[Block]], type[Block]]] = {
    "none": lambda block: block,
    "attention": lambda block: block,  # done within
    "dots": partial(nn.remat, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "block": nn.remat,
}


class _Decoder(nn.Module):
    config: Config
    place: Place = _anywhere

    @nn.compact
    def __call__(self, token_BT, position_BT, mask_BTS, cache: Cache | None, slot):
        config = self.config
        dtype = jnp.dtype(config.dtype)
        normal = nn.initializers.normal(config.embedding_stddev)
        embedding = self.param("embedding", normal, (config.vocab_size, config.width))
        x = self.place(embedding, "V-")[token_BT].astype(dtype)
        if config.embedding_scale is not None:
            x = x * jnp.asarray(config.embedding_scale, dtype)
        if config.positions == "learned":
            table = self.param("positions", normal, (config.max_positions, config.width))
            x = x + self.place(table, "--")[position_BT].astype(dtype)
        x = self.place(x, "BT-" if cache is None else "R--")
        if not config.tie_embeddings:
            self.param("unembedding", normal, (config.vocab_size, config.width))
        block = _REMAT[config.remat](Block)
        new_cache = []
        for layer in range(config.layers):
            layer_cache = None if cache is None else cache[layer]
            window = config.windows[layer] if config.windows else 0
            x, layer_cache = block(config, window, self.place, name=f"layer_{layer}")(
                x, position_BT, mask_BTS, layer_cache, slot
            )
            new_cache.append(layer_cache)
        hidden = self.place(_norm(config, "final_norm")(x), "R--")  # what reads it goes by rows
        return hidden, (None if cache is None else tuple(new_cache))


def decoder(config: Config, *, place: Place | None = None) -> LanguageModel:
    """Builds the pure functions of a decoder. Raises ValueError where the configuration contradicts itself.

    place: lays activations over devices: `mesh.activations(mesh)`; None: there is one. It gets a letter for each axis:
      B rows and T tokens within the blocks in training, R rows elsewhere, H and N heads, F the hidden layer of the MLP,
      V the vocabulary, - any other.
    """
    _check(config)
    place = place or _anywhere
    module = _Decoder(config, place)

    def init(key: jax.Array) -> dict:
        key_layers, key_rest = jax.random.split(key)
        one, seen = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool)
        x = jnp.zeros((1, 1, config.width), config.dtype)

        def params_of(module: nn.Module, key: jax.Array, x: jax.Array) -> dict:
            variables: Any = module.init(key, x, one, seen, None, 0)
            return variables["params"]

        # All layers in one go, and drawn before they are cut: drawn layer by layer, which without the barrier XLA's
        # GPU backend makes of it too, a model of 135M takes minutes to compile.
        layers = jax.vmap(lambda key: params_of(Block(config), key, x))(
            jax.random.split(key_layers, config.layers)
        )
        layers = jax.lax.optimization_barrier(layers)
        rest = params_of(_Decoder(dataclasses.replace(config, layers=0, windows=())), key_rest, one)
        return rest | {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(config.layers)}

    def apply(params, token_BT, *, position_BT, mask_BTS, cache=None, slot=0):
        chex.assert_rank([token_BT, position_BT], 2)
        chex.assert_type([token_BT, position_BT], int)
        chex.assert_equal_shape([token_BT, position_BT])
        if isinstance(mask_BTS, BranchMask | SegmentMask) and cache is not None:
            kind = type(mask_BTS).__name__
            raise ValueError(f"a {kind} is for whole rows; with a cache give the mask as an array, [B, T, S]")
        if isinstance(mask_BTS, BranchMask):
            _check_branches(mask_BTS, token_BT)
        elif isinstance(mask_BTS, SegmentMask):
            chex.assert_type(mask_BTS.segment_BT, int)
            chex.assert_equal_shape([token_BT, mask_BTS.segment_BT])
        else:
            chex.assert_rank(mask_BTS, 3)
            chex.assert_type(mask_BTS, bool)
        out: Any = module.apply({"params": params}, token_BT, position_BT, mask_BTS, cache, slot)
        return out

    def embedding(params: dict) -> jax.Array:
        return place(params["embedding" if config.tie_embeddings else "unembedding"], "V-")

    def for_decoding(params: dict) -> dict:
        return _decoding(params, jnp.dtype(config.dtype), transpose=backend() == "cpu")

    def logits(params: dict, hidden: jax.Array) -> jax.Array:
        table = embedding(params).astype(hidden.dtype)
        few = hidden[..., 0].size <= _FEW_ROWS and hidden.dtype == jnp.float32
        if few and backend() == "cpu":
            rows = hidden.reshape(-1, config.width)
            found = matrix_first(table, rows).reshape(*hidden.shape[:-1], -1)
        else:
            found = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        if found.ndim == 3:
            found = place(found, "R--")  # whole over the vocabulary: a token is drawn from all of it
        cap = config.logit_softcap
        return found if cap is None else cap * jnp.tanh(found / cap)

    def init_cache(batch: int, slots: int) -> Cache:
        heads, size, dtype = config.kv_heads, config.head_size, jnp.dtype(config.dtype)
        # Separate arrays, so that a caller may donate them all.
        return tuple(
            LayerCache(
                place(jnp.zeros((batch, heads, size, slots), dtype), "RN--"),
                place(jnp.zeros((batch, heads, slots, size), dtype), "RN--"),
                jnp.zeros((batch, slots), jnp.int32) if window else None,
            )
            for window in config.windows or (0,) * config.layers
        )

    return LanguageModel(config, init, apply, embedding, logits, init_cache, for_decoding)


def _decoding(params: dict, dtype: jnp.dtype, transpose: bool) -> dict:
    """The params with every matrix in the type that computes, and the kernels transposed.

    Where they are transposed, on a CPU, kernels of four bits are written out: undone at every token they took 2.4
    times as long at 135M parameters. Those of eight bits are as fast as they are.
    """
    if transpose and NF4 in params:
        rest = {name: x for name, x in params.items() if name not in (NF4, SCALES)}
        params = rest | {"kernel": dequantised(params, dtype)}
    out = {}
    for name, value in params.items():
        if isinstance(value, dict):
            out[name] = _decoding(value, dtype, transpose)
        elif name == "kernel" and transpose:
            out[TRANSPOSED] = jax.lax.optimization_barrier(value.astype(dtype).T)
        elif name.endswith("scale") or not jnp.issubdtype(value.dtype, jnp.floating):
            out[name] = value
        else:
            out[name] = value.astype(dtype)
    return out


def _check_branches(mask: BranchMask, token_BT: jax.Array) -> None:
    chex.assert_rank(list(mask), [2, 3])
    chex.assert_type(list(mask), bool)
    (batch, prompt), (_, samples, length) = mask.prompt_BP.shape, mask.completion_BGC.shape
    if token_BT.shape != (batch, prompt + samples * length):
        raise ValueError(
            f"tokens {token_BT.shape} are not the rows of the mask: {batch} of a prompt of {prompt} and {samples} "
            f"completions of {length}"
        )


def _check(config: Config) -> None:
    choices = {
        "attention": KERNELS,
        "remat": tuple(_REMAT),
        "norm": ("rmsnorm", "layernorm"),
        "positions": ("rotary", "learned"),
        "activation": tuple(_ACTIVATIONS),
        "dtype": ("float32", "bfloat16"),
    }
    for field, allowed in choices.items():
        if getattr(config, field) not in allowed:
            raise ValueError(
                f"decoder {field}={getattr(config, field)!r} is unknown; choose one of {allowed}"
            )
    for field in (
        "vocab_size",
        "width",
        "layers",
        "heads",
        "kv_heads",
        "head_size",
        "mlp_width",
        "max_positions",
    ):
        if getattr(config, field) < 1:
            raise ValueError(f"decoder {field} must be at least 1, got {getattr(config, field)}")
    if config.attention == "cudnn" and config.dtype != "bfloat16":
        raise ValueError(f'attention="cudnn" needs dtype="bfloat16", this decoder has {config.dtype!r}')
    if config.packing is not None and not 0 < config.packing <= 1:
        raise ValueError(f"decoder packing={config.packing} must lie in (0, 1], or be None for full rows")
    if config.heads % config.kv_heads:
        raise ValueError(f"decoder heads ({config.heads}) must be a multiple of kv_heads ({config.kv_heads})")
    if config.positions == "rotary":
        check_rope(config)
    if config.windows and (len(config.windows) != config.layers or min(config.windows) < 0):
        raise ValueError(
            f"decoder windows={config.windows} must hold a number of tokens (0: all) for each of {config.layers} layers"
        )
    for field in ("attention_scale", "attention_softcap", "logit_softcap", "embedding_scale"):
        value = getattr(config, field)
        if value is not None and not value > 0:
            raise ValueError(f"decoder {field}={value} must be above 0, or None for none")
    if config.attention_softcap is not None and config.attention not in ("auto", "xla"):
        raise ValueError(f'attention={config.attention!r} has no softcap; choose "auto" or "xla"')
