"""What accelerators can do: the denominators of utilisation, and what a plan of a run is made with.

`accelerator(device)` finds the entry of a device by the name that JAX gives it, `lookup(name)` by a short one
("h100", "v5e"), by a file of the user's, or, for "cpu", by timing this machine.

A file is YAML with the fields of `Accelerator`; `like` names an entry whose values hold where the file gives none:
  like: h100
  memory: 94e9
  network: 25e9
  source: our cluster, measured with nccl-tests
"""

import dataclasses
import difflib
import functools
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One device, as JAX counts devices, by its maker's data sheet."""

    names: tuple[str, ...]  # short ones, to ask for it
    kinds: tuple[str, ...] = ()  # `device_kind` begins with one of them
    flops: float  # per second, dense products of bfloat16 (T4: float16)
    memory: float  # bytes
    bandwidth: float  # bytes per second, of its memory
    link: float  # bytes per second that a device sends round a ring of its island (TPU: one axis, both ways)
    island: int  # devices that links join: those of a host, of a TPU pod
    network: float  # bytes per second and device, between islands
    topology: str = ""  # what JAX's compiler calls it, to compile without the device: "v5e" of "v5e:4x8"
    axes: int = 0  # of that topology
    source: str


# NVIDIA boards of eight (HGX): NVLink 4 and 3 have 18 and 12 links of 25 GB/s, and each GPU an adapter of 400 and of
# 200 Gbit/s. One-way speeds of TPU links: the scaling book (jax-ml.github.io/scaling-book/tpus); a ring sends both
# ways. Networks of TPUs: the bandwidth of a pod by its chips. The first that fits is taken, so longer kinds come first.
ACCELERATORS = (
    Accelerator(
        names=("h200",),
        kinds=("NVIDIA H200",),
        flops=989e12,
        memory=141e9,
        bandwidth=4.8e12,
        link=450e9,
        island=8,
        network=50e9,
        source="NVIDIA H200 data sheet, SXM; network: DGX H200",
    ),
    Accelerator(
        names=("h100-pcie",),
        kinds=("NVIDIA H100 PCIe",),
        flops=756e12,
        memory=80e9,
        bandwidth=2.0e12,
        link=64e9,
        island=8,
        network=25e9,
        source="NVIDIA H100 data sheet, PCIe 5 without bridges; network: one 200 Gbit/s adapter a GPU",
    ),
    Accelerator(
        names=("h100", "h100-sxm"),
        kinds=("NVIDIA H100",),
        flops=989e12,
        memory=80e9,
        bandwidth=3.35e12,
        link=450e9,
        island=8,
        network=50e9,
        source="NVIDIA H100 data sheet, SXM; network: DGX H100",
    ),
    Accelerator(
        names=("a100-40g",),
        kinds=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        flops=312e12,
        memory=40e9,
        bandwidth=1.555e12,
        link=300e9,
        island=8,
        network=25e9,
        source="NVIDIA A100 data sheet; network: DGX A100",
    ),
    Accelerator(
        names=("a100-80g", "a100"),
        kinds=("NVIDIA A100",),
        flops=312e12,
        memory=80e9,
        bandwidth=2.039e12,
        link=300e9,
        island=8,
        network=25e9,
        source="NVIDIA A100 data sheet, 80 GB SXM; network: DGX A100",
    ),
    Accelerator(
        names=("l4",),
        kinds=("NVIDIA L4",),
        flops=121e12,
        memory=24e9,
        bandwidth=0.3e12,
        link=32e9,
        island=8,
        network=1.5625e9,
        source="NVIDIA L4 data sheet, without sparsity, PCIe 4; network: Google Cloud g2-standard-96",
    ),
    Accelerator(
        names=("t4",),
        kinds=("Tesla T4",),
        flops=65e12,
        memory=16e9,
        bandwidth=0.32e12,
        link=16e9,
        island=4,
        network=3.125e9,
        source="NVIDIA T4 data sheet, PCIe 3; network: Google Cloud n1 with four, 100 Gbit/s",
    ),
    Accelerator(
        names=("v6e",),
        kinds=("TPU v6 lite", "TPU v6e"),
        flops=918e12,
        memory=32e9,
        bandwidth=1.64e12,
        link=180e9,
        island=256,
        network=12.5e9,
        topology="v6e",
        axes=2,
        source="Cloud TPU documentation, v6e; links: scaling book",
    ),
    Accelerator(
        names=("v5e",),
        kinds=("TPU v5 lite", "TPU v5e"),
        flops=197e12,
        memory=16e9,
        bandwidth=0.819e12,
        link=90e9,
        island=256,
        network=3.125e9,
        topology="v5e",
        axes=2,
        source="Cloud TPU documentation, v5e; links: scaling book",
    ),
    Accelerator(
        names=("v5p",),
        kinds=("TPU v5",),
        flops=459e12,
        memory=95e9,
        bandwidth=2.765e12,
        link=180e9,
        island=6144,
        network=6.25e9,
        topology="v5p",
        axes=3,
        source="Cloud TPU documentation, v5p; links: scaling book",
    ),
    Accelerator(
        names=("v4",),
        kinds=("TPU v4",),
        flops=275e12,
        memory=32e9,
        bandwidth=1.2e12,
        link=90e9,
        island=4096,
        network=6.25e9,
        topology="v4",
        axes=3,
        source="Cloud TPU documentation, v4; links and network: scaling book",
    ),
)


