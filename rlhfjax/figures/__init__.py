"""The figures of a run, each a function from numbers to one PNG file. Needs the extra `plot` (Matplotlib).

Colours are the colour-blind safe set of Okabe and Ito (2008); groups also differ in their markers. Drawn
without a display and without global state, so a figure may be drawn from any thread; the same numbers give
the same file.
"""

from rlhfjax.figures.curves import (
    Bands,
    Panel,
    Stroke,
    plot_bands,
    plot_frames,
    plot_panels,
)
from rlhfjax.figures.drawing import (
    running_mean,
)
from rlhfjax.figures.policies import (
    EvaluatedPolicy,
    Styled,
    plot_calibration,
    plot_distances,
    plot_gold_against_kl,
    plot_intervals,
    plot_overoptimisation,
)

__all__ = [
    "Bands",
    "EvaluatedPolicy",
    "Panel",
    "Stroke",
    "Styled",
    "plot_bands",
    "plot_calibration",
    "plot_distances",
    "plot_frames",
    "plot_gold_against_kl",
    "plot_intervals",
    "plot_overoptimisation",
    "plot_panels",
    "running_mean",
]
