"""Policy optimisation in worlds of words: a language model plays, and learns from its own games.

    evaluate = game_actor_critic(lm)
    iterate = make_game_iteration(
        lm, world, ppo.make(evaluate, ...), ppo_games(lm, evaluate), worlds=256, policy=itemgetter("policy")
    )
    state, metrics, played = jax.jit(iterate, donate_argnums=0)(state, reference, key)

The games, their rewards and the update are one compiled program. A game is a row of tokens; what is learnt from are the
agent's alone, and each of its turns has its reward. What the world says is seen and is no action: it gets no gradient,
and no log-probability of it is in any ratio or KL. Games of the same world, of which the same is hidden, are a group:
what differs between them is what the agent said.

The KL between policy and reference is that of whole games: the world's answers are equally likely under both, so its
terms are those of the agent's tokens.

Shapes: B rows, or worlds with G games of each; T positions (N = T + 1 tokens), D width. `...` is [B, T] for rows and
[B, G, T] for groups; position t speaks of token t + 1.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax.algorithms import dpo, grpo, ilql, ppo
from rlhfjax.algorithms.algorithm import Algorithm, Evaluation
from rlhfjax.environments.text import TextWorld
from rlhfjax.generation import Sampling
from rlhfjax.networks import LanguageModel, scalar_head
from rlhfjax.ops import masked_sum, token_kl, token_logprobs
from rlhfjax.recipes.games import Played, game_episodes, play_games
from rlhfjax.recipes.value import States, Turns, turn_states

PyTree = Any
AsGameBatch = Callable[[Any, dict, Played, int], PyTree]
"""`(state, reference, played, samples) -> batch` of an algorithm, from `samples` games of each world, one behind the
other."""


def game_policy(
    lm: LanguageModel, *, memory: int | None = None, temperature: jax.Array | float = 1.0
) -> Callable[..., Evaluation]:
    """`evaluate` of `grpo` on games: `(params, turns) -> Evaluation(logp, entropy)`, each float32 [...].

    Params are the language model's, `turns` rows [B, N] or groups [B, G, N]. Given a third argument, the reference's
    params, it evaluates that too, for the exact KL(policy || reference) over the vocabulary at every token; the
    reference gets no gradient. memory and temperature: those of the games, see `play_games`.
    """

    def evaluate(params: dict, turns: Turns, reference: dict | None = None) -> Evaluation:
        found = _states(lm, params, turns, memory)
        logp, entropy = _logp(lm, params, found, temperature)
        kl = None
        if reference is not None:
            kl = _exact_kl(lm, params, found, reference, turns, memory, temperature)
        return Evaluation(logp, entropy, kl=kl)

    return evaluate


def game_logp(
    lm: LanguageModel, *, memory: int | None = None, temperature: jax.Array | float = 1.0
) -> Callable[[dict, Turns], jax.Array]:
    """`evaluate` of `dpo` on games: `(params, turns) -> float32 [...]`, log-probability of every token, nats."""

    def evaluate(params: dict, turns: Turns) -> jax.Array:
        return _logp(lm, params, _states(lm, params, turns, memory), temperature)[0]

    return evaluate


def game_actor_critic(
    lm: LanguageModel,
    *,
    memory: int | None = None,
    temperature: jax.Array | float = 1.0,
    shared_trunk: bool = False,
) -> Callable[..., Evaluation]:
    """`evaluate` of `ppo` on games: `(params, turns) -> Evaluation(logp, entropy, value)`, each float32 [...].

    Params: {"policy": LM params, "critic": {"trunk": LM params, "head"}}, as in `text_actor_critic`; with
    `shared_trunk` the critic has no trunk and its head reads the policy's hidden states. The value of a token is that
    of the state it is chosen in, with what the agent has been told so far. For the rest see `game_policy`.
    """

    def evaluate(params: dict, turns: Turns, reference: dict | None = None) -> Evaluation:
        found = _states(lm, params["policy"], turns, memory)
        logp, entropy = _logp(lm, params["policy"], found, temperature)
        kl = None
        if reference is not None:
            kl = _exact_kl(lm, params["policy"], found, reference, turns, memory, temperature)
        read = found if shared_trunk else _states(lm, params["critic"]["trunk"], turns, memory)
        return Evaluation(logp, entropy, scalar_head(params["critic"]["head"], read.before), kl)

    return evaluate


def ppo_games(
    lm: LanguageModel,
    evaluate: Callable[..., Evaluation],
    *,
    memory: int | None = None,
    temperature: jax.Array | float = 1.0,
    shared_trunk: bool = False,
    exact_kl: bool = False,
) -> AsGameBatch:
    """Rollouts of games for `ppo`, one game a row.

    Args:
      evaluate: the algorithm's, `game_actor_critic` with the same memory, temperature and trunk.
      exact_kl: for kl_estimator "exact".

    A game that a limit cut short bootstraps from the value after its last token; one that ended does not.
    """

    def as_batch(state, reference: dict, played: Played, samples: int) -> ppo.Rollout:
        del samples
        games = played.games
        turns = Turns(games.token_BN, games.mask_BN, games.turn_BN)
        found = evaluate(state.params, turns, *((reference,) if exact_kl else ()))
        critic = state.params["critic"]
        trunk = state.params["policy"] if shared_trunk else critic["trunk"]
        final_B = scalar_head(critic["head"], _states(lm, trunk, turns, memory).final)
        value_BT = _given("value", found.value)
        last_BT = _last(games.agent_BT)
        return ppo.Rollout(
            inputs=turns,
            logp=played.logp_BT,  # what `evaluate` gives, at the same temperature
            logp_ref=game_logp(lm, memory=memory, temperature=temperature)(reference, turns),
            value=value_BT,
            reward=games.reward_BT,
            mask=games.agent_BT,
            next_value=_next_value(value_BT, games.agent_BT, final_B),
            terminated=last_BT & ~games.truncated_B[:, None],
            truncated=last_BT & games.truncated_B[:, None],
            kl=_given("kl", found.kl) if exact_kl else None,
            reference=reference if exact_kl else None,
        )

    return as_batch


def grpo_games(
    lm: LanguageModel,
    *,
    memory: int | None = None,
    temperature: jax.Array | float = 1.0,
    reference: bool = True,
    exact_kl: Callable[..., Evaluation] | None = None,
) -> AsGameBatch:
    """Rollouts of games for `grpo`: the games of one world are a group, judged by their scores.

    Args:
      reference: whether the reference's log-probabilities are computed; without a KL none are needed.
      exact_kl: the algorithm's `evaluate`, where kl_estimator is "exact"; None elsewhere.
    """
    of_reference, is_needed = game_logp(lm, memory=memory, temperature=temperature), reference

    def as_batch(state, reference: dict, played: Played, samples: int) -> grpo.Rollout:
        grouped: Played = jax.tree.map(lambda x: x.reshape(-1, samples, *x.shape[1:]), played)
        games = grouped.games
        turns = Turns(games.token_BN, games.mask_BN, games.turn_BN)
        kl = None if exact_kl is None else _given("kl", exact_kl(state.params, turns, reference).kl)
        return grpo.Rollout(
            inputs=turns,
            logp=grouped.logp_BT,
            logp_ref=of_reference(reference, turns) if is_needed else None,
            reward=games.score_B,
            mask=games.agent_BT,
            reference=None if exact_kl is None else reference,
            kl=kl,
        )

    return as_batch


def game_pairs(
    lm: LanguageModel,
    reference: dict,
    episodes: ilql.Episodes,
    *,
    memory: int | None = None,
    temperature: jax.Array | float = 1.0,
) -> dpo.Pairs:
    """Pairs of games of the same world for `dpo`: of every two the one of the higher score is preferred.

    episodes: groups, [B, G, ...], e.g. `game_episodes` of games with a second axis. Games of equal score make no pair.
    ValueError for groups of one game.

    A game may owe its score to luck: whoever guesses too early is right at times, and is then preferred to who asked
    first. Such pairs are outnumbered by those where the guess was wrong, but a preference does not tell by how much a
    game was better.
    """
    score_BG = masked_sum(episodes.reward, episodes.mask, axis=-1)
    samples = score_BG.shape[1]
    if samples < 2:
        raise ValueError(f"games of a world are compared with each other: give at least 2, not {samples}")
    first_K, second_K = jnp.triu_indices(samples, k=1)
    gap_BK = score_BG[:, first_K] - score_BG[:, second_K]
    return dpo.Pairs(
        inputs=episodes.inputs,
        completion_mask_BGC=episodes.mask,
        first=first_K,
        second=second_K,
        label_BK=(gap_BK > 0).astype(jnp.float32),
        # Sums of the same rewards in another order are not equal to the last bit.
        mask_BK=jnp.abs(gap_BK) > 1e-5,
        logp_ref_BGC=game_logp(lm, memory=memory, temperature=temperature)(reference, episodes.inputs),
    )


def game_kl(lm: LanguageModel, reference: dict, played: Played, *, memory: int | None = None) -> jax.Array:
    """Of each game log(policy / reference) of all that the agent said, float32 [B], nats; its mean estimates the KL.

    The policy's part was kept while playing, whatever the policy: a language model or a guided one. The reference's is
    at temperature 1.
    """
    inputs = game_episodes(played.games).inputs
    logp_ref_BT = game_logp(lm, memory=memory)(reference, inputs)
    return masked_sum(played.logp_BT - logp_ref_BT, played.games.agent_BT, axis=-1)


def make_game_iteration(
    lm: LanguageModel,
    world: TextWorld,
    algorithm: Algorithm,
    as_batch: AsGameBatch,
    *,
    worlds: int,
    samples: int = 1,
    memory: int | None = None,
    temperature: float = 1.0,
    policy: Callable[[Any], dict] = lambda params: params,
    place: Callable[[PyTree], PyTree] = lambda games: games,
) -> Callable[[Any, dict, jax.Array], tuple[Any, dict[str, jax.Array], Played]]:
    """One iteration, games and update: `iterate(state, reference, key) -> (state, metrics, played)`, to be jitted.

    Args:
      algorithm: e.g. `ppo.make(game_actor_critic(lm), ...)` or `grpo.make(game_policy(lm), ...)`.
      as_batch: e.g. `ppo_games(lm, evaluate)` or `grpo_games(lm)`.
      worlds: of an iteration, each with `samples` games.
      memory, temperature: of the games; `algorithm` and `as_batch` must have the same.
      policy: the language model's params among the algorithm's.
      place: lays arrays with a row for each game over devices, `mesh.place_rows(mesh)`.

    The key is consumed. Metrics are the algorithm's, and "game/score", "game/won", "game/turns": means over the games.
    """
    play = partial(
        play_games,
        lm,
        world=world,
        count=worlds * samples,
        samples=samples,
        memory=memory,
        sampling=Sampling(temperature=temperature),
        place=place,
    )

    def iterate(state: Any, reference: dict, key: jax.Array):
        key_play, key_update = jax.random.split(key)
        played = jax.lax.stop_gradient(play(params=policy(state.params), key=key_play))
        batch = as_batch(state, reference, played, samples)
        state, metrics = algorithm.update(state, batch, key_update)
        games = played.games
        numbers = {"game/score": games.score_B, "game/won": games.success_B, "game/turns": games.turns_B}
        return (
            state,
            metrics | {name: jnp.mean(x, dtype=jnp.float32) for name, x in numbers.items()},
            played,
        )

    return iterate


def _states(lm: LanguageModel, params: dict, turns: Turns, memory: int | None) -> States:
    """`turn_states` of rows [B, N], or of groups [B, G, N] as rows; [...] again."""
    lead = turns.mask_BN.shape[:-1]
    if len(lead) == 1:
        return turn_states(lm, params, turns, memory=memory)
    rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), turns)
    found = turn_states(lm, params, rows, memory=memory)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def _logp(lm: LanguageModel, params: dict, found: States, temperature):
    """Log-probability of the tokens, and entropy of what they were drawn from, [...]."""
    return token_logprobs(
        found.before,
        lm.embedding(params),
        found.token,
        temperature=temperature,
        softcap=lm.config.logit_softcap,
    )


def _exact_kl(lm: LanguageModel, params, found: States, reference, turns, memory, temperature) -> jax.Array:
    return token_kl(
        found.before,
        lm.embedding(params),
        _states(lm, reference, turns, memory).before,
        lm.embedding(reference),
        temperature=temperature,
        softcap=lm.config.logit_softcap,
    )


def _last(agent_BT: jax.Array) -> jax.Array:
    """Where the agent speaks for the last time, bool [B, T]."""
    length = agent_BT.shape[1]
    last_B = length - 1 - jnp.argmax(agent_BT[:, ::-1], axis=1)
    return (jnp.arange(length)[None, :] == last_B[:, None]) & agent_BT


def _next_value(value_BT: jax.Array, agent_BT: jax.Array, final_B: jax.Array) -> jax.Array:
    """Value of the state in which the agent speaks next; after its last token, of what the game was left in."""
    length = value_BT.shape[1]
    place_BT = jnp.where(agent_BT, jnp.arange(length)[None, :], length)
    next_BT = jnp.pad(
        jax.lax.cummin(place_BT, axis=1, reverse=True)[:, 1:], ((0, 0), (0, 1)), constant_values=length
    )
    return jnp.take_along_axis(jnp.concatenate([value_BT, final_B[:, None]], axis=1), next_BT, axis=1)


def _given(name: str, x: jax.Array | None) -> jax.Array:
    if x is None:
        raise ValueError(f"evaluate gave no {name}; give an `evaluate` whose Evaluation has it")
    return x
