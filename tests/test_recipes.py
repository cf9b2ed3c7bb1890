"""The text recipes against one plain forward per completion, and what an iteration of RLHF must hold to."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhfjax.algorithms import Algorithm, ppo
from rlhfjax.config import PPO, Decoder
from rlhfjax.generation import Generation
from rlhfjax.networks import Branches, causal_mask, decoder, init_scalar_head
from rlhfjax.recipes import (
    Frozen,
    PackedInputs,
    Prompts,
    completion_logp,
    host_iterations,
    init_reward_model,
    iterate_many,
    make_reward_model,
    make_rlhf,
    packed_logp,
    ppo_batch,
    text_actor_critic,
)

CONFIG = Decoder(
    vocab_size=70, width=16, layers=1, heads=2, kv_heads=1, head_size=8, mlp_width=24, max_positions=16
)
LM = decoder(CONFIG)
WIDTH, STOP, WANTED = CONFIG.width, tuple(range(1, 16)), 40
PROMPTS, SAMPLES, LENGTH = 4, 2, 6
TEMPERATURE = 0.8


def make_params(seed: int, sharpness: float = 15.0) -> dict:
    """A model with logits sharp enough that completions end at different lengths."""
    params = jax.jit(LM.init)(jax.random.key(seed))
    return params | {"embedding": params["embedding"] * sharpness}


POLICY, TRUNK, REFERENCE = make_params(0), make_params(1), make_params(2)
HEAD = init_scalar_head(jax.random.key(3), WIDTH) | {"bias": jnp.float32(0.3)}
ACTOR_CRITIC = {"policy": POLICY, "critic": {"trunk": TRUNK, "head": HEAD}}


# ---------------------------------------------------------------------------------------------- evaluate functions


@jax.jit
def plain_hidden(params, token_BT):
    """Hidden states of unpacked rows with padding on the right, which a causal model cannot see."""
    position_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1]), token_BT.shape)
    return LM.apply(params, token_BT, position_BT=position_BT, mask_BTS=causal_mask(jnp.ones_like(token_BT)))[
        0
    ]


def hidden_alone(params, rows: list[list[int]]) -> list[np.ndarray]:
    """float64 hidden states of each row, computed apart from any other."""
    padded = np.asarray([row + [0] * (CONFIG.max_positions - len(row)) for row in rows], np.int32)
    padded = np.resize(padded, (8, CONFIG.max_positions))  # one shape, so that it compiles once
    hidden = np.asarray(plain_hidden(params, padded), np.float64)
    return [hidden[i, : len(row)] for i, row in enumerate(rows)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def head_of(head: dict, hidden: np.ndarray) -> np.ndarray:
    return hidden @ np.asarray(head["kernel"], np.float64) + float(head["bias"])


def make_branches() -> Branches:
    """Two prompts of unequal length, completions of 6, 1, 3 and 4 tokens."""
    prompt = [[0, 0, 3, 4], [5, 6, 7, 8]]
    completion = [[[9, 2, 9, 4, 4, 1], [1, 0, 0, 0, 0, 0]], [[7, 7, 12, 0, 0, 0], [2, 3, 4, 22, 0, 0]]]
    length = np.asarray([[6, 1], [3, 4]])
    return Branches(
        jnp.asarray(prompt, jnp.int32),
        jnp.asarray([[0, 0, 1, 1], [1, 1, 1, 1]], bool),
        jnp.asarray(completion, jnp.int32),
        jnp.arange(LENGTH)[None, None] < length[..., None],
    )


def rows_of(branches: Branches) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of every branch without padding, in row-major order."""
    prompt, prompt_mask, completion, mask = (np.asarray(x) for x in branches)
    batch, samples, _ = completion.shape
    return [
        (prompt[b][prompt_mask[b]].tolist(), completion[b, g][mask[b, g]].tolist())
        for b in range(batch)
        for g in range(samples)
    ]


