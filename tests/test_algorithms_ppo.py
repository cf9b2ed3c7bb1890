"""PPO on tabular policies, against a float64 NumPy account of the same update and against closed forms."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.algorithms import make_optimizer, ppo
from rlhfjax.config import PPO, Optimizer

ROWS, SAMPLES, LENGTH, STATES, ACTIONS = 8, 2, 4, 3, 5
SGD = optax.sgd(1.0)
ONE_STEP = PPO(epochs=1, kl_coefficient=0.3, discount=0.9, lam=0.7)
TWO_EPOCHS = dataclasses.replace(ONE_STEP, epochs=2, minibatches=2)


def evaluate(params, inputs):
    """A softmax policy and a value per state: the smallest model with the interface of a language model."""
    logp_V = jax.nn.log_softmax(params["logits"])[inputs["state"]]
    logp = jnp.take_along_axis(logp_V, inputs["action"][..., None], axis=-1)[..., 0]
    return logp, -jnp.sum(jnp.exp(logp_V) * logp_V, axis=-1), params["value"][inputs["state"]]


@pytest.fixture(scope="module")
def params():
    generator = np.random.default_rng(0)
    return {
        "logits": jnp.asarray(generator.normal(size=(STATES, ACTIONS)), jnp.float32),
        "value": jnp.asarray(generator.normal(size=STATES), jnp.float32),
    }


@pytest.fixture(scope="module")
def rollout(params):
    """Ragged, on policy; what lies under the mask is NaN."""
    generator = np.random.default_rng(1)
    shape = (ROWS, SAMPLES, LENGTH)
    inputs = {
        "state": jnp.asarray(generator.integers(STATES, size=shape)),
        "action": jnp.asarray(generator.integers(ACTIONS, size=shape)),
    }
    length = generator.integers(1, LENGTH + 1, size=shape[:2])
    mask = jnp.asarray(np.arange(LENGTH)[None, None] < length[..., None])
    logp, _, value = evaluate(params, inputs)

    def noise(scale):
        return jnp.asarray(generator.normal(size=shape) * scale, jnp.float32)

    fields = {"logp": logp, "logp_ref": logp + noise(0.3), "value": value, "reward": noise(1.0)}
    fields = {name: jnp.where(mask, x, jnp.nan) for name, x in fields.items()}
    return ppo.Rollout(inputs=inputs, mask=mask, **fields)


def with_behaviour(rollout, params, seed=2):
    """The rollout of a slightly different policy and value, so that clipping takes place."""
    generator = np.random.default_rng(seed)
    shape = rollout.mask.shape
    shift = jnp.asarray(generator.normal(size=(2, *shape)) * 0.3, jnp.float32)
    return rollout._replace(logp=rollout.logp + shift[0], value=rollout.value + shift[1])


@functools.cache
def compiled(config):
    """`init` and the jitted `update`, shared by all tests of one configuration."""
    algorithm = ppo.make(evaluate, SGD, config)
    return algorithm.init, jax.jit(algorithm.update)


def step(params, rollout, config):
    """Parameters and metrics after one update."""
    init, update = compiled(config)
    state, metrics = update(init(params), rollout, jax.random.key(0))
    return state.params, metrics


def as_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64 if x.dtype == jnp.float32 else None), tree)


def softmax64(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def expected_targets(rollout, config, kl_coefficient=None):
    """Penalised rewards, advantages and returns by plain loops over sequences and time."""
    rollout = as_float64(rollout)
    beta = config.kl_coefficient if kl_coefficient is None else kl_coefficient
    reward = rollout.reward - beta * (rollout.logp - rollout.logp_ref)
    advantage, returns = np.full_like(reward, np.nan), np.full_like(reward, np.nan)
    if config.whiten_rewards:
        counted = reward[rollout.mask]
        reward = (reward - counted.mean()) / np.sqrt(counted.var() + 1e-8) + counted.mean()
    for i in np.ndindex(reward.shape[:-1]):
        places = np.flatnonzero(rollout.mask[i])
        following, next_value = 0.0, 0.0
        for t in places[::-1]:
            delta = reward[i][t] + config.discount * next_value - rollout.value[i][t]
            following = delta + config.discount * config.lam * following
            next_value = rollout.value[i][t]
            advantage[i][t], returns[i][t] = following, following + next_value
    return advantage, returns


def expected_loss(params, rollout, advantage, returns, config):
    """The PPO objective by a loop over single actions; also the share of clipped actions."""
    logp_table = np.log(softmax64(params["logits"]))
    total, policy_clipped, value_clipped, n = 0.0, 0, 0, 0
    for i in zip(*np.nonzero(rollout.mask), strict=True):
        state, action = rollout.inputs["state"][i], rollout.inputs["action"][i]
        ratio = np.exp(logp_table[state, action] - rollout.logp[i])
        bounded = np.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
        gain = min(ratio * advantage[i], bounded * advantage[i])
        move = np.clip(params["value"][state] - rollout.value[i], -config.value_clip, config.value_clip)
        errors = [params["value"][state] - returns[i], rollout.value[i] + move - returns[i]]
        squared = max(e**2 for e in errors)
        entropy = -(np.exp(logp_table[state]) * logp_table[state]).sum()
        total += -gain + config.value_coefficient * squared / 2
        total -= (config.entropy_coefficient or 0.0) * entropy
        policy_clipped += gain < ratio * advantage[i]
        value_clipped += squared > errors[0] ** 2
        n += 1
    return total / n, policy_clipped / n, value_clipped / n


def numerical_gradient(function, params, width=1e-6):
    """Central differences of a scalar function of a dict of float64 arrays."""
    gradient = jax.tree.map(np.zeros_like, params)
    for name, x in params.items():
        for i in np.ndindex(x.shape):
            ends = []
            for sign in (1, -1):
                moved = {**params, name: x.copy()}
                moved[name][i] += sign * width
                ends.append(function(moved))
            gradient[name][i] = (ends[0] - ends[1]) / (2 * width)
    return gradient


def test_first_step_is_the_plain_policy_gradient(params, rollout):
    """On policy the ratio is 1 and nothing is clipped: PPO is whitened REINFORCE and a regression."""
    new, metrics = step(params, rollout, ONE_STEP)
    advantage, returns = expected_targets(rollout, ONE_STEP)
    mask = np.asarray(rollout.mask)
    counted = advantage[mask]
    whitened = (advantage - counted.mean()) / np.sqrt(counted.var() + 1e-8)
    p, old = softmax64(as_float64(params)["logits"]), as_float64(params)
    ascent = {"logits": np.zeros((STATES, ACTIONS)), "value": np.zeros(STATES)}
    for i in zip(*np.nonzero(mask), strict=True):
        s, a = rollout.inputs["state"][i], rollout.inputs["action"][i]
        ascent["logits"][s] += whitened[i] * (np.eye(ACTIONS)[a] - p[s]) / mask.sum()
        ascent["value"][s] += ONE_STEP.value_coefficient * (returns[i] - old["value"][s]) / mask.sum()
    for name in params:
        np.testing.assert_allclose(new[name] - params[name], ascent[name], rtol=1e-4, atol=1e-6)
    assert abs(metrics["policy/ratio_mean"] - 1) < 1e-6
    assert abs(metrics["policy/ratio_max"] - 1) < 1e-6
    assert abs(metrics["policy/approximate_kl"]) < 1e-6
    assert metrics["policy/clip_fraction"] == metrics["value/clip_fraction"] == 0
    assert metrics["policy/logp_gap"] < 1e-6


@pytest.mark.parametrize("entropy_coefficient", [None, 0.2])
def test_clipped_losses_and_gradient_equal_a_loop_over_actions(params, rollout, entropy_coefficient):
    config = dataclasses.replace(
        ONE_STEP,
        clip_low=0.1,
        clip_high=0.25,
        value_clip=0.15,
        entropy_coefficient=entropy_coefficient,
        whiten_advantages=False,
    )
    rollout = with_behaviour(rollout, params)
    new, metrics = step(params, rollout, config)
    advantage, returns = expected_targets(rollout, config)
    arguments = (as_float64(rollout), advantage, returns, config)
    total, policy_clipped, value_clipped = expected_loss(as_float64(params), *arguments)
    assert 0.1 < policy_clipped < 0.9
    assert 0.1 < value_clipped < 0.9
    np.testing.assert_allclose(metrics["loss/total"], total, rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/clip_fraction"], policy_clipped, rtol=1e-6)
    np.testing.assert_allclose(metrics["value/clip_fraction"], value_clipped, rtol=1e-6)
    gradient = numerical_gradient(lambda p: expected_loss(p, *arguments)[0], as_float64(params))
    for name in params:
        np.testing.assert_allclose(params[name] - new[name], gradient[name], rtol=1e-3, atol=1e-6)


def test_metrics_are_those_of_their_definitions(params, rollout):
    rollout = with_behaviour(rollout, params)
    _, metrics = step(params, rollout, ONE_STEP)
    advantage, returns = expected_targets(rollout, ONE_STEP)
    old, mask = as_float64(rollout), np.asarray(rollout.mask)
    logp, entropy, _ = as_float64(evaluate(params, rollout.inputs))
    log_ratio = (logp - old.logp)[mask]
    kl = np.where(mask, old.logp - old.logp_ref, 0).sum(-1).mean()
    reward = np.where(mask, old.reward, 0).sum(-1).mean()
    residual = (returns - old.value)[mask]
    expected = {
        "objective/reward": reward,
        "objective/kl": kl,
        "objective/kl_penalty": 0.3 * kl,
        "objective/return": reward - 0.3 * kl,
        "objective/kl_coefficient": 0.3,
        "reward/nonfinite": 0,
        "batch/sequences": ROWS * SAMPLES,
        "batch/actions": mask.sum(),
        "advantage/mean": advantage[mask].mean(),
        "advantage/std": advantage[mask].std(),
        "value/mean": old.value[mask].mean(),
        "value/explained_variance": 1 - residual.var() / returns[mask].var(),
        "policy/entropy": entropy[mask].mean(),
        "policy/approximate_kl": (np.exp(log_ratio) - 1 - log_ratio).mean(),
        "policy/ratio_mean": np.exp(log_ratio).mean(),
        "policy/ratio_max": np.exp(log_ratio).max(),
        "policy/logp_gap": np.abs(log_ratio).max(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_metrics_keep_their_names_and_are_documented(params, rollout):
    configs = [PPO(), PPO(kl_target=6.0, entropy_coefficient=0.1, whiten_rewards=True, minibatches=2)]
    algorithms = (ppo.make(evaluate, SGD, config) for config in configs)
    key = jax.random.key(0)
    first, second = (jax.eval_shape(a.update, a.init(params), rollout, key)[1] for a in algorithms)
    assert first == second
    assert all(x.dtype == jnp.float32 and x.shape == () for x in first.values())
    assert [name for name in first if name not in ppo.__doc__] == []


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_targets_equal_loops(rollout, whiten_rewards):
    config = dataclasses.replace(ONE_STEP, whiten_rewards=whiten_rewards, whiten_advantages=False)
    sample, _ = jax.jit(functools.partial(ppo.targets, config=config))(rollout, jnp.float32(0.7))
    sample = jax.tree.map(np.asarray, sample)
    advantage, returns = expected_targets(rollout, config, kl_coefficient=0.7)
    mask = np.asarray(rollout.mask)
    np.testing.assert_allclose(sample.advantage[mask], advantage[mask], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sample.returns[mask], returns[mask], rtol=1e-4, atol=1e-5)
    assert not np.any(sample.advantage[~mask])


def test_truncated_episode_bootstraps_and_terminated_does_not():
    row, one = jnp.asarray(np.zeros((1, 3), np.float32)), jnp.asarray(np.ones((1, 3), np.float32))
    flags = {"terminated": jnp.array([[True, False, False]]), "truncated": jnp.array([[False, True, False]])}
    mask = jnp.asarray(np.ones((1, 3), bool))
    rollout = ppo.Rollout({}, row, row, row, one, mask, next_value=jnp.array([[10.0, 20.0, 30.0]]), **flags)
    config = PPO(discount=0.5, lam=1.0, whiten_advantages=False)
    sample, _ = jax.jit(functools.partial(ppo.targets, config=config))(rollout, jnp.float32(0.0))
    np.testing.assert_allclose(sample.returns, [[1.0, 1.0 + 0.5 * 20.0, 1.0 + 0.5 * 30.0]])


def test_masked_positions_equal_dropped_positions(params, rollout):
    """Padding may be put anywhere, with NaN in it and around it, and no number moves."""
    places = jnp.array([0, 2, 3, 5])  # of the old positions among LENGTH + 2 new ones

    def spread(x, filler):
        shape = (*x.shape[:-1], LENGTH + 2)
        return jnp.full(shape, filler, x.dtype).at[..., places].set(x)

    fillers = {"mask": False, "logp": jnp.nan, "logp_ref": jnp.nan, "value": jnp.nan, "reward": jnp.inf}
    padded = {name: spread(getattr(rollout, name), filler) for name, filler in fillers.items()}
    inputs = jax.tree.map(lambda x: spread(x, 1), rollout.inputs)
    plain, plain_metrics = step(params, rollout, TWO_EPOCHS)
    other, other_metrics = step(params, ppo.Rollout(inputs=inputs, **padded), TWO_EPOCHS)
    chex.assert_trees_all_close(plain, other, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(plain_metrics, other_metrics, rtol=1e-5, atol=1e-6)


def test_what_the_model_says_under_the_mask_is_never_read(params, rollout):
    """NaN from the network where nothing counts reaches neither the metrics nor the gradient."""
    sample, _ = ppo.targets(rollout, jnp.asarray(0.3), config=TWO_EPOCHS)
    config = dataclasses.replace(ONE_STEP, entropy_coefficient=0.1)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(filler):
        def filled(params, inputs):
            logp, entropy, value = (jnp.where(rollout.mask, x, filler) for x in evaluate(params, inputs))
            return logp, entropy, value

        def loss(params):
            return ppo.loss(params, sample, evaluate=filled, config=config)

        return jax.value_and_grad(loss, has_aux=True)(params)

    chex.assert_trees_all_equal(gradient(float("nan")), gradient(1.0))


def test_the_key_decides_the_minibatches(params, rollout):
    init, update = compiled(TWO_EPOCHS)
    first, again, other = (update(init(params), rollout, jax.random.key(i))[0].params for i in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert not np.allclose(first["logits"], other["logits"], atol=1e-6)


def test_gap_is_measured_before_the_first_step(params, rollout):
    """On policy the rollout's log-probabilities are those of the model, until it moves."""
    _, metrics = step(params, rollout, TWO_EPOCHS)
    assert metrics["policy/logp_gap"] < 1e-6
    assert metrics["policy/ratio_max"] > 1.01
    assert metrics["policy/approximate_kl"] > 1e-5


