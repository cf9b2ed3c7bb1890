"""Packing and padding: nothing lost, nothing doubled, no target across a border."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.data.datasets import Pair
from rlhfjax.data.packing import encode_pairs, pack, pad_completions, pad_prompts
from rlhfjax.data.tokenizers import ByteTokenizer

reproducible = settings(derandomize=True, database=None, deadline=None)
TOKENIZER = ByteTokenizer()
PAIRS = [Pair("abc", "d"), Pair("ab", "de"), Pair("a", "defg")]
# A prompt of p tokens and a completion of c, at most 9 tokens in all.
shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=30)


def test_pairs_become_prompt_separator_completion_end():
    encoded = encode_pairs(TOKENIZER, PAIRS, prompt_length=4, completion_length=5)
    assert encoded.prompts[0] == [97, 98, 99, TOKENIZER.sep_id]
    assert encoded.completions[2] == [100, 101, 102, 103, TOKENIZER.eos_id]
    assert encoded.row.tolist() == [0, 1, 2]
    assert encoded.dropped == 0


def test_too_long_is_an_error_or_dropped_and_counted():
    with pytest.raises(
        ValueError, match=r"row 0: the prompt has 4 tokens and prompt_length is 3 \(1 of 3 rows"
    ):
        encode_pairs(TOKENIZER, PAIRS, prompt_length=3, completion_length=5)
    with pytest.raises(ValueError, match="row 2: the completion has 5 tokens and completion_length is 4"):
        encode_pairs(TOKENIZER, PAIRS, prompt_length=4, completion_length=4)
    encoded = encode_pairs(TOKENIZER, PAIRS, prompt_length=3, completion_length=4, drop=True)
    assert (encoded.row.tolist(), encoded.dropped) == ([1], 2)
    assert encoded.prompts == [[97, 98, TOKENIZER.sep_id]]
    with pytest.raises(ValueError, match="none of 3 pairs"):
        encode_pairs(TOKENIZER, PAIRS, prompt_length=1, completion_length=4, drop=True)


@pytest.mark.parametrize("pair, name", [(Pair(" ", "a"), "prompt"), (Pair("a", ""), "completion")])
def test_empty_texts_are_refused_by_row(pair, name):
    with pytest.raises(ValueError, match=f"row 1: empty {name}"):
        encode_pairs(TOKENIZER, [PAIRS[0], pair], prompt_length=9, completion_length=9, drop=True)


def sequences(sizes: list[tuple[int, int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Distinct tokens everywhere, from 1 on, so that a token tells where it belongs."""
    token = iter(range(1, 1000))
    both = [([next(token) for _ in range(p)], [next(token) for _ in range(c)]) for p, c in sizes]
    return [prompt for prompt, _ in both], [completion for _, completion in both]


@reproducible
@given(sizes=shapes, length=st.integers(8, 24))
def test_every_sequence_is_there_once_and_whole(sizes, length):
    prompts, completions = sequences(sizes)
    packed = pack(prompts, completions, length=length, pad_id=0)
    assert packed.token_RT.shape == (len(packed.segment_RT), length + 1)
    found = []
    for token_T, segment_T, position_T in zip(
        packed.token_RT, packed.segment_RT, packed.position_RT, strict=True
    ):
        for segment in range(1, segment_T.max() + 1):
            places = np.flatnonzero(segment_T == segment)
            assert position_T[places].tolist() == list(range(len(places)))
            end = int(places[-1]) + 1
            # The last token of a full row is a target only, so it has no segment of its own.
            last = [int(token_T[end])] if end == length and token_T[end] else []
            found.append([*token_T[places].tolist(), *last])
    assert sorted(found) == sorted(p + c for p, c in zip(prompts, completions, strict=True))


@reproducible
@given(sizes=shapes, length=st.integers(8, 24))
def test_each_target_belongs_to_its_input_and_has_its_role(sizes, length):
    prompts, completions = sequences(sizes)
    packed = pack(prompts, completions, length=length, pad_id=0)
    inputs, targets = packed.token_RT[:, :-1], packed.token_RT[:, 1:]
    # Tokens ascend by one from sequence to sequence too, so only the sequences tell the right pairs.
    pairs = {
        role: {
            (s[i], s[i + 1])
            for p, c in zip(prompts, completions, strict=True)
            for s in [p + c]
            for i in span(p, c)
        }
        for role, span in {
            "prompt": lambda p, c: range(len(p) - 1),
            "completion": lambda p, c: range(len(p) - 1, len(p) + len(c) - 1),
        }.items()
    }
    for role, mask in {"prompt": packed.prompt_RT, "completion": packed.completion_RT}.items():
        drawn = list(zip(inputs[mask].tolist(), targets[mask].tolist(), strict=True))
        assert sorted(drawn) == sorted(pairs[role])
    assert packed.completion_RT.sum() == sum(map(len, completions))
    assert not (packed.completion_RT & packed.prompt_RT).any()


def test_packing_is_tight_and_reports_its_fill():
    prompts, completions = sequences([(3, 3), (2, 1), (2, 2), (1, 1), (3, 2)])  # 6 + 3, 4 + 5, 2
    packed = pack(prompts, completions, length=8, pad_id=0)
    assert packed.token_RT.shape == (3, 9)
    assert packed.fill == pytest.approx((8 + 8 + 2) / 24)


def test_packing_cannot_lose_a_token_silently():
    prompts, completions = sequences([(1, 1), (5, 5)])
    with pytest.raises(ValueError, match="sequence 1 has 10 tokens; a row of length 8 takes 2 to 9"):
        pack(prompts, completions, length=8, pad_id=0)
    with pytest.raises(ValueError, match="sequence 0 has 1 tokens"):
        pack([[1]], [[]], length=8, pad_id=0)
    with pytest.raises(ValueError, match="as many prompts as completions"):
        pack([[1]], [], length=8, pad_id=0)


def test_prompts_lean_right_and_completions_left():
    token_BP, mask_BP = pad_prompts([[5, 6], [7, 8, 9]], 3, pad_id=1)
    assert token_BP.tolist() == [[1, 5, 6], [7, 8, 9]]
    assert mask_BP.tolist() == [[False, True, True], [True] * 3]
    token_BT, mask_BT = pad_completions([[5, 6], [7, 8, 9]], 3, pad_id=1)
    assert token_BT.tolist() == [[5, 6, 1], [7, 8, 9]]
    assert mask_BT.tolist() == [[True, True, False], [True] * 3]
    assert (token_BP.dtype, mask_BP.dtype, token_BT.dtype) == (np.int32, bool, np.int32)


@pytest.mark.parametrize("pad, name", [(pad_prompts, "prompt"), (pad_completions, "completion")])
def test_padding_refuses_what_does_not_fit(pad, name):
    with pytest.raises(ValueError, match=f"row 1: the {name} has 4 tokens, 1 more than 3"):
        pad([[5], [5, 6, 7, 8]], 3, 0)
    with pytest.raises(ValueError, match=f"row 1: the {name} has no tokens"):
        pad([[5], []], 3, 0)
