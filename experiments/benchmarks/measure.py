"""Measuring a case: compiled once, ahead of time; then every step blocked, and timed on its own."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax

from experiments.benchmarks.case import Case

WARM_UP = 2  # steps that are not timed; the first is reported apart
_compiled: list[float] = []  # seconds of every program that this process compiled


def _note_compile(event: str, duration_secs: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(_note_compile)


def measure(
    case: Case, repeats: int, *, rounds: int = 1, between: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Compiles and times a case: `rounds` times `repeats` steps, each round followed by `between()`.

    A case without arrays is compiled only. Raises RuntimeError where a step does not see the tokens or environment
    steps that the case claims.

    Returns a flat record; what was not measured is None.
      seconds, seconds_*               of each step after warming up
      cpu_seconds_median               of all threads, per step
      tokens, tokens_per_second        per step; at the median
      environment_steps, ..._per_second  the same of cases that act in worlds
      compile_seconds, compiles        tracing and compiling; programs compiled
      first_step_seconds               after compiling
      compiles_while_timed             anything but 0 spoils the times
      memory_*                         bytes, by the compiler's own analysis; alias: outputs that take over an
                                       argument's memory; peak: argument + output - alias + temp
      model_flops, gflops_per_second   of the matrix products a step needs (`flops.py`); at the median
      xla_flops                        what the compiler counts, the body of a loop once
    """
    load_start = os.getloadavg()[0]
    call, compiling = _compile(case)
    times = _time_steps(case, call, repeats, rounds, between) if case.runs else _NOT_TIMED
    seconds = times["seconds"]
    median = statistics.median(seconds) if seconds else None
    return {
        "sizes": case.sizes,
        **times,
        "seconds_median": median,
        "seconds_min": min(seconds, default=None),
        "seconds_max": max(seconds, default=None),
        "tokens": case.tokens,
        "tokens_per_second": case.tokens / median if median else None,
        "environment_steps": case.environment_steps,
        "environment_steps_per_second": case.environment_steps / median if median else None,
        **compiling,
        **_memory(call),
        "model_flops": case.flops,
        "gflops_per_second": case.flops / median / 1e9 if median else None,
        "xla_flops": (call.cost_analysis() or {}).get("flops"),
        **_machine(),
        "load_start": load_start,
        "load_end": os.getloadavg()[0],
    }


def _compile(case: Case) -> tuple[jax.stages.Compiled, dict[str, float]]:
    before, start = len(_compiled), time.perf_counter()
    key = jax.eval_shape(lambda: jax.random.key(0))
    call = jax.jit(case.step, donate_argnums=0).lower(case.state, case.inputs, key).compile()
    return call, {"compile_seconds": time.perf_counter() - start, "compiles": len(_compiled) - before}


_NOT_TIMED: dict[str, Any] = {
    "seconds": [],
    "cpu_seconds_median": None,
    "first_step_seconds": None,
    "compiles_while_timed": None,
}


def _time_steps(
    case: Case, call: jax.stages.Compiled, repeats: int, rounds: int, between: Callable[[], None]
) -> dict[str, Any]:
    keys = list(jax.random.split(jax.random.key(0), WARM_UP + rounds * repeats))
    state, outputs = case.state, None
    seconds, cpu_seconds = [], []
    compiled = 0
    for i, key in enumerate(keys):
        if i == WARM_UP:
            check_count(case, outputs)
            compiled = len(_compiled)
        cpu, start = time.process_time(), time.perf_counter()
        state, outputs = call(state, case.inputs, key)
        jax.block_until_ready((state, outputs))
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu)
        if i >= WARM_UP and (i - WARM_UP + 1) % repeats == 0:
            between()
    return {
        "seconds": seconds[WARM_UP:],
        "cpu_seconds_median": statistics.median(cpu_seconds[WARM_UP:]),
        "first_step_seconds": seconds[0],
        "compiles_while_timed": len(_compiled) - compiled,
    }


def check_count(case: Case, outputs: Any) -> None:
    """Raises RuntimeError where the program did not see the tokens or environment steps that the case claims."""
    seen = int(case.count(outputs))
    what = "environment steps" if case.environment_steps else "tokens"
    claimed = case.environment_steps or case.tokens
    if seen != claimed:
        raise RuntimeError(f"the step saw {seen} {what}, not the {claimed} of its description")


def _memory(call: jax.stages.Compiled) -> dict[str, int | None]:
    names = ("argument", "output", "alias", "temp")
    analysis = call.memory_analysis()
    if analysis is None:  # not every backend has one
        return dict.fromkeys(["memory_peak_bytes", *(f"memory_{name}_bytes" for name in names)])
    argument, output, alias, temp = sizes = [getattr(analysis, f"{name}_size_in_bytes") for name in names]
    fields = {f"memory_{name}_bytes": size for name, size in zip(names, sizes, strict=True)}
    return {"memory_peak_bytes": argument + output - alias + temp} | fields


def _machine() -> dict[str, Any]:
    device = jax.devices()[0]
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "cpu_count": os.cpu_count(),
        "versions": {"python": platform.python_version()} | versions,
    }
