"""The comparison of runs: found, read though broken, put together over seeds, and shown in one page."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.options import write_yaml
from experiments.viewing import command
from experiments.viewing.comparison import comparison_html
from experiments.viewing.groups import curves, final_numbers, frontier, group_runs, last_values
from experiments.viewing.runs import find_runs, members, read_runs
from rlhfjax.report import Interval, nested_bootstrap_interval
from rlhfjax.run_folder import RunFolder, create

ROOT = Path(__file__).resolve().parents[1]


def made(
    path: Path, seed: int, beta: float, *, experiment: str = "length", finished: bool = True
) -> RunFolder:
    """A run of three steps; the score of step s is s + seed."""
    config = {
        "experiment": experiment,
        "seed": seed,
        "words": 4,
        "ppo": {"algorithm": {"kl_coefficient": beta}},
    }
    run = create(path, write_yaml(config), experiment=experiment, seed=seed, exact=True)
    for step in (1, 2, 3):
        run.log_metrics("ppo", step, {"objective/score": float(step + seed), "objective/kl": beta * step})
    run.log_samples("validation", 0, [{"prompt": "p", "ppo, greedy": f"<b>{seed}</b> & {beta}"}])
    if finished:
        run.write_summary({"ppo/gold": 1.0 + seed, "ppo/kl": 2.0, "ppo/gold_low": 0.5, "ppo/gold_high": 1.5})
    return run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for beta in (0.1, 0.3):
        for seed in (0, 1):
            made(tmp_path / f"b{beta}-s{seed}", seed, beta)
    return tmp_path


def data_of(page: str) -> list[dict]:
    return [json.loads(x) for x in re.findall(r'application/json">(.*?)</script>', page)]


def test_runs_that_differ_in_the_seed_are_one_setting(runs: Path):
    first, second = group_runs(read_runs([runs]))
    assert (first.label, second.label) == ("kl_coefficient 0.1", "kl_coefficient 0.3")
    assert first.settings == {"ppo.algorithm.kl_coefficient": 0.1} and first.seeds == "0, 1"
    curve = curves(first)["ppo"]
    assert curve["step"] == [1, 2, 3] and curve["values"]["objective/score"] == [1.5, 2.5, 3.5]
    assert (curve["low"]["objective/score"], curve["high"]["objective/score"]) == ([1, 2, 3], [2, 3, 4])
    assert final_numbers(first)["ppo/gold"] == (1.5, 1.0, 2.0)  # of two runs: their range
    assert frontier(first) == {"ppo": (2.0, (1.5, 1.0, 2.0))}
    assert last_values(second)[("ppo", "objective/score")] == (3.5, 3.0, 4.0)


def test_one_run_has_the_interval_of_its_items_and_no_band(runs: Path):
    (group,) = group_runs(read_runs([runs / "b0.1-s0"]))
    assert final_numbers(group)["ppo/gold"] == Interval(1.0, 0.5, 1.5)
    assert "ppo/gold_low" not in final_numbers(group)
    assert curves(group)["ppo"]["low"] == {} and last_values(group)[("ppo", "objective/kl")] == pytest.approx(
        0.3
    )


def test_numbers_with_ends_are_one_row_and_labels_tell_settings_of_one_name_apart(tmp_path: Path):
    numbers = {
        "a/value": 1.0,
        "a/low": 0.5,
        "a/high": 1.5,
        "b": 2.0,
        "b, low": 1.0,
        "b, high": 3.0,
        "c/low": 4.0,
    }
    for name, steps in (("x", 1), ("y", 2)):
        config = {"experiment": "length", "seed": 0, "ppo": {"steps": steps}, "sft": {"steps": 3 - steps}}
        run = create(tmp_path / name, write_yaml(config), experiment="length", seed=0, exact=True)
        run.log_metrics("ppo", 1, {"gold": 1.0})
        run.write_summary(numbers)
    first, second = group_runs(read_runs([tmp_path]))
    assert final_numbers(first) == {"a": Interval(1.0, 0.5, 1.5), "b": Interval(2.0, 1.0, 3.0), "c/low": 4.0}
    assert (first.label, second.label) == ("ppo.steps 1, sft.steps 2", "ppo.steps 2, sft.steps 1")


def test_a_seed_that_stopped_early_counts_as_far_as_it_goes(runs: Path):
    file = runs / "b0.1-s1" / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:1]))
    curve = curves(group_runs(read_runs([runs]))[0])["ppo"]
    assert curve["values"]["objective/score"] == [1.5, 2.0, 3.0]
    assert curve["low"]["objective/score"] == [1.0, None, None]


def test_gold_of_results_json_is_taken_over_items(runs: Path):
    for seed, gold in ((0, [0.0, 1.0]), (1, [2.0, 3.0])):
        rows = [{"method": "dpo", "gold": gold, "kl": 1.0 + seed, "seconds": 1.0, "command": ""}]
        (runs / f"b0.1-s{seed}" / "results.json").write_text(
            json.dumps({"task": "t", "metric": "m", "rows": rows})
        )
    kl, gold = frontier(group_runs(read_runs([runs]))[0])["dpo"]
    assert kl == 1.5
    assert gold == nested_bootstrap_interval([[0.0, 1.0], [2.0, 3.0]], 0, resamples=1000)


def test_the_page_has_what_differs_and_texts_as_texts(runs: Path):
    page = comparison_html(read_runs([runs]))
    points, shown, samples = data_of(page)
    assert [point["group"] for point in points["points"]] == ["kl_coefficient 0.1", "kl_coefficient 0.3"]
    assert [curve["label"] for curve in shown["stages"]["ppo"]] == [
        "kl_coefficient 0.1",
        "kl_coefficient 0.3",
    ]
    assert len(samples["sources"]) == 4 and samples["sources"][0]["texts"] == {"0": "<b>0</b> & 0.1"}
    assert "<b>" not in page and "4 runs, 2 settings" in page
    assert "ppo.algorithm.kl_coefficient" in page and ">words<" not in page


def test_parts_of_a_run_are_found_with_the_settings_of_their_task(tmp_path: Path):
    settings = {"experiment": "results", "seed": 0, "length": {"words": 7}}
    create(tmp_path / "all", write_yaml(settings), experiment="results", seed=0, exact=True)
    for seed in (3, 4):
        part = tmp_path / "all" / "length" / f"seed-{seed}"
        RunFolder(part).path.mkdir(parents=True)
        for step in (1, 2):
            RunFolder(part).log_metrics("ppo", step, {"gold": 1.0})
    (tmp_path / "all" / "checkpoints" / "x").mkdir()
    (tmp_path / "all" / "checkpoints" / "x" / "metrics.jsonl").touch()
    assert [path.name for path in find_runs(tmp_path)] == ["seed-3", "seed-4"]
    (group,) = group_runs(read_runs([tmp_path]))
    assert (group.experiment, group.seeds, group.runs[0].settings) == ("length", "3, 4", {"words": 7})


def test_the_runs_of_one_program_are_parted(tmp_path: Path):
    config = {"experiment": "sweep", "seed": 5, "seeds": 2, "vary": ["algorithm.kl-coefficient=0.1,0.3"]}
    sweep = create(tmp_path / "sweep", write_yaml(config), experiment="sweep", seed=5, exact=True)
    for step in (1, 2):
        sweep.log_metrics("ppo", step, {f"gold/run_{r}": float(r) for r in range(4)} | {"loss/total": 1.0})
    parted = members(read_runs([tmp_path])[0])
    assert [run.seed for run in parted] == [5, 6, 5, 6]
    first, second = group_runs(parted)
    assert (first.label, second.label) == ("kl_coefficient 0.1", "kl_coefficient 0.3")
    assert curves(second)["ppo"]["values"] == {"gold": [2.5, 2.5]}  # what all share is the first one's only
    assert curves(first)["ppo"]["values"] == {"gold": [0.5, 0.5], "loss/total": [1.0, 1.0]}
    world = create(tmp_path / "world", "experiment: cartpole\nseed: 0\n", experiment="x", seed=0, exact=True)
    for step in (1, 2):
        world.log_metrics("ppo", step, {"seed_0/return": 1.0, "seed_1/return": 3.0, "greedy/low": 1.0})
    (group,) = group_runs(members(read_runs([tmp_path / "world"])[0]))
    assert curves(group)["ppo"]["values"] == {"greedy/low": [1.0, 1.0], "seed/return": [2.0, 2.0]}


def test_what_is_broken_is_told_and_the_rest_is_shown(runs: Path, capsys):
    broken, quiet, bare = (runs / name for name in ("b0.1-s0", "quiet", "bare"))
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('nonsense\n{"stage": "ppo", "ste')
    (broken / "summary.json").write_text("{")
    create(quiet, "experiment: maze\nseed: 0\n", experiment="maze", seed=0, exact=True)
    shutil.copytree(runs / "b0.3-s0", bare)
    (bare / "config.yaml").write_text("a: [")
    out = runs / "page.html"
    assert command.main([str(runs), "--out", str(out)]) == 0
    page, said = out.read_text(), capsys.readouterr().out
    for words in (
        "b0.1-s0: metrics.jsonl, line 4 is not one of ours",
        "b0.1-s0: metrics.jsonl: the last line is half written",
        "b0.1-s0: summary.json cannot be read",
        "quiet: it has logged no metrics yet",
        "is not valid YAML",
    ):
        assert words in page and words in said
    assert "The runs are of different experiments" in page and "6 runs are compared" in said


def test_one_run_is_compared(runs: Path, capsys):
    assert command.main([str(runs / "b0.1-s0"), "--out", str(runs / "page.html")]) == 0
    assert "1 run is compared in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not there; give folders such as runs/NAME"),
        ([], "give at least one folder"),
        (["empty"], "empty holds no run: there is no metrics.jsonl in it"),
        (["file"], "file is a file, not the folder of a run"),
        (["quiet"], "nothing has been logged yet by quiet"),
        (["b0.1-s0", "--out", "no/where.html"], "there is no folder"),
    ],
)
def test_what_cannot_be_compared(runs: Path, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    Path("empty").mkdir()
    Path("file").touch()
    create(Path("quiet"), "experiment: maze\n", experiment="maze", seed=0, exact=True)
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err and not Path("comparison.html").exists()


def test_bands_equal_a_loop():
    from experiments.viewing.groups import _band

    value_RT = np.random.default_rng(0).normal(size=(3, 2))
    mean, low, high = _band(value_RT)
    generator = np.random.default_rng(0)
    drawn = generator.integers(3, size=(1000, 3))
    means = np.array([[value_RT[row, t].mean() for t in range(2)] for row in drawn])
    np.testing.assert_allclose(mean, value_RT.mean(axis=0))
    np.testing.assert_allclose([low, high], np.percentile(means, [2.5, 97.5], axis=0))


def test_the_script_answers_without_jax_and_the_experiment_is_still_there():
    script = ROOT / "experiments" / "compare.py"
    code = "import runpy, sys; sys.argv = ['compare.py', '--help']\n"
    code += f"try: runpy.run_path({str(script)!r}, run_name='__main__')\nfinally: print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert "Compares runs" in run.stdout and run.stdout.splitlines()[-1] == "False"
    from experiments import compare

    assert compare.Config().seeds == 1
