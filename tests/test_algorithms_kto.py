"""KTO and BCO of a tiny model of tokens, against a float64 loop over completions from the papers."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.algorithms import kto
from rlhfjax.config import KTO

PROMPTS, SAMPLES, LENGTH, WIDTH = 4, 2, 5, 3
SGD = optax.sgd(1.0)
CONFIGS = {
    "kto": KTO(beta=0.5, desirable_weight=1.3, undesirable_weight=0.6),
    "kto zero": KTO(beta=0.5, reference_point="zero"),
    "bco": KTO(loss="bco", beta=0.5, shift_decay=0.75),
}
SHIFT = 0.4


def evaluate(params, inputs):
    # Where the input is NaN so is the result, but the model's own gradient is not.
    bad_BGC = jnp.isnan(inputs[..., 0])
    inputs = jnp.where(bad_BGC[..., None], 0.0, inputs)
    x_BGC = jnp.einsum("bgcd,d->bgc", inputs, params["weight"]) + params["bias"]
    return jnp.where(bad_BGC, jnp.nan, -jax.nn.softplus(x_BGC))


@functools.cache
def algorithm(config):
    made = kto.make(evaluate, SGD, config)
    return made.init, jax.jit(made.update)


def step(params, batch, config):
    """One update from a state in which BCO's average has already moved."""
    init, update = algorithm(config)
    state = init(params)
    if config.loss == "bco":
        state = state._replace(reward_shift=jnp.float32(SHIFT))
    return update(state, batch, jax.random.key(0))


@pytest.fixture(scope="module")
def params():
    return {"weight": jnp.array([0.5, -1.0, 0.2]), "bias": jnp.asarray(0.3)}


def completions(seed, low):
    """Inputs, masks and reference log-probabilities; `low` moves the reference, and so the KL estimate."""
    generator = np.random.default_rng(seed)
    length_BG = generator.integers(1, LENGTH + 1, size=(PROMPTS, SAMPLES))
    return {
        "inputs": jnp.asarray(generator.normal(size=(PROMPTS, SAMPLES, LENGTH, WIDTH)), jnp.float32),
        "completion_mask_BGC": jnp.asarray(np.arange(LENGTH) < length_BG[:, :, None]),
        "logp_ref_BGC": jnp.asarray(
            -generator.uniform(low, low + 1, (PROMPTS, SAMPLES, LENGTH)), jnp.float32
        ),
        "mask_BG": jnp.asarray(generator.uniform(size=(PROMPTS, SAMPLES)) < 0.8),
    }


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(2)
    shape = (PROMPTS, SAMPLES)
    return kto.Judged(
        **completions(0, 0.2),
        label_BG=jnp.asarray(generator.choice([0.0, 0.2, 1.0], size=shape), jnp.float32),
        weight_BG=jnp.asarray(generator.uniform(0.5, 2, size=shape), jnp.float32),
        mismatched=kto.Mismatched(**completions(1, 1.0)),
    )


# ------------------------------------------------------------------------------------------------------ the oracle


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_ratios(theta, part):
    """(b, g, log_ratio, logp) of every completion that counts, float64."""
    for b, g in zip(*np.nonzero(part.mask_BG), strict=True):
        keep = np.asarray(part.completion_mask_BGC[b, g])
        x = np.asarray(part.inputs, np.float64)[b, g][keep] @ theta[:WIDTH] + theta[WIDTH]
        logp, ref = -np.log1p(np.exp(x)), np.asarray(part.logp_ref_BGC, np.float64)[b, g][keep]
        yield b, g, (logp - ref).sum(), logp.sum()


def oracle_kl(theta, batch):
    return max(0.0, np.mean([ratio for _, _, ratio, _ in log_ratios(theta, batch.mismatched)]))


