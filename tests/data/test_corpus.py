"""The corpus of a recipe or a folder: what it holds, that no cache is stale, and what disks and people do to files."""

import gzip
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset_builder
from transformers import PreTrainedTokenizerBase

from equipoise.configuration import DataSettings, parse_recipe
from equipoise.data import (
    Corpus,
    MicroBatches,
    description_differences,
    load_tokenizer,
    open_corpus,
    pack,
    sources,
    train_tokenizer,
)
from equipoise.data.core_sources import CORE_DOMAINS

ROOT = Path(__file__).parents[2]


def texts(domain: str, count: int = 60) -> list[str]:
    return [f"{domain} document {number} " + "abc cab " * (number % 5) for number in range(count)]


def write_jsonl(file: Path, rows: list[str], column: str = "text") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({column: text, "id": 1}) + "\n" for text in rows), encoding="utf-8")
    return file


def write_parquet(file: Path, rows: list[str], column: str = "text") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(column, pa.string()), ("id", pa.int64())])
    pq.write_table(pa.table({column: rows, "id": list(range(len(rows)))}, schema=schema), file)
    return file


def corpus_of(path: Path, **settings: Any) -> Corpus:
    return open_corpus(DataSettings(data=str(path), **{"validation_fraction": 0.1} | settings), seed=0)


def recipe(folder: Path, text: str) -> Path:
    file = folder / "mix.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def trained_on(corpus: Corpus, domain: str) -> list[str]:
    return corpus.documents[domain].train["text"][:]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["abc cab bac document"] * 10, 280)


# --- recipes and folders ---


def test_a_recipe_and_a_folder_of_the_same_files_are_the_same_text(tmp_path: Path) -> None:
    for domain in ("code", "law"):
        write_jsonl(tmp_path / "data" / domain / "all.jsonl", texts(domain))
    mix = recipe(tmp_path, "domains: {law: {files: data/law}, code: {files: data/code/*.jsonl}}")
    from_recipe, from_folder = corpus_of(mix), corpus_of(tmp_path / "data")
    assert from_recipe.domains == from_folder.domains == ["code", "law"]
    for domain in from_recipe.domains:
        both = trained_on(from_recipe, domain) + [
            row["text"] for row in from_recipe.held_out if row["domain"] == domain
        ]
        assert sorted(both) == sorted(texts(domain))
    assert from_recipe.held_out["text"][:] == from_folder.held_out["text"][:]
    keys = [
        {name: record["key"] for name, record in corpus.description().items()} for corpus in (from_recipe, from_folder)
    ]
    assert keys[0] == keys[1]


def test_a_file_with_a_domain_column_is_a_mixture(tmp_path: Path) -> None:
    rows = [{"body": text, "kind": domain} for domain in ("x", "y") for text in texts(domain)]
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = corpus_of(file, text_column="body", domain_column="kind")
    assert corpus.domains == ["x", "y"]
    assert set(trained_on(corpus, "y")) < set(texts("y"))


def test_fields_of_a_recipe_go_over_the_settings(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts("a"), "body")
    write_jsonl(tmp_path / "b.jsonl", texts("b"), "content")
    write_jsonl(tmp_path / "held.jsonl", ["held out", texts("b")[3]], "content")
    mix = recipe(
        tmp_path,
        """
domains:
  a: {files: a.jsonl, max_train_bytes: 300}
  b: {files: "*.jsonl", validation_files: held.jsonl, text_column: content}
""".replace('"*.jsonl"', "b.jsonl"),
    )
    corpus = corpus_of(mix, text_column="body", max_train_bytes_per_domain=500, validation_fraction=0.3)
    assert 200 < sum(map(len, trained_on(corpus, "a"))) <= 300
    assert 400 < sum(map(len, trained_on(corpus, "b"))) <= 500
    assert texts("b")[3] not in trained_on(corpus, "b")
    held_out = [row["text"] for row in corpus.held_out if row["domain"] == "b"]
    assert sorted(held_out) == sorted(["held out", texts("b")[3]])


