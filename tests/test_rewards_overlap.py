"""chrF, ROUGE, BLEU and exact match: host forms against sacrebleu and rouge-score, device forms against host forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reward_texts import MASK_BT, REFERENCES, ROWS, TABLE, TEXTS, TOKEN_BT
from sacrebleu import sentence_bleu, sentence_chrf

from rlhfjax.rewards import (
    bleu,
    bleu_on_device,
    bleu_reward,
    chrf,
    chrf_on_device,
    chrf_reward,
    exact_match_on_device,
    exact_match_reward,
    fold,
    references,
    rouge_l_on_device,
    rouge_l_reward,
    rouge_n_on_device,
    rouge_n_reward,
    words_13a,
)
from rlhfjax.rewards.rouge import _WORD, _letters

reproducible = settings(derandomize=True, database=None, deadline=None, max_examples=25)
texts = st.one_of(
    st.text(max_size=20),
    st.lists(st.sampled_from(["a", "b", "cd", "A1", "é", "b.", "3.5", ","]), max_size=9).map(" ".join),
)
# name -> (host, device)
PAIRS = {
    "chrf": (chrf_reward, chrf_on_device(TABLE)),
    "chrf of short n-grams": (
        lambda p, c, *, reference: [chrf(a, b, order=2, beta=1.0) for a, b in zip(c, reference, strict=True)],
        chrf_on_device(TABLE, order=2, beta=1.0),
    ),
    "rouge-L": (rouge_l_reward, rouge_l_on_device(TABLE)),
    "rouge-2": (rouge_n_reward(2), rouge_n_on_device(TABLE, 2)),
    "bleu": (bleu_reward(), bleu_on_device(TABLE)),
    "exact match": (exact_match_reward(), exact_match_on_device(TABLE)),
    "exact match of any case": (exact_match_reward(case=False), exact_match_on_device(TABLE, case=False)),
}


def check_oracles(prediction: str, reference: str) -> None:
    assert 100 * chrf(prediction, reference) == pytest.approx(
        sentence_chrf(prediction, [reference]).score, abs=1e-9
    )
    for tokenize, name in ((str.split, "none"), (words_13a, "13a")):
        expected = sentence_bleu(prediction, [reference], tokenize=name).score
        assert 100 * bleu(prediction, reference, tokenize=tokenize) == pytest.approx(expected, abs=1e-9)


@reproducible
@given(texts, texts)
def test_equal_to_sacrebleu_on_any_text(prediction, reference):
    check_oracles(prediction, reference)


def test_equal_to_sacrebleu_on_real_text():
    for row, other in zip(ROWS[:40], ROWS[1:], strict=False):
        check_oracles(row["document"], row["summary"])
        check_oracles(row["summary"], other["document"][:200])
    for text, reference in zip(TEXTS, REFERENCES, strict=True):
        check_oracles(text, reference)


@partial(jax.jit, static_argnames="names")
def on_device(names, given, token_BT, mask_BT, index_B):
    """Some rewards as one program."""
    return {name: PAIRS[name][1](given, token_BT, mask_BT, index_B) for name in names}


QUICK = ("chrf of short n-grams", "rouge-L", "exact match of any case")


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param(tuple(PAIRS), marks=pytest.mark.slow)], ids=["quick", "all"]
)
@pytest.mark.parametrize("others", [False, True])
def test_the_device_gives_what_the_host_gives(names, others):
    """With own references and with those of others, and with none."""
    index = np.arange(len(TEXTS))[:: -1 if others else 1].copy()
    wanted = [REFERENCES[i] for i in index]
    index[3:5] = -1, len(TEXTS)  # there are no such rows
    found = on_device(names, references(REFERENCES), TOKEN_BT, MASK_BT, jnp.asarray(index))
    for name in names:
        got, expected = np.asarray(found[name]), np.array(PAIRS[name][0](TEXTS, TEXTS, reference=wanted))
        assert got.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(got), [i in (3, 4) for i in range(len(got))], err_msg=name)
        expected[3:5] = np.nan
        np.testing.assert_allclose(got, expected, atol=1e-6, err_msg=name)
        if not others:  # else agreement would prove little
            assert np.nanmin(expected) == 0.0 and np.nanmax(expected) > 1 - 1e-12, name
            assert "exact" in name or len(np.unique(expected.round(6))) > 6, name


def test_letters_of_rouge_are_those_of_the_lower_case():
    every = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert not _WORD.search(every[0x20000 - 0x800 :].lower())
    page, value = _letters()
    for code in [code for code in range(0x20000) if not 0xD800 <= code < 0xE000]:
        letter = value[page[code >> 8], code & 255]
        found = _WORD.findall(chr(code).lower())
        assert found == ([chr(letter)] if letter else []), hex(code)
        assert len(chr(code).lower()) == 1 or not letter or code == 0x130


def test_exact_match_by_hand():
    rewards = exact_match_reward(case=False)(
        [], ["a  B\n", "ab", "", "É"], reference=["A b", "a b", " ", "é"]
    )
    assert rewards == [1.0, 0.0, 1.0, 1.0] and fold("É") == "é"
    assert exact_match_reward()([], ["A"], reference=["a"]) == [0.0]


def test_what_cannot_be_is_refused():
    for reward in (chrf_reward, rouge_n_reward(2), bleu_reward(), exact_match_reward()):
        with pytest.raises(ValueError, match="2 completions but 1 references"):
            reward(["p", "q"], ["a", "b"], reference=["a"])
    for make in (rouge_n_reward, lambda n: rouge_n_on_device(TABLE, n)):
        with pytest.raises(ValueError, match="n must be at least 1"):
            make(0)
    for options in ({"order": 0}, {"beta": 0.0}, {"beta": float("nan")}):
        for make in (lambda **x: chrf("a", "a", **x), lambda **x: chrf_on_device(TABLE, **x)):
            with pytest.raises(ValueError, match="chrF needs order >= 1 and beta > 0"):
                make(**options)
