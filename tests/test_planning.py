"""`--dry-run`: every experiment has a plan that can be lowered, it is of the programs that a run calls, and the command
line tells the plan, or what is wrong with what was asked for, without a folder."""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from jax.core import Tracer
from running import start
from test_experiments import pretrain_settings
from test_experiments_control import SETTINGS as CONTROL
from test_experiments_games import SETTINGS as GAMES
from tiny_text import write_world

from experiments import loop, run
from experiments.options import override
from experiments.programs import Program
from experiments.stages import control, games
from experiments.stages.text import Text
from rlhfjax.config import Mesh
from rlhfjax.mesh import make_mesh

TWO = ("--mesh.data", "2")
two_devices = pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices")


def planned(name: str, settings: dict[str, Any], *, data: int = 1) -> list[Program]:
    module = run.load_experiment(name, run.HERE)
    config = override(module.Config(), settings, source="the test")
    return module.plan(config, make_mesh(Mesh(data=data)))


# ---- every experiment


# Whose plans are made by the functions that make others', of worlds or settings alone that differ; `results` has those
# of its tasks.
ALIKE = {"acrobot", "catch", "cliff_walking", "compare", "mountain_car", "results", "star_graph"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*run.find_experiments(run.HERE)} - ALIKE))
def test_every_experiment_has_a_plan_that_can_be_lowered(name):
    config = run.load_experiment(name, run.HERE).Config()
    base = config.text.base if hasattr(config, "text") else ""
    package = base.removeprefix("package:")
    if package != base and importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    programs = planned(name, {})
    assert programs
    for program in programs:
        program.lower()
        assert program.runs >= 1 and math.isfinite(program.runs)
        arguments = {id(leaf) for leaf in jax.tree.leaves(program.arguments)}
        assert all(leaf.sharding is not None for leaf in jax.tree.leaves(program.arguments))
        # A part is told by which of the arguments it is; the base under adapters is bound to the function.
        assert any(id(leaf) in arguments for leaf in jax.tree.leaves(program.parts)) or not program.parts
        if program.at is not None:
            more = program.at(2 * program.rows)
            assert (more.stage, more.rows) == (program.stage, 2 * program.rows)
            assert more.parts.keys() == program.parts.keys()


# ---- the plan's programs are the run's


def shapes(tree: Any) -> Any:
    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))

    return jax.tree.map(shape, tree)


def described(tree: Any) -> dict[str, Any]:
    """The leaves by path: shape, the part of it that a device has, type."""

    def leaf(x: Any) -> tuple[Any, ...]:
        part = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return x.shape, part, str(x.dtype)

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf(x) for path, x in leaves}


def noted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    """The function; what it is called with is noted as shapes, before it is donated."""

    def call(*arguments: Any) -> Any:
        if not any(isinstance(x, Tracer) for x in jax.tree.leaves(arguments)):
            calls.append(shapes(tuple(x for x in arguments if not isinstance(x, int))))  # but a step's number
        return function(*arguments)

    return call


def expect_called(programs: list[Program], calls: list[Any]) -> None:
    found = [described(arguments) for arguments in calls]
    assert programs
    for program in programs:
        assert described(program.arguments) in found, (program.stage, program.name)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    """Settings of the tiny world; its batches can be split over two devices."""
    settings = write_world(tmp_path_factory.mktemp("world"))
    return settings | {"evaluation": {"prompts": 4, "batch": 4, "temperatures": [], "best_of": []}}


def note_text(monkeypatch, calls: list[Any]) -> None:
    original = Text.jit

    def jit(self, build, **named):
        return noted(original(self, build, **named), calls)

    monkeypatch.setattr(Text, "jit", jit)


