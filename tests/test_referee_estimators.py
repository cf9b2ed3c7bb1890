"""The mean gradient of every advantage and KL estimator, by enumeration of all groups, against the exact gradient.

The tables of docs/referee.md are these; a test compares them cell by cell.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest

from experiments.stages import estimators

EXACT = 2e-5  # rounding of float32 sums over at most 512 groups


@pytest.fixture(scope="module")
def world():
    return estimators.small()


@pytest.fixture(scope="module")
def advantages(world):
    return estimators.advantage_gradients(world)


@pytest.fixture(scope="module")
def penalties(world):
    return estimators.kl_gradients(world)


WANTED = {name: scale for name, (_, _, scale) in (estimators.ADVANTAGES | estimators.CRITICS).items()}


@pytest.mark.parametrize(("name", "scale"), WANTED.items(), ids=WANTED.keys())
def test_advantage(name, scale, advantages):
    found = advantages[name]
    if scale is None:
        assert found.residue > 0.02, f"{name} is said to be biased"
    else:
        np.testing.assert_allclose(found.mean, scale * found.true, atol=EXACT)


def test_the_true_gradient_is_the_sum_over_sequences_in_float64(world):
    """Score-function form, written out: sum_y p(y) r(y) sum_t (onehot - pi)."""
    logits = np.asarray(world.params["logits"], np.float64)
    pi_SV = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = np.zeros_like(logits)
    for token, prefix, reward in zip(world.every.token, world.every.prefix, world.reward_N, strict=True):
        p = np.prod(pi_SV[prefix, token])
        for s, a in zip(prefix, token, strict=True):
            wanted[s] += p * float(reward) * (np.eye(2)[a] - pi_SV[s])
    found = estimators.true_gradient(world, beta=0.0)["logits"]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("place", ["score", "reward"])
def test_k1_off_the_reward_is_the_gradient_of_the_divergence(place, penalties):
    found = penalties[place, "k1"]
    np.testing.assert_allclose(found.mean, found.true, atol=EXACT)


def test_k1_in_the_loss_is_nothing(penalties):
    np.testing.assert_allclose(penalties["loss", "k1"].mean, 0, atol=EXACT)


@pytest.mark.parametrize(("estimator", "forward"), [("k2", False), ("exact", False), ("k3", True)])
def test_in_the_loss_each_decision_is_held_on_its_own(estimator, forward, world, penalties):
    found = penalties["loss", estimator]
    np.testing.assert_allclose(found.mean, estimators.state_kl_gradient(world, forward=forward), atol=EXACT)
    assert np.linalg.norm(found.mean - found.true) > 0.05 * np.linalg.norm(found.true)


@pytest.mark.parametrize("estimator", ["k1", "k3", "exact"])
def test_loss_and_reward_are_the_two_parts_of_the_gradient_of_an_unbiased_estimator(estimator, penalties):
    both = penalties["loss", estimator].mean + penalties["reward", estimator].mean
    np.testing.assert_allclose(both, penalties["loss", estimator].true, atol=EXACT)


@pytest.mark.parametrize("estimator", ["k2", "k3", "exact"])
def test_other_estimators_off_the_reward_are_something_else(estimator, penalties):
    for place in ("score", "reward"):
        assert penalties[place, estimator].residue > 0.05
    np.testing.assert_allclose(
        penalties["score", estimator].mean, penalties["reward", estimator].mean, atol=EXACT
    )


def _documented(header: str) -> list[list[str]]:
    """The rows of the table of docs/referee.md that has this first column."""
    lines = (Path(__file__).parents[1] / "docs" / "referee.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_table_of_advantages_in_the_guide_is_this_one(advantages):
    rows = _documented("advantage")
    assert [name for name, *_ in rows] == list(advantages)
    for name, scale, residue, _ in rows:
        assert (scale, residue) == (f"{advantages[name].scale:.3f}", f"{advantages[name].residue:.3f}"), name


def test_the_table_of_penalties_in_the_guide_is_this_one(penalties):
    rows = _documented("place")
    assert {(place, estimator) for place, estimator, *_ in rows} == set(penalties)
    for place, estimator, scale, residue, _ in rows:
        found = penalties[place, estimator]
        assert (scale, residue) == (f"{abs(found.scale):.3f}", f"{found.residue:.3f}"), (place, estimator)
