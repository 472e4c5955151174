"""The run directory: one training run is one folder that anyone can zip and understand."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..configuration import RunSettings


class RunDirectory:
    """Where a run keeps what it makes.

    ```
    settings.yaml        every setting of the run; `scripts/train.py settings.yaml --output_dir NEW` repeats it
    tokenizer/           the tokenizer the text was cut with
    validation.parquet   the held-out documents (text, domain)
    metrics.jsonl        one line per logging step
    load.jsonl           one line per logging step: selections of each expert in one global batch, by layer
    training.json        what the run was and cost
    model/               weights, configuration and tokenizer, for `from_pretrained`
    ```

    Evaluation adds `evaluation.json`, analysis the folder `analysis/`, and the summary of all three `summary.json`.

    Args:
        path: the folder.

    Raises:
        ValueError: the folder already holds something.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"output_dir must be new or empty, a run is never overwritten; got {self.path}")
        self.preparation = self.path.absolute().with_name(f".{self.path.name}.preparing")
        """Where the run directory is put together before training starts."""

    @contextmanager
    def prepared(self, settings: RunSettings) -> Iterator[None]:
        """Put the run directory together beside its place; when the block ends well it is moved there, else removed.

        So a run that was refused leaves nothing behind, and can be started again under the same name.
        """
        shutil.rmtree(self.preparation, ignore_errors=True)  # left by a process that was killed
        self.preparation.mkdir(parents=True)
        try:
            merged = {name: value for group in settings for name, value in asdict(group).items()}
            (self.preparation / "settings.yaml").write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")
            yield
            self.preparation.replace(self.path)
        finally:
            shutil.rmtree(self.preparation, ignore_errors=True)

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add one line of JSON to a file; a line is written in one go."""
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
