"""Reward models that are linear in features, against float64 loops over pairs, choices and steps, and a known
utility."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.algorithms import reward_model
from rlhfjax.config import RewardModel

PROMPTS, SAMPLES, WIDTH = 6, 4, 3
PAIRS = np.array(list(itertools.combinations(range(SAMPLES), 2)))
SGD = optax.sgd(1.0)
CENTRED = RewardModel(centring=0.1)
SMOOTHED = RewardModel(centring=0.1, label_smoothing=0.15)


def evaluate(params, inputs):
    return inputs @ params["weight"] + params["bias"]


@functools.cache
def algorithm(config=CENTRED):
    made = reward_model.make(evaluate, SGD, config)
    return made.init, jax.jit(made.update)


def step(params, batch, config=CENTRED):
    init, update = algorithm(config)
    state, metrics = update(init(params), batch, jax.random.key(0))
    return state.params, metrics


@pytest.fixture(scope="module")
def params():
    return {"weight": jnp.array([0.5, -1.0, 0.2]), "bias": jnp.asarray(0.3)}


@pytest.fixture(scope="module")
def batch():
    """All six pairs of four completions, soft labels, about a third masked."""
    generator = np.random.default_rng(0)
    shape = (PROMPTS, len(PAIRS))
    return reward_model.Preference(
        inputs=jnp.asarray(generator.normal(size=(PROMPTS, SAMPLES, WIDTH)), jnp.float32),
        first=jnp.asarray(PAIRS[:, 0]),
        second=jnp.asarray(PAIRS[:, 1]),
        label_BK=jnp.asarray(generator.choice([0.0, 0.2, 1.0], size=shape), jnp.float32),
        mask_BK=jnp.asarray(generator.uniform(size=shape) > 0.3),
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_step_equals_a_loop_over_pairs(params, batch):
    weight, bias = np.asarray(params["weight"], np.float64), float(params["bias"])
    features = np.asarray(batch.inputs, np.float64)
    score = features @ weight + bias
    gradient, losses, agreements, margins, scores = {"weight": np.zeros(WIDTH), "bias": 0.0}, [], [], [], []
    for b, k in zip(*np.nonzero(batch.mask_BK), strict=True):
        i, j = PAIRS[k]
        label, d, s = float(batch.label_BK[b, k]), score[b, i] - score[b, j], score[b, i] + score[b, j]
        losses.append(-label * np.log(sigmoid(d)) - (1 - label) * np.log(sigmoid(-d)))
        agreements.append(label if d > 0 else 1 - label)
        margins.append((2 * label - 1) * d)
        scores += [score[b, i], score[b, j]]
        slope = sigmoid(d) - label
        gradient["weight"] += slope * (features[b, i] - features[b, j])
        gradient["weight"] += 0.1 * 2 * s * (features[b, i] + features[b, j])
        gradient["bias"] += 0.1 * 2 * s * 2
    n = len(losses)
    new, metrics = step(params, batch)
    centring = 0.1 * np.mean([(a + b) ** 2 for a, b in zip(scores[::2], scores[1::2], strict=True)])
    expected = {
        "loss/preference": np.mean(losses),
        "loss/total": np.mean(losses) + centring,
        "pair/accuracy": np.mean(agreements),
        "pair/margin": np.mean(margins),
        "score/mean": np.mean(scores),
        "score/std": np.std(scores),
        "batch/count": n,
        "batch/invalid": 0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    for name, g in gradient.items():
        np.testing.assert_allclose(params[name] - new[name], g / n, rtol=1e-4, atol=1e-6)
    assert metrics.keys() == expected.keys() | {"optimizer/gradient_norm", "optimizer/refused"}
    assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())
    documented = reward_model.__doc__
    assert [name for name in metrics if name not in documented] == []


def test_masked_pairs_equal_dropped_pairs(params, batch):
    """Appended pairs under the mask, with NaN scores and labels, move nothing."""
    ruined = jnp.concatenate([batch.inputs, jnp.full((PROMPTS, 1, WIDTH), jnp.nan)], axis=1)

    def widen(x, filler):
        return jnp.concatenate([x, jnp.full((PROMPTS, 1), filler, x.dtype)], axis=1)

    wider = batch._replace(
        inputs=ruined,
        first=jnp.append(batch.first, SAMPLES),
        second=jnp.append(batch.second, 0),
        label_BK=widen(batch.label_BK, jnp.nan),
        mask_BK=widen(batch.mask_BK, False),
    )

    def finite_scores(params, inputs):
        # The scores may be NaN; the network itself gives 0 gradient for 0 cotangent.
        bad = jnp.isnan(inputs).any(-1)
        return jnp.where(bad, jnp.nan, 0.0) + evaluate(params, jnp.where(bad[..., None], 0.0, inputs))

    def gradient(batch):
        def mean(params):
            total, sums = reward_model.loss(params, batch, evaluate=finite_scores, config=CENTRED)
            return total / sums["count"]

        return jax.jit(jax.value_and_grad(mean))(params)

    chex.assert_trees_all_close(gradient(wider), gradient(batch), rtol=1e-6)


def test_pairs_may_differ_between_prompts_and_swapping_changes_nothing(params, batch):
    shape = batch.label_BK.shape
    swapped = batch._replace(
        first=jnp.broadcast_to(batch.second, shape),
        second=jnp.broadcast_to(batch.first, shape),
        label_BK=1 - batch.label_BK,
    )
    chex.assert_trees_all_close(step(params, swapped), step(params, batch), rtol=1e-5, atol=1e-6)


def test_accumulation_gives_the_same_step(params, batch):
    parts = step(params, batch, RewardModel(centring=0.1, microbatches=3))
    chex.assert_trees_all_close(parts, step(params, batch), rtol=1e-5, atol=1e-6)


def test_a_tie_counts_half(batch):
    _, metrics = step({"weight": jnp.zeros(WIDTH), "bias": jnp.zeros(())}, batch)
    np.testing.assert_allclose(metrics["pair/accuracy"], 0.5)
    np.testing.assert_allclose(metrics["loss/preference"], np.log(2), rtol=1e-6)


def test_recovers_a_linear_utility():
    """With labels equal to the true probabilities the loss is least at the utility (up to the bias)."""
    utility = np.array([1.0, -2.0, 0.5])
    features = np.random.default_rng(1).normal(size=(64, SAMPLES, WIDTH))
    score = features @ utility
    label = sigmoid(score[:, PAIRS[:, 0]] - score[:, PAIRS[:, 1]])
    batch = reward_model.Preference(
        jnp.asarray(features, jnp.float32),
        jnp.asarray(PAIRS[:, 0]),
        jnp.asarray(PAIRS[:, 1]),
        jnp.asarray(label, jnp.float32),
        jnp.ones(label.shape, bool),
    )
    made = reward_model.make(evaluate, optax.adam(0.1), RewardModel())

    def iterate(state, key):
        return made.update(state, batch, key)

    start = made.init({"weight": jnp.zeros(WIDTH), "bias": jnp.zeros(())})
    keys = jax.random.split(jax.random.key(0), 300)
    state, metrics = jax.jit(lambda s: jax.lax.scan(iterate, s, keys))(start)
    np.testing.assert_allclose(state.params["weight"], utility, atol=0.01)
    # The best judge agrees with the label as often as max(p, 1 - p).
    np.testing.assert_allclose(metrics["pair/accuracy"][-1], np.maximum(label, 1 - label).mean(), atol=1e-3)


def test_normalisation_gives_mean_0_and_deviation_1():
    generator = np.random.default_rng(2)
    score = jnp.asarray(generator.normal(50.0, 3.0, size=(7, 9)), jnp.float32)
    mask = jnp.asarray(generator.uniform(size=(7, 9)) > 0.4)
    gain, bias = jax.jit(reward_model.normalisation)(jnp.where(mask, score, jnp.nan), mask)
    counted = np.asarray(gain * score + bias)[np.asarray(mask)]
    np.testing.assert_allclose([counted.mean(), counted.std()], [0, 1], atol=1e-4)
    gain, bias = reward_model.normalisation(score)
    np.testing.assert_allclose(np.std(np.asarray(gain * score + bias)), 1, rtol=1e-4)


def test_normalisation_of_equal_scores_only_shifts():
    gain, bias = reward_model.normalisation(jnp.full(1000, 0.1))
    assert gain == 1
    np.testing.assert_allclose(bias, -0.1, rtol=1e-6)


# ------------------------------------------------------------------------------- margins and smoothing of pairs


def oracle(score_of, params, config, n_items, items):
    """Mean loss of `items` (params -> [loss, ...] in float64) and its gradient by central differences."""
    flat = np.append(np.asarray(params["weight"], np.float64), float(params["bias"]))

    def mean(flat):
        return sum(items(score_of(flat))) / n_items

    h = 1e-6
    gradient = [(mean(flat + h * e) - mean(flat - h * e)) / (2 * h) for e in np.eye(len(flat))]
    return mean(flat), np.array(gradient)


def linear(batch):
    features = np.asarray(batch.inputs, np.float64)
    return lambda flat: features @ flat[:-1] + flat[-1]


def check_step(params, batch, config, items, n_items):
    expected, gradient = oracle(linear(batch), params, config, n_items, items)
    new, metrics = step(params, batch, config)
    np.testing.assert_allclose(metrics["loss/total"], expected, rtol=1e-5)
    np.testing.assert_allclose(params["weight"] - new["weight"], gradient[:-1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(params["bias"] - new["bias"], gradient[-1], rtol=1e-4, atol=1e-6)
    assert [name for name in metrics if name not in reward_model.__doc__] == []
    assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())
    return metrics


def test_margin_and_label_smoothing_equal_a_loop(params, batch):
    """Llama 2's margin; a label that is wrong with probability 0.15."""
    margin = np.random.default_rng(3).choice([0.0, 1 / 3, 1.0], size=batch.label_BK.shape)
    given = batch._replace(margin_BK=jnp.where(batch.mask_BK, jnp.float32(margin), jnp.nan))

    def items(score):
        for b, k in zip(*np.nonzero(batch.mask_BK), strict=True):
            i, j = PAIRS[k]
            d, m, p = score[b, i] - score[b, j], margin[b, k], float(batch.label_BK[b, k])
            p = 0.85 * p + 0.15 * (1 - p)
            yield (
                -p * np.log(sigmoid(d - m))
                - (1 - p) * np.log(sigmoid(-d - m))
                + 0.1 * (score[b, i] + score[b, j]) ** 2
            )

    check_step(params, given, SMOOTHED, items, int(batch.mask_BK.sum()))


