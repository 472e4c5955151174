"""What a run directory says of itself: whole, in part, and broken."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from equipoise.analysis import RunRecord


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_folder_that_says_nothing_is_empty(tmp_path: Path) -> None:
    assert RunRecord.read(tmp_path) == RunRecord()


def test_everything_is_read(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"seed": 3}))
    (tmp_path / "training.json").write_text('{"steps": 40}')
    # A step that was done again after a kill counts once, as it was done last; a line without measures stays out.
    write_lines(
        tmp_path / "metrics.jsonl",
        [
            {"step": 10, "tokens": 100, "lm_loss": 5.0, "max_vio_batch": [1.0, 2.0]},
            {"step": 20, "tokens": 200, "lm_loss": 9.0},
            {"step": 20, "tokens": 200, "lm_loss": 4.0, "max_vio_batch": [3.0, 4.0]},
            {"step": 30, "tokens": 300, "lm_loss": None},
        ],
    )
    for step in (10, 20, 30):
        (tmp_path / "checkpoints" / f"step-{step:08}" / "model").mkdir(parents=True)
    record = RunRecord.read(tmp_path)
    assert (record.settings, record.training) == ({"seed": 3}, {"steps": 40})
    assert record.series("lm_loss") == [(10, 100, 5.0), (20, 200, 4.0)]
    # The checkpoint of the last step is the model itself.
    assert sorted(record.checkpoints) == [10, 20]
    assert record.late("max_vio_batch") == [3.0, 4.0]
    assert record.late("max_vio_micro") == []


def test_late_is_the_mean_over_the_last_tenth(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": n, "tokens": n, "max_vio_batch": [n, 2 * n]} for n in range(30)])
    assert RunRecord.read(tmp_path).late("max_vio_batch") == [28.0, 56.0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", '{"step": 1', r"metrics\.jsonl must hold one JSON object a line; got .* on line 1"),
        ("training.json", "{", r"training\.json must hold JSON; got"),
        ("settings.yaml", "a: [", r"settings\.yaml must hold YAML; got"),
    ],
)
def test_a_broken_file_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        RunRecord.read(tmp_path)
