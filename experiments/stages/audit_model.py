"""A trained reward model as a function of texts: of a run of the experiments, or a sequence classifier."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.arrays import read_arrays
from experiments.options import override, read_yaml
from experiments.stages import reward, text
from experiments.stages.configs import RewardStage
from rlhfjax.algorithms import evaluation_params
from rlhfjax.checkpoint import Checkpoints
from rlhfjax.data import (
    ChatTemplate,
    encode_prompts,
    end_of_turn,
    load_chat_template,
    load_tokenizer,
    pad_prompts,
)
from rlhfjax.data.tokenizers import Tokenizer
from rlhfjax.networks import Branches, decoder
from rlhfjax.pretrained import load_reward_model
from rlhfjax.recipes import init_reward_model, make_reward_model
from rlhfjax.rewards import HostReward

SHORTEST = 16  # tokens; texts are padded to this times a power of two, so that few programs are compiled


@dataclass(frozen=True)
class Opened:
    """A reward model with its tokenizer."""

    evaluate: Callable[[Branches], jax.Array]
    tokenizer: Tokenizer
    template: ChatTemplate | None
    stop: int  # the token that ends a completion
    positions: int


def open_reward_model(where: Path, calls_of: int) -> HostReward:
    """The reward model in the folder `where`, as a function of lists of texts.

    A folder is a sequence classifier in the Hugging Face layout, a run that has exported one (RUN/reward_model), or a
    run with the stage `reward_model` (of several seeds: RUN/seed-N). A completion that is too long for the model is
    cut. Raises ValueError where the folder is neither, or a prompt is too long.
    """
    if (where / "config.json").is_file():
        opened = _classifier(where)
    elif (where / "reward_model" / "config.json").is_file():
        opened = _classifier(where / "reward_model")
    elif (where / "checkpoints" / "reward_model").is_dir():
        opened = _of_run(where)
    else:
        raise ValueError(
            f"{where} holds no reward model: it is neither a sequence classifier (config.json) nor a run that has "
            "trained one (checkpoints/reward_model)"
        )
    lock = threading.Lock()  # one program at a time: a second would wait for the same cores

    def scored(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        with lock:
            return score_texts(opened, prompts, completions, calls_of)

    return scored


def _classifier(where: Path) -> Opened:
    config, params = load_reward_model(where)
    tokenizer = load_tokenizer(where)
    try:
        template = load_chat_template(where)
    except FileNotFoundError:
        template = None
    model = make_reward_model(decoder(config), pool="last")
    evaluate = jax.jit(model)
    stop = tokenizer.eos_id if template is None else end_of_turn(template, tokenizer)[0]
    return Opened(lambda x: evaluate(params, x), tokenizer, template, stop, config.max_positions)


def _of_run(where: Path) -> Opened:
    from experiments import run

    described = next((x for x in (where, where.parent) if (x / "config.yaml").is_file()), None)
    if described is None:
        raise ValueError(f"{where}: neither it nor the folder above has the config.yaml of a run")
    saved = read_yaml(described / "config.yaml")
    module = run.load_experiment(str(saved.get("experiment")), run.HERE)
    options = {name: x for name, x in saved.items() if name not in (*run.RECORDED, "experiment")}
    config = override(module.Config(), options, source=str(described / "config.yaml"))
    stage = next(
        (
            x
            for x in (getattr(config, name, None) for name in ("reward_model", "reward"))
            if isinstance(x, RewardStage)
        ),
        None,
    )
    if stage is None:
        raise ValueError(f"the experiment {saved['experiment']!r} of {where} trains no reward model")
    opened = text.open_text(config.text)
    trunk = opened.start(jax.random.key(0))
    like = opened.compiled(reward.make_algorithm(stage)).init(
        init_reward_model(jax.random.key(0), trunk, opened.lm.config.width)
    )
    with Checkpoints(where / "checkpoints" / "reward_model") as checkpoints:
        found = checkpoints.restore_latest(like)
    if found is None:
        raise ValueError(f"{where}: no checkpoint of its reward model can be read")
    params = evaluation_params(found[1].opt_state, found[1].params)
    normalised = where / "arrays" / "reward_model_heldout.npz"
    if normalised.is_file():
        arrays = read_arrays(normalised)
        params = params | {name: jnp.asarray(arrays[name]) for name in ("gain", "bias")}
    evaluate = opened.jit(lambda lm: make_reward_model(lm, pool=stage.pool))
    return Opened(
        lambda x: evaluate(params, x),
        opened.tokenizer,
        opened.template,
        opened.stop_tokens[0],
        opened.lm.config.max_positions,
    )


def score_texts(
    opened: Opened, prompts: Sequence[str], completions: Sequence[str], calls_of: int
) -> list[float]:
    """The score of each text, of any number of them, `calls_of` at a time."""
    asked = _prompt_ids(opened, prompts)
    longest = max(map(len, asked))
    room = opened.positions - longest
    if room < 1:
        raise ValueError(
            f"a prompt has {longest} tokens, and the reward model has {opened.positions} positions for it and an answer"
        )
    answers = [ids[: room - 1] + [opened.stop] for ids in opened.tokenizer.encode_batch(list(completions))]
    width, height = _bucket(longest, opened.positions), _bucket(max(map(len, answers)), room)
    pad = opened.tokenizer.pad_id
    found = []
    for start in range(0, len(asked), calls_of):
        rows = np.resize(np.arange(start, min(start + calls_of, len(asked))), calls_of)
        prompt_BP, prompt_mask_BP = pad_prompts([asked[row] for row in rows], width, pad)
        completion_BC = np.full((calls_of, height), pad, np.int32)
        for place, row in enumerate(rows):
            completion_BC[place, : len(answers[row])] = answers[row]
        mask_BC = np.arange(height) < np.asarray([len(answers[row]) for row in rows])[:, None]
        branches = Branches(
            *map(jnp.asarray, (prompt_BP, prompt_mask_BP, completion_BC[:, None], mask_BC[:, None]))
        )
        found.append(np.asarray(opened.evaluate(branches), np.float64)[:, 0])
    return np.concatenate(found)[: len(asked)].tolist()


def _prompt_ids(opened: Opened, prompts: Sequence[str]) -> list[list[int]]:
    tokenizer = opened.tokenizer
    if opened.template is not None:
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return encode_prompts(opened.template, tokenizer, messages, prompt_length=2**62).ids  # pyright: ignore[reportArgumentType]
    after = [tokenizer.special_ids["sep"]] if "sep" in tokenizer.special_ids else []
    return [[*tokenizer.prefix_ids, *ids, *after] for ids in tokenizer.encode_batch(list(prompts))]


def _bucket(length: int, most: int) -> int:
    """The next of 16, 32, 64, ..., at most `most`."""
    return min(most, SHORTEST * 2 ** max(0, int(np.ceil(np.log2(length / SHORTEST)))))
