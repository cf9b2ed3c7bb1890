"""`run.py fit`: the law through a learning curve, the rules, and whole runs on a tiny world."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import start
from tiny_text import write_world

from experiments import run
from experiments.stages import fit_labels, fit_rules
from experiments.stages.fit_rules import Facts
from rlhfjax.rewards.audit import Estimate, expected_accuracy, labels_for, learning_curve

LABELS = np.asarray([100, 200, 400, 800])


def right_pairs(accuracy: np.ndarray, pairs: int) -> np.ndarray:
    """Which pairs are right: exactly that share of them, the same pairs first."""
    return np.arange(pairs) < np.round(accuracy * pairs)[:, None]


# ---- the law of labels


def test_the_law_that_the_accuracies_follow_is_found():
    ceiling, a, b = 0.9, 2.0, 0.4
    right = right_pairs(ceiling - a * LABELS**-b, 100_000)
    curve = learning_curve(LABELS, right, ceiling, resamples=2)
    assert curve.coefficient == pytest.approx(a, rel=1e-2) and curve.exponent == pytest.approx(b, abs=2e-3)
    assert expected_accuracy(curve, LABELS) == pytest.approx([x.value for x in curve.accuracy_S], abs=1e-4)
    # 0.9 - 2 n^-0.4 = 0.85 at n = 40^(1 / 0.4).
    needed = labels_for(LABELS, right, ceiling, 0.85, resamples=2)
    assert needed.value == pytest.approx(40**2.5, rel=0.02)


def test_the_interval_of_the_labels_is_wide_where_the_pairs_are_few():
    generator = np.random.default_rng(0)
    accuracy = 0.9 - 2.0 * LABELS**-0.4
    few, many = (
        labels_for(LABELS, generator.random(pairs) < accuracy[:, None], 0.9, 0.85, resamples=300)
        for pairs in (300, 10_000)
    )
    assert few.low < few.value < few.high and many.low < 40**2.5 < many.high
    assert many.high / many.low < 2 < 5 < few.high / few.low


def test_accuracies_that_do_not_rise_tell_of_no_number():
    right = right_pairs(np.asarray([0.7, 0.7, 0.6, 0.6]), 100)
    curve = learning_curve(LABELS, right, 1.0)
    assert np.isnan(curve.exponent) and np.isinf(labels_for(LABELS, right, 1.0, 0.8).value)
    # A model that reaches the ceiling has no logarithm of an excess.
    above = right_pairs(np.asarray([0.6, 0.7, 0.8, 0.95]), 100)
    assert learning_curve(LABELS, above, 0.9).exponent > 0


@pytest.mark.parametrize(
    ("labels", "ceiling", "target", "words"),
    [
        ([100], 0.9, 0.8, "growing numbers of labels"),
        ([200, 100], 0.9, 0.8, "growing numbers of labels"),
        ([100, 200], 0.5, 0.4, "must lie above 0.5"),
        ([100, 200], 0.9, 0.9, "must lie below the ceiling"),
    ],
)
def test_a_curve_refuses_what_makes_none(labels, ceiling, target, words):
    right = np.ones((len(labels), 4), bool)
    with pytest.raises(ValueError, match=words):
        learning_curve(np.asarray(labels), right, ceiling)
        labels_for(np.asarray(labels), right, ceiling, target)


# ---- the rules

GOOD = Facts(
    gain=Estimate(0.2, 0.15, 0.25),
    n=16,
    gain_of_4=0.1,
    std=0.1,
    flat=Estimate(0.1, 0.05, 0.15),
    constant=False,
    reliability=1.0,
    mean=0.4,
)


@pytest.mark.parametrize(
    ("change", "worth", "method", "words"),
    [
        ({}, "yes", "grpo", "The reward is cheap"),
        ({"constant": True}, "no", "grpo", "nothing to learn from"),
        (
            {"constant": True, "never_solved": 1.0},
            "no",
            "raft",
            "nothing to learn from.* 100% .* not solved once",
        ),
        (
            {"flat": Estimate(0.95, 0.9, 1.0)},
            "no",
            "best_of_n",
            "In 95% of the prompts all samples score alike",
        ),
        ({"reliability": 0.3}, "no", "ppo", r"Only 30% .* average 21 calls first"),
        ({"reliability": 0.8}, "yes", "ppo", "20% of the reward's variance within prompts is noise"),
        ({"never_solved": 0.95}, "no", "raft", "95% of the prompts are not solved once in 16 samples"),
        ({"never_solved": 0.6}, "yes", "raft", "the solved samples can be imitated"),
        ({"never_solved": 0.0, "mean": 0.97}, "no", "grpo", "97% of the samples solve their prompt already"),
        ({"gain": Estimate(0.03, 0.01, 0.05), "gain_of_4": 0.01}, "perhaps", "grpo", "0.30 deviations"),
        ({"gain": Estimate(0.2, -0.1, 0.5)}, "perhaps", "grpo", "shows no gain"),
        ({"cut": 0.7}, "perhaps", "grpo", "70% of the samples are cut off"),
        ({"gain_of_4": 0.18}, "yes", "best_of_n", "90% of the gain of the best of 16"),
        ({"gain_of_4": 0.2, "n": 4}, "yes", "grpo", "no critic is needed"),
        ({"seconds": 0.5}, "yes", "dpo", "The reward takes 64 s for the 128 texts"),
        ({"reference_lead": Estimate(0.1, 0.05, 0.2)}, "yes", "sft", "imitate them first"),
        ({"reference_lead": Estimate(0.1, -0.05, 0.2)}, "yes", "grpo", "no critic is needed"),
        ({"online": False}, "yes", "ilql", "they have scores"),
        ({"online": False, "has_reward": False}, "yes", "dpo", "they come in pairs"),
        (
            {"has_reward": False, "pairs": 500, "pairs_needed": 2000.0},
            "yes",
            "dpo",
            "would need more .about 2000",
        ),
        ({"has_reward": False, "pairs": 5000, "pairs_needed": 2000.0}, "yes", "ppo", "5000 pairs are enough"),
        ({"has_reward": False, "pairs": 9, "pairs_needed": np.inf}, "yes", "dpo", "none can tell how many"),
    ],
)
def test_a_rule_gives_its_advice_and_its_reason(change, worth, method, words):
    advice = fit_rules.advise(dataclasses.replace(GOOD, **change))
    assert (advice.worth, advice.method) == (worth, method)
    sentences = " ".join([*advice.reasons, *advice.because])
    assert re.search(words, sentences), sentences


# ---- given pairs


def write_pairs(path: Path, world: dict[str, Any], count: int) -> None:
    """The longer one of two completions is preferred; every third pair is too long to fit."""
    rows = [json.loads(line) for line in Path(world["text"]["data"]).read_text().splitlines()]
    lines = []
    for i in range(count):
        prompt = rows[i % 40]["document"]
        words = prompt.split()
        chosen = " ".join(words[:3]) if i % 3 else " ".join(words * 3)
        lines.append({"prompt": prompt, "chosen": chosen, "rejected": words[0]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def text(world):
    from experiments.options import override
    from experiments.stages.text import open_text

    return open_text(
        override(run.load_experiment("fit", run.HERE).Config(), {"text": world["text"]}, source="").text
    )


def test_given_pairs_that_fit_are_read_in_an_order_of_the_seed(world, text, tmp_path):
    file = tmp_path / "pairs.jsonl"
    write_pairs(file, world, 24)
    found = fit_labels.read(file, text, labels=(4, 8), heldout=4, seed=0)
    judged = found.judged
    assert len(judged.row_B) == 16 and judged.trained == 12 and found.examples.dropped == 8
    chosen, rejected = (text.decode(judged.token_BGC[:, [i]], judged.mask_BGC[:, [i]]) for i in (0, 1))
    for i, prompt in enumerate(found.examples.prompts):
        assert chosen[i][0] == " ".join(prompt.split()[:3]) and rejected[i][0] == prompt.split()[0]
    assert judged.preferences.label_BK.min() == 1 and judged.token_BGC.shape[1:] == (2, 6)
    other = fit_labels.read(file, text, labels=(4, 8), heldout=4, seed=1)
    assert other.examples.prompts != found.examples.prompts
    with pytest.raises(ValueError, match="has 16 pairs that fit .* ask for 34"):
        fit_labels.read(file, text, labels=(4, 30), heldout=4, seed=0)


# ---- what cannot be checked


@pytest.mark.parametrize(
    ("labels", "heldout", "learnt", "words"),
    [
        ((100,), 8, 0.8, "must be two growing numbers or more"),
        ((100, 100), 8, 0.8, "must be two growing numbers or more"),
        ((100, 200), 1, 0.8, "heldout=1 must be at least 2"),
        ((), 8, 1.0, "learnt=1.0 lie between 0 and 1"),
    ],
)
def test_labels_that_make_no_curve(labels, heldout, learnt, words):
    with pytest.raises(ValueError, match=words):
        fit_labels.check(labels, heldout, learnt)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"labels": [200, 100]}, "must be two growing numbers or more"),
        ({"samples": 2}, "samples=2 must be at least 4"),
        ({"reward": "none"}, "there is no reward"),
        ({"split": "tset"}, "has no rows of split 'tset'"),
        ({"preferences": "nowhere.jsonl", "sft": {"steps": 0}}, "no data file at nowhere.jsonl"),
    ],
)
def test_what_cannot_be_checked_is_told_before_anything_is_trained(world, settings, words, tmp_path, capsys):
    assert start("fit", {"text": world["text"]} | settings, tmp_path / "run") == 1
    assert words in " ".join("".join(capsys.readouterr()).split())
    assert not (tmp_path / "run" / "checkpoints" / "sft").exists()


# ---- whole runs

REWARDS = """
def never(prompts, completions, **_):
    return [0.0] * len(completions)


