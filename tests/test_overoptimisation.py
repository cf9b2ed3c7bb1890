"""Fits of gold against KL: by the 2 x 2 normal equations, on curves made with known coefficients, by a fine grid."""

import math

import numpy as np
import pytest

from rlhfjax import overoptimisation
from rlhfjax.overoptimisation import Fit, bootstrap_fits, fit, turning_point

D = np.array([0.3, 0.55, 0.8, 1.1, 1.4, 1.7, 2.1, 2.6])


def curve(form, a, b, d):
    return np.array([x * (a - b * (x if form == "best_of_n" else math.log(x))) for x in d])


def by_normal_equations(form, d, y, w):
    """(a, b, their errors, R^2) by Cramer's rule, sum by sum."""
    u = [x for x in d]
    v = [-x * (x if form == "best_of_n" else math.log(x)) for x in d]
    w = [x / np.mean(w) for x in w]
    uu, uv, vv, uy, vy = (
        sum(k * p * q for k, p, q in zip(w, left, right, strict=True))
        for left, right in ((u, u), (u, v), (v, v), (u, y), (v, y))
    )
    det = uu * vv - uv * uv
    a, b = (uy * vv - uv * vy) / det, (uu * vy - uv * uy) / det
    squares = sum(k * (q - a * p - b * r) ** 2 for k, p, r, q in zip(w, u, v, y, strict=True))
    scale = squares / (len(d) - 2)
    mean = sum(k * q for k, q in zip(w, y, strict=True)) / sum(w)
    around = sum(k * (q - mean) ** 2 for k, q in zip(w, y, strict=True))
    return a, b, math.sqrt(scale * vv / det), math.sqrt(scale * uu / det), 1 - squares / around


@pytest.mark.parametrize("form", overoptimisation.FORMS)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_fit_is_that_of_the_normal_equations(form, weighted):
    generator = np.random.default_rng(3)
    y = curve(form, 1.3, 0.4, D) + 0.1 * generator.normal(size=D.size)
    w = generator.uniform(0.2, 5, size=D.size) if weighted else np.ones(D.size)
    found = fit(form, D, y, w if weighted else None)
    np.testing.assert_allclose(found[1:6], by_normal_equations(form, D, y, w), rtol=1e-9)
    residual = y - curve(form, found.a, found.b, D)
    assert found.residual == pytest.approx(math.sqrt(np.average(residual**2, weights=w)))
    np.testing.assert_allclose(found(D), curve(form, found.a, found.b, D), rtol=1e-12)


@pytest.mark.parametrize("form", overoptimisation.FORMS)
def test_coefficients_that_made_a_curve_are_found(form):
    found = fit(form, np.append(D, 0.0), np.append(curve(form, 0.9, 0.25, D), 7.0))  # d = 0 says nothing
    assert (found.a, found.b) == (pytest.approx(0.9), pytest.approx(0.25))
    assert found.r_squared == pytest.approx(1.0) and found.residual < 1e-12
    np.testing.assert_array_equal(found(0.0), 0.0)


@pytest.mark.parametrize("form", overoptimisation.FORMS)
@pytest.mark.parametrize(("a", "b"), [(0.9, 0.25), (0.2, 0.6), (2.0, 1.0)])
def test_the_peak_is_that_of_a_fine_grid(form, a, b):
    made = Fit(form, a, b, 0, 0, 1, 0)
    grid = np.linspace(1e-4, 20, 400_001)
    y = made(grid)
    assert made.peak == pytest.approx(grid[y.argmax()], abs=1e-4)
    assert made.peak_gain == pytest.approx(y.max(), rel=1e-6)
    expected = a * a / (4 * b) if form == "best_of_n" else b * math.exp(a / b - 1)
    assert made.peak_gain == pytest.approx(expected)


def test_a_curve_that_never_turns_has_no_peak():
    for form in overoptimisation.FORMS:
        rising = Fit(form, 1.0, 0.0, 0, 0, 1, 0)
        assert rising.peak == math.inf and rising.peak_gain == math.inf
        falling = Fit(form, -1.0, 0.0, 0, 0, 1, 0)
        assert falling.peak == 0 and falling.peak_gain == 0
    assert Fit("best_of_n", -1.0, 0.5, 0, 0, 1, 0).peak == 0
    assert Fit("best_of_n", -1.0, -0.5, 0, 0, 1, 0).peak == 0  # falls, then rises: no peak but the start
    assert Fit("rl", 1.0, 1e-9, 0, 0, 1, 0).peak == math.inf


