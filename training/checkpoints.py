"""Checkpoints: written whole or not at all, found again, and read without unpickling anything.

```
checkpoints/step-00001000/
    model/           weights, configuration and tokenizer: loads with `from_pretrained`
    optimizer/       AdamW's moments, in shards that any number of processes can read (safetensors)
    state.json       where the run stands: step, tokens, data, balancer, guard, sums not yet logged
    checksums.json   size and SHA-256 of each of these files, written last
```
"""

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

# What a run of one process is told at each checkpoint.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
_CHECKSUMS = "checksums.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or there is none to go on from."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk."""

    path: Path

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return int(self.path.name.removeprefix("step-"))

    @property
    def model(self) -> Path:
        """A folder for `from_pretrained`."""
        return self.path / "model"

    def state(self) -> dict[str, Any]:
        """What the loop gave to `Checkpoints.save`."""
        return json.loads((self.path / "state.json").read_text(encoding="utf-8"))

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Fill the optimizer of a model, sharded in any way; every process must call it."""
        state: dict[str, Any] = {**get_optimizer_state_dict(model, optimizer, options=_FLAT)}
        tensors = _tensors(state)
        reader = HuggingFaceStorageReader(str(self.path / "optimizer"))
        dcp.load(tensors, storage_reader=reader)
        set_optimizer_state_dict(model, optimizer, state | tensors, options=_FLAT)

    def defect(self) -> str | None:
        """What is wrong with the files; `None` if they are as they were written."""
        try:
            checksums = json.loads((self.path / _CHECKSUMS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{_CHECKSUMS} cannot be read: {error}"
        for name, written in checksums.items():
            file = self.path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != written["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {written['bytes']}"
            if _sha256(file) != written["sha256"]:
                return f"{name} has changed since it was written"
        return None


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: where they lie; made with the first.
        keep: how many of the newest stay.
        background: write in the background, from a copy in memory; at most one at a time.
    """

    def __init__(self, folder: Path, *, keep: int, background: bool) -> None:
        self.folder, self.keep, self.background = folder, keep, background
        self._main = not dist.is_initialized() or dist.get_rank() == 0
        # Its own group: what is written in the background talks while training talks too.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._saved_step: int | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        state: dict[str, Any],
        save_model: Callable[[Path], Any],
    ) -> None:
        """Save a step; every process must call it. Nothing happens if it is the step that was saved last.

        Args:
            model: that of the optimizer.
            optimizer: `None` where its state cannot be had: such a checkpoint holds a model and cannot be resumed.
            state: JSON-able; that of the first process is kept.
            save_model: called on the first process with a folder, perhaps while training goes on: it must hold a copy
                of the weights.

        Raises:
            CheckpointError: this checkpoint, or one before it that was being written, could not be.
        """
        self.wait()
        if step == self._saved_step:
            return
        target = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{target.name}.saving"
        if self._main:
            with self._failing_clearly(target, temporary):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        if self._group is not None:
            dist.barrier(self._group)  # nobody writes into a folder that is not there
        written = None
        if optimizer is not None:
            moments = _tensors(get_optimizer_state_dict(model, optimizer, options=_FLAT))
            written = _write_shards(moments, temporary / "optimizer", self._group)  # has copied them when it returns
        self._pending = self._writer.submit(self._finish, target, temporary, written, json.dumps(state), save_model)
        self._saved_step = step
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Wait until what is being written is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait, and end the background."""
        self.wait()
        self._writer.shutdown()

    def _finish(
        self,
        target: Path,
        temporary: Path,
        written: Future | None,
        state: str,
        save_model: Callable[[Path], Any],
    ) -> None:
        with self._failing_clearly(target, temporary):
            if written is not None:
                written.result()
            if not self._main:
                return
            save_model(temporary / "model")
            (temporary / "state.json").write_text(state, encoding="utf-8")
            files = [file for file in sorted(temporary.rglob("*")) if file.is_file()]
            checksums = {
                file.relative_to(temporary).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
                for file in files
            }
            (temporary / _CHECKSUMS).write_text(json.dumps(checksums, indent=2) + "\n", encoding="utf-8")
            for path in (*files, temporary / _CHECKSUMS, *(path for path in temporary.rglob("*") if path.is_dir())):
                _to_disk(path)
            _remove(target)  # a defective one of this name, that was skipped
            temporary.replace(target)
            _to_disk(self.folder)
            for old in self.found()[: -self.keep]:
                _remove(old.path)

    @contextmanager
    def _failing_clearly(self, target: Path, temporary: Path) -> Iterator[None]:
        """Turns what goes wrong while a checkpoint is written into one sentence, and leaves nothing of it."""
        try:
            yield
        except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
            shutil.rmtree(temporary, ignore_errors=True)
            found = self.found()
            kept = f"the newest before it is {found[-1].path.name}" if found else "there is none before it"
            raise CheckpointError(f"{target.name} could not be written: {_cause(error)}; {kept}") from error

    def found(self) -> list[Checkpoint]:
        """All of them, by step, oldest first. (Not by date: clocks are set back.)"""
        return sorted((Checkpoint(path) for path in self.folder.glob("step-*")), key=lambda found: found.step)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; `None` if there is none at all.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        defects = []
        for checkpoint in reversed(self.found()):
            defect = checkpoint.defect()
            if defect is None:
                return checkpoint
            defects.append(f"{checkpoint.path.name}: {defect}")
            warnings.warn(f"checkpoint {checkpoint.path.name} is skipped: {defect}", stacklevel=2)
        if defects:
            raise CheckpointError(f"a checkpoint to resume from must be whole; got {'; '.join(defects)}")
        return None


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """What an optimizer has learned; its settings are the run's."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _write_shards(tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> Future:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    written = dcp.async_save(tensors, storage_writer=writer, process_group=group)
    assert isinstance(written, Future)
    return written


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _cause(error: BaseException) -> BaseException:
    """What went wrong on some process, where torch wraps it with all processes' stacks."""
    if isinstance(error, dcp.CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def _to_disk(path: Path) -> None:
    """What was written survives a power cut from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a folder that looks whole until it is gone."""
    if path.exists():
        removed = path.with_name(f".{path.name}.{time.monotonic_ns()}.removing")
        path.replace(removed)
        shutil.rmtree(removed)


__all__ = ["Checkpoint", "CheckpointError", "Checkpoints"]
