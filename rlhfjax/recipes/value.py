"""Q-learning on text: what `ilql` and `soft_q` need to know of a language model, and their batches.

Text comes in two forms. `Turns` are rows in which the agent and its environment take turns, e.g. a game in words;
`Branches` are prompts with several completions of each, all tokens the agent's, e.g. rated summaries. A function that
finds the states of one or the other, `turn_states` or `branch_states`, is all that tells them apart.

Shapes: B rows or prompts, T positions (N = T + 1 tokens), G completions of each prompt, C completion length, D width;
`...` is [B, T] for turns and [B, G, C] for branches, without its last axis [B] and [B, G].
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algorithms import ilql, sft, soft_q
from rlhfjax.algorithms.algorithm import PyTree
from rlhfjax.generation import Generation
from rlhfjax.networks import Branches, LanguageModel, branch_hidden, causal_mask
from rlhfjax.networks.q_heads import best_token, init_q_heads, q_log_softmax, q_of_tokens, state_value
from rlhfjax.ops import end_of_sequence_reward, masked_sum, token_logprobs
from rlhfjax.recipes.batches import AsBatch


class Turns(NamedTuple):
    """Rows of text, one episode each, right-padded. Position t of all else speaks of token t + 1."""

    token_BN: jax.Array  # int32 [B, T + 1]
    mask_BN: jax.Array  # bool, True on real tokens, whoever said them
    turn_BN: jax.Array | None = None  # int32, the turn of each token, from 0; needed where memory is limited


class Turn(NamedTuple):
    """What one side said, for `turn_episodes`."""

    tokens: Sequence[int]
    agent: bool  # whether the agent said it
    reward: float = 0.0  # earned by it, until the agent's next turn; the environment's turns have none


class States(NamedTuple):
    """Hidden states of text, where its tokens are chosen."""

    before: jax.Array  # [..., D], before each token: the state in which it is chosen
    final: jax.Array  # [B, D] or [B, G, D], after the last token
    token: jax.Array  # int32 [...], the tokens


# (lm, params, inputs) -> States
FindStates = Callable[[LanguageModel, dict, Any], States]


def turn_states(lm: LanguageModel, params: dict, turns: Turns, *, memory: int | None = None) -> States:
    """Hidden states of `Turns`: one forward pass over each row.

    memory: turns that a token's attention reaches back over, its own among them; None: all. So does `play_games`.
    """
    mask_BN = turns.mask_BN
    token_BN = jnp.where(mask_BN, turns.token_BN, 0)  # what stands in the padding need not be a token
    position_BN = jnp.maximum(jnp.cumsum(mask_BN.astype(jnp.int32), axis=1) - 1, 0)
    seen_BNN = causal_mask(mask_BN.astype(jnp.int32))
    if memory is not None:
        if turns.turn_BN is None:
            raise ValueError(f"memory={memory} turns needs turn_BN, the turn of each token")
        turn_BN = jnp.where(mask_BN, turns.turn_BN, 0)
        seen_BNN &= turn_BN[:, None, :] > turn_BN[:, :, None] - memory
        seen_BNN |= jnp.eye(seen_BNN.shape[1], dtype=bool)[
            None
        ]  # padding sees itself, so that softmax is finite
    hidden_BND, _ = lm.apply(params, token_BN, position_BT=position_BN, mask_BTS=seen_BNN)
    last_B = jnp.maximum(jnp.sum(mask_BN, axis=1) - 1, 0)
    final_BD = jnp.take_along_axis(hidden_BND, last_B[:, None, None], axis=1)[:, 0]
    return States(hidden_BND[:, :-1], final_BD, token_BN[:, 1:])


def branch_states(lm: LanguageModel, params: dict, branches: Branches) -> States:
    """Hidden states of the completions of `Branches`: the prompt is computed once for all of them."""
    before, after = branch_hidden(lm, params, branches)
    last_BG = jnp.maximum(jnp.sum(branches.completion_mask_BGC, axis=2) - 1, 0)
    final_BGD = jnp.take_along_axis(after, last_BG[..., None, None], axis=2)[:, :, 0]
    return States(before, final_BGD, jnp.where(branches.completion_mask_BGC, branches.completion_BGC, 0))


# ---- Q heads on a language model, for `ilql`


class TextValues(NamedTuple):
    """What `ilql.make` takes: `ilql.make(values.evaluate, optimizer, config, **values.target())`."""

    evaluate: ilql.Evaluate
    target_of: Callable[[dict], dict]
    evaluate_target: ilql.EvaluateTarget

    def target(self) -> dict:
        """The keyword arguments that make the target network."""
        return {"target_of": self.target_of, "evaluate_target": self.evaluate_target}


def init_text_values(
    key: jax.Array,
    lm: LanguageModel,
    policy: dict,
    *,
    heads: int = 2,
    state_value: bool = True,
    separate_trunk: bool = True,
    scale: float = 1.0,
    bias: float = 0.0,
) -> dict:
    """Params {"policy", "value": {"trunk", "q", "v"}} for `text_values`.

    Args:
      policy: the language model's params, which the policy starts from, and a copy of them the values' trunk.
      heads: Q heads; 1 for Monte-Carlo values, 2 for ILQL.
      state_value: whether there is a V head.
      separate_trunk: False: the heads read the policy's hidden states, and their losses train its trunk.
      scale, bias: of the heads, see `init_q_heads`.

    The key is consumed.
    """
    width, vocabulary = lm.config.width, lm.config.vocab_size
    key_q, key_v = jax.random.split(key)
    value = {"q": init_q_heads(key_q, width, vocabulary, heads=heads, scale=scale, bias=bias)}
    if state_value:
        value["v"] = init_q_heads(key_v, width, 1, heads=1, scale=scale, bias=bias)
    if separate_trunk:
        # A copy: two names of one array could not both be donated.
        value["trunk"] = jax.tree.map(jnp.copy, policy)
    return {"policy": policy, "value": value}


def text_values(
    lm: LanguageModel,
    *,
    states: FindStates = turn_states,
    temperature: jax.Array | float = 1.0,
    cql_temperature: jax.Array | float = 1.0,
    double: bool = True,
    chunk_size: int | None = None,
) -> TextValues:
    """`evaluate` of `ilql` on text and its target network, for params of `init_text_values`.

    Args:
      states: `turn_states` or `branch_states`: which inputs the batches hold.
      temperature: of the policy that is cloned, that of the samples in the data; the values know none.
      cql_temperature: of the softmax over Q in the CQL term.
      double: with bootstrap "max", the network in training chooses the best token and the target values it (double
        Q-learning); False: the target does both.
      chunk_size: positions whose values of the whole vocabulary are held at a time; None: as many as suit a CPU.

    The target network is a copy of the trunk and the Q heads; V has none. With a trunk in common the copy is of the
    policy's. What a config does not ask for is not computed, under jit.
    """

    def trunk_of(params: dict) -> dict:
        return params["value"].get("trunk", params["policy"])

    def evaluate(params: dict, inputs: PyTree) -> ilql.Evaluation:
        value, of_policy = params["value"], states(lm, params["policy"], inputs)
        read = states(lm, value["trunk"], inputs) if "trunk" in value else of_policy
        logp = token_logprobs(
            of_policy.before,
            lm.embedding(params["policy"]),
            of_policy.token,
            temperature=temperature,
            softcap=lm.config.logit_softcap,
            chunk_size=chunk_size,
        ).logp
        return ilql.Evaluation(
            taken=q_of_tokens(value["q"], read.before, read.token),
            value=state_value(value["v"], read.before) if "v" in value else None,
            log_softmax=q_log_softmax(
                value["q"], read.before, read.token, temperature=cql_temperature, chunk_size=chunk_size
            ),
            logp=logp,
            final=state_value(value["v"], read.final) if "v" in value else None,
        )

    def target_of(params: dict) -> dict:
        return {"trunk": trunk_of(params), "q": params["value"]["q"]}

    def evaluate_target(target: dict, inputs: PyTree, params: dict) -> ilql.Evaluation:
        read = states(lm, target["trunk"], inputs)
        chooser = states(lm, trunk_of(params), inputs) if double else read
        heads = params["value"]["q"] if double else target["q"]

        def best(hidden: jax.Array, chosen_by: jax.Array) -> jax.Array:
            token, _ = best_token(heads, chosen_by, chunk_size=chunk_size or 256)
            return jnp.min(q_of_tokens(target["q"], hidden, token), axis=0)

        return ilql.Evaluation(
            taken=q_of_tokens(target["q"], read.before, read.token),
            best=best(read.before, chooser.before),
            final=best(read.final, chooser.final),
        )

    return TextValues(evaluate, target_of, evaluate_target)


def guide_params(params: dict, beta: jax.Array | float) -> dict:
    """Params of `rlhfjax.generation.guided` from trained ones: the policy, guided by the values.

    beta: nats per unit of reward. With a trunk of the values' own, `guided(lm, trunk=lm)`; otherwise `guided(lm)`.
    """
    return {"base": params["policy"], "guide": params["value"], "beta": jnp.asarray(beta, jnp.float32)}


# ---- the policy itself as Q, for `soft_q`


class SoftInputs(NamedTuple):
    """Inputs of `text_soft_q`: the text, and what the reference makes of it."""

    text: PyTree  # Turns or Branches
    normaliser_ref: jax.Array  # float32 [...], logsumexp of the reference's logits where each token is chosen
    final_ref: jax.Array  # float32 [B] or [B, G], the same after the last token


def text_soft_q(
    lm: LanguageModel,
    *,
    states: FindStates = turn_states,
    temperature: jax.Array | float = 1.0,
    chunk_size: int | None = None,
) -> Callable[[dict, SoftInputs], soft_q.Evaluation]:
    """`evaluate` of `soft_q` on text: params are the language model's, whose logits are Q / beta + log ref, shifted.

    V(s) / beta is logsumexp of the logits less that of the reference's, so the optimum has the logits of the reference
    plus Q* / beta, and a policy that starts as the reference starts with V = 0 (the shift of ShiQ, arXiv 2505.11081).

    `temperature` divides the logits of policy and reference alike: the KL is between the two sampled at it. The batch
    must be made at the same one.
    """

    def evaluate(params: dict, inputs: SoftInputs) -> soft_q.Evaluation:
        logp, normaliser, final = _normalised(lm, params, inputs.text, states, temperature, chunk_size)
        return soft_q.Evaluation(logp, normaliser - inputs.normaliser_ref, final - inputs.final_ref)

    return evaluate


def soft_batch(
    lm: LanguageModel,
    reference: dict,
    episodes: ilql.Episodes,
    *,
    states: FindStates = turn_states,
    temperature: jax.Array | float = 1.0,
    chunk_size: int | None = None,
) -> soft_q.Batch:
    """The batch of `soft_q` from episodes of text: what the reference makes of them is computed here, once."""
    logp_ref, normaliser, final = _normalised(lm, reference, episodes.inputs, states, temperature, chunk_size)
    inputs = SoftInputs(episodes.inputs, normaliser, final)
    return soft_q.Batch(inputs, logp_ref, episodes.reward, episodes.mask, episodes.truncated)


def _normalised(lm: LanguageModel, params: dict, text, states: FindStates, temperature, chunk_size):
    """Log-probability of the tokens and logsumexp of logits / temperature, [...], and that after the last token."""
    found = states(lm, params, text)
    embedding, softcap = lm.embedding(params), lm.config.logit_softcap

    def of(hidden: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
        logp = token_logprobs(
            hidden, embedding, token, temperature=temperature, softcap=softcap, chunk_size=chunk_size
        ).logp
        # logit - logp is the normaliser, and a single token's logit needs no array over the vocabulary.
        logit = jnp.sum(hidden.astype(jnp.float32) * embedding[token].astype(jnp.float32), axis=-1)
        if softcap is not None:
            logit = softcap * jnp.tanh(logit / softcap)
        return logp, logit / temperature - logp

    logp, normaliser = of(found.before, found.token)
    _, final = of(found.final, jnp.zeros(found.final.shape[:-1], jnp.int32))
    return logp, normaliser, final


def soft_q_batch(lm: LanguageModel, *, temperature: jax.Array | float = 1.0) -> AsBatch:
    """Rollouts for `soft_q`, on policy, with `text_soft_q(lm, states=branch_states)`: for `make_rlhf`.

    `temperature` is that of the rollout, to be given to `text_soft_q` too.
    """

    def as_batch(state, frozen, branches: Branches, generation: Generation, score_BG: jax.Array):
        del state, generation
        episodes = rated_episodes(branches, score_BG)
        return soft_batch(lm, frozen.reference, episodes, states=branch_states, temperature=temperature)

    return as_batch


def value_batch() -> AsBatch:
    """Rollouts for `ilql`, on policy, with `text_values(lm, states=branch_states)`: for `make_rlhf`.

    With bootstrap "sarsa" and no policy loss this is TD(lambda) of the frozen policy's values.
    """

    def as_batch(state, frozen, branches: Branches, generation: Generation, score_BG: jax.Array):
        del state, frozen, generation
        return rated_episodes(branches, score_BG)

    return as_batch


# ---- episodes


def rated_episodes(branches: Branches, score_BG: jax.Array) -> ilql.Episodes:
    """Completions with a score each, [B, G], as episodes: the score is the reward of the last token.

    A score that is not finite leaves its completion out.
    """
    mask_BGC, finished_BG = branches.completion_mask_BGC, jnp.ones(score_BG.shape, bool)
    return ilql.Episodes(branches, end_of_sequence_reward(score_BG, mask_BGC, finished=finished_BG), mask_BGC)


def turn_episodes(
    episodes: Sequence[Sequence[Turn]], length: int, *, truncated: Sequence[bool] | None = None
) -> ilql.Episodes:
    """Episodes of turns as padded rows, on the host: what a dataset of games becomes.

    Args:
      episodes: turns in order. The first token of each episode, e.g. a begin-of-text, must not be the agent's: no
        state stands before it to choose it in.
      length: tokens of a row, T + 1.
      truncated: whether each episode was cut short, and so bootstraps; None: none was.

    The reward of a turn is that of its last token. Raises ValueError, with the episode's number, where one has no
    token of the agent, begins with one, is longer than `length`, or has a reward where the agent said nothing.

    >>> game = [Turn([0, 5], False), Turn([7], True, 1.0)]  # the world says 0 5, the agent 7, and is rewarded
    >>> episodes = turn_episodes([game], length=4)
    >>> episodes.mask.tolist(), episodes.reward.tolist()
    ([[False, True, False]], [[0.0, 1.0, 0.0]])
    """
    shape = (len(episodes), length)
    token_BN, reward_BN = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    real_BN, agent_BN = np.zeros(shape, bool), np.zeros(shape, bool)
    for i, turns in enumerate(episodes):
        end = 0
        for turn in turns:
            start, end = end, end + len(turn.tokens)
            if end > length:
                raise ValueError(
                    f"episode {i} is longer than length={length} tokens: give more, or cut it short"
                )
            if turn.reward and not (turn.agent and turn.tokens):
                raise ValueError(
                    f"episode {i} has a reward of {turn.reward} at a turn without a token of the agent; give it to "
                    "the agent's turn that earned it"
                )
            token_BN[i, start:end], real_BN[i, start:end], agent_BN[i, start:end] = (
                turn.tokens,
                True,
                turn.agent,
            )
            reward_BN[i, end - 1] += turn.reward
        if agent_BN[i, 0]:
            raise ValueError(f"episode {i} begins with a token of the agent; put a begin-of-text before it")
        if not agent_BN[i].any():
            raise ValueError(f"episode {i} has no token of the agent, so nothing to learn from; leave it out")
    inputs = Turns(jnp.asarray(token_BN), jnp.asarray(real_BN))
    cut = None if truncated is None else jnp.asarray(np.asarray(truncated, bool))
    return ilql.Episodes(inputs, jnp.asarray(reward_BN[:, 1:]), jnp.asarray(agent_BN[:, 1:]), cut)


# ---- cloning


def text_logp(lm: LanguageModel, *, states: FindStates = turn_states) -> Callable[[dict, PyTree], jax.Array]:
    """`evaluate` of `sft` on turns or branches: log-probability of every token, float32 [...]."""

    def evaluate(params: dict, inputs: PyTree) -> jax.Array:
        found = states(lm, params, inputs)
        softcap = lm.config.logit_softcap
        return token_logprobs(found.before, lm.embedding(params), found.token, softcap=softcap).logp

    return evaluate


def cloned_episodes(episodes: ilql.Episodes, fraction: float = 1.0) -> sft.Batch:
    """The agent's tokens of the best episodes, for `sft`: behaviour cloning, filtered where fraction < 1.

    Of a whole dataset, before it is cut into batches: the `ceil(fraction * episodes)` of highest return, the sum of
    rewards, are kept; ties go to the first. The others stay as rows of weight 0. An episode with a return that is not
    finite is never kept.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must lie in (0, 1]; 1 clones all episodes")
    returns = masked_sum(episodes.reward, episodes.mask, axis=-1)
    score = jnp.where(jnp.isfinite(returns), returns, -jnp.inf).reshape(-1)
    keep = math.ceil(fraction * score.size)
    place = jnp.argsort(jnp.argsort(-score, stable=True), stable=True)
    kept = ((place < keep) & (score > -jnp.inf)).reshape(returns.shape)
    return sft.Batch(episodes.inputs, jnp.where(episodes.mask & kept[..., None], 1.0, 0.0))
