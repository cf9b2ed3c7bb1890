"""Machine translation from English on real pairs: every method from one start on chrF, BLEU or a learned reward.

  fine-tuning -> rewards of the policy's samples: chrF on the device, Python functions, or a reward model of a noisy
  judge's labels -> each method from that start -> evaluation of all on the same texts

The texts are descriptions of software packages; gold is chrF against the translation in the data. No stage but the
evaluation with --evaluation.test sees the test split.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from experiments.stages.configs import (
    DPOStage,
    EvaluationStage,
    GRPOStage,
    HostRewards,
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
)

BLEU = "experiments.stages.translation:bleu_reward"
Stage = TypeVar("Stage", PPOStage, GRPOStage)
DESCRIPTION = "machine translation from English: methods side by side on chrF, BLEU or a learned reward"


def _of_translations(stage: Stage, muon_learning_rate: float) -> Stage:
    """Larger groups and smaller steps than on summaries: with steps three times as large chrF stays where it was, four
    nats away."""
    return replace(
        stage,
        steps=30,
        samples=8,
        missing_eos_penalty=0.0,
        optimizer=policy_optimizer(muon_learning_rate),
    )


@dataclass(frozen=True)
class Config:
    language: Literal["de", "fr", "it"] = "de"
    """Language to translate into: German, French or Italian."""
    optimised: Literal["chrf", "host", "learned"] = "chrf"
    """The reward: chrF on the device; the Python functions of `host` (by default BLEU, for which sacrebleu must be
    installed); or a model learnt from pairs of samples that a noisy judge labelled by their chrF."""
    gain: float = 10.0
    """What chrF and the functions are multiplied by as a reward, so that samples of one text differ by about 1, as with
    a learned one, and weights of the KL mean the same."""
    methods: tuple[Literal["ppo", "grpo", "rloo", "dpo", "online_dpo", "raft", "soft_q", "ilql"], ...] = (
        "dpo",
        "ppo",
        "grpo",
        "ilql",
    )
    """Methods to compare; the sections of the same names hold their settings."""
    seeds: int = 1
    """Runs of everything, from --seed on."""
    kl_weights: tuple[float, ...] = ()
    """Weights of the KL (beta), each a point of every method that has one; empty: as configured, one point."""
    text: Text = field(
        default_factory=lambda: Text(
            data="",
            prompt_field="source_text",
            completion_field="target_text",
            base="experiments/assets/base_translation",
            prompt_length=20,
            completion_length=24,
        )
    )
    """data: empty is the shipped file of the language."""
    host: HostRewards = field(default_factory=lambda: HostRewards(rewards=(BLEU,), workers=1))
    sft: SFTStage = field(default_factory=lambda: SFTStage(steps=120, prompt_weight=0.1))
    preferences: PreferenceStage = field(default_factory=lambda: PreferenceStage(prompts=1536, heldout=256))
    """label_temperature: in units of chrF, whatever the reward."""
    reward: RewardStage = field(default_factory=RewardStage)
    ppo: PPOStage = field(default_factory=lambda: _of_translations(PPOStage(), 8e-4))
    grpo: GRPOStage = field(default_factory=lambda: _of_translations(GRPOStage(), 6e-4))
    rloo: GRPOStage = field(default_factory=lambda: _of_translations(rloo_stage(), 6e-4))
    dpo: DPOStage = field(default_factory=DPOStage)
    online_dpo: OnlineDPOStage = field(
        default_factory=lambda: replace(OnlineDPOStage(), missing_eos_penalty=0.0)
    )
    raft: RAFTStage = field(default_factory=lambda: replace(RAFTStage(), missing_eos_penalty=0.0))
    ratings: RatingStage = field(default_factory=lambda: RatingStage(prompts=1280))
    soft_q: SoftQStage = field(default_factory=SoftQStage)
    ilql: ILQLStage = field(default_factory=lambda: ILQLStage(curve=()))
    evaluation: EvaluationStage = field(
        default_factory=lambda: EvaluationStage(temperatures=(), best_of=(4,))
    )


def results() -> Config:
    """Less of what is not the methods on samples, for the table of all tasks; the last word is the test split's."""
    return Config(
        dpo=DPOStage(steps=40),
        ilql=ILQLStage(steps=48, curve=()),
        evaluation=EvaluationStage(test=True, prompts=256, temperatures=(), best_of=(4,)),
    )


def _with_data(config: Config) -> Config:
    """The settings with the file of the language, and the noise of labels in units of the reward."""
    text, preferences = config.text, config.preferences
    if not text.data:
        text = replace(text, data=f"experiments/assets/debian_en_{config.language}.jsonl.gz")
    if config.optimised != "learned":
        preferences = replace(preferences, label_temperature=config.gain * preferences.label_temperature)
    return replace(config, text=text, preferences=preferences)


def plan(config: Config, mesh) -> list:
    """The programs of all stages, as shapes; chrF on the device is not counted."""
    from experiments.stages import comparison, methods
    from experiments.stages.text_programs import programs_of_text

    stages = comparison.chosen_stages(config)
    learned = config.optimised == "learned"
    recorded = learned or any(map(methods.learns_from_samples, stages.values()))
    return programs_of_text(
        config.text,
        mesh,
        sft=config.sft,
        preferences=config.preferences if recorded else None,
        reward=config.reward if learned else None,
        ratings=config.ratings,
        policies=stages,
        evaluation=config.evaluation,
        on_host=config.optimised == "host",
        seeds=config.seeds,
    )


def run(config: Config, folder) -> dict[str, float]:
    """Runs all seeds; returns the numbers of summary.json."""
    from contextlib import ExitStack

    from experiments.stages import comparison, host_reward, translation
    from experiments.stages.task import OnHost, Task
    from rlhfjax.report import write_report
    from rlhfjax.rewards import words_13a

    completed = _with_data(config)
    measures = {"BLEU": translation.bleu_of} if translation.has_sacrebleu() else {}
    with ExitStack() as stack:
        given = None
        if config.optimised == "chrf":
            given = translation.chrf_reward(config.gain)
        elif config.optimised == "host":
            if BLEU in config.host.rewards:
                words_13a("")  # early: that sacrebleu is missing should not cost the training
            weights = config.host.weights or (1.0,) * len(config.host.rewards)
            settings = replace(config.host, weights=tuple(config.gain * weight for weight in weights))
            given = OnHost(stack.enter_context(host_reward.open_pool(settings)), settings)
        task = Task("chrF", translation.chrf_of, given, measures)
        compared = comparison.compare_methods(completed, task, folder)
    corpus = translation.corpus_numbers(compared.found, compared.prepared.heldout)
    write_report(
        folder.path,
        f"Translation into {config.language} on {config.optimised}: {' '.join(config.methods)}, {config.seeds} from "
        f"seed {folder.seed} on",
        [*compared.sections, translation.corpus_section(corpus)],
    )
    compared.write_results(f"translation en-{config.language}", settings=config)
    return compared.summary | {
        ("" if split == "validation" else f"{split}/") + f"{policy}/{name}": value
        for split, by_policy in corpus.items()
        for policy, numbers in by_policy.items()
        for name, value in numbers.items()
    }
