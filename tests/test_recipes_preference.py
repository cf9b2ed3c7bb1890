"""Preference optimisation on text: log-probabilities, batches, and both algorithms on a small language model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax import recipes
from rlhfjax.algorithms import dpo, kto
from rlhfjax.config import DPO, KTO, Decoder
from rlhfjax.networks import Branches, branch_hidden, decoder

CONFIG = Decoder(
    vocab_size=16, width=8, layers=1, heads=1, kv_heads=1, head_size=8, mlp_width=8, max_positions=16
)
LM = decoder(CONFIG)
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def params():
    made = jax.jit(LM.init)(jax.random.key(0))
    return made | {"embedding": jnp.asarray(np.asarray(made["embedding"]) * 10)}


@pytest.fixture(scope="module")
def branches():
    """Three prompts with three completions; in the second the outer two are equal but for what is masked."""
    token = np.random.default_rng(0).integers(0, 16, (3, 3, 4))
    length = np.array([[4, 2, 3], [3, 4, 3], [1, 2, 4]])
    token[1, 2, :3] = token[1, 0, :3]
    token[1, 2, 3] = token[1, 0, 3] + 1
    token[2, 0, 0] = token[2, 1, 0]
    return Branches(
        jnp.asarray([[0, 3, 4], [5, 6, 7], [0, 0, 9]], jnp.int32),
        jnp.asarray([[False, True, True], [True] * 3, [False, False, True]]),
        jnp.asarray(token, jnp.int32),
        jnp.asarray(np.arange(4) < length[:, :, None]),
    )


FIRST, SECOND = jnp.array([0, 0, 1]), jnp.array([1, 2, 2])


@pytest.fixture(scope="module")
def all_logp(params, branches):
    """Log-probabilities of the whole vocabulary at every completion token, float64."""
    before, _ = jax.jit(partial(branch_hidden, LM))(params, branches)
    logits = np.asarray(before, np.float64) @ np.asarray(LM.embedding(params), np.float64).T / TEMPERATURE
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def test_log_probabilities_and_collision(params, branches, all_logp):
    evaluate = jax.jit(recipes.pair_evaluate(LM, temperature=TEMPERATURE, collision=True))
    given = evaluate(params, branches)
    logp = np.take_along_axis(all_logp, np.asarray(branches.completion_BGC)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(given.logp, logp, rtol=1e-4, atol=1e-4)
    collision = np.log(np.sum(np.exp(2 * all_logp), axis=-1))
    np.testing.assert_allclose(given.log_collision, collision, rtol=1e-4, atol=1e-4)


def test_collision_has_no_gradient(params, branches):
    evaluate = recipes.pair_evaluate(LM, collision=True)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.asarray(evaluate(p, branches).log_collision))))(params)
    assert all(not np.any(x) for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize("rows", [None, 1, 2])
def test_reference_in_parts_equals_the_whole(rows, params, branches, all_logp):
    given = jax.jit(partial(recipes.reference_logp, LM, rows=rows, temperature=TEMPERATURE))(params, branches)
    logp = np.take_along_axis(all_logp, np.asarray(branches.completion_BGC)[..., None], axis=-1)[..., 0]
    assert given.dtype == jnp.float32
    np.testing.assert_allclose(given, logp, rtol=1e-4, atol=1e-4)


def test_reference_in_parts_of_none_is_refused(params, branches):
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        recipes.reference_logp(LM, params, branches, rows=0)


def test_equal_texts_are_found(branches):
    """Equal but for what is masked; and not where one is the beginning of the other."""
    expected = np.zeros((3, 3), bool)
    expected[1, 1] = True
    np.testing.assert_array_equal(recipes.equal_completions(branches, FIRST, SECOND), expected)


def test_mismatched_completions_come_from_the_prompt_before(branches):
    given = recipes.mismatched_branches(branches)
    np.testing.assert_array_equal(given.prompt_BP, branches.prompt_BP)
    for new, old in ((1, 0), (2, 1), (0, 2)):
        np.testing.assert_array_equal(given.completion_BGC[new], branches.completion_BGC[old])
        np.testing.assert_array_equal(given.completion_mask_BGC[new], branches.completion_mask_BGC[old])
    with pytest.raises(ValueError, match="at least 2 prompts"):
        recipes.mismatched_branches(jax.tree.map(lambda x: x[:1], branches))


def test_dpo_on_text_starts_at_the_reference_and_learns(params, branches):
    """From policy = reference the loss is log 2 and rewards 0; then the margin grows. Equal texts are left out."""
    logp_ref = jax.jit(partial(recipes.reference_logp, LM, rows=2))(params, branches)
    batch = recipes.pair_batch(branches, logp_ref, first=FIRST, second=SECOND, label_BK=jnp.ones((3, 3)))
    dpo.check_pairs(batch)
    made = dpo.make(recipes.pair_evaluate(LM), optax.adam(1e-2), DPO(beta=0.1))
    update = jax.jit(made.update)
    state, metrics = update(made.init(params), batch, jax.random.key(0))
    assert (metrics["pair/equal"], metrics["batch/count"]) == (1, 8)
    np.testing.assert_allclose(metrics["loss/total"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(metrics["reward/chosen"], 0, atol=1e-6)
    for _ in range(10):
        state, metrics = update(state, batch, jax.random.key(0))
    assert metrics["pair/margin"] > 0.1


def test_padding_of_prompts_and_completions_changes_nothing(params, branches):
    wider = Branches(
        jnp.pad(branches.prompt_BP, ((0, 0), (2, 0)), constant_values=5),
        jnp.pad(branches.prompt_mask_BP, ((0, 0), (2, 0))),
        jnp.pad(branches.completion_BGC, ((0, 0), (0, 0), (0, 1)), constant_values=5),
        jnp.pad(branches.completion_mask_BGC, ((0, 0), (0, 0), (0, 1))),
    )
    config, gradients = DPO(beta=0.1, nll_coefficient=1.0), []
    for given in (branches, wider):
        logp_ref = -0.5 * jnp.ones(given.completion_BGC.shape)
        batch = recipes.pair_batch(
            given, logp_ref, first=FIRST, second=SECOND, label_BK=jnp.full((3, 3), 0.8)
        )
        loss = partial(dpo.loss, batch=batch, evaluate=recipes.pair_evaluate(LM), config=config)
        gradients.append(jax.jit(jax.grad(lambda p, loss=loss: loss(p)[0]))(params))
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_kto_on_text_starts_at_the_reference_and_learns(params, branches):
    others = recipes.mismatched_branches(branches)
    logp_ref = jax.jit(partial(recipes.reference_logp, LM))
    batch = recipes.judged_batch(
        branches,
        logp_ref(params, branches),
        label_BG=jnp.array([[1.0, 0, 0], [0, 1, 0], [1, 0, 1]]),
        mismatched=(others, logp_ref(params, others)),
    )
    made = kto.make(recipes.judged_evaluate(LM), optax.adam(1e-2), KTO(beta=0.1))
    update = jax.jit(made.update)
    state, metrics = update(made.init(params), batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["loss/total"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["objective/reference_point"], 0, atol=1e-6)
    for _ in range(10):
        state, metrics = update(state, batch, jax.random.key(0))
    assert metrics["reward/margin"] > 0.1
