"""Files that are read, each with a valid one to start from, and hypothesis' ways to spoil it.

A reader may succeed on a spoilt file, or raise ValueError or OSError with a message that names the file. Anything else
(another exception, a message that names nothing, a case that takes longer than `SECONDS`) is a failure.
"""

import json
import re
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

SECONDS = 20


class Target(NamedTuple):
    """A file that is read: its place, what makes it (and its neighbours) below a folder, and what reads it there."""

    file: str
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]


# What takes the place of a value in a text: (JSON, or YAML).
HOSTILE = (
    *(
        "null",
        "-1",
        "0",
        "1e999",
        "NaN",
        "1e-320",
        "99999999999999999999",
        '""',
        "[]",
        "{}",
        "true",
        "[null]",
    ),
    *('"\\ud800"', '"\\u0000"', '"../../x"', '{"a": {"a": 1}}', "!!python/object/apply:os.abort []"),
    *("deep list", "deep object"),
)
DEEP = {"deep list": b"[" * 3000, "deep object": b'{"a":' * 3000}  # named, so that reports stay short
_VALUE = re.compile(rb'-?\d+(\.\d+)?([eE][-+]?\d+)?|"[^"\n]*"|true|false|null|[\[{}\],:\n]')

_place = st.floats(0, 1, exclude_max=True)
_raw = st.sampled_from((b"\x00", b"\xff" * 7 + b"\x7f", b"\xed\xa0\x80", b"\n", b'"', b"{", b"}", b"\xc3"))
SPOILT = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), _place, st.integers(0, 7)),
        st.tuples(st.just("cut"), _place, st.just(0)),
        st.tuples(st.just("drop"), _place, st.integers(1, 40)),
        st.tuples(st.just("repeat"), _place, st.integers(1, 40)),
        st.tuples(st.just("insert"), _place, _raw),
        st.tuples(st.just("overwrite"), _place, _raw),
        st.tuples(st.just("value"), _place, st.sampled_from(HOSTILE)),
        st.tuples(st.just("swap"), _place, _place),
    ),
    min_size=1,
    max_size=3,
)


