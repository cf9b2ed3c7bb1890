"""What an audit says: the verdict in sentences, tables, and a figure."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.stages.audit_measure import QUICK, Measured
from experiments.stages.audit_texts import Texts, joined
from rlhfjax.figures import Panel, plot_panels
from rlhfjax.report import Interval, Section, Table, calibration_error, markdown_text
from rlhfjax.rewards import audit
from rlhfjax.rewards.audit import Estimate

BINS = 12  # of the curves of the figure


def sections(
    found: Sequence[Measured], texts: Texts, gold_N: np.ndarray, gold_name: str, folder: Path
) -> list[Section]:
    """All of report.md."""
    has_gold = bool(np.isfinite(gold_N).any())
    parts = [
        verdict_section(found),
        side_by_side(found, gold_name),
        *([between_section(found, gold_N, texts, gold_name)] if len(found) > 1 else []),
        best_of_section(found, gold_name, has_gold),
        feature_section(found, has_gold, gold_name),
        *(probe_section(one, gold_name) for one in found),
        speed_section(found),
        *(example_section(one, texts, gold_N, gold_name, has_gold) for one in found),
    ]
    figure = draw(found, texts, gold_name, folder / "figures" / "audit.png")
    parts[1] = parts[1]._replace(figures=[(figure, "The rewards, in one look")])
    return [part for part in parts if part is not None]


def verdict_section(found: Sequence[Measured]) -> Section:
    """The verdict on every reward, sentence by sentence."""
    lines = []
    for one in found:
        lines.append(f"**{markdown_text(one.reward.label)}: {one.verdict}**\n")
        ordered = sorted(one.findings, key=lambda finding: -audit.GRADES.index(finding.grade))
        lines += [
            f"- {finding.grade} ({finding.topic}): {markdown_text(finding.sentence)}" for finding in ordered
        ]
        lines.append("")
    return Section("Verdict", "\n".join(lines))


def side_by_side(found: Sequence[Measured], gold_name: str) -> Section:
    """The rewards in columns."""
    rows = [
        ["verdict", *(one.verdict for one in found)],
        [f"pairs ranked as {gold_name} ranks them", *(_interval(one.evidence.accuracy) for one in found)],
        ["pairs", *(one.pairs for one in found)],
        ["tau-b with it, within prompts", *(_interval(one.evidence.tau) for one in found)],
        ["Spearman's correlation with it", *(_interval(one.spearman) for one in found)],
        ["Kendall's tau-b with it", *(_interval(one.kendall) for one in found)],
        ["temperature of sigmoid(margin / T)", *(one.temperature for one in found)],
        ["calibration error at that", *(calibration_error(one.bins) if one.bins else None for one in found)],
        ["applies to", *(f"{one.evidence.spread.applies:.1%}" for one in found)],
        ["mean", *(one.evidence.spread.mean for one in found)],
        ["deviation", *(one.evidence.spread.std for one in found)],
        ["deviation within prompts", *(one.evidence.spread.within_std for one in found)],
        ["share of variance within prompts", *(one.evidence.spread.within_share for one in found)],
        ["prompts whose samples all score alike", *(_interval(one.evidence.spread.zero) for one in found)],
        ["ties among a prompt's samples", *(_interval(one.evidence.spread.ties) for one in found)],
        ["different numbers", *(one.evidence.spread.levels for one in found)],
        [
            "noise of one call (deviation)",
            *(one.evidence.again.std if one.evidence.again else None for one in found),
        ],
    ]
    text = (
        "Intervals are 95 %, by resampling prompts. A margin is the difference of two rewards of one prompt; the "
        "temperature is fitted to the pairs that gold decides."
    )
    kept = [row for row in rows if any(cell not in (None, "") and cell == cell for cell in row[1:])]
    return Section("Side by side", text, Table(["", *(one.reward.label for one in found)], kept))


def between_section(found: Sequence[Measured], gold_N: np.ndarray, texts: Texts, gold_name: str) -> Section:
    """Rank correlations between the rewards."""
    named = {one.reward.label: one.scores.reward_N for one in found}
    if np.isfinite(gold_N).any():
        named[gold_name] = gold_N
    rows = [
        [
            name,
            *(
                "" if other == name else _interval(audit.within_prompt_tau(x, y, texts.group_N))
                for other, y in named.items()
            ),
        ]
        for name, x in named.items()
    ]
    text = "Tau-b among the texts of one prompt: 1 where two rewards rank them alike, 0 where they are unrelated."
    return Section("Between rewards", text, Table(["", *named], rows))


def best_of_section(found: Sequence[Measured], gold_name: str, has_gold: bool) -> Section | None:
    """Gold and reward of the best of n."""
    rows = []
    for one in found:
        curve = one.evidence.curve
        if curve is None:
            continue
        for i, n in enumerate(curve.n_S):
            gold = [_interval(curve.gold_S[i]), _interval(curve.oracle_S[i])] if has_gold else []
            rows.append(
                [one.reward.label, int(n), f"{curve.kl_S[i]:.2f}", _interval(curve.reward_S[i]), *gold]
            )
    if not rows:
        return None
    header = [
        "reward",
        "n",
        "KL at most (nats)",
        "reward of the best",
        f"{gold_name} of it",
        f"{gold_name} at best",
    ]
    text = "Of n samples of a prompt the one with the highest reward, over all subsets of the samples. " + (
        f"The last column chooses by {gold_name} itself: what a perfect reward would give."
        if has_gold
        else ""
    )
    return Section("Best of n", text, Table(header[: None if has_gold else 4], rows))


def feature_section(found: Sequence[Measured], has_gold: bool, gold_name: str) -> Section:
    """Correlations with shallow features."""
    rows = []
    for one in found:
        for name, (over_all, within) in (one.evidence.features or {}).items():
            gold = (one.evidence.features_of_gold or {}).get(name)
            rows.append(
                [
                    one.reward.label,
                    name,
                    _interval(over_all),
                    _interval(within),
                    *([_interval(gold[1])] if has_gold and gold is not None else []),
                ]
            )
    header = [
        "reward",
        "feature",
        "Spearman, all texts",
        "tau-b, within prompts",
        f"{gold_name}: tau-b, within prompts",
    ]
    text = "Empty where the feature, or the reward, never differs."
    return Section("Shallow features", text, Table(header[: None if has_gold else 4], rows))


def probe_section(one: Measured, gold_name: str) -> Section | None:
    """What one reward gives to texts that nobody wants."""
    if not one.evidence.probes:
        return None
    gold = one.evidence.gold_probed
    rows = []
    for name, probe in one.evidence.probes.items():
        rows.append(
            [
                name,
                _interval(probe.above_best),
                _interval(probe.above_mean),
                _interval(probe.reward),
                *([_interval(probe.gold), _interval(probe.gold_best)] if gold else []),
                markdown_clip(one.scores.probe_texts[name][0]),
            ]
        )
    header = ["probe", "beats the best honest text", "beats their mean", "reward"]
    header += [f"{gold_name} of it", f"{gold_name} of the best honest text"] if gold else []
    keywords = joined(one.scores.keywords)
    text = f"Words that go with a high reward: {markdown_text(keywords)}." if keywords else ""
    return Section(f"Probes: {one.reward.label}", text, Table([*header, "the first of them"], rows))


def speed_section(found: Sequence[Measured]) -> Section | None:
    """Time of a text."""
    rows, words = [], []
    for one in found:
        speed = one.scores.speed
        if np.isnan(speed.alone):
            continue
        rows.append([one.reward.label, _milliseconds(speed.alone), _milliseconds(speed.threads)])
        name = markdown_text(one.reward.label)
        if speed.alone < QUICK:
            words.append(f"{name} costs nothing worth speaking of.")
        elif speed.threads < 0.7 * speed.alone:
            words.append(f"Threads help {name}: {speed.alone / speed.threads:.1f} times as fast.")
        else:
            words.append(f"Threads do not help {name}: it computes in Python, or waits for one thing.")
    if not rows:
        return None
    workers = found[0].scores.speed.workers
    header = ["reward", "milliseconds of a text, one thread", f"{workers} threads"]
    return Section("Speed", " ".join(words), Table(header, rows))


def example_section(
    one: Measured, texts: Texts, gold_N: np.ndarray, gold_name: str, has_gold: bool
) -> Section | None:
    """The texts that a reward likes best and least, and where it differs most from gold."""
    reward = one.scores.reward_N
    known = np.flatnonzero(np.isfinite(reward))
    order = known[np.argsort(reward[known], kind="stable")]
    chosen = [("liked best", i) for i in order[::-1][:2]] + [("liked least", i) for i in order[:2]]
    both = known[np.isfinite(gold_N[known])]
    if has_gold and len(both) > 3:
        gap = audit.average_ranks(reward[both]) - audit.average_ranks(gold_N[both])
        chosen += [("liked far more than by gold", both[gap.argmax()])]
        chosen += [("liked far less than by gold", both[gap.argmin()])]
    rows = [
        [
            why,
            reward[i],
            *([gold_N[i]] if has_gold else []),
            markdown_clip(texts.prompts[texts.group_N[i]], 120),
            markdown_clip(texts.texts[i], 160),
        ]
        for why, i in chosen
    ]
    header = ["", "reward", *([gold_name] if has_gold else []), "prompt", "text"]
    return Section(f"Texts: {one.reward.label}", "", Table(header, rows))


def draw(found: Sequence[Measured], texts: Texts, gold_name: str, path: Path) -> Path:
    """Best of n, calibration, distribution, length and spread, each reward a curve."""
    panels = []
    curves = {one.reward.label: one.evidence.curve for one in found if one.evidence.curve is not None}
    with_gold = {label: curve for label, curve in curves.items() if curve.gold_S}
    if with_gold:
        lines = {label: (c.kl_S, [x.value for x in c.gold_S]) for label, c in with_gold.items()}
        first = next(iter(with_gold.values()))
        lines["a perfect reward"] = (first.kl_S, [x.value for x in first.oracle_S])
        panels.append(Panel(f"{gold_name} of the best of n", lines, "KL, at most (nats)", "Choosing by it"))
    calibrated = {
        one.reward.label: (
            [entry.predicted for entry in one.bins if entry.count],
            [entry.observed.value for entry in one.bins if entry.count],
        )
        for one in found
        if one.bins
    }
    if calibrated:
        panels.append(
            Panel(
                "share that gold agrees with",
                calibrated | {"perfect": ([0.5, 1], [0.5, 1])},
                "predicted",
                "Calibration",
            )
        )
    panels.append(
        Panel("share of texts", {one.reward.label: _histogram(one) for one in found}, "reward, standardised")
    )
    words = audit.shallow_features(texts.prompts_N, texts.texts)["words"]
    panels.append(
        Panel(
            "reward, standardised",
            {one.reward.label: _by_length(one, words) for one in found},
            "words of a text",
        )
    )
    spreads = {one.reward.label: _sorted_spread(one, texts) for one in found}
    if all(len(y) for _, y in spreads.values()):
        panels.append(
            Panel("deviation within a prompt", spreads, "share of prompts", "In units of all texts'")
        )
    return plot_panels(path, panels)


def _standardised(one: Measured) -> np.ndarray:
    reward = one.scores.reward_N
    spread = one.evidence.spread
    return (reward - spread.mean) / (spread.std or 1.0)


def _histogram(one: Measured) -> tuple[np.ndarray, np.ndarray]:
    z = _standardised(one)
    edges = np.linspace(-3, 3, 2 * BINS + 1)
    counts, _ = np.histogram(np.clip(z[np.isfinite(z)], -2.999, 2.999), edges)
    return (edges[:-1] + edges[1:]) / 2, counts / max(1, counts.sum())


def _by_length(one: Measured, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    z = _standardised(one)
    known = np.isfinite(z)
    edges = np.unique(np.quantile(words[known], np.linspace(0, 1, BINS + 1)))
    place = np.clip(np.searchsorted(edges, words[known], side="right") - 1, 0, max(0, len(edges) - 2))
    filled = np.unique(place)
    return (
        np.asarray([words[known][place == i].mean() for i in filled]),
        np.asarray([z[known][place == i].mean() for i in filled]),
    )


def _sorted_spread(one: Measured, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
    z, group = _standardised(one), texts.group_N
    deviation = [z[(group == u) & np.isfinite(z)] for u in range(len(texts.prompts))]
    found = np.sort([x.std(ddof=1) for x in deviation if len(x) > 1])
    if len(found) > 50:  # as many points as are drawn without smoothing
        found = np.quantile(found, np.linspace(0, 1, 50))
    return np.linspace(0, 1, len(found)), found


def _interval(estimate: Estimate) -> Interval | str:
    # What is less than a millionth is rounding, and would be shown with as many digits.
    return "" if np.isnan(estimate.value) else Interval(*(float(f"{x:.6g}") for x in estimate))


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}"


def markdown_clip(text: str, longest: int = 80) -> str:
    """The beginning of a text, for a cell."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
