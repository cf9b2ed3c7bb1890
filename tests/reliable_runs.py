"""Runs that are killed, and checkpoints that are spoilt, cut short by the disk or in a place that cannot be written.

Each function tries so many cases from a seed and returns how often what came of it; anything that is not listed there
raises AssertionError.
"""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import yaml

from rlhfjax.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[1]
BITWISE = ("metrics.jsonl", "samples.jsonl", "summary.json")
DAMAGES = ("flip", "cut", "remove", "empty")


def text_run(folder: Path) -> tuple[str, dict[str, Any]]:
    """A small pipeline of text, and its settings: fine-tuning, a reward model, PPO, an evaluation."""
    from tiny_text import write_world

    settings = write_world(folder)
    settings["sft"]["steps"] = settings["reward"]["steps"] = settings["ppo"]["steps"] = 6
    return "summarize", settings


def control_run(folder: Path) -> tuple[str, dict[str, Any]]:
    """A small world of control: PPO, PQN and DQN, with their worlds and replay."""
    del folder
    from test_experiments_control import SETTINGS

    return "cartpole", SETTINGS["cartpole"]


def _command(*arguments: str) -> list[str]:
    # Every stage keeps a checkpoint of every step or two, so that kills fall between, before and behind them.
    program = (
        f"import sys, functools; sys.path.insert(0, {str(ROOT)!r})\n"
        "from experiments import loop, run\n"
        "from experiments.stages import control\n"
        "control.CHECKPOINT_EVERY = 1\n"
        "sys.exit(run.main(sys.argv[1:]))\n"
    )
    return [sys.executable, "-c", program, *arguments]