def expected_actor_critic(policy, trunk, head, branches, temperature):
    """(logp, entropy, value) of all real actions one after another, from one forward per completion."""
    rows = rows_of(branches)
    table = np.asarray(policy["embedding"], np.float64)
    out = []
    joined = [prompt + completion for prompt, completion in rows]
    for (prompt, completion), actor, critic in zip(
        rows, hidden_alone(policy, joined), hidden_alone(trunk, joined), strict=True
    ):
        for t, token in enumerate(completion):
            state = len(prompt) + t - 1  # the state in which token t is chosen
            logp = log_softmax(actor[state] @ table.T / temperature)
            out.append((logp[token], -(np.exp(logp) * logp).sum(), head_of(head, critic[state])))
    return np.asarray(out).T


def test_packed_logp_is_that_of_every_segment_alone():
    first, second = [3, 9, 4, 4], [5, 9, 2, 6, 1]
    token = jnp.asarray([[*first, *second, 0]], jnp.int32)
    inputs = PackedInputs(
        token[:, :-1],
        token[:, 1:],
        jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4]], jnp.int32),
        jnp.asarray([[1] * 4 + [2] * 5], jnp.int32),
    )
    logp = np.asarray(jax.jit(packed_logp(LM))(POLICY, inputs))[0]
    table = np.asarray(POLICY["embedding"], np.float64)
    for start, row, hidden in zip(
        (0, 4), (first, second), hidden_alone(POLICY, [first, second]), strict=True
    ):
        for t in range(len(row) - 1):
            np.testing.assert_allclose(
                logp[start + t], log_softmax(hidden[t] @ table.T)[row[t + 1]], atol=1e-4
            )


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_actor_critic_equals_one_forward_per_completion(shared_trunk):
    branches = make_branches()
    critic = {"head": HEAD} if shared_trunk else {"trunk": TRUNK, "head": HEAD}
    evaluate = text_actor_critic(LM, temperature=TEMPERATURE, shared_trunk=shared_trunk)
    got = jax.jit(evaluate)({"policy": POLICY, "critic": critic}, branches)
    mask = np.asarray(branches.completion_mask_BGC)
    trunk = POLICY if shared_trunk else TRUNK
    expected = expected_actor_critic(POLICY, trunk, HEAD, branches, TEMPERATURE)
    for name, ours, theirs in zip(("logp", "entropy", "value"), got[:3], expected, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(ours)[mask], theirs, atol=1e-4, err_msg=name)
    logp = jax.jit(partial(completion_logp, LM))(POLICY, branches, TEMPERATURE)
    np.testing.assert_allclose(np.asarray(logp)[mask], expected[0], atol=1e-4)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_reward_model_pools_by_hand(pool):
    branches = make_branches()
    params = {"trunk": TRUNK, "head": HEAD, "gain": jnp.float32(1.5), "bias": jnp.float32(-0.7)}
    score = jax.jit(make_reward_model(LM, pool=pool))(params, branches)
    rows = rows_of(branches)
    expected = []
    for (prompt, _), hidden in zip(rows, hidden_alone(TRUNK, [p + c for p, c in rows]), strict=True):
        values = head_of(HEAD, hidden[len(prompt) :])  # states that have read a completion token
        expected.append(1.5 * (values[-1] if pool == "last" else values.mean()) - 0.7)
    np.testing.assert_allclose(np.ravel(score), expected, atol=1e-4)


def test_normalisation_of_the_reward_gets_no_gradient():
    params = init_reward_model(jax.random.key(0), TRUNK, WIDTH)
    assert (float(params["gain"]), float(params["bias"]), float(params["head"]["bias"])) == (1.0, 0.0, 0.0)
    evaluate = make_reward_model(LM)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(evaluate(p, make_branches()))))(params)
    assert float(gradient["gain"]) == 0.0 and float(gradient["bias"]) == 0.0
    assert float(jnp.abs(gradient["head"]["kernel"]).sum()) > 0
    assert float(gradient["head"]["bias"]) == pytest.approx(4.0)  # 1 for every completion


