"""Preference optimisation on the judged pairs: no reward model, no sampling."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import Show, run_stage
from experiments.stages.configs import DPOStage as Config
from experiments.stages.policy import Problem
from experiments.stages.preferences import Judged, branches_of
from rlhfjax.algorithms import Algorithm, dpo, evaluation_params, make_optimizer
from rlhfjax.algorithms.algorithm import check_divisible
from rlhfjax.data import batch_indices
from rlhfjax.mesh import fetch
from rlhfjax.networks import LanguageModel
from rlhfjax.recipes import completion_logp, pair_batch, pair_evaluate
from rlhfjax.run_folder import RunFolder

COLUMNS = {
    "loss/preference": "loss",
    "pair/accuracy": "accuracy",
    "pair/margin": "margin",
    "logp/chosen": "logp chosen",
    "logp/rejected": "logp rejected",
}


def check_pairs(config: Config, available: int) -> None:
    """Raises ValueError where the batch cannot be drawn or cut, or the settings contradict each other."""
    check_divisible(config.prompts, config.algorithm.microbatches)
    if config.prompts > available:
        raise ValueError(
            f"dpo asks for {config.prompts} prompts a step; preferences leave {available} to train on"
        )
    dpo.make(lambda params, inputs: inputs, make_optimizer(config.optimizer, config.steps), config.algorithm)


def make_algorithm(config: Config) -> Callable[[LanguageModel], Algorithm]:
    """The algorithm of this stage, on a language model."""
    collision = config.algorithm.weighting == "aligned"
    optimizer = make_optimizer(config.optimizer, config.steps)

    def make(lm: LanguageModel) -> Algorithm:
        evaluate = pair_evaluate(lm, temperature=config.temperature, collision=collision)
        return dpo.make(evaluate, optimizer, config.algorithm)

    return make


def train_on_pairs(name: str, config: Config, problem: Problem, judged: Judged, folder: RunFolder) -> dict:
    """Trains on the first prompts of `judged` in the stage `name`; returns the policy's parameters."""
    text = problem.text
    init, update = text.compiled(make_algorithm(config))
    logp_ref = None if config.algorithm.reference_free else _reference_logp(config, problem, judged)
    key = jax.random.fold_in(jax.random.key(folder.seed), 5)
    pairs = judged.preferences

    def batch(step: int) -> dpo.Pairs:
        index = batch_indices(folder.seed, step, config.prompts, judged.trained)
        branches = branches_of(text, problem.examples, judged, index)
        return pair_batch(
            branches,
            None if logp_ref is None else text.rows(jnp.asarray(logp_ref[index])),
            first=jnp.asarray(pairs.first_K),
            second=jnp.asarray(pairs.second_K),
            label_BK=text.rows(jnp.asarray(pairs.label_BK[index], jnp.float32)),
            mask_BK=text.rows(jnp.asarray(pairs.mask_BK[index])),
        )

    tokens = config.prompts * (text.config.prompt_length + judged.token_BGC[0].size)

    def step(state, batch, i):
        state, metrics = update(state, batch, jax.random.fold_in(key, i))
        return state, metrics | {"perf/trained_tokens": np.float32(tokens)}

    state = run_stage(
        name,
        folder=folder,
        init=lambda: init(problem.reference),
        step=step,
        batch=batch,
        steps=config.steps,
        show=Show(columns=COLUMNS),
    )
    return evaluation_params(state.opt_state, state.params)


def _reference_logp(config: Config, problem: Problem, judged: Judged) -> np.ndarray:
    """Log-probabilities of all completions to train on under the reference, computed once; float32 [B, G, C]."""
    text = problem.text

    logp = text.jit(lambda lm: partial(completion_logp, lm, temperature=config.temperature))
    rows = np.arange(judged.trained)
    # The last part is filled up, so that nothing compiles twice.
    parts = np.resize(rows, (-(-len(rows) // config.prompts), config.prompts))
    found = [
        fetch(logp(problem.reference, branches_of(text, problem.examples, judged, index))) for index in parts
    ]
    return np.concatenate(found)[: len(rows)]
