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
# # Many seeds at once
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/rlhfjax/rlhfjax/blob/main/notebooks/7_many_seeds.ipynb)
#
# One run of reinforcement learning says little: the next seed may do much better, or fail. Here a whole training run is a pure
# function of its key and its settings. So `vmap` makes eight seeds, or a sweep over settings, one compiled program.

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
# ## A run is two functions
#
# `control_ppo` makes a training of a world and of settings: `init` and `iterate`. `train` scans over the iterations.

# %%
import dataclasses
import time

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from rlhfjax.config import ControlPPO
from rlhfjax.environments import cart_pole, play
from rlhfjax.recipes.control import control_ppo, iterations_of, train

ENVIRONMENT_STEPS, SEEDS = 48_000, 8

env = cart_pole()
settings = ControlPPO(environment_steps=ENVIRONMENT_STEPS)
training = control_ppo(env, settings)
ITERATIONS = iterations_of(ENVIRONMENT_STEPS, settings.worlds, settings.steps)
print(ITERATIONS, "iterations of", settings.worlds, "worlds and", settings.steps, "steps each")

# %% [markdown]
# ## One seed, eight seeds
#
# The only difference is `jax.vmap`. All that a run holds gets an axis of seeds.

# %%
one_seed = jax.jit(lambda key: train(training, key, ITERATIONS))
began = time.perf_counter()
run, metrics = jax.block_until_ready(one_seed(jax.random.key(0)))
print(
    f"one seed:  {time.perf_counter() - began:.1f} s with compilation, return",
    metrics["episode/return"].shape,
)

eight_seeds = jax.jit(jax.vmap(lambda key: train(training, key, ITERATIONS)))
keys = jax.random.split(jax.random.key(0), SEEDS)
began = time.perf_counter()
runs, metrics = jax.block_until_ready(eight_seeds(keys))
print(
    f"all seeds: {time.perf_counter() - began:.1f} s with compilation, return",
    metrics["episode/return"].shape,
)
print({"parameters": jax.tree.map(jnp.shape, runs.learner.params)})

# %% [markdown]
# Called again with other keys nothing is compiled, and the rate is that of the device.

# %%
began = time.perf_counter()
jax.block_until_ready(eight_seeds(jax.random.split(jax.random.key(1), SEEDS)))
seconds = time.perf_counter() - began
print(f"{seconds:.1f} s: {SEEDS * ENVIRONMENT_STEPS / seconds:,.0f} environment steps a second")


# %% [markdown]
# ## Learning curves, with intervals
#
# `episode/return` is the mean over the episodes that ended in an iteration. It is 0 where none did, so we weigh by
# `episode/count` and average over stretches of the run. The interval is a bootstrap over seeds: a run is one item.

# %%
from rlhfjax.report import bootstrap_interval

POINTS = 20


def curve(metrics):  # [seeds, iterations] -> steps [points], return [seeds, points]
    parts = [
        np.array_split(np.asarray(metrics[name]), POINTS, axis=1)
        for name in ("episode/return", "episode/count")
    ]
    mean = [np.sum(x * n, axis=1) / np.maximum(np.sum(n, axis=1), 1) for x, n in zip(*parts, strict=True)]
    return (1 + np.arange(POINTS)) * ENVIRONMENT_STEPS / POINTS, np.stack(mean, axis=1)


steps, return_SP = curve(metrics)
intervals = [bootstrap_interval(column, seed=0) for column in return_SP.T]
print("last stretch:", intervals[-1])

figure, axes = plt.subplots(figsize=(6, 3.6), dpi=70, layout="constrained")
axes.plot(steps, return_SP.T, color="grey", linewidth=0.6)
axes.plot(steps, [x.value for x in intervals], label="mean")
axes.fill_between(
    steps, [x.low for x in intervals], [x.high for x in intervals], alpha=0.3, label="95 % interval"
)
axes.set(xlabel="environment steps", ylabel="return", title=f"PPO on CartPole, {SEEDS} seeds")
axes.legend()
plt.show()


# %% [markdown]
# A curve of training is of the policy that explores. What was learnt is the greedy policy: `play` gives it whole episodes.


# %%
@jax.jit
@jax.vmap
def greedy_return(run, key):
    return play(env, training.policy(run), key, count=16, most_steps=500).score_B.mean()


greedy_S = greedy_return(runs, jax.random.split(jax.random.key(2), SEEDS))
print("greedy return by seed:", np.asarray(greedy_S).round(0))
print("mean", bootstrap_interval(np.asarray(greedy_S), seed=0))


# %% [markdown]
# ## A sweep over settings is a `vmap` too
#
# Floats of a configuration may be traced. Build the training inside the function, of the number that you are given. Three step
# sizes and eight seeds are 24 runs in one program. (What gives arrays their shapes, such as the number of worlds, cannot be
# swept so: it needs a program each.)


# %%
def run_with(learning_rate, key):
    optimizer = dataclasses.replace(settings.optimizer, learning_rate=learning_rate)
    training = control_ppo(env, dataclasses.replace(settings, optimizer=optimizer))
    return train(training, key, ITERATIONS)[1]


RATES = jnp.array([2.5e-4, 2.5e-3, 1e-2])
over_seeds = jax.vmap(run_with, in_axes=(None, 0))
sweep = jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))
began = time.perf_counter()
metrics = jax.block_until_ready(sweep(RATES, keys))
print(f"{time.perf_counter() - began:.1f} s with compilation; return", metrics["episode/return"].shape)

# %%
figure, axes = plt.subplots(figsize=(6, 3.6), dpi=70, layout="constrained")
for i, rate in enumerate(RATES):
    steps, return_SP = curve(jax.tree.map(lambda x, i=i: x[i], metrics))
    intervals = [bootstrap_interval(column, seed=0) for column in return_SP.T]
    axes.plot(steps, [x.value for x in intervals], label=f"step size {rate:.2g}")
    axes.fill_between(steps, [x.low for x in intervals], [x.high for x in intervals], alpha=0.2)
    print(f"step size {rate:.2g}, last stretch: {intervals[-1]}")
axes.set(xlabel="environment steps", ylabel="return", title="mean of the seeds, 95 % intervals")
axes.legend()
plt.show()

# %% [markdown]
# Were the intervals those of two seeds, could you tell the step sizes apart?
#
# ## What to try next
#
# - `control_pqn` and `control_dqn` of `rlhfjax.recipes.control`, with `ControlPQN` and `ControlDQN`: the lines stay the same.
# - Another world: `catch`, `acrobot`, `mountain_car`, `frozen_lake`, or
#   [one of your own](https://github.com/rlhfjax/rlhfjax/blob/main/docs/environments.md).
# - Sweep `kl_coefficient` of RLHF on text the same way: [iteration](https://github.com/rlhfjax/rlhfjax/blob/main/docs/iteration.md#many-runs-at-once).
# - Eight seeds on several devices: [mesh](https://github.com/rlhfjax/rlhfjax/blob/main/docs/mesh.md).
# - The whole comparison with its report: `python experiments/run.py cartpole`.