@two_devices
@pytest.mark.slow
@pytest.mark.parametrize("trained", ["all", "lora"])
def test_summarize_plans_what_it_calls(trained, world, tmp_path, monkeypatch):
    """Fine-tuning, reward model and PPO: state, parameters that stay, batch, key, and how each is split."""
    calls: list[Any] = []
    settings = world | {"text": world["text"] | {"trained": trained}}
    note_text(monkeypatch, calls)
    assert start("summarize", settings, tmp_path / "run", "--max-steps", "1", *TWO) == 0
    monkeypatch.undo()
    updates = [x for x in planned("summarize", settings, data=2) if x.name in ("update", "iteration")]
    assert [program.stage for program in updates] == ["sft", "reward_model", "ppo"]
    expect_called(updates, calls)


@two_devices
@pytest.mark.slow
def test_sweep_plans_what_it_calls(world, tmp_path, monkeypatch):
    calls: list[Any] = []
    settings = {name: world[name] for name in ("text", "sft", "ppo")} | {"seeds": 2, "words": 2}
    note_text(monkeypatch, calls)
    assert start("sweep", settings, tmp_path / "run", "--max-steps", "1", *TWO) == 0
    monkeypatch.undo()
    expect_called(planned("sweep", settings, data=2), calls)


@two_devices
def test_pretrain_plans_what_it_calls(tmp_path, monkeypatch):
    calls: list[Any] = []
    settings = pretrain_settings(tmp_path, words=12) | {"vocab_size": 270}  # as many as the documents give
    original = loop.run_stage

    def run_stage(*names, step, **named):
        return original(*names, step=noted(step, calls), **named)

    monkeypatch.setattr(loop, "run_stage", run_stage)
    assert start("pretrain", settings, tmp_path / "run", "--max-steps", "1", *TWO) == 0
    monkeypatch.undo()
    (update,) = planned("pretrain", settings, data=2)
    assert described(update.arguments[:2]) in [described(arguments) for arguments in calls]


@two_devices
@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("bandit", "tabular"),
        pytest.param("bandit", "ppo,dqn", marks=pytest.mark.slow),
        pytest.param("cliff_walking", "double_q,q_lambda", marks=pytest.mark.slow),
    ],
)
def test_control_plans_what_it_calls(name, methods, tmp_path, monkeypatch):
    """The states of a network's and of a table's runs, seeds split over the devices."""
    calls: list[Any] = []
    settings = CONTROL[name] | {"algorithms": methods}
    original = control.make_programs

    def make_programs(*arguments, **named):
        own = original(*arguments, **named)
        names = ("advance", "evaluate", "final_scores")
        return own._replace(**{x: noted(getattr(own, x), calls) for x in names})

    monkeypatch.setattr(control, "make_programs", make_programs)
    assert start(name, settings, tmp_path / "run", "--max-steps", "1", *TWO) == 0
    monkeypatch.undo()

    def without_metrics(arguments: Any) -> Any:  # small, and laid as the compiler chose
        return (arguments[0], arguments[2]) if len(arguments) == 3 else arguments

    programs = planned(name, settings, data=2)
    assert len(programs) == 3 * len(methods.split(","))
    expect_called(
        [dataclasses.replace(program, arguments=without_metrics(program.arguments)) for program in programs],
        [without_metrics(arguments) for arguments in calls],
    )


@two_devices
@pytest.mark.slow
def test_games_plan_what_they_call(tmp_path, monkeypatch):
    """But for the rows to learn from: how many and how long they are is known to be at most so much."""
    calls: list[Any] = []
    settings = GAMES["maze"] | {
        "play": {"points": 2, "games": 4, "final_games": 4},
        "algorithms": "soft_q,ilql",
    }
    make_updates, player = games.make_updates, games.player
    monkeypatch.setattr(games, "make_updates", lambda *x: noted(make_updates(*x), calls))
    monkeypatch.setattr(games, "player", lambda *x: noted(player(*x), calls))
    assert start("maze", settings, tmp_path / "run", *TWO) == 0
    monkeypatch.undo()
    programs = planned("maze", settings, data=2)[1:]  # the data's has a key alone
    rows = [arguments[2] for arguments in calls if len(arguments) == 4]
    bounds = {program.stage: program.arguments[2] for program in programs if len(program.arguments) == 4}
    assert list(bounds) == ["clone", "soft_q", "ilql"]
    for real in rows:
        for x, bound in zip(jax.tree.leaves(real), jax.tree.leaves(bounds["clone"]), strict=True):
            assert x.ndim == bound.ndim and x.dtype == bound.dtype
            assert all(size <= most for size, most in zip(x.shape, bound.shape, strict=True))
        # Pieces of three turns, of games of six at most.
        assert real.mask.shape[1] == bounds["clone"].mask.shape[1]

    def without_rows(arguments: Any) -> Any:
        return (*arguments[:2], arguments[3]) if len(arguments) == 4 else arguments

    expect_called(
        [dataclasses.replace(program, arguments=without_rows(program.arguments)) for program in programs],
        [without_rows(arguments) for arguments in calls],
    )


