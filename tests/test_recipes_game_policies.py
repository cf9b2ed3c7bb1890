"""Policy optimisation in worlds of words: updates against loops in Python over the agent's tokens alone, game by game;
groups of games of one world; the optimum under a KL of a world that chance plays in; several devices."""

from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_environments_text import echo_world

from rlhfjax.algorithms import dpo, grpo, ppo
from rlhfjax.config import DPO, GRPO, PPO, Decoder, Mesh
from rlhfjax.environments import Environment
from rlhfjax.environments.text import PAD, phrases, row_length, say, text_world
from rlhfjax.mesh import kept, make_mesh, place_rows, put
from rlhfjax.networks import decoder, init_scalar_head
from rlhfjax.recipes import (
    Turns,
    game_actor_critic,
    game_episodes,
    game_kl,
    game_logp,
    game_pairs,
    game_policy,
    grpo_games,
    make_game_iteration,
    play_games,
    ppo_games,
)

KEY, HEAT, SGD = jax.random.key(3), 0.7, optax.sgd(1.0)
SMALL: dict[str, Any] = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 2, "head_size": 8, "mlp_width": 24}


def model(world, **changes):
    config = SMALL | changes
    return decoder(Decoder(vocab_size=len(world.vocabulary), max_positions=row_length(world), **config))


ECHO = echo_world()
LM = model(ECHO)
# Large enough weights that the draws depend on what was said.
POLICY, OTHER = (jax.tree.map(lambda x: 2.0 * x, LM.init(jax.random.key(i))) for i in (1, 2))
CRITIC = {"trunk": OTHER, "head": init_scalar_head(jax.random.key(4), 16)}
ACTOR_CRITIC = {"policy": POLICY, "critic": CRITIC}
WORLDS, SAMPLES = 4, 3
GAMES = WORLDS * SAMPLES


def ppo_iteration(place=lambda x: x):
    """One step of SGD on the plain policy gradient: no clip bites where the ratio is 1."""
    evaluate = game_actor_critic(LM, temperature=HEAT)
    config = PPO(
        kl_coefficient=0.3,
        discount=0.9,
        lam=0.8,
        whiten_advantages=False,
        value_coefficient=0.0,
        epochs=1,
        value_clip=np.inf,
    )
    as_batch = ppo_games(LM, evaluate, temperature=HEAT)
    algorithm = ppo.make(evaluate, SGD, config)
    return algorithm, make_game_iteration(
        LM,
        ECHO,
        algorithm,
        as_batch,
        worlds=GAMES,
        temperature=HEAT,
        policy=itemgetter("policy"),
        place=place,
    )


@pytest.fixture(scope="module")
def updated():
    algorithm, iterate = ppo_iteration()
    return jax.jit(iterate)(algorithm.init(ACTOR_CRITIC), OTHER, KEY)


@pytest.fixture(scope="module")
def of_row():
    """logp [T], value [T] and value after the last token, of one game without its padding."""

    @jax.jit
    def run(policy, token_N, size):
        # Behind its end the row is masked; what stands there is never read.
        real_BN = (jnp.arange(token_N.shape[0]) < size)[None]
        turns = Turns(token_N[None], real_BN)
        position = jnp.arange(token_N.shape[0], dtype=jnp.int32)[None]
        causal = jnp.tril(jnp.ones((1, token_N.shape[0], token_N.shape[0]), bool)) & real_BN[:, None]
        hidden, _ = LM.apply(policy, turns.token_BN, position_BT=position, mask_BTS=causal)
        logits = LM.logits(policy, hidden[0]) / HEAT
        logp_T = jnp.take_along_axis(jax.nn.log_softmax(logits)[:-1], token_N[1:, None], axis=1)[:, 0]
        hidden, _ = LM.apply(CRITIC["trunk"], turns.token_BN, position_BT=position, mask_BTS=causal)
        return logp_T, hidden[0] @ CRITIC["head"]["kernel"] + CRITIC["head"]["bias"]

    return run