def oracle(theta, batch, config, z):
    """Means over completions, as `kto` names them; z is the reference point."""
    rows, labels = [], []
    for b, g, ratio, logp in log_ratios(theta, batch):
        label, beta = float(batch.label_BG[b, g]), config.beta
        if config.loss == "kto":
            d = beta * (ratio - z)
            good = config.desirable_weight * (1 - sigmoid(d))
            bad = config.undesirable_weight * (1 - sigmoid(-d))
        else:
            d = beta * ratio - SHIFT
            good, bad = -np.log(sigmoid(d)), -np.log(sigmoid(-d))
        total = float(batch.weight_BG[b, g]) * (label * good + (1 - label) * bad)
        rows.append([total, beta * ratio, logp, label if d > 0 else 1 - label])
        labels.append(label)
    total, reward, logp, agrees = np.array(rows).T
    labels = np.array(labels)

    def mean(x, share):
        return (x * share).sum() / share.sum()

    metrics = {
        "loss/total": total.mean(),
        "completion/accuracy": agrees.mean(),
        "completion/desirable": labels.mean(),
        "reward/desirable": mean(reward, labels),
        "reward/undesirable": mean(reward, 1 - labels),
        "logp/desirable": mean(logp, labels),
        "logp/undesirable": mean(logp, 1 - labels),
        "batch/count": len(rows),
    }
    return metrics | {"reward/margin": metrics["reward/desirable"] - metrics["reward/undesirable"]}


def flat(params):
    return np.append(np.asarray(params["weight"], np.float64), float(params["bias"]))


# -------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", CONFIGS)
def test_step_equals_a_loop_over_completions(name, params, batch):
    config, theta = CONFIGS[name], flat(params)
    state, metrics = step(params, batch, config)
    z = oracle_kl(theta, batch) if name == "kto" else 0.0
    assert name != "kto" or z > 0.1
    expected = oracle(theta, batch, config, z)
    if name == "kto":
        expected["objective/reference_point"] = z
    if name == "bco":
        expected["objective/reward_shift"] = SHIFT
    for metric, value in expected.items():
        np.testing.assert_allclose(metrics[metric], value, rtol=1e-5, atol=1e-6, err_msg=metric)
    # The reference point is held: no gradient flows through it.
    steps = 1e-6 * np.eye(len(theta))
    gradient = [
        (
            oracle(theta + e, batch, config, z)["loss/total"]
            - oracle(theta - e, batch, config, z)["loss/total"]
        )
        / 2e-6
        for e in steps
    ]
    np.testing.assert_allclose(theta - flat(state.params), gradient, rtol=1e-4, atol=1e-6)
    assert metrics.keys() == expected.keys() | {"optimizer/gradient_norm", "optimizer/refused"}
    assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())
    assert [metric for metric in metrics if metric not in kto.__doc__] == []
    midpoint = (expected["reward/desirable"] + expected["reward/undesirable"]) / 2
    shift = 0.75 * SHIFT + 0.25 * midpoint if name == "bco" else 0.0
    np.testing.assert_allclose(state.reward_shift, shift, rtol=1e-5)
    assert state.step == 1


def test_a_negative_kl_estimate_counts_as_zero(params, batch):
    surer = batch.mismatched._replace(logp_ref_BGC=0.0 * batch.mismatched.logp_ref_BGC)
    state, metrics = step(params, batch._replace(mismatched=surer), CONFIGS["kto"])
    assert metrics["objective/reference_point"] == 0
    expected = dataclasses.replace(CONFIGS["kto"], reference_point="zero")
    chex.assert_trees_all_close(state.params, step(params, batch, expected)[0].params, rtol=1e-6)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_masked_equals_dropped(name, params, batch):
    """A masked completion and a masked position, all NaN, move nothing."""

    def widen(x, axis, filler):
        shape = x.shape[:axis] + (1,) + x.shape[axis + 1 :]
        return jnp.concatenate([x, jnp.full(shape, filler, x.dtype)], axis=axis)

    def wider(part):
        return part._replace(
            inputs=widen(widen(part.inputs, 1, jnp.nan), 2, jnp.nan),
            completion_mask_BGC=widen(widen(part.completion_mask_BGC, 1, True), 2, False),
            logp_ref_BGC=widen(widen(part.logp_ref_BGC, 1, jnp.nan), 2, jnp.nan),
            mask_BG=widen(part.mask_BG, 1, False),
        )

    given = wider(batch)._replace(
        label_BG=widen(batch.label_BG, 1, jnp.nan),
        weight_BG=widen(batch.weight_BG, 1, jnp.nan),
        mismatched=wider(batch.mismatched),
    )
    expected = step(params, batch, CONFIGS[name])
    chex.assert_trees_all_close(step(params, given, CONFIGS[name]), expected, rtol=1e-5, atol=1e-7)


