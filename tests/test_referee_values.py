"""Q-learning in the referee: its exact answers against independent ones, short runs to them, and the printed table."""

import dataclasses
import itertools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import referee
from experiments.stages import enumerated, referees
from experiments.stages import enumerated_values as values
from rlhfjax.config import Enumerable, SoftQ
from rlhfjax.environments import enumerable

MODEL = Enumerable(vocab_size=3, length=2)
STOPPING = Enumerable(vocab_size=3, length=3, stop_token=0)
SMALL = dataclasses.replace(referee.Config(), model=MODEL, prompts=32, samples=8)
BETA = 0.5


@pytest.fixture(scope="module")
def world():
    return enumerated.tabular_world(MODEL, jax.random.key(1))


@pytest.fixture(scope="module")
def stopping():
    return enumerated.tabular_world(STOPPING, jax.random.key(2))


# ---- fixed points


def soft_maximum(q_V, logp_V, *, beta):
    return beta * np.log(np.sum(np.exp(logp_V + q_V / beta)))


@pytest.mark.parametrize("name", ["world", "stopping"])
def test_the_soft_maximum_gives_the_optimum_and_its_value(name, request):
    """The recursion with beta log sum ref exp(Q / beta) for a value is `optimal_policy` and `soft_value`."""
    world = request.getfixturevalue(name)
    state_value = partial(soft_maximum, beta=BETA)
    best = enumerable.optimal_policy(world.logp_ref_N, world.reward_N, beta=BETA)
    np.testing.assert_allclose(values.guided_optimum(world, state_value, beta=BETA), best, atol=1e-12)
    value = enumerable.soft_value(world.model, world.logp_ref_N, world.reward_N, world.every, beta=BETA)
    np.testing.assert_allclose(values.backward(world, state_value)[1], value, atol=1e-12)
    log_z = enumerable.optimal_objective(world.logp_ref_N, world.reward_N, beta=BETA)
    np.testing.assert_allclose(values.backward(world, state_value)[1][0], log_z, atol=1e-12)


def test_the_mean_gives_what_the_reference_earns_after_each_prefix(stopping):
    """Of all sequences that come by a prefix, written out; at the start the expected reward."""
    _, value_S = values.backward(stopping, values.mean_value)
    for prefix in np.unique(stopping.every.prefix[stopping.every.mask]):
        by_N = np.any((stopping.every.prefix == prefix) & stopping.every.mask, axis=1)
        p_N = np.exp(stopping.logp_ref_N) * by_N
        np.testing.assert_allclose(value_S[prefix], p_N @ stopping.reward_N / p_N.sum(), atol=1e-12)
    mean = enumerable.expected_reward(stopping.logp_ref_N, stopping.reward_N)
    np.testing.assert_allclose(value_S[0], mean, atol=1e-12)


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.7, 0.95])
def test_the_expectile_is_the_minimum_of_its_loss(expectile):
    rng = np.random.default_rng(0)
    q, logp = rng.normal(size=6), np.log(rng.dirichlet(np.ones(6)))
    found = values.expectile_value(q, logp, expectile=expectile)

    def loss(v):
        return np.exp(logp) @ (np.abs(expectile - (q < v)) * (q - v) ** 2)

    assert loss(found) < min(loss(found - 1e-4), loss(found + 1e-4))
    if expectile == 0.5:
        np.testing.assert_allclose(found, values.mean_value(q, logp), rtol=1e-12)


def test_the_expectile_of_one_certain_value_is_that_value():
    assert values.expectile_value(np.array([2.0]), np.zeros(1), expectile=0.9) == 2.0


def test_the_policy_of_other_values_is_not_the_optimum(world):
    """With one position less than two there would be no later value to be wrong: here there is."""
    best = enumerable.optimal_policy(world.logp_ref_N, world.reward_N, beta=BETA)
    for state_value in (values.mean_value, partial(values.expectile_value, expectile=0.7)):
        other = values.guided_optimum(world, state_value, beta=BETA)
        assert enumerable.total_variation(other, best) > 0.02
        np.testing.assert_allclose(np.exp(other).sum(), 1, rtol=1e-12)


def test_with_one_position_every_value_guides_to_the_optimum():
    world = enumerated.tabular_world(Enumerable(vocab_size=5, length=1), jax.random.key(0))
    best = enumerable.optimal_policy(world.logp_ref_N, world.reward_N, beta=BETA)
    found = values.guided_optimum(world, values.mean_value, beta=BETA)
    np.testing.assert_allclose(found, best, atol=1e-12)


# ---- data


def test_the_data_are_what_they_say(world):
    key, shape = jax.random.key(0), (4000, 4)
    policy_N = jnp.asarray(np.random.default_rng(0).normal(size=9), jnp.float32)
    even = np.bincount(np.ravel(values.uniform(key, policy_N, shape)), minlength=9) / 16_000
    drawn = np.bincount(np.ravel(values.of_reference(world)(key, policy_N, shape)), minlength=9) / 16_000
    np.testing.assert_allclose(even, 1 / 9, atol=0.01)
    np.testing.assert_allclose(drawn, np.exp(world.logp_ref_N), atol=0.015)


def test_the_reward_comes_with_the_last_token(stopping):
    index = jnp.arange(stopping.reward_N.size)[None]
    batch = values.soft_batch(stopping)(None, index)
    length_N = stopping.every.mask.sum(axis=1)
    for n, length in enumerate(length_N):
        wanted = np.where(np.arange(3) == length - 1, stopping.reward_N[n], 0)
        np.testing.assert_allclose(batch.reward[0, n], wanted, rtol=1e-6)
    logp_N = np.where(batch.mask, batch.logp_ref, 0).sum(axis=-1)[0]
    np.testing.assert_allclose(logp_N, stopping.logp_ref_N, atol=1e-5)


