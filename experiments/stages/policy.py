"""Policy optimisation on the policy's own samples: the compiled iteration, its state, and what is logged of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import Show, run_stage
from experiments.stages import guards
from experiments.stages.configs import GRPOStage, OnlineDPOStage, PPOStage, RAFTStage
from experiments.stages.text import Examples, Text
from rlhfjax.algorithms import Algorithm, dpo, evaluation_params, grpo, make_optimizer, ppo, sft
from rlhfjax.algorithms.algorithm import check_divisible
from rlhfjax.config import Decoder
from rlhfjax.data import batch_indices
from rlhfjax.networks import Branches, LanguageModel, init_scalar_head
from rlhfjax.networks.flops import branches_flops
from rlhfjax.recipes import (
    RLHF,
    AsBatch,
    Experience,
    Frozen,
    best_of_samples,
    best_worst_pairs,
    grpo_batch,
    judged_evaluate,
    make_rlhf,
    pair_evaluate,
    policy_parameters,
    ppo_batch,
    text_actor_critic,
    text_policy,
)
from rlhfjax.run_folder import RunFolder

Config = PPOStage | GRPOStage | OnlineDPOStage | RAFTStage
Reward = Callable[..., jax.Array]  # (params, branches) -> float [B, G]

COLUMNS = {
    "objective/score": "reward",
    "gold": "gold",
    "objective/kl": "KL",
    "policy/entropy": "entropy",
    "policy/clip_fraction": "clipped",
    "pair/accuracy": "accuracy",
    "completions/mean_length": "length",
}


@dataclass(frozen=True)
class Problem:
    """What every method starts from."""

    text: Text
    reference: dict  # the fine-tuned policy
    # None: on the host
    reward: Callable[[LanguageModel], Reward] | None
    reward_params: Any
    examples: Examples
    rows: np.ndarray  # the prompts to draw from
    # (rows, texts) -> [B, G]; never learnt from, unless it is the reward on the host
    gold: Callable[[np.ndarray, list[list[str]]], np.ndarray]
    # Whether the reward asks for the prompts' numbers too: (params, branches, index_B) -> float [B, G]
    numbered: bool = False


class Learner(NamedTuple):
    """A method on a language model: an algorithm, its batch, and where it starts."""

    algorithm: Algorithm
    as_batch: AsBatch
    params: dict
    policy: Callable[[Any], dict]  # the language model among the params
    passes: "Passes"


MakeLearner = Callable[[LanguageModel], Learner]


class Passes(NamedTuple):
    """Forward passes over all prompts and completions that one iteration cannot do without, a backward pass as two."""

    logits: float  # with the completions' logits: rollout, policy, reference
    hidden: float  # without: critic; the reward's comes on top

    def flops(self, config: Decoder, branches: Branches, *, reward: bool) -> float:
        """Operations of an iteration on these rows (host arrays), with or without a reward model."""
        with_logits, without = (branches_flops(config, branches, logits=logits) for logits in (True, False))
        return self.logits * with_logits + (self.hidden + reward) * without


def make_critic(trunk: dict, width: int) -> dict:
    """A critic on a copy of `trunk` (the reward model's, which has learnt what is rewarded), its head at zero.

    A head taken over from the reward model would speak of whole completions; of half-written ones it begins far off
    (explained variance -2 where 0 is free), and the policy would pay for it in its first steps.
    """
    return {"trunk": trunk, "head": init_scalar_head(jax.random.key(0), width, scale=0.0)}


def ppo_learner(lm: LanguageModel, config: PPOStage, problem: Problem, critic_trunk: dict) -> Learner:
    """PPO, its critic on `critic_trunk`."""
    algorithm = config.algorithm
    evaluate = text_actor_critic(lm, temperature=config.temperature, shared_trunk=config.shared_trunk)
    critic = make_critic(critic_trunk, lm.config.width)
    if config.shared_trunk:
        critic = {"head": critic["head"]}
    return Learner(
        _algorithm(config, evaluate),
        ppo_batch(lm, evaluate, temperature=config.temperature, exact_kl=algorithm.kl_estimator == "exact"),
        {"policy": problem.reference, "critic": critic},
        itemgetter("policy"),
        Passes(
            logits=2 + 3 * algorithm.epochs, hidden=1 + (not config.shared_trunk) * (1 + 3 * algorithm.epochs)
        ),
    )


def grpo_learner(lm: LanguageModel, config: GRPOStage, problem: Problem) -> Learner:
    """GRPO and its relatives; baseline "given" is the reward of a greedy completion (ReMax)."""
    algorithm = config.algorithm
    evaluate = text_policy(lm, temperature=config.temperature)
    exact = algorithm.kl_coefficient is not None and algorithm.kl_estimator == "exact"
    as_batch = grpo_batch(
        lm,
        temperature=config.temperature,
        exact_kl=evaluate if exact else None,
        greedy=_greedy(config),
    )
    passes = Passes(logits=1 + (algorithm.kl_coefficient is not None) + 3 * algorithm.epochs, hidden=0)
    return Learner(_algorithm(config, evaluate), as_batch, problem.reference, _whole, passes)


def online_dpo_learner(lm: LanguageModel, config: OnlineDPOStage, problem: Problem) -> Learner:
    """DPO on the best and the worst of each prompt's samples."""
    aligned = config.algorithm.weighting == "aligned"
    evaluate = pair_evaluate(lm, temperature=config.temperature, collision=aligned)
    return Learner(
        _algorithm(config, evaluate),
        best_worst_pairs(lm, temperature=config.temperature),
        problem.reference,
        _whole,
        Passes(logits=1 + 4 * 2 / config.samples, hidden=0),  # reference and policy read two of the samples
    )


def raft_learner(lm: LanguageModel, config: RAFTStage, problem: Problem) -> Learner:
    """Fine-tuning on the best of each prompt's samples."""
    evaluate = judged_evaluate(lm, temperature=config.temperature)
    passes = Passes(logits=1 + 3 / config.samples, hidden=0)  # the policy learns from one of the samples
    return Learner(_algorithm(config, evaluate), best_of_samples(), problem.reference, _whole, passes)


def check(config: Config, available: int) -> None:
    """Raises ValueError where the batch cannot be drawn or cut, or the settings contradict each other.

    For the start of an experiment: a mistake should not cost the minutes of the stages before this one.
    """
    parts = getattr(config.algorithm, "minibatches", 1) * config.algorithm.microbatches
    check_divisible(config.prompts, parts, what="minibatches x microbatches")
    if config.prompts > available:
        raise ValueError(
            f"{_method(config)} asks for {config.prompts} prompts a step; there are {available} to draw from"
        )
    if config.samples < 2 and _compares(config):
        raise ValueError(
            f"samples={config.samples}: this method compares the samples of a prompt with each other and needs at "
            "least 2 (grpo: or another baseline and scale)"
        )
    _algorithm(config, _never)
    check_guards(config)


def check_guards(config: Config) -> None:
    """Raises ValueError where the guards of a stage cannot be read, or ask for what its method has not."""
    why_not = ""
    if isinstance(config, OnlineDPOStage | RAFTStage):
        why_not = f"{_method(config)} keeps none that may change"
    elif config.algorithm.kl_coefficient is None:
        why_not = "algorithm.kl_coefficient is None; give 0.0 to begin without"
    guards.check(config.guards, why_not=why_not)


def _never(*_: Any) -> Any:
    raise AssertionError("settings are checked without an evaluation")


def _method(config: Config) -> str:
    return type(config).__name__.removesuffix("Stage").lower()


def _compares(config: Config) -> bool:
    if isinstance(config, GRPOStage):
        algorithm = config.algorithm
        return algorithm.baseline in ("group_mean", "leave_one_out") or algorithm.scale == "group_std"
    return isinstance(config, OnlineDPOStage)


def _algorithm(config: Config, evaluate: Callable[..., Any]) -> Algorithm:
    """The algorithm of a stage. Raises ValueError where its settings contradict each other."""
    optimizer = _optimizer(config)
    if isinstance(config, PPOStage):
        return ppo.make(evaluate, optimizer, config.algorithm, is_policy=policy_parameters)
    if isinstance(config, GRPOStage):
        algorithm = config.algorithm
        if algorithm.aggregation == "constant" and algorithm.length_constant is None:
            raise ValueError(
                'aggregation="constant" needs length_constant, e.g. the most tokens of a completion'
            )
        return grpo.make(evaluate, optimizer, algorithm)
    if isinstance(config, OnlineDPOStage):
        return dpo.make(evaluate, optimizer, config.algorithm)
    return sft.make(evaluate, optimizer, config.algorithm)


def run_key(seed: jax.Array | int) -> jax.Array:
    """The key that a run's iterations fold theirs from."""
    return jax.random.fold_in(jax.random.key(seed), 4)


def compose(lm: LanguageModel, config: Config, learner: Learner, problem: Problem) -> RLHF:
    """The iteration of a method; float settings may be traced."""
    text = problem.text
    return make_rlhf(
        lm,
        learner.algorithm,
        learner.as_batch,
        reward=None if problem.reward is None else problem.reward(lm),
        numbered=problem.numbered,
        samples=config.samples,
        max_new_tokens=text.config.completion_length,
        stop_tokens=text.stop_tokens,
        banned_tokens=text.unused_tokens,
        temperature=config.temperature,
        missing_eos_penalty=config.missing_eos_penalty,
        greedy=_greedy(config),
        policy=learner.policy,
    )


def optimise_policy(
    name: str, config: Config, make_learner: MakeLearner, problem: Problem, folder: RunFolder
) -> dict:
    """Runs the stage `name` from the reference; returns the policy's parameters."""
    text, examples = problem.text, problem.examples
    learner = make_learner(text.lm)
    iterate = text.jit(lambda lm: compose(lm, config, make_learner(lm), problem).iterate, donate_argnums=(0,))
    key = run_key(folder.seed)
    frozen = Frozen(problem.reference, problem.reward_params)
    guarding = guards.Guarding(config.guards)

    def init():
        return text.init(learner.algorithm.init, learner.params)

    def batch(step: int):
        rows = problem.rows
        return text.batch(examples, rows[batch_indices(folder.seed, step, config.prompts, len(rows))])

    per_step = config.prompts * (text.config.prompt_length + config.samples * text.config.completion_length)
    trained = np.float32(per_step * getattr(config.algorithm, "epochs", 1))

    def step(state, prompts, i):
        state = guarding.raise_in(state, i)
        state, metrics, experience = iterate(state, frozen, prompts, jax.random.fold_in(key, i))
        generated = experience.generation.mask_BGC.sum(dtype=jnp.float32)
        metrics |= {"perf/generated_tokens": generated, "perf/trained_tokens": trained}
        return state, metrics, (prompts.index_B, experience)

    def texts_of(experience: tuple[np.ndarray, Experience]):
        branches = experience[1].branches
        return text.decode(*(np.asarray(x)[:, : config.samples] for x in branches[2:]))

    def measure(i: int, experience) -> dict[str, float]:
        flops = learner.passes.flops(text.lm.config, experience[1].branches, reward=True)
        index, texts = experience[0], texts_of(experience)
        gold = float(np.mean(problem.gold(index, texts)))
        return {"gold": gold, "perf/model_flops": flops} | guarding.scores(i, examples, index, texts)

    def samples(i: int, experience) -> list[dict[str, Any]]:
        del i
        index, (_, _, score) = experience
        texts = texts_of(experience)
        golds = np.asarray(problem.gold(index, texts))
        return sample_rows(examples, index, texts, {"reward": score, "gold": golds})

    state = run_stage(
        name,
        folder=folder,
        init=init,
        step=step,
        batch=batch,
        steps=config.steps,
        checkpoint_every=25,
        keep=guarding.keep(25),
        nullable=guarding.nullable,
        show=Show(columns=COLUMNS, every=1, measure=measure, samples=samples, samples_every=25),
        watch=guarding.watch,
    )
    return learner.policy(evaluation_params(state.opt_state, state.params))


def sample_rows(
    examples: Examples, index: np.ndarray, texts: list[list[str]], scores: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """The first completions of the first prompts, for samples.jsonl; `scores` by name, each [B, G]."""
    return [
        examples.shown(index[b])
        | {"completion": texts[b][0]}
        | {name: float(score_BG[b, 0]) for name, score_BG in scores.items()}
        for b in range(min(4, len(index)))
    ]


def _optimizer(config: Config):
    parts = (getattr(config.algorithm, name, 1) for name in ("epochs", "minibatches"))
    return make_optimizer(config.optimizer, config.steps * int(np.prod(list(parts))))


def _greedy(config: Config) -> bool:
    return isinstance(config, GRPOStage) and config.algorithm.baseline == "given"


def _whole(params: Any) -> dict:
    return params
