"""Trackers of a run that is stopped or killed, and resumed: one run of the service, each step once, with its values."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhfjax import tracking
from rlhfjax.run_folder import RunFolder, read_lines
from rlhfjax.tracking import Tracker

ROOT = Path(__file__).resolve().parents[1]
Sent = tuple[str, int, dict[str, float]]  # stage, step, metrics


def stopped_and_resumed(name: str, folder: Path) -> None:
    """Steps 1 to 3, then from step 2 on again, as after a checkpoint of step 1."""
    for steps in (range(1, 4), range(2, 6)):
        tracker = tracking.open_trackers(name, folder, {"seed": 0}, "length/one")
        for step in steps:
            tracker.log("sft", step, {"loss/nll": 1.0 / step})
        tracker.log("ppo", 1, {"objective/kl": 0.5})
        tracker.close()
        if name == "wandb":
            time.sleep(1.0)  # it names its folders by the second


def steps_of(sent: list[Sent], stage: str) -> list[int]:
    return [step for of, step, _ in sent if of == stage]


def read_tensorboard(folder: Path) -> list[Sent]:
    """The events of all files, oldest file first; of what a kill has left of a record nothing."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    found: dict[tuple[str, int, int], dict[str, float]] = {}
    for number, file in enumerate(sorted((folder / "tensorboard").glob("events.*"))):
        data = file.read_bytes()
        while len(data) >= 12:  # length, its checksum, record, its checksum
            length = int.from_bytes(data[:8], "little")
            record, data = data[12 : 12 + length], data[16 + length :]
            event = Event.FromString(record) if len(record) == length else Event()
            for value in event.summary.value:
                stage, _, metric = value.tag.partition("/")
                of_step = found.setdefault((stage, event.step, number), {})
                assert metric not in of_step, f"{value.tag} of step {event.step} stands twice"
                of_step[metric] = value.simple_value
    return [(stage, step, metrics) for (stage, step, _), metrics in found.items()]


