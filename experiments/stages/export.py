"""What a run gives back: its policy and its reward model, as other programs load them."""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.assets import asset
from experiments.stages.text import Text
from rlhfjax import processes
from rlhfjax.data import PretrainedTokenizer, save_tokenizer
from rlhfjax.mesh import PyTree, fetch
from rlhfjax.networks import merge_lora
from rlhfjax.pretrained import POLICY, save_peft, save_pretrained, save_reward_model, write_model_card
from rlhfjax.run_folder import RunFolder


def on_first_process(params: PyTree) -> PyTree:
    """The params, for process 0 to write. Where there are several they are gathered, and all must ask for it."""
    return fetch(params) if processes.count() > 1 else params


def export_policy(
    text: Text, params: dict, folder: RunFolder, *, method: str, metrics: Mapping[str, float]
) -> Path:
    """Writes RUN/policy, which `python -m rlhfjax.pretrained` reads: LoRA adapters in PEFT's layout, or the whole model
    in that of Hugging Face, with a model card. Returns the folder. Of several processes the first writes.
    """
    directory = folder.path / POLICY
    base = _base_name(text)
    params = on_first_process(params)
    if not processes.is_first():
        return directory
    if text.lora is None:
        save_pretrained(directory, text.lm.config, params, dtype="bfloat16", like=_folder(text))
        _save_tokenizer(text, directory)
    else:
        save_peft(directory, text.lm.config, text.lora, params, base_name=base)
    write_model_card(
        directory,
        name=f"{Path(base).stem} by {method}",
        base=base,
        method=f"{method}.",
        data=f"Prompts of `{text.config.data}`.",
        command=f"python experiments/run.py {' '.join(sys.argv[1:])}".strip(),
        metrics={name: x for name, x in metrics.items() if not name.endswith(("low", "high"))},
        library="transformers" if text.lora is None else "peft",
        notes=[f"Seed {folder.seed}; the settings are those of the run's config.yaml."],
    )
    return directory


def export_reward_model(text: Text, params: dict, folder: RunFolder, *, rewards: str) -> Path:
    """Writes RUN/reward_model, a sequence classifier whose trunk is the base with the adapters merged.

    Scores are those of the run less their bias, which a classifier does not have: what is preferred stays.
    """
    directory, trunk = folder.path / "reward_model", params["trunk"]
    if text.lora is not None:
        trunk = jax.jit(partial(merge_lora, config=text.lora))(text.base, trunk)
    params, trunk = on_first_process((params, trunk))
    if not processes.is_first():
        return directory
    unbiased = params | {
        "trunk": trunk,
        "head": params["head"] | {"bias": jnp.zeros(())},
        "bias": jnp.zeros(()),
    }
    save_reward_model(
        directory,
        text.lm.config,
        unbiased,
        pad_token_id=text.tokenizer.pad_id,
        dtype="bfloat16",
        like=_folder(text),
    )
    _save_tokenizer(text, directory)
    write_model_card(
        directory,
        name=f"Reward model of {rewards}",
        base=_base_name(text),
        method=f"A reward model of pairs labelled by {rewards}.",
        data=f"Completions of `{text.config.data}`, sampled and labelled in the run.",
        command=f"python experiments/run.py {' '.join(sys.argv[1:])}".strip(),
        metrics={},
        library="transformers",
    )
    return directory


def _base_name(text: Text) -> str:
    """The base as it can be opened from anywhere: a path is made absolute, other names stay."""
    name = asset(text.config.base)
    return str(name.resolve()) if name.exists() else text.config.base


def _save_tokenizer(text: Text, directory: Path) -> None:
    """Where the base is no folder whose files were copied."""
    if _folder(text) is None and isinstance(text.tokenizer, PretrainedTokenizer):
        save_tokenizer(directory, text.tokenizer, text.template)


def _folder(text: Text) -> Path | None:
    """The base's folder, where it is one."""
    return text.source if text.source is not None and text.source.is_dir() else None
