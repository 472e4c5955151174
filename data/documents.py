"""Documents: the text of many domains in, a `train` and a held-out part of each out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets

from .keys import cache_file, key_of
from .sources import SPLITS, by_split, find_files, load_files

# Hashes of documents are uniform below this.
_HASH_RANGE = 2.0**63


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """The documents of a source, before it is decided which are trained on."""

    name: str | None
    """Their domain; None where each row names its own."""
    place: str
    """Where they come from, for errors."""
    loaded: dict[str, tuple[Dataset, str]]
    """Split -> documents (columns `text`, `domain`) and the key of their content. Without a validation split, a
    fraction of the train split is held out."""
    validation_fraction: float
    max_bytes: dict[str, int | None]
    """Split -> most bytes of UTF-8 text per domain."""


@dataclass(frozen=True, kw_only=True)
class DomainDocuments:
    """The documents of one domain, columns `text` and `domain`, in the files' order."""

    train: Dataset
    held_out: Dataset
    key: str
    """Stands for the text of every document of `train`, in order."""
    held_out_key: str
    """The same of `held_out`."""
    train_bytes: int
    held_out_bytes: int


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
        Splits `train` and `validation`, each with the string columns `text` and `domain`, domain by domain in the
        order of their names. Documents without text are left out, and so is a train document whose text stands in
        validation.

    Raises:
        ValueError: `path` does not exist, holds no file of a known kind, or mixes files with domain
            folders; a column is missing (of JSON, from the file's first row); a file is not UTF-8 or not
            JSON; a row names no domain; a domain has no document in train or none in validation; a
            number is out of its range.
    """
    gathered = gather_folder(
        path,
        text_column=text_column,
        domain_column=domain_column,
        validation_fraction=validation_fraction,
        max_bytes={"train": max_train_bytes_per_domain, "validation": max_validation_bytes_per_domain},
    )
    chosen = choose_documents(gathered, seed=seed).values()
    return DatasetDict(
        {
            "train": concatenate_datasets([domain.train for domain in chosen]),
            "validation": concatenate_datasets([domain.held_out for domain in chosen]),
        }
    )


def gather_folder(
    path: str | Path,
    *,
    text_column: str,
    domain_column: str,
    validation_fraction: float,
    max_bytes: dict[str, int | None],
) -> list[Gathered]:
    """Loads the files that `read_documents` describes.

    Raises:
        ValueError: as there.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, both exclusive; got {validation_fraction}")
    for split, cap in max_bytes.items():
        if cap is not None and cap < 1:
            raise ValueError(f"max_{split}_bytes_per_domain must be at least 1; got {cap}")
    gathered = []
    for domain, files in find_files(path).items():
        loaded = {
            split: load_files(of_split, text_column, domain_column, domain)
            for split, of_split in by_split(files).items()
            if of_split
        }
        gathered.append(
            Gathered(
                name=domain,
                place=str(path),
                loaded=loaded,
                validation_fraction=validation_fraction,
                max_bytes=max_bytes,
            )
        )
    return gathered


def choose_documents(gathered: Sequence[Gathered], *, seed: int = 0) -> dict[str, DomainDocuments]:
    """Holds out documents, leaves out those without text and copies of those held out, and keeps to the caps.

    Args:
        gathered: The sources, no domain in two of them.
        seed: Seeds the hash that decides what is held out and what a cap takes.

    Returns:
        Domain -> its documents, in the order of the domains' names.

    Raises:
        ValueError: a domain has no document in train or none in validation, or each is larger than the cap; `seed`
            is negative.
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0; got {seed}")
    parts: list[dict[str, tuple[Dataset, dict[str, np.ndarray]]]] = []
    for source in gathered:
        hashed = {split: (part, _hashes(part, key, seed)) for split, (part, key) in source.loaded.items()}
        if "validation" not in hashed:
            train, hashes = hashed["train"]
            held_out = is_held_out(hashes["key"], source.validation_fraction)
            for split, rows in (("train", np.flatnonzero(~held_out)), ("validation", np.flatnonzero(held_out))):
                hashed[split] = (train.select(rows), {name: column[rows] for name, column in hashes.items()})
        parts.append(hashed)
    held_out_keys = np.concatenate([part["validation"][1]["key"] for part in parts])

    chosen: dict[str, DomainDocuments] = {}
    for source, part in zip(gathered, parts, strict=True):
        domains = {
            split: document_domains(documents) if source.name is None else np.full(len(documents), source.name, object)
            for split, (documents, _) in part.items()
        }
        names = {name for of_split in domains.values() for name in of_split} if source.name is None else {source.name}
        for name in sorted(names):
            taken = {}
            for split in SPLITS:
                hashes = part[split][1]
                kept = (hashes["num_bytes"] > 0) & (domains[split] == name)
                if split == "train":
                    kept &= ~np.isin(hashes["key"], held_out_keys)
                candidates, cap = np.flatnonzero(kept), source.max_bytes[split]
                # The files' own order again: neighbours in the file are neighbours in memory.
                taken[split] = np.sort(_take_up_to(candidates, hashes, cap))
                if not len(taken[split]):
                    raise ValueError(_nothing_left(name, split, len(candidates), cap, source.place))
            of_taken = {
                split: {column: values[taken[split]] for column, values in part[split][1].items()} for split in SPLITS
            }
            keys = {split: key_of(seed, hashes["key"].astype("<i8").tobytes()) for split, hashes in of_taken.items()}
            chosen[name] = DomainDocuments(
                train=part["train"][0].select(taken["train"]),
                held_out=part["validation"][0].select(taken["validation"]),
                key=keys["train"],
                held_out_key=keys["validation"],
                train_bytes=int(of_taken["train"]["num_bytes"].sum()),
                held_out_bytes=int(of_taken["validation"]["num_bytes"].sum()),
            )
    if not chosen:
        raise ValueError(f"path must hold at least one document with text; got none in {gathered[0].place}")
    return dict(sorted(chosen.items()))


def document_domains(documents: Dataset) -> np.ndarray:
    """The domain of each document, as an object array that can be compared and indexed."""
    return np.asarray(documents.with_format("numpy")["domain"][:], dtype=object)


def document_hash(text: str, seed: int = 0) -> int:
    """63 bits, uniform, of a seed and a text: what decides whether a document is held out."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(16, "big")).digest()
    return int.from_bytes(digest, "big") >> 1


def is_held_out(hashes: np.ndarray | int, validation_fraction: float) -> np.ndarray | bool:
    """Whether documents of these hashes are among the fraction that is held out."""
    return hashes < validation_fraction * _HASH_RANGE


def read_held_out(path: str | Path) -> Dataset:
    """Held-out documents for evaluation: a file called `validation.parquet` as it is, as a training run leaves it, or
    the validation split that `read_documents` finds in any other data."""
    if Path(path).name == "validation.parquet" and Path(path).is_file():
        return Dataset.from_parquet(str(path))
    return read_documents(path)["validation"]


def _hash_batch(texts: list[str | None], seed: int) -> dict[str, list[int]]:
    return {
        "key": [document_hash(text or "", seed) for text in texts],
        "num_bytes": [len(text.encode()) if text and not text.isspace() else 0 for text in texts],
    }


def _hashes(documents: Dataset, key: str, seed: int) -> dict[str, np.ndarray]:
    """Per document: `key`, its hash; and `num_bytes`, 0 without text."""
    if not len(documents):  # `map` would give back its input's columns
        return {name: np.zeros(0, dtype=np.int64) for name in ("key", "num_bytes")}
    hashed = documents.map(
        _hash_batch,
        batched=True,
        input_columns="text",
        remove_columns=documents.column_names,
        fn_kwargs={"seed": seed},
        features=Features({"key": Value("int64"), "num_bytes": Value("int64")}),
        cache_file_name=cache_file(key_of(key, seed), "hashes"),
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


def _nothing_left(domain: str, split: str, candidates: int, cap: int | None, place: str) -> str:
    if candidates:
        return (
            f"max_{split}_bytes_per_domain (in a recipe max_{split}_bytes) must hold at least one document of every "
            f"domain; got {cap}, and each of the {candidates} of {domain} is larger"
        )
    return f"every domain must have a document with text in {split}; got none for {domain} in {place}"
