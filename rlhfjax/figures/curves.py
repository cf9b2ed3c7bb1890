"""Curves over steps, bands over seeds, and drawings frame by frame."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhfjax.figures.drawing import COLOURS, GREY, MARKERS, Curve, matplotlib_library, running_mean, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
                    matplotlib_library().ticker.MaxNLocator("auto", integer=True, min_n_ticks=1)
                )
            if any(panel.curves):
                axis.legend()
        for unused in axes[len(panels) :]:
            unused.set_visible(False)

    return save(path, draw, rows=rows, columns=columns, size=(3.6 * columns, 2.7 * rows))


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

    return save(path, draw, rows=rows, columns=columns, size=(4.4 * columns, 3.2 * rows))


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
    return save(path, draw, rows=rows, columns=columns, size=(1.8 * columns, rows * (1.8 * height + 0.3)))


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
