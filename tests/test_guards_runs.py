"""Guards in whole experiments, of a reward on the device and of one in Python."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import start
from tiny_text import write_world

from experiments.stages import many
from experiments.stages.configs import Guards, PPOStage
from rlhfjax.run_folder import read_lines

FUNCTIONS = """
def short(prompts, completions, reference, **_):
    return [-float(len(text.split())) for text in completions]

def letters(prompts, completions, **_):
    return [float(len(text)) if text else None for text in completions]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return write_world(tmp_path_factory.mktemp("world"))


def stage_lines(folder: Path, stage: str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / name) if line["stage"] == stage]


@pytest.mark.slow
def test_a_raise_on_the_device_compiles_nothing(world, tmp_path):
    """The guard is broken from the start: 0 until the third step, then 0.05, then 0.1."""
    guards = {"watch": ["completions/mean_length<99:raise"], "window": 1, "patience": 1}
    settings = {"text": world["text"], "sft": world["sft"]} | {
        "evaluation": world["evaluation"] | {"temperatures": [], "best_of": []},
        "ppo": {
            "steps": 5,
            "prompts": 4,
            "samples": 2,
            "guards": guards,
            "algorithm": {"kl_coefficient": 0.0},
        },
    }
    folder = tmp_path / "run"
    assert start("length", settings, folder) == 0
    found = [line["objective/kl_coefficient"] for line in stage_lines(folder, "ppo")]
    np.testing.assert_allclose(found, [0, 0, 0.05, 0.1, 0.2], rtol=1e-6)
    compiled = [line["compile_seconds"] for line in stage_lines(folder, "ppo", "perf.jsonl")]
    assert compiled[0] > 0 and compiled[3:] == [0, 0]
    assert "The guard on `completions/mean_length` acted" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_a_stop_by_a_function_of_texts_with_a_reward_in_python(world, tmp_path):
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS)
    guards = {"watch": [f"{file}:letters<9999:stop"], "window": 1, "patience": 2}
    settings = {"text": world["text"], "sft": world["sft"]} | {
        "evaluation": world["evaluation"] | {"temperatures": [], "best_of": []},
        "grpo": {"steps": 6, "prompts": 4, "samples": 2, "guards": guards},
        "rewards": [f"{file}:short"],
        "calls_of": 4,
        "checkpoint_every": 1,
        "ahead": True,
    }
    folder = tmp_path / "run"
    assert start("own_reward", settings, folder) == 0
    lines = stage_lines(folder, "grpo")
    assert [line["step"] for line in lines] == [1, 2, 3]  # decided at step 2
    assert all(line["guard/letters"] > 0 for line in lines)
    # It never held: what is evaluated is what training began from.
    (validation,) = stage_lines(folder, "validation")
    assert abs(validation["grpo, temperature 0.7/kl"]) < 1e-4
    assert (folder / "checkpoints" / "grpo-held" / "0").is_dir()


def test_a_sweep_refuses_guards():
    grid = many.make_grid(PPOStage(), ("algorithm.kl-coefficient=0.1,0.2",), 1, 0)
    config = PPOStage(guards=Guards(watch=("gold<0.1:stop",)))
    with pytest.raises(ValueError, match="guards look at one run, and a sweep is many in one program"):
        many.check_grid(config, grid, 1000)
