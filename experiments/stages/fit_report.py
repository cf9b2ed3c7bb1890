"""What the checks say: advice, tables, and a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.stages import fit_rules
from experiments.stages.audit_texts import Drawn, Texts
from experiments.stages.fit_labels import Learnable
from experiments.stages.fit_rules import Advice, Facts
from rlhfjax.figures import Panel, plot_panels
from rlhfjax.report import Interval, Section, Table, markdown_table, markdown_text
from rlhfjax.rewards import audit
from rlhfjax.rewards.audit import Curve, Estimate, Noise, Spread

BEYOND = 10  # times the most labels that were tried: further a power law is not believed


@dataclass(frozen=True)
class Found:
    """What was found."""

    facts: Facts
    advice: Advice
    spread: Spread
    noise: Noise
    curve: Curve | None
    learnable: Learnable | None
    texts: Texts
    reward_N: np.ndarray
    drawn: Drawn


def name_of(config: Any) -> str:
    """What the checks are of."""
    source = config.reward if config.reward != "none" else str(config.preferences)
    return f"{source.rpartition(':')[2]} on {Path(config.text.data).name}"


def sections(config: Any, found: Found, planned: str, folder: Path) -> list[Section]:
    """All of report.md."""
    figure = _draw(found, folder / "figures" / "fit.png")
    parts = [
        advice_section(found)._replace(figures=[(figure, "The checks")] if figure else []),
        gain_section(found),
        spread_section(found),
        length_section(config, found),
        label_section(config, found),
    ]
    if planned:
        parts.append(Section(f"Compute, on {config.compute_devices} x {config.compute}", planned))
    return [part for part in parts if part is not None]


def advice_section(found: Found) -> Section:
    """Is it worth it, and which method."""
    advice = found.advice
    lines = [f"**Is reinforcement learning worth it? {advice.worth}.**\n"]
    lines += [f"- {markdown_text(reason)}" for reason in advice.reasons]
    lines += ["", f"**Method to begin with: {fit_rules.NAMES[advice.method]}.**\n"]
    lines += [f"- {markdown_text(reason)}" for reason in advice.because]
    if found.learnable is not None:
        lines += ["", f"**Labels for a reward model: {_labels(found.learnable)}.**"]
    return Section("Advice", "\n".join(lines))


def gain_section(found: Found) -> Section | None:
    """Best of n and its price in nats."""
    curve = found.curve
    if curve is None:
        return None
    rows = []
    for i, n in enumerate(curve.n_S):
        gain = curve.gold_S[i].value - curve.gold_S[0].value
        price = "" if i == 0 else f"{gain / curve.kl_S[i]:.3g}"
        rows.append([int(n), f"{curve.kl_S[i]:.2f}", _interval(curve.gold_S[i]), f"{gain:.3g}", price])
    text = "The reward of the best of n samples, over all subsets. " + (
        "It answers the same each time."
        if found.noise.changed == 0
        else "Chosen by one call of the reward and measured by another, since it is noisy."
    )
    lead = found.facts.reference_lead
    if np.isfinite(lead.value):
        text += f" The data's own completions score {_words(lead)} above the best of {found.facts.n}."
    header = ["n", "KL at most (nats)", "reward", "gain", "gain a nat"]
    return Section("What choosing gains", text, Table(header, rows))


def spread_section(found: Found) -> Section:
    """Is there anything to learn from?"""
    spread, facts = found.spread, found.facts
    rows = [
        ["mean of the reward", spread.mean],
        ["deviation", spread.std],
        ["share of its variance within prompts", spread.within_share],
        ["prompts whose samples all score alike", _interval(spread.zero)],
        ["ties among a prompt's samples", _interval(spread.ties)],
        ["share of variance within prompts that is signal", facts.reliability],
        ["prompts that no sample solves", facts.never_solved],
        ["milliseconds of a text", f"{1000 * facts.seconds:.3g}"],
    ]
    kept = [row for row in rows if not (isinstance(row[1], float) and np.isnan(row[1]))]
    return Section("The reward on samples", "", Table(["", ""], kept))


def length_section(config: Any, found: Found) -> Section:
    """Do texts fit?"""
    length, most = found.drawn.length_N, config.text.completion_length
    rows = [
        ["mean tokens of a sample", float(length.mean())],
        ["95 % of them have at most", float(np.quantile(length, 0.95))],
        ["the most that is allowed", most],
        ["samples that were cut off", f"{found.facts.cut:.1%}"],
    ]
    text = "A sample that is cut off is judged unfinished; where many are, allow for more tokens or fine-tune first."
    return Section("Length against the context", text, Table(["", ""], rows))


def label_section(config: Any, found: Found) -> Section | None:
    """The learning curve of the reward model."""
    learnable = found.learnable
    if learnable is None:
        return None
    curve = learnable.curve
    law = audit.expected_accuracy(curve, curve.labels_S)
    rows = [
        [int(n), _interval(accuracy), f"{expected:.3f}" if np.isfinite(expected) else ""]
        for n, accuracy, expected in zip(curve.labels_S, curve.accuracy_S, law, strict=True)
    ]
    origin = "simulated from the reward, with noise" if config.preferences is None else "given"
    text = (
        f"Labels are {origin}; no reward model can be right more often than {curve.ceiling:.3f}. Asked for is "
        f"{learnable.target:.3f}, {config.learnt:.0%} of the way from a coin to that: {_labels(learnable)}. The law is "
        f"ceiling - a n^-b (arXiv 1712.00409), b = {curve.exponent:.2f}."
        if np.isfinite(curve.exponent)
        else f"Labels are {origin}; accuracy does not rise with their number: more of the same would not help."
    )
    return Section(
        "A reward model's labels", text, Table(["labels", "held-out accuracy", "by the law"], rows)
    )


def plan_table(planned: Sequence[Any], device_hour: float | None) -> str:
    """Seconds, memory and cost of the programs."""
    from rlhfjax.planner import in_bytes

    rows, hours = [], 0.0
    for program, plan in ((one.program, one.plan) for one in planned):
        seconds = plan.seconds.total * program.runs
        hours += seconds * plan.devices / 3600
        fits = "" if plan.fits else " (too much)"
        rows.append(
            [
                program.stage,
                program.name,
                f"{program.runs:g}",
                in_bytes(plan.usage.total) + fits,
                f"{seconds:.3g}",
            ]
        )
    table = markdown_table(Table(["stage", "program", "runs", "bytes of a device", "seconds"], rows))
    total = f"In all {3600 * hours:.3g} device seconds ({hours:.3g} hours)"
    if device_hour is not None:
        total += f", {hours * device_hour:.2f} at {device_hour:g} a device hour"
    return (
        f"{table}\n{total}, the reward's own time and compiling not counted. Compiled from shapes, not run: see "
        "`--dry-run`, and `docs/planning.md` for how far off it may be."
    )


def summarise(found: Found) -> dict[str, float]:
    """The numbers of summary.json."""
    facts = found.facts
    summary: dict[str, float] = {
        "worth": ("no", "perhaps", "yes").index(found.advice.worth),
        "method": list(fit_rules.NAMES).index(found.advice.method),
    }
    for name, x in (
        ("gain", facts.gain),
        ("flat", facts.flat),
        ("reference_lead", facts.reference_lead),
    ):
        summary |= {name: x.value, f"{name}/low": x.low, f"{name}/high": x.high}
    numbers = ("std", "mean", "gain_of_4", "reliability", "never_solved", "cut", "seconds")
    summary |= {name: float(getattr(facts, name)) for name in numbers}
    if found.curve is not None:
        summary |= {f"best_of_{n}": x.value for n, x in zip(found.curve.n_S, found.curve.gold_S, strict=True)}
    if found.learnable is not None:
        curve, needed = found.learnable.curve, found.learnable.needed
        summary |= {
            f"accuracy_at_{n}": x.value for n, x in zip(curve.labels_S, curve.accuracy_S, strict=True)
        }
        summary |= {"accuracy_ceiling": curve.ceiling, "accuracy_exponent": curve.exponent}
        summary |= {"labels": needed.value, "labels/low": needed.low, "labels/high": needed.high}
    return summary


def _labels(learnable: Learnable) -> str:
    """How many are needed, in words that claim no more than was seen."""
    most, needed = int(learnable.curve.labels_S[-1]), learnable.needed
    reach = BEYOND * most
    if not needed.value <= reach:
        return f"more than {reach}, which is as far as {most} can tell"
    high = f"{_round(needed.high)}" if needed.high <= reach else f"more than {reach}"
    return f"about {_round(needed.value)} ({_round(needed.low)} to {high})"


def _round(x: float) -> int:
    """Two figures."""
    digits = max(0, int(np.floor(np.log10(max(x, 1)))) - 1)
    return int(round(x / 10**digits) * 10**digits)


def _draw(found: Found, path: Path) -> Path | None:
    panels = []
    if found.curve is not None:
        values = [x.value for x in found.curve.gold_S]
        panels.append(
            Panel("reward of the best of n", {"": (found.curve.kl_S, values)}, "KL, at most (nats)")
        )
    if found.learnable is not None:
        curve = found.learnable.curve
        grid = np.geomspace(curve.labels_S[0], 4 * curve.labels_S[-1], 40)
        lines: dict[str, tuple[Any, Any]] = {
            "measured": (curve.labels_S, [x.value for x in curve.accuracy_S])
        }
        if np.isfinite(curve.exponent):
            lines["power law"] = (grid, audit.expected_accuracy(curve, grid))
        lines["ceiling"] = (grid[[0, -1]], [curve.ceiling] * 2)
        panels.append(Panel("held-out accuracy", lines, "labels"))
    grouped = found.reward_N.reshape(len(found.texts.prompts), -1)
    share = np.linspace(0, 1, min(50, len(grouped)))
    low, mean, high = (np.quantile(f(grouped, axis=1), share) for f in (np.nanmin, np.nanmean, np.nanmax))
    panels.append(
        Panel(
            "reward",
            {"best sample": (share, high), "mean": (share, mean), "worst": (share, low)},
            "share of prompts",
        )
    )
    length = found.drawn.length_N
    # Bins of whole tokens, each of as many.
    edges = np.arange(length.min() - 0.5, length.max() + 1.5 + length.max() // 25, 1 + length.max() // 25)
    counts, _ = np.histogram(length, edges)
    panels.append(
        Panel("share of samples", {"": ((edges[:-1] + edges[1:]) / 2, counts / counts.sum())}, "tokens")
    )
    return plot_panels(path, panels, columns=2)


def _interval(estimate: Estimate) -> Interval | str:
    return "" if np.isnan(estimate.value) else Interval(*(float(f"{x:.6g}") for x in estimate))


def _words(x: Estimate) -> str:
    return f"{x.value:.3g} ({x.low:.3g} to {x.high:.3g})"
