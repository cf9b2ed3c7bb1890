"""The dialogue experiment, tiny: what a run leaves behind, that it resumes to the same bits, that its rows are those of
the games, and that its plan is of the programs that a run calls."""

import json
import re
import shutil
from typing import Any

import numpy as np
import pytest
from running import start
from test_planning import expect_called, noted

from experiments import run
from experiments.options import override
from experiments.stages import dialogue
from experiments.stages.dialogue_report import METRIC
from experiments.stages.results import read_results
from rlhfjax.config import Mesh
from rlhfjax.environments.text import Conversation
from rlhfjax.mesh import make_mesh
from rlhfjax.run_folder import read_lines

BITWISE = ("metrics.jsonl", "samples.jsonl", "summary.json")
OPTIMIZER = {"warmup_steps": 0}
STAGE = {"steps": 2, "batch": 4, "optimizer": OPTIMIZER}
PLAYED = {"steps": 2, "worlds": 4, "samples": 2, "optimizer": OPTIMIZER}
TINY: dict[str, Any] = {
    "things": 4,
    "attributes": 5,
    "turns": 3,
    "games": 12,
    "network": {"layers": 1, "width": 16, "heads": 2, "mlp_width": 16},
    "play": {"points": 2, "games": 4, "final_games": 6, "best_of": 2},
    "clone": STAGE,
    "best": STAGE,
    "soft_q": STAGE,
    "ilql": STAGE | {"betas": [1.0]},
    "monte_carlo": STAGE | {"betas": [1.0, 4.0]},
    "dpo": {"steps": 2, "batch": 4, "worlds": 8, "samples": 2, "optimizer": OPTIMIZER},
    "ppo": PLAYED | {"algorithm": {"minibatches": 2}},
    "grpo": PLAYED | {"algorithm": {"minibatches": 2}},
    "rloo": PLAYED,
}
QUICK = TINY | {"methods": ["dpo", "ppo"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("dialogue") / "run"
    assert start("dialogue", QUICK, folder) == 0
    return folder


@pytest.mark.slow
def test_a_run_leaves_everything_behind(whole):
    stages = list(dict.fromkeys(line["stage"] for line in read_lines(whole / "metrics.jsonl")))
    assert stages == ["data", "clone", "pairs", "dpo", "ppo", "evaluation", "best_of"]
    report = (whole / "report.md").read_text()
    assert "the optimum, exact" in report and "figures/curves.png" in report
    for name in ("clone", "dpo", "ppo"):
        assert f"## Dialogues of {name}" in report
    assert report.count("[the game ") == 3 * dialogue.GAMES_SHOWN


@pytest.mark.slow
def test_rows_are_the_games_and_their_commands(whole):
    results = read_results(whole)
    found = np.load(whole / "arrays" / "evaluation.npz")
    best = np.load(whole / "arrays" / "best_of.npz")
    assert results.task == "dialogue, guess who" and results.metric == METRIC
    rows = {row.method: row for row in results.rows}
    assert list(rows) == ["clone", "best of 2", "dpo", "ppo"]
    for name in ("clone", "dpo", "ppo"):
        np.testing.assert_allclose(rows[name].gold, found[f"{name}/score"])
        assert rows[name].command.endswith(f"--world guess_who --seed 0 --methods {name}")
        assert rows[name].kl == pytest.approx(float(found[f"{name}/kl"].mean())) and rows[name].seconds > 0
    assert rows["clone"].kl == pytest.approx(0.0, abs=1e-4) and rows["ppo"].kl != rows["clone"].kl
    np.testing.assert_allclose(rows["best of 2"].gold, best["score"])
    assert rows["best of 2"].kl is None
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["ppo/score"] == pytest.approx(float(found["ppo/score"].mean()))
    # Success and number of turns are all there is to a score.
    won, turns, score = (found[f"clone/{name}"] for name in ("success", "turns", "score"))
    assert set(score - np.where(won, 11.0 - turns, -9.0 - turns)) <= {
        0.0,
        -1.0,
    }  # a last question costs 1 more


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_in_the_same_bits(whole, tmp_path):
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    lines = read_lines(stopped / "metrics.jsonl")
    kept = [x for x in lines if x["stage"] in ("data", "clone", "pairs", "dpo")]
    (stopped / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    for name in ("evaluation", "best_of"):
        (stopped / "arrays" / f"{name}.npz").unlink()
    shutil.rmtree(stopped / "checkpoints" / "ppo")
    for path in ("summary.json", "report.md", "results.json"):
        (stopped / path).unlink()
    assert run.main(["--resume", str(stopped)]) == 0
    for file in BITWISE:
        assert (stopped / file).read_bytes() == (whole / file).read_bytes(), file
    for one, other in zip(read_results(whole).rows, read_results(stopped).rows, strict=True):
        np.testing.assert_array_equal(one.gold, other.gold)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "methods"),
    [
        ("guess_who", ["best", "grpo", "rloo", "ilql", "monte_carlo", "soft_q"]),
        ("twenty_questions", ["dpo", "ppo", "grpo"]),
    ],
)
def test_every_method_runs_in_either_world(world, methods, tmp_path):
    folder = tmp_path / "run"
    settings = TINY | {"world": world, "methods": methods}
    assert start("dialogue", settings, folder, "--max-steps", "2") == 0
    names = [row.method for row in read_results(folder).rows]
    expected = {
        "best": ["best 10% cloned"],
        "ilql": ["q-learning (ilql)"],
        "monte_carlo": ["q-learning (monte_carlo, beta 1)", "q-learning (monte_carlo, beta 4)"],
        "soft_q": ["q-learning (soft_q)"],
    }
    assert names == ["clone", "best of 2", *(x for name in methods for x in expected.get(name, [name]))]


def test_the_best_of_several_games_is_chosen_by_its_score():
    score = np.array([3.0, -1.0, 5.0, 5.0, -2.0, -3.0])
    games = Conversation(*[None] * 7, success_B=score > 4, score_B=score, turns_B=np.arange(6))  # pyright: ignore[reportArgumentType]
    found = dialogue.best_games_of(games, 2)
    np.testing.assert_array_equal(found["score"], [3.0, 5.0, -2.0])
    np.testing.assert_array_equal(found["turns"], [0, 2, 4])  # the first of equals
    np.testing.assert_array_equal(found["success"], [False, True, False])


@pytest.mark.slow
def test_the_plan_is_of_the_programs_that_a_run_calls(tmp_path, monkeypatch):
    calls: list[Any] = []
    make, play = dialogue.make_iterate, dialogue.player

    def noted_iterate(*arguments):
        learner, iterate = make(*arguments)
        return learner, noted(iterate, calls)

    monkeypatch.setattr(dialogue, "make_iterate", noted_iterate)
    monkeypatch.setattr(dialogue, "player", lambda *arguments: noted(play(*arguments), calls))
    assert start("dialogue", QUICK, tmp_path / "run", "--max-steps", "1") == 0
    monkeypatch.undo()
    module = run.load_experiment("dialogue", run.HERE)
    programs = module.plan(override(module.Config(), QUICK, source="the test"), make_mesh(Mesh()))
    assert {"data", "clone", "pairs", "dpo", "ppo", "best_of", "evaluation"} == {x.stage for x in programs}
    wanted = [x for x in programs if x.stage in ("ppo", "best_of", "evaluation", "pairs")]
    expect_called(wanted, calls)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": []}, "--methods is empty"),
        ({"methods": ["ppo", "ppo"]}, "names one twice"),
        ({"world": "twenty_questions", "noise": 0.1}, "only the user of guess_who errs"),
        ({"things": 30}, "count=30"),
        ({"play": {"best_of": 0}}, "best_of=0"),
        ({"ppo": PLAYED | {"steps": 0}}, "ppo: steps=0"),
        ({"ppo": PLAYED | {"algorithm": {"minibatches": 3}}}, "8 rows cannot be cut into 3"),
        ({"methods": ["grpo"], "grpo": PLAYED | {"samples": 1}}, "grpo: samples=1"),
        ({"dpo": TINY["dpo"] | {"samples": 1}}, "dpo: samples=1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_run(change, words, tmp_path, capsys):
    assert start("dialogue", QUICK | change, tmp_path / "run") != 0
    assert re.search(words, " ".join("".join(capsys.readouterr()).split()))
    assert not (tmp_path / "run" / "arrays").exists()


@pytest.mark.slow
def test_playing_teaches_what_the_clone_lacks(tmp_path):
    """Guess who of four people: from a poor clone PPO and GRPO learn by playing, within 40 iterations."""
    settings = TINY | {
        "methods": ["ppo", "grpo"],
        "turns": 4,
        "attributes": 5,
        "games": 600,
        "network": {"layers": 2, "width": 32, "heads": 2, "mlp_width": 64},
        "play": {"points": 1, "games": 32, "final_games": 200, "best_of": 2},
        "clone": {"steps": 200, "batch": 32, "optimizer": {"learning_rate": 3e-3, "warmup_steps": 10}},
        "ppo": {"steps": 40, "worlds": 128},
        "grpo": {"steps": 40, "worlds": 16, "samples": 8},
    }
    assert start("dialogue", settings, tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["clone/score"] < summary["optimum/score"] - 4.0
    for name in ("ppo", "grpo"):
        assert summary[f"{name}/score"] > summary["clone/score"] + 1.0, summary  # two standard errors
