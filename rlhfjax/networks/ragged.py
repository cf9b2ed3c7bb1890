"""Ragged completions without their padding: sequences packed into fewer rows, all inside the compiled program.

Shapes: B prompts, G completions of each, N = B * G sequences (a prompt and one completion), P prompt length, C
completion length, R rows, L = P + C tokens of a row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.networks.attention import SegmentMask


class Places(NamedTuple):
    """Where each sequence begins."""

    row_N: jax.Array  # int32
    start_N: jax.Array  # int32
    fits: jax.Array  # bool [], False where the rows do not hold all; the places are void then


class PackedRows(NamedTuple):
    """All sequences in R rows."""

    token_RL: jax.Array  # int32
    position_RL: jax.Array  # int32, from 0 in each sequence
    segment_RL: jax.Array  # int32, the sequence counted from 1; 0 = padding
    index_BGC: jax.Array  # int32, of every completion token among the R * L, of padding any

    @property
    def mask(self) -> SegmentMask:
        """Which token sees which."""
        return SegmentMask(self.segment_RL)


def first_fit(length_N: jax.Array, rows: int, row_length: int) -> Places:
    """Places sequences in rows, the longest first, each in the first row that has room (first-fit decreasing).

    It needs at most 11/9 of the fewest rows possible, and one more (Johnson 1973).
    """

    def place(used_R: jax.Array, length: jax.Array):
        room_R = used_R + length <= row_length
        row = jnp.argmax(room_R)
        return used_R.at[row].add(length), (row, used_R[row], room_R[row])

    order_N = jnp.argsort(-length_N)
    _, placed = jax.lax.scan(place, jnp.zeros(rows, jnp.int32), length_N[order_N].astype(jnp.int32))
    row_N, start_N, room_N = (jnp.zeros_like(x).at[order_N].set(x) for x in placed)
    return Places(row_N.astype(jnp.int32), start_N, jnp.all(room_N))


def pack(
    prompt_BP: jax.Array,
    prompt_mask_BP: jax.Array,
    completion_BGC: jax.Array,
    completion_mask_BGC: jax.Array,
    rows: int,
) -> tuple[PackedRows, jax.Array]:
    """(the rows, whether all sequences fit); the prompt stands before each of its completions."""
    batch, samples, completion = completion_BGC.shape
    prompt = prompt_BP.shape[1]
    count, row_length = batch * samples, prompt + completion

    def of_sequences(of_prompt_BP: jax.Array, of_completion_BGC: jax.Array) -> jax.Array:
        return jnp.concatenate(
            [jnp.repeat(of_prompt_BP, samples, axis=0), of_completion_BGC.reshape(count, completion)], axis=1
        )

    token_NL = of_sequences(prompt_BP, completion_BGC)
    real_NL = of_sequences(prompt_mask_BP, completion_mask_BGC)
    places = first_fit(jnp.sum(real_NL, axis=1, dtype=jnp.int32), rows, row_length)
    position_NL = jnp.cumsum(real_NL, axis=1, dtype=jnp.int32) - 1
    index_NL = (places.row_N * row_length + places.start_N)[:, None] + position_NL
    index_NL = jnp.where(real_NL, index_NL, rows * row_length)  # padding goes nowhere

    def scattered(value_NL: jax.Array) -> jax.Array:
        flat = jnp.zeros(rows * row_length, jnp.int32).at[index_NL].set(value_NL, mode="drop")
        return flat.reshape(rows, row_length)

    number_NL = jnp.broadcast_to(jnp.arange(1, count + 1, dtype=jnp.int32)[:, None], token_NL.shape)
    index_BGC = jnp.minimum(index_NL[:, prompt:], rows * row_length - 1).reshape(completion_BGC.shape)
    packed = PackedRows(scattered(token_NL), scattered(position_NL), scattered(number_NL), index_BGC)
    return packed, places.fits


def rows_for(share: float, sequences: int) -> int:
    """Rows that hold `share` of the tokens of full rows, at least 1."""
    return max(1, min(sequences, round(share * sequences)))
