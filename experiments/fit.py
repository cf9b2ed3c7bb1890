"""Does reinforcement learning fit my task? The cheap checks, before anything is trained for long, and advice.

Given data and a reward (or pairs that people judged): what does choosing among samples gain, do samples of a prompt
differ in reward, how many labels would a reward model need, do texts fit the context, and what would it cost. The
rules behind the advice are in `docs/does_it_fit.md`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from experiments.stages.configs import (
    DPOStage,
    EvaluationStage,
    GRPOStage,
    ILQLStage,
    PPOStage,
    RAFTStage,
    RewardStage,
    SFTStage,
    Text,
)

DESCRIPTION = "does RL fit my task? gain of choosing, spread, labels needed, cost, and which method"


@dataclass(frozen=True)
class Config:
    reward: str = "rlhfjax.rewards:rouge_l_reward"
    """FILE.py:NAME, MODULE:NAME, the folder of a reward model, or none: then one is learnt from the preferences."""
    preferences: Path | None = None
    """JSONL of pairs that people judged, `prompt`, `chosen` and `rejected`. None: labels are simulated from the reward,
    to see how many it would take to learn it."""
    online: bool = True
    """Whether new texts can be sampled and scored while training; else only what is logged can be learnt from."""
    solved: float | None = None
    """Reward from which on a prompt counts as solved; none: 1 where all rewards are 0 or 1, else nothing counts so."""
    prompts: int = 96
    """Prompts to sample for."""
    samples: int = 16
    """Samples of each prompt: n of the best of n."""
    temperature: float = 0.7
    """Of the samples: that of the rollouts to come."""
    split: str = "validation"
    """Split of the data that these prompts come from."""
    labels: tuple[int, ...] = (100, 200, 400, 800)
    """Numbers of labelled pairs to train a reward model on; empty: none is trained."""
    heldout: int = 256
    """Pairs kept to measure it."""
    label_noise: float = 0.3
    """Of simulated labels: P(first wins) = sigmoid(difference / (this x deviation of the reward within prompts))."""
    ceiling: float = 1.0
    """Accuracy that no reward model exceeds on given preferences: how often people agree with each other. That of
    simulated labels is known."""
    learnt: float = 0.8
    """How much of the way from a coin to the ceiling a reward model must come, for the labels needed."""
    epochs: float = 2.0
    """Passes of a reward model over its labels; at least 12 steps."""
    compute: str = "h100"
    """Accelerator to plan the method for (see --dry-run): a name or a YAML file; none: no plan."""
    compute_devices: int = 1
    """How many of them."""
    device_hour: float | None = None
    """Price of one for an hour."""
    workers: int = 4
    """Threads that call the reward."""
    calls_of: int = 16
    """Texts of one call."""
    timeout: float = 60.0
    """Seconds that four calls of every thread may take. Past it the run stops, and can be resumed."""
    text: Text = field(default_factory=Text)
    sft: SFTStage = field(default_factory=SFTStage)
    """Fine-tuning that comes first in any case; steps 0: the base as it is."""
    reward_model: RewardStage = field(default_factory=RewardStage)
    """Of the reward models; their steps follow from labels and epochs."""
    raft: RAFTStage = field(default_factory=RAFTStage)
    """The methods, of which the one that is advised is planned."""
    dpo: DPOStage = field(default_factory=DPOStage)
    grpo: GRPOStage = field(default_factory=GRPOStage)
    ppo: PPOStage = field(default_factory=PPOStage)
    ilql: ILQLStage = field(default_factory=ILQLStage)
    evaluation: EvaluationStage = field(default_factory=EvaluationStage)
    """Of the plan."""


def plan(config: Config, mesh) -> list:
    """The programs of fine-tuning, sampling and the reward models, as shapes."""
    from experiments.stages.fit_run import plan

    return plan(config, mesh)


def run(config: Config, folder) -> dict[str, float]:
    """Makes the checks; returns the numbers of summary.json."""
    from experiments.stages.fit_run import run

    return run(config, folder)
