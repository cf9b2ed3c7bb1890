"""Questions whose answers can be checked: arithmetic, countdown, sorting, spelling, and the tasks of reasoning-gym.

  fine-tuning of a small decoder on few worked answers -> each method against the verifier -> accuracy, and pass@k

No reward model and no label: the verifier is the reward, on the device where one answer alone is right.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from experiments.stages.configs import (
    DPOStage,
    EvaluationStage,
    GRPOStage,
    ILQLStage,
    OnlineDPOStage,
    PPOStage,
    PreferenceStage,
    RAFTStage,
    RatingStage,
    RewardStage,
    SFTStage,
    SoftQStage,
    Text,
    policy_optimizer,
    rloo_stage,
    small_decoder,
)
from experiments.stages.reasoning_configs import PassAtK, Questions
from rlhfjax.config import DPO, GRPO, ILQL, PPO, Decoder, Optimizer, SoftQ

DESCRIPTION = (
    "questions that can be checked: arithmetic, countdown, sorting, spelling; pass@k before and after"
)


_optimizer = partial(policy_optimizer, adam_share=0.3)


@dataclass(frozen=True)
class Config:
    task: str = "arithmetic"
    """arithmetic, countdown, sorting, spelling, or gym:NAME for a task of reasoning-gym."""
    methods: tuple[Literal["ppo", "grpo", "rloo", "dpo", "online_dpo", "raft", "soft_q", "ilql"], ...] = (
        "ppo",
        "grpo",
        "rloo",
        "dpo",
        "raft",
        "soft_q",
        "ilql",
    )
    """Methods to compare; the sections of the same names hold their settings."""
    seeds: int = 1
    """Runs of everything, from --seed on."""
    kl_weights: tuple[float, ...] = ()
    """Weights of the KL (beta), each a point of every method that has one; empty: as configured, one point."""
    questions: Questions = field(default_factory=Questions)
    decoder: Decoder = field(default_factory=small_decoder)
    """The model that is trained from nothing, unless text.base names one; its vocab_size is the tokenizer's."""
    text: Text = field(
        default_factory=lambda: Text(data="", base="", prompt_length=20, completion_length=20, sft_share=0.45)
    )
    """data: the questions, written into the run's folder, whatever is named here. base: empty for an own decoder, with
    a token for each character."""
    sft: SFTStage = field(
        default_factory=lambda: SFTStage(
            steps=450,
            length=96,
            prompt_weight=0.0,
            optimizer=Optimizer(
                learning_rate=3e-3, warmup_steps=20, b2=0.95, kind="muon", muon_learning_rate=0.02
            ),
        )
    )
    preferences: PreferenceStage = field(
        default_factory=lambda: PreferenceStage(
            prompts=1088, heldout=64, samples=8, sampling_temperature=1.0, label_temperature=0.05
        )
    )
    """Samples of the start for DPO's pairs; the verifier labels them, almost without noise."""
    reward: RewardStage = field(default_factory=RewardStage)
    """Not read: the reward is given."""
    ppo: PPOStage = field(
        default_factory=lambda: PPOStage(
            steps=60,
            prompts=64,
            temperature=1.0,
            missing_eos_penalty=None,
            algorithm=PPO(kl_coefficient=0.01, epochs=1, minibatches=2, value_coefficient=0.5),
            optimizer=_optimizer(0.0008),
        )
    )
    grpo: GRPOStage = field(
        default_factory=lambda: GRPOStage(
            steps=60,
            prompts=32,
            samples=16,
            temperature=1.0,
            missing_eos_penalty=None,
            algorithm=GRPO(
                scale="none",
                kl_coefficient=0.01,
                kl_placement="reward",
                kl_estimator="k1",
                aggregation="token",
                minibatches=2,
            ),
            optimizer=_optimizer(0.001),
        )
    )
    rloo: GRPOStage = field(
        default_factory=lambda: replace(
            rloo_stage(),
            steps=60,
            prompts=32,
            samples=16,
            temperature=1.0,
            missing_eos_penalty=None,
            algorithm=replace(rloo_stage().algorithm, kl_coefficient=0.01, length_constant=20.0),
            optimizer=_optimizer(0.001),
        )
    )
    dpo: DPOStage = field(
        default_factory=lambda: DPOStage(
            steps=64, temperature=1.0, algorithm=DPO(beta=0.2), optimizer=_optimizer(0.002)
        )
    )
    online_dpo: OnlineDPOStage = field(
        default_factory=lambda: OnlineDPOStage(
            steps=60,
            samples=8,
            temperature=1.0,
            missing_eos_penalty=None,
            algorithm=DPO(beta=0.2),
            optimizer=_optimizer(0.002),
        )
    )
    raft: RAFTStage = field(
        default_factory=lambda: RAFTStage(
            steps=60, samples=8, temperature=1.0, missing_eos_penalty=None, optimizer=_optimizer(0.0015)
        )
    )
    ratings: RatingStage = field(default_factory=lambda: RatingStage(prompts=1024))
    soft_q: SoftQStage = field(
        default_factory=lambda: SoftQStage(
            temperature=1.0, algorithm=SoftQ(beta=0.1, steps=(0,)), optimizer=_optimizer(0.003)
        )
    )
    ilql: ILQLStage = field(
        default_factory=lambda: ILQLStage(
            temperature=1.0,
            kl_weight=0.1,
            curve=(),
            algorithm=ILQL("sarsa", discount=1.0, lam=0.95, polyak=0.1, policy_coefficient=None),
            optimizer=_optimizer(0.005),
        )
    )
    evaluation: EvaluationStage = field(
        default_factory=lambda: EvaluationStage(prompts=256, batch=64, temperatures=(), best_of=(4,))
    )
    """Best-of-n is by the verifier itself: the share of questions of which one of n samples is right."""
    pass_at_k: PassAtK = field(default_factory=PassAtK)


