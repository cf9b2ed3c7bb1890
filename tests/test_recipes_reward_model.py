"""Reward models of steps and ensembles of reward models on a small language model, rewards made of them, and
what is reported of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax import rewards
from rlhfjax.algorithms import reward_model
from rlhfjax.config import Decoder, RewardModel
from rlhfjax.data import batch_indices
from rlhfjax.networks import Branches, decoder
from rlhfjax.ops import end_of_sequence_reward
from rlhfjax.recipes import (
    init_reward_ensemble,
    init_reward_model,
    make_process_reward_model,
    make_reward_model,
)
from rlhfjax.report import accuracy_by_margin, wilson_interval

CONFIG = Decoder(
    vocab_size=16, width=8, layers=1, heads=2, kv_heads=1, head_size=4, mlp_width=12, max_positions=16
)
LM = decoder(CONFIG)
PROMPTS, SAMPLES, LENGTH, MEMBERS = 4, 2, 5, 3
SEPARATOR = 2
TRUNK = jax.jit(LM.init)(jax.random.key(0))
PARAMS = init_reward_model(jax.random.key(1), TRUNK, CONFIG.width)
score_whole = jax.jit(make_reward_model(LM))
score_tokens = jax.jit(make_process_reward_model(LM))


@pytest.fixture(scope="module")
def branches():
    generator = np.random.default_rng(0)
    length = generator.integers(1, LENGTH + 1, size=(PROMPTS, SAMPLES))
    mask = np.arange(LENGTH)[None, None] < length[:, :, None]
    token = generator.integers(3, CONFIG.vocab_size, size=(PROMPTS, SAMPLES, LENGTH))
    prompt = generator.integers(3, CONFIG.vocab_size, size=(PROMPTS, 3))
    return Branches(jnp.asarray(prompt), jnp.ones((PROMPTS, 3), bool), jnp.asarray(token), jnp.asarray(mask))


def test_the_logit_of_a_token_is_the_score_of_what_ends_there(branches):
    """The head of every token, against the reward model of whole completions on each beginning."""
    params = PARAMS | {"gain": jnp.float32(1.5), "bias": jnp.float32(-0.7)}
    logit = np.asarray(score_tokens(params, branches))
    assert logit.shape == branches.completion_BGC.shape and logit.dtype == np.float32
    for end in range(LENGTH):
        short = branches._replace(
            completion_mask_BGC=branches.completion_mask_BGC & (jnp.arange(LENGTH) <= end)[None, None]
        )
        here = np.asarray(branches.completion_mask_BGC)[:, :, end]
        whole = np.asarray(score_whole(params, short))
        np.testing.assert_allclose(logit[:, :, end][here], whole[here], atol=2e-5)


def test_padding_changes_no_logit(branches):
    wider = Branches(
        *(jnp.pad(x, ((0, 0), (3, 0))) for x in branches[:2]),
        *(jnp.pad(x, ((0, 0), (0, 0), (0, 2))) for x in branches[2:]),
    )
    mask, wide_mask = np.asarray(branches.completion_mask_BGC), np.asarray(wider.completion_mask_BGC)
    got, expected = score_tokens(PARAMS, wider), score_tokens(PARAMS, branches)
    np.testing.assert_allclose(np.asarray(got)[wide_mask], np.asarray(expected)[mask], atol=2e-5)


def test_a_process_model_learns_which_steps_are_right(branches):
    """A step is right if it ends in an even token. 200 steps are enough to know all of them by heart."""
    label = (branches.completion_BGC % 2 == 0).astype(jnp.float32)
    batch = reward_model.Steps(branches, label, branches.completion_mask_BGC)
    made = reward_model.make(make_process_reward_model(LM), optax.adam(0.02), RewardModel())

    @jax.jit
    def train(state):
        keys = jax.random.split(jax.random.key(0), 200)
        return jax.lax.scan(lambda state, key: made.update(state, batch, key), state, keys)

    state, metrics = train(made.init(PARAMS))
    assert float(metrics["loss/total"][0]) > 0.5 and float(metrics["loss/total"][-1]) < 0.05
    assert float(metrics["step/accuracy"][-1]) == 1.0
    assert float(state.params["gain"]) == 1.0  # no gradient
    np.testing.assert_allclose(metrics["step/label"], label[branches.completion_mask_BGC].mean(), rtol=1e-5)


def test_an_ensemble_on_text_is_one_program(branches):
    """Heads drawn apart, data in different order; members stay what they would be alone."""
    params = init_reward_ensemble(jax.random.key(2), TRUNK, CONFIG.width, MEMBERS)
    evaluate = make_reward_model(LM)
    made = reward_model.ensemble(reward_model.make(evaluate, optax.sgd(0.1), RewardModel()), MEMBERS)
    label = jnp.ones((PROMPTS, 1))
    pairs = reward_model.Preference(
        branches, jnp.zeros((PROMPTS, 1), int), jnp.ones((PROMPTS, 1), int), label, label > 0
    )
    order = np.stack([batch_indices(seed, 0, 2, PROMPTS) for seed in range(MEMBERS)])  # [M, B]
    batches = jax.tree.map(lambda x: x[order], pairs)
    state, metrics = jax.jit(made.update)(made.init(params), batches, jax.random.key(0))
    assert metrics["loss/total"].shape == ()

    scores = jax.jit(rewards.ensemble_scores(evaluate))(state.params, branches)
    assert scores.shape == (MEMBERS, PROMPTS, SAMPLES)
    for m in range(MEMBERS):
        member = jax.tree.map(lambda x, m=m: x[m], state.params)
        np.testing.assert_allclose(scores[m], score_whole(member, branches), rtol=1e-4, atol=1e-5)
    heads = np.asarray(params["head"]["kernel"])
    assert np.abs(heads[0] - heads[1]).max() > 0.01
    combine = partial(rewards.mean_minus_std, penalty=0.5)
    reward = jax.jit(rewards.ensemble_reward(evaluate, combine))(state.params, branches)
    by_hand = np.asarray(scores, np.float64)
    np.testing.assert_allclose(reward, by_hand.mean(0) - 0.5 * by_hand.std(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(rewards.ensemble_reward(evaluate))(state.params, branches), by_hand.mean(0), atol=1e-5
    )


def test_combinations_by_hand():
    score = jnp.array([[1.0, -2.0], [4.0, -2.0], [1.0, -2.0]])
    np.testing.assert_allclose(rewards.ensemble_mean(score), [2.0, -2.0])
    np.testing.assert_allclose(rewards.ensemble_worst(score), [1.0, -2.0])
    np.testing.assert_allclose(rewards.ensemble_disagreement(score), [np.sqrt(2.0), 0.0], rtol=1e-6)
    np.testing.assert_allclose(rewards.mean_minus_variance(score, penalty=0.5), [1.0, -2.0], rtol=1e-6)
    np.testing.assert_allclose(
        rewards.mean_minus_std(score, penalty=2.0), [2.0 - 2.0 * np.sqrt(2.0), -2.0], rtol=1e-6
    )
    with pytest.raises(TypeError, match=r"scores of an ensemble must be float \[M, ...\], got int32"):
        rewards.ensemble_mean(jnp.ones((2, 2), jnp.int32))


def test_step_rewards_add_up_to_the_solutions_score():
    generator = np.random.default_rng(1)
    logit = generator.normal(size=(2, 2, 5))
    mask = np.array([[[0, 1, 0, 1, 0], [1, 1, 1, 1, 1]], [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]]) > 0
    given = jnp.asarray(np.where(mask, logit, np.nan), jnp.float32)
    reward, score, worst = (
        np.asarray(f(given, jnp.asarray(mask)))
        for f in (rewards.step_reward, rewards.solution_score, rewards.worst_step_score)
    )
    for place in np.ndindex(2, 2):
        logp = [np.log(1 / (1 + np.exp(-x))) for x in logit[place][mask[place]]]
        np.testing.assert_allclose(reward[place][mask[place]], logp, rtol=1e-5)
        np.testing.assert_allclose(score[place], sum(logp), rtol=1e-5)
        np.testing.assert_allclose(worst[place], min(logp, default=0.0), rtol=1e-5)
        assert (reward[place][~mask[place]] == 0).all()
    probability = rewards.step_reward(given, jnp.asarray(mask), of=jax.nn.sigmoid)
    np.testing.assert_allclose(np.asarray(probability)[mask], 1 / (1 + np.exp(-logit[mask])), rtol=1e-5)


def test_steps_end_at_separators_and_at_the_end():
    token = jnp.array([[3, 2, 4, 5, 2], [2, 2, 3, 2, 2], [3, 4, 5, 6, 7], [2, 2, 2, 2, 2]])
    length = jnp.array([4, 3, 5, 0])
    mask = jnp.arange(5)[None] < length[:, None]
    expected = [[0, 1, 0, 1, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(rewards.step_ends(token, mask, (SEPARATOR,)), np.array(expected) > 0)
    ends = rewards.step_ends(token, mask, ())
    np.testing.assert_array_equal(jnp.sum(ends, axis=1), [1, 1, 1, 0])


def test_the_reward_of_steps_fits_ppo(branches):
    """[B, G, C] float32 like `end_of_sequence_reward`; with one step, at the last token, it is the same."""
    logit = score_tokens(PARAMS, branches)
    ends = rewards.step_ends(branches.completion_BGC, branches.completion_mask_BGC, ())
    reward = rewards.step_reward(logit, ends)
    expected = end_of_sequence_reward(
        rewards.solution_score(logit, ends),
        branches.completion_mask_BGC,
        finished=jnp.ones((PROMPTS, SAMPLES), bool),
    )
    np.testing.assert_allclose(reward, expected, rtol=1e-5)
    assert reward.dtype == jnp.float32 and reward.shape == branches.completion_BGC.shape


def test_accuracy_by_margin_equals_a_loop():
    generator = np.random.default_rng(2)
    margin = generator.choice([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0], size=60)
    difference = np.where(generator.uniform(size=60) < 0.1, 0.0, margin + generator.normal(0, 1.5, 60))
    bins = accuracy_by_margin(difference, margin, bins=12)
    assert [(b.low, b.high) for b in bins] == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]  # grades stay whole
    for found in bins:
        pairs = [(d, m) for d, m in zip(difference, margin, strict=True) if abs(m) == found.low]
        right = sum(0.5 if d == 0 else float((d > 0) == (m > 0)) for d, m in pairs)
        assert found.count == len(pairs)
        assert found.accuracy == wilson_interval(right, len(pairs))
    assert sum(b.count for b in accuracy_by_margin(difference, margin + 0.1, bins=4)) == 60


def test_bins_by_margin_hold_equal_numbers():
    margin = np.random.default_rng(3).normal(size=100)
    bins = accuracy_by_margin(margin, -margin, bins=4)
    assert [b.count for b in bins] == [25] * 4 and [b.accuracy.value for b in bins] == [0.0] * 4
    edges = [edge for b in bins for edge in (b.low, b.high)]
    assert edges == sorted(edges)
    for bad, why in (((margin, np.zeros(100)), "every margin is 0"), ((margin, margin[:3]), "margin 3")):
        with pytest.raises(ValueError, match=why):
            accuracy_by_margin(*bad)
    with pytest.raises(ValueError, match="bins must be at least 1"):
        accuracy_by_margin(margin, margin, bins=0)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"logit \(2, 3\) and mask \(3,\) must have one shape"):
        rewards.step_reward(jnp.zeros((2, 3)), jnp.ones(3, bool))
    with pytest.raises(TypeError, match="logit must be float, got int32"):
        rewards.solution_score(jnp.zeros(3, jnp.int32), jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"token \(2,\) and mask \(3,\)"):
        rewards.step_ends(jnp.zeros(2, int), jnp.ones(3, bool), ())
