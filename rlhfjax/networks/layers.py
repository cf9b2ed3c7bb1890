"""The layers that decoders are made of: norms, and projections that may be adapted (LoRA), quantised or laid out for
decoding."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.ops import backend


class Norm(nn.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm over the last axis, in float32.

    kind: "rmsnorm" or "layernorm", which has a bias.
    offset: whether it multiplies by 1 + scale; the scale then starts at 0.
    """

    kind: str
    epsilon: float
    offset: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start, shape = nn.initializers.zeros if self.offset else nn.initializers.ones, (x.shape[-1],)
        scale = self.param("scale", start, shape).astype(jnp.float32)
        scale = 1.0 + scale if self.offset else scale
        x32 = x.astype(jnp.float32)
        if self.kind == "layernorm":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(variance + self.epsilon) * _along_last(scale, x32)
        if self.kind == "layernorm":
            x32 = x32 + _along_last(self.param("bias", nn.initializers.zeros, shape), x32)
        return x32.astype(x.dtype)


def _along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))


# What a projection's params may hold in place of a kernel [inputs, outputs]:
TRANSPOSED = "kernel_transposed"  # [outputs, inputs], made by `for_decoding`
INT8 = "kernel_int8"  # int8 [inputs, outputs], beside SCALES
NF4 = "kernel_nf4"  # uint8 [inputs / 2, outputs], two codes in each, beside SCALES
SCALES = "kernel_scale"  # float [groups, outputs]: group i are the inputs from i * inputs / groups on

# What it may hold besides: output += ((x @ a) @ b) * scale (LoRA, arXiv 2106.09685).
LORA_A = "lora_a"  # float [inputs, rank]
LORA_B = "lora_b"  # float [rank, outputs]
LORA_SCALE = "lora_scale"  # float []

# The sixteen values of the four-bit NormalFloat (arXiv 2305.14314, appendix E).
NF4_VALUES = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
    + [-0.28444138169288635, -0.18477343022833334, -0.09105003625154495, 0.0]
    + [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)