def plan(config: Config, mesh) -> list:
    """The programs of all stages and seeds, as shapes, but for those of pass@k."""
    from experiments.stages import comparison, reasoning
    from experiments.stages.small_base import planned_base, small_tokenizer
    from experiments.stages.text_programs import programs_of_text
    from rlhfjax.environments.text.reasoning import question

    asked = reasoning.find_task(config.task, config.questions)
    some = [question(asked.task, "train", seed=0, index=i) for i in range(200)]
    tokens = small_tokenizer([text for q in some for text in (q.prompt, q.worked)]).vocab_size
    with planned_base(config.text, config.decoder, tokens) as text:
        return programs_of_text(
            text,
            mesh,
            sft=config.sft,
            preferences=config.preferences,
            ratings=config.ratings,
            policies=comparison.chosen_stages(config),
            evaluation=config.evaluation,
            on_host=not asked.task.one_answer,
            seeds=config.seeds,
        )


def run(config: Config, folder) -> dict[str, float]:
    """Runs all seeds; returns the numbers of summary.json."""
    from contextlib import nullcontext

    from experiments.stages import comparison, reasoning
    from experiments.stages.small_base import write_world
    from rlhfjax.report import write_report

    asked = reasoning.find_task(config.task, config.questions)
    rows = reasoning.rows_to_ask(asked, config.questions)
    config = replace(config, text=write_world(config.text, config.decoder, rows, folder))
    with reasoning.open_verifier(asked) or nullcontext() as pool:
        compared = comparison.compare_methods(config, reasoning.as_task(asked, pool), folder)
    text, passed = compared.prepared.problem.text, {}
    kinds = {"validation": asked.task} | ({reasoning.HARDER: asked.harder} if asked.harder else {})
    for kind, task in kinds.items():
        passed[kind] = reasoning.measure_passes(
            config.pass_at_k,
            task,
            text,
            text.load(kind),
            compared.writers[0],
            compared.parts[0],
            temperature=compared.temperature,
            split=kind,
        )
    write_report(
        folder.path,
        f"{config.task}: {' '.join(config.methods)}, {config.seeds} from seed {folder.seed} on",
        [*compared.sections, *reasoning.pass_sections(passed, folder, compared.temperature)],
    )
    compared.write_results(f"reasoning ({config.task})", flags=f"--task {config.task}")
    return compared.summary | reasoning.pass_numbers(passed)
