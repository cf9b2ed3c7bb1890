"""Q-learning on rated samples, without sampling: the policy's own logits as soft Q, or values beside it (ILQL)."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.loop import Show, run_stage
from experiments.stages.configs import ILQLStage, SoftQStage
from experiments.stages.policy import Problem
from experiments.stages.ratings import Rated, branches_at
from experiments.stages.text import Text, Writer
from rlhfjax.algorithms import Algorithm, evaluation_params, ilql, make_optimizer, soft_q
from rlhfjax.algorithms.algorithm import PyTree, check_divisible
from rlhfjax.algorithms.optimizers import is_hidden_matrix
from rlhfjax.data import batch_indices
from rlhfjax.generation import guided
from rlhfjax.mesh import fetch
from rlhfjax.networks import LanguageModel
from rlhfjax.recipes import (
    branch_states,
    guide_params,
    init_text_values,
    rated_episodes,
    soft_batch,
    text_soft_q,
    text_values,
)
from rlhfjax.run_folder import RunFolder

Config = SoftQStage | ILQLStage

SOFT_Q_COLUMNS = {
    "path/error": "path error",
    "value/mean": "V",
    "policy/log_ratio": "log ratio",
    "policy/nll": "-logp",
}
ILQL_COLUMNS = {"loss/q": "Q loss", "q/error": "Q error", "q/taken": "Q", "value/advantage": "advantage"}


def check(config: Config, available: int) -> None:
    """Raises ValueError where the batch cannot be drawn or cut, or the settings contradict each other."""
    check_divisible(config.prompts, config.algorithm.microbatches)
    if config.prompts > available:
        raise ValueError(
            f"a step asks for {config.prompts} prompts; ratings has samples of {available} to learn from"
        )
    if isinstance(config, SoftQStage):
        soft_q.make(_never, make_optimizer(config.optimizer, config.steps), config.algorithm)
        return
    ilql.make(_never, _value_optimizer(config), config.algorithm)
    weights = (config.kl_weight, *config.curve)
    if min(weights) <= 0:
        raise ValueError(f"kl_weight and curve must be above 0, got {weights}: they are reward per nat")
    if len(set(weights)) != len(weights):
        raise ValueError(f"kl_weight and curve name a weight twice: {weights}")


def make_algorithm(config: Config) -> Callable[[LanguageModel], Algorithm]:
    """The algorithm of a stage, on a language model."""
    if isinstance(config, SoftQStage):
        evaluate = partial(text_soft_q, states=branch_states, temperature=config.temperature)
        optimizer = make_optimizer(config.optimizer, config.steps)
        return lambda lm: soft_q.make(evaluate(lm), optimizer, config.algorithm)
    algorithm, optimizer = config.algorithm, _value_optimizer(config)

    def make(lm: LanguageModel) -> Algorithm:
        values = text_values(lm, states=branch_states, temperature=config.temperature)
        return ilql.make(values.evaluate, optimizer, algorithm, **values.target())

    return make


def train_soft_q(name: str, config: SoftQStage, problem: Problem, rated: Rated, folder: RunFolder) -> Writer:
    """Trains the policy from the reference on its rated samples, in the stage `name`."""
    text, temperature = problem.text, config.temperature
    with_reference = text.jit(
        lambda lm: partial(soft_batch, lm, states=branch_states, temperature=temperature)
    )
    data = _in_parts(
        lambda index: with_reference(problem.reference, _episodes(problem, rated, index)),
        len(rated.row_B),
        config.prompts,
    )
    size = text.config.prompt_length + rated.token_BGC[0].size
    return Writer(_train(name, config, text, lambda: problem.reference, data, SOFT_Q_COLUMNS, size, folder))


def train_values(config: ILQLStage, problem: Problem, rated: Rated, trunk: dict, folder: RunFolder) -> Writer:
    """Learns values of the rated samples' tokens, in the stage `ilql`; the policy that they guide.

    The values know nothing of the KL's weight, so those of several weights are learnt once. They begin at 0, on a
    copy of `trunk`.
    """
    text = problem.text

    def start() -> PyTree:
        key = jax.random.fold_in(jax.random.key(folder.seed), 7)
        return start_of_values(key, config, text.lm, problem.reference, trunk)

    data = _in_parts(lambda index: _episodes(problem, rated, index), len(rated.row_B), config.prompts)
    size = text.config.prompt_length + rated.token_BGC[0].size
    return guided_writer(config, _train("ilql", config, text, start, data, ILQL_COLUMNS, size, folder))


def start_of_values(key: jax.Array, config: ILQLStage, lm: LanguageModel, policy: dict, trunk: dict) -> dict:
    """The params that values are learnt from: heads at 0 on `trunk`, beside the policy. The key is consumed."""
    state_value = config.algorithm.expectile is not None
    params = init_text_values(key, lm, policy, state_value=state_value, separate_trunk=False, scale=0.0)
    params["value"]["trunk"] = trunk
    return params


def guided_writer(config: ILQLStage, params: dict) -> Writer:
    """The policy among `params`, guided by their values so that a nat costs `kl_weight`.

    Sampled at the stage's temperature T it is policy x exp((min Q - V) / kl_weight): T divides the advantage too,
    so beta is T / kl_weight.
    """
    beta = config.temperature / config.kl_weight
    return Writer(guide_params(params, beta), lambda lm: guided(lm, trunk=lm))


def curve(name: str, config: Any, writer: Writer) -> Mapping[str, Writer]:
    """The same values decoded at the other weights of the stage; nothing for a method that has none."""
    if not isinstance(config, ILQLStage):
        return {}
    return {
        f"{name}-{weight:g}": writer._replace(
            params=writer.params | {"beta": jnp.asarray(config.temperature / weight, jnp.float32)}
        )
        for weight in config.curve
    }


def kl_weight(config: Config) -> float:
    """Reward per nat."""
    return config.algorithm.beta if isinstance(config, SoftQStage) else config.kl_weight


def with_kl_weight(config: Config, weight: float) -> Config:
    """The stage with another weight of the KL, and no curve over others."""
    if isinstance(config, SoftQStage):
        return replace(config, algorithm=replace(config.algorithm, beta=weight))
    return replace(config, kl_weight=weight, curve=())


def _train(
    name: str,
    config: Config,
    text: Text,
    start: Callable[[], PyTree],
    data: PyTree,
    columns: dict[str, str],
    size: int,
    folder: RunFolder,
) -> PyTree:
    """Runs the stage `name` on batches of `data`, one row a prompt, of `size` tokens; returns the parameters."""
    init, update = text.compiled(make_algorithm(config))
    key = jax.random.fold_in(jax.random.key(folder.seed), 8)
    count = len(jax.tree.leaves(data)[0])

    def batch(step: int) -> PyTree:
        index = batch_indices(folder.seed, step, config.prompts, count)
        return text.rows(jax.tree.map(lambda x: jnp.asarray(x[index]), data))

    def step(state, batch, i):
        state, metrics = update(state, batch, jax.random.fold_in(key, i))
        return state, metrics | {"perf/trained_tokens": np.float32(config.prompts * size)}

    state = run_stage(
        name,
        folder=folder,
        init=lambda: init(start()),
        step=step,
        batch=batch,
        steps=config.steps,
        show=Show(columns=columns),
    )
    return evaluation_params(state.opt_state, state.params)


def _episodes(problem: Problem, rated: Rated, index: np.ndarray) -> ilql.Episodes:
    branches = branches_at(
        problem.text, problem.examples, rated.row_B[index], rated.token_BGC[index], rated.mask_BGC[index]
    )
    return rated_episodes(branches, problem.text.rows(jnp.asarray(rated.score_BG[index])))


def _in_parts(compute: Callable[[np.ndarray], PyTree], count: int, size: int) -> PyTree:
    """compute(index) for all prompts, `size` at a time, put together on the host."""
    # The last part is filled up, so that nothing compiles twice.
    parts = np.resize(np.arange(count), (-(-count // size), size))
    found = [fetch(compute(index)) for index in parts]
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:count], *found)


def _value_optimizer(config: ILQLStage) -> optax.GradientTransformation:
    """Muon leaves out the heads' output tables: it would move the rows of tokens that no batch holds."""
    return make_optimizer(
        config.optimizer,
        config.steps,
        orthogonalise=lambda path, x: is_hidden_matrix(path, x) and not path.endswith("outer"),
    )


def _never(*_: Any) -> Any:
    raise AssertionError("settings are checked without an evaluation")
