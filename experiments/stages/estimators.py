"""The expected gradient of every advantage estimator and of every KL estimator, exactly, beside the true one.

On a model of eight sequences all groups of K samples can be listed, each with its probability, so that the mean of
what an algorithm computes from a group is a sum and not an average over draws. The algorithms are asked as they
are: `targets` and `loss` of `rlhfjax.algorithms`.

Shapes: N sequences, K samples of a group, M = N^K groups, T positions.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algorithms import grpo, ppo
from rlhfjax.config import GRPO, PPO, Enumerable
from rlhfjax.environments import enumerable

MODEL = Enumerable(vocab_size=2, length=3)
REINFORCE = GRPO(
    baseline="none",
    scale="none",
    clip="none",
    aggregation="constant",
    length_constant=1.0,
    kl_coefficient=None,
)
# name -> samples of a group, configuration, and what the mean gradient is of the true one (None: no multiple of it)
ADVANTAGES: dict[str, tuple[int, GRPO, float | None]] = {
    "REINFORCE, no baseline": (2, REINFORCE, 1.0),
    "REINFORCE, given baseline": (2, replace(REINFORCE, baseline="given"), 1.0),
    "leave one out (RLOO), K = 2": (2, replace(REINFORCE, baseline="leave_one_out"), 1.0),
    "leave one out (RLOO), K = 3": (3, replace(REINFORCE, baseline="leave_one_out"), 1.0),
    "group mean (Dr.GRPO), K = 2": (2, replace(REINFORCE, baseline="group_mean"), 1 / 2),
    "group mean (Dr.GRPO), K = 3": (3, replace(REINFORCE, baseline="group_mean"), 2 / 3),
    "group mean and std (GRPO), K = 3": (
        3,
        replace(REINFORCE, baseline="group_mean", scale="group_std"),
        None,
    ),
}
# name -> PPO's configuration, which critic, and the same
CRITICS: dict[str, tuple[PPO, str, float | None]] = {
    "GAE, lambda 1, any critic": (PPO(lam=1.0, whiten_advantages=False), "wrong", 1.0),
    "GAE, lambda 0.5, any critic": (PPO(lam=0.5, whiten_advantages=False), "wrong", None),
    "GAE, lambda 0.5, exact critic": (PPO(lam=0.5, whiten_advantages=False), "exact", 1.0),
}
KL_PLACES = ("score", "reward", "loss")
KL_ESTIMATORS = ("k1", "k2", "k3", "exact")


class Gradients(NamedTuple):
    """A mean gradient beside the true one, both as vectors."""

    mean: np.ndarray
    true: np.ndarray

    @property
    def scale(self) -> float:
        """The multiple of the true gradient that comes nearest to the mean one."""
        return float(self.mean @ self.true / (self.true @ self.true))

    @property
    def residue(self) -> float:
        """What of the mean gradient is no multiple of the true one, as a share of the true one's length."""
        return float(np.linalg.norm(self.mean - self.scale * self.true) / np.linalg.norm(self.true))


class Small(NamedTuple):
    """The model of eight sequences: a policy, its reference, a reward."""

    every: enumerable.Sequences
    params: dict
    reference: dict
    reward_N: jax.Array


