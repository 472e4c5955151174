"""Fetching and unpacking, with real archives built here and clients that only copy them."""

import io
import os
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from equipoise.data import registries
from equipoise.data.registries import ArchiveError, RegistryError, discard, download, unpack
from tests.data.packages import FakeRegistries, deb, npm, wheel


@pytest.mark.parametrize(("registry", "name"), [("apt", "words"), ("npm", "@scope/words"), ("pip", "words")])
def test_package_is_fetched_once_and_its_version_kept(
    registry: str, name: str, fake_registries: FakeRegistries, tmp_path: Path
) -> None:
    fake_registries.publish(registry, name, {"a/b.txt": b"text", "a/c.bin": b"\xff"}, version="1.2")
    archive = download(registry, [name], tmp_path / "kept")
    assert (archive.registry, archive.name, archive.version) == (registry, name, "1.2")
    assert archive.bytes == archive.path.stat().st_size
    assert download(registry, [name], tmp_path / "kept") == archive
    assert fake_registries.asked() == [name]
    assert unpack(archive, tmp_path / "out", lambda path: path.endswith(".txt")) == 1
    (file,) = (file for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert file.read_bytes() == b"text"


@pytest.mark.parametrize("registry", ["apt", "npm", "pip"])
def test_truncated_archive_is_fetched_again(registry: str, fake_registries: FakeRegistries, tmp_path: Path) -> None:
    fake_registries.publish(registry, "words", {"a.txt": b"text" * 1000})
    archive = download(registry, ["words"], tmp_path)
    os.truncate(archive.path, archive.bytes // 2)
    assert download(registry, ["words"], tmp_path) == archive
    assert fake_registries.asked() == ["words", "words"]


@pytest.mark.parametrize("registry", ["apt", "npm", "pip"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_archive_that_ends_early_is_no_archive(
    registry: str, share: float, fake_registries: FakeRegistries, tmp_path: Path
) -> None:
    fake_registries.publish(registry, "words", {f"{n}.bin": os.urandom(5_000) for n in range(9)})
    archive = download(registry, ["words"], tmp_path / "kept")
    os.truncate(archive.path, int(share * archive.bytes))
    with pytest.raises(ArchiveError, match=r"words.* is damaged"):
        unpack(archive, tmp_path / "out", lambda path: True)
    discard(archive)
    assert not archive.path.exists()


def test_wrong_checksum_inside_is_noticed(fake_registries: FakeRegistries, tmp_path: Path) -> None:
    fake_registries.publish("npm", "words", {"a.bin": os.urandom(5_000)})
    archive = download("npm", ["words"], tmp_path / "kept")
    data = bytearray(archive.path.read_bytes())
    data[-6] ^= 1  # in the checksum that ends a gzip file
    archive.path.write_bytes(data)
    with pytest.raises(ArchiveError, match="is damaged"):
        unpack(archive, tmp_path / "out", lambda path: True)


@pytest.mark.parametrize("path", ["../outside.txt", "a/../../outside.txt", "/outside.txt"])
def test_path_out_of_the_folder_is_refused(path: str, fake_registries: FakeRegistries, tmp_path: Path) -> None:
    for registry in ("npm", "pip"):
        fake_registries.publish(registry, "words", {path: b"out"}, top="")
        archive = download(registry, ["words"], tmp_path / "kept")
        with pytest.raises(ArchiveError, match=r"outside\.txt', a path that leads out of its folder"):
            unpack(archive, tmp_path / "deep" / "out", lambda path: True)
    assert not list((tmp_path).glob("**/outside.txt"))
    assert not Path("/outside.txt").exists()


def test_links_are_neither_made_nor_followed(fake_registries: FakeRegistries, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    file = fake_registries.folder / "npm" / "words.tgz"
    file.parent.mkdir(parents=True)
    with tarfile.open(file, "w:gz") as tar:
        for name, kind, target in (
            ("package/link", tarfile.SYMTYPE, str(tmp_path)),
            ("package/secret.txt", tarfile.SYMTYPE, str(tmp_path / "secret")),
            ("package/hard.txt", tarfile.LNKTYPE, "package/package.json"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
        for name, content in (("package/link/in.txt", b"in"), ("package/package.json", b'{"version": "1"}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    archive = download("npm", ["words"], tmp_path / "kept")
    assert unpack(archive, tmp_path / "out", lambda path: True) == 2
    assert not (tmp_path / "in.txt").exists()
    assert (tmp_path / "out/package/link/in.txt").read_bytes() == b"in"
    assert not (tmp_path / "out/package/secret.txt").exists()


def test_link_in_a_wheel_is_left_out(fake_registries: FakeRegistries, tmp_path: Path) -> None:
    file = fake_registries.folder / "pip" / "words-1.0-py3-none-any.whl"
    file.parent.mkdir(parents=True)
    with zipfile.ZipFile(file, "w") as zipped:
        link = zipfile.ZipInfo("words/link.txt")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        zipped.writestr(link, "/etc/hostname")
        zipped.writestr("words/a.txt", "text")
    archive = download("pip", ["words"], tmp_path / "kept")
    assert unpack(archive, tmp_path / "out", lambda path: True) == 1


def test_other_names_are_tried_in_turn(fake_registries: FakeRegistries, tmp_path: Path) -> None:
    fake_registries.publish("apt", "words-2", {"a.txt": b"text"})
    assert download("apt", ["words-1", "words-2", "words-3"], tmp_path).name == "words-2"
    assert fake_registries.asked() == ["words-1", "words-2"]
    assert download("apt", ["words-1", "words-2", "words-3"], tmp_path).name == "words-2"
    assert fake_registries.asked() == ["words-1", "words-2"], "the one at hand comes first"


def test_errors_say_which_client_which_package_and_why(
    fake_registries: FakeRegistries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        RegistryError, match=r"nothing-1: .*E: Unable to locate package nothing-1; nothing-2: .*update"
    ):
        download("apt", ["nothing-1", "nothing-2"], tmp_path)
    with pytest.raises(RegistryError, match=r"nothing: .* pack .*npm error code E404"):
        download("npm", ["nothing"], tmp_path)
    monkeypatch.setitem(registries.CLIENTS, "npm", ["no-such-client"])
    with pytest.raises(RegistryError, match="nothing: the client no-such-client is not installed"):
        download("npm", ["nothing"], tmp_path)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and "kept" in file.parts]


def test_client_that_writes_nothing_or_hangs(
    fake_registries: FakeRegistries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registries.CLIENTS, "npm", ["true"])
    with pytest.raises(RegistryError, match="npm wrote 0 archives for words; expected one"):
        download("npm", ["words"], tmp_path)
    monkeypatch.setitem(registries.CLIENTS, "npm", ["sh", "-c", "sleep 30"])
    monkeypatch.setattr(registries, "_LONGEST_SECONDS", 0.1)
    with pytest.raises(RegistryError, match=r"words: sh did not finish within 0\.1 seconds"):
        download("npm", ["words"], tmp_path)


def test_archives_of_this_file_are_real(tmp_path: Path) -> None:
    content = {"a/b.txt": b"text"}
    listed = subprocess.run(
        ["dpkg-deb", "--contents", deb(tmp_path / "x.deb", "x", "1", content)], capture_output=True, text=True
    )
    assert "./a/b.txt" in listed.stdout
    assert tarfile.is_tarfile(npm(tmp_path / "x.tgz", "x", "1", content))
    assert zipfile.is_zipfile(wheel(tmp_path / "x-1-py3-none-any.whl", "x", "1", content))
