"""Many runs of policy optimisation in one program: seeds, and settings that differ in floats.

Shapes: R runs, H settings that differ, S seeds, N steps, B prompts, P prompt length.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import Show, run_stage
from experiments.options import did_you_mean, flatten, to_mapping
from experiments.stages.configs import PPOStage
from experiments.stages.control_report import figure_section
from experiments.stages.policy import Learner, Problem, check, compose, run_key
from rlhfjax.data import batch_indices
from rlhfjax.figures import Bands, plot_bands
from rlhfjax.mesh import init_on, put
from rlhfjax.mesh import rows as rows_of
from rlhfjax.networks import LanguageModel
from rlhfjax.recipes import Frozen, Prompts
from rlhfjax.report import Section, Table, bootstrap_interval
from rlhfjax.run_folder import RunFolder, read_lines

# Metric -> its name in tables and figures; of these each run's own is logged, of the others the mean over runs.
SHOWN = {"objective/score": "reward", "gold": "gold", "objective/kl": "KL, nats"}


class Grid(NamedTuple):
    """The runs: every combination of values with every seed, seeds innermost."""

    names: tuple[str, ...]  # dotted paths of the settings that differ
    value_RH: np.ndarray  # float32
    seed_R: np.ndarray  # int32
    seeds: int

    def label(self, run: int) -> str:
        """The run's setting in words: the values that are not the same in all runs."""
        differs_H = np.any(self.value_RH != self.value_RH[0], axis=0)
        values = zip(self.names, self.value_RH[run], differs_H, strict=True)
        parts = [f"{name.split('.')[-1]} {value:g}" for name, value, differs in values if differs]
        return ", ".join(parts) or "the settings"


