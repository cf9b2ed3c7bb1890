"""Whole experiments on a mesh of four devices, from their command line: the numbers of one device; resumed on another
mesh; and what cannot be laid out is told."""

from pathlib import Path
from typing import Any

import jax
import pytest
from running import start
from test_experiments import pretrain_settings
from test_experiments_control import SETTINGS as CONTROL
from test_experiments_games import SETTINGS as GAMES
from tiny_chat import write_chat_model, write_prompts
from tiny_text import write_world

from experiments import run
from rlhfjax.run_folder import read_lines

FOUR = ("--mesh.data", "2", "--mesh.fsdp", "2")
SHORT = """
def short(prompts, completions, **_):
    return [-float(len(text.split())) for text in completions]
"""

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")


def changed(settings: dict[str, Any], **changes: dict[str, Any]) -> dict[str, Any]:
    """The settings with some keys of some sections replaced."""
    return settings | {name: settings.get(name, {}) | section for name, section in changes.items()}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Any]:
    """The tiny world, its batches multiples of four."""
    world = write_world(tmp_path_factory.mktemp("world"))
    return changed(
        world,
        sft={"rows": 4},
        preferences={"prompts": 12, "heldout": 4},
        reward={"prompts": 4},
        ppo={"prompts": 8},
        evaluation={"prompts": 4, "batch": 4, "temperatures": [], "best_of": []},
    )


def alike(
    one: Path, other: Path, *, rtol: float = 2e-3, atol: float = 2e-4, free: tuple[str, ...] = ()
) -> None:
    """The metrics of two runs, number by number; but those whose names begin with one of `free`."""
    pairs = zip(read_lines(one / "metrics.jsonl"), read_lines(other / "metrics.jsonl"), strict=True)
    for expected, found in pairs:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, float) and not name.startswith(free):
                value = pytest.approx(value, rel=rtol, abs=atol)
            if not name.startswith(free):
                assert found[name] == value, (expected["stage"], expected["step"], name)


def compiled(folder: Path) -> set[tuple[str, int]]:
    """Stages and steps past the first in which something was compiled."""
    lines = read_lines(folder / "perf.jsonl")
    return {(x["stage"], x["step"]) for x in lines if x["step"] > 1 and x.get("compile_seconds")}


def on_both(
    name: str, settings: dict[str, Any], folder: Path, *flags: str, mesh=FOUR, **tolerance: Any
) -> Path:
    """Runs an experiment on one device and on the mesh, and compares; the folder of the second."""
    assert start(name, settings, folder / "one", *flags) == 0
    assert start(name, settings, folder / "mesh", *flags, *mesh) == 0
    alike(folder / "one", folder / "mesh", **tolerance)
    assert compiled(folder / "mesh") <= compiled(folder / "one")  # states come out as they went in
    return folder / "mesh"


@pytest.fixture(scope="module")
def summarized(settings, tmp_path_factory) -> Path:
    """`summarize` with PPO, on one device and on the mesh."""
    return on_both("summarize", settings, tmp_path_factory.mktemp("summarize"), "--max-steps", "2").parent


@pytest.mark.slow
def test_summarize(summarized):
    samples = [read_lines(summarized / name / "samples.jsonl") for name in ("one", "mesh")]
    assert samples[0] and [line["stage"] for line in samples[0]] == [line["stage"] for line in samples[1]]
    assert (summarized / "mesh" / "checkpoints" / "ppo" / "2" / "manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "ilql"])
def test_summarize_by_other_methods(algorithm, settings, tmp_path):
    """One that samples and one that learns from ratings: every recipe is in tests/test_mesh_recipes.py."""
    stage = {"steps": 2, "prompts": 8, "optimizer": {"warmup_steps": 1}}
    if (
        algorithm == "grpo"
    ):  # divided by their deviation, rewards that are equal but for rounding would be 1 apart
        stage |= {"samples": 2, "missing_eos_penalty": None, "algorithm": {"scale": "none"}}
    own = settings | {algorithm: stage, "ratings": {"prompts": 8}}
    # At the start the policy is the reference, and which of a pair it prefers is rounding.
    free = ("pair/accuracy", "group/equal_rewards")
    on_both("summarize", own, tmp_path, "--algorithm", algorithm, free=free)


@pytest.mark.slow
def test_summarize_on_a_mesh_that_splits_sequences(settings, summarized, tmp_path):
    mesh = ("--mesh.data", "2", "--mesh.sequence", "2")
    assert start("summarize", settings, tmp_path / "mesh", "--max-steps", "2", *mesh) == 0
    alike(summarized / "one", tmp_path / "mesh")


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(settings, tmp_path):
    """Stopped after the second of four steps of PPO."""
    longer = changed(settings, ppo={"steps": 4})
    assert start("summarize", longer, tmp_path / "whole") == 0
    stopped = tmp_path / "stopped"
    assert start("summarize", longer, stopped, *FOUR, "--max-steps", "2") == 0
    config = (stopped / "config.yaml").read_text()
    (stopped / "config.yaml").write_text(config.replace("max_steps: 2", "max_steps: null"))
    for path in ("summary.json", "report.md"):
        (stopped / path).unlink()
    for path in (stopped / "arrays").glob("validation*"):
        path.unlink()
    assert run.main(["--resume", str(stopped), "--mesh.data", "1", "--mesh.fsdp", "4"]) == 0
    alike(tmp_path / "whole", stopped)


@pytest.mark.slow
def test_chat_with_adapters_and_a_reward_on_the_host(tmp_path):
    write_chat_model(tmp_path / "base")
    write_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "reward.py").write_text(SHORT)
    stage = {"steps": 2, "prompts": 8, "samples": 2, "optimizer": {"warmup_steps": 1}}
    settings = {
        "text": {
            "base": str(tmp_path / "base"),
            "data": str(tmp_path / "prompts.jsonl"),
            "prompt_length": 44,
            "completion_length": 6,
            "lora": {"rank": 2},
        },
        "rewards": [f"{tmp_path / 'reward.py'}:short"],
        "grpo": stage,
        "evaluation": {"prompts": 4, "batch": 4, "best_of": [2]},
    }
    on_both("chat", settings, tmp_path)


