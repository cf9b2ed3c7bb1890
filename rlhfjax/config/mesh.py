"""How a run's devices are laid out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; their product is the number of devices used."""

    data: int = 0
    """Devices that the rows of a batch are split over. 0: all that the other axes leave; on a
    CPU 1, since its virtual devices share its cores."""
    fsdp: int = 0
    """Devices that parameters, gradients and optimiser state are split over, and the rows of a batch too. 0: as few as
    hold them, where a device's memory is known; else 1."""
    sequence: int = 1
    """Devices that the tokens of a row are split over, for rows too long for one device; in rollouts, rows."""
    tensor: int = 1
    """Devices that heads, hidden layers and the vocabulary are split over: every product is then shared, and every
    layer communicates. For devices with fast links between them."""
