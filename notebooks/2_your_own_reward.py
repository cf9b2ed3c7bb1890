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
# # Your own reward function
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/rlhfjax/rlhfjax/blob/main/notebooks/2_your_own_reward.ipynb)
#
# How do I choose a reward function? Write one, ask it about texts before anything is trained on it, and only then train. Here a
# reward of one line looks sensible and is not: a check tells in seconds how it will be gamed, training shows that the check was
# right, and we mend it. The task is to sum up the description of a Debian package in a line.

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
# ## A model that writes
#
# Descriptions, the summaries that people wrote of them, and a base model of a million parameters come with the repository. The
# model was taught to write descriptions and to copy from them, never to sum them up.

# %%
from pathlib import Path

ROOT = next((x for x in (Path.cwd(), *Path.cwd().parents) if (x / "experiments/assets").is_dir()), None)
if ROOT is None:  # the package alone is installed: its data lie in the repository
    ROOT = Path("rlhfjax-files")
    subprocess.run(["git", "clone", "-q", "--depth", "1", SOURCE.removeprefix("git+"), str(ROOT)], check=True)
ASSETS = ROOT / "experiments/assets"

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from rlhfjax.data import BPETokenizer, batch_indices, encode_pairs, load_pairs, pad_prompts
from rlhfjax.generation import Sampling, generate, sample_keys
from rlhfjax.networks import decoder
from rlhfjax.pretrained import load_pretrained
from rlhfjax.recipes import Prompts

PROMPT, COMPLETION, TEMPERATURE = 64, 24, 0.7  # most tokens
CHECKED, SAMPLES = 128, 8  # prompts and samples of each that rewards are asked about
tokenizer = BPETokenizer.load(ASSETS / "base/tokenizer.json")
config, base = load_pretrained(ASSETS / "base")
lm = decoder(config)


def load(split, count):
    pairs = load_pairs(
        ASSETS / "debian_summaries.jsonl.gz", split=split, prompt_field="document", completion_field="summary"
    )[:count]
    encoded = encode_pairs(tokenizer, pairs, prompt_length=PROMPT, completion_length=COMPLETION, drop=True)
    return [pairs[i] for i in encoded.row], encoded


def prompts_of(encoded, rows):
    token, mask = pad_prompts([encoded.prompts[i] for i in rows], PROMPT, tokenizer.pad_id)
    return Prompts(jnp.asarray(token), jnp.asarray(mask), jnp.asarray(rows, jnp.int32))


def texts_of(generation):  # all texts in a row: the samples of the first prompt, then those of the second
    token, mask = (np.asarray(x).reshape(-1, COMPLETION) for x in generation[:2])
    return [
        x.strip() for x in tokenizer.decode_batch([t[m].tolist() for t, m in zip(token, mask, strict=True)])
    ]


@jax.jit
def sample(params, prompts, key):
    keys = sample_keys(key, prompts.index_B, SAMPLES)
    stop = (tokenizer.eos_id,)
    return generate(
        lm, params, prompts.token_BP, prompts.mask_BP, keys,
        max_new_tokens=COMPLETION, stop_tokens=stop, sampling=Sampling(TEMPERATURE),
    )  # fmt: skip


pairs, encoded = load("train", 2000)
test_pairs, test_encoded = load("validation", 400)
rows = np.arange(CHECKED)
drawn = sample(base, prompts_of(encoded, rows), jax.random.key(0))
texts = texts_of(drawn)
group = np.repeat(rows, SAMPLES)  # the prompt of each text
descriptions = [pairs[i].prompt for i in group]
print("texts:", len(texts))
for i in range(3):
    print(f"description: {pairs[i].prompt[:90]}...")
    print(f"  summary: {pairs[i].completion}\n  model:   {texts[i * SAMPLES]}")

# %% [markdown]
# ## A reward is a Python function
#
# Texts in, numbers out. A good summary says what the description says, so let us count its words that the description has.


