"""Tabular methods in a world given by a table, held against its exact optimum.

Shapes: R seeds, S states, A actions.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.stages import control
from experiments.stages.control import Outcome
from experiments.stages.control_layout import Layout, lay_out
from experiments.stages.control_report import code, figure_section, mean_and_range
from experiments.stages.control_scenes import beside
from rlhfjax.algorithms import tabular_q
from rlhfjax.environments import Environment
from rlhfjax.environments.grid import optimal_values
from rlhfjax.figures import Bands, plot_bands
from rlhfjax.mesh import Devices, make_mesh
from rlhfjax.recipes.control import Training
from rlhfjax.recipes.tabular import control_tabular, optimality_gap, reachable_states
from rlhfjax.report import Section, Table, markdown_table, write_report
from rlhfjax.run_folder import RunFolder

CLOSE = 1e-3  # a policy counts as optimal if no state loses more, in units of reward
EXACT = "the exact value of every greedy policy"  # what is computed on the host, for `--dry-run`
TRACELESS = 1e-9  # gaps below are rounding; drawn as this


class Map(NamedTuple):
    """How a world of places is drawn: its rows of letters, and an arrow for each action."""

    rows: tuple[str, ...]
    arrows: str

    def policy(self, q_SA: np.ndarray, standing_S: np.ndarray) -> str:
        """The greedy action where one may stand, the letter of the place elsewhere."""
        letters = [
            self.arrows[int(q.argmax())] if standing else letter
            for q, standing, letter in zip(q_SA, standing_S, "".join(self.rows), strict=True)
        ]
        return self._lines(letters, " ")

    def values(self, value_S: np.ndarray, standing_S: np.ndarray) -> str:
        """The number of each place where one may stand, the letter elsewhere."""
        cells = [
            f"{value:6.3f}"[:6] if standing else f"{letter:>6}"
            for value, standing, letter in zip(value_S, standing_S, "".join(self.rows), strict=True)
        ]
        return self._lines(cells, " ")

    def place(self, state: np.ndarray) -> str:
        """The map with the player @ on it."""
        letters = list("".join(self.rows))
        letters[int(state)] = "@"
        return self._lines(letters, "")

    def _lines(self, cells: Sequence[str], between: str) -> str:
        width = len(self.rows[0])
        return "\n".join(between.join(cells[i : i + width]) for i in range(0, len(cells), width))


class Learnt(NamedTuple):
    """A method's outcome, and how far it is from the optimum."""

    outcome: Outcome
    q_RSA: np.ndarray  # at the end
    gap: np.ndarray  # [R, points], max over states of V* - V of the greedy policy; infinite: it never ends
    error: np.ndarray  # [R, points], max over states of |max_a Q - V*|


def solve(
    title: str,
    env: Environment,
    drawn: Map,
    config: Any,
    folder: RunFolder,
    *,
    most_steps: int,
    text: str = "",
) -> dict[str, float]:
    """Runs the methods that `config.algorithms` names and reports them beside the optimum; returns summary.json.

    `most_steps` of an episode that is shown or evaluated by playing. Raises ValueError on bad settings before anything
    is run.
    """
    jobs = make_jobs(env, config, make_mesh(folder.mesh))
    discount = config.training.algorithm.discount
    best_S, best_SA = optimal_values(env.params, discount=discount)
    standing_S = reachable_states(env.params)
    start_S = np.asarray(env.params.start_S)
    world = control.World(title, env, most_steps, float("nan"), drawn.place)
    found = [
        _learn(job.name, job.training, world, job.plan, folder, job.layout, best_S, standing_S, discount)
        for job in jobs
    ]
    results = _result_section(found, best_SA, standing_S)
    maps = _maps(drawn, found, best_SA, standing_S)
    print(f"\n{title}\n\n{markdown_table(results.table)}\n{maps}" if results.table else maps)
    optimum = f"V* of the start is {float(start_S @ best_S):.6g} (discount {discount:g})."
    write_report(
        folder.path,
        f"{title}, {config.seeds} seeds, seed {folder.seed}",
        [
            results._replace(text=f"{text} {optimum} {results.text}".strip()),
            _curve_section(found, folder),
            Section("The optimum and what was learnt", f"{MAPS}\n\n{code(maps)}"),
            *(_game_section(item.outcome, drawn) for item in found),
        ],
    )
    return _summary(found, best_SA, standing_S)


def make_jobs(env: Environment, config: Any, mesh: Devices) -> list[control.Job]:
    """The methods that `config.algorithms` names. ValueError on bad settings."""
    jobs = []
    for name in control.choose(config.algorithms, tabular_q.METHODS):
        own = method_config(config.training, name)
        plan = control.make_plan(config, own)
        jobs.append(control.Job(name, control_tabular(env, own), env, plan, lay_out(mesh, name, config, own)))
    return jobs


def method_config(config: Any, name: str) -> Any:
    """The settings with another method; those that follow one walk take one world, and as many steps in it."""
    algorithm = dataclasses.replace(config.algorithm, method=name)
    if name == "q_lambda":
        config = dataclasses.replace(config, worlds=1, steps=config.worlds * config.steps)
    return dataclasses.replace(config, algorithm=algorithm)


