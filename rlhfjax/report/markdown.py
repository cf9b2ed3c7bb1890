"""A report in Markdown: tables, text of models made harmless, and the whole of `report.md`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhfjax.report.intervals import Interval
from rlhfjax.report.sections import Section, Table, cell_text, check_rows, figure_file, visible


def markdown_table(table: Table) -> str:
    """The table in Markdown. Text from a model or a data set cannot break out of its cell or add formatting.

    Raises:
      ValueError: a row whose length is not the header's.
    """
    check_rows(table)
    lines = [_row(table.header), "|" + "|".join(" --- " for _ in table.header) + "|"]
    lines += [_row(row) for row in table.rows]
    return "\n".join(lines) + "\n"


def markdown_text(text: str, *, longest: int = 0) -> str:
    """`text` on one line of Markdown that shows it as it is: Markdown and HTML in it are escaped.

    Line breaks become `<br>`; other control characters become visible escapes such as `\\x1b`.

    Args:
      text: any text.
      longest: if positive, text beyond so many characters is cut and the cut marked with an ellipsis.
    """
    if longest and len(text) > longest:
        text = text[: longest - 1] + "…"
    return "".join(_escape(character) for character in text.replace("\r\n", "\n"))


def report_markdown(folder: Path, title: str, sections: Sequence[Section]) -> str:
    """The text of `report.md`. Figures are linked relative to the folder.

    Raises:
      FileNotFoundError: a figure is not there.
    """
    parts = [f"# {markdown_text(title)}\n"]
    for section in sections:
        parts.append(f"## {markdown_text(section.title)}\n")
        if section.text:
            parts.append(section.text.strip() + "\n")
        if section.table is not None:
            parts.append(markdown_table(section.table))
        for path, caption in section.figures:
            figure = figure_file(folder, section, path)
            link = Path(os.path.relpath(figure, folder)).as_posix()
            parts.append(f"![{markdown_text(caption)}](<{link}>)\n\n*{markdown_text(caption)}*\n")
    return "\n".join(parts)


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(value: Any) -> str:
    text = cell_text(value)
    return text if isinstance(value, Interval) else markdown_text(text)  # its brackets make no link


def _escape(character: str) -> str:
    if character == "\n":
        return "<br>"
    if character in "<>&":
        return {"<": "&lt;", ">": "&gt;", "&": "&amp;"}[character]
    if character in "\\`*_[]|~$#!":
        return "\\" + character
    return character if character.isprintable() else "\\" + visible(character)
