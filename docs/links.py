"""Links of the pages: what they must be on the site, which has not the files of the repository around it."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
REPOSITORY = "https://github.com/rlhfjax/rlhfjax"
# Files of the repository that are pages of the site too.
INCLUDED = {
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "experiments/benchmarks/README.md": "benchmarks_readme",
}


def to_site(text: str, page: Path) -> str:
    """The links of `page`, a file of the repository that holds `text`, as they must be for the site."""

    def link(found: re.Match[str]) -> str:
        target, _, anchor = found[1].partition("#")
        path = (page.parent / target).resolve()
        if "://" in target or not target or not path.is_relative_to(ROOT):
            return found[0]
        anchor, name = f"#{anchor}" if anchor else "", path.relative_to(ROOT).as_posix()
        if name in INCLUDED:
            return f"](/generated/{INCLUDED[name]}.md{anchor})"
        if path.is_relative_to(DOCS):
            return f"](/{path.relative_to(DOCS).as_posix()}{anchor})"
        return f"]({REPOSITORY}/{'tree' if path.is_dir() else 'blob'}/main/{name}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", link, text)
