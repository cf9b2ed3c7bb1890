"""Tables and figures of over-optimisation: where gold turns, how well the laws of Gao et al. fit, and trained points.

Shapes: B prompts, P points of a curve, R resamplings.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.stages.overopt_configs import Curves, Toy
from rlhfjax.figures import Styled, plot_distances
from rlhfjax.overoptimisation import Fit, Form, bootstrap_fits, fit, turning_point
from rlhfjax.report import Interval, Section, Table, bootstrap_interval
from rlhfjax.run_folder import RunFolder

NAMES: dict[str, tuple[str, Form]] = {"bon": ("best of n", "best_of_n"), "rl": ("RL", "rl")}
RESAMPLES = 500


class Fitted(NamedTuple):
    """A fit, and what it is held against."""

    fit: Fit
    d: np.ndarray  # [P] that it was fitted to
    gain: np.ndarray
    extrapolated: (
        float  # root mean squared error beyond half of the largest d, of a fit to the rest; NaN: too few
    )
    resampled: Sequence[Fit] = ()  # over prompts

    @property
    def turn(self) -> int | None:
        """Number of the highest point; None where gold does not fall by a thousandth of its range beyond it."""
        return turning_point(self.d, self.gain, tolerance=1e-3 * float(np.ptp(self.gain)))

    def interval(self, name: str) -> Interval | float:
        """A coefficient with its 95 % interval over prompts; alone where nothing was resampled."""
        value = getattr(self.fit, name)
        if not self.resampled:
            return value
        low, high = np.percentile([getattr(x, name) for x in self.resampled], [2.5, 97.5])
        return Interval(value, float(low), float(high))


def fitted(form: Form, d: np.ndarray, gain: np.ndarray, resampled: Sequence[Fit] = ()) -> Fitted:
    """The fit to all points, and how far one to the nearer half of the way is off on the farther half."""
    near = d <= d.max() / 2
    extrapolated = math.nan
    if np.unique(d[near & (d > 0)]).size >= 2 and not near.all():
        error = fit(form, d[near], gain[near])(d[~near]) - gain[~near]
        extrapolated = float(np.sqrt(np.mean(error**2)))
    return Fitted(fit(form, d, gain), d, gain, extrapolated, resampled)


FIT_HEADER = (
    "curve", "a", "b", "R^2", "residual", "error beyond half way", "peak by the fit (nats)", "best point (nats)",
    "gain by the fit", "gain there",
)  # fmt: skip


def fit_row(name: str, found: Fitted) -> list:
    """One row of the table of fits."""
    turn = found.turn
    peak = found.fit.peak
    inside = peak <= found.d.max()
    return [
        name,
        _shown(found.interval("a")),
        _shown(found.interval("b")),
        f"{found.fit.r_squared:.3f}",
        f"{found.fit.residual:.3g}",
        None if math.isnan(found.extrapolated) else f"{found.extrapolated:.3g}",
        _peak(found) if inside else "beyond the points",
        "none: it does not turn" if turn is None else f"{found.d[turn] ** 2:.2f}",
        f"{found.fit.peak_gain:.3f}" if inside else None,
        f"{found.gain.max():.3f}",
    ]


def _peak(found: Fitted) -> str:
    """The peak in nats, with its 95 % interval over prompts where there are resamplings."""
    if not found.resampled:
        return f"{found.fit.peak**2:.2f}"
    low, high = np.percentile([min(x.peak, 1e3) for x in found.resampled], [2.5, 97.5], method="nearest")
    shown = f"{high**2:.2f}" if high < 1e3 else "none"
    return f"{found.fit.peak**2:.2f} [{low**2:.2f}, {shown}]"


def _shown(x: Interval | float) -> str:
    return str(x) if isinstance(x, Interval) else f"{x:.3f}"


# ---- the toy


def toy_fits(config: Toy, exact: Mapping[str, np.ndarray]) -> dict[str, Fitted]:
    """KIND/bon and KIND/rl -> the fit of gold."""
    found = {}
    for kind in config.kinds:
        for name, (_, form) in NAMES.items():
            d = np.sqrt(exact[f"{kind}/{name}/kl"])
            found[f"{kind}/{name}"] = fitted(form, d, exact[f"{kind}/{name}/gold"])
    return found


def toy_sections(
    config: Toy,
    exact: Mapping[str, np.ndarray],
    trained: Mapping[str, Mapping[str, np.ndarray]],
    folder: RunFolder,
) -> list[Section]:
    """The report of the toy."""
    fits = toy_fits(config, exact)
    rows = [
        fit_row(f"{kind}, {NAMES[name][0]}", fits[f"{kind}/{name}"])
        for kind in config.kinds
        for name in NAMES
    ]
    panels = {kind: _toy_panel(kind, exact, fits, trained, config) for kind in config.kinds}
    figure = plot_distances(_figure(folder, "toy"), panels, y_label="standard deviations")
    size = config.model.vocab_size**config.model.length
    sections = [
        Section(
            "Gold against KL",
            f"A language model of {size} sequences; every number is exact. Scores are in standard deviations of the "
            "reference, d = sqrt(KL). RL: the optimum of proxy - beta KL.",
            figures=[(figure, "Proxy and gold against the distance; the fits are of gold")],
        ),
        Section(
            "Fits of d (a - b d) and d (a - b log d) to gold",
            "Beyond half way: a fit to the points up to half of the largest d, held against the others.",
            Table(FIT_HEADER, rows),
        ),
    ]
    if trained:
        sections.append(
            Section("Trained runs beside the optimum", "", Table(*_trained_table(config, trained)))
        )
    return sections


def _toy_panel(kind, exact, fits, trained, config: Toy) -> dict[str, Styled]:
    curves = {}
    for place, (name, (label, _)) in enumerate(NAMES.items()):
        d = np.sqrt(exact[f"{kind}/{name}/kl"])
        for field, style in (("proxy", "--"), ("gold", "-")):
            curves[f"{field}, {label}"] = Styled((d, exact[f"{kind}/{name}/{field}"]), style, place)
        grid = np.linspace(0, d.max(), 50)
        curves[f"fit, {label}"] = Styled((grid, fits[f"{kind}/{name}"].fit(grid)), ":", place)
    own = [i for i, (other, _) in enumerate(_pairs(config)) if other == kind]
    for place, (method, arrays) in enumerate(trained.items(), start=len(NAMES)):
        points = np.sqrt(np.maximum(arrays["trained/kl"][own], 0.0)), arrays["trained/gold"][own]
        curves[f"gold, trained by {method}"] = Styled(points, "o", place)
    return curves


def _pairs(config: Toy) -> list[tuple[str, float]]:
    return [(kind, beta) for kind in config.kinds for beta in config.trained_betas]


def _trained_table(
    config: Toy, trained: Mapping[str, Mapping[str, np.ndarray]]
) -> tuple[list[str], list[list]]:
    header = [
        "proxy",
        "method",
        "beta",
        "KL",
        "optimum's",
        "proxy score",
        "optimum's",
        "gold",
        "optimum's",
        "TV",
    ]
    rows = []
    for number, (kind, beta) in enumerate(_pairs(config)):
        for method, arrays in trained.items():
            row: list = [kind, method, beta]
            for field in ("kl", "proxy", "gold"):
                row += [f"{arrays[f'{which}/{field}'][number]:.3f}" for which in ("trained", "exact")]
            rows.append([*row, f"{arrays['total_variation'][number]:.3f}"])
    return header, rows


def toy_numbers(config: Toy, exact: Mapping[str, np.ndarray]) -> dict[str, float]:
    """For summary.json: where gold turns, and the fits."""
    numbers = {}
    for name, found in toy_fits(config, exact).items():
        turn = found.turn
        numbers |= {
            f"{name}/turning_kl": math.nan if turn is None else float(found.d[turn] ** 2),
            f"{name}/highest_gold": float(found.gain.max()),
            f"{name}/last_gold": float(found.gain[np.argmax(found.d)]),
            f"{name}/fit_peak_kl": found.fit.peak**2 if found.fit.peak < 1e6 else math.inf,
            f"{name}/r_squared": found.fit.r_squared,
        }
    return numbers


# ---- text


def text_fits(found: Mapping[str, np.ndarray]) -> dict[str, Fitted]:
    """Curve -> the fit of gold; best of n and RL over prompts, and along the run of the smallest beta."""
    bon, start = found["bon/gold"], found["start/gold"]
    d_bon = np.sqrt(found["bon/kl"])
    prompts = len(start)

    def of_best(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return d_bon, bon[:, index].mean(axis=1) - bon[0, index].mean()

    def of_rl(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d = np.sqrt(np.maximum(found["rl/kl"][:, index].mean(axis=1), 0.0))
        return d, found["rl/gold"][:, index].mean(axis=1) - start[index].mean()

    fits = {}
    curves: dict[str, tuple[Form, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]]] = {
        "best of n": ("best_of_n", of_best),
        "RL, by beta": ("rl", of_rl),
    }
    for name, (form, curve) in curves.items():
        d, gain = curve(np.arange(prompts))
        if np.unique(d[d > 0]).size >= 2:
            fits[name] = fitted(form, d, gain, bootstrap_fits(form, curve, prompts, 0, resamples=RESAMPLES))
    d = np.sqrt(np.maximum(found["along/kl"], 0.0))
    if np.unique(d[d > 0]).size >= 2:
        fits["RL, along the run"] = fitted("rl", d, found["along/gold"] - found["along/start"])
    return fits


def text_sections(
    config: Curves, found: Mapping[str, np.ndarray], gold_name: str, seeds: int, folder: RunFolder
):
    """The report on text."""
    fits = text_fits(found)
    rows = [
        [
            "best of n",
            f"n = {int(n)}",
            f"{kl:.2f}",
            _mean(found["bon/reward"][k]),
            _mean(found["bon/gold"][k]),
        ]
        for k, (n, kl) in enumerate(zip(found["bon/n"], found["bon/kl"], strict=True))
    ]
    rows.append(["start", "", "0.00", _mean(found["start/reward"]), _mean(found["start/gold"])])
    rows += [
        [
            "RL",
            f"beta = {beta:g}",
            f"{found['rl/kl'][m].mean():.2f}",
            _mean(found["rl/reward"][m]),
            _mean(found["rl/gold"][m]),
        ]
        for m, beta in enumerate(found["rl/beta"])
    ]
    reward = (
        "reward" if config.ensemble == 1 else f"mean of {config.ensemble} rewards - {config.penalty:g} std"
    )
    panels = _text_panels(found, fits, gold_name, reward)
    figure = plot_distances(_figure(folder, "text"), panels, y_label="gain over the start")
    of_seeds = "One seed" if seeds == 1 else f"Means over {seeds} seeds"
    return [
        Section(
            "Reward and gold against KL",
            f"{of_seeds}, on the same {len(found['start/gold'])} prompts of the validation split; 95 % intervals over "
            f"prompts. Best of n: the unbiased estimate from {config.samples} samples of a prompt, its KL the bound "
            "log n - (n-1)/n; the KL of RL is an estimate (k1) from one sample of a prompt.",
            Table(["optimiser", "strength", "KL (nats)", reward, gold_name], rows),
            figures=[
                (figure, f"{reward} and {gold_name} against d = sqrt(KL); lines without marks: the fits")
            ],
        ),
        Section(
            f"Fits of d (a - b d) and d (a - b log d) to the gain in {gold_name}",
            "Intervals from fits to resampled prompts. Along the run: the rollouts of the run with the smallest beta, "
            "in tenths. A fit of few points tells little: look at b's interval before believing in a peak.",
            Table(FIT_HEADER, [fit_row(name, x) for name, x in fits.items()]),
        ),
    ]


def _text_panels(
    found: Mapping[str, np.ndarray], fits: Mapping[str, Fitted], gold_name: str, reward: str
) -> dict[str, dict[str, Styled]]:
    """The gains in reward, and in gold with its fits."""
    d_rl, d_along = (np.sqrt(np.maximum(x, 0.0)) for x in (found["rl/kl"].mean(axis=1), found["along/kl"]))
    panels = {}
    for field, title in (("reward", f"gain in {reward}"), ("gold", f"gain in {gold_name}")):
        bon, rl = (found[f"{name}/{field}"].mean(axis=1) for name in NAMES)
        along_start = found["along/start"] if field == "gold" else 0.0
        curves = {
            "best of n": Styled((np.sqrt(found["bon/kl"]), bon - bon[0]), "-", 0),
            "RL, by beta": Styled((d_rl, rl - found[f"start/{field}"].mean()), "o", 1),
            "RL, along the run": Styled((d_along, found[f"along/{field}"] - along_start), "-", 2),
        }
        for place, (name, x) in enumerate(fits.items() if field == "gold" else ()):
            grid = np.linspace(0.0, x.d.max(), 50)
            curves[f"fit, {name}"] = Styled((grid, x.fit(grid)), ":", place)
        panels[title] = curves
    return panels


def text_numbers(found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """For summary.json."""
    numbers = {}
    for k, n in enumerate(found["bon/n"]):
        numbers |= {
            f"best of {int(n)}/{field}": float(found[f"bon/{field}"][k].mean())
            for field in ("gold", "reward")
        }
    for m, beta in enumerate(found["rl/beta"]):
        numbers |= {
            f"beta {beta:g}/{field}": float(found[f"rl/{field}"][m].mean())
            for field in ("gold", "reward", "kl")
        }
    for name, x in text_fits(found).items():
        numbers |= {
            f"fit of {name}/{field}": float(getattr(x.fit, field)) for field in ("a", "b", "r_squared")
        }
    return numbers


def _mean(values: np.ndarray) -> Interval:
    return bootstrap_interval(values, 0, resamples=2000)


def _figure(folder: RunFolder, name: str):
    path = folder.path / "figures"
    path.mkdir(exist_ok=True)
    return path / f"{name}.png"