def test_accumulated_microbatches_give_the_same_step(params, rollout):
    whole, whole_metrics = step(params, rollout, TWO_EPOCHS)
    parts, parts_metrics = step(params, rollout, dataclasses.replace(TWO_EPOCHS, microbatches=4))
    chex.assert_trees_all_close(whole, parts, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(whole_metrics, parts_metrics, rtol=1e-4, atol=1e-6)


def test_every_epoch_visits_every_row_once():
    """The linear 'policy gradient' of one SGD epoch is the sum over rows, whatever the shuffle."""
    index = jnp.arange(12.0)
    parts = ppo.split_blocks({"x": index}, 3, jax.random.key(1))["x"]
    assert parts.shape == (3, 4)
    assert sorted(parts.ravel().tolist()) == index.tolist()
    for part in parts:  # one row of every block of three
        assert sorted((part // 3).tolist()) == [0, 1, 2, 3]
    others = [ppo.split_blocks({"x": index}, 3, jax.random.key(seed))["x"] for seed in range(5)]
    assert any(not jnp.array_equal(parts, other) for other in others)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_nonfinite_reward_is_never_trained_on(params, rollout, bad):
    clean = rollout._replace(mask=rollout.mask.at[3, 1].set(False))
    spoilt = rollout._replace(reward=rollout.reward.at[3, 1, 0].set(bad))
    expected, expected_metrics = step(params, clean, TWO_EPOCHS)
    got, metrics = step(params, spoilt, TWO_EPOCHS)
    chex.assert_trees_all_equal(expected, got)
    assert metrics.pop("reward/nonfinite") == 1
    assert expected_metrics.pop("reward/nonfinite") == 0
    chex.assert_trees_all_equal(expected_metrics, metrics)


def test_nothing_to_learn_from_moves_nothing(params, rollout):
    new, metrics = step(params, rollout._replace(reward=jnp.full_like(rollout.reward, jnp.nan)), TWO_EPOCHS)
    chex.assert_trees_all_equal(new, params)
    assert all(jnp.isfinite(x) for x in metrics.values())
    assert metrics["reward/nonfinite"] == ROWS * SAMPLES


def test_fractions_of_a_reward_survive_and_integers_are_accepted(params, rollout):
    _, metrics = step(params, rollout._replace(reward=jnp.full_like(rollout.reward, 0.7)), ONE_STEP)
    np.testing.assert_allclose(metrics["objective/reward"], 0.7 * jnp.sum(rollout.mask) / 16, rtol=1e-6)
    ones = jnp.ones(rollout.mask.shape, jnp.int32)
    as_integer, _ = step(params, rollout._replace(reward=ones), ONE_STEP)
    as_float, _ = step(params, rollout._replace(reward=ones.astype(jnp.float32)), ONE_STEP)
    chex.assert_trees_all_equal(as_integer, as_float)


def test_bad_input_is_named(params, rollout):
    def update(changes, **config):
        algorithm = ppo.make(evaluate, SGD, PPO(**config))
        jax.eval_shape(
            algorithm.update, algorithm.init(params), rollout._replace(**changes), jax.random.key(0)
        )

    with pytest.raises(TypeError, match="rollout.logp_ref must be float, got int32"):
        update({"logp_ref": jnp.zeros(rollout.mask.shape, jnp.int32)})
    with pytest.raises(TypeError, match="rollout.mask must be bool"):
        update({"mask": jnp.ones(rollout.mask.shape)})
    with pytest.raises(ValueError, match=r"rollout.value has shape \(8, 2, 1\)"):
        update({"value": rollout.value[..., :1]})
    with pytest.raises(ValueError, match=r"8 rows cannot be cut into 3 .*multiple of 3.*1, 2, 4, 8"):
        update({}, minibatches=3)
    with pytest.raises(ValueError, match="cannot be cut into 16 equal parts"):
        update({}, minibatches=4, microbatches=4)
    with pytest.raises(ValueError, match="at least 1"):
        update({}, epochs=0)
    wrong = ppo.make(lambda p, x: (jnp.zeros(3), jnp.zeros(3), jnp.zeros(3)), SGD, PPO())
    with pytest.raises(ValueError, match=r"evaluate gave logp of shape \(3,\)"):
        jax.eval_shape(wrong.update, wrong.init(params), rollout, jax.random.key(0))


def test_adaptive_coefficient_follows_its_target(params, rollout):
    """Ziegler et al. 2019, 2.2; the measured KL is 0 here, so the error is clipped at -0.2."""
    config = PPO(kl_coefficient=0.3, kl_target=2.0, kl_horizon=100.0, epochs=1)
    init, update = compiled(config)
    rollout = rollout._replace(logp_ref=rollout.logp)
    first, _ = update(init(params), rollout, jax.random.key(0))
    np.testing.assert_allclose(first.kl_coefficient, 0.3 * (1 - 0.2 * 16 / 100), rtol=1e-6)
    second, metrics = update(first, rollout, jax.random.key(1))
    np.testing.assert_allclose(metrics["objective/kl_coefficient"], first.kl_coefficient)
    assert second.kl_coefficient < first.kl_coefficient
    assert second.step == 2
    init, update = compiled(ONE_STEP)
    state, _ = update(init(params), rollout, jax.random.key(0))
    np.testing.assert_allclose(state.kl_coefficient, 0.3, rtol=1e-6)


def test_update_is_traced_once(params, rollout):
    algorithm = ppo.make(evaluate, make_optimizer(Optimizer(), 100), PPO(minibatches=2, kl_target=1.0))
    update = jax.jit(chex.assert_max_traces(algorithm.update, n=1), donate_argnums=0)
    state = algorithm.init(jax.tree.map(jnp.copy, params))
    for i in range(3):
        state, _ = update(state, rollout, jax.random.fold_in(jax.random.key(0), i))
    assert state.step == 3


def test_vmapped_configs_and_seeds_equal_separate_runs(params, rollout):
    """Every float of the configuration may be an array: a sweep is one program."""
    floats = {f.name: f.default for f in dataclasses.fields(PPO) if isinstance(f.default, float)}
    floats |= {"kl_target": 1.0, "entropy_coefficient": 0.01}
    floats |= {"dual_clip": 1.5, "critic_lam": 0.9, "reward_clip": 1.5, "advantage_clip": 1.5}
    optional = {f.name for f in dataclasses.fields(PPO) if "float | None" in str(f.type)}
    assert optional - set(floats) == {"ptx_coefficient"}, "an option that no sweep has tried"
    base = PPO(epochs=2, minibatches=2)
    rollout = with_behaviour(rollout, params)

    def run(values, key):
        algorithm = ppo.make(evaluate, SGD, dataclasses.replace(base, **values))
        state, metrics = algorithm.update(algorithm.init(params), rollout, key)
        return state.params, state.kl_coefficient, metrics

    scale = jnp.array([0.5, 1.0, 0.9])
    sweep = {name: value * scale for name, value in floats.items()}
    keys = jax.random.split(jax.random.key(5), 3)
    together = jax.jit(jax.vmap(run))(sweep, keys)
    one = jax.jit(run)
    for i in range(3):
        alone = one(jax.tree.map(lambda x, i=i: x[i], sweep), keys[i])
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-4, atol=1e-5)
    spread = [float(jnp.ptp(x, axis=0).max()) for x in jax.tree.leaves(together[0])]
    assert all(s > 1e-4 for s in spread), "the sweep changed nothing"
