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
POLICY = POLICY | {"embedding": POLICY["embedding"] * 20}
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
    return init_text_values(jax.random.key(1), LM, POLICY, separate_trunk=separate)


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
    branches = Branches(
        row.token_BN[:1, :1], row.mask_BN[:1, :1], row.token_BN[:1, None, 1:7], row.mask_BN[:1, None, 1:7]
    )
    of_row, of_branch = turn_states(LM, POLICY, row), branch_states(LM, POLICY, branches)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    compare(of_row.before[0, :6], of_branch.before[0, 0])
    compare(of_row.final[0], of_branch.final[0, 0])
    np.testing.assert_array_equal(of_row.token[0, :6], of_branch.token[0, 0])


@pytest.mark.parametrize("separate", [True, False], ids=["own trunk", "shared trunk"])
def test_values_are_those_of_all_arrays_at_once(separate):
    model, inputs = params(separate), episodes().inputs
    values = text_values(LM, cql_temperature=0.7, chunk_size=3)
    given: Any = values.evaluate(model, inputs)._asdict()
    trunk = model["value"].get("trunk", model["policy"])
    states, of_policy = turn_states(LM, trunk, inputs), turn_states(LM, POLICY, inputs)
    q = np.asarray(q_values(model["value"]["q"], states.before))

    def at_token(x):
        index = np.broadcast_to(np.asarray(states.token)[..., None], (*x.shape[:-1], 1))
        return np.take_along_axis(np.asarray(x), index, axis=-1)[..., 0]

    expected = {
        "taken": at_token(q),
        "log_softmax": at_token(jax.nn.log_softmax(jnp.asarray(q) / 0.7)),
        "value": state_value(model["value"]["v"], states.before),
        "final": state_value(model["value"]["v"], states.final),
        "logp": at_token(jax.nn.log_softmax(LM.logits(POLICY, of_policy.before))),
    }
    for name, x in expected.items():
        np.testing.assert_allclose(given[name], x, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("double", [True, False])
def test_the_best_token_is_chosen_by_the_one_and_valued_by_the_other(double):
    model, inputs = params(), episodes().inputs
    values = text_values(LM, double=double, chunk_size=3)
    target = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(4), x.shape), values.target_of(model)
    )
    given = values.evaluate_target(target, inputs, model)
    states = turn_states(LM, target["trunk"], inputs)
    chooser = turn_states(LM, model["value"]["trunk"], inputs)
    for hidden, chosen_by, best in (
        (states.before, chooser.before, given.best),
        (states.final, chooser.final, given.final),
    ):
        lowest = np.asarray(q_values(target["q"], hidden)).min(0)
        by = np.asarray(q_values(model["value"]["q"], chosen_by)).min(0) if double else lowest
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
    spoiled = longer._replace(
        inputs=longer.inputs._replace(token_BN=jnp.where(longer.inputs.mask_BN, longer.inputs.token_BN, -7)),
        reward=jnp.where(longer.mask, longer.reward, jnp.nan),
    )
    expected = gradient_of(bootstrap)(params(), episodes())
    assert_same(gradient_of(bootstrap, 2)(params(), spoiled), expected)


def test_the_environments_words_are_read_and_not_cloned():
    """They change the states, and their own log-probability is in no loss."""
    (_, sums), gradient = gradient_of()(params(), episodes())
    assert sums["count"] == 4
    assert float(jnp.max(jnp.abs(gradient["policy"]["embedding"]))) > 0
    other = episodes()
    token = other.inputs.token_BN.at[0, 4].set(7)  # one word of the environment, before the agent's last
    (_, changed), _ = gradient_of()(params(), other._replace(inputs=other.inputs._replace(token_BN=token)))
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
    start = init_text_values(jax.random.key(1), LM, POLICY, scale=0.0)
    state, metrics = run(algorithm.init(start))
    model = guided(LM, LM)

    def first_token(beta):
        given = guide_params(state.params, beta)
        one = jnp.zeros((1, 1), jnp.int32)
        hidden, _ = model.apply(given, one, position_BT=one, mask_BTS=jnp.ones((1, 1, 1), bool))
        return int(jnp.argmax(model.logits(given, hidden)[0, 0]))

    assert first_token(0.0) == 1
    assert first_token(8.0) == 2
    q_start = values.evaluate(state.params, batch.inputs).taken[:, :, 0]
    np.testing.assert_allclose(q_start[:, 0], 1.0, atol=0.3)
    np.testing.assert_allclose(q_start[:, -1], 2.0, atol=0.7)
    assert metrics["loss/policy"][-1] < 0.65  # the entropy of the player's choices, per token


# ---- the policy as Q


def branches(samples=3):
    prompt = jnp.asarray([[0, 3], [6, 7]], jnp.int32)
    token = jax.random.randint(jax.random.key(5), (2, samples, 4), 0, 9)
    length = jnp.asarray([[1, 4, 2], [3, 4, 1]])[:, :samples]
    mask = jnp.arange(4)[None, None] < length[..., None]
    return Branches(prompt, jnp.asarray([[False, True], [True, True]]), token, mask)


