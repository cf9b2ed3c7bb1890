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
# # RLHF in ten minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/rlhfjax/rlhfjax/blob/main/notebooks/1_rlhf_in_ten_minutes.ipynb)
#
# The whole of RLHF in small: a language model is fine-tuned, its samples are judged in pairs, a reward model learns from the
# judgements, PPO optimises the learnt reward, and we look at what came of it. The task is to sum up the description of a
# Debian package in a line. The judge is noisy: it prefers what is nearer to the real summary (ROUGE-L), and errs often.

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
# ## Data and a base model
#
# Descriptions with their summaries, and a base model of a million parameters, come with the repository.

# %%
from pathlib import Path

ROOT = next((x for x in (Path.cwd(), *Path.cwd().parents) if (x / "experiments/assets").is_dir()), None)
if ROOT is None:  # the package alone is installed: its data lie in the repository
    ROOT = Path("rlhfjax-files")
    subprocess.run(["git", "clone", "-q", "--depth", "1", SOURCE.removeprefix("git+"), str(ROOT)], check=True)
ASSETS = ROOT / "experiments/assets"
print(sorted(path.name for path in ASSETS.glob("*.gz")))

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from rlhfjax.data import BPETokenizer, encode_pairs, load_pairs, pad_prompts
from rlhfjax.networks import decoder
from rlhfjax.pretrained import load_pretrained

PROMPT, COMPLETION = 64, 24  # most tokens
tokenizer = BPETokenizer.load(ASSETS / "base/tokenizer.json")
config, base = load_pretrained(ASSETS / "base")
lm = decoder(config)


def load(split, count):
    pairs = load_pairs(
        ASSETS / "debian_summaries.jsonl.gz", split=split, prompt_field="document", completion_field="summary"
    )[:count]
    encoded = encode_pairs(tokenizer, pairs, prompt_length=PROMPT, completion_length=COMPLETION, drop=True)
    return [pairs[i] for i in encoded.row], encoded


pairs, encoded = load("train", 8000)
test_pairs, test_encoded = load("validation", 400)
print("parameters:", sum(x.size for x in jax.tree.leaves(base)), "| vocabulary:", config.vocab_size)
print("examples:", len(pairs), "to train,", len(test_pairs), "to test")
print(pairs[0].prompt, "->", pairs[0].completion, sep="\n")

# %% [markdown]
# ## 1. Supervised fine-tuning
#
# Examples are packed into rows, so that no place is wasted. An algorithm is made of a function and an optimiser; its `init`
# and `update` are pure, and you compile them yourself.

# %%
from rlhfjax.algorithms import make_optimizer, sft
from rlhfjax.config import SFT, Optimizer
from rlhfjax.data import batch_indices, pack
from rlhfjax.recipes import PackedInputs, packed_logp

SFT_STEPS = 60
half = len(pairs) // 2  # fine-tuning sees one half; the rest is for preferences and PPO
packed = pack(encoded.prompts[:half], encoded.completions[:half], length=128, pad_id=tokenizer.pad_id)
muon = Optimizer(learning_rate=2e-3, warmup_steps=5, b2=0.95, kind="muon", muon_learning_rate=0.01)
algorithm = sft.make(packed_logp(lm), make_optimizer(muon, SFT_STEPS), SFT())
state, update = algorithm.init(base), jax.jit(algorithm.update)
print("packed rows:", packed.token_RT.shape)

losses = []
for step in range(SFT_STEPS):
    rows = batch_indices(0, step, 16, len(packed.token_RT))
    token = packed.token_RT[rows]
    parts = token[:, :-1], token[:, 1:], packed.position_RT[rows], packed.segment_RT[rows]
    weight = packed.completion_RT[rows] + 0.3 * packed.prompt_RT[rows]  # mostly the summaries
    batch = sft.Batch(PackedInputs(*map(jnp.asarray, parts)), jnp.asarray(weight, jnp.float32))
    state, metrics = update(state, batch, jax.random.key(step))
    losses.append(float(metrics["loss/nll"]))
reference = state.params  # the policy that PPO starts from, and is held to
print(f"nats a token {losses[0]:.2f} -> {losses[-1]:.2f}")

# %% [markdown]
# ## 2. Samples and preferences
#
# Four samples of each prompt; each pair of them gets a label: P(first wins) = sigmoid(difference of ROUGE-L / 0.03).

# %%
from functools import partial

from rlhfjax.data import accuracy_ceiling, draw_preferences, same_pairs
from rlhfjax.generation import Sampling, generate, sample_keys
from rlhfjax.recipes import Prompts
from rlhfjax.rewards import rouge_l

SAMPLES, TEMPERATURE = 4, 0.7


def prompts_of(encoded, rows):
    token, mask = pad_prompts([encoded.prompts[i] for i in rows], PROMPT, tokenizer.pad_id)
    return Prompts(jnp.asarray(token), jnp.asarray(mask), jnp.asarray(rows, jnp.int32))


