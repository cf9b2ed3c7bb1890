"""Reports: intervals against closed forms, calibration, hostile text in Markdown, what the figures show."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt

from rlhfjax import figures, report
from rlhfjax.report import Interval, Section, Table


def test_bootstrap_of_the_mean_agrees_with_the_normal_interval():
    """For many items the bootstrap interval of a mean tends to mean +- 1.96 s / sqrt(N)."""
    values = np.random.default_rng(0).gamma(2.0, size=2000)
    found = report.bootstrap_interval(values, seed=1, resamples=20_000)
    half = 1.959964 * values.std() / math.sqrt(values.size)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05 * half)
    ninety = report.bootstrap_interval(values, seed=1, confidence=0.9, resamples=20_000)
    assert (ninety.high - ninety.low) == pytest.approx(2 * 1.644854 * half / 1.959964, rel=0.05)


def test_bootstrap_of_two_items_is_exact():
    """Two items a < b: the resampled mean is a, (a+b)/2, b with probability 1/4, 1/2, 1/4."""
    assert report.bootstrap_interval([1.0, 3.0], seed=0) == (2.0, 1.0, 3.0)
    assert report.bootstrap_interval([1.0, 3.0], seed=0, confidence=0.3) == (2.0, 2.0, 2.0)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    generator, covered = np.random.default_rng(2), 0
    for seed in range(200):
        found = report.bootstrap_interval(generator.normal(size=50), seed, confidence=0.8, resamples=400)
        covered += found.low <= 0.0 <= found.high
    assert 0.8 - 0.09 < covered / 200 < 0.8 + 0.09  # three standard errors


def test_bootstrap_is_repeatable_takes_any_statistic():
    values = np.random.default_rng(3).normal(size=31)
    first = report.bootstrap_interval(values, seed=5, statistic=np.median)
    assert first == report.bootstrap_interval(values, seed=5, statistic=np.median)
    assert report.bootstrap_interval(values, seed=5) != report.bootstrap_interval(values, seed=6)
    assert first.value == np.median(values) and first.low < first.value < first.high
    one = report.bootstrap_interval([4.0], seed=0)
    assert one.value == 4.0 and math.isnan(one.low) and math.isnan(one.high)


def test_nested_bootstrap_holds_the_spread_of_items_and_of_runs():
    """Its variance is (spread of the runs' means / R + mean spread of the items / (R n)), each as resampled."""
    generator = np.random.default_rng(6)
    groups = [generator.normal(mean, 1.0, 200) for mean in (0.0, 0.5, 1.0, 1.5)]
    found = report.nested_bootstrap_interval(groups, seed=0, resamples=4000)
    means = [group.mean() for group in groups]
    variance = np.var(means) / 4 + np.mean([group.var() / 200 for group in groups]) / 4
    assert found.value == pytest.approx(np.mean(means))
    assert found.high - found.low == pytest.approx(2 * 1.959964 * math.sqrt(variance), rel=0.06)
    same = [groups[0]] * 4  # no spread between runs: that of items alone is left
    narrow = report.nested_bootstrap_interval(same, seed=0, resamples=4000)
    assert narrow.high - narrow.low == pytest.approx(
        2 * 1.959964 * groups[0].std() / math.sqrt(800), rel=0.06
    )
    assert report.nested_bootstrap_interval(groups[:1], seed=3) == report.bootstrap_interval(
        groups[0], seed=3
    )
    uneven = report.nested_bootstrap_interval([[0.0, 0.0, 0.0], [1.0]], seed=0)
    assert uneven == (0.5, 0.0, 1.0)  # a run counts once, however many items it has


def test_paired_difference_takes_out_what_pairs_share():
    generator = np.random.default_rng(4)
    prompt = generator.normal(size=400)
    better, worse = prompt + generator.normal(0.05, 0.1, 400), prompt + generator.normal(0, 0.1, 400)
    found = report.paired_difference_interval(better, worse, seed=0)
    half = 1.959964 * (better - worse).std() / 20
    assert found.value == pytest.approx((better - worse).mean())
    assert found.low == pytest.approx(found.value - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.1 * half)
    assert report.paired_difference_interval(worse, better, seed=0).value == pytest.approx(-found.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: report.bootstrap_interval([], 0), "values is empty"),
        (lambda: report.bootstrap_interval([1.0, math.nan], 0), r"values\[1\] is nan"),
        (lambda: report.bootstrap_interval([[1.0]], 0), r"shape is \(1, 1\)"),
        (lambda: report.bootstrap_interval([1.0], 0, confidence=95), "between 0 and 1, not 95"),
        (
            lambda: report.paired_difference_interval([1.0, 2.0], [1.0], 0),
            "values has 2 items and baseline 1",
        ),
        (lambda: report.paired_difference_interval([1.0], [math.inf], 0), r"baseline\[0\] is inf"),
        (lambda: report.nested_bootstrap_interval([], 0), "no groups"),
        (lambda: report.nested_bootstrap_interval([[1.0], [math.nan]], 0), r"group 1\[0\] is nan"),
        (lambda: report.wilson_interval(3, 2), "3 successes of 2 trials"),
        (lambda: report.calibration([1.2], [1]), r"probability must lie in \[0, 1\]"),
        (lambda: report.calibration([0.2], [0.5]), "outcome must be 0 or 1; it holds 0.5"),
        (lambda: report.calibration([0.2, 0.3], [1]), "probability has 2 items and outcome 1"),
        (lambda: report.markdown_table(Table(["a", "b"], [[1, 2], [1]])), "row 1 has 1 cells, the header 2"),
    ],
)
def test_bad_input_is_named(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (1, 1), (3, 10), (50, 50)])
def test_wilson_interval_solves_its_defining_equation(successes: int, trials: int):
    """At its ends p the observed share x is z standard errors away: |x - p| = z sqrt(p (1-p) / n)."""
    found = report.wilson_interval(successes, trials)
    assert found.value == successes / trials
    for end in found[1:]:
        assert (found.value - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / trials, abs=1e-12)
    assert found.low <= found.value <= found.high