def final_arrays(run: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint of every stage, by stage and path."""
    found = {}
    for stage in sorted((run / "checkpoints").iterdir()):
        steps = sorted(int(path.name) for path in stage.iterdir() if path.name.isdigit())
        if steps and ".stale-" not in stage.name:
            state = ocp.StandardCheckpointer().restore(stage / str(steps[-1]) / "state")
            found |= {f"{stage.name}/{steps[-1]}{path}": np.asarray(x) for path, x in state.items()}
    return found


def same(run: Path, whole: Path) -> None:
    for name in BITWISE:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), f"{run}: {name} differs"
    ours, theirs = final_arrays(run), final_arrays(whole)
    assert ours.keys() == theirs.keys() and ours
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), f"{run}: {name} differs"


def kills(make: Any, folder: Path, cases: int, seed: int, *, at_most: int = 4) -> Counter[str]:
    """Runs that are killed (SIGKILL) at random moments, up to `at_most` times each, and resumed to the end.

    Counts kills by the stage that was last logged, until there are `cases`.
    """
    generator, seen = np.random.default_rng(seed), Counter()
    name, settings = make(folder)
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "RLHFJAX_CACHE_DIR": str(folder / "cache")}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": environment}

    def begin(path: Path) -> list[str]:
        return _command(name, "--config", str(folder / "settings.yaml"), "--run-dir", str(path))

    subprocess.run(begin(folder / "first"), check=True, **quiet)  # compiles
    start = time.perf_counter()
    subprocess.run(begin(folder / "whole"), check=True, **quiet)
    seconds = time.perf_counter() - start
    same(folder / "first", folder / "whole")
    while seen.total() < cases:
        path = folder / f"run-{seen.total()}"
        for _ in range(generator.integers(1, at_most + 1)):
            resumable = (path / "config.yaml").exists()
            if path.exists() and not resumable:
                shutil.rmtree(path)  # killed before the folder was whole
            child = subprocess.Popen(_command("--resume", str(path)) if resumable else begin(path), **quiet)
            # Starting Python and JAX takes half the time; most kills are to fall behind that.
            time.sleep(seconds * (0.4 + 0.6 * generator.random()))
            child.send_signal(signal.SIGKILL)
            _, error = child.communicate()
            assert child.returncode in (0, -signal.SIGKILL), error
            if child.returncode == 0:
                break
            lines = (
                (path / "metrics.jsonl").read_bytes().splitlines()
                if (path / "metrics.jsonl").exists()
                else []
            )
            whole_lines = [line for line in lines if line.endswith(b"}")]
            seen[json.loads(whole_lines[-1])["stage"] if whole_lines else "before the first step"] += 1
        resumable = (path / "config.yaml").exists()
        if path.exists() and not resumable:
            shutil.rmtree(path)
        last = subprocess.run(_command("--resume", str(path)) if resumable else begin(path), **quiet)
        assert last.returncode == 0, last.stderr.decode()
        same(path, folder / "whole")
        shutil.rmtree(path)
    return seen


# ------------------------------------------------------------------------------------------------------- checkpoints


def state_of(step: int) -> dict[str, Any]:
    generator = np.random.default_rng(step)
    return {
        "w": jnp.asarray(generator.normal(size=(40, 50)), jnp.float32),
        "moments": [jnp.asarray(generator.normal(size=70), jnp.bfloat16)],
        "key": jax.random.key(step),
        "step": step,
    }


def equal(found: Any, step: int) -> bool:
    def raw(x: Any) -> bytes:
        key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if key else x).tobytes()

    return [raw(x) for x in jax.tree.leaves(found)] == [raw(x) for x in jax.tree.leaves(state_of(step))]


def spoilt_checkpoints(folder: Path, cases: int, seed: int) -> Counter[str]:
    """Bytes flipped, files cut short, emptied or removed, in one checkpoint or in both: what `restore_latest` finds."""
    generator, seen = np.random.default_rng(seed), Counter()
    good = folder / "good"
    with Checkpoints(good) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step))
    for case in range(cases):
        spoilt = folder / "spoilt"
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.copytree(good, spoilt)
        both = case % 5 == 4
        kind = DAMAGES[case % len(DAMAGES)]
        for step in ("2", "1")[: 1 + both]:
            files = sorted(path for path in (spoilt / step).rglob("*") if path.is_file())
            damage(files[generator.integers(len(files))], kind, generator)
        with Checkpoints(spoilt) as checkpoints, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = checkpoints.restore_latest(state_of(0))
            assert len([w for w in said if "skipping damaged checkpoint" in str(w.message)]) == 1 + both
            if both:
                assert found is None and checkpoints.steps() == [1, 2]
                seen[f"{kind}: both spoilt, both told of and kept"] += 1
                continue
            assert found is not None and found[0] == 1 and equal(found[1], 1)
            checkpoints.save(2, state_of(22))
            assert equal(checkpoints.restore(2, state_of(0)), 22)
        seen[f"{kind}: the one before was used, and the step saved again"] += 1
    return seen


def damage(file: Path, kind: str, generator: np.random.Generator) -> None:
    content = bytearray(file.read_bytes())
    if kind == "remove":
        file.unlink()
    elif kind == "empty" or not content:
        file.write_bytes(b"" if content else b"x")
    elif kind == "cut":
        file.write_bytes(content[: generator.integers(len(content))])
    else:
        content[generator.integers(len(content))] ^= 1 << int(generator.integers(8))
        file.write_bytes(content)


def full_disk(folder: Path, cases: int, seed: int) -> Counter[str]:
    """Saves with a limit on the size of a file, somewhere within what a checkpoint takes, as if the disk were full."""
    generator, seen = np.random.default_rng(seed), Counter()
    like = {"x": np.zeros(20_000)}
    for case in range(cases):
        place = folder / f"full-{case}"
        with Checkpoints(place) as checkpoints:
            checkpoints.save(1, {"x": np.ones(20_000)})
            checkpoints.wait()
            unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(generator.integers(0, 150_000)), unlimited[1]))
            try:
                checkpoints.save(2, {"x": generator.normal(size=20_000)})
                checkpoints.wait()
            except OSError as error:
                text = str(error)
                assert "checkpoint 2 could not be written to" in text and "intact: [1]" in text, text
            else:
                raise AssertionError("the limit was not met")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            restored = checkpoints.restore_latest(like)
            assert restored is not None and restored[0] == 1 and (restored[1]["x"] == 1).all()
            checkpoints.save(2, {"x": np.full(20_000, 2.0)})
            assert (checkpoints.restore(2, like)["x"] == 2).all()
        shutil.rmtree(place)
        seen["clear error, the checkpoint before intact, saved again once there was room"] += 1
    return seen


def no_place(folder: Path) -> Counter[str]:
    """A file where the folder should be, and a file system that is mounted read-only (where we may mount one)."""
    seen: Counter[str] = Counter()
    (folder / "file").write_text("mine")
    with Checkpoints(folder / "file") as checkpoints:
        try:
            checkpoints.save(1, {"x": 1})
            checkpoints.wait()
        except OSError as error:
            assert str(folder / "file") in str(error)
            seen["a file in its place: clear error"] += 1
        else:
            raise AssertionError("saved into a file")
    assert (folder / "file").read_text() == "mine"
    place = folder / "mounted"
    place.mkdir()
    with Checkpoints(place) as checkpoints:
        checkpoints.save(1, {"x": 1})
    if _mount("--bind", str(place), str(place)):
        try:
            assert _mount("-o", "remount,ro,bind", str(place))
            with Checkpoints(place) as checkpoints:
                assert checkpoints.restore_latest({"x": 0}) == (1, {"x": 1})
                try:
                    checkpoints.save(2, {"x": 2})
                    checkpoints.wait()
                except OSError as error:
                    assert error.errno == errno.EROFS and str(place) in str(error)
                    seen["mounted read-only: read, and a clear error"] += 1
                else:
                    raise AssertionError("saved where nothing can be written")
        finally:
            subprocess.run(["umount", str(place)], check=True)
    return seen


def _mount(*arguments: str) -> bool:
    """Whether that could be mounted: only root may, and not in every container."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


# -------------------------------------------------------------------------------------------------------------- soak


def soak(folder: Path, steps: int, *, warm: int) -> dict[str, float]:
    """One stage of the loop of so many updates of PPO, a checkpoint every 50: memory after `warm` updates and at the
    end, and what was compiled since."""
    from test_reliability_steps import worked_example

    from experiments.loop import compile_clock, run_stage
    from rlhfjax.run_folder import create

    names = worked_example("ppo")
    algorithm, rollout = names["algorithm"], names["rollout"]
    update = jax.jit(
        lambda state, i: algorithm.update(state, rollout, jax.random.fold_in(jax.random.key(0), i))
    )
    marks: dict[int, tuple[int, float]] = {}
    clock = compile_clock()

    def step(state: Any, i: int) -> Any:
        if i in (warm, steps - 1):
            marks[i] = (resident(), clock()[0])
        return update(state, i)

    params = {"logits": jnp.zeros(4), "value": jnp.zeros(())}
    run = create(folder / "soak", "", experiment="soak", seed=0, exact=True)
    run_stage(
        "ppo", folder=run, init=lambda: algorithm.init(params), step=step, steps=steps, checkpoint_every=50
    )
    (first, compiled), (last, at_end) = marks[warm], marks[steps - 1]
    return {
        "updates": steps,
        "MiB after warm-up": first / 2**20,
        "MiB at the end": last / 2**20,
        "seconds compiling since": at_end - compiled,
    }


def resident() -> int:
    """Bytes of memory that the process holds."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
