"""Kullback-Leibler divergence between a policy pi and its reference, and the controller of its weight.

k1, k2 and k3 (J. Schulman, "Approximating KL divergence", 2020) estimate KL(pi || ref) = E_pi[log pi - log
ref] from the log-probabilities of samples drawn from pi. As numbers they differ in bias and variance; as
losses they differ in kind. The expected gradient of each, for on-policy samples and with respect to pi
(arXiv:2512.21852):

    op    expectation under pi       expected gradient as a loss
    k1    KL(pi || ref)              0: a penalty made of it does nothing
    k2    KL(pi || ref) + O(|d|^3)   gradient of KL(pi || ref)
    k3    KL(pi || ref)              gradient of KL(ref || pi), the other direction

Taken off the reward instead (detached: it weighs the gradient of log pi), with u = pi / ref at one decision:

    op      expected gradient of the penalty
    k1      gradient of KL(pi || ref): the optimum is ref exp(reward / coefficient) / Z
    k2      gradient of sum ref u (log(u)^2 / 2 - log u + 1)
    k3      gradient of sum ref ((1 + u) log u - 2 u)
    exact   0

The functions of u under k2 and k3 are concave for u < 1: an action that the policy has made rarer than the
reference is pushed further down, not back, and near the reference the force is of second order only. What they
converge to is not the optimum of k1, and need not be anything.

Over a sequence an action also decides which states follow, and with them their divergence. In the reward this
part is in the gradient of every estimator, by way of the return; in the loss it is in none. So

    exact in the reward        holds the decisions before a state and never the one in it: the last is free
    exact or k2 in the loss    holds each decision for itself: at every state pi = ref exp(Q / coefficient) / Z,
                               with Q the return of the reward alone, without the later penalties
    k3 in the loss             the same with the other direction: pi = coefficient * ref / (level - Q)
    k1 in the reward           has both parts, and alone the optimum of the whole sequence

For one decision exact and k2 in the loss agree with k1 in the reward. Estimators in the loss are of the sampled
actions, unweighted: once the policy has moved off the rollout, k2 and k3 have the bias of its older samples.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from rlhfjax.ops._check import as_float, as_number, require_rank

# exp(20) is 5e8: far beyond any useful ratio, and its square still fits in float32.
LOG_RATIO_BOUND = 20.0


def k1(logp: ArrayLike, logp_ref: ArrayLike) -> Array:
    """`logp - logp_ref`, elementwise, in nats: unbiased, of high variance, negative for some samples."""
    logp = as_float("logp", logp)
    return logp - as_float("logp_ref", logp_ref, logp.shape)


def k2(logp: ArrayLike, logp_ref: ArrayLike) -> Array:
    """`(logp - logp_ref)^2 / 2`, elementwise, in nats: >= 0, biased, of low variance."""
    return 0.5 * jnp.square(k1(logp, logp_ref))


def k3(logp: ArrayLike, logp_ref: ArrayLike) -> Array:
    """`exp(d) - 1 - d` with `d = logp_ref - logp`, elementwise, in nats: >= 0, unbiased.

    The exponent is clamped to [-20, 20], so that one impossible sample gives a large number and not infinity;
    beyond the clamp only the linear term has a gradient.

    >>> float(k3(-1.0, -1.0)), float(k1(-1.0, -3.0)), float(k2(-1.0, -3.0))
    (0.0, 2.0, 2.0)
    """
    log_ratio = -k1(logp, logp_ref)
    return jnp.expm1(jnp.clip(log_ratio, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)) - log_ratio


def categorical_kl(logits: ArrayLike, logits_ref: ArrayLike) -> Array:
    """Exact `KL(softmax(logits) || softmax(logits_ref))` over the last axis, in nats.

    Args:
      logits, logits_ref: float [..., V]. An entry of `logits` at -inf has probability 0 and adds nothing.

    Returns:
      float32 [...]; infinite where the reference excludes what the policy does not.
    """
    logits = as_float("logits", logits)
    require_rank("logits", logits, 1, "[..., V]")
    logp_V = jax.nn.log_softmax(logits)
    logp_ref_V = jax.nn.log_softmax(as_float("logits_ref", logits_ref, logits.shape))
    possible_V = logp_V > -jnp.inf
    log_ratio_V = jnp.where(possible_V, logp_V, 0) - jnp.where(possible_V, logp_ref_V, 0)
    return jnp.sum(jnp.exp(logp_V) * log_ratio_V, axis=-1)


def adaptive_kl_coefficient(
    coefficient: ArrayLike, kl: ArrayLike, *, target: ArrayLike, horizon: ArrayLike, steps: ArrayLike
) -> Array:
    """The KL coefficient for the next iteration (arXiv:1909.08593, sec. 2.2): raised while KL is too high.

        error = clip(kl / target - 1, -0.2, 0.2);  coefficient * (1 + error * steps / horizon)

    Args:
      coefficient: the present coefficient, reward per nat.
      kl: measured KL per sequence, in nats.
      target: wanted KL per sequence, in nats, > 0.
      horizon: number of sequences over which a full error changes the coefficient by a fifth.
      steps: number of sequences since the last call (the batch size).

    Returns:
      float32 scalar.
    """
    error = jnp.clip(as_number("kl", kl) / as_number("target", target) - 1, -0.2, 0.2)
    share = as_number("steps", steps) / as_number("horizon", horizon)
    return as_number("coefficient", coefficient) * (1 + error * share)
