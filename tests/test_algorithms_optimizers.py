"""The optimiser: its schedule, its norm, and which parameters Muon takes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algorithms import make_optimizer
from rlhfjax.algorithms.optimizers import schedule
from rlhfjax.config import Optimizer

PARAMS: Any = {
    "embedding": jnp.ones((7, 4)),
    "layer_0": {"mlp": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}},
    "stacked": jnp.ones((2, 4, 5)),
    "value_head": {"kernel": jnp.ones((4, 1))},
}


def gradients(seed=0, scale=1.0) -> Any:
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(generator.normal(size=p.shape) * scale, jnp.float32), PARAMS)


def test_schedule_rises_then_falls():
    config = Optimizer(learning_rate=1.0, warmup_steps=4, final_fraction=0.2)
    steps = schedule(config, 1.0, 12)
    got = [float(steps(jnp.asarray(i))) for i in range(14)]
    rise = [0.25, 0.5, 0.75, 1.0]
    fall = [1 - 0.8 * i / 8 for i in range(9)]
    np.testing.assert_allclose(got, rise + fall + [0.2], rtol=1e-6)
    flat = schedule(Optimizer(final_fraction=1.0), 0.3, 5)
    np.testing.assert_allclose([flat(i) for i in range(7)], 0.3, rtol=1e-6)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_steps=10 must be .* less than the run's 10 steps"):
        make_optimizer(Optimizer(warmup_steps=10), 10)


def test_adam_steps_equal_a_loop():
    """AdamW in NumPy from arXiv 1412.6980 and 1711.05101, with clipping and decay of matrices only."""
    config = Optimizer(learning_rate=0.1, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1, max_grad_norm=2.0)
    optimizer = make_optimizer(config, 4)
    params, state = PARAMS, optimizer.init(PARAMS)
    expected: Any = jax.tree.map(lambda p: np.asarray(p, np.float64), PARAMS)
    first = second = jax.tree.map(np.zeros_like, expected)
    update = jax.jit(optimizer.update)
    for i in range(3):
        grads = gradients(seed=i)
        updates, state = update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)

        grads = jax.tree.map(lambda g: np.asarray(g, np.float64), grads)
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        assert norm > 2.0
        grads = jax.tree.map(lambda g, norm=norm: g * 2.0 / norm, grads)
        first = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, second, grads)

        def move(p, m, v, i=i):
            direction = (m / (1 - 0.8 ** (i + 1))) / (np.sqrt(v / (1 - 0.95 ** (i + 1))) + 1e-3)
            return p - 0.1 * (1 - i / 4) * (direction + 0.1 * p * (p.ndim >= 2))

        expected = jax.tree.map(move, expected, first, second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), params, expected)


def test_muon_takes_hidden_matrices_and_adam_the_rest():
    """Muon's first step is the orthogonal factor of the gradient, scaled; the others step as without Muon."""
    config = Optimizer(learning_rate=0.5, muon=True, muon_learning_rate=0.1, max_grad_norm=None)
    grads = gradients()

    def first_step(config) -> Any:
        optimizer = make_optimizer(config, 10)
        return jax.jit(optimizer.update)(grads, optimizer.init(PARAMS), PARAMS)[0]

    muon, adam = first_step(config), first_step(dataclasses.replace(config, muon=False))
    same = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, rtol=1e-5)), muon, adam)
    assert same == {
        "embedding": True,
        "layer_0": {"mlp": {"kernel": False, "bias": True}},
        "stacked": False,
        "value_head": {"kernel": True},
    }
    matrices = [muon["layer_0"]["mlp"]["kernel"], *muon["stacked"]]
    gradient = [grads["layer_0"]["mlp"]["kernel"], *grads["stacked"]]
    for step, g in zip(matrices, gradient, strict=True):
        left, _, right = np.linalg.svd(np.asarray(g), full_matrices=False)
        scale = 0.1 * max(1, g.shape[1] / g.shape[0]) ** 0.5
        # Five quintic iterations bring the singular values to 0.7 .. 1.2, on the axes of the gradient.
        values = np.diag(left.T @ np.asarray(-step) @ right.T) / scale
        assert np.all((values > 0.6) & (values < 1.3)), values


def test_learning_rate_may_be_swept():
    """A vmap over the step size gives the steps of separate optimisers."""
    grads = gradients()

    @jax.jit
    def step(rate) -> Any:
        optimizer = make_optimizer(Optimizer(learning_rate=rate, max_grad_norm=rate), 10)
        return optimizer.update(grads, optimizer.init(PARAMS), PARAMS)[0]

    rates = jnp.array([0.1, 0.3])
    together = jax.vmap(step)(rates)
    for i, rate in enumerate(rates):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5), together, step(rate))
