"""Many runs of PPO on text in one program: seeds, and settings that differ. The reward is exact, as in `length`."""

from dataclasses import dataclass, field, replace

from experiments.stages.configs import PPOStage, SFTStage, Text
from rlhfjax.config import PPO

DESCRIPTION = "seeds and settings of PPO on text under vmap: eight runs in one program, an exact reward"


@dataclass(frozen=True)
class Config:
    seeds: int = 4
    """Runs of every setting; they differ in prompts and keys, and start from one fine-tuned policy."""
    vary: tuple[str, ...] = ("algorithm.kl-coefficient=0.03,0.3",)
    """Settings of `ppo` that differ, each PATH=NUMBER,NUMBER; of several, every combination is run. Floats only."""
    words: int = 4
    """Words wanted; the reward is -|words - this|."""
    text: Text = field(default_factory=Text)
    sft: SFTStage = field(default_factory=lambda: SFTStage(steps=60))
    ppo: PPOStage = field(
        default_factory=lambda: replace(
            PPOStage(),
            steps=16,
            prompts=16,
            algorithm=PPO(kl_coefficient=0.1, epochs=1, minibatches=2, value_coefficient=0.1),
        )
    )


def plan(config: Config, mesh) -> list:
    """The programs of all stages, as shapes."""
    from experiments.stages.many import make_grid
    from experiments.stages.many_programs import program_of_runs
    from experiments.stages.text_programs import programs_of_text, text_of_shapes

    grid = make_grid(config.ppo, config.vary, config.seeds, 0)
    tuning = programs_of_text(config.text, mesh, sft=config.sft, policies={})
    return [*tuning, program_of_runs("ppo", config.ppo, text_of_shapes(config.text, mesh), grid)]


def run(config: Config, folder) -> dict[str, float]:
    """Runs all stages; returns the numbers of summary.json."""
    from experiments.stages import finetune, many, policy, text
    from experiments.stages.lengths import wanted_words
    from rlhfjax.report import markdown_table, write_report

    loaded = text.open_text(config.text, folder.mesh)
    train = loaded.load("train")
    sft_rows, rl_rows = text.divide(train, config.text.sft_share, folder.seed, finetuned=config.sft.steps > 0)
    grid = many.make_grid(config.ppo, config.vary, config.seeds, folder.seed)
    many.check_grid(config.ppo, grid, len(rl_rows))
    reference = finetune.finetune(config.sft, loaded, train, sft_rows, folder)
    reward, gold = wanted_words(loaded, config.words)
    problem = policy.Problem(loaded, reference, lambda lm: reward, None, train, rl_rows, gold)
    many.optimise_policies(
        "ppo",
        config.ppo,
        lambda lm, ppo: policy.ppo_learner(lm, ppo, problem, reference),
        problem,
        grid,
        folder,
    )
    table, sections, numbers = many.grid_sections("ppo", grid, folder)
    print(f"\n{markdown_table(table)}")
    write_report(
        folder.path,
        f"Completions of {config.words} words: {len(grid.seed_R)} runs, seed {folder.seed}",
        sections,
    )
    return numbers
