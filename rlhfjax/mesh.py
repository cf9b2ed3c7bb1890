"""Where arrays lie: one mesh of devices, and rules that say how each kind of array is split over it.

The only file that imports `jax.sharding`. A mesh has four axes. `data` and `fsdp` split the rows of a batch, `fsdp`
parameters and optimiser state besides (ZeRO-3, arXiv 1910.02054), `tensor` the heads, hidden layers and vocabulary
(arXiv 1909.08053), `sequence` the tokens of a row. No algorithm knows of it: programs are compiled for where their
arguments lie, and `activations` tells networks where what they compute lies.

Usage:
  mesh = make_mesh(Mesh(data=2, fsdp=2))
  lm = decoder(config, place=activations(mesh))
  state = init_on(mesh, lambda: algorithm.init(lm.init(key)))
  batch = put_rows(mesh, batch)
  state, metrics = jax.jit(kept(mesh, algorithm.update), donate_argnums=0)(state, batch, key)

With one device all of it does nothing, and costs nothing.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.sharding import Mesh as Devices

from rlhfjax.config import Mesh as Config

PyTree = Any
Tree = TypeVar("Tree")

AXES = ("data", "fsdp", "sequence", "tensor")
ROWS = ("data", "fsdp", "sequence")  # what the first axis of a batch is split over

Rule = tuple[str, tuple[str | None, ...]]

_COLUMN = "(query|key|value|gate|up)"  # projections whose outputs are split: each device has some heads
_ROW = "(output|down)"  # and those whose inputs are: each device has a part of the sum

# Path of a parameter (a regular expression that ends with it) -> what each of its last axes is split over. The first
# that fits is taken. Optimiser state and target networks carry their parameter's path, and are split as it is.
RULES: tuple[Rule, ...] = (
    (rf"{_COLUMN}/kernel(_int8|_nf4)?", ("fsdp", "tensor")),
    (rf"{_COLUMN}/kernel_transposed", ("tensor", "fsdp")),
    (rf"{_COLUMN}/kernel_scale", (None, "tensor")),
    (rf"{_COLUMN}/bias", ("tensor",)),
    (rf"{_COLUMN}/lora_a", ("fsdp", None)),
    (rf"{_COLUMN}/lora_b", (None, "tensor")),
    (rf"{_ROW}/kernel(_int8|_nf4)?", ("tensor", "fsdp")),
    (rf"{_ROW}/kernel_transposed", ("fsdp", "tensor")),
    (rf"{_ROW}/kernel_scale", (None, "fsdp")),
    (rf"{_ROW}/bias", (None,)),
    (rf"{_ROW}/lora_a", ("tensor", None)),
    (rf"{_ROW}/lora_b", (None, "fsdp")),
    (r"(un)?embedding", ("tensor", "fsdp")),
    (r"positions", (None, "fsdp")),
    (r"norm/(scale|bias)", (None,)),
    (r"head/kernel", (None,)),  # of a scalar: a reward, a value
    (r"q/inner", ("fsdp", None)),
    (r"q/inner_bias", (None,)),
    (r"q/outer", ("tensor", "fsdp")),
    (r"q/outer_bias", ("tensor",)),
    (r"v/(inner|outer)", (None, None)),  # of a state: one number
    (r"v/(inner|outer)_bias", (None,)),
    (r"ns_coeffs", (None,)),  # Muon's
    # Numbers, which have axes where there are many runs.
    (r"(head/bias|step|count|kl_coefficient|weight_sum|max_lr|b1)", ()),
)

# What the axes of an activation are split over, by the letter that its shape suffix has for them.
_LETTERS: Mapping[str, str | tuple[str, ...]] = {
    "B": ("data", "fsdp"),  # rows of a batch
    "T": "sequence",  # tokens of a row
    "R": ROWS,  # rows outside of the blocks, and in prefill and decoding, where their tokens are few
    "H": "tensor",  # query heads
    "N": "tensor",  # key-value heads
    "F": "tensor",  # the hidden layer of an MLP
    "V": "tensor",  # the vocabulary
}


def make_mesh(
    config: Config = Config(),  # noqa: B008  (frozen, so it can be shared)
    devices: Sequence[Any] | None = None,
    *,
    state_bytes: float = 0,
    memory: float | None = None,
) -> Devices:
    """The mesh that `config` describes.

    Neighbours along `tensor` are nearest to each other, then those along `sequence` and `fsdp`. Where devices belong to
    several slices (TPU pods joined by a network), `data` spans them.

    Args:
      devices: None: all that JAX has, of all processes; of a CPU, where `config.data` is left open, one.
      state_bytes: what parameters, gradients and optimiser state take together, for the choice of `fsdp`: as few
        devices as hold it in half of their memory.
      memory: bytes of a device; None: what it tells itself.

    Raises ValueError where the axes ask for more devices than there are, or leave some idle.
    """
    if devices is None:
        devices = jax.devices()
        # Virtual devices of one CPU share its cores: splitting work over them gains nothing, unless it is asked for.
        if not config.data and devices[0].platform == "cpu" and jax.process_count() == 1:
            config = dataclasses.replace(config, data=1)
    shape = _resolved(config, devices, state_bytes, memory)
    count = math.prod(shape)
    return Devices(_arranged(shape, list(devices)[:count]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shardings(mesh: Devices, tree: PyTree, rules: Sequence[Rule] = RULES) -> PyTree:
    """Where the leaves of a state lie: a `NamedSharding` for each.

    Numbers without axes lie whole on every device. A name with a shape suffix that begins with B or R (`token_BT`) is a
    batch's, and split by rows. All other leaves go by `rules`: an axis in front of those that a rule speaks of is not
    split, and a leaf with fewer axes is a statistic of its parameter (a factored second moment), and whole.

    Args:
      tree: arrays, or their shapes (`jax.eval_shape`).

    Raises ValueError that names the path where no rule fits, and where an axis cannot be split evenly.
    """

    def of_leaf(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _partition(mesh, name, np.shape(leaf), rules))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def rows(mesh: Devices, axis: int = 0) -> NamedSharding:
    """Split along the first axis, or that number `axis`, over all of `ROWS`."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, ROWS))


