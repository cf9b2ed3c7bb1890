"""The stages of the experiments on a tiny world: what they measure, against NumPy and by hand."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled
from tiny_text import WORDS, write_base, write_pairs

from experiments.stages import (
    configs,
    evaluation,
    methods,
    offline,
    policy,
    preferences,
    prepare,
    ratings,
    text,
)
from rlhfjax import run_folder
from rlhfjax.config import ILQL, Optimizer, SoftQ
from rlhfjax.generation import Sampling, generate, sample_keys
from rlhfjax.networks import Branches, causal_mask, q_advantage, scalar_head
from rlhfjax.recipes import completion_logp, init_text_values

CONFIG = configs.Text(prompt_length=10, completion_length=6)
TEMPERATURE = 0.8  # of the rollouts, at which KL is measured


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


# ------------------------------------------------------------------------------------------------------------ text


def test_pairs_that_do_not_fit_are_left_out(loaded, train):
    assert len(train) == len(train.prompts) == len(train.references) == len(train.ids)
    assert len(train) + train.dropped == 48
    assert set(" ".join(train.prompts).split()) == set(WORDS)
    short = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, prompt_length=7))
    fewer = short.load("train")
    assert fewer.dropped > 0
    assert all(prompt in train.prompts for prompt in fewer.prompts)
    for prompt, ids in zip(fewer.prompts, fewer.ids, strict=True):
        assert loaded.tokenizer.decode(ids) == prompt and len(ids) <= 7


def test_a_batch_is_padded_on_the_left_and_numbered_by_its_rows(loaded, train):
    batch = loaded.batch(train, np.asarray([5, 2]))
    assert batch.index_B.tolist() == [5, 2] and batch.token_BP.shape == (2, 10)
    for row, token, mask in zip((5, 2), batch.token_BP, batch.mask_BP, strict=True):
        assert token[mask].tolist() == train.ids[row]
        assert mask[-1] and (np.diff(mask.astype(int)) >= 0).all()
        assert token[-1] == loaded.tokenizer.sep_id


def test_decoding_reads_the_mask_and_leaves_out_the_stop_token(loaded):
    ids = loaded.tokenizer.encode("red sun") + [loaded.tokenizer.eos_id]
    token = np.zeros((2, 1, 6), np.int32)
    token[0, 0, : len(ids)] = ids
    token[1, 0, : len(ids)] = ids
    mask = np.arange(6)[None, None] < np.asarray([len(ids), 0])[:, None, None]
    assert loaded.decode(token, mask) == [["red sun"], [""]]


def test_rows_are_divided_once(train):
    one, other = text.divide(train, 0.25, seed=3)
    assert len(one) == round(0.25 * len(train))
    assert sorted([*one, *other]) == list(range(len(train)))
    again, _ = text.divide(train, 0.25, seed=3)
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, text.divide(train, 0.25, seed=4)[0])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_is_none_is_refused(train, share):
    with pytest.raises(ValueError, match="sft_share must lie between 0 and 1"):
        text.divide(train, share, seed=0)


def test_a_share_that_leaves_nothing_is_refused(train):
    with pytest.raises(ValueError, match="leaves nothing on one side"):
        text.divide(train, 1e-6, seed=0)


def test_a_prompt_longer_than_the_context_is_refused_at_once(loaded):
    with pytest.raises(ValueError, match=r"prompt_length 28 \+ completion_length 6 exceed .* 32 positions"):
        text.open_text(dataclasses.replace(loaded.config, prompt_length=28))


# ---------------------------------------------------------------------------------------------------- preferences


def test_samples_do_not_depend_on_how_they_are_grouped(loaded, train):
    """Seven completions of three prompts, in parts that do not divide them, equal those of one generation."""
    rows, samples = np.asarray([4, 0, 9]), preferences.BRANCHES + 2
    temperatures = np.linspace(0.6, 1.2, samples)
    key = jax.random.key(5)
    writer = text.Writer(loaded.base)
    out = preferences.sample_policy(loaded, writer, train, rows, key, temperatures=temperatures, batch=2)
    prompts = loaded.batch(train, rows)
    whole = compiled(
        partial(generate, loaded.lm),
        loaded.base,
        prompts.token_BP,
        prompts.mask_BP,
        compiled(lambda key: sample_keys(key, jnp.asarray(prompts.index_B), samples), key),
        max_new_tokens=loaded.config.completion_length,
        stop_tokens=loaded.stop_tokens,
        sampling=Sampling(jnp.tile(jnp.asarray(temperatures, jnp.float32), 3)),
    )
    np.testing.assert_array_equal(out["token_BGC"], whole.token_BGC)
    np.testing.assert_array_equal(out["finished_BG"], whole.finished_BG)
    np.testing.assert_allclose(out["logp_BGC"], whole.logp_BGC, atol=1e-4)
    assert len({row.tobytes() for row in out["token_BGC"].reshape(3 * samples, -1)}) > samples


def test_preferences_need_both_parts(loaded, train, tmp_path):
    for prompts, heldout in ((6, 6), (6, 0), (7, 2)):
        config = configs.PreferenceStage(prompts=prompts, heldout=heldout)
        with pytest.raises(
            ValueError, match=f"preferences ask for {prompts} prompts, {heldout} of them held out"
        ):
            preferences.collect_preferences(
                config, loaded, loaded.base, train, np.arange(6), never, folder_at(tmp_path / "a")
            )
        (tmp_path / "a" / "config.yaml").unlink()
        (tmp_path / "a").rename(tmp_path / f"{prompts}-{heldout}")


def test_preferences_are_kept_and_read_back(loaded, train, tmp_path):
    folder, config = folder_at(tmp_path / "run"), configs.PreferenceStage(prompts=6, heldout=2, samples=3)
    rows = np.asarray([7, 1, 3, 9, 0, 8, 4])
    gold = prepare.rouge_of(train)
    judged = preferences.collect_preferences(config, loaded, loaded.base, train, rows, gold, folder)
    assert judged.trained == 4 and judged.row_B.tolist() == rows[:6].tolist()
    assert judged.token_BGC.shape == (6, 3, 6) and judged.preferences.label_BK.shape == (6, 3)
    texts = loaded.decode(judged.token_BGC, judged.mask_BGC)
    for b in range(6):
        for k, (first, second) in enumerate([(0, 1), (0, 2), (1, 2)]):
            assert (judged.preferences.first_K[k], judged.preferences.second_K[k]) == (first, second)
            assert judged.preferences.mask_BK[b, k] == (texts[b][first] != texts[b][second])
    stored = preferences.collect_preferences(config, loaded, {}, train, rows, never, folder)
    for one, other in zip(jax.tree.leaves(vars(judged)), jax.tree.leaves(vars(stored)), strict=True):
        np.testing.assert_array_equal(one, other)
    samples = run_folder.read_lines(folder.path / "samples.jsonl")
    assert [row["prompt"] for row in samples] == [train.prompts[row] for row in rows[:6]]
    assert [row["completion"] for row in samples] == [row[0] for row in texts]


# ----------------------------------------------------------------------------------------------------------- critic


def test_the_critic_begins_at_zero_on_the_trunk_it_is_given(loaded):
    critic = policy.make_critic(loaded.base, loaded.lm.config.width)
    hidden = np.random.default_rng(0).normal(size=(3, loaded.lm.config.width)).astype(np.float32)
    np.testing.assert_array_equal(scalar_head(critic["head"], jnp.asarray(hidden)), np.zeros(3))
    assert critic["trunk"] is loaded.base


# ------------------------------------------------------------------------------------------------------- evaluation


def gold_of(examples):
    """A gold score that tells which text it was given, and for which row."""

    def gold(rows, texts):
        assert max(rows) < len(examples)
        return np.asarray([[100.0 * row + len(x) for x in xs] for row, xs in zip(rows, texts, strict=True)])

    return gold


@partial(jax.jit, static_argnums=0)
def plain_hidden(lm, params, token_BT):
    position_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1]), token_BT.shape)
    mask = causal_mask(jnp.ones_like(token_BT))
    return lm.apply(params, token_BT, position_BT=position_BT, mask_BTS=mask)[0]


@partial(jax.jit, static_argnums=0)
def plain_logits(lm, params, token_BT):
    return lm.logits(params, plain_hidden(lm, params, token_BT))


completion_logp_of = jax.jit(completion_logp, static_argnums=0)
advantage_of = jax.jit(q_advantage)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def sequence_logp(loaded, params, prompt, completion, temperature) -> float:
    """log p(completion | prompt) from one plain forward, summed in float64."""
    row = np.zeros((1, 16), np.int32)
    row[0, : len(prompt) + len(completion)] = [*prompt, *completion]
    logits = np.asarray(plain_logits(loaded.lm, params, jnp.asarray(row)), np.float64)[0] / temperature
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return sum(logp[len(prompt) - 1 + t, token] for t, token in enumerate(completion))


class Measured(NamedTuple):
    """An evaluation, and what it was made of."""

    found: dict[str, evaluation.Policy]
    generations: list[dict[str, np.ndarray]]  # of sft, then of ppo
    tuned: dict
    folder: run_folder.RunFolder
    again: Callable[..., list[evaluation.Policy]]  # the same evaluation, with another gold score


@pytest.fixture(scope="module")
def measured(loaded, tmp_path_factory) -> Measured:
    tuned = loaded.base | {"embedding": loaded.base["embedding"] * 1.1}
    config = configs.EvaluationStage(prompts=5, batch=4, temperatures=(TEMPERATURE, 0.5), best_of=(2, 4))

    def reward(params, branches):
        return params + 0.5 * jnp.sum((branches.completion_BGC % 5) * branches.completion_mask_BGC, axis=2)

    generations = []

    def recorded(*arguments, **named):
        generations.append(preferences.sample_policy(*arguments, **named))
        return generations[-1]

    folder = folder_at(tmp_path_factory.mktemp("evaluation") / "run")
    evaluate = partial(
        evaluation.evaluate_policies,
        config,
        loaded,
        loaded.base,
        {"ppo": text.Writer(tuned)},
        evaluation.Scorer(lambda lm: reward, jnp.float32(0.25)),
        folder=folder,
        temperature=TEMPERATURE,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "sample_policy", recorded)
        found = evaluate(gold=gold_of)
    return Measured({policy.name: policy for policy in found}, generations, tuned, folder, evaluate)


def test_every_policy_is_measured_on_the_same_prompts(measured):
    found = measured.found
    assert list(found) == [
        "sft, temperature 0.8",
        "sft, temperature 0.5",
        "sft, greedy",
        "sft, best of 2",
        "sft, best of 4",
        "ppo, temperature 0.8",
        "ppo, temperature 0.5",
        "ppo, greedy",
    ]
    groups = [measurement.group for measurement in found.values()]
    assert groups == ["sft"] * 3 + ["best of n"] * 2 + ["ppo"] * 3
    (line,) = measured.folder.metrics("validation")
    for measurement in found.values():
        for field in ("gold", "reward", "kl", "length", "finished"):
            column = getattr(measurement, field)
            assert column.shape == (5,)
            assert line[f"{measurement.name}/{field}"] == pytest.approx(column.mean())
        assert measurement.gold.tolist() == [100.0 * b + len(x) for b, x in enumerate(measurement.texts)]


def test_kl_is_that_of_plain_forwards(measured, loaded):
    found, prompts = measured.found, loaded.load("validation").ids
    for label, params, out in zip(
        ("sft", "ppo"), (loaded.base, measured.tuned), measured.generations, strict=True
    ):
        columns = out["token_BGC"].shape[1]
        places = {
            "temperature 0.8": (0, TEMPERATURE),
            "temperature 0.5": (columns - 2, 0.5),
            "greedy": (columns - 1, None),
        }
        for name, (column, temperature) in places.items():
            measurement = found[f"{label}, {name}"]
            for b in range(5):
                mask = out["mask_BGC"][b, column]
                completion = out["token_BGC"][b, column][mask].tolist()
                kl = -sequence_logp(loaded, loaded.base, prompts[b], completion, TEMPERATURE)
                if temperature is not None:
                    kl += sequence_logp(loaded, params, prompts[b], completion, temperature)
                assert measurement.kl[b] == pytest.approx(kl, abs=1e-3), (label, name, b)
                assert measurement.length[b] == mask.sum()
                assert measurement.finished[b] == (completion[-1] == loaded.tokenizer.eos_id)
            estimator = "exact, of a point mass" if temperature is None else "k1"
            assert measurement.kl_estimator == estimator
    assert np.abs(found["sft, temperature 0.8"].kl).max() < 1e-4
    assert np.abs(found["ppo, temperature 0.8"].kl).max() > 1e-2


def test_best_of_n_takes_the_highest_reward_of_the_first_n(measured, loaded):
    found, out = measured.found, measured.generations[0]
    mask, texts = out["mask_BGC"], loaded.decode(out["token_BGC"], out["mask_BGC"])
    reward = 0.25 + 0.5 * (out["token_BGC"] % 5 * mask).sum(axis=2)
    assert 0 < out["finished_BG"].mean() < 1  # or the test would be weak
    for n in (2, 4):
        measurement, best = found[f"sft, best of {n}"], reward[:, :n].argmax(axis=1)
        np.testing.assert_allclose(measurement.reward, reward[:, :n].max(axis=1), atol=1e-6)
        assert measurement.texts == [texts[b][g] for b, g in enumerate(best)]
        np.testing.assert_allclose(measurement.kl, np.log(n) - (n - 1) / n)
    assert found["sft, best of 4"].reward.mean() > found["sft, temperature 0.8"].reward.mean()
    np.testing.assert_allclose(found["sft, temperature 0.8"].reward, reward[:, 0], atol=1e-6)


def test_an_evaluation_is_read_back_as_it_was(measured):
    def gold(examples):
        pytest.fail("computed again")

    for one, other in zip(measured.found.values(), measured.again(gold=gold), strict=True):
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def hand_made(name: str, group: str, gold, kl: float = 0.0) -> evaluation.Policy:
    ones = np.ones(len(gold))
    return evaluation.Policy(name, group, np.asarray(gold, float), ones, ones * kl, "k1", ones, ones, [])


def test_claims_stand_beside_their_controls():
    """Gold per prompt is made so that PPO beats sampling, ties with greedy and loses to best of 4."""
    base, generator = np.linspace(0.0, 1.0, 40), np.random.default_rng(0)
    noise = generator.permuted(np.repeat([-0.1, 0.1], 20))
    found = [
        hand_made("sft, temperature 1", "sft", base),
        hand_made("sft, temperature 0.5", "sft", base + 0.2),
        hand_made("sft, greedy", "sft", base + 0.5 + noise),
        hand_made("sft, best of 4", "best of n", base + 1.0, kl=0.6),
        hand_made("sft, best of 64", "best of n", base - 9.0, kl=3.2),
        hand_made("ppo, temperature 1", "ppo", base + 0.5, kl=1.0),
        hand_made("ppo, temperature 0.5", "ppo", base + 0.6),
        hand_made("ppo, greedy", "ppo", base + 0.8),
    ]
    compared = {item.claim: item for item in evaluation.compare(found, 1.0)}
    expected = {
        "ppo, temperature 1 against sft, temperature 1": (0.5, True),
        "ppo, temperature 1 against sft, temperature 0.5": (0.3, True),  # the best temperature of the control
        "ppo, temperature 0.5 against sft, temperature 0.5": (0.4, True),  # of both
        "ppo, temperature 1 against sft, greedy": (0.0, False),
        "ppo, greedy against sft, greedy": (0.3, True),
        "ppo, temperature 1 against sft, best of 4": (-0.5, False),  # nearest in KL, not the weakest
    }
    assert compared.keys() == expected.keys()
    for claim, (difference, holds) in expected.items():
        assert compared[claim].difference.value == pytest.approx(difference, abs=1e-9), claim
        assert compared[claim].holds == holds, claim


def test_a_claim_made_twice_is_listed_once():
    found = [
        hand_made(name, name[:3], [0.1, 0.2, 0.3])
        for name in ("sft, temperature 1", "sft, greedy", "ppo, temperature 1", "ppo, greedy")
    ]
    assert [item.claim for item in evaluation.compare(found, 1.0)] == [
        "ppo, temperature 1 against sft, temperature 1",
        "ppo, temperature 1 against sft, greedy",
        "ppo, greedy against sft, greedy",
    ]


# ---------------------------------------------------------------------------------------- Q-learning on rated samples


def mean_over_tokens(x_BG, mask_BGC) -> float:
    return float(np.sum(x_BG[..., None] * mask_BGC) / mask_BGC.sum())


@pytest.fixture(scope="module")
def judged(loaded, train, tmp_path_factory) -> preferences.Judged:
    config = configs.PreferenceStage(prompts=6, heldout=2, samples=3)
    folder = folder_at(tmp_path_factory.mktemp("judged") / "run")
    gold = prepare.rouge_of(train)
    return preferences.collect_preferences(config, loaded, loaded.base, train, np.arange(9), gold, folder)


def never(*_):
    pytest.fail("the gold scorer was asked, or something computed again")


def problem_of(loaded, train, reward=never) -> policy.Problem:
    return policy.Problem(
        loaded, loaded.base, lambda lm: reward, jnp.float32(0.25), train, np.arange(9), never
    )


def even_tokens(params, branches):
    """A reward on the device: the share of tokens with an even id, plus its parameter."""
    even = (branches.completion_BGC % 2 == 0) & branches.completion_mask_BGC
    return params + jnp.sum(even, axis=2) / jnp.sum(branches.completion_mask_BGC, axis=2)


def test_ratings_are_the_reward_of_samples_and_never_the_gold_score(loaded, train, judged, tmp_path):
    """Four prompts that the reward model learnt from, then three more; those held out from it are passed over."""
    problem, sampled = problem_of(loaded, train, even_tokens), configs.PreferenceStage(samples=3)
    config = configs.RatingStage(prompts=7, missing_eos_penalty=-2.0, centred=False)
    folder = folder_at(tmp_path / "run")
    rated = ratings.rate(config, sampled, problem, judged, folder)
    assert rated.row_B.tolist() == [0, 1, 2, 3, 6, 7, 8]
    np.testing.assert_array_equal(rated.token_BGC[:4], judged.token_BGC[:4])
    assert rated.token_BGC.shape == (7, 3, 6)
    ended = np.zeros((7, 3), bool)
    for b, g in np.ndindex(7, 3):
        completion = rated.token_BGC[b, g][rated.mask_BGC[b, g]]
        ended[b, g] = completion[-1] == loaded.tokenizer.eos_id
        expected = 0.25 + np.mean(completion % 2 == 0) if ended[b, g] else -2.0
        assert rated.score_BG[b, g] == pytest.approx(expected, abs=1e-6)
    assert 0 < ended.mean() < 1  # or the test would be weak
    again = ratings.rate(config, sampled, problem_of(loaded, train), judged, folder)
    for one, other in zip(vars(rated).values(), vars(again).values(), strict=True):
        np.testing.assert_array_equal(one, other)
    centred = dataclasses.replace(config, centred=True)
    less = ratings.rate(centred, sampled, problem, judged, folder_at(tmp_path / "centred")).score_BG
    np.testing.assert_allclose(less, rated.score_BG - rated.score_BG.mean(axis=1, keepdims=True), atol=1e-6)


def rated_at(loaded, train, judged, folder) -> ratings.Rated:
    config = configs.RatingStage(prompts=4, missing_eos_penalty=None, centred=False)
    problem = problem_of(loaded, train, even_tokens)
    return ratings.rate(config, configs.PreferenceStage(samples=3), problem, judged, folder)


def branches_of(loaded, train, rated) -> Branches:
    return ratings.branches_at(loaded, train, rated.row_B, rated.token_BGC, rated.mask_BGC)


def test_soft_q_tilts_the_policy_towards_what_was_rated_high(loaded, train, judged, tmp_path):
    folder = folder_at(tmp_path / "run")
    rated = rated_at(loaded, train, judged, folder)
    stage = configs.SoftQStage(
        steps=40,
        prompts=4,
        temperature=TEMPERATURE,
        algorithm=SoftQ(beta=0.5, steps=(0,)),
        optimizer=Optimizer(learning_rate=5e-3, warmup_steps=0),
    )
    tuned, _ = offline.train_soft_q("soft_q", stage, problem_of(loaded, train), rated, folder)
    branches = branches_of(loaded, train, rated)
    logp, logp_ref = (
        np.sum(completion_logp_of(loaded.lm, params, branches, TEMPERATURE), axis=2, where=rated.mask_BGC)
        for params in (tuned, loaded.base)
    )
    log_ratio, score = logp - logp_ref, rated.score_BG
    centred = [x - x.mean(axis=1, keepdims=True) for x in (log_ratio, score)]
    assert np.corrcoef(*(x.reshape(-1) for x in centred))[0, 1] > 0.8
    first, last = (folder.metrics("soft_q")[i] for i in (0, -1))
    assert (
        abs(first["policy/log_ratio"]) < 1e-4 and abs(first["value/mean"]) < 1e-4
    )  # it begins as the reference
    np.testing.assert_allclose(first["loss/total"], mean_over_tokens(score**2, rated.mask_BGC), rtol=1e-4)
    assert last["loss/total"] < 0.2 * first["loss/total"]


class Guided(NamedTuple):
    """Values of random heads, and the same policy evaluated plain, guided at beta 0, and guided."""

    writer: text.Writer
    found: dict[str, evaluation.Policy]
    generations: list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def guided_policies(loaded, tmp_path_factory) -> Guided:
    stage = configs.ILQLStage(temperature=TEMPERATURE, kl_weight=0.4, curve=(0.1,))
    params = compiled(
        lambda key, base: init_text_values(key, loaded.lm, base), jax.random.key(3), loaded.base
    )
    writer = offline.guided_writer(stage, params)
    generations = []

    def recorded(text, params, examples, rows, key, **named):
        del key  # one for all: what differs is the policy
        out = preferences.sample_policy(text, params, examples, rows, jax.random.key(8), **named)
        generations.append(out)
        return out

    beta_0 = writer._replace(params=writer.params | {"beta": jnp.float32(0.0)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "sample_policy", recorded)
        found = evaluation.evaluate_policies(
            configs.EvaluationStage(prompts=5, batch=4, temperatures=(0.5,), best_of=()),
            loaded,
            loaded.base,
            {"zero": beta_0, "ilql": writer},
            evaluation.Scorer(lambda lm: even_tokens, jnp.float32(0.25)),
            gold_of,
            folder_at(tmp_path_factory.mktemp("guided") / "run"),
            temperature=TEMPERATURE,
            points=offline.curve("ilql", stage, writer),
        )
    return Guided(writer, {policy.name: policy for policy in found}, generations)


def test_guided_at_beta_0_is_the_reference(guided_policies):
    reference, zero, tilted, _ = guided_policies.generations
    for name in ("token_BGC", "mask_BGC", "finished_BG"):
        np.testing.assert_array_equal(zero[name], reference[name])
    assert not np.array_equal(tilted["token_BGC"], reference["token_BGC"])
    for how in (f"temperature {TEMPERATURE}", "temperature 0.5", "greedy"):
        one, other = (guided_policies.found[f"{label}, {how}"] for label in ("sft", "zero"))
        for field in ("gold", "reward", "length", "finished"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        assert one.texts == other.texts
        np.testing.assert_allclose(one.kl, other.kl, atol=1e-4)


def test_the_kl_of_a_guided_policy_is_that_of_its_distribution(guided_policies, loaded):
    """The weight is reward per nat at the temperature: logits / T + advantage / weight, from plain forwards."""
    prompts = loaded.load("validation").ids
    values = guided_policies.writer.params["guide"]
    for label, out, weight in (
        ("ilql", guided_policies.generations[2], 0.4),
        ("ilql-0.1", guided_policies.generations[3], 0.1),
    ):
        found = guided_policies.found[f"{label}, temperature {TEMPERATURE}"]
        for b in range(5):
            completion = out["token_BGC"][b, 0][out["mask_BGC"][b, 0]].tolist()
            row = np.zeros((1, 16), np.int32)
            row[0, : len(prompts[b]) + len(completion)] = [*prompts[b], *completion]
            at = slice(len(prompts[b]) - 1, len(prompts[b]) - 1 + len(completion))
            logits = np.asarray(plain_logits(loaded.lm, loaded.base, row))[0, at] / TEMPERATURE
            hidden = plain_hidden(loaded.lm, values["trunk"], row)
            tilt = np.asarray(advantage_of(values, hidden))[0, at]
            taken = np.arange(len(completion)), np.asarray(completion)
            kl = (log_softmax(logits + tilt / weight) - log_softmax(logits))[taken].sum()
            assert found.kl[b] == pytest.approx(float(kl), abs=1e-3), (label, b)
        assert np.abs(found.kl).max() > 0.05
    # A point of the curve is decoded at the rollouts' temperature only.
    assert [name for name in guided_policies.found if name.startswith("ilql-")] == [
        f"ilql-0.1, temperature {TEMPERATURE}"
    ]


def test_values_are_learnt_once_and_leave_the_policy_alone(loaded, train, judged, tmp_path):
    folder = folder_at(tmp_path / "run")
    rated = rated_at(loaded, train, judged, folder)
    stage = configs.ILQLStage(
        steps=30,
        prompts=4,
        algorithm=ILQL("returns", 1.0, policy_coefficient=None, cql_coefficient=None),
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=0),
    )
    problem = problem_of(loaded, train)
    writer = offline.train_values(stage, problem, rated, loaded.base, folder)
    jax.tree.map(np.testing.assert_array_equal, writer.params["base"], loaded.base)
    lines = folder.metrics("ilql")
    expected = mean_over_tokens(rated.score_BG, rated.mask_BGC)
    assert lines[0]["q/target"] == pytest.approx(expected, rel=1e-5) and abs(lines[0]["q/taken"]) < 1e-6
    assert lines[-1]["loss/q"] < 0.3 * lines[0]["loss/q"]
    cheaper = methods.with_kl_weight(stage, 0.05)
    assert isinstance(cheaper, configs.ILQLStage)
    other = offline.train_values(cheaper, problem, rated, loaded.base, folder)
    jax.tree.map(np.testing.assert_array_equal, writer.params["guide"], other.params["guide"])
    assert len(folder.metrics("ilql")) == stage.steps  # not trained again
    assert float(other.params["beta"]) == pytest.approx(0.7 / 0.05)
    assert offline.curve("ilql", cheaper, other) == {}


def test_weights_of_the_kl_are_read_and_written():
    for stage in (configs.SoftQStage(), configs.ILQLStage()):
        assert methods.kl_weight(methods.with_kl_weight(stage, 0.37)) == 0.37
    assert methods.with_kl_weight(configs.SoftQStage(), 0.37) == configs.SoftQStage(
        algorithm=dataclasses.replace(configs.SoftQStage().algorithm, beta=0.37)
    )
