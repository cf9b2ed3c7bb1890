"""Several processes as one run: real ones on this machine, one CPU device each, joined by JAX's coordination service.

Each test that starts some has a time-out and ends them whatever happens.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments import run
from rlhfjax import processes, run_folder

ROOT = Path(run.__file__).resolve().parents[1]
LAUNCH = ROOT / "experiments" / "launch"
BITWISE = ("metrics.jsonl", "samples.jsonl", "summary.json")
HEARTBEAT = 10  # seconds until a process that died is noticed
SECONDS = 120  # until a test gives up

# Two stages over all devices of all processes, and a computation between them; rows split, so that all must fetch.
EXPERIMENT = """
import os
import time
from dataclasses import dataclass

DESCRIPTION = "rows on all devices"


@dataclass(frozen=True)
class Config:
    steps: int = 5
    pause: float = 0.0
    broken_on: int = -1
    not_finite_at: int = -1


def run(config, folder):
    import jax
    import jax.numpy as jnp

    from experiments.loop import Show, run_once, run_stage
    from rlhfjax.mesh import kept, make_mesh, put

    mesh = make_mesh(folder.mesh)
    root = jax.random.key(folder.seed)

    def update(state, i):
        noise = jax.random.normal(jax.random.fold_in(root, i), state["w_B"].shape)
        w = state["w_B"] * jnp.float32(0.9) + noise * jnp.mean(state["w_B"])
        return {"w_B": w, "count": state["count"] + 1}, {"loss": jnp.mean(w * w), "trained_tokens": 8}, {"w_B": w}

    compiled = jax.jit(kept(mesh, update), donate_argnums=0)

    def step(state, i):
        time.sleep(config.pause)
        if i == 3 and config.broken_on == jax.process_index():
            raise ValueError("planted")
        state, metrics, aux = compiled(state, i)
        if i == config.not_finite_at:
            metrics["loss"] = metrics["loss"] * jnp.nan
        return state, metrics, aux

    def stage(name, w, steps):
        return run_stage(
            name,
            folder=folder,
            init=lambda: put(mesh, {"w_B": jnp.asarray(w, jnp.float32), "count": jnp.int32(0)}),
            step=step,
            steps=steps,
            checkpoint_every=2,
            show=Show(
                samples=lambda step, aux: [{"text": f"[{step}]", "w": float(w)} for w in aux["w_B"][3:5]],
                samples_every=2,
                measure=lambda step, aux: {"largest": float(aux["w_B"].max())},
            ),
        )

    first = stage("sft", jnp.arange(1.0, 9.0), config.steps)
    pairs = run_once("pairs", folder=folder, compute=lambda: ({"w": first["w_B"] * 2}, {"two": 2.0}, []))
    last = stage("ppo", pairs["w"], config.steps + 1)
    largest = max(line["largest"] for line in folder.metrics("ppo"))
    (folder.path / "own_file").write_text("written by every process into its own folder")
    return {"count": int(last["count"]), "largest": largest}
"""

PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
"""
RUN = PROGRAM + "from experiments import run\nsys.exit(run.main(sys.argv[2:], Path(sys.argv[1])))"


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("", 0))
        return trial.getsockname()[1]


