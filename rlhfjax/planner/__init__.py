"""What a program will need, take and cost, before there is a device to run it on.

A program is compiled for devices that are not there (`aot`), its text is read (`analysis`: memory, products, traffic,
collectives), and from the table of accelerators follow seconds and costs (`seconds`, `plan`), whether it fits, the
largest batch and what would help (`memory`).

Usage:
  target = aot_devices(lookup("v5e"), 64)
  mesh = make_mesh(Mesh(fsdp=64), target.devices)
  lowered = jax.jit(update, donate_argnums=0).lower(state, batch)  # shapes with shardings
  compiled, text = compile_to_read(lowered, target.platform)
  analysis = analyse(compiled, text=text)
  used = usage(analysis.memory, parameters=state.params, optimiser=state.opt_state, batch=batch)
  programs = {"update": Part(analysis)}
  plan = Plan("update", lookup("v5e"), 64, count(state.params), used, programs, target.words, price=1.2)
  print(describe(plan, advice(used, plan.memory, estimated_savings(used, state.params))))
"""

from rlhfjax.planner.analysis import Analysis, Collective, Loop, Memory, Operation, analyse
from rlhfjax.planner.aot import (
    Target,
    aot_devices,
    compile_to_read,
    has_tpu_compiler,
    memory_asked,
    topology_name,
)
from rlhfjax.planner.depth import deepened
from rlhfjax.planner.memory import (
    Usage,
    advice,
    bytes_per_device,
    count,
    estimated_savings,
    fit,
    in_bytes,
    line,
    usage,
)
from rlhfjax.planner.plan import Part, Plan, describe
from rlhfjax.planner.seconds import TIMED, Efficiency, Seconds, collective_seconds, expected_seconds

__all__ = [
    "TIMED",
    "Analysis",
    "Collective",
    "Efficiency",
    "Loop",
    "Memory",
    "Operation",
    "Part",
    "Plan",
    "Seconds",
    "Target",
    "Usage",
    "advice",
    "analyse",
    "aot_devices",
    "bytes_per_device",
    "collective_seconds",
    "compile_to_read",
    "count",
    "deepened",
    "describe",
    "estimated_savings",
    "expected_seconds",
    "fit",
    "has_tpu_compiler",
    "in_bytes",
    "line",
    "memory_asked",
    "topology_name",
    "usage",
]
