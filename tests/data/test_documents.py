"""read_documents: layouts, splits, caps, and every error it documents."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from equipoise.data import read_documents


def write_jsonl(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def texts(domain: str, count: int) -> list[str]:
    return [f"{domain} document {number} é" for number in range(count)]


def rows(documents: Dataset) -> set[tuple[str, str]]:
    return set(zip(documents["text"], documents["domain"], strict=True))


@pytest.fixture
def mixed_file(tmp_path: Path) -> Path:
    file = tmp_path / "all.jsonl"
    write_jsonl(file, [{"text": text, "domain": d, "other": 1} for d in ("law", "code") for text in texts(d, 200)])
    return file


def test_folder_per_domain_reads_every_kind_and_its_own_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "law/train.parquet", [{"text": t, "domain": "ignored", "source": "x"} for t in "ab"])
    write_parquet(tmp_path / "law/validation.parquet", [{"text": "c", "domain": "ignored", "source": "x"}])
    write_jsonl(tmp_path / "code/train-1.jsonl", [{"text": "d", "id": 1}])
    write_jsonl(tmp_path / "code/validation.jsonl", [{"text": "e"}])
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose/train.txt").write_text("two\n\nparagraphs, one document\n", encoding="utf-8")
    (tmp_path / "prose/validation.txt").write_text("f\n", encoding="utf-8")
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    read = read_documents(tmp_path)
    assert rows(read["train"]) == {
        ("a", "law"),
        ("b", "law"),
        ("d", "code"),
        ("two\n\nparagraphs, one document\n", "prose"),
    }
    assert rows(read["validation"]) == {("c", "law"), ("e", "code"), ("f\n", "prose")}
    assert read["train"].column_names == ["text", "domain"]
    assert {feature.dtype for feature in read["train"].features.values()} == {"string"}


@pytest.mark.parametrize("pattern", ["all.jsonl", ".", "*.jsonl"])
def test_file_folder_and_glob_name_the_same_documents(mixed_file: Path, pattern: str) -> None:
    read = read_documents(mixed_file.parent / pattern)
    assert rows(read["train"]) | rows(read["validation"]) == {(t, d) for d in ("law", "code") for t in texts(d, 200)}


def test_files_named_after_splits_are_the_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"body": "a", "kind": "x"}, {"body": "b", "kind": "y"}])
    write_jsonl(tmp_path / "validation.jsonl", [{"body": "c", "kind": "x"}, {"body": "d", "kind": "y"}])
    write_jsonl(tmp_path / "test.jsonl", [{"body": "e", "kind": "x"}])
    read = read_documents(tmp_path, text_column="body", domain_column="kind")
    assert rows(read["train"]) == {("a", "x"), ("b", "y")}
    assert rows(read["validation"]) == {("c", "x"), ("d", "y")}


def test_hold_out_depends_on_seed_and_text_only(tmp_path: Path, mixed_file: Path) -> None:
    held_out = rows(read_documents(mixed_file, validation_fraction=0.1)["validation"])
    assert 10 < len(held_out) < 80  # 40 expected of 400
    assert held_out != rows(read_documents(mixed_file, validation_fraction=0.1, seed=1)["validation"])

    lines = mixed_file.read_text(encoding="utf-8").splitlines()
    half = tmp_path / "half/all.jsonl"
    half.parent.mkdir()
    half.write_text("\n".join(reversed(lines[::2])) + "\n", encoding="utf-8")
    kept = {(json.loads(line)["text"], json.loads(line)["domain"]) for line in lines[::2]}
    assert rows(read_documents(half, validation_fraction=0.1)["validation"]) == held_out & kept


def test_caps_count_utf8_bytes_per_domain_and_fill_up(mixed_file: Path) -> None:
    read = read_documents(mixed_file, validation_fraction=0.2, max_train_bytes_per_domain=1000)
    for domain in ("law", "code"):
        sizes = [len(text.encode()) for text, name in rows(read["train"]) if name == domain]
        assert 1000 - 25 < sum(sizes) <= 1000  # no document is longer than 25 bytes
    assert rows(read["validation"]) == rows(read_documents(mixed_file, validation_fraction=0.2)["validation"])
    again = read_documents(mixed_file, validation_fraction=0.2, max_train_bytes_per_domain=1000)
    assert again["train"]["text"][:] == read["train"]["text"][:]
    numbers = sorted(int(text.split()[2]) for text, name in rows(read["train"]) if name == "law")
    assert numbers[-1] > 100, "a cap must not take the file's first documents"


def test_document_in_both_splits_leaves_train_and_empty_ones_leave_both(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x/train.jsonl", [{"text": t} for t in ["a", "shared", " \n", ""]] + [{"text": None}])
    write_jsonl(tmp_path / "x/validation.jsonl", [{"text": "shared"}, {"text": "  "}])
    read = read_documents(tmp_path)
    assert rows(read["train"]) == {("a", "x")}
    assert rows(read["validation"]) == {("shared", "x")}


def test_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must be .*; got .*nowhere"):
        read_documents(tmp_path / "nowhere")


def test_unknown_kinds_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"path must hold \.parquet"):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match=r"path must name \.parquet.*a\.docx"):
        read_documents(tmp_path / "a.docx")
    (tmp_path / "law").mkdir()
    with pytest.raises(ValueError, match="got none for law"):
        read_documents(tmp_path)


def test_files_beside_domain_folders_are_refused(mixed_file: Path) -> None:
    (mixed_file.parent / "law").mkdir()
    with pytest.raises(ValueError, match=r"not both; got the files \['all.jsonl'\] beside the folders \['law'\]"):
        read_documents(mixed_file.parent)


def test_missing_column_is_named_with_those_found(tmp_path: Path, mixed_file: Path) -> None:
    with pytest.raises(ValueError, match=r"text_column .*all\.jsonl.*'text', 'domain', 'other'.*; got body"):
        read_documents(mixed_file, text_column="body")
    with pytest.raises(ValueError, match=r"domain_column .*; got kind"):
        read_documents(mixed_file, domain_column="kind")
    write_parquet(tmp_path / "p/law/train.parquet", [{"content": "a"}])
    with pytest.raises(ValueError, match=r"text_column .*\['content'\].*; got text"):
        read_documents(tmp_path / "p")


@pytest.mark.parametrize("name", ["train.txt", "train.jsonl"])
@pytest.mark.parametrize("before", [b"abc", b"\xc3\xa9" * 3_000_000])
def test_file_that_is_not_utf8_is_named_with_its_offset(tmp_path: Path, name: str, before: bytes) -> None:
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / name).write_bytes(before + b"\xff\xfe tail")
    with pytest.raises(ValueError, match=rf"{name} must be UTF-8; got an invalid byte at offset {len(before)}$"):
        read_documents(tmp_path)


def test_character_cut_off_at_the_end_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "law").mkdir()
    (tmp_path / "law/train.txt").write_bytes(b"abcd\xc3")
    with pytest.raises(ValueError, match="offset 4"):
        read_documents(tmp_path)


def test_json_list_is_read_and_broken_json_is_named(tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    pairs = [{"text": text, "domain": "law"} for text in texts("law", 100)]
    file.write_text(json.dumps(pairs, indent=1), encoding="utf-8")
    read = read_documents(file, validation_fraction=0.2)
    assert rows(read["train"]) | rows(read["validation"]) == {(text, "law") for text in texts("law", 100)}
    file.write_text('{"text": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"all\.json must hold JSON.*; got"):
        read_documents(file)
    file.write_text("3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"all\.json must hold JSON objects; got int first"):
        read_documents(file)


def test_empty_domain_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "full/train.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "full/validation.jsonl", [{"text": "b"}])
    write_jsonl(tmp_path / "void/train.jsonl", [{"text": "  "}])
    write_jsonl(tmp_path / "void/validation.jsonl", [{"text": "b2"}])
    with pytest.raises(ValueError, match="in train; got none for void"):
        read_documents(tmp_path)
    write_jsonl(tmp_path / "void/train.jsonl", [{"text": "c"}])
    (tmp_path / "void/validation.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="in validation; got none for void"):
        read_documents(tmp_path)


def test_domain_without_validation_is_named(mixed_file: Path) -> None:
    with pytest.raises(ValueError, match=r"in validation; got none for (law|code)"):
        read_documents(mixed_file, validation_fraction=1e-9)


def test_row_without_domain_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "domain": "x"}, {"text": "b", "domain": None}])
    with pytest.raises(ValueError, match="domain_column must name a domain in every row"):
        read_documents(tmp_path / "a.jsonl")


def test_cap_below_every_document_is_named(mixed_file: Path) -> None:
    with pytest.raises(ValueError, match=r"max_train_bytes_per_domain .* got 3, .* is larger"):
        read_documents(mixed_file, max_train_bytes_per_domain=3, validation_fraction=0.2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("validation_fraction", 0.0),
        ("validation_fraction", 1.0),
        ("max_train_bytes_per_domain", 0),
        ("max_validation_bytes_per_domain", 0),
        ("seed", -1),
    ],
)
def test_numbers_out_of_range_are_named(mixed_file: Path, field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*; got {value}"):
        read_documents(mixed_file, **{field: value})


def test_folders_called_train_and_validation_are_the_splits(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        for number in range(5):
            file = tmp_path / "law" / split / f"{number}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{split} document {number}")
    read = read_documents(tmp_path)
    for split in ("train", "validation"):
        assert sorted(read[split]["text"]) == [f"{split} document {number}" for number in range(5)]


def test_a_file_whose_name_only_begins_like_a_split_is_none(tmp_path: Path) -> None:
    (tmp_path / "law").mkdir()
    for name in ["training_notes", *(f"article{number}" for number in range(60))]:
        (tmp_path / "law" / f"{name}.txt").write_text(f"the text of {name}")
    read = read_documents(tmp_path, validation_fraction=0.3)
    assert len(read["train"]) + len(read["validation"]) == 61


def test_folders_of_splits_with_a_domain_column(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        lines = [json.dumps({"text": f"{split} {domain} {n}", "domain": domain}) for domain in "ab" for n in range(3)]
        (tmp_path / split / "part-0.jsonl").write_text("\n".join(lines))
    read = read_documents(tmp_path)
    for split in ("train", "validation"):
        expected = sorted((f"{split} {domain} {n}", domain) for domain in "ab" for n in range(3))
        assert sorted(zip(read[split]["text"], read[split]["domain"], strict=True)) == expected
