"""Every critic-free method against a float64 loop written from its paper: value, and gradient at each logp.

The policy is a table of log-probabilities, one for each action of the batch, so that one step of gradient
descent at rate 1 shows the gradient of the loss at every logp.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.algorithms import grpo
from rlhfjax.config import GRPO

PROMPTS, SAMPLES, LENGTH = 4, 3, 5
PLAIN = {"scale": "none", "clip": "none", "aggregation": "constant", "length_constant": 1.0}

# The configurations of the module's table.
METHODS = {
    "grpo": GRPO(),
    "dr_grpo": GRPO(scale="none", aggregation="constant", length_constant=float(LENGTH), kl_coefficient=None),
    "dapo": GRPO(clip_high=0.28, aggregation="token", drop_equal_groups=True, kl_coefficient=None),
    "gspo": GRPO(ratio="sequence", clip_low=0.05, clip_high=0.08, kl_coefficient=None),
    "gspo_token": GRPO(ratio="sequence_token", clip_low=0.05, clip_high=0.08, kl_coefficient=None),
    "cispo": GRPO(clip="cispo", clip_low=1.0, clip_high=0.2, aggregation="token", kl_coefficient=None),
    "rloo": GRPO(
        baseline="leave_one_out", kl_coefficient=0.1, kl_placement="score", kl_estimator="k1", **PLAIN
    ),
    "remax": GRPO(baseline="given", kl_coefficient=0.1, kl_placement="score", kl_estimator="k1", **PLAIN),
    "reinforce_pp": GRPO(
        baseline="none",
        scale="none",
        whiten="actions",
        aggregation="token",
        kl_coefficient=0.1,
        kl_placement="reward",
        kl_estimator="k1",
    ),
    "reinforce_pp_baseline": GRPO(
        scale="none", whiten="actions", aggregation="token", kl_coefficient=0.1, kl_estimator="k2"
    ),
    "gdpo": GRPO(
        separate_rewards=True, whiten="samples", reward_weights=(1.0, 0.5), kl_coefficient=None, epsilon=1e-6
    ),
    "reinforce_batch": GRPO(baseline="batch_mean", kl_coefficient=None, **PLAIN),
    "reinforce_none": GRPO(baseline="none", kl_coefficient=None, **PLAIN),
    "lite_ppo": GRPO(scale="batch_std", aggregation="token", kl_coefficient=None),
    "dual_clip": GRPO(dual_clip=1.3, kl_coefficient=None),
}


def evaluate(params, inputs):
    """The rows of a table; the entropy is a table of its own."""
    return params["logp"][inputs], params["entropy"][inputs]


@pytest.fixture(scope="module")
def params():
    generator = np.random.default_rng(0)
    shape = (PROMPTS, SAMPLES, LENGTH)
    return {
        "logp": jnp.asarray(-generator.uniform(0.2, 2.0, size=shape), jnp.float32),
        "entropy": jnp.asarray(generator.uniform(0.1, 1.0, size=shape), jnp.float32),
    }


@pytest.fixture(scope="module")
def rollout(params):
    """Ragged and off policy, so that ratios are clipped; NaN under the mask; one group of equal rewards."""
    generator = np.random.default_rng(1)
    shape = (PROMPTS, SAMPLES, LENGTH)
    length = generator.integers(1, LENGTH + 1, size=shape[:2])
    length[0, 0] = LENGTH
    mask = np.arange(LENGTH)[None, None] < length[..., None]
    reward = generator.normal(size=shape[:2]) + 0.4
    reward[2] = 0.7
    noise = generator.normal(size=(2, *shape)) * 0.3
    old, ref = (np.where(mask, params["logp"] + x, np.nan) for x in noise)
    return grpo.Rollout(
        inputs=jnp.arange(PROMPTS),
        logp=jnp.asarray(old, jnp.float32),
        logp_ref=jnp.asarray(ref, jnp.float32),
        reward=jnp.asarray(reward, jnp.float32),
        mask=jnp.asarray(mask),
    )


def batch_of(method, rollout):
    """The rollout with what the method needs beside it."""
    generator = np.random.default_rng(5)
    if method == "remax":
        return rollout._replace(baseline=jnp.asarray(generator.normal(size=PROMPTS), jnp.float32))
    if method == "gdpo":
        second = jnp.asarray(generator.normal(size=(PROMPTS, SAMPLES)) * 10, jnp.float32)
        return rollout._replace(reward=jnp.stack([rollout.reward, second], axis=-1))
    return rollout


@functools.cache
def compiled(config):
    algorithm = grpo.make(evaluate, optax.sgd(1.0), config)
    return algorithm.init, jax.jit(algorithm.update)


def step(params, rollout, config):
    """Gradient of the loss (the step at rate 1) and metrics of one update."""
    init, update = compiled(config)
    state, metrics = update(init(params), rollout, jax.random.key(0))
    return jax.tree.map(lambda old, new: np.asarray(old - new), params, state.params), metrics


# ------------------------------------------------------------------------------------------------ the papers, in loops


class Data:
    """A rollout in float64, and loops over the samples that live."""

    def __init__(self, rollout):
        to = lambda x: np.asarray(x, np.float64)  # noqa: E731
        self.old, self.ref, self.reward = to(rollout.logp), to(rollout.logp_ref), to(rollout.reward)
        self.baseline = None if rollout.baseline is None else to(rollout.baseline)
        self.mask = np.asarray(rollout.mask)
        finite = np.asarray(np.isfinite(self.reward).reshape(*self.mask.shape[:2], -1).all(axis=-1))
        self.groups = [
            [g for g in range(self.mask.shape[1]) if self.mask[b, g].any() and finite[b, g]]
            for b in range(self.mask.shape[0])
        ]
        self.samples = [(b, g) for b, group in enumerate(self.groups) for g in group]

    def steps(self, b, g):
        return np.flatnonzero(self.mask[b, g])

    def rewards(self, b, reward=None):
        reward = self.reward if reward is None else reward
        return np.asarray([reward[b, g] for g in self.groups[b]])

    def kl1(self, b, g):
        """Sum of k1 over the sequence at the rollout."""
        return sum(self.old[b, g, t] - self.ref[b, g, t] for t in self.steps(b, g))


def surrogate(ratio, advantage, low, high):
    return -min(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)


def k3(logp, ref):
    return np.exp(ref - logp) - (ref - logp) - 1


def group_normalised(data, b, g, reward=None, epsilon=1e-4):
    r = data.rewards(b, reward)
    x = data.reward[b, g] if reward is None else reward[b, g]
    return (x - r.mean()) / (r.std(ddof=1) + epsilon)


def grpo_loss(data, logp, held, beta=0.04):
    """Shao et al.: mean over samples of the mean over tokens of clipped surrogate and beta k3."""
    total = 0.0
    for b, g in data.samples:
        advantage, here = group_normalised(data, b, g), 0.0
        for t in data.steps(b, g):
            here += surrogate(np.exp(logp[b, g, t] - data.old[b, g, t]), advantage, 0.2, 0.2)
            here += beta * k3(logp[b, g, t], data.ref[b, g, t])
        total += here / len(data.steps(b, g))
    return total / len(data.samples)


def dr_grpo_loss(data, logp, held):
    """Liu et al.: neither the deviation nor the length of a response divides."""
    total = 0.0
    for b, g in data.samples:
        advantage = data.reward[b, g] - data.rewards(b).mean()
        for t in data.steps(b, g):
            total += surrogate(np.exp(logp[b, g, t] - data.old[b, g, t]), advantage, 0.2, 0.2) / LENGTH
    return total / len(data.samples)


def dapo_loss(data, logp, held, dual=None, bounds=(0.2, 0.28)):
    """Yu et al.: groups with differing rewards only, clip higher, mean over tokens."""
    total, tokens = 0.0, 0
    for b, g in data.samples:
        if len(set(data.rewards(b))) == 1:
            continue
        advantage = group_normalised(data, b, g)
        for t in data.steps(b, g):
            total += surrogate(np.exp(logp[b, g, t] - data.old[b, g, t]), advantage, *bounds)
            tokens += 1
    return total / tokens


def gspo_loss(data, logp, held):
    """Zheng et al.: ratio of the sequence, by the geometric mean over its tokens."""
    total = 0.0
    for b, g in data.samples:
        steps = data.steps(b, g)
        ratio = np.exp(np.mean([logp[b, g, t] - data.old[b, g, t] for t in steps]))
        total += surrogate(ratio, group_normalised(data, b, g), 0.05, 0.08)
    return total / len(data.samples)


def cispo_loss(data, logp, held):
    """MiniMax-M1: the clipped ratio is a constant weight of logp, also where it is clipped; mean over tokens."""
    total, tokens = 0.0, 0
    for b, g in data.samples:
        for t in data.steps(b, g):
            weight = min(np.exp(held[b, g, t] - data.old[b, g, t]), 1.2)
            total -= weight * group_normalised(data, b, g) * logp[b, g, t]
            tokens += 1
    return total / tokens


def reinforce(data, logp, advantage):
    """Sum over tokens of ratio times the advantage of the sample, mean over samples."""
    total = 0.0
    for b, g in data.samples:
        for t in data.steps(b, g):
            total -= np.exp(logp[b, g, t] - data.old[b, g, t]) * advantage(b, g)
    return total / len(data.samples)


def rloo_loss(data, logp, held):
    """Ahmadian et al.: reward less beta KL of the sequence, against the mean of the others."""

    def penalised(b, g):
        return data.reward[b, g] - 0.1 * data.kl1(b, g)

    def advantage(b, g):
        others = [penalised(b, h) for h in data.groups[b] if h != g]
        return penalised(b, g) - np.mean(others)

    return reinforce(data, logp, advantage)


def remax_loss(data, logp, held):
    """Li et al.: against the reward of the greedy response."""
    return reinforce(data, logp, lambda b, g: data.reward[b, g] - 0.1 * data.kl1(b, g) - data.baseline[b])


def normalised_over_tokens(data, advantage):
    """Hu et al.: mean and deviation over the tokens of the batch."""
    values = np.asarray(list(advantage.values()))
    return {i: (x - values.mean()) / np.sqrt(values.var() + 1e-8) for i, x in advantage.items()}


def reinforce_pp_loss(data, logp, held):
    """Hu et al.: reward at the end, k1 at every token, summed from each token on; PPO's clip, mean over tokens."""
    advantage = {}
    for b, g in data.samples:
        for t in data.steps(b, g):
            rest = [s for s in data.steps(b, g) if s >= t]
            kl = sum(data.old[b, g, s] - data.ref[b, g, s] for s in rest)
            advantage[b, g, t] = data.reward[b, g] - 0.1 * kl
    advantage = normalised_over_tokens(data, advantage)
    total = sum(surrogate(np.exp(logp[i] - data.old[i]), a, 0.2, 0.2) for i, a in advantage.items())
    return total / len(advantage)