def rows_of(games):
    """(tokens, size, places of the agent's tokens, their rewards, truncated) of each game."""
    games = jax.tree.map(np.asarray, games)
    for i in range(len(games.score_B)):
        agent = np.flatnonzero(games.agent_BT[i])
        yield (
            games.token_BN[i],
            int(games.mask_BN[i].sum()),
            agent,
            games.reward_BT[i][agent],
            games.truncated_B[i],
        )


@pytest.fixture(scope="module")
def gradient_of_loop(of_row):
    """(games, advantages) -> gradient of minus the mean over the agent's tokens of advantage * logp, game by game."""

    @jax.jit
    def gradient(token_N, size, weight_T):
        return jax.grad(lambda params: jnp.sum(weight_T * of_row(params, token_N, size)[0]))(POLICY)

    def of_games(games, advantages):
        total, count = jax.tree.map(jnp.zeros_like, POLICY), 0
        for (token, size, agent, *_), advantage in zip(rows_of(games), advantages, strict=True):
            weight_T = np.zeros(len(token) - 1, np.float32)
            weight_T[agent] = advantage
            total = jax.tree.map(jnp.add, total, gradient(token, size, weight_T))
            count += len(agent)
        return jax.tree.map(lambda g: -g / count, total)

    return of_games


def expect_step(before, after, gradient):
    moved = jax.tree.map(lambda a, b: a - b, before, after)
    scale = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(gradient))
    assert scale > 1e-3
    jax.tree.map(lambda m, g: np.testing.assert_allclose(m, g, atol=2e-4 * scale), moved, gradient)


def test_ppo_learns_from_the_agents_tokens_as_a_loop_does(updated, of_row, gradient_of_loop):
    """KL at every token of the agent, values of the states it speaks in, a bootstrap where the game was cut short."""
    state, metrics, played = updated
    games, advantages, scores, kls = played.games, [], [], []
    assert games.truncated_B.any() and games.terminated_B.any()
    for token, size, agent, reward, truncated in rows_of(games):
        logp_T, value_N = map(np.asarray, of_row(POLICY, token, size))
        ref_T, _ = of_row(OTHER, token, size)
        kl = (logp_T - np.asarray(ref_T))[agent]
        values = [*value_N[agent], value_N[size - 1] if truncated else 0.0]
        advantage, following = np.zeros(len(agent)), 0.0
        for t in reversed(range(len(agent))):
            delta = reward[t] - 0.3 * kl[t] + 0.9 * values[t + 1] - values[t]
            following = advantage[t] = delta + 0.9 * 0.8 * following
        advantages.append(advantage)
        scores.append(reward.sum())
        kls.append(kl.sum())
    np.testing.assert_allclose(metrics["objective/kl"], np.mean(kls), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(metrics["game/score"], np.mean(scores), rtol=1e-5)
    expect_step(POLICY, state.params["policy"], gradient_of_loop(games, advantages))


def test_probabilities_kept_while_playing_are_those_of_the_update(updated):
    _, metrics, played = updated
    assert metrics["policy/logp_gap"] < 1e-4 and metrics["policy/clip_fraction"] == 0
    assert metrics["batch/actions"] == played.games.agent_BT.sum()
    assert played.logp_BT[played.games.agent_BT].min() < -0.1


def test_padding_and_what_stands_in_it_change_nothing(updated):
    state, _, played = updated
    games = played.games

    def longer(x, value):
        return jnp.pad(x, ((0, 0), (0, 3)), constant_values=value)

    # NaN for log-probabilities and tokens outside the vocabulary: they are not read.
    padded = played._replace(
        games=games._replace(
            token_BN=longer(games.token_BN, 99),
            mask_BN=longer(games.mask_BN, False),
            turn_BN=longer(games.turn_BN, 7),
            agent_BT=longer(games.agent_BT, False),
            reward_BT=longer(games.reward_BT, 5.0),
        ),
        logp_BT=longer(played.logp_BT, jnp.nan),
    )
    algorithm, _ = ppo_iteration()
    as_batch = ppo_games(LM, game_actor_critic(LM, temperature=HEAT), temperature=HEAT)

    @jax.jit
    def update(played):
        start = algorithm.init(ACTOR_CRITIC)
        return algorithm.update(start, as_batch(start, OTHER, played, 1), KEY)[0].params

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), update(padded), state.params)


