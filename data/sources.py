"""Sources: local files, data sets of the Hub and packages of the core corpus as columns `text` and `domain`.

What can be wrong with local files is found before anything is converted; the documents themselves stay in the
memory-mapped cache of `datasets`, or are read as they are needed.
"""

import codecs
import glob
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetsError

from ..configuration import DomainSource
from .keys import files_key, key_of

SPLITS = ("train", "validation")
# suffix -> the `datasets` builder that reads it
_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}


def find_files(path: str | Path) -> dict[str | None, list[Path]]:
    """Domain -> its files, sorted; the one key None where the rows name their domain.

    Raises:
        ValueError: `path` does not exist, holds no file of a known kind, or mixes files with domain folders.
    """
    folder = Path(path)
    if folder.is_dir():
        files = _known(folder.iterdir())
        subfolders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if files and subfolders:
            raise ValueError(
                f"path must hold either one sub-folder per domain or files, not both; got the files "
                f"{[file.name for file in files]} beside the folders {[entry.name for entry in subfolders]} in {path}"
            )
        if files:
            return {None: files}
        if {entry.name for entry in subfolders} & set(SPLITS):  # the splits as folders, not domains
            return {None: _known(folder.rglob("*"))}
        found: dict[str | None, list[Path]] = {entry.name: _known(entry.rglob("*")) for entry in subfolders}
        for domain, files in found.items():
            if not files:
                raise ValueError(f"path must hold {_kinds()} files for every domain; got none for {domain} in {path}")
        if found:
            return found
        raise ValueError(f"path must hold {_kinds()} files; got none in {path}")
    return {None: matching_files([str(path)], "path")}


