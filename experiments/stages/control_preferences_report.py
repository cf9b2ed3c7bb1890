"""What control from preferences says at its end: table, comparisons, figures, and its rows for the table of all tasks.

Shapes: R seeds, V variants, N episodes.
"""

from pathlib import Path

import numpy as np

from experiments.stages.control_preferences import Found, Study, Variant
from experiments.stages.control_report import figure_section
from experiments.stages.results import Row, stage_seconds, write_results
from rlhfjax.figures import Bands, plot_bands
from rlhfjax.report import (
    Interval,
    Section,
    Table,
    markdown_table,
    nested_bootstrap_interval,
    paired_difference_interval,
    write_report,
)
from rlhfjax.run_folder import RunFolder

ENDS = (
    "A segment ends where its episode terminates, and what is missing of it counts nothing: so a fall shows as a "
    "shorter segment, though CartPole's true reward is 1 at every step. None contains an end that is only the limit on "
    "steps."
)


def report(study: Study, found: Found, folder: RunFolder) -> dict[str, float]:
    """Prints the table, writes report.md and results.json, and returns the numbers of summary.json."""
    title = f"{study.title} from preferences, {study.config.seeds} seeds"
    results = _results(study, found, folder.seed)
    compared = _comparison(study, found, folder.seed)
    print(f"\n{title}\n\n{markdown_table(results.table)}\n{compared.text}" if results.table else "")
    write_report(
        folder.path,
        f"{title}, seed {folder.seed}",
        [results, compared, _figures(study, found, folder)],
    )
    write_results(
        folder,
        task=f"control from preferences ({study.title})",
        metric=study.metric,
        rows=_rows(study, found, folder),
    )
    numbers = {"true_reward/return": float(found.true_score.mean())}
    for v, variant in enumerate(study.variants):
        numbers |= {
            f"{variant.name}/return": float(found.score[v].mean()),
            f"{variant.name}/labels": float(found.asked[v]),
            f"{variant.name}/correlation": _mean(found.correlation[v]),
            f"{variant.name}/agreement": _mean(found.agreement[v]),
        }
    return numbers


def _results(study: Study, found: Found, seed: int) -> Section:
    header = ["reward", "labels", "return at the end", "95 %", "lowest seed", "highest seed", "r", "order"]
    rows = [["true reward (ppo)", None, *_scores(found.true_score, seed), None, None]]
    for v, variant in enumerate(study.variants):
        last = [_rounded(found.correlation[v]), _rounded(found.agreement[v])]
        rows.append([variant.method, f"{found.asked[v]:g}", *_scores(found.score[v], seed), *last])
    seeds, episodes = found.true_score.shape
    steps = found.x[-1] if found.x.size else 0
    noise = study.config.noise
    text = (
        f"The {study.metric}, of {episodes} whole greedy episodes of each of {seeds} seeds after {steps:,} steps; the "
        "interval is over seeds and episodes (two-stage bootstrap). All rows are PPO with the same settings, in the "
        f"same worlds. {ENDS} r: correlation of learnt and true returns of segments, of a policy trained on the true "
        "reward that acts at random now and then, from never to always; order: share of pairs of them with unequal "
        "returns that the learnt reward orders as the true one does; means over seeds. Noisy labels: temperature "
        f"{noise.temperature:g}, {noise.random:.0%} of the answers by the toss of a coin."
    )
    return Section("Return against labels", text, Table(header, rows))


def _comparison(study: Study, found: Found, seed: int) -> Section:
    """Other queries and labels against those by disagreement without noise, where there are equally many."""
    plain = {x.labels: v for v, x in enumerate(study.variants) if not x.random and not x.noisy}
    lines = []
    for v, variant in enumerate(study.variants):
        base = plain.get(variant.labels)
        if base is None or base == v:
            continue
        means, others = found.score[v].mean(axis=1), found.score[base].mean(axis=1)
        gap = paired_difference_interval(others, means, seed)
        what = "queries by disagreement" if variant.random else "labels without noise"
        lines.append(f"- {variant.labels} labels: {what} {_verdict(gap, means.size)}.")
    text = "\n".join(lines) or "There are no two rows with the same number of labels."
    return Section("Do the choice of queries, and noise, matter?", text)


