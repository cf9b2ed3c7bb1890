"""Over-optimisation: the score that is optimised, the one that is meant, and the KL between (Gao et al. 2022).

`--on toy`: a language model that can be enumerated, proxies wrong on purpose, every curve exact, trained runs beside
them. `--on text`: the summaries of `summarize`; best-of-n and RL against a learned reward, at many strengths.
See docs/overoptimisation.md.
"""

from dataclasses import dataclass, field
from typing import Literal

from experiments.stages.configs import (
    GRPOStage,
    PPOStage,
    PreferenceStage,
    RewardStage,
    SFTStage,
    Text,
    rloo_stage,
)
from experiments.stages.overopt_configs import Curves, Toy

DESCRIPTION = "over-optimisation: proxy, gold and KL of best-of-n and RL, exactly on a toy or on text"


@dataclass(frozen=True)
class Config:
    on: Literal["toy", "text"] = "toy"
    """toy: sections `toy`; text: all the others."""
    algorithm: Literal["ppo", "grpo", "rloo"] = "ppo"
    """On text, the method of RL; the section of the same name holds its settings, but for the KL coefficient."""
    seeds: int = 1
    """On text: runs, from the run's seed on; the curves are their means."""
    toy: Toy = field(default_factory=Toy)
    curves: Curves = field(default_factory=Curves)
    text: Text = field(default_factory=Text)
    sft: SFTStage = field(default_factory=SFTStage)
    preferences: PreferenceStage = field(default_factory=PreferenceStage)
    reward: RewardStage = field(default_factory=RewardStage)
    ppo: PPOStage = field(default_factory=PPOStage)
    grpo: GRPOStage = field(default_factory=GRPOStage)
    rloo: GRPOStage = field(default_factory=rloo_stage)


def plan(config: Config, mesh) -> list:
    """The programs of all stages, as shapes."""
    if config.on == "text":
        from experiments.stages import overopt_text
        from experiments.stages.text_programs import programs_of_text

        sections = overopt_text.sections_of(config)
        return programs_of_text(
            config.text,
            mesh,
            sft=config.sft,
            preferences=config.preferences,
            reward=config.reward,
            policies=overopt_text.stages_of(
                config.curves, config.algorithm, getattr(config, config.algorithm)
            ),
            evaluation=sections.evaluation,
            seeds=config.seeds,
        )
    import jax
    import jax.numpy as jnp

    from experiments.programs import Program, whole_shapes
    from experiments.stages import overopt_toy

    overopt_toy.check(config.toy)
    world, scores = overopt_toy.make_world(config.toy, 0)
    _, proxy_RN, beta_R = overopt_toy.runs(config.toy, scores)
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (proxy_RN, beta_R)]
    return [
        Program(
            stage=method,
            name="a whole run",
            function=jax.jit(overopt_toy.trainer(config.toy, world, method, jax.random.key(0), None)),
            arguments=tuple(whole_shapes(mesh, x) for x in shapes),
            runs=1,
            uncounted="the exact curves",
        )
        for method in config.toy.trained
    ]


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    return _run_toy(config, folder) if config.on == "toy" else _run_text(config, folder)


def _run_toy(config: Config, folder) -> dict[str, float]:
    from functools import partial

    from experiments.loop import run_once
    from experiments.stages import overopt_report, overopt_toy
    from rlhfjax.report import write_report

    overopt_toy.check(config.toy)
    exact = run_once("exact", folder=folder, compute=partial(overopt_toy.exact, config.toy, folder.seed))
    trained = {
        method: run_once(
            method,
            folder=folder,
            compute=partial(overopt_toy.trained, config.toy, folder.seed, method, folder.max_steps),
        )
        for method in config.toy.trained
    }
    write_report(
        folder.path,
        f"Over-optimisation, exactly, seed {folder.seed}",
        overopt_report.toy_sections(config.toy, exact, trained, folder),
    )
    worst = {f"{method}/total_variation": float(x["total_variation"].max()) for method, x in trained.items()}
    return overopt_report.toy_numbers(config.toy, exact) | worst


def _run_text(config: Config, folder) -> dict[str, float]:
    from dataclasses import replace

    from experiments.stages import overopt_report, overopt_text
    from rlhfjax.report import write_report

    name, stage = config.algorithm, getattr(config, config.algorithm)
    overopt_text.check(config.curves, stage)
    if config.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {config.seeds}")
    found = []
    for seed in range(folder.seed, folder.seed + config.seeds):
        path = folder.path / f"seed-{seed}"
        path.mkdir(exist_ok=True)
        part = replace(folder, path=path, seed=seed)
        part.repair()
        print(f"seed {seed}, in {path}", flush=True)
        found.append(overopt_text.run_seed(config, name, stage, part))
    merged = overopt_text.merge(found)
    write_report(
        folder.path,
        f"Over-optimisation by {name} and best-of-n, {config.seeds} from seed {folder.seed} on",
        overopt_report.text_sections(config.curves, merged, overopt_text.GOLD, config.seeds, folder),
    )
    return overopt_report.text_numbers(merged)
