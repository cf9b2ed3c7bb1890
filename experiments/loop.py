"""The Python loop around compiled steps: checkpoints, logs, and what the terminal shows.

A run is stages in a row. `run_stage` repeats a step; `run_once` computes arrays between two stages. Both
may be killed at any moment: called again on the same folder they continue, and the run ends in the same
bits as one never stopped. Three rules make that so. All randomness of a step is a function of (seed, i).
The lines of step s are on the disk before checkpoint s. After restoring checkpoint s, lines past s are
dropped and written again.

With several processes all of them do the same, in the same order: arrays that lie on all are fetched by all. What
the folder holds is for process 0 to say.
"""

import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.monitoring
import numpy as np

from experiments.arrays import read_arrays, save_arrays
from experiments.trace import read_trace
from experiments.watch import Watch, state_after
from rlhfjax import console, processes
from rlhfjax.accelerators import accelerator, peak_memory
from rlhfjax.checkpoint import Checkpoints
from rlhfjax.mesh import fetch
from rlhfjax.run_folder import RunFolder

State = TypeVar("State")
Rows = Sequence[dict[str, Any]]

# Counts among the metrics whose rate a user wants to see: metric -> label of its rate on the terminal.
RATES = {"generated_tokens": "gen tok/s", "trained_tokens": "train tok/s", "model_flops": ""}
PERF = "perf/"  # a metric so named is a measurement: it goes to perf.jsonl, never to metrics.jsonl
COLUMNS_BY_DEFAULT = 6
SAMPLES_SHOWN = 4
SECONDS_WORTH_SHOWING = 0.05
REFUSED = "optimizer/refused"  # share of gradient steps not made, since their gradient was not finite
MOST_REFUSED = 10  # steps in a row


