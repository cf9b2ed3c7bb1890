"""PPO's options: each against a float64 NumPy account of the update, and off, against nothing at all."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from test_algorithms_ppo import as_float64, numerical_gradient, softmax64

from rlhfjax.algorithms import make_optimizer, ppo, sft
from rlhfjax.algorithms.algorithm import Evaluation
from rlhfjax.config import PPO, Optimizer

ROWS, SAMPLES, LENGTH, STATES, ACTIONS = 8, 2, 4, 3, 5
SHAPE = (ROWS, SAMPLES, LENGTH)
SGD = optax.sgd(1.0)
BASE = PPO(epochs=1, kl_coefficient=0.3, discount=0.9, lam=0.7, whiten_advantages=False)


def tabular(params, inputs, reference=None):
    """A softmax policy and a value per state; with the reference's logits, the exact KL of every state."""
    table_SV = jax.nn.log_softmax(params["logits"])
    logp_V = table_SV[inputs["state"]]
    logp = jnp.take_along_axis(logp_V, inputs["action"][..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logp_V) * logp_V, axis=-1)
    kl = None
    if reference is not None:
        kl_S = jnp.sum(jnp.exp(table_SV) * (table_SV - jax.nn.log_softmax(reference)), axis=-1)
        kl = kl_S[inputs["state"]]
    return Evaluation(logp, entropy, params["value"][inputs["state"]], kl)


def tabular_text(params, inputs):
    """Log-probabilities of the pretraining text under the same policy."""
    return tabular(params, inputs)[0]


RNG = np.random.default_rng(0)
PARAMS = {
    "logits": jnp.asarray(RNG.normal(size=(STATES, ACTIONS)), jnp.float32),
    "value": jnp.asarray(RNG.normal(size=STATES), jnp.float32),
}
REFERENCE = jnp.asarray(RNG.normal(size=(STATES, ACTIONS)), jnp.float32)


def text_batch():
    """Two texts a row, some weights 0 with an invalid action under them."""
    shape = (ROWS, 2, 3)
    weight = RNG.uniform(size=shape) * (RNG.uniform(size=shape) < 0.7)
    action = np.where(weight > 0, RNG.integers(ACTIONS, size=shape), 99)
    inputs = {"state": jnp.asarray(RNG.integers(STATES, size=shape)), "action": jnp.asarray(action)}
    return sft.Batch(inputs, jnp.asarray(weight, jnp.float32))


def make_rollout():
    """Ragged, off policy by far enough that every bound is met; NaN under the mask."""
    inputs = {
        "state": jnp.asarray(RNG.integers(STATES, size=SHAPE)),
        "action": jnp.asarray(RNG.integers(ACTIONS, size=SHAPE)),
    }
    length = RNG.integers(1, LENGTH + 1, size=SHAPE[:2])
    mask = jnp.asarray(np.arange(LENGTH)[None, None] < length[..., None])
    evaluation = tabular(PARAMS, inputs, REFERENCE)
    assert evaluation.value is not None and evaluation.kl is not None
    reference = tabular({"logits": REFERENCE, "value": PARAMS["value"]}, inputs)

    def noise(scale):
        return jnp.asarray(RNG.normal(size=SHAPE) * scale, jnp.float32)

    fields = {
        "logp": evaluation.logp + noise(0.5),
        "logp_ref": reference.logp,
        "value": evaluation.value + noise(0.3),
        "reward": noise(1.5),
        "kl": evaluation.kl + jnp.abs(noise(0.1)),
    }
    fields = {name: jnp.where(mask, x, jnp.nan) for name, x in fields.items()}
    return ppo.Rollout(inputs=inputs, mask=mask, reference=REFERENCE, ptx=text_batch(), **fields)


ROLLOUT = make_rollout()


def fitting(rollout, config):
    """The rollout without what this configuration does not ask for."""
    return rollout if config.ptx_coefficient is not None else rollout._replace(ptx=None)


