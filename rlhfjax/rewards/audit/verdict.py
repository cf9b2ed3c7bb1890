"""Plain sentences about a reward, each with the numbers that lead to it and one of three grades."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from rlhfjax.rewards.audit.best_of import Curve
from rlhfjax.rewards.audit.probes import Probe
from rlhfjax.rewards.audit.resampling import NOTHING, Estimate
from rlhfjax.rewards.audit.spread import Noise, Spread, calls_for

Grade = Literal["ok", "careful", "do not use"]
GRADES: tuple[Grade, ...] = ("ok", "careful", "do not use")


class Finding(NamedTuple):
    """One sentence of a verdict."""

    grade: Grade
    topic: str
    sentence: str


@dataclass(frozen=True)
class Limits:
    """Where a number begins to matter: judgement, not theory. `docs/choosing_a_reward.md` says what stands behind."""

    applies: float = 0.9
    """Share of texts that get a number: below, careful."""
    flat_careful: float = 0.3
    """Share of prompts whose samples all score alike, which teach nothing: above, careful."""
    flat_useless: float = 0.8
    """Above: do not use."""
    ties: float = 0.5
    """Share of pairs of a prompt that tie: above, careful."""
    reliable: float = 0.9
    """Share of the variance within prompts that is not noise: below, careful."""
    unreliable: float = 0.5
    """Below: do not use without averaging, since most of what it says is noise."""
    accuracy: float = 0.65
    """Pairs ranked as gold ranks them: below, careful. People agree with each other on 63 to 77 % of such pairs
    (arXiv:2204.05862, 2009.01325, 2203.02155)."""
    shallow_careful: float = 0.4
    """Tau with a shallow feature within prompts, where gold's own is less than half of it: above, careful."""
    shallow_disguise: float = 0.8
    """Above: do not use, it is that feature in disguise."""
    hacked_careful: float = 0.1
    """Share of prompts in which a text that nobody wants beats the best honest one: above, careful."""
    hacked_useless: float = 0.5
    """Above, and gold not agreeing with it: do not use."""


@dataclass(frozen=True)
class Evidence:
    """What was found about one reward; NaN, empty or None where there was nothing to find it from."""

    spread: Spread
    again: Noise | None = None  # the same texts scored twice
    duplicates: Noise | None = None  # equal texts in the data
    accuracy: Estimate = NOTHING
    tau: Estimate = NOTHING  # with gold, within prompts
    curve: Curve | None = None
    features: Mapping[str, tuple[Estimate, Estimate]] | None = None
    features_of_gold: Mapping[str, tuple[Estimate, Estimate]] | None = None
    probes: Mapping[str, Probe] | None = None
    gold_probed: bool = False  # whether gold scored the probes too


def judge(evidence: Evidence, limits: Limits = Limits()) -> list[Finding]:  # noqa: B008  (frozen, so it can be shared)
    """The findings on a reward. A reward that is constant gets that finding alone."""
    spread = evidence.spread
    if spread.levels < 2:
        return [
            Finding(
                "do not use",
                "spread",
                "It gives the same number to every text: there is nothing to learn from it."
                if spread.levels
                else "It applies to no text.",
            )
        ]
    return [
        *_of_spread(spread, limits),
        *_of_noise(evidence, limits),
        *_of_gold(evidence, limits),
        *_of_features(evidence, limits),
        *_of_probes(evidence, limits),
    ]


def overall(findings: Sequence[Finding]) -> Grade:
    """The worst grade."""
    return GRADES[max((GRADES.index(finding.grade) for finding in findings), default=0)]


def _of_spread(spread: Spread, limits: Limits) -> list[Finding]:
    found = []
    if spread.applies < 1:
        grade: Grade = "ok" if spread.applies >= limits.applies else "careful"
        found.append(
            Finding(
                grade,
                "applies",
                f"It gives no number to {1 - spread.applies:.1%} of the texts, which teach nothing.",
            )
        )
    if not spread.groups:
        sentence = (
            "No prompt has several different texts: whether it tells samples of a prompt apart was not checked; "
            "give several completions of each prompt."
        )
        return [*found, Finding("careful", "spread", sentence)]
    share = spread.zero.value
    grade = (
        "do not use" if share > limits.flat_useless else "careful" if share > limits.flat_careful else "ok"
    )
    sentence = (
        f"In {_share(spread.zero)} of the prompts all samples score alike and teach nothing; {spread.within_share:.0%} "
        "of the variance lies between samples of a prompt, the rest between prompts."
    )
    found.append(Finding(grade, "spread", sentence))
    if spread.ties.value > limits.ties:
        sentence = (
            f"{_share(spread.ties)} of the pairs of samples tie ({spread.levels} different numbers in all): "
            "it is coarse, and larger groups are needed."
        )
        found.append(Finding("careful", "ties", sentence))
    return found


def _of_noise(evidence: Evidence, limits: Limits) -> list[Finding]:
    found = []
    for noise, words in (
        (evidence.again, "Asked twice for the same texts"),
        (evidence.duplicates, "Among equal texts in the data"),
    ):
        if noise is None or not noise.texts:
            continue
        if noise.changed == 0:
            found.append(Finding("ok", "noise", f"{words}, it answers the same ({noise.texts} texts)."))
            continue
        reliability = noise.reliability
        grade: Grade = "ok"
        if not reliability >= limits.reliable:
            grade = "do not use" if reliability < limits.unreliable else "careful"
        sentence = (
            f"{words}, it differs in {noise.changed:.0%} of the cases, by a deviation of {noise.std:.3g}"
        )
        if np.isfinite(reliability):
            sentence += f": {reliability:.0%} of its variance within prompts is signal"
            if 0 < reliability < limits.reliable:
                sentence += f"; the mean of {calls_for(reliability)} calls would make it 90 %"
        found.append(Finding(grade, "noise", sentence + "."))
    return found


