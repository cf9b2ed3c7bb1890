"""`translate` on a tiny world, on every kind of reward."""

import json
from pathlib import Path
from typing import Any

import pytest
from running import start
from tiny_text import write_world

from experiments import run
from experiments.stages.results import read_results
from rlhfjax.run_folder import read_lines


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Any]:
    world = write_world(tmp_path_factory.mktemp("world"))
    online = {"steps": 2, "prompts": 4, "samples": 2, "optimizer": {"warmup_steps": 1}}
    offline = {"steps": 2, "prompts": 4, "optimizer": {"warmup_steps": 1}}
    world["text"] |= {"prompt_field": "document", "completion_field": "summary"}
    world["ppo"] |= {"steps": 2}
    world["evaluation"] |= {"temperatures": [], "prompts": 4}
    world |= {"grpo": online, "rloo": online, "online_dpo": online, "raft": online, "dpo": offline}
    return world | {"ratings": {"prompts": 10}, "soft_q": offline, "ilql": offline}


def stages(folder: Path) -> list[str]:
    return list(dict.fromkeys(line["stage"] for line in read_lines(folder / "metrics.jsonl")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "before", "methods"),
    [
        (("--optimised", "chrf"), ["sft", "preferences"], ["dpo", "grpo", "soft_q"]),
        (("--optimised", "chrf"), ["sft"], ["ppo"]),
        (("--optimised", "host"), ["sft", "preferences"], ["raft", "ilql"]),
        (
            ("--optimised", "learned"),
            ["sft", "preferences", "reward_model", "reward_model_heldout"],
            ["ppo"],
        ),
    ],
)
def test_translate_runs_and_resumes_on_every_reward(settings, tmp_path, flags, before, methods):
    folder = tmp_path / "run"
    assert start("translate", settings | {"methods": methods}, folder, *flags) == 0
    found = stages(folder / "seed-0")
    assert [x for x in found if x != "rated_samples"] == [*before, *methods, "validation"]
    results = read_results(folder)
    assert results.task == "translation en-de" and results.metric == "chrF, validation split"
    names = {"soft_q": "q-learning (soft_q)", "ilql": "q-learning (ilql)"}
    assert [row.method for row in results.rows] == [
        "sft",
        "sft, greedy",
        "best of 2",
        *(names.get(method, method) for method in methods),
    ]
    summary = json.loads((folder / "summary.json").read_text())
    # The reward in the evaluation is that of the split's own references.
    scores = {"chrf": "gold", "host": "BLEU"}
    if flags[1] in scores:
        for how in ("temperature 0.7", "greedy"):
            name = f"{methods[0]}, {how}"
            assert summary[f"{name}/reward"] == pytest.approx(
                10 * summary[f"{name}/{scores[flags[1]]}"], rel=1e-5
            )
            assert summary[f"{name}/gold"] > 0
    kept = {
        path: path.read_bytes() for path in (folder / "seed-0").glob("*.jsonl") if path.name != "perf.jsonl"
    }
    (folder / "seed-0" / "arrays" / "validation.npz").unlink()
    assert run.main(["--resume", str(folder)]) == 0
    assert all(path.read_bytes() == before for path, before in kept.items())
