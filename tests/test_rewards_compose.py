"""Rewards made of rewards: on the device as on the host, with None and NaN where nothing applies."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.networks import Branches
from rlhfjax.recipes import completion_reward
from rlhfjax.rewards import (
    Applied,
    clipped,
    clipped_on_host,
    ensemble_reward,
    init_moments,
    mean_minus_std,
    normalised,
    normalised_on_host,
    scaled,
    scaled_by,
    score_on_host,
    token_count,
    unscaled,
    update_moments,
    weighted_sum,
    weighted_sum_on_host,
    where_applies,
    where_applies_on_host,
)

RANDOM = np.random.default_rng(0)
TOKEN_BT = jnp.asarray(RANDOM.integers(0, 5, (12, 6)))
MASK_BT = jnp.arange(6)[None, :] < jnp.asarray(RANDOM.integers(0, 7, 12))[:, None]
TEXTS = [
    "".join("abcde"[i] for i in t[m]) for t, m in zip(np.asarray(TOKEN_BT), np.asarray(MASK_BT), strict=True)
]
WANTED = np.array([2, 0, 4], np.int32)  # a letter for each of three prompts
INDEX_B = jnp.asarray(RANDOM.integers(0, 3, 12))
COLUMNS = {"wanted": [int(WANTED[i]) for i in INDEX_B.tolist()]}


def length(params, token_BT, mask_BT):
    return token_count(token_BT, mask_BT).astype(jnp.float32)


def share(params, token_BT, mask_BT, index_B):
    """Share of the wanted letter; does not apply to nothing."""
    held_B = jnp.sum((token_BT == params[index_B][:, None]) & mask_BT, axis=1)
    count_B = jnp.sum(mask_BT, axis=1)
    return Applied(held_B / count_B, count_B > 0)  # NaN where it does not apply


def length_on_host(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def share_on_host(prompts, completions, *, wanted):
    return [
        text.count("abcde"[w]) / len(text) if text else None
        for text, w in zip(completions, wanted, strict=True)
    ]


def many(params, token_BT, mask_BT, *_):
    return token_count(token_BT, mask_BT) >= 3


def many_on_host(prompts, completions, **columns):
    return [len(text) >= 3 for text in completions]


def host(function) -> Any:
    return function(prompts=TEXTS, completions=TEXTS, **COLUMNS)


def as_list(score: Any) -> list[float | None]:
    return [None if np.isnan(x) else float(x) for x in np.asarray(score)]


def test_a_weighted_sum_equals_that_of_the_host():
    assert "" in TEXTS and sum(map(bool, TEXTS)) > 8
    weights = {"length": 0.25, "share": -2.0}
    of_device = weighted_sum({"length": length, "share": share}, weights, numbered=("share",))
    got = jax.jit(of_device)({"share": jnp.asarray(WANTED)}, TOKEN_BT, MASK_BT, INDEX_B)
    functions = {"length": length_on_host, "share": share_on_host}
    np.testing.assert_allclose(got, host(weighted_sum_on_host(functions, weights)), atol=1e-6)
    np.testing.assert_allclose(got, score_on_host(functions, weights, TEXTS, TEXTS, COLUMNS), atol=1e-6)
    assert got.dtype == jnp.float32


def test_where_nothing_applies_there_is_no_score():
    """NaN on the device, None on the host, and an error that names the sample where a score is needed."""
    rewards = {"a": where_applies(share, many), "b": where_applies(share, lambda *x: ~many(*x) & (x[3] == 1))}
    on_device = weighted_sum(rewards, {"a": 1.0, "b": 3.0}, numbered=("a", "b"))
    given = {"a": jnp.asarray(WANTED), "b": jnp.asarray(WANTED)}
    got = as_list(on_device(given, TOKEN_BT, MASK_BT, INDEX_B))

    def second(prompts, completions, **columns):
        of_one = [w == int(WANTED[1]) for w in columns["wanted"]]
        return [one and not flag for one, flag in zip(of_one, many_on_host([], completions), strict=True)]

    functions = {
        "a": where_applies_on_host(share_on_host, many_on_host),
        "b": where_applies_on_host(share_on_host, second),
    }
    together = weighted_sum_on_host(functions, {"a": 1.0, "b": 3.0})
    expected = host(together)
    assert [x is None for x in got] == [x is None for x in expected]
    assert 0 < sum(x is None for x in got) < len(got) and {True, False} == set(host(second))
    pairs = [(x, y) for x, y in zip(got, expected, strict=True) if x is not None]
    np.testing.assert_allclose([x for x, _ in pairs], [y for _, y in pairs], atol=1e-6)
    missing = expected.index(None)
    with pytest.raises(ValueError, match=f"every reward of .'sum'. gave None for sample {missing} "):
        score_on_host({"sum": together}, {"sum": 1.0}, TEXTS, TEXTS, COLUMNS)


def test_changes_nest_and_keep_what_does_not_apply():
    made = clipped(normalised(share, 0.2, 0.5), -0.3, 0.6)
    out = made(jnp.asarray(WANTED), TOKEN_BT, MASK_BT, INDEX_B)
    expected = host(clipped_on_host(normalised_on_host(share_on_host, 0.2, 0.5), -0.3, 0.6))
    assert isinstance(out, Applied) and [x is not None for x in expected] == out.applies.tolist()
    values = [x for x in expected if x is not None]
    np.testing.assert_allclose(out.score[out.applies], values, atol=1e-6)
    assert {-0.3, 0.6} < {round(x, 6) for x in values}
    sums = weighted_sum({"in": weighted_sum({"x": length}, {"x": 2.0}), "x": length}, {"in": 1.0, "x": -1.0})
    np.testing.assert_allclose(sums(None, TOKEN_BT, MASK_BT), length(None, TOKEN_BT, MASK_BT))


def test_a_score_that_is_not_a_number_stays_so_where_its_reward_applies():
    broken = weighted_sum(
        {"x": lambda *_: jnp.asarray([1.0, jnp.nan]), "y": lambda *_: jnp.ones(2)}, {"x": 1.0, "y": 1.0}
    )
    assert as_list(broken(None)) == [2.0, None]
    assert as_list(clipped(lambda *_: jnp.asarray([jnp.nan, 3.0]), 0, 1)(None)) == [None, 1.0]
    with pytest.raises(ValueError, match="reward 'x' gave nan for sample 0"):
        weighted_sum_on_host({"x": lambda **_: [float("nan")]}, {"x": 1.0})(["p"], ["c"])
    nan = clipped_on_host(lambda **_: [float("nan")], 0, 1)
    with pytest.raises(ValueError, match="reward 'x' gave nan for sample 0"):
        score_on_host({"x": nan}, {"x": 1.0}, ["p"], ["c"], {})


def test_weights_may_be_traced():
    made = jax.vmap(lambda w: weighted_sum({"x": length}, {"x": w})(None, TOKEN_BT, MASK_BT))(
        jnp.asarray([1.0, 3.0])
    )
    np.testing.assert_allclose(made[1], 3 * length(None, TOKEN_BT, MASK_BT))


def test_learned_models_and_ensembles_compose_with_rewards_of_tokens():
    """Two models that score branches, their mean less their spread, beside a reward by the prompt's number."""
    branches = Branches(
        jnp.zeros((3, 1), int), jnp.ones((3, 1), bool), TOKEN_BT.reshape(3, 4, 6), MASK_BT.reshape(3, 4, 6)
    )

    def evaluate(params, branches):
        return params * jnp.sum(branches.completion_mask_BGC, axis=2)

    made = weighted_sum(
        {
            "model": clipped(ensemble_reward(evaluate, partial(mean_minus_std, penalty=0.5)), -100.0, 7.0),
            "share": completion_reward(lambda *x: jnp.where(share(*x).applies, share(*x).score, 0.0)),
        },
        {"model": 1.0, "share": 10.0},
        numbered=("share",),
    )
    index_B = jnp.asarray([1, 2, 0])
    got = made({"model": jnp.asarray([1.0, 3.0]), "share": jnp.asarray(WANTED)}, branches, index_B)
    for b in range(3):
        for g in range(4):
            text = TEXTS[4 * b + g]
            held = text.count("abcde"[WANTED[index_B[b]]]) / max(1, len(text))
            model = min(7.0, (1 + 3) / 2 * len(text) - 0.5 * len(text))
            assert float(got[b, g]) == pytest.approx(model + 10 * held, abs=1e-5)


