"""Shows that the tests can fail: plants each fault of faults.toml in a copy of the project and runs its test.

    python tests/plant_faults.py            # all of them
    python tests/plant_faults.py kl gae     # those whose description or file contains one of the words

Exit status 1 where a test passes although the code is wrong.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("rlhfjax", "experiments", "tests", "docs", "notebooks", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Fault:
    """One wrong line, and the test that must notice."""

    what: str
    file: str  # relative to the checkout
    find: str  # occurs once in the file
    replace: str
    test: str  # pytest node

    def plant(self, root: Path) -> str:
        """Writes the fault into the copy at `root`; returns the text as it was. Raises ValueError without a place."""
        path = root / self.file
        text = path.read_text()
        if text.count(self.find) != 1:
            raise ValueError(
                f"{self.what}: {self.find!r} occurs {text.count(self.find)} times in {self.file}"
            )
        path.write_text(text.replace(self.find, self.replace))
        return text


def load() -> list[Fault]:
    """The faults of faults.toml."""
    with open(Path(__file__).with_name("faults.toml"), "rb") as file:
        return [Fault(**entry) for entry in tomllib.load(file)["fault"]]


def noticed(fault: Fault, root: Path) -> bool:
    """Whether the test fails on the fault. Raises RuntimeError where it does not run at all."""
    before = fault.plant(root)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "slow or not slow",
        "-o",
        "xfail_strict=true",
    ]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([*command, fault.test], cwd=root, env=environment, capture_output=True, text=True)
    (root / fault.file).write_text(before)
    if run.returncode not in (0, 1):  # 1: tests ran, and some failed
        raise RuntimeError(
            f"{fault.what}: {fault.test} could not be run\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
        )
    return run.returncode == 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="run faults whose description or file contains one of these")
    words = parser.parse_args(arguments).words
    faults = [f for f in load() if not words or any(word in f.what or word in f.file for word in words)]
    if not faults:
        print(f"error: no fault mentions {' or '.join(words)}", file=sys.stderr)
        return 2
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, root / name)
        for fault in faults:
            found = noticed(fault, root)
            missed += not found
            print(f"{'noticed' if found else 'MISSED ':8} {fault.what}  ({fault.test})", flush=True)
    print(f"{len(faults) - missed} of {len(faults)} faults noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
