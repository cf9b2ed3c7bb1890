"""What accelerators can do, by the name that JAX gives them: the denominators of utilisation."""

import resource
import sys
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Accelerator:
    """One device, as JAX counts devices, by its maker's data sheet."""

    kinds: tuple[str, ...]  # `device_kind` begins with one of them
    flops: float  # per second, dense products of bfloat16 (T4: float16)
    memory: float  # bytes
    bandwidth: float  # bytes per second
    source: str


# The first that fits is taken, so longer names come first.
ACCELERATORS = (
    Accelerator(("NVIDIA H200",), 989e12, 141e9, 4.8e12, "NVIDIA H200 data sheet, SXM"),
    Accelerator(("NVIDIA H100 PCIe",), 756e12, 80e9, 2.0e12, "NVIDIA H100 data sheet, PCIe"),
    Accelerator(("NVIDIA H100",), 989e12, 80e9, 3.35e12, "NVIDIA H100 data sheet, SXM"),
    Accelerator(
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312e12, 40e9, 1.555e12, "NVIDIA A100 data sheet"
    ),
    Accelerator(("NVIDIA A100",), 312e12, 80e9, 2.039e12, "NVIDIA A100 data sheet, 80 GB SXM"),
    Accelerator(("NVIDIA L4",), 121e12, 24e9, 0.3e12, "NVIDIA L4 data sheet, without sparsity"),
    Accelerator(("Tesla T4",), 65e12, 16e9, 0.32e12, "NVIDIA T4 data sheet"),
    Accelerator(("TPU v6 lite", "TPU v6e"), 918e12, 32e9, 1.64e12, "Cloud TPU documentation, v6e"),
    Accelerator(("TPU v5 lite", "TPU v5e"), 197e12, 16e9, 0.819e12, "Cloud TPU documentation, v5e"),
    Accelerator(("TPU v5",), 459e12, 95e9, 2.765e12, "Cloud TPU documentation, v5p"),
    Accelerator(("TPU v4",), 275e12, 32e9, 1.2e12, "Cloud TPU documentation, v4"),
)


def accelerator(device: Any = None) -> Accelerator | None:
    """The entry for a device, by default JAX's first; None where it is in no table, as CPUs are."""
    kind = (device or jax.devices()[0]).device_kind
    return next((entry for entry in ACCELERATORS if kind.startswith(entry.kinds)), None)


def peak_memory(device: Any = None) -> int:
    """Most bytes used so far: of the device's own memory or, on a CPU, of the process (its resident set)."""
    stats = (device or jax.local_devices()[0]).memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
