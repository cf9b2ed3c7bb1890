"""How long a program would take on an accelerator: a roofline by instruction, and rings for collectives."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from rlhfjax.accelerators import Accelerator
from rlhfjax.planner.analysis import Analysis, Collective


@dataclass(frozen=True)
class Efficiency:
    """Which share of the data sheet programs reach, and what each step costs besides. Replace them by what you measure.

    A prediction with these is meant to be right within a factor of two.
    """

    products: float = (
        0.6  # of the peak: whole training steps of MaxText reach 0.53 to 0.67 on v5e (its configs/v5e)
    )
    memory: float = 0.8  # of the bandwidth: what copies reach (STREAM on GPUs, the scaling book on TPUs)
    links: float = 0.8  # of links and network: 360 of 450 GB/s in nccl-tests on eight H100
    overhead: float = (
        2e-6  # seconds to start an operation: a kernel on a GPU, a turn of a small loop on a CPU
    )
    hop: float = 1e-6  # seconds for the first byte from one device of a ring to the next (scaling book)
    network_hop: float = 2e-5  # the same between islands, where collectives go by trees


# For rates that were timed (`accelerators.measured`): programs reach them as the timing did.
TIMED = Efficiency(products=1.0, memory=1.0, links=1.0)


class Seconds(NamedTuple):
    """Of one run of a program on each device. Nothing is taken to overlap."""

    products: float  # of operations that the peak limits
    memory: float  # of operations that the memory's bandwidth limits
    overhead: float
    links: float  # collectives, within islands
    network: float  # collectives, between islands

    @property
    def total(self) -> float:
        return sum(self)

    @property
    def limit(self) -> str:
        """The name of what takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))


def expected_seconds(
    analysis: Analysis,
    accelerator: Accelerator,
    efficiency: Efficiency = Efficiency(),  # noqa: B008  (frozen, so it can be shared)
) -> Seconds:
    """The time of a program, in parts.

    An operation takes as long as its products at the peak or its traffic at the memory's bandwidth, whichever is
    longer, and `overhead`. Collectives are rings over `link`; of groups that lie in several islands a part goes
    over `network` (`collective_seconds`).
    """
    peak = accelerator.flops * efficiency.products
    bandwidth = accelerator.bandwidth * efficiency.memory
    products = memory = overhead = 0.0
    for operation in analysis.operations:
        by_products, by_memory = operation.flops / peak, operation.bytes / bandwidth
        if by_products > by_memory:
            products += by_products * operation.calls
        else:
            memory += by_memory * operation.calls
        overhead += efficiency.overhead * operation.calls
    rings = [
        tuple(part * c.calls for part in collective_seconds(c, accelerator, efficiency))
        for c in analysis.collectives
    ]
    return Seconds(products, memory, overhead, sum(r[0] for r in rings), sum(r[1] for r in rings))


def collective_seconds(
    collective: Collective,
    accelerator: Accelerator,
    efficiency: Efficiency = Efficiency(),  # noqa: B008
) -> tuple[float, float]:
    """(seconds over links, seconds over the network) of one call.

    With S bytes, a group of n devices, k of them in each of h islands: an all-gather or reduce-scatter sends
    (k-1)/k S over links and (h-1)/h S/k over the network, as each device of an island carries its share; an all-reduce
    twice that (Thakur et al. 2005, section 4.1 to 4.5; Patarasuk and Yuan 2009). An all-to-all sends (k-1)/n S and
    (n-k)/n S, a permute S.

    Devices are numbered as the mesh has them, so that `island` of them in a row share an island.
    """
    link, network = (speed * efficiency.links for speed in (accelerator.link, accelerator.network))
    size = collective.bytes
    if collective.kind == "collective-permute":
        moving = [(a, b) for a, b in collective.groups if a != b]
        if any(a // accelerator.island != b // accelerator.island for a, b in moving):
            return 0.0, size / network + efficiency.network_hop
        return (size / link + efficiency.hop, 0.0) if moving else (0.0, 0.0)
    islands, near = _spread(collective, accelerator.island)
    devices = collective.size
    hops = (near - 1) * efficiency.hop
    far_hops = math.ceil(math.log2(islands)) * efficiency.network_hop
    if collective.kind.endswith("all-to-all"):
        over_links, over_network = (near - 1) / devices * size, (devices - near) / devices * size
    else:
        over_links, over_network = (near - 1) / near * size, (islands - 1) / islands * size / near
    times = 2 if collective.kind == "all-reduce" else 1
    return times * (over_links / link + hops), times * (over_network / network + far_hops)


def _spread(collective: Collective, island: int) -> tuple[int, int]:
    """(most islands that a group lies in, fewest of its devices that share one there)."""
    islands = max(len({device // island for device in group}) for group in collective.groups)
    return islands, max(1, collective.size // islands)