def small(seed: int = 0) -> Small:
    """Logits and rewards N(0, 1), the critic at random too; no two differ by symmetry."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = enumerable.init_tabular(MODEL, keys[0])
    params["value"] = jax.random.normal(keys[1], params["value"].shape)
    every = enumerable.sequences(MODEL)
    reward_N = jax.random.normal(keys[2], every.mask.shape[:1])
    return Small(every, params, enumerable.init_tabular(MODEL, keys[3]), reward_N)


def advantage_gradients(world: Small) -> dict[str, Gradients]:
    """Every advantage estimator, named, against the gradient of the expected reward."""
    true = _vector(true_gradient(world, beta=0.0))
    found = {
        name: Gradients(-_mean_of_groups(world, config, samples), true)
        for name, (samples, config, _) in ADVANTAGES.items()
    }
    for name, (config, critic, _) in CRITICS.items():
        found[name] = Gradients(-_mean_of_ppo(world, config, critic), true)
    return found


def kl_gradients(world: Small) -> dict[tuple[str, str], Gradients]:
    """(place, estimator) -> the mean gradient of the penalty, against that of KL(policy || reference)."""
    true = -_vector(true_gradient(world._replace(reward_N=jnp.zeros_like(world.reward_N)), beta=1.0))
    found = {}
    for place, estimator in itertools.product(KL_PLACES, KL_ESTIMATORS):
        config = replace(REINFORCE, kl_coefficient=1.0, kl_placement=place, kl_estimator=estimator)
        nothing = world._replace(reward_N=jnp.zeros_like(world.reward_N))
        found[place, estimator] = Gradients(_mean_of_groups(nothing, config, 1), true)
    return found


def state_kl_gradient(world: Small, *, forward: bool = False) -> np.ndarray:
    """The part of the gradient of KL(policy || reference) that an action has on its own decision alone:

        sum_s P(s) grad KL(policy(. | s) || reference(. | s)),    P(s) held fixed

    `forward`: of the other direction, KL(reference || policy), at each state that the policy comes by.
    """
    every, logp_N = world.every, _logp(world, world.params)
    weight_NT = jnp.where(world.every.mask, jnp.exp(logp_N)[:, None], 0.0)

    def divergence(params):
        policy, reference = (jax.nn.log_softmax(x["logits"], axis=-1) for x in (params, world.reference))
        first, second = (reference, policy) if forward else (policy, reference)
        kl_S = jnp.sum(jnp.exp(first) * (first - second), axis=-1)
        return jnp.sum(jax.lax.stop_gradient(weight_NT) * kl_S[every.prefix])

    return _vector(jax.grad(divergence)(world.params))


def true_gradient(world: Small, *, beta: float) -> dict:
    """Of the expected reward less beta times the divergence."""
    logp_ref_N = _logp(world, world.reference)
    return enumerable.policy_gradient(
        enumerable.tabular, world.params, world.every, logp_ref_N, world.reward_N, beta=beta
    )


def _mean_of_groups(world: Small, config: GRPO, samples: int) -> np.ndarray:
    """Mean gradient, over all groups, of the loss that `grpo` computes for one group."""
    index_MK = np.array(list(itertools.product(range(world.reward_N.size), repeat=samples)))
    weight_M = jnp.exp(jnp.sum(_logp(world, world.params)[index_MK], axis=1))

    def evaluate(params, inputs):
        return enumerable.tabular_with_kl(params, inputs, world.reference)

    def of_group(index_K):
        inputs = jax.tree.map(lambda x: x[None], enumerable.rows(world.every, index_K))
        logp, _, _, kl = evaluate(world.params, inputs)
        rollout = grpo.Rollout(
            inputs,
            logp=logp,
            logp_ref=enumerable.tabular(world.reference, inputs)[0],
            reward=world.reward_N[index_K][None],
            mask=inputs.mask,
            baseline=jnp.full(1, 0.3),
            kl=kl,
        )
        sample, _, _ = grpo.targets(rollout, jnp.zeros(()), config=config)
        return _gradient(
            lambda params: grpo.loss(params, sample, evaluate=evaluate, config=config), world.params
        )

    return _weighted(jax.jit(jax.vmap(of_group))(index_MK), weight_M)


def _mean_of_ppo(world: Small, config: PPO, critic: str) -> np.ndarray:
    """The same of the policy's part of `ppo`'s loss, for one sequence at a time."""
    config = replace(config, value_coefficient=0.0)
    params = dict(world.params)
    if critic == "exact":
        params["value"] = _expected_reward_of_states(world)

    def of_sequence(index):
        inputs = enumerable.rows(world.every, index[None])
        logp, _, value = enumerable.tabular(params, inputs)
        length = inputs.mask.shape[1]
        last = jnp.arange(length)[None] == length - 1
        reward = jnp.where(last, world.reward_N[index], 0.0)
        rollout = ppo.Rollout(inputs, logp, logp, value, reward, inputs.mask)
        sample, _ = ppo.targets(rollout, jnp.zeros(()), config=config)
        # The loss is a mean over actions; here it is summed over those of a sequence.
        gradient = _gradient(
            lambda params: ppo.loss(params, sample, evaluate=enumerable.tabular, config=config), params
        )
        return jax.tree.map(lambda g: g * length, gradient)

    index_N = jnp.arange(world.reward_N.size)
    return _weighted(jax.jit(jax.vmap(of_sequence))(index_N), jnp.exp(_logp(world, world.params)))


def _expected_reward_of_states(world: Small) -> jax.Array:
    """V(s) of the reward under the policy itself, [S]: the mean reward of the sequences that come by s."""
    logp_N, every = _logp(world, world.params), world.every
    count = enumerable.count_prefixes(MODEL)
    weight_NT = jnp.broadcast_to(jnp.exp(logp_N)[:, None], every.mask.shape)
    mass_S = jnp.zeros(count).at[every.prefix].add(weight_NT)
    return jnp.zeros(count).at[every.prefix].add(weight_NT * world.reward_N[:, None]) / mass_S


def _gradient(loss: Callable[[dict], tuple[jax.Array, Any]], params: dict) -> dict:
    """Of total / count, as an update takes it."""
    grads, sums = jax.grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda g: g / sums["count"], grads)


def _weighted(grads: dict, weight_M: jax.Array) -> np.ndarray:
    return _vector(jax.tree.map(lambda g: jnp.tensordot(weight_M, g, 1), grads))


def _vector(grads: dict) -> np.ndarray:
    return np.asarray(grads["logits"], np.float64).ravel()


def _logp(world: Small, params: dict) -> jax.Array:
    return enumerable.sequence_logp(enumerable.tabular, params, world.every)
