"""The experiments whole, on a tiny world: what a run leaves behind, that it repeats, and that a kill costs no bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from running import start
from tiny_text import WORDS, write_world

from experiments import run, summarize
from experiments.options import override
from rlhfjax.algorithms import make_optimizer, ppo
from rlhfjax.checkpoint import Checkpoints
from rlhfjax.networks import init_scalar_head
from rlhfjax.pretrained import load_pretrained
from rlhfjax.run_folder import read_lines

ROOT = Path(run.__file__).resolve().parents[1]
BITWISE = ("metrics.jsonl", "samples.jsonl", "summary.json")
STAGES = {"sft": 3, "preferences": 1, "reward_model": 3, "reward_model_heldout": 1, "ppo": 3, "validation": 1}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Any]:
    return write_world(tmp_path_factory.mktemp("world"))


def changed(settings: dict[str, Any], **changes: dict[str, Any]) -> dict[str, Any]:
    """The settings with some keys of some sections replaced."""
    return settings | {name: settings[name] | section for name, section in changes.items()}


def bits(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in BITWISE}


def final_policy(folder: Path, settings: dict[str, Any]) -> list[np.ndarray]:
    """Every array of the last checkpoint of PPO: parameters, optimiser, counters."""
    config = override(summarize.Config(), settings, source="the test").ppo
    shape, base = load_pretrained(settings["text"]["base"])
    critic = {"trunk": base, "head": init_scalar_head(jax.random.key(0), shape.width)}
    optimizer = make_optimizer(
        config.optimizer, config.steps * config.algorithm.epochs * config.algorithm.minibatches
    )
    algorithm = ppo.make(lambda *_: pytest.fail("not evaluated"), optimizer, config.algorithm)
    like = jax.eval_shape(algorithm.init, {"policy": base, "critic": critic})
    with Checkpoints(folder / "checkpoints" / "ppo") as checkpoints:
        restored = checkpoints.restore_latest(like)
    assert restored is not None and restored[0] == config.steps
    return [np.asarray(x) for x in jax.tree.leaves(restored[1])]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """A run of `summarize` from start to end."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHFJAX_CACHE_DIR", "")
        assert start("summarize", settings, folder) == 0
    return folder


def test_a_run_leaves_everything_behind(whole, settings):
    for name in ("config.yaml", "environment.json", "perf.jsonl", "report.md", *BITWISE):
        assert (whole / name).stat().st_size > 0, name
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["experiment"] == "summarize" and config["ppo"]["steps"] == 3
    assert config["text"]["base"] == settings["text"]["base"]
    metrics = read_lines(whole / "metrics.jsonl")
    assert {stage: sum(line["stage"] == stage for line in metrics) for stage in STAGES} == STAGES
    assert list(dict.fromkeys(line["stage"] for line in metrics)) == list(STAGES)
    for stage in ("sft", "reward_model", "ppo"):
        assert (whole / "checkpoints" / stage / "3" / "manifest.json").is_file()
    for figure in ("losses", "ppo", "ppo_reward_and_gold", "reward_model_calibration", "gold_against_kl"):
        file = whole / "figures" / f"{figure}.png"
        assert file.read_bytes().startswith(b"\x89PNG"), figure
        assert f"figures/{figure}.png" in (whole / "report.md").read_text()


