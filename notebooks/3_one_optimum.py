# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # PPO and Q-learning meet at one optimum
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/rlhfjax/rlhfjax/blob/main/notebooks/3_one_optimum.ipynb)
#
# RLHF maximises a reward while it stays near a reference policy:
#
# $$J(\pi) = E_{y \sim \pi}[r(y)] - \beta \, KL(\pi \,\|\, \pi_{ref})$$
#
# This has one maximum, $\pi^*(y) = \pi_{ref}(y) \, e^{r(y)/\beta} / Z$, whatever method looks for it. On a language model so
# small that all its texts can be listed we can compute it, and see PPO, RLOO and soft Q-learning arrive there.

# %%
import importlib.util
import subprocess
import sys

SOURCE = "git+https://github.com/rlhfjax/rlhfjax"
if importlib.util.find_spec("rlhfjax") is None:  # on Colab, say; the JAX that is there stays
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", f"rlhfjax[plot,text] @ {SOURCE}"], check=True
    )

import jax

print("JAX", jax.__version__, "on", jax.devices())

# %% [markdown]
# ## A language model that can be listed
#
# Four tokens, three positions. Token 0 ends a text, so texts differ in length.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from rlhfjax.config import Enumerable
from rlhfjax.environments import enumerable

model = Enumerable(vocab_size=4, length=3)
every = enumerable.sequences(model)  # all texts: tokens, mask, and the prefix before each token
print("texts and positions:", every.token.shape)
print(every.token[:6])

# %% [markdown]
# The reference is a table of logits, a row for each prefix. The reward of a text is drawn at random. From both, everything
# follows: probabilities, the optimum, its value.

# %%
BETA = 0.5  # reward per nat of KL
reference = enumerable.init_tabular(model, jax.random.key(0))
reward_N = np.random.default_rng(0).normal(size=len(every.token))
logp_ref_N = enumerable.table_logp(np.asarray(reference["logits"], np.float64), every)
best_N = enumerable.optimal_policy(logp_ref_N, reward_N, beta=BETA)

print("logits of the reference, [prefixes, tokens]:", reference["logits"].shape)
print(f"J of the reference {enumerable.objective(logp_ref_N, logp_ref_N, reward_N, beta=BETA):.4f}")
print(f"J of the optimum   {enumerable.optimal_objective(logp_ref_N, reward_N, beta=BETA):.4f}")
print(f"KL of the optimum  {enumerable.kl(best_N, logp_ref_N):.4f} nats")

# %% [markdown]
# ## What an algorithm sees
#
# Algorithms do not know networks. They get a function `evaluate(params, inputs)`, which says how likely each token was (and,
# for PPO, what value and entropy were). For a table that is `enumerable.tabular`.

# %%
key_sample, _ = jax.random.split(jax.random.key(1))
logp_N = enumerable.sequence_logp(enumerable.tabular, reference, every)
index_BG = enumerable.sample(key_sample, logp_N, (32, 4))  # 32 groups of 4 texts
inputs = enumerable.rows(every, index_BG)
logp, entropy, value = enumerable.tabular(reference, inputs)
print("tokens", inputs.token.shape, "log-probabilities", logp.shape, "values", value.shape)

# %% [markdown]
# ## One loop for all
#
# Sample texts, make the batch that the algorithm asks for, update. The whole run is one `lax.scan`, one program. At every step
# we note the distance to the optimum (total variation: the largest difference in the probability of any event).

# %%
from rlhfjax.algorithms import grpo, make_optimizer, ppo, soft_q
from rlhfjax.config import GRPO, PPO, Optimizer, SoftQ

STEPS, SHAPE = 600, (128, 8)
reward = jnp.asarray(reward_N, jnp.float32)
texts = jax.tree.map(jnp.asarray, every)
best = jnp.asarray(best_N, jnp.float32)


def adam(updates):
    return make_optimizer(Optimizer(learning_rate=0.1, max_grad_norm=None), updates)


def train(algorithm, as_batch, key, draw=enumerable.sample):
    def iterate(state, key):
        key_sample, key_update = jax.random.split(key)
        logp_N = enumerable.sequence_logp(enumerable.tabular, state.params, texts)
        distance = enumerable.total_variation(logp_N, best)
        batch = as_batch(state.params, draw(key_sample, logp_N, SHAPE))
        state, _ = algorithm.update(state, batch, key_update)
        return state, distance

    return jax.lax.scan(iterate, algorithm.init(reference), jax.random.split(key, STEPS))


def of_reference(inputs):
    return enumerable.tabular(reference, inputs)[0]


def at_the_end(inputs, index_BG):  # the reward comes with the last token
    last = inputs.mask & ~jnp.pad(inputs.mask[..., 1:], [(0, 0), (0, 0), (0, 1)])
    return jnp.where(last, reward[index_BG][..., None], 0.0)


# %% [markdown]
# **PPO** has a critic; the KL is taken off the reward of each token.


# %%
def ppo_batch(params, index_BG):
    inputs = enumerable.rows(texts, index_BG)
    logp, _, value = enumerable.tabular(params, inputs)
    return ppo.Rollout(inputs, logp, of_reference(inputs), value, at_the_end(inputs, index_BG), inputs.mask)


settings = PPO(
    kl_coefficient=BETA,
    whiten_advantages=False,  # whitening makes noise loud where advantages vanish, at the optimum
    epochs=2,
    minibatches=2,
    value_clip=float("inf"),
    value_coefficient=1.0,
)
run_ppo = ppo.make(enumerable.tabular, adam(4 * STEPS), settings)
ppo_state, ppo_distance = jax.jit(lambda key: train(run_ppo, ppo_batch, key))(jax.random.key(2))
print(f"PPO: total variation {ppo_distance[0]:.3f} -> {ppo_distance[-1]:.4f}")


