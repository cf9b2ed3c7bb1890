"""Makes the summary and the translation data again from the lists of Debian packages.

    python experiments/make_debian_data.py OUT

writes OUT/debian_summaries.jsonl.gz (first paragraph of a package's description -> its one-line summary) and
OUT/debian_en_{de,fr,it}.jsonl.gz (a line or paragraph in English -> the same in German, French or Italian; of Italian,
which has more than three times as many, about three rows in ten, unless --all).

`apt-get update` runs with the apt sources of this machine in a folder of its own: the machine's apt stays
as it is. The lists are those of the release that the sources name, section main, architecture amd64. Those of
Debian 12 give, row for row, the files in experiments/assets. Needs a Debian system, and no root.
"""

import argparse
import gzip
import hashlib
import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

LANGUAGES = ("de", "fr", "it")
Row = dict[str, str]
Descriptions = dict[tuple[str, str], list[str]]  # (package, MD5 of its English description) -> parts

# Latin letters and signs only, so that a small byte-level vocabulary spends nothing on rare scripts.
LAST_CHARACTER = "\u024f"
DOCUMENT_WORDS = range(8, 61)
SUMMARY_WORDS = range(2, 17)
SOURCE_WORDS = range(2, 26)
TARGET_WORDS = range(1, 41)
TENTHS = {"it": 3}  # of the source packages, where not all are kept


def main(arguments: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("out", type=Path, help="folder to write the .jsonl.gz files to")
    parser.add_argument("--all", action="store_true", help="of every language all rows")
    options = parser.parse_args(arguments)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        packages_file, translations = fetch_lists(Path(folder))
        packages = read_packages(packages_file)
        english = read_descriptions(translations["en"], "en")
        write_rows(out / "debian_summaries.jsonl.gz", summaries(packages, english))
        for language in LANGUAGES:
            foreign = read_descriptions(translations[language], language)
            pairs = translation_pairs(packages, english, foreign)
            chosen = pairs if options.all else (row for row in pairs if kept(row["source"], language))
            write_rows(out / f"debian_en_{language}.jsonl.gz", chosen)


def fetch_lists(folder: Path) -> tuple[Path, dict[str, Path]]:
    """Runs `apt-get update` in `folder`; the files of the packages and, by language, of the descriptions."""
    options = {
        "Dir::State": folder / "state",
        "Dir::Cache": folder / "cache",
        "Acquire::Languages": ",".join(("en", *LANGUAGES)),
        "Acquire::GzipIndexes": "false",
        "APT::Architecture": "amd64",
        "APT::Architectures": "amd64",
        "APT::Sandbox::User": "root",  # the download user of apt cannot enter a private folder
    }
    (folder / "state" / "lists" / "partial").mkdir(parents=True)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True)
    flags = [f"-o={name}={value}" for name, value in options.items()]
    subprocess.run(["apt-get", "update", "-q", *flags], check=True)
    fields = "$(ORIGIN)|$(COMPONENT)|$(CODENAME)|$(CREATED_BY)|$(LANGUAGE)|$(FILENAME)"
    listing = subprocess.run(
        ["apt-get", "indextargets", *flags, "--format", fields], check=True, capture_output=True, text=True
    ).stdout
    return choose_lists(listing.splitlines())


def choose_lists(targets: Iterable[str]) -> tuple[Path, dict[str, Path]]:
    """From apt's list of what it fetched, the files of one Debian release (its updates are another suite)."""
    packages: list[Path] = []
    translations: dict[str, Path] = {}
    for target in targets:
        origin, component, codename, kind, language, file = target.split("|")
        if (origin, component) != ("Debian", "main") or "-" in codename:
            continue
        if kind == "Packages":
            packages.append(Path(file))
        elif kind == "Translations":
            translations.setdefault(language, Path(file))
    missing = [language for language in ("en", *LANGUAGES) if language not in translations]
    if not packages or missing:
        raise SystemExit(
            "the apt sources of this machine give no package list of Debian main"
            + (f" or no descriptions in {missing}" if missing else "")
            + "; run on Debian, or add its sources (man sources.list)"
        )
    return packages[0], translations


