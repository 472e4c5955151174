"""Reading the load over training from a run directory."""

import json
import math
from pathlib import Path

import pytest

from equipoise.analysis import LoadHistory


def write(file: Path, records: list[dict]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_reads_both_files_by_step(tmp_path: Path) -> None:
    write(
        tmp_path / "load.jsonl",
        [
            {"step": 10, "load": [[1, 2, 3], [4, 5, 6]]},
            {"step": 20, "load": [[0, 0, 0], [0, 0, 0]]},
            {"step": 20, "load": [[3, 3, 0], [1, 1, 4]]},  # done again after a resumption
            {"step": 30, "load": [[2, 2, 2], [2, 2, 2]]},
        ],
    )
    write(
        tmp_path / "metrics.jsonl",
        [
            {"step": 10, "loss": 3.0, "max_vio_micro": [0.5, 1.5]},
            {"step": 20, "validation_loss": 2.0},
            {"step": 30, "loss": 2.0, "max_vio_micro": [0.25, 0.75]},
        ],
    )
    history = LoadHistory.from_run(tmp_path)
    assert history.steps.tolist() == [10, 20, 30]
    assert history.load.tolist() == [[[1, 2, 3], [4, 5, 6]], [[3, 3, 0], [1, 1, 4]], [[2, 2, 2], [2, 2, 2]]]
    assert history.max_vio_micro[[0, 2]].tolist() == [[0.5, 1.5], [0.25, 0.75]]
    assert all(math.isnan(value) for value in history.max_vio_micro[1])


def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"load.jsonl must be in the run directory; got none at"):
        LoadHistory.from_run(tmp_path)
    write(tmp_path / "load.jsonl", [])
    with pytest.raises(ValueError, match=r"load.jsonl must hold at least one line with step and load"):
        LoadHistory.from_run(tmp_path)
    (tmp_path / "load.jsonl").write_text('{"step": 1, "load": [[1]]}\n{"step": 2, "lo')
    with pytest.raises(ValueError, match=r"load.jsonl must hold one JSON object a line; got .* on line 2"):
        LoadHistory.from_run(tmp_path)
