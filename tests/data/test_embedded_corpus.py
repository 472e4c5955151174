"""The embedded corpus, built small: the same bytes again, nothing of validation in train, whole or not at all."""

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from equipoise.data import build_embedded_corpus, read_documents
from equipoise.data.corpus_files import Group, in_turns
from equipoise.data.embedded_sources import DOMAINS, Domain

SMALL = {"max_bytes_per_domain": 150_000, "min_bytes_per_domain": 90_000, "validation_bytes_per_domain": 30_000}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("embedded") / "corpus"
    build_embedded_corpus(output, **SMALL)
    return output


def rows(corpus: Path, split: str) -> list[dict]:
    return [row for domain in DOMAINS for row in pq.read_table(corpus / domain / f"{split}.parquet").to_pylist()]


def test_every_domain_is_there_within_its_limits(corpus: Path) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["domains"]) == set(DOMAINS)
    packages = {package for entry in manifest["domains"].values() for package in entry["sources"]}
    assert packages - {"stdlib"} | {"python"} <= set(manifest["versions"])
    sizes: dict = defaultdict(lambda: defaultdict(list))
    for split in ("train", "validation"):
        for row in rows(corpus, split):
            sizes[row["domain"]][split].append(len(row["text"].encode()))
    for domain, entry in manifest["domains"].items():
        assert all(source["licence"] for source in entry["sources"].values())
        by_source = sum(source["bytes"] for source in entry["sources"].values())
        assert by_source == entry["train"]["bytes"] + entry["validation"]["bytes"]
        for split, most in (("train", 180_000), ("validation", 30_000)):
            assert entry[split]["bytes"] == sum(sizes[domain][split]) <= most
            assert entry[split]["documents"] == len(sizes[domain][split])
            file = corpus / domain / f"{split}.parquet"
            assert entry[split]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert entry["train"]["bytes"] >= 90_000


def test_nothing_of_validation_stands_in_train(corpus: Path) -> None:
    train, validation = rows(corpus, "train"), rows(corpus, "validation")
    everything = [" ".join(row["text"].split()) for row in train + validation]
    assert len(set(everything)) == len(everything), "the same text twice"
    assert not {row["source"] for row in train} & {row["source"] for row in validation}

    def long(row: dict) -> set[str]:
        return {line.strip() for line in row["text"].splitlines() if len(line.strip()) >= 40}

    written = {domain for domain in DOMAINS if not DOMAINS[domain].templated}
    held_out = set().union(*(long(row) for row in validation if row["domain"] in written))
    for row in train:
        if row["domain"] in written and (own := long(row)):
            assert len(own & held_out) < len(own) / 2, row["source"]


def test_documents_that_share_half_their_lines_are_parted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def line(number: int) -> str:
        return f"line number {number:05} of a long enough line of prose\n"

    def sources(installation: object, seed: int) -> dict[str, Iterator[Group]]:
        # Document n shares line n with the one before it and line n + 1 with the one after: half of its own.
        return {"a": iter([Group(f"a/{n}", "torch", [line(n) + line(n + 1)]) for n in range(200)])}

    monkeypatch.setitem(DOMAINS, "chain", Domain("a test", sources))
    build_embedded_corpus(
        tmp_path / "out", domains=["chain"], min_bytes_per_domain=1_000, validation_bytes_per_domain=1_000
    )
    held_out, train = (
        {int(source[2:]) for source in pq.read_table(tmp_path / f"out/chain/{split}.parquet")["source"].to_pylist()}
        for split in ("validation", "train")
    )
    assert len(held_out) == 1_000 // (2 * len(line(0)))
    assert train == set(range(200)) - {n + step for n in held_out for step in (-1, 0, 1)}


def test_a_python_file_gives_code_or_prose(corpus: Path) -> None:
    sources = {
        domain: {
            row["source"]
            for split in ("train", "validation")
            for row in rows(corpus, split)
            if row["domain"] == domain
        }
        for domain in ("python", "prose_en")
    }
    assert not sources["python"] & sources["prose_en"]


def test_sources_are_relative(corpus: Path) -> None:
    for row in rows(corpus, "train") + rows(corpus, "validation"):
        assert row["source"].split("/")[0] in ("site-packages", "stdlib", "reasoning-gym")
        assert ".." not in row["source"].split("/")
        assert sys.prefix not in row["text"]
        assert "equipoise" not in row["source"]


def test_same_arguments_give_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    domains = ["cpp", "math_logic", "puzzles", "data_tables"]
    first = build_embedded_corpus(tmp_path / "a", domains=domains, **SMALL)
    again = build_embedded_corpus(tmp_path / "b", domains=domains, **SMALL)
    other = build_embedded_corpus(tmp_path / "c", domains=domains, **SMALL, seed=1)
    assert first == again
    assert first == json.loads((tmp_path / "b/manifest.json").read_text(encoding="utf-8"))
    for domain in domains:
        assert first["domains"][domain]["train"]["sha256"] != other["domains"][domain]["train"]["sha256"]


def test_read_documents_reads_it(corpus: Path) -> None:
    read = read_documents(corpus)
    assert set(read["train"]["domain"]) == set(read["validation"]["domain"]) == set(DOMAINS)
    assert read["train"].num_rows == len(rows(corpus, "train"))


def test_finished_corpus_is_left_alone_and_anything_else_refused(corpus: Path, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in corpus.rglob("*")}
    assert build_embedded_corpus(corpus, **SMALL) == json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    assert {file: file.stat().st_mtime_ns for file in corpus.rglob("*")} == before
    with pytest.raises(ValueError, match="output must be empty or hold a corpus built with the same arguments"):
        build_embedded_corpus(corpus, **SMALL, seed=7)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="output must be a folder that does not exist or is empty"):
        build_embedded_corpus(tmp_path, **SMALL)


def test_domain_with_too_little_text_is_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sources(installation: object, seed: int) -> dict[str, Iterator[Group]]:
        return {"a": iter([Group(f"a/{number}", "torch", [f"text {number}\n" * 40]) for number in range(100)])}

    monkeypatch.setitem(DOMAINS, "coin", Domain("a test", sources))
    with pytest.raises(ValueError, match=r"min_bytes_per_domain .* got 2000000, and coin has \d+ bytes"):
        build_embedded_corpus(tmp_path / "out", domains=["coin"])
    assert list(tmp_path.iterdir()) == []


def test_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("equipoise.data.corpus_files.pq.write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        build_embedded_corpus(tmp_path / "out", domains=["math_logic"], **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_errors_name_field_and_value(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"domains must be some of .*; got \['klingon'\]"):
        build_embedded_corpus(tmp_path / "out", domains=["klingon"])
    with pytest.raises(ValueError, match="validation_bytes_per_domain must be at least 1; got 0"):
        build_embedded_corpus(tmp_path / "out", validation_bytes_per_domain=0)
    with pytest.raises(ValueError, match=r"min_bytes_per_domain must be at most max_bytes_per_domain \(5\); got 6"):
        build_embedded_corpus(tmp_path / "out", max_bytes_per_domain=5, min_bytes_per_domain=6)


def test_sources_take_turns_by_bytes() -> None:
    def groups(name: str, size: int, count: int) -> Iterator[Group]:
        return iter([Group(f"{name}/{number}", name, ["x" * size]) for number in range(count)])

    order = [group.package for group in in_turns({"big": groups("big", 100, 3), "small": groups("small", 10, 25)})]
    assert order == ["big", *["small"] * 10, "big", *["small"] * 10, "big", *["small"] * 5]
