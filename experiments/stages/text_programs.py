"""The programs of the stages on text, as shapes: for `--dry-run`, without weights, tokenizer and data."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.assets import asset
from experiments.programs import Program, key_shape, row_shapes, state_shapes, whole_shapes
from experiments.stages import finetune, methods, offline, pairs, policy, reward
from experiments.stages.configs import (
    DPOStage,
    EvaluationStage,
    GRPOStage,
    ILQLStage,
    PreferenceStage,
    RatingStage,
    RewardStage,
    SFTStage,
)
from experiments.stages.configs import Text as TextConfig
from experiments.stages.policy import Problem
from experiments.stages.preferences import BATCH, BRANCHES
from experiments.stages.text import Text
from rlhfjax.algorithms import Algorithm, reward_model, sft
from rlhfjax.generation import Generation, Sampling, generate, sample_keys
from rlhfjax.mesh import Devices, activations, gathered_to_decode
from rlhfjax.networks import Branches, LanguageModel, adapted, decoder, init_lora, quantise
from rlhfjax.pretrained import find_model, pretrained_config
from rlhfjax.recipes import (
    Frozen,
    PackedInputs,
    Prompts,
    branch_states,
    init_reward_model,
    make_reward_model,
    pair_batch,
    rated_episodes,
    soft_batch,
)

PyTree = Any
ARCHITECTURES = asset("experiments/assets/architectures")


def text_of_shapes(config: TextConfig, mesh: Devices, *, layers: int | None = None) -> Text:
    """The text of a configuration with shapes in place of the base's weights, and without a tokenizer.

    layers: of the base, its first ones; None: all.

    `config.base` may name an architecture alone (a folder with a config.json, or one of `ARCHITECTURES`).
    """
    known = ARCHITECTURES / str(config.base)
    source = known if known.is_dir() else find_model(_named(config))
    shape = dataclasses.replace(pretrained_config(source), dtype=config.compute, remat=config.remat)
    if layers is not None:
        shape = dataclasses.replace(shape, layers=layers, windows=shape.windows[:layers])
    length = config.prompt_length + config.completion_length
    if length > shape.max_positions:
        raise ValueError(
            f"prompt_length {config.prompt_length} + completion_length {config.completion_length} exceed the "
            f"{shape.max_positions} positions of {source}"
        )
    lm = gathered_to_decode(mesh, decoder(shape, place=activations(mesh)))
    stored = jnp.float32 if config.base_bits == 32 else jnp.bfloat16

    def base() -> dict:
        params = jax.tree.map(lambda x: x.astype(stored), decoder(shape).init(jax.random.key(0)))
        return quantise(params, config.base_bits) if config.base_bits in (8, 4) else params

    lora = config.lora if config.trained == "lora" else None
    return Text(
        config,
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        lm=lm,
        base=state_shapes(mesh, base),
        stop_tokens=(0,),
        lora=lora,
        source=source,
        mesh=mesh,
    )


def programs_of_text(
    config: TextConfig,
    mesh: Devices,
    *,
    sft: SFTStage | None = None,
    preferences: PreferenceStage | None = None,
    reward: RewardStage | None = None,
    ratings: RatingStage | None = None,
    policies: Mapping[str, methods.Stage],
    evaluation: EvaluationStage | None = None,
    on_host: bool = False,
    seeds: int = 1,
    layers: int | None = None,
) -> list[Program]:
    """The programs of a whole experiment, in the order of its stages.

    A stage of None is not part of it. `on_host`: whether the reward of `policies` is a Python function; else it is the
    model of `reward` or, without one, one that costs nothing. `layers` of the base; None: all.
    """
    text = text_of_shapes(config, mesh, layers=layers)
    found = []
    if sft is not None and sft.steps:
        found.append(_finetuning(sft, text))
    if preferences is not None and preferences.labels is None:
        found.append(_sampling("preferences", text, preferences.samples, BATCH, preferences.prompts))
    if reward is not None:
        samples = _judged_samples(preferences, 2)
        found.append(_reward_model(reward, text, samples))
    for name, stage in policies.items():
        found += _policy(name, stage, text, reward, preferences, ratings, on_host)
    if evaluation is not None:
        columns = max([1, *evaluation.best_of]) + len(evaluation.temperatures) + 1
        of_policies = 1 + len(policies)
        one = _sampling("evaluation", text, columns, evaluation.batch, evaluation.prompts)
        found.append(dataclasses.replace(one, runs=one.runs * of_policies))
    found = [dataclasses.replace(program, runs=program.runs * seeds) for program in found]
    if layers is not None:
        return found

    def again(number: int, changed: TextConfig = config, layers: int | None = None) -> Program:
        return programs_of_text(
            changed,
            mesh,
            sft=sft,
            preferences=preferences,
            reward=reward,
            ratings=ratings,
            policies=policies,
            evaluation=evaluation,
            on_host=on_host,
            seeds=seeds,
            layers=layers,
        )[number]

    changes = {f"--text.completion-length {config.completion_length // 2}": _half_as_long(config)}
    if config.remat != "block":
        changes["--text.remat block"] = dataclasses.replace(config, remat="block")
    depth = (
        0 if any(text.lm.config.windows) else text.lm.config.layers
    )  # layers with windows are not all equal

    def told(number: int, program: Program) -> Program:
        def at(rows: int) -> Program:
            assert program.at is not None
            shallow = lambda layers: again(number, layers=layers).at(rows)  # noqa: E731  # pyright: ignore
            return dataclasses.replace(program.at(rows), depth=depth, shallow=shallow)

        return dataclasses.replace(
            program,
            at=at,
            depth=depth,
            shallow=lambda layers: again(number, layers=layers),
            variants={flags: partial(again, number, changed) for flags, changed in changes.items()},
        )

    return [told(number, program) for number, program in enumerate(found)]


def _half_as_long(config: TextConfig) -> TextConfig:
    return dataclasses.replace(config, completion_length=max(1, config.completion_length // 2))


def _named(config: TextConfig) -> str | Path:
    name = asset(config.base)
    return name if name.exists() else config.base


def _trained(text: Text) -> dict:
    """Shapes of what is trained: the whole model, or adapters."""
    if text.lora is None:
        return text.base
    return state_shapes(text.mesh, partial(init_lora, config=text.lora), jax.random.key(0), text.base)


def _finetuning(config: SFTStage, text: Text, rows: int | None = None) -> Program:
    rows = rows or config.rows
    number = _shape(jnp.int32, rows, config.length)
    batch = sft.Batch(PackedInputs(*(number,) * 4), _shape(jnp.float32, rows, config.length))
    return Program(
        **_update(text, finetune.make_algorithm(config), _trained(text), row_shapes(text.mesh, batch)),
        stage="sft",
        runs=config.steps,
        rows=rows,
        at=partial(_finetuning, config, text),
    )


def _reward_model(config: RewardStage, text: Text, samples: int, prompts: int | None = None) -> Program:
    prompts = prompts or config.prompts
    batch = reward_model.Preference(_branches(text, prompts, samples), **_pairs(text, prompts, samples))
    return Program(
        **_update(text, reward.make_algorithm(config), _reward_params(text), batch),
        stage="reward_model",
        runs=config.steps,
        rows=prompts,
        at=partial(_reward_model, config, text, samples),
    )


def _dpo(name: str, config: DPOStage, text: Text, samples: int, prompts: int | None = None) -> Program:
    prompts = prompts or config.prompts
    branches = _branches(text, prompts, samples)
    pairs_of = {x: y for x, y in _pairs(text, prompts, samples).items() if x != "mask_BK"}
    logp_ref = None
    if not config.algorithm.reference_free:
        logp_ref = row_shapes(text.mesh, _shape(jnp.float32, prompts, samples, text.config.completion_length))
    shapes = jax.eval_shape(pair_batch, branches, logp_ref, **pairs_of)
    index = pairs_of["first"]
    batch = row_shapes(text.mesh, shapes)._replace(first=index, second=index)
    return Program(
        **_update(text, pairs.make_algorithm(config), _trained(text), batch),
        stage=name,
        runs=config.steps,
        rows=prompts,
        at=partial(_dpo, name, config, text, samples),
    )


def _offline(
    name: str, config: offline.Config, text: Text, samples: int, prompts: int | None = None
) -> Program:
    prompts = prompts or config.prompts
    score = row_shapes(text.mesh, _shape(jnp.float32, prompts, samples))
    episodes = jax.eval_shape(rated_episodes, _branches(text, prompts, samples), score)
    params = _trained(text)
    if isinstance(config, ILQLStage):
        batch = episodes
        params = jax.eval_shape(
            lambda key, policy, trunk: offline.start_of_values(key, config, text.lm, policy, trunk),
            jax.random.key(0),
            params,
            params,
        )
    else:

        def of_reference(reference: dict, base: dict, episodes: Any) -> Any:
            lm = _model(text, base)
            return soft_batch(lm, reference, episodes, states=branch_states, temperature=config.temperature)

        batch = jax.eval_shape(of_reference, params, text.base, episodes)
    return Program(
        **_update(text, offline.make_algorithm(config), params, row_shapes(text.mesh, batch)),
        stage=name,
        runs=config.steps,
        rows=prompts,
        at=partial(_offline, name, config, text, samples),
    )


def _policy_optimisation(
    name: str, config: policy.Config, text: Text, rewarding: RewardStage | None, on_host: bool, prompts: int
) -> list[Program]:
    """One program; two where the reward is called between them."""
    trained, mesh = _trained(text), text.mesh
    reward_params = None if rewarding is None else _reward_params(text)
    nothing: Any = None  # no data, and no gold scores
    free = lambda lm: lambda params, branches: jnp.zeros(branches.completion_BGC.shape[:2])  # noqa: E731
    scored = free if rewarding is None else partial(make_reward_model, pool=rewarding.pool)
    problem = Problem(text, trained, None if on_host else scored, reward_params, nothing, nothing, nothing)
    trunk = trained if reward_params is None else reward_params["trunk"]

    def learner(lm: LanguageModel) -> policy.Learner:
        return methods.make_learner(lm, config, problem, trunk)

    def rlhf(lm: LanguageModel):
        return policy.compose(lm, config, learner(lm), problem)

    own = learner(text.lm)
    state = state_shapes(mesh, own.algorithm.init, own.params)
    frozen = Frozen(
        trained, None if reward_params is None else state_shapes(mesh, lambda x: x, reward_params)
    )
    batch = _prompts(text, prompts)
    parts = _parts(text, state, frozen) | {"batch": batch}
    more = {"stage": name, "runs": config.steps, "parts": parts, "rows": prompts}

    def at(which: int):
        return lambda rows: _policy_optimisation(name, config, text, rewarding, on_host, rows)[which]

    if not on_host:
        iterate = text.jit(lambda lm: rlhf(lm).iterate, donate_argnums=(0,))
        arguments = state, frozen, batch, key_shape(mesh)
        return [Program(name="iteration", function=iterate, arguments=arguments, at=at(0), **more)]
    rollout = text.jit(lambda lm: rlhf(lm).rollout)
    learn = text.jit(lambda lm: rlhf(lm).learn, donate_argnums=(0,))
    samples, length = own_samples(config), text.config.completion_length
    generation = row_shapes(
        mesh,
        Generation(
            token_BGC=_shape(jnp.int32, prompts, samples, length),
            mask_BGC=_shape(bool, prompts, samples, length),
            logp_BGC=_shape(jnp.float32, prompts, samples, length),
            plain_logp_BGC=_shape(jnp.float32, prompts, samples, length),
            finished_BG=_shape(bool, prompts, samples),
        ),
    )
    score = row_shapes(mesh, _shape(jnp.float32, prompts, samples))
    words = "the rewards, called in Python between the two programs"
    return [
        Program(
            name="rollout", function=rollout, arguments=(state, batch, key_shape(mesh)), at=at(0), **more
        ),
        Program(
            name="update",
            function=learn,
            arguments=(state, frozen, batch, generation, score, key_shape(mesh)),
            at=at(1),
            uncounted=words,
            **more,
        ),
    ]


def own_samples(config: policy.Config) -> int:
    """Completions of each prompt that a rollout draws: one more where a greedy one is the baseline."""
    greedy = isinstance(config, GRPOStage) and config.algorithm.baseline == "given"
    return config.samples + greedy


def _policy(
    name: str,
    config: methods.Stage,
    text: Text,
    rewarding: RewardStage | None,
    preferences: PreferenceStage | None,
    ratings: RatingStage | None,
    on_host: bool,
) -> list[Program]:
    if isinstance(config, DPOStage):
        return [_dpo(name, config, text, _judged_samples(preferences, 4))]
    if isinstance(config, offline.Config):
        samples = 4 if preferences is None else preferences.samples
        sampled = preferences.prompts if preferences and preferences.labels is None else 0
        more = max(0, (ratings.prompts if ratings else 0) - sampled)
        sampled = [_sampling("rated_samples", text, samples, BATCH, more)] if more else []
        return [*sampled, _offline(name, config, text, samples)]
    return _policy_optimisation(name, config, text, rewarding, on_host, config.prompts)


def _judged_samples(preferences: PreferenceStage | None, without: int) -> int:
    """Completions of a prompt that pairs are made of; people compare two."""
    if preferences is None:
        return without
    return preferences.samples if preferences.labels is None else 2


def _sampling(stage: str, text: Text, samples: int, batch: int, prompts: int) -> Program:
    """`sample_policy` of so many prompts in all, in groups of completions that share a row."""
    width = min(samples, BRANCHES)

    def sampler(lm: LanguageModel):
        def run(params: dict, prompts: Prompts, key: jax.Array, temperatures: jax.Array):
            keys = sample_keys(key, prompts.index_B, width)
            return generate(
                lm,
                params,
                prompts.token_BP,
                prompts.mask_BP,
                keys,
                max_new_tokens=text.config.completion_length,
                stop_tokens=text.stop_tokens,
                sampling=Sampling(jnp.tile(temperatures, batch)),
            )

        return run

    params, of_batch = _trained(text), _prompts(text, batch)
    heat = whole_shapes(text.mesh, _shape(jnp.float32, width))
    frozen = text.base if text.lora is not None else {}
    return Program(
        stage=stage,
        name="sampling",
        function=text.jit(sampler),
        arguments=(params, of_batch, key_shape(text.mesh), heat),
        runs=math.ceil(prompts / batch) * math.ceil(samples / BRANCHES),
        parts={"parameters": params, "frozen": frozen, "batch": of_batch},
        rows=batch,
        at=lambda rows: _sampling(stage, text, samples, rows, prompts),
    )


def _update(
    text: Text, make: Callable[[LanguageModel], Algorithm], params: PyTree, batch: PyTree
) -> dict[str, Any]:
    """The program of an algorithm's update, as part of the arguments of `Program`."""
    state = state_shapes(text.mesh, make(text.lm).init, params)
    update = text.jit(lambda lm: make(lm).update, donate_argnums=(0,))
    return {
        "name": "update",
        "function": update,
        "arguments": (state, batch, key_shape(text.mesh)),
        "parts": _parts(text, state, ()) | {"batch": batch},
    }


