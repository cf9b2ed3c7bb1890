"""RL with a reward of the user's own: found, called in threads, drawn ahead, resumed, and told when it fails."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from running import start
from tiny_text import write_world

from experiments import run
from experiments.stages.host_reward import find_reward, judge
from rlhfjax.run_folder import read_lines

BITWISE = ("metrics.jsonl", "samples.jsonl", "summary.json")
WORKING = """
def short(prompts, completions, reference, **_):
    assert len(prompts) == len(completions) == len(reference)
    return [-float(len(text.split())) for text in completions]
"""
BROKEN = """
import time

CALLS = []

def short(prompts, completions, reference, **_):
    CALLS.append(completions)
    if len(CALLS) > 4:  # two calls a step
        FAIL
    return [-float(len(text.split())) for text in completions]
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Any]:
    world = write_world(tmp_path_factory.mktemp("world"))
    return {name: world[name] for name in ("text", "sft", "evaluation")} | {
        "evaluation": world["evaluation"] | {"temperatures": [], "best_of": [2]},
        "grpo": {"steps": 4, "prompts": 4, "samples": 2},
        "ppo": {"steps": 2, "prompts": 4, "samples": 2},
        "calls_of": 4,
        "checkpoint_every": 1,
    }


def begin(settings: dict[str, Any], folder: Path, code: str, *flags: str) -> int:
    """A run with the reward `short` of `code`, in a file beside its folder."""
    file = folder.with_suffix(".py")
    file.write_text(code)
    return start("own_reward", settings | {"rewards": [f"{file}:short"]}, folder, *flags)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """A run from start to end, completions drawn ahead."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert begin(settings | {"ahead": True}, folder, WORKING) == 0
    return folder


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [line for line in read_lines(folder / name) if line["stage"] == "grpo"]


def test_the_score_is_the_functions_own(whole):
    for line in lines(whole):
        assert -24 <= line["objective/score"] < 0
    samples = [line for line in read_lines(whole / "samples.jsonl") if line["stage"] == "grpo"]
    assert samples and all(line["reward"] == -len(line["completion"].split()) for line in samples)
    for line in lines(whole, "perf.jsonl"):
        assert line["reward_seconds"] >= 0 and line["model_flops"] > 0


def test_completions_drawn_ahead_are_of_the_parameters_before_the_update(whole, settings, tmp_path):
    """The first two steps of both ways see the same completions: none is older than the first update."""
    assert begin(settings, tmp_path / "run", WORKING) == 0
    ahead, fresh = lines(whole), lines(tmp_path / "run")
    assert ahead[0]["objective/score"] == fresh[0]["objective/score"]
    gap = [line["policy/logp_gap"] for line in ahead]
    assert gap[0] < 1e-4 < gap[1] and max(line["policy/logp_gap"] for line in fresh) < 1e-4
    assert "one update old" in (whole / "report.md").read_text()
    assert "one update old" not in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fail", "words"),
    [
        ('raise KeyError("no such server")', "raised KeyError: 'no such server'"),
        ("time.sleep(60)", "gave no answer within 5 s for sample"),
        ("return ['1'] * len(completions)", "give a number or None"),
        ("return [float('nan')] * len(completions)", "give a finite number"),
    ],
    ids=["raises", "hangs", "texts", "NaN"],
)
def test_a_run_whose_reward_fails_is_resumed_to_the_same_bits(whole, settings, tmp_path, capsys, fail, words):
    folder = tmp_path / "run"
    changed = settings | {"ahead": True, "timeout": 5.0}
    assert begin(changed, folder, BROKEN.replace("FAIL", fail)) != 0
    assert words in " ".join("".join(capsys.readouterr()).split())
    assert len(lines(folder)) == 2
    folder.with_suffix(".py").write_text(WORKING)
    assert run.main(["--resume", str(folder)]) == 0
    for name in BITWISE:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_ppo_takes_it_too(settings, tmp_path):
    assert begin(settings | {"algorithm": "ppo"}, tmp_path / "run", WORKING) == 0
    assert [line["stage"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")].count("ppo") == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rewards": ["nowhere.py:short"]}, "there is no file nowhere.py"),
        (
            {"rewards": ["experiments/rewards.py:no_repetitio"]},
            "did you mean 'no_repetition'?",
        ),
        ({"rewards": ["experiments.nowhere:short"]}, "there is no module 'experiments.nowhere'"),
        ({"rewards": ["short"]}, "must be FILE.py:NAME or MODULE:NAME"),
        ({"rewards": []}, "0 weights for 0 rewards"),
        ({"weights": [1.0]}, "1 weights for 2 rewards"),
        ({"weights": [1.0, float("inf")]}, "is inf"),
        ({"timeout": 0.0}, "timeout=0.0 must be above 0 seconds"),
        ({"checkpoint_every": 0}, "checkpoint_every=0 must be at least 1"),
        ({"grpo": {"prompts": 10_000}}, "asks for 10000 prompts a step"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(settings, change, words, tmp_path, capsys):
    assert start("own_reward", settings | change, tmp_path / "run") != 0
    assert words in " ".join("".join(capsys.readouterr()).split())
    assert not (tmp_path / "run" / "checkpoints" / "sft").exists()


def test_the_evaluation_hands_over_no_more_at_once_than_an_iteration():
    """The pool's time-out is for what it is handed: all of an evaluation at once would not be done in time."""
    handed = []

    class Pool:
        def submit(self, prompts, completions, columns):
            handed.append(list(completions))
            return lambda: np.asarray([float(text) for text in completions], np.float32)

    examples: Any = SimpleNamespace(prompts=["p"] * 5, references=["r"] * 5)
    texts = [[str(3 * b + g) for g in range(3)] for b in range(5)]
    pool: Any = Pool()
    scores = judge(pool, examples, at_once=7)(np.arange(5), texts)
    np.testing.assert_array_equal(scores, np.arange(15).reshape(5, 3))
    assert [len(x) for x in handed] == [6, 6, 3]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def short(:", "SyntaxError: invalid syntax (run.py, line 1)"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("", "has no function 'short'"),
    ],
)
def test_a_file_that_is_broken_or_empty_is_named(settings, code, words, tmp_path, capsys):
    assert begin(settings, tmp_path / "run", code) != 0
    out = " ".join("".join(capsys.readouterr()).split())
    assert words in out and "Traceback" not in out


def test_the_rewards_to_copy_are_what_they_say():
    names = ("words_from_the_prompt", "no_repetition")
    copied, fresh = (find_reward(f"experiments/rewards.py:{name}") for name in names)
    given = {"prompts": ["a fast editor", "x"], "completions": ["A fast fast car", ""], "reference": ["", ""]}
    assert list(copied(**given)) == [0.75, 0.0]
    assert list(fresh(**given)) == [0.75, 0.0]
