"""The documentation site: its links, its contents, its API reference, and what its pages say of the code.

The site itself is built by `sphinx-build` (CONTRIBUTING.md); these tests need nothing of it.
"""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from test_docs_q_learning import DOCS, blocks, run

from experiments.run import main
from rlhfjax.algorithms import dpo, grpo, ilql, tabular_q
from rlhfjax.config import GRPO

sys.path.insert(0, str(DOCS))  # what makes the site lies beside its pages
api_pages, links = (importlib.import_module(name) for name in ("api_pages", "links"))

ROOT = DOCS.parent
PAGES = [*sorted(DOCS.glob("*.md")), *(ROOT / name for name in ("README.md", *links.INCLUDED))]
OURS = ("start", "concepts", "guides", "algorithms", "faq", "benchmarks", "index")


def headings(path: Path) -> set[str]:
    """The anchors that GitHub, and MyST, give the headings of a page."""
    lines = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "")).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_local_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in headings(file), target


def test_every_page_is_in_the_contents_once():
    index = (DOCS / "index.md").read_text()
    entries = [
        line for tree in re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL) for line in tree.splitlines()
    ]
    for page in DOCS.glob("*.md"):
        assert entries.count(page.stem) == (page.stem != "index"), f"{page.name}: a line in docs/index.md"


def test_links_become_those_of_the_site():
    page = DOCS / "guides.md"
    for given, expected in {
        "[a](mesh.md#axes)": "[a](/mesh.md#axes)",
        "[a](../CONTRIBUTING.md)": "[a](/generated/contributing.md)",
        "[a](../rlhfjax/ops/kl.py)": f"[a]({links.REPOSITORY}/blob/main/rlhfjax/ops/kl.py)",
        "[a](../rlhfjax/ops)": f"[a]({links.REPOSITORY}/tree/main/rlhfjax/ops)",
        "[a](#here) [b](https://jax.dev)": "[a](#here) [b](https://jax.dev)",
    }.items():
        assert links.to_site(given, page) == expected
    assert links.to_site("[a](docs/mesh.md)", ROOT / "CONTRIBUTING.md") == "[a](/mesh.md)"
    assert f"git clone {links.REPOSITORY} " in (ROOT / "README.md").read_text()


def test_every_public_name_is_on_a_page_of_the_reference():
    pages = api_pages.pages()
    assert len(pages) > 30 and {"rlhfjax.ops", "rlhfjax.algorithms.dpo", "rlhfjax.mesh"} <= set(pages)
    for module in api_pages.public_modules():
        for name in api_pages.public_names(module):
            shown = re.search(
                rf"^(\.\. (auto|py:)\w+:: {name}|\* :doc:`{module}.{name} <.*)$", pages[module], re.M
            )
            assert shown or name == "__version__", f"{module}.{name}"
        assert f"   {module}\n" in pages["index"]


def test_docstrings_as_restructuredtext():
    given = """What it is, `a * b`, of x* and y_ alone:

    loss = -min(a * b, c)

Args:
  reward: float [..., T], of |x|.
    A second line.

>>> 1 + 1
2

- a list that
  goes on"""
    text = "\n".join(api_pages.as_rst(given.splitlines()))
    assert "`a * b`, of x\\* and y\\_ alone:" in text
    assert "\n::\n\n      loss = -min(a * b, c)\n" in text
    assert "\n  reward: float [..., T], of \\|x\\|.\n    A second line.\n" in text
    assert "\n>>> 1 + 1\n2\n" in text and text.endswith("\n- a list that\n  goes on")


def test_fields_of_a_named_tuple_come_with_their_comments():
    text = "\n".join(api_pages.fields(grpo.Sample))
    assert "   logp: jax.Array  # behaviour\n" in text and text.endswith("   mask: jax.Array\n")


def table(page: str, head: str) -> list[list[str]]:
    """The rows of the table of a page that begins with `head`, as cells."""
    lines = (DOCS / f"{page}.md").read_text().partition(f"\n| {head}")[2].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_page_of_algorithms_names_all_there_are():
    text = (DOCS / "algorithms.md").read_text()
    for path in (ROOT / "rlhfjax" / "algorithms").iterdir():
        helper = path.stem in ("__init__", "algorithm", "exploration", "optimizers", "turns", "__pycache__")
        assert helper or f"(../rlhfjax/algorithms/{path.name})" in text, path.name
    assert {row[0].strip("`") for row in table("algorithms", "`loss`")} == set(dpo.LOSSES)
    assert {row[0].strip("`") for row in table("algorithms", "`method`")} == set(tabular_q.METHODS)
    assert all(f"`{name}`" in text for name in ilql.BOOTSTRAPS)


def test_the_methods_of_grpo_are_settings_that_exist():
    rows = table("algorithms", "method | settings of `GRPO`")
    assert len(rows) == 10
    for name, settings, _ in rows:
        pairs = re.findall(r"`(\w+)=([^`]+)`", settings)
        given: dict[str, Any] = {"length_constant": 1.0} | {key: eval(value) for key, value in pairs}
        config = GRPO(**given)
        grpo.make(lambda params, inputs: (inputs, inputs), None, config)  # type: ignore[arg-type]
        assert pairs or name in ("GRPO", "GDPO"), name


def test_figures_of_the_benchmarks_are_those_of_their_sources():
    sources = (ROOT / "README.md").read_text() + (
        ROOT / "experiments" / "benchmarks" / "README.md"
    ).read_text()
    known = set(re.findall(r"\d[\d,]*(?:\.\d+)?", sources.replace("| .", "| 0.")))
    prose = (DOCS / "benchmarks.md").read_text()
    figures = [
        x for line in prose.splitlines() if line.startswith("| ") for x in re.findall(r"\d[\d,]*\.?\d+", line)
    ]
    assert len(figures) > 50
    for figure in figures:
        assert figure in known, figure


def commands() -> list[str]:
    text = "\n".join((DOCS / f"{page}.md").read_text() for page in OURS)
    found = {x.split(" #")[0].strip() for x in re.findall(r"python experiments/run\.py([^\n`]*)", text)}
    return sorted(x for x in found if x and not re.search(r"--resume|mine\.yaml|NAME|\(", x))


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_pages_are_accepted(command, capsys):
    assert main([*command.split(), "--print-config"]) == 0
    assert capsys.readouterr().out


def test_the_code_of_the_concepts(capsys):
    (block,) = blocks("concepts.md")
    assert run(block, capsys).split() == ["1.3862944", "3.0", "True"]


@pytest.mark.slow
def test_the_code_of_the_guides(capsys):
    printed = run("\n".join(blocks("guides.md")), capsys).splitlines()
    assert printed[:4] == ["[0.0, -0.8]", "(8,)", "(4,)", "accuracy of the implicit reward 1.00"]
    policy = [float(x) for x in re.findall(r"\d\.\d+", printed[4])]
    assert policy == pytest.approx([0.0900, 0.2447, 0.6652], abs=1e-3)
