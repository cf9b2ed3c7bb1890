"""`report.md` and `report.html` of a run, from the same sections."""

import html as escaping
import os
from collections.abc import Sequence
from pathlib import Path

from rlhfjax.report import html, logs
from rlhfjax.report.markdown import report_markdown
from rlhfjax.report.sections import Section
from rlhfjax.run_folder import write_atomically

CURVES = "Every metric that the run has logged. Choose one; the slider, or the pointer, reads the values off."
SAMPLES = "Texts of samples.jsonl side by side. Words that only one of the two has are marked."


def write_report(folder: str | os.PathLike[str], title: str, sections: Sequence[Section]) -> Path:
    """Writes `folder/report.md` and, from the same sections, `folder/report.html`; returns the path of the first.

    Figures are linked from the one and held within the other, which also has the curves of metrics.jsonl and the texts
    of samples.jsonl. Without markdown-it-py only report.md is written, and a line says so.

    A figure's path may be absolute, begin with `folder` as it is given here, or start from it.

    Raises:
      FileNotFoundError: a figure is not there.
    """
    folder = Path(folder)
    path = folder / "report.md"
    write_atomically(path, report_markdown(folder, title, sections))
    if html.available():
        write_atomically(folder / "report.html", report_html(folder, title, sections))
    else:
        print(f"note: {path} is written without report.html beside it: {html.HOW}")
    return path


def report_html(folder: Path, title: str, sections: Sequence[Section]) -> str:
    """The text of `report.html`: the sections, then the curves and samples of the logs in the folder."""
    read = {name: logs.read_log(folder / f"{name}.jsonl") for name in ("metrics", "perf", "samples")}
    parts = [html.Part(section.title, html.section_html(folder, section)) for section in sections]
    curves = logs.curves(logs.with_perf(read["metrics"].rows, read["perf"].rows))
    if curves:
        parts.append(html.Part("Curves", html.data_html("curves", logs.curve_data(curves), CURVES)))
    samples = logs.samples(read["samples"].rows)
    if samples:
        parts.append(html.Part("Samples", html.data_html("samples", logs.sample_data(samples), SAMPLES)))
    parts += _configuration(folder)
    problems = [problem for lines in read.values() for problem in lines.problems]
    words = "".join(f"<p><strong>{html.escape(problem)}</strong></p>\n" for problem in problems)
    return html.page(title, words, parts)


def _configuration(folder: Path) -> list[html.Part]:
    file = folder / "config.yaml"
    if not file.is_file():
        return []
    text = escaping.escape(file.read_text())
    return [html.Part("Configuration", f"<details><summary>config.yaml</summary><pre>{text}</pre></details>")]
