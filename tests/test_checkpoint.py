"""Checkpoints: bit-exact round trips, keep-N, damage of every sort, kills in mid-save, clear errors."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhfjax.checkpoint import Checkpoints


class State(NamedTuple):
    params: dict[str, Any]
    history: tuple[Any, ...]
    count: Any
    key: Any


def make_state(seed: int) -> State:
    """One leaf of every kind that a state may hold, with awkward values: NaN payloads, -0.0, bfloat16."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 2**32, 64, dtype=np.uint32)
    bits[:3] = [0x7FC0BEEF, 0x80000000, 0xFF800000]
    return State(
        params={
            "kernel": jnp.asarray(generator.normal(size=(3, 4)), jnp.float32),
            "half": jnp.asarray(generator.normal(size=5), jnp.bfloat16),
            "layer/0.bias": jnp.asarray(bits.view(np.float32)),
            "empty": jnp.zeros((0, 2)),
            "no_keys": jax.random.split(jax.random.key(0), 0),
            "flag": jnp.asarray([True, False]),
        },
        history=(
            generator.normal(size=7),  # float64, which JAX would narrow
            np.int32(seed),
            np.float64(0.1 + seed),
            [None, 2**40 + seed, 0.1 * seed, seed % 2 == 0],
        ),
        count=jnp.asarray(seed, jnp.int32),
        key=(jax.random.key(seed), jax.random.split(jax.random.key(seed, impl="rbg"), 3)),
    )


