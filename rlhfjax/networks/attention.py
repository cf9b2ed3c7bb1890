"""Attention of queries to keys under a mask, by XLA's products or a fused kernel.

Shapes: B sequences, T query positions, S key positions, H query heads, N key-value heads, K head size; P prompt
length, G completions of a prompt, C completion length. H / N query heads share a key-value head (arXiv 2305.13245).
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhfjax.networks.splash import splash
from rlhfjax.ops import backend

KERNELS = ("auto", "xla", "cudnn", "splash")
_HIDDEN = -1e30  # the score of a key that a query may not see; finite, so that no gradient is NaN


class BranchMask(NamedTuple):
    """Which key each query sees in a row [prompt | completion 0 | completion 1 | ... ]: the prompt is seen by all, a
    completion by itself alone, both causally. Padding sees itself besides, so that its softmax stays finite.

    The scores of one completion for another are never computed: of G completions with as long a prompt, about G / 2
    times the arithmetic and the memory of the whole square. `branch_mask` is the same as an array.
    """

    prompt_BP: jax.Array  # bool, True on real tokens; left-padded
    completion_BGC: jax.Array  # bool


class SegmentMask(NamedTuple):
    """Packed rows: a token sees itself and what precedes it in its own segment; `causal_mask` as an array."""

    segment_BT: jax.Array  # int32, 0 = padding


Mask = jax.Array | SegmentMask | BranchMask


def causal_mask(segment_BT: jax.Array) -> jax.Array:
    """The [B, T, T] mask of packed rows: a token sees itself and what precedes it in its own segment.

    `segment_BT` is int32, 0 for padding (which sees only itself, so that its softmax stays finite).
    """
    chex.assert_rank(segment_BT, 2)
    length = segment_BT.shape[1]
    causal = jnp.tril(jnp.ones((1, length, length), bool))
    same = segment_BT[:, :, None] == segment_BT[:, None, :]
    real = segment_BT[:, None, :] > 0
    return (causal & same & real) | jnp.eye(length, dtype=bool)[None]


def branch_mask(prompt_mask_BP: jax.Array, completion_mask_BGC: jax.Array) -> jax.Array:
    """`BranchMask` as an array, [B, T, T] bool with T = P + G * C."""
    batch, samples, length = completion_mask_BGC.shape
    prompt = prompt_mask_BP.shape[1]
    # Branch 0 is the prompt; completion g is branch g + 1.
    branch_T = jnp.concatenate([jnp.zeros(prompt, jnp.int32), jnp.repeat(jnp.arange(1, samples + 1), length)])
    total = prompt + samples * length
    causal = jnp.tril(jnp.ones((total, total), bool))
    related = (branch_T[None, :] == 0) | (branch_T[:, None] == branch_T[None, :])
    real_BT = jnp.concatenate([prompt_mask_BP, completion_mask_BGC.reshape(batch, -1)], axis=1)
    return ((causal & related)[None] & real_BT[:, None, :]) | jnp.eye(total, dtype=bool)[None]


def attend(
    query_BHTK: jax.Array,
    key_BNKS: jax.Array,
    value_BNSK: jax.Array,
    mask: Mask,
    kernel: str = "xla",
    softcap: float | None = None,
) -> jax.Array:
    """softmax(query key^T / sqrt(K)) value, [B, H, T, K]; the softmax in float32.

    Args:
      mask: bool [B, T, S], True where a query may see a key, and every query must see one; or a `SegmentMask`, with
        T = S, or a `BranchMask`, with T = S = P + G * C.
      kernel: "xla"; "cudnn" (bfloat16 on an NVIDIA GPU) and "splash" (a TPU; masks that are arrays take "xla"), which
        never have the scores in memory. See `kernel_for`.
      softcap: scores x become softcap * tanh(x / softcap), before the mask (Gemma 2, arXiv 2408.00118); "xla" only.

    Raises AssertionError on another rank, or keys and values of different shapes; ValueError on a softcap with
    another kernel.
    """
    if softcap is not None and kernel != "xla":
        raise ValueError(f'attention kernel {kernel!r} has no softcap; choose "xla"')
    chex.assert_rank([query_BHTK, key_BNKS, value_BNSK], 4)
    chex.assert_equal_shape([key_BNKS.swapaxes(2, 3), value_BNSK])
    if kernel == "splash" and isinstance(mask, BranchMask):
        return _splash_branches(query_BHTK, key_BNKS, value_BNSK, mask)
    if kernel == "splash" and isinstance(mask, SegmentMask):
        return _splash_segments(query_BHTK, key_BNKS, value_BNSK, mask)
    if isinstance(mask, BranchMask) and mask.completion_BGC.shape[1] > 1:
        if kernel == "cudnn":
            return _cudnn_branches(query_BHTK, key_BNKS, value_BNSK, mask)
        return _xla_branches(query_BHTK, key_BNKS, value_BNSK, mask, softcap)
    mask_BTS = as_array(mask)
    if kernel == "cudnn":
        return _cudnn(query_BHTK, key_BNKS, value_BNSK, mask_BTS)
    return _xla(query_BHTK, key_BNKS, value_BNSK, mask_BTS, softcap)


def as_array(mask: Mask) -> jax.Array:
    """The mask as bool [B, T, S]."""
    if isinstance(mask, BranchMask):
        return branch_mask(*mask)
    return causal_mask(mask.segment_BT) if isinstance(mask, SegmentMask) else mask


def kernel_for(
    wanted: str, dtype: jnp.dtype, head_size: int, queries: int, softcap: float | None = None
) -> str:
    """What "auto" is here: cuDNN's kernel where it serves (a GPU, bfloat16, heads of 8, 16, ... 128, several queries,
    no softcap).

    The backend is that of `ops.backend`, when it is traced. "splash" is never chosen: it has been run by Pallas'
    interpreter only.
    """
    if wanted != "auto":
        return wanted
    serves = (
        dtype == jnp.bfloat16 and head_size % 8 == 0 and head_size <= 128 and queries > 1 and softcap is None
    )
    return "cudnn" if serves and backend() == "gpu" else "xla"


def within_window(query_position_BT: jax.Array, key_position_BS: jax.Array, window: int) -> jax.Array:
    """Whether a key is among the last `window` tokens of a query, itself included; bool [B, T, S]."""
    return query_position_BT[:, :, None] - key_position_BS[:, None, :] < window


def _capped(score: jax.Array, softcap: float | None) -> jax.Array:
    return score if softcap is None else softcap * jnp.tanh(score / softcap)


def _xla(query_BHTK, key_BNKS, value_BNSK, mask_BTS, softcap=None):
    batch, heads, length, size = query_BHTK.shape
    groups = heads // key_BNKS.shape[1]
    query = query_BHTK.reshape(batch, -1, groups, length, size)
    score = jnp.einsum("bngtk,bnks->bngts", query, key_BNKS, preferred_element_type=jnp.float32) * size**-0.5
    score = jnp.where(mask_BTS[:, None, None], _capped(score, softcap), _HIDDEN)
    weight = jax.nn.softmax(score, axis=-1).astype(value_BNSK.dtype)
    return jnp.einsum("bngts,bnsk->bngtk", weight, value_BNSK).reshape(query_BHTK.shape)


def _xla_branches(query_BHTK, key_BNKS, value_BNSK, mask: BranchMask, softcap=None):
    batch, heads, _, size = query_BHTK.shape
    kv_heads = key_BNKS.shape[1]
    (_, prompt), (_, samples, length) = mask.prompt_BP.shape, mask.completion_BGC.shape
    prompt_key, prompt_value = key_BNKS[..., :prompt], value_BNSK[:, :, :prompt]
    of_prompt = _xla(query_BHTK[:, :, :prompt], prompt_key, prompt_value, _causal(mask.prompt_BP), softcap)

    query = query_BHTK[:, :, prompt:].reshape(batch, kv_heads, -1, samples, length, size)
    key = key_BNKS[..., prompt:].reshape(batch, kv_heads, size, samples, length)
    value = value_BNSK[:, :, prompt:].reshape(batch, kv_heads, samples, length, size)

    def scores(subscripts, key, mask):
        score = jnp.einsum(subscripts, query, key, preferred_element_type=jnp.float32) * size**-0.5
        return jnp.where(mask, _capped(score, softcap), _HIDDEN)

    to_prompt = scores("bnqgck,bnkp->bnqgcp", prompt_key, mask.prompt_BP[:, None, None, None, None])
    own_BGCC = _causal(mask.completion_BGC.reshape(-1, length)).reshape(batch, samples, length, length)
    to_own = scores("bnqgck,bnkgs->bnqgcs", key, own_BGCC[:, None, None])
    # One softmax over two parts, divided after the products; what is subtracted cancels, its gradient too.
    highest = jnp.maximum(*(jnp.max(x, axis=-1, keepdims=True) for x in (to_prompt, to_own)))
    to_prompt, to_own = (jnp.exp(x - jax.lax.stop_gradient(highest)) for x in (to_prompt, to_own))
    total = sum(jnp.sum(x, axis=-1, keepdims=True) for x in (to_prompt, to_own))

    def product(subscripts, weight, value):
        return jnp.einsum(subscripts, weight.astype(value.dtype), value, preferred_element_type=jnp.float32)

    out = product("bnqgcp,bnpk->bnqgck", to_prompt, prompt_value)
    out = (out + product("bnqgcs,bngsk->bnqgck", to_own, value)) / total
    out = out.astype(value.dtype).reshape(batch, heads, samples * length, size)
    return jnp.concatenate([of_prompt, out], axis=2)


def _cudnn(query_BHTK, key_BNKS, value_BNSK, mask_BTS):
    length, keys = query_BHTK.shape[2], key_BNKS.shape[3]
    # The kernel's backward pass wants even lengths. What is added sees all and is seen by nobody.
    more, more_keys = length % 2, keys % 2
    mask = jnp.pad(mask_BTS, ((0, 0), (0, more), (0, 0)), constant_values=True)
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, more_keys)))

    def laid_out(x, added):
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, added), (0, 0), (0, 0)))

    out = jax.nn.dot_product_attention(
        laid_out(query_BHTK, more),
        laid_out(key_BNKS.swapaxes(2, 3), more_keys),
        laid_out(value_BNSK, more_keys),
        mask=mask[:, None],
        implementation="cudnn",
    )
    return out[:, :length].swapaxes(1, 2)


def _cudnn_branches(query_BHTK, key_BNKS, value_BNSK, mask: BranchMask):
    prompt, completions = _as_rows(query_BHTK, key_BNKS, value_BNSK, mask)
    own = _causal(mask.completion_BGC.reshape(-1, mask.completion_BGC.shape[2]))
    prompt_BGP = jnp.repeat(mask.prompt_BP, mask.completion_BGC.shape[1], axis=0)
    seen = jnp.broadcast_to(prompt_BGP[:, None], (*own.shape[:2], prompt_BGP.shape[1]))
    return _from_rows(
        _cudnn(*prompt, _causal(mask.prompt_BP)),
        _cudnn(*completions, jnp.concatenate([seen, own], axis=2)),
        mask,
    )


def _splash_segments(query_BHTK, key_BNKS, value_BNSK, mask: SegmentMask):
    segment = mask.segment_BT
    return splash(query_BHTK, key_BNKS, value_BNSK, segment, segment, interpret=_interpreted())


def _splash_branches(query_BHTK, key_BNKS, value_BNSK, mask: BranchMask):
    prompt, completions = _as_rows(query_BHTK, key_BNKS, value_BNSK, mask)
    # Real tokens are one segment; padding, the other, sees what is padding, itself among it.
    of_prompt = jnp.asarray(mask.prompt_BP, jnp.int32)
    own = jnp.asarray(mask.completion_BGC, jnp.int32).reshape(-1, mask.completion_BGC.shape[2])
    of_row = jnp.concatenate([jnp.repeat(of_prompt, mask.completion_BGC.shape[1], axis=0), own], axis=1)
    return _from_rows(
        splash(*prompt, of_prompt, of_prompt, interpret=_interpreted()),
        splash(*completions, own, of_row, interpret=_interpreted()),
        mask,
    )


def _interpreted() -> bool:
    return backend() != "tpu"


def _as_rows(query_BHTK, key_BNKS, value_BNSK, mask: BranchMask):
    """Queries, keys and values of the prompt; and of every completion as a row of its own, [B * G, ...], with a copy of
    the prompt's keys."""
    (batch, prompt), (_, samples, length) = mask.prompt_BP.shape, mask.completion_BGC.shape

    def per_sample(x, axis):
        """The completions' part of x, its axis (of G * C) cut in two, and the samples moved into the batch."""
        x = jax.lax.slice_in_dim(x, prompt, None, axis=axis)
        x = x.reshape(*x.shape[:axis], samples, length, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 1).reshape(batch * samples, *x.shape[1:axis], *x.shape[axis + 1 :])

    def copies(x):
        return jnp.repeat(x, samples, axis=0)

    prompts = query_BHTK[:, :, :prompt], key_BNKS[..., :prompt], value_BNSK[:, :, :prompt]
    completions = (
        per_sample(query_BHTK, 2),
        jnp.concatenate([copies(prompts[1]), per_sample(key_BNKS, 3)], axis=3),
        jnp.concatenate([copies(prompts[2]), per_sample(value_BNSK, 2)], axis=2),
    )
    return prompts, completions


def _from_rows(of_prompt_BHPK: jax.Array, of_rows: jax.Array, mask: BranchMask) -> jax.Array:
    """The two parts in one row, [B, H, T, K]."""
    batch, heads, _, size = of_prompt_BHPK.shape
    _, samples, length = mask.completion_BGC.shape
    out = jnp.moveaxis(of_rows.reshape(batch, samples, heads, length, size), 1, 2)
    return jnp.concatenate([of_prompt_BHPK, out.reshape(batch, heads, samples * length, size)], axis=2)


def _causal(real_BT: jax.Array) -> jax.Array:
    length = real_BT.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return (causal[None] & real_BT[:, None, :]) | jnp.eye(length, dtype=bool)[None]
