"""The embedded corpus: six domains made of what the installation itself brought along, without a download.

Gather each domain up to a limit, hold out whole files by a seeded hash, drop from train what stands in
validation, write parquet and a manifest. The same installation and arguments give the same bytes.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from .cleaning import is_copy, long_lines, normalised
from .embedded_sources import DOMAINS, Domain, Group, Installation, in_turns, seeded
from .files import write_json, write_whole

logger = logging.getLogger(__name__)
_MANIFEST = "manifest.json"


def build_embedded_corpus(
    output: str | Path,
    *,
    domains: Sequence[str] = tuple(DOMAINS),
    max_bytes_per_domain: int = 5_000_000,
    min_bytes_per_domain: int = 2_000_000,
    validation_bytes_per_domain: int = 150_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Builds `<output>/<domain>/{train,validation}.parquet` (columns `text`, `domain`, `source`) and `manifest.json`.

    Args:
        output: A folder that does not exist or is empty. A corpus finished with the same arguments is left
            as it is. The folder appears whole or not at all.
        domains: Which of the recipe's domains to build.
        max_bytes_per_domain: Most bytes of UTF-8 text in a domain's train split.
        min_bytes_per_domain: Fewest; an installation that has less of a domain cannot teach it.
        validation_bytes_per_domain: Most bytes of a domain's validation split, which is filled first.
        seed: Which files and items are taken, and which of them are held out.

    Returns:
        The manifest: arguments, versions, and per domain its description, its sources (packages, with licence and
        bytes; the `source` column names the file) and each split's documents, bytes and SHA-256.

    Raises:
        ValueError: `output` holds something else; a domain is unknown, or has too few bytes in train or none in
            validation; a number is out of its range.
        ImportError: reasoning-gym, which writes the mathematics and the puzzles, is not installed.
    """
    output = Path(output)
    unknown = sorted(set(domains) - set(DOMAINS))
    if unknown or not domains:
        raise ValueError(f"domains must be some of {list(DOMAINS)}; got {list(domains)}")
    limits = {
        "max_bytes_per_domain": max_bytes_per_domain,
        "min_bytes_per_domain": min_bytes_per_domain,
        "validation_bytes_per_domain": validation_bytes_per_domain,
    }
    for name, value in limits.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if min_bytes_per_domain > max_bytes_per_domain:
        raise ValueError(
            f"min_bytes_per_domain must be at most max_bytes_per_domain ({max_bytes_per_domain}); "
            f"got {min_bytes_per_domain}"
        )
    arguments = {"domains": sorted(domains), **limits, "seed": seed}
    finished = _finished(output, arguments)
    if finished is not None:
        logger.warning("%s already holds this corpus; nothing to build", output)
        return finished

    installation = Installation.here()
    groups: dict[str, list[Group]] = {}
    seen: set[bytes] = set()
    for domain in sorted(domains):
        groups[domain] = _gather(
            domain, DOMAINS[domain], installation, seen, seed, max_bytes_per_domain + validation_bytes_per_domain
        )
    splits = {domain: _split(gathered, validation_bytes_per_domain, seed) for domain, gathered in groups.items()}
    _drop_copies(splits)
    for domain, (train, validation) in splits.items():
        if _num_bytes(train) < min_bytes_per_domain:
            raise ValueError(
                f"min_bytes_per_domain must be at most what the installation holds of every domain; got "
                f"{min_bytes_per_domain}, and {domain} has {_num_bytes(train)} bytes of train text"
            )
        if not validation:
            raise ValueError(
                f"validation_bytes_per_domain must hold at least one document group of every domain; "
                f"got {validation_bytes_per_domain}, too few for {domain}"
            )

    manifest: dict[str, Any] = {
        "arguments": arguments,
        "versions": _versions(installation, groups),
        "skipped_not_utf8": installation.skipped_not_utf8,
    }

    def write(folder: Path) -> None:
        manifest["domains"] = {
            domain: _write(folder / domain, domain, installation, *splits[domain]) for domain in splits
        }
        write_json(folder / _MANIFEST, manifest)

    write_whole(output, write)
    return manifest


