"""A chat model talks with a partner in Python, a simulated user, a tool or an environment, and learns from its own
turns alone.

    say = jax.jit(chat_generate(lm, chats))
    for number, (openings, key) in enumerate(batches):
        rollout = chat_rollout(chats, say, policy, openings, key, index_B=..., partner=partner, samples=8)
        score_BG = np.array([[judge(talk) for talk in talks] for talks in rollout.messages])
        state, metrics = learn(state, frozen, rollout.branches, rollout.generation, score_BG, key)  # `make_learn`

The loop is the host's, as the partner is: one compiled program for each length of a turn's context. A row of the
result is the opening and all that followed. What the model said stays the tokens that it drew, with their
log-probabilities, and is never read as text and encoded again. What stands between two of its turns is what the chat
template writes there: the end of a turn that has none of its own, the partner's message, the opening of the next turn.
Those tokens are context: seen, and no actions.

Shapes: B conversations, G samples of each, P prompt length, C completion length, R rows of one call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.data import ChatTemplate, PretrainedTokenizer, end_of_turn, pad_completions, pad_prompts
from rlhfjax.data.chat import Message
from rlhfjax.generation import Generation, Sampling, generate, sample_keys
from rlhfjax.networks import Branches, LanguageModel

Partner = Callable[[list[list[Message]]], Sequence[str | None]]
# (params, prompt_RP, prompt_mask_RP, key_R1) -> one turn of each row, [R, 1, C]
Say = Callable[[Any, jax.Array, jax.Array, jax.Array], Generation]

# Stands for what the model said wherever the template is asked what it writes around it. It is what a template that
# rewrites earlier turns rewrites; and what the model said itself may be nothing, or not to be encoded.
_SAID = "<think>\nI see.\n</think>\n\nYes."


@dataclass(frozen=True)
class Chats:
    """What all conversations of a run have in common."""

    template: ChatTemplate
    """Of the model. It must end the assistant's turns with a special token, and leave earlier turns as they were."""
    tokenizer: PretrainedTokenizer
    """Of the model."""
    turns: int
    """Most turns of the assistant in a conversation."""
    max_new_tokens: int
    """Most tokens of one such turn, its end included."""
    prompt_length: int
    """Tokens that openings are padded to, P; a longer one is an error."""
    completion_length: int
    """Tokens that all behind the opening is padded to, C, the partner's and the template's included."""
    context_lengths: tuple[int, ...]
    """Tokens, ascending, that what stands before a turn is padded to: the first that holds it. One program each."""
    rows: int | None = None
    """Conversations that speak in one call, R, so that memory is bounded; None: all B * G."""
    partner_role: str = "user"
    """Role of the partner's messages, as the template knows it."""


class ChatRollout(NamedTuple):
    """Conversations, each from its opening to the assistant's last word.

    `generation.finished_BG`: the assistant ended its last turn by itself, and the conversation did not run out of room.
    A conversation that is not `ended_BG` took all its turns (`turns_BG` equals `Chats.turns`), or ran out of room: the
    next turn might not have fitted `completion_length` or the longest context. The partner's last message is then
    dropped, as the assistant never read it.

    For `ppo_batch`, `grpo_batch`, `best_worst_pairs` and `best_of_samples`. The batches of values, of soft Q-learning
    and of single judgements take all that is seen for actions, the partner's words too, and are not for it.
    """

    branches: Branches  # completion_mask True on all tokens behind the opening, whoever wrote them
    generation: Generation  # mask True on the assistant's own tokens only; log-probabilities are 0 elsewhere
    messages: list[list[list[Message]]]  # [B][G], the opening's first, the last one the assistant's
    turns_BG: np.ndarray  # int32, turns that the assistant took
    ended_BG: np.ndarray  # bool, the partner ended it


class _Tokens(NamedTuple):
    """A piece of a completion."""

    ids: list[int]
    mask: np.ndarray  # bool, as long as `ids` like the others: the assistant drew it
    logp: np.ndarray  # float32
    plain_logp: np.ndarray  # float32


class _Talk(NamedTuple):
    """A conversation so far."""

    name: str
    opening: Sequence[Message]
    messages: list[Message]  # behind the opening
    prompt: list[int]
    pieces: list[_Tokens]
    turns: int = 0
    finished: bool = False  # a stop token ended the last turn
    ended: bool = False
    full: bool = False  # there is no room for another turn

    @property
    def length(self) -> int:
        """Tokens behind the opening."""
        return sum(len(piece.ids) for piece in self.pieces)


