"""The embedded corpus: six domains made of what the installation itself brought along, without a download.

Gather each domain up to a limit, hold out whole files by a seeded hash, drop what stands in both splits, write
parquet and a manifest. The same installation and arguments give the same bytes.
"""

import json
import logging
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .corpus_files import Group, check_enough, check_limits, drop_copies, gather, split_groups, write_domain
from .embedded_sources import DOMAINS, Installation
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
    check_limits(max_bytes_per_domain, min_bytes_per_domain, validation_bytes_per_domain)
    limits = {
        "max_bytes_per_domain": max_bytes_per_domain,
        "min_bytes_per_domain": min_bytes_per_domain,
        "validation_bytes_per_domain": validation_bytes_per_domain,
    }
    arguments = {"domains": sorted(domains), **limits, "seed": seed}
    finished = _finished(output, arguments)
    if finished is not None:
        logger.warning("%s already holds this corpus; nothing to build", output)
        return finished

    installation = Installation.here()
    groups: dict[str, list[Group]] = {}
    seen: set[bytes] = set()
    for domain in sorted(domains):
        sources = DOMAINS[domain].sources(installation, seed)
        groups[domain] = gather(domain, sources, seen, max_bytes_per_domain + validation_bytes_per_domain)
    splits = {domain: split_groups(gathered, validation_bytes_per_domain, seed) for domain, gathered in groups.items()}
    drop_copies(splits, templated=[domain for domain in domains if DOMAINS[domain].templated])
    for domain in splits:
        check_enough(domain, splits[domain], min_bytes_per_domain, validation_bytes_per_domain)

    manifest: dict[str, Any] = {
        "arguments": arguments,
        "versions": _versions(installation, groups),
        "skipped_not_utf8": installation.skipped_not_utf8,
    }

    def write(folder: Path) -> None:
        manifest["domains"] = {
            domain: write_domain(
                folder / domain,
                domain,
                DOMAINS[domain].description,
                splits[domain],
                lambda package: _licence(installation, package),
            )
            for domain in splits
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