def test_the_soft_value_is_the_shift_of_the_logits(world):
    """0 of the reference, c where all its logits are c higher: V is in units of beta, of the reference's own."""
    logits_SV = jnp.asarray(world.logits_ref_SV, jnp.float32)
    np.testing.assert_allclose(values.log_partition(world, logits_SV), 0, atol=1e-6)
    np.testing.assert_allclose(values.log_partition(world, logits_SV + 2.0), 2, atol=1e-5)


# ---- runs


def ended(world, name, steps=400, learning_rate=0.1):
    """Log-probabilities [N] and V(start) of a short run of a method of the table."""
    _, settings, draw, own = referees._of_values(world)[name]
    train = referees._train_soft if isinstance(settings, SoftQ) else referees._train_values
    run = partial(train, world, settings, draw, learning_rate=learning_rate, steps=steps, config=SMALL)
    logits_SV, value = jax.jit(run)(jax.random.key(3), jnp.float32(BETA))
    return enumerable.table_logp(np.asarray(logits_SV, np.float64), world.every), float(value), own


@pytest.mark.parametrize(
    "name", ["soft_q", "soft_q_whole", "soft_q_mixed", "soft_q_both", "soft_q_on_policy"]
)
def test_soft_q_learning_reaches_the_optimum_and_its_value(name, world):
    logp_N, value, own = ended(world, name)
    best = enumerable.optimal_policy(world.logp_ref_N, world.reward_N, beta=BETA)
    assert own is None and enumerable.total_variation(world.logp_ref_N, best) > 0.3
    assert enumerable.total_variation(logp_N, best) <= 1e-3
    log_z = enumerable.optimal_objective(world.logp_ref_N, world.reward_N, beta=BETA)
    assert abs(value - log_z) <= 1e-3


def test_soft_q_learning_with_a_stop_token(stopping):
    logp_N, value, _ = ended(stopping, "soft_q")
    best = enumerable.optimal_policy(stopping.logp_ref_N, stopping.reward_N, beta=BETA)
    assert enumerable.total_variation(logp_N, best) <= 1e-3
    log_z = enumerable.optimal_objective(stopping.logp_ref_N, stopping.reward_N, beta=BETA)
    assert abs(value - log_z) <= 1e-3


@pytest.mark.parametrize(
    ("name", "state_value"),
    [("ilql", partial(values.expectile_value, expectile=0.7)), ("monte_carlo", values.mean_value)],
)
def test_other_values_end_at_their_own_fixed_point(name, state_value, world):
    logp_N, value, own = ended(world, name)
    best = enumerable.optimal_policy(world.logp_ref_N, world.reward_N, beta=BETA)
    assert own is not None and enumerable.total_variation(logp_N, own(world, BETA)) < 0.015
    assert enumerable.total_variation(logp_N, best) > 0.02
    assert abs(value - values.backward(world, state_value)[1][0]) < 0.03


def test_greedy_deep_q_learning_says_the_best_sequence(world):
    logp_N, value, own = ended(world, "dqn")
    assert own is not None
    np.testing.assert_array_equal(logp_N, own(world, BETA))
    assert np.argmax(logp_N) == np.argmax(world.reward_N)
    assert abs(value - world.reward_N.max()) < 1e-3


def test_a_transformer_learns_by_soft_q_from_uniform_data_what_ppo_learns():
    """Its critic is no part of it: V is read off the logits. A short run, which goes most of the way."""
    config = dataclasses.replace(
        referee.Config().transformer, vocab_size=3, width=32, heads=2, kv_heads=2, mlp_width=64
    )
    world = enumerated.transformer_world(MODEL, config, jax.random.key(0))
    logp_N, value, _ = ended(world, "soft_q_both", steps=300, learning_rate=3e-3)
    best = enumerable.optimal_policy(world.logp_ref_N, world.reward_N, beta=BETA)
    assert enumerable.total_variation(world.logp_ref_N, best) > 0.2
    assert enumerable.total_variation(logp_N, best) < 0.01
    assert abs(value - enumerable.optimal_objective(world.logp_ref_N, world.reward_N, beta=BETA)) < 0.01


# ---- the printed table


def test_the_table_shows_ppo_and_soft_q_learning_side_by_side():
    config = dataclasses.replace(SMALL, steps=300, transformer_steps=1, pairs=64, pair_steps=1, betas=(BETA,))
    trials = referees.trials(
        dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, vocab_size=3)),
        jax.random.key(0),
        None,
    )
    rows = []
    for name in ("tabular_ppo", "tabular_soft_q"):
        found, metrics, _ = trials[name].compute()
        assert metrics["value_error"] == found["value_error"].max()
        rows += referees.method_rows(trials[name], found)
    for _, method, beta, variation, own, gap, error, _ in rows:
        assert beta == BETA and own is None and float(gap) < 1e-3, method
        assert float(variation) < 0.02 and float(error) < 0.02, method
    assert float(rows[1][3]) <= 1e-3 and float(rows[1][6]) <= 1e-3


def test_the_guide_shows_every_trial():
    lines = (Path(__file__).parents[1] / "docs" / "referee.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| policy | method |"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    shown = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    trials = referees.trials(referee.Config(), jax.random.key(0), None).values()
    wanted = [(trial.policy, trial.method, f"{beta:g}") for trial in trials for beta in trial.betas]
    assert [tuple(row[:3]) for row in shown] == wanted
    for policy, method, beta, variation, own, _, error in shown:
        name = f"{policy} {method} {beta}"
        assert (own == "") or float(own) <= 0.03, name
        if method.startswith(("soft Q", "path consistency")):
            assert float(variation) <= 1e-3 and float(error) <= 1e-3, name