def whole(mesh: Devices) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place_params(mesh: Devices) -> Callable[[tuple[str, ...], tuple[int, ...]], NamedSharding | None] | None:
    """`place` of `rlhfjax.pretrained`: each device reads its own slice of a checkpoint. None on one device."""
    if mesh.size == 1:
        return None
    return lambda path, shape: NamedSharding(mesh, _partition(mesh, "/".join(path), shape, RULES))


def place_rows(mesh: Devices | None) -> Callable[[Any], Any]:
    """`place` of rollouts and games, within a program: arrays that have a row for each world are split by rows. Under
    `vmap` the rows are those of each member. On one device, and with None, it changes nothing.

    What it gives raises ValueError, when tracing, where the rows cannot be split evenly.
    """
    if mesh is None or mesh.size == 1:
        return lambda tree: tree

    def place(tree: Tree) -> Tree:
        for leaf in jax.tree.leaves(tree):
            check_rows(mesh, leaf.shape[0], what="set of worlds")
        return jax.lax.with_sharding_constraint(tree, rows(mesh))

    return place


def put(mesh: Devices, tree: Tree, rules: Sequence[Rule] = RULES) -> Tree:
    """The arrays of a state laid over the mesh by `shardings`. With several processes each has the whole of them."""
    if mesh.size == 1:
        return tree
    return jax.tree.map(_put, tree, shardings(mesh, tree, rules))


def put_rows(mesh: Devices, tree: Tree, *, what: str = "batch") -> Tree:
    """A batch, laid over the mesh by its first axis; a number without axes is whole on every device.

    With several processes each gives the whole batch, and only its own rows are copied to its devices.

    Raises ValueError where the rows cannot be split evenly.
    """
    if mesh.size == 1:
        return tree
    for leaf in jax.tree.leaves(tree):
        if np.ndim(leaf):
            check_rows(mesh, np.shape(leaf)[0], what=what)
    return jax.tree.map(lambda x: _put(x, rows(mesh) if np.ndim(x) else whole(mesh)), tree)


def check_rows(mesh: Devices, count: int, *, what: str = "batch") -> None:
    """Raises ValueError where so many rows cannot be split evenly."""
    parts = row_parts(mesh)
    if count % parts:
        axes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in ROWS if mesh.shape[axis] > 1)
        raise ValueError(
            f"a {what} of {count} rows cannot be split over {parts} devices ({axes}); make it a multiple of {parts}, "
            "or the mesh smaller (--mesh.data)"
        )


def init_on(
    mesh: Devices, init: Callable[..., Tree], *arguments: PyTree, rules: Sequence[Rule] = RULES
) -> Tree:
    """What `init(*arguments)` makes, laid over the mesh by `shardings`; no device holds more than its part on the way.

    Large arrays belong in the arguments: what `init` closes over becomes constants of a program.
    """
    if mesh.size == 1:
        return init(*arguments)
    where = shardings(mesh, jax.eval_shape(init, *arguments), rules)
    return jax.jit(init, out_shardings=where)(*arguments)


