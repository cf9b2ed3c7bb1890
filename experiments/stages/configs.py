"""Settings of the stages. No jax here, so that `--help` answers at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rlhfjax.config import DPO, GRPO, ILQL, PPO, SFT, Decoder, LoRA, Optimizer, RewardModel, SoftQ


@dataclass(frozen=True)
class Text:
    """Data, tokenizer and base model."""

    data: str = "experiments/assets/debian_summaries.jsonl.gz"
    """JSONL of pairs, relative to the checkout or absolute; each row has a split: train, validation or test."""
    prompt_field: str = "document"
    """Field of the rows that is the prompt."""
    completion_field: str = "summary"
    """Field of the rows that is the reference completion."""
    base: str = "experiments/assets/base"
    """The base model: a folder in the Hugging Face layout, a .gguf file, package:NAME (an installed package that holds
    one), or OWNER/NAME on the Hugging Face Hub."""
    chat: bool = False
    """Whether prompts are conversations, rendered by the base's chat template. The rows then hold `prompt` (messages,
    or what the user says), and for fine-tuning `completion` too, or `messages`; prompt_field and completion_field are
    not read."""
    system: str | None = None
    """System message put before conversations that have none; none: what the template says by itself."""
    trained: Literal["all", "lora"] = "all"
    """What is trained: the whole model, or LoRA adapters on the frozen base, which policy, reference, critic and reward
    model then share."""
    lora: LoRA = field(default_factory=LoRA)
    """Of the adapters, where they are trained."""
    base_bits: Literal[32, 16, 8, 4] = 32
    """Of the base's numbers. Below 32 only where adapters are trained; 8 and 4 hold its projections quantised."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Type that the model computes in."""
    remat: Literal["none", "attention", "dots", "block"] = "none"
    """What the backward pass computes again in place of keeping it: nothing, attention's scores, all but the products,
    or whole blocks."""
    prompt_length: int = 64
    """Most tokens of a prompt, separator included; longer pairs are left out, and counted."""
    completion_length: int = 24
    """Most tokens of a completion, end included; also the most that a policy may generate."""
    sft_share: float = 0.5
    """Share of the training rows that fine-tuning sees; preferences and prompts of PPO come from the rest. Without a
    step of fine-tuning they come from all."""


@dataclass(frozen=True)
class SFTStage:
    """Supervised fine-tuning on packed rows."""

    steps: int = 256
    """Optimiser steps; 0: the base as it is."""
    rows: int = 16
    """Packed rows in a step."""
    length: int = 128
    """Tokens in a row."""
    prompt_weight: float = 0.3
    """Loss weight of prompt tokens, in a conversation of all that the assistant does not say; completions weigh 1."""
    algorithm: SFT = field(default_factory=SFT)
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(
            learning_rate=2e-3, warmup_steps=20, b2=0.95, kind="muon", muon_learning_rate=0.01
        )
    )


@dataclass(frozen=True)
class PreferenceStage:
    """Samples of the fine-tuned policy, compared by a noisy gold scorer."""

    prompts: int = 2560
    """Prompts to sample for; the last `heldout` of them are never trained on."""
    heldout: int = 512
    """Prompts kept to measure the reward model."""
    samples: int = 4
    """Completions of each prompt; all their pairs are labelled."""
    sampling_temperature: float = 0.7
    """Temperature of the samples, that of the rollouts to come (0.7: arXiv 1909.08593, 2403.17031)."""
    label_temperature: float = 0.05
    """Noise of the labels, in units of gold score: P(first wins) = sigmoid(gold difference / this)."""
    labels: Path | None = None
    """JSONL of labels that people gave (`annotate.py`, or rows of prompt, chosen and rejected), in place of samples and
    simulated labels: all that fit the lengths, of which a fifth of the prompts, at most `heldout`, is held out."""


@dataclass(frozen=True)
class RewardStage:
    """The reward model."""

    steps: int = 64
    """Optimiser steps."""
    prompts: int = 32
    """Prompts in a step, each with all pairs of its samples."""
    pool: str = "mean"
    """What the head reads: last (the final token) or mean (over the completion)."""
    algorithm: RewardModel = field(default_factory=RewardModel)
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(
            learning_rate=1e-3, warmup_steps=8, b2=0.95, kind="muon", muon_learning_rate=0.005
        )
    )


@dataclass(frozen=True)
class RatingStage:
    """Samples of the fine-tuned policy, rated by the reward model: what Q-learning learns from, without sampling."""

    prompts: int = 2048
    """Prompts whose samples are rated: first those that the reward model learnt from, whose samples there are
    already; past them others, sampled in the same way."""
    missing_eos_penalty: float | None = None
    """Score of a completion that did not end, in place of its reward; none: its reward stays. Squared errors feel such
    an outlier more than PPO does: at -3, the few completions that did not end are two fifths of the variance."""
    centred: bool = True
    """Whether the mean over the samples of each prompt is taken off. No optimum changes, since it shifts all values of
    a prompt alike; they need not learn in what prompts differ."""


