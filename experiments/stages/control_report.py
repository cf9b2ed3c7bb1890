"""What a run in a world of control says at its end: its table, its curves and a game of each method."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.stages import control
from experiments.stages.control import Outcome, pick_frames
from experiments.stages.control_scenes import Scene, beside
from rlhfjax.figures import Bands, plot_bands, plot_frames
from rlhfjax.report import Section, Table, markdown_table, write_report
from rlhfjax.run_folder import RunFolder

NO_FIGURE = 'Figures need Matplotlib: pip install "rlhfjax[plot]".'


def report(
    title: str,
    solved: float,
    found: Sequence[tuple[Outcome, Scene | None]],
    folder: RunFolder,
    text: str = "",
) -> dict[str, float]:
    """Prints the table, writes report.md, and returns the numbers of summary.json; `text` goes first."""
    outcomes = [outcome for outcome, _ in found]
    results = result_section(solved, outcomes)
    print(f"\n{title}\n\n{markdown_table(results.table)}" if results.table else "")
    sections = [
        results._replace(text=f"{text} {results.text}".strip()),
        curve_section(solved, outcomes, folder),
        *(game_section(outcome, scene, folder) for outcome, scene in found if scene),
    ]
    write_report(folder.path, f"{title}, seed {folder.seed}", sections)
    return summarise(solved, outcomes)


def mean_and_range(values: Sequence[float] | np.ndarray, format: str = ".1f") -> str | None:
    """ "mean (lowest to highest)" of the numbers that are known; None: none is."""
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    if not known.size:
        return None
    if known.size == 1:
        return f"{known[0]:{format}}"
    return f"{known.mean():{format}} ({known.min():{format}} to {known.max():{format}})"


def result_section(solved: float, outcomes: Sequence[Outcome]) -> Section:
    """One row a method."""
    header = [
        "method",
        "environment steps of a seed",
        "seeds that solve it while training",
        "steps to solve",
        "greedy seeds that solve it",
        "steps to solve, greedy",
        "greedy return at the end",
        "environment steps/s",
    ]
    rows = []
    for item in outcomes:
        seeds = len(item.greedy)
        sampled = control.solved_at(item, solved)
        greedy = control.greedy_solved_at(item, solved)
        final = item.score.mean(axis=1)
        rows.append(
            [
                item.name,
                f"{item.x[-1]:,}",
                f"{np.isfinite(sampled).sum()} of {seeds}",
                mean_and_range(sampled, ",.0f"),
                f"{np.isfinite(greedy).sum()} of {seeds}",
                mean_and_range(greedy, ",.0f"),
                mean_and_range(final, ".4g"),
                None if item.rate is None else f"{item.rate:,.0f}",
            ]
        )
    score = outcomes[0].score
    text = (
        f"It counts as solved at a return of {solved:g}: while training, as the mean of the last {control.WINDOW} or "
        "more episodes, drawn as the method explores; greedily, at a point of the curve below. Steps to solve are the "
        "mean over the seeds that do (lowest to highest), told to within a point of the curve. The last return is that "
        f"of {score.shape[1]} whole greedy episodes of each seed: mean over seeds (lowest to highest seed). Steps per "
        "second are those of all seeds together while training, without compilation and evaluation."
    )
    return Section("Methods", text, Table(header, rows))


def curve_section(solved: float, outcomes: Sequence[Outcome], folder: RunFolder) -> Section:
    """Returns against environment steps."""
    panels = [
        Bands("return", {o.name: (o.x, o.greedy) for o in outcomes}, title="Greedy", level=solved),
        Bands("return", {o.name: (o.x, o.sampled) for o in outcomes}, title="While training", level=solved),
    ]
    return figure_section(
        "Learning curves",
        "Mean over seeds, and the range from the lowest to the highest. The dashed line is where it counts as solved.",
        {"Return against the environment steps of a seed": lambda path: plot_bands(path, panels, columns=2)},
        folder,
        "curves",
    )


def game_section(outcome: Outcome, scene: Scene, folder: RunFolder) -> Section:
    """One greedy game of the first seed, in letters and drawn."""
    places = pick_frames(len(outcome.game))
    titles = [f"step {i}" for i in places]
    text = code(beside([scene.draw(outcome.game[i]) for i in places], titles))
    strokes = {title: scene.strokes(outcome.game[i]) for title, i in zip(titles, places, strict=True)}

    def draw(path: Path) -> Path:
        return plot_frames(path, strokes, x_range=scene.x_range, y_range=scene.y_range, columns=4)

    return figure_section(
        f"A game of {outcome.name}",
        f"The first seed, greedy, {len(outcome.game) - 1} steps.\n\n{text}",
        {f"A game of {outcome.name}": draw},
        folder,
        f"game_{outcome.name}",
    )


def figure_section(
    title: str, text: str, draw: Mapping[str, Callable[[Path], Path]], folder: RunFolder, name: str
) -> Section:
    """A section with figures by their captions, or a word in their place where Matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return Section(title, f"{text}\n\n{NO_FIGURE}")
    paths = [folder.path / "figures" / f"{name}{i or ''}.png" for i in range(len(draw))]
    figures = [(plot(path), caption) for path, (caption, plot) in zip(paths, draw.items(), strict=True)]
    return Section(title, text, figures=figures)


def code(text: str) -> str:
    """Text as a block of Markdown that is shown as it stands."""
    return f"```text\n{text}\n```"


def summarise(solved: float, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Flat names and numbers for summary.json."""
    numbers = {}
    for item in outcomes:
        final = item.score.mean(axis=1)
        sampled = control.solved_at(item, solved)
        greedy = control.greedy_solved_at(item, solved)
        numbers |= {
            f"{item.name}/greedy_return": float(final.mean()),
            f"{item.name}/greedy_return_low": float(final.min()),
            f"{item.name}/greedy_return_high": float(final.max()),
            f"{item.name}/seeds_solved": int(np.isfinite(sampled).sum()),
            f"{item.name}/steps_to_solve": _mean(sampled),
            f"{item.name}/seeds_solved_greedy": int(np.isfinite(greedy).sum()),
            f"{item.name}/steps_to_solve_greedy": _mean(greedy),
        }
    return numbers


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")
