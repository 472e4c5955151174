"""Lines: the files of a run directory that hold one JSON object a line."""

import json
from pathlib import Path
from typing import Any


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file, in its order.

    Raises:
        ValueError: it is missing, or a line is not valid.
    """
    if not file.is_file():
        raise ValueError(f"{file.name} must be in the run directory; got none at {file}")
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file.name} must hold one JSON object a line; got {line!r} on line {number}") from error
    return records