# ---- groups


@pytest.fixture(scope="module")
def grouped():
    """RLOO: the leave-one-out baseline among the games of a world, the KL off the score."""
    config = GRPO(
        baseline="leave_one_out",
        scale="none",
        clip="none",
        aggregation="token",
        kl_coefficient=0.2,
        kl_placement="score",
        kl_estimator="k1",
    )
    algorithm = grpo.make(game_policy(LM, temperature=HEAT), SGD, config)
    as_batch = grpo_games(LM, temperature=HEAT)
    iterate = make_game_iteration(
        LM, ECHO, algorithm, as_batch, worlds=WORLDS, samples=SAMPLES, temperature=HEAT
    )
    return jax.jit(iterate)(algorithm.init(POLICY), OTHER, KEY)


def log_ratios(of_row, games):
    """Of each game log(policy / reference) of what the agent said, and its score."""
    found = []
    for token, size, agent, reward, _ in rows_of(games):
        logp_T, ref_T = (np.asarray(of_row(x, token, size)[0])[agent] for x in (POLICY, OTHER))
        found.append((np.sum(logp_T - ref_T), reward.sum()))
    return np.array(found).T


def test_grpo_judges_a_game_by_those_of_its_world(grouped, of_row, gradient_of_loop):
    state, metrics, played = grouped
    ratio, score = log_ratios(of_row, played.games)
    judged = np.reshape(score - 0.2 * ratio, (WORLDS, SAMPLES))
    others = (judged.sum(axis=1, keepdims=True) - judged) / (SAMPLES - 1)
    advantage = np.reshape(judged - others, -1)
    advantages = [np.full(len(row[2]), a) for row, a in zip(rows_of(played.games), advantage, strict=True)]
    expect_step(POLICY, state.params, gradient_of_loop(played.games, advantages))
    assert metrics["policy/logp_gap"] < 1e-4


def coin_world(turns=2):
    """Says x or y by chance, whatever it is told; the score is told by `coin_reward`."""
    vocabulary = (PAD, ".", "a", "b", "x", "y")
    coin_2 = phrases(vocabulary, ["x", "y"])

    def reset(key, params):
        coin = jax.random.randint(key, (), 0, 2, jnp.int32) * (turns > 2)
        return say(coin_2, coin), (coin, jnp.int32(0))

    def step(key, state, action, params):
        coin, turn = jax.random.bernoulli(key, 0.3).astype(jnp.int32), state[1] + 1
        reward = coin_reward(jnp.where(turn == 1, 0, state[0]), turn - 1, action.token_L[0])
        return say(coin_2, coin), (coin, turn), reward, turn >= turns, jnp.bool_(False), {"success": coin > 0}

    env = Environment(reset, step, None, None)
    return text_world(env, vocabulary, stop=".", action_length=1, observation_length=1, turns=turns)


def coin_reward(coin, turn, token):
    """In the first turn "a" pays; in the second the letter that goes with the coin."""
    first, second = jnp.float32(token == 2), jnp.float32(token == 2 + coin)
    return jnp.where(turn == 0, 0.5 * first, second)


COINS = coin_world(turns=4)
COIN_LM = model(COINS)


@pytest.fixture(scope="module")
def coins():
    params = COIN_LM.init(KEY)
    return params, jax.jit(lambda params: play_games(COIN_LM, params, COINS, KEY, 12, samples=3))(params)


