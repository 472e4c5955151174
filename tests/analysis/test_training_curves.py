"""The course of a training as a picture: from any run's lines, whole or sparse."""

from pathlib import Path
from typing import Any

import pytest
from test_figures import check_picture

from equipoise.analysis.training_curves import training_figure


def line(step: int, domains: int) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * 8192,
        "lm_loss": 8 / step,
        "domain_loss": {f"a domain of number {number}": 8 / step + number for number in range(domains)},
        "grad_norm": 1 / step if step % 3 else None,
        "learning_rate": 1e-3,
        "tokens_per_second": 1e4,
        "step_seconds": {"data": 0.1, "forward": 1.0, "backward": 2.0, "synchronisation": 0.1, "optimizer": 0.2},
    }


@pytest.mark.parametrize(("steps", "domains"), [(1, 1), (40, 2), (40, 20)])
def test_training_figure(steps: int, domains: int, tmp_path: Path) -> None:
    records = [line(step, domains) for step in range(1, steps + 1)]
    figure = training_figure(records)
    check_picture(figure, tmp_path / "training.png")
    losses, by_domain = figure.axes[:2]
    assert losses.lines[0].get_ydata().tolist() == [record["lm_loss"] for record in records]
    assert len(by_domain.lines) == domains
    assert len({line.get_color().__str__() for line in by_domain.lines}) == domains  # no two domains look alike


def test_lines_that_lack_things_are_drawn(tmp_path: Path) -> None:
    # A line after which every step was skipped, and one of an older run.
    check_picture(training_figure([line(1, 2), {"step": 2, "tokens": 9000}, line(3, 1)]), tmp_path / "training.png")
