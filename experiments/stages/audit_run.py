"""The audit: rewards opened, texts read or sampled, every reward asked, and the report written."""

from dataclasses import replace
from typing import Any

import numpy as np

from experiments.assets import asset
from experiments.stages import audit_measure, audit_report, audit_texts, finetune, text
from experiments.stages.audit_rewards import Calls, Reward, open_reward, open_rewards
from experiments.stages.audit_texts import Texts
from experiments.stages.configs import EvaluationStage
from experiments.stages.text_programs import programs_of_text
from rlhfjax.report import write_report
from rlhfjax.run_folder import RunFolder


def plan(config: Any, mesh: Any) -> list:
    """The programs of fine-tuning and sampling, as shapes; none where the texts are a file's."""
    if config.texts is not None:
        return []
    # An evaluation draws one more completion, the greedy one.
    drawn = EvaluationStage(
        prompts=config.prompts, batch=min(64, config.prompts), temperatures=(), best_of=(config.samples - 1,)
    )
    return programs_of_text(config.text, mesh, sft=config.sft, policies={}, evaluation=drawn)


def run(config: Any, folder: RunFolder) -> dict[str, float]:
    """Audits the rewards of `experiments/audit.py`'s Config; returns the numbers of summary.json."""
    calls = Calls(config.workers, config.calls_of, config.timeout)
    # Early: a reward or a label that is not there should cost nothing.
    rewards = open_rewards(config.rewards, config.calls_of)
    gold = open_gold(config, config.calls_of)
    texts = read(config) if config.texts is not None else sample(config, folder)
    print(
        f"{len(texts.texts)} texts of {len(texts.prompts)} prompts"
        + (f", {len(texts.pairs.winner_K)} preferences" if len(texts.pairs.winner_K) else ""),
        flush=True,
    )
    gold_N, gold_name = texts.gold_N, "gold"
    if gold is not None:
        gold_name = "ROUGE-L" if gold.source == ROUGE else gold.label
        gold_N = audit_measure.score_gold(gold, texts, calls, folder)
    found, of_gold = [], audit_measure.features_of(gold_N, texts)
    for reward in rewards:
        scores = audit_measure.ask(reward, texts, calls, config.again, config.timed, folder)
        probes = None
        if gold is not None:
            probes = audit_measure.score_gold_probes(gold, scores, texts, calls, reward.stage, folder)
        found.append(audit_measure.measure(reward, scores, texts, gold_N, probes, of_gold))
        print(f"{reward.label}: {found[-1].verdict}", flush=True)
    write_report(
        folder.path,
        f"Audit of {audit_texts.joined([one.reward.label for one in found])}",
        audit_report.sections(found, texts, gold_N, gold_name, folder.path),
    )
    return audit_measure.summarise(found)


ROUGE = "rlhfjax.rewards:rouge_l_reward"


def open_gold(config: Any, calls_of: int) -> Reward | None:
    """The gold function. Raises ValueError where there is none of that name, or two golds are given."""
    if config.gold == "none" or (config.gold == "auto" and config.texts is not None):
        return None
    if config.labels is not None and config.gold != "auto":
        raise ValueError("gold is given twice, by --gold and by --labels: give one of them")
    name = ROUGE if config.gold == "auto" else config.gold
    return open_reward(name, "gold: " + name.rpartition(":")[2], calls_of)


def read(config: Any) -> Texts:
    """The texts of a file, with their labels."""
    texts = audit_texts.read_texts(asset(config.texts))
    if config.labels is not None:
        return audit_texts.with_labels(texts, asset(config.labels))
    return texts


def sample(config: Any, folder: RunFolder) -> Texts:
    """Samples of the base, fine-tuned before where that is asked for."""
    if config.labels is not None:
        raise ValueError("--labels are of texts of a file: give these with --texts")
    loaded = text.open_text(config.text, folder.mesh)
    loaded.load(config.split)  # early: a missing split should not cost the training
    train = loaded.load("train" if config.sft.steps else config.split)
    rows, _ = text.divide(train, config.text.sft_share, folder.seed, finetuned=config.sft.steps > 0)
    params = finetune.finetune(config.sft, loaded, train, rows, folder)
    found, _ = audit_texts.sampled_texts(
        loaded,
        params,
        folder,
        split=config.split,
        prompts=config.prompts,
        samples=config.samples,
        temperature=config.temperature,
    )
    if config.gold == "auto" and "reference" not in found.columns:
        raise ValueError(
            f"{config.text.data} has no completions to hold samples against: give --gold FILE.py:NAME, or --gold none"
        )
    return replace(found, gold_N=np.full(len(found.texts), np.nan))