def reinforce_pp_baseline_loss(data, logp, held):
    """The same paper, "w/ baseline": group mean, then the batch's deviation; k2 in the loss."""
    advantage = {
        (b, g, t): data.reward[b, g] - data.rewards(b).mean()
        for b, g in data.samples
        for t in data.steps(b, g)
    }
    total = 0.0
    for i, a in normalised_over_tokens(data, advantage).items():
        total += surrogate(np.exp(logp[i] - data.old[i]), a, 0.2, 0.2)
        total += 0.1 * (logp[i] - data.ref[i]) ** 2 / 2
    return total / len(advantage)


def gdpo_loss(data, logp, held):
    """Liu et al. 2026: each reward normalised in its group, weighted sum, normalised over the batch."""
    first, second = np.moveaxis(data.reward, -1, 0)
    summed = {
        (b, g): group_normalised(data, b, g, first, 1e-6) + 0.5 * group_normalised(data, b, g, second, 1e-6)
        for b, g in data.samples
    }
    values = np.asarray(list(summed.values()))
    total = 0.0
    for b, g in data.samples:
        advantage = (summed[b, g] - values.mean()) / np.sqrt(values.var() + 1e-8)
        steps = data.steps(b, g)
        total += np.mean(
            [surrogate(np.exp(logp[b, g, t] - data.old[b, g, t]), advantage, 0.2, 0.2) for t in steps]
        )
    return total / len(data.samples)


