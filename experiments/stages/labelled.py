"""Labels that people gave, in the place of samples and simulated labels.

Every judgement is a comparison of its own, whoever gave it: a pair on which people differ pulls both ways, as a soft
label would, and one that many saw counts more. A prompt is learnt from or held out with all its judgements.

Shapes: B comparisons, of G = 2 completions and K = 1 pair each; C completion length.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.loop import run_once
from experiments.stages.chats import Examples, with_system
from experiments.stages.configs import PreferenceStage as Config
from experiments.stages.preferences import Judged
from experiments.stages.text import Text
from rlhfjax.data import (
    Comparison,
    Preferences,
    PretrainedTokenizer,
    comparisons,
    encode_prompts,
    pad_completions,
    read_labels,
)
from rlhfjax.run_folder import RunFolder

HELDOUT = 5  # one prompt in so many is held out
OFTEN = 4  # passes of the reward model over its labels from which on a note is due


def collect_labels(config: Config, text: Text, folder: RunFolder) -> Judged:
    """Reads `config.labels` once a run: one that is resumed goes on with the labels it began with."""
    assert config.labels is not None
    path = config.labels

    def compute():
        arrays, left_out = encode_labels(path, text, heldout=config.heldout, seed=folder.seed)
        label = arrays["label"]
        metrics = {
            "labels": len(label),
            "labels/ties": int((label == 0.5).sum()),
            "labels/too_long": left_out,
            "labels/heldout": int(arrays["heldout"]),
        }
        return arrays, metrics, []

    stored = run_once("preferences", folder=folder, compute=compute)
    prompts = [str(x) for x in stored["prompt"]]
    examples = Examples(prompts, [""] * len(prompts), _prompt_ids(text, prompts), dropped=0)
    label_BK = stored["label"][:, None].astype(np.float32)
    preferences = Preferences(
        np.zeros(1, np.int32),
        np.ones(1, np.int32),
        label_BK,
        np.ones(label_BK.shape, bool),
        stored["probability"][:, None].astype(np.float32),
    )
    # What was preferred is all that is known of how good a text is.
    gold_BG = np.concatenate([label_BK, 1 - label_BK], axis=1).astype(np.float64)
    of_texts = stored["token"], stored["mask"], stored["row"]
    return Judged(*of_texts, gold_BG, preferences, int(stored["heldout"]), examples)


def encode_labels(path: Path, text: Text, *, heldout: int, seed: int) -> tuple[dict[str, np.ndarray], int]:
    """The comparisons of a file as arrays, those held out last; how many were left out, as too long.

    A completion without room for its end has none, as a policy that was cut off writes it. Raises ValueError where too
    few are left to learn from and to measure.
    """
    found = comparisons(read_labels(path))
    prompts = list(dict.fromkeys(x.prompt for x in found))
    ids = dict(zip(prompts, _prompt_ids(text, prompts), strict=True))
    length = text.config.completion_length
    both = [text.tokenizer.encode_batch([getattr(x, name) for x in found]) for name in ("first", "second")]
    fits = [
        len(ids[x.prompt]) <= text.config.prompt_length and max(map(len, pair)) <= length
        for x, *pair in zip(found, *both, strict=True)
    ]
    kept = [i for i in range(len(found)) if fits[i]]
    prompts = list(dict.fromkeys(found[i].prompt for i in kept))
    if len(prompts) < 2:
        raise ValueError(
            f"{path} has {len(found)} comparisons, of which those that fit prompt_length="
            f"{text.config.prompt_length} and completion_length={length} are of {len(prompts)} prompts; at least 2 are "
            "needed, one of them to measure: label more, or raise the lengths"
        )
    order = np.random.default_rng([seed, 11]).permutation(len(prompts))
    place = {prompts[row]: i for i, row in enumerate(order)}
    last = max(1, min(heldout, len(prompts) // HELDOUT))
    kept.sort(key=lambda i: place[found[i].prompt])  # stable: those of a prompt stay in their order
    chosen = [found[i] for i in kept]
    measured = [x for x in chosen if place[x.prompt] >= len(prompts) - last]
    if all(x.label == 0.5 for x in measured):
        raise ValueError(f"{path}: all {len(measured)} comparisons held out are ties; label more")
    stop = [text.stop_tokens[0]]
    token, mask = zip(
        *(
            pad_completions([(side[i] + stop)[:length] for i in kept], length, text.tokenizer.pad_id)
            for side in both
        ),
        strict=True,
    )
    return {
        "token": np.stack(token, axis=1),
        "mask": np.stack(mask, axis=1),
        "row": np.asarray([place[x.prompt] for x in chosen]),
        "prompt": np.asarray([prompts[row] for row in order]),
        "label": np.asarray([x.label for x in chosen]),
        "probability": _shares(chosen),
        "heldout": np.asarray(len(measured)),
    }, len(found) - len(kept)


def notes(judged: Judged, seen: Sequence[int], heldout: dict[str, Examples]) -> list[str]:
    """What is worth knowing before training; `seen`: comparisons that the reward model sees, where there is one."""
    found = []
    for split, examples in heldout.items():
        assert judged.examples is not None
        both = len(set(judged.examples.prompts) & set(examples.prompts))
        if both:
            found.append(
                f"{both} of the labelled prompts are of the {split} split, on which policies are measured"
            )
    for count in seen:
        if count > OFTEN * judged.trained:
            found.append(
                f"the reward model goes {count / judged.trained:.0f} times over its {judged.trained} labels: fewer "
                "steps may do better"
            )
    return [f"note: {line}" for line in found]


def _shares(found: Sequence[Comparison]) -> np.ndarray:
    """How often the first was preferred by those who decided, of each comparison's pair: no guesser that gives a pair
    one answer agrees with more of them than with the larger share."""
    answers = defaultdict(list)
    for x in found:
        if x.label != 0.5:
            answers[x.prompt, x.first, x.second].append(x.label)
    return np.asarray([np.mean(answers[x.prompt, x.first, x.second] or [0.5]) for x in found])


def _prompt_ids(text: Text, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of each prompt; for a chat model it is what the user says."""
    if text.template is not None:
        assert isinstance(text.tokenizer, PretrainedTokenizer)
        said = [with_system(text.config, [{"role": "user", "content": prompt}]) for prompt in prompts]
        return encode_prompts(text.template, text.tokenizer, said, prompt_length=2**62).ids
    tokenizer = text.tokenizer
    after = [tokenizer.special_ids["sep"]] if "sep" in tokenizer.special_ids else []
    return [[*tokenizer.prefix_ids, *ids, *after] for ids in tokenizer.encode_batch(list(prompts))]