def test_the_running_scale_is_that_of_all_scores():
    batches = [RANDOM.normal(5.0, 2.0, n).astype(np.float32) for n in (1, 7, 30)]
    batches[1][3] = np.nan
    moments = init_moments()
    np.testing.assert_array_equal(scaled_by(moments, jnp.asarray(batches[0])), batches[0])  # nothing is known
    update = jax.jit(update_moments)
    for i, batch in enumerate(batches):
        saved = [np.asarray(x) for x in moments]
        moments = update(type(moments)(*map(jnp.asarray, saved)), batch)
        seen = np.concatenate(batches[: i + 1])
        seen = seen[np.isfinite(seen)].astype(np.float64)
        assert int(moments.count) == len(seen)
        np.testing.assert_allclose(moments.mean, seen.mean(), rtol=1e-6)
        np.testing.assert_allclose(moments.variance, seen.var(), rtol=1e-5, atol=1e-7)
    reward = scaled(length)
    score = reward((moments, None), TOKEN_BT, MASK_BT)
    assert isinstance(score, jax.Array)
    expected = (np.asarray(length(None, TOKEN_BT, MASK_BT)) - seen.mean()) / seen.std()
    np.testing.assert_allclose(score, expected, atol=1e-5)
    np.testing.assert_allclose(unscaled(moments, score), length(None, TOKEN_BT, MASK_BT), atol=1e-4)
    apart = scaled(share)((moments, jnp.asarray(WANTED)), TOKEN_BT, MASK_BT, INDEX_B)
    assert isinstance(apart, Applied) and 0 < int(apart.applies.sum()) < 12


