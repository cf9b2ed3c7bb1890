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
# # One update step in your own training code
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/rlhfjax/rlhfjax/blob/main/notebooks/4_your_training_code.ipynb)
#
# You have a network, an optimiser and a loop. You want PPO's update, and nothing else: no trainer, no base class. An algorithm
# takes a function `evaluate(params, inputs)` and any optax optimiser, and gives two pure functions, `init` and `update`. Here
# the same update trains a flax network, an equinox network and bare arrays.

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
# ## A task
#
# A contextual bandit: an input of four numbers belongs to one of three answers, and the right answer pays 1. Any task that gives
# inputs, actions and rewards would do.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from rlhfjax.algorithms import ppo
from rlhfjax.config import PPO

ACTIONS, BATCH, STEPS = 3, 256, 60
secret = jax.random.normal(jax.random.key(7), (4, ACTIONS))


def draw_inputs(key):
    return jax.random.normal(key, (BATCH, 4))


def pay(x_BF, action_BT):
    return (action_BT == jnp.argmax(x_BF @ secret, axis=-1, keepdims=True)).astype(jnp.float32)


# %% [markdown]
# ## Everything PPO asks for
#
# Whatever the network is, `forward(params, x)` gives logits and a value. `evaluate` makes of them what PPO reads: the
# log-probability of the actions that were taken, the entropy, the value; each of the shape of the actions, here [B, 1]: one
# decision in an episode.


# %%
def make_evaluate(forward):
    def evaluate(params, inputs):
        x_BF, action_BT = inputs
        logits_BA, value_B = forward(params, x_BF)
        logp_BA = jax.nn.log_softmax(logits_BA)
        entropy_B = -jnp.sum(jnp.exp(logp_BA) * logp_BA, axis=-1)
        return jnp.take_along_axis(logp_BA, action_BT, axis=-1), entropy_B[:, None], value_B[:, None]

    return evaluate


# %% [markdown]
# A step of your loop: draw inputs, act, be paid, update. The reference is the uniform policy.

# %%
SETTINGS = PPO(kl_coefficient=0.02, epochs=2, minibatches=2, value_coefficient=0.5)


def train(forward, params):
    evaluate = make_evaluate(forward)
    algorithm = ppo.make(evaluate, optax.adam(1e-2), SETTINGS)

    @jax.jit
    def step(state, key):
        key_inputs, key_act, key_update = jax.random.split(key, 3)
        x_BF = draw_inputs(key_inputs)
        action_BT = jax.random.categorical(key_act, forward(state.params, x_BF)[0])[:, None]
        logp, _, value = evaluate(state.params, (x_BF, action_BT))
        rollout = ppo.Rollout(
            inputs=(x_BF, action_BT),
            logp=logp,
            logp_ref=jnp.full(logp.shape, -jnp.log(ACTIONS)),
            value=value,
            reward=pay(x_BF, action_BT),
            mask=jnp.ones(logp.shape, bool),
        )
        return algorithm.update(state, rollout, key_update)

    state, reward = algorithm.init(params), []
    for key in jax.random.split(jax.random.key(1), STEPS):
        state, metrics = step(state, key)
        reward.append(float(metrics["objective/reward"]))
    print(f"reward {reward[0]:.2f} -> {reward[-1]:.2f} of 1; logp_gap {metrics['policy/logp_gap']:.0e}")
    return state, reward


# %% [markdown]
# `policy/logp_gap` is the largest difference between the log-probabilities of the rollout and those that the update sees before
# its first step. More than rounding means that your two forward passes are not the same function.
#
# ## Flax

# %%
import flax.linen as nn


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.tanh(nn.Dense(32)(x))
        return nn.Dense(ACTIONS)(hidden), nn.Dense(1)(hidden)[..., 0]


net = Net()
params = net.init(jax.random.key(0), jnp.zeros((1, 4)))
print(jax.tree.map(jnp.shape, params["params"]))
rewards = {}
flax_state, rewards["flax"] = train(net.apply, params)

