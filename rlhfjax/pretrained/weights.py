"""The weights of a family, one by one: where each of our arrays lies in their tensors, read and written.

Our arrays are [inputs, outputs] and apart; theirs may be transposed, and several of ours fused along the outputs.
Everything is told by `Weight`, and read so that a part of our array touches no more of the file than it must.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from rlhfjax.config import Decoder
from rlhfjax.pretrained.families import Family

Path = tuple[str, ...]
SCORE = "score.weight"  # [labels, width], in place of the output embedding of a sequence classifier


class Weight(NamedTuple):
    """One array of ours in one tensor of theirs, whose last axis (once transposed as ours) has `length` entries: groups
    of `stride`, in each of which `size` are ours, from `start` on."""

    path: Path
    shape: tuple[int, ...]
    name: str
    transposed: bool
    start: int
    size: int
    stride: int
    length: int

    def stored_shape(self) -> tuple[int, ...]:
        shape = (*self.shape[:-1], self.length)
        return shape[::-1] if self.transposed else shape


def weights_of(family: Family, config: Decoder, *, prefix: str, unembedding: str) -> list[Weight]:
    """Every array of a decoder's params but those of adapters, in the order in which files hold them.

    Args:
      prefix: what stands before all names but `unembedding`: `family.prefix` in files that are written here.
      unembedding: the name of the output embedding, where it is not tied.
    """
    width = config.width

    def whole(path: Path, shape: tuple[int, ...], name: str) -> Weight:
        return Weight(path, shape, name, False, 0, shape[-1], shape[-1], shape[-1])

    def norm(path: Path, name: str, size: int) -> list[Weight]:
        kinds = [("scale", "weight")] + ([("bias", "bias")] if config.norm == "layernorm" else [])
        return [whole((*path, ours), (size,), f"{prefix}{name}.{theirs}") for ours, theirs in kinds]

    found = [whole(("embedding",), (config.vocab_size, width), prefix + family.embedding)]
    if family.positions:
        found.append(whole(("positions",), (config.max_positions, width), prefix + family.positions))
    for i in range(config.layers):
        layer, at = f"layer_{i}", family.layer.format(i)
        for ours, theirs in family.norms.items():
            size = config.head_size if ours.startswith("attention.") else width
            found += norm((layer, *ours.split(".")), at + theirs, size)
        found += _projections(family, config, layer, prefix + at)
    found += norm(("final_norm",), family.final_norm, width)
    if not config.tie_embeddings:
        found.append(whole(("unembedding",), (config.vocab_size, width), unembedding))
    return found


def _projections(family: Family, config: Decoder, layer: str, at: str) -> list[Weight]:
    queries, keys = config.heads * config.head_size, config.kv_heads * config.head_size
    # Of every projection: inputs, outputs, whether it has a bias.
    sizes = {
        "attention.query": (config.width, queries, config.attention_bias),
        "attention.key": (config.width, keys, config.attention_bias),
        "attention.value": (config.width, keys, config.attention_bias),
        "attention.output": (queries, config.width, config.output_bias),
        "mlp.gate": (config.width, config.mlp_width, config.mlp_bias),
        "mlp.up": (config.width, config.mlp_width, config.mlp_bias),
        "mlp.down": (config.mlp_width, config.width, config.mlp_bias),
    }
    found = []
    for ours, theirs in family.projections.items():
        inputs, outputs, bias = sizes[ours]
        fused = [other for other, name in family.projections.items() if name == theirs]
        length = sum(sizes[other][1] for other in fused)
        start, size, stride = sum(sizes[x][1] for x in fused[: fused.index(ours)]), outputs, length
        if family.by_head and len(fused) > 1:
            size, stride = config.head_size, len(fused) * config.head_size
            start = fused.index(ours) * size
        path, part = (layer, *ours.split(".")), (start, size, stride, length)
        matrix = f"{at}{theirs}.weight"
        found.append(Weight((*path, "kernel"), (inputs, outputs), matrix, not family.inputs_first, *part))
        if bias:
            found.append(Weight((*path, "bias"), (outputs,), f"{at}{theirs}.bias", False, *part))
    return found


def read_part(tensor: Any, weight: Weight, index: tuple[slice, ...]) -> np.ndarray:
    """The part of our array at `index`, slices with steps of 1, from a stored tensor that can be sliced."""
    bounds = [slice(*part.indices(size)) for part, size in zip(index, weight.shape, strict=True)]
    *before, last = bounds
    first, end = 0, 1  # of the groups that are touched
    along = slice(weight.start + last.start, weight.start + last.stop)
    grouped = weight.stride != weight.length
    if grouped:
        first, end = last.start // weight.size, -(-last.stop // weight.size)
        along = slice(first * weight.stride, end * weight.stride)
    where = (along, *before) if weight.transposed else (*before, along)
    array = np.asarray(tensor[where])
    array = array.T if weight.transposed else array
    if grouped:
        shape, offset = array.shape[:-1], first * weight.size
        array = array.reshape(*shape, end - first, weight.stride)
        array = array[..., weight.start : weight.start + weight.size].reshape(*shape, -1)
        array = array[..., last.start - offset : last.stop - offset]
    return array


def assemble(parts: Iterable[tuple[Weight, Any]], dtype: Any) -> np.ndarray:
    """One tensor of theirs, in host memory, from all the arrays of ours that lie in it."""
    parts = list(parts)
    weight = parts[0][0]
    out = np.empty((*weight.shape[:-1], weight.length // weight.stride, weight.stride), dtype)
    for weight, array in parts:
        into = out[..., weight.start : weight.start + weight.size]
        into[...] = np.asarray(array).reshape(into.shape).astype(dtype)
    out = out.reshape(*weight.shape[:-1], weight.length)
    return np.ascontiguousarray(out.T if weight.transposed else out)
