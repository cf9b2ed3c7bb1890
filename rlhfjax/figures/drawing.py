"""What all figures share: colours, style, error bars, and the file that is written."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhfjax.report import Interval

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


def running_mean(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """The centred mean over an odd `window` of points, at the ends over those that exist, without NaN."""
    numbers = np.asarray(values, np.float64)
    here = np.isfinite(numbers)
    kernel = np.ones(window)
    full = slice(window // 2, window // 2 + numbers.size)
    count = np.convolve(here, kernel)[full]
    total = np.convolve(np.where(here, numbers, 0.0), kernel)[full]
    return np.where(count > 0, total / np.maximum(count, 1.0), np.nan)


def arms(intervals: Sequence[Interval]) -> np.ndarray:
    """Lengths of the error bars below and above, [2, N]; 0 where an interval has no ends."""
    arms = np.asarray([(item.value - item.low, item.high - item.value) for item in intervals]).T
    return np.maximum(np.nan_to_num(arms), 0.0)


def save(
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
    matplotlib = matplotlib_library()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=size, dpi=160, layout="constrained")
        axes = figure.subplots(rows, columns, sharex=share_x, squeeze=False, height_ratios=heights)
        draw(list(axes.flat))
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", metadata={"Software": None})
    return path


def matplotlib_library() -> Any:
    """Matplotlib, imported on first use: it takes a second, and a run that draws nothing does not need it."""
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError('figures need Matplotlib: pip install "rlhfjax[plot]"') from error
    return matplotlib