def algorithm_of(config, optimizer: optax.GradientTransformation = SGD, **keywords):
    return ppo.make(tabular, optimizer, config, evaluate_ptx=tabular_text, is_policy=is_policy, **keywords)


def is_policy(params):
    return {name: name == "logits" for name in params}


@functools.cache
def compiled(config):
    algorithm = algorithm_of(config)
    return algorithm.init, jax.jit(algorithm.update)


def step(config, rollout=ROLLOUT, seed=0):
    """Parameters and metrics after one update."""
    init, update = compiled(config)
    state, metrics = update(init(PARAMS), fitting(rollout, config), jax.random.key(seed))
    return state.params, metrics


# ------------------------------------------------------------------------------------------------- float64 account


def estimate(name, logp, logp_ref, exact):
    d = logp - logp_ref
    return {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d, "exact": exact}[name]


def expected_targets(config):
    """Advantages, returns and shares clipped, by plain loops over sequences and time."""
    rollout = as_float64(ROLLOUT._replace(inputs={}, reference=None, ptx=None))
    mask, reward = np.asarray(ROLLOUT.mask), rollout.reward
    shares = {"reward": 0, "sequences": 0, "kl": 0.0}
    advantage, returns = np.full(SHAPE, np.nan), np.full(SHAPE, np.nan)
    for i in np.ndindex(SHAPE[:2]):
        bounded, penalty = reward[i].copy(), np.zeros(LENGTH)
        if config.reward_clip is not None:
            bounded = np.clip(bounded, -config.reward_clip, config.reward_clip)
        places = np.flatnonzero(mask[i])
        shares["sequences"] += 1
        shares["reward"] += bool(np.any(bounded[places] != reward[i][places]))
        if config.kl_placement == "reward":
            penalty = estimate(config.kl_estimator, rollout.logp[i], rollout.logp_ref[i], rollout.kl[i])
            shares["kl"] += penalty[places].sum()
        critic_lam = config.lam if config.critic_lam is None else config.critic_lam
        for lam, out, base in ((config.lam, advantage, 0.0), (critic_lam, returns, 1.0)):
            following, next_value = 0.0, 0.0
            for t in places[::-1]:
                r = bounded[t] - config.kl_coefficient * penalty[t]
                delta = r + config.discount * next_value - rollout.value[i][t]
                following = delta + config.discount * lam * following
                next_value = rollout.value[i][t]
                out[i][t] = following + base * next_value
    if config.whiten_advantages:
        counted = advantage[mask]
        advantage = (advantage - counted.mean()) / np.sqrt(counted.var() + 1e-8)
    unclipped = advantage
    if config.advantage_clip is not None:
        advantage = np.clip(advantage, -config.advantage_clip, config.advantage_clip)
    shares["advantage"] = np.mean((advantage != unclipped)[mask])
    return advantage, returns, shares


def expected_loss(params, advantage, returns, config):
    """The mean loss by a loop over single actions and single words of text, and its parts."""
    logp_table = np.log(softmax64(params["logits"]))
    ref_table = np.log(softmax64(np.asarray(REFERENCE, np.float64)))
    rollout = as_float64(ROLLOUT._replace(reference=None))
    parts = {"policy": 0.0, "value": 0.0, "kl": 0.0, "dual": 0.0}
    places = list(zip(*np.nonzero(np.asarray(ROLLOUT.mask)), strict=True))
    for i in places:
        s, a = rollout.inputs["state"][i], rollout.inputs["action"][i]
        ratio = np.exp(logp_table[s, a] - rollout.logp[i])
        gain = min(ratio * advantage[i], np.clip(ratio, 0.8, 1.2) * advantage[i])
        if config.dual_clip is not None and advantage[i] < 0:
            parts["dual"] += gain < config.dual_clip * advantage[i]
            gain = max(gain, config.dual_clip * advantage[i])
        value = params["value"][s]
        bounded = rollout.value[i] + np.clip(value - rollout.value[i], -0.2, 0.2)
        parts["policy"] -= gain
        parts["value"] += max((value - returns[i]) ** 2, (bounded - returns[i]) ** 2) / 2
        if config.kl_placement == "loss":
            exact = np.sum(np.exp(logp_table[s]) * (logp_table[s] - ref_table[s]))
            parts["kl"] += estimate(config.kl_estimator, logp_table[s, a], ref_table[s, a], exact)
    parts = {name: x / len(places) for name, x in parts.items()}
    total = parts["policy"] + 0.1 * parts["value"] + config.kl_coefficient * parts["kl"]
    if config.ptx_coefficient is not None:
        inputs, weight = rollout.ptx.inputs, np.asarray(rollout.ptx.weight, np.float64)
        text = [i for i in np.ndindex(weight.shape) if weight[i] > 0]
        nll = -sum(weight[i] * logp_table[inputs["state"][i], inputs["action"][i]] for i in text)
        parts["ptx"] = nll / weight.sum()
        total += config.ptx_coefficient * parts["ptx"]
    return total, parts


