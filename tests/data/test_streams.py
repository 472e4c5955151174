"""Streams: against reading everything at once, and going on from any block as if nothing had happened."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import IterableDataset, load_dataset
from transformers import PreTrainedTokenizerFast

from equipoise.data import streams, train_tokenizer
from equipoise.data.documents import document_hash
from equipoise.data.streams import BlockReader, TextStream, WindowReader

TEXTS = [f"{number} " + "abc cab " * (number % 7) for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["abc cab bac"] * 10, 270)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "WINDOW_DOCUMENTS", 8)
    monkeypatch.setattr(streams, "_ENCODED_DOCUMENTS", 3)


def write(folder: Path, kind: str, texts: list[str], shards: int = 3) -> list[str]:
    files = []
    for shard in range(shards):
        part = texts[shard * len(texts) // shards : (shard + 1) * len(texts) // shards]
        file = folder / f"part-{shard}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"text": part, "other": list(range(len(part)))}), file, row_group_size=7)
        else:
            file.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in part), encoding="utf-8")
        files.append(str(file))
    return files


def stream_of(folder: Path, kind: str = "parquet", texts: list[str] = TEXTS, **changes: object) -> TextStream:
    builder = "parquet" if kind == "parquet" else "json"
    fields = {
        "name": "domain",
        "place": "mix.yaml",
        "dataset": load_dataset(builder, data_files=write(folder, kind, texts), split="train", streaming=True),
        "text_column": "text",
        "validation": None,
        "validation_fraction": 0.2,
        "max_train_bytes": None,
        "max_validation_bytes": 1000,
    }
    return TextStream(**fields | changes)


def held_out(text: str, fraction: float = 0.2) -> bool:
    return document_hash(text) / 2**63 < fraction


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_windows_hold_the_stream_without_what_is_held_out(tmp_path: Path, kind: str) -> None:
    texts = [*TEXTS[:20], "", " \n", *TEXTS[20:]]
    stream = stream_of(tmp_path, kind, texts)
    reader = WindowReader(stream)
    expected = [text for text in TEXTS if not held_out(text)]
    assert 35 < len(expected) < 60
    for epoch in range(3):
        read: list[str] = []
        while reader.state["epoch"] == epoch and len(read) < len(expected):
            window = reader.next()
            assert len(window) == 8 or reader.state["epoch"] == epoch + 1
            read += window
        assert read == expected
    assert stream.held_out == [text for text in TEXTS if held_out(text)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_window_is_read_again_from_its_place(tmp_path: Path, kind: str) -> None:
    reader = WindowReader(stream_of(tmp_path, kind))
    places, windows = [], []
    for _ in range(15):
        places.append(json.loads(json.dumps(reader.state)))
        windows.append(reader.next())
    for number in range(15):
        again = WindowReader(stream_of(tmp_path, kind), places[number])
        assert [again.next() for _ in range(15 - number)] == windows[number:]


def test_blocks_are_the_windows_end_to_end(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    stream = stream_of(tmp_path)
    reader = BlockReader(stream, tokenizer, 16, seed=0, domain=0)
    blocks = [reader.next() for _ in range(60)]
    tokens = np.concatenate([block[0] for block in blocks]).tolist()
    eos = tokenizer.eos_token_id
    documents, current = [], []
    for token in tokens:
        current.append(token)
        if token == eos and len(current) > 1:
            assert current[0] == eos
            documents.append(tokenizer.decode(current[1:-1]))
            current = []
    expected = [text for text in TEXTS if not held_out(text)]
    assert Counter(documents[: len(expected)]) == Counter(expected), "an epoch holds each document once"
    assert documents[:8] != expected[:8], "a window is shuffled"
    assert Counter(documents[:8]) == Counter(expected[:8]), "a window holds the next documents"
    second = documents[len(expected) : len(expected) + 8]
    assert len(second) == 8
    assert second != documents[:8], "and differently the next time"
    for input_ids, position_ids in blocks:
        position = 0
        for offset in range(16):
            opens = offset == 0 or (input_ids[offset] == eos and input_ids[offset - 1] == eos)
            position = 0 if opens else position + 1
            assert position_ids[offset] == position


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_going_on_from_any_block_changes_nothing(
    tmp_path: Path, kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    reader = BlockReader(stream_of(tmp_path, kind), tokenizer, 16, seed=1, domain=2)
    blocks, places = [], []
    for _ in range(70):
        places.append(json.dumps(reader.state_dict()))
        blocks.append(reader.next())
    assert reader.epoch >= 1
    assert max(map(len, places)) < 1000, "a place is a small record"
    for number in range(0, 70, 3):
        place = json.loads(places[number])
        assert place["block"] == number
        again = BlockReader(stream_of(tmp_path, kind), tokenizer, 16, seed=1, domain=2, state=place)
        assert all(np.array_equal(again.next(), block) for block in blocks[number : number + 12])


def test_going_on_does_not_read_what_came_before(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    reader = BlockReader(stream_of(tmp_path), tokenizer, 16, seed=0, domain=0)
    for _ in range(20):
        reader.next()
    place = reader.state_dict()
    assert place["reader"]["window"] >= 2
    stream = stream_of(tmp_path)
    seen: list[str] = []
    is_trained_on = stream.is_trained_on
    stream.is_trained_on = lambda text: seen.append(text) or is_trained_on(text)  # type: ignore[method-assign]
    BlockReader(stream, tokenizer, 16, seed=0, domain=0, state=place).next()
    assert TEXTS[0] not in seen
    assert len(seen) < 30


def test_limits_of_bytes(tmp_path: Path) -> None:
    trained = [text for text in TEXTS if not held_out(text)]
    cap = sum(map(len, trained[:10])) + 1
    reader = WindowReader(stream_of(tmp_path, max_train_bytes=cap))
    assert [len(reader.next()) for _ in range(4)] == [8, 2, 8, 2]
    assert reader.state["epoch"] == 2
    first = next(text for text in TEXTS if held_out(text))
    assert stream_of(tmp_path, max_validation_bytes=len(first)).held_out[0] == first


def test_a_document_that_fits_no_epoch_is_passed_over(tmp_path: Path) -> None:
    large = next(text for number in range(99) if not held_out(text := f"large {number} " + "abc " * 999))
    cap = 2_000
    reader = WindowReader(stream_of(tmp_path, texts=[large, *TEXTS[:30], large, *TEXTS[30:]], max_train_bytes=cap))
    expected = []
    for text in (text for text in TEXTS if not held_out(text)):
        if sum(map(len, expected)) + len(text) > cap:
            break
        expected.append(text)
    seen: list[str] = []
    while reader.state["epoch"] == 0:
        seen += reader.next()
    assert seen == expected
    assert len(seen) > 31  # beyond the second large one


def test_windows_are_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "WINDOW_BYTES", 1)
    assert len(WindowReader(stream_of(tmp_path)).next()) == 1


def test_a_validation_part_of_its_own_is_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    files = write(tmp_path / "held", "jsonl", [*TEXTS[3:5], " "], shards=1)
    validation = load_dataset("json", data_files=files, split="train", streaming=True)
    stream = stream_of(tmp_path, validation=validation)
    assert stream.held_out == TEXTS[3:5]
    assert list(stream.training_texts()) == TEXTS[:3] + TEXTS[5:]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"text_column": "body"},
            r"mix\.yaml: domain domain: text_column must be a column .*'text', 'other'.*; got body",
        ),
        ({"text_column": "other"}, "text_column must hold text; got int in other"),
        ({"max_train_bytes": 1}, r"must hold a document .* fits max_train_bytes \(1\); got none"),
        ({"texts": ["", " "] * 5}, "must hold a document with text"),
    ],
)
def test_errors_name_recipe_domain_and_field(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WindowReader(stream_of(tmp_path, **changes)).next()


def test_a_stream_that_holds_nothing_out_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"domain domain: .* held-out document .*max_validation_bytes \(1\); got none"
    ):
        _ = stream_of(tmp_path, max_validation_bytes=1).held_out


def test_a_place_in_other_files_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    place = BlockReader(stream_of(tmp_path), tokenizer, 16, seed=0, domain=0).state_dict()
    (tmp_path / "other").mkdir()
    files = write(tmp_path / "other", "parquet", TEXTS, shards=2)
    other = stream_of(tmp_path, dataset=load_dataset("parquet", data_files=files, split="train", streaming=True))
    # An older datasets does not split files.
    parts, before = (10, 9) if hasattr(IterableDataset, "reshard") else (2, 3)
    words = rf"domain domain: state must be of a stream of as many parts \({parts}\); got one of {before}"
    with pytest.raises(ValueError, match=words):
        BlockReader(other, tokenizer, 16, seed=0, domain=0, state=place)


def test_many_files_are_not_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = stream_of(tmp_path)
    assert split.split_dataset.num_shards == (9 if hasattr(IterableDataset, "reshard") else 3)
    monkeypatch.setattr(streams, "_SPLIT_FILES", 2)
    whole = stream_of(tmp_path)
    assert whole.split_dataset.num_shards == 3
    readers = [WindowReader(stream) for stream in (split, whole)]
    for _ in range(15):
        assert readers[0].next() == readers[1].next()
    again = WindowReader(stream_of(tmp_path), json.loads(json.dumps(readers[1].state)))
    assert again.next() == readers[1].next()