def test_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="pool='first' is unknown; choose"):
        make_reward_model(LM, pool="first")


def test_padding_changes_nothing():
    branches = make_branches()
    wider = Branches(
        *(jnp.pad(x, ((0, 0), (3, 0))) for x in branches[:2]),
        *(jnp.pad(x, ((0, 0), (0, 0), (0, 2))) for x in branches[2:]),
    )
    # Padding is told by the mask: the ids under it may be any.
    wider = wider._replace(
        prompt_BP=jnp.where(wider.prompt_mask_BP, wider.prompt_BP, 11),
        completion_BGC=jnp.where(wider.completion_mask_BGC, wider.completion_BGC, 12),
    )
    mask, wide_mask = np.asarray(branches.completion_mask_BGC), np.asarray(wider.completion_mask_BGC)
    evaluate = jax.jit(text_actor_critic(LM))
    evaluations = (evaluate(ACTOR_CRITIC, x)[:3] for x in (branches, wider))
    for ours, theirs in zip(*evaluations, strict=True):
        np.testing.assert_allclose(np.asarray(ours)[mask], np.asarray(theirs)[wide_mask], atol=2e-5)
    reward_params = init_reward_model(jax.random.key(0), TRUNK, WIDTH)
    for pool in ("last", "mean"):
        score = jax.jit(make_reward_model(LM, pool=pool))
        np.testing.assert_allclose(score(reward_params, branches), score(reward_params, wider), atol=2e-5)


# ------------------------------------------------------------------------------------------------------- iteration

ALGORITHM = ppo.make(
    text_actor_critic(LM, temperature=TEMPERATURE),
    optax.sgd(0.1),
    PPO(epochs=1, minibatches=1, kl_coefficient=0.1),
)
FROZEN = Frozen(REFERENCE, jnp.float32(0.5))


def reward_on_device(params, branches: Branches) -> jax.Array:
    """A share of a point for every token of a high id."""
    wanted = (branches.completion_BGC >= WANTED) & branches.completion_mask_BGC
    return params * jnp.sum(wanted, axis=2, dtype=jnp.float32)


def reward_on_host(generation: Generation) -> np.ndarray:
    """The same in Python, from lists of token ids."""
    token, mask = np.asarray(generation.token_BGC), np.asarray(generation.mask_BGC)
    return np.asarray(
        [
            [0.5 * sum(x >= WANTED for x in token[b, g][mask[b, g]].tolist()) for g in range(token.shape[1])]
            for b in range(token.shape[0])
        ],
        np.float32,
    )


def compose(
    algorithm=ALGORITHM,
    reward=reward_on_device,
    missing_eos_penalty: float | None = None,
    slots: int | None = None,
):
    return make_rlhf(
        LM,
        algorithm,
        ppo_batch(LM, text_actor_critic(LM, temperature=TEMPERATURE), temperature=TEMPERATURE),
        reward=reward,
        samples=SAMPLES,
        max_new_tokens=LENGTH,
        stop_tokens=STOP,
        temperature=TEMPERATURE,
        missing_eos_penalty=missing_eos_penalty,
        slots=slots,
    )


RLHF = compose()
TRACES = []


@jax.jit
def iterate(*arguments):
    TRACES.append(1)
    return RLHF.iterate(*arguments)


ROLLOUT, LEARN = jax.jit(RLHF.rollout), jax.jit(RLHF.learn)


def make_prompts(seed: int = 0) -> Prompts:
    generator = np.random.default_rng(seed)
    mask = np.arange(4)[None] >= np.asarray([2, 0, 1, 3])[:, None]
    token = np.where(mask, generator.integers(2, CONFIG.vocab_size, size=(PROMPTS, 4)), 0)
    return Prompts(
        jnp.asarray(token, jnp.int32), jnp.asarray(mask), jnp.arange(10, 10 + PROMPTS, dtype=jnp.int32)
    )