@contextlib.contextmanager
def started(
    program: str, arguments: Sequence[Sequence[str]], log: Path, places: Sequence[Path] = ()
) -> Iterator[list[subprocess.Popen[str]]]:
    """One process for each list of arguments, one CPU device each; `log`-NUMBER gets what each prints.

    A free port, the number of processes and its own number are told by `--distributed`.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    port, running = free_port(), []
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        for number, own in enumerate(arguments):
            joined = [
                f"--distributed=localhost:{port},{len(arguments)},{number}",
                f"--heartbeat-seconds={HEARTBEAT}",
            ]
            with open(f"{log}-{number}", "w") as out, open(f"{log}-{number}-errors", "w") as errors:
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-c", program, *own, *joined],
                        stdout=out,
                        stderr=errors,
                        env=environment,
                        cwd=places[number] if places else None,
                        text=True,
                    )
                )
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def ended(running: Sequence[subprocess.Popen[str]], seconds: float = SECONDS) -> list[int]:
    """The exit statuses; fails where one goes on for longer."""
    end = time.monotonic() + seconds
    return [process.wait(max(0.1, end - time.monotonic())) for process in running]


def said(log: Path, number: int) -> str:
    return Path(f"{log}-{number}").read_text() + Path(f"{log}-{number}-errors").read_text()


def all_said(log: Path) -> str:
    return "\n".join(
        f"--- {path.name}\n{path.read_text()}" for path in sorted(log.parent.glob(f"{log.name}-*"))
    )


def run_all(experiment: Path, log: Path, *arguments: str, count: int = 2) -> list[int]:
    with started(RUN, [[str(experiment), *arguments]] * count, log) as running:
        return ended(running)


def wait_for_lines(path: Path, lines: int, running: Sequence[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + SECONDS
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < end and all(process.poll() is None for process in running)
        time.sleep(0.005)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experiments")
    (directory / "rows.py").write_text(EXPERIMENT)
    return directory


@pytest.fixture(scope="module")
def twelve_steps(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing stopped."""
    path = tmp_path_factory.mktemp("whole")
    assert run_all(experiment, path / "log", "rows", "--run-dir", str(path / "run"), "--steps=12") == [0, 0]
    return path / "run"


def bits(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in BITWISE}