def test_calibration_counts_by_hand():
    bins = report.calibration(
        [0.0, 0.24, 0.25, 0.9, 1.0, 1.0], [False, True, True, True, True, False], bins=4
    )
    assert [entry.count for entry in bins] == [2, 1, 0, 3]
    assert [entry.observed.value for entry in bins[:2]] == [0.5, 1.0] and math.isnan(bins[2].predicted)
    assert bins[3].predicted == pytest.approx(2.9 / 3) and bins[3].observed == report.wilson_interval(2, 3)
    by_hand = (2 * abs(0.5 - 0.12) + 1 * 0.75 + 3 * abs(2 / 3 - 2.9 / 3)) / 6
    assert report.calibration_error(bins) == pytest.approx(by_hand)


HOSTILE = "a|b\n\r\n<script>x</script> ![i](u) `c` **b** _e_ $m$ ~s~ \\ &amp; \x1b[31m \ud800 #h"


def test_hostile_text_stays_in_its_cell():
    rows = [[HOSTILE, 1], ["|" * 5, 2], ["\\|", 3]]
    lines = report.markdown_table(Table(["text", "n"], rows)).splitlines()
    assert len(lines) == 2 + len(rows)
    for line in lines:
        # A pipe divides cells unless an odd number of backslashes stands before it.
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3, line
    text = report.markdown_text(HOSTILE)
    assert (
        "<script" not in text and "&lt;script&gt;" in text and "&amp;amp;" in text and text.count("<br>") == 2
    )
    assert "\\x1b" in text and "\\ud800" in text and "\x1b" not in text
    assert not re.search(r"(?<!\\)[*_`\[\]$~#!|]", text)
    text.encode()  # no lone surrogate is left


def test_hostile_text_survives_a_markdown_reader():
    table = report.markdown_table(Table(["text"], [[HOSTILE.replace("\n", " ").replace("\r", "")]]))
    html = MarkdownIt("gfm-like", {"linkify": False}).render(table)
    assert html.count("<td>") == 1 and not re.search(r"<(script|img|em|strong|code|s|a)\b", html)
    assert "![i](u) `c` **b** _e_ $m$ ~s~ \\ &amp;amp; \\x1b[31m" in html


def test_cells_show_numbers_and_missing_values():
    rows = [
        [
            0.123456,
            12,
            None,
            True,
            Interval(0.3134, 0.3011, 0.3257),
            float("nan"),
            np.float32(2.5),
            np.bool_(False),
        ]
    ]
    line = report.markdown_table(Table(list("abcdefgh"), rows)).splitlines()[-1]
    assert line == "| 0.1235 | 12 |  | yes | 0.313 [0.301, 0.326] |  | 2.5 | no |"
    assert str(Interval(123.4, 100.0, 150.0)) == "123 [100, 150]"
    assert str(Interval(0.5, math.nan, math.nan)) == "0.5 (one item)"
    assert report.markdown_text("abcdef", longest=4) == "abc…"


