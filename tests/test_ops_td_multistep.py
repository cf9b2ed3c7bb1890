"""Targets over several steps in float64: against sums written out from their definitions, and against rlax.

The masks are exhaustive, one row for each of the 32 patterns of five positions, and episodes end, both ways, inside
the rows: what is compared is each row without its masked entries.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from compiling import compiled
from precision import float64
from test_ops_td import EPS, assert_exact, in_float64  # noqa: F401

from rlhfjax import ops

T, A, TEMPERATURE = 5, 3, 0.7
RNG = np.random.default_rng(4)
MASK = np.array(np.meshgrid(*[[False, True]] * T)).reshape(T, -1).T
B = len(MASK)
EVERYWHERE = np.ones((B, T), bool)
TERMINATED = RNG.random((B, T)) < 0.15
TRUNCATED = RNG.random((B, T)) < 0.2
GREEDY = RNG.random((B, T)) < 0.6
DISCOUNT = RNG.uniform(0.5, 1.0, (B, T))
LAM = RNG.uniform(0.2, 0.9, (B, T))
REWARD, VALUE, NEXT_VALUE, LOG_RATIO = RNG.normal(size=(4, B, T))
NEXT_Q = RNG.normal(size=(B, T, A))


# The definitions, of one row without masked entries. `given` holds its discount, lam, terminated, truncated, greedy.


def ends(given, t):
    """Whether the row knows nothing of what follows step t."""
    return given["terminated"][t] or given["truncated"][t] or t == len(given["terminated"]) - 1


def path(given, t):
    """The steps from t to the end of its episode."""
    while True:
        yield t
        if ends(given, t):
            return
        t += 1


def decay(given, t):
    return 0.0 if given["terminated"][t] else given["discount"][t]


def n_step_of(steps, given, reward, next_value):
    result = np.zeros(len(reward))
    for t in range(len(reward)):
        weight = 1.0
        for k in path(given, t):
            result[t] += weight * reward[k]
            weight *= decay(given, k)
            if ends(given, k) or k == t + steps - 1:
                result[t] += weight * next_value[k]
                break
    return result


def mixture(given, reward, next_value, lam):
    """The forward view: every n-step return times its weight."""
    result = np.zeros(len(reward))
    for t in range(len(reward)):
        weight = 1.0
        for n, k in enumerate(path(given, t), start=1):
            share = 1.0 if ends(given, k) else 1 - lam[k]
            result[t] += weight * share * n_step_of(n, given, reward, next_value)[t]
            weight *= lam[k]
    return result


def lambda_of(given, reward, next_value):
    return mixture(given, reward, next_value, given["lam"])


def peng(given, reward, next_q):
    return mixture(given, reward, np.array([max(q) for q in next_q]), given["lam"])


def watkins(given, reward, next_q):
    lam = given["lam"] * np.append(given["greedy"][1:], 0)
    return mixture(given, reward, np.array([max(q) for q in next_q]), lam)


def retrace_of(given, reward, q, next_value, log_ratio):
    result = np.array(q)
    for t in range(len(reward)):
        weight = 1.0
        for s in path(given, t):
            if s > t:
                weight *= given["discount"][s - 1] * given["lam"][s] * min(1.0, np.exp(log_ratio[s]))
            result[t] += weight * (reward[s] + decay(given, s) * next_value[s] - q[s])
    return result


CLIPS = {"clip_rho": 1.3, "clip_trace": 0.8, "clip_policy": 1.1}


def vtrace_of(given, reward, value, next_value, log_ratio):
    returns = np.array(value)
    for t in range(len(reward)):
        weight = 1.0
        for s in path(given, t):
            if s > t:
                weight *= given["discount"][s - 1] * given["lam"][s - 1] * min(0.8, np.exp(log_ratio[s - 1]))
            delta = reward[s] + decay(given, s) * next_value[s] - value[s]
            returns[t] += weight * min(1.3, np.exp(log_ratio[s])) * delta
    advantage = np.zeros(len(reward))
    for t in range(len(reward)):
        after = next_value[t]
        if not ends(given, t):
            after = (1 - given["lam"][t]) * next_value[t] + given["lam"][t] * returns[t + 1]
        advantage[t] = min(1.1, np.exp(log_ratio[t])) * (reward[t] + decay(given, t) * after - value[t])
    return np.stack([returns, advantage], axis=-1)


def consistency(steps, given, value, reward, next_value, log_ratio):
    return n_step_of(steps, given, reward - TEMPERATURE * log_ratio, next_value) - value


def vtrace_stacked(*arrays, **given):
    return jnp.stack(ops.vtrace(*arrays, **given, **CLIPS), axis=-1)


def consistency_op(steps):
    return partial(ops.multistep_path_consistency_error, temperature=TEMPERATURE, steps=steps)


WITH_LAM = ("discount", "lam")
# name: (op, definition, what it needs beside mask and flags, its differentiable arrays)
CASES = {
    **{
        f"n_step_{n}": (
            partial(ops.n_step_returns, steps=n), partial(n_step_of, n), ("discount",), (REWARD, NEXT_VALUE)
        )
        for n in (1, 2, 3, 9)
    },
    "lambda": (ops.lambda_returns, lambda_of, WITH_LAM, (REWARD, NEXT_VALUE)),
    "peng": (ops.q_lambda_returns, peng, WITH_LAM, (REWARD, NEXT_Q)),
    "watkins": (ops.q_lambda_returns, watkins, (*WITH_LAM, "greedy"), (REWARD, NEXT_Q)),
    "retrace": (ops.retrace, retrace_of, WITH_LAM, (REWARD, VALUE, NEXT_VALUE, LOG_RATIO)),
    "vtrace": (vtrace_stacked, vtrace_of, WITH_LAM, (REWARD, VALUE, NEXT_VALUE, LOG_RATIO)),
    **{
        f"consistency_{n}": (
            consistency_op(n), partial(consistency, n or T), ("discount",), (VALUE, REWARD, NEXT_VALUE, LOG_RATIO)
        )
        for n in (None, 1, 2)
    },
}  # fmt: skip
SETTINGS = {"discount": DISCOUNT, "lam": LAM, "greedy": GREEDY}
FLAGS = {"terminated": TERMINATED, "truncated": TRUNCATED}


def by_definition(name, mask, *arrays):
    """The definition on each row without its masked entries; 0 elsewhere."""
    _, definition, needs, _ = CASES[name]
    out = np.zeros((B, T, 2) if name == "vtrace" else (B, T))
    for b, keep in enumerate(mask):
        given = {key: array[b, keep] for key, array in (SETTINGS | FLAGS).items() if key in (*needs, *FLAGS)}
        out[b, keep] = definition(given, *(array[b, keep] for array in arrays))
    return out


def poisoned(name, mask):
    """The arrays of a case with NaN where masked, and in what lies after the end."""
    _, _, needs, arrays = CASES[name]
    arrays = [
        np.where(
            (mask & ~TERMINATED if x is NEXT_VALUE or x is NEXT_Q else mask).reshape(
                B, T, *[1] * (x.ndim - 2)
            ),
            x,
            np.nan,
        )
        for x in arrays
    ]
    settings = {key: SETTINGS[key] for key in needs}
    return arrays, {key: x if x.dtype == bool else np.where(mask, x, np.nan) for key, x in settings.items()}


@pytest.mark.parametrize("name", CASES)
def test_value_and_slope_with_every_mask_termination_and_truncation(name):
    op, _, _, arrays = CASES[name]
    directions = [np.cos(np.arange(x.size) + i).reshape(x.shape) for i, x in enumerate(arrays)]
    given, settings = poisoned(name, MASK)
    op = partial(op, mask=MASK, **FLAGS, **settings)
    value, slope = jax.jit(lambda *a: jax.jvp(op, a, tuple(directions)))(*given)
    assert value.dtype == np.float64
    assert_exact(value, by_definition(name, MASK, *arrays))
    ahead, behind = (
        by_definition(name, MASK, *(x + sign * EPS * d for x, d in zip(arrays, directions, strict=True)))
        for sign in (1, -1)
    )
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * EPS), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_masked_nan_leaks_into_no_gradient(name):
    op, _, needs, arrays = CASES[name]
    weight = RNG.normal(size=(B, T))

    @jax.jit
    def gradients(arrays, settings):
        def total(arrays):
            result = op(*arrays, mask=MASK, **FLAGS, **settings)
            return (weight.reshape(B, T, *[1] * (result.ndim - 2)) * result).sum()

        return jax.grad(total)(arrays)

    clean = gradients(list(arrays), {key: SETTINGS[key] for key in needs})
    for gradient, expected, x in zip(gradients(*poisoned(name, MASK)), clean, arrays, strict=True):
        np.testing.assert_array_equal(gradient, expected)
        read = MASK & ~TERMINATED if x is NEXT_VALUE or x is NEXT_Q else MASK
        assert not np.asarray(gradient)[~read].any() and np.asarray(gradient)[read].any()


@pytest.mark.parametrize("name", ["n_step_3", "watkins", "retrace", "vtrace", "consistency_None"])
def test_masked_nan_leaks_into_no_gradient_of_a_number(name):
    op, _, needs, arrays = CASES[name]
    numbers = {"discount": 0.9} | ({"lam": 0.7} if "lam" in needs else {})
    if name == "consistency_None":
        op, numbers = ops.multistep_path_consistency_error, {**numbers, "temperature": TEMPERATURE}
    greedy = {"greedy": GREEDY} if "greedy" in needs else {}

    @jax.jit
    @jax.grad
    def gradients(numbers, arrays):
        return op(*arrays, mask=MASK, **FLAGS, **greedy, **numbers).sum()

    given, expected = gradients(numbers, poisoned(name, MASK)[0]), gradients(numbers, list(arrays))
    assert given == expected and all(abs(x) > 1e-3 for x in given.values())


JITTED = {name: jax.jit(op) for name, (op, *_) in CASES.items()}


def only(name, **given):
    """A case in jit, with scalars for discount and lam, no masks and no ends unless given."""
    _, _, needs, arrays = CASES[name]
    arrays = given.get("arrays", arrays)
    never = np.zeros(arrays[0].shape, bool)
    settings = (
        {"discount": 0.9, "lam": 0.7, "greedy": GREEDY, "mask": ~never} | dict.fromkeys(FLAGS, never) | given
    )
    return JITTED[name](*arrays, **{key: settings[key] for key in (*needs, "mask", *FLAGS)})


@pytest.mark.parametrize("name", CASES)
def test_an_autoreset_boundary_is_the_end_of_an_array(name):
    """Two episodes in one array, the first one cut short, equal the two in arrays of their own."""
    cut_at = 2
    cut = np.broadcast_to(np.arange(T) == cut_at, (B, T))
    together = np.asarray(only(name, truncated=cut))
    _, _, _, arrays = CASES[name]
    for part in (slice(0, cut_at + 1), slice(cut_at + 1, T)):
        alone = only(name, arrays=[x[:, part] for x in arrays], greedy=GREEDY[:, part])
        assert_exact(together[:, part], alone)
    ended = np.asarray(only(name, truncated=cut, terminated=cut))
    assert_exact(ended, only(name, terminated=cut))
    assert not np.allclose(ended[:, cut_at], together[:, cut_at])


@pytest.mark.parametrize("name", CASES)
def test_padding_leading_axes_and_batch_order(name):
    _, _, _, arrays = CASES[name]
    expected = np.asarray(only(name, mask=MASK, **FLAGS))
    rolled = {key: np.roll(x, 3, axis=0) for key, x in ({"mask": MASK, "greedy": GREEDY} | FLAGS).items()}
    given = only(name, arrays=[np.roll(x, 3, axis=0) for x in arrays], **rolled)
    np.testing.assert_array_equal(np.roll(given, -3, axis=0), expected)

    def pad(x, value=np.nan):
        return np.pad(x, [(0, 0), (2, 3)] + [(0, 0)] * (x.ndim - 2), constant_values=value)

    flags = {key: pad(x, False) for key, x in ({"mask": MASK, "greedy": GREEDY} | FLAGS).items()}
    padded = np.asarray(only(name, arrays=[pad(x) for x in arrays], **flags))
    assert_exact(padded[:, 2:-3], expected)

    def fold(x):
        return x.reshape(4, B // 4, *x.shape[1:])

    flags = {key: fold(x) for key, x in ({"mask": MASK, "greedy": GREEDY} | FLAGS).items()}
    assert_exact(only(name, arrays=[fold(x) for x in arrays], **flags), fold(expected))
    row = {key: x[9] for key, x in ({"mask": MASK, "greedy": GREEDY} | FLAGS).items()}
    assert_exact(only(name, arrays=[x[9] for x in arrays], **row), expected[9])


# Against rlax, which has no masks and no truncation: the discount is 0 where the episode terminated.
ALIVE = np.where(TERMINATED, 0.0, DISCOUNT)
ENDED = {"terminated": TERMINATED}
OBSERVED = np.concatenate([VALUE, NEXT_VALUE[:, -1:]], axis=1)  # of T + 1 states of one episode
Q, ACTION = RNG.normal(size=(B, T + 1, A)), RNG.integers(0, A, (B, T + 1))


def along(q, action):
    return np.take_along_axis(q, action[..., None], axis=-1)[..., 0]


def test_lambda_returns_equal_rlax_also_at_truncations():
    """A cut bootstraps from the value wholly, as lam = 0 does."""
    lam = np.where(TRUNCATED, 0.0, LAM)
    expected = compiled(jax.vmap(rlax.lambda_returns), REWARD, ALIVE, NEXT_VALUE, lam)
    assert_exact(
        compiled(ops.lambda_returns, REWARD, NEXT_VALUE, discount=DISCOUNT, lam=LAM, **FLAGS), expected
    )


def test_td_lambda_equals_rlax():
    expected = compiled(
        jax.vmap(rlax.td_lambda, (0, 0, 0, 0, None)), VALUE, REWARD, ALIVE, OBSERVED[:, 1:], 0.7
    )
    given = compiled(ops.lambda_returns, REWARD, OBSERVED[:, 1:], discount=DISCOUNT, lam=0.7, **ENDED)
    assert_exact(given - VALUE, expected)
    advantage, returns = compiled(
        ops.gae, REWARD, VALUE, discount=DISCOUNT, lam=0.7, next_value=OBSERVED[:, 1:], **ENDED
    )
    assert_exact(given, returns)
    assert_exact(given - VALUE, advantage)


def test_sarsa_lambda_equals_rlax():
    expected = compiled(
        jax.vmap(rlax.sarsa_lambda, (0, 0, 0, 0, 0, 0, None)),
        Q[:, :-1],
        ACTION[:, :-1],
        REWARD,
        ALIVE,
        Q[:, 1:],
        ACTION[:, 1:],
        0.7,
    )
    taken = along(Q, ACTION)
    given = compiled(ops.lambda_returns, REWARD, taken[:, 1:], discount=DISCOUNT, lam=0.7, **ENDED)
    assert_exact(given - taken[:, :-1], expected)


@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_n_step_equals_rlax(n):
    theirs = partial(rlax.n_step_bootstrapped_returns, n=min(n, T))
    expected = compiled(jax.vmap(theirs), REWARD, ALIVE, NEXT_VALUE)
    given = compiled(ops.n_step_returns, REWARD, NEXT_VALUE, discount=DISCOUNT, steps=n, **ENDED)
    assert_exact(given, expected)


def test_q_lambda_equals_rlax():
    greedy = Q.argmax(-1) == ACTION
    assert 0 < greedy[:, 1:-1].sum() < greedy[:, 1:-1].size
    watkins_lam = 0.7 * greedy[:, 1:]
    taken = along(Q, ACTION)[:, :-1]
    for lam, flags in ((np.full((B, T), 0.7), {}), (watkins_lam, {"greedy": greedy[:, :-1]})):
        expected = compiled(jax.vmap(rlax.q_lambda), Q[:, :-1], ACTION[:, :-1], REWARD, ALIVE, Q[:, 1:], lam)
        given = compiled(ops.q_lambda_returns, REWARD, Q[:, 1:], discount=DISCOUNT, lam=0.7, **ENDED, **flags)
        assert_exact(given - taken, expected)


def test_retrace_equals_rlax():
    pi, mu = RNG.dirichlet(np.ones(A), (2, B, T + 1))
    log_ratio = np.log(along(pi, ACTION) / along(mu, ACTION))
    expected = compiled(jax.vmap(partial(rlax.retrace, eps=0.0), (0, 0, 0, 0, 0, 0, 0, 0, None)), 
        Q[:, :-1], Q[:, 1:], ACTION[:, :-1], ACTION[:, 1:], REWARD, ALIVE, pi[:, 1:], along(mu, ACTION)[:, 1:], 0.7
    )  # fmt: skip
    taken = along(Q, ACTION)[:, :-1]
    next_value = (pi * Q).sum(-1)[:, 1:]
    given = compiled(
        ops.retrace, REWARD, taken, next_value, log_ratio[:, :-1], discount=DISCOUNT, lam=0.7, **ENDED
    )
    assert_exact(given - taken, expected)


@pytest.mark.parametrize("lam", [1.0, 0.7])
def test_vtrace_equals_rlax(lam):
    compare = partial(rlax.vtrace_td_error_and_advantage, clip_rho_threshold=1.3, clip_pg_rho_threshold=1.1)
    expected = compiled(
        jax.vmap(compare, (0, 0, 0, 0, 0, None)),
        VALUE,
        OBSERVED[:, 1:],
        REWARD,
        ALIVE,
        np.exp(LOG_RATIO),
        lam,
    )
    given = compiled(
        ops.vtrace,
        REWARD,
        VALUE,
        OBSERVED[:, 1:],
        LOG_RATIO,
        discount=DISCOUNT,
        lam=lam,
        clip_rho=1.3,
        clip_policy=1.1,
        **ENDED,
    )
    assert_exact(given.returns - VALUE, expected.errors)
    assert_exact(given.advantage, expected.pg_advantage)


def test_on_policy_they_are_one():
    """Where the ratio is 1: V-trace is the lambda-return, Retrace of Q(s, a) = V(s) too."""
    setting = {"discount": 0.9, "lam": 0.7, **FLAGS, "mask": MASK}
    next_value = np.where(TRUNCATED, NEXT_VALUE, compiled(ops.value_at_next, VALUE, MASK))
    expected = compiled(ops.lambda_returns, REWARD, next_value, **setting)
    zero = np.zeros((B, T))
    assert_exact(compiled(ops.vtrace, REWARD, VALUE, next_value, zero, **setting).returns, expected)
    assert_exact(compiled(ops.retrace, REWARD, VALUE, next_value, zero, **setting), expected)
    assert_exact(compiled(ops.gae, REWARD, VALUE, next_value=next_value, **setting)[1], expected)


def test_a_ratio_too_large_for_exp():
    huge = np.full((B, T), 800.0)
    setting = {"discount": 0.9, "lam": 0.7}
    slope = compiled(jax.grad(lambda x: ops.retrace(REWARD, VALUE, NEXT_VALUE, x, **setting).sum()), huge)
    assert_exact(slope, 0 * huge)
    unbounded = {"clip_rho": np.inf, "clip_trace": 1.0}
    given = compiled(ops.vtrace, REWARD, VALUE, NEXT_VALUE, np.log(2) + 0 * huge, **setting, **unbounded)
    assert_exact(
        np.asarray(given.returns)[:, -1] - VALUE[:, -1], 2 * (REWARD + 0.9 * NEXT_VALUE - VALUE)[:, -1]
    )


def test_n_step_transitions_of_a_replay():
    """The value may be computed later, at the position that `last` names."""
    path = jax.jit(partial(ops.n_step, steps=3))(REWARD, discount=DISCOUNT, mask=MASK, **FLAGS)
    target = path.reward + path.discount * np.take_along_axis(NEXT_VALUE, np.asarray(path.last), axis=1)
    expected = compiled(
        ops.n_step_returns, REWARD, NEXT_VALUE, discount=DISCOUNT, steps=3, mask=MASK, **FLAGS
    )
    assert_exact(target, expected)
    kept = np.asarray(path.last)[MASK]
    assert (kept >= np.broadcast_to(np.arange(T), (B, T))[MASK]).all()
    assert np.take_along_axis(MASK, np.asarray(path.last), axis=1)[MASK].all()
    assert not np.asarray(path.discount)[~MASK].any()
    assert path.last.dtype == jnp.int32


def test_the_next_position_that_counts():
    value = np.where(MASK, VALUE, np.nan)
    expected = np.zeros((B, T))
    for b in range(B):
        (kept,) = np.nonzero(MASK[b])
        expected[b, kept[:-1]] = VALUE[b, kept[1:]]
    np.testing.assert_array_equal(jax.jit(ops.value_at_next)(value, MASK), expected)
    # A turn of the agent, two tokens of the environment, another turn.
    given = compiled(ops.value_at_next, np.array([1.0, 2.0, 9.0, 9.0, 3.0]), np.array([1, 1, 0, 0, 1]))
    np.testing.assert_array_equal(given, [2, 3, 0, 0, 0])


def test_path_consistency_of_an_enumerated_optimum():
    """pi* = ref exp((Q* - V*) / temperature) of a tree of three binary decisions: every path of it is consistent."""
    length = 3
    reward_of = RNG.normal(size=(2,) * length)
    ref = RNG.dirichlet(np.ones(2), (2,) * length)  # a state is its prefix; the rest of the index is 0
    values, soft = [reward_of], reward_of
    for depth in reversed(range(length)):
        prefix = (slice(None),) * depth + (0,) * (length - depth)
        probability = ref[prefix]
        soft = TEMPERATURE * np.log((probability * np.exp(soft / TEMPERATURE)).sum(-1))
        values.insert(0, soft)
    paths = np.stack(np.unravel_index(np.arange(2**length), (2,) * length), axis=1)
    value = np.array([[values[d][tuple(path[:d])] for d in range(length)] for path in paths])
    after = np.array([[values[d + 1][tuple(path[: d + 1])] for d in range(length)] for path in paths])
    reward = np.zeros(after.shape)
    reward[:, -1] = reward_of[tuple(paths.T)]
    after_inside = np.where(np.arange(length) == length - 1, 0.0, after)
    log_ratio = (reward + after_inside - value) / TEMPERATURE
    terminated = np.broadcast_to(np.arange(length) == length - 1, reward.shape)
    for steps in (None, 1, 2):
        error = compiled(
            ops.multistep_path_consistency_error,
            value,
            reward,
            after,
            log_ratio,
            temperature=TEMPERATURE,
            discount=1.0,
            steps=steps,
            terminated=terminated,
        )
        assert_exact(error, 0 * reward)
    assert_exact(compiled(ops.value_at_next, value), after_inside)


def test_bfloat16_comes_out_as_float32():
    with float64(False):
        x = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
        for op, arrays in (
            (partial(ops.lambda_returns, discount=0.9, lam=0.5), (x, x)),
            (partial(ops.n_step_returns, discount=0.9, steps=2), (x, x)),
            (partial(ops.vtrace, discount=0.9), (x, x, x, x)),
        ):
            assert all(out.dtype == jnp.float32 for out in jax.tree.leaves(jax.eval_shape(op, *arrays)))


def test_bad_input_is_named():
    setting = {"discount": 0.9, "lam": 0.7}
    with pytest.raises(ValueError, match=r"lam must lie in \[0, 1\], got 1.5"):
        ops.lambda_returns(REWARD, NEXT_VALUE, discount=0.9, lam=1.5)
    with pytest.raises(ValueError, match=r"discount must lie in \[0, 1\], got 2"):
        ops.n_step_returns(REWARD, NEXT_VALUE, discount=2, steps=2)
    wrong: list[Any] = [0, 2.0, -1]
    for steps in wrong:
        with pytest.raises(ValueError, match="steps must be a positive Python int"):
            ops.n_step(REWARD, discount=0.9, steps=steps)
    with pytest.raises(TypeError, match=r"reward must be floating point, got int64\[32,5\]"):
        ops.lambda_returns(ACTION[:, :-1], NEXT_VALUE, **setting)
    with pytest.raises(ValueError, match=r"reward must have shape \[..., T\]"):
        ops.lambda_returns(1.0, 1.0, **setting)
    with pytest.raises(ValueError, match=r"next_value must be of shape \[32,5\].* got float64\[32,6\]"):
        ops.lambda_returns(REWARD, OBSERVED, **setting)
    with pytest.raises(ValueError, match=r"next_q must be of shape \[32,5,3\].* got float64\[32,6,3\]"):
        ops.q_lambda_returns(REWARD, Q, **setting)
    with pytest.raises(ValueError, match=r"q must be of shape \[32,5\]"):
        ops.retrace(REWARD, Q[:, :-1], NEXT_VALUE, LOG_RATIO, **setting)
    with pytest.raises(TypeError, match="greedy must be bool"):
        ops.q_lambda_returns(REWARD, NEXT_Q, greedy=LAM, **setting)
    with pytest.raises(TypeError, match="truncated must be bool"):
        ops.vtrace(REWARD, VALUE, NEXT_VALUE, LOG_RATIO, discount=0.9, truncated=ALIVE)
