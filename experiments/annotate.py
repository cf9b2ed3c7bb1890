"""Asks people which completion is better: `python experiments/annotate.py RUN_OR_FILE [flags]`, see docs/annotate.md.

A page on this machine alone shows prompts with completions side by side; every answer is on the disk before the next
pair is shown. `annotate.py report LABELS` prints what the labels say, `annotate.py export LABELS OUT` writes pairs for
other programs, and `run.py NAME --preferences.labels LABELS` trains a reward model on them.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout runs as it lies, from any folder

from experiments.annotation.items import Item, as_gold, items_of_run, read_gold, read_items
from experiments.annotation.numbers import numbers_of, text_of
from experiments.annotation.server import make_server
from experiments.annotation.session import Session, check_name
from experiments.annotation.store import open_store
from rlhfjax.data import PreferencePair, comparisons, read_labels, write_preferences


@dataclass(frozen=True)
class Options:
    """Serve the page."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_FILE")]
    """Folder of a run that has ended, or a JSONL file of items: `prompt`, `completions`, and where they are known
    `systems`, `id` and `gold`."""
    labels: Path | None = None
    """File that labels are appended to. None: labels.jsonl in the run, or FILE.labels.jsonl beside the file."""
    annotator: str = ""
    """Who annotates; empty: the page asks."""
    port: int = 0
    """Port on 127.0.0.1; 0: a free one."""
    stage: str = "validation"
    """Of a run, the texts to compare: validation or test, those of its policies; or preferences, its samples to learn
    from."""
    systems: tuple[str, ...] = ()
    """Of a run, policies to compare, such as "ppo, greedy"; none: those sampled at the temperature of training."""
    at_once: int = 2
    """Of a run, completions side by side, 2 to 9."""
    repeats: float = 0.1
    """Share of the items shown a second time, in the reverse order, to see whether the answer is the same."""
    gold: Path | None = None
    """JSONL of items with `gold`, the number of the better completion, from 0; mixed among the others."""
    select: Literal["none", "disagreement"] = "none"
    """Order of the items: as they come, or first those on which reward models disagree."""
    reward: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A reward model for --select disagreement, as experiments/audit.py takes it; give it for each model."""
    panel: bool = True
    """Whether the page has agreement and ranking so far, folded. Without, `annotate.py report` tells them, and nobody
    is swayed."""


@dataclass(frozen=True)
class Report:
    """What the labels say: agreement, consistency, ranking."""

    labels: tyro.conf.Positional[Path]
    """File of labels."""


@dataclass(frozen=True)
class Export:
    """Pairs {prompt, chosen, rejected}, without ties, for other programs."""

    labels: tyro.conf.Positional[Path]
    """File of labels."""
    out: tyro.conf.Positional[Path]
    """File to write; .gz compresses."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0: done, 2: not begun."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["report"]:
            print(text_of(numbers_of(read_labels(_parse(Report, arguments[1:]).labels))))
        elif arguments[:1] == ["export"]:
            export(_parse(Export, arguments[1:]))
        else:
            serve(_parse(Options, arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def open_session(options: Options) -> Session:
    """Items, gold pairs and labels of the options."""
    if not 0 <= options.repeats <= 1:
        raise ValueError(f"--repeats {options.repeats} must lie between 0 and 1: it is a share of the items")
    if not 0 <= options.port < 65_536:
        raise ValueError(f"--port {options.port} must lie between 0 and 65535")
    given = read_gold(options.gold) if options.gold else []
    items, gold = as_gold(_items(options), given)
    if options.select == "disagreement":
        from experiments.annotation.selection import by_disagreement

        items = by_disagreement(items, options.reward)
    elif options.reward:
        raise ValueError("--reward is for --select disagreement: give that too")
    annotator = check_name(options.annotator) if options.annotator else ""
    store = open_store(options.labels or _labels_beside(options.source))
    return Session(items, gold, store, repeats=options.repeats, annotator=annotator, panel=options.panel)


def serve(options: Options) -> None:
    """Serves the page until Ctrl-C."""
    session = open_session(options)
    server, address = make_server(session, options.port)
    known = len(session.store.book.labels)
    print(
        f"{len(session.items)} items, {len(session.gold)} gold pairs; labels in {session.store.path}",
        flush=True,
    )
    print(f"{known} labels are there already" if known else "no labels yet", flush=True)
    print(f"open {address}\nCtrl-C ends", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"\n{len(session.store.refresh().labels)} labels in {session.store.path}")
        print(f"next: python experiments/run.py summarize --preferences.labels {session.store.path}")
    finally:
        server.server_close()


def export(options: Export) -> None:
    """Writes pairs, and says what became of the labels."""
    found = comparisons(read_labels(options.labels))
    pairs = [
        PreferencePair(x.prompt, *((x.first, x.second) if x.label == 1.0 else (x.second, x.first)))
        for x in found
        if x.label != 0.5
    ]
    if not pairs:
        raise ValueError(f"{options.labels} has no comparison that somebody decided; label first")
    write_preferences(options.out, pairs)
    print(f"{len(pairs)} pairs in {options.out}; {len(found) - len(pairs)} ties left out")


def _items(options: Options) -> list[Item]:
    if options.source.is_dir():
        return items_of_run(options.source, options.stage, options.systems, options.at_once)
    if options.systems:
        raise ValueError("--systems chooses policies of a run; a file of items says who wrote what itself")
    return read_items(options.source)


def _labels_beside(source: Path) -> Path:
    return source / "labels.jsonl" if source.is_dir() else source.with_suffix(".labels.jsonl")


def _parse(options, arguments: Sequence[str]):
    return tyro.cli(options, args=list(arguments), prog="annotate.py", description=__doc__)


if __name__ == "__main__":
    raise SystemExit(main())