def test_config_may_be_swept(params, batch):
    def total(smoothing):
        config = RewardModel(label_smoothing=smoothing)
        return reward_model.loss(params, batch, evaluate=evaluate, config=config)[0]

    swept = jax.jit(jax.vmap(total))(jnp.array([0.0, 0.15]))
    np.testing.assert_allclose(swept, [total(0.0), total(0.15)], rtol=1e-6)


def test_bad_pairs_are_left_out_and_counted(params, batch):
    """Labels outside 0..1 or NaN, a margin below 0, completions that are not there."""
    keep = jnp.ones(batch.mask_BK.shape, bool)
    whole = batch._replace(
        mask_BK=keep,
        first=jnp.broadcast_to(batch.first, keep.shape),
        margin_BK=jnp.zeros(keep.shape),
    )
    bad = whole._replace(
        label_BK=whole.label_BK.at[0, 0].set(1.5).at[1, 1].set(-0.1).at[2, 2].set(jnp.nan),
        first=whole.first.at[3, 3].set(SAMPLES).at[3, 4].set(-1),
        margin_BK=whole.margin_BK.at[4, 4].set(-1.0).at[4, 5].set(jnp.nan),
    )
    dropped = whole._replace(
        mask_BK=keep.at[0, 0]
        .set(False)
        .at[1, 1]
        .set(False)
        .at[2, 2]
        .set(False)
        .at[3, 3:5]
        .set(False)
        .at[4, 4:]
        .set(False)
    )
    (new, metrics), (expected_new, expected) = step(params, bad), step(params, dropped)
    chex.assert_trees_all_close(new, expected_new, rtol=1e-6)
    assert (float(metrics.pop("batch/invalid")), float(expected.pop("batch/invalid"))) == (7.0, 0.0)
    chex.assert_trees_all_close(metrics, expected, rtol=1e-6)


