"""The code of docs/reports.md runs, and its flags are those that there are."""

import re

from test_docs_q_learning import DOCS, blocks, run

from rlhfjax.tracking import TRACKERS


def test_a_report_of_ones_own(capsys):
    (block,) = blocks("reports.md")
    assert run(block, capsys) == "['report.html', 'report.md']\n"


def test_the_trackers_and_their_extras():
    rows = re.findall(
        r"^\| `(\w+)` \| `pip install \"rlhfjax\[(\w+)\]\"`", (DOCS / "reports.md").read_text(), re.M
    )
    assert dict(rows) == {name: choice.extra for name, choice in TRACKERS.items()}