def make_grid(config: PPOStage, vary: Sequence[str], seeds: int, first_seed: int) -> Grid:
    """The grid of "path=value,value" texts, e.g. "algorithm.kl-coefficient=0.03,0.3".

    Raises ValueError for a text of another form, a path that leads to no float of `config`, a path given twice, or
    no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    floats = {path: x for path, x in flatten(to_mapping(config)).items() if type(x) is float}
    columns: dict[str, list[float]] = {}
    for text in vary:
        path, _, listed = text.partition("=")
        path = path.strip().replace("-", "_")
        if path not in floats:
            raise ValueError(
                f"vary {text!r}: {path!r} is no float setting of the stage{did_you_mean(path, floats)}"
            )
        if path in columns:
            raise ValueError(f"vary names {path!r} twice; list all its values in one")
        columns[path] = _numbers(listed)
        if not np.isfinite(columns[path]).all():
            raise ValueError(
                f"vary {text!r} must read PATH=NUMBER,NUMBER, for example {path}={floats[path]:g},0.5"
            )
    rows = [row for row in itertools.product(*columns.values()) for _ in range(seeds)]
    seed_R = np.tile(np.arange(first_seed, first_seed + seeds, dtype=np.int32), len(rows) // seeds)
    return Grid(tuple(columns), np.array(rows, np.float32).reshape(len(rows), -1), seed_R, seeds)


def _numbers(listed: str) -> list[float]:
    """Numbers between commas; NaN for what is none."""
    found = []
    for text in listed.split(","):
        try:
            found.append(float(text))
        except ValueError:
            found.append(math.nan)
    return found


def check_grid(config: PPOStage, grid: Grid, available: int) -> None:
    """Raises ValueError where a run of the grid could not be made."""
    if config.guards.watch:
        raise ValueError(
            "guards look at one run, and a sweep is many in one program: leave ppo.guards.watch empty"
        )
    for value_H in grid.value_RH[:: grid.seeds]:
        check(with_values(config, grid.names, [float(x) for x in value_H]), available)


def with_values(config: Any, names: Sequence[str], values: Iterable[Any]) -> Any:
    """`config` with the values at the dotted paths; they may be traced."""
    for name, value in zip(names, values, strict=True):
        head, _, rest = name.partition(".")
        value = with_values(getattr(config, head), [rest], [value]) if rest else value
        config = dataclasses.replace(config, **{head: value})
    return config


class Programs(NamedTuple):
    """What the stage compiles of its runs.

    init(params that a run starts from) -> states [R, ...]
    iterate(states, frozen, prompts [R, B, ...], number of the step) -> (states, metrics, seen)
        Donates the states. `seen`: of every run the numbers of its prompts, and what was generated.
    """

    init: Callable[[dict], Any]
    iterate: Callable[..., tuple[Any, dict[str, jax.Array], Any]]


def make_programs(
    config: PPOStage,
    make_learner: Callable[[LanguageModel, PPOStage], Learner],
    problem: Problem,
    grid: Grid,
) -> Programs:
    """The programs of all runs of the grid."""
    text = problem.text

    def init_one(value_H: jax.Array, params: dict):
        return make_learner(text.lm, with_values(config, grid.names, value_H)).algorithm.init(params)

    def init(params: dict):
        return jax.vmap(init_one, (0, None))(jnp.asarray(grid.value_RH), params)

    def iteration(lm: LanguageModel):
        def one(frozen: Frozen, i: jax.Array, state: Any, value_H: jax.Array, seed: jax.Array, prompts):
            own = with_values(config, grid.names, value_H)
            rlhf = compose(lm, own, make_learner(lm, own), problem)
            key = jax.random.fold_in(run_key(seed), i)
            state, metrics, experience = rlhf.iterate(state, frozen, prompts, key)
            return state, metrics, (prompts.index_B, experience.generation)

        def iterate(state_R: Any, frozen: Frozen, prompts_R: Prompts, i: jax.Array):
            of_runs = state_R, jnp.asarray(grid.value_RH), jnp.asarray(grid.seed_R), prompts_R
            state_R, metrics_R, seen = jax.vmap(partial(one, frozen, i))(*of_runs)
            metrics = {key: jnp.mean(value_R) for key, value_R in metrics_R.items()}
            metrics |= _by_run({key: metrics_R[key] for key in SHOWN if key in metrics_R})
            metrics["perf/generated_tokens"] = seen[1].mask_BGC.sum(dtype=jnp.float32)
            return state_R, metrics, seen

        return iterate

    return Programs(jax.jit(init), text.jit(iteration, donate_argnums=(0,)))


def optimise_policies(
    name: str,
    config: PPOStage,
    make_learner: Callable[[LanguageModel, PPOStage], Learner],
    problem: Problem,
    grid: Grid,
    folder: RunFolder,
) -> None:
    """Runs the stage `name`: all runs of the grid from one reference, each step one program.

    A run draws the prompts and keys that it would draw alone with its seed.
    """
    text, examples, rows = problem.text, problem.examples, problem.rows
    frozen = Frozen(problem.reference, problem.reward_params)
    programs = make_programs(config, make_learner, problem, grid)

    # The rows of each run lie as those of one alone.
    stack = jax.jit(
        lambda batches: jax.tree.map(lambda *x: jnp.stack(x), *batches),
        out_shardings=rows_of(text.mesh, axis=1),
    )

    def init():
        params = put(text.mesh, make_learner(text.lm, config).params)
        return init_on(text.mesh, programs.init, params)

    def batch(step: int) -> Prompts:
        one_of = {
            seed: text.batch(examples, rows[batch_indices(seed, step, config.prompts, len(rows))])
            for seed in sorted(set(grid.seed_R.tolist()))
        }
        return stack([one_of[seed] for seed in grid.seed_R.tolist()])

    def step(state_R, prompts_R: Prompts, i: int):
        return programs.iterate(state_R, frozen, prompts_R, jnp.int32(i))

    def measure(i: int, seen) -> dict[str, float]:
        del i
        index_RB, generation_R = seen
        gold_R = np.array(
            [
                np.mean(problem.gold(index_B, text.decode(token_BGC, mask_BGC)))
                for index_B, token_BGC, mask_BGC in zip(
                    index_RB, generation_R.token_BGC, generation_R.mask_BGC, strict=True
                )
            ]
        )
        return {"gold": float(gold_R.mean())} | _by_run({"gold": gold_R})

    run_stage(
        name,
        folder=folder,
        init=init,
        step=step,
        batch=batch,
        steps=config.steps,
        checkpoint_every=25,
        show=Show(columns=SHOWN, every=1, measure=measure),
    )


def _by_run(values: Mapping[str, Any]) -> dict[str, Any]:
    """ "NAME/run_NUMBER" for each run of each metric [R]."""
    return {f"{key}/run_{run}": value for key, value_R in values.items() for run, value in enumerate(value_R)}


def grid_sections(name: str, grid: Grid, folder: RunFolder) -> tuple[Table, list[Section], dict[str, float]]:
    """The table of settings, the report's sections with it, and the numbers of summary.json.

    A run is told by its mean over the last quarter of its steps.
    """
    lines = [line for line in read_lines(folder.path / "metrics.jsonl") if line["stage"] == name]
    runs = range(len(grid.seed_R))
    curve_RN = {
        metric: np.array([[line[f"{metric}/run_{run}"] for line in lines] for run in runs])
        for metric in SHOWN
    }
    last = max(1, len(lines) // 4)
    rows, numbers = [], {}
    for first in range(0, len(runs), grid.seeds):
        of_setting = slice(first, first + grid.seeds)
        intervals = {
            metric: bootstrap_interval(value_RN[of_setting, -last:].mean(axis=1), folder.seed)
            for metric, value_RN in curve_RN.items()
        }
        rows.append([grid.label(first), *intervals.values()])
        numbers |= {f"{grid.label(first)}/{metric}": x.value for metric, x in intervals.items()}
    text = (
        f"Means over {grid.seeds} seeds of the last {last} steps, with 95 % bootstrap intervals over the seeds. All "
        f"{len(runs)} runs start from one fine-tuned policy and are one program."
    )
    step_N = [line["step"] for line in lines]
    bands = [
        Bands(
            label,
            {
                grid.label(first): (step_N, curve_RN[metric][first : first + grid.seeds])
                for first in range(0, len(runs), grid.seeds)
            },
            x_label="step",
        )
        for metric, label in SHOWN.items()
    ]
    table = Table(["setting", *SHOWN.values()], rows)
    return (
        table,
        [
            Section("Settings", text, table),
            figure_section(
                "Curves",
                "Means over the seeds, and from the lowest to the highest.",
                {"Along the steps": lambda path: plot_bands(path, bands)},
                folder,
                name,
            ),
        ],
        numbers,
    )
