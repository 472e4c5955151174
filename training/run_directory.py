"""The run directory: one training run is one folder that anyone can zip and understand."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from ..configuration import DataSettings, ModelSettings, RunSettings, TrainingSettings
from ..data import write_json, write_whole

# What a resumed run may not change: it would not be the same blocks in the same order. (Whether it is the same text,
# `data.json` tells; where it lies may change.)
_FIXED = {
    DataSettings: {"block_size", "micro_batch_domains"},
    TrainingSettings: {"seed", "micro_batch_size", "global_batch_size"},
    ModelSettings: set[str](),  # a checkpoint says itself which models it fits
}


class RunDirectory:
    """Where a run keeps what it makes.

    ```
    settings.yaml        every setting; `scripts/train.py settings.yaml --output_dir NEW` repeats the run
    data.json            what it was trained on: each domain's source, content, weight
    tokenizer/           the tokenizer the text was cut with
    validation.parquet   the held-out documents (text, domain)
    status.json          running, stopped, failed or finished; at which step, when, and why
    metrics.jsonl        one line per logging step
    load.jsonl           one line per logging step: selections of each expert in one global batch, by layer
    skipped.jsonl        the steps the guard did not make: why, and which blocks they held
    checkpoints/         the newest ones, from which it can be resumed; each holds a model for `from_pretrained`
    training.json        what the finished run was and cost
    model/               weights, configuration and tokenizer of the finished run, for `from_pretrained`
    ```

    Evaluation adds `evaluation.json`, analysis the folder `analysis/`, and the summary of all three `summary.json`.

    Args:
        path: the folder.
        resume: it may hold a run, to go on with.

    Raises:
        ValueError: the folder holds something that is no run to resume.
    """

    def __init__(self, path: str | Path, *, resume: bool = False) -> None:
        self.path = Path(path)
        self.resumed = resume and (self.path / "settings.yaml").is_file()
        """Whether there is a run already."""
        self.stopped: str | None = None
        """Why the run was stopped before its end; `None` if it was not."""
        if not self.resumed and self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            rule = "hold a run, or be new or empty" if resume else "be new or empty, a run is never overwritten"
            hint = "" if resume else "; to go on with a run: --resume"
            raise ValueError(f"output_dir must {rule}; got {self.path}{hint}")
        self.preparation = self.path.absolute().with_name(f".{self.path.name}.preparing")
        """Where the run directory is put together before training starts."""
        self.checkpoints = self.path / "checkpoints"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else trains into this folder meanwhile; what a killed process held is free at once.

        Raises:
            ValueError: another process holds it, and goes on holding it for a minute.
        """
        try:
            with FileLock(self.path / ".lock", timeout=60):
                yield
        except Timeout as error:
            raise ValueError(f"output_dir must not be in use by another run; got {self.path}, which is") from error

    def settled(self, settings: RunSettings) -> RunSettings:
        """The settings to go on with: those given, where they agree with the run's.

        Raises:
            ValueError: they name other data, another order or another batch than the run has.
        """
        kept = yaml.safe_load((self.path / "settings.yaml").read_text(encoding="utf-8"))
        settled = []
        for group in settings:
            for name in _FIXED[type(group)]:
                given, ran = getattr(group, name), kept.get(name)
                if name == "global_batch_size" and given is None:
                    group = replace(group, global_batch_size=ran)
                elif given != ran:
                    raise ValueError(f"{name} must stay as it was when a run is resumed ({ran}); got {given}")
            settled.append(group)
        return tuple(settled)  # type: ignore[return-value]

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Put the run directory together beside its place; when the block ends well it is moved there, else removed.

        So a run that was refused leaves nothing behind, and can be started again under the same name.
        """
        shutil.rmtree(self.preparation, ignore_errors=True)  # left by a process that was killed
        self.preparation.mkdir(parents=True)
        try:
            yield
            self.preparation.replace(self.path)
        finally:
            shutil.rmtree(self.preparation, ignore_errors=True)

    def write_settings(self, settings: RunSettings, folder: Path) -> None:
        """Keep every setting of the run in `settings.yaml`."""
        merged = {name: value for group in settings for name, value in asdict(group).items() if name != "resume"}
        text = yaml.safe_dump(merged, sort_keys=False)
        write_whole(folder / "settings.yaml", lambda file: file.write_text(text, encoding="utf-8"))

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add one line of JSON to a file; a line is written in one go."""
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def tidy(self, step: int) -> None:
        """Make of what a killed run left what it was after `step`: remove files half-written, lines of steps that will
        be made again, and lines cut short."""
        for left in [*self.path.glob(".*"), *self.checkpoints.glob(".*")]:
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != ".lock":
                left.unlink()
        for file in sorted(self.path.glob("*.jsonl")):
            kept = []
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
                try:
                    made = json.loads(line)["step"]
                except (ValueError, KeyError, TypeError):
                    break  # a power cut may leave what was never written
                if line.endswith("\n") and made <= step:
                    kept.append(line)
            write_whole(file, partial(Path.write_text, data="".join(kept), encoding="utf-8"))

    def set_status(self, state: str, step: int, reason: str | None = None) -> None:
        """Say in `status.json` how the run stands: `running`, `stopped` (to be resumed), `failed` or `finished`; after
        how many steps, since when, and why."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_json(self.path / "status.json", {"state": state, "step": step, "reason": reason, "time": now})


__all__ = ["RunDirectory"]
