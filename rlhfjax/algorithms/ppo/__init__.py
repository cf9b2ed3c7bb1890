"""Proximal policy optimisation (arXiv 1707.06347) with a KL penalty in the reward (arXiv 1909.08593).

One update, from a rollout made with the present parameters:

  1. reward[t] - kl_coefficient * (logp[t] - logp_ref[t]) is the reward to maximise      `targets`
  2. generalised advantage estimation; advantages whitened over the global batch         `targets`
  3. epochs x minibatches gradient steps on the clipped losses                           `loss`, `update`
  4. on request, the KL coefficient moves towards its target                             `update`

The optimum of 1. is pi(y|x) = pi_ref(y|x) exp(reward(x, y) / kl_coefficient) / Z(x).

On request (each a field of the config, off by default):

    kl_placement, kl_estimator   another estimate of KL, in the reward or in the loss; only k1 in the reward has the
                                 optimum above, `rlhfjax.ops.kl` has the table of the others
    dual_clip                    bounds the loss of a bad action that became likely (arXiv 1912.09729)
    critic_lam                   a lambda of its own for the critic's target (VC-PPO, arXiv 2503.01491)
    critic_warmup                updates in which the critic learns and the policy is held, bit by bit
    reward_clip, advantage_clip  bounds of what is learnt from
    ptx_coefficient              language modelling on pretraining text beside it (InstructGPT, arXiv 2203.02155 eq. 2)

Metrics (float32 scalars; "sequence" = a row along the last axis with at least one action that counts):

    objective/reward            per sequence, as given
    objective/kl                per sequence, nats: sum of k1 = logp - logp_ref over its actions
    objective/kl_penalty        per sequence: kl_coefficient * objective/kl
    objective/return            per sequence: reward - penalty
    objective/kl_coefficient    used in this update
    reward/nonfinite            sequences with a NaN or infinite reward, masked out of everything
    batch/sequences             that count
    batch/actions               that count
    advantage/mean, advantage/std    per action, before whitening
    value/mean                  per action, at the rollout
    value/explained_variance    1 - Var[returns - value] / Var[returns], at the rollout
    value/clip_fraction         share of actions whose value gets no gradient
    loss/total, loss/policy, loss/value    per action
    policy/entropy              per action, nats
    policy/approximate_kl       KL(behaviour || trained) per action, nats, by k3
    policy/ratio_mean, policy/ratio_max    probability ratio trained / behaviour, 1 on policy
    policy/clip_fraction        share of actions whose logp gets no gradient
    policy/logp_gap             largest |logp - rollout.logp| before the first step: only rounding, where
                                rollout and update evaluate the same function
    optimizer/gradient_norm     before clipping; in critic_warmup of the critic alone
    optimizer/refused           share of gradient steps not made, their gradient not being finite

and only where the config asks for what they speak of:

    objective/kl_estimate       per sequence, nats: sum of kl_estimator in the reward, if that is not k1
    reward/clip_fraction        share of sequences with a reward beyond reward_clip
    advantage/clip_fraction     share of actions with an advantage beyond advantage_clip
    policy/dual_clip_fraction   share of actions whose loss dual_clip bounds
    loss/kl                     per action, nats: kl_estimator in the loss, without its coefficient
    loss/ptx                    nats per unit of weight of the pretraining text, without its coefficient

Loss, policy, gradient metrics and value/clip_fraction are means over the gradient steps (ratio_max: largest).

Shapes: B rows of the batch, T actions in time; between them any axes, e.g. [B prompts, G samples, T].

>>> import jax, jax.numpy as jnp, optax
>>> from rlhfjax.config import PPO
>>> def evaluate(params, action):  # logp, entropy and value of each action, [B, T]
...     logp = jax.nn.log_softmax(params["logits"])
...     entropy = jnp.full(action.shape, -jnp.sum(jnp.exp(logp) * logp))
...     return logp[action], entropy, jnp.full(action.shape, params["value"])
>>> algorithm = make(evaluate, optax.sgd(0.5), PPO(kl_coefficient=0.1))
>>> state, update = algorithm.init({"logits": jnp.zeros(4), "value": jnp.zeros(())}), jax.jit(algorithm.update)
>>> action = jnp.arange(64)[:, None] % 4  # one action a row, and a reward for action 2
>>> logp, _, value = evaluate(state.params, action)
>>> reward = jnp.where(action == 2, 1.0, 0.0)
>>> rollout = Rollout(action, logp, logp, value, reward, mask=jnp.ones(action.shape, bool))
>>> state, metrics = update(state, rollout, jax.random.key(0))
>>> int(jnp.argmax(state.params["logits"]))
2
"""

from rlhfjax.algorithms.algorithm import split_blocks
from rlhfjax.algorithms.ppo.batch import Rollout, Sample
from rlhfjax.algorithms.ppo.experience import targets
from rlhfjax.algorithms.ppo.objective import Evaluate, loss
from rlhfjax.algorithms.ppo.update import State, make
from rlhfjax.config import PPO as Config

__all__ = ["Config", "Evaluate", "Rollout", "Sample", "State", "loss", "make", "split_blocks", "targets"]
