"""What comparisons on text are made of: given rewards by the prompts' numbers, scores of translations, differences at
equal length, rows of results."""

import dataclasses
import shlex
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from tiny_text import write_base, write_pairs

from experiments import compare, translate
from experiments.stages import (
    comparison,
    configs,
    length_matched,
    policy,
    preferences,
    ratings,
    text,
    translation,
)
from experiments.stages.evaluation import Policy
from experiments.stages.results import read_results
from experiments.stages.task import Task
from rlhfjax import run_folder
from rlhfjax.networks import Branches

CONFIG = configs.Text(prompt_length=10, completion_length=6)


@pytest.fixture
def sacrebleu():
    return pytest.importorskip("sacrebleu")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> text.Text:
    folder = tmp_path_factory.mktemp("world")
    write_pairs(folder / "pairs.jsonl")
    write_base(folder / "base", folder / "pairs.jsonl")
    return text.open_text(
        dataclasses.replace(CONFIG, data=str(folder / "pairs.jsonl"), base=str(folder / "base"))
    )


@pytest.fixture(scope="module")
def train(loaded) -> text.Examples:
    return loaded.load("train")


def folder_at(path) -> run_folder.RunFolder:
    return run_folder.create(path, "experiment: fake\n", experiment="fake", seed=0, exact=True)


