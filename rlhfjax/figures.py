"""The figures of a run, each a function from numbers to one PNG file. Needs the extra `plot` (Matplotlib).

Colours are the colour-blind safe set of Okabe and Ito (2008); groups also differ in their markers. Drawn
without a display and without global state, so a figure may be drawn from any thread; the same numbers give
the same file.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhfjax.report import CalibrationBin, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
GREY = "#666666"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a "$" in a label is a dollar sign
}

Curve = tuple[Any, Any]  # the x and the y of a line: sequences or arrays of numbers, of equal length


class Panel(NamedTuple):
    """One set of axes: curves by label over a common x. One curve with an empty label needs no legend."""

    y_label: str
    curves: Mapping[str, Curve]
    x_label: str = "step"
    title: str = ""


class Bands(NamedTuple):
    """One set of axes: for each label a band over a common x, of a run repeated with several seeds."""

    y_label: str
    bands: Mapping[str, tuple[Any, Any]]  # x [N], and y [R, N] of the R seeds; NaN leaves a gap
    x_label: str = "environment steps"
    title: str = ""
    level: float | None = None  # a dashed line at this y, for example that of a solved task
    logarithmic: bool = False  # the y axis; values of 0 and less are not seen on it


class Stroke(NamedTuple):
    """A line through points of a drawing, one point being a dot; `mark` is the letter that draws it in text."""

    points: Sequence[tuple[float, float]]  # (x, y), y upwards
    mark: str


class Styled(NamedTuple):
    """A curve with how it is drawn: "-", "--", ":" or, for points that no line joins, "o"."""

    curve: Curve
    style: str
    colour: int  # number among COLOURS


class EvaluatedPolicy(NamedTuple):
    """A policy as a point of the gold-against-KL figure. One group has one colour and one marker."""

    label: str
    group: str
    kl: float  # nats per completion from the reference policy
    gold: Interval


def plot_panels(path: str | os.PathLike[str], panels: Sequence[Panel], *, columns: int = 3) -> Path:
    """The curves of one stage (or several), for example loss, reward and KL against the step, one panel each.

    A curve of more than 60 points is drawn pale with its running mean on top; the title tells how many points
    the mean is taken over. NaN and None leave a gap.

    Raises:
      ValueError: no panels, a panel without curves, or a curve whose x and y differ in length.
    """
    if not panels or not all(panel.curves for panel in panels):
        raise ValueError("there is nothing to plot: every panel needs a curve, and there must be a panel")
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)

    def draw(axes: Sequence["Axes"]) -> None:
        for axis, panel in zip(axes, panels, strict=False):
            window = max(_draw_curve(axis, place, *item) for place, item in enumerate(panel.curves.items()))
            running = f"running mean of {window} points" if window > 1 else ""
            title = ", ".join(filter(None, [panel.title, running]))
            axis.set(xlabel=panel.x_label, ylabel=panel.y_label, title=title)
            if panel.x_label == "step":
                axis.xaxis.set_major_locator(
                    _matplotlib().ticker.MaxNLocator("auto", integer=True, min_n_ticks=1)
                )
            if any(panel.curves):
                axis.legend()
        for unused in axes[len(panels) :]:
            unused.set_visible(False)

    return _save(path, draw, rows=rows, columns=columns, size=(3.6 * columns, 2.7 * rows))


def plot_bands(path: str | os.PathLike[str], panels: Sequence[Bands], *, columns: int = 3) -> Path:
    """Curves of runs with several seeds: the mean over seeds as a line, from the lowest to the highest as a band.

    Raises:
      ValueError: no panels, a panel without bands, or a y that is not [seeds, len(x)].
    """
    if not panels or not all(panel.bands for panel in panels):
        raise ValueError("there is nothing to plot: every panel needs a band, and there must be a panel")
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)

    def draw(axes: Sequence["Axes"]) -> None:
        for axis, panel in zip(axes, panels, strict=False):
            for place, (label, (x, y)) in enumerate(panel.bands.items()):
                _draw_band(axis, place, label, np.asarray(x, np.float64), np.asarray(y, np.float64))
            if panel.level is not None:
                axis.axhline(panel.level, color=GREY, linestyle="--", linewidth=1.0)
            if panel.logarithmic:
                axis.set_yscale("log")
            axis.set(xlabel=panel.x_label, ylabel=panel.y_label, title=panel.title)
            axis.legend()
        for unused in axes[len(panels) :]:
            unused.set_visible(False)

    return _save(path, draw, rows=rows, columns=columns, size=(4.4 * columns, 3.2 * rows))


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
                axis.errorbar([x.value], [y], xerr=_arms([x]), fmt="o", color=colour, markersize=4, capsize=3)
            axis.set(title=title, yticks=place, yticklabels=list(intervals), ylim=(0.6 - most, 0.6))
            axis.grid(visible=False, axis="y")
        for unused in axes[len(panels) :]:
            unused.set_visible(False)

    return _save(path, draw, rows=rows, columns=columns, size=(4.6 * columns, rows * (0.26 * most + 0.7)))


def plot_frames(
    path: str | os.PathLike[str],
    frames: Mapping[str, Sequence[Stroke]],
    *,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    columns: int = 6,
) -> Path:
    """Drawings beside each other, by title: a game as a strip of frames. One letter of strokes has one colour.

    Raises:
      ValueError: no frames.
    """
    if not frames:
        raise ValueError("there are no frames to draw")
    columns = min(columns, len(frames))
    rows = math.ceil(len(frames) / columns)
    marks = list(dict.fromkeys(stroke.mark for strokes in frames.values() for stroke in strokes))

    def draw(axes: Sequence["Axes"]) -> None:
        for axis, (title, strokes) in zip(axes, frames.items(), strict=False):
            for stroke in strokes:
                x, y = np.asarray(stroke.points, np.float64).T
                colour = COLOURS[marks.index(stroke.mark) % len(COLOURS)]
                axis.plot(x, y, color=colour, linewidth=1.6, marker="s" if x.size == 1 else "", markersize=5)
            axis.set(xlim=x_range, ylim=y_range, title=title, xticks=[], yticks=[], aspect="equal")
            axis.grid(visible=False)
        for unused in axes[len(frames) :]:
            unused.set_visible(False)

    height = (y_range[1] - y_range[0]) / (x_range[1] - x_range[0])
    return _save(path, draw, rows=rows, columns=columns, size=(1.8 * columns, rows * (1.8 * height + 0.3)))


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
                yerr=_arms([policy.gold for policy in members]),
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

    return _save(path, draw, size=(6.4, 3.8))


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
            yerr=_arms([entry.observed for entry in filled]),
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

    return _save(path, draw, rows=2, size=(4.4, 4.8), heights=(3.2, 1.0), share_x=True)


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
                yerr=_arms(values),
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

    return _save(path, draw, rows=2, size=(5.2, 4.4), share_x=True)


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

    return _save(path, draw, rows=rows, columns=columns, size=(3.8 * columns, 2.8 * rows + 0.6))


def running_mean(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """The centred mean over an odd `window` of points, at the ends over those that exist, without NaN."""
    numbers = np.asarray(values, np.float64)
    here = np.isfinite(numbers)
    kernel = np.ones(window)
    full = slice(window // 2, window // 2 + numbers.size)
    count = np.convolve(here, kernel)[full]
    total = np.convolve(np.where(here, numbers, 0.0), kernel)[full]
    return np.where(count > 0, total / np.maximum(count, 1.0), np.nan)


def _draw_curve(axis: "Axes", place: int, label: str, curve: Curve) -> int:
    """Draws one curve; returns how many points its running mean takes, 1 where it is drawn as it is."""
    x, y = (np.asarray(values, np.float64) for values in curve)  # None becomes NaN
    if x.shape != y.shape:
        raise ValueError(f"curve {label!r} has {x.size} values of x and {y.size} of y")
    colour = COLOURS[place % len(COLOURS)]
    if x.size <= 60:
        axis.plot(x, y, color=colour, label=label, marker="o" if x.size <= 12 else "", markersize=3)
        return 1
    window = 2 * (x.size // 60) + 1
    axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.7)
    axis.plot(x, running_mean(y, window), color=colour, label=label)
    return window


def _draw_band(axis: "Axes", place: int, label: str, x: np.ndarray, y: np.ndarray) -> None:
    """Mean and range over the first axis of y [R, N], of the seeds that have a number at each x."""
    if y.ndim != 2 or x.shape != y.shape[1:]:
        raise ValueError(f"band {label!r} needs y of shape [seeds, {x.size}], one row a seed, got {y.shape}")
    known = np.isfinite(y).any(axis=0)
    x, y = x[known], y[:, known]
    colour = COLOURS[place % len(COLOURS)]
    axis.plot(
        x,
        np.nanmean(y, axis=0),
        color=colour,
        label=label,
        marker=MARKERS[place % len(MARKERS)],
        markersize=3,
    )
    axis.fill_between(x, np.nanmin(y, axis=0), np.nanmax(y, axis=0), color=colour, alpha=0.2, linewidth=0)


def _arms(intervals: Sequence[Interval]) -> np.ndarray:
    """Lengths of the error bars below and above, [2, N]; 0 where an interval has no ends."""
    arms = np.asarray([(item.value - item.low, item.high - item.value) for item in intervals]).T
    return np.maximum(np.nan_to_num(arms), 0.0)


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
    below, above = _arms([policy.gold for policy in policies])
    bars = [
        along * (0.0, low + high) + point - (0.0, low)
        for point, low, high in zip(points, below, above, strict=True)
    ]
    lines = [start + along * (end - start) for start, end in zip(points[:-1], points[1:], strict=True)]
    return np.concatenate([points, *bars, *lines])


def _save(
    path: str | os.PathLike[str],
    draw: Callable[[Sequence["Axes"]], None],
    *,
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    heights: Sequence[float] | None = None,
    share_x: bool = False,
) -> Path:
    """Makes rows x columns of axes, lets `draw` fill them, and writes the PNG (and the folder for it)."""
    matplotlib = _matplotlib()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=size, dpi=160, layout="constrained")
        axes = figure.subplots(rows, columns, sharex=share_x, squeeze=False, height_ratios=heights)
        draw(list(axes.flat))
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", metadata={"Software": None})
    return path


def _matplotlib() -> Any:
    """Matplotlib, imported on first use: it takes a second, and a run that draws nothing does not need it."""
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError('figures need Matplotlib: pip install "rlhfjax[plot]"') from error
    return matplotlib
