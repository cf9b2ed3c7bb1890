"""How much of a lead is left at equal length: a score such as ROUGE rewards longer texts, up to a point.

Two estimates from the same pairs of completions, a policy's and its control's of the same prompt:

  regression  the differences in gold score are regressed on the differences in length, and read off where these are
              0 (the idea of length-controlled win rates, arXiv 2404.04475). All pairs count; it takes the effect of
              length to be linear, and extrapolates where one side is longer almost everywhere.
  matched     the mean difference over the pairs whose lengths differ by at most one token. It assumes no form, and
              speaks of those pairs alone.

Neither is the effect of an intervention on length; where they agree, length is not what the lead is made of.
Shapes: S seeds, B prompts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.stages.evaluation import Policy
from rlhfjax.report import Interval, Section, Table

RESAMPLES = 2000
CLOSE = 1  # tokens: so far apart lengths count as equal


class AtEqualLength(NamedTuple):
    """A difference in gold score, as it is and at equal length; intervals of 95 % by bootstrap over prompts."""

    plain: Interval
    regression: Interval  # NaN where all lengths differ alike, so that nothing tells what they do
    matched: Interval  # NaN where no pair is of equal length
    longer: float  # tokens, mean difference in length
    per_token: float  # gold score that a token more goes with; NaN where all lengths differ alike
    share: float  # of the pairs that are matched


def at_equal_length(
    policies: Sequence[Policy], controls: Sequence[Policy], *, seed: int = 0
) -> AtEqualLength:
    """Holds a policy against its control, both of every run's seed, on the same prompts.

    Prompts are drawn again with all that the seeds have of them. Raises ValueError where numbers do not pair up.
    """
    shapes = {policy.gold.shape for policy in (*policies, *controls)}
    if len(policies) != len(controls) or len(shapes) != 1:
        raise ValueError(
            f"pairs need equally many seeds and prompts, got {len(policies)} and {len(controls)} seeds, shapes "
            f"{sorted(shapes)}"
        )
    gold_SB, length_SB = (
        np.stack([getattr(a, name) - getattr(b, name) for a, b in zip(policies, controls, strict=True)])
        for name in ("gold", "length")
    )
    close_SB = np.abs(length_SB) <= CLOSE
    # All that the estimates need is sums over pairs, so that resampling is one product of counts and sums.
    terms = (np.ones_like(gold_SB), length_SB, gold_SB, length_SB**2, length_SB * gold_SB)
    sums_BK = np.stack([x.sum(axis=0) for x in (*terms, close_SB, close_SB * gold_SB)], axis=1)
    prompts = sums_BK.shape[0]
    generator = np.random.default_rng(seed)
    count_RB = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    found_NR = _estimates((count_RB @ sums_BK).T)
    plain, regression, slope, matched = _estimates(sums_BK.sum(axis=0))
    return AtEqualLength(
        _interval(plain, found_NR[0]),
        _interval(regression, found_NR[1]),
        _interval(matched, found_NR[3]),
        longer=float(length_SB.mean()),
        per_token=float(slope),
        share=float(close_SB.mean()),
    )


def _estimates(sums: np.ndarray) -> np.ndarray:
    """(mean, regression's value at 0, its slope, mean of the matched) from sums [K, ...]; NaN where undefined."""
    n, x, y, xx, xy, close, close_y = sums
    spread = n * xx - x * x
    # Sums of whole numbers (over several seeds too): a spread of exactly 0 is one.
    slope = np.divide(n * xy - x * y, spread, out=np.full_like(y, np.nan), where=spread > 0)
    at_zero = np.where((spread <= 0) & (x == 0), y / n, (y - slope * x) / n)
    matched = np.divide(close_y, close, out=np.full_like(y, np.nan), where=close > 0)
    return np.stack([y / n, at_zero, slope, matched])


def _interval(value: float, found_R: np.ndarray) -> Interval:
    """Percentiles of the resamples in which the estimate exists; without ends where it does not exist in the data."""
    if not np.isfinite(value):
        return Interval(float(value), np.nan, np.nan)
    low, high = np.nanpercentile(found_R, (2.5, 97.5))
    return Interval(float(value), float(low), float(high))


def against_start(
    found: Sequence[Sequence[Policy]], start: str, temperature: float
) -> dict[str, AtEqualLength]:
    """Every policy against the start decoded in the same way, best-of-n against one sample of it; by claim.

    found: the policies of every seed; temperature: that of best-of-n.
    """
    place = {policy.name: i for i, policy in enumerate(found[0])}
    claims = {}
    for policy in found[0]:
        how = f"temperature {temperature:g}" if policy.group == "best of n" else policy.name.split(", ", 1)[1]
        control = f"{start}, {how}"
        if control in place and control != policy.name:
            pairs = ([of_seed[place[name]] for of_seed in found] for name in (policy.name, control))
            claims[f"{policy.name} against {control}"] = at_equal_length(*pairs)
    return claims


def length_section(found: dict[str, AtEqualLength], gold_name: str, split: str) -> Section:
    """The table of claims."""
    rows = [
        [
            claim,
            item.plain,
            f"{item.longer:+.1f}",
            f"{item.per_token:+.4f}",
            *("" if np.isnan(x.value) else x for x in (item.regression, item.matched)),
            f"{item.share:.0%}",
        ]
        for claim, item in found.items()
    ]
    text = (
        f"Differences in {gold_name} over the same prompts, and what is left of them at equal length. By regression: "
        "of the differences in gold score on those in length, read off at 0. Matched: the mean over pairs whose "
        f"lengths differ by at most {CLOSE} token. 95 % bootstrap intervals over prompts. Where both agree with the "
        "plain difference, length is not what it is made of."
    )
    header = ["claim", "difference", "tokens longer", "a token", "by regression", "matched", "pairs matched"]
    return Section(f"At equal length, {split} split", text, Table(header, rows))


def length_numbers(found: dict[str, AtEqualLength]) -> dict[str, float]:
    """Flat names and numbers for summary.json."""
    return {
        f"{claim}/{name} at equal length{end}": float(value)
        for claim, item in found.items()
        for name in ("regression", "matched")
        for end, value in zip(("", ", low", ", high"), getattr(item, name), strict=True)
        if np.isfinite(value)
    }
