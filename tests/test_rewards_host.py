"""Host rewards: any number counts whole, nothing bad passes, and the error says where."""

import threading
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.rewards.host import RewardPool, score_on_host
from rlhfjax.rewards.rouge import rouge_l_reward

PROMPTS = ["p", "q", "r"]
COMPLETIONS = ["a", "bb", "c" * 100]


def giving(*rewards: Any):
    return lambda prompts, completions, **columns: list(rewards)


def score(functions, weights=None, columns=None):
    weights = dict.fromkeys(functions, 1.0) if weights is None else weights
    return score_on_host(functions, weights, PROMPTS, COMPLETIONS, columns or {})


def test_the_sum_is_weighted_and_none_adds_nothing():
    functions = {"one": giving(1.0, None, 0.7), "two": giving(0.5, -1.9, None)}
    total = score(functions, {"one": 2.0, "two": -1.0})
    np.testing.assert_array_equal(total, np.array([1.5, 1.9, 1.4], np.float32))
    assert total.dtype == np.float32


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ((1, True, 0.7), [1.0, 1.0, 0.7]),
        ((np.float64(0.25), np.int64(-2), np.bool_(False)), [0.25, -2.0, 0.0]),
        ((jnp.float32(0.5), jnp.asarray(3), np.array(0.1)), [0.5, 3.0, 0.1]),
    ],
)
def test_every_kind_of_number_keeps_its_value(rewards, expected):
    np.testing.assert_array_equal(score({"f": giving(*rewards)}), np.array(expected, np.float32))


def test_an_array_is_a_list_of_rewards():
    np.testing.assert_array_equal(
        score({"f": lambda **_: np.array([0.5, 1.5, 2.5])}), np.array([0.5, 1.5, 2.5], np.float32)
    )


def test_functions_see_texts_and_columns():
    def by_column(prompts, completions, *, extra, **columns):
        return [len(p) + len(c) + e for p, c, e in zip(prompts, completions, extra, strict=True)]

    columns = {"extra": [0.5, 0.25, 0.0], "reference": ["a", "x", "y"]}
    total = score({"f": by_column, "rouge": rouge_l_reward}, columns=columns)
    np.testing.assert_array_equal(total, np.array([3.5, 3.25, 101.0], np.float32))


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), -float("inf"), np.float32("nan"), jnp.float32("inf")]
)
def test_what_is_not_finite_is_named(bad):
    with pytest.raises(
        ValueError, match=r"reward 'broken' gave .* for sample 1 \('bb'\); give a finite number"
    ):
        score({"good": giving(0, 0, 0), "broken": giving(0.0, bad, 0.0)})


@pytest.mark.parametrize("bad", ["1.0", [1.0], 1j, np.array([1.0])])
def test_what_is_no_number_is_named(bad):
    with pytest.raises(TypeError, match=r"reward 'f' gave .* for sample 0 \('a'\); give a number or None"):
        score({"f": giving(bad, 0.0, 0.0)})


def test_a_function_that_returns_nothing_is_named():
    with pytest.raises(TypeError, match="reward 'f' gave NoneType; give a list"):
        score({"f": lambda **_: None})


def test_long_completions_are_clipped_in_the_message():
    with pytest.raises(ValueError, match="sample 2 .'c{60}[.]{3}'.; at least one must apply"):
        score({"f": giving(1.0, 1.0, None)})


def test_a_sum_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="sample 0 sum to 1e"):
        score({"f": giving(1e300, 0.0, 0.0)})


