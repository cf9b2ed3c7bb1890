"""An initialisation with induction heads: a tiny decoder that can copy from its context before its first step.

Copying names and phrases from a document is what summaries and translations live on. A small transformer learns it
late: the circuit of two layers (arXiv 2209.11895) is found only after a long plateau, millions of tokens in at this
size. Built into the first weights it is there from the start, in a plain Llama, with no new part in the architecture.

The residual stream is parted in three: dimension 0 is a constant (a bias for attention), the rest of the lower half
holds a token's content, the upper half is free for the content of the token before it.

  layer 0   previous-token heads: rotary attention to distance 1, content copied to the upper half
  layer 1   induction heads: the content of this token is compared with the previous content of earlier ones (in the
            slowest rotary frequencies, which hardly see distance), and the content of the match is added to this one's
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.config import Decoder

_FAST = 4  # rotary pairs that tell distance 1 from all others
_SLOW = 9 / 16  # pairs from this share on turn by less than a radian in a hundred tokens (theta 10,000)
_PREVIOUS_SHARPNESS = 60.0
_MATCH_SHARPNESS = 20.0
_PREVIOUS_GAIN, _COPY_GAIN = 0.3, 0.5
_NOISE = 0.1  # of the usual initialisation, which all other directions keep


def with_induction_heads(
    key: jax.Array, params: dict, config: Decoder, *, embedding_stddev: float = 0.15
) -> dict:
    """Params of a fresh decoder with an induction circuit written into its first two layers.

    All other weights shrink to a tenth of their initial size, so that the circuit is heard. The key is consumed.
    Raises ValueError where the decoder is not a tied Llama with multi-head attention, two layers and heads that span
    half its width.
    """
    half, size, pairs = config.width // 2, config.head_size, config.head_size // 2
    previous_heads = -(-half // size)
    plain = config.tie_embeddings and config.positions == "rotary" and config.norm == "rmsnorm"
    if not (plain and config.layers >= 2 and config.kv_heads == config.heads >= previous_heads):
        raise ValueError(
            "induction heads need tied embeddings, rotary positions, RMS norms, two layers, kv_heads = heads and "
            f"heads * head_size >= width / 2; got {config}"
        )
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    params = jax.tree.map(np.array, params)
    for i in range(config.layers):
        for part in ("attention", "mlp"):
            for projection in params[f"layer_{i}"][part].values():
                projection["kernel"] *= _NOISE

    embedding = np.zeros((config.vocab_size, config.width), np.float32)
    embedding[:, 1:half] = rng.normal(size=(config.vocab_size, half - 1)) * embedding_stddev
    embedding[:, 0] = embedding_stddev * np.sqrt(
        half - 1
    )  # half of the norm, so that it survives the RMS norm
    params["embedding"] = embedding

    def kernels(layer: int):
        attention = params[f"layer_{layer}"]["attention"]
        return tuple(attention[name]["kernel"] for name in ("query", "key", "value", "output"))

    query, keys, value, output = kernels(0)
    angle = config.rope_theta ** (-np.arange(pairs) / pairs)
    strength = np.where(np.arange(pairs) < _FAST, _PREVIOUS_SHARPNESS, 0.0) / np.sqrt(half)
    for head in range(previous_heads):
        first, second = head * size + np.arange(pairs), head * size + pairs + np.arange(pairs)
        keys[0, first] += strength
        query[0, first] += strength * np.cos(angle)  # a query turned back by one position
        query[0, second] -= strength * np.sin(angle)
        content = np.arange(max(1, head * size), min(half, (head + 1) * size))
        value[content, content] += 1.0
        output[content, half + content] += _PREVIOUS_GAIN

    query, keys, value, output = kernels(1)
    slow = np.arange(int(_SLOW * pairs), pairs)
    slow = np.concatenate([slow, pairs + slow])
    scale = np.sqrt(_MATCH_SHARPNESS / (half - 1))
    for head in range(config.heads):
        project = rng.normal(size=(half - 1, len(slow))) * scale
        query[1:half, head * size + slow] += project
        keys[half + 1 :, head * size + slow] += project
        start = head % previous_heads * size
        content = np.arange(max(1, start), min(half, start + size))
        inside = head * size + content - start
        value[content, inside] += 1.0
        output[inside, content] += _COPY_GAIN
    return jax.tree.map(jnp.asarray, params)
