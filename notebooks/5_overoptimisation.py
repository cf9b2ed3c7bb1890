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
# # Reward over-optimisation
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/rlhfjax/rlhfjax/blob/main/notebooks/5_overoptimisation.ipynb)
#
# A reward stands for what is meant, and is not it. Optimise it, and past some point what is meant gets worse while the reward
# still rises (Goodhart's law; [Gao et al. 2022](https://arxiv.org/abs/2210.10760)). Here everything is exact: a language model
# whose texts can be listed, a gold score, and proxies that are wrong in a known way.

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
# ## A language model, a gold score, two proxies
#
# 8 tokens and 5 positions: 32,768 texts, nearly equally likely. Each text has a quality and a style, independent. Gold is the
# quality, less what much style costs. One proxy is gold with noise; the other pays for style, and does not know its cost.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from rlhfjax.config import Enumerable
from rlhfjax.environments import enumerable

model = Enumerable(vocab_size=8, length=5, stop_token=None)
every = enumerable.sequences(model)
reference = enumerable.init_tabular(model, jax.random.key(0), scale=0.3)
logp_ref_N = enumerable.table_logp(np.asarray(reference["logits"], np.float64), every)
p_ref_N = np.exp(logp_ref_N)


def standardise(score_N):  # mean 0 and standard deviation 1 under the reference
    centred_N = score_N - p_ref_N @ score_N
    return centred_N / np.sqrt(p_ref_N @ centred_N**2)


generator = np.random.default_rng(0)
quality_N, style_N, luck_N = (standardise(generator.normal(size=len(p_ref_N))) for _ in range(3))
gold_N = standardise(quality_N - 0.5 * np.maximum(style_N, 0.0) ** 2)
proxies = {
    "noise": standardise(gold_N + 1.5 * luck_N),
    "style": standardise(quality_N + 1.5 * style_N),
}
print("texts and positions:", every.token.shape)
for name, proxy_N in proxies.items():
    print(f"correlation of gold with the proxy {name!r}: {p_ref_N @ (gold_N * proxy_N):.2f}")

# %% [markdown]
# Both go with gold: of two texts that the reference writes, either proxy picks the better one more often than not. What happens
# when they are optimised is another question.
#
# ## Best of n, exactly
#
# Draw n texts, keep the best by the proxy. `best_of_n_distribution` gives the distribution of what is kept; from it follow
# KL, proxy and gold, without sampling.

# %%
from rlhfjax.ops import best_of_n_distribution

COUNTS = 2.0 ** np.arange(0, 11)


@jax.jit
def best_of_each(logp_N, score_N, counts):
    return jax.vmap(lambda n: best_of_n_distribution(logp_N, score_N, n=n))(counts)


def measure(logp_PN, proxy_N):  # KL, proxy and gold of P policies
    kl = np.maximum(enumerable.kl(logp_PN, logp_ref_N[None]), 0.0)
    return (
        kl,
        enumerable.expected_reward(logp_PN, proxy_N[None]),
        enumerable.expected_reward(logp_PN, gold_N[None]),
    )


best_of_n = {}
for name, proxy_N in proxies.items():
    logp_PN = best_of_each(*(jnp.asarray(x, jnp.float32) for x in (logp_ref_N, proxy_N, COUNTS)))
    best_of_n[name] = measure(np.asarray(logp_PN, np.float64), proxy_N)
print("n, texts:", logp_PN.shape)
for n, kl, proxy, gold in zip(COUNTS, *best_of_n["style"], strict=True):
    print(f"best of {n:5.0f}: KL {kl:.2f} nats, proxy {proxy:5.2f}, gold {gold:5.2f}")

# %% [markdown]
# ## RL, exactly
#
# What RL with a KL penalty looks for is `ref exp(proxy / beta) / Z`. A smaller beta optimises harder.

# %%
BETAS = (8.0, 5.0, 3.0, 2.0, 1.5, 1.2, 1.0, 0.8, 0.65, 0.5)
rl = {}
for name, proxy_N in proxies.items():
    logp_PN = np.stack([enumerable.optimal_policy(logp_ref_N, proxy_N, beta=beta) for beta in BETAS])
    rl[name] = measure(logp_PN, proxy_N)
print("betas, texts:", logp_PN.shape)

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), dpi=70, layout="constrained", sharey=True)
for axes, name in zip(panels, proxies, strict=True):
    for label, found, marker in (("best of n", best_of_n, "o"), ("RL", rl, "s")):
        kl, proxy, gold = found[name]
        axes.plot(np.sqrt(kl), proxy, marker=marker, markersize=3, linestyle="--", label=f"{label}: proxy")
        axes.plot(np.sqrt(kl), gold, marker=marker, markersize=3, label=f"{label}: gold")
    axes.set(
        xlabel="square root of KL, nats",
        title=f"proxy: gold and {name}" if name == "noise" else "proxy: style",
    )
panels[0].set_ylabel("standard deviations")
panels[0].legend()
plt.show()