@dataclass(frozen=True)
class Show:
    """What of a stage is shown and sampled; the logs hold everything.

    `columns`: metric -> label on the terminal; empty: the first few metrics. `every`: steps between lines;
    None: about twenty lines a stage. `samples(step, aux)`: the rows of texts of one step, from the third
    thing that the step returned, called every `samples_every` steps and at the last (0: never), by all processes.
    `measure(step, aux)`: metrics made on the host, from texts for example, one step late like all others;
    "perf/model_flops" among them, the operations that the step cannot do without, gives utilisation.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    every: int | None = None
    samples: Callable[[int, Any], Rows] | None = None
    samples_every: int = 0
    measure: Callable[[int, Any], Mapping[str, float]] | None = None


def run_stage(
    name: str,
    *,
    folder: RunFolder,
    init: Callable[[], State],
    step: Callable[..., tuple],
    steps: int,
    batch: Callable[[int], Any] | None = None,
    checkpoint_every: int = 100,
    keep: int = 2,
    nullable: frozenset[str] = frozenset(),
    show: Show = Show(),  # noqa: B008  (frozen, so it can be shared)
    watch: Watch | None = None,
) -> State:
    """Runs the stage `name` to step `steps`, from its newest checkpoint or from `init()`; returns the state.

    Args:
      folder: where the run writes. Its `max_steps` caps `steps`.
      init: makes the state at step 0, a pytree of arrays. It is also called on resume, for its structure.
        Where the step donates its state, these must be arrays that nothing else uses.
      step: `step(state, i)`, or `step(state, batch(i), i)` where `batch` is given; i counts from 0. Returns
        (state, metrics) or (state, metrics, aux). It may donate the state. Metrics are a flat dict of
        scalars, the same keys every time.
      batch: makes the input of step i on the host, while the device works on step i - 1. A function of
        (seed, i) only.
      checkpoint_every: steps between checkpoints; there is always one at the end.
      keep: checkpoints kept.
      nullable: metrics that may be NaN or infinite (written as null). Any other such value stops the run.
      watch: what looks at the metrics and may end the stage before its last step.

    Raises:
      FloatingPointError: a metric is not finite; names stage, step and metric. No checkpoint of that state
        is written. Where the algorithm has refused the gradient ("optimizer/refused"), the state is sound and the
        stage goes on, to the tenth such step in a row.
      FileNotFoundError: the stage has checkpoints, and none can be read.
      Preempted: SIGTERM came; the step at hand has been done and its state saved.
    """
    steps = steps if folder.max_steps is None else min(steps, folder.max_steps)
    with Checkpoints(folder.checkpoints(name), keep=keep) as checkpoints:
        done, state = _restore(name, checkpoints, init)
        if watch is not None:
            for line in folder.metrics(name):
                if line["step"] <= done:
                    watch.observe(line["step"], line)
            steps = done if watch.over(done) else steps
        if done < steps:
            folder.truncate_after(name, done)
        with console.open_stage(name, steps, start=done) as view:
            if done:
                word = "done" if done >= steps else "continues"
                view.note(f"{word}: checkpoint of step {done} of {steps}")
            clock = _DeviceClock()
            report = _reporter(name, folder, view, steps, done, nullable, show, watch)
            # Two steps may compile: the first, and one that meets the first one's outputs.
            traced = range(min(done + 2, steps - 1), steps)[: folder.profile if processes.is_first() else 0]
            late = None  # a step with metrics not fetched yet: fetching at once would leave the device idle
            stop = False
            with processes.finishing_steps():
                for i in range(done, steps):
                    inputs = () if batch is None else (batch(i),)
                    with _trace(name, i, folder, view) if i in traced else contextlib.nullcontext():
                        idle = clock.start()
                        state, *out = step(state, *inputs, i)
                        clock.watch(out[0])
                        if i in traced or _must_wait(state):
                            jax.block_until_ready((state, out[0]))
                    if late:
                        report(*late)
                    late = (i + 1, out[0] | {f"{PERF}idle_seconds": idle}, *out[1:])
                    stop = processes.preempted()
                    last = i + 1 == steps or (watch is not None and watch.over(i + 1))
                    if (i + 1) % checkpoint_every == 0 or last or stop:
                        report(*late)
                        late = None
                        folder.sync()
                        checkpoints.save(i + 1, state)
                    if stop or last:
                        break
                checkpoints.wait()
            if stop:
                raise processes.Preempted(f"stage {name}, step {i + 1} of {steps}")  # pyright: ignore[reportPossiblyUnboundVariable]
            kept = None if watch is None else watch.kept()
            if kept is not None:
                view.note(f"back to the state after step {kept}")
                state = state_after(kept, name, folder, checkpoints, init=init, step=step, batch=batch)
    return state


def run_once(
    name: str,
    *,
    folder: RunFolder,
    compute: Callable[[], tuple[Mapping[str, Any], Mapping[str, float], Rows]],
) -> dict[str, np.ndarray]:
    """Computes arrays once a run; a resumed run reads them back.

    `compute() -> (arrays, metrics, sample rows)`. The arrays (numbers, booleans or strings; no objects) are
    kept in arrays/NAME.npz, the metrics and rows logged as step 0 of the stage `name`. A damaged file is
    computed again. All processes compute; they read the file that process 0 has written.
    """
    path = folder.shared / "arrays" / f"{name}.npz"
    with console.open_stage(name, 1) as view:
        whole = processes.from_first(
            f"arrays {name} stored", lambda: _load_arrays(path, view.note) is not None
        )
        if whole:
            view.note("done earlier")
            return processes.together(f"arrays {name} read", lambda: read_arrays(path))
        folder.truncate_after(name, -1)
        start = time.perf_counter()
        arrays, metrics, rows = compute()
        arrays = {key: np.asarray(value) for key, value in fetch(dict(arrays)).items()}
        fetched = fetch(dict(metrics))
        values = {key: plain_number(fetched[key]) for key in metrics}
        _log(name, 0, folder, values, {"seconds": time.perf_counter() - start})
        folder.log_samples(name, 0, rows)
        view.update(1, dict(list(values.items())[:COLUMNS_BY_DEFAULT]), True)
        view.samples(name, rows[:SAMPLES_SHOWN])
        folder.sync()
        processes.from_first(f"arrays {name} saved", lambda: save_arrays(path, arrays))
    return arrays


def plain_number(value: Any) -> float | int:
    """A scalar array as a Python number. A float32 gets the shortest decimal that names it: 0.1, not
    0.10000000149.

    Raises ValueError where the value is not a scalar.
    """
    array = np.asarray(value)
    if array.shape != ():
        raise ValueError(
            f"a metric is a scalar, but this one has shape {array.shape}: take its mean in the step"
        )
    if array.dtype == np.float32:
        return float(str(array[()]))
    return int(array) if array.dtype.kind in "iub" else float(array)


@functools.cache
def compile_clock() -> Callable[[], tuple[float, int]]:
    """A function that tells (seconds spent compiling, programs taken from the cache) since this was first
    called.

    JAX offers no way to take a listener off again, so there is one for the whole process.
    """
    seconds = [0.0]
    hits = [0]

    def on_duration(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event == "/jax/core/compile/backend_compile_duration":
            seconds[0] += duration_secs

    def on_event(event: str, **kwargs: str | int) -> None:
        del kwargs
        if event == "/jax/compilation_cache/cache_hits":
            hits[0] += 1

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    return lambda: (seconds[0], hits[0])


def _restore(name: str, checkpoints: Checkpoints, init: Callable[[], State]) -> tuple[int, State]:
    state = init()
    restored = checkpoints.restore_latest(state)
    if restored is not None:
        return restored
    steps = processes.from_first(f"checkpoints of {name}", checkpoints.steps)
    if steps:
        raise FileNotFoundError(
            f"stage {name}: none of its checkpoints (steps {steps}) can be read. "
            f"Delete the folder checkpoints/{name} of the run to do this stage anew"
        )
    return 0, state


def _must_wait(state: Any) -> bool:
    """Whether a step must end before the next begins: on CPUs programs of several devices that run at once may wait
    for each other for ever, one holding the threads that the other needs."""
    if jax.default_backend() != "cpu":
        return False
    return any(isinstance(leaf, jax.Array) and len(leaf.devices()) > 1 for leaf in jax.tree.leaves(state))


@contextlib.contextmanager
def _trace(name: str, i: int, folder: RunFolder, view: console.StageView) -> Iterator[None]:
    """Writes what device and host do in step i to profile/NAME/step-NUMBER, and says what an accelerator did."""
    path = folder.path / "profile" / name / f"step-{i + 1}"
    view.note(f"step {i + 1} is traced in {path}")
    start = time.perf_counter()
    with jax.profiler.trace(path):
        yield
        seconds = time.perf_counter() - start
    device = read_trace(path)
    if device is None:
        return
    share = device.busy_seconds / (seconds * jax.local_device_count())
    view.note(
        f"  {seconds:.3f} s, devices busy {share:.0%} of it with {device.operations} operations; the longest:"
    )
    for operation, spent, times in device.longest:
        view.note(f"  {spent:9.4f} s  {times:6d} x  {operation}")


def _reporter(
    name: str,
    folder: RunFolder,
    view: console.StageView,
    steps: int,
    done: int,
    nullable: frozenset[str],
    show: Show,
    watch: Watch | None,
) -> Callable[..., None]:
    """A function (step, metrics, aux) that fetches, checks, logs and shows one step."""
    every = show.every or max(1, steps // 20)
    lap = _stopwatch()
    refused = 0  # steps in a row
    recent: list[dict[str, float]] = []  # numbers of the steps since the last line shown

    def report(step: int, metrics: Mapping[str, Any], aux: Any = None) -> None:
        nonlocal refused
        fetched = {key: plain_number(value) for key, value in fetch(dict(metrics)).items()}
        if show.measure:
            fetched |= show.measure(step, fetch(aux))
        more, lines = ({}, ()) if watch is None else watch.observe(step, fetched)
        fetched |= more
        values = {key: value for key, value in fetched.items() if not key.startswith(PERF)}
        perf = lap() | {key.removeprefix(PERF): fetched[key] for key in fetched.keys() - values.keys()}
        _log(name, step, folder, values, perf | _rates([values | perf]))
        refused = refused + 1 if any(x > 0 for key, x in values.items() if REFUSED in key) else 0
        if refused:
            view.note(f"step {step}: the gradient is not finite; parameters and optimiser stay as they were")
        if not 0 < refused < MOST_REFUSED:
            _refuse_non_finite(name, step, values, nullable)
        recent.append(values | perf)
        shown = step % every == 0 or step in (done + 1, steps)
        view.update(step, _line(values, recent, show.columns) if shown else {}, shown)
        for line in lines:
            view.note(line)
        if shown:
            recent.clear()
        if show.samples and show.samples_every and (step % show.samples_every == 0 or step == steps):
            rows = show.samples(step, fetch(aux))
            folder.log_samples(name, step, rows)
            view.samples(f"{name}, step {step}", rows[:SAMPLES_SHOWN])

    return report


def _log(
    name: str, step: int, folder: RunFolder, values: Mapping[str, float], perf: Mapping[str, float]
) -> None:
    folder.log_metrics(name, step, values)
    folder.log_perf(name, step, perf)
    folder.tracker.log(name, step, dict(values) | {f"{PERF}{key}": value for key, value in perf.items()})


def _stopwatch() -> Callable[[], dict[str, float]]:
    """A function that tells what has passed since its last call, seconds and compiling among them, and the most
    memory used so far."""
    clock = compile_clock()
    last = (time.perf_counter(), *clock())

    def lap() -> dict[str, float]:
        nonlocal last
        now = (time.perf_counter(), *clock())
        seconds, compiled, hits = (new - old for new, old in zip(now, last, strict=True))
        last = now
        times = {"seconds": seconds, "compile_seconds": compiled, "cache_hits": hits}
        return times | {"peak_memory_bytes": peak_memory()}

    return lap


class _DeviceClock:
    """Tells how long the device had nothing to do between two steps.

    A thread waits for each step's metrics and notes when they were there. Time idle within a step, as between two
    programs of one, is not seen; a trace (--profile) shows that.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.perf_counter,
        wait: Callable[[Any], object] = jax.block_until_ready,
    ) -> None:
        self._now, self._wait = now, wait
        self._waiting: threading.Thread | None = None
        self._done = math.nan

    def start(self) -> float:
        """To be called as a step starts: seconds since the device was done with the last one; 0 if it is not yet."""
        if self._waiting is None or self._waiting.is_alive():
            return 0.0
        return self._now() - self._done

    def watch(self, arrays: Any) -> None:
        """To be called with what a step returned, not donated to the next."""

        def wait() -> None:
            with contextlib.suppress(Exception):  # whoever reads the arrays is told
                self._wait(arrays)
            self._done = self._now()

        self._waiting = threading.Thread(target=wait, daemon=True)
        self._waiting.start()