def read_stanzas(file: Path) -> Iterator[dict[str, str]]:
    """The paragraphs of a Debian control file: field -> value, continued lines kept with their newline."""
    stanza: dict[str, str] = {}
    field = ""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line == "\n":
                if stanza:
                    yield stanza
                stanza = {}
            elif line[0] in " \t":
                stanza[field] += "\n" + line.rstrip("\n")
            else:
                field, _, value = line.partition(":")
                stanza[field] = value.strip()
    if stanza:
        yield stanza


def read_packages(file: Path) -> dict[str, Row]:
    """package -> its source package (without a version) and section; the first of a name counts."""
    packages: dict[str, Row] = {}
    for stanza in read_stanzas(file):
        name = stanza["Package"]
        source = stanza.get("Source", name).split(" ")[0]
        packages.setdefault(name, {"package": name, "source": source, "section": stanza.get("Section", "")})
    return packages


def read_descriptions(file: Path, language: str) -> Descriptions:
    """Every description of a Translation list, split in parts; sorted by package, then as in the list."""
    found: Descriptions = {}
    for stanza in read_stanzas(file):
        parts = split_description(stanza.get(f"Description-{language}", ""))
        found.setdefault((stanza["Package"], stanza["Description-md5"]), parts)
    return dict(sorted(found.items(), key=lambda item: item[0][0]))


def split_description(text: str) -> list[str]:
    """The one-line summary, then each paragraph in one line; a single dot on a line parts paragraphs."""
    summary, *lines = (line.strip() for line in text.split("\n"))
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line == ".":
            paragraphs.append([])
        else:
            paragraphs[-1].append(line)
    return [summary, *(" ".join(paragraph) for paragraph in paragraphs if paragraph)]


def summaries(packages: Mapping[str, Row], english: Descriptions) -> Iterator[Row]:
    """First paragraph -> summary, no document twice (families of packages share their first paragraph)."""
    seen: set[str] = set()
    for (name, _), parts in english.items():
        if name not in packages or len(parts) < 2:
            continue
        summary, document = parts[:2]
        if fits(document, DOCUMENT_WORDS) and fits(summary, SUMMARY_WORDS) and document not in seen:
            seen.add(document)
            yield {**labels(packages[name]), "document": document, "summary": summary}


def translation_pairs(
    packages: Mapping[str, Row], english: Descriptions, foreign: Descriptions
) -> Iterator[Row]:
    """Summary with summary and, if both sides have as many, paragraph with paragraph; no source twice."""
    seen: set[str] = set()
    for key, target_parts in foreign.items():
        if key[0] not in packages or key not in english:
            continue
        source_parts = english[key]
        aligned = len(source_parts) if len(source_parts) == len(target_parts) else 1
        for source, target in list(zip(source_parts, target_parts, strict=False))[:aligned]:
            usable = fits(source, SOURCE_WORDS) and fits(target, TARGET_WORDS) and source != target
            if usable and source not in seen:
                seen.add(source)
                row = labels(packages[key[0]])
                del row["section"]
                yield {**row, "source_text": source, "target_text": target}


def fits(text: str, words: range) -> bool:
    return len(text.split()) in words and max(text) <= LAST_CHARACTER


def labels(package: Row) -> Row:
    return {"split": split_of(package["source"]), **package}


def split_of(source: str) -> str:
    """90 % train, 5 % validation, 5 % test, by source package, so that no family of packages is in two."""
    percentile = digest(source) % 100
    return "test" if percentile < 5 else "validation" if percentile < 10 else "train"


def kept(source: str, language: str) -> bool:
    """Whether the translations of a source package are among those shipped."""
    return digest(source) // 100 % 10 < TENTHS.get(language, 10)


def digest(source: str) -> int:
    """A number that the name of a source package always gives."""
    return int(hashlib.sha256(source.encode()).hexdigest(), 16)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """JSON lines, compressed without a time stamp: the same rows give the same bytes (with one zlib)."""
    counts: Counter[str] = Counter()
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as compressed:
        for row in rows:
            counts[row["split"]] += 1
            compressed.write((json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n").encode())
    print(f"{path}: {dict(counts)}, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
