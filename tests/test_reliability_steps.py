"""A gradient that is not finite: refused by every algorithm, counted, and survived by a run."""

import doctest
import json
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.loop import MOST_REFUSED, run_stage
from rlhfjax.algorithms import make_optimizer
from rlhfjax.algorithms.algorithm import gradient_step
from rlhfjax.config import Optimizer
from rlhfjax.run_folder import RunFolder, create, read_lines

ALGORITHMS = ("sft", "reward_model", "ppo", "grpo", "dpo", "kto", "dqn", "pqn", "ilql", "soft_q")
BATCH = {"dpo": "pairs", "reward_model": "pairs", "ilql": "episodes"} | dict.fromkeys(
    ("ppo", "grpo", "pqn"), "rollout"
)


def worked_example(name: str) -> dict:
    """What the example in the docstring of an algorithm's module defines: algorithm, batch and the rest."""
    module = import_module(f"rlhfjax.algorithms.{name}")
    names = dict(vars(module))
    for example in doctest.DocTestParser().get_examples(module.__doc__ or ""):
        if "metrics" not in example.source:  # up to the first update
            exec(example.source, names)
    return names


@pytest.mark.reliability
@pytest.mark.parametrize(("name", "bad"), [("sft", jnp.inf), *((name, jnp.nan) for name in ALGORITHMS)])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(name, bad):
    names = worked_example(name)
    algorithm, batch = names["algorithm"], names[BATCH.get(name, "batch")]
    state = names["state"] if "state" in names else algorithm.init(jnp.zeros(3))  # that of `reward_model`
    traced = []
    update = jax.jit(lambda *arguments: traced.append(name) or algorithm.update(*arguments))
    for turn in range(2):  # good, bad, and good again
        state, metrics = update(state, batch, jax.random.key(turn))
        assert metrics["optimizer/refused"] == 0 and jnp.isfinite(metrics["optimizer/gradient_norm"])
        # One parameter that is not finite makes a loss and a gradient that are not.
        spoilt = state._replace(params=jax.tree.map(lambda x: x * 0 + bad, state.params))
        after, metrics = update(spoilt, batch, jax.random.key(turn))
        assert metrics["optimizer/refused"] == 1 and not jnp.isfinite(metrics["optimizer/gradient_norm"])
        jax.tree.map(np.testing.assert_array_equal, after.opt_state, spoilt.opt_state)
        jax.tree.map(np.testing.assert_array_equal, after.params, spoilt.params)
        for field in {"kl_coefficient", "reward_shift", "mean_reward"} & {*state._fields}:
            value = getattr(after, field)
            assert value is None or jnp.isfinite(value), field
    assert traced == [name], "compiled again"


def loss(params, batch):
    total = jnp.sum(batch * jnp.square(params["w"]))
    return total, {"count": jnp.float32(batch.shape[0]), "loss/total": total}


@pytest.mark.reliability
@pytest.mark.parametrize("kind", ["adamw", "muon", "adafactor", "schedule_free", "sgd"])
def test_the_step_after_a_refused_one_is_the_step_that_would_have_been_first(kind):
    """Moments and step counts of every optimiser are as if the bad batch had never come, under jit and vmap."""
    schedule = "constant" if kind == "schedule_free" else "linear"
    optimizer = make_optimizer(Optimizer(kind=kind, schedule=schedule, warmup_steps=2), 10)
    params = {"w": jnp.linspace(1.0, 2.0, 6).reshape(2, 3)}

    @jax.jit
    def step(carry, batch):
        params, opt_state, metrics = gradient_step(loss, optimizer, carry[0], carry[1], batch)
        return [params, opt_state], metrics

    start = [params, optimizer.init(params)]
    good, bad = jnp.ones((2, 3)), jnp.ones((2, 3)).at[1, 1].set(jnp.nan)
    expected, _ = step(start, good)
    kept, metrics = step(start, bad)
    assert metrics["optimizer/refused"] == 1
    jax.tree.map(np.testing.assert_array_equal, kept, start)
    jax.tree.map(np.testing.assert_array_equal, step(kept, good)[0], expected)
    both, metrics = jax.vmap(step, in_axes=(None, 0))(start, jnp.stack([good, bad]))
    assert metrics["optimizer/refused"].tolist() == [0, 1]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1], y), both, start)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[0], y, rtol=1e-6), both, expected)


def run_with(bad_steps: set[int], folder: RunFolder, steps: int = 12):
    """A stage of the loop whose batch is not finite at these steps."""
    optimizer = optax.adam(0.1)

    def init():
        params = {"w": jnp.ones((2, 3))}
        return [params, optimizer.init(params)]

    @jax.jit
    def step(carry, batch, i):
        params, opt_state, metrics = gradient_step(loss, optimizer, carry[0], carry[1], batch)
        return [params, opt_state], metrics

    def batch(i):
        return jnp.ones((2, 3)) * (jnp.nan if i in bad_steps else 1.0)

    return run_stage("sft", folder=folder, init=init, step=step, steps=steps, batch=batch, checkpoint_every=4)


@pytest.mark.reliability
def test_a_run_goes_past_a_bad_batch_and_says_so(tmp_path, capsys):
    bad = {0, 5, 6}
    state = run_with(bad, create(tmp_path / "run", "", experiment="x", seed=0, exact=True))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["optimizer/refused"] for line in lines] == [float(i in bad) for i in range(12)]
    assert [line["loss/total"] is None for line in lines] == [i in bad for i in range(12)]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    other = run_with(set(), create(tmp_path / "less", "", experiment="x", seed=0, exact=True), steps=9)
    jax.tree.map(np.testing.assert_array_equal, state, other)
    assert capsys.readouterr().out.count("the gradient is not finite") == 3
    json.dumps(lines, allow_nan=False)


@pytest.mark.reliability
def test_a_run_that_makes_no_step_any_more_stops(tmp_path):
    folder = create(tmp_path / "run", "", experiment="x", seed=0, exact=True)
    with pytest.raises(FloatingPointError, match=r"stage sft, step 13: .*loss/total = nan"):
        run_with(set(range(3, 100)), folder, steps=50)
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 3 + MOST_REFUSED