def reinforce_batch_loss(data, logp, held):
    mean = np.mean([data.reward[i] for i in data.samples])
    return reinforce(data, logp, lambda b, g: data.reward[b, g] - mean)


def reinforce_none_loss(data, logp, held):
    return reinforce(data, logp, lambda b, g: data.reward[b, g])


def lite_ppo_loss(data, logp, held):
    """Group mean, deviation of all rewards of the batch, mean over tokens."""
    std = np.std([data.reward[i] for i in data.samples], ddof=1) + 1e-4
    losses = [
        surrogate(
            np.exp(logp[b, g, t] - data.old[b, g, t]),
            (data.reward[b, g] - data.rewards(b).mean()) / std,
            0.2,
            0.2,
        )
        for b, g in data.samples
        for t in data.steps(b, g)
    ]
    return np.mean(losses)


def dual_clip_loss(data, logp, held):
    """GRPO with Ye et al.'s bound: where the advantage is negative the loss is at most 1.3 times its size."""
    total = 0.0
    for b, g in data.samples:
        advantage, steps = group_normalised(data, b, g), data.steps(b, g)
        losses = [surrogate(np.exp(logp[b, g, t] - data.old[b, g, t]), advantage, 0.2, 0.2) for t in steps]
        total += np.mean([min(x, 1.3 * -advantage) if advantage < 0 else x for x in losses])
    return total / len(data.samples)


