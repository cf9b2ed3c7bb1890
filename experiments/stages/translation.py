"""Translation: chrF and BLEU as gold scores and as rewards, and scores of a whole corpus."""

from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import jax
import numpy as np

from experiments.stages.evaluation import Policy
from experiments.stages.task import DeviceReward, OnDevice, against_references
from experiments.stages.text import Examples, Text
from rlhfjax import rewards
from rlhfjax.mesh import whole
from rlhfjax.recipes import completion_reward
from rlhfjax.report import Section, Table

# Against the translation in the data, in [0, 1]; BLEU of sentences, which needs sacrebleu.
chrf_of = against_references(rewards.chrf)
bleu_of = against_references(partial(rewards.bleu, tokenize=rewards.words_13a))


def chrf_reward(gain: float) -> OnDevice:
    """`gain` times chrF as a reward on the device, the references looked up by the prompts' numbers."""

    def of(text: Text, examples: Examples) -> DeviceReward:
        table = rewards.byte_table(text.token_bytes(), text.lm.config.vocab_size)
        score = completion_reward(rewards.chrf_on_device(table))
        params = jax.device_put(rewards.references(examples.references), whole(text.mesh))
        return DeviceReward(params, lambda params, branches, index_B: gain * score(params, branches, index_B))

    return OnDevice(of)


def has_sacrebleu() -> bool:
    """Whether BLEU can be computed."""
    return find_spec("sacrebleu") is not None


def bleu_reward(
    prompts: Sequence[str], completions: Sequence[str], *, reference: Sequence[str], **columns: object
) -> list[float]:
    """A reward in Python: sentence BLEU in [0, 1], words as sacrebleu cuts them by default; needs sacrebleu."""
    return rewards.bleu_reward(rewards.words_13a)(prompts, completions, reference=reference, **columns)


def corpus_scores(texts: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """chrF and BLEU of a corpus by sacrebleu's defaults, in [0, 100]; nothing without it."""
    if not has_sacrebleu():
        return {}
    metrics = import_module("sacrebleu.metrics")
    return {
        name: float(metric.corpus_score(list(texts), [list(wanted)]).score)
        for name, metric in (("corpus chrF", metrics.CHRF()), ("corpus BLEU", metrics.BLEU()))
    }


def corpus_numbers(
    found: Mapping[str, Sequence[Sequence[Policy]]], heldout: Mapping[str, Examples]
) -> dict[str, dict[str, dict[str, float]]]:
    """split -> policy -> corpus scores, means over the seeds; `found` has the policies of every split and seed."""
    scores = {}
    for split, of_seeds in found.items():
        wanted = heldout[split].references[: len(of_seeds[0][0].texts)]
        scores[split] = {}
        for policies in zip(*of_seeds, strict=True):
            each = [corpus_scores(policy.texts, wanted) for policy in policies]
            scores[split][policies[0].name] = {
                name: float(np.mean([one[name] for one in each])) for name in each[0]
            }
    return scores


def corpus_section(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Section:
    """The table of corpus scores, of all splits."""
    rows = [
        [split, policy, *(f"{value:.1f}" for value in numbers.values())]
        for split, by_policy in scores.items()
        for policy, numbers in by_policy.items()
        if numbers
    ]
    if not rows:
        text = 'sacrebleu is not installed, so that there is no score of the corpus: pip install "rlhfjax[eval]".'
        return Section("Scores of the corpus", text)
    text = "By sacrebleu with its defaults, means over the seeds. Short texts weigh less than in means of sentences."
    return Section("Scores of the corpus", text, Table(["split", "policy", "chrF", "BLEU"], rows))
