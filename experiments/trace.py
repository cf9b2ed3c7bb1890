"""What a trace says of a device: how long it worked, and at what."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax


class DeviceTime(NamedTuple):
    """Of all accelerators in a trace."""

    busy_seconds: float  # summed over devices
    operations: int
    longest: list[tuple[str, float, int]]  # name, seconds, number of times; the longest first


def read_trace(folder: Path, most: int = 10) -> DeviceTime | None:
    """The newest trace in `folder`, as `jax.profiler.trace` wrote it; None where it holds no accelerator, as on CPU."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return device_time(jax.profiler.ProfileData.from_file(str(files[-1])), most) if files else None


def device_time(profile: Any, most: int = 10) -> DeviceTime | None:
    """The same of a `jax.profiler.ProfileData`."""
    seconds: dict[str, float] = defaultdict(float)
    times = Counter[str]()
    for plane in profile.planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            # A GPU has a line for each of its streams, a TPU one for the operations of all its cores.
            if line.name.startswith("Stream") or line.name == "XLA Ops":
                for event in line.events:
                    seconds[event.name] += event.duration_ns / 1e9
                    times[event.name] += 1
    if not times:
        return None
    order = sorted(seconds.items(), key=lambda item: -item[1])
    longest = [(name, value, times[name]) for name, value in order[:most]]
    return DeviceTime(sum(seconds.values()), sum(times.values()), longest)
