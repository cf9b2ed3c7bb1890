"""Pages of the API reference, and how the docstrings of this project are read: what `conf.py` asks for.

Docstrings are plain text. A formula or a table is a block that is set in, and `code` stands between single backticks;
reStructuredText would take the first for a quotation, and a star in the prose for an emphasis.
"""

import ast
import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import rlhfjax

PACKAGE = Path(rlhfjax.__file__).parent
SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:")  # of Google's style, which napoleon reads


@cache
def public_modules() -> tuple[str, ...]:
    """What a user may import from: packages, files at the top, and the modules that a package offers by name."""
    found = {"rlhfjax"}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        if parts[-1] == "__init__" or len(parts) == 1:
            found.add(".".join(("rlhfjax", *parts)).removesuffix(".__init__"))
    for name in sorted(found):
        module = importlib.import_module(name)
        found |= {f"{name}.{x}" for x in public_names(name) if inspect.ismodule(getattr(module, x))}
    return tuple(sorted(found))


@cache
def public_names(name: str) -> tuple[str, ...]:
    """`__all__` of a module; without one what it defines and does not hide, and its Config."""
    module = importlib.import_module(name)
    if hasattr(module, "__all__"):
        return tuple(module.__all__)
    names = [x for x in _defined(module) if not x.startswith("_")]
    return tuple(names + (["Config"] if hasattr(module, "Config") else []))


def pages() -> dict[str, str]:
    """The pages by name: one for each public module, and the list of them."""
    modules = public_modules()
    index = ["API reference", "=============", "", "Made from the docstrings. ", ""]
    index += ["Letters at the end of a name are the axes of the array: :doc:`/concepts`.", ""]
    index += [".. toctree::", "   :maxdepth: 1", "", *(f"   {name}" for name in modules), ""]
    return {"index": "\n".join(index)} | {name: page(name) for name in modules}


def page(name: str) -> str:
    """One module: its docstring, a table of its names, and every name below the file that defines it."""
    lines = [name, "=" * len(name), "", f".. automodule:: {name}", "   :no-members:", ""]
    offered = [f"{name}.{x}" for x in public_names(name)]
    inner = [x for x in public_modules() if x.rpartition(".")[0] == name]
    if inner:
        lines += ["Modules:", "", *(f"* :doc:`{x} <{x}>`" for x in inner), ""]
    for file, names in by_file(name).items():
        elsewhere = file in public_modules() and file != name
        if elsewhere:
            lines += [f"From :doc:`{file} <{file}>`", "-" * (2 * len(file) + 16), ""]
        elif file != name:
            lines += [
                file,
                "-" * len(file),
                "",
                f".. automodule:: {file}",
                "   :no-members:",
                "   :no-index:",
                "",
            ]
        lines += [f".. currentmodule:: {name}", ""]
        for x in names:
            lines += (
                [f".. py:data:: {x}", f"   :type: {file}.{x}", ""] if elsewhere else [*directive(name, x), ""]
            )
    return "\n".join(lines) if offered else "\n".join(lines[:6])


def by_file(name: str) -> dict[str, list[str]]:
    """The public names of a module, modules apart, by the file or public module that defines them, in its order."""
    module, found = importlib.import_module(name), {}
    for x in public_names(name):
        value = getattr(module, x)
        if not inspect.ismodule(value):
            found.setdefault(_home(name, value), []).append(x)
    for file, names in found.items():
        order = _defined(importlib.import_module(file))
        names.sort(key=lambda x: order.index(x) if x in order else len(order))
    return dict(sorted(found.items()))


def _home(name: str, value: object) -> str:
    """The module below `name` that defines `value`, as far down as it has a page or is a file of `name` itself."""
    home = getattr(value, "__module__", None)
    if not isinstance(home, str) or not home.startswith(f"{name}."):
        return name
    parts = home.removeprefix(f"{name}.").split(".")
    if parts[0].startswith("_"):
        return name
    return next((x for x in (f"{name}.{parts[0]}", home) if x in public_modules()), home)


def directive(module: str, name: str) -> list[str]:
    value = getattr(importlib.import_module(module), name)
    if inspect.isclass(value):
        if hasattr(value, "_fields"):  # a NamedTuple: its fields come with their comments, see `fields`
            return [f".. autoclass:: {name}", "   :no-members:"]
        return [f".. autoclass:: {name}", "   :members:", "   :member-order: bysource"]
    return [f".. autofunction:: {name}" if inspect.isfunction(value) else f".. autodata:: {name}"]


def fields(value: type) -> list[str]:
    """The fields of a NamedTuple as its source has them: types, and shapes and units in comments."""
    try:
        source = inspect.getsource(value)
    except OSError:
        return []
    body, lines = ast.parse(source).body[0], source.splitlines()
    own = [node for node in getattr(body, "body", []) if isinstance(node, ast.AnnAssign)]
    if not own:
        return []
    shown = [line[4:] for line in lines[own[0].lineno - 1 : own[-1].end_lineno]]
    return ["", ".. code-block:: python", "", *(f"   {line}" for line in shown), ""]


def as_rst(lines: list[str]) -> list[str]:
    """A docstring of this project in reStructuredText."""
    out, section = [], False
    for block in _blocks(lines):
        first = block[0]
        if first in SECTIONS:
            section = True
        elif first and not first.startswith(" "):
            section = False
        if not first or first.startswith((">>>", "...")):
            out += block
        elif first.startswith(" ") and not section:
            out += ["", "::", "", *(f"  {line}" for line in block), ""]
        else:
            out += [escape(line) for line in block]
    return out


def _blocks(lines: list[str]) -> list[list[str]]:
    """Runs of lines of one kind: blank, set in, an example with its output, prose (lists with what hangs from them)."""
    blocks: list[list[str]] = []
    kind = ""
    for line in lines:
        if not line.strip():
            new = "example over" if kind == "example" else kind if kind == "set in" else "blank"
        elif line.startswith(">>>") or (kind == "example" and line.strip()):
            new = "example"
        elif line in SECTIONS:
            new = f"section {line}"
        elif kind.startswith("section") and line.startswith(" "):
            new = kind
        elif line.startswith(("- ", "* ")) or (kind == "list" and line.startswith(" ")):
            new = "list"
        else:
            new = "set in" if line.startswith(" ") else "prose"
        if new == kind and blocks:
            blocks[-1].append(line)
        else:
            blocks.append([line])
        kind = new
    return blocks


def escape(line: str) -> str:
    """Prose whose stars, bars and final underscores are only that; what stands between backticks is left alone."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(
        x if x.startswith("`") else re.sub(r"([*|\\])|(?<=\w)(_)(?!\w)", r"\\\1\2", x) for x in parts
    )


def _defined(module: ModuleType) -> list[str]:
    """The names that the source of a module defines, in order."""
    names = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [x.id for x in node.targets if isinstance(x, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return names
