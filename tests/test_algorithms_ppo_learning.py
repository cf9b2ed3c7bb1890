"""PPO learns: the best arm of a bandit, and the closed-form optimum on a language of nine sequences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algorithms import make_optimizer, ppo
from rlhfjax.config import PPO, Optimizer


def evaluate(params, inputs):
    """A softmax policy and a value per state: the smallest model with the interface of a language model."""
    logp_V = jax.nn.log_softmax(params["logits"])[inputs["state"]]
    logp = jnp.take_along_axis(logp_V, inputs["action"][..., None], axis=-1)[..., 0]
    return logp, -jnp.sum(jnp.exp(logp_V) * logp_V, axis=-1), params["value"][inputs["state"]]


def softmax64(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def play(logits, value, logp_ref_table, reward_of, key, count, length):
    """Sequences of a policy whose state is the prefix: state 0, then 1 + first token (V = 3, T <= 2)."""

    def act(state, key):
        action = jax.random.categorical(key, logits[state])
        return 1 + action, (state, action)

    keys = jax.random.split(key, (count, length))
    _, (state, action) = jax.vmap(lambda k: jax.lax.scan(act, 0, k))(keys)
    inputs = {"state": state, "action": action}
    logp, _, value = evaluate({"logits": logits, "value": value}, inputs)
    reward = jnp.zeros((count, length)).at[:, -1].set(reward_of(action))
    logp_ref = logp_ref_table[state, action]
    return ppo.Rollout(inputs, logp, logp_ref, value, reward, jnp.ones((count, length), bool))


def train(key, config, *, logits_ref, reward_of, steps, learning_rate, length, count=256):
    """A whole run as one scan, from the reference policy; returns the last logits and all metrics."""
    total = steps * config.epochs * config.minibatches
    optimizer = make_optimizer(Optimizer(learning_rate=learning_rate, max_grad_norm=None), total)
    algorithm = ppo.make(evaluate, optimizer, config)
    logp_ref_table = jax.nn.log_softmax(logits_ref)

    def iterate(state, key):
        rollout_key, update_key = jax.random.split(key)
        rollout = play(
            state.params["logits"],
            state.params["value"],
            logp_ref_table,
            reward_of,
            rollout_key,
            count,
            length,
        )
        return algorithm.update(state, rollout, update_key)

    start = algorithm.init({"logits": logits_ref, "value": jnp.zeros(logits_ref.shape[0])})
    state, metrics = jax.lax.scan(iterate, start, jax.random.split(key, steps))
    return state.params["logits"], metrics


def test_bandit_finds_the_best_arm():
    arms = jnp.array([0.1, 0.7, 0.5, 0.3])
    config = PPO(kl_coefficient=0.0, minibatches=2)
    logits, metrics = jax.jit(
        lambda key: train(
            key,
            config,
            logits_ref=jnp.zeros((5, 4)),
            reward_of=lambda action: arms[action[:, 0]],
            steps=30,
            learning_rate=0.1,
            length=1,
            count=64,
        )
    )(jax.random.key(0))
    assert jax.nn.softmax(logits[0])[1] > 0.9
    assert metrics["objective/reward"][-1] > metrics["objective/reward"][0] + 0.2


def test_optimum_is_the_tilted_reference():
    """pi*(y) = pi_ref(y) exp(r(y) / beta) / Z on all nine sequences, three betas at once."""
    generator = np.random.default_rng(3)
    logits_ref = jnp.asarray(generator.normal(size=(4, 3)), jnp.float32)
    reward = jnp.asarray(generator.uniform(size=(3, 3)), jnp.float32)
    betas = jnp.array([0.2, 0.4, 1.0])

    def final(beta, key):
        return train(
            key,
            PPO(kl_coefficient=beta, epochs=2, minibatches=2, lam=1.0),
            logits_ref=logits_ref,
            reward_of=lambda action: reward[action[:, 0], action[:, 1]],
            steps=120,
            learning_rate=0.05,
            length=2,
        )[0]

    def sequence_probability(logits):
        p = softmax64(np.asarray(logits, np.float64))
        return np.array([[p[0, a] * p[1 + a, b] for b in range(3)] for a in range(3)])

    logits = jax.jit(jax.vmap(final))(betas, jax.random.split(jax.random.key(4), 3))
    reference = sequence_probability(logits_ref)
    for beta, learnt in zip(betas, logits, strict=True):
        optimum = reference * np.exp(np.asarray(reward, np.float64) / beta)
        optimum /= optimum.sum()
        before = np.abs(reference - optimum).sum() / 2
        after = np.abs(sequence_probability(learnt) - optimum).sum() / 2
        assert after < 0.04, (beta, before, after)
        assert after < before / 2, (beta, before, after)


def test_prefixes_are_enumerated():
    """The oracle's own bookkeeping: state 1 + a follows action a, and nine sequences exist."""
    key = jax.random.key(0)
    rollout = play(jnp.zeros((4, 3)), jnp.zeros(4), jnp.zeros((4, 3)), lambda a: a[:, 0] * 1.0, key, 64, 2)
    state, action = rollout.inputs["state"], rollout.inputs["action"]
    assert jnp.array_equal(state[:, 1], 1 + action[:, 0])
    assert set(map(tuple, np.asarray(action).tolist())) == set(itertools.product(range(3), repeat=2))
