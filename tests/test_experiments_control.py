"""The experiments in worlds of control, tiny: what a run leaves behind, that it repeats and resumes to the same bits,
how solving is told, and the pictures."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import start

from experiments import run
from experiments.stages import control, control_scenes, control_tables
from experiments.stages.control import Outcome
from experiments.stages.control_worlds import binned, scaled
from rlhfjax.environments import acrobot, autoreset, cart_pole, mountain_car
from rlhfjax.run_folder import read_lines

BITWISE = ("metrics.jsonl", "samples.jsonl", "summary.json")
PPO = {"environment_steps": 64, "worlds": 4, "steps": 8, "network": {"hidden": [8]}}
PQN = PPO | {"algorithm": {"minibatches": 2}}
DQN = PPO | {"updates": 1, "batch": 4, "capacity": 64, "learning_starts": 8}
TABULAR = {"environment_steps": 64, "worlds": 4, "steps": 4}
TINY: dict[str, Any] = {"seeds": 2, "points": 4, "episodes": 2, "final_episodes": 3}
SECTIONS = {"ppo": PPO, "pqn": PQN, "dqn": DQN}
SETTINGS: dict[str, dict[str, Any]] = {
    "frozen_lake": TINY | {"training": TABULAR, "algorithms": "q_learning,q_lambda"},
    "cliff_walking": TINY | {"training": TABULAR, "algorithms": "expected_sarsa"},
    "cartpole": TINY | SECTIONS | {"algorithms": "ppo,pqn,dqn"},
    "catch": TINY | SECTIONS | {"algorithms": "ppo"},
    "acrobot": TINY | SECTIONS | {"algorithms": "pqn"},
    "bandit": TINY | SECTIONS | {"tabular": TABULAR, "algorithms": "tabular,dqn"},
    "mountain_car": TINY | SECTIONS | {"tabular": TABULAR, "algorithms": "tabular,pqn"},
}


def stages(folder: Path) -> list[str]:
    return list(dict.fromkeys(line["stage"] for line in read_lines(folder / "metrics.jsonl")))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_leaves_everything_behind(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "run"
    assert start(name, SETTINGS[name], folder, "--max-steps", "2") == 0
    lines = read_lines(folder / "metrics.jsonl")
    methods = [stage for stage in stages(folder) if not stage.endswith("_games")]
    assert methods == SETTINGS[name]["algorithms"].split(",")
    for method in methods:
        rows = [line for line in lines if line["stage"] == method]
        assert [row["step"] for row in rows] == [1, 2]
        steps = TABULAR if "frozen" in name or "cliff" in name or method == "tabular" else PPO
        assert rows[0]["environment_steps"] == 2 * steps["worlds"] * steps["steps"]
        greedy = [rows[1][f"seed_{r}/greedy"] for r in range(2)]
        assert rows[1]["greedy/return"] == pytest.approx(np.mean(greedy), rel=1e-5)
        assert rows[1]["greedy/low"] == min(greedy) and rows[1]["greedy/high"] == max(greedy)
        (games,) = [line for line in lines if line["stage"] == f"{method}_games"]
        scores = np.load(folder / "arrays" / f"{method}_games.npz")["score"]
        assert scores.shape == (2, 3) and scores.mean() == pytest.approx(games["greedy/return"], rel=1e-6)
        assert (folder / "checkpoints" / method / "2" / "manifest.json").is_file()
    report = (folder / "report.md").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert all(f"{method}/greedy_return" in summary for method in methods)
    figures = sorted((folder / "figures").glob("*.png"))
    assert figures and all(f"figures/{figure.name}" in report for figure in figures)
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)
    if name != "bandit":
        assert "A game of" in report and "step 0" in report
        assert any(line["frame"].strip() for line in read_lines(folder / "samples.jsonl"))
    assert "| method |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cartpole", "frozen_lake"])
def test_a_run_that_was_stopped_ends_in_the_same_bits(name, tmp_path, monkeypatch):
    """Stopped after the first checkpoint of the first method, replay and worlds included."""
    monkeypatch.setattr(control, "CHECKPOINT_EVERY", 1)
    methods = "dqn" if name == "cartpole" else "sarsa,q_lambda"
    settings = SETTINGS[name] | {"algorithms": methods}
    assert start(name, settings, tmp_path / "whole") == 0
    first = methods.split(",")[0]
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    kept = [line for line in read_lines(stopped / "metrics.jsonl") if line["stage"] == first][:-1]
    last = kept[-1]["step"]
    (stopped / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (stopped / "samples.jsonl").write_text("")
    for path in ("summary.json", "report.md"):
        (stopped / path).unlink()
    shutil.rmtree(stopped / "arrays")
    for path in (stopped / "checkpoints").iterdir():
        if path.name != first:
            shutil.rmtree(path)
    for path in (stopped / "checkpoints" / first).iterdir():
        if path.name.isdigit() and int(path.name) > last:
            shutil.rmtree(path)
    assert run.main(["--resume", str(stopped)]) == 0
    for file in BITWISE:
        assert (stopped / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


@pytest.mark.slow
def test_a_method_does_not_depend_on_which_others_run(tmp_path):
    for methods in ("q_learning,sarsa", "sarsa"):
        assert (
            start("frozen_lake", SETTINGS["frozen_lake"] | {"algorithms": methods}, tmp_path / methods) == 0
        )
    both, alone = (
        [x for x in read_lines(tmp_path / name / "metrics.jsonl") if x["stage"] == "sarsa"]
        for name in ("q_learning,sarsa", "sarsa")
    )
    assert both == alone


def test_bad_settings_are_told_before_anything_runs(tmp_path, capsys):
    for flags, word in (
        (("catch", "--algorithms", "ppo,dqm"), "--algorithms: 'dqm' is unknown; did you mean 'dqn'?"),
        (("frozen_lake", "--algorithms", "q"), "there are: q_learning, sarsa"),
        (("catch", "--algorithms", ","), "--algorithms names none"),
        (("catch", "--seeds", "0"), "--seeds must be at least 1, not 0"),
        (("frozen_lake", "--lake", "SX/FG"), "a lake is rows of equal length of the letters S, F, H, G"),
        (("bandit", "--mean"), "at least one arm"),
        (("catch", "--dqn.batch", "60000"), "batch=60000 must lie between 1 and the replay's capacity"),
    ):
        folder = tmp_path / "-".join(flags).replace("/", "")
        assert run.main([*flags, "--run-dir", str(folder)]) == 1
        assert word in capsys.readouterr().err
        assert not list((folder / "checkpoints").iterdir())


def outcome(sampled, ended, greedy) -> Outcome:
    x = 10 * (1 + np.arange(len(greedy[0])))
    arrays = (np.asarray(a, np.float64) for a in (sampled, ended, greedy))
    return Outcome("a", x, *arrays, score=np.zeros((1, 1)), game=np.zeros(1), rate=None)


def test_when_a_seed_counts_as_solved():
    """The mean is over the newest points with 100 episodes or more, weighted by their numbers."""
    found = outcome(
        sampled=[[500, 400, 480, 480], [np.nan, 0, 474, 500], [500, 500, 500, np.nan], [500, 100, 100, 480]],
        ended=[[60, 60, 60, 60], [0, 100, 99, 1], [10, 10, 10, 0], [10, 0, 90, 100]],
        greedy=[[1, 2, 3, 2], [5, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 3]],
    )
    np.testing.assert_array_equal(control.solved_at(found, 475), [40, np.nan, np.nan, 40])
    np.testing.assert_array_equal(control.solved_at(found, 440), [20, 40, np.nan, 40])
    np.testing.assert_array_equal(control.greedy_solved_at(found, 3), [30, 10, np.nan, 40])


def test_a_table_counts_as_optimal_from_where_it_stays_so():
    gap = np.array([[0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [np.inf, 0, 5e-4, 0]])
    found = control_tables.Learnt(outcome(gap, gap, gap), np.zeros((5, 1, 1)), gap, gap)
    np.testing.assert_array_equal(control_tables.optimal_from(found), [30, 40, np.nan, 10, 20])


def test_metrics_of_iterations_and_seeds_are_put_together():
    """Two seeds, three iterations: returns are weighted by the episodes that ended, counts are summed."""
    metrics = {
        "episode/return": jnp.array([[2.0, 0.0, 8.0], [0.0, 0.0, 0.0]]),
        "episode/length": jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]),
        "episode/count": jnp.array([[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]]),
        "environment_steps": jnp.full((2, 3), 5.0),
        "td/error": jnp.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]),
        "td/error_max": jnp.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]),
    }
    whole = jax.vmap(control._over_iterations)(metrics)
    np.testing.assert_allclose(whole["episode/return"], [26 / 4, np.nan])
    found = control._over_seeds(whole, jnp.array([1.0, 3.0]))
    assert found["episode/return"] == 6.5 and found["episode/count"] == 4 and found["environment_steps"] == 30
    assert found["td/error"] == 3.0 and found["td/error_max"] == 5.0
    assert found["greedy/return"] == 2 and found["greedy/low"] == 1 and found["greedy/high"] == 3
    assert jnp.isnan(found["seed_1/return"]) and found["seed_0/episodes"] == 4


def test_scenes_in_letters():
    upright = control_scenes.CART_POLE.draw(np.array([0.0, 0, 0, 0])).split("\n")
    assert len(upright) == 6 and set(upright[-1]) == {"_"} and "#" in upright[4]
    assert upright[1].index("o") in (14, 15)
    right = control_scenes.CART_POLE.draw(np.array([1.2, 0, 0.7, 0])).split("\n")
    assert right[4].index("#") > 18 and max(line.rfind("o") for line in right) > right[4].index("#")
    hanging = np.array([1.0, 0, 1, 0, 0, 0])  # both links hang down
    lowest = control_scenes.ACROBOT.draw(hanging).split("\n")[-2:]
    assert "x" in "".join(lowest)
    up = control_scenes.ACROBOT.strokes(np.array([-1.0, 0, 1, 0, 0, 0]))
    np.testing.assert_allclose(up[2].points[1], (0, 2), atol=1e-12)  # the tip of both stretched upwards
    bent = control_scenes.ACROBOT.strokes(np.array([1.0, 0, 0, 1, 0, 0]))  # the second to the right
    np.testing.assert_allclose(bent[2].points, [(0, -1), (1, -1)], atol=1e-12)
    board = np.zeros((4, 3))
    board[1, 2] = board[3, 0] = 1
    assert control_scenes.catch_scene(4, 3).draw(board) == "...\n..o\n...\n=.."


def test_pictures_beside_each_other():
    text = control_scenes.beside(["ab\ncd", "e"], ["one", "two"], width=20)
    assert text == "one   two\nab    e\ncd"
    assert control_scenes.beside(["a", "b"], ["x", "y"], width=3) == "x\na\n\ny\nb"
    assert control.pick_frames(3) == [0, 1, 2] and control.pick_frames(100, 3) == [0, 50, 99]


def test_maps_of_policies_and_values():
    drawn = control_tables.Map(("SF", "HG"), "<v>^")
    q = np.array([[0, 1, 0, 0], [0, 0, 0, 2], [1, 0, 0, 0], [1, 0, 0, 0]], np.float64)
    standing = np.array([True, True, False, False])
    assert drawn.policy(q, standing) == "v ^\nH G"
    assert drawn.values(q.max(axis=1), standing) == " 1.000  2.000\n     H      G"
    assert drawn.place(np.array(2)) == "SF\n@G"


def test_a_world_seen_otherwise():
    env, low, high = mountain_car(), (-1.2, -0.07), (0.6, 0.07)
    key = jax.random.key(0)
    plain, state = env.reset(key, env.params)
    seen, _ = scaled(env, low, high).reset(key, env.params)
    np.testing.assert_allclose(-0.3 + 0.9 * seen[0], plain[0], rtol=1e-6)
    stepped = scaled(env, low, high).step(key, state, jnp.int32(2), env.params)[0]
    np.testing.assert_allclose(
        0.07 * stepped[1], env.step(key, state, jnp.int32(2), env.params)[0][1], rtol=1e-5
    )
    table = binned(env, low, high, (3, 4))
    number, _ = table.reset(key, env.params)
    assert table.num_observations == 12 and table.observation_shape == ()
    assert number == int((plain[0] + 1.2) / 0.6) * 4 + 2
    autoreset(table).step(key, state, jnp.int32(0), env.params)  # keeps to the protocol
    scene = control_scenes.of_binned(control_scenes.MOUNTAIN_CAR, low, high, (3, 4))
    car = scene.strokes(np.asarray(number))[-1].points[0]
    assert abs(car[0] - float(plain[0])) <= 0.3
    same = control_scenes.of_scaled(control_scenes.MOUNTAIN_CAR, low, high).strokes(np.asarray(seen))
    np.testing.assert_allclose(same[-1].points[0][0], plain[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("env", "scene"),
    [
        (cart_pole(), control_scenes.CART_POLE),
        (acrobot(), control_scenes.ACROBOT),
        (mountain_car(), control_scenes.MOUNTAIN_CAR),
    ],
)
def test_every_start_is_seen(env, scene):
    observation, _ = env.reset(jax.random.key(0), env.params)
    text = scene.draw(np.asarray(observation))
    marks = {stroke.mark for stroke in scene.strokes(np.asarray(observation))}
    assert marks <= set(text)


def test_without_matplotlib_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from experiments.stages.control_report import figure_section

    section = figure_section("Curves", "Text.", {"a": lambda path: pytest.fail("drawn")}, None, "a")  # type: ignore
    assert section.figures == () and 'pip install "rlhfjax[plot]"' in section.text
