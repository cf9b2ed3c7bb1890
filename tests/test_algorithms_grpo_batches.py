"""What must not change an update of `grpo`, what it reports, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_algorithms_grpo import METHODS, compiled, evaluate, params, rollout, step

from rlhfjax.algorithms import grpo
from rlhfjax.config import GRPO

__all__ = ["params", "rollout"]  # fixtures

PLAIN = METHODS["grpo"]
CHECKED = ("grpo", "reinforce_pp", "gspo")


def assert_same(gradient, metrics, expected, expected_metrics, rtol=1e-4):
    assert np.abs(expected["logp"]).max() > 1e-2
    np.testing.assert_allclose(gradient["logp"], expected["logp"], rtol=rtol, atol=1e-6)
    assert metrics.keys() == expected_metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=rtol, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", CHECKED)
def test_padding_changes_nothing(method, params, rollout):
    wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 2))), params)
    per_action = {
        name: jnp.pad(getattr(rollout, name), ((0, 0), (0, 0), (0, 2)), constant_values=jnp.nan)
        for name in ("logp", "logp_ref")
    }
    padded = rollout._replace(mask=jnp.pad(rollout.mask, ((0, 0), (0, 0), (0, 2))), **per_action)
    wide["logp"] = jnp.where(padded.mask, wide["logp"], jnp.nan)  # what `evaluate` gives there is anything
    gradient, metrics = step(wide, padded, METHODS[method])
    assert np.isfinite(np.where(padded.mask, gradient["logp"], 0.0)).all()
    narrow = {"logp": np.where(rollout.mask, gradient["logp"][..., :-2], 0.0)}
    assert_same(narrow, metrics, *step(params, rollout, METHODS[method]))


@pytest.mark.parametrize("method", CHECKED)
def test_order_of_prompts_and_samples_changes_nothing(method, params, rollout):
    prompts, samples = np.asarray([2, 0, 3, 1]), np.asarray([1, 2, 0])

    def turn(x):
        x = x[prompts]
        return x if x.ndim == 1 else x[:, samples]

    turned = jax.tree.map(turn, rollout._replace(inputs=None))._replace(inputs=rollout.inputs)
    gradient, metrics = step(jax.tree.map(turn, params), turned, METHODS[method])
    expected, expected_metrics = step(params, rollout, METHODS[method])
    assert_same(gradient, metrics, jax.tree.map(turn, expected), expected_metrics)


@pytest.mark.parametrize("method", CHECKED)
def test_microbatches_change_nothing(method, params, rollout):
    config = dataclasses.replace(METHODS[method], microbatches=2)
    assert_same(*step(params, rollout, config), *step(params, rollout, METHODS[method]))


@pytest.mark.parametrize("method", ["reinforce_pp", "lite_ppo"])
def test_batch_split_over_a_mapped_axis_changes_nothing(method, params, rollout):
    """Statistics of the batch are those of all members, and so is the count that divides."""
    config = METHODS[method]
    algorithm = grpo.make(evaluate, optax.sgd(1.0), config, axis_name="data")
    halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), rollout)
    split = jax.jit(jax.vmap(algorithm.update, in_axes=(None, 0, None), axis_name="data"))
    state, metrics = split(algorithm.init(params), halves, jax.random.key(0))
    gradient = jax.tree.map(lambda old, new: np.asarray(old - new[0]), params, state.params)
    expected, expected_metrics = step(params, rollout, config)
    # The one number of a single member: it is a maximum over the first minibatch, combined like the rest.
    assert_same(gradient, {k: v[0] for k, v in metrics.items()}, expected, expected_metrics)


def test_configs_are_swept_by_vmap(params, rollout):
    def of(clip_high, weight):
        config = dataclasses.replace(PLAIN, clip_high=clip_high, kl_coefficient=weight)
        algorithm = grpo.make(evaluate, optax.sgd(1.0), config)
        return algorithm.update(algorithm.init(params), rollout, jax.random.key(0))[0].params["logp"]

    settings = jnp.asarray([0.05, 0.3]), jnp.asarray([0.04, 0.5])
    swept = jax.jit(jax.vmap(of))(*settings)
    for i, new in enumerate(swept):
        config = dataclasses.replace(
            PLAIN, clip_high=float(settings[0][i]), kl_coefficient=float(settings[1][i])
        )
        np.testing.assert_allclose(
            params["logp"] - new, step(params, rollout, config)[0]["logp"], rtol=1e-4, atol=1e-6
        )


def test_metrics_are_those_of_their_definitions(params, rollout):
    _, metrics = step(params, rollout, METHODS["rloo"])
    mask = np.asarray(rollout.mask)
    old, ref, logp = (
        np.where(mask, np.asarray(x, np.float64), 0.0)
        for x in (rollout.logp, rollout.logp_ref, params["logp"])
    )
    reward, kl = np.asarray(rollout.reward, np.float64), (old - ref).sum(-1)
    penalised = reward - 0.1 * kl
    advantage = penalised - (penalised.sum(1, keepdims=True) - penalised) / 2
    per_action = np.broadcast_to(advantage[..., None], mask.shape)[mask]
    ratio = np.exp((logp - old)[mask])
    expected = {
        "objective/reward": reward.mean(),
        "objective/kl": kl.mean(),
        "objective/kl_penalty": 0.1 * kl.mean(),
        "objective/kl_coefficient": 0.1,
        "objective/return": reward.mean() - 0.1 * kl.mean(),
        "reward/nonfinite": 0.0,
        "group/equal_rewards": 0.25,
        "batch/sequences": reward.size,
        "batch/actions": mask.sum(),
        "advantage/mean": per_action.mean(),
        "advantage/std": per_action.std(),
        "policy/entropy": np.asarray(params["entropy"])[mask].mean(),
        "policy/approximate_kl": (ratio - 1 - np.log(ratio)).mean(),
        "policy/ratio_mean": ratio.mean(),
        "policy/ratio_max": ratio.max(),
        "policy/clip_fraction": 0.0,
        "policy/logp_gap": np.abs(logp - old).max(),
    }
    for name, x in expected.items():
        np.testing.assert_allclose(metrics[name], x, rtol=1e-4, atol=1e-6, err_msg=name)
        assert metrics[name].shape == () and metrics[name].dtype == jnp.float32, name
    others = {"loss/total", "loss/policy", "optimizer/gradient_norm", "optimizer/refused"}
    assert metrics.keys() == expected.keys() | others
    assert metrics["loss/total"] == metrics["loss/policy"]


def test_metrics_of_the_table_and_no_others(params, rollout):
    """Each key that any configuration gives stands in the module's table."""
    table = grpo.__doc__
    assert table is not None
    for method in ("grpo", "rloo"):
        for name in step(params, rollout, METHODS[method])[1]:
            assert f"    {name} " in table or f", {name} " in table or f"{name}, " in table, name


