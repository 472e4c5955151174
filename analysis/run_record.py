"""What a run directory says of its training: settings, data, the lines it logged."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .load_history import LoadHistory
from .run_lines import read_lines


@dataclass(frozen=True)
class RunRecord:
    """What is known of how a model was trained; a part that is not there is empty."""

    settings: dict[str, Any] = field(default_factory=dict)
    """`settings.yaml`"""
    data: dict[str, Any] = field(default_factory=dict)
    """`data.json`: domain -> source, weight, documents, bytes"""
    training: dict[str, Any] = field(default_factory=dict)
    """`training.json`, which a finished run writes"""
    status: dict[str, Any] = field(default_factory=dict)
    """`status.json`"""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """`evaluation.json`"""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """The lines of `metrics.jsonl`, of a step done twice the last, in the steps' order."""
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """The lines of `skipped.jsonl`."""
    load: LoadHistory | None = None
    """`load.jsonl`"""
    checkpoints: dict[int, Path] = field(default_factory=dict)
    """Step -> the model of a checkpoint, but for that of the last step, which is the model itself."""

    @classmethod
    def read(cls, run: Path) -> "RunRecord":
        """
        Raises:
            ValueError: a file is not valid.
        """
        lines = {name: _lines(run / f"{name}.jsonl") for name in ("metrics", "skipped")}
        metrics = sorted({line["step"]: line for line in lines["metrics"] if "step" in line}.items())
        steps = {int(path.parent.name.removeprefix("step-")): path for path in run.glob("checkpoints/step-*/model")}
        last = max([*steps, *(step for step, _ in metrics)], default=0)
        return cls(
            settings=_read(run / "settings.yaml"),
            data=_read(run / "data.json"),
            training=_read(run / "training.json"),
            status=_read(run / "status.json"),
            evaluation=_read(run / "evaluation.json"),
            metrics=[line for _, line in metrics],
            skipped=lines["skipped"],
            load=LoadHistory.from_run(run) if (run / "load.jsonl").is_file() else None,
            checkpoints={step: path for step, path in steps.items() if step < last},
        )

    def series(self, name: str) -> list[tuple[int, int, Any]]:
        """Step, tokens seen and value of each line that holds `name`."""
        return [
            (line["step"], line["tokens"], line[name])
            for line in self.metrics
            if line.get(name) is not None and "tokens" in line
        ]

    def late(self, name: str) -> list[float]:
        """Mean of a measure by layer over the last tenth of the lines that hold it, at least the last; [] if none."""
        values = [value for _, _, value in self.series(name)]
        late = values[-max(1, len(values) // 10) :]
        return [sum(layer) / len(late) for layer in zip(*late, strict=True)]


def _lines(file: Path) -> list[dict[str, Any]]:
    return read_lines(file) if file.is_file() else []


def _read(file: Path) -> dict[str, Any]:
    """A record as a mapping; an empty one where there is none."""
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8")
    try:
        return yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} must hold {file.suffix[1:].upper()}; got {error}") from error


__all__ = ["RunRecord"]
