"""The statistics of an audit, against SciPy, plain loops and cases with a known answer."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats
from test_docs_q_learning import blocks

from rlhfjax.ops import best_of_n_mean
from rlhfjax.rewards import audit
from rlhfjax.rewards.audit.resampling import estimate_of_items, estimate_of_sums

stats: Any = scipy_stats  # its results are told by name
RNG = np.random.default_rng(0)
GROUP = np.repeat(np.arange(6), 5)
COARSE = RNG.integers(0, 4, GROUP.size).astype(float)
FINE = COARSE + RNG.normal(size=GROUP.size)


# ---- ranks


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_rank_correlations_equal_scipys(levels):
    for count in (2, 3, 50, 257):
        x, y = RNG.integers(0, levels, (2, count)).astype(float)
        y = y + 0.5 * x
        if np.ptp(x) and np.ptp(y):
            assert audit.kendall_tau_b(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
            assert audit.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
            assert audit.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
        np.testing.assert_array_equal(audit.average_ranks(x), stats.rankdata(x))


def test_what_is_constant_has_no_correlation():
    for correlation in (audit.pearson, audit.spearman, audit.kendall_tau_b):
        assert np.isnan(correlation(np.ones(4), np.arange(4.0)))
        # The mean of these is none of them, and their deviations are rounding.
        assert np.isnan(correlation(np.full(3, 0.1), np.arange(3.0)))


def test_vectors_of_other_lengths_are_named():
    with pytest.raises(ValueError, match=r"reward \(3,\), gold \(2,\) and group \(3,\)"):
        audit.best_of_n_curve(np.zeros(3), np.zeros(2), np.zeros(3, int))
    with pytest.raises(ValueError, match=r"reward \(2,\), group \(2,\) and 1 texts"):
        audit.spread(np.zeros(2), np.zeros(2, int), ["a"])


def test_a_correlation_refuses_what_has_none():
    with pytest.raises(ValueError, match="finite numbers"):
        audit.spearman(np.asarray([1.0, np.nan]), np.arange(2.0))
    with pytest.raises(ValueError, match="equal length"):
        audit.kendall_tau_b(np.arange(3.0), np.arange(2.0))


# ---- agreement


def pairs_by_loop(group):
    return [(i, j) for i, j in itertools.combinations(range(len(group)), 2) if group[i] == group[j]]


def test_pairs_are_of_one_prompt():
    group = np.asarray([7, 2, 7, 2, 2, 9])
    first, second = audit.pairs_within(group)
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == pairs_by_loop(group)
    assert [len(x) for x in audit.pairs_within(np.arange(3))] == [0, 0]
    assert [len(x) for x in audit.pairs_within(np.zeros(0))] == [0, 0]


def test_pair_accuracy_equals_the_loop_and_ties_count_half():
    gold = np.where(np.arange(GROUP.size) % 11 == 3, np.nan, FINE)
    reward = np.where(np.arange(GROUP.size) % 13 == 5, np.nan, COARSE)
    right = []
    for i, j in pairs_by_loop(GROUP):
        if np.isfinite([gold[i], gold[j], reward[i], reward[j]]).all() and gold[i] != gold[j]:
            right.append(0.5 * (1 + np.sign(reward[i] - reward[j]) * np.sign(gold[i] - gold[j])))
    found = audit.pair_accuracy(reward, audit.gold_pairs(gold, GROUP), GROUP)
    assert found.value == pytest.approx(np.mean(right))
    assert found.low < found.value < found.high


def test_tau_within_prompts_is_kendalls_of_one_prompt_and_blind_to_what_prompts_have_in_common():
    one = GROUP == 2
    found = audit.within_prompt_tau(COARSE[one], FINE[one], GROUP[one])
    assert found.value == pytest.approx(stats.kendalltau(COARSE[one], FINE[one]).statistic)
    assert np.isnan(found.low)
    shifted = audit.within_prompt_tau(COARSE + 100 * GROUP, FINE - 100 * GROUP, GROUP)
    assert shifted.value == audit.within_prompt_tau(COARSE, FINE, GROUP).value
    assert np.isnan(audit.within_prompt_tau(GROUP.astype(float), FINE, GROUP).value)


def test_rank_correlation_leaves_out_what_is_unknown():
    x, y = COARSE.copy(), FINE.copy()
    x[3] = y[8] = np.nan
    known = np.isfinite(x) & np.isfinite(y)
    spearman, kendall = audit.spearman_estimate(x, y, GROUP), audit.kendall_estimate(x, y, GROUP)
    assert spearman.value == pytest.approx(stats.spearmanr(x[known], y[known]).statistic)
    assert kendall.value == pytest.approx(stats.kendalltau(x[known], y[known]).statistic)
    assert spearman.low < spearman.value < spearman.high and kendall.low < kendall.value < kendall.high
    assert np.isnan(audit.spearman_estimate(np.ones(GROUP.size), y, GROUP).value)


def test_the_interval_of_spearmans_is_near_that_of_ranks_drawn_anew():
    group = np.repeat(np.arange(40), 5)
    x = np.random.default_rng(3).normal(size=group.size)
    y = x + np.random.default_rng(4).normal(size=group.size)
    anew = estimate_of_items(group, lambda i: audit.spearman(x[i], y[i]), resamples=400)
    assert audit.spearman_estimate(x, y, group) == pytest.approx(anew, abs=0.02)


@pytest.mark.parametrize("unit", [1.0, 1e40])
def test_calibration_finds_the_temperature_that_the_labels_were_drawn_with(unit):
    count, temperature = 40_000, 0.7
    margin = RNG.normal(size=count)
    wins = RNG.random(count) < 1 / (1 + np.exp(-margin / temperature))
    reward = np.stack([np.where(wins, margin, 0), np.where(wins, 0, margin)], axis=1).reshape(-1) * unit
    pairs = audit.Pairs(np.arange(0, 2 * count, 2), np.arange(1, 2 * count, 2))
    found = audit.calibrate(reward, pairs)
    assert found.temperature == pytest.approx(temperature * unit, rel=0.03)
    assert found.probability_K.min() >= 0.5
    for low, high in ((0.5, 0.6), (0.6, 0.8), (0.8, 1.0)):
        inside = (found.probability_K > low) & (found.probability_K <= high)
        assert found.right_K[inside].mean() == pytest.approx(found.probability_K[inside].mean(), abs=0.02)


# ---- intervals


def test_an_interval_over_prompts_covers_as_often_as_it_says():
    """Texts of a prompt share their prompt's luck: 40 prompts of 5 equal texts are 40 items, not 200."""
    covered, wide = 0, []
    for trial in range(200):
        generator = np.random.default_rng(trial)
        value_U = generator.normal(size=40)
        sums = np.stack([5 * value_U, np.full(40, 5.0)], axis=1)
        found = estimate_of_sums(sums, lambda s: s[..., 0] / s[..., 1], seed=trial, resamples=500)
        covered += found.low <= 0 <= found.high
        wide.append(found.high - found.low)
    assert 0.88 <= covered / 200 <= 0.985
    assert np.mean(wide) == pytest.approx(2 * 1.96 / np.sqrt(40), rel=0.1)


