"""Load over training, as a run directory records it.

Shapes: S logging steps, L MoE layers, E experts.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .run_lines import read_lines


@dataclass(frozen=True)
class LoadHistory:
    """The load of the global batch at each logging step, and MaxVio within its micro-batches."""

    steps: Tensor
    """`[S]` int64, rising."""
    load: Tensor
    """`[S, L, E]` int64: tokens of the global batch that selected the expert."""
    max_vio_micro: Tensor
    """`[S, L]` float32: mean MaxVio of a micro-batch; NaN where it was not logged."""

    @classmethod
    def from_run(cls, run: str | Path) -> "LoadHistory":
        """Reads `load.jsonl` and, where it is there, `metrics.jsonl`.

        Raises:
            ValueError: `load.jsonl` is missing, holds no line, or a line is not valid.
        """
        loads = _by_step(Path(run) / "load.jsonl", "load")
        if not loads:
            raise ValueError(f"load.jsonl must hold at least one line with step and load; got none in {run}")
        metrics = Path(run) / "metrics.jsonl"
        micro = _by_step(metrics, "max_vio_micro") if metrics.is_file() else {}
        steps = sorted(loads)
        load = torch.tensor([loads[step] for step in steps])
        unknown = [float("nan")] * load.shape[1]
        return cls(
            steps=torch.tensor(steps),
            load=load,
            max_vio_micro=torch.tensor([micro.get(step, unknown) for step in steps], dtype=torch.float32),
        )


def _by_step(file: Path, name: str) -> dict[int, list]:
    """The value called `name` of each line that has one. Of a step done twice, the last."""
    values = {}
    for record in read_lines(file):
        if name in record:
            if "step" not in record:
                raise ValueError(f"{file.name} must name the step of each line; got {record}")
            values[record["step"]] = record[name]
    return values