# %%
def words_of_the_description(prompts, completions, **columns):
    return [
        sum(word in prompt.lower().split() for word in text.lower().split()) / 10
        for prompt, text in zip(prompts, completions, strict=True)
    ]


tried = ["mail tool", "music player", "sort mail mail mail"]
print(words_of_the_description(["a tool to sort mail"] * 3, tried))

# %% [markdown]
# ## Check it before training
#
# What is wanted is likeness to the summary that a person wrote (ROUGE-L). With such gold scores for some texts, or some pairs
# judged by yourself, a reward can be asked what it is worth: whether it ranks texts as gold does, what the best of n by it
# is worth, whether it is length in disguise, and whether texts that nobody wants beat the honest ones. `judge` says it in
# sentences.

# %%
from rlhfjax.rewards import audit, rouge_l


def gold_of(pairs, rows, texts):
    return np.array([rouge_l(text, pairs[i].completion) for i, text in zip(rows, texts, strict=True)])


def check(reward):
    score = np.array(reward(descriptions, texts))
    gold = gold_of(pairs, group, texts)
    features = audit.shallow_features(descriptions, texts)
    asked = [pairs[i].prompt for i in rows]
    probes = audit.probe_texts(asked, texts, group, score, audit.reward_words(score, texts, group))
    judged = audit.judge_probes(
        {name: np.array(reward(asked, probe)) for name, probe in probes.items()}, score, group,
        {name: gold_of(pairs, rows, probe) for name, probe in probes.items()}, gold,
    )  # fmt: skip
    evidence = audit.Evidence(
        spread=audit.spread(score, group, texts),
        accuracy=audit.pair_accuracy(score, audit.gold_pairs(gold, group), group),
        curve=audit.best_of_n_curve(score, gold, group),
        features=audit.feature_correlations(score, features, group),
        features_of_gold=audit.feature_correlations(gold, features, group),
        probes=judged,
        gold_probed=True,
    )
    findings = audit.judge(evidence)
    print(f"verdict on {reward.__name__}: {audit.overall(findings)}")
    for finding in findings:
        print(f"- {finding.grade} ({finding.topic}): {finding.sentence}")


check(words_of_the_description)

# %% [markdown]
# It is the number of words in disguise, and a text written four times over beats every honest one. Best of n still gains a
# little gold: among *honest* samples longer ones are a little better. A policy does not stop there.
#
# ## Mend it
#
# Two changes, each of which answers a finding. A word counts as often as the description has it, and no more (BLEU clips its
# counts for this reason): `rouge_n` of the description. And words beyond the eighth cost. Rewards compose, by name and weight.

# %%
from rlhfjax.rewards import over_length_reward, rouge_n, weighted_sum_on_host


def each_word_once(prompts, completions, **columns):
    return [rouge_n(text, prompt, 1) for prompt, text in zip(prompts, completions, strict=True)]


parts = {"each word once": each_word_once, "too long": over_length_reward(8)}
weights = {"each word once": 1.0, "too long": 0.05}
mended = weighted_sum_on_host(parts, weights)
mended.__name__ = "mended"
check(mended)

# %% [markdown]
# Not perfect: "careful" still. It agrees with gold more often, and no probe beats the honest texts.
#
# ## The same on the device
#
# Python is enough, and what follows trains by it. A reward that is a function of arrays saves the way of the texts to the host:
# a whole iteration is then one compiled program. Here one part is the library's, the other is written by hand.

# %%
from rlhfjax.rewards import byte_table, references, rouge_n_on_device, weighted_sum, word_count, word_table

token_bytes = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
counter = word_table(token_bytes, config.vocab_size)


def too_long(params, token_BT, mask_BT):
    return -jnp.maximum(word_count(token_BT, mask_BT, counter) - 8.0, 0.0)