CASES = {
    "k2 in the reward": {"kl_estimator": "k2"},
    "k3 in the reward, clipped reward": {"kl_estimator": "k3", "reward_clip": 0.8},
    "exact in the reward, two lambdas": {"kl_estimator": "exact", "critic_lam": 1.0},
    "k2 in the loss, clipped advantage": {
        "kl_placement": "loss",
        "kl_estimator": "k2",
        "whiten_advantages": True,
        "advantage_clip": 0.9,
    },
    "k3 in the loss, dual clip": {"kl_placement": "loss", "kl_estimator": "k3", "dual_clip": 1.5},
    "exact in the loss, pretraining text": {
        "kl_placement": "loss",
        "kl_estimator": "exact",
        "ptx_coefficient": 0.7,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_loops(name):
    config = dataclasses.replace(BASE, **CASES[name])
    new, metrics = step(config)
    advantage, returns, shares = expected_targets(config)
    start = as_float64(PARAMS)
    total, parts = expected_loss(start, advantage, returns, config)
    expected = {"loss/total": total, "loss/policy": parts["policy"], "loss/value": parts["value"]}
    if config.kl_placement == "loss":
        expected["loss/kl"] = parts["kl"]
    elif config.kl_estimator != "k1":
        expected["objective/kl_estimate"] = shares["kl"] / shares["sequences"]
    if config.reward_clip is not None:
        expected["reward/clip_fraction"] = shares["reward"] / shares["sequences"]
        assert 0.1 < expected["reward/clip_fraction"] < 0.9
    if config.advantage_clip is not None:
        expected["advantage/clip_fraction"] = shares["advantage"]
        assert 0.1 < shares["advantage"] < 0.9
    if config.dual_clip is not None:
        expected["policy/dual_clip_fraction"] = parts["dual"]
        assert 0.05 < parts["dual"] < 0.9
    if config.ptx_coefficient is not None:
        expected["loss/ptx"] = parts["ptx"]
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)
    _, plain = step(BASE)
    assert set(metrics) - set(plain) == set(expected) - {"loss/total", "loss/policy", "loss/value"}
    gradient = numerical_gradient(lambda p: expected_loss(p, advantage, returns, config)[0], start)
    for leaf in PARAMS:
        np.testing.assert_allclose(PARAMS[leaf] - new[leaf], gradient[leaf], rtol=1e-3, atol=1e-6)


def test_options_that_bind_nothing_change_nothing():
    """At the value where it has no effect an option gives the step without it, bit by bit."""
    config = dataclasses.replace(BASE, epochs=2, minibatches=2)
    inf = float("inf")
    neutral = {"dual_clip": inf, "critic_lam": config.lam, "reward_clip": inf, "advantage_clip": inf}
    expected, expected_metrics = step(config)
    got, metrics = step(dataclasses.replace(config, **neutral))
    chex.assert_trees_all_equal(got, expected)
    for name in ("reward/clip_fraction", "advantage/clip_fraction", "policy/dual_clip_fraction"):
        assert metrics.pop(name) == 0
    chex.assert_trees_all_equal(metrics, expected_metrics)


# ------------------------------------------------------------------------------------- what holds for every option

EVERYTHING = dataclasses.replace(
    BASE,
    kl_placement="loss",
    kl_estimator="exact",
    critic_lam=1.0,
    dual_clip=1.5,
    reward_clip=0.8,
    advantage_clip=0.9,
    ptx_coefficient=0.7,
    entropy_coefficient=0.1,
    whiten_advantages=True,
    epochs=2,
    minibatches=2,
    kl_target=1.0,
    kl_horizon=50.0,
)
SAMPLED = dataclasses.replace(EVERYTHING, kl_estimator="k2")
IN_REWARD = dataclasses.replace(EVERYTHING, kl_placement="reward")


@pytest.mark.parametrize("config", [SAMPLED, IN_REWARD], ids=["in the loss", "in the reward"])
def test_masked_positions_equal_dropped_positions(config):
    places = jnp.array([0, 2, 3, 5])

    def spread(x, filler):
        return jnp.full((*SHAPE[:2], LENGTH + 2), filler, x.dtype).at[..., places].set(x)

    names = ("logp", "logp_ref", "value", "reward", "kl")
    padded = {name: spread(getattr(ROLLOUT, name), jnp.nan) for name in names}
    inputs = jax.tree.map(lambda x: spread(x, 1), ROLLOUT.inputs)
    other = ROLLOUT._replace(inputs=inputs, mask=spread(ROLLOUT.mask, False), **padded)
    (expected, expected_metrics), (got, metrics) = step(config), step(config, other)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-4, atol=1e-6)