@dataclass(frozen=True)
class Guards:
    """Bounds on what policy optimisation logs, and what is done where they are not kept (docs/overoptimisation.md)."""

    watch: tuple[str, ...] = ()
    """Each NAME<BOUND:ACTION or NAME>BOUND:ACTION, what must not happen. NAME: a metric, as gold, objective/kl,
    completions/mean_length, or a function of texts, FILE.py:NAME or MODULE:NAME, called like a reward. BOUND: a number,
    or start-NUMBER, start+NUMBER, start*NUMBER. ACTION: warn, raise (the KL coefficient) or stop."""
    window: int = 5
    """Values in the moving mean that is held against the bound; also those that `start` is the mean of."""
    patience: int = 3
    """Values in a row out of bounds before a guard acts, and between two times that it does."""
    every: int = 1
    """Steps between scorings by functions of texts."""
    factor: float = 2.0
    """By which a raise multiplies the KL coefficient."""
    least: float = 0.05
    """Reward per nat: what a raise makes at least of a KL coefficient, of 0 for example."""
    most: float = 1.0
    """Reward per nat: what a raise makes at most of it."""
    keep: Literal["held", "last"] = "held"
    """After a stop, the policy that is returned: of the last step at which the guard held, or of the last step."""


@dataclass(frozen=True)
class PPOStage:
    """PPO against a reward on the device."""

    steps: int = 45
    """Iterations: rollout, reward, update."""
    prompts: int = 32
    """Prompts in an iteration."""
    samples: int = 4
    """Completions of each prompt."""
    temperature: float = 0.7
    """Temperature of the rollouts; policy, reference and behaviour share it (0.7: arXiv 1909.08593, 2403.17031)."""
    missing_eos_penalty: float | None = -3.0
    """Score of a completion that did not end, in place of its reward; none: its reward stays."""
    shared_trunk: bool = False
    """Whether the critic is a head on the policy, not a network of its own."""
    guards: Guards = field(default_factory=Guards)
    algorithm: PPO = field(
        default_factory=lambda: PPO(kl_coefficient=0.2, epochs=1, minibatches=2, value_coefficient=0.5)
    )
    optimizer: Optimizer = field(default_factory=lambda: policy_optimizer())


def policy_optimizer(muon_learning_rate: float = 0.0025, *, adam_share: float = 0.4) -> Optimizer:
    """What every method of policy optimisation starts from; Adam's learning rate is a share of Muon's."""
    return Optimizer(
        learning_rate=adam_share * muon_learning_rate,
        warmup_steps=2,
        b2=0.95,
        kind="muon",
        muon_learning_rate=muon_learning_rate,
        final_fraction=0.1,
    )


@dataclass(frozen=True)
class GRPOStage:
    """A critic-free method against a reward on the device: GRPO, RLOO and their relatives."""

    steps: int = 45
    """Iterations: rollout, reward, update."""
    prompts: int = 32
    """Prompts in an iteration."""
    samples: int = 4
    """Completions of each prompt: a group."""
    temperature: float = 0.7
    """Temperature of the rollouts; policy, reference and behaviour share it."""
    missing_eos_penalty: float | None = -3.0
    """Score of a completion that did not end, in place of its reward; none: its reward stays."""
    guards: Guards = field(default_factory=Guards)
    algorithm: GRPO = field(
        default_factory=lambda: GRPO(
            kl_coefficient=0.2, kl_placement="reward", kl_estimator="k1", aggregation="token", minibatches=2
        )
    )
    optimizer: Optimizer = field(default_factory=policy_optimizer)


def rloo_stage() -> GRPOStage:
    """RLOO (arXiv 2402.14740): leave-one-out baseline, no clip, the KL in the score."""
    algorithm = GRPO(
        baseline="leave_one_out",
        scale="none",
        clip="none",
        aggregation="constant",
        length_constant=24.0,
        kl_coefficient=0.2,
        kl_placement="score",
        kl_estimator="k1",
        minibatches=2,
    )
    return GRPOStage(algorithm=algorithm)


@dataclass(frozen=True)
class DPOStage:
    """Preference optimisation on the pairs that the reward model learns from; no reward, no sampling."""

    steps: int = 64
    """Optimiser steps."""
    prompts: int = 32
    """Prompts in a step, each with all pairs of its samples."""
    temperature: float = 0.7
    """Temperature of the policy's log-probabilities, that of the samples in the pairs."""
    algorithm: DPO = field(default_factory=lambda: DPO(beta=0.2))
    optimizer: Optimizer = field(default_factory=lambda: policy_optimizer(0.001))