def test_order_and_microbatches_change_nothing(params, batch):
    """Also not the reference point, which is a statistic of the whole batch."""
    expected = step(params, batch, CONFIGS["kto"])
    reordered = jax.tree.map(lambda x: x[::-1], batch)
    chex.assert_trees_all_close(step(params, reordered, CONFIGS["kto"]), expected, rtol=1e-5, atol=1e-7)
    split = dataclasses.replace(CONFIGS["kto"], microbatches=2)
    chex.assert_trees_all_close(step(params, batch, split), expected, rtol=1e-5, atol=1e-7)


def test_a_mapped_axis_changes_nothing(params, batch):
    """The reference point is that of all members together."""
    config = CONFIGS["kto"]
    made = kto.make(evaluate, SGD, config, axis_name="data")
    halves = jax.tree.map(lambda x: x.reshape(2, PROMPTS // 2, *x.shape[1:]), batch)
    mapped = jax.jit(jax.vmap(made.update, in_axes=(None, 0, None), axis_name="data"))
    given = mapped(made.init(params), halves, jax.random.key(0))
    expected = step(params, batch, config)
    for member in range(2):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, member=member: x[member], given), expected, rtol=1e-5, atol=1e-7
        )


def test_one_class_alone_is_finite_and_holds_the_shift(params, batch):
    for name in ("kto", "bco"):
        state, metrics = step(params, batch._replace(label_BG=jnp.ones_like(batch.label_BG)), CONFIGS[name])
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((state, metrics)))
        assert metrics["reward/undesirable"] == 0
        assert name == "kto" or state.reward_shift == SHIFT
    state, metrics = step(params, batch._replace(mask_BG=batch.mask_BG & False), CONFIGS["kto"])
    chex.assert_trees_all_equal(state.params, params)
    assert metrics["batch/count"] == 0


def test_bad_input_is_named(params, batch):
    with pytest.raises(ValueError, match="loss='dpo' is unknown; choose among kto, bco"):
        kto.make(evaluate, SGD, KTO(loss="dpo"))
    with pytest.raises(ValueError, match="reference_point='none' is unknown"):
        kto.make(evaluate, SGD, KTO(reference_point="none"))
    made = kto.make(evaluate, SGD, KTO())
    key = jax.random.key(0)
    with pytest.raises(ValueError, match='batch.mismatched is missing: .* set reference_point="zero"'):
        made.update(made.init(params), batch._replace(mismatched=None), key)
    with pytest.raises(TypeError, match="batch.label_BG must be float, got int32"):
        made.update(made.init(params), batch._replace(label_BG=jnp.ones((PROMPTS, SAMPLES), jnp.int32)), key)
    with pytest.raises(ValueError, match=r"batch.mask_BG must be \[B, G\] = \(4, 2\)"):
        made.update(made.init(params), batch._replace(mask_BG=batch.mask_BG[:, 0]), key)
    with pytest.raises(ValueError, match="batch.logp_ref_BGC is float32 of shape"):
        made.update(made.init(params), batch._replace(logp_ref_BGC=batch.logp_ref_BGC[:, :, :1]), key)
