"""Data and the base model that the experiments ship with."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def asset(path: str | Path) -> Path:
    """An absolute path as it is; a relative one from the working directory if it is there, else from the checkout."""
    path = Path(path)
    return path if path.is_absolute() or path.exists() else CHECKOUT / path
