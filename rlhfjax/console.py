"""What a run shows: a bar per stage and one line per update on a terminal, plain lines when piped.

Nothing here decides anything. rich is imported when the first stage opens, so that `--help` stays quick.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhfjax.run_folder import RunFolder

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_WHEN_PIPED = 100  # columns of a sample table in a log file
NARROWEST = 18  # columns that a text needs to be read
NUMBERS_AT_THE_END = 16  # of a summary; the file has them all


class StageView(NamedTuple):
    """What a running stage may show.

    `update(step, values, show)`: moves the bar to `step` and, where `show`, prints a line of `values`
    (label -> number). `samples(title, rows)`: prints a table of texts. `note(text)`: prints a line.
    """

    update: Callable[[int, Mapping[str, float], bool], None]
    samples: Callable[[str, Sequence[Mapping[str, Any]]], None]
    note: Callable[[str], None]


@contextmanager
def open_stage(
    name: str, steps: int, *, start: int = 0, console: "Console | None" = None
) -> Iterator[StageView]:
    """Shows the stage `name` of `steps` steps, of which `start` are done already, while the context lasts."""
    console = console or make_console()
    with _bar(name, steps, start, console) as advance:

        def update(step: int, values: Mapping[str, float], show: bool) -> None:
            if show:
                console.print(
                    update_line(name, step, steps, values), markup=False, highlight=False, soft_wrap=True
                )
            advance(step)

        yield StageView(
            update=update,
            samples=lambda title, rows: sample_table(rows, title=title, console=console),
            note=lambda text: console.print(
                f"{name:<12} {text}", markup=False, highlight=False, soft_wrap=True
            ),
        )


def make_console() -> "Console":
    """A rich console on standard output; where that is no terminal, without colour or cursor movements."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else WIDTH_WHEN_PIPED
    return Console(width=width, highlight=False)


def update_line(name: str, step: int, steps: int, values: Mapping[str, float]) -> str:
    """One line: stage, step of steps, then "label number" for each of `values`."""
    count = f"{step:>{len(str(steps))}}/{steps}"
    return "  ".join(
        [f"{name:<12} {count}", *(f"{label} {format_number(value)}" for label, value in values.items())]
    )


def format_number(value: float) -> str:
    """A number in about five characters: 1234567 -> 1,234,567; 0.12345 -> 0.123; 0.000012 -> 1.2e-05."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    if size >= 0.01 or value == 0:
        return f"{value:.3f}" if size < 10 else f"{value:.2f}"
    return f"{value:.1e}"


def sample_table(
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str = "samples",
    console: "Console | None" = None,
    longest: int = 400,
) -> None:
    """Prints `rows` as a table, a column per key of the first row (prompt, before, after, reward...), as many as fit.

    Texts come from a model or a data set, so they are printed literally: no markup is read in them, control
    characters are shown as escapes, and a text of more than `longest` characters is cut with an ellipsis.
    """
    if not rows:
        return
    from rich.table import Table
    from rich.text import Text

    console = console or make_console()
    columns = list(rows[0])[: max(3, console.width // NARROWEST)]
    if len(columns) < len(rows[0]):
        title = f"{title} ({len(rows[0]) - len(columns)} more columns in samples.jsonl)"
    table = Table(title=Text(printable(title)), show_lines=True, expand=True)
    for column in columns:
        numeric = isinstance(rows[0][column], float | int)
        table.add_column(
            Text(printable(str(column))), justify="right" if numeric else "left", ratio=None if numeric else 1
        )
    for row in rows:
        table.add_row(*(Text(_cell(row.get(column, ""), longest)) for column in columns))
    console.print(table)


def printable(text: str) -> str:
    """`text` with the characters that move the cursor or hide others shown as escapes; newlines stay."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def closing_lines(folder: RunFolder, summary: Mapping[str, float]) -> str:
    """The last lines of a run: its final numbers, where everything lies, and what to type next."""
    shown = dict(list(summary.items())[:NUMBERS_AT_THE_END])
    width = max((len(name) for name in shown), default=0)
    numbers = [f"  {name:<{width}}  {format_number(float(value))}" for name, value in shown.items()]
    if len(shown) < len(summary):
        numbers.append(f"  and {len(summary) - len(shown)} more in summary.json")
    files = [
        f"  {name:<{18}} {meaning}"
        for name, meaning in (
            ("report.md", "what happened, in words and figures"),
            ("report.html", "the same with curves and samples to look through: open it in a browser"),
            ("summary.json", "the final numbers"),
            ("metrics.jsonl", "every step of every stage"),
            ("samples.jsonl", "texts"),
        )
        if (folder.path / name).exists() and (folder.path / name).stat().st_size
    ]
    return "\n".join(
        [
            *(["", "Final numbers", *numbers] if numbers else []),
            "",
            f"Results are in {folder.path}",
            *files,
            "",
            "Next",
        ]
        + [
            f"  python experiments/run.py {folder.experiment} --seed {folder.seed + 1}   # another seed",
            f"  python experiments/run.py {folder.experiment} --help   # every option",
        ]
    )


def interrupted_lines(folder: RunFolder) -> str:
    """What to say when a run ends early."""
    command = f"python experiments/run.py --resume {folder.path}"
    return f"\nStopped. What was done is in {folder.path}\nContinue with\n  {command}"


def _cell(value: Any, longest: int) -> str:
    if isinstance(value, float):
        return format_number(value)
    text = printable(str(value))
    return text if len(text) <= longest else text[: longest - 1] + "…"


@contextmanager
def _bar(name: str, steps: int, start: int, console: "Console") -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, nothing when piped. Yields a function to call with the steps done."""
    if not console.is_terminal:
        yield lambda step: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task(name, total=steps, completed=start)
        yield lambda step: progress.update(task, completed=step)
