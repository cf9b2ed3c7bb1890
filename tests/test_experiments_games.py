"""The experiments in worlds of words, tiny: what a run leaves behind, that it repeats and resumes to the same bits, and
that its numbers are those of the games."""

import json
import re
import shutil
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from running import start

from experiments import run
from experiments.stages import games
from experiments.stages.game_configs import CloneStage, Network, Play, ValueStage
from experiments.stages.games import Task
from rlhfjax.config import ILQL, Optimizer
from rlhfjax.environments.grid import optimal_values
from rlhfjax.environments.text import converse, maze_player, maze_score, maze_table, maze_world
from rlhfjax.run_folder import RunFolder, read_lines

BITWISE = ("metrics.jsonl", "samples.jsonl", "summary.json")
STAGE = {"steps": 2, "batch": 4, "optimizer": {"warmup_steps": 0}}
TINY: dict[str, Any] = {
    "games": 12,
    "network": {"layers": 1, "width": 16, "heads": 2, "mlp_width": 16},
    "play": {"points": 2, "games": 5, "final_games": 5},
    "clone": STAGE,
    "best": STAGE,
    "soft_q": STAGE,
    **{name: STAGE | {"betas": [1.0, 4.0]} for name in games.VALUE_METHODS},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "maze": TINY | {"turns": 6, "piece": 3, "algorithms": "best,ilql"},
    "wordle": TINY | {"words": 6, "tries": 3, "algorithms": "monte_carlo"},
    "twenty_questions": TINY | {"things": 4, "turns": 4, "algorithms": "soft_q"},
    "star_graph": TINY | {"algorithms": "clone,dqn"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_leaves_everything_behind(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "run"
    assert start(name, SETTINGS[name], folder) == 0
    methods = SETTINGS[name]["algorithms"].split(",")
    lines = read_lines(folder / "metrics.jsonl")
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    assert stages == ["data", *dict.fromkeys(["clone", *methods]), "evaluation"]
    for method in methods:
        rows = [line for line in lines if line["stage"] == method]
        assert [row["updates"] for row in rows] == [1, 2]
        assert (folder / "checkpoints" / method / "2" / "manifest.json").is_file()
    found = np.load(folder / "arrays" / "evaluation.npz")
    names = {key.rsplit("/", 1)[0] for key in found.files}
    values = [m for m in methods if m in games.VALUE_METHODS]
    assert len(names) == len(methods) + len(values)
    (evaluation,) = [line for line in lines if line["stage"] == "evaluation"]
    report = (folder / "report.md").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    for policy in names:
        assert found[f"{policy}/score"].shape == (5,)
        assert evaluation[f"{policy}/score"] == pytest.approx(found[f"{policy}/score"].mean(), rel=1e-6)
        assert "A game of " + policy.replace("_", "\\_") in report
    assert any(x == pytest.approx(evaluation[f"{p}/score"]) for p in names for x in summary.values())
    assert (folder / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "| player |" in capsys.readouterr().out
    assert "optimum/score" in summary and "the optimum, exact" in report


def test_a_run_in_the_folder_of_runs_ends_with_its_report(tmp_path, monkeypatch, capsys):
    """As a user types it: no --run-dir, so that the folder is named from where the program runs."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "star.yaml").write_text(yaml.safe_dump(SETTINGS["star_graph"] | {"algorithms": "clone"}))
    assert run.main(["star_graph", "--config", "star.yaml"]) == 0
    (folder,) = (tmp_path / "runs" / "star_graph").iterdir()
    assert "![Score against updates](<figures/curves.png>)" in (folder / "report.md").read_text()
    (folder / "report.md").unlink()
    assert run.main(["--resume", str(folder.relative_to(tmp_path))]) == 0
    assert (folder / "report.md").is_file() and (folder / "figures" / "curves.png").is_file()
    assert f"Results are in {folder.relative_to(tmp_path)}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_in_the_same_bits(tmp_path):
    """Stopped after the first of two checkpoints of ILQL."""
    settings = SETTINGS["maze"] | {"algorithms": "ilql"}
    assert start("maze", settings, tmp_path / "whole") == 0
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    lines = read_lines(stopped / "metrics.jsonl")
    kept = [x for x in lines if x["stage"] in ("data", "clone") or (x["stage"] == "ilql" and x["step"] == 1)]
    (stopped / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (stopped / "arrays" / "evaluation.npz").unlink()
    shutil.rmtree(stopped / "checkpoints" / "ilql" / "2")
    for path in ("summary.json", "report.md"):
        (stopped / path).unlink()
    assert run.main(["--resume", str(stopped)]) == 0
    for file in BITWISE:
        assert (stopped / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


@pytest.mark.slow
def test_a_method_does_not_depend_on_which_others_run(tmp_path):
    for methods in ("best,ilql", "ilql"):
        assert start("maze", SETTINGS["maze"] | {"algorithms": methods}, tmp_path / methods) == 0
    both, alone = (
        [x for x in read_lines(tmp_path / name / "metrics.jsonl") if x["stage"] == "ilql"]
        for name in ("best,ilql", "ilql")
    )
    assert both == alone


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"algorithms": "clone,iql"}, "'iql' is unknown"),
        ({"games": 0}, "games must be at least 1"),
        ({"best_fraction": 0.0}, "best_fraction=0.0"),
        ({"network": {"width": 18, "heads": 2}}, "multiple of twice heads=2"),
        ({"ilql": STAGE | {"betas": []}}, "betas names none"),
        ({"ilql": STAGE | {"steps": 0}}, "ilql: steps=0"),
        ({"ilql": STAGE | {"optimizer": {"warmup_steps": 9}}}, "warmup_steps=9"),
        ({"ilql": STAGE | {"algorithm": {"discount": 1.5}}}, "discount=1.5"),
        ({"random": 1.5}, r"random=1.5 must lie in \[0, 1\]"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_run(change, words, tmp_path, capsys):
    settings = SETTINGS["maze"] | change
    assert start("maze", settings, tmp_path / "run") != 0
    assert re.search(words, " ".join("".join(capsys.readouterr()).split()))
    assert not (tmp_path / "run" / "arrays").exists()


def test_returns_are_sums_of_what_follows():
    world = maze_world(turns=6)
    data = jax.device_get(converse(world, maze_player(world, random=0.8), jax.random.key(0), 8))
    found = games.returned(data, 0.9).reward_BT
    for i in range(8):
        rewards = data.reward_BT[i][data.agent_BT[i]].astype(np.float64)
        expected = [sum(0.9**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]
        np.testing.assert_allclose(found[i][data.agent_BT[i]], expected, rtol=1e-5)


@pytest.mark.slow
def test_values_learnt_from_bad_players_lead_out_of_the_maze(tmp_path):
    """A smaller maze: cloning plays as the players did, ILQL nearly as well as can be."""
    layout = ("######", "#    #", "# ## #", "#G## #", "######")
    world = maze_world(layout, turns=40)
    task = Task(world, maze_player(world, random=0.85), memory=1, piece=5)
    optimizer = Optimizer(learning_rate=3e-3, warmup_steps=10)
    # One-step targets would take thousands of updates: after 1000 some seeds still wander about.
    algorithm = ILQL("sarsa", discount=1.0, expectile=0.7, lam=0.9, polyak=0.2, policy_coefficient=None)
    config = SimpleNamespace(
        network=Network(layers=1, width=32, heads=2, mlp_width=64),
        play=Play(points=1, games=8, final_games=300),
        best_fraction=0.1,
        clone=CloneStage(steps=250, batch=32, optimizer=optimizer),
        ilql=ValueStage(steps=600, batch=32, betas=(16.0,), algorithm=algorithm, optimizer=optimizer),
    )
    folder = RunFolder(tmp_path)
    data = games.collect(task, 400, folder)
    policies = games.learn_all(["clone", "ilql"], config, task, data, folder)
    found = games.evaluate(policies, task, config.play, folder)
    table = maze_table(layout)
    best_SA = np.eye(4)[np.argmax(optimal_values(table, discount=1.0)[1], axis=1)]
    optimum = maze_score(best_SA, layout, turns=40)
    assert found["clone"].score.mean() == pytest.approx(data.score_B.mean(), abs=4.0)
    assert data.score_B.mean() < optimum - 10.0
    assert found["ilql, beta 16"].score.mean() > optimum - 1.0
