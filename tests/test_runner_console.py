"""What a run shows, and the trackers it feeds."""

import io
import struct

import pytest
from rich.console import Console

from rlhfjax import console, run_folder, tracking


def piped(**changes):
    """A console that writes into a text; `shown_on` reads it."""
    return Console(file=io.StringIO(), **({"width": 100, "highlight": False} | changes))


def shown_on(screen):
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.000"),
        (0.12345, "0.123"),
        (-2.5, "-2.500"),
        (12.345, "12.35"),
        (123.456, "123.5"),
        (1234567, "1,234,567"),
        (0.0000123, "1.2e-05"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_are_short(value, text):
    assert console.format_number(value) == text


def test_plain_lines_when_piped():
    screen = piped()
    with console.open_stage("ppo", 120, console=screen) as view:
        view.update(1, {"reward": 0.5, "gen tok/s": 3210.4}, True)
        view.update(2, {"reward": 0.6}, False)
        view.note("[bold]continues")
    lines = shown_on(screen).splitlines()
    assert lines == ["ppo            1/120  reward 0.500  gen tok/s 3,210", "ppo          [bold]continues"]


def test_long_lines_are_not_broken_when_piped():
    screen = piped(width=40)
    with console.open_stage("ppo", 9, console=screen) as view:
        view.update(1, {f"metric{i}": 0.5 for i in range(12)}, True)
    assert len(shown_on(screen).splitlines()) == 1


def test_a_terminal_gets_a_bar_and_the_same_lines():
    screen = piped(force_terminal=True, color_system=None)
    with console.open_stage("ppo", 10, start=4, console=screen) as view:
        view.update(5, {"reward": 0.5}, True)
    shown = shown_on(screen)
    assert "ppo           5/10  reward 0.500" in shown
    assert "━" in shown and "5/10" in shown and "\x1b[" in shown


def test_samples_are_printed_literally():
    screen = piped(width=160)
    rows = [
        {"prompt": "[red]not red[/red] \x1b[2J\r\u202e", "after": "two\nlines", "reward": 0.5},
        {"prompt": "x" * 500, "after": "[/]", "reward": -1.0},
    ]
    console.sample_table(rows, title="[bold]step 3", console=screen)
    shown = shown_on(screen)
    assert r"[red]not red[/red] \x1b[2J\r\u202e" in shown
    assert "[bold]step 3" in shown and "[/]" in shown and "-1.000" in shown
    assert "\x1b" not in shown and "\u202e" not in shown
    assert shown.count("x") < 420 and "…" in shown


def test_a_table_shows_the_columns_that_fit_and_says_what_it_left_out():
    screen = piped(width=90)
    console.sample_table(
        [{f"policy {i}": f"text {i}" for i in range(12)}], title="validation", console=screen
    )
    shown = shown_on(screen)
    assert "text 4" in shown and "text 5" not in shown
    assert "7 more columns in samples.jsonl" in shown


def test_no_samples_no_table():
    screen = piped()
    console.sample_table([], console=screen)
    assert shown_on(screen) == ""


def test_the_last_lines_say_where_and_what_next(tmp_path):
    folder = run_folder.create(tmp_path, "", experiment="length", seed=3)
    folder.log_metrics("sft", 1, {"loss": 0.5})
    folder.write_summary({"gold": 0.25})
    text = console.closing_lines(folder, {"gold": 0.25})
    assert f"Results are in {folder.path}" in text
    assert "gold  0.250" in text and "metrics.jsonl" in text
    assert "samples.jsonl" not in text  # it is empty
    assert "python experiments/run.py length --seed 4" in text
    assert f"--resume {folder.path}" in console.interrupted_lines(folder)


def test_a_long_summary_is_cut_at_the_end_of_a_run(tmp_path):
    folder = run_folder.create(tmp_path, "", experiment="length", seed=3)
    text = console.closing_lines(folder, {f"number {i}": float(i) for i in range(20)})
    assert "number 15 " in text and "number 16" not in text and "and 4 more in summary.json" in text


def test_tracker_names_are_read_and_checked(monkeypatch):
    assert tracking.parse_names("jsonl") == ()
    assert tracking.parse_names(" tensorboard ,jsonl,tensorboard") == ("tensorboard",)
    with pytest.raises(ValueError, match="did you mean 'wandb'"):
        tracking.parse_names("jsonl,wanbd")
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"--log wandb needs .* pip install .rlhfjax\[wandb\]"):
        tracking.parse_names("wandb")


def test_combined_trackers_all_hear_and_all_close():
    heard = []
    trackers = [
        tracking.Tracker(lambda *entry, n=n: heard.append((n, *entry)), lambda n=n: heard.append(n))
        for n in (1, 2)
    ]
    both = tracking.combine(trackers)
    both.log("sft", 3, {"loss": 0.5})
    both.close()
    assert heard == [(1, "sft", 3, {"loss": 0.5}), (2, "sft", 3, {"loss": 0.5}), 1, 2]


def test_tensorboard_files_hold_the_numbers(tmp_path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    tracker = tracking.open_trackers("tensorboard", tmp_path, {}, "length/one")
    tracker.log("sft", 3, {"loss": 0.5, "accuracy": 0.25})
    tracker.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:  # a TFRecord: length, its checksum, the record, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    numbers = {
        (value.tag, event.step): value.simple_value for event in events for value in event.summary.value
    }
    assert numbers == {("sft/loss", 3): 0.5, ("sft/accuracy", 3): 0.25}


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = tracking.open_trackers("wandb", tmp_path, {"seed": 0}, "length/one")
    tracker.log("sft", 1, {"loss": 0.5})
    tracker.close()
    assert list((tmp_path / "wandb").glob("offline-run-*"))
