"""The run folder: whole lines, repair, truncation, a full disk."""

import errno
import json
import os
import subprocess
import sys

import pytest

from rlhfjax import run_folder


def make(tmp_path, **changes):
    settings = {"experiment": "length", "seed": 0} | changes
    return run_folder.create(tmp_path / "runs", "experiment: length\n", **settings)


def test_folders_of_one_second_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.time, "strftime", lambda format: "20260102-030405")
    names = [make(tmp_path, seed=7).path.relative_to(tmp_path).as_posix() for _ in range(3)]
    assert names == [f"runs/length/20260102-030405-s7{end}" for end in ("", "-2", "-3")]


def test_an_exact_folder_is_never_written_over(tmp_path):
    folder = run_folder.create(tmp_path / "mine", "a: 1\n", experiment="length", seed=0, exact=True)
    assert folder.path == tmp_path / "mine"
    with pytest.raises(FileExistsError, match="--resume"):
        run_folder.create(tmp_path / "mine", "a: 2\n", experiment="length", seed=0, exact=True)
    assert (tmp_path / "mine" / "config.yaml").read_text() == "a: 1\n"


def test_lines_are_valid_json_whatever_is_in_them(tmp_path):
    folder = make(tmp_path)
    folder.log_metrics("sft", 1, {"loss": 0.5, "bad": float("nan"), "worse": float("-inf"), "count": 3})
    folder.log_samples("sft", 1, [{"text": "line\nbreak \u2028 \x00 \ud800 名"}, {"text": ""}])
    strict = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (folder.path / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert strict == [{"stage": "sft", "step": 1, "loss": 0.5, "bad": None, "worse": None, "count": 3}]
    rows = run_folder.read_lines(folder.path / "samples.jsonl")
    assert [row["text"] for row in rows] == ["line\nbreak \u2028 \x00 \ud800 名", ""]


@pytest.mark.parametrize(
    "torn", [b'{"stage": "sft", "st', b'{"stage": "sft", "step": 3}', b"\x00\x00\x00", b"3\n", b"\n"]
)
def test_a_half_written_last_line_is_dropped(tmp_path, torn):
    folder = make(tmp_path)
    folder.log_metrics("sft", 1, {"loss": 0.5})
    path = folder.path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [line["step"] for line in folder.metrics("sft")] == [1]
    folder.repair()
    assert path.read_bytes() == whole
    folder.log_metrics("sft", 2, {"loss": 0.4})
    assert [line["step"] for line in folder.metrics()] == [1, 2]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    folder = make(tmp_path)
    path = folder.path / "metrics.jsonl"
    path.write_bytes(b'{"stage": "sft", "step": 1}\nwhat\n{"stage": "sft", "step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
        folder.metrics()


def fill(folder):
    """Three stages of three steps; samples at every second step; checkpoints of two of the stages."""
    for stage in ("sft", "reward", "ppo"):
        for step in (1, 2, 3):
            folder.log_metrics(stage, step, {"loss": step / 10})
            folder.log_perf(stage, step, {"seconds": 1.0})
            if step == 2:
                folder.log_samples(stage, step, [{"text": "a"}, {"text": "b"}])
    for stage in ("reward", "ppo"):
        (folder.checkpoints(stage) / "3").mkdir(parents=True)


def kept(folder, name="metrics.jsonl"):
    return [(line["stage"], line["step"]) for line in run_folder.read_lines(folder.path / name)]


@pytest.mark.parametrize(
    ("stage", "step", "metrics", "samples"),
    [
        ("ppo", 3, 9, 6),
        ("ppo", 1, 7, 4),
        ("ppo", 0, 6, 4),
        ("reward", 2, 5, 4),
        ("sft", 1, 1, 0),
        ("sft", -1, 0, 0),
        ("evaluate", 0, 9, 6),
    ],
)
def test_truncation_keeps_exactly_what_came_before(tmp_path, stage, step, metrics, samples):
    folder = make(tmp_path)
    fill(folder)
    all_metrics, all_samples = kept(folder), kept(folder, "samples.jsonl")
    folder.truncate_after(stage, step)
    assert kept(folder) == all_metrics[:metrics]
    assert kept(folder, "samples.jsonl") == all_samples[:samples]
    assert len(kept(folder, "perf.jsonl")) == 9


def test_truncation_sets_the_checkpoints_of_later_stages_aside(tmp_path):
    folder = make(tmp_path)
    fill(folder)
    folder.truncate_after("reward", 1)
    assert sorted(path.name for path in (folder.path / "checkpoints").iterdir()) == ["ppo.stale-1", "reward"]


def test_a_later_stage_is_known_by_either_log(tmp_path):
    """A stage that shows samples only in a later stage must not lose them for want of an order."""
    folder = make(tmp_path)
    folder.log_metrics("sft", 1, {})
    folder.log_metrics("ppo", 1, {})
    folder.log_samples("ppo", 1, [{"text": "a"}])
    folder.truncate_after("sft", 0)
    assert kept(folder) == [] and kept(folder, "samples.jsonl") == []


def test_a_full_disk_is_told_and_takes_nothing_away(tmp_path, monkeypatch):
    folder = make(tmp_path)
    folder.log_metrics("sft", 1, {"loss": 0.5})
    path = folder.path / "metrics.jsonl"
    whole, write = path.read_bytes(), os.write
    calls = []

    def nearly_full(descriptor, data):
        calls.append(data)
        if len(calls) == 1:
            return write(descriptor, data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder.os, "write", nearly_full)
    with pytest.raises(OSError, match=r"metrics.jsonl \(No space left on device\).*--resume") as error:
        folder.log_metrics("sft", 2, {"loss": 0.4})
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == whole


def test_a_write_in_parts_is_put_together(tmp_path, monkeypatch):
    folder, write = make(tmp_path), os.write
    monkeypatch.setattr(run_folder.os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    folder.log_metrics("sft", 1, {"loss": 0.5})
    assert folder.metrics() == [{"stage": "sft", "step": 1, "loss": 0.5}]


def test_the_summary_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = make(tmp_path)
    folder.write_summary({"gold": 0.25, "none": float("nan")})
    assert json.loads((folder.path / "summary.json").read_text()) == {"gold": 0.25, "none": None}

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(OSError, match="summary.json"):
        folder.write_summary({"gold": 0.5})
    assert json.loads((folder.path / "summary.json").read_text())["gold"] == 0.25
    assert [path.name for path in folder.path.iterdir() if "tmp" in path.name] == []


def test_one_process_works_in_a_folder_at_a_time(tmp_path):
    folder = make(tmp_path)
    program = (
        "import sys; from pathlib import Path; from rlhfjax import run_folder\n"
        "with run_folder.lock(Path(sys.argv[1])): pass"
    )

    def other():
        return subprocess.run(
            [sys.executable, "-c", program, str(folder.path)], capture_output=True, text=True
        )

    with run_folder.lock(folder.path):
        assert "another process is working in" in other().stderr
        saved = folder.path / "saved"  # as an editor saves: another file takes the name
        saved.write_text((folder.path / "config.yaml").read_text())
        saved.replace(folder.path / "config.yaml")
        assert "another process is working in" in other().stderr
    assert other().returncode == 0


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    import fcntl

    def no_locks(file, operation):
        assert "+" in file.mode  # a network file system locks only what may be written
        raise OSError(errno.ENOSYS, "Function not implemented")

    folder = make(tmp_path)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with run_folder.lock(folder.path):
        pass
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().out
