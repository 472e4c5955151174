"""Package registries, asked through their own clients: an archive is fetched once, checked and unpacked.

Nothing is installed, and no code of a package runs. What is kept of an archive (name, version, size, SHA-256) stands
beside it, so that a damaged one is noticed and fetched again.
"""

import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from .corpus_files import sha256
from .files import write_json, write_whole

logger = logging.getLogger(__name__)

CLIENTS: dict[str, Sequence[str]] = {
    "apt": ("apt-get",),
    "npm": ("npm",),
    "pip": (sys.executable, "-m", "pip"),
}
"""Registry -> the command that asks it."""

# Run in an empty folder; the package's name follows. A wheel only: pip would run the build of a source package.
_DOWNLOAD = {
    "apt": ("download",),
    "npm": ("pack", "--ignore-scripts", "--loglevel=error"),
    "pip": ("download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest=."),
}
_SUFFIXES = {"apt": (".deb",), "npm": (".tgz",), "pip": (".whl", ".zip", ".tar.gz")}
_HINTS = {
    "apt": "apt must know its packages: if its lists are missing or old, run `apt-get update` first",
    "npm": "npm comes with Node.js; `npm view NAME` tells whether its registry answers",
    "pip": "pip must be in this environment (`python -m ensurepip`) and find a wheel for this Python",
}
_LONGEST_SECONDS = 1_800  # a download that takes longer hangs
_RECORD = "archive.json"
_ERROR_LINE = re.compile(r"E: |ERROR|error|npm (ERR!|error)")
# What the readers of archives raise for one that ends early or was changed on the way.
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError)


class RegistryError(RuntimeError):
    """A package that its client could not fetch."""


class ArchiveError(RuntimeError):
    """An archive that is damaged, or holds what must not be unpacked."""


@dataclass(frozen=True)
class Archive:
    """A package's archive on this machine."""

    path: Path
    registry: str
    name: str
    version: str
    bytes: int
    sha256: str


def download(registry: str, names: Sequence[str], folder: Path) -> Archive:
    """The archive of a package, from `folder` where it was fetched before, else from its registry.

    Args:
        registry: `apt`, `npm` or `pip`.
        names: The package's names, the first that the registry has is taken. One fetched before comes first.
        folder: Holds `<registry>/<name>/`, each whole or not at all.

    Raises:
        RegistryError: The client is missing, or could fetch none of the names; says why for each.
    """
    for name in names:
        if (archive := _kept(registry, name, folder)) is not None:
            return archive
    reasons = []
    for name in names:
        try:
            write_whole(_place(registry, name, folder), partial(_fetch, registry, name))
        except RegistryError as error:
            reasons.append(str(error))
            continue
        archive = _kept(registry, name, folder)
        assert archive is not None
        return archive
    raise RegistryError("; ".join(reasons) + f" ({_HINTS[registry]})")


def discard(archive: Archive) -> None:
    """Removes a fetched archive, so that it is fetched again."""
    shutil.rmtree(archive.path.parent)


def unpack(archive: Archive, folder: Path, wanted: Callable[[str], bool]) -> int:
    """Writes an archive's wanted files under `folder`.

    Only regular files are written: a link, which could lead out of `folder`, is neither made nor followed.

    Args:
        wanted: Called with a file's path inside the archive (`usr/share/...`, `package/...`).

    Returns:
        How many files were written.

    Raises:
        ArchiveError: It is damaged, or a path in it leads out of `folder`; `folder` may then hold some files.
    """
    written = 0
    try:
        with _members(archive) as members:
            for name, content in members:
                place = PurePosixPath(name)
                if place.is_absolute() or ".." in place.parts:
                    raise ArchiveError(f"{archive.path.name} holds {name!r}, a path that leads out of its folder")
                if content is not None and wanted(str(place)):
                    file = folder / place
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with content() as source, file.open("wb") as target:
                        shutil.copyfileobj(source, target)
                    written += 1
    except _BROKEN as error:
        raise ArchiveError(f"{archive.path.name} is damaged: {error or type(error).__name__}") from error
    return written


def _place(registry: str, name: str, folder: Path) -> Path:
    return folder / registry / name.replace("/", "+")