def assert_close(left: Path, right: Path) -> None:
    """Two runs agree: the same lines, numbers to rounding (a mean over devices sums in another order)."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        ours, theirs = run_folder.read_lines(left / name), run_folder.read_lines(right / name)
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            assert [one[k] for k in ("stage", "step")] == [other[k] for k in ("stage", "step")]
            numbers = [key for key, value in one.items() if isinstance(value, float)]
            np.testing.assert_allclose([one[k] for k in numbers], [other[k] for k in numbers], rtol=2e-5)


def alone(experiment: Path, path: Path, *arguments: str) -> Path:
    """The same run on one device of this process."""
    assert run.main(["rows", "--run-dir", str(path), "--mesh.data", "1", *arguments], experiment) == 0
    return path


def test_two_processes_are_one_run(experiment: Path, tmp_path: Path):
    log, path = tmp_path / "log", tmp_path / "run"
    assert run_all(experiment, log, "rows", "--run-dir", str(path)) == [0, 0], all_said(log)
    assert_close(path, alone(experiment, tmp_path / "alone"))
    assert "Final numbers" in said(log, 0)
    assert [line for line in said(log, 1).splitlines() if "[Gloo]" not in line] == []  # which prints from C++
    session = json.loads((path / "environment.json").read_text())["sessions"][0]
    assert session["processes"] == 2 and len(session["devices"]) == 2 and session["mesh"]["data"] == 0
    assert sorted(step.name for step in (path / "checkpoints" / "ppo").iterdir()) == ["4", "6"]
    # Each process has written its parts of the arrays, and no folder of its own is left.
    parts = (path / "checkpoints" / "ppo" / "6" / "state").glob("ocdbt.process_*")
    assert sorted(part.name for part in parts) == ["ocdbt.process_0", "ocdbt.process_1"]
    assert {file.name for file in path.iterdir()} == {
        "config.yaml", "environment.json", "checkpoints", "arrays", "own_file", *run_folder.LOGS, "summary.json",
        ".lock",
    }  # fmt: skip
    # And one process alone, on one device, goes on with what two have left.
    expected = bits(path)
    assert run.main(["--resume", str(path), "--mesh.data", "1"], experiment) == 0
    assert bits(path) == expected


def test_different_configurations_are_told_on_all(experiment: Path, tmp_path: Path):
    log, path = tmp_path / "log", tmp_path / "run"
    own = [["--seed=1", "--max-steps=3"], ["--seed=2", "--mesh.fsdp=2", "--max-steps=3"]]
    with started(
        RUN, [[str(experiment), "rows", "--run-dir", str(path), *each] for each in own], log
    ) as running:
        assert ended(running) == [2, 2]
    for number in (0, 1):
        error = said(log, number)
        assert f"error on process {number} of 2: the configuration differs" in error
        assert "seed: 1 on process 0, 2 on process 1" in error
        assert "mesh.fsdp: 0 on process 0, 2 on process 1" in error and "max_steps" not in error
    assert not path.exists()


def outcome(text: str) -> str:
    """What a worker of `SAVE` says last."""
    return next(line for line in reversed(text.splitlines()) if line.startswith("outcome: "))


@pytest.mark.slow
def test_four_processes_are_one_run_and_a_resumed_one_may_have_other_numbers(
    experiment: Path, tmp_path: Path
):
    path, whole = tmp_path / "run", alone(experiment, tmp_path / "alone")
    first = ["rows", "--run-dir", str(path), "--mesh.fsdp", "2"]
    with started(RUN, [[str(experiment), *first, "--pause=0.5"]] * 4, tmp_path / "a") as running:
        wait_for_lines(path / "metrics.jsonl", 3, running)
    saved = sorted(
        int(step.name) for step in (path / "checkpoints" / "sft").iterdir() if step.name.isdecimal()
    )
    assert saved, "nothing was saved before the end"
    with started(
        RUN, [[str(experiment), "--resume", str(path), "--mesh.data", "2"]] * 2, tmp_path / "b"
    ) as running:
        wait_for_lines(path / "metrics.jsonl", 5, running)
    assert run_all(experiment, tmp_path / "c", "--resume", str(path), "--mesh.data", "4", count=4) == [0] * 4
    assert_close(path, whole)
    sessions = json.loads((path / "environment.json").read_text())["sessions"]
    assert [(session["processes"], session["mesh"]["data"]) for session in sessions] == [
        (4, 0),
        (2, 2),
        (4, 4),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_is_killed_in_mid_step_the_others_stop_and_the_run_goes_on(
    victim: int, experiment: Path, twelve_steps: Path, tmp_path: Path
):
    path, log = tmp_path / "run", tmp_path / "log"
    own = [str(experiment), "rows", "--run-dir", str(path), "--steps=12", "--pause=0.3"]
    with started(RUN, [own] * 2, log) as running:
        wait_for_lines(path / "metrics.jsonl", 3, running)
        running[victim].kill()
        begin = time.monotonic()
        assert running[1 - victim].wait(HEARTBEAT + 15) != 0
        assert time.monotonic() - begin < HEARTBEAT + 15
    assert (path / "checkpoints" / "sft" / "2" / "manifest.json").is_file(), all_said(log)
    assert run_all(experiment, tmp_path / "again", "--resume", str(path)) == [0, 0], all_said(
        tmp_path / "again"
    )
    assert bits(path) == bits(twelve_steps)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_on_one_process_ends_all(broken: int, experiment: Path, tmp_path: Path):
    log, path = tmp_path / "log", tmp_path / "run"
    own = [str(experiment), "rows", "--run-dir", str(path), f"--broken-on={broken}"]
    with started(RUN, [own] * 2, log) as running:
        statuses = ended(running, HEARTBEAT + 40)
    assert statuses[broken] == 1 and statuses[1 - broken] != 0
    assert f"error on process {broken} of 2: planted" in said(log, broken)
    assert "planted" in (path / ("error-1.txt" if broken else "error.txt")).read_text()


@pytest.mark.slow
def test_a_number_that_is_not_finite_stops_all_with_the_same_words(experiment: Path, tmp_path: Path):
    log, path = tmp_path / "log", tmp_path / "run"
    assert run_all(experiment, log, "rows", "--run-dir", str(path), "--not-finite-at=2") == [1, 1]
    for number in (0, 1):
        assert f"error on process {number} of 2: stage sft, step 3: loss = nan." in said(log, number)
    assert [step.name for step in (path / "checkpoints" / "sft").iterdir()] == ["2"]


@pytest.mark.slow
@pytest.mark.parametrize("told", [[0], [1], [0, 1]])
def test_sigterm_to_any_process_stops_all_at_one_step(
    told: list[int], experiment: Path, twelve_steps: Path, tmp_path: Path
):
    path, log = tmp_path / "run", tmp_path / "log"
    own = [str(experiment), "rows", "--run-dir", str(path), "--steps=12", "--pause=0.5"]
    with started(RUN, [own] * 2, log) as running:
        wait_for_lines(path / "metrics.jsonl", 2, running)
        for number in told:
            running[number].send_signal(signal.SIGTERM)
        assert ended(running) == [143, 143], all_said(log)
    assert "SIGTERM: stage sft, step " in said(log, 0) and f"--resume {path}" in said(log, 0)
    assert "SIGTERM: stage" not in said(log, 1)
    step = int(said(log, 0).split("SIGTERM: stage sft, step ")[1].split()[0])
    assert (path / "checkpoints" / "sft" / str(step)).is_dir() and 2 < step < 12
    assert run_all(experiment, tmp_path / "again", "--resume", str(path)) == [0, 0], all_said(
        tmp_path / "again"
    )
    assert bits(path) == bits(twelve_steps)


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_on_all(experiment: Path, tmp_path: Path):
    path = tmp_path / "run"
    assert run_all(experiment, tmp_path / "first", "rows", "--run-dir", str(path), "--max-steps=1") == [0, 0]
    assert run_all(experiment, tmp_path / "again", "rows", "--run-dir", str(path), "--max-steps=1") == [2, 2]
    for number in (0, 1):
        assert f"{path} is there already" in said(tmp_path / "again", number)
    with run_folder.lock(path):
        assert run_all(experiment, tmp_path / "locked", "--resume", str(path)) == [2, 2]
    for number in (0, 1):
        assert "another process is working in" in said(tmp_path / "locked", number)


@pytest.mark.slow
def test_a_folder_that_one_process_cannot_see_is_told_on_all(experiment: Path, tmp_path: Path):
    """/proc/self/cwd is another folder for each process, as a local disk is for each machine."""
    log, places = tmp_path / "log", [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    own = [str(experiment), "rows", "--run-dir", "/proc/self/cwd/run"]
    with started(RUN, [own] * 2, log, places) as running:
        assert ended(running) == [2, 2], all_said(log)
    assert "error on process 0 of 2: process 1: FileNotFoundError: /proc/self/cwd/run is not the" in said(
        log, 0
    )
    assert "must lie on a file system that all machines share" in said(log, 1)
    assert list((tmp_path / "a" / "run").glob(".seen*")) == []


@pytest.mark.slow
def test_a_folder_to_resume_that_one_process_lacks_is_told_on_all(experiment: Path, tmp_path: Path):
    log, places = tmp_path / "log", [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    alone(experiment, tmp_path / "a" / "run", "--max-steps=1")
    with started(RUN, [[str(experiment), "--resume", "run"]] * 2, log, places) as running:
        assert ended(running) == [2, 2], all_said(log)
    for number in (0, 1):
        assert "--resume run: not a run folder" in said(log, number)
    assert "error on process 0 of 2: process 1: FileNotFoundError" in said(log, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "not all of them have come to localhost:"), (1, "process 0 cannot be reached at localhost:")],
)
def test_a_process_that_stays_alone_says_so(number: int, words: str):
    program = f"{PROGRAM}from rlhfjax import processes\nprocesses.start(sys.argv[1], join_seconds=3)"
    command = [sys.executable, "-c", program, f"localhost:{free_port()},2,{number}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2 and words in done.stderr and "--join-seconds" in done.stderr


# Saves checkpoints from all processes: argv is directory, plan, --distributed, --heartbeat-seconds.
SAVE = (
    PROGRAM
    + """