@dataclass(frozen=True)
class OnlineDPOStage:
    """Preference optimisation on the policy's own samples, judged by the reward (arXiv 2402.04792)."""

    steps: int = 45
    """Iterations: rollout, reward, update."""
    prompts: int = 32
    """Prompts in an iteration."""
    samples: int = 4
    """Completions of each prompt; the best and the worst of them are the pair."""
    temperature: float = 0.7
    """Temperature of the rollouts and of the policy's log-probabilities."""
    missing_eos_penalty: float | None = -3.0
    """Score of a completion that did not end, in place of its reward; none: its reward stays."""
    guards: Guards = field(default_factory=Guards)
    algorithm: DPO = field(default_factory=lambda: DPO(beta=0.2))
    optimizer: Optimizer = field(default_factory=lambda: policy_optimizer(0.001))


@dataclass(frozen=True)
class RAFTStage:
    """Fine-tuning on the best of several samples, again and again (RAFT, arXiv 2304.06767; expert iteration)."""

    steps: int = 45
    """Iterations: rollout, choice, update."""
    prompts: int = 32
    """Prompts in an iteration."""
    samples: int = 4
    """Completions of each prompt, of which the best by the reward is learnt."""
    temperature: float = 0.7
    """Temperature of the rollouts and of the policy's log-probabilities."""
    missing_eos_penalty: float | None = -3.0
    """Score of a completion that did not end, in place of its reward; none: its reward stays."""
    guards: Guards = field(default_factory=Guards)
    algorithm: SFT = field(default_factory=SFT)
    optimizer: Optimizer = field(default_factory=lambda: policy_optimizer(0.001))


@dataclass(frozen=True)
class HostRewards:
    """Rewards that are Python functions of texts, and how they are called."""

    rewards: tuple[str, ...] = ()
    """Functions, each FILE.py:NAME or MODULE:NAME; the score is their weighted sum."""
    weights: tuple[float, ...] = ()
    """One for each reward; none: all 1."""
    workers: int = 4
    """Threads that call them."""
    calls_of: int = 16
    """Completions of one call."""
    timeout: float = 60.0
    """Seconds that the rewards of one iteration may take, in the evaluation those of as many completions. Past it the
    run stops, and can be resumed."""
    checkpoint_every: int = 10
    """Steps between checkpoints: what a reward that fails may cost."""
    ahead: bool = False
    """Whether the next completions are drawn before the update that waits for the rewards: the device is busy
    meanwhile, and learns from completions of parameters one update old, which the probability ratio corrects for."""


@dataclass(frozen=True)
class SoftQStage:
    """Soft Q-learning of the policy on the rated samples (path consistency, arXiv 1702.08892, 2106.07704)."""

    steps: int = 96
    """Optimiser steps."""
    prompts: int = 32
    """Prompts in a step, each with all of its samples."""
    temperature: float = 0.7
    """Temperature of policy and reference, that of the samples; the KL is between the two at it."""
    algorithm: SoftQ = field(default_factory=lambda: SoftQ(beta=0.1, steps=(0,)))
    optimizer: Optimizer = field(default_factory=lambda: policy_optimizer(0.002))


@dataclass(frozen=True)
class ILQLStage:
    """Values of the rated samples' tokens, which then guide the fine-tuned policy (ILQL, arXiv 2206.11871)."""

    steps: int = 128
    """Optimiser steps."""
    prompts: int = 32
    """Prompts in a step, each with all of its samples."""
    temperature: float = 0.7
    """Temperature of the guided policy and of the reference, that of the samples."""
    kl_weight: float = 0.2
    """Reward per nat: what is sampled is, at that temperature, reference x exp((min Q - V) / this)."""
    curve: tuple[float, ...] = (0.5, 0.1, 0.05)
    """More such weights at which the same values are decoded, each a point of gold score against KL."""
    algorithm: ILQL = field(
        default_factory=lambda: ILQL("sarsa", discount=1.0, lam=0.95, polyak=0.1, policy_coefficient=None)
    )
    optimizer: Optimizer = field(default_factory=lambda: policy_optimizer(0.0025))


@dataclass(frozen=True)
class EvaluationStage:
    """Evaluation of all policies on the same prompts."""

    test: bool = False
    """Whether the test split is evaluated too. It is for the last word, never for choosing settings."""
    prompts: int = 512
    """Prompts, the first ones of the split that fit."""
    batch: int = 32
    """Prompts decoded at once."""
    temperatures: tuple[float, ...] = (1.0, 0.5, 0.3)
    """Temperatures at which policies are sampled, besides that of the rollouts and greedy decoding."""
    best_of: tuple[int, ...] = (4, 16)
    """Best-of-n by the reward: numbers of samples."""


def small_decoder() -> Decoder:
    """What learns in seconds."""
    return Decoder(width=64, layers=2, heads=4, kv_heads=4, head_size=16, mlp_width=192, max_positions=512)
