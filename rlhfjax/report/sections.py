"""What a report is made of, and how a value is put into words: the same for Markdown and for HTML."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhfjax.report.intervals import Interval


class Table(NamedTuple):
    """Rows of cells, each of the header's length. A cell holds any value; text is escaped when written."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Section(NamedTuple):
    """A part of the report: a title, Markdown text as it stands, a table, and figures as (path, caption)."""

    title: str
    text: str = ""
    table: Table | None = None
    figures: Sequence[tuple[str | os.PathLike[str], str]] = ()


def check_rows(table: Table) -> None:
    """Raises ValueError for a row whose length is not the header's."""
    for number, row in enumerate(table.rows):
        if len(row) != len(table.header):
            raise ValueError(f"row {number} has {len(row)} cells, the header {len(table.header)}")


def cell_text(value: Any) -> str:
    """A cell's value in words, not escaped yet."""
    if value is None:
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else f"{value:.4g}"
    if isinstance(value, Interval):
        return str(value)
    return str(value)


def visible(character: str) -> str:
    """The character, or where it is a control character an escape that can be read, such as `\\x1b`."""
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


def figure_file(folder: Path, section: Section, path: str | os.PathLike[str]) -> Path:
    """Where the figure lies: its path may be absolute, begin with `folder` as it is given, or start from it.

    Raises FileNotFoundError where it is not there.
    """
    figure = Path(path)
    if not figure.is_relative_to(folder):
        figure = folder / path  # an absolute path stays as it is
    if not figure.is_file():
        raise FileNotFoundError(f"section {section.title!r} shows the figure {figure}, which is not there")
    return figure
