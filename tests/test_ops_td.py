"""One-step targets and their losses in float64: against NumPy loops written from the papers, and against rlax."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rlax
from compiling import compiled
from precision import float64

from rlhfjax import ops

EPS = 1e-6
N, A, DISCOUNT, TEMPERATURE = 24, 4, 0.9, 0.7


@pytest.fixture(autouse=True)
def in_float64():
    with float64():
        yield


def assert_exact(given, expected):
    np.testing.assert_allclose(given, expected, rtol=1e-12, atol=1e-12)


def assert_value_and_slope(op, oracle, arrays, seed=0):
    """The value, and the derivative along a random direction of all arrays at once, against central differences."""
    directions = np.random.default_rng(seed).normal(size=(len(arrays), 1))
    directions = [
        scale * np.cos(np.arange(x.size)).reshape(x.shape)
        for scale, x in zip(directions, arrays, strict=True)
    ]
    value, slope = jax.jit(lambda *args: jax.jvp(op, args[0], args[1]))(tuple(arrays), tuple(directions))
    assert value.dtype == np.float64
    assert_exact(value, oracle(*arrays))
    ahead, behind = (
        oracle(*(x + sign * EPS * d for x, d in zip(arrays, directions, strict=True))) for sign in (1, -1)
    )
    np.testing.assert_allclose(
        slope, (np.asarray(ahead) - np.asarray(behind)) / (2 * EPS), rtol=1e-7, atol=1e-7
    )


RNG = np.random.default_rng(3)
REWARD, VALUE, NEXT_VALUE = RNG.normal(size=(3, N))
Q, NEXT_Q, SELECTOR = RNG.normal(size=(3, N, A))
ACTION, NEXT_ACTION = RNG.integers(0, A, (2, N))
PROBABILITY = RNG.dirichlet(np.ones(A), N)
LOG_RATIO = RNG.normal(size=N)
TERMINATED = RNG.random(N) < 0.3
ALIVE = np.where(TERMINATED, 0.0, DISCOUNT)
SETTING = {"discount": DISCOUNT, "terminated": TERMINATED}


def each(function, *arrays):
    """A function of one transition, applied to all."""
    return np.array([function(n, *(array[n] for array in arrays)) for n in range(N)])


def backed_up(n, reward, next_value):
    return reward if TERMINATED[n] else reward + DISCOUNT * next_value


def test_td_target_and_error():
    oracle = partial(each, backed_up)
    assert_value_and_slope(partial(ops.td_target, **SETTING), oracle, (REWARD, NEXT_VALUE))
    assert_value_and_slope(
        partial(ops.td_error, **SETTING),
        lambda v, r, w: oracle(r, w) - v,
        (VALUE, REWARD, NEXT_VALUE),
    )
    assert_exact(
        compiled(ops.td_error, VALUE, REWARD, NEXT_VALUE, **SETTING),
        jax.jit(jax.vmap(rlax.td_learning))(VALUE, REWARD, ALIVE, NEXT_VALUE),
    )


def taken(q, action):
    return q[np.arange(N), action]


def test_q_learning():
    op = partial(ops.q_learning_target, **SETTING)
    assert_value_and_slope(
        op, lambda r, q: each(lambda n, r, q: backed_up(n, r, max(q)), r, q), (REWARD, NEXT_Q)
    )
    expected = jax.jit(jax.vmap(rlax.q_learning))(Q, ACTION, REWARD, ALIVE, NEXT_Q)
    assert_exact(compiled(op, REWARD, NEXT_Q) - taken(Q, ACTION), expected)


def test_double_q_learning():
    def oracle(reward, q, selector):
        return each(lambda n, r, q, s: backed_up(n, r, q[list(s).index(max(s))]), reward, q, selector)

    op = partial(ops.double_q_target, **SETTING)
    assert_value_and_slope(op, oracle, (REWARD, NEXT_Q, SELECTOR))
    expected = jax.jit(jax.vmap(rlax.double_q_learning))(Q, ACTION, REWARD, ALIVE, NEXT_Q, SELECTOR)
    assert_exact(compiled(op, REWARD, NEXT_Q, SELECTOR) - taken(Q, ACTION), expected)


def test_sarsa():
    def oracle(reward, q):
        return each(lambda n, r, q: backed_up(n, r, q[NEXT_ACTION[n]]), reward, q)

    def op(reward, q):
        return ops.sarsa_target(reward, q, NEXT_ACTION, **SETTING)

    assert_value_and_slope(op, oracle, (REWARD, NEXT_Q))
    expected = jax.jit(jax.vmap(rlax.sarsa))(Q, ACTION, REWARD, ALIVE, NEXT_Q, NEXT_ACTION)
    assert_exact(compiled(op, REWARD, NEXT_Q) - taken(Q, ACTION), expected)


def test_expected_sarsa():
    def oracle(reward, q, p):
        return each(lambda n, r, q, p: backed_up(n, r, sum(p[a] * q[a] for a in range(A))), reward, q, p)

    op = partial(ops.expected_sarsa_target, **SETTING)
    assert_value_and_slope(op, oracle, (REWARD, NEXT_Q, PROBABILITY))
    expected = jax.jit(jax.vmap(rlax.expected_sarsa))(Q, ACTION, REWARD, ALIVE, NEXT_Q, PROBABILITY)
    assert_exact(compiled(op, REWARD, NEXT_Q, PROBABILITY) - taken(Q, ACTION), expected)
    # The greedy policy makes Q-learning of it, a one-hot one SARSA.
    greedy = np.eye(A)[NEXT_Q.argmax(axis=1)]
    assert_exact(
        compiled(op, REWARD, NEXT_Q, greedy), compiled(ops.q_learning_target, REWARD, NEXT_Q, **SETTING)
    )


TARGETS = {
    "td": lambda r, q: ops.td_target(r, q[..., 0], **SETTING),
    "q": lambda r, q: ops.q_learning_target(r, q, **SETTING),
    "double": lambda r, q: ops.double_q_target(r, q, q[..., ::-1], **SETTING),
    "sarsa": lambda r, q: ops.sarsa_target(r, q, np.where(TERMINATED, -7, NEXT_ACTION), **SETTING),
    "expected": lambda r, q: ops.expected_sarsa_target(r, q, 0.1 * q, **SETTING),
    "quantile": lambda r, q: ops.quantile_target(r, jnp.stack([q, 2 * q], -1), **SETTING).sum(-1),
}


@pytest.mark.parametrize("name", TARGETS)
def test_what_follows_the_end_is_never_read(name):
    poisoned = np.where(TERMINATED[:, None], np.nan, NEXT_Q)
    both = jax.jit(jax.value_and_grad(lambda q: TARGETS[name](REWARD, q).sum()))
    (value, gradient), (clean, expected) = both(poisoned), both(NEXT_Q)
    np.testing.assert_array_equal(value, clean)
    np.testing.assert_array_equal(gradient, expected)
    assert not np.asarray(gradient)[TERMINATED].any() and np.asarray(gradient)[~TERMINATED].any()


def test_an_action_that_is_not_available():
    q = NEXT_Q.copy()
    q[:, 1] = -np.inf
    without = np.delete(q, 1, axis=1)
    probability = np.insert(PROBABILITY[:, 1:] / PROBABILITY[:, 1:].sum(1, keepdims=True), 1, 0.0, axis=1)
    pairs = (
        (ops.q_learning_target, (q,), (without,)),
        (ops.expected_sarsa_target, (q, probability), (without, np.delete(probability, 1, axis=1))),
    )
    for op, arrays, fewer in pairs:
        assert_exact(compiled(op, REWARD, *arrays, **SETTING), compiled(op, REWARD, *fewer, **SETTING))
    for op in (
        lambda q: ops.soft_value(q, temperature=TEMPERATURE),
        lambda q: ops.cql_penalty(q, 0 * ACTION),
    ):
        assert_exact(compiled(op, q), compiled(op, without))
        slope = jax.jit(jax.grad(lambda q, op=op: op(q).sum()))
        gradient = slope(q)
        assert_exact(np.delete(gradient, 1, axis=1), slope(without))
        assert not np.asarray(gradient)[:, 1].any()


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


LOGP_REF = log_softmax(RNG.normal(size=(N, A)))


def test_soft_value_and_policy():
    def value(q, logp_ref):
        return np.array(
            [
                TEMPERATURE
                * np.log(sum(np.exp(logp_ref[n, a]) * np.exp(q[n, a] / TEMPERATURE) for a in range(A)))
                for n in range(N)
            ]
        )

    setting = {"temperature": TEMPERATURE}
    assert_value_and_slope(lambda q, ref: ops.soft_value(q, logp_ref=ref, **setting), value, (Q, LOGP_REF))
    assert_value_and_slope(partial(ops.soft_value, **setting), lambda q: value(q, 0 * q), (Q,))
    assert_value_and_slope(
        lambda q, ref: ops.soft_log_policy(q, logp_ref=ref, **setting),
        lambda q, ref: ref + (q - value(q, ref)[:, None]) / TEMPERATURE,
        (Q, LOGP_REF),
    )
    # It is the largest penalised value of any policy, and that policy reaches it.
    best = np.exp(compiled(ops.soft_log_policy, Q, logp_ref=LOGP_REF, **setting))
    for policy in (best, PROBABILITY):
        penalised = (policy * (Q - TEMPERATURE * (np.log(policy) - LOGP_REF))).sum(1)
        gap = np.asarray(compiled(ops.soft_value, Q, logp_ref=LOGP_REF, **setting)) - penalised
        assert np.all(np.abs(gap) < 1e-12) if policy is best else np.all(gap > 1e-3)
    assert_exact(compiled(ops.soft_value, Q, temperature=1e-9), Q.max(1) + 0 * best[:, 0])


def test_munchausen():
    logp = np.log(PROBABILITY[:, 0])

    def oracle(reward, logp):
        return each(lambda n, r, lp: r + 0.9 * max(min(0.3 * lp, 0.0), -0.25), reward, logp)

    op = partial(ops.munchausen_reward, temperature=0.3, scale=0.9, floor=-0.25)
    assert 0 < np.sum(0.3 * logp < -0.25) < N
    assert_value_and_slope(op, oracle, (REWARD, logp))
    # The target as the paper has it: the expectation of q - temperature log pi is the soft value.
    logp_next = log_softmax(NEXT_Q / 0.3)
    expected = each(
        lambda n, r, lp, q, lpn: backed_up(
            n, r + 0.9 * max(0.3 * lp, -0.25), sum(np.exp(lpn) * (q - 0.3 * lpn))
        ),
        REWARD, logp, NEXT_Q, logp_next,
    )  # fmt: skip

    def target(reward, logp, next_q):
        return ops.td_target(op(reward, logp), ops.soft_value(next_q, temperature=0.3), **SETTING)

    assert_exact(compiled(target, REWARD, logp, NEXT_Q), expected)


def test_path_consistency():
    def oracle(value, reward, next_value, log_ratio):
        return each(
            lambda n, v, r, w, d: backed_up(n, r - TEMPERATURE * d, w) - v,
            value,
            reward,
            next_value,
            log_ratio,
        )

    op = partial(ops.path_consistency_error, temperature=TEMPERATURE, **SETTING)
    assert_value_and_slope(op, oracle, (VALUE, REWARD, NEXT_VALUE, LOG_RATIO))
    # Where the policy and the value are those of one Q, it is the soft TD error of Q.
    setting = {"temperature": TEMPERATURE, "logp_ref": LOGP_REF}
    log_ratio = taken(np.asarray(compiled(ops.soft_log_policy, Q, **setting)) - LOGP_REF, ACTION)
    given = compiled(op, compiled(ops.soft_value, Q, **setting), REWARD, NEXT_VALUE, log_ratio)
    assert_exact(given, compiled(ops.td_error, taken(Q, ACTION), REWARD, NEXT_VALUE, **SETTING))


def test_huber():
    def oracle(error):
        return each(lambda n, e: e * e / 2 if abs(e) <= 0.8 else 0.8 * (abs(e) - 0.4), error)

    assert_value_and_slope(lambda e: ops.huber_loss(e, threshold=0.8), oracle, (2 * VALUE,))
    expected = compiled(lambda x: rlax.huber_loss(x, 0.8), 2 * VALUE)
    assert_exact(compiled(ops.huber_loss, 2 * VALUE, threshold=0.8), expected)
    at_zero = compiled(jax.grad(lambda e: ops.huber_loss(e)), 0.0)
    assert at_zero == 0


def test_expectile():
    def oracle(error):
        return each(lambda n, e: abs(0.8 - (e < 0)) * e * e, error)

    assert_value_and_slope(lambda e: ops.expectile_loss(e, expectile=0.8), oracle, (VALUE,))
    expected = compiled(lambda value, reward: rlax.expectile_loss(value, reward, 0.8), VALUE, REWARD)
    assert_exact(compiled(ops.expectile_loss, REWARD - VALUE, expectile=0.8), expected)
    # The minimiser of the mean is the expectile: tau E[(x - m)+] = (1 - tau) E[(m - x)+].
    m = VALUE.mean()
    for _ in range(200):
        weight = np.where(m < VALUE, 0.8, 0.2)
        m = (weight * VALUE).sum() / weight.sum()
    slope = compiled(jax.grad(lambda m: ops.expectile_loss(VALUE - m, expectile=0.8).sum()), m)
    np.testing.assert_allclose(slope, 0, atol=1e-10)


QUANTILE = np.sort(RNG.normal(size=(N, 5)), axis=1)
TARGET = RNG.normal(size=(N, 3))


@pytest.mark.parametrize("threshold", [None, 0.6, 1.0])
@pytest.mark.parametrize("probability", [None, np.array([0.05, 0.2, 0.3, 0.7, 0.9])])
def test_quantile_regression(threshold, probability):
    levels = [0.1, 0.3, 0.5, 0.7, 0.9] if probability is None else probability

    def loss_of(u, level):
        size = abs(u)
        if threshold is not None:
            size = u * u / 2 if abs(u) <= threshold else threshold * (abs(u) - threshold / 2)
        return abs(level - (u < 0)) * size

    def oracle(quantile, target):
        return each(
            lambda n, q, y: sum(sum(loss_of(y[j] - q[i], levels[i]) for j in range(3)) / 3 for i in range(5)),
            quantile, target,
        )  # fmt: skip

    def op(quantile, target):
        return ops.quantile_huber_loss(quantile, target, threshold=threshold, probability=probability)

    assert_value_and_slope(op, oracle, (QUANTILE, TARGET))
    loss = partial(rlax.quantile_regression_loss, huber_param=threshold or 0.0)
    expected = compiled(jax.vmap(loss, (0, None, 0)), QUANTILE, np.array(levels), TARGET)
    assert_exact(compiled(op, QUANTILE, TARGET), expected)


def test_quantile_target():
    next_quantile = RNG.normal(size=(N, A, 5))
    tau = (np.arange(5) + 0.5) / 5
    given = compiled(ops.quantile_target, REWARD, next_quantile, **SETTING)
    double = compiled(ops.quantile_target, REWARD, next_quantile, SELECTOR, **SETTING)
    best = next_quantile.mean(-1).argmax(1)
    assert_exact(given, each(lambda n, r, z: backed_up(n, r, z[best[n]]) + 0 * z[0], REWARD, next_quantile))
    chosen = SELECTOR.argmax(1)
    assert_exact(
        double, each(lambda n, r, z: backed_up(n, r, z[chosen[n]]) + 0 * z[0], REWARD, next_quantile)
    )
    quantile = RNG.normal(size=(N, A, 5))
    theirs, theirs_next = quantile.swapaxes(1, 2), next_quantile.swapaxes(1, 2)
    loss = partial(rlax.quantile_q_learning, huber_param=1.0)
    expected = compiled(
        jax.vmap(loss, (0, None, 0, 0, 0, 0, 0)),
        *(theirs, tau, ACTION, REWARD, ALIVE, theirs_next, theirs_next),
    )
    assert_exact(compiled(ops.quantile_huber_loss, taken(quantile, ACTION), given), expected)


def test_cql():
    def oracle(q):
        return each(lambda n, q: 0.7 * np.log(sum(np.exp(x / 0.7) for x in q)) - q[ACTION[n]], q)

    assert_value_and_slope(lambda q: ops.cql_penalty(q, ACTION, temperature=0.7), oracle, (Q,))
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    expected = compiled(cross_entropy, Q, ACTION)
    assert_exact(compiled(ops.cql_penalty, Q, ACTION), expected)
    expected = 0.7 * compiled(cross_entropy, Q / 0.7, ACTION)
    assert_exact(compiled(ops.cql_penalty, Q, ACTION, temperature=0.7), expected)
    assert np.isfinite(compiled(ops.cql_penalty, 1e6 * Q, ACTION)).all()


def test_leading_axes_and_a_traced_discount():
    def fold(x):
        return x.reshape(2, 3, N // 6, *x.shape[1:])

    sweep = jax.jit(
        jax.vmap(lambda d: ops.q_learning_target(REWARD, NEXT_Q, discount=d, terminated=TERMINATED))
    )
    for discount, given in zip((0.0, 0.9), np.asarray(sweep(np.array([0.0, 0.9]))), strict=True):
        assert_exact(given, REWARD + discount * ~TERMINATED * NEXT_Q.max(1))
    per_step = compiled(
        ops.double_q_target,
        fold(REWARD),
        fold(NEXT_Q),
        fold(SELECTOR),
        discount=fold(ALIVE),
        terminated=fold(TERMINATED),
    )
    expected = compiled(ops.double_q_target, REWARD, NEXT_Q, SELECTOR, **SETTING)
    assert_exact(np.asarray(per_step).reshape(N), expected)
    one = compiled(ops.sarsa_target, REWARD[0], NEXT_Q[0], NEXT_ACTION[0], discount=1.0)
    assert_exact(one, REWARD[0] + NEXT_Q[0, NEXT_ACTION[0]])


def test_bfloat16_comes_out_as_float32():
    with float64(False):
        shapes = (((3,), jnp.bfloat16), ((3, 2), jnp.bfloat16), ((3,), jnp.int32))
        one, q, action = (jax.ShapeDtypeStruct(*x) for x in shapes)
        target = jax.eval_shape(partial(ops.q_learning_target, discount=0.5), one, q)
        assert target.dtype == jnp.float32
        assert jax.eval_shape(ops.cql_penalty, q, action).dtype == jnp.float32
        assert jax.eval_shape(ops.quantile_huber_loss, q, q).dtype == jnp.float32


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"discount must lie in \[0, 1\], got 99"):
        ops.td_target(REWARD, NEXT_VALUE, discount=99)
    with pytest.raises(ValueError, match=r"discount must lie in \[0, 1\], got -0.1"):
        ops.q_learning_target(REWARD, NEXT_Q, discount=-0.1)
    with pytest.raises(ValueError, match=r"expectile must lie in \[0, 1\]"):
        ops.expectile_loss(VALUE, expectile=1.5)
    with pytest.raises(TypeError, match=r"reward must be floating point, got int64\[24\]"):
        ops.td_target(ACTION, NEXT_VALUE, discount=0.9)
    with pytest.raises(ValueError, match=r"next_q must be of shape \[24,3\].* got float64\[3,3\]"):
        ops.q_learning_target(REWARD, NEXT_Q[:3, :3], discount=0.9)
    with pytest.raises(ValueError, match=r"next_q must have shape \[..., A\]"):
        ops.q_learning_target(1.0, 2.0, discount=0.9)
    with pytest.raises(ValueError, match=r"next_q_selector must be of shape \[24,4\]"):
        ops.double_q_target(REWARD, NEXT_Q, SELECTOR[:, :3], discount=0.9)
    with pytest.raises(TypeError, match="next_action must be integer"):
        ops.sarsa_target(REWARD, NEXT_Q, PROBABILITY[:, 0], discount=0.9)
    with pytest.raises(TypeError, match="terminated must be bool"):
        ops.td_target(REWARD, NEXT_VALUE, discount=0.9, terminated=ALIVE)
    with pytest.raises(ValueError, match=r"next_quantile must have shape \[..., A, N\]"):
        ops.quantile_target(REWARD[0], QUANTILE[0], discount=0.9)
    with pytest.raises(ValueError, match=r"target must be of shape \[24,3\].* got float64\[3\]"):
        ops.quantile_huber_loss(QUANTILE, TARGET[0])
    with pytest.raises(ValueError, match=r"action must be of shape \[24\]"):
        ops.cql_penalty(Q, ACTION[:3])