def texts_of(token_BGC, mask_BGC):
    flat = (np.asarray(x).reshape(-1, COMPLETION) for x in (token_BGC, mask_BGC))
    rows = [token[mask].tolist() for token, mask in zip(*flat, strict=True)]
    texts = [text.strip() for text in tokenizer.decode_batch(rows)]
    return [texts[i : i + token_BGC.shape[1]] for i in range(0, len(texts), token_BGC.shape[1])]


def gold(pairs, rows, texts):  # [B, G]
    return np.array(
        [[rouge_l(x, pairs[i].completion) for x in group] for i, group in zip(rows, texts, strict=True)]
    )


@partial(jax.jit, static_argnames="samples")
def sample(params, prompts, key, samples, temperature=TEMPERATURE):
    keys = sample_keys(key, prompts.index_B, samples)
    return generate(
        lm, params, prompts.token_BP, prompts.mask_BP, keys,
        max_new_tokens=COMPLETION, stop_tokens=(tokenizer.eos_id,), sampling=Sampling(temperature),
    )  # fmt: skip


JUDGED, HELDOUT = 768, 128
judged = half + np.arange(JUDGED)
drawn = [
    sample(reference, prompts_of(encoded, rows), jax.random.key(1), SAMPLES)
    for rows in judged.reshape(-1, 64)
]
token_BGC, mask_BGC = (
    np.concatenate([getattr(x, name) for x in drawn]) for name in ("token_BGC", "mask_BGC")
)
texts = texts_of(token_BGC, mask_BGC)
gold_BG = gold(pairs, judged, texts)
labels = draw_preferences(gold_BG, temperature=0.03, seed=0, same_BK=same_pairs(texts))
print("samples:", token_BGC.shape, "| labels:", labels.label_BK.shape)
print("pairs of two different texts:", labels.mask_BK.sum())
print(f"the best guesser of such labels is right {accuracy_ceiling(labels):.0%} of the time")

# %% [markdown]
# ## 3. The reward model
#
# The fine-tuned model with a scalar head, trained so that the sample that won scores higher (Bradley and Terry). The last
# 128 prompts are held out.

# %%
from rlhfjax.algorithms import reward_model
from rlhfjax.config import RewardModel
from rlhfjax.networks import Branches
from rlhfjax.recipes import init_reward_model, make_reward_model

REWARD_STEPS = 30


def branches_of(index):
    return Branches(
        *prompts_of(encoded, judged[index])[:2], jnp.asarray(token_BGC[index]), jnp.asarray(mask_BGC[index])
    )


def preferences_of(index):
    return reward_model.Preference(
        branches_of(index), *map(jnp.asarray, (labels.first_K, labels.second_K)),
        jnp.asarray(labels.label_BK[index]), jnp.asarray(labels.mask_BK[index]),
    )  # fmt: skip


score = make_reward_model(lm, pool="mean")
muon = Optimizer(learning_rate=1e-3, warmup_steps=4, b2=0.95, kind="muon", muon_learning_rate=0.005)
algorithm = reward_model.make(score, make_optimizer(muon, REWARD_STEPS), RewardModel())
state = algorithm.init(init_reward_model(jax.random.key(2), reference, config.width))
update = jax.jit(algorithm.update)
for step in range(REWARD_STEPS):
    index = batch_indices(0, step, 32, JUDGED - HELDOUT)
    state, metrics = update(state, preferences_of(index), jax.random.key(step))

evaluate_score = jax.jit(score)
blocks = np.arange(JUDGED).reshape(-1, 64)
score_BG = jnp.concatenate([evaluate_score(state.params, branches_of(index)) for index in blocks])
gain, bias = reward_model.normalisation(score_BG[:-HELDOUT])  # mean 0, deviation 1 on the reference's samples
reward_params = state.params | {"gain": gain, "bias": bias}
margin = np.asarray(score_BG[-HELDOUT:, labels.first_K] - score_BG[-HELDOUT:, labels.second_K])
counts = labels.mask_BK[-HELDOUT:]
right = (margin > 0) == (labels.label_BK[-HELDOUT:] > 0.5)
print(f"right about {right[counts].mean():.0%} of {counts.sum()} held-out labels")

# %% [markdown]
# ## 4. PPO
#
# `make_rlhf` composes rollout, reward, batch and update into one function, compiled once: prompts in, new state out.

# %%
from rlhfjax.algorithms import ppo
from rlhfjax.config import PPO
from rlhfjax.networks import init_scalar_head
from rlhfjax.recipes import Frozen, make_rlhf, policy_parameters, ppo_batch, text_actor_critic

