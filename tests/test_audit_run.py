"""`run.py audit`: rewards with known faults get the verdict that they deserve, and bad input a message."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import start
from tiny_chat import END, write_chat_model
from tiny_text import write_world
from tiny_tokenizers import BYTE_LEVEL

from experiments import run
from experiments.stages import audit_measure, audit_model, audit_texts
from experiments.stages.audit_rewards import Calls, Reward
from rlhfjax.data import load_chat_template, load_tokenizer
from rlhfjax.networks import decoder
from rlhfjax.pretrained import load_pretrained, save_reward_model
from rlhfjax.rewards import rouge_l
from rlhfjax.run_folder import RunFolder, read_lines

REWARDS = """
import random, threading

from rlhfjax.rewards import rouge_l

LOCK, RANDOM = threading.Lock(), random.Random(0)


def length(prompts, completions, **_):
    return [float(len(text.split())) for text in completions]


def constant(prompts, completions, **_):
    return [3] * len(completions)


def noisy(prompts, completions, reference, **_):
    with LOCK:
        return [rouge_l(x, r) + RANDOM.gauss(0, 0.5) for x, r in zip(completions, reference)]


def coarse(prompts, completions, reference, **_):
    return [float(rouge_l(x, r) > 0.7) for x, r in zip(completions, reference)]


def stuffed(prompts, completions, reference, **_):
    return [rouge_l(x, r) + 0.1 * x.split().count("excellent") for x, r in zip(completions, reference)]


def same(prompts, completions, reference, **_):
    return [rouge_l(x, r) for x, r in zip(completions, reference)]


def opposite(prompts, completions, reference, **_):
    return [-rouge_l(x, r) for x, r in zip(completions, reference)]


def partial(prompts, completions, reference, **_):
    return [None if "excellent" in x else rouge_l(x, r) for x, r in zip(completions, reference)]
"""
FAULTY = """
import time

def bad(prompts, completions, **_):
    WHAT
"""
NAMES = ("length", "constant", "noisy", "coarse", "stuffed", "same", "opposite", "partial")
WORDS = ("red", "sun", "ox", "tea", "map", "kit", "oak", "jar", "ink", "fox")


def write_texts(path: Path, *, prompts: int = 16, samples: int = 8) -> None:
    """Rows of completions: the reference with words dropped and changed, some of them longer, some "excellent"."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(prompts):
        reference = generator.choice(WORDS, size=6, replace=False).tolist()
        completions = []
        for _ in range(samples):
            kept = generator.random()
            text = [word if generator.random() < kept else str(generator.choice(WORDS)) for word in reference]
            text += generator.choice(WORDS, size=generator.integers(0, 5)).tolist()
            text = text[int(generator.integers(0, 3)) :]
            text += ["excellent"] * int(generator.random() < 0.2)
            completions.append(" ".join(text))
        rows.append({"id": f"p{number}", "prompt": f"question {number}", "completions": completions})
        rows[-1]["reference"] = " ".join(reference)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    write_texts(path)
    return path


