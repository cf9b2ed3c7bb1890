"""The table of accelerators: names, files, and this machine."""

import jax.numpy as jnp
import pytest

from rlhfjax import accelerators
from rlhfjax.accelerators import ACCELERATORS, Accelerator, lookup, measured


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("h100", "NVIDIA H100"),
        ("H100", "NVIDIA H100"),
        ("h200", "NVIDIA H200"),
        ("a100-80g", "NVIDIA A100"),
        ("a100-40g", "NVIDIA A100-SXM4-40GB"),
        ("l4", "NVIDIA L4"),
        ("t4", "Tesla T4"),
        ("v4", "TPU v4"),
        ("v5e", "TPU v5 lite"),
        ("v5p", "TPU v5"),
        ("v6e", "TPU v6 lite"),
    ],
)
def test_short_names_are_those_of_the_devices(name, kind):
    assert kind in lookup(name).kinds


def test_no_short_name_is_given_twice():
    names = [name for entry in ACCELERATORS for name in entry.names]
    assert len(names) == len(set(names)) and all(name == name.lower() for name in names)


def test_the_table_is_in_order_of_size():
    """A slip of a power of ten would show: memory is faster than links, links are faster than networks."""
    for entry in ACCELERATORS:
        assert 1e13 < entry.flops < 1e16 and 1e10 <= entry.memory < 1e12, entry
        assert entry.bandwidth > entry.link > entry.network > 1e9, entry
        assert bool(entry.topology) == bool(entry.axes) == ("TPU" in entry.kinds[0])


def test_an_unknown_name_is_told():
    with pytest.raises(ValueError, match="'a100-80gb' is not known; did you mean 'a100-80g'.*h100.*cpu"):
        lookup("a100-80gb")


def test_a_file_describes_an_accelerator(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("like: h100\nmemory: 94e9\nnetwork: 25e9\nisland: 4\nsource: measured\n")
    h100, mine = lookup("h100"), lookup(str(path))
    assert (mine.memory, mine.network, mine.island, mine.source) == (94e9, 25e9, 4, "measured")
    assert (mine.flops, mine.link, mine.bandwidth) == (h100.flops, h100.link, h100.bandwidth)
    assert mine.names == ("mine",) and isinstance(mine.island, int)
    path.write_text(
        "flops: 1e12\nmemory: 2e9\nbandwidth: 3e9\nlink: 4e8\nnetwork: 5e7\nisland: 2\nnames: board\n"
    )
    assert lookup(str(path)) == Accelerator(
        names=("board",),
        flops=1e12,
        memory=2e9,
        bandwidth=3e9,
        link=4e8,
        network=5e7,
        island=2,
        source=str(path),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("like: h100\nmemry: 1e9\n", "no 'memry'; did you mean 'memory'"),
        ("like: h100\n1: 1e9\n", "has no 1; it has"),
        ("like: h100\nkinds: 5\n", "kinds is 5; it must be a word or a list of words"),
        ("flops: 1e12\n", "does not say memory, bandwidth, link, island, network"),
        ("like: h100\nmemory: much\n", "memory is 'much'; it must be a number above 0"),
        ("like: h100\nmemory: -1\n", "memory is -1; it must be a number above 0"),
        ("like: h1000\n", "'h1000' is not known"),
        ("just words\n", "expected lines like"),
    ],
)
def test_a_bad_file_is_told(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        lookup(str(path))


def test_a_file_that_is_not_there_is_told():
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml: there is no such file"):
        lookup("nowhere.yaml")


def test_this_machine_is_timed():
    whole, quarter = lookup("cpu"), measured(4)
    assert 1e8 < whole.flops < 1e14 and 1e8 < whole.bandwidth < 1e13 and whole.memory > 2**27
    for name in ("flops", "memory", "bandwidth", "link"):
        assert getattr(quarter, name) == getattr(whole, name) / 4
    with pytest.raises(ValueError, match="share=0"):
        measured(0)


def test_the_clock_is_read_around_the_work(monkeypatch):
    """The rates are those of the fastest call: of a clock that this test turns."""
    now = iter(float(x) for x in [0, 9, 10, 12, 20, 24, 30, 37, 40, 45])
    monkeypatch.setattr(accelerators.time, "perf_counter", lambda: next(now))
    assert accelerators._best(lambda x: x, jnp.ones(1)) == 2.0
