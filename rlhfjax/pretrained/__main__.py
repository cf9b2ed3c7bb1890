"""`python -m rlhfjax.pretrained inspect|chat|convert|export`: look at a model, ask it, and give it back."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

_MODEL = (
    "a folder, a .gguf file, package:NAME, a LoRA adapter's folder, or OWNER/NAME on the Hugging Face Hub"
)


@dataclass(frozen=True)
class Inspect:
    """Says what a model is: its architecture, size, tokenizer and chat template."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help=_MODEL)]


@dataclass(frozen=True)
class Chat:
    """Answers a message, or many: without one, each line of standard input, the conversation going on."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help=_MODEL)]
    message: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(help="what to say")] = None
    system: str | None = None
    """System message; none: what the chat template says by itself."""
    temperature: float = 0.0
    """0: the most likely token at every step."""
    top_p: float = 1.0
    """Share of the probability that is sampled from."""
    max_new_tokens: int = 128
    """Most tokens of an answer."""
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and arithmetic."""


@dataclass(frozen=True)
class Convert:
    """Writes a model in the Hugging Face layout, its tokenizer beside it; a LoRA adapter is merged into its base."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(help=_MODEL)]
    to: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="the folder to write")]
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the weights."""
    shard_gigabytes: float = 5.0
    """Size above which the weights are cut into files."""


@dataclass(frozen=True)
class Export:
    """Writes the policy of a run as a whole model, with its model card."""

    run: Annotated[
        tyro.conf.Positional[Path], tyro.conf.arg(help="a run folder whose policy was exported by it")
    ]
    to: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(help="the folder to write")]
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the weights."""
    shard_gigabytes: float = 5.0
    """Size above which the weights are cut into files."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    commands = {"inspect": Inspect, "chat": Chat, "convert": Convert, "export": Export}
    command = tyro.extras.subcommand_cli_from_dict(
        commands, prog="python -m rlhfjax.pretrained", description=__doc__, args=arguments
    )
    try:
        {Inspect: _inspect, Chat: _chat, Convert: _convert, Export: _export}[type(command)](command)
    except (FileNotFoundError, ModuleNotFoundError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _inspect(command: Inspect) -> None:
    from rlhfjax.pretrained import describe

    print(describe(command.model))


def _chat(command: Chat) -> None:
    from rlhfjax.pretrained import Answerer, open_model

    answer = Answerer(
        open_model(command.model, dtype=command.dtype, compute_dtype=command.dtype),
        max_new_tokens=command.max_new_tokens,
        temperature=command.temperature,
        top_p=command.top_p,
        seed=command.seed,
    )
    said = [] if command.system is None else [{"role": "system", "content": command.system}]
    if command.message is not None:
        print(answer([*said, {"role": "user", "content": command.message}]))
        return
    while line := _next_line():
        said.append({"role": "user", "content": line})
        text = answer(said)
        print(text, flush=True)
        # A turn without a word is none: templates do not take it.
        said = [*said, {"role": "assistant", "content": text}] if text else said[:-1]


def _next_line() -> str:
    """The next line that says something; "" at the end."""
    try:
        while not (line := input("> " if sys.stdin.isatty() else "").strip()):
            pass
        return line
    except EOFError:
        return ""


def _convert(command: Convert) -> None:
    from rlhfjax.pretrained import convert

    convert(command.model, command.to, dtype=command.dtype, shard_bytes=int(command.shard_gigabytes * 1e9))
    print(f"{command.to}: {', '.join(sorted(file.name for file in command.to.iterdir()))}")


def _export(command: Export) -> None:
    from rlhfjax.pretrained import POLICY, convert

    policy = command.run / POLICY
    if not policy.is_dir():
        raise FileNotFoundError(
            f"{command.run} has no folder {POLICY}: it is no run of an experiment that exports its policy"
        )
    convert(policy, command.to, dtype=command.dtype, shard_bytes=int(command.shard_gigabytes * 1e9))
    print(f"{command.to}: {', '.join(sorted(file.name for file in command.to.iterdir()))}")


if __name__ == "__main__":
    sys.exit(main())
