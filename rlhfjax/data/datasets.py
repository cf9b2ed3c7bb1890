"""Rows of text from JSON-lines files, and which rows make the batch of a step.

No iterator and no state: the rows are a list, and those of step `s` are `batch_indices(seed, s, ...)`. A run
that is resumed at step `s` therefore reads what it would have read.
"""

import gzip
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Pair", "batch_indices", "load_pairs", "read_jsonl"]

_SURROGATE = re.compile("[\ud800-\udfff]")


class Pair(NamedTuple):
    """A prompt and the completion written for it by the data."""

    prompt: str
    completion: str


def read_jsonl(path: str | Path, required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects of a .jsonl or .jsonl.gz file, one a line; blank lines are passed over.

    required: names of fields that every row must have, each a text with something but white space in it.
    ValueError for a bad row, naming file, line and field; FileNotFoundError for a missing file.
    """
    return [row for _, row in numbered_rows(path, required)]


def numbered_rows(
    path: str | Path, required: Sequence[str] = (), *, torn: bool = False
) -> list[tuple[str, dict[str, Any]]]:
    """As `read_jsonl`, each row behind the place it came from, "file:line", for messages about it.

    torn: whether the last line may be half written, as by a killed process, and then is passed over.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no data file at {file}")
    content = _read_bytes(file)
    if torn:
        content = content[: whole_length(content)]
    lines = ((f"{file}:{number}", line) for number, line in enumerate(content.split(b"\n"), 1))
    rows = [(where, _parse_row(line, required, where=where)) for where, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{file} has no rows; write one JSON object a line")
    return rows


def whole_length(content: bytes) -> int:
    """How many bytes of JSON lines are whole: all, or those before a last line that was cut short."""
    last = content.rfind(b"\n") + 1
    try:
        return len(content) if isinstance(json.loads(content[last:]), dict) else last
    except (ValueError, RecursionError):
        return last


def load_pairs(
    path: str | Path,
    *,
    split: str | None = None,
    prompt_field: str = "prompt",
    completion_field: str = "completion",
) -> list[Pair]:
    """Prompt and completion of each row of a JSON-lines file; `split` keeps rows with that field "split"."""
    fields = (prompt_field, completion_field)
    rows = read_jsonl(path, required=fields if split is None else ("split", *fields))
    chosen = [row for row in rows if split in (None, row.get("split"))]
    if not chosen:
        splits = sorted({row["split"] for row in rows})
        raise ValueError(f"{path} has no rows of split {split!r}; it has {splits}")
    return [Pair(row[prompt_field], row[completion_field]) for row in chosen]


def batch_indices(seed: int, step: int, batch_size: int, size: int) -> np.ndarray:
    """Rows of the batch of one step: int64 [batch_size], a pure function of its arguments.

    The steps walk through epochs, each a permutation of range(size) drawn from (seed, epoch) alone. So every
    row is seen once an epoch; a batch may stand across two epochs, and then can hold a row twice.
    The permutation sorts raw Philox words, whose stream NumPy keeps fixed across versions.
    """
    if size < 1:
        raise ValueError("there are no rows to draw batches from (size is 0)")
    if not 1 <= batch_size <= size:
        raise ValueError(f"batch_size is {batch_size} and there are {size} rows; it must lie in 1..{size}")
    if seed < 0 or step < 0:
        raise ValueError(f"seed and step must not be negative; they are {seed} and {step}")
    epoch, offset = divmod(step * batch_size, size)
    taken = _permutation(seed, epoch, size)[offset : offset + batch_size]
    if len(taken) == batch_size:
        return taken.copy()
    return np.concatenate([taken, _permutation(seed, epoch + 1, size)[: batch_size - len(taken)]])


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    permutation = np.argsort(bits.random_raw(size), kind="stable")
    permutation.setflags(write=False)  # shared by the cache
    return permutation


def _read_bytes(file: Path) -> bytes:
    if file.suffix != ".gz":
        return file.read_bytes()
    try:
        with gzip.open(file) as content:
            return content.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} is no whole gzip file ({error}); fetch or make it again") from error


def _parse_row(line: bytes, required: Sequence[str], *, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or lists in lists in lists
        raise ValueError(f"{where}: not JSON ({error}); write one JSON object a line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON object is needed, this is {type(row).__name__}")
    for field in required:
        check_text(row, field, where=where)
    return row


def check_text(row: Mapping[str, Any], field: str, *, where: str) -> None:
    """ValueError unless row[field] is a text that can be encoded and is not empty."""
    if field not in row:
        raise ValueError(f"{where}: no field {field!r}; the row has {sorted(row)}")
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} must be a text, it is {type(text).__name__}")
    if not text.strip():
        raise ValueError(f"{where}: empty {field!r}; fill it or drop the row")
    if _SURROGATE.search(text):
        raise ValueError(
            f"{where}: field {field!r} holds half a surrogate pair, which is no character; mend the text"
        )
