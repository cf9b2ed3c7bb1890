"""Supervised fine-tuning on packed rows of prompt and completion."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import Show, run_stage
from experiments.stages.configs import SFTStage as Config
from experiments.stages.text import Examples, Text
from rlhfjax.algorithms import Algorithm, evaluation_params, make_optimizer, sft
from rlhfjax.data import batch_indices
from rlhfjax.networks import LanguageModel
from rlhfjax.recipes import PackedInputs, packed_logp
from rlhfjax.run_folder import RunFolder


def make_algorithm(config: Config) -> Callable[[LanguageModel], Algorithm]:
    """The algorithm of this stage, on a language model."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    return lambda lm: sft.make(packed_logp(lm), optimizer, config.algorithm)


def finetune(config: Config, text: Text, examples: Examples, rows: np.ndarray, folder: RunFolder) -> dict:
    """Fine-tunes the base model on the examples numbered `rows`; returns the parameters that were trained."""

    def start() -> dict:
        return text.start(jax.random.fold_in(jax.random.key(folder.seed), 9))

    if config.steps == 0:
        return start()
    packed = text.pack(examples, rows, config.length)
    init, update = text.compiled(make_algorithm(config))
    key = jax.random.fold_in(jax.random.key(folder.seed), 1)

    def batch(step: int) -> sft.Batch:
        index = batch_indices(folder.seed, step, config.rows, len(packed.token_RT))
        token = packed.token_RT[index]
        weight = packed.completion_RT[index] + config.prompt_weight * packed.prompt_RT[index]
        parts = token[:, :-1], token[:, 1:], packed.position_RT[index], packed.segment_RT[index]
        return text.rows(sft.Batch(PackedInputs(*map(jnp.asarray, parts)), jnp.asarray(weight, jnp.float32)))

    def step(state, batch, i):
        state, metrics = update(state, batch, jax.random.fold_in(key, i))
        return state, metrics | {"perf/trained_tokens": np.float32(config.rows * config.length)}

    state = run_stage(
        "sft",
        folder=folder,
        init=lambda: init(start()),
        step=step,
        batch=batch,
        steps=config.steps,
        show=Show(columns={"loss/nll": "loss"}),
    )
    return evaluation_params(state.opt_state, state.params)