def matrix_first(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """rows @ matrix.T for few rows, in their type.

    A product of few rows with a great matrix is limited by how the matrix is read. XLA's CPU backend takes 0.6 of the
    time where the matrix is the left factor and both lie row by row; without the barriers it undoes the transposes.
    """
    barrier = jax.lax.optimization_barrier
    return barrier(matrix @ barrier(rows.T)).T


def dequantised(stored: dict, dtype: Any = jnp.float32) -> jax.Array:
    """The kernel [inputs, outputs] that INT8 or NF4 with SCALES stand for, in `dtype`."""
    scale_GO = stored[SCALES].astype(jnp.float32)
    groups, outputs = scale_GO.shape
    if NF4 in stored:
        packed_GIO = stored[NF4].astype(jnp.uint8).reshape(groups, -1, outputs)
        # The low halves of the bytes are the first half of their group.
        code_GIO = jnp.concatenate([packed_GIO & 15, packed_GIO >> 4], axis=1)
        value_GIO = jnp.asarray(NF4_VALUES)[code_GIO.astype(jnp.int32)]
    else:
        value_GIO = stored[INT8].astype(jnp.float32).reshape(groups, -1, outputs)
    return (value_GIO * scale_GO[:, None]).reshape(-1, outputs).astype(dtype)


# Differentiated by hand: the backward pass dequantises once more. What autodiff would keep from the forward pass is
# every layer's kernel in full. The stored numbers get no gradient.
@jax.custom_vjp
def _quantised_product(rows: jax.Array, stored: dict) -> jax.Array:
    """rows [N, inputs] @ the kernel, in the rows' type."""

    def product(part: dict) -> jax.Array:
        if INT8 in part and part[SCALES].shape[0] == 1:
            # Scaled after the product, the integers are exact in any type that computes.
            out = jnp.matmul(rows, part[INT8].astype(rows.dtype), preferred_element_type=jnp.float32)
            return (out * part[SCALES].astype(jnp.float32)).astype(rows.dtype)
        return rows @ dequantised(part, rows.dtype)

    return _in_parts(product, stored, axis=1)


def _quantised_product_backward(stored: dict, d_out: jax.Array) -> tuple[jax.Array, None]:
    # Behind a barrier, or XLA would keep the forward pass's kernel for it.
    stored, d_out = jax.lax.optimization_barrier((stored, d_out))

    def product(part: dict) -> jax.Array:
        if INT8 in part and part[SCALES].shape[0] == 1:
            scaled = (d_out * part[SCALES].astype(jnp.float32)).astype(d_out.dtype)
            return jnp.matmul(scaled, part[INT8].T.astype(d_out.dtype))
        return d_out @ dequantised(part, d_out.dtype).T

    return _in_parts(product, stored, axis=0), None


_quantised_product.defvjp(
    lambda rows, stored: (_quantised_product(rows, stored), stored), _quantised_product_backward
)


def _in_parts(product: Callable[[dict], jax.Array], stored: dict, axis: int) -> jax.Array:
    """[N, ...]: `product` of a kernel that is cut along an axis, put together along the last.

    XLA's CPU backend dequantises all layers before it needs the first, barriers or not; not so within a loop. There a
    kernel is computed in two halves, where it can be halved.
    """
    parts, groups = 2, stored[SCALES].shape[0]
    # Four bits are cut between groups only, whose halves share bytes.
    uncut = {SCALES} if axis == 0 and groups == 1 and INT8 in stored else set()
    halves = all(x.shape[axis] % parts == 0 for name, x in stored.items() if name not in uncut)
    if backend() != "cpu" or not halves:
        return product(stored)

    def one(i: jax.Array) -> jax.Array:
        def cut(x: jax.Array) -> jax.Array:
            size = x.shape[axis] // parts
            return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

        return product({name: x if name in uncut else cut(x) for name, x in stored.items()})

    out = jnp.moveaxis(jax.lax.map(one, jnp.arange(parts)), 0, 1)
    return out.reshape(out.shape[0], -1)


class Projection(nn.Module):
    """x @ kernel (+ bias): kernel [inputs, outputs], so that the optimiser and LoRA see plain matrices.

    Params may hold a stand-in for the kernel, which gets no gradient where it is quantised, and an adapter beside it
    (LoRA), computed in the type of x.

    flat: whether x is taken as one matrix. On a CPU the gradient of a rank-3 product copies its operands, and takes
      twice the time; but where the tokens of a row are split over devices, a matrix of all of them is gathered.
    """

    outputs: int
    bias: bool
    stddev: float
    flat: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1]) if self.flat else x
        names = (TRANSPOSED, INT8, NF4, SCALES, LORA_A, LORA_B, LORA_SCALE)
        stored = {x: self.get_variable("params", x) for x in names if self.has_variable("params", x)}
        if TRANSPOSED in stored:
            out = matrix_first(stored[TRANSPOSED], x.reshape(-1, x.shape[-1]))
            out = out.reshape(*rows.shape[:-1], self.outputs)
        elif INT8 in stored or NF4 in stored:
            kernel = {name: stored[name] for name in (INT8, NF4, SCALES) if name in stored}
            out = _quantised_product(x.reshape(-1, x.shape[-1]), kernel)
            out = out.reshape(*rows.shape[:-1], self.outputs)
        else:
            kernel = self.param("kernel", nn.initializers.normal(self.stddev), (x.shape[-1], self.outputs))
            out = rows @ kernel.astype(x.dtype)
        if LORA_A in stored:
            if LORA_SCALE not in stored:
                raise ValueError(
                    f"{self.name} has a LoRA adapter without its scale: give `with_adapters(base, adapters)`"
                )
            change = (rows @ stored[LORA_A].astype(x.dtype)) @ stored[LORA_B].astype(x.dtype)
            out = out + change * stored[LORA_SCALE].astype(x.dtype)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.outputs,))
            out = out + _along_last(bias.astype(x.dtype), out)
        return out.reshape(*x.shape[:-1], self.outputs)


# The names of a decoder's projections, in its layers' "attention" and "mlp".
PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")


def projections(params: dict, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], dict]:
    """The params of all projections of a decoder, by their paths: ("layer_0", "attention", "query") and so on."""
    found: dict[tuple[str, ...], dict] = {}
    for name, value in params.items():
        if not isinstance(value, dict):
            continue
        if name in PROJECTIONS and not value.keys().isdisjoint({"kernel", TRANSPOSED, INT8, NF4}):
            found[(*path, name)] = value
        else:
            found |= projections(value, (*path, name))
    return found


def with_entries(params: dict, path: tuple[str, ...], entries: dict) -> dict:
    """The params with `entries` at a path, whose dictionaries are made where there are none. No array is copied."""
    if not path:
        return entries
    return params | {path[0]: with_entries(params.get(path[0], {}), path[1:], entries)}


def kernel_shape(entries: dict) -> tuple[int, int]:
    """(inputs, outputs) of a projection, whatever its kernel is stored as."""
    if TRANSPOSED in entries:
        outputs, inputs = entries[TRANSPOSED].shape
    elif NF4 in entries:
        halves, outputs = entries[NF4].shape
        inputs = 2 * halves
    else:
        inputs, outputs = entries[INT8 if INT8 in entries else "kernel"].shape
    return inputs, outputs
