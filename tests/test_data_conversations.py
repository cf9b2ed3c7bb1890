"""Data sets of conversations: every form of row, what is learnt of it, and errors that name file, line and field."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizers import KINDS, ROLES, TOKENIZERS

from rlhfjax.data import (
    CHATML,
    ChatPair,
    ChatTemplate,
    Conversation,
    encode_chat_pairs,
    encode_conversations,
    encode_prompts,
    pack,
    pad_completions,
    pad_prompts,
    read_chat_pairs,
    read_conversations,
    read_prompts,
)

TOKENIZER, INNER = TOKENIZERS["byte"], KINDS["byte"]
TEMPLATE = ChatTemplate(CHATML, ROLES)
USER, ANSWER = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}
AGAIN, OTHER = {"role": "user", "content": "the dog"}, {"role": "assistant", "content": "is 4"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text(ids) -> str:
    return INNER.decode(list(ids), skip_special_tokens=False)


def learnt(ids, mask) -> list[str]:
    """The text of each run of learnt tokens."""
    starts = np.flatnonzero(np.diff(np.asarray(mask, int), prepend=0, append=0))
    return [text(ids[a:b]) for a, b in starts.reshape(-1, 2)]


def test_conversations_are_read_in_every_form(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"messages": [USER, ANSWER, AGAIN, OTHER], "split": "train"},
        {"prompt": [USER, ANSWER, AGAIN], "completion": [OTHER], "split": "train"},
        {"prompt": [USER], "completion": "sat", "split": "test"},
        {"prompt": "the cat", "completion": "sat", "split": "train"},
    )
    expected = [
        Conversation([USER, ANSWER, AGAIN, OTHER], 0),
        Conversation([USER, ANSWER, AGAIN, OTHER], 3),
        Conversation([USER, ANSWER], 1),
        Conversation([USER, ANSWER], 1),
    ]
    assert read_conversations(path) == expected
    assert read_conversations(path, split="test") == expected[2:3]
    with pytest.raises(ValueError, match=r"'dev'; it has \['test', 'train'\]"):
        read_conversations(path, split="dev")


def test_prompts_and_pairs_are_read_in_every_form(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": [USER]}, {"prompt": "the cat"})
    assert read_prompts(path) == [[USER], [USER]]
    path = write(
        tmp_path / "b.jsonl",
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": "the cat", "chosen": "sat", "rejected": "is 4"},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "the cat", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    )
    assert read_chat_pairs(path) == [ChatPair([USER], ANSWER, OTHER)] * 4


@pytest.mark.parametrize(
    "read, row, message",
    [
        (read_conversations, {"text": "a"}, "needs 'messages', or 'prompt' and 'completion'"),
        (read_conversations, {"messages": []}, "field 'messages' must be a list of messages"),
        (read_conversations, {"messages": "a"}, "field 'messages' must be a list"),
        (read_conversations, {"messages": [USER]}, "no message in 'messages' is the assistant's"),
        (read_conversations, {"messages": [USER, "a"]}, r"messages\[1\] must be .* it is str"),
        (
            read_conversations,
            {"messages": [USER, {"role": "assistant"}]},
            r"messages\[1\]: no field 'content'",
        ),
        (
            read_conversations,
            {"messages": [{"role": 1, "content": "a"}]},
            r"messages\[0\]: field 'role' must",
        ),
        (read_conversations, {"messages": [USER, ANSWER | {"content": " "}]}, r"\[1\]: empty 'content'"),
        (read_conversations, {"prompt": "a", "completion": [USER]}, "no message in 'completion'"),
        (read_prompts, {"messages": [USER]}, "no field 'prompt'"),
        (read_prompts, {"prompt": ""}, "empty 'prompt'"),
        (read_chat_pairs, {"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
        (read_chat_pairs, {"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        (read_chat_pairs, {"chosen": "a", "rejected": "b"}, "no field 'prompt', and"),
        (
            read_chat_pairs,
            {"prompt": [AGAIN], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            "not with",
        ),
        (read_chat_pairs, {"chosen": [USER, ANSWER], "rejected": [USER]}, "'rejected' must end with one"),
        (
            read_chat_pairs,
            {"prompt": [USER], "chosen": [ANSWER, AGAIN, OTHER], "rejected": [OTHER]},
            "'chosen' must end with one",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, read, row, message):
    good = {"messages": [USER, ANSWER], "prompt": "p", "completion": "c", "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match=f"bad.jsonl:2: .*{message}|bad.jsonl:2: {message}"):
        read(write(tmp_path / "bad.jsonl", good, row))


def test_every_turn_of_the_assistant_is_learnt_or_the_completion_alone():
    both = [USER, ANSWER, AGAIN, OTHER]
    encoded = encode_conversations(
        TEMPLATE, TOKENIZER, [Conversation(both, 0), Conversation(both, 3)], conversation_length=99
    )
    assert text(encoded.ids[0]) == text(encoded.ids[1]) == TEMPLATE.render(both)
    assert learnt(encoded.ids[0], encoded.masks[0]) == ["sat<|im_end|>", "is 4<|im_end|>"]
    assert learnt(encoded.ids[1], encoded.masks[1]) == ["is 4<|im_end|>"]
    assert encoded.row.tolist() == [0, 1] and encoded.dropped == 0


def test_packed_conversations_learn_the_assistants_tokens_and_no_others():
    """Two to a row, with EOS as padding; every target is told by hand."""
    talks = [Conversation([USER, ANSWER, AGAIN, OTHER], 0), Conversation([AGAIN, OTHER], 1)] * 2
    encoded = encode_conversations(TEMPLATE, TOKENIZER, talks, conversation_length=99)
    length = len(encoded.ids[0]) + len(encoded.ids[1]) + 3
    packed = pack([[]] * 4, encoded.ids, length=length, pad_id=TOKENIZER.eos_id, masks=encoded.masks)
    assert packed.token_RT.shape == (2, length + 1)
    target_RT = packed.token_RT[:, 1:]
    for row in range(2):
        turns = ["sat<|im_end|>", "is 4<|im_end|>", "is 4<|im_end|>"]
        assert learnt(target_RT[row], packed.completion_RT[row]) == turns
    assert not (packed.completion_RT & packed.prompt_RT).any()
    # Every target of a sequence is one or the other: all its tokens but the first.
    assert (packed.completion_RT | packed.prompt_RT).sum() == sum(len(ids) - 1 for ids in encoded.ids)


def test_masks_hide_tokens_of_packed_completions():
    packed = pack(
        [[1, 2], []], [[3, 4, 5], [6, 7]], length=8, pad_id=0, masks=[[True, False, True], [True, True]]
    )
    assert packed.token_RT.tolist() == [[1, 2, 3, 4, 5, 6, 7, 0, 0]]
    assert packed.token_RT[:, 1:][packed.completion_RT].tolist() == [3, 5, 7]
    assert packed.token_RT[:, 1:][packed.prompt_RT].tolist() == [2, 4]
    with pytest.raises(ValueError, match="masks must be one a completion: 1 of 2"):
        pack([[1], [1]], [[2], [3]], length=8, pad_id=0, masks=[[True]])
    with pytest.raises(ValueError, match="sequence 1: its mask has 2 places, its completion 1 tokens"):
        pack([[1], [1]], [[2], [3]], length=8, pad_id=0, masks=[[True], [True, True]])


def test_prompts_end_with_the_opening_of_the_assistants_turn():
    encoded = encode_prompts(TEMPLATE, TOKENIZER, [[USER], [USER, ANSWER, AGAIN]], prompt_length=99)
    token_BP, mask_BP = pad_prompts(encoded.ids, 99, TOKENIZER.pad_id)
    for row, messages in enumerate(([USER], [USER, ANSWER, AGAIN])):
        assert text(token_BP[row][mask_BP[row]]) == TEMPLATE.render(messages, add_generation_prompt=True)
    assert mask_BP[:, -1].all()


def test_pairs_are_what_generation_from_their_prompt_would_draw():
    encoded = encode_chat_pairs(
        TEMPLATE, TOKENIZER, [ChatPair([USER], ANSWER, OTHER)], prompt_length=99, completion_length=9
    )
    assert text(encoded.prompts[0]) == TEMPLATE.render([USER], add_generation_prompt=True)
    assert [text(encoded.chosen[0]), text(encoded.rejected[0])] == ["sat<|im_end|>", "is 4<|im_end|>"]
    token_BT, mask_BT = pad_completions([*encoded.chosen, *encoded.rejected], 9, TOKENIZER.pad_id)
    assert mask_BT.sum(axis=1).tolist() == [len(encoded.chosen[0]), len(encoded.rejected[0])]
    assert token_BT[0, 0] == encoded.chosen[0][0]


def test_too_long_is_an_error_or_dropped_and_counted():
    talks = [Conversation([USER, ANSWER, AGAIN, OTHER], 0), Conversation([USER, ANSWER], 0)]
    sizes = [len(ids) for ids in encode_conversations(TEMPLATE, TOKENIZER, talks, conversation_length=99).ids]
    with pytest.raises(
        ValueError, match=f"row 0: the conversation has {sizes[0]} tokens and conversation_length is"
    ):
        encode_conversations(TEMPLATE, TOKENIZER, talks, conversation_length=sizes[1])
    encoded = encode_conversations(TEMPLATE, TOKENIZER, talks, conversation_length=sizes[1], drop=True)
    assert (encoded.row.tolist(), encoded.dropped, len(encoded.masks[0])) == ([1], 1, sizes[1])
    prompts = [[USER, ANSWER, AGAIN], [USER]]
    size = len(encode_prompts(TEMPLATE, TOKENIZER, prompts[1:], prompt_length=99).ids[0])
    short = encode_prompts(TEMPLATE, TOKENIZER, prompts, prompt_length=size, drop=True)
    assert (short.row.tolist(), short.dropped) == ([1], 1)
    with pytest.raises(ValueError, match="none of 2 prompts has at most prompt_length=3 tokens"):
        encode_prompts(TEMPLATE, TOKENIZER, prompts, prompt_length=3, drop=True)
    pairs = [ChatPair([USER], ANSWER, OTHER), ChatPair([USER], ANSWER, ANSWER | {"content": "sat " * 9})]
    with pytest.raises(ValueError, match="row 1: the completion has"):
        encode_chat_pairs(TEMPLATE, TOKENIZER, pairs, prompt_length=99, completion_length=9)
    kept = encode_chat_pairs(TEMPLATE, TOKENIZER, pairs, prompt_length=99, completion_length=9, drop=True)
    assert (kept.row.tolist(), kept.dropped) == ([0], 1)


def test_conversations_that_cannot_be_encoded_are_named():
    strict = ChatTemplate("{{ raise_exception('never') }}", ROLES)
    with pytest.raises(ValueError, match="row 1: .*never"):
        encode_prompts(
            ChatTemplate("{% if messages | length > 1 %}{{ raise_exception('never') }}{% endif %}a", ROLES),
            TOKENIZER,
            [[USER], [USER, ANSWER]],
            prompt_length=9,
        )
    with pytest.raises(ValueError, match="row 0: .*never"):
        encode_conversations(strict, TOKENIZER, [Conversation([USER, ANSWER], 0)], conversation_length=9)
    with pytest.raises(ValueError, match="row 0: the assistant says nothing"):
        encode_conversations(TEMPLATE, TOKENIZER, [Conversation([USER], 0)], conversation_length=99)
    opens_otherwise = ChatTemplate(CHATML.replace("assistant\n", "assistant\n<think>"), ROLES)
    with pytest.raises(
        ValueError, match="row 0: the conversation with the chosen answer does not begin with"
    ):
        encode_chat_pairs(
            opens_otherwise,
            TOKENIZER,
            [ChatPair([USER], ANSWER, OTHER)],
            prompt_length=99,
            completion_length=99,
        )
