"""The loop: what it computes, and that a killed and resumed run ends in the bits of one never stopped."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import arrays, loop, run
from rlhfjax import run_folder
from rlhfjax.checkpoint import Checkpoints

ROOT = Path(run.__file__).resolve().parents[1]
BITWISE = ("metrics.jsonl", "samples.jsonl", "summary.json")

# Three stages and a computation between them. The state is donated, as a real one is.
EXPERIMENT = """
import time
from dataclasses import dataclass

DESCRIPTION = "three small stages"


@dataclass(frozen=True)
class Config:
    steps: int = 9
    pause: float = 0.0


def run(config, folder):
    import jax
    import jax.numpy as jnp

    from functools import partial

    from experiments.loop import Show, run_once, run_stage

    root = jax.random.key(folder.seed)

    @partial(jax.jit, donate_argnums=0)
    def update(state, i):
        noise = jax.random.normal(jax.random.fold_in(root, i), state["w"].shape)
        w = state["w"] * jnp.float32(0.9) + noise
        metrics = {"loss": jnp.mean(w * w), "norm": jnp.sqrt(jnp.sum(w * w)), "trained_tokens": jnp.int32(7)}
        return {"w": w, "count": state["count"] + 1}, metrics, {"w": w}

    def step(state, i):
        time.sleep(config.pause)
        return update(state, i)

    def rows(step, aux):
        return [{"text": f"[{step}] é", "w": float(w)} for w in aux["w"][:2]]

    def stage(name, w, steps):
        return run_stage(
            name,
            folder=folder,
            init=lambda: {"w": jnp.array(w, jnp.float32), "count": jnp.int32(0)},
            step=step,
            steps=steps,
            checkpoint_every=4,
            keep=KEEP,
            show=Show(samples=rows, samples_every=3),
        )

    first = stage("sft", [0.0, 1.0, 2.0], config.steps)
    pairs = run_once(
        "pairs",
        folder=folder,
        compute=lambda: ({"w": first["w"] * 2}, {"mean": first["w"].mean()}, [{"text": "pair"}]),
    )
    second = stage("reward", pairs["w"], config.steps - 2)
    last = stage("ppo", second["w"] + first["w"], config.steps)
    return {f"w{i}": float(w) for i, w in enumerate(last["w"])} | {"count": int(last["count"])}
