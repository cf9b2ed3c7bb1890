"""The experiment on questions that can be checked: its world, its verifier on the device, pass@k, and whole runs."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import start

from experiments import run
from experiments.stages import configs, reasoning, reasoning_configs, small_base, text
from experiments.stages.results import read_results
from rlhfjax import run_folder
from rlhfjax.config import Decoder
from rlhfjax.environments.text.reasoning import verify_answer
from rlhfjax.networks import Branches

SHAPE = Decoder(width=16, layers=1, heads=2, kv_heads=2, head_size=8, mlp_width=16, max_positions=64)
QUESTIONS = reasoning_configs.Questions(train=40, heldout=6)
CONFIG = configs.Text(base="", data="", prompt_length=8, completion_length=12)


def folder_at(path: Path) -> run_folder.RunFolder:
    return run_folder.create(path, "experiment: fake\n", experiment="fake", seed=0, exact=True)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> text.Text:
    asked = reasoning.find_task("arithmetic", QUESTIONS)
    rows = reasoning.rows_to_ask(asked, QUESTIONS)
    rows[0] |= {"completion": "é= 7\u2003"}  # a row with a space that is no ASCII, and a letter of two bytes
    folder = folder_at(tmp_path_factory.mktemp("world") / "run")
    return text.open_text(small_base.write_world(CONFIG, SHAPE, rows, folder))


# ---- the world


def test_a_tokenizer_has_the_characters_and_the_words_asked_for():
    texts = ["it was good", "é+1=2", "the good goods"]
    tokenizer = small_base.small_tokenizer(texts, [" good", "it"])
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert len(tokenizer.encode("it was good")) == len("it") - 1 + len(" was") + 1
    # Three specials, two words, and each byte once.
    assert tokenizer.vocab_size == 3 + 2 + len({byte for x in texts for byte in x.encode()})
    assert b"good" not in [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    # The text of a special token is its characters, and nothing else is made of them.
    odd = small_base.small_tokenizer(["a<|end|>"])
    assert odd.decode(odd.encode("a<|end|>")) == "a<|end|>" and odd.eos_id not in odd.encode("a<|end|>")


def test_the_rows_of_all_splits_can_be_read_back(loaded):
    assert {len(loaded.load(split)) for split in ("validation", "test", "harder")} == {6}
    assert len(loaded.load("train")) == 40
    harder = loaded.load("harder").prompts
    assert all(len(x) == 3 for prompt in harder for x in prompt.split("+"))
    assert loaded.lm.config.vocab_size == loaded.tokenizer.vocab_size < 24


# ---- the verifier on the device


def test_the_verifier_on_the_device_is_that_on_the_host(loaded):
    train = loaded.load("train")
    answers = [x.rpartition("=")[2].strip() for x in train.references]
    rows, completions = [], []
    for row in (0, 1, 2, 39):
        a = answers[row]
        for form in (
            a,
            f" {a}",
            f"{a} ",
            f"1+1={a}",
            f"={a}=",
            f"={a}= 9",
            f"{a}{a}",
            a[:-1],
            "",
            "=",
            f"= {a} \u2003",
            f"é{a}",
        ):
            rows.append(row)
            completions.append(form)
    expected = verify_answer(completions, completions, reference=[train.references[row] for row in rows])
    assert 12 < sum(x or 0 for x in expected) < 36
    ids = loaded.tokenizer.encode_batch(completions)
    token, mask = np.zeros((len(rows), 1, 12), np.int32), np.zeros((len(rows), 1, 12), bool)
    for i, row in enumerate(ids):
        # Behind the text its end, as a policy leaves it; in front of it nothing.
        token[i, 0, : len(row) + 1] = [*row, loaded.tokenizer.eos_id]
        mask[i, 0, : len(row) + 1] = True
        token[i, 0, len(row) + 1 :] = loaded.tokenizer.encode("1")[0]  # padding may be anything
    params, reward = reasoning.answer_on_device(loaded, train)
    prompts = loaded.batch(train, np.asarray(rows))
    branches = Branches(prompts.token_BP, prompts.mask_BP, jnp.asarray(token), jnp.asarray(mask))
    got = jax.jit(reward)(params, branches, prompts.index_B)
    np.testing.assert_array_equal(got[:, 0], expected)


def test_gold_is_the_verifiers_score_by_row_and_sample(loaded):
    train = loaded.load("train")
    task = reasoning.find_task("arithmetic", QUESTIONS).task
    texts = [[train.references[5], "?"], ["?", train.references[4]]]
    found = reasoning.verified(task, train)(np.asarray([5, 4]), texts)
    np.testing.assert_array_equal(found, [[1, 0], [0, 1]])


# ---- pass@k


def test_passes_are_told_by_policy_and_number_of_samples(tmp_path):
    right = np.array([[True, False, False, False], [True, True, True, True]])
    answer = np.array([[0, 1, 1, 2], [3, 3, 3, 3]])
    passed = {
        "validation": {"sft": reasoning.Passed(right, answer), "grpo": reasoning.Passed(~right, answer)}
    }
    sections = reasoning.pass_sections(passed, folder_at(tmp_path / "run"), 1.0)
    table = sections[0].table
    assert table is not None
    header, rows = table.header, table.rows
    assert list(header) == ["policy", "pass@1", "pass@2", "pass@4", "maj@2"]
    assert [row[0] for row in rows] == ["sft", "grpo"]
    np.testing.assert_allclose([x.value for x in rows[0][1:4]], [0.625, 0.75, 1.0])
    assert (
        rows[0][4] == "0.625"
    )  # of the first question's two votes one is a tie that may be won, one is lost
    numbers = reasoning.pass_numbers(passed)
    np.testing.assert_allclose(numbers["validation/grpo/pass@2"], 0.5)
    assert (tmp_path / "run" / "figures" / "pass_at_k.png").exists()


# ---- what may be asked for


def test_bad_input_is_named():
    with pytest.raises(
        ValueError, match="--task arithmetics: there is no such task; did you mean 'arithmetic'"
    ):
        reasoning.find_task("arithmetics", QUESTIONS)
    gym = reasoning_configs.Questions(gym=reasoning_configs.Gym(settings=("terms",)))
    with pytest.raises(ValueError, match="'terms' must read NAME=VALUE"):
        reasoning.find_task("gym:chain_sum", gym)


def test_settings_of_reasoning_gym_are_values_of_python():
    pytest.importorskip("reasoning_gym")
    g = reasoning_configs.Gym(settings=("min_terms=2", "max_terms=2"), harder=("min_terms=5", "max_terms=5"))
    asked = reasoning.find_task("gym:chain_sum", reasoning_configs.Questions(train=9, heldout=4, gym=g))
    rows = reasoning.rows_to_ask(asked, reasoning_configs.Questions(train=9, heldout=4))
    signs = {
        row["split"]: {
            sum(row["prompt"].count(x) for x in "+-") for row in rows if row["split"] == row["split"]
        }
        for row in rows
    }
    assert set(signs) == {"train", "validation", "test", "harder"}
    assert reasoning.find_task("gym:chain_sum", QUESTIONS).harder is None


# ---- whole runs

NO_WARMUP = {"optimizer": {"warmup_steps": 0}}
STEP = {"steps": 2, "prompts": 4, "samples": 2, **NO_WARMUP}
TINY: dict[str, Any] = {
    "methods": ["grpo", "dpo", "ilql"],
    "questions": {"train": 60, "heldout": 8},
    "decoder": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_size": 8, "mlp_width": 16},
    "text": {"prompt_length": 14, "completion_length": 14},
    "sft": {"steps": 3, "rows": 4, "length": 32, **NO_WARMUP},
    "preferences": {"prompts": 12, "heldout": 4, "samples": 2},
    "ratings": {"prompts": 8},
    "grpo": STEP,
    "dpo": {"steps": 2, "prompts": 4, **NO_WARMUP},
    "ilql": {"steps": 2, "prompts": 4, **NO_WARMUP},
    "evaluation": {"prompts": 8, "batch": 8, "best_of": [2]},
    "pass_at_k": {"samples": 4, "questions": 8},
}


@pytest.mark.slow
def test_a_run_compares_methods_and_tells_pass_at_k(tmp_path):
    folder = tmp_path / "run"
    assert start("reasoning", TINY, folder) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (
        0 <= summary["harder/ilql/pass@4"] <= 1
        and summary["validation/sft/pass@1"] <= summary["validation/sft/pass@4"]
    )
    results = read_results(folder)
    assert results.task == "reasoning (arithmetic)"
    assert [row.method for row in results.rows] == [
        "sft", "sft, greedy", "best of 2", "grpo", "dpo", "q-learning (ilql)",
    ]  # fmt: skip
    report = (folder / "report.md").read_text()
    assert "pass@k, harder" in report and "maj@2" in report
    # What was computed is read back: a second run trains and samples nothing.
    before = (folder / "seed-0" / "metrics.jsonl").read_bytes()
    assert run.main(["reasoning", "--resume", str(folder)]) == 0
    assert (folder / "seed-0" / "metrics.jsonl").read_bytes() == before
    assert json.loads((folder / "summary.json").read_text()) == summary


@pytest.mark.slow
def test_where_several_answers_are_right_the_verifier_is_on_the_host(tmp_path):
    settings = TINY | {"task": "countdown", "methods": ["grpo", "dpo"]}
    assert start("reasoning", settings, tmp_path / "run") == 0
    perf = (json.loads(line) for line in (tmp_path / "run" / "seed-0" / "perf.jsonl").open())
    assert any("reward_seconds" in line for line in perf if line["stage"] == "grpo")