def raw(leaf: Any) -> tuple[type, Any, Any, bytes]:
    """A leaf's type, dtype, shape and bytes: what `bit for bit` compares."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return type(leaf), str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    array = np.asarray(leaf)
    return type(leaf), array.dtype, array.shape, array.tobytes()


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, left), right in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert raw(left) == raw(right), jax.tree_util.keystr(path)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    with Checkpoints(tmp_path / "checkpoints") as opened:
        yield opened


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints 1 and 2, to be copied by the tests that damage it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder) as opened:
        for step in (1, 2):
            opened.save(step, make_state(step))
    return folder


def test_round_trip_is_bit_exact_in_type_dtype_shape_and_value(checkpoints: Checkpoints):
    checkpoints.save(3, make_state(3))
    restored = checkpoints.restore_latest(like=make_state(0))
    assert restored is not None
    step, state = restored
    assert step == 3
    assert_same(state, make_state(3))
    assert_same(jax.random.normal(state.key[0], (3,)), jax.random.normal(jax.random.key(3), (3,)))


def test_abstract_like_gives_arrays(saved: Path):
    like = jax.eval_shape(lambda: make_state(0).params)
    with Checkpoints(saved) as opened:
        full = jax.tree.map(lambda leaf: leaf, make_state(0))._replace(params=like)
        assert_same(opened.restore(2, full), make_state(2))
        key_like = full._replace(key=jax.eval_shape(lambda: make_state(0).key))
        assert_same(opened.restore(2, key_like), make_state(2))


def test_weak_types_and_uncommitted_arrays_stay_so(checkpoints: Checkpoints):
    state = {"weak": jnp.full((2,), 0.1), "strong": jnp.ones(2), "scalar": jnp.asarray(7)}
    committed = jax.device_put(jnp.ones(2), jax.devices()[1])
    assert state["weak"].weak_type and not state["strong"].weak_type
    checkpoints.save(1, {**state, "committed": committed})
    restored = checkpoints.restore(1, {**state, "committed": committed})
    assert {name: value.weak_type for name, value in restored.items()} == {
        "weak": True,
        "strong": False,
        "scalar": state["scalar"].weak_type,
        "committed": False,
    }
    assert_same({name: restored[name] for name in state}, state)
    assert restored["committed"].devices() == {jax.devices()[1]}
    # An uncommitted array may be used beside one that lies on another device; a committed one may not.
    assert (restored["strong"] + committed).devices() == {jax.devices()[1]}


def test_restores_onto_the_sharding_of_like(checkpoints: Checkpoints):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    values = jnp.arange(32.0).reshape(8, 4)
    checkpoints.save(1, {"by_rows": jax.device_put(values, rows), "whole": jax.device_put(values, whole)})
    like = {
        "by_rows": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=whole),
        "whole": jax.device_put(values, rows),
    }
    restored = checkpoints.restore(1, like)
    assert restored["by_rows"].sharding == whole and restored["whole"].sharding == rows
    np.testing.assert_array_equal(restored["by_rows"], values)
    np.testing.assert_array_equal(restored["whole"], values)


def test_save_copies_before_it_returns(checkpoints: Checkpoints):
    """Donating the JAX arrays and overwriting the NumPy ones while the save is under way changes nothing."""
    advance = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1.0, tree), donate_argnums=0)
    on_device, on_host = {str(i): jnp.full(200_000, float(i)) for i in range(8)}, np.zeros(200_000)
    for step in range(3):
        expected = {str(i): np.full(200_000, i + step, np.float32) for i in range(8)}
        checkpoints.save(step, (on_device, on_host))
        on_device = jax.block_until_ready(advance(on_device))
        on_host += 1.0
        restored = checkpoints.restore(step, (expected, on_host))
        assert_same(restored, (expected, np.full(200_000, float(step))))


def test_keeps_the_newest(tmp_path: Path):
    with Checkpoints(tmp_path, keep=3) as opened:
        assert opened.steps() == [] and opened.restore_latest(like={"x": 0}) is None
        for step in (5, 10, 15, 100):
            opened.save(step, {"x": step})
        opened.wait()
        assert opened.steps() == [10, 15, 100]
        assert opened.restore(15, {"x": 0}) == {"x": 15}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["10", "100", "15"]


def test_plain_orbax_reads_the_state(saved: Path):
    arrays = ocp.StandardCheckpointer().restore(saved / "2" / "state")
    np.testing.assert_array_equal(arrays[".params['kernel']"], make_state(2).params["kernel"])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest(folder: Path) -> Path:
    return max(
        (path for path in (folder / "state").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )


def replace_a_word(path: Path) -> None:
    content = path.read_text()
    assert "kernel" in content
    path.write_text(content.replace("kernel", "fennel"))


def in_its_place(folder: Path, put: Any) -> None:
    shutil.rmtree(folder)
    put(folder)


DAMAGES = {
    "truncated array file": (lambda folder: truncate(largest(folder)), r"state/.* has \d+ bytes, not \d+"),
    "one bit of an array": (lambda folder: flip_a_bit(largest(folder)), "the checksum of state/.* is wrong"),
    "emptied array file": (lambda folder: largest(folder).write_bytes(b""), r"state/.* has 0 bytes, not \d+"),
    "deleted array file": (lambda folder: largest(folder).unlink(), "state/.* is missing"),
    "deleted state": (lambda folder: shutil.rmtree(folder / "state"), "state/.* is missing"),
    "empty folder": (lambda folder: in_its_place(folder, Path.mkdir), "manifest.json is missing"),
    "a file": (lambda folder: in_its_place(folder, Path.touch), "manifest.json cannot be read"),
    "deleted manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "garbage manifest": (
        lambda folder: (folder / "manifest.json").write_bytes(bytes(range(256))),
        "manifest.json cannot be read",
    ),
    "one word of the manifest": (
        lambda folder: replace_a_word(folder / "manifest.json"),
        r"manifest.json cannot be read \(its checksum is wrong\)",
    ),
    "truncated manifest": (lambda folder: truncate(folder / "manifest.json"), "manifest.json cannot be read"),
    "manifest of another form": (
        lambda folder: (folder / "manifest.json").write_text("[]"),
        "manifest.json cannot be read",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_newest_is_skipped_with_a_warning_and_makes_room(
    damage: Any, reason: str, saved: Path, tmp_path: Path
):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    damage(folder / "2")
    with Checkpoints(folder) as opened:
        with pytest.warns(UserWarning, match=f"skipping damaged checkpoint {folder / '2'}: {reason}"):
            restored = opened.restore_latest(like=make_state(0))
        assert restored is not None and restored[0] == 1
        assert_same(restored[1], make_state(1))
        with pytest.raises(OSError, match=f"(step 2 in .*)|(is damaged: {reason})"):
            opened.restore(2, make_state(0))
        opened.save(2, make_state(22))  # the resumed run comes to the same step again
        assert_same(opened.restore(2, make_state(0)), make_state(22))


def test_all_damaged_gives_none(saved: Path, tmp_path: Path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for step in ("1", "2"):
        flip_a_bit(largest(folder / step))
    with Checkpoints(folder) as opened, pytest.warns(UserWarning) as caught:
        assert opened.restore_latest(like=make_state(0)) is None
    assert [
        f"/{step}: the checksum of" in str(w.message) for step, w in zip((2, 1), caught, strict=True)
    ] == [True] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s._replace(count=jnp.zeros(2, jnp.int32)),
            r"\.count as int32\[\], but `like` as int32\[2\]",
        ),
        (
            lambda s: s._replace(count=jnp.zeros((), jnp.uint32)),
            r"\.count as int32\[\], but `like` as uint32\[\]",
        ),
        (lambda s: s._replace(count=0), r"\.count as int32\[\], but `like` as a Python int"),
        (lambda s: s._replace(count=None), r"has \.count \(int32\[\]\), which `like` has not"),
        (lambda s: s._replace(params={**s.params, "new": 1}), r"no \.params\['new'\], which `like` has"),
        (lambda s: dict(s._asdict()), r"no \['count'\], which `like` has"),
        (
            lambda s: s._replace(key=(jax.random.key(0, impl="rbg"), s.key[1])),
            r"\.key\[0\] as key<fry>\[\], but .*rbg",
        ),
    ],
)
def test_another_state_is_an_error_not_damage(change: Any, message: str, saved: Path):
    with Checkpoints(saved) as opened, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=message):
            opened.restore_latest(like=change(make_state(0)))


def test_missing_checkpoint_names_the_folder_and_what_is_there(saved: Path, tmp_path: Path):
    with (
        Checkpoints(saved) as opened,
        pytest.raises(FileNotFoundError, match=rf"step 7 in {saved}: .* \[1, 2\]"),
    ):
        opened.restore(7, make_state(0))
    nowhere = tmp_path / "nowhere"
    with (
        Checkpoints(nowhere) as opened,
        pytest.raises(FileNotFoundError, match=f"{nowhere}: it holds no checkpoint"),
    ):
        opened.restore(7, make_state(0))
    assert not nowhere.exists(), "reading made a folder"


def test_steps_only_grow(saved: Path, tmp_path: Path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    with Checkpoints(folder) as opened:
        for step in (1, 2):
            with pytest.raises(ValueError, match=f"cannot save step {step} .* an intact checkpoint of step"):
                opened.save(step, make_state(0))
        assert_same(opened.restore(2, make_state(0)), make_state(2))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"name": "text"}, r"\['name'\] is a str"),
        ({"f": len}, r"\['f'\] is a builtin_function_or_method"),
        ({"text": np.array(["a"])}, r"\['text'\] is a NumPy array of <U1"),
        ({"big": 2**63}, r"\['big'\] is 9223372036854775808, which does not fit in 64 bits"),
        ({"small": -(2**63) - 1}, r"\['small'\] is -9223372036854775809, which does not fit"),
        ({"abstract": jax.ShapeDtypeStruct((), jnp.float32)}, r"\['abstract'\] is a ShapeDtypeStruct"),
    ],
)
def test_what_cannot_be_saved_is_named(state: Any, message: str, checkpoints: Checkpoints):
    with pytest.raises(TypeError, match=message):
        checkpoints.save(1, state)
    assert checkpoints.steps() == []


def test_empty_state_and_bad_keep_are_refused(checkpoints: Checkpoints, tmp_path: Path):
    with pytest.raises(ValueError, match="no leaves"):
        checkpoints.save(1, {"nothing": None})
    with pytest.raises(ValueError, match="keep must be at least 1, not 0"):
        Checkpoints(tmp_path, keep=0)


def test_no_room_is_a_clear_error_and_older_checkpoints_stay(checkpoints: Checkpoints):
    """A limit on the size of a file stands in for the full disk: the write fails, in the background."""
    small, large = {"x": jnp.ones(8)}, {"x": jnp.asarray(np.random.default_rng(0).normal(size=100_000))}
    checkpoints.save(1, small)
    checkpoints.wait()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, unlimited[1]))
    try:
        checkpoints.save(2, large)
        with pytest.raises(OSError, match=r"checkpoint 2 could not be written to .* intact: \[1\]"):
            checkpoints.wait()
        assert [entry.name for entry in checkpoints.directory.iterdir()] == ["1"], (
            "what failed takes up space"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert_same(checkpoints.restore(1, small), small)
    checkpoints.save(2, large)  # once there is room, the same step can be saved
    assert_same(checkpoints.restore(2, large), large)


SAVE_FOR_EVER = """
import sys
import numpy as np
from rlhfjax.checkpoint import Checkpoints
with Checkpoints(sys.argv[1]) as checkpoints:
    like = {"x": np.zeros(50_000), "step": 0}
    step, state = checkpoints.restore_latest(like=like) or (0, like)
    assert state["step"] == step and (state["x"] == step).all(), (step, state)
    while True:
        step += 1
        checkpoints.save(step, {"x": np.full(50_000, float(step)), "step": step})
        print(step, flush=True)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_kill_at_any_moment_leaves_a_whole_checkpoint(kills: int, tmp_path: Path):
    """SIGKILL at moments spread over the saves, again and again in one folder: nothing older is lost."""
    generator, like, committed = np.random.default_rng(kills), {"x": np.zeros(50_000), "step": 0}, 0
    for _ in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        # Printing n says that the save of n has begun, hence that all before it are on disk.
        begun = [int(child.stdout.readline()) for _ in range(3)]
        time.sleep(generator.uniform(0.0, 0.3))
        os.kill(child.pid, signal.SIGKILL)
        begun += [int(line) for line in child.stdout.read().split()]
        child.wait()
        with Checkpoints(tmp_path) as opened, warnings.catch_warnings():
            warnings.simplefilter(
                "error"
            )  # a folder with a step's name is whole, so there is nothing to skip
            restored = opened.restore_latest(like=like)
        assert restored is not None
        step, state = restored
        assert begun[-1] - 1 <= step <= begun[-1] and step > committed
        assert state["step"] == step and (state["x"] == step).all()
        committed = step
    with Checkpoints(tmp_path) as opened:
        opened.save(committed + 1, like)
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {str(committed), str(committed + 1)}, "something half-written was left"


def test_a_checkpoint_has_its_name_only_when_it_is_whole(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise OSError("planted")

    checkpoints.save(1, {"x": 1})
    checkpoints.wait()
    monkeypatch.setattr("rlhfjax.checkpoint._write_manifest", fail)
    checkpoints.save(2, {"x": 2})
    with pytest.raises(OSError, match=r"checkpoint 2 could not be written .* planted.* intact: \[1\]"):
        checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_manifest_lists_every_file_with_its_checksum(saved: Path):
    manifest = json.loads(json.loads((saved / "2" / "manifest.json").read_text())["body"])
    files = {
        str(path.relative_to(saved / "2")) for path in (saved / "2" / "state").rglob("*") if path.is_file()
    }
    assert set(manifest["files"]) == files and len(manifest["leaves"]) == len(jax.tree.leaves(make_state(0)))