ORACLES = {name: globals()[f"{name}_loss"] for name in METHODS if name != "gspo_token"}


def numerical_gradient(function, x, width=1e-6):
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[i] += sign * width
            ends.append(function(moved))
        gradient[i] = (ends[0] - ends[1]) / (2 * width)
    return gradient


def assert_equals_the_paper(method, params, batch):
    config, oracle, data = METHODS[method], ORACLES[method], Data(batch)
    held = np.asarray(params["logp"], np.float64)
    gradient, metrics = step(params, batch, config)
    expected = numerical_gradient(lambda logp: oracle(data, logp, held), held)
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(metrics["loss/total"], oracle(data, held, held), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient["logp"], expected, rtol=1e-3, atol=2e-6)
    assert not gradient["entropy"].any()
    return metrics


@pytest.mark.parametrize("method", ORACLES)
def test_method_equals_its_paper(method, params, rollout):
    metrics = assert_equals_the_paper(method, params, batch_of(method, rollout))
    if METHODS[method].clip != "none":
        assert 0.03 < float(metrics["policy/clip_fraction"]) < 0.97  # or clipping were not tested


@pytest.mark.parametrize("method", ["grpo", "rloo", "dapo", "reinforce_pp", "gspo"])
def test_a_reward_that_is_not_finite_leaves_group_and_batch(method, params, rollout):
    """The oracles do not know the sample: neither its group's baseline nor any mean does."""
    reward = rollout.reward.at[1, 2].set(jnp.nan).at[3, 0].set(jnp.inf)
    metrics = assert_equals_the_paper(method, params, rollout._replace(reward=reward))
    assert float(metrics["reward/nonfinite"]) == 2.0
    assert all(np.isfinite(float(x)) for x in metrics.values())