def begin(
    texts: Path, folder: Path, code: str = REWARDS, names=("same",), settings: Any = None, **more: Any
) -> int:
    file = folder.with_suffix(".py")
    file.write_text(code)
    given = {"rewards": [f"{file}:{name}" for name in names], "texts": str(texts), "timed": 8}
    return start("audit", given | (settings or {}) | more, folder)


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory) -> Path:
    """All the rewards, against a gold function."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert begin(texts, folder, names=NAMES, gold="rlhfjax.rewards:rouge_l_reward") == 0
    return folder


def findings(folder: Path, name: str) -> tuple[str, str]:
    """The verdict on a reward, and its sentences."""
    report = (folder / "report.md").read_text()
    verdict = re.search(rf"^\*\*{name}: (.*?)\*\*\n(.*?)(?=^\*\*|^## )", report, re.M | re.S)
    assert verdict is not None
    return verdict[1], verdict[2]


@pytest.mark.parametrize(
    ("name", "verdict", "words"),
    [
        ("length", "do not use", r"do not use \(shallow features\): It goes with the feature “words”"),
        ("constant", "do not use", r"do not use \(spread\): It gives the same number to every text"),
        (
            "noisy",
            "do not use",
            r"do not use \(noise\): Asked twice .* differs in 100% .* the mean of \d+ calls",
        ),
        ("coarse", "careful", r"careful \(ties\): \d+% .* of the pairs of samples tie \(2 different numbers"),
        (
            "stuffed",
            "do not use",
            r"do not use \(probes\): The probe “one keyword over and over” beats the best honest",
        ),
        ("same", "ok", r"ok \(agreement\): It ranks 100% .* better than a coin"),
        ("opposite", "do not use", r"do not use \(best of n\): .* choosing by it does harm"),
        ("opposite", "do not use", r"do not use \(agreement\): It ranks 0% .* it may have the wrong sign"),
        ("partial", "careful", r"careful \(applies\): It gives no number to \d\d\.\d% of the texts"),
    ],
)
def test_a_known_fault_gets_its_verdict(whole, name, verdict, words):
    found, sentences = findings(whole, name)
    assert found == verdict, sentences
    assert re.search(words, sentences), sentences


def test_the_keyword_is_found_and_shown(whole):
    report = (whole / "report.md").read_text()
    of_stuffed = report.split("## Probes: stuffed")[1].split("\n## ")[0]
    assert "Words that go with a high reward" in of_stuffed and "excellent" in of_stuffed
    for title in ("Verdict", "Side by side", "Between rewards", "Best of n", "Shallow features", "Speed"):
        assert f"\n## {title}\n" in report
    assert (whole / "figures" / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_the_numbers_of_the_summary(whole, texts):
    summary = json.loads((whole / "summary.json").read_text())
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    gold = [[rouge_l(x, row["reference"]) for x in row["completions"]] for row in rows]
    assert summary["same/grade"] == 0 and summary["coarse/grade"] == 1 and summary["length/grade"] == 2
    assert summary["same/mean"] == pytest.approx(np.mean(gold), abs=1e-6)
    assert summary["same/best_of_8/gold"] == pytest.approx(np.mean([max(x) for x in gold]), abs=1e-6)
    assert summary["same/accuracy"] == 1 and summary["opposite/accuracy"] == 0
    assert summary["same/best_of_n/gain"] == pytest.approx(summary["same/best_of_n/possible"])
    assert summary["noisy/again/std"] == pytest.approx(0.5, rel=0.2)
    assert summary["partial/applies"] == pytest.approx(
        np.mean(["excellent" not in x for row in rows for x in row["completions"]])
    )


def test_a_none_stays_with_its_text():
    """Whatever the calls are cut into, and whichever thread makes them."""

    def odd(prompts, completions, number, **_):
        assert [f"text {n}" for n in number] == list(completions)
        return [None if n % 3 == 0 else float(n) for n in number]

    texts = [f"text {n}" for n in range(50)]
    calls = Calls(workers=3, calls_of=4, timeout=60.0)
    found = calls.score(Reward("odd", "", odd), texts, texts, {"number": range(50)})
    np.testing.assert_array_equal(found, [np.nan if n % 3 == 0 else n for n in range(50)])


@pytest.mark.slow
def test_a_resumed_audit_asks_nothing_again(whole, capsys):
    before = (whole / "summary.json").read_bytes()
    assert run.main(["--resume", str(whole)]) == 0
    assert (whole / "summary.json").read_bytes() == before  # of the noisy one too


def test_preferences_and_single_texts(tmp_path):
    """Preferences, scores and texts without gold in one file; labels by id beside it."""
    rows = [
        {"prompt": "p", "chosen": "a b c", "rejected": "a"},
        {"prompt": "q", "completion": "a b", "id": "x", "gold": 2},
        {"prompt": "q", "completion": "a", "id": "y"},
        {"prompt": "q", "completion": "a b c d", "id": "z"},
    ]
    file, labels = tmp_path / "texts.jsonl", tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels.write_text('{"id": "y", "gold": 1}\n{"chosen": "z", "rejected": "x"}\n')
    assert begin(file, tmp_path / "run", names=("length",), labels=str(labels)) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["length/pairs"] == 3 and summary["length/accuracy"] == 1


def test_labels_come_to_the_texts_of_their_ids(texts, tmp_path):
    read = audit_texts.read_texts(texts)
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"id": "p1", "gold": [0, 1, 2, 3, 4, 5, 6, 7]}\n{"id": "p0/3", "gold": true}\n')
    found = audit_texts.with_labels(read, labels)
    assert found.gold_N[8:16].tolist() == list(range(8)) and found.gold_N[3] == 1
    assert np.isnan(found.gold_N[[0, 16]]).all()
    assert found.columns_of(np.asarray([1, 0]))["reference"] == [read.columns["reference"][i] for i in (1, 0)]


# ---- what is wrong with the input


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("return [1.0]", "texts 0 to 127: reward 'bad' gave 1 numbers for 16 completions"),
        ("raise KeyError('no such server')", "raised KeyError: 'no such server'"),
        ("time.sleep(60)", "gave no answer within 3 s"),
    ],
)
def test_a_faulty_reward_is_told_and_loses_nothing(texts, what, words, tmp_path, capsys):
    folder = tmp_path / "run"
    code = REWARDS + FAULTY.replace("WHAT", what)
    assert begin(texts, folder, code, ("constant", "bad"), timeout=3.0 if "sleep" in what else 60.0) == 1
    out = " ".join("".join(capsys.readouterr()).split())
    assert words in out and "Traceback (most" not in out and "--resume" in out
    assert "scores_constant" in [line["stage"] for line in read_lines(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([None] * 2, "reward 'bad' gave None for all 2 texts"),
        ([float("nan")] * 2, "give a finite number"),
        (["good"] * 2, "gave 'good' for sample 0"),
        ("good", "reward 'bad' gave"),
        (1.0, "gave float"),
    ],
)
def test_what_a_reward_must_not_give(given, words, tmp_path):
    reward = Reward("bad", "", lambda prompts, completions, **_: given)
    texts = audit_texts.Texts(
        ["p"], ["a", "b"], np.zeros(2, int), ["0", "1"], {}, np.full(2, np.nan), audit_texts.NO_PAIRS
    )
    (tmp_path / "arrays").mkdir()
    with pytest.raises(ValueError, match=words):
        audit_measure.ask(reward, texts, Calls(1, 2, 60.0), 2, 0, RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", "texts.jsonl has no rows"),
        ("{", "texts.jsonl:1: not JSON"),
        ('{"completion": "a"}', "texts.jsonl:1: no field 'prompt'"),
        ('{"prompt": "p"}', "a row needs one of `completion`, `completions` and `chosen`"),
        ('{"prompt": "p", "completion": 3}', "texts.jsonl:1: field 'completion' must be a text, it is int"),
        ('{"prompt": "p", "completions": []}', "must be a list of texts, at least one"),
        ('{"prompt": "p", "completions": ["a"], "gold": 1}', "must be a list of 1 numbers"),
        ('{"prompt": "p", "completion": "a", "gold": "good"}', "must be a finite number, it is 'good'"),
        ('{"prompt": "p", "completion": "a", "gold": NaN}', "must be a finite number, it is nan"),
        ('{"prompt": "p", "chosen": "a"}', "field 'rejected' must be a text"),
        ('{"prompt": "p", "completion": "a", "id": 1}\n' * 2, "a text with the id '1' already"),
    ],
)
def test_a_bad_file_is_told(rows, words, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text(rows)
    with pytest.raises(ValueError, match=re.escape(words)):
        audit_texts.read_texts(file)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('{"id": "p99/0", "gold": 1}', "labels 1 ids that no text has: 'p99/0'; did you mean 'p9/0'?"),
        ('{"chosen": "p0/0", "rejected": "nobody"}', "labels 1 ids that no text has: 'nobody'"),
        ('{"chosen": "p0/0", "rejected": "p1/0"}', "are texts of two prompts"),
        ('{"id": "p0/0", "gold": 1}\n' * 2, "labelled a second time"),
        ('{"id": "p0/0"}', "a label has the fields `id` and `gold`"),
    ],
)
def test_a_bad_label_is_told(texts, rows, words, tmp_path):
    file = tmp_path / "labels.jsonl"
    file.write_text(rows)
    read = audit_texts.read_texts(texts)
    with pytest.raises(ValueError, match=re.escape(words)):
        audit_texts.with_labels(read, file)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rewards": []}, "name a reward to audit"),
        ({"rewards": ["experiments/assets"]}, "experiments/assets holds no reward model"),
        ({"gold": "nothing"}, "reward 'nothing' must be FILE.py:NAME"),
        ({"texts": "nowhere.jsonl"}, "no data file at"),
        ({"gold": "experiments/rewards.py:no_repetition", "labels": "x"}, "gold is given twice"),
    ],
)
def test_what_cannot_be_audited_is_told(texts, settings, words, tmp_path, capsys):
    assert begin(texts, tmp_path / "run", settings=settings) == 1
    out = " ".join("".join(capsys.readouterr()).split())
    assert words in out and "Traceback (most" not in out


# ---- samples of a model, and trained reward models


@pytest.mark.slow
def test_samples_of_a_model_and_a_trained_reward_model(tmp_path):
    """The reward model of a run, audited on samples: it gives what the run's own evaluation gave."""
    world = write_world(tmp_path)
    trained = tmp_path / "trained"
    assert start("summarize", world, trained) == 0
    settings = {
        "rewards": [str(trained), "experiments/rewards.py:no_repetition"],
        "text": world["text"],
        "prompts": 6,
        "samples": 3,
        "timed": 4,
    }
    for name, more in (("run", {}), ("tuned", {"sft": world["sft"]})):
        assert start("audit", settings | more, tmp_path / name, "--max-steps", "2") == 0
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["trained/applies"] == 1 and summary["trained/levels"] > 2
    # The run's evaluation has the reward of each text. A sample need not be how its text is encoded, but many are.
    with np.load(trained / "arrays" / "validation.npz") as stored:
        texts, reward, finished = stored["texts"], stored["reward"], stored["finished"] == 1
    rows = [json.loads(line) for line in Path(world["text"]["data"]).read_text().splitlines()]
    prompts = [row["document"] for row in rows if row["split"] == "validation"][: texts.shape[1]]
    function = audit_model.open_reward_model(trained, 8)
    found = [function(prompts=prompts, completions=[str(x) for x in row]) for row in texts]
    near = np.isclose(np.asarray(found), reward, atol=1e-4)
    assert finished.any() and near[finished].mean() > 0.3