import os
import resource
import traceback

from rlhfjax import processes
from rlhfjax.mesh import fetch, make_mesh, put, whole

def die(*error):
    traceback.print_exception(*error)
    sys.stderr.flush()
    os._exit(1)  # at an exit of the usual kind JAX waits for the others


sys.excepthook = die
directory, plan = sys.argv[1:3]
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[3:])
processes.start(flags["distributed"], heartbeat_seconds=int(flags["heartbeat-seconds"]))

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.checkpoint import Checkpoints

mesh, number = make_mesh(), processes.index()


def state_of(step):
    wide = np.random.default_rng(step).normal(size=(8, 8192)).astype(np.float32)
    on_mesh = {
        "split_B": wide,
        "whole": np.float32(step),
        "key": jax.random.key(step),
        "keys_B": jax.random.split(jax.random.key(step), 8),
        "none_B": np.zeros((0, 3), np.float32),
    }
    weak = jax.jit(lambda: jnp.full((2,), 0.5), out_shardings=whole(mesh))()
    return put(mesh, on_mesh) | {"host": np.arange(5) + step, "number": step, "weak": weak}


def plain(state):
    numbers = {k: jax.random.key_data(v) if k.startswith("key") else v for k, v in state.items()}
    return {name: np.asarray(value) for name, value in fetch(numbers).items()}