def _parts(text: Text, state: Any, frozen: PyTree) -> dict[str, PyTree]:
    base = text.base if text.lora is not None else ()
    return {"parameters": state.params, "optimiser": state.opt_state, "frozen": (frozen, base)}


def _model(text: Text, base: dict) -> LanguageModel:
    return text.lm if text.lora is None else adapted(text.lm, base, text.lora)


def _reward_params(text: Text) -> dict:
    key, width = jax.random.key(0), text.lm.config.width
    return jax.eval_shape(lambda trunk: init_reward_model(key, trunk, width), _trained(text))


def _prompts(text: Text, prompts: int) -> Prompts:
    length = text.config.prompt_length
    shapes = Prompts(
        _shape(jnp.int32, prompts, length), _shape(bool, prompts, length), _shape(jnp.int32, prompts)
    )
    return row_shapes(text.mesh, shapes)


def _branches(text: Text, prompts: int, samples: int) -> Branches:
    length = text.config.completion_length
    shapes = _shape(jnp.int32, prompts, samples, length), _shape(bool, prompts, samples, length)
    return Branches(*_prompts(text, prompts)[:2], *row_shapes(text.mesh, shapes))


def _pairs(text: Text, prompts: int, samples: int) -> dict[str, Any]:
    """All pairs of the samples of each prompt."""
    count = math.comb(samples, 2)
    index = whole_shapes(text.mesh, _shape(jnp.int32, count))
    label, mask = row_shapes(text.mesh, (_shape(jnp.float32, prompts, count), _shape(bool, prompts, count)))
    return {"first": index, "second": index, "label_BK": label, "mask_BK": mask}


def _shape(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
