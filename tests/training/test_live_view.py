"""What TensorBoard and trackio are given to show."""

import re
from pathlib import Path

import pytest
from training_runs import settings, written

from equipoise.configuration import parse_run_settings
from equipoise.training import train
from equipoise.training.panels import TENSORBOARD_LAYOUT, panels, start_trackers

RECORD = {
    "lm_loss": 2.5,
    "aux_loss": 0.01,
    "load_balancing_loss": 1.1,
    "router_z_loss": 3.0,
    "domain_loss": {"code": 2.0, "law": 3.0},
    "load_balancing_loss_batch": [1.0, 1.1],
    "max_vio_batch": [0.5, 1.5],
    "max_vio_micro": [1.5, 2.5],
    "load_entropy": [0.9, 0.7],
    "dead_experts": [0, 2],
    "bias_range": [0.1, 0.2],
    "step_seconds": {"data": 0.1, "forward": 0.2},
}


def shown() -> dict[str, list[str]]:
    """Chart of the layout -> the tags that it shows: TensorBoard takes those that a pattern matches from the start."""
    tags = panels(RECORD)
    return {
        title: [tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns)]
        for charts in TENSORBOARD_LAYOUT.values()
        for title, (_, patterns) in charts.items()
    }


def test_every_chart_of_the_layout_shows_what_its_title_says() -> None:
    """A pattern that matches nothing leaves an empty chart, one that matches too much an unreadable one: on the scale
    of the language-model loss what balancing adds is a line at 0."""
    assert shown() == {
        "Language-model loss by domain": ["loss_by_domain/code", "loss_by_domain/law"],
        "Language-model loss": ["loss/lm_loss"],
        "What balancing adds, and its terms without coefficients": [
            "loss/aux_loss", "loss/load_balancing_loss", "loss/router_z_loss",
        ],
        "MaxVio of the global batch": ["max_vio_batch_by_layer/0", "max_vio_batch_by_layer/1"],
        "MaxVio of a micro-batch": ["max_vio_micro_by_layer/0", "max_vio_micro_by_layer/1"],
        "Entropy of the load, 1 when even": ["load_entropy_by_layer/0", "load_entropy_by_layer/1"],
        "Dead experts": ["dead_experts_by_layer/0", "dead_experts_by_layer/1"],
        "Load-balancing loss of the global batch": [
            "load_balancing_loss_batch_by_layer/0", "load_balancing_loss_batch_by_layer/1",
        ],
        "Range of the selection biases": ["bias_range_by_layer/0", "bias_range_by_layer/1"],
        "MaxVio, worst layer": ["balance/max_vio_batch_worst", "balance/max_vio_micro_worst"],
        "MaxVio, mean over layers": ["balance/max_vio_batch_mean", "balance/max_vio_micro_mean"],
        "Seconds of a step by phase": ["step_seconds/data", "step_seconds/forward"],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["trackio", "nothing_like_it"])
def test_a_tracker_that_is_not_there_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Accelerate leaves it out without a word, and at the end of a run nothing has been logged."""
    monkeypatch.setattr("equipoise.training.panels.get_available_trackers", lambda: ["tensorboard"])
    flags = [written(tmp_path, settings(corpus, tmp_path / "run")), "--trackers", "tensorboard", name]
    with pytest.raises(ValueError, match=rf"trackers must be among those .* installed \(tensorboard\); got {name}"):
        train(parse_run_settings(flags))
    assert not (tmp_path / "run").exists()


def test_trackio_names_a_run_by_its_folder_and_goes_on_with_it() -> None:
    """By itself it draws a name at each start, and a run that is resumed would be two."""
    given = []

    class Recorder:
        trackers = ()

        def init_trackers(self, *arguments: object, **options: object) -> None:
            given.append((arguments, options))

    start_trackers(Recorder(), {"output_dir": "runs/mine/", "domains": ["code"], "seed": 3})
    assert given == [
        (
            ("equipoise",),
            {
                "config": {"output_dir": "runs/mine/", "domains": "['code']", "seed": 3},
                "init_kwargs": {"trackio": {"name": "mine", "resume": "allow"}},
            },
        )
    ]