def chat_generate(
    lm: LanguageModel,
    chats: Chats,
    *,
    temperature: jax.Array | float = 1.0,
    banned_tokens: Sequence[int] = (),
) -> Say:
    """One turn of the assistant, `(params, prompt_RP, prompt_mask_RP, key_R1) -> Generation`; pure, for the caller to
    jit.

    It stops at the template's end of turn and the tokenizer's stop tokens. Ids that no token has are never drawn, nor
    are `banned_tokens`, e.g. special tokens that open turns; the plain distribution, whose log-probabilities are learnt
    from, still has them. With LoRA the base is an argument:

        say = jax.jit(lambda params, *x: chat_generate(adapted(lm, params[0], lora), chats)(params[1], *x))

    ValueError where the model has fewer ids than the tokenizer, or positions than the longest context and a turn, and
    where the template refuses a plain conversation.
    """
    longest, positions = max(chats.context_lengths, default=0) + chats.max_new_tokens, lm.config.max_positions
    if longest > positions:
        raise ValueError(
            f"the longest of context_lengths and max_new_tokens={chats.max_new_tokens} are {longest} tokens, the model "
            f"has max_positions={positions}; shorten one of them"
        )
    stops = end_of_turn(chats.template, chats.tokenizer)
    banned = (*chats.tokenizer.unused_tokens(lm.config.vocab_size), *banned_tokens)

    def say(params: Any, prompt_RP: jax.Array, prompt_mask_RP: jax.Array, key_R1: jax.Array) -> Generation:
        sampling = Sampling(temperature, banned_tokens=jnp.asarray(banned, jnp.int32) if banned else None)
        return generate(
            lm,
            params,
            prompt_RP,
            prompt_mask_RP,
            key_R1,
            max_new_tokens=chats.max_new_tokens,
            stop_tokens=stops,
            sampling=sampling,
        )

    return say


def chat_rollout(
    chats: Chats,
    say: Say,
    params: Any,
    openings: Sequence[Sequence[Message]],
    key: jax.Array,
    *,
    index_B: np.ndarray | jax.Array,
    partner: Partner,
    samples: int,
) -> ChatRollout:
    """G conversations from each opening, all at the same time, turn by turn.

    Args:
      say: `chat_generate`, jitted.
      params: what `say` takes.
      openings: messages before the assistant's first turn, B of them.
      key: consumed. A turn's key derives from the conversation's number, the sample and the turn, so a conversation
        depends neither on those beside it nor on how a batch was split.
      index_B: int32, the conversations' own numbers.
      partner: `partner(conversations) -> replies`, called once a turn with all conversations that go on, in order, as
        lists of messages of its own. A reply is a text, or None to end the conversation there. It is not called after
        the last turn. What it raises comes out.

    Raises ValueError, naming the conversation, for an opening that does not fit or that the template refuses; for
    replies of a wrong number or that are no texts; for a template that writes earlier turns otherwise than they were
    said (as those do that drop reasoning), or that ends turns with no special token; and for settings that do not fit.
    """
    talks = _opened(chats, openings, index_B, samples)
    stops = end_of_turn(chats.template, chats.tokenizer)
    key_N = sample_keys(key, jnp.asarray(index_B, jnp.int32), samples).reshape(-1)
    live = list(range(len(talks)))
    for turn in range(chats.turns):
        key_turn_N = jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_N, turn)
        for n, said in _said(chats, say, params, talks, live, key_turn_N):
            talks[n] = _spoken(chats, talks[n], said, stops)
        if turn + 1 == chats.turns:
            break
        for n, reply in zip(live, _replies(partner, talks, live), strict=True):
            talks[n] = _answered(chats, talks[n], reply, stops)
        live = [n for n in live if not talks[n].ended and not talks[n].full]
        if not live:
            break
    return _as_rollout(chats, talks, samples)


def _opened(chats: Chats, openings, index_B, samples: int) -> list[_Talk]:
    """The conversations before anything is said, [B * G]."""
    _check(chats, len(openings), np.shape(index_B), samples)
    limit = min(chats.prompt_length, chats.context_lengths[-1])
    talks = []
    for b, opening in enumerate(openings):
        try:
            prompt = chats.template.encode(chats.tokenizer, opening, add_generation_prompt=True).ids
        except ValueError as error:
            raise ValueError(f"opening {b}: {error}") from error
        if len(prompt) > limit:
            raise ValueError(
                f"opening {b} has {len(prompt)} tokens, prompt_length is {chats.prompt_length} and the longest of "
                f"context_lengths {chats.context_lengths[-1]}; raise them or shorten the opening"
            )
        talks += [_Talk(f"opening {b}, sample {g}", opening, [], prompt, []) for g in range(samples)]
    return talks


