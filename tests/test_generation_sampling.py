"""Every setting of sampling against the definition that transformers implements, in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.generation import Sampling, filter_logits, sample_token

ROWS, VOCABULARY = 5, 90
LOGITS = jax.random.normal(jax.random.key(0), (ROWS, VOCABULARY)) * 2.5
SEEN = jnp.asarray([[3, 3, 7, -1], [-1, -1, -1, -1], [0, 1, 2, 89], [5, 5, 5, 5], [88, 89, -1, 4]], jnp.int32)
STOP = jnp.asarray([7, 11, -1], jnp.int32)
PENALTY = jnp.asarray([1.5, 2.0, 0.7, 1.0, 3.0])
BANNED = jnp.asarray([[3, 4], [-1, -1], [50, -1], [6, 6], [0, 89]], jnp.int32)


def processed(row: int, sampling: Sampling, step: int) -> np.ndarray:
    """The logits of one row after all that comes before the filters: transformers' loops over token ids."""

    def of_row(setting, rank):
        setting = np.asarray(setting)
        return setting[row] if setting.ndim > rank else setting

    score = np.asarray(LOGITS[row], np.float64).copy()
    if sampling.repetition_penalty is not None:
        for token in {int(x) for x in SEEN[row] if x >= 0}:
            factor = float(of_row(sampling.repetition_penalty, 0))
            score[token] = score[token] * factor if score[token] < 0 else score[token] / factor
    if sampling.banned_tokens is not None:
        score[[x for x in of_row(sampling.banned_tokens, 1) if x >= 0]] = -np.inf
    if sampling.min_new_tokens is not None and step < of_row(sampling.min_new_tokens, 0):
        score[[x for x in STOP if x >= 0]] = -np.inf
    if sampling.forced_tokens is not None:
        forced = of_row(sampling.forced_tokens, 1)
        if step < len(forced) and forced[step] >= 0:
            score[:], score[forced[step]] = -np.inf, 0.0
    return score / float(of_row(sampling.temperature, 0))


def distribution(row: int, sampling: Sampling, step: int) -> np.ndarray:
    """Then top-k, top-p and min-p, each by sorting what the one before left."""

    def of_row(setting):
        return float(np.broadcast_to(np.asarray(setting), (ROWS,))[row])

    score = processed(row, sampling, step)
    if k := min(int(of_row(sampling.top_k)), VOCABULARY):
        score[score < np.sort(score)[-k]] = -np.inf
    if (top_p := of_row(sampling.top_p)) < 1:
        order = np.argsort(-score)
        p = np.exp(score[order] - score.max())
        before = np.cumsum(p / p.sum()) - p / p.sum()
        score[order[1:][before[1:] >= top_p]] = -np.inf
    p = np.exp(score - score.max())
    p[p < of_row(sampling.min_p)] = 0
    return p / p.sum()


def drawn(sampling: Sampling, step: int = 1, draws: int = 4000):
    """Every row drawn at evenly spaced uniforms: the share of each token, and one draw of each token seen."""

    def one(uniform):
        return sample_token(
            LOGITS, jnp.full(ROWS, uniform), sampling, step=step, seen_RT=SEEN, stop_tokens=STOP
        )

    out = jax.jit(lambda u: jax.lax.map(one, u))((jnp.arange(draws) + 0.5) / draws)
    token, logp, plain = (np.asarray(x) for x in out)
    share = np.stack([np.bincount(token[:, row], minlength=VOCABULARY) / draws for row in range(ROWS)])
    return share, token, logp, plain


