"""The list of planted faults fits the code: `python tests/plant_faults.py` runs it."""

import ast
import shutil
from functools import cache
from pathlib import Path

import plant_faults
import pytest

ROOT = Path(__file__).resolve().parents[1]
FAULTS = plant_faults.load()


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_fault_has_its_place_and_its_test():
    for fault in FAULTS:
        assert (ROOT / fault.file).read_text().count(fault.find) == 1, fault.what
        assert fault.find != fault.replace, fault.what
        file, name = fault.test.split("::", 1)
        assert name.split("[")[0] in names_in(file), fault.test


def test_a_fault_without_its_place_is_an_error(tmp_path):
    fault = FAULTS[0]
    (tmp_path / fault.file).parent.mkdir(parents=True)
    (tmp_path / fault.file).write_text("something else\n")
    with pytest.raises(ValueError, match="occurs 0 times"):
        fault.plant(tmp_path)


@pytest.mark.slow
def test_a_planted_fault_is_noticed_and_taken_back(tmp_path):
    fault = next(f for f in FAULTS if f.test.startswith("tests/test_ops_kl.py"))
    for name in plant_faults.COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tmp_path / name)
    assert plant_faults.noticed(fault, tmp_path)
    assert (tmp_path / fault.file).read_text() == (ROOT / fault.file).read_text()