def kinds(state):
    return {k: (type(v), getattr(v, "sharding", None), getattr(v, "weak_type", None)) for k, v in state.items()}


def same(left, right):
    ours, theirs = plain(left), plain(right)
    assert kinds(left) == kinds(right), (kinds(left), kinds(right))
    return all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def finish(said):
    print(f"outcome: {said}", flush=True)
    processes.leave(0)
    sys.exit(0)


if plan == "elsewhere" and number == 1:
    directory += "-of-another-machine"
checkpoints = Checkpoints(directory)
if plan == "for ever":
    like = state_of(0)
    step, state = checkpoints.restore_latest(like) or (0, like)
    assert same(state, state_of(step)), step
    while True:
        step += 1
        checkpoints.save(step, state_of(step))
        print(step, flush=True)
try:
    checkpoints.save(1, state_of(1))
    checkpoints.wait()
    if plan == "full" and number == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    for step in (2, 3):
        checkpoints.save(step, state_of(step))
    checkpoints.wait()
except (OSError, RuntimeError) as error:
    finish(f"{type(error).__name__}: {error}; left {checkpoints.steps()} {sorted(os.listdir(directory))}")
assert checkpoints.steps() == [2, 3], checkpoints.steps()
restored = checkpoints.restore_latest(state_of(0))
assert restored[0] == 3 and same(restored[1], state_of(3))
assert same(checkpoints.restore(2, state_of(0)), state_of(2))
try:
    checkpoints.save(3, state_of(3))
except (ValueError, RuntimeError) as error:
    finish(f"as saved; {error}")
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_checkpoints_of_several_processes_come_back_bit_for_bit(count: int, tmp_path: Path):
    log = tmp_path / "log"
    with started(SAVE, [[str(tmp_path / "saved"), "all"]] * count, log) as running:
        assert ended(running) == [0] * count, all_said(log)
    for number in range(count):
        assert "as saved; " in outcome(said(log, number)) and "cannot save step 3" in outcome(
            said(log, number)
        )


@pytest.mark.slow
def test_a_full_disk_of_one_process_is_told_on_all_and_the_last_checkpoint_stays(tmp_path: Path):
    log = tmp_path / "log"
    with started(SAVE, [[str(tmp_path / "saved"), "full"]] * 2, log) as running:
        assert ended(running) == [0, 0], all_said(log)
    for number in (0, 1):
        assert "OSError: checkpoint 2 could not be written" in outcome(said(log, number))
        assert "intact: [1]" in outcome(said(log, number)) and "left [1] ['1'" in outcome(said(log, number))
    assert "process 1: ValueError: " in outcome(said(log, 0)) and "left [1] ['1']" in outcome(said(log, 0))


