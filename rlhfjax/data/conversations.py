"""Data sets of conversations, in the fields that TRL names, and the token ids that training takes of them.

Rows of a JSON-lines file hold one of:
    messages                    a conversation; every turn of the assistant is learnt
    prompt, completion          messages before, and what the assistant answers
    prompt                      to generate from
    prompt, chosen, rejected    two answers; without `prompt` it is what both begin with
A list of messages is [{"role": ..., "content": ...}, ...]. A text in its place is what the user says in a prompt, and
what the assistant says elsewhere. (Plain text without a chat template: `load_pairs` and `read_preferences`.)

Source: https://huggingface.co/docs/trl/dataset_formats
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhfjax.data.chat import ChatTemplate, EncodedChat, Message
from rlhfjax.data.datasets import check_text, numbered_rows
from rlhfjax.data.packing import fitting_rows
from rlhfjax.data.pretrained_tokenizers import PretrainedTokenizer

__all__ = [
    "ChatPair",
    "Conversation",
    "EncodedChatPairs",
    "EncodedConversations",
    "EncodedPrompts",
    "encode_chat_pairs",
    "encode_conversations",
    "encode_prompts",
    "read_chat_pairs",
    "read_conversations",
    "read_prompts",
]


class Conversation(NamedTuple):
    """A conversation to learn from."""

    messages: Sequence[Message]
    given: int  # first messages of which nothing is learnt; 0 where every turn of the assistant is


class ChatPair(NamedTuple):
    """Two answers in a conversation, of which a judge preferred the first; each is one message."""

    prompt: Sequence[Message]
    chosen: Message
    rejected: Message


class EncodedConversations(NamedTuple):
    """Conversations for `pack([[]] * n, ids, masks=masks, ...)`; item i belongs to `row[i]` of those given."""

    ids: list[list[int]]
    masks: list[np.ndarray]  # bool, as long as the ids: what is learnt
    row: np.ndarray  # int64 [N], ascending
    dropped: int  # conversations left out because they were too long


class EncodedPrompts(NamedTuple):
    """Prompts for `pad_prompts`; item i belongs to `row[i]` of those given."""

    ids: list[list[int]]  # each ends with the opening of the assistant's turn
    row: np.ndarray  # int64 [N], ascending
    dropped: int


class EncodedChatPairs(NamedTuple):
    """Pairs for `pad_prompts` and `pad_completions`; item i belongs to `row[i]` of those given."""

    prompts: list[list[int]]  # each ends with the opening of the assistant's turn
    chosen: list[list[int]]  # each ends with the token that ends the turn
    rejected: list[list[int]]
    row: np.ndarray  # int64 [N], ascending
    dropped: int


def read_conversations(path: str | Path, *, split: str | None = None) -> list[Conversation]:
    """Rows of {messages} or {prompt, completion}; `split` keeps rows with that field "split".

    ValueError for a bad row, naming file, line and field.
    """
    return [_conversation(row, where) for where, row in _rows(path, split)]


def read_prompts(path: str | Path, *, split: str | None = None) -> list[list[Message]]:
    """Field `prompt` of each row, as messages. Errors as `read_conversations`."""
    return [_messages(row, "prompt", "user", where) for where, row in _rows(path, split)]


def read_chat_pairs(path: str | Path, *, split: str | None = None) -> list[ChatPair]:
    """Rows of {prompt, chosen, rejected} or {chosen, rejected}. Errors as `read_conversations`.

    Where chosen and rejected are lists that repeat the prompt, or there is none, it is what both begin with.
    """
    return [_pair(row, where) for where, row in _rows(path, split)]


def encode_conversations(
    template: ChatTemplate,
    tokenizer: PretrainedTokenizer,
    conversations: Sequence[Conversation],
    *,
    conversation_length: int,
    drop: bool = False,
) -> EncodedConversations:
    """Each conversation as ids, and a mask of what the assistant says in its turns and the tokens that end them.

    conversation_length: most tokens. A longer one is a ValueError that names it; with `drop` it is left out and
    counted. ValueError also for one that the template refuses, or of which nothing is learnt.
    """
    chats = []
    for row, (messages, given) in enumerate(conversations):
        ids, assistant_N = _encoded(template, tokenizer, messages, row)
        if given:
            before, _ = _encoded(template, tokenizer, messages[:given], row)
            assistant_N[: _common(before, ids)] = False
        if not assistant_N.any():
            raise ValueError(f"row {row}: the assistant says nothing, so there is nothing to learn")
        chats.append((ids, assistant_N))
    kept = fitting_rows(
        {"conversation": ([ids for ids, _ in chats], conversation_length)}, drop=drop, rows="conversations"
    )
    ids, masks = [chats[i][0] for i in kept], [chats[i][1] for i in kept]
    return EncodedConversations(ids, masks, kept, len(chats) - len(kept))


def encode_prompts(
    template: ChatTemplate,
    tokenizer: PretrainedTokenizer,
    prompts: Sequence[Sequence[Message]],
    *,
    prompt_length: int,
    drop: bool = False,
) -> EncodedPrompts:
    """Each prompt as ids that end with the opening of the assistant's turn. Errors as `encode_conversations`."""
    ids = [
        _encoded(template, tokenizer, messages, row, generate=True).ids
        for row, messages in enumerate(prompts)
    ]
    kept = fitting_rows({"prompt": (ids, prompt_length)}, drop=drop, rows="prompts")
    return EncodedPrompts([ids[i] for i in kept], kept, len(ids) - len(kept))