def test_two_points_leave_no_error():
    found = fit("best_of_n", [1.0, 2.0], [0.5, 0.6])
    assert math.isnan(found.a_error) and math.isnan(found.b_error)
    np.testing.assert_allclose(found([1.0, 2.0]), [0.5, 0.6])


def test_standard_errors_are_the_spread_of_repeated_fits():
    generator = np.random.default_rng(0)
    fits = [fit("rl", D, curve("rl", 1.0, 0.3, D) + 0.2 * generator.normal(size=D.size)) for _ in range(3000)]
    for name in ("a", "b"):
        spread = np.std([getattr(x, name) for x in fits])
        told = math.sqrt(np.mean([getattr(x, f"{name}_error") ** 2 for x in fits]))
        assert told == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize(
    ("d", "gain", "weight", "why"),
    [
        ([1.0], [1.0], None, "at least two different d above 0; there is 1 among 1 points"),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], None, "there is 1 among 3 points"),
        ([0.0, 0.0, 2.0], [0.0, 0.0, 1.0], None, "there is 1 among 3 points"),
        ([], [], None, "there is 0 among 0 points"),
        ([1.0, -2.0], [1.0, 2.0], None, r"d\[1\] = -2.0 is negative"),
        ([1.0, math.nan], [1.0, 2.0], None, r"d\[1\] is not finite"),
        ([1.0, 2.0], [math.inf, 2.0], None, r"gain\[0\] is not finite"),
        ([1.0, 2.0], [1.0], None, "gain must be a vector as long as d"),
        ([1.0, 2.0], [1.0, 2.0], [1.0, 0.0], r"weight\[1\] must be above 0"),
        ([[1.0, 2.0]], [[1.0, 2.0]], None, "d must be a vector"),
    ],
)
def test_what_cannot_be_fitted_is_refused(d, gain, weight, why):
    with pytest.raises(ValueError, match=why):
        fit("best_of_n", d, gain, weight)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match='form \'ppo\' is unknown; choose "best_of_n" or "rl"'):
        fit("ppo", D, D)  # pyright: ignore[reportArgumentType]


def test_resampled_fits_spread_as_those_of_new_items():
    """Items are noisy lines; the spread over resamplings of one set is about that over many sets."""
    generator = np.random.default_rng(1)
    items = 200

    def draw():
        return (
            curve("best_of_n", 1.0, 0.2, D)
            + generator.normal(size=(items, 1)) * D
            + generator.normal(size=(items, D.size))
        )

    one = draw()
    fits = bootstrap_fits("best_of_n", lambda index: (D, one[index].mean(axis=0)), items, 0, resamples=400)
    fresh = [fit("best_of_n", D, draw().mean(axis=0)) for _ in range(400)]
    assert np.std([x.a for x in fits]) == pytest.approx(np.std([x.a for x in fresh]), rel=0.25)
    again = bootstrap_fits("best_of_n", lambda index: (D, one[index].mean(axis=0)), items, 0, resamples=2)
    assert again == fits[:2] and fits[0] != fits[1]
    with pytest.raises(ValueError, match="a bootstrap over 1 items"):
        bootstrap_fits("rl", lambda index: (D, D), 1, 0)


def test_where_a_curve_turns():
    assert turning_point([0.0, 1.0, 2.0, 3.0], [0.0, 2.0, 1.5, 1.6]) == 1
    assert turning_point([3.0, 1.0, 2.0, 0.0], [1.6, 2.0, 1.5, 0.0]) == 1
    assert turning_point([0.0, 1.0], [0.0, 1.0]) is None
    assert turning_point([0.0, 1.0, 2.0], [0.0, 1.0, 1.0]) is None
    assert turning_point([0.0, 1.0, 2.0], [0.0, 1.0, 0.99], tolerance=0.02) is None
    assert turning_point([0.0, 1.0, 2.0], [0.0, 1.0, 0.99], tolerance=0.005) == 1
    assert turning_point([1.0], [1.0]) is None
    with pytest.raises(ValueError, match="equal length"):
        turning_point([1.0], [1.0, 2.0])