# %% [markdown]
# The proxy always rises. Noise only makes gold rise more slowly. The proxy that pays for style turns gold down.
#
# ## Gao's laws
#
# With d the square root of KL, the gain of gold is d (a - b d) for best of n, and d (a - b log d) for RL. Two coefficients, and a
# peak that follows from them.

# %%
from rlhfjax import overoptimisation

fits = {}
for form, found in (("best_of_n", best_of_n), ("rl", rl)):
    for name in proxies:
        kl, _, gold = found[name]
        d = np.sqrt(kl)
        fit = fits[form, name] = overoptimisation.fit(form, d, gold)
        turn = overoptimisation.turning_point(d, gold, tolerance=0.01)
        seen = "gold has not turned" if turn is None else f"gold was highest at {kl[turn]:.2f} nats"
        print(f"{form:9} {name}: a {fit.a:6.3f}, b {fit.b:6.3f}, R2 {fit.r_squared:.3f}; {seen}", end="")
        print(f", the fit's peak at {fit.peak**2:.2f}" if turn is not None else "")

# %% [markdown]
# ## Can the turn be foreseen?
#
# That is what one would want of a law: fit the first points, where it is cheap, and read off where to stop.

# %%
kl, _, gold = best_of_n["style"]
d = np.sqrt(kl)
line = np.linspace(0.01, d[-1], 100)
figure, axes = plt.subplots(figsize=(6, 3.6), dpi=70, layout="constrained")
axes.plot(d, gold, "o", label="exact")
for used in (4, 6, len(d)):
    fit = overoptimisation.fit("best_of_n", d[:used], gold[:used])
    axes.plot(line, line * (fit.a - fit.b * line), label=f"fit to n up to {COUNTS[used - 1]:.0f}")
    print(f"n up to {COUNTS[used - 1]:4.0f}: peak at {fit.peak**2:.2f} nats, {fit.peak_gain:.2f} high")
axes.set(xlabel="square root of KL, nats", ylabel="gold", title="best of n, proxy: style")
axes.legend()
plt.show()

# %% [markdown]
# ## Does a trained policy go there too?
#
# RLOO on the proxy, at three betas in one program (`vmap`). It samples and knows nothing of the curve, and ends on it.

# %%
from rlhfjax.algorithms import grpo, make_optimizer
from rlhfjax.config import GRPO, Optimizer

STEPS = 400
proxy = jnp.asarray(proxies["style"], jnp.float32)
texts = jax.tree.map(jnp.asarray, every)


def evaluate(params, inputs):
    return enumerable.tabular(params, inputs)[:2]


@jax.jit
@jax.vmap
def train(beta):
    settings = GRPO(
        kl_coefficient=beta,
        baseline="leave_one_out",
        scale="none",
        clip="none",
        aggregation="constant",
        length_constant=1.0,
        kl_placement="score",
        kl_estimator="k1",
    )
    optimizer = make_optimizer(Optimizer(learning_rate=0.1, max_grad_norm=None), STEPS)
    algorithm = grpo.make(evaluate, optimizer, settings)

    def iterate(state, key):
        key_sample, key_update = jax.random.split(key)
        logp_N = enumerable.sequence_logp(evaluate, state.params, texts)
        index_BG = enumerable.sample(key_sample, logp_N, (64, 8))
        inputs = enumerable.rows(texts, index_BG)
        logp, logp_ref = evaluate(state.params, inputs)[0], evaluate(reference, inputs)[0]
        return algorithm.update(
            state, grpo.Rollout(inputs, logp, logp_ref, proxy[index_BG], inputs.mask), key_update
        )

    state, _ = jax.lax.scan(iterate, algorithm.init(reference), jax.random.split(jax.random.key(1), STEPS))
    return state.params["logits"]


TRAINED = (3.0, 2.0, 1.0)
logits_PSV = np.asarray(train(jnp.array(TRAINED)), np.float64)
print("logits, [betas, prefixes, tokens]:", logits_PSV.shape)
logp_PN = np.stack([enumerable.table_logp(logits_SV, every) for logits_SV in logits_PSV])
for beta, *trained in zip(TRAINED, *measure(logp_PN, proxies["style"]), strict=True):
    exact = [x[BETAS.index(beta)] for x in rl["style"]]
    print(f"beta {beta}: KL, proxy, gold {np.round(trained, 2)}, at the exact optimum {np.round(exact, 2)}")

# %% [markdown]
# ## What to try next
#
# - An error with a heavy tail: `generator.standard_t(3, size=...)` in the place of `luck_N`. What does best of 1024 pick?
# - Pay for style less (0.5 for 1.5). Where does gold turn now?
# - Four proxies, PPO beside RLOO, and what goes wrong with the fits:
#   [over-optimisation](https://github.com/rlhfjax/rlhfjax/blob/main/docs/overoptimisation.md), which also has guards that stop a run in time.
# - The same on text: `python experiments/run.py overoptimisation --on text`.