def test_a_mean_leaves_out_nan_and_one_prompt_has_no_interval():
    assert audit.mean_estimate(np.asarray([1.0, np.nan, 3.0])).value == 2
    assert np.isnan(audit.mean_estimate(np.asarray([1.0])).low)
    assert np.isnan(audit.mean_estimate(np.asarray([np.nan])).value)


# ---- spread and noise


def test_spread_of_a_case_told_by_hand():
    reward = np.asarray([1, 1, 1, 0, 0, 2, 5, 5, np.nan])
    group = np.asarray([0, 0, 0, 1, 1, 1, 2, 2, 2])
    texts = ["a", "b", "c", "a", "b", "c", "same", "same", "x"]
    found = audit.spread(reward, group, texts)
    assert found.applies == pytest.approx(8 / 9)
    assert (found.levels, found.mode, found.groups) == (4, 3 / 8, 2)  # a prompt of equal texts is no group
    assert found.zero.value == 0.5
    assert found.ties.value == pytest.approx((3 + 1) / 6)
    within = ((0 - 2 / 3) ** 2 * 2 + (2 - 2 / 3) ** 2) / (2 + 2 + 1)
    assert found.within_std == pytest.approx(np.sqrt(within))
    assert found.within_share == pytest.approx(within / np.nanvar(reward))


def test_a_reward_that_applies_to_nothing():
    found = audit.spread(np.full(3, np.nan), np.zeros(3), ["a", "b", "c"])
    assert found.applies == 0 and found.levels == 0 and np.isnan(found.mean)
    assert [finding.sentence for finding in audit.judge(audit.Evidence(found))] == ["It applies to no text."]


