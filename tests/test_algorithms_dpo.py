"""Direct preference optimisation of a tiny model of tokens, against a float64 loop over pairs from the papers."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.algorithms import dpo
from rlhfjax.config import DPO

PROMPTS, SAMPLES, LENGTH, WIDTH = 4, 3, 5, 3
PAIRS = np.array(list(itertools.combinations(range(SAMPLES), 2)))
SGD = optax.sgd(1.0)
CONFIGS = {
    "dpo": DPO(beta=0.5),
    "cdpo": DPO(beta=0.5, label_smoothing=0.1),
    "robust": DPO(beta=0.5, flip_rate=0.1),
    "ipo": DPO(loss="ipo", beta=0.5),
    "ipo per token": DPO(loss="ipo", beta=0.5, length_normalised=True),
    "hinge": DPO(loss="hinge", beta=0.5),
    "exo": DPO(loss="exo", beta=0.5, label_smoothing=0.01),
    "nca": DPO(loss="nca", beta=0.5),
    "apo zero": DPO(loss="apo_zero", beta=0.5),
    "apo down": DPO(loss="apo_down", beta=0.5),
    "sppo": DPO(loss="sppo", beta=0.5),
    "simpo": DPO(reference_free=True, length_normalised=True, beta=2.0, margin=1.0),
    "cpo": DPO(reference_free=True, beta=0.1, nll_coefficient=1.0, nll_per_token=False),
    "orpo": DPO(loss="orpo", reference_free=True, length_normalised=True, beta=0.1, nll_coefficient=1.0),
    "rpo": DPO(beta=0.5, nll_coefficient=0.7),
    "ld-dpo": DPO(beta=0.5, ld_alpha=0.3),
    "wpo": DPO(beta=0.5, weighting="probability"),
    "wpo aligned": DPO(beta=0.5, weighting="aligned"),
}


def evaluate(params, inputs):
    """A log-probability of every token, and a log-collision that depends on the parameters as well."""
    # Where the input is NaN so are both, but the model's own gradient is not: what a masked token may look like.
    bad_BGC = jnp.isnan(inputs[..., 0])
    inputs = jnp.where(bad_BGC[..., None], 0.0, inputs)
    x_BGC = jnp.einsum("bgcd,d->bgc", inputs, params["weight"]) + params["bias"]
    logp_BGC, collision_BGC = -jax.nn.softplus(x_BGC), -jax.nn.softplus(2.0 * x_BGC)
    return dpo.TokenLogps(jnp.where(bad_BGC, jnp.nan, logp_BGC), jnp.where(bad_BGC, jnp.nan, collision_BGC))


@functools.cache
def algorithm(config):
    made = dpo.make(evaluate, SGD, config)
    return made.init, jax.jit(made.update)


def step(params, batch, config):
    init, update = algorithm(config)
    state, metrics = update(init(params), batch, jax.random.key(0))
    return state.params, metrics


@pytest.fixture(scope="module")
def params():
    return {"weight": jnp.array([0.5, -1.0, 0.2]), "bias": jnp.asarray(0.3)}


@pytest.fixture(scope="module")
def batch():
    """All three pairs of three completions of unequal lengths, soft labels, some masked, one of equal texts."""
    generator = np.random.default_rng(0)
    shape = (PROMPTS, len(PAIRS))
    length_BG = generator.integers(1, LENGTH + 1, size=(PROMPTS, SAMPLES))
    mask_BK = generator.uniform(size=shape) < 0.8
    mask_BK[2, 0] = mask_BK[1, 1] = True
    equal_BK = np.zeros(shape, bool)
    equal_BK[2, 0] = True
    return dpo.Pairs(
        inputs=jnp.asarray(generator.normal(size=(PROMPTS, SAMPLES, LENGTH, WIDTH)), jnp.float32),
        completion_mask_BGC=jnp.asarray(np.arange(LENGTH) < length_BG[:, :, None]),
        first=jnp.asarray(PAIRS[:, 0]),
        second=jnp.asarray(PAIRS[:, 1]),
        label_BK=jnp.asarray(generator.choice([0.0, 0.2, 1.0], size=shape), jnp.float32),
        mask_BK=jnp.asarray(mask_BK),
        logp_ref_BGC=jnp.asarray(-generator.uniform(0.1, 2, (PROMPTS, SAMPLES, LENGTH)), jnp.float32),
        equal_BK=jnp.asarray(equal_BK),
    )


# ------------------------------------------------------------------------------------------------------ the oracle


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_odds(logp):
    return np.log(np.exp(logp) / (1 - np.exp(logp)))


def preferred_loss(w, other, config):
    """Loss of one pair as the papers write it: w preferred to the other."""
    beta = config.beta
    return {
        "sigmoid": lambda: -np.log(sigmoid(beta * (w - other) - (config.margin or 0.0))),
        "hinge": lambda: max(0.0, 1 - beta * (w - other)),
        "ipo": lambda: (w - other - 1 / (2 * beta)) ** 2,
        "nca": lambda: (
            -np.log(sigmoid(beta * w)) - 0.5 * (np.log(sigmoid(-beta * w)) + np.log(sigmoid(-beta * other)))
        ),
        "apo_zero": lambda: 1 - sigmoid(beta * w) + sigmoid(beta * other),
        "apo_down": lambda: 1 + sigmoid(beta * w) - sigmoid(beta * (w - other)),
        "orpo": lambda: -beta * np.log(sigmoid(log_odds(w) - log_odds(other))),
    }[config.loss]()


def pair_loss(first, second, label, config):
    label = (1 - config.label_smoothing) * label + config.label_smoothing * (1 - label)
    flip = config.flip_rate or 0.0
    label = (label - flip) / (1 - 2 * flip)
    if config.loss == "exo":
        q = sigmoid(config.beta * (first - second))
        return q * np.log(q / label) + (1 - q) * np.log((1 - q) / (1 - label))
    if config.loss == "sppo":
        target = (label - 0.5) / config.beta
        return (first - target) ** 2 + (second + target) ** 2
    return label * preferred_loss(first, second, config) + (1 - label) * preferred_loss(second, first, config)


def tokens_of(theta, batch, b, g):
    """logp, logp_ref and log-collision of the tokens of one completion, float64."""
    keep = np.asarray(batch.completion_mask_BGC[b, g])
    x = np.asarray(batch.inputs, np.float64)[b, g][keep] @ theta[:WIDTH] + theta[WIDTH]
    ref = np.asarray(batch.logp_ref_BGC, np.float64)[b, g][keep]
    return -np.log1p(np.exp(x)), ref, -np.log1p(np.exp(2 * x))


def log_ratio(logp, ref, shared, config):
    ratio = logp if config.reference_free else logp - ref
    if config.ld_alpha is not None:
        ratio = np.concatenate([ratio[:shared], config.ld_alpha * ratio[shared:]])
    return ratio.mean() if config.length_normalised else ratio.sum()


def oracle(theta, batch, config, frozen=None):
    """Per-pair numbers over the pairs that count, as lists; `frozen` are the parameters of WPO's weights."""
    rows = []
    for b, k in zip(*np.nonzero(batch.mask_BK & ~batch.equal_BK), strict=True):
        first, second = (tokens_of(theta, batch, b, g) for g in PAIRS[k])
        shared = min(len(first[0]), len(second[0]))
        ratios = [log_ratio(logp, ref, shared, config) for logp, ref, _ in (first, second)]
        label = float(batch.label_BK[b, k])
        loss, weight = pair_loss(ratios[0], ratios[1], label, config), 1.0
        for g in PAIRS[k]:
            logp, _, collision = tokens_of(theta if frozen is None else frozen, batch, b, g)
            if config.weighting != "none":
                weight *= np.exp((logp - (collision if config.weighting == "aligned" else 0)).mean())
        nll = [-(x[0].mean() if config.nll_per_token else x[0].sum()) for x in (first, second)]
        mixed = {
            "reward": [config.beta * x for x in ratios],
            "logp": [x[0].sum() for x in (first, second)],
            "length": [len(x[0]) for x in (first, second)],
        }
        row = {
            "loss/preference": weight * loss,
            "loss/nll": label * nll[0] + (1 - label) * nll[1],
            "pair/accuracy": label if ratios[0] > ratios[1] else 1 - label,
            "pair/margin": (2 * label - 1) * config.beta * (ratios[0] - ratios[1]),
        }
        for name, (x, y) in mixed.items():
            row |= {f"{name}/chosen": label * x + (1 - label) * y}
            row |= {f"{name}/rejected": label * y + (1 - label) * x}
        row["loss/total"] = row["loss/preference"] + (config.nll_coefficient or 0.0) * row["loss/nll"]
        if config.weighting != "none":
            row["pair/weight"] = weight
        rows.append(row)
    return {name: np.mean([row[name] for row in rows]) for name in rows[0]} | {"batch/count": len(rows)}