# %% [markdown]
# ## Equinox
#
# A model is its own parameters: `partition` parts its arrays from the rest, `combine` joins them again.

# %%
if importlib.util.find_spec("equinox") is None:
    print("equinox is not installed: pip install equinox, and run this cell again")
else:
    import equinox as eqx

    class EquinoxNet(eqx.Module):
        trunk: eqx.nn.Linear
        policy: eqx.nn.Linear
        value: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.trunk, self.policy, self.value = (
                eqx.nn.Linear(size, out, key=k)
                for size, out, k in zip((4, 32, 32), (32, ACTIONS, 1), keys, strict=True)
            )

        def __call__(self, x):
            hidden = jnp.tanh(self.trunk(x))
            return self.policy(hidden), self.value(hidden)[0]

    arrays, static = eqx.partition(EquinoxNet(jax.random.key(0)), eqx.is_array)

    def equinox_forward(params, x_BF):
        return jax.vmap(eqx.combine(params, static))(x_BF)

    equinox_state, rewards["equinox"] = train(equinox_forward, arrays)
    trained = eqx.combine(equinox_state.params, static)
    print(type(trained).__name__, "of one input:", trained(jnp.ones(4))[0].shape)


# %% [markdown]
# ## Bare arrays
#
# Parameters are any tree of arrays.


# %%
def bare_forward(params, x_BF):
    hidden = jnp.tanh(x_BF @ params["in"])
    return hidden @ params["out"], hidden @ params["value"]


keys = jax.random.split(jax.random.key(0), 2)
params = {
    "in": jax.random.normal(keys[0], (4, 32)) / 2,
    "out": jax.random.normal(keys[1], (32, ACTIONS)) / 32**0.5,
    "value": jnp.zeros(32),
}
bare_state, rewards["bare arrays"] = train(bare_forward, params)

# %%
figure, axes = plt.subplots(figsize=(6, 3.2), dpi=70, layout="constrained")
for name, reward in rewards.items():
    axes.plot(reward, label=name)
axes.set(xlabel="update", ylabel="mean reward", title="one update, three ways to write a network")
axes.legend()
plt.show()

# %% [markdown]
# ## The loss alone
#
# If you have your own step too, take the loss. It returns a total and sums over actions: divide by the count, once, over
# all your devices and microbatches, and padding changes nothing.

# %%
x_BF = draw_inputs(jax.random.key(3))
action_BT = jnp.zeros((BATCH, 1), jnp.int32)
evaluate = make_evaluate(bare_forward)
logp, _, value = evaluate(bare_state.params, (x_BF, action_BT))
paid = pay(x_BF, action_BT)
sample = ppo.Sample(
    inputs=(x_BF, action_BT),
    logp=logp,
    value=value,
    advantage=paid - value,
    returns=paid,
    mask=jnp.ones(logp.shape, bool),
)
gradient, sums = jax.grad(ppo.loss, has_aux=True)(
    bare_state.params, sample, evaluate=evaluate, config=SETTINGS
)
print({name: f"{x:.3f}" for name, x in sums.items()})
print(jax.tree.map(jnp.shape, gradient))

# %% [markdown]
# ## What to try next
#
# - The other algorithms take the same way in: `grpo`, `dpo`, `reward_model`, `dqn`. Their `evaluate` differs, see
#   [algorithms](https://github.com/rlhfjax/rlhfjax/blob/main/docs/algorithms.md).
# - Your step inside `shard_map`, `pmap` or `vmap`: [axis_name](https://github.com/rlhfjax/rlhfjax/blob/main/docs/axis_name.md).
# - A whole language model in the same form: [iteration](https://github.com/rlhfjax/rlhfjax/blob/main/docs/iteration.md).
# - `optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(...))` in the place of Adam: any optax optimiser goes in.