@pytest.mark.slow
def test_a_sequence_classifier_is_a_reward(tmp_path):
    """The score is read at the token that ends the answer's turn, of the conversation as the template writes it."""
    folder = write_chat_model(tmp_path / "classifier")
    config, trunk = load_pretrained(folder)
    config = dataclasses.replace(config, tie_embeddings=True)
    head = {"kernel": jax.random.normal(jax.random.key(1), (config.width,)), "bias": jnp.zeros(())}
    (folder / "model.safetensors").unlink()
    save_reward_model(folder, config, {"trunk": trunk, "head": head}, pad_token_id=0)
    tokenizer, template = load_tokenizer(folder), load_chat_template(folder)
    function: Any = audit_model.open_reward_model(folder, 4)
    prompts = ["What of the cat?", "What of the cat?", "2+2", "2+2"]
    texts = ["the mat", "a dog sat on the log", "4", "the"]
    found = function(prompts=prompts, completions=texts)
    lm, end = decoder(config), BYTE_LEVEL.token_to_id(END)
    assert end is not None
    for prompt, text, score in zip(prompts, texts, found, strict=True):
        said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        ids = template.encode(tokenizer, said).ids
        ids = ids[: len(ids) - ids[::-1].index(end)]
        hidden, _ = lm.apply(
            trunk,
            jnp.asarray([ids]),
            position_BT=jnp.arange(len(ids))[None],
            mask_BTS=jnp.tril(jnp.ones((1, len(ids), len(ids)), bool)),
        )
        assert score == pytest.approx(float(hidden[0, -1] @ head["kernel"]), abs=1e-3)
    # Cut to what the model can read; and one that says nothing, but ends.
    assert np.isfinite(function(prompts=["the cat"] * 2, completions=["the mat " * 200, ""])).all()
    with pytest.raises(ValueError, match="128 positions"):
        function(prompts=["the cat " * 200], completions=["a"])
