"""report.html and the comparison of runs in a real browser: what is drawn and read off, by pointer and by keyboard.

Without a browser they are skipped: `browsers`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import MARKS, chromium, until, webdriver

from experiments.options import write_yaml
from experiments.viewing.comparison import comparison_html
from experiments.viewing.groups import curves, group_runs
from experiments.viewing.runs import read_runs
from rlhfjax.report import Interval, Section, Table, write_report
from rlhfjax.run_folder import create

pytestmark = MARKS
HOSTILE = [
    "</script><script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\"> & &lt;b&gt;",
    "\u202ereversed\u202c \u2066isolated, \x1b[31mred <!-- אחת",
    "x" * 3000,
]
PIXEL = bytes.fromhex(  # a picture of one pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c63f80f00010101001bb6ee560000000049454e44ae426082"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile"), "browser", "performance") as driver:
        yield driver


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The report of a run of two stages: a value that is missing, another with none beside it, texts that mean harm."""
    run = create(tmp_path_factory.mktemp("run") / "run", "a: <b>\n", experiment="length", seed=0, exact=True)
    for step in range(1, 7):
        run.log_metrics("sft", step, {"loss/nll": 2.0 / step})
    for step in range(1, 13):
        alone = 4.0 if step % 5 == 0 else None
        metrics = {
            "objective/score": -1.23456 + step**0.5,
            "objective/kl": 0.5 * step,
            "policy/entropy": alone,
        }
        run.log_metrics("ppo", step, {name: float("nan") if x is None else x for name, x in metrics.items()})
        run.log_perf("ppo", step, {"tokens_per_second": 12345.6 + step})
    prompts = ["first prompt", HOSTILE[0], "third"]
    texts = [("one two three", "one 2 three"), (HOSTILE[0], HOSTILE[1]), ("b", HOSTILE[2])]
    rows = [
        {"prompt": p, "sft, greedy": a, "ppo, greedy": b} for p, (a, b) in zip(prompts, texts, strict=True)
    ]
    run.log_samples("validation", 0, rows)
    (run.path / "a.png").write_bytes(PIXEL)
    cells = [[HOSTILE[2], Interval(0.5, 0.4, 0.6), HOSTILE[0]], ["b", Interval(-1.5, -2.0, -1.0), HOSTILE[1]]]
    table = Table(["policy", "gold", "text"], cells)
    write_report(run.path, f"Report {HOSTILE[0]}", [Section("Results", "", table, [("a.png", HOSTILE[0])])])
    return run.path / "report.html"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    """Three seeds of two methods, each a stage of its own; one seed of the second stopped early."""
    folder = tmp_path_factory.mktemp("runs")
    for method, lead in (("ppo", 0.0), ("grpo", 0.2)):
        for seed in range(3):
            config = {"experiment": "summarize", "seed": seed, "algorithm": method}
            path = folder / f"{method}-s{seed}"
            run = create(path, write_yaml(config), experiment="summarize", seed=seed, exact=True)
            for step in range(1, 9 if (method, seed) != ("grpo", 2) else 4):
                score = lead + 0.1 * step + 0.05 * seed
                run.log_metrics(method, step, {"objective/score": score, "objective/kl": 0.3 * step})
            gold = {"sft": 0.1, method: 0.3 + lead + 0.01 * seed}
            numbers = {f"validation/{name}/gold": x for name, x in gold.items()}
            run.write_summary(numbers | {"validation/sft/kl": 0.0, f"validation/{method}/kl": 2.0 + lead})
            run.log_samples(
                "validation", 0, [{"prompt": "p", f"{method}, greedy": f"text of {method}, {seed}"}]
            )
    (folder / "page.html").write_text(comparison_html(read_runs([folder])))
    return folder / "page.html"


def opened(
    browser: Any, page: Path, *, width: int = 1100, scheme: str = "light", media: str = "screen"
) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get(page.as_uri())