def test_a_group_shares_its_world_and_its_chance(coins):
    token = np.asarray(coins[1].games.token_BN).reshape(4, 3, -1)
    np.testing.assert_array_equal(token[:, :, ::2], np.repeat(token[:, :1, ::2], 3, axis=1))
    assert len(np.unique(token[:, 0, ::2], axis=0)) > 1
    assert np.any(token[:, 0, 1::2] != token[:, 1, 1::2])  # the agent draws anew
    for i in range(4):  # world i is that of the i-th game where there is one of each
        key = jax.random.fold_in(jax.random.fold_in(KEY, i), 0)
        assert token[i, 0, 0] == COINS.env.reset(key, COINS.env.params)[0].token_L[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "rloo"])
def test_the_optimum_under_a_kl_is_reached(name):
    """Soft values by enumeration: the agent's tokens have a KL to the reference, the world's chance has none."""
    world, beta = coin_world(), 0.5
    lm = model(world, width=32, head_size=16, mlp_width=48)
    reference = jax.tree.map(lambda x: 1.5 * x, lm.init(jax.random.key(1)))

    @jax.jit
    def policy(params, token_N):  # of the tokens that may follow, [V]
        n = token_N.shape[0]
        position, seen = jnp.arange(n, dtype=jnp.int32)[None], jnp.tril(jnp.ones((1, n, n), bool))
        hidden, _ = lm.apply(params, token_N[None], position_BT=position, mask_BTS=seen)
        return jax.nn.log_softmax(lm.logits(params, hidden[:, -1]))[0]

    def soft(prefix, reward_V, value_V):
        """Optimal log-probabilities [V] and the value of the state."""
        exponent = np.asarray(policy(reference, jnp.array(prefix))) + (reward_V + value_V) / beta
        value = np.logaddexp.reduce(exponent)
        return exponent - value, beta * value

    rewards = np.array([[[coin_reward(c, t, v) for v in range(6)] for t in range(2)] for c in range(2)])
    second = {(v, c): soft([4, v, 4 + c], rewards[c, 1], np.zeros(6)) for v in range(6) for c in range(2)}
    value_V = np.array([0.7 * second[v, 0][1] + 0.3 * second[v, 1][1] for v in range(6)])
    first, _ = soft([4], rewards[0, 0], value_V)

    optimizer = optax.adam(optax.linear_schedule(5e-3, 0.0, 300))
    if name == "ppo":
        evaluate = game_actor_critic(lm)
        config = PPO(
            kl_coefficient=beta, value_clip=np.inf, value_coefficient=0.5, epochs=1, whiten_advantages=False
        )
        algorithm = ppo.make(evaluate, optimizer, config)
        critic = {"trunk": reference, "head": init_scalar_head(KEY, 32, scale=0.0)}
        start, as_batch, pick = (
            {"policy": reference, "critic": critic},
            ppo_games(lm, evaluate),
            itemgetter("policy"),
        )
        worlds, samples = 512, 1
    else:
        config = GRPO(
            baseline="leave_one_out", scale="none", clip="none", aggregation="token", kl_coefficient=beta,
            kl_placement="score", kl_estimator="k1",
        )  # fmt: skip
        algorithm = grpo.make(game_policy(lm), optimizer, config)
        start, as_batch, pick = reference, grpo_games(lm), lambda params: params
        worlds, samples = 128, 4
    iterate = make_game_iteration(lm, world, algorithm, as_batch, worlds=worlds, samples=samples, policy=pick)

    @jax.jit
    def run(state):
        return jax.lax.scan(
            lambda s, key: (iterate(s, reference, key)[0], None), state, jax.random.split(KEY, 300)
        )[0]

    params = pick(run(algorithm.init(start)).params)
    learnt = np.exp(np.asarray(policy(params, jnp.array([4]))))
    np.testing.assert_allclose(learnt, np.exp(first), atol=0.05)
    assert np.abs(np.exp(np.asarray(policy(reference, jnp.array([4])))) - np.exp(first)).max() > 0.15
    for v in range(4):
        learnt = np.exp(np.asarray(policy(params, jnp.array([4, v, 4]))))
        np.testing.assert_allclose(learnt, np.exp(second[v, 0][0]), atol=0.02)
    # After the rarer coin the small network gives one answer to most first tokens.
    learnt = np.exp(np.asarray(policy(params, jnp.array([4, 2, 5]))))
    np.testing.assert_allclose(learnt, np.exp(second[2, 1][0]), atol=0.1)


