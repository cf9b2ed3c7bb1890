"""Many runs of PPO on text in one program: each is what it is alone, the report says what was logged, resuming changes
no bit, and settings that cannot be are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import start
from tiny_text import write_world

from experiments import run, sweep
from experiments.options import flatten, override, to_mapping
from experiments.stages.configs import PPOStage
from experiments.stages.many import make_grid, with_values
from rlhfjax.run_folder import read_lines

VARY = ["algorithm.kl-coefficient=0.05,0.5", "temperature=0.7,1"]
BITWISE = ("metrics.jsonl", "summary.json")


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Any]:
    world = write_world(tmp_path_factory.mktemp("world"))
    return {name: world[name] for name in ("text", "sft", "ppo")} | {"words": 2}


def ppo_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / "metrics.jsonl") if line["stage"] == "ppo"]


@pytest.mark.slow
def test_each_run_is_what_it_is_alone_and_resumes(settings, tmp_path, capsys):
    folder = tmp_path / "many"
    assert start("sweep", settings | {"seeds": 2, "vary": VARY}, folder) == 0
    many = ppo_lines(folder)
    assert "| kl\\_coefficient 0.5, temperature 1 |" in capsys.readouterr().out
    # Settings outermost, the last of them fastest, seeds innermost: 0.5 and 1 are runs 6 and 7.
    ppo = settings["ppo"] | {
        "algorithm": {"kl_coefficient": 0.5, "epochs": 1, "minibatches": 2, "value_coefficient": 0.1}
    }
    alone = settings | {
        "ppo": ppo | {"temperature": 1.0},
        "evaluation": {"prompts": 2, "temperatures": [], "best_of": []},
    }
    assert start("length", alone, tmp_path / "alone") == 0
    for line, single in zip(many, ppo_lines(tmp_path / "alone"), strict=True):
        for metric in ("objective/score", "objective/kl", "gold"):
            assert line[f"{metric}/run_6"] == pytest.approx(single[metric], rel=2e-3, abs=2e-5), metric
    assert len({many[-1][f"objective/kl/run_{r}"] for r in range(8)}) == 8
    for metric in ("objective/score", "gold"):
        runs = [many[-1][f"{metric}/run_{r}"] for r in range(8)]
        assert many[-1][metric] == pytest.approx(np.mean(runs), rel=1e-5)
    summary = json.loads((folder / "summary.json").read_text())
    # Of three steps the last quarter is one.
    expected = np.mean([many[-1][f"objective/kl/run_{r}"] for r in (6, 7)])
    assert summary["kl_coefficient 0.5, temperature 1/objective/kl"] == pytest.approx(expected, rel=1e-5)
    assert (folder / "figures" / "ppo.png").read_bytes().startswith(b"\x89PNG")
    kept = {name: (folder / name).read_bytes() for name in BITWISE}
    for path in (folder / "checkpoints" / "ppo").glob("3*"):
        shutil.rmtree(path)
    (folder / "summary.json").unlink()
    assert run.main(["--resume", str(folder)]) == 0
    assert kept == {name: (folder / name).read_bytes() for name in BITWISE}


def test_the_grid_holds_every_combination_with_every_seed():
    grid = make_grid(PPOStage(), VARY, 3, first_seed=5)
    assert grid.names == ("algorithm.kl_coefficient", "temperature")
    np.testing.assert_allclose(
        grid.value_RH[::3], [[0.05, 0.7], [0.05, 1.0], [0.5, 0.7], [0.5, 1.0]], rtol=1e-6
    )
    np.testing.assert_array_equal(grid.seed_R, [5, 6, 7] * 4)
    changed = with_values(PPOStage(), grid.names, [0.25, 0.9])
    assert changed.algorithm.kl_coefficient == 0.25 and changed.temperature == 0.9
    assert changed.optimizer == PPOStage().optimizer and changed.algorithm.epochs == 1
    one = make_grid(PPOStage(), [VARY[0], "temperature=0.9"], 1, first_seed=0)
    assert one.label(1) == "kl_coefficient 0.5" and one.value_RH[1, 1] == np.float32(0.9)
    alone = make_grid(PPOStage(), [], 2, first_seed=0)
    assert alone.value_RH.shape == (2, 0) and alone.label(0) == "the settings"


@pytest.mark.slow
def test_every_float_may_differ(settings, tmp_path):
    """Each of them traced, at the values that they have alone."""
    stage = override(sweep.Config().ppo, settings["ppo"], source="the test")
    floats = {path: x for path, x in flatten(to_mapping(stage)).items() if type(x) is float}
    assert {"temperature", "missing_eos_penalty", "algorithm.clip_low", "optimizer.learning_rate"} <= set(
        floats
    )
    vary = [f"{path}={value!r}" for path, value in floats.items()]
    results = []
    for name, chosen in (("traced", vary), ("constant", [])):
        assert start("sweep", settings | {"seeds": 1, "vary": chosen}, tmp_path / name) == 0
        results.append(ppo_lines(tmp_path / name))
    for traced, constant in zip(*results, strict=True):
        assert traced.keys() == constant.keys()
        for metric, value in constant.items():
            assert traced[metric] == (
                value if metric == "stage" else pytest.approx(value, rel=5e-3, abs=1e-4)
            ), metric


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vary": ["algorithm.kl=0.1"]}, "'algorithm.kl' is no float setting of the stage"),
        ({"vary": ["steps=1,2"]}, "'steps' is no float setting"),
        ({"vary": ["temperature"]}, "must read PATH=NUMBER,NUMBER"),
        ({"vary": ["temperature=hot"]}, "must read PATH=NUMBER,NUMBER"),
        ({"vary": ["temperature=1,nan"]}, "must read PATH=NUMBER,NUMBER"),
        ({"vary": ["temperature=1", "temperature=2"]}, "names 'temperature' twice"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"ppo": {"prompts": 98}}, "asks for 98 prompts"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_run(settings, change, words, tmp_path, capsys):
    assert start("sweep", settings | change, tmp_path / "run") != 0
    assert words in " ".join(capsys.readouterr().err.split())
    assert not read_lines(tmp_path / "run" / "metrics.jsonl")
