"""The README's Python runs and shows what it says; the paths and options it names exist."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt

from experiments import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    """The fenced blocks of one language ("" for those without)."""
    tokens = MarkdownIt().parse(README)
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


def test_python_of_the_readme_reaches_the_optimum(capsys):
    (block,) = code_blocks("python")
    exec(compile(block, "README.md", "exec"), {})
    numbers = [float(x) for x in re.findall(r"\d+\.\d+", capsys.readouterr().out)]
    policy, optimum = numbers[:4], numbers[4:]
    np.testing.assert_allclose(optimum, [0.0963, 0.0963, 0.7112, 0.0963], atol=1e-4)
    np.testing.assert_allclose(policy, optimum, atol=2e-3)


def test_paths_of_the_readme_exist():
    for path in re.findall(r"`((?:rlhfjax|experiments|tests|docs)/[\w./-]*)`", README):
        assert (ROOT / path).exists(), path


def test_the_table_of_algorithms_has_their_lines():
    rows = re.findall(r"^\| `(\w+(?:\.py)?)` \| (\d+) \|", README, re.MULTILINE)
    folder = ROOT / "rlhfjax" / "algorithms"
    helpers = ("__init__.py", "algorithm.py", "exploration.py", "optimizers.py", "turns.py", "__pycache__")
    assert {name for name, _ in rows} == {path.name for path in folder.iterdir()} - set(helpers)
    for name, said in rows:
        path = folder / name
        files = [path] if path.is_file() else path.glob("*.py")
        lines = sum(len(file.read_text().splitlines()) for file in files)
        assert abs(int(said) - lines) <= 0.1 * lines, f"{name} has {lines} lines"


def commands() -> list[list[str]]:
    lines = "".join(code_blocks("")).splitlines()
    words = [line.split("#")[0].split(">")[0].split() for line in lines]
    return [line[2:] for line in words if line[:2] == ["python", "experiments/run.py"]]


def test_there_are_commands_to_test():
    assert len(commands()) >= 8


@pytest.mark.parametrize("arguments", [x for x in commands() if "--resume" not in x and "mine.yaml" not in x])
def test_options_of_the_readme_are_accepted(arguments, capsys):
    assert run.main([*arguments, "--print-config"] if "--list" not in arguments else arguments) == 0
    assert capsys.readouterr().out


def test_help_is_quick_to_import():
    script = "import sys; sys.argv=['run.py','summarize','--print-config']; from experiments import run; run.main(); "
    script += "assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
