"""Frozen models in eight or four bits: kernels as integers and scales, read by the same decoder.

A quantised model is for bases that are not trained: adapters on it are (`networks.lora`; QLoRA, arXiv 2305.14314), and
a reference or a reward model needs no training. Gradients pass through its products to what comes before them.

Eight bits: whole numbers to +-127 times a scale of each output. Four bits: NF4 codes (arXiv 2305.14314) times a
bfloat16 scale of each output and group of 32 inputs: 4.5 bits for each number.

Root mean square error of a kernel of normal numbers, relative to it: 0.0065 in eight bits, with 128 inputs; 0.0765 in
four. There NF4 with the largest magnitude as the scale has 0.087, whole numbers with a minimum 0.078 and half a bit
more, symmetric ones 0.097. What that makes of a model's predictions, `quantisation_error` tells. SmolLM2-135M, on 512
tokens of English: the logits change by 4 % in eight bits and 33 % in four, by KL 0.006 and 0.35 nats a token; the
likeliest token is the same at 95 % and 68 % of positions. Four bits cost a model this small much: measure yours.

Shapes: B sequences, T positions, V vocabulary, I inputs, O outputs, G groups of inputs.
"""

import math

import jax
import jax.numpy as jnp

from rlhfjax.networks.attention import causal_mask
from rlhfjax.networks.decoder import LanguageModel
from rlhfjax.networks.layers import INT8, NF4, NF4_VALUES, SCALES, dequantised, projections, with_entries

_GROUP_NF4 = 32
# Scales that are tried for a group, relative to its largest magnitude: the largest number may be cut off for the sake
# of the others, and NF4 is not symmetric, so the sign matters too.
_SCALES_TRIED = tuple(sign * (0.8 + 0.025 * i) for i in range(13) for sign in (1.0, -1.0))


def quantise(params: dict, bits: int = 8, *, group: int | None = None, skip: tuple[str, ...] = ()) -> dict:
    """A decoder's params with the kernels of its projections quantised; all else, embeddings too, is shared as it is.

    Args:
      bits: 8 or 4.
      group: inputs that share a scale; None: all of them in eight bits, 32 in four. A multiple of it, in four bits an
        even one, must be each kernel's inputs.
      skip: names on the way to projections that keep their kernels: "down", "layer_0", "attention".

    Returns params whose projections hold, in place of "kernel", "kernel_int8" int8 [I, O] and "kernel_scale" float32
    [G, O]; or "kernel_nf4" uint8 [I / 2, O], two codes in each, and "kernel_scale" bfloat16 [G, O].

    Raises ValueError for other bits, inputs that are no multiple of the group, a name in `skip` that is nowhere, and
    params that are quantised already or hold no projection.
    """
    if bits not in (8, 4):
        raise ValueError(f"bits={bits} must be 8 or 4")
    there = projections(params)
    names = {name for path in there for name in path}
    if not there or not names.issuperset(skip):
        raise ValueError(f"skip={skip} must name what is on the way to a projection: {sorted(names)}")
    out = params
    for path, entries in there.items():
        if set(path).isdisjoint(skip):
            where = "/".join(path)
            if "kernel" not in entries:
                raise ValueError(f"{where} has no kernel to quantise, only {sorted(entries)}")
            rest = {x: entries[x] for x in entries if x != "kernel"}
            out = with_entries(out, path, rest | _quantised(where, entries["kernel"], bits, group))
    return out


def dequantise(params: dict) -> dict:
    """The params with all quantised kernels as float32 "kernel" again; what is not quantised is shared as it is."""

    out = params
    for path, entries in projections(params).items():
        if SCALES in entries:
            rest = {x: entries[x] for x in entries if x not in (INT8, NF4, SCALES)}
            out = with_entries(out, path, rest | {"kernel": dequantised(entries)})
    return out


