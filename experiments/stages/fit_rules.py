"""From what was measured to advice: is reinforcement learning worth it, and by which method?

The rules, with their reasons and sources, are the table of `docs/does_it_fit.md`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from rlhfjax.rewards.audit import NOTHING, Estimate, calls_for

Worth = Literal["yes", "perhaps", "no"]
Method = Literal["sft", "best_of_n", "raft", "dpo", "grpo", "ppo", "ilql"]
NAMES: dict[Method, str] = {
    "sft": "fine-tuning on the data (SFT)",
    "best_of_n": "best of n, without training",
    "raft": "fine-tuning on the best samples (RAFT)",
    "dpo": "DPO on the pairs",
    "grpo": "GRPO",
    "ppo": "PPO",
    "ilql": "offline Q-learning (ILQL)",
}
# Where a number begins to matter.
FLAT = 0.8  # share of prompts whose samples all score alike
SMALL = 0.5  # gain of the best of n, in deviations of the reward
SOLVED = 0.95  # mean of a reward that is 0 or 1
HOPELESS = 0.9  # share of prompts that no sample solves
HARD = 0.5
MOST = 0.8  # of the gain of the best of n, reached by the best of 4 already
RELIABLE, UNRELIABLE = 0.9, 0.5
SLOW = 10.0  # seconds that the rewards of an iteration may take
ITERATION = 128  # texts of one: 32 prompts, 4 samples


@dataclass(frozen=True)
class Facts:
    """What the checks found."""

    gain: Estimate  # reward of the best of n less the mean, chosen and measured by two calls where there is noise
    n: int
    gain_of_4: float
    std: float  # of the reward, over all samples
    flat: Estimate  # share of prompts whose samples all score alike
    constant: bool
    reliability: float  # share of the variance within prompts that is signal
    reference_lead: Estimate = NOTHING  # the data's own completions above the best of n
    never_solved: float = np.nan  # share of prompts; NaN: the reward does not say what is solved
    mean: float = np.nan
    seconds: float = 0.0  # of a text, as fast as threads make it
    cut: float = 0.0  # share of samples that did not end
    has_reward: bool = True  # or pairs alone
    has_references: bool = True  # completions to fine-tune on
    pairs: int = 0  # given
    pairs_needed: float = np.nan
    online: bool = True


class Advice(NamedTuple):
    """What to do, and why."""

    worth: Worth
    method: Method
    reasons: list[str]  # of the one
    because: list[str]  # of the other


def advise(facts: Facts) -> Advice:
    """The rules, in order."""
    worth, reasons = _worth(facts)
    method, because = _method(facts)
    return Advice(worth, method, reasons, because)


def _worth(facts: Facts) -> tuple[Worth, list[str]]:
    against, doubts = [], []
    if facts.constant:
        against.append("The reward gives the same to every text: there is nothing to learn from.")
    elif facts.flat.low > FLAT or (np.isnan(facts.flat.low) and facts.flat.value > FLAT):
        against.append(
            f"In {facts.flat.value:.0%} of the prompts all samples score alike, so that nothing is learnt from them."
        )
    if facts.reliability < UNRELIABLE:
        against.append(
            f"Only {facts.reliability:.0%} of the reward's variance within prompts is signal: "
            + (
                f"average {calls_for(facts.reliability)} calls first."
                if facts.reliability > 0.01
                else "it is all noise."
            )
        )
    if facts.never_solved > HOPELESS:
        against.append(
            f"{facts.never_solved:.0%} of the prompts are not solved once in {facts.n} samples: the model must "
            "first be able to; fine-tune it, or take easier prompts."
        )
    if np.isfinite(facts.never_solved) and facts.mean > SOLVED:
        against.append(f"{facts.mean:.0%} of the samples solve their prompt already.")
    size = facts.gain.value / facts.std if facts.std > 0 else 0.0
    if facts.constant:
        doubts = []  # what it does not give it cannot gain
    elif not facts.gain.low > 0:
        doubts.append(f"Choosing the best of {facts.n} shows no gain: {_signed(facts.gain)}.")
    elif size < SMALL:
        doubts.append(
            f"Choosing the best of {facts.n} gains {size:.2f} deviations of the reward, which is little."
        )
    if facts.cut > 0.5:
        doubts.append(
            f"{facts.cut:.0%} of the samples are cut off before they end: allow for longer ones, or fine-tune first."
        )
    if against:
        return "no", against + doubts
    if doubts:
        return "perhaps", doubts
    return "yes", [
        f"Choosing the best of {facts.n} gains {_signed(facts.gain)}, {size:.1f} deviations of the reward: better "
        "texts are within the model's reach, and the reward tells them apart."
    ]


def _method(facts: Facts) -> tuple[Method, list[str]]:
    if not facts.online:
        if facts.has_reward:
            return "ilql", ["Only logged texts can be learnt from, and they have scores."]
        return "dpo", ["Only logged texts can be learnt from, and they come in pairs."]
    if facts.has_references and facts.reference_lead.low > 0:
        words = (
            f"The data's own completions score {_signed(facts.reference_lead)} above the best of {facts.n}"
        )
        return "sft", [f"{words}: imitate them first, then ask again."]
    if facts.never_solved > HARD:
        return "raft", [
            f"{facts.never_solved:.0%} of the prompts are never solved: most groups would teach nothing, and the "
            "solved samples can be imitated."
        ]
    if not facts.has_reward:
        if facts.pairs < facts.pairs_needed:
            needed = (
                "none can tell how many"
                if np.isinf(facts.pairs_needed)
                else f"about {facts.pairs_needed:.0f}"
            )
            return "dpo", [
                f"There are {facts.pairs} pairs, and a reward model would need more ({needed}): learn from the pairs "
                "themselves."
            ]
        return "ppo", [
            f"{facts.pairs} pairs are enough for a reward model, which can judge new samples; it is wrong at times, "
            "and PPO's value function averages."
        ]
    if facts.flat.value > FLAT or (facts.n > 4 and facts.gain_of_4 >= MOST * facts.gain.value):
        return "best_of_n", [
            f"The best of 4 has {facts.gain_of_4 / facts.gain.value:.0%} of the gain of the best of {facts.n}: "
            "choosing among a few samples may be all that is needed."
            if facts.gain.value > 0
            else "There is little for a gradient to follow; choosing costs no training."
        ]
    waiting = facts.seconds * ITERATION
    if waiting > SLOW:
        return "dpo", [
            f"The reward takes {waiting:.0f} s for the {ITERATION} texts of an iteration: label pairs with it once, "
            "and learn from these."
        ]
    if facts.reliability < RELIABLE:
        return "ppo", [
            f"{1 - facts.reliability:.0%} of the reward's variance within prompts is noise: PPO's value function "
            "averages over many samples, where a group of a few does not."
        ]
    return "grpo", [
        f"The reward is cheap ({waiting:.2g} s for an iteration of {ITERATION} texts) and answers the same each time: "
        "the samples of a prompt are the baseline, and no critic is needed."
    ]


def _signed(x: Estimate) -> str:
    return f"{x.value:+.3g}" if np.isnan(x.low) else f"{x.value:+.3g} ({x.low:+.3g} to {x.high:+.3g})"
