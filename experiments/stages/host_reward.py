"""Policy optimisation against a reward that is a Python function of texts."""

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import Show, run_stage
from experiments.options import did_you_mean
from experiments.stages import guards, policy
from experiments.stages.configs import HostRewards
from experiments.stages.policy import MakeLearner, Problem
from experiments.stages.preferences import Gold
from experiments.stages.text import Examples
from rlhfjax.algorithms import evaluation_params
from rlhfjax.data import batch_indices
from rlhfjax.generation import Generation
from rlhfjax.mesh import from_own_rows, own_rows
from rlhfjax.networks import LanguageModel
from rlhfjax.recipes import RLHF, Frozen, Iteration, Prompts
from rlhfjax.rewards import HostReward, RewardPool
from rlhfjax.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


class State(NamedTuple):
    """What a checkpoint holds."""

    learner: Any  # the algorithm's
    ahead: Generation | None  # completions of the next step, where they are drawn ahead


def open_pool(config: HostRewards) -> RewardPool:
    """The threads that call the rewards. Raises ValueError where one cannot be found, or the weights do not fit."""
    if config.checkpoint_every < 1:
        raise ValueError(f"checkpoint_every={config.checkpoint_every} must be at least 1 step")
    weights = config.weights or (1.0,) * len(config.rewards)
    if not config.rewards or len(weights) != len(config.rewards):
        raise ValueError(
            f"{len(config.weights)} weights for {len(config.rewards)} rewards; give one for each"
        )
    if len(set(config.rewards)) < len(config.rewards):
        raise ValueError(f"rewards={list(config.rewards)} names one of them twice; give it a larger weight")
    functions = {name: find_reward(name) for name in config.rewards}
    return RewardPool(
        functions,
        dict(zip(config.rewards, weights, strict=True)),
        workers=config.workers,
        batch=config.calls_of,
        timeout=config.timeout,
    )


