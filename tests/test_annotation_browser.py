"""The annotation page in a real browser: by keyboard alone, with texts that mean harm, and with the server gone.

Without a browser they are skipped: `browsers`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browsers import MARKS, chromium, until

from experiments.annotation.items import Item
from experiments.annotation.server import make_server
from experiments.annotation.session import Session
from experiments.annotation.store import open_store
from rlhfjax.data import read_labels

pytestmark = MARKS
HOSTILE = [
    "<script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\">",
    "\u202ereversed\u202c, nothing\u0000, \u001b[31mred, &lt;b&gt; javascript:alert(1)",
    "",
    "x" * 100_000,
]
ITEMS = [
    Item("plain", "<b>Which?</b>", ("one", "two"), ("sft", "ppo")),
    Item("script", "a prompt\nof two lines", (HOSTILE[0], HOSTILE[1]), ("sft", "ppo")),
    Item("long", "another", (HOSTILE[2], HOSTILE[3]), ("sft", "ppo")),
    Item("last", "the last", ("אחת", "two", "three"), None),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile"), "browser") as driver:
        yield driver


@contextmanager
def serving(path: Path, **settings: Any) -> Iterator[str]:
    session = Session(ITEMS, [], open_store(path), **{"repeats": 0.0, **settings})
    server, address = make_server(session, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def press(browser: Any, keys: str) -> None:
    """To whatever has the focus."""
    browser.switch_to.active_element.send_keys(keys)


def text_of(browser: Any, name: str) -> str:
    return browser.execute_script(f"return document.getElementById({name!r}).textContent")


def texts(browser: Any) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll('article .text')].map(x => x.textContent)"
    )


def shows(browser: Any, progress: str) -> None:
    until(browser, lambda: text_of(browser, "progress") == progress)


def test_by_keyboard_alone_and_against_hostile_texts(browser, tmp_path):
    path = tmp_path / "labels.jsonl"
    with serving(path) as address:
        browser.get(address)
        until(browser, lambda: browser.switch_to.active_element.get_attribute("id") == "name")
        press(browser, "ada 1\n")  # the 1 is a letter here, no answer
        shows(browser, "1 of 4")
        assert text_of(browser, "prompt") == "<b>Which?</b>" and sorted(texts(browser)) == ["one", "two"]
        assert browser.switch_to.active_element.get_attribute("id") == "prompt-title"
        first = texts(browser)
        press(browser, "2")
        shows(browser, "2 of 4")
        shown = HOSTILE[1].replace("\u202e", "U+202E").replace("\u202c", "U+202C")
        shown = shown.replace("\u0000", "U+0000").replace("\u001b", "U+001B")
        assert sorted(texts(browser)) == sorted([HOSTILE[0], shown])
        press(browser, "u")
        shows(browser, "1 of 4")
        assert texts(browser) == first and "Taken back" in text_of(browser, "notice")
        press(browser, "9")  # there is no ninth
        press(browser, "1")
        shows(browser, "2 of 4")
        press(browser, "0")
        shows(browser, "3 of 4")
        assert sorted(map(len, texts(browser))) == [len("(no text)"), 100_000]
        press(browser, "\ue004" * 6 + "\n")  # by tab: prompt, completion, button, completion, button, tie
        shows(browser, "4 of 4")
        press(browser, "3")
        until(browser, lambda: browser.switch_to.active_element.get_attribute("id") == "end-title")
        assert browser.title == "Which is better?"
        assert browser.execute_script("return document.scripts.length + document.images.length") == 1
        assert [
            x for x in browser.get_log("browser") if x["level"] == "SEVERE"
        ] == []  # nothing refused by the policy
        browser.refresh()  # the name is remembered
        until(browser, lambda: text_of(browser, "progress") == "4 of 4 answered")
    labels = {x.item: x for x in read_labels(path)}
    assert [labels[x.id].choice for x in ITEMS[1:3]] == ["tie", "tie"]
    assert {x.annotator for x in labels.values()} == {"ada 1"}
    one, last = labels["plain"], labels["last"]
    assert one.choice == one.shown[0] and last.choice == last.shown[2]
    assert all(x.seconds > 0 for x in labels.values())


def test_a_server_that_does_not_answer_is_said_and_the_answer_given_again(browser, tmp_path):
    path = tmp_path / "labels.jsonl"
    conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.enable", {})
    with serving(path, annotator="ada") as address:
        browser.get(address)
        shows(browser, "1 of 4")
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", conditions | {"offline": True})
        press(browser, "1")
        until(browser, lambda: "Nothing is lost" in text_of(browser, "error"))
        assert read_labels(path) == [] and text_of(browser, "progress") == "1 of 4"
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", conditions | {"offline": False})
        press(browser, "1")
        shows(browser, "2 of 4")
        assert text_of(browser, "error") == ""
    assert len(read_labels(path)) == 1


def test_a_narrow_dark_screen_and_a_screen_reader(browser, tmp_path):
    with serving(tmp_path / "labels.jsonl", annotator="ada") as address:
        size = {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": True}
        scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
        browser.get(address)
        shows(browser, "1 of 4")
        for progress in ("2 of 4", "3 of 4"):
            press(browser, "1")
            shows(browser, progress)
        browser.find_element("css selector", "summary").click()
        until(browser, lambda: len(browser.find_elements("css selector", "#tables table")) == 3)
        # The long line is on the page, and so are the tables: neither makes it wider than the screen.
        assert browser.execute_script("return document.documentElement.scrollWidth") == 320
        ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(20, 24, 27)"
        nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    found = [(x["role"]["value"], x.get("name", {}).get("value", "")) for x in nodes if not x["ignored"]]
    names = {role: [name for r, name in found if r == role] for role, _ in found}
    assert sorted(names["heading"]) == sorted(["Which is better?", "Prompt", "Completion 1", "Completion 2"])
    choices = {"1 Completion 1 is better", "2 Completion 2 is better", "0 About equal", "s Skip"}
    assert set(names["button"]) == {*choices, "u Undo the last answer"}
    assert set(names["region"]) >= {"Prompt", "Completion 1", "Completion 2", "Agreement", "Systems"}
    assert names["progressbar" if "progressbar" in names else "ProgressIndicator"] == ["Pairs answered"]
    assert "main" in names and len(names["status"]) == 2
    assert browser.execute_script("return document.documentElement.lang") == "en"
