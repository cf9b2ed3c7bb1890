"""Guards: how they are written, when they act, by a plain loop over whole histories; the coefficient they raise."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax import guards
from rlhfjax.algorithms import grpo
from rlhfjax.config import GRPO


def test_a_guard_is_read():
    assert guards.parse_guard("gold<0.12:stop") == guards.Guard(
        "gold<0.12:stop", "gold", False, 0.0, 0.12, "stop"
    )
    read = guards.parse_guard(" experiments/rewards.py:polite > start + 2e-1 : warn ")
    assert read[1:] == ("experiments/rewards.py:polite", True, 1.0, 0.2, "warn")
    assert guards.parse_guard("gold<start-3:raise")[2:5] == (False, 1.0, -3.0)
    assert guards.parse_guard("objective/kl>start*1.5:raise")[2:5] == (True, 1.5, 0.0)
    assert guards.parse_guard("objective/score<-1.5:warn").offset == -1.5


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("gold", "must read NAME<BOUND:ACTION"),
        ("gold<0.1", "must read NAME<BOUND:ACTION"),
        ("<0.1:stop", "must read NAME<BOUND:ACTION"),
        ("0<gold<1:stop", "must read NAME<BOUND:ACTION"),
        ("gold<much:stop", "the bound 'much' must be a number, or start-NUMBER"),
        ("gold<:stop", "the bound '' must be a number"),
        ("gold<nan:stop", "the bound 'nan' must be a number"),
        ("gold<1e999:stop", "the bound '1e999' must be a number"),
        ("gold<1.2.3:stop", "the bound '1.2.3' must be a number"),
        ("gold<start:stop", "the bound 'start' must be a number"),
        ("gold<0.1:halt", "the action 'halt' must be warn, raise or stop"),
    ],
)
def test_what_is_no_guard_is_refused(text, why):
    with pytest.raises(ValueError) as error:
        guards.parse_guard(text)
    assert why in str(error.value) and repr(text) in str(error.value)


def by_loop(guard, values, window, patience):
    """(mean, broken in a row, acts) of every step, each from the whole history before it."""
    found, real = [], []
    for value in values:
        if value is None or not math.isfinite(value):
            found.append(None)
            continue
        real.append(value)
        means = [np.mean(real[max(0, n - window) : n]) for n in range(1, len(real) + 1)]
        row = 0
        for n in range(len(real), 0, -1):
            known = len(real[:n]) >= window
            start = np.mean(real[:window]) if known else math.nan
            bound = guard.offset if guard.factor == 0 else guard.factor * start + guard.offset
            out = means[n - 1] > bound if guard.above else means[n - 1] < bound
            if not out:
                break
            row += 1
        found.append((means[-1], row, row > 0 and row % patience == 0))
    return found


@pytest.mark.parametrize("text", ["x<0:warn", "x>0.3:stop", "x<start-0.2:raise", "x>start*0.5:warn"])
@pytest.mark.parametrize(("window", "patience"), [(1, 1), (3, 2), (4, 3)])
def test_a_guard_acts_as_the_loop_says(text, window, patience):
    generator = np.random.default_rng(window)
    values = [*(0.3 + np.cumsum(generator.normal(size=60)) / 4).tolist()]
    values[7], values[20], values[21] = None, math.nan, math.inf
    guard, memory, acted = guards.parse_guard(text), guards.Memory(), 0
    for step, (value, expected) in enumerate(
        zip(values, by_loop(guard, values, window, patience), strict=True), start=1
    ):
        before = memory
        memory, verdict = guards.observe(guard, memory, step, value, window=window, patience=patience)
        if expected is None:
            assert memory == before and not verdict.acts
            continue
        assert verdict.mean == pytest.approx(expected[0])
        assert (verdict.broken, verdict.acts) == expected[1:], step
        assert memory.held == (step if verdict.broken == 0 else before.held)
        acted += verdict.acts
    assert acted > 0


def test_no_window_and_no_patience_are_refused():
    guard = guards.parse_guard("x<0:warn")
    for window, patience in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            guards.observe(guard, guards.Memory(), 1, 0.0, window=window, patience=patience)


# ---- the coefficient of the critic-free methods, which a guard raises

PLACES = {"loss": "k2", "reward": "k1", "score": "k1"}


def toy(placement: str, coefficient: float | None):
    def evaluate(params, action):
        logp = jax.nn.log_softmax(params)
        return logp[action], jnp.zeros(action.shape)

    config = GRPO(
        scale="none",
        aggregation="token",
        kl_coefficient=coefficient,
        kl_placement=placement,
        kl_estimator=PLACES[placement],
    )
    return grpo.make(evaluate, optax.sgd(0.5), config)


ACTION = jnp.array([[[0], [2], [1]]])
ROLLOUT = grpo.Rollout(
    ACTION,
    jax.nn.log_softmax(jnp.array([0.5, 0.1, -0.3, 0.0]))[ACTION],
    jnp.full(ACTION.shape, -1.0) - 0.2 * ACTION,
    jnp.array([[0.3, 1.0, -0.5]]),
    jnp.ones(ACTION.shape, bool),
)
START = jnp.array([0.5, 0.1, -0.3, 0.0])


@pytest.mark.parametrize("placement", PLACES)
def test_the_coefficient_of_the_state_is_what_acts(placement):
    """A state with another coefficient steps as the algorithm configured with that one, in the same program."""
    low, high = toy(placement, 0.1), toy(placement, 0.7)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(low.update, n=1))
    state = low.init(START)
    plain, metrics = update(state, ROLLOUT, jax.random.key(0))
    raised, more = update(state._replace(kl_coefficient=jnp.float32(0.7)), ROLLOUT, jax.random.key(0))
    wanted, _ = jax.jit(high.update)(high.init(START), ROLLOUT, jax.random.key(0))
    np.testing.assert_allclose(raised.params, wanted.params, rtol=1e-5)
    assert np.abs(raised.params - plain.params).max() > 1e-3
    found = [x["objective/kl_coefficient"] for x in (metrics, more)]
    np.testing.assert_allclose(found, [0.1, 0.7], rtol=1e-6)
    assert float(raised.kl_coefficient) == pytest.approx(0.7)


def test_a_state_without_the_coefficient_is_refused():
    some, none = toy("score", 0.1), toy("score", None)
    assert none.init(START).kl_coefficient is None
    with pytest.raises(ValueError, match=r"state.kl_coefficient is None, and that of the config 0\.1"):
        some.update(none.init(START), ROLLOUT, jax.random.key(0))