def find_reward(name: str) -> HostReward:
    """The function FILE.py:NAME, relative to where the program runs or to the checkout, or MODULE:NAME.

    Raises ValueError where there is none.
    """
    where, _, function = name.rpartition(":")
    if not where:
        raise ValueError(f"reward {name!r} must be FILE.py:NAME or MODULE:NAME")
    module = _from_file(where) if where.endswith(".py") else _from_module(where)
    found = getattr(module, function, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{where} has no function {function!r}{did_you_mean(function, known)}")
    return cast(HostReward, found)


def _from_file(path: str) -> Any:
    file = next((x for x in (Path(path), ROOT / path) if x.is_file()), None)
    if file is None:
        raise ValueError(f"there is no file {path}, here or in {ROOT}")
    name = f"rewards_in_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that what the file defines can name its module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file does
        raise ValueError(f"{file} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _from_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"there is no module {name!r} ({error})") from error


def judge(pool: RewardPool, examples: Examples, at_once: int) -> Gold:
    """(rows, texts [B][G]) -> scores [B, G], of completions of the examples' prompts.

    They are handed to the pool about `at_once` texts at a time, since its time-out is for what is handed to it.
    """

    def gold(rows: np.ndarray, texts: list[list[str]]) -> np.ndarray:
        count = max(1, at_once // len(texts[0]))
        parts = [slice(start, start + count) for start in range(0, len(texts), count)]
        return np.concatenate([_submit(pool, examples, rows[part], texts[part])() for part in parts])

    return gold


def _submit(
    pool: RewardPool, examples: Examples, rows: np.ndarray, texts: list[list[str]]
) -> Callable[[], np.ndarray]:
    """Hands the completions [B][G] to the pool; returns a function that waits for their scores, [B, G]."""
    samples = len(texts[0])
    prompts = [examples.prompts[row] for row in rows for _ in range(samples)]
    columns = {"reference": [examples.references[row] for row in rows for _ in range(samples)]}
    wait = pool.submit(prompts, [text for group in texts for text in group], columns)
    return lambda: wait().reshape(len(rows), samples)


def optimise_policy(
    name: str,
    config: policy.Config,
    make_learner: MakeLearner,
    problem: Problem,
    pool: RewardPool,
    folder: RunFolder,
    rewards: HostRewards,
) -> dict:
    """Runs the stage `name` from the reference; returns the policy's parameters.

    What a reward raises, or its time-out, stops the run; it goes on from the last checkpoint, in the same bits.
    """
    text, examples = problem.text, problem.examples
    learner, ahead = make_learner(text.lm), rewards.ahead
    waited = [0.0]  # seconds, of the step at hand

    def score(prompts: Prompts, generation: Generation) -> Callable[[], jax.Array]:
        # Of several processes each scores the completions that its own devices hold.
        (token_BGC, _), (mask_BGC, _), (index_B, _) = map(
            own_rows, (generation.token_BGC, generation.mask_BGC, prompts.index_B)
        )
        scores = _submit(pool, examples, index_B, text.decode(token_BGC, mask_BGC))

        def wait() -> jax.Array:
            start = time.perf_counter()
            found = scores()
            waited[0] = time.perf_counter() - start
            return from_own_rows(text.mesh, np.asarray(found, np.float32), config.prompts)

        return wait

    def rlhf(lm: LanguageModel) -> RLHF:
        return policy.compose(lm, config, make_learner(lm), problem)

    iteration = Iteration(
        text.jit(lambda lm: rlhf(lm).rollout), text.jit(lambda lm: rlhf(lm).learn, donate_argnums=(0,)), score
    )
    frozen = Frozen(problem.reference, None)
    key = policy.run_key(folder.seed)
    guarding = guards.Guarding(config.guards)

    def one_batch(step: int) -> tuple[Prompts, jax.Array]:
        rows = problem.rows[batch_indices(folder.seed, step, config.prompts, len(problem.rows))]
        return text.batch(examples, rows), jax.random.fold_in(key, step)

    def init() -> State:
        state = text.init(learner.algorithm.init, learner.params)
        return State(state, iteration.rollout(state, *one_batch(0)) if ahead else None)

    def step(state: State, batches, i: int):
        this, following = batches
        state = state._replace(learner=guarding.raise_in(state.learner, i))
        made = iteration(state.learner, frozen, this, following if ahead else None, state.ahead)
        generated = made.experience.generation.mask_BGC.sum(dtype=jnp.float32)
        metrics = made.metrics | {
            "perf/generated_tokens": generated,
            "perf/reward_seconds": np.float64(waited[0]),
        }
        return State(made.state, made.ahead), metrics, (this[0].index_B, made.experience)

    def measure(i: int, seen) -> dict[str, float]:
        index, (branches, generation, _) = seen
        flops = learner.passes.flops(text.lm.config, branches, reward=False)
        texts = text.decode(*(x[:, : config.samples] for x in (generation.token_BGC, generation.mask_BGC)))
        return {"perf/model_flops": flops} | guarding.scores(i, examples, index, texts)

    def samples(i: int, seen) -> list[dict[str, Any]]:
        del i
        index, (_, generation, score) = seen
        return policy.sample_rows(
            examples, index, text.decode(generation.token_BGC, generation.mask_BGC), {"reward": score}
        )

    state = run_stage(
        name,
        folder=folder,
        init=init,
        step=step,
        batch=lambda step: (one_batch(step), one_batch(step + 1)),
        steps=config.steps,
        checkpoint_every=rewards.checkpoint_every,
        keep=guarding.keep(rewards.checkpoint_every),
        nullable=guarding.nullable,
        show=Show(columns=policy.COLUMNS, every=1, measure=measure, samples=samples, samples_every=25),
        watch=guarding.watch,
    )
    trained = state.learner
    return learner.policy(evaluation_params(trained.opt_state, trained.params))
