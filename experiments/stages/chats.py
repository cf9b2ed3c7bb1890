"""Prompts and conversations for a chat model, rendered by its template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.assets import asset
from experiments.stages.configs import Text as Config
from rlhfjax.data import (
    ChatTemplate,
    Message,
    PretrainedTokenizer,
    encode_conversations,
    encode_prompts,
    read_conversations,
    read_jsonl,
    read_prompts,
)


@dataclass(frozen=True)
class Examples:
    """Pairs or conversations that fit, as texts and as ids."""

    prompts: list[str]  # of a conversation what the user said last
    references: list[str]  # the completion in the data; "" where there is none
    ids: list[list[int]]  # of the prompts, whole
    dropped: int  # left out because they were too long
    completions: list[list[int]] | None = (
        None  # ids to fine-tune on, behind the prompt; of a conversation all of it
    )
    learnt: list[np.ndarray] | None = None  # bool, of a conversation the tokens that are learnt

    def __len__(self) -> int:
        return len(self.prompts)

    def shown(self, row: int) -> dict[str, str]:
        """What a sample of the prompt numbered `row` is shown beside."""
        reference = self.references[row]
        return {"prompt": self.prompts[row]} | ({"reference": reference} if reference else {})


def load_chats(
    config: Config, tokenizer: PretrainedTokenizer, template: ChatTemplate, split: str
) -> Examples:
    """The conversations of one split that fit: a prompt within prompt_length, all of it within both lengths."""
    path = asset(config.data)
    first = read_jsonl(path)[0]
    if "messages" not in first and "completion" not in first:
        prompts = [with_system(config, prompt) for prompt in read_prompts(path, split=split)]
        found = encode_prompts(template, tokenizer, prompts, prompt_length=config.prompt_length, drop=True)
        texts = [_last(prompts[i], "user") for i in found.row]
        return Examples(texts, [""] * len(texts), found.ids, found.dropped)
    conversations = [
        c._replace(
            messages=with_system(config, c.messages),
            given=c.given + (c.given > 0 and _lacks_system(config, c.messages)),
        )
        for c in read_conversations(path, split=split)
    ]
    prompts = [c.messages[: c.given or _answer(c.messages)] for c in conversations]
    prompted = encode_prompts(template, tokenizer, prompts, prompt_length=config.prompt_length, drop=True)
    whole = encode_conversations(
        template,
        tokenizer,
        conversations,
        conversation_length=config.prompt_length + config.completion_length,
        drop=True,
    )
    prompt_at, whole_at = ({int(row): i for i, row in enumerate(x.row)} for x in (prompted, whole))
    kept = sorted(prompt_at.keys() & whole_at.keys())
    if not kept:
        raise ValueError(
            f"{path}: no conversation has a prompt within prompt_length={config.prompt_length} and all within that and "
            f"completion_length={config.completion_length} tokens; raise them"
        )
    return Examples(
        [_last(prompts[row], "user") for row in kept],
        [_last(conversations[row].messages, "assistant") for row in kept],
        [prompted.ids[prompt_at[row]] for row in kept],
        len(conversations) - len(kept),
        [whole.ids[whole_at[row]] for row in kept],
        [whole.masks[whole_at[row]] for row in kept],
    )


def _lacks_system(config: Config, messages: Sequence[Message]) -> bool:
    return config.system is not None and messages[0]["role"] != "system"


def with_system(config: Config, messages: Sequence[Message]) -> Sequence[Message]:
    """The messages, behind the configured system message where they have none."""
    if not _lacks_system(config, messages):
        return messages
    return [{"role": "system", "content": config.system}, *messages]


def _answer(messages: Sequence[Message]) -> int:
    """Where the assistant speaks last."""
    return max(i for i, message in enumerate(messages) if message["role"] == "assistant")


def _last(messages: Sequence[Message], role: str) -> Any:
    """What `role` says last."""
    return next((m["content"] for m in reversed(messages) if m["role"] == role), "")