@pytest.mark.slow
def test_a_checkpoint_directory_that_one_process_cannot_see_is_told_on_all(tmp_path: Path):
    log = tmp_path / "log"
    (tmp_path / "saved-of-another-machine").mkdir()
    with started(SAVE, [[str(tmp_path / "saved"), "elsewhere"]] * 2, log) as running:
        assert ended(running) == [0, 0], all_said(log)
    assert "process 1: FileNotFoundError: " in outcome(said(log, 0))
    assert "another-machine/1.partial is not the folder that process 0 made" in outcome(said(log, 1))


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_save_leaves_the_last_checkpoint(tmp_path: Path):
    """One process is killed, at moments spread over the saves; the others stop, and all go on from what is there."""
    draw, newest, folder = random.Random(0), 0, tmp_path / "saved"
    for attempt in range(5):
        log = tmp_path / f"log-{attempt}"
        with started(SAVE, [[str(folder), "for ever"]] * 2, log) as running:
            wait_for_lines(Path(f"{log}-0"), 6, running)
            time.sleep(draw.uniform(0.0, 0.1))
            running[attempt % 2].kill()
            assert running[1 - attempt % 2].wait(HEARTBEAT + 20) != 0
        assert "AssertionError" not in all_said(log)  # what was there was whole
        begun = [int(line) for line in Path(f"{log}-0").read_text().split("\n") if line.isdecimal()]
        there = max(int(step.name) for step in folder.iterdir() if step.name.isdecimal())
        assert (folder / str(there) / "manifest.json").is_file()
        assert begun[-1] - 1 <= there <= begun[-1] + 1 and there > newest
        newest = there


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # the batch script itself is no step
        ({"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "2"}, "slurm"),
        ({"SLURM_STEP_NODELIST": "a1", "SLURM_NTASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "ompi"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod of its own
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "k8s"),
        ({"TPU_WORKER_HOSTNAMES": "one"}, None),
        ({"TPU_WORKER_HOSTNAMES": "one,two"}, "tpu"),
        ({"TPU_PROCESS_ADDRESSES": "one:1,two:1"}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "one", "MEGASCALE_NUM_SLICES": "2"}, "tpu"),
    ],
)
def test_what_has_started_several_processes_is_told_by_the_environment(
    environ: dict[str, str], found: str | None
):
    assert processes.cluster(environ) == found