@pytest.mark.parametrize(
    "functions, weights, columns, message",
    [
        ({"f": giving(1.0)}, {"f": 1.0}, {}, "'f' gave 1 numbers for 3 completions"),
        ({"f": giving(1, 1, 1)}, {"g": 1.0}, {}, r"weights \['g'\] must name the rewards \['f'\]"),
        ({}, {}, {}, "at least one"),
        ({"f": giving(1, 1, 1)}, {"f": float("nan")}, {}, "weight of reward 'f' is nan"),
        ({"f": giving(1, 1, 1)}, {"f": 1.0}, {"reference": ["x"]}, "'reference' has 1 entries for 3"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(functions, weights, columns, message):
    with pytest.raises(ValueError, match=message):
        score(functions, weights, columns)


# ---- a pool


def lengths(prompts, completions, *, extra):
    return [len(p) + len(c) + e for p, c, e in zip(prompts, completions, extra, strict=True)]


MANY = [f"text {'x' * i}" for i in range(23)]
ASKED = (MANY, MANY[::-1], {"extra": list(range(23))})


@pytest.mark.parametrize(("workers", "batch"), [(1, 1), (3, 4), (2, 100)])
def test_a_pool_gives_the_scores_of_one_call(workers, batch):
    functions, weights = {"f": lengths, "g": lambda **_: [0.5] * len(_["completions"])}, {"f": 2.0, "g": -1.0}
    with RewardPool(functions, weights, workers=workers, batch=batch, timeout=60) as pool:
        first, second = pool.submit(*ASKED), pool.submit(*ASKED)
        expected = score_on_host(functions, weights, *ASKED)
        np.testing.assert_array_equal(second(), expected)
        np.testing.assert_array_equal(first(), expected)
        assert first().dtype == np.float32


def test_batches_are_scored_at_the_same_time():
    """Each of three waits for the two others: one thread alone would never end."""
    together = threading.Barrier(3, timeout=30)

    def meets(prompts, completions):
        together.wait()
        return [1.0]

    with RewardPool({"f": meets}, {"f": 1.0}, workers=3, batch=1, timeout=60) as pool:
        np.testing.assert_array_equal(pool.submit(PROMPTS, COMPLETIONS)(), [1.0, 1.0, 1.0])


def test_a_pool_numbers_samples_as_the_caller_does():
    def none_for_the_long(prompts, completions):
        return [None if len(c) > 50 else 1.0 for c in completions]

    def divides(prompts, completions):
        return [1 / (len(c) - 2) for c in completions]

    for function, error, words in (
        (none_for_the_long, ValueError, r"None for sample 2 \('ccc"),
        (divides, RuntimeError, r"reward 'f' raised ZeroDivisionError: .* \(sample 1: 'bb'\)"),
        (lambda **_: [float("nan")], ValueError, r"gave nan for sample 0 \('a'\)"),
    ):
        with RewardPool({"f": function}, {"f": 1.0}, batch=1) as pool:
            scores = pool.submit(PROMPTS, COMPLETIONS)
            with pytest.raises(error, match=words):
                scores()


def test_a_function_that_hangs_is_named_with_its_samples_and_does_not_stop_the_others():
    free = threading.Event()

    def hangs(prompts, completions):
        if "bb" in completions:
            free.wait()
        return [1.0] * len(completions)

    with RewardPool({"judge": hangs}, {"judge": 1.0}, workers=2, batch=1, timeout=0.2) as pool:
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"'judge'.* within 0.2 s for sample 1 of 3 \('bb'\)"):
            pool.submit(PROMPTS, COMPLETIONS)()
        assert time.monotonic() - start < 10
        np.testing.assert_array_equal(pool.submit(PROMPTS[:1], COMPLETIONS[:1])(), [1.0])
        free.set()


def test_a_time_out_of_the_reward_itself_is_told_as_such():
    def raises(**_):
        raise TimeoutError("the judge's server is slow")

    told = "raised TimeoutError: the judge's server is slow"
    with RewardPool({"f": raises}, {"f": 1.0}, timeout=30) as pool, pytest.raises(RuntimeError, match=told):
        pool.submit(PROMPTS, COMPLETIONS)()


def test_scores_that_were_not_begun_when_the_pool_was_closed_are_told_missing():
    free, begun = threading.Event(), threading.Event()

    def waits(prompts, completions):
        begun.set()
        free.wait()
        return [1.0]

    pool = RewardPool({"f": waits}, {"f": 1.0}, workers=1, batch=1)
    scores = pool.submit(PROMPTS, COMPLETIONS)
    assert begun.wait(30)
    pool.close()
    free.set()
    with pytest.raises(RuntimeError, match="closed before sample 1 had been scored"):
        scores()


def test_one_text_in_place_of_a_list_is_refused():
    for prompts, completions, columns, name in (
        ("pqr", COMPLETIONS, {}, "prompts"),
        (PROMPTS, "abc", {}, "completions"),
        (PROMPTS, COMPLETIONS, {"reference": "xyz"}, "reference"),
    ):
        with pytest.raises(TypeError, match=f"'{name}' must be a list"):
            score_on_host({"f": giving(1, 2, 3)}, {"f": 1.0}, prompts, completions, columns)


def test_a_pool_that_cannot_be_is_refused():
    refused: list[tuple[str, dict[str, Any]]] = [
        ("workers=0", {"workers": 0}),
        ("batch=0", {"batch": 0}),
        ("timeout=0", {"timeout": 0.0}),
    ]
    for words, options in refused:
        with pytest.raises(ValueError, match=words):
            RewardPool({"f": lengths}, {"f": 1.0}, **options)
    with pytest.raises(ValueError, match="must name the rewards"):
        RewardPool({"f": lengths}, {})
    pool = RewardPool({"f": giving(1.0)}, {"f": 1.0})
    pool.close()
    with pytest.raises(ValueError, match="the pool is closed"):
        pool.submit(PROMPTS, COMPLETIONS)
