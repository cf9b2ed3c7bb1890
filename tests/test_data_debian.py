"""The script that makes the shipped data, on small lists, and the shipped file itself."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from experiments.make_debian_data import (
    choose_lists,
    kept,
    read_descriptions,
    read_packages,
    split_of,
    summaries,
    translation_pairs,
    write_rows,
)

ASSET = Path(__file__).parent.parent / "experiments" / "assets" / "debian_summaries.jsonl.gz"
DOCUMENT = "Cat is a program that joins files and prints them."

PACKAGES = """\
Package: cat-doc
Source: cat (1.0-2)
Section: doc
Depends: a,
 b

Package: cat
Section: utils
"""
ENGLISH = """\
Package: cat-doc
Description-md5: m2
Description-en: joins files (manual)
 Cat is a program that joins files
 and prints them.
 .
 This is its manual.

Package: cat
Description-md5: m1
Description-en: joins files
 Cat is a program that joins files
 and prints them.
 .
 It has options:
  * one
 .
 This is “quoted” text.

Package: gone
Description-md5: m3
Description-en: is not in the release
 Cat is a program that joins other files and prints them.
"""
GERMAN = """\
Package: cat
Description-md5: m1
Description-de: verbindet Dateien
 Cat verbindet Dateien und gibt sie aus.
 .
 Es hat Optionen:
  * eins
 .
 Dies ist Text.

Package: cat-doc
Description-md5: m2
Description-de: verbindet Dateien (Handbuch)
 Ein Absatz.
 .
 Noch einer.
 .
 Und noch einer.

Package: gone
Description-md5: m3
Description-de: ist nicht in der Ausgabe

Package: cat
Description-md5: old
Description-de: alte Fassung
"""


@pytest.fixture
def lists(tmp_path):
    files = {"packages": PACKAGES, "en": ENGLISH, "de": GERMAN}
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    english, german = (read_descriptions(tmp_path / language, language) for language in ("en", "de"))
    return read_packages(tmp_path / "packages"), english, german


def test_families_of_packages_are_told_by_their_source(lists):
    packages, _, _ = lists
    assert packages["cat-doc"] == {"package": "cat-doc", "source": "cat", "section": "doc"}


def test_a_document_is_the_first_paragraph_and_occurs_once(lists):
    packages, english, _ = lists
    row = {"split": split_of("cat"), "package": "cat", "source": "cat", "section": "utils"}
    assert list(summaries(packages, english)) == [row | {"document": DOCUMENT, "summary": "joins files"}]


def test_translations_are_paired_by_paragraph_where_they_align(lists):
    pairs = [(row["package"], row["source_text"], row["target_text"]) for row in translation_pairs(*lists)]
    assert pairs == [
        ("cat", "joins files", "verbindet Dateien"),
        ("cat", DOCUMENT, "Cat verbindet Dateien und gibt sie aus."),
        ("cat", "It has options: * one", "Es hat Optionen: * eins"),
        ("cat-doc", "joins files (manual)", "verbindet Dateien (Handbuch)"),
    ]


def test_the_lists_of_one_debian_release_are_chosen():
    targets = [
        "Google|main|bookworm|Packages||/google",
        "Debian|main|bookworm-security|Packages||/security",
        "Debian|contrib|bookworm|Packages||/contrib",
        "Debian|main|bookworm|Packages||/packages",
        *(
            f"Debian|main|bookworm|Translations|{language}|/{language}"
            for language in ("en", "de", "fr", "it")
        ),
    ]
    packages, translations = choose_lists(targets)
    assert (packages, translations["de"], len(translations)) == (Path("/packages"), Path("/de"), 4)
    with pytest.raises(SystemExit, match=r"descriptions in \['it'\]"):
        choose_lists(targets[:-1])
    with pytest.raises(SystemExit, match="no package list"):
        choose_lists(targets[:3])


def test_the_shipped_file_is_what_its_attribution_says(tmp_path):
    rows = [json.loads(line) for line in gzip.decompress(ASSET.read_bytes()).splitlines()]
    assert Counter(row["split"] for row in rows) == {"train": 32_248, "validation": 1_770, "test": 1_684}
    assert all(row["split"] == split_of(row["source"]) for row in rows)
    assert len({row["document"] for row in rows}) == len(rows)
    assert {tuple(row) for row in rows} == {("split", "package", "source", "section", "document", "summary")}
    for name in ("a.gz", "b.gz"):
        write_rows(tmp_path / name, rows[:100])
    content = (tmp_path / "a.gz").read_bytes()
    assert (tmp_path / "b.gz").read_bytes() == content
    assert content[4:8] == bytes(4)  # gzip's time stamp


@pytest.mark.parametrize(
    ("language", "counts"),
    [("de", (21_654, 1_116, 1_131)), ("fr", (22_770, 1_108, 1_198)), ("it", (25_562, 1_184, 1_225))],
)
def test_the_shipped_translations_are_what_the_attribution_says(language, counts):
    path = ASSET.parent / f"debian_en_{language}.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert Counter(row["split"] for row in rows) == dict(
        zip(("train", "validation", "test"), counts, strict=True)
    )
    assert all(row["split"] == split_of(row["source"]) for row in rows)
    assert all(kept(row["source"], language) for row in rows)
    assert len({row["source_text"] for row in rows}) == len(rows)
    assert {tuple(row) for row in rows} == {("split", "package", "source", "source_text", "target_text")}
    told = (ASSET.parent / "ATTRIBUTION.md").read_text()
    assert f"| {counts[0]:,} | {counts[1]:,} | {counts[2]:,} |" in told


def test_three_tenths_of_the_italian_packages_are_kept():
    sources = [f"package-{i}" for i in range(2000)]
    assert sum(kept(source, "it") for source in sources) / 2000 == pytest.approx(0.3, abs=0.03)
    assert all(kept(source, "de") for source in sources)
    # What is kept does not depend on the split: each has its tenths.
    tested = [source for source in sources if split_of(source) == "test"]
    assert 0.15 < sum(kept(source, "it") for source in tested) / len(tested) < 0.45