def test_a_text_held_out_of_one_domain_is_trained_on_in_none(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts("a"))
    write_jsonl(tmp_path / "b.jsonl", [*texts("a"), *texts("b")])
    write_jsonl(tmp_path / "held.jsonl", texts("a", 20))
    mix = recipe(tmp_path, "domains: {a: {files: a.jsonl, validation_files: held.jsonl}, b: {files: b.jsonl}}")
    corpus = corpus_of(mix)
    assert not set(corpus.held_out["text"]) & {*trained_on(corpus, "a"), *trained_on(corpus, "b")}


def test_a_sample_takes_as_much_of_each_domain(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"a {number:06}" for number in range(3000)])
    write_jsonl(tmp_path / "b.jsonl", [f"b {number:06}" for number in range(3000)])
    write_jsonl(tmp_path / "c.jsonl", texts("c", 5) * 3)
    mix = recipe(
        tmp_path,
        """
domains:
  a: {files: a.jsonl, weight: 1}
  b: {files: b.jsonl, weight: 1, streaming: true}
  c: {files: c.jsonl, weight: 9, validation_fraction: 0.3}
""",
    )
    corpus = corpus_of(mix)
    sample = list(corpus.sample_texts(15_000))
    assert sample == list(corpus.sample_texts(15_000))
    for domain in ("a", "b"):
        assert 3_900 <= sum(len(text) for text in sample if text.startswith(domain)) <= 5_000
    assert {text for text in sample if text.startswith("c")} == set(trained_on(corpus, "c"))
    assert not set(sample) & set(corpus.held_out["text"])


def test_a_description_is_json_and_tells_other_text_and_weights(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts("a"))
    write_jsonl(tmp_path / "b.jsonl", texts("b"))
    line = "domains: {a: {files: a.jsonl, weight: %s}, b: {files: b.jsonl, streaming: true, weight: 1}}"
    description = corpus_of(recipe(tmp_path, line % 1)).description()
    assert json.loads(json.dumps(description)) == description
    assert description["a"]["documents"] + description["a"]["held_out_documents"] == 60
    assert description["a"]["bytes"] + description["a"]["held_out_bytes"] == sum(map(len, texts("a")))
    assert description["b"]["source"] == {"files": [str(tmp_path / "b.jsonl")], "streaming": True, "weight": 1.0}

    (tmp_path / "moved").mkdir()
    for name in "ab":
        (tmp_path / f"{name}.jsonl").rename(tmp_path / "moved" / f"{name}.jsonl")
    moved = corpus_of(recipe(tmp_path, (line % 1).replace("files: ", "files: moved/"))).description()
    assert description_differences(description, moved) == [], "where text lies is no difference"
    write_jsonl(tmp_path / "moved/b.jsonl", texts("B"))
    changed = corpus_of(recipe(tmp_path, (line % 3).replace("files: ", "files: moved/"))).description()
    weight, text = description_differences(description, changed)
    assert weight == "the weight of a was 1.0 and is 3.0"
    assert text.startswith("the text of b was ")
    assert description_differences(description, {"a": description["a"]}) == ["the domain b is gone"]


# --- caches ---


def blocks_of(path: Path, tokenizer: PreTrainedTokenizerBase, block_size: int = 8, seed: int = 0) -> list[list[int]]:
    packed = pack(corpus_of(path), tokenizer, block_size, seed)
    return [
        packed.blocks[name][number][0].tolist()
        for name in packed.domains
        for number in range(len(packed.blocks[name]))
    ]