def kept(mesh: Devices, update: Callable[..., Any], rules: Sequence[Rule] = RULES) -> Callable[..., Any]:
    """`update`, whose result, or the first part of it, is a state: that lies by `shardings` again, as it did before."""
    if mesh.size == 1:
        return update

    @functools.wraps(update)
    def on_mesh(*arguments: Any, **named: Any) -> Any:
        state, *rest = update(*arguments, **named)
        state = jax.lax.with_sharding_constraint(state, shardings(mesh, state, rules))
        return (state, *rest)

    return on_mesh


def activations(mesh: Devices) -> Callable[[jax.Array, str], jax.Array] | None:
    """`place` of `networks.decoder`: lays an activation over the mesh by its letters, one for each axis. None on one
    device.

    Within `jax.shard_map` axes that are mapped there are left alone: an array is then a device's own part already.

    Raises ValueError, when tracing, where an axis cannot be split evenly.
    """
    if mesh.size == 1:
        return None

    def place(x: jax.Array, axes: str) -> jax.Array:
        context = jax.sharding.get_abstract_mesh()
        manual = set() if context.empty else set(context.manual_axes)
        split = [_without(_LETTERS.get(letter), manual) for letter in axes]
        for size, letter, over in zip(x.shape, axes, split, strict=True):
            if letter in "BR" and not manual:
                check_rows(mesh, size, what="batch, or a minibatch or microbatch of it,")
            _check_even(mesh, size, over, f"axis {letter} of an activation {axes} {list(x.shape)}")
        where = NamedSharding(context if manual else mesh, PartitionSpec(*split))
        return jax.lax.with_sharding_constraint(x, where)

    return place