def test_a_masked_sample_is_a_dropped_sample(params, rollout):
    """Its reward may be anything: it is in no baseline."""
    reward = jnp.concatenate([rollout.reward[:, :2], jnp.full((PROMPTS, 1), 1e6)], axis=1)
    masked = rollout._replace(mask=rollout.mask.at[:, 2].set(False), reward=reward)
    dropped = jax.tree.map(lambda x: x[:, :2] if x.ndim > 1 else x, rollout)
    for method in ("grpo", "rloo", "reinforce_pp"):
        gradient, metrics = step(params, masked, METHODS[method])
        expected, of_dropped = step(jax.tree.map(lambda x: x[:, :2], params), dropped, METHODS[method])
        np.testing.assert_allclose(gradient["logp"][:, :2], expected["logp"], rtol=1e-5, atol=1e-7)
        assert not gradient["logp"][:, 2].any()
        for name in metrics:
            np.testing.assert_allclose(metrics[name], of_dropped[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_gspo_token_has_the_value_of_gspo_and_gradients_of_its_own(params, rollout):
    """Equal where all tokens of a sequence have one advantage (the paper says so); not with a KL of each token."""
    of_sequence, metrics = step(params, rollout, METHODS["gspo"])
    of_token, token_metrics = step(params, rollout, METHODS["gspo_token"])
    np.testing.assert_allclose(of_token["logp"], of_sequence["logp"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(token_metrics["loss/total"], metrics["loss/total"], rtol=1e-5)
    with_kl = {"kl_coefficient": 0.5, "kl_placement": "reward", "kl_estimator": "k1", "clip": "none"}
    of_sequence, _ = step(params, rollout, dataclasses.replace(METHODS["gspo"], **with_kl))
    of_token, _ = step(params, rollout, dataclasses.replace(METHODS["gspo_token"], **with_kl))
    data, logp = Data(rollout), np.asarray(params["logp"], np.float64)
    expected = np.zeros_like(logp)
    for b, g in data.samples:
        steps = data.steps(b, g)
        ratio = np.exp(np.mean([logp[b, g, t] - data.old[b, g, t] for t in steps]))
        for t in steps:
            kl = sum(data.old[b, g, s] - data.ref[b, g, s] for s in steps if s >= t)
            advantage = group_normalised(data, b, g) - 0.5 * kl
            expected[b, g, t] = -ratio * advantage / len(steps) / len(data.samples)
    np.testing.assert_allclose(of_token["logp"], expected, rtol=1e-3, atol=1e-6)
    assert np.abs(of_token["logp"] - of_sequence["logp"]).max() > 1e-2


def test_moving_baseline_follows_the_rewards(params, rollout):
    """No baseline at first; then the mean of past mean rewards, weighted by 0.8 per update."""
    config = GRPO(baseline="moving", baseline_decay=0.8, kl_coefficient=None, **PLAIN)
    init, update = compiled(config)
    state, past, data = init(params), [], Data(rollout)
    for shift in (0.0, 1.0, -2.0):
        batch = rollout._replace(reward=rollout.reward + shift)
        baseline = 0.0
        if past:
            weights = 0.8 ** np.arange(len(past))[::-1]
            baseline = float((weights * past).sum() / weights.sum())
        held = np.asarray(state.params["logp"], np.float64)
        new, _ = update(state._replace(params=params), batch, jax.random.key(0))
        expected = numerical_gradient(
            lambda logp, at=baseline - shift: reinforce(data, logp, lambda b, g: data.reward[b, g] - at),
            held,
        )
        np.testing.assert_allclose(params["logp"] - new.params["logp"], expected, rtol=1e-3, atol=1e-5)
        past.append(np.mean([data.reward[i] for i in data.samples]) + shift)
        state = new._replace(params=params)


def test_given_baseline_that_is_not_finite_takes_its_prompt_out(params, rollout):
    batch = batch_of("remax", rollout)
    gradient, metrics = step(
        params, batch._replace(baseline=batch.baseline.at[1].set(jnp.nan)), METHODS["remax"]
    )
    without = jnp.asarray([0, 2, 3])
    expected, _ = step(params, jax.tree.map(lambda x: x[without], batch), METHODS["remax"])
    assert float(metrics["reward/nonfinite"]) == SAMPLES
    np.testing.assert_allclose(gradient["logp"], expected["logp"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("placement", ["loss", "reward", "score"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
def test_kl_by_each_estimator_in_each_place(params, rollout, estimator, placement):
    if (placement, estimator) == ("loss", "k1"):
        with pytest.raises(ValueError, match="k1.* in the loss does nothing"):
            grpo.make(evaluate, optax.sgd(1.0), GRPO(kl_estimator="k1", kl_placement="loss"))
        return
    config = GRPO(
        baseline="none", kl_coefficient=0.3, kl_placement=placement, kl_estimator=estimator, **PLAIN
    )
    exact = jnp.asarray(np.random.default_rng(8).uniform(size=rollout.mask.shape), jnp.float32)
    exact = jnp.where(rollout.mask, exact, jnp.nan)

    def with_kl(params, inputs):
        # The exact KL of a table is a table; its gradient is that of the weights it is multiplied by.
        return params["logp"][inputs], params["entropy"][inputs], None, params["kl"][inputs]

    algorithm = grpo.make(with_kl, optax.sgd(1.0), config)
    held = params | {"kl": exact}
    state, _ = jax.jit(algorithm.update)(algorithm.init(held), rollout._replace(kl=exact), jax.random.key(0))
    data, table = Data(rollout), np.asarray(exact, np.float64)

    def kl_of(logp, i):
        difference = logp[i] - data.ref[i]
        return {
            "k1": difference,
            "k2": difference**2 / 2,
            "k3": np.exp(-difference) + difference - 1,
            "exact": table[i],
        }[estimator]

    def expected(logp):
        total = 0.0
        for b, g in data.samples:
            for t in data.steps(b, g):
                first = {"loss": LENGTH, "reward": t, "score": 0}[placement]
                kl = sum(kl_of(data.old, (b, g, s)) for s in data.steps(b, g) if s >= first)
                total -= np.exp(logp[b, g, t] - data.old[b, g, t]) * (data.reward[b, g] - 0.3 * kl)
                total += 0.3 * kl_of(logp, (b, g, t)) if placement == "loss" else 0.0
        return total / len(data.samples)

    gradient = numerical_gradient(expected, np.asarray(params["logp"], np.float64))
    np.testing.assert_allclose(params["logp"] - state.params["logp"], gradient, rtol=1e-3, atol=1e-5)
    moved = np.where(rollout.mask, exact - state.params["kl"], 0.0)
    weight = 0.3 / len(data.samples) if (placement, estimator) == ("loss", "exact") else 0.0
    np.testing.assert_allclose(moved, np.where(rollout.mask, weight, 0.0), atol=1e-6)


def test_reference_reaches_evaluate_whole(params, rollout):
    """The update closes over it: minibatches and microbatches do not cut it."""
    seen = []

    def with_reference(params, inputs, reference):
        seen.append(jax.tree.map(jnp.shape, reference))
        kl = jnp.sum(reference["table"]) * params["logp"][inputs] ** 2
        return params["logp"][inputs], params["entropy"][inputs], None, kl

    reference = {"table": jnp.asarray([0.25, 0.5, 0.25])}
    batch = rollout._replace(reference=reference, logp_ref=None)
    steps = []
    for minibatches, microbatches in ((1, 1), (1, 2), (2, 2)):
        config = GRPO(
            kl_estimator="exact", kl_coefficient=0.5, minibatches=minibatches, microbatches=microbatches
        )
        algorithm = grpo.make(with_reference, optax.sgd(0.1), config)
        state, metrics = jax.jit(algorithm.update)(algorithm.init(params), batch, jax.random.key(0))
        steps.append(np.asarray(state.params["logp"]))
        assert "objective/kl" not in metrics and float(metrics["loss/kl"]) > 0
    assert seen and all(shapes == {"table": (3,)} for shapes in seen)
    np.testing.assert_allclose(steps[1], steps[0], rtol=1e-5)
    assert np.abs(steps[2] - steps[0]).max() > 1e-4  # two steps are not one


def test_entropy_bonus(params, rollout):
    config = dataclasses.replace(METHODS["dr_grpo"], entropy_coefficient=0.2)
    gradient, _ = step(params, rollout, config)
    without, _ = step(params, rollout, METHODS["dr_grpo"])
    np.testing.assert_array_equal(gradient["logp"], without["logp"])
    samples = float(np.asarray(rollout.mask).any(-1).sum())
    expected = np.where(rollout.mask, -0.2 / LENGTH / samples, 0.0)
    np.testing.assert_allclose(gradient["entropy"], expected, rtol=1e-4, atol=1e-7)
