"""Files that are there whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Writes a file or a folder under a temporary name beside its place, then renames it.

    Args:
        path: Where it shall be. Folders on the way are made. A symbolic link is followed, and stays.
        write: Called with the temporary path. If it fails, nothing of it stays, and what was at `path` is untouched.

    Returns:
        `path`.
    """
    path = Path(path)
    place = path.resolve()  # renaming would put the link away, on whichever disk that is
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        write(temporary)
        if place.is_dir():  # a folder cannot be replaced in one go
            place.replace(place.with_name(f".{place.name}.{os.getpid()}.old"))
        temporary.replace(place)
        shutil.rmtree(place.with_name(f".{place.name}.{os.getpid()}.old"), ignore_errors=True)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, record: dict[str, Any]) -> Path:
    """Writes one record as an indented JSON file, whole or not at all."""
    return write_whole(path, lambda file: file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8"))
