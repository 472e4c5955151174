"""Files are there whole or not at all."""

from pathlib import Path

import pytest

from equipoise.data import write_whole


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    write_whole(tmp_path / "new" / "metrics.json", lambda path: path.write_text("old"))

    def half(path: Path) -> None:
        path.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "new" / "metrics.json", half)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["metrics.json"]
    assert (tmp_path / "new" / "metrics.json").read_text() == "old"


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.mkdir()
        (path / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "model", half)
    assert list(tmp_path.iterdir()) == []
