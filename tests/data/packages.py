"""Small real packages, and clients of registries that only copy them: for tests that must not use a network."""

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any


def _tar(file: Path, mode: Any, content: dict[str, bytes], top: str) -> Path:
    with tarfile.open(file, mode) as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(top + name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file


def deb(file: Path, name: str, version: str, content: dict[str, bytes], top: str = "./") -> Path:
    """A Debian package: an `ar` archive of a version, the metadata and the files."""
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@b>\nDescription: test\n"
    parts = {"debian-binary": b"2.0\n"}
    for part, files, beginning in (("control", {"control": control.encode()}, "./"), ("data", content, top)):
        packed = _tar(file.with_suffix(f".{part}"), "w:xz", files, beginning)
        parts[f"{part}.tar.xz"] = packed.read_bytes()
        packed.unlink()
    with file.open("wb") as stream:
        stream.write(b"!<arch>\n")
        for part, data in parts.items():
            stream.write(f"{part:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode())
            stream.write(data + b"\n" * (len(data) % 2))
    return file


def npm(file: Path, name: str, version: str, content: dict[str, bytes], top: str = "package/") -> Path:
    """An npm package: its files under `package/`, package.json among them."""
    described = {"package/package.json": json.dumps({"name": name, "version": version}).encode()}
    return _tar(file, "w:gz", described | {top + path: data for path, data in content.items()}, "")


def wheel(file: Path, name: str, version: str, content: dict[str, bytes], top: str = "") -> Path:
    """A wheel, without metadata."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        for path, data in content.items():
            zipped.writestr(top + path, data)
    return file


# Called as `client ... NAME`, in the folder to write to.
_CLIENT = """
import pathlib, shutil, sys
registry, folder, name = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[-1]
with (folder / "asked").open("a") as asked:
    asked.write(name + "\\n")
stem = name.replace("/", "-").lstrip("@")
found = [f for f in (folder / registry).glob("*") if f.name.startswith((stem + "_", stem + "-1", stem + "."))]
if not found:
    words = {"apt": "E: Unable to locate package ", "npm": "npm error code E404 ", "pip": "ERROR: No matching "}
    sys.exit("something else first\\n" + words[registry] + name)
shutil.copy(found[0], ".")
"""


class FakeRegistries:
    """The registries that a test's packages are published in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "client.py").write_text(_CLIENT, encoding="utf-8")

    def client(self, registry: str) -> list[str]:
        return [sys.executable, str(self.folder / "client.py"), registry, str(self.folder)]

    def publish(self, registry: str, name: str, content: dict[str, bytes], version: str = "1.0", **top: str) -> Path:
        stem = name.replace("/", "-").lstrip("@")
        (self.folder / registry).mkdir(exist_ok=True)
        make, file = {
            "apt": (deb, f"{stem}_{version}_all.deb"),
            "npm": (npm, f"{stem}-{version}.tgz"),
            "pip": (wheel, f"{stem}-{version}-py3-none-any.whl"),
        }[registry]
        return make(self.folder / registry / file, name, version, content, **top)

    def withdraw(self, registry: str) -> None:
        for file in (self.folder / registry).iterdir():
            file.unlink()

    def asked(self) -> list[str]:
        """The names that clients were asked for, in order."""
        file = self.folder / "asked"
        return file.read_text(encoding="utf-8").split() if file.exists() else []
