"""Trackers of a run that is stopped and resumed: one run of the service, no step twice."""

import json
import sqlite3
from pathlib import Path

import pytest

from rlhfjax import tracking
from rlhfjax.tracking import Tracker


def stopped_and_resumed(name: str, folder: Path) -> None:
    """Steps 1 to 3, then from step 2 on again, as after a checkpoint of step 1."""
    for steps in (range(1, 4), range(2, 6)):
        tracker = tracking.open_trackers(name, folder, {"seed": 0}, "length/one")
        for step in steps:
            tracker.log("sft", step, {"loss/nll": 1.0 / step})
        tracker.log("ppo", 1, {"objective/kl": 0.5})
        tracker.close()


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


def test_wandb_goes_on_in_one_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

    monkeypatch.setenv("WANDB_MODE", "offline")
    stopped_and_resumed("wandb", tmp_path)
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.parent.name.rsplit("-", 1)[-1] for file in files}) == 1
    steps = []
    for file in files:
        data = file.read_bytes()[
            7:
        ]  # after the file's own header: checksum, length, kind and record, again and again
        assert len(data) < 32_000, "records may be cut at the end of a block"
        while data:
            length = int.from_bytes(data[4:6], "little")
            record, data = Record.FromString(data[7 : 7 + length]), data[7 + length :]
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            steps += [json.loads(items["sft/step"])] if "sft/step" in items else []
    assert steps == [1, 2, 3, 4, 5]


def test_trackio_goes_on_in_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read on import
    pytest.importorskip("trackio")
    stopped_and_resumed("trackio", tmp_path)
    (database,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("SELECT run_name, metrics FROM metrics").fetchall()
    assert len({name for name, _ in rows}) == 1
    found = [json.loads(metrics) for _, metrics in rows]
    assert sorted(row["sft/step"] for row in found if "sft/step" in row) == [1, 2, 3, 4, 5]
