"""The automaton of a regular expression against `re`."""

import itertools
import random
import re

import jax
import numpy as np
import pytest
from reward_texts import MASK_BT, TABLE, TEXTS, TOKEN_BT

from rlhfjax.rewards import regex_automaton, regex_on_device, regex_reward

HOWS = ("fullmatch", "search")
# Each letter stands for a kind of character that patterns below tell apart.
ALPHABET = "ab\ncAK\u212aéßſs1 _."
PATTERNS = [
    *(
        r"a$",
        r"a$\n",
        r"a$\n?b?",
        r"^a|b$",
        r"(?:$a|b)",
        r"(^a|b)*$",
        r"(?:a$|b)\n?",
        r"(a|b$)(\n|$)",
        r"($|a)*\Z",
    ),
    *(r"(?m)^a$", r"(?m)a$\n^b", r"\Aab\Z", r"\ba\b", r"\B", r"\b", r"a\Bb?", r"(?a)\w+\b", r"\w+\b\W"),
    *(
        r"(?i)straße|é+",
        r"(?i:A)b",
        r"(?i)k",
        "(?i)ſ",
        r"(?i)[^k]",
        r"(?i-s:a.)",
        r"(?s).+",
        r".+",
        r"(?a:\b)é\b",
    ),
    *(r"[^a-c\d]{2,3}?", r"(a|ab)(c|bcd)*", r"", r"a{0}", r"(a*)*b", r"(a?){3}b", r"(?x) a b # c", r"\s+$"),
]


def run(automaton, texts: list[str]) -> list[bool]:
    """The automaton in plain Python."""
    page, value = automaton.classes
    class_of = {c: int(value[page[ord(c) >> 8], ord(c) & 255]) for c in ALPHABET}
    after, accepts, found = automaton.next_SC.tolist(), automaton.accepts_S.tolist(), []
    for text in texts:
        state = 0
        for c in text:
            state = after[state][class_of[c]]
        found.append(accepts[state])
    return found


@pytest.mark.parametrize("how", HOWS)
def test_every_kind_of_part_means_what_it_means_to_re(how):
    short = ["".join(x) for n in range(3) for x in itertools.product(ALPHABET, repeat=n)]
    draw = random.Random(0)
    longer = ["".join(draw.choices(ALPHABET, k=draw.randint(3, 6))) for _ in range(200)]
    for pattern in PATTERNS:
        automaton = regex_automaton(pattern, how)
        match = getattr(re.compile(pattern), how)
        texts = short + longer
        unlike = [
            text for text, x in zip(texts, run(automaton, texts), strict=True) if x != bool(match(text))
        ]
        assert not unlike, (pattern, how, unlike[:3])


@pytest.mark.parametrize(
    "pattern, how",
    [
        pytest.param(r"[A-Z]\w*[^.]* \w+", "search", marks=pytest.mark.slow),
        (r"(?i)[^\W\d].*(?:\s\S+)+[^\s!]*\n?", "fullmatch"),
        (r"\ufffd{2}|\b\d+$", "search"),
    ],
)
def test_the_device_gives_what_the_host_gives(pattern, how):
    reward = jax.jit(regex_on_device(TABLE, pattern, how))(None, TOKEN_BT, MASK_BT)
    expected = regex_reward(pattern, how)(TEXTS, TEXTS, other=TEXTS)
    assert 5 < sum(expected) < len(TEXTS) - 5
    assert reward.dtype == np.float32 and reward.tolist() == expected


def test_what_no_automaton_does_is_refused_by_name():
    for pattern, what in (
        (r"a(?=b)", "has lookahead or lookbehind"),
        (r"(?<!a)b", "has negative lookahead or lookbehind"),
        (r"(a)\1", "has a reference to a group"),
        (r"(?i)(a)\1", "has a reference to a group"),
        (r"(a)?(?(1)b|c)", "has a condition on a group"),
        (r"(?>a)", "has an atomic group"),
        (r"a++", "has a possessive repeat"),
        (r"(a|b)*a(a|b){14}", "has more than 4096 states"),
        (r"(a{100}){300}", "has more than 20000 parts"),
    ):
        with pytest.raises(ValueError, match=what) as told:
            regex_automaton(pattern)
        assert repr(pattern) in str(told.value)
    with pytest.raises(re.error):
        regex_automaton("(")
    for make in (lambda how: regex_reward("a", how), lambda how: regex_automaton("a", how)):
        with pytest.raises(ValueError, match="how must be 'fullmatch' or 'search', got 'match'"):
            make("match")
