"""The corpus: what `data` names, a recipe or a folder, opened: documents of every domain, and those held out."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets

from ..configuration import DataSettings, DomainSource, Recipe, parse_recipe
from .documents import DomainDocuments, Gathered, choose_documents, gather_folder
from .keys import key_of
from .order import SAMPLE, generator
from .sources import (
    build_packages,
    by_split,
    check_column,
    load_files,
    load_hub,
    matching_files,
    open_hub,
    package_files,
    stated_files,
    stream_files,
)
from .streams import TextStream

# What is held out of a domain that streams, where nothing says how much.
STREAM_VALIDATION_BYTES = 1_000_000


class Corpus:
    """The text of every domain; from `open_corpus`.

    Args:
        documents: Domain -> its documents, for domains that are on disk.
        streams: Domain -> its stream, for domains that are read as they are needed.
        weights: Domain -> its share of the blocks drawn; None is in proportion to their numbers of blocks.
        described: Domain -> its source and the key of its content.
        seed: Which texts a sample takes.
    """

    def __init__(
        self,
        documents: dict[str, DomainDocuments],
        streams: dict[str, TextStream],
        weights: dict[str, float] | None,
        described: dict[str, dict[str, Any]],
        seed: int,
    ) -> None:
        self.documents, self.streams, self.weights = documents, streams, weights
        self.domains = sorted([*documents, *streams])
        self._described, self._seed = described, seed

    @cached_property
    def held_out(self) -> Dataset:
        """The held-out documents, columns `text` and `domain`, domain by domain. Of a domain that streams, they are
        collected from its beginning when this is first asked for.

        Raises:
            ValueError: a stream holds none.
        """
        parts = []
        for name in self.domains:
            if name in self.documents:
                parts.append(self.documents[name].held_out)
            else:
                texts = self.streams[name].held_out
                parts.append(Dataset.from_dict({"text": texts, "domain": [name] * len(texts)}))
        return concatenate_datasets(parts)

    def sample_texts(self, max_bytes: int = 20_000_000) -> Iterator[str]:
        """Yields about `max_bytes` UTF-8 bytes of training text, as many from each domain, to train a tokenizer on.

        A domain with less than its share gives all it has; one that streams gives what it begins with.
        """
        share = max_bytes // len(self.domains)
        for number, name in enumerate(self.domains):
            left = share
            for text in self._texts(number, name):
                num_bytes = len(text.encode())
                if num_bytes <= left:
                    left -= num_bytes
                    yield text
                if left < 1_000:  # nothing but crumbs would still fit: do not read the whole domain for them
                    break

    def _texts(self, number: int, name: str) -> Iterator[str]:
        if name in self.streams:
            yield from self.streams[name].training_texts()
            return
        train = self.documents[name].train
        for index in generator(self._seed, SAMPLE, number).permutation(len(train)):
            yield train[int(index)]["text"]

    def description(self) -> dict[str, Any]:
        """What the corpus is, JSON-able, domain by domain: `source`, `key` (of its content, and of what is held out;
        of a stream of files, of their sizes and ends), `weight` (None where the number of blocks decides), and for
        domains on disk the `documents`, `bytes`, `held_out_documents` and `held_out_bytes`."""
        record: dict[str, Any] = {}
        for name in self.domains:
            record[name] = self._described[name] | {"weight": None if self.weights is None else self.weights[name]}
            if name in self.documents:
                documents = self.documents[name]
                record[name] |= {
                    "documents": len(documents.train),
                    "bytes": documents.train_bytes,
                    "held_out_documents": len(documents.held_out),
                    "held_out_bytes": documents.held_out_bytes,
                }
        return record


def description_differences(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """In words, how two descriptions of a corpus differ in what a run trains on; where the text lies is no difference.

    Empty if a run of the one can go on with the other.
    """
    found = []
    for name in sorted({*stored, *current}):
        if name not in stored or name not in current:
            found.append(f"the domain {name} is {'gone' if name in stored else 'new'}")
            continue
        for field in ("key", "weight"):
            if stored[name][field] != current[name][field]:
                what = "text of" if field == "key" else "weight of"
                found.append(f"the {what} {name} was {stored[name][field]} and is {current[name][field]}")
    return found


def open_corpus(settings: DataSettings, seed: int) -> Corpus:
    """Opens the corpus that `settings.data` names: a recipe (`.yaml`, `.yml`), or what `read_documents` reads.

    What is held out does not depend on `seed`, so that runs of several seeds are measured on the same text.

    Args:
        settings: Their `text_column`, `validation_fraction` and byte limits hold for every domain of a recipe that
            does not say otherwise.
        seed: Which texts `sample_texts` takes.

    Raises:
        ValueError: the recipe is wrong (see `parse_recipe`), or a domain's text cannot be read (see
            `read_documents`); the message names the recipe and the domain.
    """
    assert settings.data is not None
    if Path(settings.data).suffix in (".yaml", ".yml"):
        return _open_recipe(parse_recipe(settings.data), settings, seed)
    gathered = gather_folder(
        settings.data,
        text_column=settings.text_column,
        domain_column=settings.domain_column,
        validation_fraction=settings.validation_fraction,
        max_bytes={
            "train": settings.max_train_bytes_per_domain,
            "validation": settings.max_validation_bytes_per_domain,
        },
    )
    documents = choose_documents(gathered)
    described = {
        name: {"source": {"data": settings.data}, "key": _documents_key(domain)} for name, domain in documents.items()
    }
    return Corpus(documents, {}, None, described, seed)


def _open_recipe(recipe: Recipe, settings: DataSettings, seed: int) -> Corpus:
    gathered: list[Gathered] = []
    streams: dict[str, TextStream] = {}
    described: dict[str, dict[str, Any]] = {}
    packages = [source.package for source in recipe.domains.values() if source.package is not None]
    try:
        build_packages(packages, recipe.package_folder)
    except ValueError as error:
        raise ValueError(f"{recipe.path}: the domains {packages}: {error}") from error
    for name, source in recipe.domains.items():
        described[name] = {"source": source.described()}
        try:
            if source.streaming:
                streams[name], described[name]["key"] = _open_stream(recipe, name, source, settings)
            else:
                gathered.append(_gather(recipe, name, source, settings))
        except ValueError as error:
            raise ValueError(f"{recipe.path}: domain {name}: {error}") from error
    try:
        documents = choose_documents(gathered) if gathered else {}
    except ValueError as error:
        raise ValueError(f"{recipe.path}: {error}") from error
    for name, domain in documents.items():
        described[name]["key"] = _documents_key(domain)
    weights = {name: source.weight for name, source in recipe.domains.items() if source.weight is not None}
    return Corpus(documents, streams, weights or None, described, seed)


def _documents_key(domain: DomainDocuments) -> str:
    return key_of(domain.key, domain.held_out_key)


def _gather(recipe: Recipe, name: str, source: DomainSource, settings: DataSettings) -> Gathered:
    text_column = source.text_column or settings.text_column
    if source.hub is not None:
        loaded = {"train": load_hub(source, source.split, text_column, name)}
        if source.validation_split:
            loaded["validation"] = load_hub(source, source.validation_split, text_column, name)
    else:
        if source.package is not None:
            files = by_split(package_files(source.package, recipe.package_folder))
        else:
            files = _split_files(source)
        loaded = {
            split: load_files(of_split, text_column, settings.domain_column, name)
            for split, of_split in files.items()
            if of_split
        }
    return Gathered(
        name=name,
        place=str(recipe.path),
        loaded=loaded,
        validation_fraction=source.validation_fraction or settings.validation_fraction,
        max_bytes={
            "train": source.max_train_bytes or settings.max_train_bytes_per_domain,
            "validation": source.max_validation_bytes or settings.max_validation_bytes_per_domain,
        },
    )


def _split_files(source: DomainSource) -> dict[str, list[Path]]:
    files = matching_files(source.files, "files")
    if source.validation_files:
        held_out = matching_files(source.validation_files, "validation_files")
        return {"train": [file for file in files if file not in held_out], "validation": held_out}
    return {"train": files, "validation": []} if source.validation_fraction else by_split(files)


def _open_stream(recipe: Recipe, name: str, source: DomainSource, settings: DataSettings) -> tuple[TextStream, str]:
    text_column = source.text_column or settings.text_column
    validation: IterableDataset | None = None
    if source.hub is not None:
        opened, key = open_hub(source, source.split)
        assert isinstance(opened, IterableDataset)
        dataset = opened
        check_column(dataset.column_names, text_column, source.hub)
        if source.validation_split:
            held_out, held_out_key = open_hub(source, source.validation_split)
            assert isinstance(held_out, IterableDataset)
            validation, key = held_out, key_of(key, held_out_key)
    else:
        files = _split_files(source)
        if {file.suffix for of_split in files.values() for file in of_split} == {".txt"}:
            text_column = "text"
        dataset = stream_files(files["train"], text_column)
        key = stated_files(files["train"])
        if files["validation"]:
            validation = stream_files(files["validation"], text_column)
            key = key_of(key, stated_files(files["validation"]))
    stream = TextStream(
        name=name,
        place=str(recipe.path),
        dataset=dataset,
        text_column=text_column,
        validation=validation,
        validation_fraction=source.validation_fraction or settings.validation_fraction,
        max_train_bytes=source.max_train_bytes or settings.max_train_bytes_per_domain,
        max_validation_bytes=(
            source.max_validation_bytes or settings.max_validation_bytes_per_domain or STREAM_VALIDATION_BYTES
        ),
    )
    limits = [stream.validation_fraction, stream.max_train_bytes, stream.max_validation_bytes, text_column]
    return stream, key_of(key, limits)