def read_wandb(folder: Path) -> list[Sent]:
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.parent.name.rsplit("-", 1)[-1] for file in files}) == 1, "several runs"
    found = []
    for file in files:
        # After the file's own header: checksum, length, kind and record, again and again.
        data = file.read_bytes()[7:]
        assert len(data) < 32_000, "records may be cut at the end of a block"
        while len(data) >= 7:
            length = int.from_bytes(data[4:6], "little")
            record, data = Record.FromString(data[7 : 7 + length]), data[7 + length :]
            items = record.history.item
            found.append(
                {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            )
    return _by_stage(found)


def read_trackio(folder: Path) -> list[Sent]:
    (database,) = (folder / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("SELECT run_name, metrics FROM metrics").fetchall()
    assert len({name for name, _ in rows}) == 1, "several runs"
    return _by_stage([json.loads(metrics) for _, metrics in rows])


def _by_stage(rows: list[dict[str, Any]]) -> list[Sent]:
    found = []
    for row in rows:
        for key in (key for key in row if key.endswith("/step")):
            stage = key.removesuffix("/step")
            metrics = {
                name.removeprefix(f"{stage}/"): x for name, x in row.items() if name.startswith(f"{stage}/")
            }
            found.append((stage, metrics.pop("step"), metrics))
    return found


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}


@pytest.fixture(params=READERS)
def service(request, tmp_path, monkeypatch) -> str:
    """A tracker's name, its service kept within the test; skipped where its package is not installed."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read on import
    pytest.importorskip(tracking.TRACKERS[request.param].package)
    return request.param


def test_no_step_is_sent_twice_and_a_torn_line_costs_nothing(tmp_path, monkeypatch):
    heard = []
    own = Tracker(lambda stage, step, metrics: heard.append((stage, step)), lambda: None)
    choice = tracking.Choice("json", "none", lambda directory, config, name: own)
    monkeypatch.setitem(tracking.TRACKERS, "own", choice)
    stopped_and_resumed("own", tmp_path)
    assert heard == [("sft", 1), ("sft", 2), ("sft", 3), ("ppo", 1), ("sft", 4), ("sft", 5)]
    with open(tmp_path / "tracked" / "own.jsonl", "a") as file:
        file.write('{"stage": "sft", "st')  # killed while it wrote
    again = tracking.open_trackers("own", tmp_path, {}, "length/one")
    again.log("sft", 6, {})
    tracking.open_trackers("own", tmp_path, {}, "length/one").log("sft", 6, {})
    assert heard[6:] == [("sft", 6)]


def test_what_a_killed_service_may_have_lost_is_sent_again_from_the_logs(tmp_path, monkeypatch):
    heard = []
    own = Tracker(lambda stage, step, metrics: heard.append((stage, step, dict(metrics))), lambda: None)
    choice = tracking.Choice("json", "none", lambda directory, config, name: own, lambda: 5.0)
    monkeypatch.setitem(tracking.TRACKERS, "own", choice)
    clock = iter([0.0, 100.0, 103.0, 104.0, 105.0])
    monkeypatch.setattr(tracking, "time", SimpleNamespace(time=lambda: next(clock)))
    run = RunFolder(tmp_path)

    def opened() -> Tracker:
        return tracking.open_trackers("own", tmp_path, {}, "length/one")

    first = opened()
    for step in (1, 2, 3):
        run.log_metrics("sft", step, {"loss/nll": 1.0 / step} if step < 3 else {})
        run.log_perf("sft", step, {"seconds": 0.5})
        first.log("sft", step, {"loss/nll": 1.0 / step, "perf/seconds": 0.5})
    (tmp_path / "metrics.jsonl").write_bytes((tmp_path / "metrics.jsonl").read_bytes()[:-9])  # torn: step 3
    del heard[:]
    second = opened()  # the first was never closed; step 1 is long on its way, 3 will be computed again
    second.log("sft", 2, {})
    second.log("sft", 3, {"loss/nll": 0.25})
    assert heard == [("sft", 2, {"loss/nll": 0.5, "perf/seconds": 0.5}), ("sft", 3, {"loss/nll": 0.25})]
    second.close()
    opened()
    assert len(heard) == 2


def test_a_service_goes_on_in_one_run(service, tmp_path):
    stopped_and_resumed(service, tmp_path)
    sent = READERS[service](tmp_path)
    assert sorted(steps_of(sent, "sft")) == [1, 2, 3, 4, 5] and steps_of(sent, "ppo") == [1]
    assert {step: x["loss/nll"] for stage, step, x in sent if stage == "sft"} == pytest.approx(
        {step: 1.0 / step for step in range(1, 6)}
    )


# Two stages with checkpoints of every third step. Arguments: folder, service, and where the process kills itself.
PROGRAM = """
import os, signal, sys
import jax.numpy as jnp
import numpy as np
from experiments.loop import run_stage
from rlhfjax.run_folder import RunFolder
from rlhfjax.tracking import open_trackers
from pathlib import Path

path, service, target = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
path.mkdir(exist_ok=True)
folder = RunFolder(path, tracker=open_trackers(service, path, {"seed": 0}, "length/one"))
folder.repair()
for stage in ("sft", "ppo"):
    def batch(i):
        if f"{stage}{i}" == target:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.float32(i)

    def step(state, x, i):
        state = jnp.sin(3.0 * state + x)
        return state, {"loss/total": state, "objective/kl": state**2}

    run_stage(stage, folder=folder, init=lambda: jnp.float32(0.5), step=step, batch=batch, steps=8, checkpoint_every=3)
folder.tracker.close()
"""


@pytest.mark.slow
def test_after_kills_a_service_has_every_step_with_the_values_of_the_log(service, tmp_path):
    run = tmp_path / "run"
    for target, status in (("sft5", -signal.SIGKILL), ("ppo7", -signal.SIGKILL), ("", 0)):
        command = [sys.executable, "-c", PROGRAM, str(run), service, target]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(run / "trackio")}
        environment.pop("WANDB_SERVICE", None)  # of this process, where it has used wandb itself
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ended.returncode == status, ended.stderr[-3000:]
    logged = {(line.pop("stage"), line.pop("step")): line for line in read_lines(run / "metrics.jsonl")}
    sent = READERS[service](run)
    places = [(stage, step) for stage, step, _ in sent]
    assert set(places) == set(logged) and len(logged) == 16
    if service == "tensorboard":  # the others may have kept what they are sent again: the same values
        assert len(places) == 16
    for stage, step, metrics in sent:
        without = {name: x for name, x in metrics.items() if not name.startswith("perf/")}
        assert without == pytest.approx(logged[stage, step], rel=1e-6) and "perf/seconds" in metrics
