"""The import law: which room may import which. Kept by parsing the sources; the checker is tested too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each room of rlhfjax may import of rlhfjax, besides itself. A file at the top is a room of its own.
PURE = {"ops", "config"}
RUN = {
    "config",
    "run_folder",
    "tracking",
    "console",
    "report",
    "figures",
}  # a run's files and words: no maths, no JAX
ROOMS = {
    "ops",
    "networks",
    "algorithms",
    "generation",
    "environments",
    "rewards",
    "data",
    "pretrained",
    "recipes",
}
MAY_IMPORT = {
    "ops": set(),
    "config": set(),
    "accelerators": set(),  # a table, beside the device it is read for
    "planner": {"accelerators"},  # it reads compiled programs, whatever they compute
    **dict.fromkeys(RUN - {"config"}, RUN),
    "guards": set(),  # bounds on metrics: numbers in, decisions out
    "overoptimisation": set(),  # fits of a few numbers
    "agreement": {"report"},  # kappa and rankings: numbers in, intervals out
    "processes": set(),  # how several are one run: below everything that waits for others
    "checkpoint": {"config", "processes"},
    "mesh": {"config"},
    **dict.fromkeys(["algorithms", "networks", "environments", "rewards", "data"], PURE),
    "generation": PURE | {"networks"},  # it drives a network's apply and cache
    "pretrained": PURE | {"networks", "data", "generation"},  # it answers, to be tried
    "recipes": (ROOMS - {"recipes"}) | {"config", "mesh", "checkpoint"},
}
# Libraries that one file alone may import.
KEEPERS = {"orbax": "checkpoint", "jax.sharding": "mesh"}


def imported_names(source: str, module: str, is_package: bool = False) -> list[str]:
    """The dotted names that `source`, the text of `module`, imports anywhere; relative ones are resolved."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{prefix}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "jax.sharding":
            names.append("jax.sharding")  # reached through `import jax`
    return names


def room_of(name: str) -> str | None:
    """`rlhfjax.ops.kl` lies in room `ops`; a name outside rlhfjax in none."""
    parts = name.split(".")
    return parts[1] if parts[0] == "rlhfjax" and len(parts) > 1 else None


def offences(source: str, module: str, is_package: bool = False) -> list[str]:
    """What `source` imports against the law, in words."""
    room, found = room_of(module), []
    if room is None:
        return []  # the package's own __init__, lazy and tested below
    if room not in MAY_IMPORT:
        return [f"{module}: `{room}` is a new room; say in MAY_IMPORT what it may import"]
    for name in imported_names(source, module, is_package):
        other = room_of(name)
        if name.split(".")[0] == "experiments":
            found.append(f"{module} imports {name}: nothing imports experiments")
        elif other not in (None, room, "__version__") and other not in MAY_IMPORT[room]:
            allowed = sorted(MAY_IMPORT[room]) or "nothing of ours"
            found.append(f"{module} imports {name}: `{room}` may import {allowed}")
        for library, keeper in KEEPERS.items():
            if (name + ".").startswith(library + ".") and room != keeper:
                found.append(f"{module} imports {name}: only {keeper} may")
    return found


def modules() -> list[tuple[str, Path]]:
    """Every module of the package by dotted name."""
    found = []
    for path in sorted((ROOT / "rlhfjax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_each_module_keeps_the_law(module: str, path: Path):
    assert offences(path.read_text(), module, is_package=path.name == "__init__.py") == []


def loaded_after(statement: str, libraries: list[str]) -> set[str]:
    """Which of `libraries` are loaded once a fresh interpreter has run `statement`."""
    program = f"{statement}\nimport sys\nprint([name for name in {libraries!r} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(ast.literal_eval(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "module", ["rlhfjax", "rlhfjax.config", "rlhfjax.processes", "rlhfjax.report", "rlhfjax.figures"]
)
def test_the_light_modules_load_no_heavy_library(module: str):
    assert loaded_after(f"import {module}", ["jax", "flax", "optax", "orbax", "matplotlib"]) == set()


def test_rooms_are_loaded_on_first_use():
    assert loaded_after("import rlhfjax; rlhfjax.ops", ["jax", "rlhfjax.networks"]) == {"jax"}
    with pytest.raises(AttributeError, match="no attribute 'opps'; it offers .*ops"):
        import rlhfjax

        _ = rlhfjax.opps  # pyright: ignore[reportAttributeAccessIssue]
    assert {"ops", "checkpoint", "__version__"} <= set(dir(rlhfjax))


PLANTED = [
    ("from rlhfjax.networks import decoder", "rlhfjax.algorithms.ppo", "may import ['config', 'ops']"),
    ("from rlhfjax import networks", "rlhfjax.algorithms.ppo", "may import ['config', 'ops']"),
    ("from ..networks import decoder", "rlhfjax.algorithms.ppo", "may import ['config', 'ops']"),
    ("from .. import checkpoint", "rlhfjax.generation.decode", "may import"),
    ("def f():\n    import rlhfjax.mesh", "rlhfjax.rewards.learned", "may import"),
    ("from rlhfjax.config import Config", "rlhfjax.ops.kl", "may import nothing of ours"),
    ("import experiments.run", "rlhfjax.recipes.ppo", "nothing imports experiments"),
    ("from experiments import loop", "rlhfjax.report", "nothing imports experiments"),
    ("import orbax.checkpoint as ocp", "rlhfjax.recipes.ppo", "only checkpoint may"),
    ("from jax.sharding import Mesh", "rlhfjax.checkpoint", "only mesh may"),
    ("from jax import sharding", "rlhfjax.algorithms.ppo", "only mesh may"),
    ("import jax\nm = jax.sharding.Mesh", "rlhfjax.algorithms.ppo", "only mesh may"),
    ("import jax", "rlhfjax.novel.thing", "is a new room"),
]
ALLOWED = [
    (
        "from rlhfjax import ops\nfrom rlhfjax.algorithms.algorithm import Algorithm",
        "rlhfjax.algorithms.ppo",
        False,
    ),
    ("from .algorithm import Algorithm", "rlhfjax.algorithms.ppo", False),
    ("from .ppo import loss", "rlhfjax.algorithms", True),
    ("from ..ops import gae", "rlhfjax.algorithms.ppo", False),
    ("import orbax.checkpoint", "rlhfjax.checkpoint", False),
    ("from rlhfjax import __version__", "rlhfjax.run_folder", False),
    ("import jax\nimport optax", "rlhfjax.ops.kl", False),
]


@pytest.mark.parametrize(("source", "module", "why"), PLANTED)
def test_the_checker_finds_a_planted_offence(source: str, module: str, why: str):
    found = offences(source, module)
    assert len(found) == 1 and why in found[0] and found[0].startswith(module)


@pytest.mark.parametrize(("source", "module", "is_package"), ALLOWED)
def test_the_checker_lets_lawful_imports_pass(source: str, module: str, is_package: bool):
    assert offences(source, module, is_package) == []
