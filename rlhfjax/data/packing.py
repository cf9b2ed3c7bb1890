"""Ragged token sequences as arrays of one shape: packed rows to train on, padded prompts to generate from.

Shapes: R rows, T positions, B sequences, P prompt length.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rlhfjax.data.datasets import Pair
from rlhfjax.data.tokenizers import Tokenizer

__all__ = ["Encoded", "Packed", "encode_pairs", "pack", "pad_completions", "pad_prompts"]


class Encoded(NamedTuple):
    """Pairs as token ids; item i of every field belongs to pair `row[i]` of those given."""

    prompts: list[list[int]]  # each ends with the separator
    completions: list[list[int]]  # each ends with EOS
    row: np.ndarray  # int64 [N], ascending
    dropped: int  # pairs left out because they were too long


class Packed(NamedTuple):
    """Rows that hold several sequences each. Inputs are `token_RT[:, :-1]`, targets `token_RT[:, 1:]`.

    `token_RT` is [R, T + 1]. Every other field is [R, T] and its position t belongs to the input t; the two
    masks speak of the target, token t + 1, and are False where it is padding or the first token of another
    sequence.
    """

    token_RT: np.ndarray  # int32
    segment_RT: np.ndarray  # int32: which sequence of the row, from 1; 0 is padding
    position_RT: np.ndarray  # int32: place in the sequence, from 0; 0 on padding
    prompt_RT: np.ndarray  # bool: token t + 1 is of the prompt (its separator included)
    completion_RT: np.ndarray  # bool: token t + 1 is of the completion (its EOS included)

    @property
    def fill(self) -> float:
        """Share of the positions that hold a sequence, in (0, 1]."""
        return float((self.segment_RT > 0).mean())


def encode_pairs(
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    *,
    prompt_length: int,
    completion_length: int,
    drop: bool = False,
) -> Encoded:
    """Each pair as (prompt ids + [sep], completion ids + [eos]).

    prompt_length, completion_length: most tokens of each, separator and EOS counted. A longer pair is a
    ValueError that names it; with `drop` it is left out and counted. An empty text is always a ValueError.
    """
    _check_no_empty(pairs)
    prompts = [ids + [tokenizer.sep_id] for ids in tokenizer.encode_batch([pair[0] for pair in pairs])]
    completions = [ids + [tokenizer.eos_id] for ids in tokenizer.encode_batch([pair[1] for pair in pairs])]
    limits = (("prompt", prompts, prompt_length), ("completion", completions, completion_length))
    fits = np.ones(len(pairs), bool)
    for name, sequences, limit in limits:
        length_N = np.array([len(ids) for ids in sequences], np.int64)
        if not drop and (length_N > limit).any():
            row = int(np.argmax(length_N > limit))
            raise ValueError(
                f"row {row}: the {name} has {length_N[row]} tokens and {name}_length is {limit} "
                f"({int((length_N > limit).sum())} of {len(pairs)} rows are too long); "
                f"raise {name}_length, shorten the text or pass drop=True"
            )
        fits &= length_N <= limit
    kept = np.flatnonzero(fits)
    if not len(kept):
        raise ValueError(
            f"none of {len(pairs)} pairs has at most prompt_length={prompt_length} and "
            f"completion_length={completion_length} tokens; raise them"
        )
    return Encoded([prompts[i] for i in kept], [completions[i] for i in kept], kept, len(pairs) - len(kept))


def pack(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, length: int, pad_id: int
) -> Packed:
    """Lays sequences (prompt + completion) into rows of `length + 1` tokens, none of them cut.

    Best fit decreasing: the longest first, each into the fullest row that still holds it. Deterministic; the
    rows come out roughly from long sequences to short ones, so shuffle rows when drawing batches.
    ValueError if a sequence is longer than `length + 1` or has no target.
    """
    if len(prompts) != len(completions) or len(prompts) == 0:
        raise ValueError(
            f"pack needs as many prompts as completions, at least one: {len(prompts)}, {len(completions)}"
        )
    sizes = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    for i, size in enumerate(sizes):
        if not 2 <= size <= length + 1:
            raise ValueError(
                f"sequence {i} has {size} tokens; a row of length {length} takes 2 to {length + 1}"
            )
    rows = _best_fit_decreasing(sizes, length + 1)
    shape = (len(rows), length)
    packed = Packed(
        token_RT=np.full((len(rows), length + 1), pad_id, np.int32),
        segment_RT=np.zeros(shape, np.int32),
        position_RT=np.zeros(shape, np.int32),
        prompt_RT=np.zeros(shape, bool),
        completion_RT=np.zeros(shape, bool),
    )
    for r, members in enumerate(rows):
        start = 0
        for segment, i in enumerate(members, 1):
            _write(packed, r, start, segment, prompts[i], completions[i])
            start += sizes[i]
    return packed


def pad_prompts(prompts: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts against the right edge: (token_BP int32, mask_BP bool, True on prompt tokens), P = length.

    Padding on the left lets every sequence of a batch generate from the same column.
    """
    lengths = _checked_lengths(prompts, length, "prompt")
    mask_BP = np.arange(length)[None, :] >= length - lengths[:, None]
    return _fill(mask_BP, prompts, pad_id), mask_BP


