"""A report as one HTML file that needs nothing else: no network, no other file, no library.

Its script and its style are in it, and the page's own policy (a Content-Security-Policy) lets nothing else run or load:
so text of a model that slipped through the escaping could still do nothing.
"""

import base64
import hashlib
import html
import importlib.util
import json
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhfjax.report.sections import Section, Table, cell_text, check_rows, figure_file, visible

HERE = Path(__file__).parent
WIDE = 1100  # pixels: a picture of more is not shrunk to the width of a phone
HOW = 'an HTML report needs markdown-it-py: pip install "rlhfjax[experiments]"'


class Part(NamedTuple):
    """A part of a page: its heading, as text, and what stands below it, as HTML."""

    title: str
    html: str


def available() -> bool:
    """Whether the library that reads Markdown is installed."""
    return importlib.util.find_spec("markdown_it") is not None


def page(title: str, introduction: str, parts: Sequence[Part]) -> str:
    """The whole file: heading, `introduction` (HTML), a table of contents, and the parts."""
    style, script = ((HERE / name).read_text() for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    names = [f"part-{number}" for number in range(1, len(parts) + 1)]
    contents = "\n".join(
        f'<li><a href="#{name}">{escape(part.title)}</a></li>'
        for name, part in zip(names, parts, strict=True)
    )
    body = "\n".join(
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(part.title)}</h2>\n{part.html}\n</section>'
        for name, part in zip(names, parts, strict=True)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#content">To the report</a>
<header>
<h1>{escape(title)}</h1>
{introduction}
<nav aria-label="Contents">
<ul>
{contents}
</ul>
</nav>
</header>
<main id="content">
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def section_html(folder: Path, section: Section) -> str:
    """The text, the table and the figures of a section.

    Raises:
      FileNotFoundError: a figure is not there.
      ImportError: markdown-it-py is not installed.
    """
    parts = [markdown_html(section.text)] if section.text else []
    if section.table is not None:
        parts.append(table_html(section.table, section.title))
    for path, caption in section.figures:
        parts.append(_figure_html(figure_file(folder, section, path), caption))
    return "\n".join(parts)


def table_html(table: Table, caption: str) -> str:
    """The table, to be sorted by a click on a heading. The first cell of a row is its heading."""
    check_rows(table)
    head = "".join(f'<th scope="col">{escape(cell_text(cell))}</th>' for cell in table.header)
    rows = []
    room = ' class="long"' if any(_is_long(cell_text(row[0]), 60) for row in table.rows) else ""
    for first, *rest in table.rows:
        cells = "".join(_cell(cell_text(cell)) for cell in rest)
        rows.append(f'<tr><th scope="row"{room}>{escape(cell_text(first))}</th>{cells}</tr>')
    body = "\n".join(rows)
    return (
        f'<div class="scroll" role="region" aria-label="Table: {escape(caption)}" tabindex="0">\n'
        f'<table class="sortable">\n<caption class="unseen">{escape(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def markdown_html(text: str) -> str:
    """Markdown as HTML; HTML in it is shown as text, but for the `<br>` that `markdown_text` makes of a line break.

    Raises:
      ImportError: markdown-it-py is not installed.
    """
    if not available():
        raise ImportError(HOW)
    from markdown_it import MarkdownIt
    from markdown_it.rules_inline import StateInline

    def line_break(state: StateInline, silent: bool) -> bool:
        found = state.src.startswith("<br>", state.pos)
        if found:
            state.pos += len("<br>")
            if not silent:
                state.push("hardbreak", "br", 0)
        return found

    # Headings of the text go below those of the sections; pictures are given as figures, and nothing is loaded.
    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    reader.inline.ruler.before("autolink", "line_break", line_break)
    tokens = reader.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 2)}"
    return reader.renderer.render(tokens, reader.options, {})


def data_html(kind: str, data: Any, caption: str) -> str:
    """A place that the page's script fills from `data`: `kind` is "curves", "points" or "samples"."""
    return (
        f'<figure class="{kind}" data-view="{kind}">\n<script type="application/json">{json_text(data)}</script>\n'
        "<noscript><p>This part is drawn by the script in the page, which is switched off.</p></noscript>\n"
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


def json_text(data: Any) -> str:
    """JSON that can stand within a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def escape(text: str) -> str:
    """Text as HTML that shows it as it is, in an element or in an attribute between double quotes."""
    lines = text.replace("\r\n", "\n").split("\n")
    return "<br>".join(html.escape("".join(map(visible, line))) for line in lines)


def _cell(text: str) -> str:
    number = len(text) < 28 and text.lstrip("+-").startswith(tuple("0123456789."))
    kind = ' class="number"' if number else ' class="long"' if _is_long(text, 28) else ""
    return f"<td{kind}>{escape(text)}</td>"  # of a number no line is broken


def _is_long(text: str, most: int) -> bool:
    """Whether a cell's text needs room, or has a word that must be broken."""
    return len(text) > most or any(len(word) > 24 for word in text.split())


def _figure_html(file: Path, caption: str) -> str:
    kind = mimetypes.guess_type(file.name)[0] or "image/png"
    content = file.read_bytes()
    data = base64.b64encode(content).decode()
    width = int.from_bytes(content[16:20]) if content.startswith(b"\x89PNG") else 0
    wide = " wide" if width > WIDE else ""
    words = escape(caption)
    alternative = words.replace("<br>", " ")
    return (
        f'<figure class="picture{wide}">'
        f'<div class="scroll" role="region" aria-label="Figure: {alternative}" tabindex="0">'
        f'<img src="data:{kind};base64,{data}" alt="{alternative}"></div>'
        f"<figcaption>{words}</figcaption></figure>"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
