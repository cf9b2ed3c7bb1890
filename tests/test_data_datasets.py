"""JSON-lines files with their errors, and batches as a pure function of (seed, step)."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.data.datasets import Pair, batch_indices, load_pairs, read_jsonl

reproducible = settings(derandomize=True, database=None, deadline=None)
GOOD = {"prompt": "a b", "completion": "c"}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_plain_and_compressed_files_read_the_same(tmp_path):
    rows = [GOOD, {"prompt": "é\u2028", "completion": "x"}]
    plain = write(tmp_path / "a.jsonl", GOOD, "", rows[1])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert read_jsonl(plain, ("prompt",)) == read_jsonl(tmp_path / "a.jsonl.gz") == rows


def test_pairs_are_those_of_the_split(tmp_path):
    rows = [{"split": s, "document": f"d {s}", "summary": f"s {s}"} for s in ("train", "test", "train")]
    path = write(tmp_path / "a.jsonl", *rows)
    fields = {"prompt_field": "document", "completion_field": "summary"}
    assert load_pairs(path, split="test", **fields) == [Pair("d test", "s test")]
    assert len(load_pairs(path, **fields)) == 3
    with pytest.raises(ValueError, match=r"'dev'; it has \['test', 'train'\]"):
        load_pairs(path, split="dev", **fields)


@pytest.mark.parametrize(
    "row, message",
    [
        ("{not json", "not JSON"),
        ("[1]", "list"),
        ({"completion": "c"}, "no field 'prompt'"),
        (GOOD | {"prompt": ""}, "empty 'prompt'"),
        (GOOD | {"completion": " \n"}, "empty 'completion'; fill it or drop the row"),
        (GOOD | {"prompt": 3}, "'prompt' must be a text, it is int"),
        (GOOD | {"prompt": None}, "NoneType"),
        (GOOD | {"prompt": "\ud800"}, "surrogate"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, message):
    path = write(tmp_path / "bad.jsonl", GOOD, "", row)
    with pytest.raises(ValueError, match=f"bad.jsonl:3: .*{message}"):
        load_pairs(path)


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(ValueError, match="latin.jsonl:1"):
        read_jsonl(tmp_path / "latin.jsonl")


def test_missing_empty_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="empty.jsonl has no rows"):
        read_jsonl(write(tmp_path / "empty.jsonl", "", ""))
    whole = gzip.compress(json.dumps(GOOD).encode() * 100)
    for content in (whole[:-20], b"no gzip", whole[:12] + b"\0\0\0\0" + whole[16:]):
        (tmp_path / "damaged.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match="damaged.jsonl.gz"):
            read_jsonl(tmp_path / "damaged.jsonl.gz")


@reproducible
@given(seed=st.integers(0, 2**40), size=st.integers(1, 40), data=st.data())
def test_an_epoch_holds_every_row_once_however_it_is_cut(seed, size, data):
    batch_size = data.draw(st.integers(1, size))
    epochs = 3
    steps = -(-epochs * size // batch_size)
    stream = np.concatenate([batch_indices(seed, step, batch_size, size) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_batches_depend_on_seed_and_epoch_and_on_nothing_else():
    first, other_seed = batch_indices(0, 0, 20, 20), batch_indices(1, 0, 20, 20)
    next_epoch = batch_indices(0, 1, 20, 20)
    assert len({tuple(x) for x in (first, other_seed, next_epoch)}) == 3
    first_again = batch_indices(0, 0, 20, 20)
    first_again[:] = 0  # what a caller does to a batch must not reach the next caller
    np.testing.assert_array_equal(batch_indices(0, 0, 20, 20), first)


def independent_batch(seed: int, step: int, batch_size: int, size: int) -> list[int]:
    """Written from the definition: the whole stream of epochs, of which the batch is a piece."""
    stream: list[int] = []
    for epoch in range((step + 1) * batch_size // size + 1):
        words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size).tolist()
        stream += sorted(range(size), key=words.__getitem__)
    return stream[step * batch_size : (step + 1) * batch_size]


@reproducible
@given(st.integers(0, 99), st.integers(0, 30), st.integers(1, 12), st.integers(12, 20))
def test_any_step_is_computed_alone(seed, step, batch_size, size):
    expected = independent_batch(seed, step, batch_size, size)
    assert batch_indices(seed, step, batch_size, size).tolist() == expected


def test_batches_are_pinned():
    """Another order would silently change every run that is resumed across versions."""
    assert batch_indices(7, 2, 4, 10).tolist() == [9, 0, 3, 9]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 0, 1, 0), "no rows"),
        ((0, 0, 11, 10), "batch_size is 11 and there are 10 rows"),
        ((0, 0, 0, 10), "batch_size is 0"),
        ((-1, 0, 1, 10), "negative"),
        ((0, -1, 1, 10), "negative"),
    ],
)
def test_impossible_batches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        batch_indices(*arguments)