on_device = weighted_sum(
    {
        "each word once": rouge_n_on_device(byte_table(token_bytes, config.vocab_size), 1),
        "too long": too_long,
    },
    weights,
    numbered=("each word once",),  # it looks up the description by the prompt's number
)
params = {"each word once": references([pair.prompt for pair in pairs])}
token_BT, mask_BT = (x.reshape(-1, COMPLETION) for x in (drawn.token_BGC, drawn.mask_BGC))
score_B = jax.jit(on_device)(params, token_BT, mask_BT, jnp.asarray(group, jnp.int32))
apart = np.abs(np.asarray(score_B) - mended(descriptions, texts)).max()
print(f"host and device differ by at most {apart:.0e} over {len(texts)} texts")

# %% [markdown]
# ## Train
#
# GRPO with a leave-one-out baseline. `RewardPool` calls the functions in threads, and names function and sample where one
# raises, hangs or gives no number. `Iteration` joins the two compiled halves, `rollout` and `learn`, with the scoring between
# them. (While a slow reward is waited for, the device can draw the next completions: `following=`.) The KL coefficient is part
# of the state, which `init` takes from the settings, so that all runs share two programs.
#
# The guard watches the KL. Here it only notes when it would have ended the run.

# %%
from rlhfjax.algorithms import grpo, make_optimizer
from rlhfjax.config import GRPO, Optimizer
from rlhfjax.guards import Memory, observe, parse_guard
from rlhfjax.recipes import Frozen, Iteration, grpo_batch, make_rlhf, text_policy
from rlhfjax.rewards import RewardPool

STEPS, BATCH, GROUP = 40, 16, 4
muon = Optimizer(
    learning_rate=2e-3, warmup_steps=2, b2=0.95, kind="muon", muon_learning_rate=5e-3, final_fraction=0.1
)


def make(kl_coefficient):
    settings = GRPO(
        kl_coefficient=kl_coefficient, kl_placement="reward", kl_estimator="k1",
        baseline="leave_one_out", scale="none", aggregation="token", minibatches=2,
    )  # fmt: skip
    algorithm = grpo.make(text_policy(lm, temperature=TEMPERATURE), make_optimizer(muon, 2 * STEPS), settings)
    rlhf = make_rlhf(
        lm, algorithm, grpo_batch(lm, temperature=TEMPERATURE), samples=GROUP, max_new_tokens=COMPLETION,
        stop_tokens=(tokenizer.eos_id,), temperature=TEMPERATURE, policy=lambda params: params,
    )  # fmt: skip
    return algorithm, rlhf


rollout = jax.jit(make(0.0)[1].rollout)
learn = jax.jit(make(0.0)[1].learn)
guard = parse_guard("KL>10:stop")


def train(name, functions, weights, kl_coefficient):
    seen, memory, stopped = {"words": [], "gold": [], "KL": []}, Memory(), None
    with RewardPool(functions, weights, workers=2, timeout=60) as pool:

        def score(prompts, generation):  # hands the texts over, and returns what waits for the scores
            asked, written = np.repeat(np.asarray(prompts.index_B), GROUP), texts_of(generation)
            descriptions = [pairs[i].prompt for i in asked]
            seen["words"].append(np.mean(words_of_the_description(descriptions, written)))
            seen["gold"].append(gold_of(pairs, asked, written).mean())
            scores = pool.submit(descriptions, written)
            return lambda: scores().reshape(BATCH, GROUP)

        iteration = Iteration(rollout, learn, score)
        state = make(kl_coefficient)[0].init(base)
        for step in range(STEPS):
            prompts = prompts_of(encoded, batch_indices(0, step, BATCH, len(pairs)))
            made = iteration(state, Frozen(base, None), (prompts, jax.random.key(step)))
            state = made.state
            seen["KL"].append(float(made.metrics["objective/kl"]))
            memory, verdict = observe(guard, memory, step, seen["KL"][-1], window=3, patience=2)
            stopped = step if stopped is None and verdict.acts else stopped
    note = "the guard holds" if stopped is None else f"{guard.text} at step {stopped + 1}"
    first, last = ({key: np.mean(x[part]) for key, x in seen.items()} for part in (slice(5), slice(-5, None)))
    print(f"{name}: " + ", ".join(f"{key} {first[key]:.2f} -> {last[key]:.2f}" for key in seen) + f"; {note}")
    return state.params, seen


