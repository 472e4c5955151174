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


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed_and_stays(tmp_path: Path, there: bool) -> None:
    """Links lead to another disk, with room: the temporary files must be there too, and the link must not be lost."""
    (tmp_path / "disk").mkdir()
    place = tmp_path / "disk" / "model"
    if there:
        place.mkdir()
    (tmp_path / "model").symlink_to(place)

    def write(folder: Path) -> None:
        assert folder.parent == place.parent
        folder.mkdir()
        (folder / "weights").write_text("all")

    assert write_whole(tmp_path / "model", write) == tmp_path / "model"
    assert (tmp_path / "model").readlink() == place
    assert [path.name for path in place.iterdir()] == ["weights"]
    assert {path.name for path in (*tmp_path.iterdir(), *place.parent.iterdir())} == {"disk", "model"}


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.mkdir()
        (path / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "model", half)
    assert list(tmp_path.iterdir()) == []