def test_equal_completions_teach_nothing(params, batch):
    same = batch._replace(second=batch.first)
    new, metrics = step(params, same, RewardModel())
    chex.assert_trees_all_equal(new, params)
    np.testing.assert_allclose(metrics["loss/preference"], np.log(2), rtol=1e-6)
    assert float(metrics["pair/accuracy"]) == 0.5


# ------------------------------------------------------------------------------------------------------ rankings


@pytest.fixture(scope="module")
def ranking(batch):
    """Every prompt its own order; one to four places judged; some completions did not take part."""
    generator = np.random.default_rng(5)
    order = np.stack([generator.permutation(SAMPLES) for _ in range(PROMPTS)])
    mask = np.ones((PROMPTS, SAMPLES), bool)
    mask[1, order[1, 0]] = mask[2, order[2, 2]] = mask[3, 1] = False
    mask[5] = [True, False, False, False]  # nothing to choose from
    places = jnp.array([1, 2, 3, 4, 1, 4])
    return reward_model.Ranking(batch.inputs, jnp.asarray(order), places, jnp.asarray(mask))


def choices_of(ranking):
    """(prompt, [completions left, the chosen one first]) of every choice."""
    for b, (order, places, mask) in enumerate(
        zip(ranking.order_BG, ranking.places, ranking.mask_BG, strict=True)
    ):
        left = [int(g) for g in order if mask[g]]
        for _ in range(int(places)):
            if len(left) < 2:
                break
            yield b, left
            left = left[1:]