def accelerator(device: Any = None) -> Accelerator | None:
    """The entry for a device, by default JAX's first; None where it is in no table, as CPUs are."""
    kind = (device or jax.devices()[0]).device_kind
    return next((entry for entry in ACCELERATORS if kind.startswith(entry.kinds)), None)


def lookup(name: str) -> Accelerator:
    """The entry of a short name ("h100"), of a YAML file ("mine.yaml"), or "cpu": this machine, timed.

    Raises ValueError for a name that is not known, FileNotFoundError for a file that is not there.
    """
    if name.lower() == "cpu":
        return measured()
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name))
    entries = {short: entry for entry in ACCELERATORS for short in entry.names}
    if name.lower() in entries:
        return entries[name.lower()]
    raise ValueError(
        f"accelerator {name!r} is not known{_meant(name.lower(), [*entries, 'cpu'])}; there are "
        f"{', '.join(entries)}, cpu, and files of your own (mine.yaml)"
    )


def _read(path: Path) -> Accelerator:
    """The accelerator that a file describes."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file, to read an accelerator from")
    try:
        given = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected lines like `flops: 989e12`")
    fields = {field.name: field for field in dataclasses.fields(Accelerator)}
    for name in set(given) - set(fields) - {"like"}:
        raise ValueError(
            f"{path}: an accelerator has no {name!r}{_meant(name, list(fields))}; it has {', '.join(fields)}"
        )
    like = given.pop("like", None)
    values = {"names": (path.stem,), "source": str(path)}
    if like is not None:
        try:
            values = dataclasses.asdict(lookup(str(like))) | values
        except (ValueError, OSError, RecursionError) as error:  # a file may be like itself
            raise ValueError(f"{path}: like: {error}") from error
    values |= {name: _value(path, name, value, fields[name].type) for name, value in given.items()}
    missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in values]
    if missing:
        raise ValueError(f"{path} does not say {', '.join(missing)}; say it, or `like: h100`")
    return Accelerator(**values)


def _value(path: Path, name: str, value: Any, kind: Any) -> Any:
    """What a file says, in the field's type. YAML takes 989e12 for a word."""
    if name in ("names", "kinds"):
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{path}: {name} is {value!r}; it must be a word or a list of words")
        return tuple(words)
    if kind is str:
        return str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if number < 0 or (number == 0 and name != "axes"):
        raise ValueError(f"{path}: {name} is {value!r}; it must be a number above 0")
    return kind(number)


def _meant(name: Any, known: list[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def measured(share: int = 1) -> Accelerator:
    """This machine's processor, timed once in a process; takes about a second.

    XLA's CPU compiler computes products of bfloat16 in float32, so products of float32 are what is timed.

    Args:
      share: devices among which the processor is divided, as virtual ones are (`jax_num_cpu_devices`).
    """
    if share < 1:
        raise ValueError(f"share={share} devices of one processor: it must be at least 1")
    flops, bandwidth = (rate / share for rate in _timed())
    return Accelerator(
        names=("cpu",),
        flops=flops,
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / share,
        bandwidth=bandwidth,
        link=bandwidth / 2,  # what is sent is read and written
        island=2**30,  # one memory
        network=bandwidth / 2,
        source=f"timed on this machine's {os.cpu_count()} processors, shared by {share}",
    )


@functools.cache
def _timed() -> tuple[float, float]:
    """(FLOP/s of products [512, 512], bytes/s of copies of 64 MiB within a program), the best of a few.

    Within a program, as that writes to memory which it has written to before; the first time is several times slower.
    """
    device, size, turns = jax.devices("cpu")[0], 512, 4
    square = jax.device_put(jnp.ones((size, size)), device)
    long = jax.device_put(jnp.ones((2**24,)), device)
    product = _best(jax.jit(lambda x: x @ x), square)
    copies = _best(jax.jit(lambda x: jax.lax.fori_loop(0, turns, lambda i, y: y + 1, x)), long)
    return 2 * size**3 / product, turns * 2 * long.nbytes / copies


def _best(function: Callable[[jax.Array], jax.Array], argument: jax.Array, repeats: int = 5) -> float:
    """Seconds of the fastest call, compiled before."""
    function(argument).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(argument).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peak_memory(device: Any = None) -> int:
    """Most bytes used so far: of the device's own memory or, on a CPU, of the process (its resident set)."""
    stats = (device or jax.local_devices()[0]).memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