def encode_chat_pairs(
    template: ChatTemplate,
    tokenizer: PretrainedTokenizer,
    pairs: Sequence[ChatPair],
    *,
    prompt_length: int,
    completion_length: int,
    drop: bool = False,
) -> EncodedChatPairs:
    """Prompt and both answers of each pair: what generation from the prompt would have to draw.

    Errors as `encode_conversations`, and where the ids of the prompt are not those that the whole begins with.
    """
    prompts = encode_prompts(template, tokenizer, [pair.prompt for pair in pairs], prompt_length=2**62).ids
    answers: dict[str, list[list[int]]] = {"chosen": [], "rejected": []}
    for row, (pair, prompt) in enumerate(zip(pairs, prompts, strict=True)):
        for name, ids in answers.items():
            message = pair.chosen if name == "chosen" else pair.rejected
            chat = _encoded(template, tokenizer, [*pair.prompt, message], row)
            ids.append(_answer(chat, prompt, row, name))
    longest = [max(both, key=len) for both in zip(*answers.values(), strict=True)]
    limits = {"prompt": (prompts, prompt_length), "completion": (longest, completion_length)}
    kept = fitting_rows(limits, drop=drop)
    chosen, rejected = ([ids[i] for i in kept] for ids in answers.values())
    return EncodedChatPairs([prompts[i] for i in kept], chosen, rejected, kept, len(pairs) - len(kept))


def _answer(chat: EncodedChat, prompt: list[int], row: int, name: str) -> list[int]:
    """The ids behind the prompt, up to the token that ends the turn; what a template writes behind that is cut."""
    if chat.ids[: len(prompt)] != prompt:
        raise ValueError(
            f"row {row}: the conversation with the {name} answer does not begin with the tokens of its prompt; the "
            "chat template opens a turn otherwise than it writes one, so answers cannot be compared"
        )
    said = np.flatnonzero(chat.assistant)
    return chat.ids[len(prompt) : int(said[-1]) + 1]


def _encoded(
    template: ChatTemplate,
    tokenizer: PretrainedTokenizer,
    messages: Sequence[Message],
    row: int,
    *,
    generate: bool = False,
) -> EncodedChat:
    try:
        return template.encode(tokenizer, messages, add_generation_prompt=generate)
    except ValueError as error:
        raise ValueError(f"row {row}: {error}") from error


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences begin with alike."""
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def _rows(path: str | Path, split: str | None) -> list[tuple[str, dict[str, Any]]]:
    rows = numbered_rows(path, () if split is None else ("split",))
    chosen = [(where, row) for where, row in rows if split in (None, row.get("split"))]
    if not chosen:
        splits = sorted({row["split"] for _, row in rows})
        raise ValueError(f"{path} has no rows of split {split!r}; it has {splits}")
    return chosen


def _conversation(row: dict[str, Any], where: str) -> Conversation:
    if "messages" in row:
        messages = _messages(row, "messages", None, where)
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError(
                f"{where}: no message in 'messages' is the assistant's; there is nothing to learn"
            )
        return Conversation(messages, 0)
    if "prompt" not in row or "completion" not in row:
        raise ValueError(
            f"{where}: needs 'messages', or 'prompt' and 'completion'; the row has {sorted(row)}"
        )
    prompt = _messages(row, "prompt", "user", where)
    completion = _messages(row, "completion", "assistant", where)
    if not any(message["role"] == "assistant" for message in completion):
        raise ValueError(f"{where}: no message in 'completion' is the assistant's; there is nothing to learn")
    return Conversation([*prompt, *completion], len(prompt))


def _pair(row: dict[str, Any], where: str) -> ChatPair:
    chosen, rejected = (_messages(row, name, "assistant", where) for name in ("chosen", "rejected"))
    shared = _common(chosen, rejected)
    if shared == len(chosen) == len(rejected):
        raise ValueError(f"{where}: 'chosen' and 'rejected' are the same; drop the row")
    prompt = [] if "prompt" not in row else _messages(row, "prompt", "user", where)
    if shared and chosen[: len(prompt)] != prompt:
        raise ValueError(f"{where}: 'chosen' and 'rejected' begin alike, but not with the 'prompt'")
    prompt = chosen[:shared] or prompt
    if not prompt:
        raise ValueError(f"{where}: no field 'prompt', and 'chosen' and 'rejected' do not begin alike")
    for name, answer in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
        if [message["role"] for message in answer] != ["assistant"]:
            raise ValueError(
                f"{where}: {name!r} must end with one message of the assistant behind the prompt; it has "
                f"{[message['role'] for message in answer]}"
            )
    return ChatPair(prompt, chosen[-1], rejected[-1])


def _messages(row: dict[str, Any], field: str, speaker: str | None, where: str) -> list[Message]:
    """row[field] as checked messages; a text is what `speaker` says."""
    if isinstance(row.get(field), str) and speaker is not None:
        check_text(row, field, where=where)
        return [{"role": speaker, "content": row[field]}]
    if field not in row:
        raise ValueError(f"{where}: no field {field!r}; the row has {sorted(row)}")
    messages = row[field]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: field {field!r} must be a list of messages, it is {messages!r:.60}")
    for i, message in enumerate(messages):
        place = f"{where}: {field}[{i}]"
        if not isinstance(message, dict):
            raise ValueError(
                f'{place} must be {{"role": ..., "content": ...}}, it is {type(message).__name__}'
            )
        check_text(message, "role", where=place)
        check_text(message, "content", where=place)
    return messages
