"""The documentation site: `pip install -e ".[docs]" && sphinx-build -W --keep-going -b html docs build/docs`.

The pages are those of this folder, as they are read on GitHub. Links that leave it become links to the repository, or
to a page of the site where the file is one. The API reference is made from the docstrings. Formulas are drawn by a
MathJax that lies in the site: it is built, and read, without a network.
"""

import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import api_pages  # noqa: E402
from links import DOCS, INCLUDED, REPOSITORY, ROOT, to_site  # noqa: E402

import rlhfjax  # noqa: E402

GENERATED = DOCS / "generated"
ARRAY_LIKE = (
    r"~[\w.]*Array \| ~numpy.ndarray \| ~numpy.bool \| ~numpy.number \| bool \| int \| float \| complex"
)

project, author, copyright = "rlhfjax", "The rlhfjax authors", "The rlhfjax authors"
version = release = rlhfjax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.linkcode"]
exclude_patterns = ["figures"]
html_theme, html_title = "furo", f"rlhfjax {version}"
# Of MathJax the one file that needs no other: TeX in, SVG out.
MATHJAX = importlib.util.find_spec("sphinx-mathjax-offline")
assert MATHJAX is not None and MATHJAX.origin is not None, "pip install -e '.[docs]'"
html_static_path = ["static", str(Path(MATHJAX.origin).parent / "static" / "mathjax" / "tex-svg.js")]
html_css_files = ["site.css"]
mathjax_path = "tex-svg.js"
html_show_sourcelink = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # tests run the code of the pages

highlight_language = "text"
default_role = "code"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
# Lines of the contents that may have no page.
OPTIONAL = ("annotate", "metrics", "reliability", "reports", "results", "generated/notebooks/*")


def read_page(app, docname, source):
    if not docname.startswith("generated/"):
        source[0] = to_site(source[0], DOCS / f"{docname}.md")
    if docname == "index":
        absent = {name for name in OPTIONAL if not [*DOCS.glob(f"{name}.*"), *DOCS.glob(name)]}
        source[0] = "\n".join(line for line in source[0].splitlines() if line not in absent)


def generate(app, config):
    """Writes the pages that are made, and takes away those that are no more."""
    made = {f"api/{name}.rst": text for name, text in api_pages.pages().items()}
    for name, page in INCLUDED.items():
        made[f"{page}.md"] = to_site((ROOT / name).read_text(), ROOT / name)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        made[f"notebooks/{path.name}"] = to_site(path.read_text(), path)
    for path in GENERATED.rglob("*.*"):
        if path.relative_to(GENERATED).as_posix() not in made:
            path.unlink()
    for name, text in made.items():
        path = GENERATED / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def read_docstring(app, what, name, obj, options, lines):
    lines[:] = api_pages.as_rst(lines)
    if what == "class" and hasattr(obj, "_fields"):
        lines += api_pages.fields(obj)


def read_signature(app, what, name, obj, options, signature, returned):
    """What ArrayLike stands for is spelt out by Python, and not helpful at every argument."""
    return signature and re.sub(ARRAY_LIKE, "ArrayLike", signature), returned


def linkcode_resolve(domain, info):
    """Where the source of a documented object lies in the repository."""
    value = importlib.import_module(info["module"])
    for part in info["fullname"].split("."):
        value = getattr(value, part, None)
    value = inspect.unwrap(value) if callable(value) else value
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        return None
    try:
        path, (_, line) = Path(inspect.getsourcefile(value) or ""), inspect.getsourcelines(value)
    except (OSError, TypeError):
        return None
    if not path.is_relative_to(ROOT / "rlhfjax"):
        return None
    return f"{REPOSITORY}/blob/main/{path.relative_to(ROOT)}#L{line}"


def check_names(app, error):
    """Every public name must be on a page."""
    if error is None and app.builder.name == "html":
        documented = {name for name, *_ in app.env.get_domain("py").get_objects()}
        for module in api_pages.public_modules():
            for name in api_pages.public_names(module):
                if f"{module}.{name}" not in documented:
                    raise ValueError(f"{module}.{name} is public, and on no page of the API reference")


def setup(app):
    app.connect("config-inited", generate)
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", read_docstring, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", read_signature)
    app.connect("build-finished", check_names)