def test_several_rewards_are_weighted_and_reported(params, rollout):
    second = rollout.reward * 0.0 + jnp.arange(3.0)[None]
    config = dataclasses.replace(PLAIN, reward_weights=(1.0, -0.5))
    both = rollout._replace(reward=jnp.stack([rollout.reward, second], axis=-1))
    gradient, metrics = step(params, both, config)
    one, of_one = step(params, rollout._replace(reward=rollout.reward - 0.5 * second), PLAIN)
    np.testing.assert_allclose(gradient["logp"], one["logp"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["reward/0"], rollout.reward.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward/1"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(metrics["objective/reward"], of_one["objective/reward"], rtol=1e-5)


@pytest.mark.parametrize("method", ["grpo", "dapo", "gdpo", "lite_ppo"])
def test_all_equal_rewards_give_no_signal_and_no_nan(method, params, rollout):
    """0.1 is no float32: the mean of three is another number."""
    config = dataclasses.replace(METHODS[method], kl_coefficient=None)
    reward = jnp.full_like(rollout.reward, 0.1)
    if method == "gdpo":
        reward = jnp.stack([reward, 3.0 * reward], axis=-1)
    gradient, metrics = step(params, rollout._replace(reward=reward), config)
    assert not gradient["logp"].any()
    assert float(metrics["group/equal_rewards"]) == 1.0
    assert all(np.isfinite(float(x)) for x in metrics.values())


def test_dropped_groups_are_dropped_and_only_then(params, rollout):
    """Dynamic sampling changes the mean over tokens; without it the equal group still divides."""
    dropped, metrics = step(params, rollout, METHODS["dapo"])
    kept, of_all = step(params, rollout, dataclasses.replace(METHODS["dapo"], drop_equal_groups=False))
    actions = np.asarray(rollout.mask).sum()
    without = actions - np.asarray(rollout.mask)[2].sum()
    assert (float(metrics["batch/actions"]), float(of_all["batch/actions"])) == (without, actions)
    np.testing.assert_allclose(dropped["logp"], kept["logp"] * actions / without, rtol=1e-5, atol=1e-6)
    assert float(metrics["group/equal_rewards"]) == float(of_all["group/equal_rewards"]) == 0.25


def test_a_batch_without_any_sample_changes_nothing(params, rollout):
    for reward in (jnp.full_like(rollout.reward, jnp.nan), rollout.reward):
        batch = rollout._replace(reward=reward, mask=rollout.mask & jnp.isfinite(reward)[..., None])
        if reward is rollout.reward:
            batch = batch._replace(mask=jnp.zeros_like(batch.mask))
        gradient, metrics = step(params, batch, PLAIN)
        assert not gradient["logp"].any()
        assert all(np.isfinite(float(x)) for x in metrics.values())


def test_epochs_and_minibatches(params, rollout):
    """Two epochs of two minibatches are four steps; off policy the ratio moves."""
    # By actions: minibatches of unequal numbers of them, so that it matters which prompts meet.
    config = dataclasses.replace(METHODS["rloo"], aggregation="token", epochs=2, minibatches=2)
    init, update = compiled(config)
    on_policy = rollout._replace(logp=jnp.where(rollout.mask, params["logp"], jnp.nan))
    new, metrics = update(init(params), on_policy, jax.random.key(0))
    others = [update(init(params), on_policy, jax.random.key(i))[0].params["logp"] for i in (1, 2, 3)]
    same, _ = update(init(params), on_policy, jax.random.key(0))
    assert float(metrics["policy/ratio_max"]) > 1.01 and float(metrics["policy/logp_gap"]) < 1e-6
    np.testing.assert_array_equal(new.params["logp"], same.params["logp"])
    assert int(new.step) == 1
    assert not all(np.array_equal(new.params["logp"], other) for other in others)


REFUSED = [
    ({"baseline": "median"}, "baseline='median' is unknown; choose among group_mean"),
    ({"aggregation": "mean"}, "aggregation='mean' is unknown; choose among token"),
    ({"kl_placement": "both"}, "kl_placement='both' is unknown"),
    ({"kl_estimator": "k4"}, "kl_estimator='k4' is unknown"),
    ({"epochs": 0}, "epochs must be at least 1"),
    ({"dual_clip": 3.0, "clip": "cispo"}, "dual_clip bounds"),
    ({"baseline": "moving", "separate_rewards": True}, "choose another baseline"),
    ({"kl_placement": "score", "separate_rewards": True}, "takes the KL off one reward"),
]


@pytest.mark.parametrize(("fields", "why"), REFUSED)
def test_choices_that_make_no_sense_are_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        grpo.make(evaluate, optax.sgd(1.0), GRPO(**fields))


def test_batches_that_do_not_fit_are_refused(params, rollout):
    def update(batch, **fields):
        algorithm = grpo.make(evaluate, optax.sgd(1.0), dataclasses.replace(PLAIN, **fields))
        jax.eval_shape(algorithm.update, algorithm.init(params), batch, jax.random.key(0))

    alone = jax.tree.map(lambda x: x[:, :1] if x.ndim > 1 else x, rollout)
    with pytest.raises(ValueError, match="a group of one sample.*draw at least 2 samples of each prompt"):
        update(alone)
    with pytest.raises(ValueError, match="a group of one sample"):
        update(alone, baseline="none")
    with pytest.raises(ValueError, match="group of one.*leave_one_out"):
        update(alone, baseline="leave_one_out", scale="none")
    with pytest.raises(ValueError, match="needs rollout.baseline"):
        update(rollout, baseline="given")
    with pytest.raises(ValueError, match="rollout.baseline must be"):
        update(rollout._replace(baseline=jnp.zeros(3)))
    with pytest.raises(ValueError, match="rollout.reward must be"):
        update(rollout._replace(reward=rollout.reward[:, :2]))
    with pytest.raises(ValueError, match="reward_weights has 3 entries, but the batch 1"):
        update(rollout, reward_weights=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="rollout.logp has shape"):
        update(rollout._replace(logp=rollout.logp[..., 1:]))
    with pytest.raises(TypeError, match="rollout.logp_ref must be float"):
        update(rollout._replace(logp_ref=jnp.zeros(rollout.mask.shape, jnp.int32)))
    with pytest.raises(TypeError, match="pass rollout.mask > 0"):
        update(rollout._replace(mask=rollout.mask.astype(jnp.float32)))
    with pytest.raises(ValueError, match="rollout.mask must be"):
        update(jax.tree.map(lambda x: x[:, 0] if x.ndim > 1 else x, rollout))
    with pytest.raises(ValueError, match="needs logp_ref"):
        update(rollout._replace(logp_ref=None))
    with pytest.raises(ValueError, match="length_constant"):
        update(rollout, aggregation="constant")
    with pytest.raises(ValueError, match="cut into 3 equal parts"):
        update(rollout, minibatches=3)
    with pytest.raises(ValueError, match="evaluate gave entropy of shape"):
        algorithm = grpo.make(lambda p, i: (p["logp"][i], jnp.zeros(3)), optax.sgd(1.0), PLAIN)
        jax.eval_shape(algorithm.update, algorithm.init(params), rollout, jax.random.key(0))
