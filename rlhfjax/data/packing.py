"""Ragged token sequences as arrays of one shape: packed rows to train on, padded prompts to generate from.

Shapes: R rows, T positions, B sequences, P prompt length.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlhfjax.data.datasets import Pair
from rlhfjax.data.tokenizers import Tokenizer

__all__ = ["Encoded", "Packed", "encode_pairs", "pack", "pad_completions", "pad_prompts"]


class Encoded(NamedTuple):
    """Pairs as token ids; item i of every field belongs to pair `row[i]` of those given."""

    prompts: list[list[int]]  # each ends with the separator, where the tokenizer has one
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
    prompt_RT: (
        np.ndarray
    )  # bool: token t + 1 is of the prompt (its separator included), or else not to be learnt
    completion_RT: np.ndarray  # bool: token t + 1 is of the completion (its EOS included) and to be learnt

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
    """Each pair as (prefix + prompt ids + [sep], completion ids + [eos]).

    The prefix, such as BOS, is that of the tokenizer; one without the role "sep", as pretrained models have, puts
    nothing between prompt and completion, so a text wants its own white space there.

    prompt_length, completion_length: most tokens of each, separator and EOS counted. A longer pair is a
    ValueError that names it; with `drop` it is left out and counted. An empty text is always a ValueError.
    """
    _check_no_empty(pairs)
    before = list(tokenizer.prefix_ids)
    after = [tokenizer.special_ids["sep"]] if "sep" in tokenizer.special_ids else []
    prompts = [before + ids + after for ids in tokenizer.encode_batch([pair[0] for pair in pairs])]
    completions = [ids + [tokenizer.eos_id] for ids in tokenizer.encode_batch([pair[1] for pair in pairs])]
    limits = {"prompt": (prompts, prompt_length), "completion": (completions, completion_length)}
    kept = fitting_rows(limits, drop=drop)
    return Encoded([prompts[i] for i in kept], [completions[i] for i in kept], kept, len(pairs) - len(kept))


def fitting_rows(
    limits: Mapping[str, tuple[Sequence[Sequence[int]], int]], *, drop: bool, rows: str = "pairs"
) -> np.ndarray:
    """Rows whose sequences all fit: int64, ascending. `limits`: name -> (a sequence of each row, most tokens).

    Without `drop` a row that does not fit is a ValueError that names it, and the argument `name`_length. `rows`: what
    a message calls them.
    """
    fits = np.ones(max(len(sequences) for sequences, _ in limits.values()), bool)
    for name, (sequences, limit) in limits.items():
        length_N = np.array([len(ids) for ids in sequences], np.int64)
        if not drop and (length_N > limit).any():
            row = int(np.argmax(length_N > limit))
            raise ValueError(
                f"row {row}: the {name} has {length_N[row]} tokens and {name}_length is {limit} "
                f"({int((length_N > limit).sum())} of {len(fits)} rows are too long); "
                f"raise {name}_length, shorten the text or pass drop=True"
            )
        fits &= length_N <= limit
    if not fits.any():
        asked = " and ".join(f"{name}_length={limit}" for name, (_, limit) in limits.items())
        raise ValueError(f"none of {len(fits)} {rows} has at most {asked} tokens; raise them")
    return np.flatnonzero(fits)


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    length: int,
    pad_id: int,
    masks: Sequence[Sequence[bool] | np.ndarray] | None = None,
) -> Packed:
    """Lays sequences (prompt + completion) into rows of `length + 1` tokens, none of them cut.

    masks: which tokens of each completion are learnt, bool, as long as it; None: all. A conversation of several turns
    is a completion without a prompt, its mask True on the assistant's tokens. `pad_id` may be any id, EOS too.

    Best fit decreasing: the longest first, each into the fullest row that still holds it. Deterministic; the
    rows come out roughly from long sequences to short ones, so shuffle rows when drawing batches.
    ValueError if a sequence is longer than `length + 1` or has no target.
    """
    if len(prompts) != len(completions) or len(prompts) == 0:
        raise ValueError(
            f"pack needs as many prompts as completions, at least one: {len(prompts)}, {len(completions)}"
        )
    _check_masks(completions, masks)
    sizes = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    for i, size in enumerate(sizes):
        if not 2 <= size <= length + 1:
            raise ValueError(
                f"sequence {i} has {size} tokens; a row of length {length} takes 2 to {length + 1}"
            )
    rows = _best_fit_decreasing(sizes, length + 1)
    packed = _empty(len(rows), length, pad_id)
    for r, members in enumerate(rows):
        start = 0
        for segment, i in enumerate(members, 1):
            _write(packed, r, start, segment, prompts[i], completions[i])
            if masks is not None:
                _hide(packed, r, start + len(prompts[i]), np.asarray(masks[i], bool))
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


def _empty(rows: int, length: int, pad_id: int) -> Packed:
    shape = (rows, length)
    return Packed(
        token_RT=np.full((rows, length + 1), pad_id, np.int32),
        segment_RT=np.zeros(shape, np.int32),
        position_RT=np.zeros(shape, np.int32),
        prompt_RT=np.zeros(shape, bool),
        completion_RT=np.zeros(shape, bool),
    )


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


def _hide(packed: Packed, row: int, start: int, mask: np.ndarray) -> None:
    """Takes the tokens where `mask` is False, at column `start` and on, from the completion to the prompt.

    The first token of a sequence is nobody's target."""
    hidden = start + np.flatnonzero(~mask)
    target = hidden[hidden > 0] - 1
    target = target[packed.completion_RT[row, target]]
    packed.completion_RT[row, target] = False
    packed.prompt_RT[row, target] = True


def _check_masks(
    completions: Sequence[Sequence[int]], masks: Sequence[Sequence[bool] | np.ndarray] | None
) -> None:
    if masks is None:
        return
    if len(masks) != len(completions):
        raise ValueError(f"masks must be one a completion: {len(masks)} of {len(completions)}")
    for i, (mask, ids) in enumerate(zip(masks, completions, strict=True)):
        if len(mask) != len(ids):
            raise ValueError(
                f"sequence {i}: its mask has {len(mask)} places, its completion {len(ids)} tokens"
            )


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
