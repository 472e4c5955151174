"""Documents: text files of many domains in, a `train` and a `validation` split out.

Everything that can be wrong with the files is found before anything is converted; the documents
themselves stay in the memory-mapped cache of `datasets`.
"""

import codecs
import glob
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets, load_dataset

# suffix -> the `datasets` builder that reads it
_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
_SPLITS = ("train", "validation")


def read_documents(
    path: str | Path,
    *,
    text_column: str = "text",
    domain_column: str = "domain",
    validation_fraction: float = 0.02,
    max_train_bytes_per_domain: int | None = None,
    max_validation_bytes_per_domain: int | None = None,
    seed: int = 0,
) -> DatasetDict:
    """Reads documents of several domains from parquet, JSON (lines) or plain-text files.

    Args:
        path: A folder with one sub-folder per domain (its name is the domain), or a file, a folder of
            files (or of sub-folders `train` and `validation`) or a glob whose rows name their domain in
            `domain_column`. Files called `train`
            and `validation` (`train.parquet`, `train-00000-of-00002.jsonl`), or in folders called so, are the
            splits, and then other files beside them are not read. A plain-text
            file is one document.
        text_column: The column that holds a document's text.
        domain_column: The column that holds its domain; not looked at where folders name the domains.
        validation_fraction: Share of the documents to hold out where no validation file is given,
            between 0 and 1. A hash of `seed` and the text decides, so neither the files' order nor
            what else they hold changes a document's split.
        max_train_bytes_per_domain: At most so many bytes of UTF-8 text per domain in `train`. Documents
            are taken in an order that the same hash shuffles; one that no longer fits is passed over.
        max_validation_bytes_per_domain: The same for `validation`.
        seed: Seeds that hash.

    Returns:
        Splits `train` and `validation`, each with the string columns `text` and `domain`. Documents
        without text are left out, and so is a train document whose text stands in validation.

    Raises:
        ValueError: `path` does not exist, holds no file of a known kind, or mixes files with domain
            folders; a column is missing (of JSON, from the file's first row); a file is not UTF-8 or not
            JSON; a row names no domain; a domain has no document in train or none in validation; a
            number is out of its range.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, both exclusive; got {validation_fraction}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0; got {seed}")
    caps = {"train": max_train_bytes_per_domain, "validation": max_validation_bytes_per_domain}
    for split, cap in caps.items():
        if cap is not None and cap < 1:
            raise ValueError(f"max_{split}_bytes_per_domain must be at least 1; got {cap}")

    # domain -> files by split; the domain None means that each row names its own
    domain_files = {domain: _by_split(files) for domain, files in _find_files(path).items()}
    for domain, files_by_split in domain_files.items():
        wanted = [("text_column", text_column)] + ([("domain_column", domain_column)] if domain is None else [])
        for file in (file for files in files_by_split.values() for file in files):
            _check_utf8(file)
            _check_columns(file, wanted)

    parts: dict[str, list[Dataset]] = {split: [] for split in _SPLITS}
    for domain, files_by_split in domain_files.items():
        loaded = {
            split: _load(files, text_column, domain_column, domain) for split, files in files_by_split.items() if files
        }
        if "train" in loaded and "validation" not in loaded:
            train = loaded["train"]
            held_out = _hashes(train, seed)["key"] < validation_fraction * 2.0**63
            loaded = {
                "train": train.select(np.flatnonzero(~held_out)),
                "validation": train.select(np.flatnonzero(held_out)),
            }
        for split, part in loaded.items():
            parts[split].append(part)

    empty = Dataset.from_dict({"text": [], "domain": []}, features=_features())
    splits = {split: concatenate_datasets(parts[split]) if parts[split] else empty for split in _SPLITS}
    hashes = {split: _hashes(documents, seed) for split, documents in splits.items()}
    kept = {split: hashes[split]["num_bytes"] > 0 for split in _SPLITS}
    kept["train"] &= ~np.isin(hashes["train"]["key"], hashes["validation"]["key"])

    domains = {split: document_domains(splits[split]) for split in _SPLITS}
    names: list[str] = sorted({*domain_files, *domains["train"], *domains["validation"]} - {None})
    if not names:
        raise ValueError(f"path must hold at least one document with text; got none in {path}")
    chosen: dict[str, list[np.ndarray]] = {split: [] for split in _SPLITS}
    for name in names:
        for split in _SPLITS:
            candidates = np.flatnonzero(kept[split] & (domains[split] == name))
            taken = _take_up_to(candidates, hashes[split], caps[split])
            if not len(taken):
                raise ValueError(_nothing_left(name, split, len(candidates), caps[split], path))
            chosen[split].append(taken)
    # The files' own order again: neighbours in the file are neighbours in memory.
    return DatasetDict(
        {split: documents.select(np.sort(np.concatenate(chosen[split]))) for split, documents in splits.items()}
    )


def document_domains(documents: Dataset) -> np.ndarray:
    """The domain of each document, as an object array that can be compared and indexed."""
    return np.asarray(documents.with_format("numpy")["domain"][:], dtype=object)


def read_held_out(path: str | Path) -> Dataset:
    """Held-out documents for evaluation: a file called `validation.parquet` as it is, as a training run leaves it, or
    the validation split that `read_documents` finds in any other data."""
    if Path(path).name == "validation.parquet" and Path(path).is_file():
        return Dataset.from_parquet(str(path))
    return read_documents(path)["validation"]


def _find_files(path: str | Path) -> dict[str | None, list[Path]]:
    """Domain -> its files, sorted; the one key None where the rows name their domain."""
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
        if {entry.name for entry in subfolders} & set(_SPLITS):  # the splits as folders, not domains
            return {None: _known(folder.rglob("*"))}
        found: dict[str | None, list[Path]] = {entry.name: _known(entry.rglob("*")) for entry in subfolders}
        for domain, files in found.items():
            if not files:
                raise ValueError(f"path must hold {_kinds()} files for every domain; got none for {domain} in {path}")
        if found:
            return found
        raise ValueError(f"path must hold {_kinds()} files; got none in {path}")
    if folder.is_file():
        matches = [folder]
    else:
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        if not matches:
            raise ValueError(f"path must be a file, a folder or a glob that matches files; got {path}, which is none")
    files = _known(matches)
    if not files:
        raise ValueError(f"path must name {_kinds()} files; got {[match.name for match in matches[:5]]}")
    return {None: files}


def _known(paths: Iterable[Path]) -> list[Path]:
    # manifest.json describes a corpus (see embedded_corpus.py); it is not one of its documents.
    return sorted(p for p in paths if p.suffix in _BUILDERS and p.is_file() and p.name != "manifest.json")


def _kinds() -> str:
    return ", ".join(_BUILDERS)


def _by_split(files: list[Path]) -> dict[str, list[Path]]:
    """The files of each split: `train*` or `train/*`, `validation*` or `validation/*`; else all are train."""
    named: dict[str, list[Path]] = {split: [] for split in _SPLITS}
    for file in files:
        for split in _SPLITS:
            if file.parent.name == split or re.fullmatch(rf"{split}([-_.].*)?", file.name):
                named[split].append(file)
    return named if any(named.values()) else {"train": files, "validation": []}


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


def _load(files: list[Path], text_column: str, domain_column: str, domain: str | None) -> Dataset:
    parts = []
    options: dict[str, dict] = {".txt": {"sample_by": "document"}}
    for suffix in _BUILDERS:
        same_kind = [str(file) for file in files if file.suffix == suffix and file.stat().st_size]
        if not same_kind:
            continue
        text = "text" if suffix == ".txt" else text_column
        columns = [text] if domain is not None else [text, domain_column]
        options[".parquet"] = {"columns": columns}
        part = load_dataset(_BUILDERS[suffix], data_files=same_kind, split="train", **options.get(suffix, {}))
        part = part.select_columns(columns)
        if text != "text":
            part = part.rename_column(text, "text")
        if domain is not None:
            part = part.add_column("domain", [domain] * len(part))
        elif domain_column != "domain":
            part = part.rename_column(domain_column, "domain")
        if part.features != _features():
            part = part.cast(_features())
        if part.data.column("domain").null_count:
            raise ValueError(f"domain_column must name a domain in every row; got rows without {domain_column}")
        parts.append(part)
    return (
        concatenate_datasets(parts) if parts else Dataset.from_dict({"text": [], "domain": []}, features=_features())
    )


def _features() -> Features:
    return Features({"text": Value("string"), "domain": Value("string")})


def _hash_batch(texts: list[str | None], seed: int) -> dict[str, list[int]]:
    salt = seed.to_bytes(16, "big")
    keys, sizes = [], []
    for text in texts:
        encoded = (text or "").encode()
        keys.append(int.from_bytes(hashlib.blake2b(encoded, digest_size=8, salt=salt).digest(), "big") >> 1)
        sizes.append(len(encoded) if encoded.strip() else 0)
    return {"key": keys, "num_bytes": sizes}


def _hashes(documents: Dataset, seed: int) -> dict[str, np.ndarray]:
    """Per document: `key`, uniform over 63 bits, of seed and text; and `num_bytes`, 0 without text."""
    if not len(documents):  # `map` would give back its input's columns
        return {name: np.zeros(0, dtype=np.int64) for name in ("key", "num_bytes")}
    hashed = documents.map(
        _hash_batch,
        batched=True,
        input_columns="text",
        remove_columns=documents.column_names,
        fn_kwargs={"seed": seed},
        features=Features({"key": Value("int64"), "num_bytes": Value("int64")}),
        desc="Hashing documents",
    )
    arrays = hashed.with_format("numpy")
    return {name: np.asarray(arrays[name][:]) for name in ("key", "num_bytes")}


def _take_up_to(candidates: np.ndarray, hashes: dict[str, np.ndarray], cap: int | None) -> np.ndarray:
    if cap is None:
        return candidates
    taken, total = [], 0
    for index in candidates[np.argsort(hashes["key"][candidates], kind="stable")]:
        if total + hashes["num_bytes"][index] <= cap:
            total += int(hashes["num_bytes"][index])
            taken.append(index)
    return np.asarray(taken, dtype=np.int64)


def _nothing_left(domain: str, split: str, candidates: int, cap: int | None, path: str | Path) -> str:
    if candidates:
        return (
            f"max_{split}_bytes_per_domain must hold at least one document of every domain; "
            f"got {cap}, and each of the {candidates} of {domain} is larger"
        )
    return f"every domain must have a document with text in {split}; got none for {domain} in {path}"