def oracle_gradient(theta, batch, config, eps=1e-6):
    def total(theta_moved):
        return oracle(theta_moved, batch, config, frozen=theta)["loss/total"]

    return np.array(
        [(total(theta + eps * e) - total(theta - eps * e)) / (2 * eps) for e in np.eye(len(theta))]
    )


def flat(params):
    return np.append(np.asarray(params["weight"], np.float64), float(params["bias"]))


# -------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", CONFIGS)
def test_step_equals_a_loop_over_pairs(name, params, batch):
    config = CONFIGS[name]
    new, metrics = step(params, batch, config)
    expected = oracle(flat(params), batch, config) | {"pair/equal": np.sum(batch.mask_BK & batch.equal_BK)}
    for metric, value in expected.items():
        np.testing.assert_allclose(metrics[metric], value, rtol=1e-4, atol=1e-6, err_msg=metric)
    gradient = flat(params) - flat(new)
    np.testing.assert_allclose(gradient, oracle_gradient(flat(params), batch, config), rtol=2e-4, atol=2e-6)
    assert metrics.keys() == expected.keys() | {"optimizer/gradient_norm", "optimizer/refused"}
    assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())
    assert [metric for metric in metrics if metric not in dpo.__doc__] == []


@pytest.mark.parametrize("name", ["ld-dpo", "orpo", "exo", "wpo aligned"])
def test_masked_equals_dropped(name, params, batch):
    """A completion of NaN, the pairs it is in and a position of padding, all masked, move nothing."""

    def widen(x, axis, filler):
        shape = x.shape[:axis] + (1,) + x.shape[axis + 1 :]
        return jnp.concatenate([x, jnp.full(shape, filler, x.dtype)], axis=axis)

    wider = batch._replace(
        inputs=widen(widen(batch.inputs, 1, jnp.nan), 2, jnp.nan),
        completion_mask_BGC=widen(widen(batch.completion_mask_BGC, 1, True), 2, False),
        logp_ref_BGC=widen(widen(batch.logp_ref_BGC, 1, jnp.nan), 2, jnp.nan),
        first=jnp.append(batch.first, SAMPLES),
        second=jnp.append(batch.second, 0),
        label_BK=widen(batch.label_BK, 1, jnp.nan),
        mask_BK=widen(batch.mask_BK, 1, False),
        equal_BK=widen(batch.equal_BK, 1, False),
    )
    chex.assert_trees_all_close(
        step(params, wider, CONFIGS[name]), step(params, batch, CONFIGS[name]), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", ["nca", "simpo", "exo"])
def test_swapping_pairs_and_labels_changes_nothing(name, params, batch):
    swapped = batch._replace(first=batch.second, second=batch.first, label_BK=1 - batch.label_BK)
    chex.assert_trees_all_close(
        step(params, swapped, CONFIGS[name]), step(params, batch, CONFIGS[name]), rtol=1e-4, atol=1e-6
    )


def test_order_and_microbatches_change_nothing(params, batch):
    config = CONFIGS["rpo"]
    expected = step(params, batch, config)
    index = (
        jnp.broadcast_to(batch.first, batch.label_BK.shape),
        jnp.broadcast_to(batch.second, batch.label_BK.shape),
    )
    reordered = jax.tree.map(lambda x: x[::-1], batch._replace(first=index[0], second=index[1]))
    chex.assert_trees_all_close(step(params, reordered, config), expected, rtol=1e-5, atol=1e-7)
    split = dataclasses.replace(config, microbatches=2)
    chex.assert_trees_all_close(step(params, batch, split), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["dpo", "apo down", "orpo"])
def test_equal_texts_have_no_gradient(name, params, batch):
    """A pair told to be equal, and one of a completion with itself: gradient 0 to the bit, and counted."""
    told = batch._replace(mask_BK=batch.equal_BK)
    itself = batch._replace(first=jnp.zeros(3, int), second=jnp.zeros(3, int), equal_BK=None)
    for given, pairs in ((told, 1), (itself, int(jnp.sum(batch.mask_BK)))):
        new, metrics = step(params, given, CONFIGS[name])
        chex.assert_trees_all_equal(new, params)
        assert (metrics["pair/equal"], metrics["batch/count"]) == (pairs, 0)
        assert all(np.isfinite(x) for x in metrics.values())


def test_flipped_labels_average_to_the_clean_loss(params, batch):
    """Robust DPO, weighted over both values of an observed label, has the gradient of DPO on the true ones."""
    e, config = 0.1, CONFIGS["robust"]
    clean = batch._replace(label_BK=jnp.round(batch.label_BK))
    kept, _ = step(params, clean, config)
    flipped, _ = step(params, clean._replace(label_BK=1 - clean.label_BK), config)
    mean = jax.tree.map(lambda a, b: (1 - e) * a + e * b, kept, flipped)
    expected, _ = step(params, clean, CONFIGS["dpo"])
    chex.assert_trees_all_close(mean, expected, rtol=1e-4, atol=1e-6)


def test_limits_join_the_methods(params, batch):
    plain = step(params, batch, CONFIGS["dpo"])
    for same in (DPO(beta=0.5, flip_rate=0.0), DPO(beta=0.5, ld_alpha=1.0), DPO(beta=0.5, margin=0.0)):
        chex.assert_trees_all_close(step(params, batch, same), plain, rtol=1e-5, atol=1e-7)


def test_beta_may_be_traced(params, batch):
    """A sweep over float fields is a vmap."""

    def total(beta, smoothing):
        config = DPO(beta=beta, label_smoothing=smoothing)
        return dpo.loss(params, batch, evaluate=evaluate, config=config)[0]

    betas, smoothing = jnp.array([0.5, 0.5]), jnp.array([0.0, 0.1])
    totals = jax.jit(jax.vmap(total))(betas, smoothing)
    for given, name in zip(totals, ("dpo", "cdpo"), strict=True):
        expected = oracle(flat(params), batch, CONFIGS[name])
        np.testing.assert_allclose(given, expected["loss/total"] * expected["batch/count"], rtol=1e-5)


def test_soft_labels_lead_to_the_tilted_reference():
    """On all pairs of four outcomes, DPO and EXO end at pi_ref exp(reward / beta) / Z, IPO at its own fixed point."""
    beta, reward = 0.5, np.array([0.3, -0.4, 0.9, 0.0])
    logp_ref = np.log([0.1, 0.4, 0.2, 0.3])
    first, second = np.array(list(itertools.combinations(range(4), 2))).T
    label = sigmoid(reward[first] - reward[second])
    pairs = dpo.Pairs(
        inputs=jnp.zeros(1),
        completion_mask_BGC=jnp.ones((1, 4, 1), bool),
        first=jnp.asarray(first),
        second=jnp.asarray(second),
        label_BK=jnp.asarray(label[None], jnp.float32),
        mask_BK=jnp.ones((1, 6), bool),
        logp_ref_BGC=jnp.asarray(logp_ref[None, :, None], jnp.float32),
    )
    tilted = np.exp(logp_ref + reward / beta)
    # The least squares of all differences (2 label - 1) / (2 beta): each outcome's mean against the others.
    target = np.zeros((4, 4))
    target[first, second] = (2 * label - 1) / (2 * beta)
    least_squares = np.exp(logp_ref + (target - target.T).sum(axis=1) / 4)
    for name, expected in (("sigmoid", tilted), ("exo", tilted), ("ipo", least_squares)):
        config = DPO(loss=name, beta=beta, label_smoothing=1e-9)
        made = dpo.make(lambda p, _: jax.nn.log_softmax(p)[None, :, None], optax.adam(0.05), config)

        def one(state, _, update=made.update):
            return update(state, pairs, jax.random.key(0))[0], None

        state, _ = jax.jit(lambda s, one=one: jax.lax.scan(one, s, length=500))(made.init(jnp.zeros(4)))
        given = np.asarray(jax.nn.softmax(state.params))
        np.testing.assert_allclose(given, expected / expected.sum(), atol=2e-3, err_msg=name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DPO(loss="kto"), "loss='kto' is unknown; choose among sigmoid, hinge"),
        (DPO(weighting="wpo"), "weighting='wpo' is unknown"),
        (DPO(loss="ipo", margin=1.0), 'margin belongs to loss="sigmoid"'),
        (DPO(loss="exo"), "infinite on hard labels; set label_smoothing"),
        (DPO(loss="exo", label_smoothing=0.1, flip_rate=0.1), "flip_rate cannot correct it"),
        (DPO(flip_rate=0.5), r"flip_rate must be in \[0, 0.5\)"),
        (DPO(label_smoothing=-0.1), r"label_smoothing must be in \[0, 0.5\)"),
        (DPO(loss="orpo"), "set reference_free and length_normalised"),
        (DPO(ld_alpha=0.5, length_normalised=True), "choose one"),
    ],
)
def test_configs_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        dpo.make(evaluate, SGD, config)