def _kept(registry: str, name: str, folder: Path) -> Archive | None:
    """The archive fetched before; None, and removed, where it is not as it was."""
    place = _place(registry, name, folder)
    if not place.exists():
        return None
    try:
        record = json.loads((place / _RECORD).read_text(encoding="utf-8"))
        archive = Archive(**{**record, "path": place / record["path"]})
        if archive.path.stat().st_size == archive.bytes and sha256(archive.path) == archive.sha256:
            return archive
    except (OSError, ValueError, TypeError, KeyError):
        pass
    logger.warning("%s is damaged; fetching %s again", place, name)
    shutil.rmtree(place)
    return None


def _fetch(registry: str, name: str, place: Path) -> None:
    """Has the client write the archive into the new folder `place`, and records it there."""
    place.mkdir()
    _run(registry, name, [*CLIENTS[registry], *_DOWNLOAD[registry], name], place)
    found = [file for file in sorted(place.iterdir()) if file.name.endswith(_SUFFIXES[registry])]
    if len(found) != 1:
        raise RegistryError(f"{registry} wrote {len(found)} archives for {name}; expected one")
    file = found[0]
    # The sandbox user of apt owns what root downloads, and others may then not read it.
    file.chmod(0o644)
    archive = Archive(file, registry, name, _version(registry, name, file), file.stat().st_size, sha256(file))
    write_json(place / _RECORD, {**asdict(archive), "path": file.name})


def _run(registry: str, name: str, command: Sequence[str], place: Path) -> str:
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            command,
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_LONGEST_SECONDS,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise RegistryError(f"{name}: the client {command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise RegistryError(f"{name}: {command[0]} did not finish within {_LONGEST_SECONDS} seconds") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = [line for line in said if _ERROR_LINE.match(line)][:3] or said[-1:] or ["it said nothing"]
        raise RegistryError(f"{name}: {' '.join(command[:-1])} failed: {' / '.join(reason)}")
    return done.stdout


def _version(registry: str, name: str, file: Path) -> str:
    if registry == "apt":
        return _run(registry, name, ["dpkg-deb", "--field", str(file.absolute()), "Version"], file.parent).strip()
    if registry == "pip":  # name-version-...whl, name-version.tar.gz
        return file.name.removesuffix(".tar.gz").removesuffix(".zip").split("-")[1]
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                if re.fullmatch(r"[^/]+/package\.json", member.name) and (content := tar.extractfile(member)):
                    return str(json.load(content)["version"])
    except (*_BROKEN, OSError, ValueError, KeyError) as error:
        raise RegistryError(f"{name}: npm wrote an archive that cannot be read: {error}") from error
    raise RegistryError(f"{name}: npm wrote an archive without package.json")


@contextmanager
def _members(archive: Archive) -> Iterator[Iterator[tuple[str, Callable[[], IO[bytes]] | None]]]:
    """Of each member of an archive its path and, for a regular file, what opens it."""
    if archive.path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive.path) as zipped:
            yield _zip_members(zipped)
    elif archive.path.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(archive.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                    yield _tar_members(tar)
                _read_to_end(process.stdout)  # the padding after the last member
            finally:
                # Closed first: a client that still writes would wait for its reader for ever.
                if process.stdout is not None:
                    process.stdout.close()
                said = process.stderr.read().decode(errors="replace").strip() if process.stderr else ""
            if process.wait():
                raise ArchiveError(f"{archive.path.name} is damaged: {said}")
    else:
        try:
            with tarfile.open(archive.path) as tar:
                yield _tar_members(tar)
                _read_to_end(tar.fileobj)  # to the checksum at the very end
        except OSError as error:  # gzip's own error for a wrong checksum is one
            if error.errno is not None:
                raise
            raise ArchiveError(f"{archive.path.name} is damaged: {error}") from error


def _tar_members(tar: tarfile.TarFile) -> Iterator[tuple[str, Callable[[], IO[bytes]] | None]]:
    for member in tar:

        def content(member: tarfile.TarInfo = member) -> IO[bytes]:
            opened = tar.extractfile(member)
            assert opened is not None
            return opened

        yield member.name, content if member.isreg() else None


def _zip_members(zipped: zipfile.ZipFile) -> Iterator[tuple[str, Callable[[], IO[bytes]] | None]]:
    for member in zipped.infolist():
        kind = stat.S_IFMT(member.external_attr >> 16)
        regular = not member.is_dir() and kind in (0, stat.S_IFREG)
        yield member.filename, partial(zipped.open, member) if regular else None


def _read_to_end(stream: Any) -> None:
    while stream.read(1 << 20):
        pass