def one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def texts(browser: Any, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((x) => x.textContent)"
    return browser.execute_script(script, selector)


def choose(browser: Any, view: str, label: str, words: str) -> None:
    """Chooses the option that reads `words`."""
    select = browser.find_element(
        "xpath", f"//figure[@data-view='{view}']//label[contains(., '{label}')]/select"
    )
    options = select.find_elements("tag name", "option")
    next(option for option in options if option.get_property("textContent") == words).click()


def press(browser: Any, keys: str) -> None:
    """To whatever has the focus."""
    browser.switch_to.active_element.send_keys(keys)


def told(browser: Any, view: str = "curves") -> str:
    return one(browser, f"figure.{view} output").text


def shapes(browser: Any, selector: str) -> list[tuple[str, list[tuple[float, float]], tuple[float, float]]]:
    """Of each path its text, its points, and the size of the drawing it stands in."""
    script = (
        "return [...document.querySelectorAll(arguments[0])].map((x) => "
        "[x.getAttribute('d'), x.ownerSVGElement.getAttribute('viewBox').split(' ').slice(2).map(Number)])"
    )
    found = []
    for path, (width, height) in browser.execute_script(script, selector):
        assert re.fullmatch(r"([ML]-?[\d.]+ -?[\d.]+|Z)+", path), f"no numbers: {path[:80]}"
        points = [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]
        found.append((path, points, (width, height)))
    return found


def in_view(points: list[tuple[float, float]], size: tuple[float, float]) -> bool:
    return all(0 <= x <= size[0] and 0 <= y <= size[1] for x, y in points)


def point_at(browser: Any, share: float) -> None:
    """The pointer over the drawing of curves, at a share of its width."""
    svg = one(browser, "figure.curves svg[role=img]")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", svg)
    width = svg.rect["width"]
    webdriver.ActionChains(browser).move_to_element_with_offset(
        svg, round(width * share - width / 2), 0
    ).perform()


def test_curves_are_what_was_logged(browser, report):
    opened(browser, report)
    logged = [json.loads(line) for line in (report.parent / "metrics.jsonl").read_text().splitlines()]
    score = {line["step"]: line["objective/score"] for line in logged if line["stage"] == "ppo"}
    ((path, points, size),) = shapes(browser, "figure.curves path.curve")
    assert len(points) == 12 and in_view(points, size) and path.count("M") == 1
    xs, ys = zip(*points, strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys, reverse=True)  # the score rises
    spans = [(score[step] - score[1]) / (score[12] - score[1]) for step in score]
    assert [(y - ys[0]) / (ys[-1] - ys[0]) for y in ys] == pytest.approx(spans, abs=0.01)
    assert texts(browser, "figure.curves svg text.name") == ["step", "ppo: objective/score"]
    read = set()
    for share in (0.05, 0.3, 0.62, 0.99):
        point_at(browser, share)
        words = re.fullmatch(r"step (\d+); objective/score (.+)", told(browser))
        assert words and float(words[2]) == float(f"{score[int(words[1])]:.4g}")
        read.add(int(words[1]))
        assert float(one(browser, "figure.curves circle.s0").get_attribute("cx")) == pytest.approx(
            xs[int(words[1]) - 1], abs=0.1
        )
    assert len(read) == 4 and {1, 12} <= read


def test_controls_change_what_is_shown(browser, report):
    opened(browser, report)
    choose(browser, "curves", "metric", "objective/kl")
    assert told(browser) == "step 12; objective/kl 6"
    assert texts(browser, "figure.curves svg text.name")[1] == "ppo: objective/kl (nats a sequence)"
    choose(browser, "curves", "metric", "perf/tokens_per_second")
    assert told(browser) == "step 12; perf/tokens_per_second 12,358"
    choose(browser, "curves", "metric", "policy/entropy")  # two values with nothing beside them
    assert len(browser.find_elements("css selector", "figure.curves circle.alone")) == 2
    choose(browser, "curves", "metric", "objective/score")
    choose(browser, "curves", "against", "objective/kl")
    assert texts(browser, "figure.curves svg text.name")[0] == "objective/kl (nats a sequence)"
    assert told(browser) == "objective/kl 6; objective/score 2.23"
    before = shapes(browser, "figure.curves path.curve")[0][0]
    one(browser, "figure.curves input[type=checkbox]").click()
    assert shapes(browser, "figure.curves path.curve")[0][0] != before and "means of 3 points" in told(
        browser
    )
    choose(browser, "curves", "stage", "sft")
    assert one(browser, "figure.curves label:nth-child(2) select").text.split() == ["loss/nll"]
    one(browser, "figure.curves summary").click()
    until(browser, lambda: texts(browser, "figure.curves details tbody tr"))
    rows = texts(browser, "figure.curves details tbody tr")
    assert len(rows) == 6 and rows[0].startswith("11.5")  # step 1: the mean of 2 and 1
    choose(browser, "curves", "stage", "all stages")
    assert set(one(browser, "figure.curves label:nth-child(2) select").text.split()) >= {
        "loss/nll",
        "objective/kl",
    }


def test_samples_are_marked_and_paged(browser, report):
    opened(browser, report)
    assert texts(browser, ".pair h3") == ["validation: sft, greedy", "validation: ppo, greedy"]
    assert texts(browser, ".pair .text") == ["one two three", "one 2 three"]
    assert (texts(browser, "del"), texts(browser, "ins")) == (["two"], ["2"])
    one(browser, "figure.samples input[type=checkbox]").click()
    assert texts(browser, "del, ins") == [] and texts(browser, ".pair .text")[1] == "one 2 three"
    for expected in ("b", HOSTILE[0]):  # back from the first is the last
        browser.find_element("xpath", "//button[. = 'previous']").click()
        assert texts(browser, ".pair .text")[0] == expected
    browser.find_element("xpath", "//button[. = 'next']").click()
    assert texts(browser, ".pair .text") == ["b", HOSTILE[2]]
    choose(browser, "samples", "prompt", "first prompt")
    choose(browser, "samples", "right", "validation: sft, greedy")
    assert texts(browser, ".pair h3") == ["validation: sft, greedy"]


def test_by_keyboard_alone(browser, report):
    opened(browser, report)
    reached = []
    for _ in range(40):
        press(browser, "\ue004")  # Tab
        script = (
            "const x = document.activeElement, style = getComputedStyle(x);"
            "return [x.tagName + (x.type ? ':' + x.type : ''), style.outlineStyle !== 'none', x.className]"
        )
        name, outlined, kind = browser.execute_script(script)
        if name == "BODY" or (reached and kind == "skip"):
            break
        assert outlined, f"nothing shows that {name} has the focus"
        reached.append(name)
        if name == "INPUT:range":
            press(browser, "\ue012\ue012")  # two to the left
            assert told(browser).startswith("step 10; ")
        if (
            reached.count("BUTTON:submit") == 0
            and name == "BUTTON:button"
            and reached.count("BUTTON:button") == 2
        ):
            press(browser, "\ue007")  # Enter: by gold, ascending
            assert texts(browser, "table.sortable tbody th") == ["b", HOSTILE[2]]
            press(browser, "\ue00d")  # and the space bar, descending
            assert texts(browser, "table.sortable tbody th") == [HOSTILE[2], "b"]
            assert one(browser, "th[aria-sort]").get_attribute("aria-sort") == "descending"
    kinds = {"A", "BUTTON:button", "SELECT:select-one", "INPUT:checkbox", "INPUT:range", "SUMMARY"}
    assert kinds <= set(reached) and reached.count("SELECT:select-one") == 6 and reached[0] == "A"


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_nothing_is_loaded_nothing_fails_and_texts_are_texts(browser, request, name):
    for log in ("browser", "performance"):
        browser.get_log(log)
    opened(browser, request.getfixturevalue(name))
    if name == "report":
        choose(browser, "samples", "prompt", HOSTILE[0][:70])
        assert browser.title.startswith("Report </script>") and texts(browser, "h1") == [browser.title]
        assert texts(browser, ".pair .text")[0] == HOSTILE[0] == texts(browser, ".prompt .text")[0]
        right = texts(browser, ".pair .text")[1]
        assert right == "\\u202ereversed\\u202c \\u2066isolated, \\x1b[31mred <!-- אחת"
        assert len(browser.find_elements("css selector", "img")) == 1
        assert one(browser, "img").get_property("naturalWidth") == 1
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked and {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in asked) == 1  # the page itself
    assert browser.get_log("browser") == []


CONTRAST = """
const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const behind = (x) => {
  for (; x; x = x.parentElement) {
    const back = numbers(getComputedStyle(x).backgroundColor);
    if (back.length < 4 || back[3] > 0) return back;
  }
  return [255, 255, 255];
};
const found = [];
for (const x of document.querySelectorAll("body *")) {
  const own = [...x.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || !x.getClientRects().length || x.closest(".unseen, script, .skip, option")) continue;
  const style = getComputedStyle(x), colour = numbers(x.namespaceURI.endsWith("svg") ? style.fill : style.color);
  const [a, b] = [light(colour), light(behind(x))].sort((p, q) => q - p);
  found.push([(a + 0.05) / (b + 0.05), `${x.tagName} ${x.textContent.slice(0, 40)}`]);
}
return found;
"""


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(browser, request, name, scheme):
    opened(browser, request.getfixturevalue(name), scheme=scheme)
    back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back))) > 384) == (scheme == "light")
    found = browser.execute_script(CONTRAST)
    assert len(found) > 30 and min(found)[0] >= 4.5, min(found)  # WCAG 2.2, level AA
    colours = {one(browser, "figure.curves path.curve").value_of_css_property("stroke")}
    assert back not in colours


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_phone_does_not_scroll_sideways(browser, request, name):
    opened(browser, request.getfixturevalue(name), width=360)
    wide, seen = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert (wide, seen) == (360, 360)
    outside = """
    const shown = document.querySelectorAll("select, button, input, svg, h1, h2, p, output, .pair > div");
    return [...shown].filter((x) => !x.closest(".scroll, .unseen") && x.getBoundingClientRect().right > innerWidth + 1)
        .map((x) => x.outerHTML.slice(0, 80));
    """
    assert browser.execute_script(outside) == []
    assert one(browser, "figure.curves svg[role=img]").rect["height"] > 200
    sizes = "return [...document.querySelectorAll('svg text')].map((x) => x.getBoundingClientRect().height)"
    assert min(browser.execute_script(sizes)) >= 9, "the words of a drawing are too small to be read"


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_on_paper_nothing_is_cut_and_the_curve_has_its_name(browser, request, name):
    opened(browser, request.getfixturevalue(name), width=720, scheme="dark", media="print")
    assert not [x for x in browser.find_elements("css selector", ".choices, input, nav") if x.is_displayed()]
    assert texts(browser, "figure.curves svg text.name")[1].endswith("objective/score")
    colour = one(browser, "p, td").value_of_css_property("color")
    assert sum(map(int, re.findall(r"\d+", colour)[:3])) < 150, "light text on white paper"
    cut = """
    const right = document.body.getBoundingClientRect().right + 1;
    return [...document.querySelectorAll(".scroll table, .scroll img, pre")]
        .filter((x) => x.getClientRects().length && x.getBoundingClientRect().right > right)
        .map((x) => x.outerHTML.slice(0, 80));
    """
    assert browser.execute_script(cut) == []


