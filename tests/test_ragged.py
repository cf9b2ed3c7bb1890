"""Packed rows against full rows and against each sequence alone."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled

from rlhfjax.config import Decoder
from rlhfjax.networks import Branches, branch_hidden, decoder
from rlhfjax.networks import branches as networks_branches
from rlhfjax.networks.ragged import first_fit, pack, rows_for

CONFIG = Decoder(
    vocab_size=32, width=16, layers=2, heads=2, kv_heads=1, head_size=8, mlp_width=24, max_positions=16
)
P, C = 3, 6
LENGTHS = np.array([[6, 1, 0], [2, 3, 1], [1, 1, 2], [4, 2, 1]])  # real tokens: prompts 3, 1, 2, 3
GENERATOR = np.random.default_rng(0)


def branches(lengths=LENGTHS) -> Branches:
    batch, samples = lengths.shape
    prompt = GENERATOR.integers(1, 32, (batch, P)).astype(np.int32)
    prompt_mask = np.arange(P) >= P - np.array([3, 1, 2, 3])[:batch, None]
    completion = GENERATOR.integers(1, 32, (batch, samples, C)).astype(np.int32)
    mask = np.arange(C) < lengths[:, :, None]
    return Branches(*map(jnp.asarray, (prompt, prompt_mask, completion, mask)))


@pytest.fixture(scope="module")
def params():
    params = compiled(decoder(CONFIG).init, jax.random.key(0))
    # Of size 1 at the first norm: its derivative would enlarge rounding errors fifty times.
    return params | {"embedding": params["embedding"] * 50.0}


@functools.cache
def evaluated(packing: float | None):
    """Hidden states, and the gradient of a loss on those of real tokens; compiled."""
    lm = decoder(dataclasses.replace(CONFIG, packing=packing))

    def run(params, given: Branches):
        def loss(params):
            hidden = branch_hidden(lm, params, given)
            real = given.completion_mask_BGC[..., None]
            return sum(jnp.sum(jnp.where(real, jnp.sin(x), 0.0)) for x in hidden), hidden

        gradient, hidden = jax.grad(loss, has_aux=True)(params)
        return hidden, gradient

    return jax.jit(run)


@pytest.mark.parametrize(
    ("packing", "lengths"),
    [(0.5, LENGTHS), (1.0, LENGTHS), (0.5, np.full((4, 3), C))],
    ids=["fits", "as many rows as sequences", "does not fit"],
)
def test_the_same_states_and_gradients_as_in_full_rows(params, packing, lengths):
    given = branches(lengths)
    real = np.asarray(given.completion_mask_BGC)
    (full, gradient), (fewer, again) = (evaluated(x)(params, given) for x in (None, packing))
    for one, other in zip(full, fewer, strict=True):
        np.testing.assert_allclose(np.asarray(other)[real], np.asarray(one)[real], atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max()), gradient, again)


@pytest.mark.parametrize(("lengths", "full"), [(LENGTHS, False), (np.full((4, 3), C), True)])
def test_full_rows_are_taken_only_where_the_fewer_do_not_hold_all(params, lengths, full, monkeypatch):
    """Full rows that gave NaN would be seen, in states and gradients."""
    in_full_rows = networks_branches._in_full_rows
    monkeypatch.setattr(
        networks_branches, "_in_full_rows", lambda *x: jax.tree.map(lambda y: y * jnp.nan, in_full_rows(*x))
    )
    lm = decoder(dataclasses.replace(CONFIG, packing=0.5))
    given = branches(lengths)

    def loss(params):
        before, after = branch_hidden(lm, params, given)
        return jnp.sum(before) + jnp.sum(after)

    value, gradient = compiled(jax.value_and_grad(loss), params)
    for x in (value, gradient["embedding"]):
        assert np.isnan(x).any() == full


def test_fewer_rows_are_so_much_less_work(params):
    given = branches()

    def flops(packing):
        lm = decoder(dataclasses.replace(CONFIG, packing=packing))
        packed, _ = pack(*given, rows_for(packing or 1.0, 12))
        row = (packed.token_RL, packed.position_RL, packed.mask)
        program = jax.jit(lambda p, t, o, m: lm.apply(p, t, position_BT=o, mask_BTS=m)[0]).lower(params, *row)
        analysis: Any = program.cost_analysis()
        return analysis["flops"]

    assert flops(0.5) == pytest.approx(0.5 * flops(1.0), rel=0.05)


def test_every_sequence_lies_in_one_row_and_nothing_overlaps():
    given = branches()
    packed, fit = jax.jit(pack, static_argnums=4)(*given, 6)
    assert bool(fit)
    token, position, segment, index = map(np.asarray, packed)
    prompt, prompt_mask, completion, mask = map(np.asarray, given)
    for n in range(12):
        b, g = divmod(n, 3)
        rows, columns = np.nonzero(segment == n + 1)
        expected = [*prompt[b][prompt_mask[b]], *completion[b, g][mask[b, g]]]
        assert len(set(rows)) == 1 and np.array_equal(columns, columns[0] + np.arange(len(expected)))
        np.testing.assert_array_equal(token[rows, columns], expected)
        np.testing.assert_array_equal(position[rows, columns], np.arange(len(expected)))
        np.testing.assert_array_equal(token.ravel()[index[b, g][mask[b, g]]], completion[b, g][mask[b, g]])
    assert np.sum(segment > 0) == sum(len(x) for x in prompt_mask for x in [x[x]]) * 3 + mask.sum()


def test_first_fit_decreasing_is_that_of_the_textbook():
    lengths = np.random.default_rng(1).integers(1, 11, 40)
    rows = []
    for length in sorted(lengths, reverse=True):
        row = next((row for row in rows if sum(row) + length <= 10), None)
        if row is None:
            rows.append(row := [])
        row.append(length)
    for count, fits in ((len(rows), True), (len(rows) - 1, False)):
        places = jax.jit(first_fit, static_argnums=(1, 2))(jnp.asarray(lengths), count, 10)
        assert bool(places.fits) is fits
    places = jax.jit(first_fit, static_argnums=(1, 2))(jnp.asarray(lengths), len(rows), 10)
    filled = np.zeros(len(rows), int)
    np.add.at(filled, np.asarray(places.row_N), lengths)
    np.testing.assert_array_equal(filled, [sum(row) for row in rows])


@pytest.mark.parametrize("packing", [0.0, 1.5])
def test_a_share_that_cannot_be_is_refused(packing):
    with pytest.raises(ValueError, match=rf"packing={packing} must lie in \(0, 1\]"):
        decoder(dataclasses.replace(CONFIG, packing=packing))