def quantisation_error(
    lm: LanguageModel, params: dict, other: dict, token_BT: jax.Array
) -> dict[str, jax.Array]:
    """What quantising did to a model's predictions, at every position of full rows of tokens. Pure; jit it.

    Returns float32 scalars: "logits", root mean square of the change of the logits, relative to their own, both less
    their mean over the vocabulary; "kl", KL(params || other) in nats per token; "agreement", the share of positions
    with the same likeliest token.
    """
    position_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1]), token_BT.shape)
    mask_BTS = causal_mask(jnp.ones(token_BT.shape, bool))

    def logp(params: dict) -> jax.Array:
        hidden_BTD, _ = lm.apply(params, token_BT, position_BT=position_BT, mask_BTS=mask_BTS)
        return jax.nn.log_softmax(lm.logits(params, hidden_BTD), axis=-1)

    def centred(logp_BTV: jax.Array) -> jax.Array:
        return logp_BTV - jnp.mean(logp_BTV, axis=-1, keepdims=True)

    before_BTV, after_BTV = logp(params), logp(other)
    change_BTV = centred(after_BTV) - centred(before_BTV)
    same_BT = jnp.argmax(before_BTV, axis=-1) == jnp.argmax(after_BTV, axis=-1)
    return {
        "logits": jnp.sqrt(jnp.mean(change_BTV**2) / jnp.mean(centred(before_BTV) ** 2)),
        "kl": jnp.mean(jnp.sum(jnp.exp(before_BTV) * (before_BTV - after_BTV), axis=-1)),
        "agreement": jnp.mean(same_BT.astype(jnp.float32)),
    }


def _quantised(name: str, kernel_IO: jax.Array, bits: int, group: int | None) -> dict:
    inputs, outputs = kernel_IO.shape
    size = group or (inputs if bits == 8 else _GROUP_NF4)
    if inputs % size or (bits == 4 and size % 2):
        even = "an even number that divides" if bits == 4 else "a divisor of"
        raise ValueError(
            f"group={size} must be {even} the {inputs} inputs of {name}; give another, or skip it"
        )
    grouped_GIO = kernel_IO.astype(jnp.float32).reshape(inputs // size, size, outputs)
    if bits == 8:
        scale_GO, value_GIO = _whole_numbers(grouped_GIO)
        return {INT8: value_GIO.reshape(inputs, outputs), SCALES: scale_GO}
    scale_GO, code_GIO = _nf4(grouped_GIO)
    low, high = jnp.split(code_GIO, 2, axis=1)
    return {NF4: (low | high << 4).reshape(inputs // 2, outputs), SCALES: scale_GO}


@jax.jit
def _whole_numbers(kernel_GIO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(float32 [G, O] scales, int8 [G, I, O] numbers): the largest magnitude is 127."""
    scale_GO = _nowhere_zero(jnp.max(jnp.abs(kernel_GIO), axis=1) / 127.0)
    return scale_GO, jnp.round(kernel_GIO / scale_GO[:, None]).astype(jnp.int8)


@jax.jit
def _nf4(kernel_GIO: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(bfloat16 [G, O] scales, uint8 [G, I, O] codes): of the scales that are tried the one with the least error."""
    largest_GO = _nowhere_zero(jnp.max(jnp.abs(kernel_GIO), axis=1))

    def codes(scale_GO: jax.Array) -> jax.Array:
        between = (NF4_VALUES[1:] + NF4_VALUES[:-1]) / 2
        relative_GIO = kernel_GIO / scale_GO.astype(jnp.float32)[:, None]
        code_GIO = jnp.zeros(kernel_GIO.shape, jnp.uint8)
        for threshold in between:
            code_GIO = code_GIO + (relative_GIO > threshold).astype(jnp.uint8)
        return code_GIO

    def error(scale_GO: jax.Array) -> jax.Array:
        values_GIO = jnp.asarray(NF4_VALUES)[codes(scale_GO).astype(jnp.int32)]
        return jnp.sum((values_GIO * scale_GO.astype(jnp.float32)[:, None] - kernel_GIO) ** 2, axis=1)

    def better(best: tuple[jax.Array, jax.Array], tried: jax.Array):
        scale_GO = (largest_GO * tried).astype(jnp.bfloat16)  # rounded first: the codes fit what is stored
        error_GO = error(scale_GO)
        less_GO = error_GO < best[1]
        return (jnp.where(less_GO, scale_GO, best[0]), jnp.minimum(error_GO, best[1])), None

    start = (largest_GO.astype(jnp.bfloat16), jnp.full(largest_GO.shape, math.inf))
    (scale_GO, _), _ = jax.lax.scan(better, start, jnp.asarray(_SCALES_TRIED))
    return scale_GO, codes(scale_GO)


def _nowhere_zero(scale_GO: jax.Array) -> jax.Array:
    return jnp.where(scale_GO > 0, scale_GO, 1.0)