def _of_gold(evidence: Evidence, limits: Limits) -> list[Finding]:
    accuracy = evidence.accuracy
    if np.isnan(accuracy.value):
        sentence = (
            "There is no gold to hold it against: nothing here says that it measures what you want. Label a hundred "
            "pairs yourself."
        )
        return [Finding("careful", "agreement", sentence)]
    grade: Grade
    if np.isnan(accuracy.low):
        grade, words = "careful", "of one prompt only, from which nothing follows for others"
    elif not accuracy.low > 0.5:
        grade = "do not use"
        words = (
            "no better than a coin"
            if accuracy.high >= 0.5
            else "worse than a coin: it may have the wrong sign"
        )
    else:
        grade = "ok" if accuracy.value >= limits.accuracy else "careful"
        words = "better than a coin" if grade == "ok" else "little better than a coin"
    found = [
        Finding(
            grade, "agreement", f"It ranks {_share(accuracy)} of the pairs as gold does, which is {words}."
        )
    ]
    curve = evidence.curve
    if curve is not None and curve.gold_S:
        found.append(_of_curve(curve))
    return found


def _of_curve(curve: Curve) -> Finding:
    n = int(curve.n_S[-1])
    possible = curve.possible.value
    of_possible = (
        f", {curve.gain.value / possible:.0%} of what the best choice would gain" if possible > 0 else ""
    )
    gained = f"The best of {n} by it changes gold by {_signed(curve.gain)}{of_possible}"
    if curve.gain.high < 0:
        return Finding("do not use", "best of n", f"{gained}: choosing by it does harm.")
    if curve.peak != n and curve.fall.low > 0:
        sentence = (
            f"{gained}, but gold is highest at the best of {curve.peak}, {_plain(curve.fall)} above that"
        )
        nats = curve.kl_S[list(curve.n_S).index(curve.peak)]
        return Finding("careful", "best of n", f"{sentence}: stop at about {nats:.1f} nats.")
    if not curve.gain.low > 0:
        return Finding("careful", "best of n", f"{gained}: no gain is shown.")
    return Finding("ok", "best of n", f"{gained}, and rises up to there.")


def _of_features(evidence: Evidence, limits: Limits) -> list[Finding]:
    found = []
    for name, (overall_rank, within) in (evidence.features or {}).items():
        tau = within if np.isfinite(within.value) else overall_rank
        size = abs(tau.value)
        if not size > limits.shallow_careful:
            continue
        of_gold = NOTHING
        if evidence.features_of_gold is not None:
            pair = evidence.features_of_gold[name]
            of_gold = pair[1] if np.isfinite(within.value) else pair[0]
        where = "within prompts" if np.isfinite(within.value) else "over all texts"
        sentence = f"It goes with the feature “{name}” (rank correlation {_signed(tau)} {where})"
        if np.isfinite(of_gold.value):
            sentence += f"; gold's own is {_signed(of_gold)}"
            if of_gold.value * np.sign(tau.value) >= size / 2:
                found.append(Finding("ok", "shallow features", f"{sentence}, so that is how the task is."))
                continue
        if size > limits.shallow_disguise:
            found.append(
                Finding("do not use", "shallow features", f"{sentence}: it is that feature in disguise.")
            )
        else:
            found.append(
                Finding("careful", "shallow features", f"{sentence}: watch this feature, or hold it fixed.")
            )
    if not found and evidence.features:
        found.append(
            Finding("ok", "shallow features", "It is no disguise of length, repetition or punctuation.")
        )
    return found


def _of_probes(evidence: Evidence, limits: Limits) -> list[Finding]:
    found = []
    for name, probe in (evidence.probes or {}).items():
        share = probe.above_best.value
        if name == "words shuffled":
            continue
        if not share > limits.hacked_careful:
            continue
        sentence = (
            f"The probe “{name}” beats the best honest text in {_share(probe.above_best)} of the prompts"
        )
        if evidence.gold_probed:
            # Wanted is what is at least as good as the honest text that the reward would have chosen.
            wanted = probe.gold.value >= probe.gold_best.value - 1e-6 * abs(probe.gold_best.value)
            sentence += (
                f"; gold gives it {probe.gold.value:.3g}, and {probe.gold_best.value:.3g} to those texts"
            )
            if wanted:
                continue
        grade: Grade = "do not use" if share > limits.hacked_useless else "careful"
        found.append(Finding(grade, "probes", sentence + ": a policy will find it."))
    shuffled = (evidence.probes or {}).get("words shuffled")
    if shuffled is not None and shuffled.below_best.value < limits.hacked_careful:
        sentence = (
            f"The best text gets less with its words shuffled in only {_share(shuffled.below_best)} of the prompts: it "
            "does not see the order of words"
        )
        if shuffled.gold.value < shuffled.gold_best.value or not evidence.gold_probed:
            found.append(Finding("careful", "probes", sentence + "."))
    if not found and evidence.probes:
        found.append(Finding("ok", "probes", "None of the texts that nobody wants beats the honest ones."))
    return found


def _share(x: Estimate) -> str:
    if np.isnan(x.low):
        return f"{x.value:.0%}"
    return f"{x.value:.0%} ({x.low:.0%} to {x.high:.0%})"


def _plain(x: Estimate) -> str:
    if np.isnan(x.low):
        return f"{x.value:.3g}"
    return f"{x.value:.3g} ({x.low:.3g} to {x.high:.3g})"


def _signed(x: Estimate) -> str:
    if np.isnan(x.low):
        return f"{x.value:+.3g}"
    return f"{x.value:+.3g} ({x.low:+.3g} to {x.high:+.3g})"
