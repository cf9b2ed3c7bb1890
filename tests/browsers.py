"""Headless Chromium for the tests of pages, which are skipped without selenium or without Chromium and its driver.

The extra `browser` has selenium; Debian has the rest as `chromium` and `chromium-driver`.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason='needs selenium: pip install -e ".[browser]"')
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs Chromium: apt-get install chromium chromium-driver"
    ),
]
FLAGS = [
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "window-size=1100,800",
]


@contextmanager
def chromium(profile: Path, *logs: str) -> Iterator[Any]:
    """A browser with an empty profile, which keeps the logs named ("browser" is the console)."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"user-data-dir={profile}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", dict.fromkeys(logs, "ALL"))
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def until(browser: Any, reached: Callable[[], Any]) -> None:
    """Waits; what the page says is in the error where it takes longer than 15 s."""
    end = time.monotonic() + 15
    while not reached():
        assert time.monotonic() < end, browser.find_element("tag name", "body").text[:2000]
        time.sleep(0.02)