def test_noise_is_told_by_asking_twice_and_by_equal_texts():
    signal = RNG.normal(size=4000)
    first, second = (signal + 0.5 * RNG.normal(size=4000) for _ in range(2))
    within = np.sqrt(1 + 0.25)
    again = audit.repeat_noise(first, second, within_std=within)
    assert again.std == pytest.approx(0.5, rel=0.05) and again.changed == 1
    assert again.reliability == pytest.approx(0.8, abs=0.03)
    texts = [str(i) for i in range(4000)] * 2
    twice = audit.duplicate_noise(np.r_[first, second], ["p"] * 8000, texts, within_std=within)
    assert twice.std == pytest.approx(again.std) and twice.texts == 8000
    none = audit.repeat_noise(signal, signal, within_std=1.0)
    assert (none.changed, none.std, none.reliability) == (0, 0, 1)
    assert audit.duplicate_noise(signal, ["p"] * 4000, texts[:4000], within_std=1.0).texts == 0


def test_averaging_as_many_calls_as_told_makes_it_reliable():
    assert audit.calls_for(0.95) == 1
    for reliability in (0.2, 0.5, 0.75):
        calls = audit.calls_for(reliability)
        of_mean = lambda k, r=reliability: k * r / (1 + (k - 1) * r)  # noqa: E731  (Spearman and Brown)
        assert of_mean(calls) >= 0.9 - 1e-9 > of_mean(calls - 1)
    with pytest.raises(ValueError, match="all noise"):
        audit.calls_for(0.0)


# ---- features and probes


def test_features_of_texts():
    found = audit.shallow_features(["a b"] * 4, ["A b c!", "x x x x", "", "one"])
    assert found["words"].tolist() == [3, 4, 0, 1]
    assert found["characters"].tolist() == [6, 7, 0, 3]
    assert found["distinct-2"].tolist() == [1, 1 / 3, 1, 1]
    assert found["punctuation"].tolist() == [1 / 6, 0, 0, 0]
    assert found["words from the prompt"].tolist() == [2 / 3, 0, 0, 0]


def test_the_words_of_a_reward_are_found_within_prompts():
    """A word that only goes with an easy prompt is none of them."""
    texts, group, reward = [], [], []
    for prompt in range(10):
        for sample in range(4):
            paid, easy = sample % 2, prompt % 2
            texts.append(f"word{prompt} {'gold' if paid else 'lead'} {'easy' if easy else 'hard'}")
            group.append(prompt)
            reward.append(paid + 10.0 * easy)
    assert audit.reward_words(np.asarray(reward), texts, np.asarray(group)) == ["gold"]
    alone = audit.reward_words(np.asarray(reward), texts, np.arange(len(texts)))
    assert alone[0] == "easy" and "gold" in alone


def test_probes_are_made_of_the_honest_texts():
    texts, group = ["a b c", "d", "e f", "g h i j"], np.asarray([0, 0, 1, 1])
    reward = np.asarray([2.0, 1.0, 5.0, np.nan])
    found = audit.probe_texts(["p q", "r"], texts, group, reward, ["k"])
    assert found["empty"] == ["", ""]
    assert found["each word doubled"] == ["a a b b c c", "e e f f"]
    assert found["four times over"][1] == "e f e f e f e f"
    assert [sorted(text.split()) for text in found["words shuffled"]] == [["a", "b", "c"], ["e", "f"]]
    assert found["longest of all texts"] == ["g h i j"] * 2 and found["prompt copied"] == ["p q", "r"]
    assert found["keywords alone"] == ["k k k k"] * 2
    assert found["one keyword over and over"][1].split() == ["k"] * 32
    assert found["worst text and keywords"] == ["d k k k k", "e f k k k k"]
    assert "keywords alone" not in audit.probe_texts(["p q", "r"], texts, group, reward, [])
    with pytest.raises(ValueError, match="prompt 1 has no text with a reward"):
        audit.probe_texts(["p", "q"], texts, group, np.asarray([1, 1, np.nan, np.nan]), [])


