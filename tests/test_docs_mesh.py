"""docs/mesh.md and docs/scaling.md: their code runs, their numbers are what it prints, and what a program is compiled
to agrees with them."""

import ast
import re
from functools import cache
from pathlib import Path

import jax
import pytest
from test_docs_q_learning import DOCS, blocks, run

from experiments.benchmarks import scaling
from experiments.benchmarks.sizes import Sizes
from rlhfjax.config import PPO, Mesh

ROOT = DOCS.parent
STATE, RULE, GENERATION = blocks("mesh.md")
PAGES = ("mesh.md", "scaling.md")

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")


def prose(page: str) -> str:
    return " ".join((DOCS / page).read_text().split())


def rows(page: str, header: str) -> list[list[str]]:
    """The cells of the table whose header line begins so."""
    lines = (DOCS / page).read_text().splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith(header)]
    table = [lines[start]]
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append(line)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


# mesh.md


def test_the_program_gives_the_numbers_of_one_device(capsys):
    program = "\n".join((STATE, RULE, GENERATION))
    of_four = run(program, capsys)
    of_one = run(program.replace("Mesh(data=2, fsdp=2)", "Mesh(data=1, fsdp=1)"), capsys)
    (loss, tokens), (loss_alone, tokens_alone) = (
        (float(re.findall(r"loss ([\d.]+);", text)[0]), re.findall(r"(\d+) \(\d, 2, 4\)", text))
        for text in (of_four, of_one)
    )
    assert loss < 1.5 and loss == pytest.approx(loss_alone, abs=2e-4)  # it starts at log(32) = 3.5
    assert tokens == tokens_alone
    assert "(16, 32) is (8, 32) on a device" in of_four and "(16, 32) is (16, 32) on a device" in of_one
    assert "(2, 2, 4)" in of_four and "(8, 2, 4)" in of_one
    assert "('fsdp', None)" in of_four


def constants(file: str, name: str) -> list[str]:
    """The keys of a dictionary that a test file assigns to `name`."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    (found,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    ]
    assert isinstance(found, ast.Dict)
    return [ast.literal_eval(key) for key in found.keys if key is not None]


@pytest.mark.parametrize(
    ("header", "file", "cases"),
    [("| recipe", "test_mesh_recipes.py", "CASES"), ("| method", "test_mesh_control.py", "CONFIGS")],
)
def test_the_tables_are_of_what_is_tested(header, file, cases):
    head, *table = rows("mesh.md", header)
    meshes = ["_".join(re.findall("[a-z]+", cell)) for cell in head[1:]]
    assert meshes == constants(file, "MESHES")
    assert [row[0].strip("`") for row in table] == constants(file, cases)
    assert all(row[1:] == ["yes"] * len(meshes) for row in table)
    assert f"pytest tests/{file}" in prose("mesh.md")


# scaling.md


def test_the_tables_on_paper_are_what_the_code_prints(capsys):
    printed = run("\n".join(blocks("scaling.md")), capsys).splitlines()
    lines = [line.strip() for line in (DOCS / "scaling.md").read_text().splitlines()]
    assert len(printed) > 40 and not [line for line in printed if line not in lines]
    # And the page has no row that is not printed, but those that were compiled.
    shown = {line for line in lines if re.match(r"\| (h100|v5|\d)", line)}
    assert shown == {line for line in printed if line.startswith("|")}


def test_bytes_on_paper_are_those_of_the_parameters(capsys):
    """By arithmetic of its own: one gradient of each model in every minibatch, each gathered twice, three to score."""
    both = 2 * 8.03e9
    expected = {
        ("8 x 8 x 1", "gradients, data"): 4 * both * 4 / 8,
        ("8 x 8 x 1", "gradients, fsdp"): 4 * both * 4,
        ("8 x 8 x 1", "parameters to update, fsdp"): 4 * both * 2 * 2,
        ("1 x 1024 x 1", "parameters to score, fsdp"): 3 * 8.03e9 * 2,
        ("16 x 8 x 8", "parameters to decode, fsdp"): 8.03e9 * 2 / 8,
        # 32 rows of a device and iteration; 32 layers; two sums forward, two backward; policy and critic.
        ("16 x 8 x 8", "activations, tensor"): 32 * 1024 * 4096 * 2 * 32 * 4 * 2,
    }
    found = {(row[0], row[1]): row[2] for row in rows("scaling.md", "| data x fsdp x tensor | collective")}
    for name, size in expected.items():
        assert float(found[name].removesuffix(" GB")) == pytest.approx(size / 1e9, rel=5e-3), name


def test_what_the_page_says_of_its_tables():
    text = prose("scaling.md")
    total = {(r[0], r[1]): float(r[9]) for r in rows("scaling.md", "| | data x fsdp x tensor")[1:]}
    network = {(r[0], r[1]): float(r[8]) for r in rows("scaling.md", "| | data x fsdp x tensor")[1:]}
    few, many = ("h100", "8 x 8 x 1"), ("h100", "128 x 8 x 1")
    assert f"16 times the devices are {total[few] / total[many]:.1f} times as fast" in text
    assert f"with {network[many] - network[few]:.2f} s more of network" in text


TINY = Sizes(layers=1, width=32, heads=4, mlp_width=64, samples=2, prompt_length=4, new_tokens=4)


@cache
def work(mesh: Mesh) -> scaling.Work:
    (target,) = scaling.targets(counts=(mesh.data * mesh.fsdp,)).values()
    config = PPO(epochs=2, minibatches=2)
    return scaling.work(mesh, target, TINY, prompts=8, vocab_size=64, config=config)


@pytest.mark.slow
def test_work_is_divided_and_gradients_are_summed_once_a_minibatch():
    """Four steps of two models, whose unembedding of the critic has no gradient."""
    alone, data = work(Mesh(data=1, fsdp=1)), work(Mesh(data=4, fsdp=1))
    assert alone.calls == 0 and alone.flops == 4 * data.flops
    assert data.learner == alone.learner and data.frozen == alone.frozen
    assert data.temporary < 0.75 * alone.temporary
    gradients = alone.learner / 3 - 64 * 32 * 4
    assert data.sent == pytest.approx(4 * gradients, rel=0.05)


@pytest.mark.slow
def test_fsdp_divides_what_is_held_too_and_gathers_it():
    alone, data, fsdp = (work(Mesh(data=a, fsdp=b)) for a, b in ((1, 1), (4, 1), (1, 4)))
    assert alone.flops == 4 * fsdp.flops
    assert fsdp.learner < 0.3 * alone.learner and fsdp.frozen < 0.3 * alone.frozen
    assert fsdp.sent > 2 * data.sent  # parameters besides


def test_what_cannot_be_compiled_for_is_told(monkeypatch):
    monkeypatch.setattr("rlhfjax.planner.has_tpu_compiler", lambda: False)
    with pytest.raises(ValueError, match="to compile for v5e libtpu must be installed"):
        scaling.targets("v5e")
    monkeypatch.setattr("rlhfjax.planner.has_tpu_compiler", lambda: True)
    with pytest.raises(ValueError, match="accelerator 'v5ee' is not known; did you mean 'v5e'"):
        scaling.targets("v5ee")


@pytest.mark.parametrize("page", PAGES)
def test_what_the_pages_name_exists(page):
    text = (DOCS / page).read_text()
    links = re.findall(r"\]\(([\w/]+\.md)\)", text)
    files = re.findall(r"(?:experiments|tests)/[\w/]+\.(?:py|md)", text)
    assert links and files
    assert all((DOCS / link).is_file() for link in links)
    assert all(Path(ROOT / file).is_file() for file in files)