def start() -> ppo.State:
    return ALGORITHM.init(ACTOR_CRITIC)


def moved(state) -> list[np.ndarray]:
    """How far every parameter has gone from the start."""
    return [
        np.asarray(new) - np.asarray(old)
        for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(ACTOR_CRITIC), strict=True)
    ]


def assert_same_move(got, expected, rtol=1e-3, atol=2e-6):
    distance = max(np.abs(x).max() for x in moved(expected))
    assert distance > 1e-3  # else agreement would prove nothing
    for ours, theirs in zip(moved(got), moved(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def generation() -> Generation:
    """A rollout in which some completions end and some do not."""
    out = ROLLOUT(start(), make_prompts(), jax.random.key(7))
    assert 0 < np.asarray(out.finished_BG).sum() < PROMPTS * SAMPLES
    return out


def test_iterate_is_rollout_then_score_then_learn():
    """The road of a reward on the host, taken by hand, ends where the one program ends."""
    prompts, key = make_prompts(), jax.random.key(7)
    state, metrics, experience = iterate(start(), FROZEN, prompts, key)
    key_rollout, key_learn = jax.random.split(key)
    generation = ROLLOUT(start(), prompts, key_rollout)
    np.testing.assert_array_equal(generation.token_BGC, experience.generation.token_BGC)
    np.testing.assert_array_equal(generation.token_BGC, experience.branches.completion_BGC)
    score = reward_on_host(generation)
    assert len(np.unique(score)) > 1
    np.testing.assert_allclose(score, experience.score_BG, atol=1e-6)
    by_hand, by_hand_metrics = LEARN(start(), FROZEN, prompts, generation, score, key_learn)
    assert_same_move(by_hand, state)
    assert by_hand_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        assert value.shape == () and value.dtype == jnp.float32, name
        np.testing.assert_allclose(by_hand_metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert float(metrics["objective/score"]) == pytest.approx(score.mean())
    assert float(metrics["objective/score_std"]) == pytest.approx(score.std(), abs=1e-6)
    mask = np.asarray(generation.mask_BGC)
    assert float(metrics["completions/mean_length"]) == mask.sum(axis=2).mean()
    assert float(metrics["completions/padding"]) == pytest.approx(1 - mask.mean())
    assert float(metrics["completions/finished"]) == np.asarray(generation.finished_BG).mean()


def test_the_first_step_is_on_policy():
    """Rollout and update evaluate one function: the ratio is 1 and nothing is clipped."""
    _, metrics, _ = iterate(start(), FROZEN, make_prompts(), jax.random.key(8))
    assert 0 < float(metrics["policy/logp_gap"]) < 1e-4
    assert float(metrics["policy/ratio_mean"]) == pytest.approx(1.0, abs=1e-5)
    assert float(metrics["policy/ratio_max"]) == pytest.approx(1.0, abs=1e-4)
    assert float(metrics["policy/approximate_kl"]) == pytest.approx(0.0, abs=1e-8)
    assert float(metrics["policy/clip_fraction"]) == 0.0


def test_a_rollout_through_slots_is_the_same(generation):
    refilled = jax.jit(compose(slots=3).rollout)(start(), make_prompts(), jax.random.key(7))
    np.testing.assert_array_equal(refilled.token_BGC, generation.token_BGC)
    np.testing.assert_array_equal(refilled.mask_BGC, generation.mask_BGC)
    np.testing.assert_allclose(refilled.plain_logp_BGC, generation.plain_logp_BGC, atol=1e-4)


def test_completions_do_not_depend_on_the_order_of_the_batch(generation):
    order = np.asarray([2, 0, 3, 1])
    turned = ROLLOUT(start(), Prompts(*(x[order] for x in make_prompts())), jax.random.key(7))
    np.testing.assert_array_equal(turned.token_BGC, generation.token_BGC[order])
    renumbered = make_prompts()._replace(index_B=jnp.arange(PROMPTS, dtype=jnp.int32))
    other = ROLLOUT(start(), renumbered, jax.random.key(7))
    assert not np.array_equal(other.token_BGC, generation.token_BGC)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_not_finite_is_never_trained_on(generation, bad):
    """The step equals that on a batch of seven completions that never held the eighth."""
    prompts, key, score = make_prompts(), jax.random.key(9), reward_on_host(generation)
    score[1, 0] = bad
    state, metrics = LEARN(start(), FROZEN, prompts, generation, score, key)
    assert float(metrics["reward/nonfinite"]) == 1.0
    assert float(metrics["batch/sequences"]) == PROMPTS * SAMPLES - 1
    assert all(np.isfinite(float(x)) for x in metrics.values())
    kept = np.delete(np.arange(PROMPTS * SAMPLES), 1 * SAMPLES)
    assert float(metrics["objective/score"]) == pytest.approx(score.ravel()[kept].mean())
    alone = Prompts(*(jnp.repeat(x, SAMPLES, axis=0)[kept] for x in prompts))
    rows = Generation(*(x.reshape(PROMPTS * SAMPLES, 1, *x.shape[2:])[kept] for x in generation))
    expected, _ = LEARN(start(), FROZEN, alone, rows, score.reshape(-1, 1)[kept], key)
    assert_same_move(state, expected)


def learn_spy(generation, score, penalty):
    """What `learn` hands to the algorithm, and the metrics it adds."""
    spy = Algorithm(init=ALGORITHM.init, update=lambda state, batch, key: (batch, {}))
    learn = compose(spy, None, penalty).learn
    return jax.jit(learn)(start(), FROZEN, make_prompts(), generation, score, jax.random.key(0))


@pytest.mark.parametrize("penalty", [None, -3.0])
def test_what_the_algorithm_is_given(generation, penalty):
    score = reward_on_host(generation) + 0.25
    rollout, _ = learn_spy(generation, score, penalty)
    mask, finished = np.asarray(generation.mask_BGC), np.asarray(generation.finished_BG)
    expected = np.zeros(mask.shape)
    for b in range(PROMPTS):
        for g in range(SAMPLES):
            last = np.flatnonzero(mask[b, g])[-1]
            expected[b, g, last] = score[b, g] if finished[b, g] or penalty is None else penalty
    np.testing.assert_allclose(rollout.reward, expected, atol=1e-6)
    np.testing.assert_array_equal(rollout.mask, mask)
    np.testing.assert_array_equal(rollout.logp, generation.logp_BGC)
    prompts = make_prompts()
    branches = Branches(prompts.token_BP, prompts.mask_BP, generation.token_BGC, generation.mask_BGC)
    np.testing.assert_array_equal(rollout.inputs.completion_BGC, branches.completion_BGC)
    logp_ref, _, _ = expected_actor_critic(REFERENCE, TRUNK, HEAD, branches, TEMPERATURE)
    logp, _, value = expected_actor_critic(POLICY, TRUNK, HEAD, branches, TEMPERATURE)
    np.testing.assert_allclose(np.asarray(rollout.logp_ref)[mask], logp_ref, atol=1e-4)
    np.testing.assert_allclose(np.asarray(rollout.value)[mask], value, atol=1e-4)
    np.testing.assert_allclose(np.asarray(rollout.logp)[mask], logp, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_score_that_is_not_finite_stays_so_without_an_end(generation, bad):
    """The penalty for a missing end replaces rewards, not the news that there is none."""
    score, finished = reward_on_host(generation), np.asarray(generation.finished_BG)
    unfinished = tuple(np.argwhere(~finished)[0])
    score[unfinished] = bad
    rollout, metrics = learn_spy(generation, score, -3.0)
    reward, mask = np.asarray(rollout.reward), np.asarray(rollout.mask)
    last = np.flatnonzero(mask[unfinished])[-1]
    np.testing.assert_array_equal(reward[unfinished][last], bad)
    others = [i for i in np.argwhere(~finished).tolist() if tuple(i) != unfinished]
    assert others
    for b, g in others:
        assert reward[b, g][mask[b, g]][-1] == -3.0
    _, of_update = jax.jit(compose(missing_eos_penalty=-3.0).learn)(
        start(), FROZEN, make_prompts(), generation, score, jax.random.key(0)
    )
    assert float(of_update["reward/nonfinite"]) == 1.0
    assert all(np.isfinite(float(x)) for x in (metrics | of_update).values())


def test_iterate_without_a_reward_says_what_to_call():
    with pytest.raises(ValueError, match="call rollout, then learn"):
        compose(reward=None).iterate(start(), FROZEN, make_prompts(), jax.random.key(0))


def test_new_prompts_and_keys_compile_nothing():
    iterate(start(), FROZEN, make_prompts(), jax.random.key(7))
    traces = len(TRACES)
    state, _, _ = iterate(start(), FROZEN, make_prompts(5), jax.random.key(11))
    iterate(state, FROZEN, make_prompts(6), jax.random.key(12))
    assert len(TRACES) == traces > 0


def test_vmap_over_seeds_equals_separate_runs():
    keys = jax.random.split(jax.random.key(13), 2)
    over_seeds = jax.jit(jax.vmap(RLHF.iterate, in_axes=(None, None, None, 0)))
    states, metrics, experience = over_seeds(start(), FROZEN, make_prompts(), keys)
    assert not np.array_equal(*experience.generation.token_BGC)
    for i in range(2):
        state, alone, seen = iterate(start(), FROZEN, make_prompts(), keys[i])
        np.testing.assert_array_equal(experience.generation.token_BGC[i], seen.generation.token_BGC)
        assert_same_move(jax.tree.map(lambda x, i=i: x[i], states), state)
        for name, value in alone.items():
            np.testing.assert_allclose(metrics[name][i], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_many_iterations_in_one_program_equal_one_after_another():
    keys, batches = jax.random.split(jax.random.key(15), 2), [make_prompts(1), make_prompts(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    together, metrics, experience = jax.jit(partial(iterate_many, RLHF))(start(), FROZEN, stacked, keys)
    state = start()
    for i in range(2):
        state, alone, seen = iterate(state, FROZEN, batches[i], keys[i])
        for name, value in alone.items():
            np.testing.assert_allclose(metrics[name][i], value, rtol=1e-3, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(experience.generation.token_BGC, seen.generation.token_BGC)
    assert_same_move(together, state)


# ---- a reward on the host


BATCHES = [(make_prompts(seed), jax.random.key(20 + seed)) for seed in range(3)]


def score_late(prompts, generation):
    """Scores that are made only where they are waited for."""
    assert generation.token_BGC.shape[0] == prompts.index_B.shape[0]
    return lambda: reward_on_host(generation)


def fresh_start() -> ppo.State:
    """Of arrays that nothing else uses: they are donated."""
    return jax.tree.map(jnp.copy, start())


def test_iterations_with_a_reward_on_the_host_equal_those_of_one_program():
    state = start()
    found = [
        (np.asarray(jax.tree.leaves(x.state.params)[0]), x)
        for x in host_iterations(RLHF, score_late, fresh_start(), FROZEN, BATCHES[:2])
    ]
    for (kernel, run), (prompts, key) in zip(found, BATCHES, strict=False):
        state, metrics, seen = iterate(state, FROZEN, prompts, key)
        np.testing.assert_array_equal(run.experience.generation.token_BGC, seen.generation.token_BGC)
        np.testing.assert_allclose(kernel, jax.tree.leaves(state.params)[0], atol=2e-5)
        for name, value in metrics.items():
            np.testing.assert_allclose(run.metrics[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
        assert run.ahead is None
    assert_same_move(run.state, state)


def test_completions_drawn_ahead_come_from_the_parameters_before_the_update():
    """By hand: each rollout takes the state that the update before it took. The ratio is to those parameters."""
    state, drawn_from = start(), start()
    runs = host_iterations(RLHF, score_late, fresh_start(), FROZEN, BATCHES, ahead=True)
    for i, (run, (prompts, key)) in enumerate(zip(runs, BATCHES, strict=True)):
        key_rollout, key_learn = jax.random.split(key)
        generation = ROLLOUT(drawn_from, prompts, key_rollout)
        np.testing.assert_array_equal(run.experience.generation.token_BGC, generation.token_BGC)
        drawn_from = state
        state, metrics = LEARN(state, FROZEN, prompts, generation, reward_on_host(generation), key_learn)
        for name, value in metrics.items():
            np.testing.assert_allclose(run.metrics[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
        # The gap is that of decoding to training at first, later also that of two updates.
        assert (float(metrics["policy/logp_gap"]) > 1e-3) == (i > 0)
        assert (run.ahead is None) == (i == 2)
    assert_same_move(run.state, state)


def test_a_run_with_completions_drawn_ahead_goes_on_where_it_stopped():
    def run(state, batches, generation=None):
        return host_iterations(RLHF, score_late, state, FROZEN, batches, ahead=True, generation=generation)

    *_, whole = run(fresh_start(), BATCHES)
    runs = run(fresh_start(), BATCHES)
    first = next(runs)
    *_, rest = run(jax.tree.map(jnp.copy, first.state), BATCHES[1:], first.ahead)
    np.testing.assert_array_equal(whole.experience.generation.token_BGC, rest.experience.generation.token_BGC)
    assert_same_move(rest.state, whole.state)


def test_what_is_not_of_the_batch_is_refused_by_name(generation):
    def run(score, given=None, batches=BATCHES):
        next(host_iterations(RLHF, score, fresh_start(), FROZEN, batches, generation=given))

    with pytest.raises(ValueError, match=r"scores of shape \(8,\) for completions \[B, G\] = \(4, 2\)"):
        run(lambda prompts, generation: lambda: reward_on_host(generation).ravel())
    few = jax.tree.map(lambda x: np.asarray(x)[:3], generation)
    with pytest.raises(ValueError, match="completions of 3 prompts, the first batch has 4"):
        run(score_late, few)
    stacked = jax.tree.map(lambda *x: np.stack([np.asarray(y) for y in x]), make_prompts(1), make_prompts(2))
    for keys in (jax.random.split(jax.random.key(0), 3), jax.random.key(0)):
        with pytest.raises(ValueError, match="must share a first axis of at least 1 iteration"):
            iterate_many(RLHF, start(), FROZEN, stacked, keys)


def test_a_reward_that_raises_loses_no_state():
    def broken(prompts, generation):
        raise RuntimeError("no judge today")

    state = fresh_start()
    with pytest.raises(RuntimeError, match="no judge today"):
        next(host_iterations(RLHF, broken, state, FROZEN, BATCHES))
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_four_devices_equal_one():
    """Prompts sharded over four devices, everything else on each: same completions, metrics and step."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    split, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    key = jax.random.key(14)
    alone, expected, seen = iterate(start(), FROZEN, make_prompts(), key)
    arguments = jax.device_put(
        (start(), FROZEN, make_prompts(), key), (everywhere, everywhere, split, everywhere)
    )
    sharded, metrics, experience = jax.block_until_ready(iterate(*arguments))
    np.testing.assert_array_equal(experience.generation.token_BGC, seen.generation.token_BGC)
    assert_same_move(sharded, alone)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    for array in (experience.generation.token_BGC, experience.score_BG):
        assert array.sharding.is_equivalent_to(split, array.ndim)
