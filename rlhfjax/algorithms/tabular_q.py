"""Action values in a table, learnt from one transition after the other. With s' the next state, a' an action
in it, terminated episodes having no future,

    Q(s, a) <- Q(s, a) + alpha [r + discount * future - Q(s, a)]

    q_learning      future = max_a' Q(s', a')                                     (Watkins 1989)
    sarsa           future = Q(s', a'), a' the action taken next                   (Rummery and Niranjan 1994)
    expected_sarsa  future = sum_a' pi(a'|s') Q(s', a'), pi epsilon-greedy in Q    (van Seijen et al. 2009)
    double_q        Q one of two tables, by a coin for each transition;
                    future = Q_other(s', argmax_a' Q(s', a'))                      (van Hasselt 2010)
    q_lambda        the error of q_learning moves every Q(x), by alpha * trace(x);
                    the trace of (s, a) is set to 1 (or 1 is added to it), then all are multiplied
                    by discount * lam, or set to 0 where the episode ends or a' is not greedy (Watkins 1989)

There is no loss and no optimiser: alpha is `Config.step_size`, falling with the visits to (s, a) on request.
A truncated episode bootstraps from the state in which it was cut; only its traces end.

Metrics (means over the transitions that count):
    td/error          |r + discount * future - Q(s, a)|, before the step
    td/error_max      the largest
    q/taken           Q(s, a), before the step
    step_size/mean    alpha
    batch/count       transitions
    batch/invalid     those left out as bad input: a state or action outside the table, a reward not finite

Shapes: N transitions, S states, A actions, M tables (2 with double_q, else 1).

>>> import jax, jax.numpy as jnp
>>> from rlhfjax.config import TabularQ
>>> algorithm = make(TabularQ(discount=0.9, step_size=0.5))
>>> one = jnp.array([0])  # in state 0, action 0 gives 1 and leads back to state 0
>>> batch = Transition(one, one, jnp.array([1.0]), one, jnp.array([False]))
>>> state, update = algorithm.init(jnp.zeros((2, 2))), jax.jit(algorithm.update)
>>> for key in jax.random.split(jax.random.key(0), 200):
...     state, metrics = update(state, batch, key)
>>> round(float(action_values(state)[0, 0]), 2)  # 1 / (1 - 0.9)
10.0
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhfjax.algorithms.algorithm import Algorithm
from rlhfjax.algorithms.exploration import epsilon_greedy_probabilities
from rlhfjax.config import TabularQ as Config

METHODS = ("q_learning", "sarsa", "expected_sarsa", "double_q", "q_lambda")
NEED_NEXT_ACTION = ("sarsa", "q_lambda")
_FLAGS = ("terminated", "truncated", "mask")


class Transition(NamedTuple):
    """Transitions in the order in which they are learnt; what is masked may hold anything.

    Rollouts of several environments are put in one row, time first: [T, E] reshaped to [T * E]. With
    q_lambda they are steps of one environment in order, from one update to the next.
    """

    state: jax.Array  # int [N]
    action: jax.Array  # int [N]
    reward: jax.Array  # float [N]
    next_state: jax.Array  # int [N]; where the episode was cut, its own last state
    terminated: jax.Array  # bool [N]
    truncated: jax.Array | None = None  # bool [N], cut short after this action; None: never
    next_action: jax.Array | None = None  # int [N], taken in next_state; for sarsa and q_lambda
    mask: jax.Array | None = None  # bool [N], True where it counts; None: all do


class _Row(NamedTuple):
    """A Transition with every field given, zeros where it does not count; in the scan all are scalars."""

    state: jax.Array
    action: jax.Array
    reward: jax.Array
    next_state: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    next_action: jax.Array
    counts: jax.Array


class State(NamedTuple):
    """All that a run needs to go on."""

    q: jax.Array  # float [M, S, A]
    visits: jax.Array  # int32 [M, S, A], transitions learnt
    trace: jax.Array  # float [S, A], of q_lambda; zeros otherwise
    step: jax.Array  # int32 [], updates made


def action_values(state: State) -> jax.Array:
    """float [S, A]: the table, or the mean of the two of double_q. What to act on."""
    return jnp.mean(state.q, axis=0)


def make(config: Config) -> Algorithm:
    """The configured method as `Algorithm(init, update)` on `Transition`; see the module for the metrics.

    `init` takes the initial table, float [S, A]. Raises ValueError where config names an unknown method or a
    number is out of range, and when tracing where the batch does not fit.
    """
    if config.method not in METHODS:
        raise ValueError(f"method={config.method!r} is unknown; choose among {', '.join(METHODS)}")
    for name in ("discount", "epsilon", "lam", "step_size"):
        value = getattr(config, name)
        # An array may be traced, and is taken as it comes.
        if isinstance(value, int | float) and not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be in [0, 1]")

    def init(q: jax.Array) -> State:
        q = jnp.asarray(q)
        if q.ndim != 2 or not jnp.issubdtype(q.dtype, jnp.floating):
            raise TypeError(f"the initial table must be float [S, A], got {q.dtype} of shape {q.shape}")
        tables = jnp.stack([q] * (2 if config.method == "double_q" else 1))
        return State(tables, jnp.zeros(tables.shape, jnp.int32), jnp.zeros_like(q), jnp.zeros((), jnp.int32))

    def update(state: State, batch: Transition, key: jax.Array):
        rows, invalid = _clean(batch, state.q.shape, config)
        table = jnp.zeros(batch.state.shape, jnp.int32)
        if config.method == "double_q":
            table = jax.random.randint(key, batch.state.shape, 0, 2)
        state, steps = jax.lax.scan(partial(_learn, config=config), state, (rows, table))
        count = jnp.sum(rows.counts, dtype=jnp.float32)
        largest = jnp.max(steps["td/error"], initial=0.0)
        sums = {name: jnp.sum(x) for name, x in steps.items()}
        metrics = {name: x / jnp.maximum(count, 1.0) for name, x in sums.items()}
        metrics |= {"td/error_max": largest, "batch/count": count, "batch/invalid": invalid}
        metrics = {name: x.astype(jnp.float32) for name, x in metrics.items()}
        return state._replace(step=state.step + 1), metrics

    return Algorithm(init, update)


def step_size(visits: jax.Array, config: Config) -> jax.Array:
    """Alpha at the given visit (1 the first): `step_size * (k / (k + visits - 1)) ** decay_power`."""
    if config.decay_power is None:
        return jnp.broadcast_to(jnp.asarray(config.step_size), visits.shape)
    k = config.decay_visits
    return config.step_size * (k / (k + jnp.maximum(visits, 1) - 1)) ** config.decay_power


def _learn(state: State, row_and_table: tuple[_Row, jax.Array], *, config: Config):
    """One transition, every field a scalar, into one of the tables; also what the metrics need of it."""
    row, table = row_and_table
    place = (table, row.state, row.action)
    future = jnp.where(row.terminated, 0, _future(state, table, row, config))
    taken = state.q[place]
    error = jnp.where(row.counts, row.reward + config.discount * future - taken, 0)
    visits = state.visits.at[place].add(row.counts.astype(jnp.int32))
    alpha = step_size(visits[place], config).astype(taken.dtype)
    if config.method == "q_lambda":
        q, trace = _along_trace(state, visits, row, error, config)
    else:
        q, trace = state.q.at[place].add(alpha * error), state.trace
    step = {"td/error": jnp.abs(error), "q/taken": taken, "step_size/mean": alpha}
    step = {name: jnp.where(row.counts, x, 0) for name, x in step.items()}
    return State(q, visits, trace, state.step), step


def _along_trace(state: State, visits: jax.Array, row: _Row, error: jax.Array, config: Config):
    """The table moved wherever there is a trace, and the traces of the next step."""
    visited = state.trace.at[row.state, row.action]
    visited = visited.set(1) if config.replacing_traces else visited.add(1)
    q = state.q[0]
    ends = row.terminated | row.truncated
    if config.cut_traces:
        ends |= q[row.next_state, row.next_action] < jnp.max(q[row.next_state])
    trace = jnp.where(ends, 0, config.discount * config.lam * visited)
    moved = q + step_size(visits[0], config) * error * visited
    return moved.astype(q.dtype)[None], jnp.where(row.counts, trace, state.trace).astype(q.dtype)


def _future(state: State, table: jax.Array, row: _Row, config: Config) -> jax.Array:
    """What the next state is worth, by the method."""
    next_q = state.q[table, row.next_state]
    if config.method == "sarsa":
        return next_q[row.next_action]
    if config.method == "expected_sarsa":
        return jnp.sum(epsilon_greedy_probabilities(next_q, config.epsilon) * next_q)
    if config.method == "double_q":
        return state.q[1 - table, row.next_state, jnp.argmax(next_q)]
    return jnp.max(next_q)


def _clean(batch: Transition, shape: tuple[int, ...], config: Config) -> tuple[_Row, jax.Array]:
    """The batch with every field given, zeros where nothing counts, and how many were bad input."""
    _check(batch, config)
    _, states, actions = shape
    off, zero = jnp.zeros(batch.state.shape, bool), jnp.zeros(batch.state.shape, jnp.int32)
    given = ~off if batch.mask is None else batch.mask.astype(bool)
    next_action = batch.next_action if config.method in NEED_NEXT_ACTION else None
    next_action = zero if next_action is None else next_action
    terminated = batch.terminated.astype(bool)
    # What follows a terminated episode is not read, and may hold anything.
    next_state, next_action = (jnp.where(terminated, 0, x) for x in (batch.next_state, next_action))
    valid = jnp.isfinite(batch.reward)
    for index in (batch.state, next_state):
        valid &= (index >= 0) & (index < states)
    for index in (batch.action, next_action):
        valid &= (index >= 0) & (index < actions)
    counts = given & valid
    rows = _Row(
        jnp.where(counts, batch.state, 0),
        jnp.where(counts, batch.action, 0),
        jnp.where(counts, batch.reward, 0),
        jnp.where(counts, next_state, 0),
        terminated,
        off if batch.truncated is None else batch.truncated.astype(bool),
        jnp.where(counts, next_action, 0),
        counts,
    )
    return rows, jnp.sum(given & ~valid, dtype=jnp.float32)


def _check(batch: Transition, config: Config) -> None:
    """Raises ValueError or TypeError that names the field of the batch that does not fit."""
    if batch.next_action is None and config.method in NEED_NEXT_ACTION:
        raise ValueError(f'method="{config.method}" needs batch.next_action, the action taken in next_state')
    for name, x in batch._asdict().items():
        if x is None:
            continue
        if x.ndim != 1 or x.shape != batch.state.shape:
            raise ValueError(f"batch.{name} must be [N] = {batch.state.shape[:1]}, got shape {x.shape}")
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        if is_float != (name == "reward"):
            kind = "float" if name == "reward" else "bool" if name in _FLAGS else "integer"
            raise TypeError(f"batch.{name} must be {kind}, got {x.dtype}")