def test_accumulated_microbatches_give_the_same_step():
    """Actions and text are counted apart, over the whole minibatch; the reference is not cut."""
    whole, whole_metrics = step(EVERYTHING)
    parts, parts_metrics = step(dataclasses.replace(EVERYTHING, microbatches=4))
    chex.assert_trees_all_close(whole, parts, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(whole_metrics, parts_metrics, rtol=1e-4, atol=1e-6)


def test_what_the_model_says_under_the_mask_is_never_read():
    sample, _ = ppo.targets(ROLLOUT, jnp.float32(0.3), config=EVERYTHING)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(filler):
        def filled(params, inputs):
            evaluation = tabular(params, inputs, REFERENCE)
            return jax.tree.map(lambda x: jnp.where(ROLLOUT.mask, x, filler), evaluation)

        def loss(params):
            return ppo.loss(params, sample, evaluate=filled, config=EVERYTHING, evaluate_ptx=tabular_text)

        return jax.value_and_grad(loss, has_aux=True)(PARAMS)

    chex.assert_trees_all_equal(gradient(float("nan")), gradient(1.0))


def test_shard_map_equals_one_device():
    """Shares and the balance of text and actions are those of the global batch; so is the warm-up."""
    config = dataclasses.replace(EVERYTHING, minibatches=1, critic_warmup=1)
    rollout = fitting(ROLLOUT, config)
    algorithm = algorithm_of(config, axis_name="data")
    split, everywhere = PartitionSpec("data"), PartitionSpec()
    specs = jax.tree.map(lambda _: split, rollout)._replace(reference=everywhere)
    update = jax.shard_map(
        algorithm.update,
        mesh=Mesh(np.array(jax.devices()[:4]), ("data",)),
        in_specs=(everywhere, specs, everywhere),
        out_specs=everywhere,
    )
    init, alone = compiled(config)
    one = several = init(PARAMS)
    several_update = jax.jit(update)
    for i in range(2):
        one, metrics = alone(one, rollout, jax.random.key(i))
        several, several_metrics = several_update(several, rollout, jax.random.key(i))
        as_numpy = jax.tree.map(np.asarray, (several_metrics, metrics))
        chex.assert_trees_all_close(*as_numpy, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(*jax.tree.map(np.asarray, (several, one)), rtol=1e-4, atol=1e-6)
    assert not np.allclose(one.params["logits"], PARAMS["logits"], atol=1e-3)


def test_metrics_keep_their_names_and_are_documented():
    init, update = compiled(SAMPLED)
    state = init(PARAMS)
    for i in range(2):
        state, metrics = update(state, ROLLOUT, jax.random.key(i))
        assert all(x.dtype == jnp.float32 and x.shape == () and jnp.isfinite(x) for x in metrics.values())
        assert [name for name in metrics if not re.search(rf"\b{name}\b", str(ppo.__doc__))] == []


def test_adaptive_coefficient_is_the_one_in_the_loss():
    """The controller's present coefficient, not the one of the config."""
    init, update = compiled(SAMPLED)
    first, _ = update(init(PARAMS), ROLLOUT, jax.random.key(0))
    assert not np.allclose(first.kl_coefficient, SAMPLED.kl_coefficient, rtol=1e-2)
    _, metrics = update(first, ROLLOUT, jax.random.key(1))
    total = metrics["loss/policy"] + 0.1 * metrics["loss/value"] - 0.1 * metrics["policy/entropy"]
    total += 0.7 * metrics["loss/ptx"] + first.kl_coefficient * metrics["loss/kl"]
    np.testing.assert_allclose(metrics["loss/total"], total, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- critic warm-up

ADAMW = make_optimizer(Optimizer(learning_rate=0.05, weight_decay=0.1, max_grad_norm=1.0), 100)
WARM = dataclasses.replace(
    BASE,
    kl_placement="loss",
    kl_estimator="k2",
    ptx_coefficient=0.7,
    epochs=2,
    minibatches=2,
    kl_target=1.0,
    critic_warmup=2,
)


@pytest.fixture(scope="module")
def warm_run():
    """States and metrics of four updates, of which the first two hold the policy."""
    algorithm = algorithm_of(WARM, ADAMW)
    update = jax.jit(algorithm.update)
    states, metrics = [algorithm.init(PARAMS)], []
    for i in range(4):
        state, measured = update(states[-1], ROLLOUT, jax.random.key(i))
        states.append(state)
        metrics.append(measured)
    return states, metrics


def test_warm_up_holds_the_policy_bit_by_bit(warm_run):
    """Weight decay, momentum and the optimiser's step count included; the critic moves at once."""
    states, metrics = warm_run
    for state in states[1:3]:
        np.testing.assert_array_equal(state.params["logits"], PARAMS["logits"])
        np.testing.assert_array_equal(state.kl_coefficient, states[0].kl_coefficient)
    values = [np.asarray(state.params["value"]) for state in states]
    assert all(not np.allclose(a, b, atol=1e-4) for a, b in zip(values, values[1:], strict=False))
    assert not np.allclose(states[3].params["logits"], PARAMS["logits"], atol=1e-3)
    assert states[3].kl_coefficient != states[2].kl_coefficient
    assert [float(m["policy/logp_gap"]) == float(metrics[0]["policy/logp_gap"]) for m in metrics] == [
        True,
        True,
        True,
        False,
    ]


def test_policy_starts_as_if_nothing_had_been_before(warm_run):
    """The first steps after the warm-up are those of a new optimiser, bias correction and schedule included."""
    states, _ = warm_run
    fresh = algorithm_of(dataclasses.replace(WARM, critic_warmup=0), split_optimizer())
    start = fresh.init(states[2].params)._replace(kl_coefficient=states[2].kl_coefficient)
    expected, _ = jax.jit(fresh.update)(start, ROLLOUT, jax.random.key(2))
    np.testing.assert_allclose(states[3].params["logits"], expected.params["logits"], rtol=1e-6)


def split_optimizer():
    return optax.partition({"policy": ADAMW, "rest": ADAMW}, {"logits": "policy", "value": "rest"})


def test_warm_up_is_the_value_loss_alone(warm_run):
    """The critic's parameters go where the value loss takes them with no policy in sight."""
    states, metrics = warm_run
    config = dataclasses.replace(WARM, epochs=1, minibatches=1)
    algorithm = algorithm_of(config)
    state, measured = jax.jit(algorithm.update)(algorithm.init(PARAMS), ROLLOUT, jax.random.key(0))
    _, returns, _ = expected_targets(config)
    slope = numerical_gradient(
        lambda p: expected_loss(
            {"logits": as_float64(PARAMS)["logits"], **p}, np.zeros(SHAPE), returns, config
        )[0],
        {"value": as_float64(PARAMS)["value"]},
    )["value"]
    np.testing.assert_allclose(PARAMS["value"] - state.params["value"], slope, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(measured["optimizer/gradient_norm"], np.linalg.norm(slope), rtol=1e-3)
    assert metrics[0]["optimizer/gradient_norm"] < metrics[3]["optimizer/gradient_norm"]


def test_warm_up_holds_a_trunk_that_the_critic_shares():
    """What the value loss says of the policy's parameters is not heard while they are held."""

    def shared(params, inputs, reference=None):
        value = params["head"] + jnp.sum(params["trunk"], axis=-1)
        return tabular({"logits": params["trunk"], "value": value}, inputs, reference)

    params = {"trunk": PARAMS["logits"], "head": PARAMS["value"]}
    algorithm = ppo.make(
        shared,
        ADAMW,
        dataclasses.replace(BASE, critic_warmup=1),
        is_policy=lambda _: {"trunk": True, "head": False},
    )
    update = jax.jit(algorithm.update)
    held, _ = update(algorithm.init(params), fitting(ROLLOUT, BASE), jax.random.key(0))
    np.testing.assert_array_equal(held.params["trunk"], params["trunk"])
    assert not np.allclose(held.params["head"], params["head"], atol=1e-4)
    moved, _ = update(held, fitting(ROLLOUT, BASE), jax.random.key(1))
    assert not np.allclose(moved.params["trunk"], params["trunk"], atol=1e-4)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_placement": "loss"}, 'k1" in the loss does nothing.*mean zero.*choose "k2"'),
        ({"kl_placement": "score"}, "kl_placement='score' is unknown; choose"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4' is unknown; choose"),
        ({"dual_clip": 1.0}, "dual_clip=1.0 must be above 1"),
        ({"critic_warmup": -1}, "critic_warmup must be at least 0"),
        ({"critic_warmup": 3}, "critic_warmup=3 must know what to hold: give `make` is_policy"),
        ({"ptx_coefficient": 0.1}, "give `make` evaluate_ptx"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ppo.make(tabular, SGD, PPO(**changes))


def test_bad_batches_are_named():
    def update(changes, evaluate=tabular, **settings):
        algorithm = ppo.make(evaluate, SGD, PPO(**settings), evaluate_ptx=tabular_text)
        rollout = ROLLOUT._replace(**({"ptx": None} | changes))
        jax.eval_shape(algorithm.update, algorithm.init(PARAMS), rollout, jax.random.key(0))

    with pytest.raises(ValueError, match='"exact" in the reward needs rollout.kl'):
        update({"kl": None}, kl_estimator="exact")
    with pytest.raises(ValueError, match='evaluate gave no kl: kl_estimator="exact" needs'):
        update({"reference": None}, kl_estimator="exact", kl_placement="loss")
    with pytest.raises(ValueError, match="evaluate gave no value: PPO needs a critic"):
        update({}, evaluate=lambda *arguments: tabular(*arguments)[:2])
    with pytest.raises(ValueError, match="rollout.ptx is given, but ptx_coefficient is None"):
        update({"ptx": text_batch()})
    with pytest.raises(ValueError, match="ptx_coefficient is set, but rollout.ptx is None"):
        update({}, ptx_coefficient=0.5)
    with pytest.raises(
        ValueError, match=r"rollout.ptx.weight has shape \(7, 2, 3\); its leading axis must be"
    ):
        update({"ptx": jax.tree.map(lambda x: x[:-1], text_batch())}, ptx_coefficient=0.5)
    with pytest.raises(TypeError, match="rollout.kl must be float"):
        update({"kl": jnp.ones(SHAPE, jnp.int32)})
