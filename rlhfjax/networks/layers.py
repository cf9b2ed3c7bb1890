"""The layers that decoders are made of: norms, and projections that may be adapted (LoRA), quantised or laid out for
decoding."""

import flax.linen as nn
import jax
import jax.numpy as jnp


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


TRANSPOSED = "kernel_transposed"  # [outputs, inputs], in place of a kernel; made by `for_decoding`


def matrix_first(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """rows @ matrix.T for few rows, in their type.

    A product of few rows with a great matrix is limited by how the matrix is read. XLA's CPU backend takes 0.6 of the
    time where the matrix is the left factor and both lie row by row; without the barriers it undoes the transposes.
    """
    barrier = jax.lax.optimization_barrier
    return barrier(matrix @ barrier(rows.T)).T


class Projection(nn.Module):
    """x @ kernel (+ bias): kernel [inputs, outputs], so that the optimiser and LoRA see plain matrices."""

    outputs: int
    bias: bool
    stddev: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # As one matrix: on CPU the gradient of a rank-3 product copies its operands, and takes twice the time.
        rows = x.reshape(-1, x.shape[-1])
        if self.has_variable("params", TRANSPOSED):
            out = matrix_first(self.get_variable("params", TRANSPOSED), rows)
        else:
            kernel = self.param("kernel", nn.initializers.normal(self.stddev), (x.shape[-1], self.outputs))
            out = rows @ kernel.astype(x.dtype)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.outputs,))
            out = out + _along_last(bias.astype(x.dtype), out)
        return out.reshape(*x.shape[:-1], self.outputs)
