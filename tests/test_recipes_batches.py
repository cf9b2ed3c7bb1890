"""From a scored rollout of text to the batch of each algorithm, and whole iterations of the critic-free ones."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhfjax.algorithms import Algorithm, dpo, grpo, sft
from rlhfjax.config import DPO, GRPO, SFT, Decoder
from rlhfjax.generation import Generation
from rlhfjax.networks import Branches, decoder
from rlhfjax.recipes import (
    Frozen,
    Prompts,
    best_of_samples,
    best_worst_pairs,
    completion_logp,
    grpo_batch,
    judged_evaluate,
    keep_informative,
    make_rlhf,
    pair_evaluate,
    ppo_batch,
    text_policy,
)

CONFIG = Decoder(
    vocab_size=70, width=16, layers=1, heads=2, kv_heads=1, head_size=8, mlp_width=24, max_positions=16
)
LM = decoder(CONFIG)
STOP, WANTED = tuple(range(1, 16)), 40
PROMPTS, SAMPLES, LENGTH, TEMPERATURE = 4, 2, 6, 0.8


def make_params(seed: int) -> dict:
    params = jax.jit(LM.init)(jax.random.key(seed))
    return params | {"embedding": params["embedding"] * 15.0}


POLICY, REFERENCE = make_params(0), make_params(2)
FROZEN = Frozen(REFERENCE, jnp.float32(0.5))


def reward_on_device(params, branches: Branches) -> jax.Array:
    wanted = (branches.completion_BGC >= WANTED) & branches.completion_mask_BGC
    return params * jnp.sum(wanted, axis=2, dtype=jnp.float32)


def make_prompts() -> Prompts:
    generator = np.random.default_rng(0)
    mask = np.arange(4)[None] >= np.asarray([2, 0, 1, 3])[:, None]
    token = np.where(mask, generator.integers(2, CONFIG.vocab_size, size=(PROMPTS, 4)), 0)
    return Prompts(jnp.asarray(token, jnp.int32), jnp.asarray(mask), jnp.arange(10, 10 + PROMPTS))


SPY = Algorithm(init=lambda params: grpo.State(params, None, jnp.zeros(()), jnp.int32(0)), update=None)  # pyright: ignore[reportArgumentType]
SPY = SPY._replace(update=lambda state, batch, key: (batch, {}))


def compose(algorithm, as_batch, reward=reward_on_device, **options):
    return make_rlhf(
        LM,
        algorithm,
        as_batch,
        reward=reward,
        samples=options.pop("samples", SAMPLES),
        max_new_tokens=LENGTH,
        stop_tokens=STOP,
        temperature=TEMPERATURE,
        policy=lambda params: params,
        **options,
    )


@cache
def drawn(greedy: bool = False) -> Generation:
    rollout = jax.jit(compose(SPY, None, samples=3, greedy=greedy).rollout)
    return rollout(SPY.init(POLICY), make_prompts(), jax.random.key(7))


def batch_of(as_batch, score, generation=None, **options):
    """What `learn` hands to the algorithm."""
    generation = drawn() if generation is None else generation
    learn = jax.jit(compose(SPY, as_batch, samples=3, **options).learn)
    return learn(SPY.init(POLICY), FROZEN, make_prompts(), generation, score, jax.random.key(0))


@pytest.mark.parametrize("greedy", [False, True])
def test_banned_tokens_are_not_drawn(greedy):
    free = np.asarray(drawn(greedy).token_BGC)
    likely = np.bincount(free[np.asarray(drawn(greedy).mask_BGC)]).argsort()[-5:]
    banned = tuple(int(token) for token in likely if token not in STOP)
    rollout = jax.jit(compose(SPY, None, samples=3, greedy=greedy, banned_tokens=banned).rollout)
    generation = rollout(SPY.init(POLICY), make_prompts(), jax.random.key(7))
    assert banned and not np.isin(generation.token_BGC, banned)[np.asarray(generation.mask_BGC)].any()


SCORE = np.asarray([[0.1, 0.5, 0.3], [0.7, 0.7, 0.7], [np.nan, -1.0, 2.0], [np.nan, 0.2, np.nan]], np.float32)


def test_grpo_batch_is_the_scored_rollout():
    batch, _ = batch_of(grpo_batch(LM, temperature=TEMPERATURE), SCORE)
    generation = drawn()
    np.testing.assert_array_equal(batch.reward, SCORE)
    np.testing.assert_array_equal(batch.mask, generation.mask_BGC)
    np.testing.assert_array_equal(batch.logp, generation.logp_BGC)
    logp_ref = jax.jit(lambda b: completion_logp(LM, REFERENCE, b, TEMPERATURE))(batch.inputs)
    mask = np.asarray(batch.mask)
    np.testing.assert_allclose(np.asarray(batch.logp_ref)[mask], np.asarray(logp_ref)[mask], atol=1e-5)
    evaluation = jax.jit(text_policy(LM, temperature=TEMPERATURE))(POLICY, batch.inputs)
    np.testing.assert_allclose(
        np.asarray(evaluation.logp)[mask], np.asarray(generation.logp_BGC)[mask], atol=1e-4
    )
    without, _ = batch_of(grpo_batch(LM, reference=False), SCORE)
    assert without.logp_ref is None and without.kl is None and without.reference is None


def test_truncated_completions_are_masked_and_long_ones_penalised():
    generation = drawn()
    finished, mask = np.asarray(generation.finished_BG), np.asarray(generation.mask_BGC)
    assert 0 < finished.sum() < finished.size
    as_batch = grpo_batch(LM, reference=False, mask_truncated=True, overlong=(LENGTH, LENGTH))
    score = np.ones((PROMPTS, 3), np.float32)
    batch, _ = batch_of(as_batch, score)
    np.testing.assert_array_equal(batch.mask, mask & finished[..., None])
    expected = [[1 - n / LENGTH for n in row] for row in mask.sum(-1)]
    np.testing.assert_allclose(batch.reward, expected, atol=1e-6)
    assert len(np.unique(expected)) > 2
    both, _ = batch_of(as_batch, np.stack([score, 2 * score], axis=-1))
    np.testing.assert_allclose(both.reward[..., 0], expected, atol=1e-6)
    np.testing.assert_array_equal(both.reward[..., 1], 2 * score)


def test_penalty_for_a_missing_end_with_several_rewards():
    score = np.stack([SCORE, np.full_like(SCORE, 0.25)], axis=-1)
    batch, metrics = batch_of(grpo_batch(LM, reference=False), score, missing_eos_penalty=-3.0)
    finished = np.asarray(drawn().finished_BG)[..., None]
    np.testing.assert_array_equal(batch.reward, np.where(finished | ~np.isfinite(score), score, -3.0))
    assert float(metrics["objective/score"]) == pytest.approx(np.nanmean(score), rel=1e-5)


def test_greedy_completion_is_the_baseline_and_is_not_learnt_from():
    """The last of the group is the most likely one; the others are what they are without it."""
    plain, generation = drawn(), drawn(greedy=True)
    np.testing.assert_array_equal(generation.token_BGC[:, :3], plain.token_BGC)
    alone = jax.jit(compose(SPY, None, samples=0, greedy=True).rollout)(
        SPY.init(POLICY), make_prompts(), jax.random.key(99)
    )
    np.testing.assert_array_equal(generation.token_BGC[:, 3], alone.token_BGC[:, 0])
    score = np.arange(4.0 * PROMPTS, dtype=np.float32).reshape(PROMPTS, 4)
    as_batch = grpo_batch(LM, temperature=TEMPERATURE, greedy=True)
    batch, metrics = batch_of(as_batch, score, generation, greedy=True)
    np.testing.assert_array_equal(batch.baseline, score[:, 3])
    np.testing.assert_array_equal(batch.reward, score[:, :3])
    np.testing.assert_array_equal(batch.inputs.completion_BGC, plain.token_BGC)
    assert batch.logp.shape == batch.logp_ref.shape == batch.mask.shape == (PROMPTS, 3, LENGTH)
    assert float(metrics["objective/score"]) == pytest.approx(score[:, :3].mean())
    assert float(metrics["completions/finished"]) == pytest.approx(np.asarray(plain.finished_BG).mean())


def test_informative_prompts_come_first():
    """Equal scores, and a group with one finite score, say nothing."""
    batch, _ = batch_of(keep_informative(grpo_batch(LM, reference=False), 3), SCORE)
    np.testing.assert_array_equal(batch.reward, SCORE[[0, 2, 1]])
    np.testing.assert_array_equal(batch.mask, drawn().mask_BGC[np.asarray([0, 2, 1])])
    np.testing.assert_array_equal(batch.inputs.prompt_BP, make_prompts().token_BP[np.asarray([0, 2, 1])])
    second = np.where(np.arange(PROMPTS)[:, None] == 1, np.arange(3.0), 0.0)
    two = np.stack([np.nan_to_num(SCORE * 0), second], axis=-1).astype(np.float32)
    of_two, _ = batch_of(keep_informative(grpo_batch(LM, reference=False), 1), two)
    np.testing.assert_array_equal(of_two.reward, two[1:2])


def test_best_and_worst_make_a_pair():
    batch, _ = batch_of(best_worst_pairs(LM, temperature=TEMPERATURE), SCORE)
    token = np.asarray(drawn().token_BGC)
    np.testing.assert_array_equal(batch.mask_BK[:, 0], [True, False, True, False])
    for b, best, worst in ((0, 1, 0), (2, 2, 1)):
        np.testing.assert_array_equal(batch.inputs.completion_BGC[b], token[b, [best, worst]])
    np.testing.assert_array_equal(batch.label_BK, np.ones((PROMPTS, 1)))
    mask = np.asarray(batch.completion_mask_BGC)
    logp_ref = jax.jit(lambda b: completion_logp(LM, REFERENCE, b, TEMPERATURE))(batch.inputs)
    np.testing.assert_allclose(np.asarray(batch.logp_ref_BGC)[mask], np.asarray(logp_ref)[mask], atol=1e-5)


def test_best_of_samples_is_imitated():
    score = SCORE.copy()
    score[1] = np.nan
    batch, _ = batch_of(best_of_samples(), score)
    generation = drawn()
    token, mask = np.asarray(generation.token_BGC), np.asarray(generation.mask_BGC)
    for b, best in ((0, 1), (2, 2), (3, 1)):
        np.testing.assert_array_equal(batch.inputs.completion_BGC[b, 0], token[b, best])
        np.testing.assert_array_equal(batch.weight[b, 0], mask[b, best])
    assert not np.asarray(batch.weight)[1].any()


SGD = optax.sgd(0.05)
EVALUATE = text_policy(LM, temperature=TEMPERATURE)
RLOO = GRPO(baseline="leave_one_out", scale="none", clip="none", kl_estimator="k1", kl_placement="score")
ITERATIONS = {
    "rloo": (
        grpo.make(EVALUATE, SGD, RLOO),
        grpo_batch(LM, temperature=TEMPERATURE),
        {},
    ),
    "remax": (
        grpo.make(EVALUATE, SGD, replace(RLOO, baseline="given", kl_placement="reward")),
        grpo_batch(LM, temperature=TEMPERATURE, greedy=True),
        {"greedy": True},
    ),
    "dapo_exact_kl": (
        grpo.make(EVALUATE, SGD, GRPO(kl_estimator="exact", aggregation="token", minibatches=2)),
        keep_informative(grpo_batch(LM, temperature=TEMPERATURE, exact_kl=EVALUATE), 2),
        {},
    ),
    "online_dpo": (
        dpo.make(pair_evaluate(LM, temperature=TEMPERATURE), SGD, DPO()),
        best_worst_pairs(LM, temperature=TEMPERATURE),
        {},
    ),
    "raft": (sft.make(judged_evaluate(LM, temperature=TEMPERATURE), SGD, SFT()), best_of_samples(), {}),
}


@pytest.mark.parametrize("name", ITERATIONS)
def test_every_method_iterates_in_one_program(name):
    """Parameters move, numbers are finite, the same key gives the same and another key something else."""
    algorithm, as_batch, options = ITERATIONS[name]
    iterate = jax.jit(compose(algorithm, as_batch, **options).iterate)
    arguments = (algorithm.init(POLICY), FROZEN, make_prompts())
    state, metrics, experience = iterate(*arguments, jax.random.key(3))
    again, _, _ = iterate(*arguments, jax.random.key(3))
    _, _, other = iterate(*arguments, jax.random.key(4))
    assert experience.score_BG.shape == (PROMPTS, SAMPLES + bool(options))
    assert all(np.isfinite(float(x)) for x in metrics.values())
    assert float(metrics["optimizer/gradient_norm"]) > 0
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (state.params, POLICY)), strict=True)]
    assert max(moved) > 0 and np.isfinite(moved).all()
    for ours, theirs in zip(*map(jax.tree.leaves, (state, again)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(other.generation.token_BGC, experience.generation.token_BGC)
    if "policy/logp_gap" in metrics:
        assert 0 <= float(metrics["policy/logp_gap"]) < 1e-4


def test_what_evaluate_does_not_give_is_named():
    as_batch = ppo_batch(LM, EVALUATE)
    with pytest.raises(ValueError, match="evaluate gave no value"):
        batch_of(as_batch, SCORE)
    no_kl = grpo_batch(LM, exact_kl=lambda params, branches, reference: EVALUATE(params, branches))
    with pytest.raises(ValueError, match="evaluate gave no kl"):
        batch_of(no_kl, SCORE)