def test_the_addresses_of_processes_are_read():
    assert processes.parse("10.0.0.1:99,4,3") == ("10.0.0.1:99", 4, 3)
    assert processes.parse("[::1]:9876,2,0") == ("[::1]:9876", 2, 0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("yes", "give auto, on, off or HOST:PORT,COUNT,INDEX"),
        ("host,2,0", "give auto"),
        ("host:1,2", "give auto"),
        ("host:1,2,-1", "give auto"),
        ("host:1,2,2", "from 0 to 1, and 2 is not among them"),
        ("host:0,2,1", "0 is no port"),
        ("host:99999,2,1", "99999 is no port"),
    ],
)
def test_a_malformed_way_to_join_is_refused(how: str, message: str, experiment: Path, tmp_path: Path, capsys):
    with pytest.raises(ValueError, match=message):
        processes.start(how)
    arguments = ["rows", "--run-dir", str(tmp_path / "run"), "--distributed", how]
    assert run.main(arguments, experiment) == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--heartbeat-seconds", "0"], "--heartbeat-seconds 0 must be at least 1"),
        (["--join-seconds", "soon"], "invalid int value: 'soon'"),
        (["--mesh.data", "5"], "the mesh asks for 5 devices"),
        (["--mesh.tensor", "3"], "4 devices cannot be laid out"),
    ],
)
def test_what_cannot_begin_makes_no_folder(
    flags: list[str], message: str, experiment: Path, tmp_path: Path, capsys
):
    assert run.main(["rows", "--run-dir", str(tmp_path / "run"), *flags], experiment) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_told_before_it_crashes_jax(experiment: Path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(OSError, match=r"port \d+ of this machine cannot be used .* choose another"):
            processes.start(f"localhost:{taken.getsockname()[1]},2,0")


def test_one_process_is_alone():
    assert (processes.count(), processes.index(), processes.is_first()) == (1, 0, True)
    assert processes.exchange("x", 3) == [3] and processes.from_first("x", lambda: 4) == 4
    with pytest.raises(KeyError):
        processes.together("x", lambda: {}["no"])
    processes.start("localhost:1,1,0")  # of one: nothing to join
    assert processes.count() == 1 and processes.leave(3) == 3


def test_a_copy_of_the_folder_keeps_the_checkpoints_where_they_are(tmp_path: Path):
    folder = run_folder.create(tmp_path / "run", "a: 1\n", experiment="rows", seed=0, exact=True)
    folder.log_metrics("sft", 1, {"loss": 0.5})
    folder.log_metrics("ppo", 1, {"loss": 0.5})
    (folder.checkpoints("ppo") / "1").mkdir(parents=True)
    with run_folder.own_copy(folder) as own:
        assert own.metrics() == folder.metrics() and own.shared == folder.path
        own.truncate_after("sft", 0)
        assert own.metrics() == [] and len(folder.metrics()) == 2
        assert own.checkpoints("ppo") == folder.checkpoints("ppo") and (own.checkpoints("ppo") / "1").is_dir()
        part = run_folder.replace(own, path=own.path / "seed-3")
        assert part.checkpoints("sft") == folder.path / "seed-3" / "checkpoints" / "sft"
    assert not own.path.exists()


TERMINATED = """
import os
import signal

from dataclasses import dataclass

DESCRIPTION = "sends itself SIGTERM"


@dataclass(frozen=True)
class Config:
    pass


def run(config, folder):
    import jax.numpy as jnp

    from experiments.loop import run_once, run_stage

    def signalled(where):
        marker = folder.path / f"was-{where}"
        if where == os.environ.get("SIGTERM_AT") and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGTERM)

    def step(state, i):
        signalled(f"step-{i + 1}")
        return state + i, {"total": state + i}

    def compute():
        signalled("between")
        return {"x": jnp.arange(3)}, {"mean": 1.0}, []

    total = run_stage("sum", folder=folder, init=lambda: jnp.float32(0), step=step, steps=5, checkpoint_every=4)
    run_once("pairs", folder=folder, compute=compute)
    signalled("end")
    return {"total": float(total)}
"""


@pytest.mark.parametrize(
    ("where", "told", "checkpoints"),
    [
        ("step-2", "stage sum, step 2 of 5", ["2"]),
        ("step-4", "stage sum, step 4 of 5", ["4"]),
        ("step-5", "stage sum, step 5 of 5", ["4", "5"]),
        ("between", "between two stages", ["4", "5"]),
        ("end", "between two stages", ["4", "5"]),
    ],
)
def test_sigterm_saves_and_stops_and_the_resumed_run_has_the_same_bits(
    where: str, told: str, checkpoints: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "terminated.py").write_text(TERMINATED)
    whole, stopped, before = tmp_path / "whole", tmp_path / "stopped", signal.getsignal(signal.SIGTERM)
    assert run.main(["terminated", "--run-dir", str(whole)], tmp_path / "experiments") == 0
    monkeypatch.setenv("SIGTERM_AT", where)
    assert run.main(["terminated", "--run-dir", str(stopped)], tmp_path / "experiments") == 143
    assert signal.getsignal(signal.SIGTERM) is before
    error = capsys.readouterr().err
    assert f"SIGTERM: {told}" in error and f"--resume {stopped}" in error
    assert sorted(step.name for step in (stopped / "checkpoints" / "sum").iterdir()) == checkpoints
    assert (stopped / "arrays" / "pairs.npz").exists() == (where == "end")
    assert not (stopped / "summary.json").exists()
    assert run.main(["--resume", str(stopped)], tmp_path / "experiments") == 0
    assert bits(stopped) == bits(whole)


def environment_with(tmp_path: Path, **programs: str) -> dict[str, str]:
    """The environment, with `programs` (name -> what the shell does in its place) found before all others."""
    (tmp_path / "bin").mkdir()
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)}


PYTHON = 'printf "[%s] " "$@"; exit ${STATUS:-0}'