def matching_files(patterns: Sequence[str], field: str) -> list[Path]:
    """The files of known kinds that paths, folders and globs name, each once; those of a folder at any depth.

    Raises:
        ValueError: a pattern matches nothing, or no file of a known kind; the message names `field`.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not matches:
            raise ValueError(
                f"{field} must be a file, a folder or a glob that matches files; got {pattern}, which is none"
            )
        files = _known(file for match in matches for file in (match.rglob("*") if match.is_dir() else [match]))
        if not files:
            raise ValueError(f"{field} must name {_kinds()} files; got {[match.name for match in matches[:5]]}")
        found |= dict.fromkeys(files)
    return list(found)


def by_split(files: list[Path]) -> dict[str, list[Path]]:
    """The files of each split: `train*` or `train/*`, `validation*` or `validation/*`; else all are train."""
    named: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for file in files:
        for split in SPLITS:
            if file.parent.name == split or re.fullmatch(rf"{split}([-_.].*)?", file.name):
                named[split].append(file)
    return named if any(named.values()) else {"train": files, "validation": []}


def load_files(files: Sequence[Path], text_column: str, domain_column: str, domain: str | None) -> tuple[Dataset, str]:
    """Loads files through the cache of `datasets`, in which their bytes are their name.

    Args:
        files: Of known kinds.
        text_column: The column that holds a document's text; a plain-text file is one document.
        domain_column: The column that holds its domain, where `domain` is None.
        domain: The domain of every document.

    Returns:
        The documents, string columns `text` and `domain`; and the key of the files' content.

    Raises:
        ValueError: a file is not UTF-8 or not JSON, lacks a column, or has a row that names no domain.
    """
    _check_files(files, text_column, None if domain is not None else domain_column)
    parts, keys = [], []
    for suffix, builder in _BUILDERS.items():
        same_kind = [file for file in files if file.suffix == suffix and not _is_empty(file)]
        if not same_kind:
            continue
        text = "text" if suffix == ".txt" else text_column
        columns = [text] if domain is not None else [text, domain_column]
        key = files_key(same_kind)
        part = load_dataset(
            builder,
            data_files=[str(file) for file in same_kind],
            split="train",
            cache_dir=os.path.join(datasets.config.HF_DATASETS_CACHE, "equipoise", key),
            **_options(suffix, columns),
        )
        part = part.select_columns(columns)
        if text != "text":
            part = part.rename_column(text, "text")
        if domain is None and domain_column != "domain":
            part = part.rename_column(domain_column, "domain")
        parts.append(_with_domain(part, domain))
        if parts[-1].data.column("domain").null_count:
            raise ValueError(f"domain_column must name a domain in every row; got rows without {domain_column}")
        keys.append([key, suffix, columns])
    return concatenate_datasets(parts) if parts else no_documents(), key_of(keys, domain)


def stream_files(files: Sequence[Path], text_column: str) -> IterableDataset:
    """Files as a stream with the column `text` or, unless plain text, `text_column`.

    Raises:
        ValueError: a file is not JSON or lacks the column; files are of more than one kind, or all empty.
    """
    # All of UTF-8 is not read here: that would take as long as reading the stream once.
    _check_files(files, text_column, None, whole=False)
    files = [file for file in files if not _is_empty(file)]
    builders = sorted({_BUILDERS[file.suffix] for file in files})
    if len(builders) != 1:
        raise ValueError(f"files must be of one kind, and not all empty, to be streamed; got {builders}")
    return load_dataset(
        builders[0],
        data_files=[str(file) for file in files],
        split="train",
        streaming=True,
        **_options(files[0].suffix, [text_column]),
    )


def stated_files(files: Sequence[Path]) -> str:
    """A key for files too large to be read for it: their sizes, and the first and last 64 KiB of each."""
    parts: list[Any] = []
    for file in files:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            head = stream.read(1 << 16)
            stream.seek(max(0, size - (1 << 16)))
            parts += [size, head, stream.read(1 << 16)]
    return key_of(*parts)


def open_hub(source: DomainSource, split: str) -> tuple[Dataset | IterableDataset, str]:
    """A split of a data set of the Hub, and what names its content: the commit, and what was chosen of it.

    Raises:
        ValueError: there is no such data set, configuration or split, or the Hub cannot be reached and the data set
            is not in the cache.
    """
    assert source.hub is not None
    if Path(source.hub).exists():  # `datasets` would read it, and know it by its time instead of its content
        raise ValueError(f"hub must name a data set of the Hub, for local text is given as files; got {source.hub}")
    try:
        builder = load_dataset_builder(
            source.hub, source.config, revision=source.revision, data_files=list(source.data_files) or None
        )
        if source.streaming:
            documents = builder.as_streaming_dataset(split=split)
        else:
            builder.download_and_prepare()
            documents = builder.as_dataset(split=split)
    # what `datasets` raises for names, for connections, for data sets that are programs and for broken files
    except (ValueError, OSError, RuntimeError, DatasetsError) as error:
        raise ValueError(
            f"hub must name a data set, with its config and split, that can be read; "
            f"got {source.hub}, config {source.config}, split {split}: {error}"
        ) from error
    chosen = [source.hub, source.config, split, list(source.data_files)]
    return documents, key_of(chosen, builder.hash)


def load_hub(source: DomainSource, split: str, text_column: str, domain: str) -> tuple[Dataset, str]:
    """A split of a data set of the Hub as columns `text` and `domain`, downloaded whole; and its key.

    Raises:
        ValueError: it cannot be read, or lacks the column.
    """
    documents, key = open_hub(source, split)
    assert isinstance(documents, Dataset)
    check_column(documents.column_names, text_column, source.hub)
    documents = documents.select_columns([text_column])
    if text_column != "text":
        documents = documents.rename_column(text_column, "text")
    return _with_domain(documents, domain), key_of(key, text_column, domain)


def check_column(columns: Sequence[str] | None, text_column: str, where: Any) -> None:
    """
    Raises:
        ValueError: `text_column` is not among the columns, as far as these are known.
    """
    if columns is not None and text_column not in columns:
        raise ValueError(f"text_column must be a column of {where}, one of {list(columns)}; got {text_column}")


def build_packages(names: Sequence[str], folder: Path) -> None:
    """Builds those of these domains of the core corpus that are not in `folder` yet.

    Raises:
        ValueError: there is no such domain, or it cannot be built.
    """
    missing = [name for name in names if not all(file.is_file() for file in package_files(name, folder))]
    if missing:
        from .core_corpus import DomainsFailed, build_core_corpus  # its sources are many, and nothing else needs them

        try:
            build_core_corpus(folder, domains=missing)
        except DomainsFailed as error:
            raise ValueError(str(error)) from error


def package_files(name: str, folder: Path) -> list[Path]:
    """Where the files of a domain of the core corpus are."""
    return [folder / name / f"{split}.parquet" for split in SPLITS]


def no_documents() -> Dataset:
    """Not one document, with the columns that documents have."""
    return Dataset.from_dict({"text": [], "domain": []}, features=_features())


def _features() -> Features:
    return Features({"text": Value("string"), "domain": Value("string")})


def _with_domain(documents: Dataset, domain: str | None) -> Dataset:
    if not len(documents):
        return no_documents()
    if domain is not None:
        documents = documents.add_column("domain", [domain] * len(documents))
    return documents if documents.features == _features() else documents.cast(_features())


def _options(suffix: str, columns: list[str]) -> dict[str, Any]:
    if suffix == ".parquet":
        return {"columns": columns}
    return {"sample_by": "document"} if suffix == ".txt" else {}


def _known(paths: Iterable[Path]) -> list[Path]:
    # manifest.json describes a corpus (see embedded_corpus.py); it is not one of its documents.
    return sorted(p for p in paths if p.suffix in _BUILDERS and p.is_file() and p.name != "manifest.json")


def _kinds() -> str:
    return ", ".join(_BUILDERS)


def _is_empty(file: Path) -> bool:
    """Whether a file has no rows; `datasets` fails on some of these."""
    if file.suffix == ".parquet":
        return pq.read_metadata(file).num_rows == 0
    return file.stat().st_size == 0


def _check_files(files: Sequence[Path], text_column: str, domain_column: str | None, whole: bool = True) -> None:
    wanted = [("text_column", text_column)] + ([("domain_column", domain_column)] if domain_column else [])
    for file in files:
        if not file.is_file():
            raise ValueError(f"every file must stay while it is read; got {file}, which is gone")
        if whole:
            _check_utf8(file)
        _check_columns(file, wanted)


def _check_utf8(file: Path) -> None:
    if file.suffix == ".parquet":
        return  # strings in parquet are UTF-8 by its specification
    offset, rest = 0, b""
    with file.open("rb") as stream:
        while True:
            chunk = stream.read(1 << 22)
            try:
                _, consumed = codecs.utf_8_decode(rest + chunk, "strict", not chunk)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file} must be UTF-8; got an invalid byte at offset {offset + error.start}"
                ) from error
            if not chunk:
                return
            offset += consumed
            rest = (rest + chunk)[consumed:]


def _check_columns(file: Path, wanted: list[tuple[str, str]]) -> None:
    if file.suffix == ".parquet":
        columns = pq.read_schema(file).names
    elif file.suffix == ".txt":
        columns = ["text"]
    elif file.stat().st_size == 0:
        return  # no rows, so no columns to miss; an empty domain is reported by name
    else:
        columns = list(_first_json_row(file))
    for field, column in wanted:
        # A text file has one nameless column, its text, whatever `text_column` says.
        if column not in columns and not (file.suffix == ".txt" and field == "text_column"):
            hint = "; or give one sub-folder per domain" if field == "domain_column" else ""
            raise ValueError(f"{field} must be a column of {file}, one of {columns}{hint}; got {column}")


def _first_json_row(file: Path) -> dict:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            first = json.loads(next((line for line in lines if line.strip()), "{}"))
    except json.JSONDecodeError:  # not one value per line: then one value over all lines
        try:
            first = json.loads(file.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} must hold JSON, an object per line or one list of them; got {error}") from error
    if isinstance(first, list):
        first = first[0] if first else {}
    if not isinstance(first, dict):
        raise ValueError(f"{file} must hold JSON objects; got {type(first).__name__} first")
    return first