def test_what_the_numbers_of_a_run_must_be(whole):
    metrics = {
        stage: [x for x in read_lines(whole / "metrics.jsonl") if x["stage"] == stage] for stage in STAGES
    }
    for line in metrics["ppo"]:
        assert 0 < line["policy/logp_gap"] < 1e-4
        assert line["batch/sequences"] == 8 and line["reward/nonfinite"] == 0
        assert 0 <= line["gold"] <= 1
    # The first iteration is on policy, and its policy is the reference.
    assert abs(metrics["ppo"][0]["objective/kl"]) < 1e-4
    (heldout,) = metrics["reward_model_heldout"]
    assert 0.5 <= heldout["heldout/accuracy_ceiling"] <= 1
    assert 0 <= heldout["heldout/accuracy"] <= 1
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["validation/sft, temperature 0.7/kl"] == pytest.approx(0.0, abs=1e-4)
    assert summary["reward_model/heldout/accuracy"] == heldout["heldout/accuracy"]
    assert (
        summary["validation/ppo, temperature 0.7/gold_low"] <= summary["validation/ppo, temperature 0.7/gold"]
    )
    (validation,) = metrics["validation"]
    assert summary["validation/ppo, greedy/gold"] == pytest.approx(validation["ppo, greedy/gold"])
    assert "validation/ppo, temperature 0.7 against sft, temperature 0.7/value" in summary


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_another_does_not(whole, settings, tmp_path):
    assert start("summarize", settings, tmp_path / "again") == 0
    assert bits(tmp_path / "again") == bits(whole)
    for one, other in zip(
        final_policy(tmp_path / "again", settings), final_policy(whole, settings), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert start("summarize", settings, tmp_path / "other", "--seed", "1", "--max-steps", "1") == 0
    first, other = (read_lines(folder / "metrics.jsonl")[0] for folder in (whole, tmp_path / "other"))
    assert first["loss/nll"] != other["loss/nll"]


def test_a_finished_run_that_is_resumed_changes_nothing(whole, capsys):
    before = bits(whole)
    assert run.main(["--resume", str(whole)]) == 0
    assert bits(whole) == before
    assert "checkpoint of step 3 of 3" in capsys.readouterr().out


@pytest.mark.slow
def test_length_needs_no_reward_model(settings, tmp_path):
    sections = {name: settings[name] for name in ("text", "sft", "ppo", "evaluation")}
    short = changed(sections, evaluation={"temperatures": [], "best_of": [2]}, ppo={"shared_trunk": True})
    assert start("length", short | {"words": 2}, tmp_path / "run") == 0
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert list(dict.fromkeys(line["stage"] for line in metrics)) == ["sft", "ppo", "validation"]
    # The reward is exact: the score on the device is the one counted on the texts.
    for line in metrics:
        if line["stage"] == "ppo":
            assert line["gold"] == pytest.approx(line["objective/score"], abs=1e-5)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation/ppo, greedy/gold"] == pytest.approx(
        summary["validation/ppo, greedy/reward"], abs=1e-5
    )
    assert summary["validation/sft, best of 2/reward"] >= summary["validation/sft, temperature 0.7/reward"]


def pretrain_settings(folder: Path, words: int) -> dict[str, Any]:
    """Settings of `pretrain` on documents of so many words."""
    row = {
        "document": " ".join(WORDS[i % len(WORDS)] for i in range(words)),
        "summary": "red",
        "split": "train",
    }
    (folder / "documents.jsonl").write_text(json.dumps(row) + "\n")
    shape = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_size": 8, "mlp_width": 16}
    return {
        "data": str(folder / "documents.jsonl"),
        "vocab_size": 290,
        "steps": 2,
        "rows": 2,
        "length": 64,
        "repeated": 0.5,
        "decoder": shape,
        "optimizer": {"warmup_steps": 1},
    }


def test_pretrain_writes_a_base_that_loads(tmp_path):
    assert start("pretrain", pretrain_settings(tmp_path, words=12), tmp_path / "run") == 0
    shape, params = load_pretrained(tmp_path / "run" / "model")
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["parameters"] == sum(x.size for x in jax.tree.leaves(params))
    assert shape.layers == 2 and params["embedding"].shape == (shape.vocab_size, 16)


def test_pretrain_needs_documents_of_some_length(tmp_path, capsys):
    assert start("pretrain", pretrain_settings(tmp_path, words=3), tmp_path / "run") != 0
    assert "0 training documents of 8 tokens or more" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- bad input


