"""Samples of the fine-tuned policy, and a noisy judge's preferences among them."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import run_once
from experiments.stages.configs import PreferenceStage as Config
from experiments.stages.text import Examples, Text, Writer
from rlhfjax.data import Preferences, accuracy_ceiling, draw_preferences, same_pairs
from rlhfjax.generation import Sampling, generate, sample_keys
from rlhfjax.mesh import fetch
from rlhfjax.networks import Branches, LanguageModel
from rlhfjax.recipes import Prompts
from rlhfjax.run_folder import RunFolder

# gold(rows, texts [B][G]) -> [B, G]
Gold = Callable[[np.ndarray, list[list[str]]], np.ndarray]

BATCH = 64  # prompts decoded at once
BRANCHES = 5  # completions of a prompt that share a row


@dataclass(frozen=True)
class Judged:
    """Completions of prompts with their gold scores and the labels drawn from them."""

    token_BGC: np.ndarray
    mask_BGC: np.ndarray
    row_B: np.ndarray  # the prompts' row numbers
    gold_BG: np.ndarray
    preferences: Preferences
    heldout: int
    examples: Examples | None = None  # what `row_B` numbers; None: the training data

    @property
    def trained(self) -> int:
        """Prompts that the reward model learns from: the first ones."""
        return len(self.row_B) - self.heldout


def sample_policy(
    text: Text,
    writer: Writer,
    examples: Examples,
    rows: np.ndarray,
    key: jax.Array,
    *,
    temperatures: np.ndarray,
    batch: int = BATCH,
) -> dict[str, np.ndarray]:
    """One completion per prompt and temperature, [B, G]: the arrays of `Generation`, on the host."""
    samples = len(temperatures)
    width = min(samples, BRANCHES)
    banned = jnp.asarray(text.unused_tokens, jnp.int32) if text.unused_tokens else None

    def sampler(lm: LanguageModel):
        def run(params, prompts: Prompts, key, columns, temperatures):
            return generate(
                writer.model(lm),
                params,
                prompts.token_BP,
                prompts.mask_BP,
                sample_keys(key, prompts.index_B, samples)[:, columns],
                max_new_tokens=text.config.completion_length,
                stop_tokens=text.stop_tokens,
                sampling=Sampling(jnp.tile(temperatures, batch), banned_tokens=banned),
            )

        return run

    run = text.jit(sampler)

    def sample(start: int, columns: np.ndarray) -> dict[str, np.ndarray]:
        index = rows[start : start + batch]
        # The last batch and the last columns are filled up, so that nothing compiles twice.
        padded, filled = np.resize(index, batch), np.resize(columns, width)
        heat = jnp.asarray(np.asarray(temperatures)[filled], jnp.float32)
        out = fetch(run(writer.params, text.batch(examples, padded), key, filled, heat))
        return {name: x[: len(index), : len(columns)] for name, x in out._asdict().items()}

    groups = column_groups(samples)
    batches = [[sample(start, columns) for columns in groups] for start in range(0, len(rows), batch)]
    names = batches[0][0]
    return {
        name: np.concatenate([np.concatenate([part[name] for part in parts], axis=1) for parts in batches])
        for name in names
    }


def column_groups(samples: int) -> list[np.ndarray]:
    """Completions of a prompt in groups that share its row: attention's cost grows with the square of a group."""
    return [np.arange(start, min(start + BRANCHES, samples)) for start in range(0, samples, BRANCHES)]


def check(config: Config, available: int) -> None:
    """Raises ValueError where `available` prompts are too few, or one part of them is empty."""
    if not 0 < config.heldout < config.prompts or config.prompts > available:
        raise ValueError(
            f"preferences ask for {config.prompts} prompts, {config.heldout} of them held out; there are "
            f"{available} to draw from, and both parts need at least one"
        )


def collect_preferences(
    config: Config,
    text: Text,
    policy: dict,
    examples: Examples,
    rows: np.ndarray,
    gold: Gold,
    folder: RunFolder,
    *,
    score: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> Judged:
    """Samples the policy on the first prompts of `rows` and draws a label for every pair of samples, by their gold
    scores or, where it is given, by `score(rows, token_BGC, mask_BGC) -> [B, G]`."""
    check(config, len(rows))
    rows = rows[: config.prompts]

    def compute():
        key = jax.random.fold_in(jax.random.key(folder.seed), 2)
        temperatures = np.full(config.samples, config.sampling_temperature)
        out = sample_policy(text, Writer(policy), examples, rows, key, temperatures=temperatures)
        texts = text.decode(out["token_BGC"], out["mask_BGC"])
        gold_BG = np.asarray(gold(rows, texts), np.float64)
        score_BG = gold_BG if score is None else score(rows, out["token_BGC"], out["mask_BGC"])
        preferences = draw_preferences(
            score_BG, temperature=config.label_temperature, seed=folder.seed, same_BK=same_pairs(texts)
        )
        arrays = {"token": out["token_BGC"], "mask": out["mask_BGC"], "gold": gold_BG}
        arrays |= {"label": preferences.label_BK, "counts": preferences.mask_BK}
        arrays |= {"probability": preferences.probability_BK}
        arrays |= {"prompt": np.asarray([examples.prompts[i] for i in rows]), "texts": np.asarray(texts)}
        metrics = {
            "gold/mean": float(gold_BG.mean()),
            "pairs": int(preferences.mask_BK.sum()),
            "pair/accuracy_ceiling": accuracy_ceiling(preferences),
            "completions/finished": float(out["finished_BG"].mean()),
        }
        samples = [
            examples.shown(rows[i]) | {"completion": texts[i][0], "gold": float(gold_BG[i, 0])}
            for i in range(min(16, len(rows)))
        ]
        return arrays, metrics, samples

    stored = run_once("preferences", folder=folder, compute=compute)
    first, second = np.triu_indices(config.samples, k=1)
    preferences = Preferences(
        first.astype(np.int32),
        second.astype(np.int32),
        stored["label"],
        stored["counts"],
        stored["probability"],
    )
    return Judged(stored["token"], stored["mask"], rows, stored["gold"], preferences, config.heldout)


def branches_of(text: Text, examples: Examples, judged: Judged, index: np.ndarray) -> Branches:
    """Prompts and completions at `index` of the judged ones."""
    prompts = text.batch(judged.examples or examples, judged.row_B[index])
    completions = jnp.asarray(judged.token_BGC[index]), jnp.asarray(judged.mask_BGC[index])
    return Branches(*prompts[:2], *text.rows(completions))
