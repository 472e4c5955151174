"""Rows of a task: from the Hub, or from local files of the same columns."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset
from datasets.exceptions import DatasetsError

from .tasks import GATHERED, Task

Row = dict[str, Any]
_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def load_rows(task: Task, data: Path | None = None) -> tuple[list[Row], list[Row] | None]:
    """The rows that the task's items are made of, and those that its shots are drawn from.

    Args:
        data: Local data instead of the task's source: a file, or a folder that holds `<split>.jsonl` (or json,
            parquet, csv), or `<config>/<split>.jsonl`.

    Returns:
        Rows with the task's columns; None for the shots where they are drawn from the items themselves.

    Raises:
        ValueError: there is no such data, it cannot be read, or it lacks a column; the Hub cannot be reached. The
            message names the task and the field.
    """
    source, shots_split = task.source, task.shots.split if task.shots.number else None
    if data is not None:
        if not data.exists():
            raise ValueError(f"task_data must name a file or a folder; got {data} for {task.name}, which is none")
        if data.is_file():
            rows, shots = _read_files(task, [data]), None
        else:
            rows = _read_folder(task, data, source.split or "test")
            shots = _read_folder(task, data, shots_split) if shots_split else None
    elif source.hub is not None:
        rows = _load_hub(task, str(source.split))
        shots = _load_hub(task, shots_split) if shots_split else None
    else:
        files = list(source.files)
        if source.gathered is not None:
            files = [GATHERED / f"{source.gathered}.jsonl"]
            if not files[0].is_file():
                raise ValueError(
                    f"{task.name}: source.gathered must have been gathered (python scripts/prepare_data.py --corpus "
                    f"task_items), or its file be given with --task_data {task.name}=PATH; got no {files[0]}"
                )
        rows, shots = _read_files(task, files), None
    if task.where is not None:
        try:
            rows = [row for row in rows if task.where(row)]
        except ValueError as error:
            raise ValueError(f"{task.name}: where must suit every row; got {error}") from error
    if not rows:
        raise ValueError(f"{task.name}: source must hold at least one item; got none")
    return rows, shots


def _load_hub(task: Task, split: str) -> list[Row]:
    source = task.source
    rows = []
    for config in source.config or (None,):
        try:
            loaded = load_dataset(str(source.hub), config, split=split, revision=source.revision)
        # what `datasets` raises for names, for connections, for data sets that are programs and for broken files
        except (ValueError, OSError, RuntimeError, DatasetsError) as error:
            raise ValueError(
                f"{task.name}: source must be a data set that the Hub, or its cache here, has (or give its rows with "
                f"--task_data {task.name}=PATH); got {source.hub}, config {config}, split {split}: "
                f"{' '.join(str(error).split())}"
            ) from error
        where = f"{source.hub}, config {config}"
        columns = [name for name in task.columns if name in loaded.column_names]
        rows += _checked(task, loaded.select_columns(columns).to_list(), where, config)
    return rows


def _read_folder(task: Task, folder: Path, split: str) -> list[Row]:
    configs = [config for config in task.source.config if (folder / config).is_dir()]
    places: list[tuple[str | None, Path]] = [(config, folder / config) for config in configs]
    rows = []
    for config, place in places or [(None, folder)]:
        found = [place / f"{split}{suffix}" for suffix in _SUFFIXES if (place / f"{split}{suffix}").is_file()]
        if not found:
            raise ValueError(
                f"task_data must be a file, or a folder with {split}.jsonl (or {', '.join(_SUFFIXES[1:])}); "
                f"got {place} for {task.name}"
            )
        rows += _read_files(task, found, config)
    return rows


def _read_files(task: Task, files: list[Path], config: str | None = None) -> list[Row]:
    rows = []
    for file in files:
        if file.suffix not in _SUFFIXES:
            raise ValueError(f"{task.name}: its files must be {', '.join(_SUFFIXES)}; got {file}")
        try:
            rows += _checked(task, _read(file), str(file), config)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, pa.ArrowInvalid, csv.Error) as error:
            raise ValueError(f"{task.name}: {file} must be readable as {file.suffix}; got {error}") from error
    return rows


def _read(file: Path) -> list[Any]:
    if file.suffix == ".parquet":
        return pq.read_table(file).to_pylist()
    with file.open(encoding="utf-8-sig", newline="") as stream:
        if file.suffix == ".csv":
            return list(csv.DictReader(stream))
        if file.suffix == ".json":
            return json.load(stream)
        return [json.loads(line) for line in stream if line.strip()]


def _checked(task: Task, rows: Any, where: str, config: str | None) -> list[Row]:
    """Rows that have the task's columns, and `config` where the task has configurations."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{task.name}: {where} must hold rows of columns; got {type(rows).__name__}")
    configs = task.source.config
    if config is None and len(configs) == 1:
        config = configs[0]
    columns = (*task.columns, "config") if configs else task.columns
    if configs and config is not None:
        rows = [{"config": config} | row for row in rows]
    for number, row in enumerate(rows):
        if missing := [name for name in columns if name not in row]:
            raise ValueError(
                f"{task.name}: columns must be in every row of {where}; got no {missing[0]} in row {number}, "
                f"which has {', '.join(map(str, row))}"
            )
    return rows
