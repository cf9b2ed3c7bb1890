"""How many labels would a reward model need? It is trained on more and more of them, and measured on the same pairs.

Shapes: S numbers of labels, K held-out pairs, B prompts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.stages import reward
from experiments.stages.audit_model import Opened, score_texts
from experiments.stages.audit_rewards import Reward
from experiments.stages.configs import PreferenceStage, RewardStage
from experiments.stages.preferences import Gold, Judged, collect_preferences
from experiments.stages.text import Examples, Text
from rlhfjax.data import Pair, Preferences, encode_pairs, pad_completions, read_preferences
from rlhfjax.recipes import make_reward_model
from rlhfjax.rewards import audit
from rlhfjax.rewards.audit import Estimate, LearningCurve
from rlhfjax.run_folder import RunFolder

LEAST_STEPS = 12


@dataclass(frozen=True)
class Labelled:
    """Pairs with labels, one of each prompt: the last `judged.heldout` are kept to measure."""

    examples: Examples
    judged: Judged
    simulated: bool


@dataclass(frozen=True)
class Learnable:
    """What came of training on more and more labels."""

    curve: LearningCurve
    target: float  # accuracy that is asked for
    needed: Estimate  # labels for it
    largest: Reward  # the reward model of the most labels, as a function of texts


def check(labels: Sequence[int], heldout: int, learnt: float) -> None:
    """Raises ValueError where the numbers of labels make no curve."""
    if labels and (len(labels) < 2 or list(labels) != sorted(set(labels)) or labels[0] < 1):
        raise ValueError(
            f"labels={list(labels)} must be two growing numbers or more; or none: no reward model"
        )
    if heldout < 2 or not 0 < learnt < 1:
        raise ValueError(f"heldout={heldout} must be at least 2, and learnt={learnt} lie between 0 and 1")


def simulate(
    text: Text,
    params: dict,
    examples: Examples,
    rows: np.ndarray,
    gold: Gold,
    *,
    labels: Sequence[int],
    heldout: int,
    temperature: float,
    label_temperature: float,
    folder: RunFolder,
) -> Labelled:
    """Two samples of each prompt, labelled by the reward with noise."""
    config = PreferenceStage(
        prompts=labels[-1] + heldout,
        heldout=heldout,
        samples=2,
        sampling_temperature=temperature,
        label_temperature=label_temperature,
    )
    if config.prompts > len(rows):
        raise ValueError(
            f"labels={list(labels)} and heldout={heldout} ask for {config.prompts} prompts; the data has {len(rows)}: "
            "ask for fewer"
        )
    return Labelled(
        examples, collect_preferences(config, text, params, examples, rows, gold, folder), simulated=True
    )


def read(path: Path, text: Text, *, labels: Sequence[int], heldout: int, seed: int) -> Labelled:
    """Given pairs, in an order drawn from the seed. Pairs that do not fit the lengths are left out.

    Raises ValueError where fewer are left than asked for, and for a chat model.
    """
    if text.template is not None:
        raise ValueError("preferences are of plain texts here: leave out --text.chat")
    pairs = read_preferences(path)
    order = np.random.default_rng([seed, 11]).permutation(len(pairs))
    pairs = [pairs[i] for i in order]
    lengths = {"prompt_length": text.config.prompt_length, "completion_length": text.config.completion_length}
    both = [
        encode_pairs(
            text.tokenizer, [Pair(pair.prompt, answer(pair)) for pair in pairs], drop=True, **lengths
        )
        for answer in (lambda pair: pair.chosen, lambda pair: pair.rejected)
    ]
    kept = np.intersect1d(both[0].row, both[1].row)
    asked = (labels[-1] if labels else 0) + heldout
    if len(kept) < asked:
        raise ValueError(
            f"{path} has {len(kept)} pairs that fit {lengths}, of {len(pairs)}; labels={list(labels)} and "
            f"heldout={heldout} ask for {asked}: ask for fewer"
        )
    at = [{int(row): i for i, row in enumerate(one.row)} for one in both]
    tokens, masks = zip(
        *(
            pad_completions(
                [one.completions[place[row]] for row in kept],
                text.config.completion_length,
                text.tokenizer.pad_id,
            )
            for one, place in zip(both, at, strict=True)
        ),
        strict=True,
    )
    examples = Examples(
        [pairs[row].prompt for row in kept],
        [pairs[row].chosen for row in kept],
        [both[0].prompts[at[0][row]] for row in kept],
        len(pairs) - len(kept),
    )
    one, count = np.ones((len(kept), 1)), len(kept)
    judged = Judged(
        np.stack(tokens, axis=1),
        np.stack(masks, axis=1),
        np.arange(count),
        np.tile([1.0, 0.0], (count, 1)),
        Preferences(
            np.zeros(1, np.int32),
            np.ones(1, np.int32),
            one.astype(np.float32),
            one > 0,
            one.astype(np.float32),
        ),
        heldout,
    )
    return Labelled(examples, judged, simulated=False)


def learn(
    config: RewardStage,
    text: Text,
    params: dict,
    labelled: Labelled,
    *,
    labels: Sequence[int],
    epochs: float,
    ceiling: float,
    learnt: float,
    calls_of: int,
    folder: RunFolder,
) -> Learnable:
    """Trains a reward model on each number of labels, in the folders labels-N of the run."""
    right, stored_ceiling, largest = [], ceiling, None
    for count in labels:
        judged = _first(labelled.judged, count)
        path = folder.path / f"labels-{count}"
        path.mkdir(exist_ok=True)
        part = replace(folder, path=path)
        part.repair()
        prompts = min(config.prompts, count)
        steps = max(LEAST_STEPS, math.ceil(epochs * count / prompts))
        stage = replace(config, steps=steps, prompts=prompts)
        print(f"a reward model of {count} labels, in {path}", flush=True)
        learned = reward.train_reward_model(stage, text, params, labelled.examples, judged, part)
        right.append((learned.probability > 0.5) == learned.outcome)
        largest = learned.params
        if labelled.simulated:
            stored_ceiling = part.metrics("reward_model_heldout")[0]["heldout/accuracy_ceiling"]
    right = np.stack(right)
    target = 0.5 + learnt * (stored_ceiling - 0.5)
    return Learnable(
        audit.learning_curve(np.asarray(labels), right, stored_ceiling, seed=folder.seed),
        target,
        audit.labels_for(np.asarray(labels), right, stored_ceiling, target, seed=folder.seed),
        _as_reward(text, largest, config.pool, calls_of),
    )


def _first(judged: Judged, count: int) -> Judged:
    """The first `count` prompts and the held-out ones."""
    kept = np.r_[:count, judged.trained : len(judged.row_B)]
    pairs = judged.preferences
    return Judged(
        judged.token_BGC[kept],
        judged.mask_BGC[kept],
        judged.row_B[kept],
        judged.gold_BG[kept],
        pairs._replace(
            label_BK=pairs.label_BK[kept],
            mask_BK=pairs.mask_BK[kept],
            probability_BK=pairs.probability_BK[kept],
        ),
        judged.heldout,
    )


def _as_reward(text: Text, params: Any, pool: str, calls_of: int) -> Reward:
    evaluate: Callable[..., jax.Array] = text.jit(lambda lm: make_reward_model(lm, pool=pool))
    opened = Opened(
        lambda branches: evaluate(params, branches),
        text.tokenizer,
        text.template,
        text.stop_tokens[0],
        text.lm.config.max_positions,
    )

    def function(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        return score_texts(opened, prompts, completions, calls_of)

    return Reward("the reward model of the most labels", "learned", function)
