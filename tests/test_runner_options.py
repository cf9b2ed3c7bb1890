"""The command line and YAML: what overrides what, and what a mistake is told."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from experiments import options, run

ROOT = Path(run.__file__).resolve().parents[1]

FAKE = '''
from dataclasses import dataclass

DESCRIPTION = "a fake: {name}"


@dataclass(frozen=True)
class PPO:
    clip_low: float = 0.2
    """Lower clip."""
    epochs: int = 4
    whiten: bool = True


@dataclass(frozen=True)
class Config:
    width: int = 8
    ppo: PPO = PPO()


def run(config, folder):
    (folder.path / "ran").write_text(f"{{config.width}} {{folder.seed}} {{folder.max_steps}}")
    return {{"score": 0.5}}
'''


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["linear", "cosine"] = "linear"


@dataclass(frozen=True)
class Outer:
    steps: int = 3
    whiten: bool = True
    name: str = "tiny"
    shape: tuple[int, ...] = (2, 3)
    pair: tuple[float, int] = (0.5, 1)
    target: float | None = None
    data: Path = Path("a/b")
    inner: Inner = Inner()


@pytest.fixture
def experiments(tmp_path, monkeypatch):
    """A folder of two experiments and one file that is none; the working directory is empty."""
    folder = tmp_path / "experiments"
    folder.mkdir()
    for name in ("summarize", "length"):
        (folder / f"{name}.py").write_text(FAKE.format(name=name))
    (folder / "helper.py").write_text("import jax\n")
    monkeypatch.chdir(tmp_path)
    return folder


def printed_config(arguments, experiments, capsys):
    assert run.main([*arguments, "--print-config"], experiments) == 0
    return yaml.safe_load(capsys.readouterr().out)


def error_of(arguments, experiments, capsys):
    assert run.main(arguments, experiments) == 2
    return capsys.readouterr().err


def test_yaml_round_trip_restores_every_kind_of_field():
    config = Outer(
        steps=7,
        whiten=False,
        name="yes: [odd] # 名",
        shape=(),
        pair=(1e-5, 2),
        target=float("inf"),
        data=Path("c"),
        inner=Inner(rate=3e-5, kind="cosine"),
    )
    text = options.write_yaml(options.to_mapping(config))
    assert options.override(Outer(), yaml.safe_load(text), source="x.yaml") == config


def test_override_leaves_other_fields_alone_and_reads_numbers_as_people_write_them():
    changed = options.override(Outer(), {"inner": {"rate": "1e-3"}, "target": 2}, source="x.yaml")
    assert changed == Outer(inner=Inner(rate=0.001), target=2.0)
    assert isinstance(changed.target, float)
    assert options.override(Outer(target=1.0), {"target": None}, source="x.yaml") == Outer()


@pytest.mark.parametrize(
    ("mapping", "told"),
    [
        ({"stepz": 1}, "x.yaml: unknown key 'stepz'; did you mean 'steps'?"),
        ({"inner": {"rat": 1}}, "x.yaml: unknown key 'inner.rat'; did you mean 'inner.rate'?"),
        ({"rate": 1}, "x.yaml: unknown key 'rate'; did you mean 'inner.rate'?"),
        ({"qqqqqq": 1}, "x.yaml: unknown key 'qqqqqq'"),
        ({"steps": 1.5}, "x.yaml: steps must be a whole number, not 1.5"),
        ({"steps": True}, "x.yaml: steps must be a whole number, not True"),
        ({"steps": "3"}, "x.yaml: steps must be a whole number, not '3'"),
        ({"whiten": 1}, "x.yaml: whiten must be true or false, not 1"),
        ({"name": 3}, "x.yaml: name must be a text, not 3"),
        ({"shape": 3}, "x.yaml: shape must be a list, not 3"),
        ({"shape": [1, 2.5]}, "x.yaml: shape[1] must be a whole number, not 2.5"),
        ({"pair": [1.0]}, "x.yaml: pair must have 2 entries, not 1"),
        ({"target": "high"}, "x.yaml: target must be a number, not 'high'"),
        ({"inner": {"rate": False}}, "x.yaml: inner.rate must be a number, not False"),
        ({"inner": {"kind": "cosin"}}, "'cosin'; did you mean 'cosine'?"),
        ({"inner": 3}, "x.yaml: inner must be a section of keys, not 3"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_file_and_its_mend(mapping, told):
    with pytest.raises(ValueError) as error:
        options.override(Outer(), mapping, source="x.yaml")
    assert told in str(error.value)


def test_preset_then_yaml_then_flags(experiments, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("seed: 5\nwidth: 16\nppo: {clip-low: 0.3, epochs: 2}\n")
    preset = {
        "experiment": "summarize",
        "seed": 0,
        "max_steps": None,
        "width": 8,
        "ppo": {"clip_low": 0.2, "epochs": 4, "whiten": True},
    }
    assert printed_config([], experiments, capsys) == preset
    arguments = [
        "length",
        "--config",
        "mine.yaml",
        "--ppo.epochs",
        "9",
        "--ppo.no-whiten",
        "--max_steps",
        "3",
    ]
    expected = {
        "experiment": "length",
        "seed": 5,
        "max_steps": 3,
        "width": 16,
        "ppo": {"clip_low": 0.3, "epochs": 9, "whiten": False},
    }
    assert printed_config(arguments, experiments, capsys) == expected


def test_printed_config_can_be_given_back(experiments, tmp_path, capsys):
    arguments = ["length", "--ppo.clip_low", "1e-05", "--seed=3"]
    first = printed_config(arguments, experiments, capsys)
    (tmp_path / "back.yaml").write_text(options.write_yaml(first))
    assert printed_config(["--config=back.yaml"], experiments, capsys) == first


def test_help_list_and_print_config_do_not_import_jax(experiments):
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from experiments import run
for arguments in (["--help"], ["length", "--help"], ["--list"], ["--print-config"]):
    try:
        run.main(arguments, Path({str(experiments)!r}))
    except SystemExit as end:
        assert end.code == 0
assert "jax" not in sys.modules, "jax was imported"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for expected in (
        "--ppo.clip-low",
        "Lower clip.",
        "a fake: length",
        "--seed",
        "Experiments: length, summarize",
    ):
        assert expected in done.stdout, expected


def test_list_names_experiments_only(experiments):
    assert run.list_experiments(experiments) == "length     a fake: length\nsummarize  a fake: summarize"


def test_a_mistyped_flag_is_told_the_right_one(experiments, capsys):
    with pytest.raises(SystemExit) as end:
        run.main(["--ppo.clip-lo", "0.1"], experiments)
    assert end.value.code == 2
    assert "--ppo.clip-low" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--ppo.epochs", "many"], experiments)
    assert "--ppo.epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["lenght"], "no experiment named 'lenght'; did you mean 'length'? (there are: length, summarize)"),
        (["--config", "none.yaml"], "no such file: none.yaml"),
        (["--config", "broken.yaml"], "broken.yaml is not valid YAML"),
        (["--config", "list.yaml"], "list.yaml must hold keys and values"),
        (["--config", "typo.yaml"], "typo.yaml: unknown key 'ppo.epoch'; did you mean 'ppo.epochs'?"),
        (
            ["summarize", "--config", "other.yaml"],
            "other.yaml is for the experiment 'length', not 'summarize'",
        ),
        (["--log", "tensorbord"], "no tracker named 'tensorbord'; did you mean 'tensorboard'?"),
        (["--resume", "nowhere"], "--resume nowhere: not a run folder"),
        (["--run-dir", "experiments"], "experiments is there already"),
        (["--resume", "old", "--run-dir", "new"], "give one of them"),
        (["--config", "number.yaml"], "no experiment named '3'"),
        (["--profile", "-1"], "--profile -1 must be at least 0 steps"),
        (["--config", "seed.yaml"], "seed.yaml: seed must be a whole number, not 'x'"),
    ],
)
def test_a_mistake_on_the_command_line_ends_with_one_clear_line(
    experiments, tmp_path, capsys, arguments, told
):
    (tmp_path / "broken.yaml").write_text("ppo: 3\n a: [\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "typo.yaml").write_text("ppo:\n  epoch: 3\n")
    (tmp_path / "number.yaml").write_text("experiment: 3\n")
    (tmp_path / "seed.yaml").write_text("seed: x\n")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text(options.write_yaml(printed_config([], experiments, capsys)))
    (tmp_path / "other.yaml").write_text("experiment: length\n")
    error = error_of(arguments, experiments, capsys)
    assert told in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_a_run_leaves_config_environment_and_summary(experiments, tmp_path, capsys):
    assert run.main(["length", "--seed", "4", "--max-steps", "2", "--width", "9"], experiments) == 0
    (folder,) = (tmp_path / "runs" / "length").iterdir()
    assert folder.name.endswith("-s4")
    assert (folder / "ran").read_text() == "9 4 2"
    assert yaml.safe_load((folder / "config.yaml").read_text())["width"] == 9
    environment = yaml.safe_load((folder / "environment.json").read_text())
    assert environment["sessions"][0]["versions"]["jax"]
    assert yaml.safe_load((folder / "summary.json").read_text()) == {"score": 0.5}
    assert f"Results are in {folder.relative_to(tmp_path)}" in capsys.readouterr().out


def test_resume_keeps_the_configuration_and_says_what_differs(experiments, tmp_path, capsys):
    assert run.main(["length", "--run-dir", "mine", "--seed", "4", "--width", "9"], experiments) == 0
    (tmp_path / "mine" / "ran").unlink()
    assert run.main(["--resume", "mine"], experiments) == 0
    assert (tmp_path / "mine" / "ran").read_text() == "9 4 None"
    assert len(yaml.safe_load((tmp_path / "mine" / "environment.json").read_text())["sessions"]) == 2
    assert run.main(["length", "--resume", "mine", "--width", "9"], experiments) == 0
    capsys.readouterr()
    changes = ["--width", "10", "--ppo.epochs", "1", "--seed", "5"]
    error = error_of(["--resume", "mine", *changes], experiments, capsys)
    for line in ("seed: saved 4, given 5", "width: saved 9, given 10", "ppo.epochs: saved 4, given 1"):
        assert line in error
    error = error_of(["summarize", "--resume", "mine"], experiments, capsys)
    assert "mine is for the experiment 'length', not 'summarize'" in error


def test_an_error_in_the_experiment_says_how_to_go_on(experiments, tmp_path, capsys):
    source = (experiments / "length.py").read_text()
    (experiments / "length.py").write_text(source.replace('return {"score": 0.5}', "raise KeyError('gone')"))
    assert run.main(["length", "--run-dir", "mine"], experiments) == 1
    error = capsys.readouterr().err
    assert "KeyError: 'gone'" in error
    assert "python experiments/run.py --resume mine" in error
    assert not (tmp_path / "mine" / "summary.json").exists()


def test_a_mistake_found_during_the_run_is_one_clear_line_and_its_traceback_is_kept(
    experiments, tmp_path, capsys
):
    source = (experiments / "length.py").read_text()
    (experiments / "length.py").write_text(
        source.replace('return {"score": 0.5}', "raise ValueError('5 prompts are too few: give 8')")
    )
    assert run.main(["length", "--run-dir", "mine"], experiments) == 1
    error = capsys.readouterr().err
    assert "error: 5 prompts are too few: give 8" in error and "Traceback" not in error
    assert "Traceback" in (tmp_path / "mine" / "error.txt").read_text()


def test_the_compilation_cache_lies_where_the_environment_says(tmp_path, monkeypatch):
    import jax

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        jax.config.update(names[0], None)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("RLHFJAX_CACHE_DIR", "")
        run.use_compilation_cache()
        assert getattr(jax.config, names[0]) is None
        monkeypatch.setenv("RLHFJAX_CACHE_DIR", str(tmp_path))
        run.use_compilation_cache()
        assert Path(getattr(jax.config, names[0])).parent == tmp_path
        (tmp_path / "file").touch()
        monkeypatch.setenv("RLHFJAX_CACHE_DIR", str(tmp_path / "file"))
        run.use_compilation_cache()  # an unusable place is a note, not the end of the run
        assert Path(getattr(jax.config, names[0])).parent == tmp_path
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_options_and_experiments_share_no_field():
    """Both are typed as flags without prefix, so a name in both would be read twice."""
    runner = {field.name for field in dataclasses.fields(run.RunOptions)} | {"experiment"}
    for name in run.find_experiments(run.HERE):
        config = run.load_experiment(name, run.HERE).Config
        assert not runner & {field.name for field in dataclasses.fields(config)}, name
