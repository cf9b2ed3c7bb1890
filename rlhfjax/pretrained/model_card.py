"""A model card: README.md of an exported model, in the form the Hugging Face Hub reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from rlhfjax.pretrained.weights_files import write_folder

CARD = "README.md"


def write_model_card(
    directory: str | Path,
    *,
    name: str,
    base: str,
    method: str,
    data: str,
    command: str,
    metrics: Mapping[str, float],
    library: str,
    licence: str | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Writes README.md.

    Args:
      base: the model this one was made from, a name on the Hub or a path.
      method: how, in a sentence. data: on what.
      command: what makes it again. metrics: name -> value, as measured.
      library: "transformers" for a whole model, "peft" for an adapter.
      licence: SPDX name; None: none is stated, and the base's own holds.
      notes: paragraphs besides.
    """
    front = {"base_model": base, "library_name": library, "tags": ["rlhfjax", "rlhf"]}
    if licence is not None:
        front["license"] = licence
    table = "\n".join(f"| {key} | {value:.4g} |" for key, value in metrics.items())
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}\n",
        f"{method} It was made from `{base}` with [rlhfjax](https://github.com/rlhfjax/rlhfjax).\n",
        f"## Data\n\n{data}\n",
        f"## Metrics\n\n| metric | value |\n|---|---|\n{table}\n" if metrics else "",
        f"## Made by\n\n```\n{command}\n```\n",
        *(f"{note}\n" for note in notes),
        _usage(library, base),
    ]
    text = "\n".join(part for part in parts if part)
    write_folder(Path(directory), {CARD: lambda file: file.write_text(text)})


def card_of_merged(card: str, base: str) -> str:
    """The card of an adapter as that of the whole model it was merged into."""
    card = card.replace("library_name: peft", "library_name: transformers")
    return card.replace(_usage("peft", base), _usage("transformers", base))


def _usage(library: str, base: str) -> str:
    if library == "peft":
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "this folder")',
        ]
    else:
        lines = [
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("this folder")',
        ]
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```\n"