def test_bad_batches_are_named(params, batch):
    def given(evaluate=evaluate, config=CONFIGS["dpo"], **fields):  # noqa: B008
        return dpo.loss(params, batch._replace(**fields), evaluate=evaluate, config=config)

    with pytest.raises(TypeError, match="label_BK must be a float probability, got int32"):
        given(label_BK=jnp.ones(batch.label_BK.shape, jnp.int32))
    with pytest.raises(ValueError, match="logp_ref_BGC is missing: .* set reference_free"):
        given(logp_ref_BGC=None)
    with pytest.raises(ValueError, match="logp_ref_BGC must be float of the shape"):
        given(logp_ref_BGC=batch.logp_ref_BGC[:, :, 0])
    with pytest.raises(ValueError, match="evaluate gave logp of shape"):
        given(evaluate=lambda p, x: evaluate(p, x).logp[:, :, :1])
    with pytest.raises(ValueError, match="needs evaluate to give TokenLogps"):
        given(evaluate=lambda p, x: evaluate(p, x).logp, config=CONFIGS["wpo aligned"])
    with pytest.raises(ValueError, match=r"batch.first must be \[K\] = \(3,\)"):
        given(first=batch.first[:2])
    with pytest.raises(TypeError, match="batch.mask_BK must be bool"):
        given(mask_BK=batch.label_BK)