def shell(script: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], env=env, capture_output=True, text=True, timeout=SECONDS
    )


def test_the_slurm_script_begins_resumes_and_goes_back_into_the_queue(tmp_path: Path):
    env = environment_with(tmp_path, srun='shift; exec "$@"', scontrol='echo "scontrol $@"', python=PYTHON)
    env |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "try"}
    path = tmp_path / "runs" / "try-7"
    first = shell("slurm.sbatch", "length", "--seed", "a b", env=env)
    begun = f"[experiments/run.py] [length] [--seed] [a b] [--run-dir] [{path}] [--mesh.fsdp] [8] "
    assert (first.returncode, first.stdout) == (0, begun)
    path.mkdir(parents=True)
    (path / "config.yaml").touch()
    resumed = f"[experiments/run.py] [--resume] [{path}] [--mesh.fsdp] [8] "
    again = shell("slurm.sbatch", "length", env=env | {"STATUS": "143"})
    assert (again.returncode, again.stdout) == (143, f"{resumed}scontrol requeue 7\n")
    failed = shell("slurm.sbatch", "length", env=env | {"STATUS": "1"})
    assert (failed.returncode, failed.stdout) == (1, resumed)


def test_the_tpu_script_begins_and_resumes_on_all_hosts(tmp_path: Path):
    env = environment_with(tmp_path, gcloud='echo "${@:1:$#-1}"; exec bash -c "${@: -1}"', python=PYTHON)
    path = tmp_path / "a run"
    env |= {"TPU": "slice", "ZONE": "here", "RUN_DIR": str(path)}
    (tmp_path / "rlhfjax").mkdir()
    told = "compute tpus tpu-vm ssh slice --zone here --worker=all --command\n"
    first = shell("tpu_pod.sh", "length", "--name", "it's", env=env)
    assert first.stdout == (
        f"{told}[experiments/run.py] [length] [--name] [it's] [--run-dir] [{path}] [--mesh.fsdp] [8] "
    )
    path.mkdir()
    (path / "config.yaml").touch()
    again = shell("tpu_pod.sh", "length", env=env)
    assert again.stdout == f"{told}[experiments/run.py] [--resume] [{path}] [--mesh.fsdp] [8] "
    assert "zone" in shell("tpu_pod.sh", env={key: env[key] for key in env if key != "ZONE"}).stderr


def test_the_jobset_is_of_the_form_that_kubernetes_takes(tmp_path: Path):
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] == 2
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    env = environment_with(tmp_path, python=PYTHON) | {"JOB_COMPLETION_INDEX": "1"}
    command = [*container["command"], *container["args"]]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS, check=True)
    how = done.stdout.split("[--distributed] [")[1].split("]")[0]
    # The name that JobSet gives the first pod: JOBSET-JOB-0-0.JOBSET
    host = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['metadata']['name']}"
    port = container["ports"][0]["containerPort"]
    assert processes.parse(how) == (f"{host}:{port}", job["parallelism"], 1)


EIGHT = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_run_of_four_devices_goes_on_with_others(devices: int, experiment: Path, tmp_path: Path):
    path, whole = tmp_path / "run", tmp_path / "whole"
    assert run.main(["rows", "--run-dir", str(whole)], experiment) == 0  # on the four devices of this process
    shutil.copytree(whole, path)
    stages = path / "checkpoints"
    for later in (stages / "ppo", stages / "sft" / "5", path / "arrays" / "pairs.npz", path / "summary.json"):
        shutil.rmtree(later) if later.is_dir() else later.unlink()  # as if it had been killed in step 5
    program = EIGHT + RUN.replace("sys.argv[2:], Path(sys.argv[1])", "sys.argv[3:], Path(sys.argv[2])")
    command = [sys.executable, "-c", program, str(devices), str(experiment), "--resume", str(path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert "continues: checkpoint of step 4 of 5" in done.stdout
    assert len(json.loads((path / "environment.json").read_text())["sessions"][1]["devices"]) == devices
    assert_close(path, whole)