# %% [markdown]
# **RLOO** has none: a text is held against the mean of the other texts of its group, and the KL is taken off its score.


# %%
def rloo_batch(params, index_BG):
    inputs = enumerable.rows(texts, index_BG)
    logp = enumerable.tabular(params, inputs)[0]
    return grpo.Rollout(inputs, logp, of_reference(inputs), reward[index_BG], inputs.mask)


settings = GRPO(
    kl_coefficient=BETA,
    baseline="leave_one_out",
    scale="none",
    clip="none",
    aggregation="constant",
    length_constant=1.0,
    kl_placement="score",
    kl_estimator="k1",
)
run_rloo = grpo.make(lambda params, x: enumerable.tabular(params, x)[:2], adam(STEPS), settings)
rloo_state, rloo_distance = jax.jit(lambda key: train(run_rloo, rloo_batch, key))(jax.random.key(3))
print(f"RLOO: total variation {rloo_distance[0]:.3f} -> {rloo_distance[-1]:.4f}")


# %% [markdown]
# **Soft Q-learning** learns from any data: here texts drawn evenly, never its own. The policy's logits are the values:
# $Q = V + \beta \log(\pi / \pi_{ref})$, and $V$ is $\beta$ times a log-partition.


# %%
def soft_evaluate(params, inputs):
    partition_S = jax.nn.logsumexp(params["logits"], axis=-1) - jax.nn.logsumexp(reference["logits"], axis=-1)
    logp, _, log_partition = enumerable.tabular({"logits": params["logits"], "value": partition_S}, inputs)
    return soft_q.Evaluation(logp, log_partition)


def soft_batch(params, index_BG):
    inputs = enumerable.rows(texts, index_BG)
    return soft_q.Batch(inputs, of_reference(inputs), at_the_end(inputs, index_BG), inputs.mask)


def evenly(key, logp_N, shape):
    return jax.random.randint(key, shape, 0, logp_N.size)


run_soft = soft_q.make(soft_evaluate, adam(STEPS), SoftQ(beta=BETA, polyak=0.1))
soft_state, soft_distance = jax.jit(lambda key: train(run_soft, soft_batch, key, evenly))(jax.random.key(4))
print(f"soft Q: total variation {soft_distance[0]:.3f} -> {soft_distance[-1]:.6f}")

# %% [markdown]
# ## Where they end

# %%
logp_of = {
    "reference": logp_ref_N,
    "optimum": best_N,
    "PPO": enumerable.table_logp(np.asarray(ppo_state.params["logits"], np.float64), every),
    "RLOO": enumerable.table_logp(np.asarray(rloo_state.params["logits"], np.float64), every),
    "soft Q": enumerable.table_logp(np.asarray(soft_state.params["logits"], np.float64), every),
}
print(f"{'':10} {'J':>8} {'reward':>8} {'KL':>8}")
for name, logp_N in logp_of.items():
    numbers = (
        enumerable.objective(logp_N, logp_ref_N, reward_N, beta=BETA),
        enumerable.expected_reward(logp_N, reward_N),
        enumerable.kl(logp_N, logp_ref_N),
    )
    print(f"{name:10}", *(f"{x:8.4f}" for x in numbers))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), dpi=70, layout="constrained")
for name, distance in (("PPO", ppo_distance), ("RLOO", rloo_distance), ("soft Q", soft_distance)):
    left.semilogy(np.maximum(distance, 1e-7), label=name)
left.set(xlabel="update", ylabel="total variation to the optimum")
left.legend()
order = np.argsort(-best_N)[:12]
right.plot(np.exp(logp_ref_N[order]), "o", color="grey", label="reference")
right.bar(range(12), np.exp(best_N[order]), alpha=0.3, label="optimum")
for name, marker in (("PPO", "x"), ("RLOO", "+"), ("soft Q", ".")):
    right.plot(np.exp(logp_of[name][order]), marker, label=name)
right.set(xlabel="text, the likeliest first", ylabel="probability")
right.legend()
plt.show()

# %% [markdown]
# The two that sample end within the noise of their last small steps; soft Q-learning, whose error vanishes at the optimum for
# every text at once, ends at rounding.
#
# The value that a method gives the empty text is the objective itself: $V(s_0) = \beta \log Z = J(\pi^*)$.

# %%
log_z = jax.nn.logsumexp(soft_state.params["logits"][0]) - jax.nn.logsumexp(reference["logits"][0])
print(f"soft Q: V of the empty text {BETA * log_z:.4f}")
print(f"PPO:    V of the empty text {ppo_state.params['value'][0]:.4f}")
print(f"J*                          {enumerable.optimal_objective(logp_ref_N, reward_N, beta=BETA):.4f}")

# %% [markdown]
# ## What to try next
#
# - `whiten_advantages=True` in PPO: does it still arrive?
# - GRPO's own KL, `kl_placement="loss", kl_estimator="k3"`: it ends elsewhere.
#   [The referee](https://github.com/rlhfjax/rlhfjax/blob/main/docs/referee.md) says where, and why.
# - A smaller `BETA`: the optimum lies further away. Which method gives up first?
# - All methods, a transformer in place of the table: `python experiments/run.py referee`.
# - The road from a table of Q to a language model:
#   [Q-learning](https://github.com/rlhfjax/rlhfjax/blob/main/docs/q_learning.md).