def test_probes_are_held_against_the_best_honest_text():
    group, reward, gold = np.asarray([0, 0, 1, 1]), np.asarray([1.0, 3, 2, 2]), np.asarray([0.0, 1, 1, 0])
    probes = {"hack": np.asarray([4.0, 2.0]), "none": np.asarray([np.nan, 1.0])}
    golds = {"hack": np.asarray([0.0, 0.0]), "none": np.asarray([0.0, 0.5])}
    found = audit.judge_probes(probes, reward, group, golds, gold)
    hack = found["hack"]
    assert (hack.above_best.value, hack.below_best.value, hack.above_mean.value) == (0.5, 0, 0.5)
    assert (hack.gold.value, hack.gold_honest.value, hack.gold_best.value) == (0, 0.5, 1)
    assert found["none"].above_best.value == 0 and found["none"].below_best.value == 1
    assert np.isnan(audit.judge_probes(probes, reward, group)["hack"].gold.value)


# ---- best of n


def test_the_curve_is_the_mean_over_all_subsets():
    curve = audit.best_of_n_curve(FINE, COARSE, GROUP)
    assert curve is not None and curve.n_S.tolist() == [1, 2, 4, 5]
    for i, n in enumerate((1, 2, 4, 5)):
        best = []
        for prompt in range(6):
            members = np.flatnonzero(prompt == GROUP)
            subsets = list(itertools.combinations(members, n))
            best.append(np.mean([COARSE[max(subset, key=lambda j: FINE[j])] for subset in subsets]))
        assert curve.gold_S[i].value == pytest.approx(np.mean(best), abs=1e-6)
        assert curve.oracle_S[i].value == pytest.approx(
            float(best_of_n_mean(COARSE.reshape(6, 5), n=n).mean()), abs=1e-6
        )
    assert curve.gain.value == pytest.approx(curve.gold_S[-1].value - curve.gold_S[0].value, abs=1e-9)


def test_the_curve_finds_where_gold_turns():
    """Gold rises with the reward but for its highest values, of which the best of many is one."""
    reward = np.random.default_rng(1).random((200, 32))
    gold = np.where(reward < 0.97, reward, -1.0)
    curve = audit.best_of_n_curve(reward.reshape(-1), gold.reshape(-1), np.repeat(np.arange(200), 32))
    assert curve is not None and curve.peak in (2, 4) and curve.fall.low > 0
    assert curve.reward_S[-1].value == pytest.approx(
        32 / 33, abs=0.01
    )  # E max of n uniform numbers is n / (n + 1)


def test_prompts_of_different_numbers_of_texts():
    group = np.asarray([0, 0, 0, 0, 1, 1, 2])
    curve = audit.best_of_n_curve(np.arange(7.0), np.arange(7.0), group)
    assert curve is not None and curve.n_S.tolist() == [1, 2, 4]
    assert curve.reward_S[-1].value == 3 and np.isnan(curve.reward_S[-1].low)  # one prompt has as many
    assert audit.best_of_n_curve(np.arange(3.0), None, np.arange(3)) is None
    assert audit.best_of_n_curve(np.full(4, np.nan), None, np.zeros(4)) is None


def test_a_large_number_keeps_its_small_differences():
    reward = 1e9 + np.arange(4.0) * 1e-3
    curve = audit.best_of_n_curve(reward, reward, np.zeros(4))
    assert curve is not None and curve.gain.value == pytest.approx(1.5e-3, rel=1e-3)


def test_one_prompt_tells_nothing_of_others():
    reward, group = np.arange(4.0), np.zeros(4)
    evidence = audit.Evidence(
        audit.spread(reward, group, list("abcd")),
        accuracy=audit.pair_accuracy(reward, audit.gold_pairs(reward, group), group),
    )
    (agreement,) = (finding for finding in audit.judge(evidence) if finding.topic == "agreement")
    assert agreement.grade == "careful" and "one prompt only" in agreement.sentence


def test_the_worst_grade_is_the_verdict():
    finding = audit.Finding
    assert audit.overall([]) == "ok"
    assert audit.overall([finding("careful", "", ""), finding("ok", "", "")]) == "careful"
    assert audit.overall([finding("do not use", "", ""), finding("careful", "", "")]) == "do not use"


def test_the_code_of_the_page():
    space: dict[str, Any] = {}
    (code,) = blocks("choosing_a_reward.md")
    exec(code, space)
    found = audit.pair_accuracy(
        space["reward"], audit.gold_pairs(space["gold"], space["group"]), space["group"]
    )
    assert found.value == pytest.approx(float(re.findall(r"# (0\.\d+):", code)[0]))
