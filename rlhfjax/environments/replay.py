"""Experience replay in device memory: a ring of items as pure functions over a pytree, uniform or prioritised.

    replay = init(example, capacity)                # example: one item, arrays without a batch axis
    replay = add(replay, batch)                     # batch [B, ...]; the oldest items make room
    batch, index, weight = sample(key, replay, batch_size)
    replay = update_priorities(replay, index, error, alpha=0.6)

The whole lies in one pytree, so it is donated, checkpointed and resumed with the rest of a run's state, and `vmap`
over seeds gives each seed its own.

Prioritised (arXiv 1511.05952, proportional): item i is drawn with probability P(i) = p_i^alpha / sum_k p_k^alpha,
where p_i = |error_i| + epsilon, from a binary tree of sums (section 3.3). Drawing a batch costs
batch_size * log2(capacity) reads. A parent is always written as the sum of its children, so that
rounding does not add up over updates.

Shapes: N items of capacity, B of a batch, L steps of a window.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental import checkify

PyTree = Any


class Priorities(NamedTuple):
    """Sums of p^alpha: node 1 is the root, 2 n and 2 n + 1 the children of n, the leaves come last in ring order."""

    tree: jax.Array  # float32 [2 * leaves], leaves a power of two
    largest: jax.Array  # float32 [], largest p^alpha given so far: what a new item gets


class Replay(NamedTuple):
    """A ring of items."""

    item: PyTree  # arrays [N, ...]
    next: jax.Array  # int32 [], where the next item goes
    count: jax.Array  # int32 [], items held
    priorities: Priorities | None  # None: uniform


class Sample(NamedTuple):
    """What was drawn."""

    batch: PyTree  # arrays [B, ...]
    index: jax.Array  # int32 [B], where each item lies: for update_priorities and windows
    weight: jax.Array  # float32 [B], importance weight of each item in the loss; 0 where the replay is empty


def init(example: PyTree, capacity: int, *, prioritised: bool = False) -> Replay:
    """An empty replay for items like `example`: one transition, of any structure, without a batch axis."""
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1 item, got {capacity}")
    leaves = jax.tree.leaves(example)
    if not leaves:
        raise ValueError("example holds no arrays; give one item as it will be stored")
    item = jax.tree.map(lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.asarray(x).dtype), example)
    priorities = None
    if prioritised:
        leaves = 1 << (capacity - 1).bit_length()
        priorities = Priorities(jnp.zeros(2 * leaves, jnp.float32), jnp.float32(1))
    return Replay(item, jnp.int32(0), jnp.int32(0), priorities)


def add(replay: Replay, batch: PyTree) -> Replay:
    """Stores a batch [B, ...] in its order; the oldest items make room. B is at most the capacity.

    A new item gets the largest priority given so far, so that it is likely to be seen at least once.
    """
    size = _batch_size(replay, batch)
    capacity = _capacity(replay)
    index_B = (replay.next + jnp.arange(size, dtype=jnp.int32)) % capacity
    item = jax.tree.map(lambda old, new: old.at[index_B].set(new), replay.item, batch)
    priorities = replay.priorities
    if priorities is not None:
        tree = _set(priorities.tree, index_B, jnp.broadcast_to(priorities.largest, (size,)))
        priorities = priorities._replace(tree=tree)
    count = jnp.minimum(replay.count + size, capacity)
    return Replay(item, (replay.next + size) % capacity, count, priorities)


def can_sample(replay: Replay, batch_size: int) -> jax.Array:
    """bool []: whether at least `batch_size` items are held. For `jax.lax.cond` around an update."""
    return replay.count >= batch_size


def sample(key: jax.Array, replay: Replay, batch_size: int, *, beta: jax.Array | float = 1.0) -> Sample:
    """Draws items with replacement. The key is consumed.

    Uniform: every weight is 1. Prioritised: one draw from each of B equal parts of the total (appendix B.2.1),
    and weight (N P(i))^-beta over the largest of the batch, N the items held (section 3.4); beta in [0, 1]
    is 1 where the bias is corrected in full.

    ValueError for a capacity below the batch and, where the count is known, for fewer items than the batch.
    While tracing it is not known: `can_sample` tells; of an empty replay all weights are 0, and
    `checkify.checkify(..., errors=checkify.user_checks)` reports fewer items than the batch.
    """
    capacity = _capacity(replay)
    if batch_size < 1 or batch_size > capacity:
        raise ValueError(
            f"batch_size {batch_size} must lie between 1 and the replay's capacity of {capacity}"
        )
    # `int`, for even a known count is compared into a traced flag where this is called inside a trace.
    if not isinstance(replay.count, Tracer) and int(replay.count) < batch_size:
        raise ValueError(
            f"the replay holds {replay.count} items, fewer than a batch of {batch_size}; "
            "act for more steps before the first update"
        )
    checkify.debug_check(
        can_sample(replay, batch_size),
        f"the replay holds {{count}} items, fewer than a batch of {batch_size}",
        count=replay.count,
    )
    held = replay.count > 0
    if replay.priorities is None:
        index_B = jax.random.randint(key, (batch_size,), 0, jnp.maximum(replay.count, 1), jnp.int32)
        weight_B = jnp.ones(batch_size)
    else:
        index_B, probability_B = _draw(key, replay.priorities.tree, batch_size)
        # The ratio to the least likely item is at least 1: no overflow, and a logarithm of nothing is not taken.
        likely_B = jnp.where(held, probability_B, 1.0)
        weight_B = (likely_B / jnp.min(likely_B)) ** -jnp.asarray(beta, jnp.float32)
    batch = jax.tree.map(lambda x: x[index_B], replay.item)
    return Sample(batch, index_B, jnp.where(held, weight_B, 0.0))


def update_priorities(
    replay: Replay,
    index: jax.Array,
    error: jax.Array,
    *,
    alpha: jax.Array | float = 0.6,
    epsilon: jax.Array | float = 1e-6,
) -> Replay:
    """Gives the items at `index` the priority (|error| + epsilon)^alpha.

    index: int32 [B] of a sample. error: float [B], the TD errors; of an item drawn twice one of its errors
    stands. alpha: 0 is uniform. epsilon: keeps an item without error possible, in units of the error.
    """
    if replay.priorities is None:
        raise ValueError("this replay is uniform; build it with init(..., prioritised=True)")
    if index.shape != error.shape or index.ndim != 1:
        raise ValueError(f"index and error must both be [B], got {index.shape} and {error.shape}")
    raised_B = (jnp.abs(error).astype(jnp.float32) + epsilon) ** alpha
    largest = jnp.maximum(replay.priorities.largest, jnp.max(raised_B))
    return replay._replace(priorities=Priorities(_set(replay.priorities.tree, index, raised_B), largest))


class Windows(NamedTuple):
    """The steps from each sampled one on."""

    batch: PyTree  # arrays [B, L, ...]
    mask_BL: jax.Array  # bool, True where the step has been stored


def windows(replay: Replay, index: jax.Array, length: int, *, stride: int = 1) -> Windows:
    """The `length` steps of the same world from each index on, for n-step targets.

    A step of `stride` worlds is stored by one `add`, in a fixed order, so that the next step of an item lies
    `stride` places on; the capacity must be a multiple of it. Steps that lie beyond the newest one are masked; a
    window that an episode's end lies in runs on into the next episode, which terminated and truncated tell.
    """
    capacity = _capacity(replay)
    if length < 1 or length * stride > capacity or capacity % stride:
        raise ValueError(
            f"{length} steps of {stride} worlds do not fit into a replay of {capacity} items, which must be a "
            "multiple of the worlds"
        )
    ahead_L = jnp.arange(length, dtype=jnp.int32) * stride
    age_B = (index - replay.next + replay.count) % capacity  # 0 is the oldest item held
    place_BL = (index[:, None] + ahead_L[None, :]) % capacity
    mask_BL = age_B[:, None] + ahead_L[None, :] < replay.count
    return Windows(jax.tree.map(lambda x: x[place_BL], replay.item), mask_BL)


def _capacity(replay: Replay) -> int:
    return jax.tree.leaves(replay.item)[0].shape[0]


def _batch_size(replay: Replay, batch: PyTree) -> int:
    """B of a batch, held against the items of the replay."""
    if jax.tree.structure(batch) != jax.tree.structure(replay.item):
        raise ValueError(
            f"the batch has structure {jax.tree.structure(batch)}, "
            f"the replay's items {jax.tree.structure(replay.item)}"
        )
    size = jax.tree.leaves(batch)[0].shape[0]
    pairs = zip(jax.tree_util.tree_leaves_with_path(replay.item), jax.tree.leaves(batch), strict=True)
    for (path, old), new in pairs:
        if new.shape != (size, *old.shape[1:]) or new.dtype != old.dtype:
            raise ValueError(
                f"leaf {jax.tree_util.keystr(path) or '(the whole)'} of the batch is {new.dtype.name}"
                f"{list(new.shape)}; the replay stores {old.dtype.name}{[size, *old.shape[1:]]}"
            )
    if size < 1 or size > _capacity(replay):
        raise ValueError(f"a batch of {size} items does not fit into a replay of {_capacity(replay)}")
    return size


def _set(tree: jax.Array, index_B: jax.Array, raised_B: jax.Array) -> jax.Array:
    """Writes leaves, then every sum above them, level by level. The same place twice is written one value."""
    node_B = index_B + tree.shape[0] // 2
    tree = tree.at[node_B].set(raised_B)
    for _ in range((tree.shape[0] // 2).bit_length() - 1):
        node_B = node_B // 2
        tree = tree.at[node_B].set(tree[2 * node_B] + tree[2 * node_B + 1])
    return tree


def _draw(key: jax.Array, tree: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Leaves and their probabilities, [B]: down the tree, to the left where the rest of the sum is smaller."""
    part_B = (jnp.arange(batch_size) + jax.random.uniform(key, (batch_size,))) / batch_size
    rest_B = part_B * tree[1]
    node_B = jnp.ones(batch_size, jnp.int32)
    for _ in range((tree.shape[0] // 2).bit_length() - 1):
        left_B = tree[2 * node_B]
        # Rounding may leave a rest that no leaf covers; a side that holds nothing is never taken.
        right_B = (rest_B >= left_B) & (tree[2 * node_B + 1] > 0)
        rest_B = jnp.where(right_B, rest_B - left_B, rest_B)
        node_B = 2 * node_B + right_B
    return node_B - tree.shape[0] // 2, tree[node_B] / tree[1]
