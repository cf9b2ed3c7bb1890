"""The table of all tasks: what a task's run leaves, how runs are put together, and a run of it that is stopped."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from running import start
from test_dialogue import TINY

from experiments import results, run
from experiments.stages import all_results
from experiments.stages.results import Results, Row, read_results, stage_seconds, write_results
from rlhfjax.report import nested_bootstrap_interval
from rlhfjax.run_folder import create

BASE = Row("sft", np.array([0.0, 1.0, 2.0]), None, 1.0, "task --methods sft")
BETTER = Row("ppo", np.array([0.5, 1.5, 2.5]), 0.25, 3.0, "task --methods ppo")


def folder_at(path):
    return create(path, "", experiment="task", seed=0, exact=True)


def test_what_is_written_is_read(tmp_path):
    folder = folder_at(tmp_path / "run")
    write_results(folder, task="a task", metric="points", rows=[BASE, BETTER])
    found = read_results(folder.path)
    assert (found.task, found.metric) == ("a task", "points")
    for row, expected in zip(found.rows, (BASE, BETTER), strict=True):
        np.testing.assert_array_equal(row.gold, expected.gold)
        assert (row.method, row.kl, row.seconds, row.command) == (
            expected.method,
            expected.kl,
            expected.seconds,
            expected.command,
        )


def test_bad_results_are_named(tmp_path):
    folder = folder_at(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="has not ended; continue it with --resume"):
        read_results(folder.path)
    with pytest.raises(ValueError, match="name a method twice: sft, sft"):
        write_results(folder, task="t", metric="m", rows=[BASE, BASE])
    for gold in (np.array([1.0, np.nan]), np.array([[1.0]])):
        with pytest.raises(ValueError, match="of sft on t must be a vector of finite numbers"):
            write_results(folder, task="t", metric="m", rows=[Row("sft", gold, None, 1.0, "")])


def test_seconds_are_those_of_the_stages(tmp_path):
    folder = folder_at(tmp_path / "run")
    for stage, seconds in (("ppo", 1.5), ("sft", 10.0), ("ppo", 2.0), ("validation", 0.25)):
        folder.log_perf(stage, 1, {"seconds": seconds})
    assert stage_seconds(folder, "ppo", "validation") == 3.75


def test_each_task_is_run_under_the_name_that_the_command_line_knows_it_by(tmp_path, monkeypatch):
    """A row's command is made of that name: it must be an experiment that takes the task's settings."""
    jobs = {}
    monkeypatch.setattr(all_results, "run_all", lambda tasks, seeds, folder: jobs.update(tasks) or {})
    monkeypatch.setattr(all_results, "sections", lambda found, folder: [])
    results.run(results.Config(), folder_at(tmp_path / "run"))
    assert list(jobs) == list(results.TASKS)
    for job in jobs.values():
        assert (
            type(run.load_experiment(job.experiment, run.HERE).Config()).__name__ == type(job.config).__name__
        )
        assert run.load_experiment(job.experiment, run.HERE).__name__ == type(job.config).__module__


def test_a_table_over_runs(tmp_path):
    pytest.importorskip("matplotlib")
    folder = folder_at(tmp_path / "run")
    shifted = Row("ppo", BETTER.gold + 1.0, 0.75, 5.0, BETTER.command)
    runs = [Results("a task", "points", [BASE, BETTER]), Results("a task", "points", [BASE, shifted])]
    first, table = all_results.sections({"task": runs}, folder)
    assert Path(first.figures[0][0]).exists()
    assert table.title == "a task" and table.table is not None
    base, better = table.table.rows
    assert base[1] == nested_bootstrap_interval([BASE.gold] * 2, 0, resamples=4000)
    assert base[2:6] == ["1 to 1", "", "", "1"]
    assert better[1].value == 2.0 and better[2] == "1.5 to 2.5"
    # Item by item both leads are constant, .5 and 1.5: nothing is left but the spread of the runs.
    assert (better[3].value, better[3].low, better[3].high) == (1.0, 0.5, 1.5)
    assert better[4:] == ["0.50", "4", BETTER.command]
    found = all_results.numbers({"task": runs})
    assert found == {
        "task/sft/gold": 1.0,
        "task/sft/seconds": 1.0,
        "task/ppo/gold": 2.0,
        "task/ppo/kl": 0.5,
        "task/ppo/seconds": 4.0,
    }
    fewer = Results("a task", "points", [BASE, Row("ppo", BETTER.gold[:2], 0.75, 5.0, "")])
    table = all_results.sections({"task": [fewer]}, folder)[1].table
    assert table is not None and table.rows[1][3] == ""  # other items, no lead


@pytest.mark.slow
def test_a_run_goes_on_with_the_task_where_it_stopped(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    config = {"tasks": ["dialogue"], "seeds": 2, "dialogue": TINY | {"methods": ["dpo"]}}
    assert start("results", config, tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "dialogue/dpo/gold" in summary
    runs = [read_results(tmp_path / "run" / "dialogue" / f"seed-{seed}") for seed in (0, 1)]
    golds = [next(row.gold.mean() for row in found.rows if row.method == "dpo") for found in runs]
    assert summary["dialogue/dpo/gold"] == pytest.approx(np.mean(golds))
    logs = [(tmp_path / "run" / "dialogue" / f"seed-{seed}" / "metrics.jsonl").read_text() for seed in (0, 1)]
    assert logs[0] != logs[1]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "figures/results.png" in report and re.search(r"\| dpo \|", report)
    (tmp_path / "run" / "dialogue" / "seed-1" / "results.json").unlink()
    before = (tmp_path / "run" / "dialogue" / "seed-0" / "results.json").stat().st_mtime_ns
    assert run.main(["--resume", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text()).keys() == summary.keys()
    assert (tmp_path / "run" / "dialogue" / "seed-0" / "results.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tasks": ["dialog"]}, "no task named 'dialog'.*did you mean 'dialogue'"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": ["dialogue", "dialogue"]}, "none twice"),
        ({"seeds": 0}, "one seed"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, capsys, config, message):
    assert start("results", config, tmp_path / "run") == 1
    assert re.search(message, capsys.readouterr().err)
