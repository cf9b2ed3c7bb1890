"""Shaping by a potential keeps the best policy, exactly; without its conditions it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import ops
from rlhfjax.config import Enumerable
from rlhfjax.environments import autoreset, catch, mountain_car
from rlhfjax.environments.enumerable import optimal_objective, optimal_policy, sequences, table_logp
from rlhfjax.environments.grid import cliff_walking_table, frozen_lake_table, optimal_values, policy_values
from rlhfjax.rewards import shaped_environment, shaped_table

RANDOM = np.random.default_rng(0)
T = 4
MASK = np.array(np.meshgrid(*[[False, True]] * T)).reshape(T, -1).T
POTENTIAL, NEXT = RANDOM.normal(size=(2, *MASK.shape)).astype(np.float32)
TERMINATED = RANDOM.random(MASK.shape) < 0.3


# ---- the op


def test_shaping_of_whole_episodes_with_every_mask():
    got = jax.jit(lambda x, mask: ops.potential_shaping(x, discount=0.9, mask=mask))(
        np.where(MASK, POTENTIAL, np.nan), MASK
    )
    for b, mask in enumerate(MASK):
        kept = POTENTIAL[b][mask].astype(np.float64)
        expected = np.zeros(T)
        expected[mask] = [0.9 * after - now for now, after in zip(kept, [*kept[1:], 0.0], strict=False)]
        np.testing.assert_allclose(got[b], expected, atol=1e-6)
    assert got.dtype == jnp.float32


def test_shaping_of_parts_of_episodes():
    def shaping(now, after, terminated, mask):
        return ops.potential_shaping(
            now, next_potential=after, terminated=terminated, mask=mask, discount=0.9
        )

    expected = np.where(MASK, 0.9 * np.where(TERMINATED, 0, NEXT) - POTENTIAL, 0)
    np.testing.assert_allclose(shaping(POTENTIAL, NEXT, TERMINATED, MASK), expected, atol=1e-6)
    mapped = jax.vmap(jax.vmap(shaping))(POTENTIAL, NEXT, TERMINATED, MASK)
    np.testing.assert_allclose(mapped, expected, atol=1e-6)


def test_wrong_arrays_are_refused():
    with pytest.raises(TypeError, match="potential must be floating point"):
        ops.potential_shaping(np.ones(3, int), discount=1.0)
    with pytest.raises(ValueError, match="terminated needs next_potential"):
        ops.potential_shaping(np.ones(3, np.float32), terminated=np.ones(3, bool), discount=1.0)
    with pytest.raises(ValueError, match="next_potential must be of shape"):
        ops.potential_shaping(np.ones(3, np.float32), next_potential=np.ones(2, np.float32), discount=1.0)


# ---- worlds with numbered states, by value iteration

LAKE, CLIFF = frozen_lake_table(), cliff_walking_table()


def best_actions(q_SA: np.ndarray) -> np.ndarray:
    return q_SA >= q_SA.max(axis=1, keepdims=True) - 1e-9


def unmasked(table, potential_S, discount):
    """The shaping of a program that forgets that a terminal state has no potential."""
    added_SAK = discount * potential_S[table.next_SAK] - potential_S[:, None, None]
    return table._replace(reward_SAK=table.reward_SAK + added_SAK)


@pytest.mark.parametrize("table, discount", [(LAKE, 0.9), (CLIFF, 1.0)])
def test_a_potential_keeps_the_optimum_of_a_table(table, discount):
    value_S, q_SA = optimal_values(table, discount=discount)
    for scale in (0.1, 10.0):
        potential_S = scale * RANDOM.normal(size=len(value_S))
        shaped = shaped_table(table, potential_S, discount=discount)
        value_shaped_S, q_shaped_SA = optimal_values(shaped, discount=discount)
        np.testing.assert_allclose(value_shaped_S, value_S - potential_S, atol=1e-8)
        np.testing.assert_allclose(q_shaped_SA, q_SA - potential_S[:, None], atol=1e-8)
        np.testing.assert_array_equal(best_actions(q_shaped_SA), best_actions(q_SA))
        assert np.abs(shaped.reward_SAK - table.reward_SAK).max() > scale


def test_the_best_potential_leaves_nothing_to_look_ahead_for():
    """With Phi = V* every best action is worth 0 and every other less: one step of look-ahead finds them."""
    value_S, _ = optimal_values(LAKE, discount=0.9)
    shaped = shaped_table(LAKE, value_S, discount=0.9)
    value_shaped_S, _ = optimal_values(shaped, discount=0.9)
    np.testing.assert_allclose(value_shaped_S, 0, atol=1e-12)


@pytest.mark.parametrize("wrong", ["no discount", "a potential behind the end"])
def test_without_its_conditions_the_optimum_moves(wrong):
    """The policy that is best for the wrongly shaped reward is worse by the true one."""
    discount, potential_S = 0.9, np.zeros(16)
    value_S, q_SA = optimal_values(LAKE, discount=discount)
    if wrong == "no discount":
        potential_S[:15] = -1.0  # away from the goal each step saves (1 - discount)
        moved = shaped_table(LAKE, 20 * potential_S, discount=1.0)
    else:
        potential_S[[5, 7, 11, 12]] = 1.0  # the holes
        moved = unmasked(LAKE, potential_S, discount)
    _, q_moved_SA = optimal_values(moved, discount=discount)
    best_SA = best_actions(q_moved_SA)
    assert not np.array_equal(best_SA[:15], best_actions(q_SA)[:15])
    reached_S, _ = policy_values(LAKE, best_SA / best_SA.sum(axis=1, keepdims=True), discount=discount)
    assert reached_S[0] < 0.9 * value_S[0]


def test_a_potential_that_does_not_fit_is_refused():
    for potential_S in (np.zeros(15), np.full(16, np.nan)):
        with pytest.raises(ValueError, match="potential_S must be 16 finite numbers"):
            shaped_table(LAKE, potential_S, discount=0.9)
    with pytest.raises(ValueError, match="shape the world before autoreset"):
        shaped_environment(autoreset(catch()), minus_distance, discount=0.9)


# ---- control


def minus_distance(state, params):
    return -jnp.abs(state.ball_column - state.paddle).astype(jnp.float32) - 1.0


def energy(state, params):
    return jnp.sin(3 * state.state.x) + 50 * state.state.velocity


WORLDS = {"catch": (catch(), minus_distance), "mountain car": (mountain_car(limit=9), energy)}


@pytest.mark.parametrize("world", WORLDS)
def test_shaping_adds_to_an_episodes_return_what_its_ends_say(world):
    """-Phi(start), and the discounted potential of the last state where the episode was cut short."""
    env, potential = WORLDS[world]
    discount = 0.8
    worlds = (env, shaped_environment(env, potential, discount=discount))

    @jax.jit
    def episode(key):
        _, start = env.reset(key, env.params)

        def step(states, i):
            outs = [
                world.step(jax.random.fold_in(key, i), state, i % 3, env.params)
                for world, state in zip(worlds, states, strict=True)
            ]
            states = tuple(out[1] for out in outs)
            return states, (*(out[2] for out in outs), potential(states[1], env.params), *outs[1][3:5])

        return potential(start, env.params), jax.lax.scan(step, (start, start), jnp.arange(9))[1]

    first, (plain, shaped, after, terminated, truncated) = episode(jax.random.key(3))
    last = int(np.argmax(terminated | truncated))
    weight = discount ** np.arange(last + 1)
    added = float(np.sum(weight * (np.asarray(shaped) - np.asarray(plain))[: last + 1]))
    left = 0.0 if terminated[last] else discount ** (last + 1) * float(after[last])
    assert bool(terminated[last]) == (world == "catch") and last > 3
    assert added == pytest.approx(left - float(first), abs=1e-5) and abs(float(first)) > 0.1


# ---- tokens: all sequences of a model

CONFIG = Enumerable(vocab_size=3, length=4, stop_token=2)
SEQUENCES = sequences(CONFIG)
PREFIXES = 1 + 3 + 9 + 27
LOGP_REF_N = table_logp(RANDOM.normal(size=(PREFIXES, 3)), SEQUENCES)
REWARD_N = RANDOM.normal(size=len(LOGP_REF_N))
POTENTIAL_S = RANDOM.normal(size=PREFIXES).astype(np.float32)
POTENTIAL_NT = POTENTIAL_S[SEQUENCES.prefix]
BETA = 0.5


def total(shaping_NT) -> np.ndarray:
    return np.asarray(shaping_NT, np.float64).sum(axis=1)


def test_shaped_tokens_have_the_same_optimum():
    shaping_NT = ops.potential_shaping(POTENTIAL_NT, discount=1.0, mask=SEQUENCES.mask)
    assert float(jnp.abs(shaping_NT).max()) > 1.0
    shaped_N = REWARD_N + total(shaping_NT)
    np.testing.assert_allclose(
        optimal_policy(LOGP_REF_N, shaped_N, beta=BETA),
        optimal_policy(LOGP_REF_N, REWARD_N, beta=BETA),
        atol=1e-5,
    )
    moved = optimal_objective(LOGP_REF_N, shaped_N, beta=BETA) - optimal_objective(
        LOGP_REF_N, REWARD_N, beta=BETA
    )
    assert moved == pytest.approx(-float(POTENTIAL_S[0]), abs=1e-5)


@pytest.mark.parametrize("wrong", ["discount", "a potential behind the end"])
def test_tokens_shaped_wrongly_have_another_optimum(wrong):
    if wrong == "discount":  # other than the returns'
        shaping_NT = ops.potential_shaping(POTENTIAL_NT, discount=0.5, mask=SEQUENCES.mask)
    else:
        after_N = RANDOM.normal(size=len(REWARD_N)).astype(np.float32)
        next_NT = ops.value_at_next(POTENTIAL_NT, SEQUENCES.mask)
        last_N = SEQUENCES.mask.sum(axis=1) - 1
        next_NT = np.asarray(next_NT).copy()
        next_NT[np.arange(len(last_N)), last_N] = after_N
        shaping_NT = ops.potential_shaping(
            POTENTIAL_NT, next_potential=next_NT, discount=1.0, mask=SEQUENCES.mask
        )
    policies = (optimal_policy(LOGP_REF_N, r, beta=BETA) for r in (REWARD_N, REWARD_N + total(shaping_NT)))
    right_N, wrong_N = (np.exp(x) for x in policies)
    assert 0.5 * np.abs(right_N - wrong_N).sum() > 0.05