def _check(chats: Chats, count: int, numbers: tuple[int, ...], samples: int) -> None:
    rows = 1 if chats.rows is None else chats.rows
    for name, value in (("turns", chats.turns), ("rows", rows), ("samples", samples), ("openings", count)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if numbers != (count,):
        raise ValueError(f"index_B must hold one number an opening, [{count}], it has shape {list(numbers)}")
    lengths = chats.context_lengths
    if not lengths or lengths[0] < 1 or list(lengths) != sorted(set(lengths)):
        raise ValueError(f"context_lengths={lengths} must be ascending lengths of at least 1 token")
    if chats.max_new_tokens > chats.completion_length:
        raise ValueError(
            f"max_new_tokens={chats.max_new_tokens} of a turn do not fit completion_length={chats.completion_length}; "
            "it must hold all turns"
        )
    if chats.partner_role == "assistant":
        raise ValueError('partner_role="assistant" is the model\'s own; name the role of the partner')


def _said(chats: Chats, say: Say, params, talks: list[_Talk], live: list[int], key_N: jax.Array):
    """What each of the live conversations says next: (its number, one row of a `Generation`), short contexts first.

    Every call has as many rows as any other; missing ones repeat the first, so that they end with it."""
    rows = min(chats.rows or len(talks), len(talks))
    contexts = {n: [*talks[n].prompt, *(i for piece in talks[n].pieces for i in piece.ids)] for n in live}
    order = sorted(live, key=lambda n: len(contexts[n]))
    calls = []
    for start in range(0, len(order), rows):
        some = order[start : start + rows]
        filled = some + [some[0]] * (rows - len(some))
        length = next(x for x in chats.context_lengths if x >= len(contexts[some[-1]]))
        prompt_RP, mask_RP = pad_prompts([contexts[n] for n in filled], length, chats.tokenizer.pad_id)
        key_R1 = key_N[np.asarray(filled)][:, None]
        calls.append((some, say(params, jnp.asarray(prompt_RP), jnp.asarray(mask_RP), key_R1)))
    for some, out in calls:  # fetched when all are under way
        out = jax.device_get(out)
        if out.token_BGC.shape != (rows, 1, chats.max_new_tokens):
            raise ValueError(
                f"say gave tokens of shape {out.token_BGC.shape} for {rows} rows of one turn of "
                f"max_new_tokens={chats.max_new_tokens}; make it by `chat_generate` of the same `Chats`"
            )
        for r, n in enumerate(some):
            yield n, Generation(*(x[r, 0] for x in out))


def _spoken(chats: Chats, talk: _Talk, said: Generation, stops: tuple[int, ...]) -> _Talk:
    """The conversation with the assistant's turn, its tokens as they were drawn."""
    mask_C = np.asarray(said.mask_BGC)
    ids = [int(i) for i in said.token_BGC[mask_C]]
    logp_C, plain_logp_C = np.asarray(said.logp_BGC), np.asarray(said.plain_logp_BGC)
    piece = _Tokens(ids, mask_C[mask_C], logp_C[mask_C], plain_logp_C[mask_C])
    text = chats.tokenizer.decode(ids[:-1] if ids[-1] in stops else ids)
    return talk._replace(
        messages=[*talk.messages, {"role": "assistant", "content": text}],
        pieces=[*talk.pieces, piece],
        turns=talk.turns + 1,
        finished=bool(said.finished_BG),
    )


def _replies(partner: Partner, talks: list[_Talk], live: list[int]) -> Sequence[str | None]:
    """One checked reply for each live conversation. The partner gets copies, so that it changes nothing of ours."""
    replies = partner([[dict(message) for message in (*talks[n].opening, *talks[n].messages)] for n in live])
    if not isinstance(replies, list | tuple) or len(replies) != len(live):
        found = f"{len(replies)} replies" if isinstance(replies, list | tuple) else type(replies).__name__
        raise ValueError(
            f"partner gave {found} to {len(live)} conversations; it must return a list of one a conversation"
        )
    for n, reply in zip(live, replies, strict=True):
        if reply is not None and not isinstance(reply, str):
            raise ValueError(
                f"{talks[n].name}, turn {talks[n].turns}: partner replied {reply!r:.60}; a reply is a text, or None to "
                "end the conversation"
            )
    return replies


def _answered(chats: Chats, talk: _Talk, reply: str | None, stops: tuple[int, ...]) -> _Talk:
    """The conversation up to its next turn, or as it was where it is over."""
    if reply is None:
        return talk._replace(ended=True)
    messages = [*talk.messages, {"role": chats.partner_role, "content": reply}]
    try:
        ids = _between(chats, talk.opening, messages, talk.pieces[-1].ids[-1], stops)
    except ValueError as error:
        raise ValueError(f"{talk.name}, turn {talk.turns}: {error}") from error
    length = talk.length + len(ids)
    if (
        length + chats.max_new_tokens > chats.completion_length
        or len(talk.prompt) + length > chats.context_lengths[-1]
    ):
        return talk._replace(full=True)
    nothing = np.zeros(len(ids), np.float32)
    piece = _Tokens(ids, nothing.astype(bool), nothing, nothing)
    return talk._replace(messages=messages, pieces=[*talk.pieces, piece])


def _between(
    chats: Chats,
    opening: Sequence[Message],
    messages: Sequence[Message],
    last: int,
    stops: tuple[int, ...],
) -> list[int]:
    """What the template writes from the assistant's last token `last` to the opening of its next turn, as ids.

    Cut from the encoding of the whole conversation, behind the token that ends the last turn; with that token where the
    model did not draw it.
    """
    spoken = [{**m, "content": _SAID} if m["role"] == "assistant" else m for m in messages]
    whole = [*opening, *spoken]
    before = chats.template.render(whole[:-2], add_generation_prompt=True)
    text = chats.template.render(whole, add_generation_prompt=True)
    if not text.startswith(before) or not text[len(before) :].lstrip().startswith(_SAID):
        raise ValueError(
            "the chat template writes earlier turns otherwise than they were said (it drops reasoning, or moves what "
            "stands before the last message), so that the model would be trained on what it never saw; give a "
            "ChatTemplate that leaves them as they were"
        )
    ids, assistant_T = chats.template.encode(chats.tokenizer, whole, add_generation_prompt=True)
    end = int(np.flatnonzero(assistant_T)[-1])
    start = int(np.flatnonzero(~assistant_T[:end])[-1]) + 1
    # A template may mark the content alone as the assistant's, with the end right behind it.
    ends = [i for i in range(start, end + 2) if ids[i] in stops]
    if not ends:
        raise ValueError(
            "the chat template ends the assistant's turn with no special token, so that it cannot be told where a turn "
            "ends; give a template that does, or load the tokenizer with that token as its eos="
        )
    return ids[ends[0] + (ids[ends[0]] == last) :]


def _as_rollout(chats: Chats, talks: list[_Talk], samples: int) -> ChatRollout:
    first, length, shape = talks[::samples], chats.completion_length, (-1, samples)
    prompt_BP, prompt_mask_BP = pad_prompts(
        [talk.prompt for talk in first], chats.prompt_length, chats.tokenizer.pad_id
    )
    ids = [[i for piece in talk.pieces for i in piece.ids] for talk in talks]
    token_NC, visible_NC = pad_completions(ids, length, 0)

    def placed(name: str) -> jax.Array:
        x_NC = np.zeros(visible_NC.shape, getattr(talks[0].pieces[0], name).dtype)
        x_NC[visible_NC] = np.concatenate([getattr(piece, name) for talk in talks for piece in talk.pieces])
        return jnp.asarray(x_NC.reshape(*shape, length))

    finished_N = np.array([talk.finished and not talk.full for talk in talks])
    token_BGC = jnp.asarray(token_NC.reshape(*shape, length))
    generation = Generation(
        token_BGC=token_BGC,
        mask_BGC=placed("mask"),
        logp_BGC=placed("logp"),
        plain_logp_BGC=placed("plain_logp"),
        finished_BG=jnp.asarray(finished_N.reshape(shape)),
    )
    visible_BGC = jnp.asarray(visible_NC.reshape(*shape, length))
    messages = [[*talk.opening, *talk.messages] for talk in talks]
    return ChatRollout(
        branches=Branches(jnp.asarray(prompt_BP), jnp.asarray(prompt_mask_BP), token_BGC, visible_BGC),
        generation=generation,
        messages=[messages[n : n + samples] for n in range(0, len(talks), samples)],
        turns_BG=np.array([talk.turns for talk in talks], np.int32).reshape(shape),
        ended_BG=np.array([talk.ended for talk in talks]).reshape(shape),
    )