def pad_completions(
    completions: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Completions against the left edge: (token_BT int32, mask_BT bool, True on their tokens), T = length."""
    lengths = _checked_lengths(completions, length, "completion")
    mask_BT = np.arange(length)[None, :] < lengths[:, None]
    return _fill(mask_BT, completions, pad_id), mask_BT


def _check_no_empty(pairs: Iterable[Pair]) -> None:
    for row, pair in enumerate(pairs):
        for name, text in zip(Pair._fields, pair, strict=True):
            if not text.strip():
                raise ValueError(f"row {row}: empty {name}; fill it or drop the row")


def _best_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Which sequences share a row. `open_rows` is sorted by (room left, row): the best fit is a bisection."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        found = bisect_left(open_rows, (sizes[i], -1))
        if found < len(open_rows):
            room, row = open_rows.pop(found)
            rows[row].append(i)
        else:
            room, row = capacity, len(rows)
            rows.append([i])
        if room > sizes[i]:
            insort(open_rows, (room - sizes[i], row))
    return rows


def _write(
    packed: Packed, row: int, start: int, segment: int, prompt: Sequence[int], completion: Sequence[int]
) -> None:
    """Writes one sequence at column `start`. The last token of a full row is a target only: as an input its
    column does not exist, and the slices drop it."""
    end = start + len(prompt) + len(completion)
    first_target = max(start + len(prompt) - 1, start)  # the input whose target opens the completion
    packed.token_RT[row, start:end] = [*prompt, *completion]
    packed.segment_RT[row, start:end] = segment
    packed.position_RT[row, start:end] = np.arange(min(end, packed.position_RT.shape[1]) - start)
    packed.prompt_RT[row, start:first_target] = True
    packed.completion_RT[row, first_target : end - 1] = True


def _checked_lengths(sequences: Sequence[Sequence[int]], length: int, name: str) -> np.ndarray:
    lengths = np.array([len(ids) for ids in sequences], np.int64)
    for row in np.flatnonzero((lengths > length) | (lengths == 0)):
        if lengths[row] == 0:
            raise ValueError(f"row {row}: the {name} has no tokens")
        raise ValueError(
            f"row {row}: the {name} has {lengths[row]} tokens, {lengths[row] - length} more than {length}"
        )
    return lengths


def _fill(mask: np.ndarray, sequences: Sequence[Sequence[int]], pad_id: int) -> np.ndarray:
    """The sequences, one after another, into the True places of mask."""
    token = np.full(mask.shape, pad_id, np.int32)
    if mask.any():
        token[mask] = np.concatenate([np.asarray(ids, np.int32) for ids in sequences])
    return token
