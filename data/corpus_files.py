"""From document groups to a domain's files: gather, hold out, drop copies, write. What every built corpus shares."""

import hashlib
import heapq
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from .cleaning import is_copy, long_lines, normalised


@dataclass(frozen=True)
class Group:
    """Documents that must stay in one split: they come from one file, or one section of a long one."""

    source: str  # where from, relative: site-packages/..., stdlib/..., reasoning-gym/..., apt:hol-light/...
    package: str  # whose licence holds
    texts: list[str]


Splits = tuple[list[Group], list[Group]]
"""Train and validation."""


def seeded(seed: int, name: str) -> int:
    """A number of 63 bits that is a pure function of seed and name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "big") >> 1


def num_bytes(groups: list[Group]) -> int:
    """Bytes of UTF-8 text."""
    return sum(len(text.encode()) for group in groups for text in group.texts)


def check_limits(max_bytes_per_domain: int, min_bytes_per_domain: int, validation_bytes_per_domain: int) -> None:
    """Raises a ValueError that names the limit that is out of its range."""
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


def check_enough(domain: str, splits: Splits, min_bytes: int, validation_bytes: int) -> None:
    """Raises a ValueError where the domain has too few bytes in train or none in validation."""
    train, validation = splits
    if num_bytes(train) < min_bytes:
        raise ValueError(
            f"min_bytes_per_domain must be at most what there is of every domain; got "
            f"{min_bytes}, and {domain} has {num_bytes(train)} bytes of train text"
        )
    if not validation:
        raise ValueError(
            f"validation_bytes_per_domain must hold at least one document group of every domain; "
            f"got {validation_bytes}, too few for {domain}"
        )


def in_turns(sources: dict[str, Iterator[Group]]) -> Iterator[Group]:
    """All groups; next is always the source that has given fewest bytes so far."""
    turns = [(0, name) for name in sorted(sources)]
    while turns:
        given, name = heapq.heappop(turns)
        group = next(sources[name], None)
        if group is not None:
            yield group
            heapq.heappush(turns, (given + num_bytes([group]), name))


def gather(name: str, sources: dict[str, Iterator[Group]], seen: set[bytes], max_bytes: int) -> list[Group]:
    """Groups of a domain, in turns over its sources, until they hold `max_bytes`.

    Args:
        name: The domain's, for the progress bar.
        seen: Digests of the texts taken so far; a text that stands there is passed over, one taken is added.
    """
    gathered, total = [], 0
    with tqdm(total=max_bytes, desc=f"Gathering {name}", unit="B", unit_scale=True) as progress:
        for group in in_turns(sources):
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


def split_groups(groups: list[Group], validation_bytes: int, seed: int) -> Splits:
    """Train and validation, each whole groups: those of the smallest hash are held out until the bytes are used."""
    held_out, left = set(), validation_bytes
    for group in sorted(groups, key=lambda group: seeded(seed + 1, group.source)):
        size = num_bytes([group])
        # A large file would be the whole validation split, which must show the domain's variety.
        if size <= min(left, validation_bytes // 4):
            held_out.add(group.source)
            left -= size
    return (
        [group for group in groups if group.source not in held_out],
        [group for group in groups if group.source in held_out],
    )


def drop_copies(splits: dict[str, Splits], templated: Container[str] = ()) -> None:
    """Removes, in place, documents that stand in the other split too.

    Train loses each document half of whose long lines stand in validation: there is more of it. What is left of
    train may still hold, within a longer document, most of a short held-out one: that one is then dropped from
    validation.

    Args:
        splits: Domain -> its splits; the lines of all of them are compared.
        templated: Domains whose documents share their long lines whatever they say; they are left as they are.
    """
    written = [domain for domain in splits if domain not in templated]
    for side, other in ((0, 1), (1, 0)):
        lines = long_lines(text for domain in written for group in splits[domain][other] for text in group.texts)
        for domain in written:
            kept = [
                Group(group.source, group.package, [text for text in group.texts if not is_copy(text, lines)])
                for group in splits[domain][side]
            ]
            left = [group for group in kept if group.texts]
            splits[domain] = (left, splits[domain][1]) if side == 0 else (splits[domain][0], left)


def write_domain(
    folder: Path, domain: str, description: str, splits: Splits, licence: Callable[[str], str]
) -> dict[str, Any]:
    """Writes `folder/{train,validation}.parquet`, columns `text`, `domain` and `source`.

    Returns:
        The domain's entry in a manifest: its description, its sources (packages, with licence and bytes) and each
        split's documents, bytes and SHA-256.
    """
    folder.mkdir(parents=True)
    written = {}
    for split, groups in zip(("train", "validation"), splits, strict=True):
        rows = [{"text": text, "domain": domain, "source": group.source} for group in groups for text in group.texts]
        columns = pa.schema([(name, pa.string()) for name in ("text", "domain", "source")])
        file = folder / f"{split}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=columns), file, compression="zstd")
        written[split] = {"documents": len(rows), "bytes": num_bytes(groups), "sha256": sha256(file)}
    sources = {}
    for package in sorted({group.package for groups in splits for group in groups}):
        of_package = [group for groups in splits for group in groups if group.package == package]
        sources[package] = {"licence": licence(package), "bytes": num_bytes(of_package)}
    return {"description": description, "sources": sources, **written}


def sha256(file: Path) -> str:
    """The file's SHA-256, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