def test_values_are_checked_on_the_host(batch):
    dpo.check_pairs(batch)
    assert bool(batch.mask_BK[1, 1])

    def at(x, *place, value):
        return x.at[place].set(value)

    with pytest.raises(ValueError, match="label_BK is 1.5 at prompt 1, pair 1; it must be a probability"):
        dpo.check_pairs(batch._replace(label_BK=at(batch.label_BK, 1, 1, value=1.5)))
    with pytest.raises(ValueError, match="label_BK is nan at prompt 1, pair 1"):
        dpo.check_pairs(batch._replace(label_BK=at(batch.label_BK, 1, 1, value=jnp.nan)))
    with pytest.raises(ValueError, match="second is 3 at prompt 0, pair .*below the 3 completions"):
        dpo.check_pairs(batch._replace(mask_BK=batch.mask_BK | True, second=at(batch.second, 0, value=3)))
    with pytest.raises(ValueError, match="logp_ref_BGC of first is nan .*finite and at most 0"):
        dpo.check_pairs(batch._replace(logp_ref_BGC=at(batch.logp_ref_BGC, 1, 0, 0, value=jnp.nan)))
    with pytest.raises(ValueError, match="the length of first is 0 .*at least one token"):
        dpo.check_pairs(batch._replace(completion_mask_BGC=at(batch.completion_mask_BGC, 1, 0, value=False)))
    masked = batch._replace(mask_BK=batch.mask_BK & False, label_BK=batch.label_BK + 7)
    dpo.check_pairs(masked)
