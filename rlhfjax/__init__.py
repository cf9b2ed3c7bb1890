"""rlhfjax: reinforcement learning from human feedback in JAX.

The rooms (`rlhfjax.ops`, `rlhfjax.algorithms`, ...) are imported when they are first used, so that reading a
configuration or printing a command's help does not wait for JAX to start.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhfjax import (
        algorithms,
        checkpoint,
        config,
        data,
        environments,
        figures,
        generation,
        mesh,
        networks,
        ops,
        pretrained,
        processes,
        recipes,
        report,
        rewards,
    )

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "algorithms",
    "checkpoint",
    "config",
    "data",
    "environments",
    "figures",
    "generation",
    "mesh",
    "networks",
    "ops",
    "pretrained",
    "processes",
    "recipes",
    "report",
    "rewards",
]


def __getattr__(name: str) -> ModuleType:
    """Imports the room `name` on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