def test_a_file_changed_with_its_time_set_back_is_read_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    for kind, write in (("jsonl", write_jsonl), ("parquet", write_parquet)):
        file = write(tmp_path / kind / f"law/all.{kind}", texts("old"))
        before, stat = blocks_of(tmp_path / kind, tokenizer), file.stat()
        write(file, texts("new"))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert file.stat().st_size == stat.st_size or kind == "parquet"
        corpus = corpus_of(tmp_path / kind)
        assert all(text.startswith("new") for text in [*trained_on(corpus, "law"), *corpus.held_out["text"]])
        assert blocks_of(tmp_path / kind, tokenizer) != before


def test_two_files_swapped_are_read_again(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    # Of several files in one domain, only a later one changes: what is cached beside the first must not be found.
    write_jsonl(tmp_path / "law/1.jsonl", texts("one"))
    file = write_parquet(tmp_path / "law/2.parquet", texts("two"))
    stat = file.stat()
    assert any(text.startswith("two") for text in trained_on(corpus_of(tmp_path), "law"))
    before = blocks_of(tmp_path, tokenizer)
    write_parquet(file, texts("six"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not any(text.startswith("two") for text in trained_on(corpus_of(tmp_path), "law"))
    assert blocks_of(tmp_path, tokenizer) != before


def test_another_tokenizer_in_the_same_folder_gives_other_blocks(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data/law/all.jsonl", texts("law"))
    train_tokenizer(["document"] * 9, 262).save_pretrained(tmp_path / "tokenizer")
    stat = (tmp_path / "tokenizer/tokenizer.json").stat()
    before = blocks_of(tmp_path / "data", load_tokenizer(tmp_path / "tokenizer"))
    train_tokenizer(["abc cab"] * 9, 262).save_pretrained(tmp_path / "tokenizer")
    os.utime(tmp_path / "tokenizer/tokenizer.json", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other = load_tokenizer(tmp_path / "tokenizer")
    after = blocks_of(tmp_path / "data", other)
    assert after != before
    assert "law document" in other.decode([token for block in after for token in block])


def test_the_cache_is_found_again_whatever_was_done_with_the_tokenizer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "data/law/all.jsonl", texts("law"))
    first = blocks_of(tmp_path / "data", tokenizer)
    other_time = (tmp_path / "data/law/all.jsonl").stat().st_mtime_ns + 10**9
    os.utime(tmp_path / "data/law/all.jsonl", ns=(other_time, other_time))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    saved = load_tokenizer(tmp_path / "tokenizer")
    saved(["abc", "abc abc"], padding=True, truncation=True, max_length=2)

    def forbidden(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("equipoise.data.blocks.encode_documents", forbidden)
    assert blocks_of(tmp_path / "data", saved) == first
    # Length of block and seed are arithmetic: nothing is tokenised for them either.
    assert blocks_of(tmp_path / "data", saved, block_size=5) != first
    assert blocks_of(tmp_path / "data", saved, seed=1) != first


# --- what disks and people do ---


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_shards_and_blank_documents_are_passed_over(tmp_path: Path, streaming: bool) -> None:
    write_parquet(tmp_path / "law/0.parquet", [])
    write_parquet(tmp_path / "law/1.parquet", [*texts("law")[:30], " \n\t ", ""])
    write_parquet(tmp_path / "law/2.parquet", [])
    write_parquet(tmp_path / "law/3.parquet", texts("law")[30:])
    write_jsonl(tmp_path / "code/1.jsonl", texts("code"))
    write_jsonl(tmp_path / "code/2.jsonl", [])
    options = "streaming: true, weight: 1" if streaming else "weight: 1"
    mix = recipe(tmp_path, f"domains: {{law: {{files: law, {options}}}, code: {{files: code, {options}}}}}")
    corpus = corpus_of(mix)
    held_out = corpus.held_out["text"][:]
    sample = list(corpus.sample_texts())
    assert sorted([*held_out, *sample]) == sorted([*texts("law"), *texts("code")])


def test_a_domain_that_vanished_is_named_with_its_path(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "law.jsonl", texts("law"))
    mix = recipe(tmp_path, "domains: {law: {files: law.jsonl}, code: {files: code/}}")
    with pytest.raises(
        ValueError, match=r"mix\.yaml: domain code: files must be a file.*; got .*/code.*, which is none"
    ):
        corpus_of(mix)
    for domain in ("law", "code"):
        write_jsonl(tmp_path / "data" / domain / "all.jsonl", texts(domain))
    stored = corpus_of(tmp_path / "data").description()
    (tmp_path / "data/code/all.jsonl").unlink()
    with pytest.raises(ValueError, match=r"got none for code in .*data"):
        corpus_of(tmp_path / "data")
    (tmp_path / "data/code").rmdir()
    assert description_differences(stored, corpus_of(tmp_path / "data").description()) == ["the domain code is gone"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{files: a.jsonl, text_column: body}", r"mix\.yaml: domain a: text_column must be a column of .*; got body"),
        ("{files: a.jsonl, validation_files: none.txt}", "domain a: validation_files must be a file.*none.txt"),
        (
            "{files: a.jsonl, max_train_bytes: 2}",
            r"max_train_bytes_per_domain \(in a recipe max_train_bytes\) .* got 2",
        ),
        ("{files: [a.jsonl, b.parquet], streaming: true, weight: 1}", r"one kind.*; got \['json', 'parquet'\]"),
        ("{hub: %s}", r"domain a: hub must name a data set of the Hub, .*; got "),
        ("{hub: nobody/nothing-at-all}", "domain a: hub must name a data set, .*; got nobody/nothing-at-all"),
    ],
)
def test_errors_name_recipe_domain_and_field(tmp_path: Path, line: str, words: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts("a"))
    write_parquet(tmp_path / "b.parquet", texts("b"))
    mix = recipe(tmp_path, f"domains: {{a: {line % tmp_path if '%' in line else line}}}")
    with pytest.raises(ValueError, match=words):
        corpus_of(mix)


def test_text_files_stream_whatever_the_column_is_called(tmp_path: Path) -> None:
    for number, text in enumerate(texts("law")):
        (tmp_path / f"{number:02}.txt").write_text(f"{text}\n\nsecond paragraph")
    mix = recipe(tmp_path, 'domains: {law: {files: "*.txt", streaming: true, weight: 1, text_column: content}}')
    corpus = corpus_of(mix)
    read = [*corpus.held_out["text"], *corpus.sample_texts()]
    assert sorted(read) == sorted(f"{text}\n\nsecond paragraph" for text in texts("law"))


def test_packages_are_built_once_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[list[str]] = []

    def build_core_corpus(output: Path, *, domains: list[str]) -> None:
        built.append(domains)
        for domain in domains:
            for split in ("train", "validation"):
                write_parquet(Path(output) / domain / f"{split}.parquet", texts(f"{split} {domain}"))

    monkeypatch.setattr("equipoise.data.core_corpus.build_core_corpus", build_core_corpus, raising=False)
    lines = "domains: {a: {package: law_fr}, b: {package: python}}"
    mix = recipe(tmp_path, f"package_folder: {tmp_path / 'core'}\n{lines}")
    for _ in range(2):
        corpus = corpus_of(mix)
        assert trained_on(corpus, "a") == texts("train law_fr")
    assert built == [["law_fr", "python"]]
    assert {(row["text"].split()[1], row["domain"]) for row in corpus.held_out} == {("law_fr", "a"), ("python", "b")}


# --- the shipped recipes, on small files of the same schemas ---

# data set -> kind of file and columns; the text column is the one that a recipe must name
SCHEMAS = {
    "HuggingFaceFW/fineweb-edu": ("parquet", ["text", "id", "dump", "url", "file_path", "language"]),
    "codeparrot/codeparrot-clean": ("json.gz", ["repo_name", "path", "copies", "size", "content", "license"]),
    "open-web-math/open-web-math": ("parquet", ["url", "text", "date", "metadata"]),
    "common-pile/arxiv_papers_filtered": ("json.gz", ["id", "text", "source", "added"]),
    "bigcode/the-stack-smol": ("json", ["content", "max_line_length", "licenses", "repository_name", "path", "lang"]),
    "wikimedia/wikipedia": ("parquet", ["id", "url", "title", "text"]),
}


@pytest.fixture
def small_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Stands in for the Hub: a few small files per data set and configuration; what was asked for is noted."""
    asked: list[tuple] = []

    def local(name: str, config: str | None, revision: str | None, data_files: list[str] | None) -> Any:
        asked.append((name, config, data_files))
        kind, columns = SCHEMAS[name]
        part = config or "".join(data_files or ["default"]).replace("/", "-").replace("*", "")
        folder = tmp_path / name / part
        files = []
        for number in range(2):
            rows = [
                {column: f"{part} {column} {number} {row} " + "abc " * (row % 5) for column in columns}
                for row in range(60)
            ]
            file = folder / f"{number}.{kind}"
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
            if kind == "parquet":
                pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=25)
            else:
                file.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
            files.append(str(file))
        return load_dataset_builder("parquet" if kind == "parquet" else "json", data_files=files)

    monkeypatch.setattr(sources, "load_dataset_builder", local)
    return asked


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("name", ["web_code_math", "code", "wikipedia"])
def test_shipped_recipes_train(
    name: str, streaming: bool, small_hub: list[tuple], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    if not streaming:
        text = text.replace("    streaming: true\n", "").replace(", streaming: true", "")
    mix = recipe(tmp_path, text)
    domains = parse_recipe(mix).domains
    corpus = corpus_of(mix)
    assert set(corpus.held_out["domain"]) == set(domains) == {*corpus.documents, *corpus.streams}
    for domain, source in domains.items():
        of_domain = [row["text"] for row in corpus.held_out if row["domain"] == domain]
        assert of_domain
        assert all(f" {source.text_column or 'text'} " in text for text in of_domain), "another column was read"
        assert source.hub in SCHEMAS
        assert (source.hub, source.config, list(source.data_files) or None) in small_hub
        assert bool(domain in corpus.streams) == source.streaming
    batches = MicroBatches(pack(corpus, tokenizer, 16, 0), micro_batch_size=2, micro_batches_per_step=4, seed=0)
    iterator = batches.steps()
    steps = list(islice(iterator, 12))
    iterator.close()
    seen = {int(domain) for step in steps for batch in step for domain in batch["domain"]}
    assert len(seen) == len(domains)
    assert batches.contents(3)[0]["domains"][0] in domains


def test_a_pinned_revision_and_splits_reach_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Builder:
        hash = "0123abc"

        def download_and_prepare(self) -> None:
            asked["downloaded"] = True

        def as_dataset(self, split: str) -> datasets.Dataset:
            return datasets.Dataset.from_dict({"article": [f"{text} {split}" for text in texts("a")]})

    def load(name: str, config: str | None, **options: Any) -> Builder:
        asked.update(options, name=name, config=config)
        return Builder()

    monkeypatch.setattr(sources, "load_dataset_builder", load)
    line = "{hub: x/y, config: c, split: first, validation_split: last, revision: v1, text_column: article}"
    mix = recipe(tmp_path, f"domains: {{a: {line}}}")
    corpus = corpus_of(mix)
    assert asked == {"name": "x/y", "config": "c", "revision": "v1", "data_files": None, "downloaded": True}
    assert all(text.endswith(" first") for text in trained_on(corpus, "a"))
    assert all(text.endswith(" last") for text in corpus.held_out["text"])
    first = corpus.description()["a"]["key"]
    assert corpus_of(mix).description()["a"]["key"] == first


def test_the_core_recipe_names_every_domain_of_the_core_corpus() -> None:
    shipped = parse_recipe(ROOT / "recipes" / "core.yaml").domains
    assert {name: source.package for name, source in shipped.items()} == {name: name for name in CORE_DOMAINS}