naive = {"words of the description": words_of_the_description}
policies, history = {"base": base}, {}
for name, functions, given, kl_coefficient in (
    ("naive", naive, {"words of the description": 1.0}, 0.0),
    ("naive, KL 0.2", naive, {"words of the description": 1.0}, 0.2),
    ("mended, KL 0.03", parts, weights, 0.03),
):
    policies[name], history[name] = train(name, functions, given, kl_coefficient)

# %% [markdown]
# "words" is the naive reward of what a run writes, whatever it is paid for; "gold" none of them ever sees.

# %%
figure, panels = plt.subplots(1, 3, figsize=(10, 3), dpi=70, layout="constrained")
labels = {"words": "the naive reward", "gold": "gold: ROUGE-L", "KL": "KL from the base, nats"}
for axes, (key, label) in zip(panels, labels.items(), strict=True):
    for name, seen in history.items():
        smooth = np.convolve(seen[key], np.ones(5) / 5, mode="valid")
        axes.plot(np.arange(5, STEPS + 1), smooth, label=name)
    axes.set(xlabel="step (mean of the last 5)", title=label)
panels[0].legend()
plt.show()

# %% [markdown]
# ## What came of it
#
# On descriptions that nothing was trained on, with intervals over them.

# %%
from rlhfjax.report import bootstrap_interval, paired_difference_interval

tested = [test_pairs[i].prompt for i in group]
written, gold = {}, {}
for name, policy in policies.items():
    written[name] = texts_of(sample(policy, prompts_of(test_encoded, rows), jax.random.key(9)))
    gold[name] = gold_of(test_pairs, group, written[name]).reshape(CHECKED, SAMPLES).mean(axis=1)
    paid = np.mean(words_of_the_description(tested, written[name]))
    print(f"{name:16} naive reward {paid:.2f}, gold {bootstrap_interval(gold[name], seed=0)}", end="")
    lead = (
        ""
        if name == "base"
        else f", less the base's {paired_difference_interval(gold[name], gold['base'], seed=0)}"
    )
    print(lead)

# %% [markdown]
# The texts that the naive reward pays best, beside what the other policies write of the same descriptions:

# %%
order = np.argsort(words_of_the_description(tested, written["naive"]), kind="stable")[::-1]
for i in list(dict.fromkeys(group[order]))[:3]:  # the first three descriptions in that order
    text = next(k for k in order if group[k] == i)
    print("description:", test_pairs[i].prompt[:150])
    print("  summary:", test_pairs[i].completion)
    for name in policies:
        print(f"  {name}: {written[name][text]}")

# %% [markdown]
# The naive reward nearly tripled, and the texts are what the check foretold: the description's words again and again, up to the
# last token. Gold did not rise. A KL penalty keeps the policy from going there, and what is left of the reward does a little
# good. The mended reward gains more, at a seventh of the penalty. (One seed each: the intervals are over descriptions only.) A
# model of a million parameters copies more than it sums up, and none of this changes that.
#
# ## What to try next
#
# - The mended reward without a KL: does it go where the naive one went?
# - The naive reward with the length cost only, or with `repetition_reward()` beside it: what does `check` say, and is it right?
# - Your own: any function of lists of texts. `python experiments/run.py audit --rewards FILE.py:NAME` writes the whole report.
#   What its numbers mean: [choosing a reward](https://github.com/rlhfjax/rlhfjax/blob/main/docs/choosing_a_reward.md).
# - All rewards that there are, and how each is hacked: [rewards](https://github.com/rlhfjax/rlhfjax/blob/main/docs/rewards.md).
# - The reward on the device in training: `make_rlhf(..., reward=completion_reward(on_device), numbered=True)` and
#   `Frozen(base, params)`; [iteration](https://github.com/rlhfjax/rlhfjax/blob/main/docs/iteration.md).
# - Guards that stop a run or raise its KL: [over-optimisation](https://github.com/rlhfjax/rlhfjax/blob/main/docs/overoptimisation.md).