def each_on_its_rows(mesh: Devices, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(params, *batches) -> batch`, for loops that end at another time on each device, such as
    `generate_refilled`: each device (each group of them along `tensor`) is given its own rows, and params that are
    whole over the other axes, gathered before the loop.
    """
    if mesh.size == 1:
        return function

    def on_mesh(params: PyTree, *batches: PyTree) -> PyTree:
        of_rows = PartitionSpec(ROWS)
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(PartitionSpec(), *(of_rows,) * len(batches)),
            out_specs=of_rows,
            axis_names=set(ROWS),
            check_vma=False,
        )(params, *batches)

    return on_mesh


def row_parts(mesh: Devices) -> int:
    """How many parts the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def gathered_to_decode(mesh: Devices, lm: Tree) -> Tree:
    """A language model whose parameters are gathered over `fsdp` once, before the loop that decodes, in the type that
    computes: otherwise every layer is gathered for every token. Each device must have room for them, a part of them
    where `tensor` splits them.
    """
    if mesh.shape["fsdp"] == 1:
        return lm

    def for_decoding(params: PyTree) -> PyTree:
        params = lm.for_decoding(params)  # pyright: ignore[reportAttributeAccessIssue]
        where = shardings(mesh, params, [(path, tuple(_but_fsdp(split))) for path, split in RULES])
        return jax.lax.with_sharding_constraint(params, where)

    return lm._replace(for_decoding=for_decoding)  # pyright: ignore[reportAttributeAccessIssue]


def _but_fsdp(split: tuple[str | None, ...]) -> list[str | None]:
    return [None if axis == "fsdp" else axis for axis in split]


def fetch(tree: Tree) -> Tree:
    """The arrays as NumPy, whole, on the host; with several processes on each of them, which must all ask for it."""

    def gathered(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.device_get(jax.tree.map(gathered, tree))


def own_rows(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(rows that this process holds of an array split along its first axis, their numbers); all, where it is alone."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x), np.arange(x.shape[0])
    blocks = {shard.index[0].indices(x.shape[0])[0]: np.asarray(shard.data) for shard in x.addressable_shards}
    starts = sorted(blocks)
    number = np.concatenate([start + np.arange(len(blocks[start])) for start in starts])
    return np.concatenate([blocks[start] for start in starts]), number


def from_own_rows(mesh: Devices, x: np.ndarray, count: int) -> jax.Array:
    """The inverse of `own_rows`: an array of `count` rows, of which this process gives its own."""
    if mesh.size == 1:
        return jax.numpy.asarray(x)
    return jax.make_array_from_process_local_data(rows(mesh), x, (count, *x.shape[1:]))


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    """On the mesh: an array that lies there already by JAX's own way, another from the host, a device's part each."""
    if isinstance(x, jax.Array) and (jax.process_count() == 1 or not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _put(np.asarray(jax.random.key_data(x)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _partition(mesh: Devices, name: str, shape: tuple[int, ...], rules: Sequence[Rule]) -> PartitionSpec:
    """How a leaf is split. Raises ValueError where no rule fits, or an axis cannot be split evenly."""
    if not shape:
        return PartitionSpec()
    if re.search(r"_[BR][A-Za-z0-9]*$", name):
        _check_even(mesh, shape[0], ROWS, f"the first axis of {name} {list(shape)}")
        return PartitionSpec(ROWS)
    split = next((split for rule, split in rules if re.search(rf"(^|[/_]){rule}$", name)), None)
    if split is None:
        raise ValueError(
            f"no rule says how {name} {list(shape)} lies on the mesh: add one to the rules that are given to "
            "`shardings`, (end of its path, axes of the mesh)"
        )
    if len(shape) < len(split):
        return PartitionSpec()
    for size, over in zip(shape[len(shape) - len(split) :], split, strict=True):
        _check_even(mesh, size, over, f"{name} {list(shape)}, axis of {size}")
    return PartitionSpec(*(None,) * (len(shape) - len(split)), *split)


def _check_even(mesh: Devices, size: int, over: str | tuple[str, ...] | None, what: str) -> None:
    axes = (over,) if isinstance(over, str) else over or ()
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if size % parts:
        named = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)
        raise ValueError(
            f"{what}, cannot be split evenly over {named}: choose a divisor of {size} for --mesh"
        )


def _without(over: str | tuple[str, ...] | None, manual: set[str]) -> str | tuple[str, ...] | None:
    if isinstance(over, tuple):
        return tuple(axis for axis in over if axis not in manual) or None
    return None if over in manual else over


def _resolved(
    config: Config, devices: Sequence[Any], state_bytes: float, memory: float | None = None
) -> tuple[int, ...]:
    """Devices along each of `AXES`."""
    size = {axis: getattr(config, axis) for axis in AXES}
    for axis in AXES:
        least = 0 if axis in ("data", "fsdp") else 1
        if size[axis] < least:
            raise ValueError(f"--mesh.{axis} {size[axis]} must be at least {least}")
    fixed = math.prod(n for n in size.values() if n)
    asked = " x ".join(f"{axis} {n}" for axis, n in size.items() if n > 1)
    if fixed > len(devices):
        raise ValueError(
            f"the mesh asks for {fixed} devices ({asked}), and there are {len(devices)}: make it smaller, or, to try "
            f"it on a CPU, set JAX_NUM_CPU_DEVICES={fixed}"
        )
    chosen = [axis for axis in ("data", "fsdp") if not size[axis]]
    left, idle = divmod(len(devices), fixed)
    if idle and (chosen or jax.process_count() > 1):
        raise ValueError(
            f"{len(devices)} devices cannot be laid out as {asked} x {' x '.join(chosen)}: {idle} would be idle; "
            f"choose axes whose product divides {len(devices)}"
        )
    if "fsdp" in chosen:
        share = state_bytes / (size["tensor"] or 1)
        size["fsdp"] = _fewest(left, share, memory or _memory(devices[0])) if "data" in chosen else 1
        left //= size["fsdp"]
    if "data" in chosen:
        size["data"] = left
    return tuple(size[axis] for axis in AXES)


def _memory(device: Any) -> float:
    """Bytes of a device that programs may take; infinite where it does not tell, as a CPU does not."""
    if device.process_index != jax.process_index():  # of another process's device nothing can be asked
        device = jax.local_devices(backend=device.platform)[0]
    return (device.memory_stats() or {}).get("bytes_limit", math.inf)


def _fewest(most: int, state_bytes: float, memory: float) -> int:
    """The least divisor of `most` among so many of which a state takes half of a device's memory; or `most`."""
    fitting = (n for n in range(1, most + 1) if most % n == 0 and state_bytes / n <= memory / 2)
    return next(fitting, most)


def _arranged(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """The devices in the shape of the mesh, those that talk most nearest to each other."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if shape[0] % slices:
            raise ValueError(
                f"--mesh.data {shape[0]} must be a multiple of the {slices} slices that the devices belong to: the "
                "other axes must stay within one"
            )
        within = (shape[0] // slices, *shape[1:])
        across = (slices, *(1,) * (len(shape) - 1))
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.array(devices).reshape(shape)