def refused(settings, folder, capsys) -> str:
    """The message of a run that must fail, before any stage has begun."""
    assert start("summarize", settings, folder) != 0
    assert not read_lines(folder / "metrics.jsonl")
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": {"prompt_length": 30}}, "prompt_length 30 + completion_length 6 exceed the 32 positions"),
        ({"text": {"sft_share": 1.5}}, "sft_share must lie between 0 and 1, got 1.5"),
        ({"text": {"prompt_field": "title"}}, "no field 'title'"),
        ({"preferences": {"heldout": 12}}, "preferences ask for 12 prompts, 12 of them held out"),
        ({"preferences": {"prompts": 50}}, "preferences ask for 50 prompts, 4 of them held out"),
        ({"reward": {"prompts": 9}}, "the reward model asks for 9 prompts a step; preferences leave 8"),
        ({"ppo": {"prompts": 5}}, "a batch of 5 rows cannot be cut into 2 equal parts"),
        ({"ppo": {"algorithm": {"minibatches": 3}}}, "a batch of 4 rows cannot be cut into 3 equal parts"),
        ({"ppo": {"prompts": 40}}, "ppo asks for 40 prompts a step"),
        (
            {"ppo": {"steps": 1, "optimizer": {"warmup_steps": 2}}},
            "warmup_steps=2 must be at least 0 and less",
        ),
        (
            {"reward": {"algorithm": {"microbatches": 3}}},
            "a batch of 4 rows cannot be cut into 3 equal parts",
        ),
        ({"evaluation": {"test": True}}, "no rows of split 'test'"),
    ],
    ids=[
        "context",
        "share",
        "field",
        "heldout",
        "preferences",
        "reward-prompts",
        "ppo-batch",
        "minibatches",
        "ppo-prompts",
        "warm-up",
        "microbatches",
        "split",
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_stage(settings, changes, message, tmp_path, capsys):
    assert message in refused(changed(settings, **changes), tmp_path / "run", capsys)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"document": "red sun", "summ', "not JSON"),
        ('["red sun", "red"]', "a JSON object is needed, this is list"),
        ('{"document": "red sun", "summary": " ", "split": "train"}', "empty 'summary'"),
        ('{"document": "", "summary": "red", "split": "train"}', "empty 'document'"),
        ('{"document": "red sun", "split": "train"}', "no field 'summary'"),
    ],
    ids=["half", "list", "empty-summary", "empty-document", "missing"],
)
def test_a_bad_row_is_refused_by_file_and_line(settings, row, message, tmp_path, capsys):
    data = tmp_path / "bad.jsonl"
    lines = Path(settings["text"]["data"]).read_text().splitlines()
    data.write_text("\n".join([*lines[:7], row, *lines[7:]]) + "\n")
    error = refused(changed(settings, text={"data": str(data)}), tmp_path / "run", capsys)
    assert f"{data}:8: {message}" in error or (f"{data}:8: " in error and message in error)


def test_no_data_and_no_base_are_refused_by_name(settings, tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    (tmp_path / "empty.jsonl").touch()
    for key, path, message in (
        ("data", nowhere, f"no data file at {nowhere}"),
        ("data", tmp_path / "empty.jsonl", "has no rows"),
        ("base", nowhere, f"there is no model at {nowhere}"),
    ):
        spoilt = changed(settings, text={key: str(path)})
        assert message in refused(spoilt, tmp_path / f"run-{key}-{path.name}", capsys)


def test_resuming_with_other_settings_says_what_differs(whole, capsys):
    assert run.main(["--resume", str(whole), "--ppo.prompts", "8"]) == 2
    assert "ppo.prompts: saved 4, given 8" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- kill

# Kills itself, as `kill -9` would, once a line of a stage and step is in metrics.jsonl.
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from experiments import run
from rlhfjax.run_folder import RunFolder

target, log = {target!r}, RunFolder.log_metrics

def log_and_die(folder, stage, step, metrics):
    log(folder, stage, step, metrics)
    if (stage, step) == target:
        os.kill(os.getpid(), signal.SIGKILL)

RunFolder.log_metrics = log_and_die
sys.exit(run.main(sys.argv[1:]))
"""


def run_until(target: tuple[str, int] | None, arguments: list[str], cache: Path) -> int:
    """Runs the command line in a process of its own, up to `target` or to its end; returns its exit status."""
    program = KILLED.format(root=str(ROOT), target=target)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "RLHFJAX_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode in (0, -signal.SIGKILL), done.stdout + done.stderr
    return done.returncode


@pytest.mark.slow
def test_killed_in_every_stage_and_resumed_ends_in_the_same_bits(settings, tmp_path):
    """Fine-tuning and PPO are long enough to have a checkpoint behind them when they are killed."""
    long = changed(settings, sft={"steps": 102}, ppo={"steps": 27})
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(long))
    begin = ["summarize", "--config", str(tmp_path / "long.yaml"), "--run-dir"]
    assert run_until(None, [*begin, str(tmp_path / "whole")], tmp_path / "cache") == 0
    killed, arguments = tmp_path / "killed", [*begin, str(tmp_path / "killed")]
    kills = [
        ("sft", 101),
        ("preferences", 0),
        ("reward_model", 2),
        ("reward_model_heldout", 0),
        ("ppo", 1),
        ("ppo", 26),
        ("validation", 0),
    ]
    assert {stage for stage, _ in kills} == set(STAGES)
    for target in kills:
        assert run_until(target, arguments, tmp_path / "cache") == -signal.SIGKILL, target
        last = read_lines(killed / "metrics.jsonl")[-1]
        assert (last["stage"], last["step"]) == target
        arguments = ["--resume", str(killed)]
    assert run_until(None, arguments, tmp_path / "cache") == 0
    assert bits(killed) == bits(tmp_path / "whole")
    for one, other in zip(final_policy(killed, long), final_policy(tmp_path / "whole", long), strict=True):
        np.testing.assert_array_equal(one, other)
