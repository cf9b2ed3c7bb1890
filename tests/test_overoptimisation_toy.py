"""The exact toy: its scores, its curves against brute force, trained runs at the optimum, and the run whole."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from running import start
from tiny_text import write_world

from experiments import overoptimisation as experiment
from experiments import run as runner
from experiments.stages import overopt_report, overopt_text, overopt_toy
from experiments.stages.configs import PPOStage
from experiments.stages.overopt_configs import Curves, Toy
from rlhfjax import run_folder
from rlhfjax.config import Enumerable
from rlhfjax.environments import enumerable
from rlhfjax.guards import parse_guard

PAGE = (Path(runner.__file__).parents[1] / "docs" / "overoptimisation.md").read_text()

SMALL = Toy(
    model=Enumerable(vocab_size=4, length=2),
    best_of=(1, 2, 3, 8, 64),
    betas=(4.0, 1.0, 0.5, 0.25),
    trained=("rloo",),
    trained_betas=(1.0,),
    steps=300,
    prompts=32,
    samples=8,
    learning_rate=0.1,
)


@pytest.fixture(scope="module")
def small():
    return overopt_toy.make_world(SMALL, 0)


def test_scores_are_standardised_and_wrong_as_told(small):
    world, scores = small
    p_N = np.exp(world.logp_ref_N)
    assert p_N.sum() == pytest.approx(1.0)
    assert set(scores.proxies) == set(overopt_toy.KINDS)
    for score_N in (scores.gold, *scores.proxies.values()):
        assert p_N @ score_N == pytest.approx(0.0, abs=1e-12)
        assert p_N @ score_N**2 == pytest.approx(1.0)
    np.testing.assert_array_equal(world.reward_N, scores.gold)
    again = overopt_toy.make_world(SMALL, 0)[1]
    np.testing.assert_array_equal(again.gold, scores.gold)
    other = overopt_toy.make_world(SMALL, 1)[1]
    assert not np.allclose(other.gold, scores.gold)


def test_what_a_proxy_does_not_know_is_what_it_rewards():
    """By regression of proxy - gold: on words for length, and on nothing that can be seen for noise."""
    config = dataclasses.replace(SMALL, model=Enumerable(vocab_size=4, length=5))
    world, scores = overopt_toy.make_world(config, 0)
    p_N = np.exp(world.logp_ref_N)
    words_N = overopt_toy.standardise(world.logp_ref_N, np.sum(world.every.token >= 2, axis=1) * 1.0)
    slopes = {
        kind: p_N @ (words_N * (proxy_N - (p_N @ (proxy_N * scores.gold)) * scores.gold))
        for kind, proxy_N in scores.proxies.items()
    }
    assert slopes["length"] > 0.5
    assert abs(slopes["noise"]) < 0.1 and abs(slopes["outliers"]) < 0.1


def by_draws(logp_N, score_N, n):
    """Distribution of the first best of n draws, over all N^n of them."""
    p_N, q_N = np.exp(logp_N), np.zeros(len(logp_N))
    for draws in itertools.product(range(len(logp_N)), repeat=n):
        q_N[max(draws, key=lambda y: score_N[y])] += np.prod(p_N[list(draws)])
    return q_N


def test_best_of_n_is_that_of_all_draws(small):
    world, scores = small
    proxy_N = scores.proxies["spurious"]
    found = overopt_toy.best_of_n_points(world, scores.gold, proxy_N, (1, 2, 3))
    for place, n in enumerate((1, 2, 3)):
        q_N = by_draws(world.logp_ref_N, proxy_N, n)
        kl = np.sum(q_N * (np.log(q_N) - world.logp_ref_N))
        got = [x[place] for x in found]
        np.testing.assert_allclose(got, [kl, q_N @ proxy_N, q_N @ scores.gold], atol=2e-5)


def test_the_optimum_is_better_than_its_neighbours(small):
    world, scores = small
    proxy_N = scores.proxies["outliers"]
    generator = np.random.default_rng(0)
    found = overopt_toy.optimum_points(world, scores.gold, proxy_N, SMALL.betas)
    for place, beta in enumerate(SMALL.betas):
        best_N = world.logp_ref_N + proxy_N / beta
        p_N = np.exp(best_N - np.logaddexp.reduce(best_N))
        kl = np.sum(p_N * (np.log(p_N) - world.logp_ref_N))
        assert found.kl[place] == pytest.approx(kl)
        assert found.proxy[place] == pytest.approx(p_N @ proxy_N)
        assert found.gold[place] == pytest.approx(p_N @ scores.gold)
        for _ in range(20):
            other_N = p_N * np.exp(0.1 * generator.normal(size=p_N.shape))
            other_N /= other_N.sum()
            value = other_N @ proxy_N - beta * np.sum(other_N * (np.log(other_N) - world.logp_ref_N))
            assert value < found.proxy[place] - beta * found.kl[place]


def test_a_trained_run_ends_on_the_curve():
    arrays, metrics, _ = overopt_toy.trained(SMALL, 0, "rloo", None)
    assert metrics["total_variation"] < 0.06
    for field in ("kl", "proxy", "gold"):
        np.testing.assert_allclose(arrays[f"trained/{field}"], arrays[f"exact/{field}"], atol=0.08)
    assert len(arrays["total_variation"]) == 4 and np.all(arrays["exact/kl"] > 0.05)


@pytest.mark.slow
def test_ppo_ends_on_the_curve():
    arrays, metrics, _ = overopt_toy.trained(dataclasses.replace(SMALL, prompts=64), 0, "ppo", None)
    assert metrics["total_variation"] < 0.06
    np.testing.assert_allclose(arrays["trained/gold"], arrays["exact/gold"], atol=0.08)


@pytest.fixture(scope="module")
def preset():
    """The exact curves of the preset, seed 0."""
    return overopt_toy.exact(Toy(), 0)[0]


def test_curves_on_which_gold_turns_or_does_not(preset):
    """Of the preset: luck alone slows gold down, a habit that costs turns it."""
    exact, numbers = preset, overopt_report.toy_numbers(Toy(), preset)
    for optimiser in ("bon", "rl"):
        assert np.isnan(numbers[f"noise/{optimiser}/turning_kl"])
        assert 0.05 < numbers[f"spurious/{optimiser}/turning_kl"] < 2
        assert numbers[f"spurious/{optimiser}/last_gold"] < 0 < numbers[f"spurious/{optimiser}/highest_gold"]
        assert np.all(np.diff(exact[f"spurious/{optimiser}/proxy"]) > 0)
        assert numbers[f"spurious/{optimiser}/r_squared"] > 0.9
    # At the same KL nothing has more of the proxy than the optimum.
    at = np.interp(exact["noise/bon/kl"][1:8], exact["noise/rl/kl"], exact["noise/rl/proxy"])
    assert np.all(at > exact["noise/bon/proxy"][1:8] - 0.02)


def test_the_page_has_the_fits_of_the_preset(preset):
    fits = overopt_report.toy_fits(Toy(), preset)
    lines = [line for line in PAGE.splitlines() if re.match(r"\| (noise|outliers|spurious|length), ", line)]
    assert len(lines) == len(fits) == 8
    for line, (name, found) in zip(lines, fits.items(), strict=True):
        row = overopt_report.fit_row(name, found)
        shown = [*row[1:6], row[7].removeprefix("none: it "), row[9]]
        for cell, value in zip([x.strip() for x in line.strip("| ").split("|")][1:], shown, strict=True):
            try:
                assert float(cell) == pytest.approx(float(value), rel=0.02, abs=2e-3), line
            except ValueError:
                assert cell == value, line


def test_the_code_of_the_page_runs():
    fit, guard = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    found: dict = {}
    exec(fit, found)
    assert 0.5 < found["fit"].peak ** 2 < 5 and found["fit"].r_squared > 0.9
    exec(guard, found)
    assert found["grammatical"](["p"] * 2, ["A b.", "a"]) == [1.0, 0.0]
    for line in re.findall(r'"([a-z_/.:]+[<>][^"]+)"', PAGE):
        parse_guard(line)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kinds": ("nosie",)}, r"toy.kinds=\['nosie'\] must be different ones of noise, outliers"),
        ({"kinds": ("noise", "noise")}, "must be different ones"),
        ({"kinds": ()}, "toy.kinds is empty"),
        ({"trained": ("dpo",)}, "toy.trained"),
        ({"best_of": (1, 2, 4)}, "toy.best_of=.* at least four for a fit"),
        ({"betas": (1.0, 0.5, 0.2, 0.0)}, "toy.betas=.* above 0"),
        ({"trained_betas": ()}, "toy.trained_betas"),
    ],
)
def test_settings_without_a_curve_are_refused(changes, why):
    with pytest.raises(ValueError, match=why):
        overopt_toy.check(dataclasses.replace(Toy(), **changes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"best_of": (2, 4)}, "must rise from 1 to at most curves.samples=64"),
        ({"best_of": (1, 4, 128)}, "must rise from 1 to at most"),
        ({"best_of": (1, 4, 2)}, "must rise from 1"),
        ({"betas": ()}, "curves.betas"),
        ({"betas": (0.1, 0.1)}, "must be different numbers"),
        ({"betas": (-0.1,)}, "of at least 0"),
        ({"ensemble": 0}, "curves.ensemble=0"),
        ({"penalty": 0.5}, "a penalty is for reward models that disagree"),
        ({"prompts": 1}, "curves.prompts=1"),
    ],
)
def test_curves_that_cannot_be_measured_are_refused(changes, why):
    with pytest.raises(ValueError, match=why):
        overopt_text.check(dataclasses.replace(Curves(), **changes), PPOStage())


def tiny_settings() -> dict:
    return {
        "toy": {
            "model": {"vocab_size": 4, "length": 2},
            "kinds": ["noise", "length"],
            "trained": ["rloo"],
            "trained_betas": [1.0],
            "prompts": 2,
            "samples": 2,
        }
    }


def test_the_toy_whole_and_resumed(tmp_path):
    folder = tmp_path / "run"
    assert start("overoptimisation", tiny_settings(), folder, "--max-steps", "2") == 0
    report = (folder / "report.md").read_text()
    assert "length, best of n" in report and "| noise | rloo | 1 |" in report
    assert (folder / "figures" / "toy.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 <= summary["rloo/total_variation"] <= 1
    (folder / "arrays" / "rloo.npz").unlink()
    before = [(folder / name).read_bytes() for name in ("metrics.jsonl", "summary.json", "report.md")]
    assert runner.main(["overoptimisation", "--resume", str(folder)]) == 0
    assert [(folder / name).read_bytes() for name in ("metrics.jsonl", "summary.json", "report.md")] == before


@pytest.mark.slow
def test_text_whole(tmp_path):
    world = write_world(tmp_path)
    settings = {name: world[name] for name in ("text", "sft", "preferences", "reward", "ppo")} | {
        "on": "text",
        "seeds": 2,
        "curves": {
            "prompts": 5,
            "samples": 7,
            "best_of": [1, 2, 7],
            "betas": [0.0, 0.1],
            "ensemble": 2,
            "penalty": 0.5,
        },
    }
    folder = tmp_path / "run"
    assert start("overoptimisation", settings, folder) == 0
    assert (
        "RL, by beta" in (folder / "report.md").read_text()
        or "best of n" in (folder / "report.md").read_text()
    )
    arrays = np.load(folder / "seed-0" / "arrays" / "best_of_n.npz")
    assert arrays["bon/gold"].shape == (3, 5)
    rewards = arrays["bon/reward"]
    assert np.all(np.diff(rewards, axis=0) >= -1e-6)  # more samples, a better best
    assert (folder / "seed-1" / "member-1" / "checkpoints" / "reward_model").is_dir()
    summary = json.loads((folder / "summary.json").read_text())
    found = [np.load(folder / f"seed-{seed}" / "arrays" / "best_of_n.npz")["bon/gold"] for seed in (0, 1)]
    assert summary["best of 7/gold"] == pytest.approx(np.mean(found, axis=(0, 2))[2])
    first = (folder / "summary.json").read_bytes()
    assert runner.main(["overoptimisation", "--resume", str(folder)]) == 0
    assert (folder / "summary.json").read_bytes() == first


def test_rewards_in_groups_are_those_of_each(monkeypatch):
    """Seven completions of three prompts, in groups of five: each with its own prompt and in its own place."""

    def rewards_of(problem, rows, token, mask):
        assert token.shape[1:] == mask.shape[1:] == (5, 2)
        return rows[:, None] * 100.0 + token[..., 0]

    monkeypatch.setattr(overopt_text.ratings, "rewards_of", rewards_of)
    token = np.arange(42).reshape(3, 7, 2)
    rows = np.array([4, 1, 9])
    found = overopt_text.rewards_in_groups(None, rows, {"token_BGC": token, "mask_BGC": token >= 0})  # pyright: ignore
    np.testing.assert_array_equal(found, rows[:, None] * 100.0 + token[..., 0])


def test_a_run_in_tenths(tmp_path):
    folder = run_folder.create(tmp_path / "a", "experiment: fake\n", experiment="fake", seed=0, exact=True)
    folder.log_metrics("preferences", 0, {"gold/mean": 0.25})
    for i in range(20):
        folder.log_metrics("ppo-0", i + 1, {"objective/kl": i, "gold": 2.0 * i, "objective/score": -i})
    found = overopt_text.along_the_run(folder, "ppo-0")
    np.testing.assert_allclose(found["along/kl"], np.arange(10) * 2 + 0.5)
    np.testing.assert_allclose(found["along/gold"], np.arange(10) * 4 + 1.0)
    assert found["along/start"] == 0.25


def test_fits_of_text_are_of_gains_over_the_start():
    """Prompts whose gold is a common curve and an offset of their own: the offset must not matter."""
    generator = np.random.default_rng(0)
    offset_B = generator.normal(size=40)
    n, betas = np.array([1, 2, 4, 8, 16, 32]), np.array([0.0, 0.1, 0.2, 0.4])
    kl = np.log(n) - (n - 1) / n
    d, d_rl = np.sqrt(kl), np.array([3.0, 2.0, 1.0, 0.5])
    found = {
        "bon/n": n,
        "bon/kl": kl,
        "bon/gold": (d * (0.5 - 0.2 * d))[:, None] + offset_B,
        "rl/beta": betas,
        "rl/kl": np.tile((d_rl**2)[:, None], 40),
        "rl/gold": (d_rl * (0.4 - 0.3 * np.log(d_rl)))[:, None] + offset_B,
        "start/gold": offset_B,
        "along/kl": d_rl**2,
        "along/gold": 0.1 * d_rl + 7.0,
        "along/start": np.asarray(7.0),
    }
    fits = overopt_report.text_fits(found)
    for name, a, b in (("best of n", 0.5, 0.2), ("RL, by beta", 0.4, 0.3), ("RL, along the run", 0.1, 0.0)):
        assert fits[name].fit.a == pytest.approx(a) and fits[name].fit.b == pytest.approx(b, abs=1e-9), name
    row = overopt_report.fit_row("RL", fits["RL, by beta"])
    peak = f"{np.exp(2 * (0.4 / 0.3 - 1)):.2f}"  # nats; of every resampling alike
    assert row[6] == f"{peak} [{peak}, {peak}]" and row[7] == "1.00"


@pytest.mark.slow
def test_the_plan_is_of_the_trained_runs():
    config = experiment.Config(toy=SMALL)
    from rlhfjax.mesh import make_mesh

    (program,) = experiment.plan(config, make_mesh())
    assert program.stage == "rloo" and program.arguments[0].shape == (4, 16)
    assert jax.tree.leaves(program.lower().out_info)[0].shape[0] == 4


def test_the_reference_is_that_of_the_policy(small):
    world, _ = small
    np.testing.assert_allclose(
        enumerable.table_logp(np.asarray(world.params["logits"], np.float64), world.every), world.logp_ref_N
    )
