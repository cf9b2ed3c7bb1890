"""The optimisers against loops in float64, their schedules, and which parameters Muon takes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.algorithms import make_optimizer
from rlhfjax.algorithms.optimizers import evaluation_params, schedule
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


def test_schedules_equal_loops():
    warmup, total, final, decay = 3, 13, 0.1, 0.25

    def expected(name: str, step: int) -> float:
        if step < warmup:
            return 0.5 * (step + 1) / warmup
        done = min((step - warmup) / (total - warmup), 1.0)
        factor = {
            "linear": 1 - 0.9 * done,
            "cosine": final + 0.9 * np.cos(np.pi / 2 * done) ** 2,
            "constant": 1.0,
            "inverse_sqrt": (warmup / (step + 1)) ** 0.5,
            "wsd": 1.0 if done <= 1 - decay else 1 - 0.9 * (done - (1 - decay)) / decay,
        }[name]
        return 0.5 * factor

    for name in ("linear", "cosine", "constant", "inverse_sqrt", "wsd"):
        config = Optimizer(
            schedule=name, warmup_steps=warmup, final_fraction=final, decay_fraction=decay, learning_rate=0.5
        )
        got = jax.vmap(schedule(config, 0.5, total))(jnp.arange(16))
        # The cosine of a float32 angle near pi / 2 ... pi is good to 1e-7, not to 1e-7 of a small step.
        np.testing.assert_allclose(
            got, [expected(name, i) for i in range(16)], rtol=1e-6, atol=1e-7, err_msg=name
        )
    without_warmup = schedule(Optimizer(schedule="inverse_sqrt"), 1.0, 9)
    np.testing.assert_allclose([without_warmup(i) for i in (0, 3, 8)], [1.0, 0.5, 1 / 3], rtol=1e-6)


def test_unknown_choices_are_refused():
    with pytest.raises(
        ValueError, match="kind='lion' is unknown; choose one of .*'adafactor', 'adamw', 'muon'"
    ):
        make_optimizer(Optimizer(kind="lion"), 10)
    with pytest.raises(ValueError, match="schedule='step' is unknown; choose one of .*'constant', 'cosine'"):
        make_optimizer(Optimizer(schedule="step"), 10)
    with pytest.raises(ValueError, match="schedule=\"constant\", not 'linear'"):
        make_optimizer(Optimizer(kind="schedule_free"), 10)


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
    config = Optimizer(learning_rate=0.5, kind="muon", muon_learning_rate=0.1, max_grad_norm=None)
    grads = gradients()

    def first_step(config) -> Any:
        optimizer = make_optimizer(config, 10)
        return jax.jit(optimizer.update)(grads, optimizer.init(PARAMS), PARAMS)[0]

    muon, adam = first_step(config), first_step(dataclasses.replace(config, kind="adamw"))
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


def follow(config: Optimizer, params, grads: list, total: int) -> list[tuple[Any, Any]]:
    """(params, optimiser state) after each step."""
    optimizer = make_optimizer(config, total)
    state, update, out = optimizer.init(params), jax.jit(optimizer.update), []
    for gradient in grads:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        out.append((params, state))
    return out


def random_like(params, seed: int) -> Any:
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(generator.normal(size=p.shape), jnp.float32), params)


def as_float64(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(x, np.float64) for name, x in tree.items()}


def assert_close(got, expected, rtol=1e-5):
    for name, x in expected.items():
        np.testing.assert_allclose(got[name], x, rtol=rtol, atol=1e-6, err_msg=name)


SMALL = {"kernel": jnp.full((3, 4), 0.5), "bias": jnp.full((4,), 0.5)}


def test_sgd_equals_a_loop():
    config = Optimizer(kind="sgd", learning_rate=0.1, b1=0.7, weight_decay=0.2, max_grad_norm=None)
    grads = [random_like(SMALL, i) for i in range(3)]
    expected = as_float64(SMALL)
    momentum: dict[str, Any] = {"kernel": 0.0, "bias": 0.0}
    for i, (got, _) in enumerate(follow(config, SMALL, grads, 4)):
        for name, g in as_float64(grads[i]).items():
            momentum[name] = 0.7 * momentum[name] + g
            decay = 0.2 * expected[name] * (name == "kernel")
            expected[name] = expected[name] - 0.1 * (1 - i / 4) * (momentum[name] + decay)
        assert_close(got, expected)


def test_adafactor_equals_a_loop():
    """arXiv 1804.04235, algorithms 4 and 5, with decoupled decay: second moments by row and column where both sides
    are long, in full elsewhere; no matrix of second moments is kept."""
    params = {"kernel": jnp.full((130, 140), 0.5), "lora_b": jnp.zeros((2, 140)), "bias": jnp.full((4,), 0.5)}
    config = Optimizer(
        kind="adafactor", learning_rate=0.1, weight_decay=0.1, max_grad_norm=None, schedule="constant"
    )

    def unequal(seed: int) -> dict:
        """Columns of unlike sizes, and every gradient much larger than the last, so that its step is clipped."""
        generator = np.random.default_rng(seed)
        return {
            name: jnp.asarray(
                10**seed * np.linspace(0.1, 1, p.shape[-1]) * generator.normal(size=p.shape), jnp.float32
            )
            for name, p in params.items()
        }

    grads = [unequal(i) for i in range(3)]
    expected, row, column, full = as_float64(params), 0.0, 0.0, {"lora_b": 0.0, "bias": 0.0}
    steps, clipped = follow(config, params, grads, 4), False
    for i, (got, _) in enumerate(steps):
        kept = 1 - (i + 1.0) ** -0.8
        for name, g in as_float64(grads[i]).items():
            if name == "kernel":
                row = kept * row + (1 - kept) * (g**2).mean(axis=1)
                column = kept * column + (1 - kept) * (g**2).mean(axis=0)
                second = np.outer(row, column) / row.mean()
            else:
                second = full[name] = kept * full[name] + (1 - kept) * g**2
            direction = g / np.sqrt(second)
            size = np.sqrt((direction**2).mean())
            clipped |= size > 1.2
            direction = direction / max(1.0, size) + 0.1 * expected[name] * (g.ndim == 2)
            expected[name] = expected[name] - 0.1 * direction
        assert_close(got, expected, rtol=1e-4)
    assert clipped
    kept_numbers = sum(x.size for x in jax.tree.leaves(steps[-1][1]))
    assert kept_numbers < 130 + 140 + 2 * 140 + 4 + 20


def test_schedule_free_equals_its_three_sequences():
    """arXiv 2405.15682, algorithm 1: z steps, x averages z by squared step size, gradients are taken at y."""
    config = Optimizer(
        kind="schedule_free", schedule="constant", learning_rate=0.1, warmup_steps=2, b1=0.8, b2=0.9,
        eps=1e-3, weight_decay=0.1, max_grad_norm=None,
    )  # fmt: skip
    grads = [random_like(SMALL, i) for i in range(5)]
    x, y, z = as_float64(SMALL), as_float64(SMALL), as_float64(SMALL)
    second: dict[str, Any] = {"kernel": 0.0, "bias": 0.0}
    weights = 0.0
    for i, (got, state) in enumerate(follow(config, SMALL, grads, 6)):
        rate = 0.1 * min(1, (i + 1) / 2)
        weights += rate**2
        for name, g in as_float64(grads[i]).items():
            second[name] = 0.9 * second[name] + 0.1 * g**2
            direction = g / (np.sqrt(second[name] / (1 - 0.9 ** (i + 1))) + 1e-3)
            z[name] = z[name] - rate * (direction + 0.1 * y[name] * (g.ndim == 2))
            x[name] = x[name] + rate**2 / weights * (z[name] - x[name])
            y[name] = 0.2 * z[name] + 0.8 * x[name]
        assert_close(got, y)
        assert_close(jax.jit(evaluation_params)(state, got), x)
    assert np.abs(x["kernel"] - y["kernel"]).max() > 1e-3


def test_evaluation_params_of_other_states():
    """Of an optimiser that does not average: the parameters. Of parts with a state each: the average of every part."""
    params, state = follow(Optimizer(), SMALL, [random_like(SMALL, 0)], 4)[0]
    assert evaluation_params(state, params) is params

    config = Optimizer(kind="schedule_free", schedule="constant", max_grad_norm=None, learning_rate=0.1)
    whole, parts = make_optimizer(config, 9), make_optimizer(config, 9)
    parts = optax.partition({"policy": parts, "rest": parts}, lambda _: {"a": "policy", "b": "rest"})
    found: list[Any] = []
    for optimizer in (whole, parts):
        params: Any = {"a": SMALL, "b": {"head": jnp.ones((4, 1))}}
        state = optimizer.init(params)
        for i in range(3):
            updates, state = optimizer.update(random_like(params, i), state, params)
            params = optax.apply_updates(params, updates)
        found.append(evaluation_params(state, params))
        assert np.abs(np.asarray(found[-1]["b"]["head"] - params["b"]["head"])).max() > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *found)


@pytest.mark.parametrize("kind", ["adafactor", "sgd", "schedule_free", "muon"])
def test_every_kind_may_be_swept(kind):
    """A vmap over float fields gives the steps of separate optimisers."""
    params, grads = {"kernel": jnp.full((4, 6), 0.5)}, {"kernel": gradients()["layer_0"]["mlp"]["kernel"]}

    @jax.jit
    def steps(rate):
        config = Optimizer(
            kind=kind,
            schedule="constant",
            learning_rate=rate,
            muon_learning_rate=rate,
            weight_decay=rate,
            b1=1 - rate,
        )
        optimizer = make_optimizer(config, 10)
        updates, state = optimizer.update(grads, optimizer.init(params), params)
        return evaluation_params(state, optax.apply_updates(params, updates))["kernel"]

    rates = jnp.array([0.1, 0.3])
    together = jax.vmap(steps)(rates)
    assert np.abs(together[0] - together[1]).max() > 0.01
    for got, rate in zip(together, rates, strict=True):
        np.testing.assert_allclose(got, steps(rate), rtol=1e-5, atol=1e-6)
