"""Replay against a Python list and, prioritised, against the paper's probabilities in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from rlhfjax.environments import replay

EXAMPLE: dict[str, jax.Array] = {"x": jnp.float32(0), "y": jnp.zeros(2, jnp.int32)}
KEY = jax.random.key(0)
add = jax.jit(replay.add)
update = jax.jit(replay.update_priorities)
sample = jax.jit(replay.sample, static_argnums=2)
windows = jax.jit(replay.windows, static_argnames=("length", "stride"))


def items(first: int, count: int) -> dict:
    number = np.arange(first, first + count)
    return {
        "x": jnp.asarray(number, jnp.float32),
        "y": jnp.asarray(np.stack([number, -number], axis=1), jnp.int32),
    }


def filled(capacity: int, count: int, **options) -> replay.Replay:
    return add(replay.init(EXAMPLE, capacity, **options), items(0, count))


@pytest.mark.parametrize("prioritised", [False, True])
def test_the_ring_keeps_the_newest_items(prioritised):
    capacity, state, kept = 5, replay.init(EXAMPLE, 5, prioritised=prioritised), []
    for first, count in ((0, 2), (2, 2), (4, 4), (8, 1), (9, 5)):
        state = add(state, items(first, count))
        kept = (kept + list(range(first, first + count)))[-capacity:]
        assert int(state.count) == len(kept)
        place = (int(state.next) - len(kept) + np.arange(len(kept))) % capacity
        np.testing.assert_array_equal(state.item["x"][place], kept)
        np.testing.assert_array_equal(state.item["y"][place, 1], -np.array(kept))


def test_uniform_sampling():
    state = filled(8, 5)
    drawn = sample(KEY, state, 8)
    assert drawn.batch["y"].shape == (8, 2) and drawn.index.dtype == jnp.int32
    np.testing.assert_array_equal(drawn.batch["x"], state.item["x"][drawn.index])
    np.testing.assert_array_equal(drawn.weight, np.ones(8))
    index = jax.jit(jax.vmap(lambda key: replay.sample(key, state, 4).index))(
        jax.random.split(KEY, 1000)
    ).ravel()
    counts = np.bincount(index, minlength=8)
    assert counts[5:].sum() == 0
    np.testing.assert_allclose(counts[:5] / 4000, 0.2, atol=5 * (0.16 / 4000) ** 0.5)


def tree(state: replay.Replay) -> np.ndarray:
    assert state.priorities is not None
    return np.asarray(state.priorities.tree)


def probabilities(error: np.ndarray, alpha: float, epsilon: float) -> np.ndarray:
    """arXiv 1511.05952, equation 1, proportional."""
    priority = (np.abs(error) + epsilon) ** alpha
    return priority / priority.sum()


@pytest.mark.parametrize("capacity", [1, 2, 6, 8])
def test_the_tree_holds_the_papers_probabilities(capacity):
    rng = np.random.default_rng(capacity)
    state = filled(capacity, capacity, prioritised=True)
    index = rng.permutation(capacity)
    error = rng.normal(size=capacity).astype(np.float32)
    state = update(state, jnp.asarray(index), jnp.asarray(error), alpha=0.7, epsilon=0.01)
    sums = tree(state)
    leaves = sums[len(sums) // 2 :]
    assert not leaves[capacity:].any()
    wanted = probabilities(error.astype(np.float64), 0.7, 0.01)
    np.testing.assert_allclose(leaves[index] / sums[1], wanted, rtol=1e-5)
    for node in range(1, len(sums) // 2):
        assert sums[node] == sums[2 * node] + sums[2 * node + 1]


def test_draws_and_weights_follow_the_paper():
    count, capacity, alpha, beta = 5, 6, 0.6, 0.4
    error = np.array([0.1, -3.0, 0.0, 1.0, 0.5], np.float32)
    state = filled(capacity, count, prioritised=True)
    state = update(state, jnp.arange(count), jnp.asarray(error), alpha=alpha, epsilon=0.01)
    p = probabilities(error.astype(np.float64), alpha, 0.01)
    drawn = jax.jit(jax.vmap(lambda key: replay.sample(key, state, 4, beta=beta)))(
        jax.random.split(KEY, 2000)
    )
    counts = np.bincount(drawn.index.ravel(), minlength=capacity)
    assert counts[count:].sum() == 0
    np.testing.assert_allclose(counts[:count] / 8000, p, atol=5 * (0.25 / 8000) ** 0.5)
    # Section 3.4 over the batch: (N P(i))^-beta over its largest.
    raw = (count * p) ** -beta
    for index, weight in zip(np.asarray(drawn.index[:20]), np.asarray(drawn.weight[:20]), strict=True):
        np.testing.assert_allclose(weight, raw[index] / raw[index].max(), rtol=1e-4)
    whole = sample(KEY, state, 4, beta=1.0)
    expected = (1 / p[whole.index]) / (1 / p[whole.index]).max()
    np.testing.assert_allclose(whole.weight, expected, rtol=1e-4)


def test_one_draw_from_each_part():
    """Four items of equal priority and a batch of four: each is drawn exactly once (appendix B.2.1)."""
    state = filled(4, 4, prioritised=True)
    for seed in range(5):
        index = sample(jax.random.key(seed), state, 4).index
        np.testing.assert_array_equal(np.sort(index), np.arange(4))


def test_new_items_get_the_largest_priority():
    state = filled(4, 2, prioritised=True)
    np.testing.assert_array_equal(tree(state)[4:], [1, 1, 0, 0])
    state = update(state, jnp.asarray([0, 1]), jnp.asarray([3.0, 0.5]), alpha=1.0, epsilon=0.0)
    state = add(state, items(2, 1))
    np.testing.assert_array_equal(tree(state)[4:], [3, 0.5, 3, 0])
    # Items that make room take their priority with them.
    state = add(state, items(3, 2))
    np.testing.assert_array_equal(tree(state)[4:], [3, 0.5, 3, 3])
    assert tree(state)[1] == 9.5


def test_windows_follow_a_world_and_stop_at_the_newest_step():
    """Two worlds, capacity of four steps, six steps stored: item = 10 * step + world."""
    state = replay.init(jnp.int32(0), 8)
    for t in range(6):
        state = add(state, jnp.asarray([10 * t, 10 * t + 1], jnp.int32))
    for place in range(8):
        found = windows(state, jnp.asarray([place]), length=3, stride=2)
        first = int(state.item[place])
        step, world = divmod(first, 10)
        wanted = [10 * t + world for t in range(step, step + 3) if t <= 5]
        mask = np.asarray(found.mask_BL[0])
        assert mask.tolist() == [step + k <= 5 for k in range(3)]
        assert np.asarray(found.batch[0])[mask].tolist() == wanted


def test_windows_of_a_replay_that_is_not_full():
    state = filled(6, 4)
    found = windows(state, jnp.asarray([0, 3]), length=3)
    assert found.mask_BL.tolist() == [[True] * 3, [True, False, False]]
    np.testing.assert_array_equal(found.batch["x"][0], [0, 1, 2])


def test_a_replay_smaller_than_a_batch():
    with pytest.raises(ValueError, match="between 1 and the replay's capacity of 4"):
        replay.sample(KEY, filled(4, 4), 5)
    with pytest.raises(ValueError, match="holds 2 items, fewer than a batch of 3"):
        replay.sample(KEY, filled(4, 2), 3)
    assert not replay.can_sample(filled(4, 2), 3) and replay.can_sample(filled(4, 3), 3)
    checked = checkify.checkify(jax.jit(replay.sample, static_argnums=2), errors=checkify.user_checks)
    error, _ = checked(KEY, filled(4, 2), 3)
    assert "holds 2 items, fewer than a batch of 3" in (error.get() or "")


@pytest.mark.parametrize("prioritised", [False, True])
def test_of_an_empty_replay_nothing_is_learnt(prioritised):
    empty = replay.init(EXAMPLE, 4, prioritised=prioritised)
    drawn = sample(KEY, empty, 2)
    np.testing.assert_array_equal(drawn.weight, [0, 0])


def test_bad_items():
    state = replay.init(EXAMPLE, 4)
    with pytest.raises(ValueError, match="5 items does not fit into a replay of 4"):
        replay.add(state, items(0, 5))
    with pytest.raises(ValueError, match=r"\['x'\].* is int32\[2\]; the replay stores float32\[2\]"):
        replay.add(state, {**items(0, 2), "x": jnp.arange(2)})
    with pytest.raises(ValueError, match="structure"):
        replay.add(state, {"x": jnp.zeros(2)})
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        replay.init(EXAMPLE, 0)
    with pytest.raises(ValueError, match="no arrays"):
        replay.init({}, 4)
    with pytest.raises(ValueError, match="this replay is uniform"):
        replay.update_priorities(state, jnp.arange(2), jnp.ones(2))
    with pytest.raises(ValueError, match=r"both be \[B\]"):
        replay.update_priorities(filled(4, 4, prioritised=True), jnp.arange(2), jnp.ones(3))
    with pytest.raises(ValueError, match="3 steps of 2 worlds do not fit into a replay of 4"):
        replay.windows(state, jnp.arange(2), 3, stride=2)
    with pytest.raises(ValueError, match="multiple of the worlds"):
        replay.windows(state, jnp.arange(2), 1, stride=3)


def test_the_state_is_one_pytree_for_vmap_and_checkpoints():
    seeds = jax.vmap(lambda x: filled(4, 3, prioritised=True)._replace(count=x))(jnp.asarray([3, 3]))
    drawn = jax.jit(jax.vmap(lambda key, state: replay.sample(key, state, 2)))(
        jax.random.split(KEY, 2), seeds
    )
    assert drawn.index.shape == (2, 2)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(filled(4, 3, prioritised=True)))