CASES = {
    "temperature": Sampling(0.7),
    "top_k": Sampling(top_k=jnp.asarray([0, 1, 4, 30, 500])),
    "top_p": Sampling(top_p=jnp.asarray([1.0, 0.0, 0.3, 0.9, 0.999])),
    "min_p": Sampling(min_p=jnp.asarray([0.0, 1.0, 0.3, 0.05, 1e-4])),
    "filters": Sampling(jnp.linspace(0.5, 1.5, ROWS), 12, 0.8, jnp.asarray([0.0, 0.1, 0.5, 0.05, 0.0])),
    "repetition": Sampling(0.9, repetition_penalty=PENALTY),
    "banned": Sampling(banned_tokens=BANNED),
    "banned alike": Sampling(banned_tokens=BANNED[4]),
    "min_new_tokens": Sampling(min_new_tokens=jnp.asarray([0, 1, 2, 3, 0])),
    "forced": Sampling(forced_tokens=jnp.asarray([[4, 8], [1, -1], [1, 7], [2, 89], [-1, -1]])),
    "forced past": Sampling(forced_tokens=jnp.asarray([4])),
    "all": Sampling(
        jnp.linspace(0.5, 1.5, ROWS),
        jnp.asarray([0, 3, 40, 9, 20]),
        0.9,
        0.01,
        PENALTY,
        BANNED,
        jnp.asarray([0, 5, 1, 2, 3]),
        jnp.asarray([[-1, -1], [3, 3], [9, -1], [-1, 6], [-1, -1]]),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_distribution_is_that_of_transformers(name):
    sampling = CASES[name]
    share, token, logp, plain = drawn(sampling)
    unchanged = Sampling(sampling.temperature)
    for row in range(ROWS):
        expected = distribution(row, sampling, 1)
        np.testing.assert_allclose(share[row], expected, atol=1e-3)
        assert set(np.flatnonzero(share[row])) <= set(np.flatnonzero(expected))
        np.testing.assert_allclose(logp[:, row], np.log(expected[token[:, row]]), atol=2e-5)
        model = distribution(row, unchanged, 1)
        np.testing.assert_allclose(plain[:, row], np.log(model[token[:, row]]), atol=2e-5)


def test_processed_and_plain_are_one_where_nothing_but_a_temperature_is_set():
    _, _, logp, plain = drawn(Sampling(0.7), draws=50)
    np.testing.assert_array_equal(logp, plain)
    idle = Sampling(0.7, 0, 1.0, 0.0, jnp.ones(ROWS), jnp.full(3, -1), jnp.zeros(ROWS, jnp.int32))
    np.testing.assert_array_equal(drawn(idle, draws=50)[2], logp)
    np.testing.assert_array_equal(drawn(idle, draws=50)[3], plain)


def test_a_greedy_token_is_of_the_processed_logits_and_its_plain_logp_at_temperature_one():
    sampling = Sampling(0.0, banned_tokens=jnp.argmax(LOGITS, axis=1)[:, None], top_p=0.5)
    _, token, logp, plain = drawn(sampling, draws=1)
    np.testing.assert_array_equal(token[0], jnp.argsort(LOGITS, axis=1)[:, -2])
    np.testing.assert_array_equal(logp, np.zeros((1, ROWS)))
    expected = [np.log(distribution(row, Sampling(), 1)[token[0, row]]) for row in range(ROWS)]
    np.testing.assert_allclose(plain[0], expected, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.01, 0.3, 2.0, 30.0])
def test_the_nucleus_is_exact_however_flat_or_steep(scale):
    """Against sorting in float64; every row has its own top_p and top_k."""
    rows, size = 12, 3000
    logits = jax.random.normal(jax.random.key(1), (rows, size)) * scale
    logits = logits.at[0, 100:].set(-jnp.inf)
    top_p, top_k = jnp.linspace(0.02, 0.999, rows), jnp.arange(rows) % 3 * 700
    out = np.asarray(jax.jit(filter_logits)(logits, top_k, top_p, 0.0))
    for row in range(rows):
        x = np.asarray(logits[row], np.float64)
        x = np.sort(x)[::-1][: int(top_k[row]) or size]
        p = np.exp(x - x.max())
        p /= p.sum()
        count = int(np.isfinite(out[row]).sum())
        if scale == 0.0:  # all tie
            assert count == (100 if row == 0 else size)
            continue
        # The fewest that reach top_p, where float32 can tell: neither one less nor one more.
        mass = np.cumsum(p)
        assert mass[count - 1] >= top_p[row] - 2e-6
        assert count == 1 or mass[count - 2] < top_p[row] + 2e-6
        assert set(np.flatnonzero(np.isfinite(out[row]))) == set(np.argsort(-np.asarray(logits[row]))[:count])


def test_tied_tokens_stand_or_fall_together():
    logits = jnp.asarray([[0.0, 1.0, 1.0, 1.0, -1.0]])
    assert np.isfinite(filter_logits(logits, 2, 1.0, 0.0)).tolist() == [[False, True, True, True, False]]
    assert np.isfinite(filter_logits(logits, 0, 0.5, 0.0)).tolist() == [[False, True, True, True, False]]


def test_settings_change_without_compiling():
    @jax.jit
    def run(sampling):
        return sample_token(LOGITS, jnp.full(ROWS, 0.5), sampling, seen_RT=SEEN, stop_tokens=STOP)

    everything = CASES["all"]._replace(top_p=jnp.float32(0.9))
    one = run(everything)
    compiled = run._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    other = run(everything._replace(top_p=jnp.float32(0.1), banned_tokens=BANNED[::-1]))
    assert not np.array_equal(other.logp_R, one.logp_R)
    assert run._cache_size() == compiled  # pyright: ignore[reportAttributeAccessIssue]


def test_a_setting_that_lacks_its_tokens_is_refused():
    uniform = jnp.zeros(ROWS)
    with pytest.raises(ValueError, match="repetition_penalty needs the tokens seen so far"):
        sample_token(LOGITS, uniform, Sampling(repetition_penalty=2.0))
    with pytest.raises(ValueError, match="min_new_tokens needs to know what it holds back"):
        sample_token(LOGITS, uniform, Sampling(min_new_tokens=2))
    with pytest.raises(ValueError, match="sampling.banned_tokens must be .k. or .R, k. with R = 5 rows"):
        sample_token(LOGITS, uniform, Sampling(banned_tokens=jnp.int32(3)))
