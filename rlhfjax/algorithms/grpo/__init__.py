"""Critic-free policy optimisation: a sample is judged by the other samples of its prompt (GRPO, arXiv
2402.03300) or of the batch, and every method of the family is a choice of few parts.

One update, from a rollout made with the present parameters:

  1. reward of a sample, less the KL where `kl_placement` is "score"                     `targets`
  2. advantage = (reward - baseline) / scale, and what else the config asks for          `targets`
  3. epochs x minibatches gradient steps on ratio, clip, KL and aggregation              `loss`, `update`

The methods as configurations (clip ranges and weights are the user's; see the fields of `rlhfjax.config.GRPO`):

    GRPO, 2402.03300       the defaults
    Dr.GRPO, 2503.20783    scale none, aggregation constant, length_constant, kl_coefficient None
    DAPO, 2503.14476       clip_high 0.28, aggregation token, drop_equal_groups, kl_coefficient None (its penalty
                           for length is `rlhfjax.ops.soft_overlong_penalty`)
    GSPO, 2507.18071       ratio sequence, clip_low 3e-4, clip_high 4e-4, kl_coefficient None
    CISPO, 2506.13585      clip cispo, clip_low 1, clip_high as tuned, aggregation token, kl_coefficient None
    RLOO, 2402.14740       baseline leave_one_out, scale none, clip none, aggregation constant with
                           length_constant 1, kl_placement score, kl_estimator k1
    ReMax, 2310.10505      RLOO with baseline given (the greedy completion's reward)
    REINFORCE++, 2501.03262    baseline none, scale none, whiten actions, aggregation token, kl_placement reward,
                           kl_estimator k1; "w/ baseline": baseline group_mean, kl_placement loss, kl_estimator k2
    GDPO, 2601.05242       GRPO with separate_rewards and whiten samples
    REINFORCE              RLOO with baseline batch_mean, moving or none

Of these, the optimum is pi(y|x) = pi_ref(y|x) exp(reward(x, y) / kl_coefficient) / Z(x) where scale and whiten are
"none", the aggregation is not "sequence", and the KL is k1 in "reward" or "score". A division by a deviation makes
the weight of the KL vary with the rewards, a mean over the actions of each sequence with its length. k2 and exact in
the loss see only the KL of each state, not that an action changes the states to come: they agree for sequences of
one action. The group mean leaves (G - 1) / G of the reward's gradient; a KL in "loss" or "reward", which has no such
baseline, then weighs G / (G - 1) times its coefficient.

Metrics (float32 scalars; "sequence" = a sample with at least one action that counts):

    objective/reward            per sequence, as given; several rewards weighted and added
    objective/kl                per sequence, nats: sum of k1 = logp - logp_ref over its actions
    objective/kl_penalty        per sequence: what its reward lost to the KL
    objective/return            per sequence: reward - penalty (these two: kl_placement reward and score)
    objective/kl_coefficient    used in this update (where there is one)
    reward/0, reward/1, ...     per sequence, where there are several rewards
    reward/nonfinite            sequences with a NaN or infinite reward or baseline, masked out of everything
    group/equal_rewards         share of the groups whose rewards are all equal
    batch/sequences             that count
    batch/actions               that count
    advantage/mean, advantage/std    per action
    loss/total, loss/policy     as aggregated
    loss/kl                     as aggregated, without its coefficient (kl_placement loss)
    policy/entropy              per action, nats
    policy/approximate_kl       KL(behaviour || trained) per action, nats, by k3
    policy/ratio_mean, policy/ratio_max    probability ratio trained / behaviour of an action or, at ratio
                                sequence, of sequences; 1 on policy
    policy/clip_fraction        share of actions whose ratio is bounded
    policy/logp_gap             largest |logp - rollout.logp| before the first step: only rounding, where
                                rollout and update evaluate the same function
    optimizer/gradient_norm     before clipping
    optimizer/refused           share of gradient steps not made, their gradient not being finite

Loss, policy and gradient metrics are means over the gradient steps (ratio_max: largest). Without a reference
(kl_coefficient None and logp_ref None) there is no objective/kl.

Shapes: B prompts, G samples of each, R rewards of a sample, T actions in time.

>>> import jax, jax.numpy as jnp, optax
>>> from rlhfjax.config import GRPO
>>> def evaluate(logits, action):  # logp and entropy of each action, [B, G, T]
...     logp = jax.nn.log_softmax(logits)
...     return logp[action], jnp.full(action.shape, -jnp.sum(jnp.exp(logp) * logp))
>>> algorithm = make(evaluate, optax.sgd(0.5), GRPO(scale="none", aggregation="token", kl_coefficient=None))
>>> state, update = algorithm.init(jnp.zeros(4)), jax.jit(algorithm.update)
>>> action = jnp.array([[[0], [2]], [[2], [3]]])  # two prompts, two samples of each, one action
>>> logp, _ = evaluate(state.params, action)
>>> reward = jnp.where(action[..., 0] == 2, 1.0, 0.0)
>>> rollout = Rollout(action, logp, None, reward, mask=jnp.ones(action.shape, bool))
>>> state, metrics = update(state, rollout, jax.random.key(0))
>>> int(jnp.argmax(state.params)), float(metrics["group/equal_rewards"])
(2, 0.0)
"""

from rlhfjax.algorithms.grpo.advantage import targets
from rlhfjax.algorithms.grpo.batch import Rollout, Sample
from rlhfjax.algorithms.grpo.objective import Evaluate, loss
from rlhfjax.algorithms.grpo.update import State, make
from rlhfjax.config import GRPO as Config

__all__ = ["Config", "Evaluate", "Rollout", "Sample", "State", "loss", "make", "targets"]
