"""The numbers of docs/truncation.md: learnt from an episode with the ops, by sums in closed form, and as printed."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import float64
from test_ops_td import in_float64  # noqa: F401

from rlhfjax import ops

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "truncation.md").read_text()
START, DISCOUNT, PRICE, LAM = 50, 0.99, 90.0, 0.95
RUNNING = START  # states: steps since the start, the last one stands for all that follow
EXACT = np.append(DISCOUNT ** np.arange(START, 0, -1.0), 1.0) / (1 - DISCOUNT)
TREATMENTS = ("right", "counts as terminated", "observation of the reset")


def episode(limit):
    """State, reward and next state of a machine that is left alone until the time limit."""
    state = np.minimum(np.arange(limit), RUNNING)
    return state, (state == RUNNING) * 1.0, np.minimum(state + 1, RUNNING)


def treated(treatment, next_state):
    """The next states and the terminations as the treatment has them; the last step is the truncated one."""
    cut = np.arange(len(next_state)) == len(next_state) - 1
    if treatment == "observation of the reset":
        return np.where(cut, 0, next_state), np.zeros(len(cut), bool)
    return next_state, cut & (treatment == "counts as terminated")


@jax.jit
def learnt_values(state, reward, next_state, terminated):
    """The table of V after so many sweeps that 0.99 to their power is nothing."""

    def sweep(_, value):
        target = ops.td_target(reward, value[next_state], discount=DISCOUNT, terminated=terminated)
        return mean_by_state(target, state)

    return jax.lax.fori_loop(0, 5000, sweep, jnp.zeros(START + 1))


@jax.jit
def learnt_keep(state, reward, next_state, terminated):
    """The table of Q of keeping, with the sale of a running machine beside it."""
    sale = jnp.where(jnp.arange(START + 1) == RUNNING, PRICE, -jnp.inf)

    def sweep(_, keep):
        next_q = jnp.stack([keep, sale], axis=1)[next_state]
        target = ops.q_learning_target(reward, next_q, discount=DISCOUNT, terminated=terminated)
        return mean_by_state(target, state)

    return jax.lax.fori_loop(0, 5000, sweep, jnp.zeros(START + 1))


def mean_by_state(target, state):
    count = jnp.zeros(START + 1).at[state].add(1.0)
    return jnp.zeros(START + 1).at[state].add(target) / count


def learnt(function, treatment, limit):
    state, reward, next_state = episode(limit)
    return np.asarray(function(state, reward, *treated(treatment, next_state)))


def table(header):
    """The rows of the page's table that begins with this line, without it."""
    lines = PAGE.splitlines()
    first = lines.index(header) + 2
    rows = []
    while first < len(lines) and lines[first].startswith("|"):
        rows.append([cell.strip() for cell in lines[first].strip("|").split("|")])
        first += 1
    assert rows
    return rows


VALUES = table("| time limit | quantity | right | counts as terminated | observation of the reset |")


def closed_form(treatment, limit):
    """V(running) where one of the visits to it is the last one."""
    last = 1 / (limit - START)
    if treatment == "right":
        return 1 / (1 - DISCOUNT)
    again = DISCOUNT**START if treatment == "observation of the reset" else 0.0
    return 1 / (1 - DISCOUNT * (1 - last + last * again))


@pytest.mark.parametrize(("limit", "quantity", "right", "ended", "reset"), VALUES)
def test_learnt_values(limit, quantity, right, ended, reset):
    state = {"V(running)": RUNNING, "V(start)": 0}[quantity]
    for treatment, printed in zip(TREATMENTS, (right, ended, reset), strict=True):
        value = learnt(learnt_values, treatment, int(limit))
        np.testing.assert_allclose(value[RUNNING], closed_form(treatment, int(limit)), rtol=1e-10)
        assert f"{value[state]:.2f}" == printed, treatment
        if treatment == "right":
            np.testing.assert_allclose(value, EXACT, rtol=1e-10)


def test_learnt_decisions():
    rows = table("| treatment | keep | sell | does |")
    assert tuple(row[0] for row in rows) == TREATMENTS
    for treatment, keep, sell, does in rows:
        value = learnt(learnt_keep, treatment, 200)[RUNNING]
        assert (f"{value:.2f}", f"{PRICE:.2f}", "keep" if value > PRICE else "sell") == (keep, sell, does)


def two_episodes():
    """Reward, state, next state and the flag of the cut of two episodes of 200 steps in one array."""
    state, reward, next_state = (np.tile(x, 2) for x in episode(200))
    return reward, state, next_state, np.arange(400) % 200 == 199


def test_advantages_of_an_exact_critic():
    reward, state, next_state, cut = two_episodes()
    first_of_next = np.append(state[1:], 0)
    given = {
        "right": {"next_value": EXACT[next_state], "truncated": cut},
        "counts as terminated": {"next_value": EXACT[next_state], "terminated": cut},
        "observation of the reset": {"next_value": EXACT[first_of_next], "truncated": cut},
    }
    rows = table("| treatment | last step | 10 before | 50 before |")
    assert tuple(row[0] for row in rows) == TREATMENTS
    for treatment, *printed in rows:
        advantage, _ = ops.gae(reward, EXACT[state], discount=DISCOUNT, lam=LAM, **given[treatment])
        numbers = [f"{advantage[199 - k] + 0.0:.2f}" for k in (0, 10, 50)]
        assert [x.replace("-0.00", "0.00") for x in numbers] == printed
    advantage, _ = ops.gae(reward, EXACT[state], discount=DISCOUNT, lam=LAM, **given["right"])
    np.testing.assert_allclose(advantage, 0, atol=1e-10)


def test_returns_that_run_on_into_the_next_episode():
    reward, _, _, cut = two_episodes()
    returns = partial(ops.lambda_returns, reward, np.zeros(400), discount=DISCOUNT, lam=1.0)
    right, on = returns(truncated=cut)[199], returns()[199]
    expected = DISCOUNT * sum(DISCOUNT**k for k in range(START, 200))
    np.testing.assert_allclose([right, on], [1.0, 1.0 + expected], rtol=1e-12)
    sentence = r"last step is (\S+); where the recursion runs on it is (\S+), of which (\S+)"
    printed = re.search(sentence, " ".join(PAGE.split()))
    assert printed is not None
    assert printed.groups() == (f"{right:.2f}", f"{on:.2f}", f"{on - right:.2f}")


def test_the_example_prints_what_it_says(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    with float64(False):
        exec(compile(block, "truncation.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed and printed == re.findall(r"^(?:print.*|\))  # (\[.*\])$", block, flags=re.MULTILINE)


def test_the_page_names_ops_that_are_there():
    part = PAGE.split("## In code")[1]
    names = set(re.findall(r"`([a-z_]+)`", part)) - {"next_value", "terminated", "truncated", "done"}
    assert len(names) > 12
    assert all(hasattr(ops, name) for name in names), names
