"""Policies and rewards, measured: gold against KL, calibration, over-optimisation, numbers with their intervals."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhfjax.figures.drawing import COLOURS, GREY, MARKERS, Curve, arms, save
from rlhfjax.report import CalibrationBin, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class EvaluatedPolicy(NamedTuple):
    """A policy as a point of the gold-against-KL figure. One group has one colour and one marker."""

    label: str
    group: str
    kl: float  # nats per completion from the reference policy
    gold: Interval


class Styled(NamedTuple):
    """A curve with how it is drawn: "-", "--", ":" or, for points that no line joins, "o"."""

    curve: Curve
    style: str
    colour: int  # number among COLOURS


def plot_intervals(
    path: str | os.PathLike[str], panels: Mapping[str, Mapping[str, Interval]], *, columns: int = 2
) -> Path:
    """Numbers with their intervals, one above the other: by title of the panel, then by label.

    A dashed line marks the first of a panel, which the others are held against.

    Raises:
      ValueError: no panels, or a panel without an interval.
    """
    if not panels or not all(panels.values()):
        raise ValueError("there is nothing to plot: every panel needs an interval, and there must be a panel")
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    most = max(map(len, panels.values()))

    def draw(axes: Sequence["Axes"]) -> None:
        for axis, (title, intervals) in zip(axes, panels.items(), strict=False):
            found, place = list(intervals.values()), -np.arange(len(intervals))
            axis.axvline(found[0].value, color=GREY, linestyle="--", linewidth=1.0)
            for number, (x, y) in enumerate(zip(found, place, strict=True)):
                colour = COLOURS[number % len(COLOURS)]
                axis.errorbar([x.value], [y], xerr=arms([x]), fmt="o", color=colour, markersize=4, capsize=3)
            axis.set(title=title, yticks=place, yticklabels=list(intervals), ylim=(0.6 - most, 0.6))
            axis.grid(visible=False, axis="y")
        for unused in axes[len(panels) :]:
            unused.set_visible(False)

    return save(path, draw, rows=rows, columns=columns, size=(4.6 * columns, rows * (0.26 * most + 0.7)))


def plot_gold_against_kl(
    path: str | os.PathLike[str],
    policies: Sequence[EvaluatedPolicy],
    *,
    gold_label: str = "gold score",
    kl_label: str = "KL from the reference policy (nats per completion)",
) -> Path:
    """Gold score against KL, one labelled point with its interval per policy: what was gained, and the price.

    Points of one group are joined in order of KL, so that best-of-n and PPO can be compared at equal KL.

    Raises:
      ValueError: no policies.
    """
    if not policies:
        raise ValueError("there are no policies to plot")
    by_kl = sorted(policies, key=lambda policy: policy.kl)
    names = dict.fromkeys(policy.group for policy in policies)
    groups = {name: [policy for policy in by_kl if policy.group == name] for name in names}

    def draw(axes: Sequence["Axes"]) -> None:
        axis = axes[0]
        for place, (group, members) in enumerate(groups.items()):
            axis.errorbar(
                [policy.kl for policy in members],
                [policy.gold.value for policy in members],
                yerr=arms([policy.gold for policy in members]),
                color=COLOURS[place % len(COLOURS)],
                marker=MARKERS[place % len(MARKERS)],
                label=group,
                linestyle=":",
                linewidth=1.0,
                elinewidth=1.2,
                capsize=2,
                markersize=5,
            )
        axis.margins(x=0.12, y=0.1)
        axis.set(xlabel=kl_label, ylabel=gold_label)
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
        _label_points(axis, list(groups.values()))

    return save(path, draw, size=(6.4, 3.8))


def plot_calibration(
    path: str | os.PathLike[str],
    bins: Sequence[CalibrationBin],
    *,
    note: str = "",
    event: str = "the chosen answer wins",
) -> Path:
    """Reward-model calibration: observed share of wins against predicted probability, above the counts.

    Args:
      path: the PNG file.
      bins: from `rlhfjax.report.calibration`.
      note: one line for the title, for example the accuracy and the expected calibration error.
      event: what the probability is of.
    """
    filled = [entry for entry in bins if entry.count]
    if not filled:
        raise ValueError("there are no predictions to plot: every bin is empty")
    centres = (np.arange(len(bins)) + 0.5) / len(bins)

    def draw(axes: Sequence["Axes"]) -> None:
        upper, lower = axes
        upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.0, label="perfectly calibrated")
        upper.errorbar(
            [entry.predicted for entry in filled],
            [entry.observed.value for entry in filled],
            yerr=arms([entry.observed for entry in filled]),
            color=COLOURS[0],
            marker="o",
            markersize=4,
            linewidth=1.2,
            capsize=2,
            label="observed, 95 % interval",
        )
        upper.set(ylabel=f"observed share: {event}", title=note, ylim=(-0.03, 1.03), xlim=(0, 1))
        upper.legend(loc="upper left")
        lower.bar(
            centres, [entry.count for entry in bins], width=0.9 / len(bins), color=COLOURS[0], alpha=0.5
        )
        lower.set(xlabel=f"predicted probability: {event}", ylabel="pairs", xlim=(0, 1))
        lower.grid(axis="x", visible=False)

    return save(path, draw, rows=2, size=(4.4, 4.8), heights=(3.2, 1.0), share_x=True)


def plot_overoptimisation(
    path: str | os.PathLike[str],
    x: Sequence[float],
    learned: Sequence[Interval],
    gold: Sequence[Interval],
    *,
    x_label: str = "KL from the reference policy (nats per completion)",
    learned_label: str = "learned reward",
    gold_label: str = "gold score",
) -> Path:
    """The learned reward and the gold score along PPO, one above the other over the same x.

    Where the upper curve still rises and the lower one falls, the policy exploits the reward model
    (Gao et al. 2023, arXiv:2210.10760, fig. 1). The best gold score is marked.

    Raises:
      ValueError: no points, or unequal lengths.
    """
    if not len(x) == len(learned) == len(gold) or not len(x):
        raise ValueError(
            "x, learned and gold need equally many points, at least one: "
            f"{len(x)}, {len(learned)}, {len(gold)}"
        )
    best = int(np.argmax([interval.value for interval in gold]))

    def draw(axes: Sequence["Axes"]) -> None:
        for place, (axis, values, label) in enumerate(
            zip(axes, (learned, gold), (learned_label, gold_label), strict=True)
        ):
            axis.errorbar(
                x,
                [interval.value for interval in values],
                yerr=arms(values),
                color=COLOURS[place],
                marker=MARKERS[place],
                markersize=4,
                elinewidth=1.0,
                capsize=2,
            )
            axis.axvline(x[best], color=GREY, linestyle="--", linewidth=1.0)
            axis.set_ylabel(label)
        axes[0].set_title(f"dashed: best {gold_label}, {gold[best].value:.3g}")
        axes[1].set_xlabel(x_label)

    return save(path, draw, rows=2, size=(5.2, 4.4), share_x=True)


def plot_distances(
    path: str | os.PathLike[str],
    panels: Mapping[str, Mapping[str, Styled]],
    *,
    y_label: str,
    x_label: str = "distance from the reference, sqrt(KL)",
    columns: int = 2,
) -> Path:
    """Scores against the distance from a policy, a panel for each title; one legend for all of them.

    A label must be drawn in one way in all panels. Values that are not finite leave a gap.

    Raises ValueError where there are no panels, or one has no curves.
    """
    if not panels or not all(panels.values()):
        raise ValueError("there is nothing to plot: every panel needs a curve, and there must be a panel")
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)

    def draw(axes: Sequence["Axes"]) -> None:
        shown = {}
        for axis, (title, curves) in zip(axes, panels.items(), strict=False):
            for label, ((x, y), style, colour) in curves.items():
                line, marker = ("", "o") if style == "o" else (style, "")
                drawn = axis.plot(
                    x, y, color=COLOURS[colour % len(COLOURS)], linestyle=line, marker=marker, markersize=4
                )
                shown[label] = drawn[0]
            axis.set(title=title, xlabel=x_label, ylabel=y_label)
        for unused in axes[len(panels) :]:
            unused.set_visible(False)
        figure = axes[0].get_figure(root=True)
        assert figure is not None
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4)

    return save(path, draw, rows=rows, columns=columns, size=(3.8 * columns, 2.8 * rows + 0.6))


def _label_points(axis: "Axes", groups: Sequence[Sequence[EvaluatedPolicy]]) -> None:
    """Writes each label beside its point, at the one of several places where it covers least.

    It is worst to leave the axes or to cover another label, and bad to cover a point, an error bar or a
    joining line (both taken as a row of dots).
    """
    from matplotlib.patheffects import withStroke

    figure = axis.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # fixes the axes' limits, hence where the points lie on the page
    ink = axis.transData.transform(np.concatenate([_ink(policies) for policies in groups]))
    frame, taken = axis.get_window_extent(), []

    def cost(box: Any) -> int:
        outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
        inside = ((ink > box.min) & (ink < box.max)).all(axis=1).sum()
        return int(inside) + 1000 * outside + 1000 * sum(box.overlaps(other) for other in taken)

    for policy in (policy for policies in groups for policy in policies):
        point, options = (policy.kl, policy.gold.value), []
        for dx, dy in [
            (side * right, up) for up in (4, -10, 13, -19, 22, -28) for right in (7, 14) for side in (1, -1)
        ]:
            note = axis.annotate(
                policy.label,
                point,
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right",
                fontsize=8,
            )
            note.set_path_effects([withStroke(linewidth=2.0, foreground="white")])
            options.append((cost(note.get_window_extent()), note))
        _, best = min(options, key=lambda option: option[0])
        for _, note in options:
            if note is not best:
                note.remove()
        taken.append(best.get_window_extent())


def _ink(policies: Sequence[EvaluatedPolicy]) -> np.ndarray:
    """The points of one group, their error bars and the lines between them, as rows of dots [N, 2]."""
    along = np.linspace(0.0, 1.0, 20)[:, None]
    points = np.asarray([(policy.kl, policy.gold.value) for policy in policies])
    below, above = arms([policy.gold for policy in policies])
    bars = [
        along * (0.0, low + high) + point - (0.0, low)
        for point, low, high in zip(points, below, above, strict=True)
    ]
    lines = [start + along * (end - start) for start, end in zip(points[:-1], points[1:], strict=True)]
    return np.concatenate([points, *bars, *lines])
