"""Control from preferences, against loops and float64 NumPy: segments, labeller, loss, bootstrap, disagreement,
normaliser, schedule; and whole runs: padding, resuming, seeds."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.config import MLP, ControlPPO, ControlPreferences, Labeller, Optimizer, SegmentReward
from rlhfjax.environments import Trajectory, cart_pole, frozen_lake
from rlhfjax.ops import bradley_terry_loss
from rlhfjax.recipes.control import control_preferences, learned_reward, rounds_of, train
from rlhfjax.recipes.control.preferences import choose_queries, labels_due
from rlhfjax.recipes.control.segment_rewards import (
    Labels,
    adapted_l2,
    add_labels,
    bootstrap_weights,
    disagreement,
    empty_labels,
    normaliser,
    preference_loss,
    reward_learner,
)
from rlhfjax.recipes.control.segments import Segments, answer_probabilities, answers, cut_segments

KEY = jax.random.key(3)
LAKE = frozen_lake(slippery=False)
STATES = 16
LENGTH = 5
LEARNER = SegmentReward(
    network=MLP(hidden=(16,)), optimizer=Optimizer(learning_rate=0.02, schedule="constant"), updates=60
)
SMALL = ControlPreferences(
    ppo=ControlPPO(environment_steps=256, worlds=4, steps=16, network=MLP(hidden=(8,))),
    iterations=2,
    segment=6,
    labels=6,
    queries=4,
    candidates=8,
    reward=SegmentReward(updates=3, batch=4, network=MLP(hidden=(8,))),
)


# ---- segments

cut = jax.jit(cut_segments, static_argnames=("count", "length"))


def made_up(steps: int, worlds: int, ends: float = 0.25) -> Trajectory:
    """Steps whose observations are their own numbers; episodes end in both ways, at times in both at once."""
    generator = np.random.default_rng(5)
    number = jnp.arange(steps * worlds, dtype=jnp.int32).reshape(steps, worlds)
    terminated, truncated = (jnp.asarray(generator.random((steps, worlds)) < p) for p in (ends, ends / 3))
    reward = jnp.asarray(generator.normal(size=(steps, worlds)), jnp.float32)
    return Trajectory(number, number + 1000, reward, terminated, truncated, number)


def windows_by_loop(trajectory: Trajectory, length: int) -> dict[int, tuple[list[int], float]]:
    """First observation -> observations of the segment, and its true return; cut ones are left out."""
    observation, reward, terminated, truncated = map(
        np.asarray, (trajectory.observation, trajectory.reward, trajectory.terminated, trajectory.truncated)
    )
    found = {}
    for t in range(len(reward) - length + 1):
        for b in range(reward.shape[1]):
            seen, total, cut = [], 0.0, False
            for i in range(t, t + length):
                seen.append(int(observation[i, b]))
                total += float(reward[i, b])
                if terminated[i, b]:
                    break
                cut = cut or bool(truncated[i, b])
            if not cut:
                found[int(observation[t, b])] = (seen, total)
    return found


def test_segments_are_those_of_the_loop():
    trajectory = made_up(12, 3)
    expected = windows_by_loop(trajectory, LENGTH)
    segments, return_N = cut(KEY, trajectory, count=600, length=LENGTH)
    assert {len(seen) for seen, _ in expected.values()} == {1, 2, 3, 4, 5}
    assert {int(x) for x in segments.observation[:, 0]} == set(expected)  # all of them, and no other
    for i, (row, mask) in enumerate(
        zip(np.asarray(segments.observation), np.asarray(segments.mask), strict=True)
    ):
        seen, total = expected[int(row[0])]
        np.testing.assert_array_equal(row[mask], seen)
        np.testing.assert_allclose(return_N[i], total, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(segments.action, segments.observation + 1000)


def test_where_every_place_is_cut_off_there_is_no_segment():
    trajectory = made_up(12, 3)._replace(
        terminated=jnp.zeros((12, 3), bool), truncated=jnp.ones((12, 3), bool)
    )
    segments, return_N = cut(KEY, trajectory, count=600, length=LENGTH)
    assert not np.asarray(segments.mask).any() and not np.asarray(return_N).any()
    # One that terminates first is whole, though it is said to be truncated too.
    whole, _ = cut(KEY, trajectory._replace(terminated=trajectory.truncated), count=600, length=LENGTH)
    np.testing.assert_array_equal(whole.mask, [[True] + [False] * 4] * 600)


def test_a_segment_longer_than_the_trajectory_is_refused():
    with pytest.raises(ValueError, match="segment of 7 steps cannot be cut from a trajectory of 6"):
        cut_segments(KEY, made_up(6, 2), count=1, length=7)


# ---- the labeller


def test_probabilities_of_answers():
    """By hand: the larger return; sigmoid(1 / 2) = 0.6224593; a coin in a tenth of the answers."""
    first, second = jnp.array([2.0, 1.0, 1.5]), jnp.array([1.0, 2.0, 1.5])
    for labeller, p_first, p_equal in (
        (Labeller(), [1, 0, 0], [0, 0, 1]),
        (Labeller(tie=1.0), [0, 0, 0], [1, 1, 1]),
        (Labeller(tie=-1.0), [1, 0, 0.5], [0, 0, 0]),
        (Labeller(temperature=2.0), [0.6224593, 0.3775407, 0], [0, 0, 1]),
        (Labeller(random=0.1), [0.95, 0.05, 0.05], [0, 0, 0.9]),
        (Labeller(temperature=2.0, random=0.1), [0.6102134, 0.3897866, 0.05], [0, 0, 0.9]),
    ):
        got = answer_probabilities(first, second, labeller)
        np.testing.assert_allclose(got[0], p_first, atol=1e-6)
        np.testing.assert_allclose(got[1], p_equal, atol=1e-6)


def test_answers_are_drawn_with_their_probabilities():
    labeller = Labeller(temperature=2.0, random=0.1)
    first, second = (jnp.repeat(jnp.array(x), 20_000) for x in ([2.0, 1.5], [1.0, 1.5]))
    said = np.asarray(jax.jit(lambda a, b: answers(KEY, a, b, labeller))(first, second)).reshape(2, -1)
    shares = [[np.mean(row == x) for x in (1.0, 0.5, 0.0)] for row in said]
    np.testing.assert_allclose(shares, [[0.610, 0.0, 0.390], [0.05, 0.9, 0.05]], atol=0.012)


@pytest.mark.parametrize(
    ("labeller", "message"),
    [
        (Labeller(temperature=-1.0), "labeller.temperature=-1.0"),
        (Labeller(random=1.5), "labeller.random=1.5"),
        (Labeller(random=math.nan), "labeller.random=nan"),
    ],
)
def test_a_labeller_out_of_range_is_refused(labeller, message):
    with pytest.raises(ValueError, match=message):
        answer_probabilities(jnp.zeros(1), jnp.zeros(1), labeller)


# ---- the loss


def loss_in_float64(first, second, label, error):
    p = (1 - error) / (1 + np.exp(-(first - second))) + error / 2
    return -label * np.log(p) - (1 - label) * np.log(1 - p)


def test_loss_and_gradient_equal_float64():
    generator = np.random.default_rng(0)
    first, second = generator.normal(scale=4, size=(2, 40))
    label = generator.choice([0.0, 0.5, 1.0], size=40)
    small = 1e-6
    one = jax.value_and_grad(lambda a, b, m, e: preference_loss(a, b, m, error=e))
    every = jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None)))
    inputs = [jnp.asarray(x, jnp.float32) for x in (first, second, label)]
    for error in (0.02, 0.1, 0.5):
        got, slope = every(*inputs, error)
        np.testing.assert_allclose(got, loss_in_float64(first, second, label, error), rtol=2e-5, atol=1e-6)
        up, down = (loss_in_float64(first + e, second, label, error) for e in (small, -small))
        np.testing.assert_allclose(slope, (up - down) / (2 * small), rtol=2e-4, atol=2e-6)


def test_without_error_the_loss_is_bradley_and_terrys_and_bounded_with_it():
    first, second, label = jnp.array([3.0, -1.0, 2.0]), jnp.array([1.0, 4.0, 2.0]), jnp.array([1.0, 1.0, 0.5])
    expected = bradley_terry_loss(first, second, label=label)
    np.testing.assert_allclose(preference_loss(first, second, label, error=0.0), expected, rtol=1e-6)
    sure = preference_loss(jnp.float32(-1e4), jnp.float32(0.0), jnp.float32(1.0), error=0.1)
    assert float(sure) == pytest.approx(-math.log(0.05), rel=1e-6)


# ---- bootstrap, disagreement, queries


def test_bootstrap_weights_are_poisson():
    weights = np.asarray(bootstrap_weights(KEY, (20_000, 2)))
    shares = [(weights == k).mean(axis=0) for k in range(5)]
    expected = [math.exp(-1) / math.factorial(k) for k in range(5)]
    np.testing.assert_allclose(shares, np.stack([expected, expected], axis=1), atol=0.012)
    assert abs(np.corrcoef(weights.T)[0, 1]) < 0.03  # each member's own


def test_disagreement_is_the_variance_of_what_members_predict():
    """Pair 0: all sure of the same. Pair 1: one against one. Pair 2: scores differ, but predictions hardly do."""
    first = jnp.array([[9.0, 9.0, 30.0], [9.0, -9.0, 9.0]])
    got = np.asarray(disagreement(first, jnp.zeros_like(first)))
    p = 1 / (1 + np.exp(-np.asarray(first, np.float64)))
    np.testing.assert_allclose(got, ((p - p.mean(axis=0)) ** 2).mean(axis=0), atol=1e-6)
    assert got.argmax() == 1 and got[1] == pytest.approx(0.25, abs=1e-3)


def test_queries_are_those_disagreed_on_most_or_random_ones():
    doubt = jnp.array([0.0, 0.2, 0.1, 0.25, 0.05, 9.0, 9.0, 9.0])  # five candidates, three for random queries
    np.testing.assert_array_equal(choose_queries(KEY, doubt, 3, 0.0), [3, 1, 2])
    np.testing.assert_array_equal(choose_queries(KEY, doubt, 3, 1.0), [5, 6, 7])
    many = jax.jit(jax.vmap(lambda key: choose_queries(key, doubt, 3, 0.3)))
    mixed = many(jax.random.split(KEY, 2000))
    assert abs(float(jnp.mean(mixed >= 5)) - 0.3) < 0.03


def test_labels_are_added_behind_the_others_and_the_rest_is_left_out():
    def some(count, offered, value):
        labels = empty_labels(offered, 2, 2, jnp.zeros((), jnp.int32))
        return labels._replace(label_N=jnp.full(offered, value), count=jnp.int32(count))

    labels = add_labels(add_labels(some(0, 5, 0.0), some(2, 3, 1.0)), some(1, 3, 0.5))
    np.testing.assert_array_equal(labels.label_N, [1.0, 1.0, 0.5, 0.0, 0.0])
    full = add_labels(labels, some(3, 3, 0.25))
    np.testing.assert_array_equal(full.label_N, [1.0, 1.0, 0.5, 0.25, 0.25])
    assert (int(labels.count), int(full.count)) == (3, 5)


def test_the_schedule_asks_a_share_at_once_and_ever_fewer_then():
    due = np.asarray(jax.jit(lambda i: labels_due(i, 1000, 11, 0.25))(jnp.arange(11)))
    # The integral of 1 / (10 + i) over rounds, as a share of that to the end.
    expected = [250 + 750 * math.log((10 + i) / 10) / math.log(2) for i in range(11)]
    np.testing.assert_allclose(due, expected, atol=0.51)
    assert due[0] == 250 and due[-1] == 1000
    assert (np.diff(np.diff(due)) <= 1).all()
    assert int(labels_due(0, 7, 1, 0.25)) == 7 and int(labels_due(3, 0, 11, 0.25)) == 0


def test_normaliser():
    reward = jnp.asarray(np.random.default_rng(1).normal(3.0, 2.0, size=200), jnp.float32)
    gain, bias = normaliser(reward, centred=True)
    scaled = np.asarray(gain * reward + bias, np.float64)
    assert scaled.mean() == pytest.approx(0, abs=1e-5) and scaled.std() == pytest.approx(1, rel=1e-5)
    gain, bias = normaliser(reward, centred=False)
    assert float(bias) == 0 and float(jnp.mean(jnp.square(gain * reward))) == pytest.approx(1, rel=1e-5)
    for alike in (jnp.zeros(5), jnp.full(5, 0.1)):
        assert float(normaliser(alike, centred=True)[0]) == 1
    assert float(normaliser(jnp.zeros(5), centred=False)[0]) == 1


def test_the_coefficient_follows_the_held_out_loss():
    config = SegmentReward(l2_factor=2.0)
    held = jnp.array([1.6, 1.3, 1.05, 1.6])
    got = adapted_l2(jnp.array([0.1, 0.1, 0.1, 0.0]), jnp.ones(4), held, config)
    np.testing.assert_allclose(got, [0.2, 0.1, 0.05, 0.0], rtol=1e-6)
    assert float(adapted_l2(jnp.float32(0.9), jnp.float32(1), jnp.float32(2), config)) == 1


# ---- the ensemble


@functools.cache
def learner():
    return reward_learner(LEARNER, LAKE)


@functools.cache
def compiled():
    own = learner()
    return jax.jit(own.init), jax.jit(own.fit)


def true_reward(state, action):
    return np.sin(1.7 * state) + 0.5 * action


@functools.cache
def labelled(count: int = 120) -> Labels:
    """Random segments of unequal lengths, labelled by their true sums, without error; room for 8 more."""
    generator = np.random.default_rng(2)
    room = count + 8

    def side():
        state, action = (
            generator.integers(STATES, size=(room, LENGTH)),
            generator.integers(4, size=(room, LENGTH)),
        )
        mask = np.arange(LENGTH)[None] < generator.integers(1, LENGTH + 1, size=(room, 1))
        total = (true_reward(state, action) * mask).sum(axis=1)
        return Segments(
            *(jnp.asarray(x, t) for x, t in ((state, jnp.int32), (action, jnp.int32), (mask, bool)))
        ), total

    (first, left), (second, right) = side(), side()
    weight = bootstrap_weights(jax.random.key(1), (room, LEARNER.members))
    return Labels(first, second, jnp.asarray(left > right, jnp.float32), weight, jnp.int32(count))


def fitted(labels: Labels, times: int = 1):
    init, fit = compiled()
    ensemble = init(jax.random.key(0))
    for i in range(times):
        ensemble, metrics = fit(ensemble, labels, jax.random.key(i))
    return ensemble, metrics


def test_the_reward_is_learnt_from_comparisons_alone():
    labels = labelled()
    ensemble, metrics = fitted(labels, times=8)
    of = jax.jit(learner().scores)
    left, right = (of(ensemble, side).mean(axis=0)[120:] for side in (labels.first, labels.second))
    assert metrics["reward/loss"] < 0.3 < metrics["reward/heldout_loss"] + 0.15
    told = np.asarray((left > right) == (labels.label_N[120:] > 0.5))
    assert told.mean() >= 0.75  # eight pairs that were not among the labels
    state, action = np.divmod(np.arange(4 * STATES), 4)
    steps = jnp.asarray(state, jnp.int32), jnp.asarray(action, jnp.int32)
    found = jax.jit(learner().reward)(ensemble, *steps)
    assert np.corrcoef(found, true_reward(state, action))[0, 1] > 0.85


def test_a_member_learns_nothing_of_what_is_held_out_from_it():
    labels = labelled()
    # Label 0 is held out from member 0 only.
    weight = labels.weight_NM.at[0].set(jnp.array([0, 2, 2]))
    one, other = (
        fitted(labels._replace(weight_NM=weight, label_N=labels.label_N.at[0].set(x)))[0] for x in (0.0, 1.0)
    )
    same = jax.tree.map(
        lambda a, b: np.array([np.array_equal(a[m], b[m]) for m in range(3)]), one.params, other.params
    )
    for leaf in jax.tree.leaves(same):
        assert leaf[0]
    assert not all(leaf[1] or leaf[2] for leaf in jax.tree.leaves(same))


def test_without_labels_nothing_is_learnt():
    init, _ = compiled()
    ensemble, metrics = fitted(labelled()._replace(count=jnp.int32(0)))
    for a, b in zip(jax.tree.leaves(ensemble), jax.tree.leaves(init(jax.random.key(0))), strict=True):
        np.testing.assert_array_equal(a, b)
    assert metrics["reward/loss"] == 0


def test_padding_counts_nothing_whatever_it_holds():
    own = reward_learner(LEARNER, cart_pole())
    ensemble = jax.jit(own.init)(KEY)

    def total(params, segments):
        found = own.scores(ensemble._replace(params=params), segments)
        return jnp.sum(jnp.square(found)), found

    slope_and_scores = jax.jit(jax.grad(total, has_aux=True))
    generator = np.random.default_rng(4)
    observation = generator.normal(size=(6, LENGTH, 4))
    mask = np.arange(LENGTH)[None] < np.arange(1, 7)[:, None].clip(max=LENGTH - 1)
    action = generator.integers(2, size=(6, LENGTH))

    def scores(padding, extra):
        seen = np.where(mask[..., None], observation, padding)
        seen = np.concatenate([seen, np.full((6, extra, 4), padding)], axis=1)
        acts = np.concatenate([np.where(mask, action, 1), np.ones((6, extra), int)], axis=1)
        masks = np.concatenate([mask, np.zeros((6, extra), bool)], axis=1)
        segments = Segments(jnp.asarray(seen, jnp.float32), jnp.asarray(acts, jnp.int32), jnp.asarray(masks))

        return slope_and_scores(ensemble.params, segments)

    plain, padded = scores(0.0, 0), scores(np.nan, 3)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
    # And the score is the sum of what the reward gives step by step.
    steps = jnp.asarray(observation, jnp.float32), jnp.asarray(action, jnp.int32)
    every = jax.jit(own.reward)(ensemble, *steps)
    expected = (np.asarray(every) * mask).sum(axis=1)  # gains are 1 and biases 0 at the start
    np.testing.assert_allclose(plain[1].mean(axis=0), expected, rtol=1e-4, atol=1e-5)


def test_each_member_is_normalised_before_the_mean_is_taken():
    own = reward_learner(dataclasses.replace(LEARNER, centred=True), LAKE)
    state, action = (jnp.asarray(x, jnp.int32) for x in np.divmod(np.arange(4 * STATES), 4))
    ensemble = jax.jit(own.init)(KEY)
    params = ensemble.params
    # One member is made a hundred times as loud: it must not decide alone.
    loud = params | {"output": jax.tree.map(lambda x: x.at[0].multiply(100.0), params["output"])}

    @jax.jit
    def mean(params):
        return own.reward(own.normalise(ensemble._replace(params=params), state, action), state, action)

    means = [mean(params), mean(loud)]
    np.testing.assert_allclose(means[0], means[1], rtol=1e-3, atol=1e-4)
    assert abs(float(jnp.mean(means[0]))) < 1e-5


# ---- the whole


@functools.cache
def iterate():
    return jax.jit(control_preferences(cart_pole(limit=12), SMALL).iterate)


def numbers(tree):
    keys = (
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(tree)
    )
    return [np.asarray(x) for x in keys]


@pytest.mark.slow
def test_a_round_asks_fits_and_learns():
    config = SMALL
    run = jax.jit(control_preferences(cart_pole(limit=12), config).init)(KEY)
    counts = []
    for i in range(rounds_of(config)):
        before = run
        run, metrics = iterate()(run, jax.random.fold_in(KEY, i))
        counts.append(int(metrics["labels/count"]))
        assert all(np.isfinite(x) for x in metrics.values()), metrics
    assert counts == [2, 6] == [int(labels_due(i, 6, 2, 0.25)) for i in range(2)]
    assert int(run.steps) == 2 * 2 * 4 * 16 and float(metrics["environment_steps"]) == 2 * 4 * 16
    labels = run.learner.labels
    asked = (labels.first.mask[:, 0] & labels.second.mask[:, 0]).sum()
    assert int(asked) == int(labels.count) == 6
    # A labeller who never errs counts the steps, of which each is worth 1.
    length = [np.asarray(side.mask.sum(axis=1)) for side in (labels.first, labels.second)]
    np.testing.assert_array_equal(labels.label_N, 0.5 + 0.5 * np.sign(length[0] - length[1]))
    for name in ("policy", "ensemble"):
        old, new = (numbers(getattr(r.learner, name).params) for r in (before, run))
        assert not any(np.array_equal(a, b) for a, b in zip(old, new, strict=True) if a.any())
    reward = jax.jit(learned_reward(cart_pole(limit=12), config))
    last = before.learner.trajectory  # what the last reward was brought to mean square 1 on, member by member
    found = np.asarray(reward(run, last.observation, last.action))
    assert found.shape == (16, 4) and 0.3 < np.sqrt((found**2).mean()) < 1.001


@pytest.mark.slow
def test_seeds_and_numbers_of_labels_together_equal_runs_alone_and_are_resumed():
    env = cart_pole(limit=12)

    def whole(labels, share, key, run=None, first=0):
        config = dataclasses.replace(SMALL, labels=labels, capacity=6, random_queries=share)
        return train(control_preferences(env, config), key, 1, run=run, first=first)

    labels, share, keys = jnp.array([0, 6, 3]), jnp.array([0.0, 1.0, 0.0]), jax.random.split(KEY, 3)
    begin, go_on = jax.jit(jax.vmap(whole)), jax.jit(jax.vmap(whole, in_axes=(0, 0, 0, 0, None)))
    half, _ = begin(labels, share, keys)
    together, _ = go_on(labels, share, keys, half, 1)
    np.testing.assert_array_equal(together.learner.labels.count, [0, 6, 3])
    alone_begin, alone = jax.jit(whole), jax.jit(whole)
    for i in range(3):
        run, _ = alone_begin(labels[i], share[i], keys[i])
        run, _ = alone(labels[i], share[i], keys[i], run, 1)
        for a, b in zip(numbers(together), numbers(run), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=2e-4, atol=2e-5)
    again, _ = go_on(labels, share, keys, jax.tree.map(jnp.copy, half), 1)
    for a, b in zip(numbers(together), numbers(again), strict=True):
        np.testing.assert_array_equal(a, b)


REFUSED = {
    "segment=17 must lie between 1 and ppo.steps=16": {"segment": 17},
    "queries=9 cannot be chosen among candidates=8": {"queries": 9},
    "labels=9 cannot be asked for in 2 rounds of at most 4": {"labels": 9},
    "random_queries=1.5 is a share": {"random_queries": 1.5},
    "initial_share=-0.1 is a share": {"initial_share": -0.1},
    "iterations=0 of PPO": {"iterations": 0},
    "labels=6 must lie between 0 and the capacity, 5": {"capacity": 5},
    "reward.error=1.0": {"reward": SegmentReward(error=1.0)},
    "reward.updates=0": {"reward": SegmentReward(updates=0)},
    "disagreement needs reward.members of at least 2": {"reward": SegmentReward(members=1)},
    "labeller.random=-1": {"labeller": Labeller(random=-1)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_do_not_fit_are_refused(message):
    with pytest.raises(ValueError, match=message):
        control_preferences(cart_pole(), dataclasses.replace(SMALL, **REFUSED[message]))


def test_a_traced_number_of_labels_needs_room():
    with pytest.raises(ValueError, match="labels is traced: give `capacity`"):
        jax.eval_shape(
            lambda n: control_preferences(cart_pole(), dataclasses.replace(SMALL, labels=n)).init(KEY), 3
        )