def _rates(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """ "COUNT_per_second" for each of RATES, over the steps that compiled nothing: the others say nothing of
    a rate; and "mfu", model FLOP utilisation, on an accelerator whose peak is known."""
    steady = [step for step in steps if step["compile_seconds"] == 0.0]
    seconds = sum(step["seconds"] for step in steady)
    rates = {
        f"{count}_per_second": sum(step[count] for step in steady) / seconds
        for count in RATES
        if steady and count in steady[0]
    }
    device = accelerator()
    if device and "model_flops_per_second" in rates:
        rates["mfu"] = rates["model_flops_per_second"] / (device.flops * jax.device_count())
    return rates


def _line(
    values: Mapping[str, float], recent: Sequence[Mapping[str, float]], columns: Mapping[str, str]
) -> dict[str, float]:
    """Label -> number for one line: the chosen metrics, rates since the last line, any compile time."""
    chosen = columns or {name: name for name in list(values)[:COLUMNS_BY_DEFAULT]}
    rates, compiled = _rates(recent), sum(step["compile_seconds"] for step in recent)
    line = {label: values[name] for name, label in chosen.items() if name in values}
    labels = {f"{count}_per_second": label for count, label in RATES.items()} | {"mfu": "MFU"}
    line |= {labels[name]: rate for name, rate in rates.items() if labels[name]}
    return line | ({"compile s": compiled} if compiled > SECONDS_WORTH_SHOWING else {})


def _refuse_non_finite(name: str, step: int, values: Mapping[str, float], nullable: frozenset[str]) -> None:
    bad = [
        f"{key} = {value}"
        for key, value in values.items()
        if key not in nullable and not math.isfinite(value)
    ]
    if bad:
        raise FloatingPointError(
            f"stage {name}, step {step}: {', '.join(bad)}. The run stops, with no checkpoint of this state. "
            "metrics.jsonl shows how it came about; try a lower learning rate or gradient norm limit"
        )


def _load_arrays(path: Path, note: Callable[[str], None]) -> dict[str, np.ndarray] | None:
    if not path.exists():
        return None
    try:
        return read_arrays(path)
    except (ValueError, OSError) as error:
        note(f"warning: {path} is damaged ({error.__cause__ or error}); computing it again")
        return None
