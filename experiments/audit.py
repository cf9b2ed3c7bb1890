"""Is this reward any good? One or several rewards on texts, against gold where there is some, and a verdict in words.

A reward is FILE.py:NAME, MODULE:NAME (see `experiments/rewards.py`), the folder of a run that trained a reward model,
or a sequence classifier in the Hugging Face layout. The texts are a file's or samples of a model.
"""

from dataclasses import dataclass, field
from pathlib import Path

from experiments.stages.configs import SFTStage, Text

DESCRIPTION = "is this reward any good? agreement with gold, spread, noise, hacks, speed, and a verdict"


@dataclass(frozen=True)
class Config:
    rewards: tuple[str, ...] = (
        "experiments/rewards.py:words_from_the_prompt",
        "experiments/rewards.py:no_repetition",
    )
    """What to audit, each FILE.py:NAME, MODULE:NAME, the folder of a run with a reward model, or a sequence
    classifier's."""
    gold: str = "auto"
    """A reward that you trust, named alike; none; or auto: ROUGE-L against the completions of the data for samples of a
    model, and for texts of a file what file and labels say."""
    texts: Path | None = None
    """JSONL of texts, rows of `prompt` with `completion`, `completions`, or `chosen` and `rejected`; optional `id`,
    `gold` and columns for the rewards. None: samples of text.base."""
    labels: Path | None = None
    """JSONL of gold labels of those texts: rows `id` and `gold`, or `chosen` and `rejected` of two ids."""
    prompts: int = 64
    """Prompts to sample for; of a file all are taken."""
    samples: int = 16
    """Samples of each prompt."""
    temperature: float = 0.7
    """Of the samples: that of the rollouts to come."""
    split: str = "validation"
    """Split of the data that the prompts come from."""
    again: int = 128
    """Texts scored a second time, for the noise."""
    timed: int = 32
    """Texts whose scoring is timed, in one thread and in all; 0: none."""
    workers: int = 4
    """Threads that call a reward."""
    calls_of: int = 16
    """Texts of one call."""
    timeout: float = 60.0
    """Seconds that four calls of every thread may take. Past it the audit stops, and can be resumed."""
    text: Text = field(default_factory=Text)
    sft: SFTStage = field(default_factory=lambda: SFTStage(steps=0))
    """Fine-tuning before samples are drawn; none by default."""


def plan(config: Config, mesh) -> list:
    """The programs of fine-tuning and sampling, as shapes."""
    from experiments.stages.audit_run import plan

    return plan(config, mesh)


def run(config: Config, folder) -> dict[str, float]:
    """Audits the rewards; returns the numbers of summary.json."""
    from experiments.stages.audit_run import run

    return run(config, folder)
