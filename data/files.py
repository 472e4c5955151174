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
        path: Where it shall be. Folders on the way are made.
        write: Called with the temporary path. If it fails, nothing of it stays, and what was at `path` is untouched.

    Returns:
        `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        if path.is_dir():  # a folder cannot be replaced in one go
            path.replace(path.with_name(f".{path.name}.{os.getpid()}.old"))
        temporary.replace(path)
        shutil.rmtree(path.with_name(f".{path.name}.{os.getpid()}.old"), ignore_errors=True)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, record: dict[str, Any]) -> Path:
    """Writes one record as an indented JSON file, whole or not at all."""
    return write_whole(path, lambda file: file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8"))
