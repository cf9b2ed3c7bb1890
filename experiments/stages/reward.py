"""The reward model: learnt from preferences, normalised on the reference's samples, measured on held-out ones."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import Show, run_once, run_stage
from experiments.stages.configs import RewardStage as Config
from experiments.stages.preferences import BATCH, Judged, branches_of
from experiments.stages.text import Examples, Text
from rlhfjax.algorithms import Algorithm, evaluation_params, make_optimizer, reward_model
from rlhfjax.algorithms.algorithm import check_divisible
from rlhfjax.data import accuracy_ceiling, batch_indices
from rlhfjax.mesh import fetch
from rlhfjax.networks import LanguageModel
from rlhfjax.ops import fit_temperature
from rlhfjax.recipes import init_reward_model, make_reward_model
from rlhfjax.run_folder import RunFolder

# Prompts whose samples give the reward its mean 0 and deviation 1 (Ziegler et al. 2019 take 256 samples).
NORMALISED = 512


@dataclass(frozen=True)
class Learned:
    """A reward model and what it does on held-out pairs."""

    params: dict
    probability: np.ndarray  # predicted chance that the first of a pair wins, held-out pairs that count
    outcome: np.ndarray  # bool, whether it did
    margin: np.ndarray  # gold score of the first less that of the second
    people: bool = False  # whether people judged the pairs; there is no gold score then


def check(config: Config, available: int) -> None:
    """Raises ValueError where the batch cannot be drawn or cut, or the optimiser contradicts the steps."""
    check_divisible(config.prompts, config.algorithm.microbatches)
    if config.prompts > available:
        raise ValueError(
            f"the reward model asks for {config.prompts} prompts a step; preferences leave {available} to train on: "
            "ask for fewer, or have more"
        )
    make_optimizer(config.optimizer, config.steps)


def make_algorithm(config: Config) -> Callable[[LanguageModel], Algorithm]:
    """The algorithm of this stage, on a language model."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    return lambda lm: reward_model.make(make_reward_model(lm, pool=config.pool), optimizer, config.algorithm)


def train_reward_model(
    config: Config, text: Text, policy: dict, examples: Examples, judged: Judged, folder: RunFolder
) -> Learned:
    """Trains on the first prompts of `judged`, then normalises and measures."""
    init_state, update = text.compiled(make_algorithm(config))
    key_init, key_update = jax.random.split(jax.random.fold_in(jax.random.key(folder.seed), 3))
    pairs = judged.preferences

    def init():
        return init_state(init_reward_model(key_init, policy, text.lm.config.width))

    def batch(step: int) -> reward_model.Preference:
        index = batch_indices(folder.seed, step, config.prompts, judged.trained)
        inputs = branches_of(text, examples, judged, index)
        label_BK, mask_BK = text.rows((jnp.asarray(pairs.label_BK[index]), jnp.asarray(pairs.mask_BK[index])))
        of_pairs = jnp.asarray(pairs.first_K), jnp.asarray(pairs.second_K)
        return reward_model.Preference(inputs, *of_pairs, label_BK, mask_BK)

    tokens = config.prompts * (text.config.prompt_length + judged.token_BGC[0].size)

    def step(state, batch, i):
        state, metrics = update(state, batch, jax.random.fold_in(key_update, i))
        return state, metrics | {"perf/trained_tokens": np.float32(tokens)}

    state = run_stage(
        "reward_model",
        folder=folder,
        init=init,
        step=step,
        batch=batch,
        steps=config.steps,
        show=Show(columns={"loss/preference": "loss", "pair/accuracy": "accuracy", "score/std": "score std"}),
    )
    evaluate = text.jit(lambda lm: make_reward_model(lm, pool=config.pool))
    params = evaluation_params(state.opt_state, state.params)
    return _measure(text, evaluate, params, examples, judged, folder)


def _measure(text, evaluate, params, examples, judged, folder) -> Learned:
    def compute():
        scored = np.r_[: min(judged.trained, NORMALISED), judged.trained : len(judged.row_B)]
        # The last chunk is filled up, so that nothing compiles twice.
        chunks = np.resize(scored, (-(-len(scored) // BATCH), BATCH))
        score = np.concatenate(
            [fetch(evaluate(params, branches_of(text, examples, judged, index))) for index in chunks]
        )[: len(scored)]
        reference, heldout_score = score[: -judged.heldout], score[-judged.heldout :]
        gain, bias = reward_model.normalisation(jnp.asarray(reference))
        heldout = slice(judged.trained, None)
        pairs, gold = judged.preferences, judged.gold_BG[heldout]
        counts = pairs.mask_BK[heldout] & (pairs.label_BK[heldout] != 0.5)  # a tie is no answer to agree with
        margin = (heldout_score[:, pairs.first_K] - heldout_score[:, pairs.second_K])[counts]
        outcome = pairs.label_BK[heldout][counts] == 1.0
        kept = pairs._replace(mask_BK=counts, probability_BK=pairs.probability_BK[heldout])
        metrics = {
            "heldout/accuracy": float(np.mean((margin > 0) == outcome)),
            "heldout/accuracy_ceiling": accuracy_ceiling(kept),
        }
        if judged.examples is None:
            metrics |= {
                "heldout/correlation": _correlation(heldout_score, gold, axis=None),
                "heldout/correlation_within_prompt": _correlation(heldout_score, gold, axis=1),
                "heldout/best_of_samples_gold": float(
                    gold[np.arange(len(gold)), heldout_score.argmax(1)].mean()
                ),
                "heldout/mean_gold": float(gold.mean()),
            }
        metrics["heldout/temperature"] = float(fit_temperature(margin, outcome.astype(np.float32)))
        arrays = {"probability": 1.0 / (1.0 + np.exp(-margin.astype(np.float64))), "outcome": outcome}
        arrays["margin"] = (gold[:, pairs.first_K] - gold[:, pairs.second_K])[counts]
        return arrays | {"gain": np.asarray(gain), "bias": np.asarray(bias)}, metrics, []

    stored = run_once("reward_model_heldout", folder=folder, compute=compute)
    params = params | {"gain": jnp.asarray(stored["gain"]), "bias": jnp.asarray(stored["bias"])}
    people = judged.examples is not None
    return Learned(params, stored["probability"], stored["outcome"], stored["margin"], people)


def _correlation(score_BG: np.ndarray, gold_BG: np.ndarray, *, axis: int | None) -> float:
    """Correlation of score and gold, of all (axis None) or, with axis 1, once each prompt's mean is taken off.

    The latter is what choosing among samples needs. 0 where one of them is constant.
    """
    score, gold = (x - x.mean(axis=axis, keepdims=True) for x in (score_BG.astype(np.float64), gold_BG))
    return float((score * gold).sum() / np.sqrt((score**2).sum() * (gold**2).sum() + 1e-12))