def _learn(
    name: str,
    training: Training,
    world: control.World,
    plan: control.Plan,
    folder: RunFolder,
    layout: Layout,
    best_S: np.ndarray,
    standing_S: np.ndarray,
    discount: float,
) -> Learnt:
    table = world.env.params
    states = jnp.arange(best_S.size)

    def measure(step: int, q_RSA: np.ndarray) -> Mapping[str, float]:
        del step
        gap_R = [optimality_gap(table, q, discount=discount)[standing_S].max() for q in q_RSA]
        error_R = [np.abs(q.max(axis=1) - best_S)[standing_S].max() for q in q_RSA.astype(np.float64)]
        numbers = {"gap/largest": float(max(gap_R)), "value_error/largest": float(max(error_R))}
        for r, (gap, error) in enumerate(zip(gap_R, error_R, strict=True)):
            numbers |= {f"seed_{r}/gap": max(float(gap), 0.0), f"seed_{r}/value_error": float(error)}
        return numbers

    def look(run: Any) -> jax.Array:
        assert training.values is not None
        return training.values(run, states)

    outcome, q_RSA = control.run_training(
        name, training, world, plan, folder, layout=layout, look=look, measure=measure
    )
    lines = folder.metrics(name)

    def each(key: str, unknown: float) -> np.ndarray:
        rows = [[line[f"seed_{r}/{key}"] for line in lines] for r in range(plan.seeds)]
        return np.array([[unknown if x is None else x for x in row] for row in rows], np.float64)

    return Learnt(outcome, q_RSA, each("gap", np.inf), each("value_error", np.nan))


def optimal_from(found: Learnt) -> np.ndarray:
    """Environment steps from which on the greedy policy was optimal at every point, [R]; NaN: not at the end."""
    held = np.cumprod((found.gap <= CLOSE)[:, ::-1], axis=1)[:, ::-1].astype(bool)
    return np.where(held[:, -1], found.outcome.x[held.argmax(axis=1)], np.nan)


def _result_section(found: Sequence[Learnt], best_SA: np.ndarray, standing_S: np.ndarray) -> Section:
    header = [
        "method",
        "optimal seeds",
        "steps until optimal",
        "largest V* - V(greedy policy)",
        "largest error of V",
        "largest error of Q",
        "return of the greedy policy, played",
        "environment steps/s",
    ]
    rows = []
    for item in found:
        from_R, rate = optimal_from(item), item.outcome.rate
        rows.append(
            [
                item.outcome.name,
                f"{np.isfinite(from_R).sum()} of {len(from_R)}",
                mean_and_range(from_R, ",.0f"),
                f"{item.gap[:, -1].max():.2g}",
                f"{item.error[:, -1].max():.2g}",
                f"{_action_error(item, best_SA, standing_S):.2g}",
                mean_and_range(item.outcome.score.mean(axis=1), ".4g"),
                None if rate is None else f"{rate:,.0f}",
            ]
        )
    text = (
        "V of the greedy policy is computed from the table of the world, in float64, not estimated; the largest "
        "difference over all states that can be reached and all seeds counts. A seed is optimal if its policy loses at "
        f"most {CLOSE:g} in every such state. Steps are those of one seed: the mean over seeds (lowest to highest). "
        "Errors are those of the learnt table, of max Q beside V* and of Q beside Q*: actions that are never best may "
        "stay unknown without harm."
    )
    return Section("Methods against the optimum", text, Table(header, rows))


def _action_error(item: Learnt, best_SA: np.ndarray, standing_S: np.ndarray) -> float:
    return float(np.abs(item.q_RSA.astype(np.float64) - best_SA)[:, standing_S].max())


def _curve_section(found: Sequence[Learnt], folder: RunFolder) -> Section:
    def bands(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        curves = {item.outcome.name: (item.outcome.x, getattr(item, name)) for item in found}
        return {
            label: (x, np.where(np.isfinite(y), np.maximum(y, TRACELESS), np.nan))
            for label, (x, y) in curves.items()
        }

    panels = [
        Bands(
            "V* - V(greedy policy)",
            bands("gap"),
            title="Loss of the greedy policy",
            level=CLOSE,
            logarithmic=True,
        ),
        Bands("largest |max Q - V*|", bands("error"), title="Error of the values", logarithmic=True),
    ]
    return figure_section(
        "Error along the run",
        f"The largest over states; mean over seeds, lowest to highest. What is below {TRACELESS:g} is drawn there. "
        "A policy that never ends has no value, and leaves a gap.",
        {"Error against the environment steps of a seed": lambda path: plot_bands(path, panels, columns=2)},
        folder,
        "errors",
    )


MAPS = "The best action of every place and what it is worth; of the methods, those of the first seed."


def _maps(drawn: Map, found: Sequence[Learnt], best_SA: np.ndarray, standing_S: np.ndarray) -> str:
    """Policy and values of the optimum and of each method, beside each other."""
    tables = {"optimum": best_SA} | {item.outcome.name: item.q_RSA[0] for item in found}
    policies = beside([drawn.policy(q, standing_S) for q in tables.values()], list(tables))
    values = beside([drawn.values(q.max(axis=1), standing_S) for q in tables.values()], list(tables))
    return f"{policies}\n\n{values}"


def _game_section(outcome: Outcome, drawn: Map, most: int = 16) -> Section:
    places = control.pick_frames(len(outcome.game), most)
    frames = beside([drawn.place(outcome.game[i]) for i in places], [f"step {i}" for i in places])
    text = f"The first seed, greedy, {len(outcome.game) - 1} steps.\n\n{code(frames)}"
    return Section(f"A game of {outcome.name}", text)


def _summary(found: Sequence[Learnt], best_SA: np.ndarray, standing_S: np.ndarray) -> dict[str, float]:
    numbers = {}
    for item in found:
        name, from_R = item.outcome.name, optimal_from(item)
        numbers |= {
            f"{name}/seeds_optimal": int(np.isfinite(from_R).sum()),
            f"{name}/largest_gap": float(item.gap[:, -1].max()),
            f"{name}/largest_value_error": float(item.error[:, -1].max()),
            f"{name}/largest_action_value_error": _action_error(item, best_SA, standing_S),
            f"{name}/greedy_return": float(item.outcome.score.mean()),
        }
    return numbers
