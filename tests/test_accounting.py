"""What a run says of its own speed: utilisation, idle time, memory, and what a trace holds."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import loop, trace
from rlhfjax import accelerators
from rlhfjax.config import Decoder
from rlhfjax.networks import Branches, branch_mask
from rlhfjax.networks.flops import branches_flops, forward_flops
from rlhfjax.run_folder import RunFolder


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("TPU v5 lite", 197e12),
    ],
)
def test_devices_are_known_by_the_names_jax_gives_them(kind, flops):
    found = accelerators.accelerator(SimpleNamespace(device_kind=kind))
    assert found and found.flops == flops


def test_no_name_is_hidden_by_an_earlier_one():
    for entry in accelerators.ACCELERATORS:
        for kind in entry.kinds:
            assert accelerators.accelerator(SimpleNamespace(device_kind=kind)) is entry
    assert accelerators.accelerator(jax.devices("cpu")[0]) is None


def test_peak_memory_is_the_devices_own_or_that_of_the_process():
    stats = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 7})
    assert accelerators.peak_memory(stats) == 7
    before = accelerators.peak_memory()
    held = np.ones(2**27, np.uint8)  # 128 MiB
    assert accelerators.peak_memory() >= max(before, held.nbytes)


def test_only_real_tokens_count_as_work():
    config = Decoder(vocab_size=11, width=8, layers=3, heads=4, kv_heads=2, head_size=2, mlp_width=16)
    prompt = jnp.asarray([[0, 1, 1], [1, 1, 1]], bool)
    completion = jnp.asarray(np.arange(4)[None, None] < np.array([[4, 1], [0, 2]])[:, :, None])
    branches = Branches(jnp.int32(prompt), prompt, jnp.int32(completion), completion)
    # By the mask itself: pairs of real queries, without what padding sees of itself.
    real = np.concatenate([prompt, completion.reshape(2, -1)], axis=1)
    pairs = int(np.sum(branch_mask(prompt, completion) & real[:, :, None] & real[:, None, :]))
    for logits in (True, False):
        expected = forward_flops(config, positions=5 + 7, pairs=pairs, logits=7 * logits)
        assert branches_flops(config, branches, logits=logits) == expected


def run(folder: Path, step, steps=4, **settings):
    loop.run_stage(
        "ppo", folder=RunFolder(folder), init=lambda: jnp.zeros(()), step=step, steps=steps, **settings
    )
    return [json.loads(line) for line in (folder / "perf.jsonl").read_text().splitlines()]


def test_utilisation_is_the_share_of_the_devices_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "accelerator", lambda: SimpleNamespace(flops=1e6))
    show = loop.Show(measure=lambda step, aux: {"perf/model_flops": 500.0})
    lines = run(tmp_path, lambda state, i: (state, {"loss": 0.5}, None), show=show)
    assert lines[-1]["compile_seconds"] == 0
    assert lines[-1]["mfu"] == pytest.approx(500.0 / lines[-1]["seconds"] / 1e6 / jax.device_count())
    assert "model_flops" not in (tmp_path / "metrics.jsonl").read_text()
    assert lines[-1]["peak_memory_bytes"] > 2**20


def test_no_utilisation_where_the_peak_is_unknown(tmp_path):
    show = loop.Show(measure=lambda step, aux: {"perf/model_flops": 500.0})
    lines = run(tmp_path, lambda state, i: (state, {"loss": 0.5}, None), show=show)
    assert "mfu" not in lines[-1] and lines[-1]["model_flops_per_second"] > 0


def test_idle_time_is_what_passes_between_the_end_of_a_step_and_the_start_of_the_next():
    now, done = [10.0], threading.Event()
    clock = loop._DeviceClock(now=lambda: now[0], wait=lambda event: event.wait())
    assert clock.start() == 0.0  # the first step waits for nothing
    clock.watch(done)
    now[0] = 12.0
    assert clock.start() == 0.0  # the device is still at work
    now[0] = 13.0
    done.set()
    assert clock._waiting is not None
    clock._waiting.join()
    now[0] = 15.5
    assert clock.start() == 2.5


def test_every_step_says_how_long_the_device_was_idle_before_it(tmp_path):
    lines = run(tmp_path, lambda state, i: (state, {"loss": 0.5}))
    assert lines[0]["idle_seconds"] == 0.0 and all(line["idle_seconds"] >= 0.0 for line in lines)


def test_a_trace_tells_what_devices_did():
    def event(name, nanoseconds):
        return SimpleNamespace(name=name, duration_ns=nanoseconds)

    def plane(name, **lines):
        return SimpleNamespace(
            name=name,
            lines=[SimpleNamespace(name=key.replace("_", " "), events=value) for key, value in lines.items()],
        )

    gemm, add = event("gemm", 2e9), event("add", 1e9)
    profile = SimpleNamespace(
        planes=[
            plane("/device:GPU:0", Stream_13=[gemm, add, gemm], XLA_Modules=[event("jit_step", 9e9)]),
            plane("/device:TPU:1", XLA_Ops=[add], Steps=[event("1", 9e9)]),
            plane("/host:CPU", Stream_1=[event("python", 9e9)]),
        ]
    )
    found = trace.device_time(profile, most=1)
    assert found == (6.0, 4, [("gemm", 4.0, 2)])
    assert trace.device_time(SimpleNamespace(planes=profile.planes[2:])) is None