def spoil(content: bytes, changes: list[tuple[str, float, Any]], head: int | None = None) -> bytes:
    """`content` after the changes. `head`: half of them fall on so many first bytes, as a header may be short."""
    for kind, place, what in changes:
        size = len(content)
        if head is not None and place < 0.5:
            size = min(size, head)
            place *= 2
        at = int(place * size)
        if kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ (1 << what)]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "drop":
            content = content[:at] + content[at + what :]
        elif kind == "repeat":
            content = content[: at + what] + content[at:]
        elif kind == "insert":
            content = content[:at] + what + content[at:]
        elif kind == "overwrite":
            content = content[:at] + what + content[at + len(what) :]
        elif found := list(_VALUE.finditer(content[:20_000])):
            one = found[int(place * len(found))]
            other = (
                found[int(what * len(found))].group() if kind == "swap" else (DEEP.get(what) or what.encode())
            )
            content = content[: one.start()] + other + content[one.end() :]
    return content


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in here after so long; code in C that never returns is beyond it."""

    def ring(*_: Any) -> None:
        raise RuntimeError(f"longer than {seconds} s")

    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def outcome(read: Callable[[Path], Any], folder: Path, file: Path) -> str:
    """ "read", or "clear error". Raises AssertionError for anything else."""
    try:
        with limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder)
    except (ValueError, OSError) as error:
        named = any(name in str(error) for name in (file.name, str(file.parent), "the chat template"))
        assert named, f"{type(error).__name__} names no file: {error}"
        return "clear error"
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    return "read"


def fuzz(target: Target, folder: Path, cases: int, *, derandomize: bool = True) -> Counter[str]:
    """Spoils the file of `target` in `folder` so often and reads it; how often what came of it."""
    target.write(folder)
    file = folder / target.file
    whole = file.read_bytes()
    assert outcome(target.read, folder, file) == "read"
    seen: Counter[str] = Counter()
    head = 400 if file.suffix in (".gguf", ".safetensors", ".npz") else None

    @settings(
        max_examples=cases,
        derandomize=derandomize,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )
    @given(SPOILT)
    @example([("cut", 0.0, 0)])
    def one(changes: list[tuple[str, float, Any]]) -> None:
        file.write_bytes(spoil(whole, changes, head))
        seen[outcome(target.read, folder, file)] += 1

    try:
        one()
    finally:
        file.write_bytes(whole)
    return seen


# ---------------------------------------------------------------------------------------------- what is read


def _lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


PROMPTS = _lines(*({"prompt": f"What of {word}?", "split": "train"} for word in ("cats", "dogs", "tea")))
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CONVERSATIONS = _lines({"messages": TALK}, {"messages": TALK})
CHAT_PAIRS = _lines(*({"prompt": "Hi", "chosen": f"Hello {i}", "rejected": "No"} for i in range(3)))
PAIRS = _lines(*({"document": f"a b {i}", "summary": "a", "split": "train"} for i in range(3)))
LABELS = _lines(
    {"seed": "00"},
    {"label": "l1", "item": "x1", "prompt": "Hi", "completions": ["a", "b"], "annotator": "ann", "choice": 0},
    {
        "label": "l2",
        "prompt": "Ho",
        "completions": ["a", "b"],
        "choice": "tie",
        "shown": [1, 0],
        "seconds": 2.5,
    },
)
METRICS = _lines(*({"stage": "ppo", "step": i, "loss/total": 0.5, "kl": None} for i in range(1, 5)))
RESULTS = json.dumps(
    {
        "task": "tldr",
        "metric": "gold",
        "rows": [{"method": "ppo", "gold": [0.5, 1.0], "kl": 1.5, "seconds": 2.0, "command": "run.py"}],
    }
)
ACCELERATOR = "like: h100\nflops: 989e12\nmemory: 8.0e10\n"


def _preferences(folder: Path) -> None:
    from rlhfjax.data import PreferencePair, write_preferences

    pairs = [PreferencePair(f"prompt {i}", "better", "worse") for i in range(4)]  # pyright: ignore[reportCallIssue]
    write_preferences(folder / "pairs.jsonl.gz", pairs)


def _run_folder(folder: Path) -> None:
    from experiments.stages.results import FILE

    (folder / "config.yaml").write_text("experiment: length\nseed: 0\nppo:\n  steps: 3\nwords: 2\n")
    (folder / "summary.json").write_text('{"gold": 0.5, "kl": 1.5}\n')
    for name in ("metrics", "perf"):
        (folder / f"{name}.jsonl").write_text(METRICS)
    (folder / "samples.jsonl").write_text(_lines({"stage": "ppo", "step": 1, "prompt": "Hi", "text": "ho"}))
    (folder / FILE).write_text(RESULTS)


def _viewed(folder: Path) -> Any:
    from experiments.viewing.comparison import comparison_html  # noqa: F401  # pyright: ignore
    from experiments.viewing.runs import members, read_runs

    return [members(run) for run in read_runs([folder])]


def _repaired(folder: Path) -> None:
    from rlhfjax.run_folder import RunFolder

    run = RunFolder(folder)
    run.repair()
    run.metrics("ppo")
    run.truncate_after("ppo", 2)


def _config(folder: Path) -> None:
    from experiments import length
    from experiments.options import override, read_yaml

    path = folder / "config.yaml"
    own = {k: v for k, v in read_yaml(path).items() if k not in ("experiment", "seed")}
    override(length.Config(), own, source=str(path))


def _npz(folder: Path) -> None:
    texts = np.array([["a", "b"], ["c", "d"]])
    np.savez(folder / "validation.npz", prompt=np.array(["p", "q"]), texts=texts, name=np.array(["x", "y"]))


def _model(folder: Path) -> None:
    from tiny_chat import write_chat_model

    write_chat_model(folder)


def _adapter(folder: Path) -> None:
    import test_pretrained_peft as peft

    peft.save_peft(folder, peft.CONFIG, peft.LORA, peft.ADAPTERS, base_name="base")


def _read_adapter(folder: Path) -> None:
    import test_pretrained_peft as peft

    peft.load_peft(folder, peft.CONFIG, peft.BASE)


def _gguf(folder: Path) -> None:
    import test_pretrained_gguf as gguf

    config = gguf.FAMILIES["llama"]
    about = gguf.metadata("llama", config) | gguf.tokenizer_metadata()
    gguf.write_gguf(folder / "m.gguf", about, gguf.arrays_of("llama", config, gguf.random_params(config)))


def _read_gguf(folder: Path) -> None:
    from rlhfjax.pretrained.gguf import gguf_tokenizer, load_gguf, read_gguf

    opened = read_gguf(folder / "m.gguf")
    load_gguf(opened)
    gguf_tokenizer(opened)


def _tokenizer(folder: Path) -> None:
    from rlhfjax.data import end_of_turn, load_chat_template, load_tokenizer

    end_of_turn(load_chat_template(folder), load_tokenizer(folder))


def targets() -> dict[str, Target]:
    """Name -> what is read."""
    from experiments.annotation.items import read_gold, read_items
    from experiments.annotation.store import open_store
    from experiments.arrays import read_arrays
    from experiments.stages.results import FILE, read_results
    from rlhfjax import accelerators, data, pretrained

    model = {
        name: Target(file, _model, pretrained.load_pretrained)
        for name, file in (("model: weights", "model.safetensors"), ("model: config.json", "config.json"))
    }
    beside = {
        f"tokenizer: {file}": Target(file, _model, _tokenizer)
        for file in ("tokenizer.json", "tokenizer_config.json")
    }
    viewed = {
        f"run, shown: {file}": Target(file, _run_folder, _viewed)
        for file in ("config.yaml", "summary.json", "metrics.jsonl", "perf.jsonl", "samples.jsonl", FILE)
    }
    return (
        {
            "prompts": Target(
                "a.jsonl", _text("a.jsonl", PROMPTS), lambda f: data.read_prompts(f / "a.jsonl")
            ),
            "conversations": Target(
                "a.jsonl", _text("a.jsonl", CONVERSATIONS), lambda f: data.read_conversations(f / "a.jsonl")
            ),
            "chat pairs": Target(
                "a.jsonl", _text("a.jsonl", CHAT_PAIRS), lambda f: data.read_chat_pairs(f / "a.jsonl")
            ),
            "pairs of text": Target(
                "a.jsonl",
                _text("a.jsonl", PAIRS),
                lambda f: data.load_pairs(
                    f / "a.jsonl", prompt_field="document", completion_field="summary", split="train"
                ),
            ),
            "preferences, gzip": Target(
                "pairs.jsonl.gz", _preferences, lambda f: data.read_preferences(f / "pairs.jsonl.gz")
            ),
            "labels": Target("l.jsonl", _text("l.jsonl", LABELS), lambda f: data.read_labels(f / "l.jsonl")),
            "labels, opened": Target(
                "l.jsonl", _text("l.jsonl", LABELS), lambda f: open_store(f / "l.jsonl")
            ),
            "items": Target("a.jsonl", _text("a.jsonl", ITEMS), lambda f: read_items(f / "a.jsonl")),
            "gold items": Target("a.jsonl", _text("a.jsonl", ITEMS), lambda f: read_gold(f / "a.jsonl")),
            "run, resumed: metrics.jsonl": Target("metrics.jsonl", _run_folder, _repaired),
            "run, resumed: samples.jsonl": Target("samples.jsonl", _run_folder, _repaired),
            "run, resumed: config.yaml": Target("config.yaml", _run_folder, _config),
            "results.json": Target(FILE, _run_folder, read_results),
            "arrays": Target("validation.npz", _npz, lambda f: read_arrays(f / "validation.npz")),
            "accelerator": Target(
                "a.yaml", _text("a.yaml", ACCELERATOR), lambda f: accelerators.lookup(str(f / "a.yaml"))
            ),
            "adapter: weights": Target("adapter_model.safetensors", _adapter, _read_adapter),
            "adapter: config": Target("adapter_config.json", _adapter, _read_adapter),
            "GGUF": Target("m.gguf", _gguf, _read_gguf),
            "BPE tokenizer": Target("tokenizer.json", _bpe, lambda f: data.BPETokenizer.load(f)),
        }
        | model
        | beside
        | viewed
    )


ITEMS = _lines(*({"prompt": f"Hi {i}", "completions": ["a", "b"], "gold": 0} for i in range(3)))


def _bpe(folder: Path) -> None:
    from rlhfjax.data import train_bpe

    train_bpe(["the cat sat", "the mat"] * 3, 270).save(folder / "tokenizer.json")