@pytest.mark.slow
def test_own_reward_with_completions_drawn_ahead(settings, tmp_path):
    (tmp_path / "reward.py").write_text(SHORT)
    own = {name: settings[name] for name in ("text", "sft", "evaluation")} | {
        "grpo": {"steps": 3, "prompts": 8, "samples": 2},
        "rewards": [f"{tmp_path / 'reward.py'}:short"],
        "ahead": True,
        "checkpoint_every": 1,
    }
    on_both("own_reward", own, tmp_path)


@pytest.mark.slow
def test_a_sweep(settings, tmp_path):
    many = {name: settings[name] for name in ("text", "sft", "ppo")} | {
        "words": 2,
        "seeds": 2,
        "vary": ["algorithm.kl-coefficient=0.05,0.5"],
    }
    on_both(
        "sweep", many, tmp_path, "--max-steps", "2"
    )  # later a token that is nearly even may fall the other way


@pytest.mark.slow
def test_pretrain(tmp_path):
    on_both("pretrain", pretrain_settings(tmp_path, words=12) | {"rows": 4}, tmp_path)


@pytest.mark.slow
def test_a_game(tmp_path):
    settings = GAMES["wordle"] | {"games": 16, "play": {"points": 2, "games": 4, "final_games": 4}}
    on_both("wordle", settings, tmp_path)


@pytest.mark.slow
def test_cartpole(tmp_path):
    """The worlds of one seed are split. Greedy games of hardly trained networks hang on rounding."""
    settings = CONTROL["cartpole"] | {"seeds": 1, "episodes": 4, "final_episodes": 4}
    on_both("cartpole", settings, tmp_path, free=("greedy/", "seed_0/greedy"))


@pytest.mark.slow
def test_tables_split_seeds(tmp_path, capsys):
    on_both("frozen_lake", CONTROL["frozen_lake"] | {"seeds": 4}, tmp_path)
    assert "one device does it all" not in capsys.readouterr().out


@pytest.mark.slow
def test_tables_of_seeds_that_cannot_be_split_are_made_by_one_device(tmp_path, capsys):
    settings = CONTROL["frozen_lake"] | {"seeds": 3}
    assert start("frozen_lake", settings, tmp_path / "run", "--max-steps", "1", *FOUR) == 0
    assert "one device does it all" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- bad input


def refused(name: str, settings: dict[str, Any], folder: Path, capsys, *flags: str) -> str:
    """What a run says that must fail, on one line, before any stage has begun."""
    assert start(name, settings, folder, *flags) != 0
    assert not folder.exists() or not read_lines(folder / "metrics.jsonl")
    return " ".join(capsys.readouterr().err.split())


def test_a_mesh_larger_than_the_devices_is_told_before_there_is_a_folder(settings, tmp_path, capsys):
    told = refused("summarize", settings, tmp_path / "run", capsys, "--mesh.data", "4", "--mesh.fsdp", "4")
    assert "the mesh asks for 16 devices (data 4 x fsdp 4), and there are 4" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({"sft": {"rows": 6}}, FOUR, "of 6 rows cannot be split over 4 devices (data 2 x fsdp 2)"),
        ({}, ("--mesh.tensor", "4"), "cannot be split evenly over tensor 4"),
    ],
    ids=["rows", "heads"],
)
def test_what_cannot_be_split_is_told(changes, flags, words, settings, tmp_path, capsys):
    assert words in refused("summarize", changed(settings, **changes), tmp_path / "run", capsys, *flags)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("cartpole", {"seeds": 3, "ppo": {"worlds": 6}}, "neither --seeds 3 nor --ppo.worlds 6 can be split"),
        ("wordle", {"games": 18}, "a set of games (--games) of 18 rows cannot be split over 4 devices"),
        ("wordle", {"games": 16}, "a set of games (--play.games) of 5 rows cannot be split over 4 devices"),
    ],
)
def test_worlds_and_games_that_cannot_be_split_are_told(name, change, words, tmp_path, capsys):
    settings = (CONTROL | GAMES)[name] | change
    assert words in refused(name, settings, tmp_path / "run", capsys, *FOUR)
