"""Devices to compile for that are not there.

A TPU's compiler is part of the `libtpu` package (`pip install rlhfjax[tpu]`) and runs on any Linux machine: memory,
fusions and collectives are then those of the real program. It serves as the stand-in for GPUs too, whose compiler needs
one. Without it programs are compiled for virtual CPU devices, whose number must be set before JAX starts.
"""

import importlib.util
import os
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from rlhfjax.accelerators import Accelerator, lookup

_STAND_IN = "v5p"  # for what is no TPU: it has the most memory, so most programs compile


class Target(NamedTuple):
    devices: list[Any]  # for `mesh.make_mesh`
    platform: str  # "tpu" or "cpu": what networks should take the backend for
    words: str  # what the numbers are of, for the reader of a plan


def aot_devices(accelerator: Accelerator, count: int) -> Target:
    """The best devices to compile a plan for: the accelerator's own, a TPU's in its place, virtual CPUs.

    Raises ValueError where there are too few virtual CPUs, or the TPU has no topology of so many.
    """
    name = accelerator.names[0]
    if count < 1:
        raise ValueError(f"a plan is for 1 device or more, not {count}")
    if name == "cpu" or not has_tpu_compiler():
        return _virtual(name, count)
    if accelerator.topology:
        slices = max(1, count // _largest_slice(accelerator))
        several = f"{slices} slices of " if slices > 1 else ""
        words = f"compiled for {several}{topology_name(accelerator, count)}"
        return Target(_topology(accelerator, count), "tpu", words)
    if not _power_of_two(count):
        return _virtual(name, count)
    stand_in = lookup(_STAND_IN)
    grid = topology_name(stand_in, count)
    words = f"compiled for {grid} in place of {name}: fusions and temporary memory are a TPU's"
    return Target(_topology(stand_in, count), "tpu", words)


def has_tpu_compiler() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def topology_name(accelerator: Accelerator, count: int) -> str:
    """The name of its most even grid, as JAX's compiler takes it: 32 of v5e are "v5e:4x8".

    Where that is more than the largest slice holds, the name of one of the slices.

    Raises ValueError where the count is no power of two.
    """
    if not _power_of_two(count):
        near = 1 << count.bit_length()
        raise ValueError(
            f"{count} devices of {accelerator.names[0]}: TPU slices have 1, 2, 4, 8, ... devices; take {near // 2} or "
            f"{near}"
        )
    size = min(count, _largest_slice(accelerator))
    sides, left = [], size.bit_length() - 1  # as powers of two
    for axis in range(accelerator.axes, 0, -1):
        sides.append(left // axis)
        left -= left // axis
    sides.sort(reverse=size < 8)  # hosts hold 2 x 2 x 1, and what is less than two has its axes in that order
    return f"{accelerator.topology}:{'x'.join(str(1 << side) for side in sides)}"


def compile_to_read(lowered: Any, platform: str) -> tuple[Any, str]:
    """(compiled program, its text) of `jax.jit(f).lower(...)`, for `analyse`; `platform` is the `Target`'s.

    The libtpu of one release may write what the jaxlib of another cannot read back ("async-update instruction should
    have 1 operands", jaxlib 0.10.2 with libtpu 0.0.52): the text is then the one that the compiler itself writes to a
    temporary folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        dumped = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=dumped if platform == "tpu" else None)
        try:
            return compiled, compiled.as_text()
        except jax.errors.JaxRuntimeError:
            written = sorted(Path(folder).glob("*.after_codegen.txt"))
            if not written:
                raise
            return compiled, written[-1].read_text()


def memory_asked(error: Exception) -> tuple[float, float] | None:
    """(bytes that a program asks for, bytes that there are), of the error of a compiler that finds it too large.

    None for other errors. TPU compilers refuse such a program; a plan of it is made for a device with more memory.
    """
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", str(error))
    if found is None:
        return None
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    asked, asked_unit, there, there_unit = found.groups()
    return float(asked) * units[asked_unit], float(there) * units[there_unit]


def _power_of_two(count: int) -> bool:
    return count & (count - 1) == 0


def _largest_slice(accelerator: Accelerator) -> int:
    """The largest power of two that links join."""
    return 1 << (accelerator.island.bit_length() - 1)


def _topology(accelerator: Accelerator, count: int) -> list[Any]:
    # Or libtpu would ask Google Cloud's metadata server, for minutes, which TPU this machine has.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # And a plan beside another, or beside a run on this machine's own TPU, which it does not touch, would be refused.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name = topology_name(accelerator, count)
    options: dict[str, Any] = {}
    if accelerator.topology == "v4":
        options["chip_config_name"] = "megacore"  # as on Cloud TPU: both cores of a chip are one device
    if count > _largest_slice(accelerator):
        options["num_slices"] = count // _largest_slice(accelerator)
    return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices)


def _virtual(name: str, count: int) -> Target:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"a plan for {count} devices needs as many virtual CPUs, there are {len(devices)}: set "
            f"JAX_NUM_CPU_DEVICES={count} before JAX starts"
        )
    words = f"compiled for {count} virtual CPU{'s' if count > 1 else ''}"
    if name != "cpu":
        words += (
            f" in place of {name}: they compute bfloat16 in float32, and undo remat, so that temporary memory, "
            "traffic and collectives are overstated (a decoder's gradient: 2.7, 3.5 and 2 times what libtpu's compiler "
            "has for a TPU)"
        )
    return Target(devices[:count], "cpu", words)
