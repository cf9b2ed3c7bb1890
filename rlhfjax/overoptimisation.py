"""Over-optimisation: how the score that is optimised and the one that is meant part with the KL (Gao et al. 2022,
arXiv 2210.10760).

With d = sqrt(KL) from the policy that optimisation starts from, and R the gain in gold score over it, they find

    best of n    R(d) = d (a - b d)              peak at d = a / (2 b), of a^2 / (4 b)
    RL           R(d) = d (a - b log d)          peak at d = exp(a / b - 1), of b exp(a / b - 1)

a is how much is gained at first, b how soon it is lost; of the score that is optimised b is small. Both are linear in
a and b, so that a fit is a linear least-squares problem. NumPy only, float64.

Shapes: N points, R resamplings.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

Form = Literal["best_of_n", "rl"]
FORMS = ("best_of_n", "rl")


class Fit(NamedTuple):
    """A curve d (a - b f(d)), f(d) = d (best of n) or log d (RL); R in units of score, d in sqrt(nats)."""

    form: Form
    a: float
    b: float
    a_error: float  # standard errors, from the residuals; NaN where two points leave none
    b_error: float
    r_squared: float  # share of the (weighted) variation of R that the curve explains; below 0: worse than a constant
    residual: float  # root of the (weighted) mean squared residual, in units of score

    def __call__(self, d: Any) -> np.ndarray:
        """The curve at these d >= 0."""
        return _basis(self.form, np.asarray(d, np.float64)) @ np.array([self.a, self.b])

    @property
    def peak(self) -> float:
        """d at which the curve is highest. Infinite where it never turns (b <= 0, a > 0), 0 where it only falls; of RL
        with b < 0, whose curve falls first and rises for ever, infinite."""
        if self.b <= 0:
            return math.inf if self.form == "rl" and self.b < 0 or self.a > 0 else 0.0
        if self.form == "best_of_n":
            return max(0.0, self.a / (2 * self.b))
        return _exp(self.a / self.b - 1)

    @property
    def peak_gain(self) -> float:
        """R at the peak: the most that there is to be gained; infinite where the curve never turns."""
        return float(self(self.peak)) if math.isfinite(self.peak) else math.inf


def fit(form: Form, d: Any, gain: Any, weight: Any = None) -> Fit:
    """Least squares of `gain` on d (a - b f(d)).

    Args:
      form: "best_of_n" or "rl".
      d: [N], square roots of KL in nats, >= 0. Points at 0, where both curves are 0, say nothing and are left out.
      gain: [N], score less that of the policy at d = 0.
      weight: [N] > 0, e.g. 1 / variance of each gain; None: all alike. Only their ratios matter.

    Returns:
      The fit. The standard errors take the residuals for independent noise; for points made of the same prompts
      `bootstrap_fits` gives better ones.

    Raises:
      ValueError: an unknown form, lengths that differ, values that are not finite, a negative d, weights that are not
        above 0, or fewer than two different d above 0.
    """
    d, gain, weight = _points(form, d, gain, weight)
    root = np.sqrt(weight / weight.mean())
    basis = _basis(form, d) * root[:, None]
    target = gain * root
    coefficients, *_ = np.linalg.lstsq(basis, target, rcond=None)
    error = target - basis @ coefficients
    squares, free = float(error @ error), d.size - 2
    spread = np.full(2, math.nan)
    if free > 0:
        spread = np.sqrt(np.diag(np.linalg.inv(basis.T @ basis)) * squares / free)
    around = float(np.sum(weight / weight.mean() * (gain - np.average(gain, weights=weight)) ** 2))
    r_squared = 1 - squares / around if around > 0 else (1.0 if squares == 0 else -math.inf)
    return Fit(
        form,
        float(coefficients[0]),
        float(coefficients[1]),
        float(spread[0]),
        float(spread[1]),
        r_squared,
        math.sqrt(squares / d.size),
    )


def bootstrap_fits(
    form: Form,
    curve: Callable[[np.ndarray], tuple[Any, Any]],
    items: int,
    seed: int,
    *,
    resamples: int = 200,
) -> list[Fit]:
    """Fits to curves of resampled items, from which intervals of a, b and the peak are read.

    Args:
      curve: `curve(index [items]) -> (d [N], gain [N])` of the items (prompts) drawn, some of them several times.
      items: how many there are, at least 2.
      seed: the same seed gives the same fits.

    Raises ValueError where there are fewer than two items, and what `fit` raises.
    """
    if items < 2:
        raise ValueError(f"a bootstrap over {items} items says nothing of their spread; it needs at least 2")
    generator = np.random.default_rng(seed)
    return [fit(form, *curve(generator.integers(items, size=items))) for _ in range(resamples)]


def turning_point(d: Any, gain: Any, *, tolerance: float = 0.0) -> int | None:
    """Index of the highest gain, where the last one by d is lower by more than `tolerance`; else None.

    [N] each, in any order; of equal gains the one at the smaller d.
    """
    d, gain = np.asarray(d, np.float64), np.asarray(gain, np.float64)
    if d.ndim != 1 or d.shape != gain.shape or not d.size:
        raise ValueError(
            f"d {d.shape} and gain {gain.shape} must be vectors of equal length, of at least 1 point"
        )
    order = np.argsort(d, kind="stable")
    best = int(np.argmax(gain[order]))
    return None if gain[order][-1] >= gain[order][best] - tolerance else int(order[best])


def _basis(form: str, d: np.ndarray) -> np.ndarray:
    """d times 1 and -f(d): [..., 2], zeros at d = 0."""
    if form == "best_of_n":
        return np.stack([d, -d * d], axis=-1)
    # d log d -> 0 as d -> 0
    return np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))], axis=-1)


def _points(form: str, d: Any, gain: Any, weight: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if form not in FORMS:
        raise ValueError(f'form {form!r} is unknown; choose "best_of_n" or "rl"')
    d, gain = np.asarray(d, np.float64), np.asarray(gain, np.float64)
    weight = np.ones_like(d) if weight is None else np.asarray(weight, np.float64)
    for name, x in (("d", d), ("gain", gain), ("weight", weight)):
        if x.ndim != 1 or x.shape != d.shape:
            raise ValueError(f"{name} must be a vector as long as d, {d.shape}; it has shape {x.shape}")
        if not np.all(np.isfinite(x)):
            raise ValueError(f"{name}[{int(np.argmin(np.isfinite(x)))}] is not finite; leave that point out")
    if np.any(d < 0):
        raise ValueError(
            f"d[{int(np.argmax(d < 0))}] = {d.min()} is negative: it is the root of a KL, at least 0"
        )
    if np.any(weight <= 0):
        raise ValueError(
            f"weight[{int(np.argmax(weight <= 0))}] must be above 0; leave that point out instead"
        )
    used = d > 0
    different = np.unique(d[used]).size
    if different < 2:
        raise ValueError(
            f"a fit of two coefficients needs at least two different d above 0; there is {different} among "
            f"{d.size} points: take more values of n, or of beta"
        )
    return d[used], gain[used], weight[used]


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