# ---- the command line


@pytest.fixture
def dry(monkeypatch, tmp_path, capsys) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """(exit status, what was printed, errors) of `--dry-run` with these arguments, in a folder of its own."""
    before = {name: getattr(jax.config, name) for name in ("jax_platforms", "jax_enable_compilation_cache")}
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run.main([*arguments, "--dry-run"])
        said = capsys.readouterr()
        return status, said.out, said.err

    yield call
    for name, value in before.items():
        jax.config.update(name, value)


def test_dry_run_prints_a_plan_and_makes_no_folder(dry, tmp_path):
    status, printed, _ = dry("bandit", "--algorithms", "tabular", "--accelerator", "cpu", "--price", "2")
    assert status == 0 and not list(tmp_path.iterdir())
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in printed.splitlines()
        if line.startswith("| tabular")
    ]
    assert [row[:3] for row in rows] == [
        ["tabular", "training", "20"],
        ["tabular", "evaluation", "20"],
        ["tabular\\_games", "greedy games", "1"],
    ]
    for row in rows:
        assert all(math.isfinite(float(x.split()[0])) for x in row[2:]), row
        # `in all` is of all runs, in its own unit.
        assert float(row[5]) > 0 and float(row[3].split()[0]) > 0
    total = re.search(r"In all .*, ([\d.e+-]+) device hours, ([\d.]+) at 2 a device hour", printed)
    assert total is not None and math.isfinite(float(total[1]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain", "--accelerator", "nonsense"], "accelerator 'nonsense' is not known"),
        (
            ["pretrain", "--accelerator", "cpu", "--devices", "3", "--mesh.data", "2"],
            "3 devices cannot be laid out as data 2",
        ),
        (
            ["pretrain", "--accelerator", "cpu", "--devices", "1", "--mesh.data", "2"],
            "the mesh asks for 2 devices (data 2), and there are 1",
        ),
        (
            ["pretrain", "--accelerator", "cpu", "--rows", "3", "--mesh.data", "2"],
            "a batch (--rows) of 3 rows cannot be split over 2 devices",
        ),
        (
            ["sweep", "--accelerator", "cpu", "--ppo.prompts", "5", "--mesh.data", "2", "--sft.steps", "0"],
            "a batch of prompts (--ppo.prompts) of 5 rows cannot be split over 2 devices",
        ),
        (
            ["maze", "--accelerator", "cpu", "--clone.batch", "9", "--mesh.data", "2"],
            "a batch (--clone.batch) of 9 rows cannot be split over 2 devices",
        ),
        (
            ["bandit", "--accelerator", "cpu", "--seeds", "3", "--ppo.worlds", "5", "--mesh.data", "2"],
            "neither --seeds 3 nor --ppo.worlds 5 can be split over 2 devices",
        ),
    ],
)
def test_what_cannot_be_planned_is_told(arguments, words, dry, tmp_path):
    status, printed, errors = dry(*arguments)
    assert status == 2 and words in errors and "Traceback" not in errors
    assert "# Plan" not in printed and not list(tmp_path.iterdir())