def _verdict(gap: Interval, seeds: int) -> str:
    """In words: the difference of returns by seed, and whether its interval leaves 0 out."""
    told = f"{gap.value:+.3g} of return ({gap.low:+.3g} to {gap.high:+.3g} over {seeds} seeds)"
    if gap.low > 0:
        return f"did better: {told}"
    if gap.high < 0:
        return f"did worse: {told}"
    return f"made no difference that these seeds could tell: {told}"


def _figures(study: Study, found: Found, folder: RunFolder) -> Section:
    lines: dict[str, list[int]] = {}
    for v, variant in enumerate(study.variants):
        lines.setdefault(_line_of(variant), []).append(v)

    def against_labels(values: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        found_by = {}
        for label, places in lines.items():
            order = sorted(places, key=lambda v: study.variants[v].labels)
            x = np.array([study.variants[v].labels for v in order])
            found_by[label] = (x, values[order].T)
        return found_by

    level = float(found.true_score.mean())
    panels = [
        Bands("return", against_labels(found.score.mean(axis=2)), "labels", "Greedy, at the end", level),
        Bands("order of segments told rightly", against_labels(found.agreement), "labels", "Learnt reward"),
    ]
    plain = [v for v, variant in enumerate(study.variants) if not variant.random and not variant.noisy]
    curves = {
        study.variants[v].method: (found.x, found.curve[v]) for v in plain or range(len(study.variants))
    }
    curves = {"true reward": (found.x, found.true_curve)} | curves

    def draw(path: Path) -> Path:
        return plot_bands(path, [*panels, Bands("return", curves, title="While training")], columns=3)

    return figure_section(
        "Figures",
        "Mean over seeds, and the range from the lowest to the highest. The dashed line is the true reward's.",
        {"Return and learnt reward against labels, and learning curves": draw},
        folder,
        "preferences",
    )


def _line_of(variant: Variant) -> str:
    if variant.noisy:
        return "disagreement, noisy labels"
    return "random queries" if variant.random else "disagreement"


def _rows(study: Study, found: Found, folder: RunFolder) -> list[Row]:
    """For the table of all tasks. The variants are trained in one program; each is given its share of its seconds."""
    base = f"python experiments/run.py control_preferences --env {study.config.env}"
    flags = {"labels": "", "random-labels": "", "noisy-labels": ""}
    known, learnt = (stage_seconds(folder, stage) for stage in ("true_reward", "preferences"))
    rows = [Row("true reward (ppo)", found.true_score.ravel(), None, known, base)]
    for v, variant in enumerate(study.variants):
        kind = "noisy-labels" if variant.noisy else "random-labels" if variant.random else "labels"
        given = flags | {kind: str(variant.labels)}
        command = " ".join([base, *(f"--{name} '{value}'" for name, value in given.items())])
        rows.append(Row(variant.method, found.score[v].ravel(), None, learnt / len(study.variants), command))
    return rows


def _scores(score_RN: np.ndarray, seed: int) -> list[str]:
    mean_R = score_RN.mean(axis=1)
    interval = nested_bootstrap_interval(list(score_RN), seed, resamples=1000)
    return [
        f"{mean_R.mean():.4g}",
        f"{interval.low:.4g} to {interval.high:.4g}",
        f"{mean_R.min():.4g}",
        f"{mean_R.max():.4g}",
    ]


def _mean(values: np.ndarray) -> float:
    """Of what is known; NaN where nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def _rounded(values: np.ndarray) -> str | None:
    mean = _mean(values)
    return f"{mean:.2f}" if np.isfinite(mean) else None