def test_ranking_equals_a_loop_over_choices(params, ranking):
    choices = list(choices_of(ranking))

    def items(score):
        for b, left in choices:
            s = score[b, left]
            logp = s - np.log(np.exp(s).sum())
            smoothed = -0.85 * logp[0] - 0.15 * logp[1:].mean()
            yield smoothed + 0.1 * (2 * s.mean()) ** 2

    metrics = check_step(params, ranking, SMOOTHED, items, len(choices))
    score = linear(ranking)(np.append(np.asarray(params["weight"], np.float64), float(params["bias"])))
    rows = [score[b, left] for b, left in choices]
    expected = {
        "choice/accuracy": np.mean([s.argmax() == 0 for s in rows]),
        "choice/margin": np.mean([s[0] - s[1:].max() for s in rows]),
        "score/mean": np.mean([s.mean() for s in rows]),
        "score/std": np.sqrt(np.mean([(s**2).mean() for s in rows]) - np.mean([s.mean() for s in rows]) ** 2),
        "batch/count": len(choices),
        "batch/invalid": 0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_rankings_of_two_are_pairs(params, batch):
    order = jnp.asarray(np.random.default_rng(6).permuted(np.tile([0, 1], (PROMPTS, 1)), axis=1))
    inputs, ones = batch.inputs[:, :2], jnp.ones((PROMPTS, 1), bool)
    pairs = reward_model.Preference(
        inputs, jnp.array([0]), jnp.array([1]), (order[:, :1] == 0).astype(jnp.float32), ones
    )
    (new, metrics), (expected_new, expected) = (
        step(params, given, SMOOTHED) for given in (reward_model.Ranking(inputs, order), pairs)
    )
    chex.assert_trees_all_close(new, expected_new, rtol=1e-5, atol=1e-6)
    for ours, theirs in (("choice/accuracy", "pair/accuracy"), ("choice/margin", "pair/margin")):
        np.testing.assert_allclose(metrics[ours], expected[theirs], rtol=1e-5)
    for name in ("loss/total", "loss/preference", "score/mean", "score/std", "batch/count"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)


def test_best_of_four_is_a_softmax(params, batch):
    """-log softmax(r_1..r_4)[best], arXiv 1909.08593; the order of the others says nothing."""
    best = jnp.array([3, 0, 1, 2, 2, 1])
    given = reward_model.best_choice(batch.inputs, best, SAMPLES)
    _, metrics = step(params, given, RewardModel())
    score = linear(batch)(np.append(np.asarray(params["weight"], np.float64), float(params["bias"])))
    expected = np.log(np.exp(score).sum(1)) - score[np.arange(PROMPTS), best]
    np.testing.assert_allclose(metrics["loss/total"], expected.mean(), rtol=1e-5)
    assert float(metrics["batch/count"]) == PROMPTS
    other = given._replace(order_BG=jnp.concatenate([given.order_BG[:, :1], given.order_BG[:, :0:-1]], 1))
    chex.assert_trees_all_close(
        step(params, other, RewardModel()), step(params, given, RewardModel()), rtol=1e-5
    )


def test_completions_that_took_no_part_change_nothing(params, ranking):
    """Whatever their scores, NaN included, and wherever they stand in the order."""
    ruined = jnp.where(ranking.mask_BG[:, :, None], ranking.inputs, jnp.nan)
    last = jnp.argsort(~jnp.take_along_axis(ranking.mask_BG, ranking.order_BG, 1), axis=1, stable=True)
    moved = jnp.take_along_axis(ranking.order_BG, last, axis=1)

    def finite(params, inputs):
        bad = jnp.isnan(inputs).any(-1)
        return jnp.where(bad, jnp.nan, 0.0) + evaluate(params, jnp.where(bad[..., None], 0.0, inputs))

    def gradient(batch):
        def total(params):
            return reward_model.loss(params, batch, evaluate=finite, config=SMOOTHED)[0]

        return jax.jit(jax.value_and_grad(total))(params)

    expected = gradient(ranking)
    chex.assert_trees_all_close(gradient(ranking._replace(inputs=ruined)), expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(gradient(ranking._replace(order_BG=moved)), expected, rtol=1e-5, atol=1e-6)


def test_rankings_in_parts_and_in_another_order_give_the_same_step(params, ranking):
    expected = step(params, ranking)
    parts = step(params, ranking, RewardModel(centring=0.1, microbatches=3))
    chex.assert_trees_all_close(parts, expected, rtol=1e-5, atol=1e-6)
    turned = jax.tree.map(lambda x: x[::-1], ranking)
    chex.assert_trees_all_close(step(params, turned), expected, rtol=1e-5, atol=1e-6)


def test_an_order_that_is_none_is_left_out_and_counted(params, ranking):
    bad = ranking._replace(order_BG=ranking.order_BG.at[0, 0].set(ranking.order_BG[0, 1]))
    dropped = ranking._replace(mask_BG=ranking.mask_BG.at[0].set(False))
    (new, metrics), (expected_new, expected) = step(params, bad), step(params, dropped)
    chex.assert_trees_all_close(new, expected_new, rtol=1e-6)
    assert float(metrics["batch/invalid"]) == 1.0 and metrics["batch/count"] == expected["batch/count"]
    outside = reward_model.best_choice(ranking.inputs, jnp.array([4, 0, 1, 2, 3, -1]), SAMPLES)
    assert float(step(params, outside)[1]["batch/invalid"]) == 2.0


def test_tied_choices_share(batch):
    zero = {"weight": jnp.zeros(WIDTH), "bias": jnp.zeros(())}
    given = reward_model.best_choice(batch.inputs, jnp.zeros(PROMPTS, int), SAMPLES)
    _, metrics = step(zero, given)
    np.testing.assert_allclose(metrics["choice/accuracy"], 1 / SAMPLES)
    np.testing.assert_allclose(metrics["loss/preference"], np.log(SAMPLES), rtol=1e-6)


# --------------------------------------------------------------------------------------------------------- steps


@pytest.fixture(scope="module")
def steps():
    """Labels 0, 0.5 (nobody knows) and 1 at some tokens; NaN elsewhere."""
    generator = np.random.default_rng(7)
    shape = (PROMPTS, 2, 5)
    mask = generator.uniform(size=shape) > 0.5
    label = np.where(mask, generator.choice([0.0, 0.5, 1.0], size=shape), np.nan)
    inputs = jnp.asarray(generator.normal(size=(*shape, WIDTH)), jnp.float32)
    return reward_model.Steps(inputs, jnp.asarray(label, jnp.float32), jnp.asarray(mask))


def test_steps_equal_a_loop(params, steps):
    counted = list(zip(*np.nonzero(steps.mask_BGC), strict=True))

    def items(score):
        for place in counted:
            p = 0.85 * float(steps.label_BGC[place]) + 0.15 * (1 - float(steps.label_BGC[place]))
            probability = sigmoid(score[place])
            yield -p * np.log(probability) - (1 - p) * np.log(1 - probability) + 0.1 * score[place] ** 2

    metrics = check_step(params, steps, SMOOTHED, items, len(counted))
    flat = np.append(np.asarray(params["weight"], np.float64), float(params["bias"]))
    score = linear(steps)(flat)[np.asarray(steps.mask_BGC)]
    label = np.asarray(steps.label_BGC)[np.asarray(steps.mask_BGC)]
    expected = {
        "step/accuracy": np.mean(np.where(score > 0, label, 1 - label)),
        "step/label": label.mean(),
        "score/mean": score.mean(),
        "score/std": score.std(),
        "batch/count": len(counted),
        "batch/invalid": 0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_padded_steps_in_parts_give_the_same_step(params, steps):
    def widen(x, filler):
        return jnp.concatenate([x, jnp.full_like(x[:, :, :2], filler)], axis=2)

    wider = reward_model.Steps(
        widen(steps.inputs, 3.0), widen(steps.label_BGC, 7.0), widen(steps.mask_BGC, False)
    )
    parts = RewardModel(centring=0.1, microbatches=3)
    chex.assert_trees_all_close(step(params, wider, parts), step(params, steps), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ ensembles


def test_an_ensemble_is_its_members_trained_alone(params, batch):
    """Each with its own start and its own data, in one program."""
    members = 3
    heads = jax.tree.map(lambda x: jnp.stack([x, 2.0 * x, -x]).astype(jnp.float32), params)
    order = jnp.stack([jnp.roll(jnp.arange(PROMPTS), shift) for shift in range(members)])
    own = batch._replace(
        first=jnp.broadcast_to(batch.first, batch.label_BK.shape),
        second=jnp.broadcast_to(batch.second, batch.label_BK.shape),
    )
    batches = jax.tree.map(lambda x: x[order[:, :3]], own)
    made = reward_model.ensemble(reward_model.make(evaluate, SGD, CENTRED), members)
    update = jax.jit(chex.assert_max_traces(made.update, n=1))
    state = made.init(heads)
    for _ in range(2):
        state, metrics = update(state, batches, jax.random.key(0))
    _, alone = algorithm()
    losses = []
    for m in range(members):
        one = reward_model.make(evaluate, SGD, CENTRED).init(jax.tree.map(lambda x, m=m: x[m], heads))
        for _ in range(2):
            one, one_metrics = alone(one, jax.tree.map(lambda x, m=m: x[m], batches), jax.random.key(0))
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, m=m: x[m], state.params), one.params, rtol=1e-5, atol=1e-6
        )
        losses.append(float(one_metrics["loss/total"]))
    np.testing.assert_allclose(metrics["loss/total"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["ensemble/loss_std"], np.std(losses), rtol=1e-4)
    np.testing.assert_array_equal(state.step, [2] * members)


def test_members_may_share_inputs_and_have_pairs_of_their_own(params, batch):
    heads = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    masks = jnp.stack([batch.mask_BK, ~batch.mask_BK])
    axes = batch._replace(inputs=None, first=None, second=None, label_BK=None, mask_BK=0)
    made = reward_model.ensemble(reward_model.make(evaluate, SGD, CENTRED), 2, batch_axes=axes)
    state, _ = jax.jit(made.update)(made.init(heads), batch._replace(mask_BK=masks), jax.random.key(0))
    for m in range(2):
        alone, _ = step(params, batch._replace(mask_BK=masks[m]))
        chex.assert_trees_all_close(jax.tree.map(lambda x, m=m: x[m], state.params), alone, rtol=1e-5)


def test_members_must_be_stacked(params):
    made = reward_model.ensemble(reward_model.make(evaluate, SGD, CENTRED), 2)
    with pytest.raises(ValueError, match=r"params\['bias'\] has shape \(\); its leading axis must be the 2"):
        made.init(params)
    with pytest.raises(ValueError, match="at least one member, members is 0"):
        reward_model.ensemble(made, 0)


# -------------------------------------------------------------------------------------------------------- the door


def test_other_bad_batches_are_named(params, batch, ranking, steps):
    def trace(given, evaluate=evaluate):
        made = reward_model.make(evaluate, SGD, RewardModel())
        jax.eval_shape(made.update, made.init(params), given, jax.random.key(0))

    with pytest.raises(ValueError, match=r"batch.margin_BK must be \[B, K\]"):
        trace(batch._replace(margin_BK=jnp.zeros(3)))
    with pytest.raises(TypeError, match="batch.order_BG must be integer"):
        trace(ranking._replace(order_BG=jnp.zeros((PROMPTS, SAMPLES))))
    with pytest.raises(ValueError, match=r"batch.mask_BG \(6, 3\) must have order_BG's shape \(6, 4\)"):
        trace(ranking._replace(mask_BG=ranking.mask_BG[:, :3]))
    with pytest.raises(ValueError, match=r"batch.places must be \[B\] = \(6,\) or a scalar"):
        trace(ranking._replace(places=jnp.ones(2, int)))
    with pytest.raises(ValueError, match=r"scores \[B, G, C\], B = 6, G = 2, C = 5; it gave shape \(6, 2\)"):
        trace(steps, lambda params, inputs: evaluate(params, inputs)[..., 0])
    with pytest.raises(TypeError, match="label_BGC must be a float probability"):
        trace(steps._replace(label_BGC=steps.mask_BGC))
    with pytest.raises(TypeError, match="a batch is a Preference, a Ranking or Steps, not tuple"):
        trace(tuple(steps))


def test_bad_input_is_named(params, batch):
    def update(**changes):
        made = reward_model.make(evaluate, SGD, RewardModel())
        jax.eval_shape(made.update, made.init(params), batch._replace(**changes), jax.random.key(0))

    with pytest.raises(TypeError, match="label_BK must be a float probability, got int32"):
        update(label_BK=jnp.ones(batch.label_BK.shape, jnp.int32))
    with pytest.raises(ValueError, match=r"batch.first must be \[K\] = \(6,\)"):
        update(first=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="mask_BK"):
        update(mask_BK=batch.mask_BK[:, :1])
    with pytest.raises(ValueError, match=r"scores \[B, G\]"):
        update(inputs=batch.inputs[:2])
