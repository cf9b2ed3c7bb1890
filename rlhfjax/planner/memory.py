"""Whether a program fits: bytes by part, the largest batch, and what would make it fit."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def bytes_per_device(tree: PyTree) -> int:
    """Bytes that one device holds of a tree of arrays, or of their shapes with shardings (`jax.ShapeDtypeStruct`).

    A leaf without a sharding lies whole on each device.
    """

    def of_leaf(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if sharding is not None else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(of_leaf(leaf) for leaf in jax.tree.leaves(tree))


def count(tree: PyTree) -> int:
    """Numbers in a tree of arrays or shapes, of all devices together."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def fit(peak_bytes: Callable[[int], float], memory: float, *, multiple: int = 1, most: int = 2**20) -> int:
    """The largest batch whose peak is at most `memory`: a multiple of `multiple`, 0 where not even that fits.

    Doubles, then halves the interval: `peak_bytes`, which must not fall as the batch grows, is asked about
    2 log2(batch / multiple) times. Where each answer is a compilation, two of them and `line` will do.
    """
    if multiple < 1 or most < multiple:
        raise ValueError(f"multiple={multiple} must be from 1 to most={most}")
    fitting, limit = 0, most // multiple
    above = 1
    while above <= limit and peak_bytes(above * multiple) <= memory:
        fitting, above = above, above * 2
    above = min(above, limit + 1)
    while above - fitting > 1:
        middle = (fitting + above) // 2
        if peak_bytes(middle * multiple) <= memory:
            fitting = middle
        else:
            above = middle
    return fitting * multiple


def line(small: tuple[int, float], large: tuple[int, float]) -> Callable[[int], float]:
    """Peak bytes as a straight line through (batch, peak) of two compilations; the state is what it has at 0.

    Raises ValueError where the batches are the same or the peak falls.
    """
    (batch, peak), (batch_2, peak_2) = sorted([small, large])
    if batch == batch_2:
        raise ValueError(f"a line needs two batches, got {batch} twice")
    slope = (peak_2 - peak) / (batch_2 - batch)
    if slope < 0:
        raise ValueError(
            f"the peak falls from {peak:.3g} to {peak_2:.3g} bytes as the batch grows from {batch} to {batch_2}: "
            "these are not of the same program"
        )
    return lambda at: peak + slope * (at - batch)


@dataclass(frozen=True)
class Usage:
    """Bytes of one device. Parts that are not there are 0."""

    parameters: float  # of what is trained
    optimiser: float  # moments, averages
    frozen: float = 0.0  # reference policy, reward model, base under adapters
    batch: float = 0.0
    temporary: float = 0.0  # activations, cache, gradients: `Memory.temporary`
    other: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """What is held, in words -> bytes."""
        return {
            "parameters": self.parameters,
            "optimiser state": self.optimiser,
            "frozen models": self.frozen,
            "batch": self.batch,
            "activations, cache and gradients": self.temporary,
            "other": self.other,
        }


def usage(memory: Any, **parts: PyTree) -> Usage:
    """`Usage` of a program, from its `Memory` and the trees it is given: parameters, optimiser, frozen, batch.

    Arguments in none of these trees are `other`, as are results that lie in no donated argument.
    """
    known = {name: float(bytes_per_device(tree)) for name, tree in parts.items()}
    other = max(0.0, memory.arguments - sum(known.values())) + memory.outputs - memory.aliased
    return Usage(**{"parameters": 0.0, "optimiser": 0.0} | known, temporary=memory.temporary, other=other)


def estimated_savings(
    used: Usage, params: PyTree, *, fsdp: int = 1, rank: int = 16, reference: float = 0.0
) -> dict[str, float]:
    """What common changes would save of a device's memory, without compiling anew: words -> bytes.

    Gradients are taken to be as large as the parameters, and part of `temporary`; what is left of it to grow with the
    batch. Where a change can be compiled (remat, a shorter context), compile it: `advice` takes both.

    Args:
      used: what is held now.
      params: what is trained, arrays or shapes.
      fsdp: devices that it is split over now.
      rank: of LoRA adapters on all matrices but embeddings.
      reference: bytes of the reference policy, among `used.frozen`, which adapters make needless.
    """
    gradients = min(used.parameters, used.temporary)
    state = used.parameters + used.optimiser + used.frozen + gradients
    trained = _adapters(params, rank) / max(1, count(params))
    adapted = (used.optimiser + gradients) * (1 - trained) + reference - used.parameters * trained
    savings = {
        f"twice the devices along fsdp ({fsdp} -> {2 * fsdp})": state / 2,
        "half the rows at a time (batch, samples of a prompt, or minibatch)": (
            used.temporary - gradients + used.batch
        )
        / 2,
    }
    if trained < 1:
        savings[f"LoRA of rank {rank}"] = adapted
    full = sum(_bytes(leaf) for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.float32)
    part = full / max(1, sum(_bytes(leaf) for leaf in jax.tree.leaves(params)))
    if part:
        savings["parameters in bfloat16"] = part * (used.parameters + gradients) / 2
    if trained < 1:
        eight = used.parameters * (
            1 - count(params) / max(1, sum(_bytes(leaf) for leaf in jax.tree.leaves(params)))
        )
        savings[f"LoRA of rank {rank} on a base in 8 bits"] = adapted + max(0.0, eight)
    return {words: saved for words, saved in savings.items() if saved > 0}


def advice(used: Usage, memory: float, savings: Mapping[str, float]) -> list[str]:
    """What to do, in sentences; an empty list where it fits.

    Args:
      used: what is held now.
      memory: bytes that a device has for it.
      savings: changes in words -> bytes that they save alone: of `estimated_savings`, and of compiling anew (the
        peak now less the peak with the change).
    """
    over = used.total - memory
    if over <= 0:
        return []
    parts = used.parts()
    largest = max(parts, key=lambda name: parts[name])
    lines = [
        f"{in_bytes(used.total)} are needed on a device, {in_bytes(memory)} are there: {in_bytes(over)} too much. "
        f"The largest part: {largest}, {in_bytes(parts[largest])}."
    ]
    for words, saved in sorted(savings.items(), key=lambda item: -item[1]):
        left = used.total - saved
        enough = "enough alone" if left <= memory else f"{in_bytes(left - memory)} too much would be left"
        lines.append(f"{words}: saves {in_bytes(saved)}, {enough}.")
    if not any(used.total - saved <= memory for saved in savings.values()):
        lines.append(
            "None of these is enough alone: combine them, or take more devices or ones with more memory; "
            f"{math.ceil(used.total / memory)} times the memory would hold it."
        )
    return lines


def in_bytes(number: float) -> str:
    """1.5e9 -> '1.50 GB'."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _adapters(params: PyTree, rank: int) -> int:
    """Numbers of adapters on all matrices that are no embedding: rank (inputs + outputs) each."""
    found = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if len(leaf.shape) >= 2 and not re.search("embedding|positions", jax.tree_util.keystr(path)):
            found += math.prod(leaf.shape[:-2]) * rank * (leaf.shape[-2] + leaf.shape[-1])
    return found
