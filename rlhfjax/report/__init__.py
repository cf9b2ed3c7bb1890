"""What a run says to its reader: intervals, calibration, tables, `report.md` and `report.html`. NumPy only.

The figures that go with it are drawn by `rlhfjax.figures`.
"""

from rlhfjax.report.intervals import (
    CalibrationBin,
    Interval,
    MarginBin,
    accuracy_by_margin,
    bootstrap_interval,
    calibration,
    calibration_error,
    nested_bootstrap_interval,
    paired_difference_interval,
    wilson_interval,
)
from rlhfjax.report.markdown import markdown_table, markdown_text
from rlhfjax.report.sections import Section, Table
from rlhfjax.report.writing import write_report

__all__ = [
    "CalibrationBin",
    "Interval",
    "MarginBin",
    "Section",
    "Table",
    "accuracy_by_margin",
    "bootstrap_interval",
    "calibration",
    "calibration_error",
    "markdown_table",
    "markdown_text",
    "nested_bootstrap_interval",
    "paired_difference_interval",
    "wilson_interval",
    "write_report",
]
