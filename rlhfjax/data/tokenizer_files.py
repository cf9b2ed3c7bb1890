"""What lies beside a pretrained model's `tokenizer.json`: its special tokens, where it stops, its chat template.

The files are those `transformers` writes: `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`,
`config.json`, `chat_template.jinja` and `additional_chat_templates/`. Any of them may be missing.
"""

import json
from pathlib import Path
from typing import Any

__all__ = ["read_chat_template", "read_special_tokens", "read_stop_ids", "update_object"]

# Roles of special tokens, which the files call "eos_token" and so on.
ROLES = ("bos", "eos", "pad", "unk")


def read_special_tokens(directory: str | Path) -> dict[str, str]:
    """Role ("bos", "eos", "pad", "unk") -> text of the token, where the folder's files name one.

    `tokenizer_config.json` goes before `special_tokens_map.json`. ValueError for a file that is no JSON, and for a text
    with half of a surrogate pair, which JSON can write and UTF-8 cannot.
    """
    texts: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        raw = _read_object(Path(directory) / name)
        for role in ROLES:
            token = raw.get(f"{role}_token")
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and text:
                if any("\ud800" <= character <= "\udfff" for character in text):
                    raise ValueError(f"{Path(directory) / name}: {role}_token={text!r} is no text")
                texts.setdefault(role, text)
    return texts


def read_stop_ids(directory: str | Path) -> tuple[int, ...]:
    """Ids at which generation stops: `eos_token_id`, one or a list, of `generation_config.json`, else `config.json`."""
    for name in ("generation_config.json", "config.json"):
        stop = _read_object(Path(directory) / name).get("eos_token_id")
        if stop is not None:
            return tuple(stop) if isinstance(stop, list) else (stop,)
    return ()


def read_chat_template(directory: str | Path, name: str = "default") -> str:
    """The Jinja source of a chat template.

    name: "default", or that of one of several, as "tool_use".
    A file of its own goes before `tokenizer_config.json`, as in `transformers`. FileNotFoundError if there is none.
    """
    found = _chat_templates(Path(directory))
    if name not in found:
        raise FileNotFoundError(
            f"{directory} has no chat template {name!r} (found: {sorted(found)}); a base model has none: "
            "pass one by intent, such as ChatTemplate(CHATML, ...)"
        )
    return found[name]


def update_object(file: Path, entries: dict[str, Any]) -> None:
    """Writes entries into the object of a JSON file, which need not be there yet."""
    text = json.dumps(_read_object(file) | entries, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _chat_templates(directory: Path) -> dict[str, str]:
    raw = _read_object(directory / "tokenizer_config.json").get("chat_template")
    found: dict[str, str] = {"default": raw} if isinstance(raw, str) else {}
    if isinstance(raw, list) and all(isinstance(entry, dict) for entry in raw):
        found = {entry.get("name", "?"): entry.get("template") for entry in raw}
    elif isinstance(raw, dict):
        found = dict(raw)
    for name, source in found.items():
        if not isinstance(name, str) or not isinstance(source, str):
            raise ValueError(f"{directory / 'tokenizer_config.json'}: chat template {name!r} is no text")
    for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = file.read_text(encoding="utf-8")
    file = directory / "chat_template.jinja"
    if file.is_file():
        found["default"] = file.read_text(encoding="utf-8")
    return found


def _read_object(file: Path) -> dict[str, Any]:
    """The object of a JSON file, empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); fetch it again") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: a JSON object is needed, this is {type(raw).__name__}")
    return raw
