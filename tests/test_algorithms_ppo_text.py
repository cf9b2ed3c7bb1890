"""PPO on a language model of one layer: exact KL, pretraining mix and critic warm-up by way of the recipes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.algorithms import ppo, sft
from rlhfjax.config import PPO, Decoder
from rlhfjax.networks import Branches, branch_hidden, decoder, init_scalar_head
from rlhfjax.ops import categorical_kl
from rlhfjax.recipes import PackedInputs, packed_logp, policy_parameters, text_actor_critic

LM = decoder(
    Decoder(vocab_size=11, width=8, layers=1, heads=2, kv_heads=1, head_size=4, mlp_width=8, max_positions=12)
)
TEMPERATURE = 0.7
ROWS, SAMPLES, PROMPT, LENGTH = 2, 2, 3, 4


def make_params(seed):
    params = jax.jit(LM.init)(jax.random.key(seed))
    return params | {"embedding": jnp.asarray(np.asarray(params["embedding"]) * 20)}


POLICY, REFERENCE = make_params(0), make_params(1)
HEAD = init_scalar_head(jax.random.key(3), 8)


def make_branches():
    rng = np.random.default_rng(0)
    mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (ROWS, SAMPLES, 1))
    return Branches(
        jnp.asarray(rng.integers(11, size=(ROWS, PROMPT)), jnp.int32),
        jnp.asarray([[0, 1, 1], [1, 1, 1]], bool),
        jnp.asarray(rng.integers(11, size=(ROWS, SAMPLES, LENGTH)), jnp.int32),
        jnp.asarray(mask),
    )


BRANCHES = make_branches()
EVALUATE = text_actor_critic(LM, temperature=TEMPERATURE)
PARAMS = {"policy": POLICY, "critic": {"trunk": REFERENCE, "head": HEAD}}


def all_logits(params):
    before, _ = branch_hidden(LM, params, BRANCHES)
    return before @ LM.embedding(params).T / TEMPERATURE


@jax.jit
def kl_of_all_logits(policy, reference):
    return categorical_kl(all_logits(policy), all_logits(reference))


def test_exact_kl_equals_that_of_all_logits_at_the_temperature():
    evaluation = jax.jit(EVALUATE)(PARAMS, BRANCHES, REFERENCE)
    np.testing.assert_allclose(evaluation.kl, kl_of_all_logits(POLICY, REFERENCE), rtol=1e-4, atol=1e-6)
    assert evaluation.kl.shape == evaluation.logp.shape == (ROWS, SAMPLES, LENGTH)
    without = jax.jit(EVALUATE)(PARAMS, BRANCHES)
    assert without.kl is None
    for name in ("logp", "entropy", "value"):
        np.testing.assert_array_equal(getattr(without, name), getattr(evaluation, name))


def test_exact_kl_trains_the_policy_and_neither_critic_nor_reference():
    def total(params, reference):
        kl = EVALUATE(params, BRANCHES, reference).kl
        assert kl is not None
        return jnp.sum(kl)

    of_params, of_reference = jax.jit(jax.grad(total, (0, 1)))(PARAMS, REFERENCE)
    expected = jax.jit(jax.grad(lambda policy: jnp.sum(kl_of_all_logits(policy, REFERENCE))))(POLICY)
    for given, wanted in zip(jax.tree.leaves(of_params["policy"]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-3, atol=1e-4)
    assert not any(np.any(x) for x in jax.tree.leaves((of_params["critic"], of_reference)))


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_warm_up_with_text_and_pretraining_mix(shared_trunk):
    """All together as a user would: held for one update, then moved, by the text too."""
    evaluate = text_actor_critic(LM, temperature=TEMPERATURE, shared_trunk=shared_trunk)
    logp_of_text = packed_logp(LM)
    config = PPO(
        epochs=1,
        kl_placement="loss",
        kl_estimator="exact",
        critic_warmup=1,
        ptx_coefficient=0.5,
        minibatches=2,
    )
    algorithm = ppo.make(
        evaluate,
        optax.adamw(0.01, weight_decay=0.1),
        config,
        is_policy=policy_parameters,
        evaluate_ptx=lambda params, inputs: logp_of_text(params["policy"], inputs),
    )
    critic = {"head": HEAD} if shared_trunk else {"trunk": REFERENCE, "head": HEAD}
    logp, _, value, kl = jax.jit(evaluate)({"policy": POLICY, "critic": critic}, BRANCHES, REFERENCE)
    token = jnp.arange(ROWS * 5, dtype=jnp.int32).reshape(ROWS, 5) % 11
    segment = jnp.ones((ROWS, 4), jnp.int32)
    inputs = PackedInputs(
        token[:, :-1], token[:, 1:], jnp.broadcast_to(jnp.arange(4), segment.shape), segment
    )
    mask = BRANCHES.completion_mask_BGC
    rollout = ppo.Rollout(
        BRANCHES,
        logp,
        logp - 0.1,
        value,
        jnp.where(mask, 1.0, jnp.nan),
        mask,
        kl=kl,
        reference=REFERENCE,
        ptx=sft.Batch(inputs, jnp.ones((ROWS, 4))),
    )
    update = jax.jit(algorithm.update)
    start = jax.jit(algorithm.init)({"policy": POLICY, "critic": critic})
    held, metrics = update(start, rollout, jax.random.key(0))
    for name, x in held.params["policy"].items():
        jax.tree.map(np.testing.assert_array_equal, x, POLICY[name])
    assert np.any(held.params["critic"]["head"]["kernel"] != HEAD["kernel"])
    np.testing.assert_allclose(
        metrics["loss/ptx"], -np.mean(jax.jit(logp_of_text)(POLICY, inputs)), rtol=1e-4
    )
    moved, metrics = update(held, rollout, jax.random.key(1))
    assert np.any(moved.params["policy"]["embedding"] != POLICY["embedding"])
    assert all(jnp.isfinite(x) for x in metrics.values())