def test_write_report(tmp_path: Path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a b.png").write_bytes(b"")
    sections = [
        Section(
            "Results",
            "Some *words*.",
            Table(["policy", "gold"], [["SFT", 0.21]]),
            [("figures/a b.png", "A | b")],
        ),
        Section("Absolute", figures=[(tmp_path / "figures" / "a b.png", "again")]),
    ]
    path = report.write_report(tmp_path, "summarize, seed 0", sections)
    assert path == tmp_path / "report.md"
    assert path.read_text() == (
        "# summarize, seed 0\n\n## Results\n\nSome *words*.\n\n"
        "| policy | gold |\n| --- | --- |\n| SFT | 0.21 |\n\n"
        "![A \\| b](<figures/a b.png>)\n\n*A \\| b*\n\n## Absolute\n\n"
        "![again](<figures/a b.png>)\n\n*again*\n"
    )
    with pytest.raises(FileNotFoundError, match="section 'Lost' shows the figure .*nowhere.png"):
        report.write_report(tmp_path, "title", [Section("Lost", figures=[("nowhere.png", "")])])
    assert path.read_text().startswith("# summarize"), "a failed report destroyed the one before it"


def test_figures_may_begin_with_the_folder_as_it_is_given(tmp_path, monkeypatch):
    """As drawing functions return them in a run whose folder is named from where the program runs."""
    (tmp_path / "runs" / "one" / "figures").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "figures" / "a.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for path in ("runs/one/figures/a.png", "figures/a.png"):
        written = report.write_report("runs/one", "title", [Section("Drawn", figures=[(path, "a")])])
        assert "![a](<figures/a.png>)" in written.read_text()


def test_running_mean_is_centred_and_skips_gaps():
    values = np.asarray([1.0, 2.0, math.nan, 4.0, 9.0, math.nan, math.nan, math.nan])
    expected = []
    for t in range(values.size):
        near = values[max(0, t - 1) : t + 2]
        near = near[np.isfinite(near)]
        expected.append(near.mean() if near.size else math.nan)
    np.testing.assert_allclose(figures.running_mean(values, 3), expected)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that is saved while the test runs."""
    from matplotlib.figure import Figure

    seen, save = [], Figure.savefig

    def savefig(figure: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


def numbers(data: Any) -> np.ndarray:
    return np.asarray(data, np.float64)  # error bars keep theirs as objects


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 5000


def test_panels(tmp_path: Path, drawn: list[Any]):
    x = np.arange(200.0)
    panels = [
        figures.Panel("loss (nats)", {"train": (x, np.sin(x)), "held out": ([0, 100], [1.0, None])}),
        figures.Panel("reward", {"": (x[:10], x[:10])}, title="PPO $"),
    ]
    assert is_png(figures.plot_panels(tmp_path / "new" / "curves.png", panels))
    loss, reward = drawn[0].axes
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("step", "loss (nats)")
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train", "held out"]
    assert loss.get_title("left") == "running mean of 7 points" and reward.get_title("left") == "PPO $"
    assert reward.get_legend() is None
    np.testing.assert_array_equal(reward.lines[0].get_ydata(), x[:10])
    for wrong in ([], [figures.Panel("y", {})], [figures.Panel("y", {"a": ([1, 2], [1])})]):
        with pytest.raises(ValueError, match="nothing to plot|'a' has 2 values of x and 1 of y"):
            figures.plot_panels(tmp_path / "wrong.png", wrong)
    again = figures.plot_panels(tmp_path / "again.png", panels)
    assert again.read_bytes() == (tmp_path / "new" / "curves.png").read_bytes()


def test_intervals(tmp_path: Path, drawn: list[Any]):
    panels = {
        "one": {"a": Interval(0.5, 0.4, 0.7), "b": Interval(0.6, math.nan, math.nan)},
        "two": {"a": Interval(-3.0, -4.0, -1.0)},
    }
    assert is_png(figures.plot_intervals(tmp_path / "intervals.png", panels))
    one, two = drawn[0].axes
    assert [tick.get_text() for tick in one.get_yticklabels()] == ["a", "b"]
    bars = [container.lines[2][0].get_segments() for container in one.containers]
    np.testing.assert_allclose(numbers(bars[0])[0, :, 0], [0.4, 0.7])
    np.testing.assert_allclose(numbers(bars[1])[0, :, 0], [0.6, 0.6])  # no ends, no arms
    assert numbers(one.lines[0].get_xdata())[0] == 0.5 and two.get_title(loc="left") == "two"
    with pytest.raises(ValueError, match="nothing to plot"):
        figures.plot_intervals(tmp_path / "none.png", {"one": {}})


def test_gold_against_kl_labels_every_policy_and_no_label_covers_another(tmp_path: Path, drawn: list[Any]):
    def policy(label: str, group: str, kl: float, gold: float) -> figures.EvaluatedPolicy:
        return figures.EvaluatedPolicy(label, group, kl, Interval(gold, gold - 0.01, gold + 0.01))

    policies = [
        policy("SFT", "SFT", 0.0, 0.21),
        policy("greedy", "SFT", 0.1, 0.212),
        policy("$\\low$ beta", "PPO", 9.0, 0.1),
    ]
    policies += [policy(f"best of {n}", "best of n", math.log(n), 0.2 + 0.01 * n) for n in (8, 2, 4)]
    policies += [figures.EvaluatedPolicy("lonely", "one", 5.0, Interval(0.2, math.nan, math.nan))]
    assert is_png(figures.plot_gold_against_kl(tmp_path / "gold.png", policies))
    axis = drawn[0].axes[0]
    assert sorted(text.get_text() for text in axis.texts) == sorted(policy.label for policy in policies)
    boxes = [text.get_window_extent() for text in axis.texts]
    assert not any(left.overlaps(right) for i, left in enumerate(boxes) for right in boxes[:i])
    best_of_n = next(bar for bar in axis.containers if bar.get_label() == "best of n")
    np.testing.assert_allclose(
        numbers(best_of_n.lines[0].get_xdata()), np.log([2, 4, 8])
    )  # joined in order of KL
    np.testing.assert_allclose(numbers(best_of_n.lines[0].get_ydata()), [0.22, 0.24, 0.28])
    ends = best_of_n.lines[2][0].get_segments()[0][:, 1]
    np.testing.assert_allclose(ends, [0.21, 0.23])
    with pytest.raises(ValueError, match="no policies"):
        figures.plot_gold_against_kl(tmp_path / "gold.png", [])


def test_calibration_figure_shows_the_filled_bins(tmp_path: Path, drawn: list[Any]):
    bins = report.calibration([0.1, 0.1, 0.9], [0, 1, 1], bins=5)
    assert is_png(figures.plot_calibration(tmp_path / "calibration.png", bins))
    upper, lower = drawn[0].axes
    observed = upper.containers[0]
    np.testing.assert_allclose(numbers(observed.lines[0].get_xydata()), [[0.1, 0.5], [0.9, 1.0]])
    assert [bar.get_height() for bar in lower.containers[0]] == [2, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="every bin is empty"):
        figures.plot_calibration(tmp_path / "calibration.png", [bins[1]])


def test_overoptimisation_marks_the_best_gold(tmp_path: Path, drawn: list[Any]):
    learned = [Interval(v, v - 1, v + 1) for v in (0.0, 1.0, 2.0)]
    gold = [Interval(v, v - 1, v + 1) for v in (5.0, 7.0, 6.0)]
    assert is_png(figures.plot_overoptimisation(tmp_path / "over.png", [0.0, 2.0, 8.0], learned, gold))
    upper, lower = drawn[0].axes
    np.testing.assert_allclose(numbers(upper.containers[0].lines[0].get_ydata()), [0, 1, 2])
    np.testing.assert_allclose(numbers(lower.containers[0].lines[0].get_ydata()), [5, 7, 6])
    assert list(lower.lines[-1].get_xdata()) == [2.0, 2.0]
    with pytest.raises(ValueError, match="equally many points, at least one: 1, 1, 0"):
        figures.plot_overoptimisation(tmp_path / "over.png", [0.0], learned[:1], [])


def test_missing_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "rlhfjax\[plot\]"'):
        figures.plot_panels(tmp_path / "a.png", [figures.Panel("y", {"": ([0], [0])})])