PPO_STEPS = 16
settings = PPO(kl_coefficient=0.2, epochs=1, minibatches=2, value_coefficient=0.5)
muon = Optimizer(
    learning_rate=1e-3, warmup_steps=2, b2=0.95, kind="muon", muon_learning_rate=2.5e-3, final_fraction=0.1
)
evaluate = text_actor_critic(lm, temperature=TEMPERATURE)
algorithm = ppo.make(evaluate, make_optimizer(muon, 2 * PPO_STEPS), settings, is_policy=policy_parameters)
rlhf = make_rlhf(
    lm,
    algorithm,
    ppo_batch(lm, evaluate, temperature=TEMPERATURE),
    reward=score,
    samples=SAMPLES,
    max_new_tokens=COMPLETION,
    stop_tokens=(tokenizer.eos_id,),
    temperature=TEMPERATURE,
    missing_eos_penalty=-3.0,  # a summary must end
)
critic = {
    "trunk": reward_params["trunk"],
    "head": init_scalar_head(jax.random.key(3), config.width, scale=0.0),
}
state = algorithm.init({"policy": reference, "critic": critic})
iterate = jax.jit(rlhf.iterate)
rest = half + JUDGED + np.arange(len(pairs) - half - JUDGED)
history = {"reward": [], "ROUGE-L": [], "KL": []}
for step in range(PPO_STEPS):
    rows = rest[batch_indices(1, step, 32, len(rest))]
    state, metrics, experience = iterate(
        state, Frozen(reference, reward_params), prompts_of(encoded, rows), jax.random.key(step)
    )
    written = texts_of(*experience.branches[2:])
    history["reward"].append(float(metrics["objective/score"]))
    history["ROUGE-L"].append(gold(pairs, rows, written).mean())
    history["KL"].append(float(metrics["objective/kl"]))
    if step % 4 == 3:
        means = ", ".join(f"{name} {np.mean(x[-4:]):.3f}" for name, x in history.items())
        print(f"steps {step - 2}-{step + 1}: {means}")
policy = state.params["policy"]
print("completions of a step:", experience.branches.completion_BGC.shape)

# %%
figure, panels = plt.subplots(1, 3, figsize=(10, 2.8), dpi=70, layout="constrained")
for axes, (name, x) in zip(panels, history.items(), strict=True):
    axes.plot(range(1, PPO_STEPS + 1), x)
    axes.set(xlabel="step", title=name + (" from the reference, nats" if name == "KL" else ""))
plt.show()

# %% [markdown]
# The reward is what PPO sees. ROUGE-L it never sees: it only tells us whether the reward model leads the right way. One step is
# 128 samples, so these curves are noisy.
#
# ## 5. Evaluation
#
# On prompts that nothing was trained on, with intervals over prompts. Best of 4 by the reward model is what costs no training.

# %%
from rlhfjax.report import bootstrap_interval, paired_difference_interval

rows = np.arange(len(test_pairs))
prompts = prompts_of(test_encoded, rows)
gold_of, text_of = {}, {}
for name, params in (("fine-tuned", reference), ("PPO", policy)):
    drawn = sample(params, prompts, jax.random.key(9), SAMPLES)
    text_of[name] = texts_of(drawn.token_BGC, drawn.mask_BGC)
    gold_of[name] = gold(test_pairs, rows, text_of[name])
    if name == "fine-tuned":
        branches = Branches(*prompts[:2], drawn.token_BGC, drawn.mask_BGC)
        best = np.asarray(evaluate_score(reward_params, branches).argmax(axis=1))
        gold_of["best of 4"] = gold_of[name][rows, best][:, None]
for name, x in gold_of.items():
    print(f"{name:10} ROUGE-L {bootstrap_interval(x.mean(axis=1), seed=0)}")
lead = paired_difference_interval(gold_of["PPO"].mean(axis=1), gold_of["fine-tuned"].mean(axis=1), seed=0)
print(f"PPO less fine-tuned: {lead}")

# %%
for i in range(4):
    print("description:", test_pairs[i].prompt[:150])
    print("  summary:   ", test_pairs[i].completion)
    print("  fine-tuned:", text_of["fine-tuned"][i][0])
    print("  PPO:       ", text_of["PPO"][i][0])

# %% [markdown]
# One sample of PPO's policy is about as good as the best of four of the policy it came from, and it was held to it by the KL.
# The texts are still those of a model of a million parameters, trained for two minutes: the parts are those of a full-sized
# run, the sizes are not.
#
# ## What to try next
#
# - `kl_coefficient=0`: the reward rises further. What happens to ROUGE-L, and to the texts?
# - GRPO for PPO: `grpo.make(text_policy(lm), ...)` with `grpo_batch(lm)`, and no critic. [Iteration](https://github.com/rlhfjax/rlhfjax/blob/main/docs/iteration.md).
# - Your own reward in the place of the learnt one: [the next notebook](https://github.com/rlhfjax/rlhfjax/blob/main/notebooks/2_your_own_reward.ipynb), and [rewards](https://github.com/rlhfjax/rlhfjax/blob/main/docs/rewards.md).
# - The full-sized run with a report, five minutes: `python experiments/run.py`. What it found:
#   [summarisation](https://github.com/rlhfjax/rlhfjax/blob/main/docs/summarisation.md).