def test_seeds_of_two_methods_on_one_plot(browser, comparison):
    opened(browser, comparison)
    groups = {group.label: curves(group) for group in group_runs(read_runs([comparison.parent]))}
    legend = texts(browser, "figure.curves .legend li")
    assert legend == ["algorithm grpo, grpo", "algorithm ppo, ppo"]  # each method is a stage of its own
    drawn, bands = (shapes(browser, f"figure.curves path.{kind}") for kind in ("curve", "band"))
    assert [len(points) for _, points, _ in drawn] == [8, 8] and all(
        in_view(*x[1:]) for x in (*drawn, *bands)
    )
    assert [len(points) for _, points, _ in bands] == [16, 16] and all(x[0].endswith("Z") for x in bands)
    for share, step in ((0.99, 8), (0.05, 1)):
        point_at(browser, share)
        for label, stages in groups.items():
            (curve,) = stages.values()
            at = [curve[kind]["objective/score"][step - 1] for kind in ("values", "low", "high")]
            mean, low, high = (f"{x:.4g}" for x in at)
            assert f"{label}, {label.split()[1]}: {mean} [{low}, {high}]" in told(browser)
        assert told(browser).startswith(f"step {step}; ")


def test_the_frontier_has_its_points_their_names_and_their_intervals(browser, comparison):
    opened(browser, comparison)
    assert texts(browser, "figure.points svg text.name") == ["KL, nats", "gold"]
    names = texts(browser, "figure.points svg text.point")
    assert sorted(names) == ["grpo", "ppo", "sft"]  # that of both settings once
    marks = browser.find_elements("css selector", "figure.points circle.mark")
    width, height = map(float, one(browser, "figure.points svg").get_dom_attribute("viewBox").split()[2:])
    places = [(float(x.get_attribute("cx")), float(x.get_attribute("cy"))) for x in marks]
    assert len(marks) == 4 and in_view(places, (width, height))
    assert sum("ring" in x.get_attribute("class") for x in marks) == 1  # the one that lies on another
    arms = browser.find_elements("css selector", "figure.points line.arm")
    assert len(arms) == 4
    webdriver.ActionChains(browser).move_to_element(marks[1]).perform()
    assert told(browser, "points") == "algorithm grpo: validation/grpo: gold 0.51 [0.5, 0.52], KL, nats 2.2"
    assert "1 run is" not in one(browser, "body").text and "6 runs, 2 settings." in one(browser, "body").text