# ---- preferences and KL


def test_pairs_are_games_of_one_world_that_differ_in_score(grouped, of_row):
    games = grouped[2].games
    groups = jax.tree.map(lambda x: x.reshape(WORLDS, SAMPLES, *x.shape[1:]), games)
    algorithm = dpo.make(game_logp(LM, temperature=HEAT), SGD, DPO(beta=0.4))

    @jax.jit
    def update(params):
        batch = game_pairs(LM, OTHER, game_episodes(groups), temperature=HEAT)
        return algorithm.update(algorithm.init(params), batch, KEY)[1]

    metrics, (ratio, score) = update(POLICY), log_ratios(of_row, games)
    losses = [
        np.logaddexp(0.0, -0.4 * np.sign(score[i] - score[j]) * (ratio[i] - ratio[j]))
        for w in range(0, GAMES, SAMPLES)
        for i, j in ((w, w + 1), (w, w + 2), (w + 1, w + 2))
        if score[i] != score[j]
    ]
    assert 0 < len(losses) < GAMES  # some are equal
    assert metrics["batch/count"] == len(losses)
    np.testing.assert_allclose(metrics["loss/preference"], np.mean(losses), rtol=1e-4)


def test_kl_of_a_game_is_that_of_what_the_agent_said(coins):
    params, played = coins
    reference = COIN_LM.init(jax.random.key(9))

    @jax.jit
    def both(played):
        logp, turns = game_logp(COIN_LM), game_episodes(played.games).inputs
        kl = [game_kl(COIN_LM, x, played) for x in (reference, params)]
        return *kl, logp(params, turns), logp(reference, turns)

    other, same, logp_BT, ref_BT = map(np.asarray, both(played))
    np.testing.assert_allclose(same, 0.0, atol=1e-4)
    agent_BT = np.asarray(played.games.agent_BT)
    rows = zip(logp_BT, ref_BT, agent_BT, strict=True)
    np.testing.assert_allclose(other, [np.sum((x - y)[agent]) for x, y, agent in rows], atol=1e-3)
    assert np.abs(other).max() > 0.2 and agent_BT.sum() == 12 * 4


# ---- devices


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices")
def test_on_two_devices_the_step_is_that_of_one(updated):
    mesh = make_mesh(Mesh(data=2))
    algorithm, iterate = ppo_iteration(place_rows(mesh))
    state = put(mesh, algorithm.init(ACTOR_CRITIC))
    run = jax.jit(kept(mesh, iterate))
    after, metrics, played = jax.block_until_ready(run(state, put(mesh, OTHER), KEY))
    np.testing.assert_array_equal(played.games.token_BN, updated[2].games.token_BN)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), after.params, updated[0].params)
    np.testing.assert_allclose(metrics["objective/kl"], updated[1]["objective/kl"], rtol=1e-4)
    assert played.games.token_BN.sharding.shard_shape(played.games.token_BN.shape)[0] == GAMES // 2


# ---- bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: play_games(LM, POLICY, ECHO, KEY, 5, samples=2), "multiple of samples=2"),
        (lambda: play_games(LM, POLICY, ECHO, KEY, 4, samples=0), "samples=0"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_group_of_one_makes_no_pair():
    games = jax.eval_shape(lambda: play_games(LM, POLICY, ECHO, KEY, 2).games)
    with pytest.raises(ValueError, match="at least 2, not 1"):
        jax.eval_shape(
            lambda games: game_pairs(LM, OTHER, jax.tree.map(lambda x: x[:, None], game_episodes(games))),
            games,
        )
