"""`summarize --algorithm` and `compare` on a tiny world: every method runs and resumes; bad settings are told."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from running import start
from tiny_text import write_world

from experiments import run
from rlhfjax.run_folder import read_lines

BEFORE = ["sft", "preferences", "reward_model", "reward_model_heldout"]
OFFLINE = ("soft_q", "ilql")  # learn from rated samples
BITWISE = ("metrics.jsonl", "samples.jsonl")


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Any]:
    world = write_world(tmp_path_factory.mktemp("world"))
    online = {"steps": 2, "prompts": 4, "samples": 2, "optimizer": {"warmup_steps": 1}}
    offline = {"steps": 2, "prompts": 4, "optimizer": {"warmup_steps": 1}}
    world["ppo"] |= {"steps": 2}
    world["evaluation"] |= {"temperatures": [], "prompts": 4}
    world |= {"grpo": online, "rloo": online, "online_dpo": online, "raft": online, "dpo": offline}
    return world | {"ratings": {"prompts": 10}, "soft_q": offline, "ilql": offline | {"curve": [0.5]}}


def stages(folder: Path) -> list[str]:
    return list(dict.fromkeys(line["stage"] for line in read_lines(folder / "metrics.jsonl")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "flags", "logged"),
    [
        ("grpo", (), "group/equal_rewards"),
        ("grpo", ("--grpo.algorithm.baseline", "given"), "objective/kl"),
        (
            "grpo",
            ("--grpo.algorithm.kl-placement", "loss", "--grpo.algorithm.kl-estimator", "exact"),
            "loss/kl",
        ),
        (
            "ppo",
            ("--ppo.algorithm.kl-estimator", "exact", "--ppo.algorithm.critic-warmup", "1"),
            "value/mean",
        ),
        ("rloo", (), "policy/ratio_mean"),
        ("dpo", ("--dpo.algorithm.weighting", "aligned"), "pair/weight"),
        ("online_dpo", (), "pair/accuracy"),
        ("raft", (), "loss/nll"),
        ("soft_q", ("--soft-q.algorithm.beta", "0.1"), "path/error"),
        ("ilql", ("--ilql.algorithm.expectile", "0.8"), "value/advantage"),
    ],
)
def test_every_method_runs_and_is_evaluated(settings, tmp_path, method, flags, logged):
    assert start("summarize", settings, tmp_path / "run", "--algorithm", method, *flags) == 0
    rated = ["rated_samples"] if method in OFFLINE else []
    assert stages(tmp_path / "run") == [*BEFORE, *rated, method, "validation"]
    lines = [x for x in read_lines(tmp_path / "run" / "metrics.jsonl") if x["stage"] == method]
    assert len(lines) == 2 and logged in lines[0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # It moved away from the reference, at which the KL is rounding.
    assert abs(summary[f"validation/{method}, temperature 0.7/kl"]) > 1e-4
    assert f"figures/{method}.png" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
def test_compare_runs_methods_and_seeds_from_one_start(settings, tmp_path, capsys):
    chosen = {"methods": ["dpo", "raft"], "seeds": 2, "kl_weights": [0.1, 0.5]}
    folder = tmp_path / "run"
    assert start("compare", settings | chosen, folder) == 0
    for seed in (0, 1):
        part = folder / f"seed-{seed}"
        assert stages(part) == [*BEFORE, "dpo-0.1", "dpo-0.5", "raft", "validation"]
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("sft", "dpo-0.1", "dpo-0.5", "raft"):
        golds = [
            line[f"{name}, greedy/gold"]
            for seed in (0, 1)
            for line in read_lines(folder / f"seed-{seed}" / "metrics.jsonl")
            if line["stage"] == "validation"
        ]
        assert summary[f"{name}, greedy/gold"] == pytest.approx(sum(golds) / 2)
    assert (folder / "figures" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    kept = {path: path.read_bytes() for path in folder.glob("seed-*/*.jsonl") if path.name in BITWISE}
    capsys.readouterr()
    assert run.main(["--resume", str(folder)]) == 0
    assert all(path.read_bytes() == before for path, before in kept.items())
    assert "checkpoint of step 2 of 2" in capsys.readouterr().out


@pytest.mark.slow
def test_offline_methods_share_their_data_and_values_and_resume_to_the_same_bits(settings, tmp_path):
    folder = tmp_path / "run"
    chosen = {"methods": ["soft_q", "ilql"], "kl_weights": [0.1, 0.5]}
    assert start("compare", settings | chosen, folder) == 0
    part = folder / "seed-0"
    # One set of ratings for both, and values that are learnt once for all weights.
    assert stages(part) == [*BEFORE, "rated_samples", "soft_q-0.1", "soft_q-0.5", "ilql", "validation"]
    summary = json.loads((folder / "summary.json").read_text())
    for method in OFFLINE:
        kl = [summary[f"{method}-{weight}, temperature 0.7/kl"] for weight in (0.1, 0.5)]
        assert abs(kl[0] - kl[1]) > 1e-4
    kept = {name: sorted((part / name).read_text().splitlines()) for name in BITWISE}
    for name in ("rated_samples", "validation"):
        (part / "arrays" / f"{name}.npz").unlink()
    for name in ("soft_q-0.5", "ilql"):
        shutil.rmtree(part / "checkpoints" / name)
    assert run.main(["--resume", str(folder)]) == 0
    assert kept == {name: sorted((part / name).read_text().splitlines()) for name in BITWISE}


@pytest.mark.parametrize(
    ("name", "flags", "told"),
    [
        ("summarize", ("--algorithm", "grpo", "--grpo.samples", "1"), "samples=1: this method compares"),
        ("summarize", ("--algorithm", "online_dpo", "--online-dpo.samples", "1"), "samples=1: this method"),
        (
            "summarize",
            ("--algorithm", "grpo", "--grpo.algorithm.baseline", "mean"),
            "baseline='mean' is unknown",
        ),
        (
            "summarize",
            ("--algorithm", "ppo", "--ppo.algorithm.kl-placement", "loss"),
            "has mean zero",
        ),
        ("summarize", ("--algorithm", "grpo", "--grpo.algorithm.aggregation", "constant"), "length_constant"),
        ("summarize", ("--algorithm", "dpo", "--dpo.algorithm.loss", "sigmoidd"), "loss='sigmoidd'"),
        ("summarize", ("--algorithm", "soft_q", "--ratings.prompts", "99"), "ratings ask for 99 prompts"),
        ("summarize", ("--algorithm", "ilql", "--ilql.prompts", "11"), "asks for 11 prompts; ratings has"),
        ("summarize", ("--algorithm", "soft_q", "--soft-q.algorithm.beta", "0"), "beta=0.0 must be above 0"),
        (
            "summarize",
            ("--algorithm", "ilql", "--ilql.algorithm.bootstrap", "q"),
            "bootstrap='q' is unknown",
        ),
        (
            "summarize",
            ("--algorithm", "ilql", "--ilql.kl-weight", "0"),
            "kl_weight and curve must be above 0",
        ),
        ("summarize", ("--algorithm", "ilql", "--ilql.curve", "0.2"), "name a weight twice"),
        ("compare", ("--methods", "dpo", "dpo"), "--methods names one twice"),
        ("compare", ("--methods", "dpo", "raft", "--raft.temperature", "1.0"), "must share one temperature"),
        ("compare", ("--seeds", "0"), "seeds must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_stage(
    settings, tmp_path, capsys, name, flags, told
):
    assert start(name, settings, tmp_path / "run", *flags) != 0
    assert told in capsys.readouterr().err
    assert not read_lines(tmp_path / "run" / "metrics.jsonl")
