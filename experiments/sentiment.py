"""Sentiment control, the task of Ziegler et al. (2019, arXiv 1909.08593) in small: reviews that are to be positive.

  fine-tuning of a small decoder on reviews of an exact grammar -> each method against a sentiment scorer -> VADER

The scorer sees words alone, so that a policy that only lists praise scores best. The grammar is known, so that what is
lost is measured: the share of texts that are still reviews. A KL penalty keeps it, or a guard that raises it.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from experiments.stages.configs import (
    DPOStage,
    EvaluationStage,
    GRPOStage,
    Guards,
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
from rlhfjax.config import DPO, GRPO, ILQL, PPO, Decoder, Optimizer, SoftQ

DESCRIPTION = "reviews that are to be positive: a lexicon as reward, VADER as gold, the grammar as guard"
VALID = "experiments.stages.sentiment_texts:valid"


_optimizer = partial(policy_optimizer, adam_share=0.3)


def _watched(*, action: str = "warn") -> Guards:
    """The share of samples that are of the grammar, logged at every step."""
    return Guards(watch=(f"{VALID}<0.8:{action}",), window=2, patience=3, least=0.05, most=0.2)


def _grpo(kl_coefficient: float, guards: Guards) -> GRPOStage:
    return GRPOStage(
        steps=60,
        prompts=16,
        samples=8,
        temperature=1.0,
        missing_eos_penalty=None,
        guards=guards,
        algorithm=GRPO(
            scale="none",
            kl_coefficient=kl_coefficient,
            kl_placement="reward",
            kl_estimator="k1",
            aggregation="token",
            minibatches=2,
        ),
        optimizer=_optimizer(0.004),
    )


@dataclass(frozen=True)
class Config:
    scorer: Literal["lexicon", "vader"] = "lexicon"
    """The reward: the weights of a text's words, squashed, on the device; or VADER itself, in Python."""
    valid_weight: float = 0.0
    """Added to the reward of a text that is of the grammar: on the device by the automaton of a regular expression."""
    methods: tuple[
        Literal[
            "ppo",
            "grpo",
            "rloo",
            "dpo",
            "online_dpo",
            "raft",
            "soft_q",
            "ilql",
            "unguarded",
            "guarded",
        ],
        ...,
    ] = ("ppo", "grpo", "dpo", "soft_q", "ilql", "unguarded", "guarded")
    """Methods to compare; the sections of the same names hold their settings. `unguarded` is grpo without a KL penalty,
    `guarded` the same with a guard that raises it where fewer than 80 % of the samples are of the grammar."""
    seeds: int = 1
    """Runs of everything, from --seed on."""
    kl_weights: tuple[float, ...] = ()
    """Weights of the KL (beta), each a point of every method that has one; empty: as configured, one point."""
    reviews_seed: int = 0
    """That the reviews are drawn with, whatever the run's: runs of other seeds see the same."""
    reviews: int = 4000
    """Reviews of the training split."""
    heldout: int = 256
    """Reviews of the validation split, and of the test split."""
    decoder: Decoder = field(default_factory=small_decoder)
    """The model that is trained from nothing, unless text.base names one; its vocab_size is the tokenizer's."""
    text: Text = field(
        default_factory=lambda: Text(data="", base="", prompt_length=10, completion_length=24, sft_share=0.5)
    )
    """data: the reviews, written into the run's folder, whatever is named here. base: empty for an own decoder, with a
    token for each word."""
    sft: SFTStage = field(
        default_factory=lambda: SFTStage(
            steps=200,
            length=96,
            optimizer=Optimizer(
                learning_rate=3e-3, warmup_steps=20, b2=0.95, kind="muon", muon_learning_rate=0.02
            ),
        )
    )
    preferences: PreferenceStage = field(
        default_factory=lambda: PreferenceStage(
            prompts=1088, heldout=64, samples=4, sampling_temperature=1.0, label_temperature=0.05
        )
    )
    """Samples of the start for DPO's pairs; the scorer labels them, almost without noise."""
    reward: RewardStage = field(default_factory=RewardStage)
    """Not read: the reward is given."""
    ppo: PPOStage = field(
        default_factory=lambda: PPOStage(
            steps=60,
            temperature=1.0,
            missing_eos_penalty=None,
            guards=_watched(),
            algorithm=PPO(kl_coefficient=0.05, epochs=1, minibatches=2, value_coefficient=0.5),
            optimizer=_optimizer(0.003),
        )
    )
    grpo: GRPOStage = field(default_factory=lambda: _grpo(0.05, _watched()))
    unguarded: GRPOStage = field(default_factory=lambda: _grpo(0.0, _watched()))
    guarded: GRPOStage = field(default_factory=lambda: _grpo(0.0, _watched(action="raise")))
    rloo: GRPOStage = field(
        default_factory=lambda: replace(
            rloo_stage(),
            steps=60,
            prompts=16,
            samples=8,
            temperature=1.0,
            missing_eos_penalty=None,
            guards=_watched(),
            algorithm=replace(rloo_stage().algorithm, kl_coefficient=0.05),
            optimizer=_optimizer(0.004),
        )
    )
    dpo: DPOStage = field(
        default_factory=lambda: DPOStage(
            temperature=1.0, algorithm=DPO(beta=0.1), optimizer=_optimizer(0.003)
        )
    )
    online_dpo: OnlineDPOStage = field(
        default_factory=lambda: OnlineDPOStage(
            steps=60,
            temperature=1.0,
            missing_eos_penalty=None,
            guards=_watched(),
            algorithm=DPO(beta=0.1),
            optimizer=_optimizer(0.003),
        )
    )
    raft: RAFTStage = field(
        default_factory=lambda: RAFTStage(
            steps=60,
            temperature=1.0,
            missing_eos_penalty=None,
            guards=_watched(),
            optimizer=_optimizer(0.005),
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


def plan(config: Config, mesh) -> list:
    """The programs of all stages and seeds, as shapes."""
    from experiments.stages import comparison
    from experiments.stages.sentiment_texts import review_rows, words_of_reviews
    from experiments.stages.small_base import planned_base, small_tokenizer
    from experiments.stages.text_programs import programs_of_text

    rows = review_rows(0, {"train": 200})
    texts = [text for row in rows for text in (row["prompt"], row["completion"])]
    tokens = small_tokenizer(texts, words_of_reviews()).vocab_size
    with planned_base(config.text, config.decoder, tokens) as text:
        return programs_of_text(
            text,
            mesh,
            sft=config.sft,
            preferences=config.preferences,
            ratings=config.ratings,
            policies=comparison.chosen_stages(config),
            evaluation=config.evaluation,
            on_host=config.scorer == "vader",
            seeds=config.seeds,
        )


def run(config: Config, folder) -> dict[str, float]:
    """Runs all seeds; returns the numbers of summary.json."""
    from contextlib import nullcontext

    from experiments.stages import comparison, sentiment
    from experiments.stages.sentiment_texts import review_rows, words_of_reviews
    from experiments.stages.small_base import write_world
    from rlhfjax.report import write_report

    counts = {"train": config.reviews, "validation": config.heldout, "test": config.heldout}
    rows = review_rows(config.reviews_seed, counts)
    text = write_world(config.text, config.decoder, rows, folder, words=words_of_reviews())
    config = replace(config, text=text)
    with sentiment.open_scorer(config.scorer, config.valid_weight) or nullcontext() as pool:
        task = sentiment.as_task(config.valid_weight, pool)
        compared = comparison.compare_methods(config, task, folder)
    write_report(
        folder.path,
        f"Positive reviews by the {config.scorer}, {config.seeds} from seed {folder.seed} on",
        [*compared.sections, sentiment.hack_section(compared.parts, compared.stages, folder)],
    )
    compared.write_results("sentiment", flags=f"--scorer {config.scorer}")
    return compared.summary