def test_soft_values_are_differences_of_normalisers():
    text = branches()
    episodes = rated_episodes(text, jnp.ones((2, 3)))
    batch = soft_batch(LM, POLICY, episodes, states=branch_states, chunk_size=5)
    tilted = POLICY | {"embedding": POLICY["embedding"] * 1.3}
    given = text_soft_q(LM, states=branch_states)(tilted, batch.inputs)
    logits, logits_ref = (LM.logits(p, branch_hidden(LM, p, text)[0]) for p in (tilted, POLICY))
    expected = jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(logits_ref, axis=-1)
    mask = np.asarray(batch.mask)
    np.testing.assert_allclose(given.log_partition[mask], expected[mask], rtol=1e-3, atol=1e-4)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), text.completion_BGC[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(given.logp[mask], logp[mask], rtol=1e-3, atol=1e-4)
    after = branch_hidden(LM, tilted, text)[1][0, 1, 3], branch_hidden(LM, POLICY, text)[1][0, 1, 3]
    normalisers = [jax.nn.logsumexp(LM.logits(p, h)) for p, h in zip((tilted, POLICY), after, strict=True)]
    assert given.final is not None
    np.testing.assert_allclose(given.final[0, 1], normalisers[0] - normalisers[1], rtol=1e-3, atol=1e-4)


def test_a_temperature_divides_the_logits_of_policy_and_reference():
    """At temperature T the soft values are those of embeddings divided by T, and so is the policy that is cloned."""
    text, tilted = branches(), POLICY | {"embedding": POLICY["embedding"] * 1.3}
    hidden, hidden_ref = (branch_hidden(LM, p, text)[0] for p in (tilted, POLICY))
    logits, logits_ref = LM.logits(tilted, hidden) / 0.7, LM.logits(POLICY, hidden_ref) / 0.7
    episodes = rated_episodes(text, jnp.ones((2, 3)))
    batch = soft_batch(LM, POLICY, episodes, states=branch_states, temperature=0.7)
    given = text_soft_q(LM, states=branch_states, temperature=0.7)(tilted, batch.inputs)
    values = text_values(LM, states=branch_states, temperature=0.7)
    cloned = values.evaluate(init_text_values(jax.random.key(1), LM, tilted), text).logp
    nothing: Any = None  # state and generation, which are not read
    as_batch = soft_q_batch(LM, temperature=0.7)
    on_policy = as_batch(nothing, Frozen(POLICY, None), text, nothing, jnp.ones((2, 3)))
    mask, token = np.asarray(batch.mask), text.completion_BGC[..., None]
    expected = jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(logits_ref, axis=-1)
    np.testing.assert_allclose(given.log_partition[mask], expected[mask], rtol=1e-3, atol=1e-4)
    logp, logp_ref = (
        jnp.take_along_axis(jax.nn.log_softmax(x), token, axis=-1)[..., 0][mask] for x in (logits, logits_ref)
    )
    for found, wanted in (
        (given.logp, logp),
        (cloned, logp),
        (batch.logp_ref, logp_ref),
        (on_policy.logp_ref, logp_ref),
    ):
        assert found is not None
        np.testing.assert_allclose(found[mask], wanted, rtol=1e-3, atol=1e-4)


def test_the_reference_is_the_optimum_of_no_reward():
    """The shift: with reward 0 a policy that starts as the reference has error 0 and V = 0 from the first step."""
    batch = soft_batch(LM, POLICY, rated_episodes(branches(), jnp.zeros((2, 3))), states=branch_states)
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
    algorithm = soft_q.make(text_soft_q(LM, states=branch_states), optax.adam(3e-3), config)
    loop = make_rlhf(LM, algorithm, soft_q_batch(LM), policy=lambda params: params, **options)
    iterate = jax.jit(loop.iterate)
    state, scores = algorithm.init(POLICY), []
    for key in jax.random.split(jax.random.key(0), 40):
        state, metrics, _ = iterate(state, Frozen(POLICY, None), prompts, key)
        scores.append(float(metrics["objective/score"]))
    assert np.mean(scores[-10:]) > np.mean(scores[:10]) + 0.1

    values = text_values(LM, states=branch_states)
    td = ilql.make(
        values.evaluate,
        optax.adam(1e-2),
        ILQL("sarsa", 1.0, lam=0.9, expectile=None, policy_coefficient=None),
        **values.target(),
    )
    loop = make_rlhf(LM, td, value_batch(), **options)
    before = td.init(params())
    after, metrics, _ = jax.jit(loop.iterate)(before, Frozen(POLICY, None), prompts, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, after.params["policy"], before.params["policy"])
    assert metrics["batch/count"] == 4 * 4 * 3 and np.isfinite(metrics["loss/q"])


# ---- cloning


def test_only_the_best_episodes_are_cloned():
    mask = jnp.asarray([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]], bool)
    reward = jnp.asarray(
        [[1.0, 1.0, 9.0], [2.0, 9.0, 1.0], [0.0, 1.0, 2.0], [jnp.nan, 9.0, 9.0], [0, 0, 1.0]]
    )
    rows = ilql.Episodes({}, jnp.where(mask, reward, jnp.nan).at[3, 0].set(jnp.nan), mask)
    for fraction, kept in ((0.2, [1]), (0.3, [1, 2]), (0.6, [0, 1, 2]), (1.0, [0, 1, 2, 4])):
        weight = cloned_episodes(rows, fraction).weight
        expected = np.where(np.isin(np.arange(5), kept)[:, None], mask, False)
        np.testing.assert_array_equal(weight, expected.astype(np.float32))
    with pytest.raises(ValueError, match="fraction=0.0 must lie"):
        cloned_episodes(rows, 0.0)


def test_cloning_turns_takes_the_agents_words_only():
    batch = cloned_episodes(episodes(), 0.5)
    total, sums = sft.loss(POLICY, batch, evaluate=text_logp(LM), config=SFT())
    states = turn_states(LM, POLICY, episodes().inputs)
    logp = np.asarray(jax.nn.log_softmax(LM.logits(POLICY, states.before)))
    expected = -sum(logp[0, t, int(states.token[0, t])] for t in (0, 1, 5))
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    assert sums["count"] == 3