def _finished(output: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the corpus that `output` already holds; None where there is nothing yet."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    manifest_file = output / _MANIFEST
    if not manifest_file.is_file():
        raise ValueError(f"output must be a folder that does not exist or is empty; got {output}, which is not")
    manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
    if manifest.get("arguments") != arguments:
        raise ValueError(
            f"output must be empty or hold a corpus built with the same arguments ({arguments}); "
            f"got {output}, built with {manifest.get('arguments')}"
        )
    return manifest


def _gather(
    name: str, domain: Domain, installation: Installation, seen: set[bytes], seed: int, max_bytes: int
) -> list[Group]:
    """Groups of the domain, in turns over its sources, until they hold `max_bytes`; no text twice."""
    gathered, total = [], 0
    with tqdm(total=max_bytes, desc=f"Gathering {name}", unit="B", unit_scale=True) as progress:
        for group in in_turns(domain.sources(installation, seed)):
            texts = []
            for text in group.texts:
                digest = hashlib.blake2b(normalised(text).encode(), digest_size=16).digest()
                size = len(text.encode())
                if digest not in seen and total + size <= max_bytes:
                    seen.add(digest)
                    texts.append(text)
                    total += size
                    progress.update(size)
            if texts:
                gathered.append(Group(group.source, group.package, texts))
            if total > 0.999 * max_bytes:  # only crumbs would still fit
                break
    return gathered


def _split(groups: list[Group], validation_bytes: int, seed: int) -> tuple[list[Group], list[Group]]:
    """Train and validation, each whole groups: those of the smallest hash are held out until the bytes are used."""
    held_out, left = set(), validation_bytes
    for group in sorted(groups, key=lambda group: seeded(seed + 1, group.source)):
        size = _num_bytes([group])
        # A large file would be the whole validation split, which must show the domain's variety.
        if size <= min(left, validation_bytes // 4):
            held_out.add(group.source)
            left -= size
    return (
        [group for group in groups if group.source not in held_out],
        [group for group in groups if group.source in held_out],
    )


def _drop_copies(splits: dict[str, tuple[list[Group], list[Group]]]) -> None:
    """Removes from train, in place, each document half of whose long lines stand in any validation split."""
    lines = long_lines(
        text
        for domain, (_, validation) in splits.items()
        if not DOMAINS[domain].templated
        for group in validation
        for text in group.texts
    )
    for domain, (train, validation) in splits.items():
        if not DOMAINS[domain].templated:
            kept = [
                Group(group.source, group.package, [text for text in group.texts if not is_copy(text, lines)])
                for group in train
            ]
            splits[domain] = ([group for group in kept if group.texts], validation)


def _write(
    folder: Path, domain: str, installation: Installation, train: list[Group], validation: list[Group]
) -> dict[str, Any]:
    """Writes the domain's two files; returns its entry in the manifest."""
    folder.mkdir(parents=True)
    splits = {}
    for split, groups in (("train", train), ("validation", validation)):
        rows = [{"text": text, "domain": domain, "source": group.source} for group in groups for text in group.texts]
        columns = pa.schema([(name, pa.string()) for name in ("text", "domain", "source")])
        file = folder / f"{split}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=columns), file, compression="zstd")
        splits[split] = {
            "documents": len(rows),
            "bytes": _num_bytes(groups),
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
    sources = {}
    for package in sorted({group.package for group in train + validation}):
        of_package = [group for group in train + validation if group.package == package]
        sources[package] = {"licence": _licence(installation, package), "bytes": _num_bytes(of_package)}
    return {"description": DOMAINS[domain].description, "sources": sources, **splits}


def _licence(installation: Installation, package: str) -> str:
    """The licence that a package's own metadata state."""
    if package not in installation.distributions:
        return "PSF-2.0; Unicode-3.0 for the character table"  # the standard library
    stated = installation.distributions[package].metadata
    expression = stated.get_all("License-Expression", [])
    classified = [line.rsplit(" :: ", 1)[-1] for line in stated.get_all("Classifier", []) if "License ::" in line]
    # Some packages put the licence's whole text into the oldest field: its first line names it.
    named = [text.strip().splitlines()[0] for text in stated.get_all("License", []) if text.strip()]
    return "; ".join(expression or classified or named) or "not stated"


def _versions(installation: Installation, groups: dict[str, list[Group]]) -> dict[str, str]:
    packages = {group.package for gathered in groups.values() for group in gathered} | {"pyarrow"}
    versions = {name: d.version for name, d in sorted(installation.distributions.items()) if name in packages}
    return {"python": platform.python_version(), **versions}


def _num_bytes(groups: list[Group]) -> int:
    return sum(len(text.encode()) for group in groups for text in group.texts)
