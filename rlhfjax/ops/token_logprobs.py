"""Log-probability and entropy of tokens, and the KL divergence of two policies, from hidden states, without an
array of rows x vocabulary.

A row is one position. Rows are taken in chunks: a chunk's logits are made, used and dropped, and made again
in the backward pass, so that peak memory does not grow with the number of rows. Shapes: N rows, C rows of one
chunk, V vocabulary, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhfjax.ops._backend import backend
from rlhfjax.ops._check import as_index, as_number, describe, require_float, require_rank

# A chunk holds at most this many logits (on a CPU 4 MiB in float32, within its cache; elsewhere 1 GiB) ...
CHUNK_LOGITS = {"cpu": 2**20, "accelerator": 2**28}
# ... but no fewer rows than this: each chunk reads the embedding and updates its gradient once, [V, D] both,
# and with fewer rows than this that traffic costs more than the arithmetic.
CHUNK_ROWS = {"cpu": 256, "accelerator": 2048}


class TokenLogprobs(NamedTuple):
    """float32 arrays of the tokens' shape, in nats."""

    logp: Array  # log-probability of the token
    entropy: Array  # entropy of the distribution it was drawn from


def token_logprobs(
    hidden: ArrayLike,
    embedding: ArrayLike,
    token: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> TokenLogprobs:
    """Log-probability of each token, and entropy, under `softmax(hidden @ embedding.T / temperature)`.

    Equals `jax.nn.log_softmax` of all logits at once, and its gradient, to rounding. With float32 inputs
    everything is float32. With bfloat16 hidden states the embedding is rounded to bfloat16 too, whatever its type;
    logits are accumulated and normalised in float32; in the backward pass their cotangent is rounded to bfloat16 for
    the two matrix products, and the embedding's gradient is summed over chunks in float32.

    Args:
      hidden: float [..., D].
      embedding: float [V, D], the output matrix.
      token: int [...], ids in [0, V); any other id gives NaN. Ids at masked positions must be valid too.
      temperature: scalar or broadcastable to token's shape, > 0, may be traced. Gets no gradient.
      softcap: static; logits x become softcap * tanh(x / softcap) before the temperature (Gemma 2, arXiv 2408.00118).
      chunk_size: rows of one chunk. None: on a CPU as many as make 2^20 logits, at least 256; on other devices 2^28
        and 2048. If all rows fit in one chunk, no loop is emitted and the logits are kept for the backward pass.

    Returns:
      logp, entropy: float32 [...]. Reverse-mode differentiable with respect to hidden and embedding, once.
    """
    hidden, embedding = _hidden_and_embedding(hidden, embedding)
    shape, rows, vocabulary = hidden.shape[:-1], hidden[..., 0].size, embedding.shape[0]
    token = as_index("token", token, shape).reshape(-1)
    inverse_temperature_N = _inverse_temperature(temperature, shape)
    chunks = _chunks(rows, chunk_size, vocabulary)
    logp, entropy = _rows(
        hidden.reshape(rows, hidden.shape[-1]), embedding, token, inverse_temperature_N, chunks, softcap
    )
    in_vocabulary = (token >= 0) & (token < vocabulary)
    return TokenLogprobs(jnp.where(in_vocabulary, logp, jnp.nan).reshape(shape), entropy.reshape(shape))


def token_kl(
    hidden: ArrayLike,
    embedding: ArrayLike,
    hidden_ref: ArrayLike,
    embedding_ref: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Array:
    """Exact `KL(pi || ref)` over the vocabulary at each position, in nats.

    pi = softmax(hidden @ embedding.T / temperature), ref likewise. Equals `categorical_kl` of all logits at once,
    and its gradient, to rounding; float types as in `token_logprobs`.

    Args:
      hidden: float [..., D].
      embedding: float [V, D], the output matrix.
      hidden_ref: float [..., E], of the reference, whose width may be another.
      embedding_ref: float [V, E].
      temperature: scalar or broadcastable to [...], > 0, may be traced. Gets no gradient.
      softcap: of the logits of both, as in `token_logprobs`.
      chunk_size: rows of one chunk, as in `token_logprobs`; a chunk holds the logits of both policies.

    Returns:
      float32 [...]. Reverse-mode differentiable with respect to hidden and embedding, once; the reference is a
      constant and gets gradient 0.
    """
    hidden, embedding = _hidden_and_embedding(hidden, embedding)
    hidden_ref, embedding_ref = _hidden_and_embedding(hidden_ref, embedding_ref, "_ref")
    shape, rows, vocabulary = hidden.shape[:-1], hidden[..., 0].size, embedding.shape[0]
    if hidden_ref.shape[:-1] != shape:
        raise ValueError(
            f"hidden_ref must have the positions of hidden, {describe(hidden)}, got {describe(hidden_ref)}"
        )
    if embedding_ref.shape[0] != vocabulary:
        raise ValueError(
            f"embedding_ref must have the vocabulary of embedding, {describe(embedding)}, "
            f"got {describe(embedding_ref)}"
        )
    chunks = _chunks(rows, chunk_size, 2 * vocabulary)
    kl = _kl_rows(
        hidden.reshape(rows, hidden.shape[-1]),
        embedding,
        jax.lax.stop_gradient(hidden_ref).reshape(rows, hidden_ref.shape[-1]),
        jax.lax.stop_gradient(embedding_ref),
        _inverse_temperature(temperature, shape),
        chunks,
        softcap,
    )
    return kl.reshape(shape)


def _hidden_and_embedding(hidden: ArrayLike, embedding: ArrayLike, suffix: str = "") -> tuple[Array, Array]:
    """The two as arrays that fit each other."""
    hidden = require_float("hidden" + suffix, hidden)
    embedding = require_float("embedding" + suffix, embedding)
    require_rank("hidden" + suffix, hidden, 1, "[..., D]")
    if embedding.ndim != 2 or embedding.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"embedding{suffix} must have shape [V, D] with D = {hidden.shape[-1]}, the width of "
            f"hidden{suffix}, got {describe(embedding)}"
        )
    # Under `shard_map` the gradient of a replicated embedding varies over devices, as the rows do. This zero
    # marks the embedding as varying too, and JAX itself then adds the sum over devices, outside of `_rows`.
    return hidden, embedding + jnp.zeros_like(hidden, shape=(), dtype=embedding.dtype)


def _inverse_temperature(temperature: ArrayLike, shape: tuple[int, ...]) -> Array:
    temperature = as_number("temperature", temperature, jnp.shape(temperature))
    return (1 / jnp.broadcast_to(temperature, shape)).reshape(-1)


def _chunks(rows: int, chunk_size: int | None, logits_per_row: int) -> int:
    """Number of chunks: the least that suffices or, below twice that, the next that divides the rows.

    Rows are padded to a multiple of it; a divisor needs no padding, which would shift rows between devices.
    """
    if chunk_size is None:
        device = "cpu" if backend() == "cpu" else "accelerator"
        chunk_size = max(CHUNK_LOGITS[device] // logits_per_row, CHUNK_ROWS[device])
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    least = max(1, -(-rows // chunk_size))
    return next((n for n in range(least, 2 * least) if rows % n == 0), least)


def _rows_value(
    hidden_ND: Array,
    embedding_VD: Array,
    token_N: Array,
    inverse_temperature_N: Array,
    chunks: int,
    softcap: float | None,
) -> tuple[Array, Array]:
    return _rows_forward(hidden_ND, embedding_VD, token_N, inverse_temperature_N, chunks, softcap)[0]


def _rows_forward(hidden_ND, embedding_VD, token_N, inverse_temperature_N, chunks, softcap):
    def of_chunk(hidden_CD, token_C, inverse_temperature_C):
        logits_CV = _logits(hidden_CD, embedding_VD, inverse_temperature_C, softcap)
        return _statistics(logits_CV, token_C), logits_CV

    rows = (hidden_ND, token_N, inverse_temperature_N)
    if chunks == 1:
        (logp_N, entropy_N, log_normaliser_N), logits_NV = of_chunk(*rows)
    else:
        statistics = jax.lax.map(lambda row: of_chunk(*row)[0], _split(rows, chunks))
        logp_N, entropy_N, log_normaliser_N = _join(statistics, token_N.size)
        logits_NV = None
    residuals = (rows, embedding_VD, entropy_N, log_normaliser_N, logits_NV)
    return (logp_N, entropy_N), residuals


def _rows_backward(chunks, softcap, residuals, cotangents):
    rows, embedding_VD, entropy_N, log_normaliser_N, logits_NV = residuals

    def of_chunk(rows, logits_CV=None):
        (hidden_CD, token_C, inverse_temperature_C), entropy_C, log_normaliser_C, d_logp_C, d_entropy_C = rows
        if logits_CV is None:
            logits_CV = _logits(hidden_CD, embedding_VD, inverse_temperature_C, softcap)
        logp_CV = logits_CV - log_normaliser_C[:, None]
        # d logp / d logit = onehot - p;  d entropy / d logit = -p (log p + entropy)
        # One-hot by comparison: it fuses with the rest, which a scatter into [C, V] does not.
        is_token_CV = jax.lax.broadcasted_iota(token_C.dtype, logp_CV.shape, 1) == token_C[:, None]
        from_token_CV = jnp.where(is_token_CV, d_logp_C[:, None], 0)
        surprise_CV = logp_CV + entropy_C[:, None]
        from_all_CV = jnp.exp(logp_CV) * (d_logp_C[:, None] + d_entropy_C[:, None] * surprise_CV)
        d_logits_CV = (from_token_CV - from_all_CV) * _slope(logits_CV, inverse_temperature_C, softcap)
        d_logits_CV = d_logits_CV.astype(hidden_CD.dtype)
        d_hidden_CD = _matmul("cv,vd->cd", d_logits_CV, embedding_VD).astype(hidden_CD.dtype)
        return d_hidden_CD, _matmul("cv,cd->vd", d_logits_CV, hidden_CD)

    hidden_ND, rows = rows[0], (rows, entropy_N, log_normaliser_N, *cotangents)
    d_hidden_ND, d_embedding_VD = _over_chunks(of_chunk, hidden_ND, embedding_VD, rows, logits_NV, chunks)
    return d_hidden_ND, d_embedding_VD, None, None


_rows = jax.custom_vjp(_rows_value, nondiff_argnums=(4, 5))
_rows.defvjp(_rows_forward, _rows_backward)


def _kl_rows_value(
    hidden_ND: Array,
    embedding_VD: Array,
    hidden_ref_NE: Array,
    embedding_ref_VE: Array,
    inverse_temperature_N: Array,
    chunks: int,
    softcap: float | None,
) -> Array:
    arguments = (hidden_ND, embedding_VD, hidden_ref_NE, embedding_ref_VE, inverse_temperature_N)
    return _kl_rows_forward(*arguments, chunks, softcap)[0]


def _kl_rows_forward(
    hidden_ND, embedding_VD, hidden_ref_NE, embedding_ref_VE, inverse_temperature_N, chunks, softcap
):
    def of_chunk(rows):
        logp_CV, log_ratio_CV, slope = _log_ratio(rows, embedding_VD, embedding_ref_VE, softcap)
        # Equal policies may differ by rounding, but a divergence is never negative.
        kl_C = jnp.maximum(jnp.sum(jnp.exp(logp_CV) * log_ratio_CV, axis=-1), 0)
        return kl_C, (logp_CV, log_ratio_CV, slope)

    rows = (hidden_ND, hidden_ref_NE, inverse_temperature_N)
    if chunks == 1:
        kl_N, kept = of_chunk(rows)
    else:
        kl_N = _join(jax.lax.map(lambda rows: of_chunk(rows)[0], _split(rows, chunks)), hidden_ND.shape[0])
        kept = None
    return kl_N, (rows, embedding_VD, embedding_ref_VE, kl_N, kept)


def _kl_rows_backward(chunks, softcap, residuals, d_kl_N):
    rows, embedding_VD, embedding_ref_VE, kl_N, kept = residuals

    def of_chunk(rows, kept=None):
        (hidden_CD, *_), kl_C, d_kl_C = rows
        logp_CV, log_ratio_CV, slope = kept or _log_ratio(rows[0], embedding_VD, embedding_ref_VE, softcap)
        # d KL / d logit = p (log p / q - KL)
        d_logits_CV = d_kl_C[:, None] * slope * jnp.exp(logp_CV) * (log_ratio_CV - kl_C[:, None])
        d_logits_CV = d_logits_CV.astype(hidden_CD.dtype)
        d_hidden_CD = _matmul("cv,vd->cd", d_logits_CV, embedding_VD).astype(hidden_CD.dtype)
        return d_hidden_CD, _matmul("cv,cd->vd", d_logits_CV, hidden_CD)

    hidden_ND, rows = rows[0], (rows, kl_N, d_kl_N)
    d_hidden_ND, d_embedding_VD = _over_chunks(of_chunk, hidden_ND, embedding_VD, rows, kept, chunks)
    return d_hidden_ND, d_embedding_VD, None, None, None


_kl_rows = jax.custom_vjp(_kl_rows_value, nondiff_argnums=(5, 6))
_kl_rows.defvjp(_kl_rows_forward, _kl_rows_backward)


def _log_ratio(
    rows, embedding_VD: Array, embedding_ref_VE: Array, softcap: float | None
) -> tuple[Array, Array, Array]:
    """log p and log p - log q, each [C, V], and the `_slope` of p's logits."""
    hidden_CD, hidden_ref_CE, inverse_temperature_C = rows
    logits_CV = _logits(hidden_CD, embedding_VD, inverse_temperature_C, softcap)
    logp_CV = jax.nn.log_softmax(logits_CV)
    logp_ref_CV = jax.nn.log_softmax(_logits(hidden_ref_CE, embedding_ref_VE, inverse_temperature_C, softcap))
    return logp_CV, logp_CV - logp_ref_CV, _slope(logits_CV, inverse_temperature_C, softcap)


def _over_chunks(of_chunk, hidden_ND, embedding_VD, rows, kept, chunks):
    """Gradients of hidden and embedding: `of_chunk(rows, kept)` gives a chunk's, the embedding's are added."""
    if chunks == 1:
        d_hidden_ND, d_embedding_VD = of_chunk(rows, kept)
    else:

        def step(d_embedding_VD, rows):
            d_hidden_CD, of_this_chunk_VD = of_chunk(rows)
            return d_embedding_VD + of_this_chunk_VD, d_hidden_CD

        zeros_VD = jnp.zeros_like(embedding_VD, dtype=_accumulator(hidden_ND))
        d_embedding_VD, d_hidden = jax.lax.scan(step, zeros_VD, _split(rows, chunks))
        d_hidden_ND = _join(d_hidden, hidden_ND.shape[0])
    return d_hidden_ND, d_embedding_VD.astype(embedding_VD.dtype)


def _logits(
    hidden_CD: Array, embedding_VD: Array, inverse_temperature_C: Array, softcap: float | None
) -> Array:
    logits_CV = _matmul("cd,vd->cv", hidden_CD, embedding_VD)
    if softcap is not None:
        logits_CV = softcap * jnp.tanh(logits_CV / softcap)
    return logits_CV * inverse_temperature_C[:, None]


def _slope(logits_CV: Array, inverse_temperature_C: Array, softcap: float | None) -> Array:
    """Derivative of a logit by what the matrix product gave, [C, V] or [C, 1]."""
    inverse_temperature_C1 = inverse_temperature_C[:, None]
    if softcap is None:
        return inverse_temperature_C1
    return inverse_temperature_C1 * (1 - jnp.square(logits_CV / (softcap * inverse_temperature_C1)))


def _statistics(logits_CV: Array, token_C: Array) -> tuple[Array, Array, Array]:
    """Log-probability of the token, entropy, and log of the normaliser, each [C]."""
    highest_C = jnp.max(logits_CV, axis=-1)
    shifted_CV = logits_CV - highest_C[:, None]
    weight_CV = jnp.exp(shifted_CV)
    total_C = jnp.sum(weight_CV, axis=-1)
    log_total_C = jnp.log(total_C)
    entropy_C = log_total_C - jnp.sum(weight_CV * shifted_CV, axis=-1) / total_C
    logit_C = jnp.take_along_axis(shifted_CV, token_C[:, None], axis=-1, mode="clip")[:, 0]
    return logit_C - log_total_C, entropy_C, highest_C + log_total_C


def _matmul(subscripts: str, a: Array, b: Array) -> Array:
    """In the type of `a`, accumulated in float32 or wider: the embedding's own type decides nothing."""
    return jnp.einsum(subscripts, a, b.astype(a.dtype), preferred_element_type=_accumulator(a))


def _accumulator(a: Array) -> jnp.dtype:
    return jnp.promote_types(a.dtype, jnp.float32)


def _split(rows, chunks: int):
    """Arrays [N, ...] as [chunks, C, ...], padded with zeros.

    Chunk i takes the rows i, i + chunks, i + 2 chunks, ...: where rows are split over devices in blocks,
    every device then has its share of every chunk. (Chunks of consecutive rows would each lie on one device,
    and all would compute all.)
    """

    def of_array(x: Array) -> Array:
        padding = [(0, -x.shape[0] % chunks)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(-1, chunks, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(of_array, rows)


def _join(split_rows, rows: int):
    """The inverse of `_split`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:rows], split_rows)
