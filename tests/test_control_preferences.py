"""The experiment of control from preferences: what is asked for, what the report says of it, and a tiny run."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from running import start

from experiments import control_preferences, run
from experiments.stages import control_preferences_report as words
from experiments.stages.control_preferences import Found, choice_of, make_study, make_variants
from experiments.stages.results import read_results
from rlhfjax.config import Mesh
from rlhfjax.mesh import make_mesh
from rlhfjax.report import Interval
from rlhfjax.run_folder import RunFolder, read_lines

SETTINGS = {
    "seeds": 2,
    "labels": "0,6",
    "random_labels": "6",
    "noisy_labels": "6",
    "episodes": 3,
    "training": {
        "ppo": {"environment_steps": 256, "worlds": 4, "steps": 16, "network": {"hidden": [8]}},
        "iterations": 2,
        "segment": 6,
        "queries": 4,
        "candidates": 8,
        "reward": {"updates": 3, "batch": 4, "network": {"hidden": [8]}},
    },
}


def config_of(**changes):
    return dataclasses.replace(control_preferences.Config(), **changes)


def test_the_rows_are_those_asked_for():
    config = config_of(labels="0, 25,25", random_labels="25", noisy_labels="")
    assert [v.method for v in make_variants(config)] == [
        "preferences, 0 labels",
        "preferences, 25 labels",
        "random queries, 25 labels",
    ]
    choices = [choice_of(v, config_of()) for v in make_variants(config_of(labels="", noisy_labels="4"))]
    assert [c.labels for c in choices] == [25, 100, 400, 4]
    assert [c.random_queries for c in choices] == [1, 1, 1, 0]
    assert [c.coin for c in choices] == [0, 0, 0, config_of().noise.random]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "cart"}, "--env 'cart' is unknown; there are: cartpole, grid"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"success": 0.0}, "--success 0.0 is a probability"),
        ({"labels": "25,-3"}, "--labels '25,-3': numbers of labels"),
        ({"labels": "", "random_labels": "", "noisy_labels": ""}, "are all empty"),
        ({"labels": "5000"}, "labels=5000 cannot be asked for"),
        ({"training": dataclasses.replace(config_of().training, segment=501)}, "longer than an episode"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_study(config_of(**changes), make_mesh(Mesh(), None))


def test_the_report_says_what_was_found_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(words, "_figures", lambda *_: words.Section("Figures"))
    config = config_of(labels="4,8", random_labels="4,8", noisy_labels="")
    variants = make_variants(config)
    study = SimpleNamespace(title="CartPole", metric="return of an episode", config=config, variants=variants)
    score = np.zeros((4, 4, 3)) + np.array([9.0, 5.0, 2.0, 5.5])[:, None, None]
    score[3] += np.array([-1, 1, -1, 1])[:, None]  # no difference that could be told
    correlation = np.full((4, 4), 0.5)
    correlation[1] = np.nan
    found = Found(
        np.array([10]),
        np.zeros((4, 4, 1)),
        np.zeros((4, 1)),
        score,
        np.full((4, 3), 7.0),
        np.array([4.0, 8.0, 4.0, 8.0]),
        correlation,
        np.full((4, 4), 0.75),
    )
    folder = RunFolder(tmp_path)
    summary = words.report(study, found, folder)  # pyright: ignore[reportArgumentType]
    assert summary["labels_4/return"] == 9 and summary["labels_4/correlation"] == 0.5
    assert np.isnan(summary["labels_8/correlation"]) and summary["true_reward/return"] == 7
    text = (tmp_path / "report.md").read_text()
    assert "4 labels: queries by disagreement did better: +7 of return" in text
    assert "8 labels: queries by disagreement made no difference that these seeds could tell: -0.5" in text
    results = read_results(tmp_path)
    assert [row.method for row in results.rows] == ["true reward (ppo)", *(v.method for v in variants)]
    np.testing.assert_array_equal(results.rows[1].gold, np.full(12, 9.0))
    assert results.rows[3].command.endswith("--labels '' --random-labels '4' --noisy-labels ''")


def test_a_difference_is_told_by_its_interval():
    assert words._verdict(Interval(-2.0, -3.0, -1.0), 4).startswith(
        "did worse: -2 of return (-3 to -1 over 4"
    )
    assert words._verdict(Interval(1.0, -1.0, 3.0), 4).startswith("made no difference")


@pytest.mark.slow
def test_a_run_leaves_everything_behind_and_resumes_to_the_same_bits(tmp_path):
    pytest.importorskip("matplotlib")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start("control_preferences", SETTINGS | {"env": "grid"}, whole) == 0
    # Stopped after the first step of its second stage.
    shutil.copytree(whole, broken)
    lines = read_lines(broken / "metrics.jsonl")
    first, second, *_ = dict.fromkeys(line["stage"] for line in lines)
    kept = [line for line in lines if line["stage"] == first or (line["stage"], line["step"]) == (second, 1)]
    (broken / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    for name in ("summary.json", "report.md", "results.json"):
        (broken / name).unlink()
    shutil.rmtree(broken / "arrays", ignore_errors=True)
    for path in (broken / "checkpoints").iterdir():
        if path.name not in (first, second):
            shutil.rmtree(path)
    for path in (broken / "checkpoints" / second).iterdir():
        if path.name.isdigit() and int(path.name) > 1:
            shutil.rmtree(path)
    assert run.main(["--resume", str(broken)]) == 0
    for name in ("metrics.jsonl", "summary.json"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    summary = json.loads((whole / "summary.json").read_text())
    assert [summary[f"{name}/labels"] for name in ("labels_0", "labels_6", "random_6", "noisy_6")] == [
        0,
        6,
        6,
        6,
    ]
    rows = read_results(whole).rows
    assert len(rows) == 5 and all(row.gold.shape == (6,) and set(row.gold) <= {0.0, 1.0} for row in rows)
    assert (whole / "figures" / "preferences.png").is_file()
