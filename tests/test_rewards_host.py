"""Host rewards: any number counts whole, nothing bad passes, and the error says where."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.rewards.host import score_on_host
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