def long(prompts, completions, **_):
    return [float(len(text.split())) for text in completions]
"""


def settings_of(world: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": world["text"],
        "sft": world["sft"],
        "reward_model": {"prompts": 4, "optimizer": {"warmup_steps": 1}},
        "prompts": 8,
        "samples": 4,
        "labels": [4, 8],
        "heldout": 8,
        "compute": "none",
    }


@pytest.mark.slow
def test_a_task_that_fits_one_that_does_not_and_one_with_pairs_alone(world, tmp_path, capsys):
    file = tmp_path / "rewards.py"
    file.write_text(REWARDS)
    settings = settings_of(world)
    fits = tmp_path / "fits"
    assert start("fit", settings | {"reward": f"{file}:long", "compute": "v5e"}, fits) == 0
    summary = json.loads((fits / "summary.json").read_text())
    assert summary["worth"] > 0 and summary["gain/low"] > 0 and 0 < summary["accuracy_at_8"] <= 1
    report = (fits / "report.md").read_text()
    for title in ("Advice", "What choosing gains", "The reward on samples", "A reward model's labels"):
        assert f"\n## {title}\n" in report
    assert "Compute, on 1 x v5e" in report and "device seconds" in report
    assert run.main(["--resume", str(fits)]) == 0
    assert json.loads((fits / "summary.json").read_text()) == summary

    assert start("fit", settings | {"reward": f"{file}:never"}, tmp_path / "never", "--max-steps", "2") == 0
    summary = json.loads((tmp_path / "never" / "summary.json").read_text())
    assert summary["worth"] == 0 and summary["never_solved"] == 1
    assert "nothing to learn from" in (tmp_path / "never" / "report.md").read_text()

    pairs = tmp_path / "pairs.jsonl"
    write_pairs(pairs, world, 40)
    alone = {"reward": "none", "preferences": str(pairs), "labels": [4, 12]}
    assert start("fit", settings | alone, tmp_path / "pairs") == 0
    summary = json.loads((tmp_path / "pairs" / "summary.json").read_text())
    assert summary["accuracy_ceiling"] == 1 and summary["method"] in (3, 5)  # DPO or PPO
