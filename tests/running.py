"""Experiments run from their command line, with settings from a file."""

from pathlib import Path
from typing import Any

import yaml

from experiments import run


def start(name: str, settings: dict[str, Any], folder: Path, *flags: str) -> int:
    """Runs an experiment with `settings` from a YAML file beside its folder; returns the exit status."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings))
    return run.main([name, "--config", str(file), "--run-dir", str(folder), *flags])