def test_what_cannot_be_is_refused():
    made = weighted_sum({"x": length, "y": share}, {"x": 1.0, "y": 1.0}, numbered=("y",))
    for make, words in (
        (lambda: weighted_sum({}, {}), "at least one"),
        (lambda: weighted_sum({"x": length}, {"y": 1.0}), r"weights \['y'\] must name the rewards \['x'\]"),
        (lambda: weighted_sum({"x": length}, {"x": float("inf")}), "the weight of reward 'x' is inf"),
        (lambda: weighted_sum_on_host({"x": length_on_host}, {}), "must name the rewards"),
        (lambda: weighted_sum({"x": length}, {"x": 1.0}, numbered=("z",)), "numbered=.'z'. must be among"),
        (lambda: made({"z": 1}, TOKEN_BT, MASK_BT, INDEX_B), r"params must be a dict .*got \['z'\]"),
        (lambda: made(WANTED, TOKEN_BT, MASK_BT, INDEX_B), "params must be a dict .*got ndarray"),
        (lambda: made(None, TOKEN_BT), "need index_B as the last input"),
        (lambda: normalised(length, 0.0, 0.0), "std above 0, got mean=0.0, std=0.0"),
        (lambda: normalised_on_host(length_on_host, 0.0, float("nan")), "std above 0"),
        (lambda: clipped(length, 1.0, 1.0), "low=1.0 must be below high=1.0"),
        (lambda: clipped_on_host(length_on_host, 2.0, 1.0), "low=2.0 must be below high=1.0"),
        (lambda: host(where_applies_on_host(length_on_host, lambda **_: [True])), "gave 1 flags for 12"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


@pytest.mark.parametrize(
    "bad, kind",
    [
        ("0.5", "str"),
        ({0.5}, "set"),
        ({"a": 0.5}, "dict"),
        (iter([0.5]), "list_iterator"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_list_is_told_by_name(bad, kind):
    for call in (
        lambda: weighted_sum_on_host({"judge": lambda **_: bad}, {"judge": 1.0})(["p"], ["c"]),
        lambda: score_on_host({"judge": lambda **_: bad}, {"judge": 1.0}, ["p"], ["c"], {}),
    ):
        with pytest.raises(TypeError, match=f"reward 'judge' gave {kind}; give a list of numbers"):
            call()
