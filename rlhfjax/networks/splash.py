"""The TPU kernel of attention that JAX ships: scores are never in memory, and blocks that nobody sees are not computed.

Shapes: B sequences, T query positions, S key positions, H query heads, N key-value heads, K head size.
"""

from typing import Any

import jax
import jax.numpy as jnp

_LANES = 128  # lengths are padded to a multiple of it


def splash(
    query_BHTK: jax.Array,
    key_BNKS: jax.Array,
    value_BNSK: jax.Array,
    segment_BT: jax.Array,
    key_segment_BS: jax.Array,
    *,
    interpret: bool,
) -> jax.Array:
    """Causal attention within segments, [B, H, T, K]: query t sees key s <= t + S - T of its own segment.

    segments: int32; a segment is seen by itself alone, that of padding too.
    interpret: runs the kernel's program without a TPU, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    batch, heads, length, size = query_BHTK.shape
    kv_heads, keys = key_BNKS.shape[1], key_BNKS.shape[3]
    more, more_keys = -length % _LANES, -keys % _LANES

    def padded(x: jax.Array, added: int, axis: int, value: int = 0) -> jax.Array:
        width = [(0, 0)] * x.ndim
        width[axis] = (0, added)
        return jnp.pad(x, width, constant_values=value)

    # Added keys are of a segment that no query has. Added queries are of the last real one's, so that each sees a key:
    # a row without any would be NaN, in the gradients of all keys too.
    key_segment = padded(key_segment_BS, more_keys, 1, -1)
    segment = jnp.concatenate([segment_BT, jnp.repeat(segment_BT[:, -1:], more, axis=1)], axis=1)
    groups = heads // kv_heads
    mask = masks.MultiHeadMask(
        [masks.CausalMask((length + more, keys + more_keys), offset=keys - length) for _ in range(groups)]
    )
    attend = kernel.make_splash_mqa(mask, head_shards=1, q_seq_shards=1, interpret=interpret)

    def of_sequence(query, key, value, segment, key_segment) -> Any:
        segments = kernel.SegmentIds(segment, key_segment)
        return jax.vmap(lambda q, k, v: attend(q, k, v, segments))(query, key, value)

    query = padded(query_BHTK * size**-0.5, more, 2).reshape(batch, kv_heads, groups, -1, size)
    out: jax.Array = jax.vmap(of_sequence)(
        query,
        padded(key_BNKS.swapaxes(2, 3), more_keys, 2),
        padded(value_BNSK, more_keys, 2),
        segment.astype(jnp.int32),
        key_segment.astype(jnp.int32),
    )
    return out.reshape(batch, heads, -1, size)[:, :, :length].astype(query_BHTK.dtype)
