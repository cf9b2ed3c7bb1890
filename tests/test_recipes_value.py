"""Q-learning on text: what the recipes read off a language model against plain arrays, and a game in turns learnt."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.algorithms import ilql, sft, soft_q
from rlhfjax.config import ILQL, SFT, Decoder, SoftQ
from rlhfjax.generation import guided
from rlhfjax.networks import Branches, branch_hidden, decoder, q_values, state_value
from rlhfjax.recipes import (
    Frozen,
    Prompts,
    Turn,
    branch_states,
    cloned_episodes,
    guide_params,
    init_text_values,
    make_rlhf,
    rated_episodes,
    soft_batch,
    soft_q_batch,
    text_logp,
    text_soft_q,
    text_values,
    turn_episodes,
    turn_states,
    value_batch,
)

CONFIG = Decoder(
    vocab_size=9, width=8, layers=1, heads=2, kv_heads=2, head_size=4, mlp_width=12, max_positions=16
)
LM = decoder(CONFIG)
POLICY = jax.jit(LM.init)(jax.random.key(0))
POLICY = POLICY | {"embedding": jnp.asarray(np.asarray(POLICY["embedding"]) * 20)}
TILTED = POLICY | {"embedding": jnp.asarray(np.asarray(POLICY["embedding"]) * np.float32(1.3))}
SETTINGS = ILQL(discount=0.9, expectile=0.8, cql_coefficient=0.3, advantage_beta=0.5)
DIALOGUES = [
    [Turn([0], False), Turn([1, 2], True, -1.0), Turn([3, 4, 3], False), Turn([5], True, 2.0)],
    [Turn([0, 3], False), Turn([6], True, 0.5), Turn([4], False)],
]
LENGTH = 8


@functools.cache
def episodes(length=LENGTH):
    return turn_episodes(DIALOGUES, length, truncated=[False, True])


@functools.cache
def params(separate=True):
    init = functools.partial(init_text_values, lm=LM, separate_trunk=separate)
    return jax.jit(lambda key, policy: init(key, policy=policy))(jax.random.key(1), POLICY)


q_of, v_of = jax.jit(q_values), jax.jit(state_value)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - logsumexp(x)[..., None]


def logsumexp(x):
    x = np.asarray(x, np.float64)
    top = x.max(axis=-1)
    return top + np.log(np.exp(x - top[..., None]).sum(axis=-1))


@jax.jit
def turns_of(params, turns):
    """States of turns, and the logits where each token is chosen."""
    states = turn_states(LM, params, turns)
    return states, LM.logits(params, states.before)


@jax.jit
def texts_of(params, branches):
    """Logits before and after each token of branches."""
    before, after = branch_hidden(LM, params, branches)
    return LM.logits(params, before), LM.logits(params, after)


def test_turns_become_rows():
    """By hand: position t speaks of token t + 1, the reward of a turn is that of its last token."""
    rows = episodes()
    np.testing.assert_array_equal(rows.inputs.token_BN, [[0, 1, 2, 3, 4, 3, 5, 0], [0, 3, 6, 4, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.inputs.mask_BN.sum(axis=1), [7, 4])
    np.testing.assert_array_equal(rows.mask, [[1, 1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.reward, [[0, -1, 0, 0, 0, 2, 0], [0, 0.5, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.truncated, [False, True])


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([Turn([0, 1], False)], "episode 0 has no token of the agent"),
        ([Turn([1], True), Turn([0], False)], "episode 0 begins with a token of the agent"),
        ([Turn([0] * 8, False), Turn([1], True)], "episode 0 is longer than length=8"),
        ([Turn([0], False, 1.0), Turn([1], True)], "a reward of 1.0 at a turn without a token of the agent"),
        ([Turn([0], False), Turn([], True, 1.0)], "a reward of 1.0 at a turn without a token of the agent"),
        ([], "no token of the agent"),
    ],
)
def test_dialogues_that_teach_nothing_are_refused(turns, told):
    with pytest.raises(ValueError, match=told):
        turn_episodes([turns], LENGTH)


def test_a_row_of_turns_and_a_branch_have_the_same_states():
    row = episodes().inputs
    token_BN, mask_BN = np.asarray(row.token_BN), np.asarray(row.mask_BN)
    parts = token_BN[:1, :1], mask_BN[:1, :1], token_BN[:1, None, 1:7], mask_BN[:1, None, 1:7]
    branches = Branches(*map(jnp.asarray, parts))
    of_row = jax.tree.map(np.asarray, turns_of(POLICY, row)[0])
    found = jax.jit(functools.partial(branch_states, LM))(POLICY, branches)
    of_branch = jax.tree.map(np.asarray, found)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    compare(of_row.before[0, :6], of_branch.before[0, 0])
    compare(of_row.final[0], of_branch.final[0, 0])
    np.testing.assert_array_equal(of_row.token[0, :6], of_branch.token[0, 0])


@pytest.mark.parametrize("separate", [True, False], ids=["own trunk", "shared trunk"])
def test_values_are_those_of_all_arrays_at_once(separate):
    model, inputs = params(separate), episodes().inputs
    values = text_values(LM, cql_temperature=0.7, chunk_size=3)
    given: Any = jax.jit(values.evaluate)(model, inputs)._asdict()
    trunk = model["value"].get("trunk", model["policy"])
    (states, _), (_, logits) = turns_of(trunk, inputs), turns_of(POLICY, inputs)
    q, value = np.asarray(q_of(model["value"]["q"], states.before)), model["value"]["v"]

    def at_token(x):
        index = np.broadcast_to(np.asarray(states.token)[..., None], (*x.shape[:-1], 1))
        return np.take_along_axis(x, index, axis=-1)[..., 0]

    expected = {
        "taken": at_token(q),
        "log_softmax": at_token(log_softmax(q / 0.7)),
        "value": v_of(value, states.before),
        "final": v_of(value, states.final),
        "logp": at_token(log_softmax(logits)),
    }
    for name, x in expected.items():
        np.testing.assert_allclose(given[name], x, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("double", [True, False])
def test_the_best_token_is_chosen_by_the_one_and_valued_by_the_other(double):
    model, inputs = params(), episodes().inputs
    values = text_values(LM, double=double, chunk_size=3)
    generator = np.random.default_rng(4)

    def moved(x):
        return jnp.asarray(np.asarray(x) + 0.3 * generator.normal(size=x.shape).astype(np.float32))

    target = jax.tree.map(moved, values.target_of(model))
    given = jax.jit(values.evaluate_target)(target, inputs, model)
    states, _ = turns_of(target["trunk"], inputs)
    chooser, _ = turns_of(model["value"]["trunk"], inputs)
    for hidden, chosen_by, best in (
        (states.before, chooser.before, given.best),
        (states.final, chooser.final, given.final),
    ):
        lowest = np.asarray(q_of(target["q"], hidden)).min(0)
        by = np.asarray(q_of(model["value"]["q"], chosen_by)).min(0) if double else lowest
        expected = np.take_along_axis(lowest, by.argmax(-1)[..., None], axis=-1)[..., 0]
        np.testing.assert_allclose(np.asarray(best), expected, rtol=1e-4, atol=1e-5)


@functools.cache
def gradient_of(bootstrap="value", chunk_size=None):
    values = text_values(LM, chunk_size=chunk_size)
    config = ILQL(bootstrap, 0.9, expectile=0.8, cql_coefficient=0.3, advantage_beta=0.5)

    def loss(model, batch):
        return ilql.loss(
            model,
            batch,
            target=values.target_of(model),
            evaluate=values.evaluate,
            config=config,
            evaluate_target=values.evaluate_target,
        )

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def assert_same(given, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), given, expected)


@pytest.mark.parametrize("bootstrap", ["value", "max"])
def test_padding_and_chunks_move_neither_value_nor_gradient(bootstrap):
    """Longer rows, with anything in their padding, whose vocabulary is taken two positions at a time."""
    longer = episodes(LENGTH + 4)
    token_BN = np.where(longer.inputs.mask_BN, longer.inputs.token_BN, np.int32(-7))
    spoiled = longer._replace(
        inputs=longer.inputs._replace(token_BN=jnp.asarray(token_BN)),
        reward=jnp.asarray(np.where(longer.mask, longer.reward, np.float32(np.nan))),
    )
    expected = gradient_of(bootstrap)(params(), episodes())
    assert_same(gradient_of(bootstrap, 2)(params(), spoiled), expected)


def test_the_environments_words_are_read_and_not_cloned():
    """They change the states, and their own log-probability is in no loss."""
    (_, sums), gradient = gradient_of()(params(), episodes())
    assert sums["count"] == 4
    assert np.abs(gradient["policy"]["embedding"]).max() > 0
    other = episodes()
    token = np.array(other.inputs.token_BN)
    token[0, 4] = 7  # one word of the environment, before the agent's last
    inputs = other.inputs._replace(token_BN=jnp.asarray(token))
    (_, changed), _ = gradient_of()(params(), other._replace(inputs=inputs))
    assert abs(changed["value/mean"] - sums["value/mean"]) > 1e-3


def test_a_game_in_turns_is_won_by_q_learning_and_lost_by_cloning():
    """Doors 1 and 2; behind them the environment says 3 or 4, and the agent 5 or 6.

    The data's player opens door 1 four times in five, for a small reward at once. Door 2 costs, and what it leads to
    is worth more only if the agent then says 6, as the player does every other time.
    """
    games = []
    for door, word, reward, count in ((1, 5, 0.0, 4), (1, 6, 0.0, 4), (2, 5, 0.0, 1), (2, 6, 3.0, 1)):
        game = [Turn([0], False), Turn([door], True, 1.0 if door == 1 else -0.5)]
        games += [[*game, Turn([2 + door], False), Turn([word], True, reward)]] * count
    batch = turn_episodes(games, 4)
    values = text_values(LM)
    config = ILQL(discount=1.0, expectile=0.9, cql_coefficient=None, polyak=0.1)
    algorithm = ilql.make(values.evaluate, optax.adam(1e-2), config, **values.target())

    def step(state, key):
        return algorithm.update(state, batch, key)

    run = jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(0), 500)))
    # Heads that begin at 0: words that the data do not hold keep that value.
    start = jax.jit(lambda key, policy: init_text_values(key, LM, policy, scale=0.0))(
        jax.random.key(1), POLICY
    )
    state, metrics = run(jax.jit(algorithm.init)(start))
    model = guided(LM, LM)

    @jax.jit
    def first_token(params, beta):
        given = guide_params(params, beta)
        one = jnp.zeros((1, 1), jnp.int32)
        hidden, _ = model.apply(given, one, position_BT=one, mask_BTS=jnp.ones((1, 1, 1), bool))
        return jnp.argmax(model.logits(given, hidden)[0, 0])

    assert first_token(state.params, 0.0) == 1
    assert first_token(state.params, 8.0) == 2
    q_start = np.asarray(jax.jit(values.evaluate)(state.params, batch.inputs).taken)[:, :, 0]
    np.testing.assert_allclose(q_start[:, 0], 1.0, atol=0.3)
    np.testing.assert_allclose(q_start[:, -1], 2.0, atol=0.7)
    assert np.asarray(metrics["loss/policy"])[-1] < 0.65  # the entropy of the player's choices, per token


# ---- the policy as Q


def branches(samples=3):
    prompt = np.asarray([[0, 3], [6, 7]], np.int32)
    token = np.random.default_rng(5).integers(9, size=(2, samples, 4)).astype(np.int32)
    length = np.asarray([[1, 4, 2], [3, 4, 1]])[:, :samples]
    mask = np.arange(4)[None, None] < length[..., None]
    return Branches(*map(jnp.asarray, (prompt, np.asarray([[False, True], [True, True]]), token, mask)))


@functools.cache
def soft_batches(temperature=1.0, chunk_size=None):
    """The batch of `soft_q` of rated branches, and what its `evaluate` gives of it, compiled."""

    def make(reference, params, text, score_BG):
        episodes = rated_episodes(text, score_BG)
        options = {"states": branch_states, "temperature": temperature}
        batch = soft_batch(LM, reference, episodes, **options, chunk_size=chunk_size)
        return batch, text_soft_q(LM, **options)(params, batch.inputs)

    return jax.jit(make)


def at(x, token):
    """The entries of x [..., V] at the tokens."""
    return np.take_along_axis(np.asarray(x), np.asarray(token)[..., None], axis=-1)[..., 0]


def test_soft_values_are_differences_of_normalisers():
    text, score_BG = branches(), np.ones((2, 3), np.float32)
    batch, given = soft_batches(chunk_size=5)(POLICY, TILTED, text, score_BG)
    (logits, after), (logits_ref, after_ref) = texts_of(TILTED, text), texts_of(POLICY, text)
    expected = logsumexp(logits) - logsumexp(logits_ref)
    mask = np.asarray(batch.mask)
    np.testing.assert_allclose(np.asarray(given.log_partition)[mask], expected[mask], rtol=1e-3, atol=1e-4)
    logp = at(log_softmax(logits), text.completion_BGC)
    np.testing.assert_allclose(np.asarray(given.logp)[mask], logp[mask], rtol=1e-3, atol=1e-4)
    last = (logsumexp(after) - logsumexp(after_ref))[0, 1, 3]
    assert given.final is not None
    np.testing.assert_allclose(np.asarray(given.final)[0, 1], last, rtol=1e-3, atol=1e-4)


def test_a_temperature_divides_the_logits_of_policy_and_reference():
    """At temperature T the soft values are those of embeddings divided by T, and so is the policy that is cloned."""
    text, score_BG = branches(), np.ones((2, 3), np.float32)
    logits, logits_ref = (np.asarray(texts_of(p, text)[0], np.float64) / 0.7 for p in (TILTED, POLICY))
    batch, given = soft_batches(0.7)(POLICY, TILTED, text, score_BG)
    values = text_values(LM, states=branch_states, temperature=0.7)
    as_batch = soft_q_batch(LM, temperature=0.7)
    nothing: Any = None  # state and generation, which are not read

    @jax.jit
    def others(key, reference, params, text, score_BG):
        cloned = values.evaluate(init_text_values(key, LM, params), text).logp
        return cloned, as_batch(nothing, Frozen(reference, None), text, nothing, score_BG).logp_ref

    cloned, on_policy = others(jax.random.key(1), POLICY, TILTED, text, score_BG)
    mask, token = np.asarray(batch.mask), text.completion_BGC
    expected = logsumexp(logits) - logsumexp(logits_ref)
    np.testing.assert_allclose(np.asarray(given.log_partition)[mask], expected[mask], rtol=1e-3, atol=1e-4)
    logp, logp_ref = (at(log_softmax(x), token)[mask] for x in (logits, logits_ref))
    for found, wanted in (
        (given.logp, logp),
        (cloned, logp),
        (batch.logp_ref, logp_ref),
        (on_policy, logp_ref),
    ):
        assert found is not None
        np.testing.assert_allclose(np.asarray(found)[mask], wanted, rtol=1e-3, atol=1e-4)


def test_the_reference_is_the_optimum_of_no_reward():
    """The shift: with reward 0 a policy that starts as the reference has error 0 and V = 0 from the first step."""
    batch, _ = soft_batches()(POLICY, POLICY, branches(), np.zeros((2, 3), np.float32))
    loss = functools.partial(
        soft_q.loss, evaluate=text_soft_q(LM, states=branch_states), config=SoftQ(steps=(1, 0))
    )
    total, sums = jax.jit(loss)(POLICY, batch)
    assert total < 1e-8 and abs(sums["value/mean"]) < 1e-4


def test_on_policy_iterations_run_through_the_same_loop():
    """Rewarded for token 5, the policy says it more often, by `soft_q`; values are learnt beside it, by `ilql`."""

    def reward(params, branches):
        return jnp.mean(jnp.where(branches.completion_BGC == 5, 1.0, 0.0), axis=2)

    prompts = Prompts(jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1), bool), jnp.arange(4))
    options = {"reward": reward, "samples": 4, "max_new_tokens": 3, "stop_tokens": ()}
    config = SoftQ(beta=0.1, steps=(0,))
    algorithm = soft_q.make(text_soft_q(LM, states=branch_states), optax.adam(1e-2), config)
    loop = make_rlhf(LM, algorithm, soft_q_batch(LM), policy=lambda params: params, **options)
    iterate = jax.jit(loop.iterate)
    state, scores = jax.jit(algorithm.init)(POLICY), []
    for i in range(60):
        state, metrics, _ = iterate(state, Frozen(POLICY, None), prompts, jax.random.key(i))
        scores.append(float(metrics["objective/score"]))
    assert np.mean(scores[-10:]) > np.mean(scores[:10]) + 0.3

    values = text_values(LM, states=branch_states)
    td = ilql.make(
        values.evaluate,
        optax.adam(1e-2),
        ILQL("sarsa", 1.0, lam=0.9, expectile=None, policy_coefficient=None),
        **values.target(),
    )
    loop = make_rlhf(LM, td, value_batch(), **options)
    before = jax.jit(td.init)(params())
    after, metrics, _ = jax.jit(loop.iterate)(before, Frozen(POLICY, None), prompts, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, after.params["policy"], before.params["policy"])
    assert metrics["batch/count"] == 4 * 4 * 3 and np.isfinite(metrics["loss/q"])


# ---- cloning


def test_only_the_best_episodes_are_cloned():
    mask = np.asarray([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]], bool)
    reward = np.asarray(
        [[1.0, 1.0, 9.0], [2.0, 9.0, 1.0], [0.0, 1.0, 2.0], [np.nan, 9.0, 9.0], [0, 0, 1.0]], np.float32
    )
    reward = np.where(mask, reward, np.float32(np.nan))
    rows = ilql.Episodes({}, jnp.asarray(reward), jnp.asarray(mask))
    for fraction, kept in ((0.2, [1]), (0.3, [1, 2]), (0.6, [0, 1, 2]), (1.0, [0, 1, 2, 4])):
        weight = jax.jit(cloned_episodes, static_argnums=1)(rows, fraction).weight
        expected = np.where(np.isin(np.arange(5), kept)[:, None], mask, False)
        np.testing.assert_array_equal(weight, expected.astype(np.float32))
    with pytest.raises(ValueError, match="fraction=0.0 must lie"):
        cloned_episodes(rows, 0.0)


def test_cloning_turns_takes_the_agents_words_only():
    @jax.jit
    def loss(params, episodes):
        return sft.loss(params, cloned_episodes(episodes, 0.5), evaluate=text_logp(LM), config=SFT())

    total, sums = loss(POLICY, episodes())
    states, logits = turns_of(POLICY, episodes().inputs)
    logp, token = log_softmax(logits), np.asarray(states.token)
    expected = -sum(logp[0, t, token[0, t]] for t in (0, 1, 5))
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    assert sums["count"] == 3