def completions_of(loaded, train, rows: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Two completions for each row: what the data has, and what it has for the next row."""
    rows = list(rows)
    token = np.zeros((len(rows), 2, 6), np.int32)
    mask = np.zeros((len(rows), 2, 6), bool)
    for b, row in enumerate(rows):
        for g, ids in enumerate((train.completions[row], train.completions[row + 1])):
            token[b, g, : len(ids)], mask[b, g, : len(ids)] = ids, True
    return token, mask


# ----------------------------------------------------------------------------------------------------- given rewards


def test_chrf_on_the_device_is_the_gold_score_of_the_prompts_numbered(loaded, train):
    rows = np.asarray([7, 0, 7, 3])
    token, mask = completions_of(loaded, train, rows)
    params, reward = translation.chrf_reward(10.0).of(loaded, train)
    problem = policy.Problem(loaded, {}, lambda lm: reward, params, train, rows, never, numbered=True)
    found = ratings.rewards_of(problem, rows, token, mask)
    texts = loaded.decode(token, mask)
    np.testing.assert_allclose(found, 10.0 * translation.chrf_of(train)(rows, texts), rtol=1e-5)
    np.testing.assert_allclose(found[:, 0], 10.0, rtol=1e-6)  # the data's own translation
    assert (found[:, 1] < 9.0).any()


def never(*_: Any) -> Any:
    pytest.fail("what is given on the device was asked in Python")


def test_rewards_in_python_are_asked_by_row(loaded, train):
    rows = np.asarray([4, 1])
    token, mask = completions_of(loaded, train, rows)

    def gold(asked, texts):
        assert asked.tolist() == [4, 1] and texts[0][0] == train.references[4]
        return np.asarray([[row + 0.5 * g for g in range(2)] for row in asked])

    problem = policy.Problem(loaded, {}, None, None, train, rows, gold)
    assert ratings.rewards_of(problem, rows, token, mask).tolist() == [[4.0, 4.5], [1.0, 1.5]]


def test_pairs_are_labelled_by_the_score_where_one_is_given(loaded, train, tmp_path, monkeypatch):
    token, mask = completions_of(loaded, train, range(6))
    out = {"token_BGC": token, "mask_BGC": mask, "finished_BG": np.ones((6, 2), bool)}
    monkeypatch.setattr(preferences, "sample_policy", lambda *_, **__: out)
    config = configs.PreferenceStage(prompts=6, heldout=2, samples=2, label_temperature=1e-3)

    def score(rows, token_BGC, mask_BGC):  # against gold: the second is always better
        np.testing.assert_array_equal(token_BGC, token)
        return np.tile([0.0, 1.0], (len(rows), 1))

    arguments = config, loaded, {}, train, np.arange(9), translation.chrf_of(train)
    given = preferences.collect_preferences(*arguments, folder_at(tmp_path / "given"), score=score)
    assert given.preferences.label_BK[:, 0].tolist() == [0.0] * 6
    np.testing.assert_allclose(given.gold_BG[:, 0], 1.0)  # gold is still what is measured
    by_gold = preferences.collect_preferences(*arguments, folder_at(tmp_path / "gold"))
    assert by_gold.preferences.label_BK[:, 0].tolist() == [1.0] * 6


def test_the_number_of_a_prompt_reaches_a_reward_on_the_device(loaded, train):
    def reward(params, branches: Branches, index_B):
        return jnp.broadcast_to((params * index_B)[:, None], branches.completion_BGC.shape[:2])

    rows = np.asarray([9, 2, 5])
    token, mask = completions_of(loaded, train, rows)
    problem = policy.Problem(
        loaded, {}, lambda lm: reward, jnp.float32(0.5), train, rows, never, numbered=True
    )
    assert ratings.rewards_of(problem, rows, token, mask)[:, 0].tolist() == [4.5, 1.0, 2.5]


# ------------------------------------------------------------------------------------------------------- translation


def test_chrf_is_sacrebleus(sacrebleu, train):
    texts = [train.references[1], "red sun", "Öl für Käse"]
    gold = translation.chrf_of(train)(np.asarray([0]), [texts])
    wanted = [sacrebleu.sentence_chrf(x, [train.references[0]]).score / 100 for x in texts]
    np.testing.assert_allclose(gold, [wanted], atol=1e-9)


def test_bleu_is_sacrebleus(sacrebleu, train):
    texts = ["red sun ox tea", "map kit", "red sun map"]
    wanted = [sacrebleu.sentence_bleu(x, ["red sun ox map"]).score / 100 for x in texts]
    found = translation.bleu_reward(texts, texts, reference=["red sun ox map"] * 3)
    np.testing.assert_allclose(found, wanted)
    assert 0 < found[2] < found[0] < 1
    gold = translation.bleu_of(train)(np.asarray([2]), [[train.references[2], "kit"]])
    assert gold[0, 0] == pytest.approx(1.0) and gold[0, 1] < 0.5


def test_scores_of_the_corpus_are_of_the_rows_evaluated(sacrebleu, train):
    own = made("sft, greedy", texts=train.references[:5])
    other = made("ppo, greedy", texts=train.references[1:6])
    found = translation.corpus_numbers({"validation": [[own, other], [own, own]]}, {"validation": train})
    exact, mixed = (found["validation"][name] for name in ("sft, greedy", "ppo, greedy"))
    assert exact["corpus chrF"] == pytest.approx(100.0)
    one = sacrebleu.corpus_chrf(train.references[1:6], [train.references[:5]]).score
    assert mixed["corpus chrF"] == pytest.approx((one + 100.0) / 2)  # mean over the two seeds
    assert "sft, greedy" in str(translation.corpus_section(found).table)


def test_without_sacrebleu_there_is_chrf(monkeypatch, train):
    monkeypatch.setattr(translation, "find_spec", lambda name: None)
    assert not translation.has_sacrebleu() and translation.corpus_scores(["a"], ["a"]) == {}
    assert translation.chrf_of(train)(np.asarray([0]), [[train.references[0]]])[0, 0] == pytest.approx(1.0)
    assert "pip install" in translation.corpus_section({"validation": {"sft, greedy": {}}}).text


def test_the_language_chooses_the_data_and_labels_are_as_noisy_whatever_the_reward():
    config = translate.Config(language="fr")
    given = translate._with_data(config)
    assert given.text.data == "experiments/assets/debian_en_fr.jsonl.gz"
    assert given.preferences.label_temperature == pytest.approx(
        config.gain * config.preferences.label_temperature
    )
    learned = translate._with_data(dataclasses.replace(config, optimised="learned"))
    assert learned.preferences == config.preferences
    own = dataclasses.replace(config, text=dataclasses.replace(config.text, data="mine.jsonl"))
    assert translate._with_data(own).text.data == "mine.jsonl"


# --------------------------------------------------------------------------------------------------- at equal length


def made(name: str, *, gold: Any = (0.0,), length: Any = None, group: str = "", texts: Any = ()) -> Policy:
    gold = np.asarray(gold, np.float64)
    zero = np.zeros_like(gold)
    length = zero if length is None else np.asarray(length, np.float64)
    return Policy(name, group or name.split(", ")[0], gold, zero, zero, "k1", length, zero, list(texts))


def drawn(seed: int, effect: float, per_token: float, *, seeds: int = 1, prompts: int = 40):
    """Policies and controls whose gold differs by `effect` at equal length and `per_token` for each token more."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(seeds):
        length = rng.integers(5, 15, size=prompts)
        longer = rng.integers(-4, 9, size=prompts)
        gold = rng.normal(size=prompts)
        noise = 0.05 * rng.normal(size=prompts)
        control = made("sft, greedy", gold=gold, length=length)
        tuned = made("ppo, greedy", gold=gold + effect + per_token * longer + noise, length=length + longer)
        pairs.append((tuned, control))
    return tuple(zip(*pairs, strict=True))


def differences(tuned, controls):
    return (
        np.stack([getattr(a, name) - getattr(b, name) for a, b in zip(tuned, controls, strict=True)])
        for name in ("gold", "length")
    )


@pytest.mark.parametrize("seeds", [1, 3])
def test_at_equal_length_is_the_least_squares_line_at_0_and_the_mean_of_close_pairs(seeds, monkeypatch):
    monkeypatch.setattr(length_matched, "RESAMPLES", 40)
    tuned, controls = drawn(0, 0.3, 0.1, seeds=seeds)
    found = length_matched.at_equal_length(tuned, controls, seed=5)
    y_SB, x_SB = differences(tuned, controls)
    slope, at_zero = np.polyfit(x_SB.ravel(), y_SB.ravel(), 1)
    assert found.regression.value == pytest.approx(at_zero) and found.per_token == pytest.approx(slope)
    assert found.regression.value == pytest.approx(0.3, abs=0.05)
    assert found.plain.value == pytest.approx(y_SB.mean()) and found.plain.value > 0.4
    close = [y for y, x in zip(y_SB.ravel(), x_SB.ravel(), strict=True) if -1 <= x <= 1]
    assert found.matched.value == pytest.approx(sum(close) / len(close))
    assert found.share == pytest.approx(len(close) / y_SB.size)
    assert found.longer == pytest.approx(x_SB.mean())

    # The interval: prompts drawn again, each with all its seeds, and the line fitted anew.
    count_RB = np.random.default_rng(5).multinomial(40, np.full(40, 1 / 40), size=40)
    fits, means = [], []
    for count_B in count_RB:
        again = np.repeat(np.arange(40), count_B)
        x, y = x_SB[:, again].ravel(), y_SB[:, again].ravel()
        fits.append(np.polyfit(x, y, 1)[1])
        means.append(y[np.abs(x) <= 1].mean())
    assert found.regression[1:] == pytest.approx(np.percentile(fits, (2.5, 97.5)))
    assert found.matched[1:] == pytest.approx(np.percentile(means, (2.5, 97.5)))


def test_a_lead_that_is_length_alone_is_none_at_equal_length():
    found = length_matched.at_equal_length(*drawn(1, 0.0, 0.1, prompts=400))
    assert found.plain.low > 0.1
    for estimate in (found.regression, found.matched):
        assert estimate.low < 0 < estimate.high
        assert estimate.high - estimate.low < 0.06


def test_lengths_that_all_differ_alike_tell_nothing_of_equal_ones():
    control = made("sft, greedy", gold=[0.1, 0.2, 0.4], length=[5, 6, 7])
    longer = made("ppo, greedy", gold=[0.2, 0.2, 0.8], length=[8, 9, 10])
    found = length_matched.at_equal_length([longer], [control])
    assert np.isnan(found.regression.value) and np.isnan(found.matched.value) and found.share == 0
    assert found.plain.value == pytest.approx(0.5 / 3)
    assert not length_matched.length_numbers({"claim": found})
    equal = made("ppo, greedy", gold=[0.2, 0.2, 0.8], length=[5, 6, 7])
    found = length_matched.at_equal_length([equal], [control])
    assert found.regression.value == found.matched.value == found.plain.value == pytest.approx(0.5 / 3)
    assert "ppo" not in str(length_matched.length_section({"a": found}, "gold", "validation").table)


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 and 1 seeds"):
        length_matched.at_equal_length([made("a, greedy")] * 2, [made("b, greedy")])
    with pytest.raises(ValueError, match="pairs need equally many"):
        length_matched.at_equal_length([made("a, greedy", gold=[1.0, 2.0])], [made("b, greedy")])


def test_every_policy_is_held_against_the_start_decoded_in_the_same_way():
    gold = np.arange(4.0)
    names = {
        "sft, temperature 0.7": "sft",
        "sft, greedy": "sft",
        "sft, best of 4": "best of n",
        "ppo, temperature 0.7": "ppo",
        "ppo, greedy": "ppo",
        "ppo-0.5, temperature 0.3": "ppo-0.5",
    }
    found = [
        made(name, gold=gold + i, length=gold, group=group) for i, (name, group) in enumerate(names.items())
    ]
    claims = length_matched.against_start([found], "sft", 0.7)
    assert {claim: item.plain.value for claim, item in claims.items()} == {
        "sft, best of 4 against sft, temperature 0.7": 2.0,
        "ppo, temperature 0.7 against sft, temperature 0.7": 3.0,
        "ppo, greedy against sft, greedy": 3.0,
    }


# ----------------------------------------------------------------------------------------------------------- results


def test_rows_of_results_are_sampled_at_one_temperature(tmp_path):
    folder = folder_at(tmp_path / "run")
    part = folder_at(tmp_path / "part")
    for stage, seconds in (("sft", 4.0), ("ppo-0.1", 2.0), ("ilql", 1.5)):
        part.log_perf(stage, 0, {"seconds": seconds})
    names = [
        ("sft, temperature 0.7", "sft"),
        ("sft, temperature 0.3", "sft"),
        ("sft, greedy", "sft"),
        ("sft, best of 4", "best of n"),
        ("ppo-0.1, temperature 0.7", "ppo-0.1"),
        ("ppo-0.1, greedy", "ppo-0.1"),
        ("ilql-0.1, temperature 0.7", "ilql-0.1"),
        ("raft, temperature 0.7", "raft"),
        ("ilql-9, temperature 0.7", "ilql-9"),  # a point of the curve, no stage
    ]
    merged = [made(name, gold=np.arange(3.0) + i, group=group) for i, (name, group) in enumerate(names)]
    stages: Any = dict.fromkeys(("ppo-0.1", "ilql-0.1", "raft"))
    prepared: Any = SimpleNamespace(start="sft")
    found = {"validation": [merged], "test": [merged]}
    both = {"validation": merged[:1], "test": merged}
    compared = comparison.Compared(
        Task("chrF", never),
        0.7,
        stages,
        folder,
        [part, part],
        prepared,
        [],
        found,
        both,
        {},
    )
    compared.write_results("translation", flags="--language de")
    read = read_results(folder.path)
    assert (read.task, read.metric) == ("translation", "chrF, test split")
    rows = {row.method: row for row in read.rows}
    assert {name: (row.gold[0], row.seconds) for name, row in rows.items()} == {
        "sft": (0.0, 4.0),
        "sft, greedy": (2.0, 0.0),
        "best of 4": (3.0, 0.0),
        "ppo 0.1": (4.0, 2.0),
        "q-learning (ilql) 0.1": (6.0, 1.5),
        "raft": (7.0, 0.0),
    }
    assert rows["sft, greedy"].kl is None and rows["ppo 0.1"].kl == 0.0
    assert rows["ppo 0.1"].command == (
        "python experiments/run.py fake --language de --seed 0 --methods ppo --kl-weights 0.1"
    )
    assert rows["best of 4"].command == "python experiments/run.py fake --language de --seed 0"


def test_the_command_of_a_row_names_what_is_not_as_by_default(tmp_path):
    settings = compare.results()
    flags = comparison.changed_flags(settings)
    assert flags["sft.steps"] == "--sft.steps 128" and "sft.rows" not in flags
    command = [word for flag in flags.values() for word in shlex.split(flag)]
    assert tyro.cli(compare.Config, args=command) == settings  # it makes the same settings
    chosen = dataclasses.replace(
        translate.Config(), host=configs.HostRewards(rewards=("a b.py:f", "c:g"), ahead=True)
    )
    ratings_as_they_are = dataclasses.replace(chosen.ratings, centred=False)
    chosen = dataclasses.replace(chosen, ratings=ratings_as_they_are, language="it")
    command = [word for flag in comparison.changed_flags(chosen).values() for word in shlex.split(flag)]
    assert tyro.cli(translate.Config, args=command) == chosen

    stages: Any = dict.fromkeys(("ppo", "dpo"))
    prepared: Any = SimpleNamespace(start="sft")
    folder: Any = SimpleNamespace(experiment="compare", seed=3, path=tmp_path)
    compared = comparison.Compared(
        Task("ROUGE-L", never), 0.7, stages, folder, [folder], prepared, [], {}, {}, {}
    )
    row = compared._row(made("ppo, temperature 0.7"), "", flags)
    assert row is not None
    assert row.command.startswith("python experiments/run.py compare --seed 3 --methods ppo --")
    assert "--ppo.steps 24" in row.command and "--sft.steps 128" in row.command
    assert "--dpo" not in row.command and row.command.count("--methods") == 1