"""


def folder_at(path, **settings):
    return run_folder.create(path, "experiment: fake\n", experiment="fake", seed=0, exact=True, **settings)


def count_up(name, folder, steps, **changes):
    """A stage whose state is the sum 0 + 1 + ... of its step numbers."""

    def step(state, i):
        return state + i, {"total": state + i}

    settings = {"init": lambda: jnp.float32(0), "step": step, "steps": steps, "checkpoint_every": 3} | changes
    return loop.run_stage(name, folder=folder, **settings)


@pytest.fixture
def experiment(tmp_path):
    """Writes the experiment, keeping every checkpoint: so a copy never meets one that is being deleted."""
    directory = tmp_path / "experiments"
    directory.mkdir()
    (directory / "three.py").write_text(EXPERIMENT.replace("KEEP", "100"))
    return directory


def bits(folder):
    return {name: (folder / name).read_bytes() for name in BITWISE}


def newest_arrays(folder, stage):
    like = {"w": jnp.zeros(3, jnp.float32), "count": jnp.int32(0)}
    with Checkpoints(folder / "checkpoints" / stage) as checkpoints:
        restored = checkpoints.restore_latest(like)
    assert restored is not None
    step, state = restored
    return step, np.asarray(state["w"]).tobytes(), int(state["count"])


def test_a_stage_runs_every_step_once_in_order(tmp_path):
    folder = folder_at(tmp_path / "run")
    assert float(count_up("sum", folder, 7)) == sum(range(7))
    totals = [sum(range(step)) for step in range(1, 8)]
    assert folder.metrics() == [
        {"stage": "sum", "step": step, "total": float(total)} for step, total in enumerate(totals, start=1)
    ]
    with Checkpoints(folder.checkpoints("sum")) as checkpoints:
        assert checkpoints.steps() == [6, 7]


def test_a_finished_stage_is_restored_not_repeated(tmp_path):
    folder = folder_at(tmp_path / "run")
    count_up("sum", folder, 4)
    before = (folder.path / "metrics.jsonl").read_bytes()
    state = count_up("sum", folder, 4, step=lambda state, i: pytest.fail("a step was repeated"))
    assert float(state) == 6.0
    assert (folder.path / "metrics.jsonl").read_bytes() == before


def test_max_steps_caps_every_stage(tmp_path):
    folder = folder_at(tmp_path / "run", max_steps=2)
    assert float(count_up("one", folder, 7)) == 1.0
    assert float(count_up("two", folder, 1)) == 0.0
    assert [(line["stage"], line["step"]) for line in folder.metrics()] == [
        ("one", 1),
        ("one", 2),
        ("two", 1),
    ]


@pytest.mark.parametrize(
    ("profile", "steps", "traced"), [(0, 5, []), (2, 5, [3, 4]), (9, 4, [3, 4]), (1, 1, [1])]
)
def test_steps_are_traced_where_it_is_asked_for(tmp_path, capsys, profile, steps, traced):
    folder = run_folder.RunFolder(tmp_path, profile=profile)
    state = loop.run_stage(
        "sft",
        folder=folder,
        init=lambda: jnp.float32(0),
        step=lambda state, i: (state + 1, {"x": state}),
        steps=steps,
    )
    assert float(state) == steps
    files = {path.relative_to(tmp_path / "profile").parts[:2] for path in tmp_path.rglob("*.xplane.pb")}
    assert files == {("sft", f"step-{i}") for i in traced}
    assert ("is traced in" in capsys.readouterr().out) == bool(traced)


def test_metrics_are_fetched_while_the_next_step_runs(tmp_path, monkeypatch):
    events = []
    folder = folder_at(tmp_path / "run")
    log = run_folder.RunFolder.log_metrics
    monkeypatch.setattr(
        run_folder.RunFolder,
        "log_metrics",
        lambda self, *line: (events.append(f"log {line[1]}"), log(self, *line)),
    )

    def step(state, batch, i):
        events.append(f"step {i + 1}")
        return state + batch, {"total": state}

    def batch(i):
        events.append(f"batch {i + 1}")
        return jnp.float32(10 * i)

    assert float(count_up("sum", folder, 4, step=step, batch=batch, checkpoint_every=3)) == 60.0
    expected = (
        "batch 1, step 1, batch 2, step 2, log 1, batch 3, step 3, log 2, log 3, batch 4, step 4, log 4"
    )
    assert ", ".join(events) == expected


def test_a_checkpoint_is_saved_only_after_its_lines_are_on_the_disk(tmp_path, monkeypatch):
    folder = folder_at(tmp_path / "run")
    synced, save = [], Checkpoints.save
    monkeypatch.setattr(run_folder.RunFolder, "sync", lambda self: synced.append(len(self.metrics())))

    def checked(self, step, state):
        assert synced[-1] == step
        save(self, step, state)

    monkeypatch.setattr(Checkpoints, "save", checked)
    count_up("sum", folder, 7)
    assert synced == [3, 6, 7]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stops_the_run_and_is_not_checkpointed(tmp_path, bad):
    folder = folder_at(tmp_path / "run")

    def step(state, i):
        return state, {"policy_loss": jnp.where(i == 4, bad, 0.5), "fine": jnp.float32(1)}

    with pytest.raises(FloatingPointError, match=r"stage ppo, step 5: policy_loss = (nan|inf)\.") as error:
        count_up("ppo", folder, 9, step=step, checkpoint_every=5)
    assert "fine" not in str(error.value)
    assert folder.metrics()[-1] == {"stage": "ppo", "step": 5, "policy_loss": None, "fine": 1.0}
    with Checkpoints(folder.checkpoints("ppo")) as checkpoints:
        assert checkpoints.steps() == []


def test_a_metric_may_be_declared_to_have_no_value(tmp_path):
    folder = folder_at(tmp_path / "run")
    count_up(
        "ppo", folder, 1, step=lambda s, i: (s, {"gold": jnp.float32(jnp.nan)}), nullable=frozenset(["gold"])
    )
    assert folder.metrics() == [{"stage": "ppo", "step": 1, "gold": None}]


def test_measurements_are_kept_apart_from_results(tmp_path):
    heard = []
    tracker = run_folder.Tracker(lambda *entry: heard.append(entry), lambda: None)
    folder = folder_at(tmp_path / "run")
    folder = run_folder.RunFolder(folder.path, tracker=tracker)
    count_up(
        "ppo", folder, 2, step=lambda s, i: (s, {"loss": 0.5, "generated_tokens": 300, "perf/wait": 0.25})
    )
    assert folder.metrics()[1] == {"stage": "ppo", "step": 2, "loss": 0.5, "generated_tokens": 300}
    perf = run_folder.read_lines(folder.path / "perf.jsonl")[1]
    assert perf["wait"] == 0.25 and perf["seconds"] > 0 and perf["compile_seconds"] == 0
    assert perf["generated_tokens_per_second"] == pytest.approx(300 / perf["seconds"])
    stage, step, values = heard[1]
    assert (stage, step) == ("ppo", 2)
    assert values["loss"] == 0.5 and values["perf/seconds"] == perf["seconds"]


def test_rates_leave_out_the_steps_that_compiled():
    steps = [
        {"seconds": 10.0, "compile_seconds": 9.0, "generated_tokens": 100},
        {"seconds": 1.0, "compile_seconds": 0.0, "generated_tokens": 100},
        {"seconds": 3.0, "compile_seconds": 0.0, "generated_tokens": 300},
    ]
    assert loop._rates(steps) == {"generated_tokens_per_second": 100.0}
    assert loop._rates(steps[:1]) == {}


def test_compile_seconds_are_counted():
    clock = loop.compile_clock()
    before, _ = clock()
    compiled = jax.jit(lambda x: x * 3 + 1)
    compiled(jnp.float32(2)).block_until_ready()
    after, _ = clock()
    compiled(jnp.float32(3)).block_until_ready()
    assert after > before
    assert clock()[0] == after


def test_plain_numbers():
    assert loop.plain_number(jnp.float32(0.1)) == 0.1
    assert loop.plain_number(jnp.bfloat16(0.5)) == 0.5
    assert loop.plain_number(np.float64(0.1)) == 0.1
    assert isinstance(loop.plain_number(jnp.int32(3)), int)
    assert np.float32(loop.plain_number(np.float32(1 / 3))) == np.float32(1 / 3)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        loop.plain_number(jnp.zeros(2))


def test_lines_are_shown_about_twenty_times_a_stage(tmp_path, capsys):
    count_up("sum", folder_at(tmp_path / "run"), 100, checkpoint_every=100)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 21  # the first, and every fifth
    assert shown[-1] == f"{'sum':<12} 100/100  total 4,950"


def test_samples_are_shown_and_kept_every_so_often_and_at_the_end(tmp_path, capsys):
    folder = folder_at(tmp_path / "run")
    show = loop.Show(samples=lambda step, aux: [{"text": f"text {float(aux)}"}], samples_every=3)
    count_up("ppo", folder, 7, step=lambda s, i: (s, {}, jnp.float32(10 * i)), show=show)
    rows = run_folder.read_lines(folder.path / "samples.jsonl")
    expected = [(3, "text 20.0"), (6, "text 50.0"), (7, "text 60.0")]
    assert [(row["step"], row["text"]) for row in rows] == expected
    assert "text 20.0" in capsys.readouterr().out


def test_a_stage_whose_checkpoints_are_all_damaged_is_a_clear_error(tmp_path):
    folder = folder_at(tmp_path / "run")
    count_up("sum", folder, 4)
    for manifest in folder.checkpoints("sum").glob("*/manifest.json"):
        manifest.unlink()
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(FileNotFoundError, match=r"stage sum: none of its checkpoints \(steps \[3, 4\]\)"),
    ):
        count_up("sum", folder, 4)


def test_computing_once(tmp_path):
    folder = folder_at(tmp_path / "run")
    calls = []

    def compute():
        calls.append(1)
        return {"x": jnp.arange(3), "text": ["a", "é"]}, {"mean": jnp.float32(1)}, [{"text": "row"}]

    first = loop.run_once("pairs", folder=folder, compute=compute)
    logs = bits_of_logs(folder)
    again = loop.run_once("pairs", folder=folder, compute=compute)
    assert len(calls) == 1 and bits_of_logs(folder) == logs
    for found in (first, again):
        assert found["x"].tolist() == [0, 1, 2] and found["text"].tolist() == ["a", "é"]
    assert folder.metrics() == [{"stage": "pairs", "step": 0, "mean": 1.0}]
    path = folder.path / "arrays" / "pairs.npz"
    path.write_bytes(path.read_bytes()[:-30])
    loop.run_once("pairs", folder=folder, compute=compute)
    assert len(calls) == 2 and bits_of_logs(folder) == logs
    with pytest.raises(TypeError, match=r"names: \['x'\] cannot be kept"):
        loop.run_once("names", folder=folder, compute=lambda: ({"x": np.array([None])}, {}, []))


def bits_of_logs(folder):
    return [(folder.path / name).read_bytes() for name in run_folder.DETERMINISTIC_LOGS]


def test_whatever_a_kill_leaves_behind_the_resumed_run_ends_in_the_same_bits(
    experiment, tmp_path, monkeypatch
):
    """After every write the folder is copied, as a kill at that moment would leave it; copies are resumed."""
    copies = []

    def copy_after(function):
        def wrapped(*arguments):
            result = function(*arguments)
            copies.append(tmp_path / f"copy-{len(copies)}")
            # A checkpoint in the making is renamed under the copy's feet: left out, as if the kill was first.
            shutil.copytree(tmp_path / "whole", copies[-1], ignore=shutil.ignore_patterns("*.partial"))
            return result

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "append_line", copy_after(run_folder.append_line))
        patch.setattr(arrays, "write_atomically", copy_after(arrays.write_atomically))
        patch.setattr(Checkpoints, "save", copy_after(Checkpoints.save))
        assert run.main(["three", "--run-dir", str(tmp_path / "whole")], experiment) == 0
    expected = bits(tmp_path / "whole")
    assert len(copies) > 60
    chosen = random.Random(0).sample(copies, 9) + copies[:1] + copies[-1:]
    for number, copy in enumerate(chosen):
        if number % 2:  # the kill came in the middle of a line
            log = copy / BITWISE[number // 2 % 2]
            log.write_bytes(log.read_bytes() + b'{"stage": "ppo", "st')
        assert run.main(["--resume", str(copy)], experiment) == 0
        assert bits(copy) == expected, copy
        for stage in ("sft", "reward", "ppo"):
            assert newest_arrays(copy, stage) == newest_arrays(tmp_path / "whole", stage)


def test_a_damaged_last_checkpoint_costs_steps_but_no_bit(experiment, tmp_path):
    path = tmp_path / "whole"
    assert run.main(["three", "--run-dir", str(path)], experiment) == 0
    expected, arrays = bits(path), newest_arrays(path, "ppo")
    (path / "checkpoints" / "reward" / "7" / "manifest.json").write_text("garbage")
    with pytest.warns(UserWarning, match="reward/7"):
        assert run.main(["--resume", str(path)], experiment) == 0
    assert bits(path) == expected and newest_arrays(path, "ppo") == arrays
    assert (path / "checkpoints" / "ppo.stale-1").is_dir()


def start(experiment, arguments, log):
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path; from experiments import run\n"
        f"sys.exit(run.main(sys.argv[1:], Path({str(experiment)!r})))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT
    )


def kill_at(process, metrics, lines, delay, log):
    """Kills the process a moment after so many lines of metrics; False where it ended before."""
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        if process.poll() is not None:
            assert process.returncode == 0, Path(log.name).read_text()
            return False
        assert time.monotonic() < deadline, Path(log.name).read_text()
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


@pytest.mark.slow
def test_kill_minus_nine_again_and_again_then_the_same_bits(experiment, tmp_path, monkeypatch):
    (experiment / "three.py").write_text(EXPERIMENT.replace("KEEP", "2"))
    monkeypatch.setenv(
        "RLHFJAX_CACHE_DIR", str(tmp_path / "cache")
    )  # resumed runs read compiled programs back
    settings = ["--steps", "25", "--pause", "0.01", "--seed", "3"]
    with open(tmp_path / "log", "w") as log:
        whole = start(experiment, ["three", "--run-dir", str(tmp_path / "whole"), *settings], log)
        assert whole.wait(timeout=300) == 0, Path(log.name).read_text()
        draw, path, kills = random.Random(1), tmp_path / "killed", 0
        arguments = ["three", "--run-dir", str(path), *settings]
        for lines in sorted(draw.sample(range(2, 70), 4)):
            process = start(experiment, arguments, log)
            kills += kill_at(process, path / "metrics.jsonl", lines, draw.uniform(0, 0.05), log)
            arguments = ["--resume", str(path)]
        assert kills >= 3
        assert start(experiment, arguments, log).wait(timeout=300) == 0, Path(log.name).read_text()
    assert bits(path) == bits(tmp_path / "whole")
    assert json.loads((path / "summary.json").read_text())["count"] == 25
    for stage in ("sft", "reward", "ppo"):
        assert newest_arrays(path, stage) == newest_arrays(tmp_path / "whole", stage)
